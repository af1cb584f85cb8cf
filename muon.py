"""The hybrid optimizer: Muon for every hidden matrix, AdamW for embedding, head, norms and router.

Both read gradients as `gradient * factor` in fp32, where the factor holds 1 / loss scale and clipping, so `.grad` is
never rewritten and all state is unscaled; both update fp32 masters (see precision.py).
"""
import math

import torch
from torch import Tensor, nn

from precision import OptimizerState, read_master, write_master

# Keller Jordan's quintic: steepest at zero, singular values end between about 0.7 and 1.2
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5


def newton_schulz(matrices: Tensor, dtype: torch.dtype, coefficients=NEWTON_SCHULZ) -> Tensor:
    """Approximately orthogonalises each matrix of `matrices` [..., rows, columns]: U S V^T becomes about U V^T.

    Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Each step maps every singular
    value s to a s + b s^3 + c s^5. Matrices are normalised in fp32 before they are cast to `dtype` for the products, so
    small gradients are treated as large ones. Returns `dtype`.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (matrices / norm.clamp(min=1e-30)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:                      # the Gram matrix is of the shorter side
        x = x.mT
    x = x.reshape(-1, *x.shape[-2:])
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class Muon:
    """Momentum, orthogonalised (Newton-Schulz), with decoupled weight decay, on each matrix of each parameter.

    A parameter [..., rows, columns] is a bank of matrices that are updated one by one, so an expert bank takes no more
    workspace than a few experts. A matrix whose gradient is exactly zero (an expert that received no token) keeps
    weight and momentum: its update would otherwise have full size for hundreds of steps, as Muon's is scale-invariant.
    """

    def __init__(self, parameters: dict[str, Tensor], momentum: float, weight_decay: float, offload: bool = False):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.state = OptimizerState(parameters, ("momentum",), muon_momentum_dtype, offload, matrices=True)

    @torch.no_grad()
    def step(self, lr: float, factor: float) -> None:
        """Updates the parameters with learning rate `lr`; gradients are read as gradient * factor."""
        for _, weight, gradient, state in self.state.pieces():
            active = (gradient != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)    # [n, 1, 1]
            gradient = gradient.float() * factor
            momentum = torch.add(gradient, state["momentum"], alpha=self.momentum)     # fp32, and a new tensor
            nesterov = gradient.add_(momentum, alpha=self.momentum)
            state["momentum"].copy_(torch.where(active, momentum, state["momentum"]))
            update = newton_schulz(nesterov, product_dtype(weight.device)).float()
            rows, columns = weight.shape[-2:]
            step = lr * active
            master = read_master(weight, state)
            master.mul_(1 - step * self.weight_decay).sub_(update.mul_(step * math.sqrt(max(1, rows / columns))))
            write_master(master, weight, state)

    def state_dict(self) -> dict:
        return dict(state=self.state.state_dict())

    def load_state_dict(self, saved: dict) -> None:
        self.state.load_state_dict(saved["state"])


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) in fp32 on the fp32 masters; norms (vectors) are not decayed."""

    def __init__(self, parameters: dict[str, Tensor], beta1: float, beta2: float, eps: float, weight_decay: float,
                 offload: bool = False):
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.steps = 0
        self.state = OptimizerState(parameters, ("exp_avg", "exp_avg_sq"), lambda p: torch.float32, offload, matrices=False)

    @torch.no_grad()
    def step(self, lr: float, factor: float) -> None:
        """Updates the parameters with learning rate `lr`; gradients are read as gradient * factor."""
        self.steps += 1
        correction1, correction2 = 1 - self.beta1 ** self.steps, 1 - self.beta2 ** self.steps
        for _, weight, gradient, state in self.state.pieces():
            gradient = gradient.float() * factor
            state["exp_avg"].lerp_(gradient, 1 - self.beta1)
            state["exp_avg_sq"].mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            denominator = (state["exp_avg_sq"].sqrt() / math.sqrt(correction2)).add_(self.eps)
            master = read_master(weight, state)
            if weight.ndim >= 2:
                master.mul_(1 - lr * self.weight_decay)
            master.addcdiv_(state["exp_avg"], denominator, value=-lr / correction1)
            write_master(master, weight, state)

    def state_dict(self) -> dict:
        return dict(state=self.state.state_dict(), steps=self.steps)

    def load_state_dict(self, saved: dict) -> None:
        self.state.load_state_dict(saved["state"])
        self.steps = saved["steps"]


def muon_momentum_dtype(parameter: Tensor) -> torch.dtype:
    """bfloat16 for 16-bit weights (fp16 would under- and overflow), fp32 for fp32 ones."""
    return torch.float32 if parameter.dtype == torch.float32 else torch.bfloat16


def product_dtype(device: torch.device) -> torch.dtype:
    """Newton-Schulz runs in bfloat16 on a GPU (the standard form is stable in it), in fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def split_parameters(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(hidden matrices for Muon, everything else for AdamW) by name; each parameter is in exactly one of them."""
    named = dict(model.named_parameters())
    hidden = {name: p for name, p in named.items()
              if name.startswith("blocks.") and p.ndim >= 2 and ".router." not in name}
    others = {name: p for name, p in named.items() if name not in hidden}
    assert len(hidden) + len(others) == len(named) and not hidden.keys() & others.keys()
    return hidden, others
