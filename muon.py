"""The hybrid optimizer: Muon for every hidden matrix, AdamW for embedding, head, norms and router.

Both read gradients as `gradient * factor` in fp32, where the factor holds 1 / loss scale and clipping, so `.grad` is
never rewritten and all state is unscaled; both update fp32 masters (see precision.py).
"""

import functools
import math

import torch
from torch import Tensor, nn

from engine.offload import OptimizerState
from engine.precision import read_master, write_master
from engine.triton_kernels import COMPILE_OPTIONS, symmetric_matmul

# Keller Jordan's quintic: steepest at zero, singular values end between about 0.7 and 1.2
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
RESTART = 2  # step of the Gram form at which the Gram matrix is made anew


def newton_schulz(x: Tensor) -> Tensor:
    """Approximately orthogonalises each matrix of x [n, rows, columns]: U S V^T becomes about U V^T.

    Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Each step maps every singular
    value s to a s + b s^3 + c s^5. Singular values must not exceed 1, as those of a matrix of norm 1 do not.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the Gram matrix is of the shorter side
        x = x.mT
    for a, b, c in NEWTON_SCHULZ:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def gram_newton_schulz(x: Tensor) -> Tensor:
    """`newton_schulz` with the work on the Gram matrix of the shorter side (Gram Newton-Schulz, Dao-AILab 2025).

    Each step multiplies x by a polynomial of x x^T, so the polynomials are gathered in `product`, the Gram matrix follows
    them, and x is touched only at RESTART and at the end. All products but those two are symmetric: half the work. In
    fp16 this is as exact as the standard form in bf16; without the restart rounding makes the Gram matrix indefinite.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
        if step == RESTART:
            x = torch.bmm(product, x)  # noqa: F821
        if step in (0, RESTART):
            gram, product = symmetric_matmul(x, x), None
        polynomial = symmetric_matmul(gram, gram, alpha=c, add=gram, beta=b, diagonal=a)
        product = polynomial if product is None else symmetric_matmul(polynomial, product)
        if step + 1 not in (RESTART, len(NEWTON_SCHULZ)):
            gram = symmetric_matmul(polynomial, symmetric_matmul(gram, polynomial))
    x = torch.bmm(product, x)
    return x.mT if tall else x


def nesterov_direction(
    gradient: Tensor, momentum: Tensor, factor: Tensor, decay: float, out: Tensor
) -> Tensor:
    """Folds gradient * factor into the momentum and writes the Nesterov direction, divided by its norm, to `out`.

    All are [..., rows, columns]; the arithmetic is fp32, and the norm is divided by before the direction is rounded to
    out's dtype, so that small gradients are treated as large ones. A matrix whose gradient is exactly zero keeps its
    momentum. Returns whether each matrix has a gradient, [..., 1, 1].
    """
    active = (gradient != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
    gradient = gradient.float() * factor
    new_momentum = gradient + decay * momentum
    direction = gradient + decay * new_momentum
    norm = direction.square().sum(dim=-1, keepdim=True).sum(dim=-2, keepdim=True).sqrt()
    out.copy_(direction / norm.clamp(min=1e-30))
    momentum.copy_(torch.where(active, new_momentum, momentum))
    return active


def muon_update(
    weight: Tensor,
    state: dict[str, Tensor],
    update: Tensor,
    active: Tensor,
    rate: Tensor,
    decay: Tensor,
) -> None:
    """master <- (1 - decay) master - rate update, for active matrices, on the fp32 masters behind weight and state."""
    master = read_master(weight, state)
    write_master(master * (1 - decay * active) - update.float() * (rate * active), weight, state)


class Muon:
    """Momentum, orthogonalised (Newton-Schulz), with decoupled weight decay, on each matrix of each parameter.

    A parameter [..., rows, columns] is a bank of matrices that are updated one by one, so an expert bank takes no more
    workspace than a few experts. A matrix whose gradient is exactly zero (an expert that received no token) keeps
    weight and momentum: its update would otherwise have full size for hundreds of steps, as Muon's is scale-invariant.

    `fused` (for GPUs) compiles the elementwise work and orthogonalises in Gram form, in fp16; else all is plain PyTorch.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        momentum: float,
        weight_decay: float,
        offload: bool = False,
        fused: bool = False,
        gradients: dict[str, Tensor] = {},
    ):
        self.momentum, self.weight_decay, self.fused = momentum, weight_decay, fused
        self.state = OptimizerState(
            parameters,
            ("momentum",),
            muon_momentum_dtype,
            offload,
            matrices=True,
            gradients=gradients,
        )
        self.dtype = product_dtype(self.state.device, fused)
        self.orthogonalize = gram_newton_schulz if fused else newton_schulz
        self.nesterov_direction, self.muon_update = (
            compiled_for_any_number(f, fused) for f in (nesterov_direction, muon_update)
        )

    @torch.no_grad()
    def step(self, lr: float, factor: float) -> None:
        """Updates the parameters with learning rate `lr`; gradients are read as gradient * factor."""
        scalar = functools.partial(torch.full, (), device=self.state.device)
        factor, decay = scalar(factor), scalar(lr * self.weight_decay)
        for group in self.state.groups():
            counts, (rows, columns) = [len(weight) for weight, _, _ in group], group[0][0].shape[1:]
            x = torch.empty(sum(counts), rows, columns, dtype=self.dtype, device=self.state.device)
            active = [
                self.nesterov_direction(gradient, state["momentum"], factor, self.momentum, part)
                for (_, gradient, state), part in zip(group, x.split(counts))
            ]
            rate = scalar(lr * math.sqrt(max(1, rows / columns)))
            for (weight, _, state), update, alive in zip(
                group, self.orthogonalize(x).split(counts), active
            ):
                self.muon_update(weight, state, update, alive, rate, decay)

    def state_dict(self) -> dict:
        return dict(state=self.state.state_dict())

    def load_state_dict(self, saved: dict) -> None:
        self.state.load_state_dict(saved["state"])


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    factor: Tensor,
    betas: tuple[float, float],
    eps: float,
    corrections: tuple[Tensor, Tensor],
    rate: Tensor,
    decay: Tensor,
) -> None:
    """One AdamW step in fp32 on the masters behind weight and state; `corrections` are 1 - beta^steps."""
    gradient = gradient.float() * factor
    state["exp_avg"].lerp_(gradient, 1 - betas[0])
    state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (state["exp_avg_sq"] / corrections[1]).sqrt() + eps
    master = read_master(weight, state) * (1 - decay) - rate / corrections[0] * (
        state["exp_avg"] / denominator
    )
    write_master(master, weight, state)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) in fp32 on the fp32 masters; norms (vectors) are not decayed."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        offload: bool = False,
        fused: bool = False,
        gradients: dict[str, Tensor] = {},
    ):
        self.betas, self.eps, self.weight_decay = (beta1, beta2), eps, weight_decay
        self.steps = 0
        self.state = OptimizerState(
            parameters,
            ("exp_avg", "exp_avg_sq"),
            lambda p: torch.float32,
            offload,
            False,
            gradients,
        )
        self.adamw_update = compiled(adamw_update, fused, dynamic=True)

    @torch.no_grad()
    def step(self, lr: float, factor: float) -> None:
        """Updates the parameters with learning rate `lr`; gradients are read as gradient * factor."""
        self.steps += 1
        scalar = functools.partial(torch.full, (), device=self.state.device)
        corrections = tuple(scalar(1 - beta**self.steps) for beta in self.betas)
        factor, rate, decays = (
            scalar(factor),
            scalar(lr),
            (scalar(0.0), scalar(lr * self.weight_decay)),
        )
        for group in self.state.groups():
            for weight, gradient, state in group:
                self.adamw_update(
                    weight.flatten(),
                    gradient.flatten(),
                    {k: t.flatten() for k, t in state.items()},
                    factor,
                    self.betas,
                    self.eps,
                    corrections,
                    rate,
                    decays[weight.ndim > 1],
                )

    def state_dict(self) -> dict:
        return dict(state=self.state.state_dict(), steps=self.steps)

    def load_state_dict(self, saved: dict) -> None:
        self.state.load_state_dict(saved["state"])
        self.steps = saved["steps"]


def compiled(function, fused: bool, dynamic: bool = False):
    """The function, or its fused twin: torch.compile makes a kernel or two of its elementwise operations, for each shape or,
    with `dynamic`, for all."""
    return (
        torch.compile(function, fullgraph=True, dynamic=dynamic, options=COMPILE_OPTIONS)
        if fused
        else function
    )


def compiled_for_any_number(function, fused: bool):
    """`compiled` for tensors [n, rows, columns]: a kernel for each rows and columns, whatever n (one of its own for n = 1)."""
    function = compiled(function, fused)

    def call(*arguments):
        for argument in arguments:
            for tensor in argument.values() if isinstance(argument, dict) else (argument,):
                if isinstance(tensor, Tensor) and tensor.ndim == 3 and len(tensor) > 1:
                    torch._dynamo.mark_dynamic(tensor, 0)
        return function(*arguments)

    return call if fused else function


def muon_momentum_dtype(parameter: Tensor) -> torch.dtype:
    """bfloat16 for 16-bit weights (fp16 would under- and overflow), fp32 for fp32 ones."""
    return torch.float32 if parameter.dtype == torch.float32 else torch.bfloat16


def product_dtype(device: torch.device, fused: bool) -> torch.dtype:
    """Newton-Schulz runs in fp32 on a CPU and in 16 bits on a GPU: fp16 in Gram form (bf16 is too coarse for it), bf16 in
    the standard form."""
    return torch.float16 if fused else torch.bfloat16 if device.type == "cuda" else torch.float32


def split_parameters(
    model: nn.Module, optimizer: str = "muon"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(hidden matrices for Muon, everything else for AdamW) by name; each parameter is in exactly one of them. With the
    optimizer "adamw" everything is AdamW's."""
    named = dict(model.named_parameters())
    hidden = {
        name: p
        for name, p in named.items()
        if optimizer == "muon"
        and name.startswith("blocks.")
        and p.ndim >= 2
        and ".router." not in name
    }
    others = {name: p for name, p in named.items() if name not in hidden}
    assert len(hidden) + len(others) == len(named) and not hidden.keys() & others.keys()
    return hidden, others
