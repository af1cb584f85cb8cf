"""The optimizers: Muon for every hidden matrix, AdamW for everything else.

Muon (Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks")
updates a weight matrix W [rows, columns] with gradient G in four steps:

1. Momentum            M <- G + mu M
2. Nesterov            D = G + mu M, the momentum of the next step if its gradient were the same
3. Orthogonalization   O = U V^T, where D = U S V^T is the singular value decomposition
4. Update              W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) O

Step 3 is the point. The gradient of a matrix has a few large singular values and many small ones.
O has the same singular directions, all with singular value 1, so that the rare directions learn
as fast as the common ones. Newton-Schulz approximates O with matmuls alone, which a GPU does fast.

Step 4 makes the effect of an update independent of the matrix's shape. Take a random input x with
entries of size 1: its squared norm is `columns`.
- rows >= columns: O x has the norm of x, spread over more entries. The squared size of an entry is
  columns / rows, and the scale sqrt(rows / columns) makes it 1.
- rows < columns: O x keeps the share rows / columns of the squared norm, which leaves `rows` for
  `rows` entries. Their size is 1 without a scale.

Muon is made for matrices between hidden layers. Embedding, head, norms and router go to AdamW.

Both optimizers read a gradient as `gradient * grad_scale` in fp32, where grad_scale holds
clipping and 1 / loss scale. So `.grad` is never rewritten and all state is unscaled. Both update
fp32 masters (see engine/precision.py), whatever the dtype of the weights.

To add an optimizer: write a class with the constructor, `state`, `step`, `state_dict` and
`load_state_dict` of those below, enter it in OPTIMIZERS, and give it a group of parameters under
the same name in `config.optimizer_groups`.
"""

import math

import torch
from torch import Tensor

from config import Config, optimizer_groups
from engine.offload import GradientOffload, OptimizerState
from engine.ownership import parameter_of
from engine.precision import read_master, write_master
from engine.triton_kernels import COMPILE_OPTIONS, symmetric_matmul

# ---------------------------------------------------------------- Newton-Schulz

# (a, b, c) of each step. A step maps every singular value s to a s + b s^3 + c s^5. Keller Jordan
# chose the coefficients for the steepest slope at zero: a small s grows 3.4 times in a step. The
# price is that singular values end somewhere between about 0.7 and 1.2, instead of at 1.
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5

# The Gram form computes the Gram matrix from x again before this step.
RESTART = 2


def newton_schulz(x: Tensor) -> Tensor:
    """Orthogonalizes each matrix of x [n, rows, columns] approximately: U S V^T becomes U V^T.

    Singular values must not exceed 1. A matrix of Frobenius norm 1 has no larger ones.
    """
    # Of x x^T and x^T x, the one on the shorter side of x is smaller.
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for a, b, c in NEWTON_SCHULZ:
        # gram = U S^2 U^T, so (a I + b gram + c gram^2) x = U (a S + b S^3 + c S^5) V^T
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if tall:
        x = x.mT
    return x


def gram_newton_schulz(x: Tensor) -> Tensor:
    """`newton_schulz` with most work on the Gram matrix (Gram Newton-Schulz, Dao-AILab 2025).

    A step of Newton-Schulz is x <- P x with P = a I + b gram + c gram^2. Then gram = x x^T
    becomes P gram P, for which x itself is not needed. So the steps run on gram, [n, m, m] with m
    the shorter side, and collect the product of all P; x is multiplied with that product at the
    end.

    All these matrices are polynomials of one symmetric matrix: they commute, and their products are
    symmetric. `symmetric_matmul` computes one triangle, which is half the work.

    Why x is multiplied, and gram computed from x again, after RESTART steps:

    - The eigenvalues of an exact gram are squares of singular values, and not negative. Rounding
      errors of the size of its largest eigenvalue, times the precision, may make small eigenvalues
      negative.
    - A step multiplies a small singular value by a, so it multiplies a small eigenvalue, and its
      error, by a^2 = 3.4445^2 = 12. The steps drive a negative eigenvalue away from zero without
      bound. Few steps in a row leave the errors small, and a gram computed from x has new ones.

    Why fp16: with the restart it is as exact here as bf16 in the standard form. bf16, with 8 bits
    of mantissa instead of 11, is too coarse for the Gram form. The range of fp16 is enough. At most
    three steps run in a row, each P is at most about a, and so no entry of their product exceeds
    a^3 = 41. The singular values of x are at most 1.2.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for coefficients in (NEWTON_SCHULZ[:RESTART], NEWTON_SCHULZ[RESTART:]):
        gram = symmetric_matmul(x, x)
        product_of_p = None
        for step, (a, b, c) in enumerate(coefficients):
            # P = a I + b gram + c gram gram
            p = symmetric_matmul(gram, gram, alpha=c, add=gram, beta=b, diagonal=a)
            if product_of_p is None:
                product_of_p = p
            else:
                product_of_p = symmetric_matmul(p, product_of_p)
            # The gram of the last step would not be used.
            if step + 1 < len(coefficients):
                # One expression, so that gram P has no name and is freed at once
                gram = symmetric_matmul(p, symmetric_matmul(gram, p))
        x = torch.bmm(product_of_p, x)
    if tall:
        x = x.mT
    return x


def newton_schulz_dtype(device: torch.device, fused: bool) -> torch.dtype:
    """dtype of the matmuls: 16 bits on a GPU, where they are fastest; fp32 on a CPU."""
    if fused:
        return torch.float16  # the Gram form
    if device.type == "cuda":
        return torch.bfloat16
    return torch.float32


# ---------------------------------------------------------------- Muon


def nesterov_direction(
    gradient: Tensor, momentum: Tensor, grad_scale: Tensor, mu: float, out: Tensor
) -> Tensor:
    """Updates the momentum and writes the Nesterov direction, divided by its norm, to `out`.

    gradient, momentum and out are [..., rows, columns]. Returns booleans [..., 1, 1]: whether a
    matrix is active, which is that its gradient is not exactly zero. A matrix that is not active
    keeps its momentum.
    """
    active = (gradient != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
    gradient = gradient.float() * grad_scale
    new_momentum = gradient + mu * momentum
    direction = gradient + mu * new_momentum
    # The Frobenius norm of each matrix. Divided in fp32, before `out` rounds to 16 bits: in 16 bits
    # small gradients would vanish.
    row_squares = direction.square().sum(dim=-1, keepdim=True)
    norm = row_squares.sum(dim=-2, keepdim=True).sqrt()
    # not 0 / 0 where the gradient and the momentum are zero
    out.copy_(direction / norm.clamp(min=1e-30))
    momentum.copy_(torch.where(active, new_momentum, momentum))
    return active


def muon_update(
    weight: Tensor,
    state: dict[str, Tensor],
    update: Tensor,
    active: Tensor,
    lr: Tensor,
    decay: Tensor,
) -> None:
    """master <- (1 - decay) master - lr update, for the fp32 masters of the active matrices.

    weight and update are [n, rows, columns], active [n, 1, 1].
    """
    master = read_master(weight, state)
    # `active` is 0 or 1: with 0 the master stays as it is.
    write_master(master * (1 - decay * active) - update.float() * (lr * active), weight, state)


def muon_momentum_dtype(parameter: Tensor) -> torch.dtype:
    """bfloat16 for 16-bit weights (fp16 would under- and overflow), fp32 for fp32 weights."""
    if parameter.dtype == torch.float32:
        return torch.float32
    return torch.bfloat16


class Muon:
    """Muon with decoupled weight decay, on every matrix of every parameter.

    A parameter [..., rows, columns] is a bank of matrices that are updated one by one. They pass
    through in buckets, so a bank of experts takes no more workspace than a few of its experts.

    A matrix whose gradient is exactly zero, an expert that received no token, keeps its weight
    and its momentum. Otherwise it would move at full speed for hundreds of steps: the update has
    the same size however small the momentum has become.

    `fused` (for GPUs) compiles the elementwise work and orthogonalizes in Gram form in fp16;
    without it all is plain PyTorch. `offload` keeps the state, and `gradient_offload` some
    gradients, in host memory (see engine/offload.py).
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: Config,
        weight_decay: float,
        offload: bool = False,
        fused: bool = False,
        gradient_offload: GradientOffload | None = None,
    ):
        self.mu = config.muon_momentum
        self.weight_decay = weight_decay
        self.state = OptimizerState(
            parameters,
            ("momentum",),
            muon_momentum_dtype,
            offload,
            matrices=True,
            gradient_offload=gradient_offload,
        )
        self.dtype = newton_schulz_dtype(self.state.device, fused)
        self.orthogonalize = newton_schulz
        self.nesterov_direction = nesterov_direction
        self.muon_update = muon_update
        if fused:
            self.orthogonalize = gram_newton_schulz
            # The number of matrices differs from bucket to bucket.
            self.nesterov_direction = compile_for_any_number(nesterov_direction)
            self.muon_update = compile_for_any_number(muon_update)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float) -> None:
        """Updates the parameters with learning rate `lr`, from gradients times `grad_scale`."""
        device = self.state.device
        # Tensors, because compiled code would be compiled again for each new Python number.
        grad_scale = scalar(grad_scale, device)
        decay = scalar(lr * self.weight_decay, device)
        for bucket in self.state.buckets():
            # The matrices of a bucket have one shape: they are orthogonalized as one batch.
            counts = [len(part.weight) for part in bucket]
            rows, columns = bucket[0].weight.shape[1:]
            directions = torch.empty(sum(counts), rows, columns, dtype=self.dtype, device=device)
            active = []
            for part, direction in zip(bucket, directions.split(counts)):
                momentum = part.state["momentum"]
                active.append(
                    self.nesterov_direction(part.gradient, momentum, grad_scale, self.mu, direction)
                )
            updates = self.orthogonalize(directions).split(counts)
            # Step 4 of the module docstring. The weight decay is not scaled by the shape.
            scaled_lr = scalar(lr * math.sqrt(max(1, rows / columns)), device)
            for part, update, part_active in zip(bucket, updates, active):
                self.muon_update(part.weight, part.state, update, part_active, scaled_lr, decay)

    def state_dict(self) -> dict:
        return dict(state=self.state.state_dict())

    def load_state_dict(self, saved: dict) -> None:
        self.state.load_state_dict(saved["state"])


# ---------------------------------------------------------------- AdamW


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    grad_scale: Tensor,
    betas: tuple[float, float],
    eps: float,
    corrections: tuple[Tensor, Tensor],
    lr: Tensor,
    decay: Tensor,
) -> None:
    """One AdamW step in fp32 on the masters of `weight`. All tensors are flat.

    The moments are running means of the gradient (beta 0) and of its square (beta 1). They start at
    zero, so after t steps the weights of a mean add up to 1 - beta^t instead of 1. `corrections`
    are these two sums: a moment is divided by its own.
    """
    gradient = gradient.float() * grad_scale
    state["exp_avg"].lerp_(gradient, 1 - betas[0])
    state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    # eps is added after the root, as in PyTorch and the paper.
    denominator = (state["exp_avg_sq"] / corrections[1]).sqrt() + eps
    # (1 - decay) master - lr m / (sqrt(v) + eps), with the corrected moments m and v. One
    # expression, so that its temporaries are freed before the master is encoded.
    master = read_master(weight, state) * (1 - decay) - lr / corrections[0] * (
        state["exp_avg"] / denominator
    )
    write_master(master, weight, state)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) in fp32; vectors (the norms) are not decayed.

    The arguments are those of Muon.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: Config,
        weight_decay: float,
        offload: bool = False,
        fused: bool = False,
        gradient_offload: GradientOffload | None = None,
    ):
        self.betas = (config.adamw_beta1, config.adamw_beta2)
        self.eps = config.adamw_eps
        self.weight_decay = weight_decay
        self.steps = 0
        self.state = OptimizerState(
            parameters,
            ("exp_avg", "exp_avg_sq"),
            adamw_moment_dtype,
            offload,
            matrices=False,
            gradient_offload=gradient_offload,
        )
        self.adamw_update = adamw_update
        if fused:
            # Every tensor is flattened before the call, so one kernel serves all lengths.
            self.adamw_update = compile_elementwise(adamw_update, dynamic=True)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float) -> None:
        """Updates the parameters with learning rate `lr`, from gradients times `grad_scale`."""
        self.steps += 1
        device = self.state.device
        # What changes from step to step is a tensor: a compiled function is not compiled again.
        corrections = tuple(scalar(1 - beta**self.steps, device) for beta in self.betas)
        grad_scale = scalar(grad_scale, device)
        vector_decay = scalar(0.0, device)
        matrix_decay = scalar(lr * self.weight_decay, device)
        lr = scalar(lr, device)
        for bucket in self.state.buckets():
            for weight, gradient, state in bucket:
                decay = vector_decay
                if weight.ndim > 1:
                    decay = matrix_decay
                # Contiguous tensors: flatten() gives views, which the update writes in place.
                self.adamw_update(
                    weight.flatten(),
                    gradient.flatten(),
                    {key: tensor.flatten() for key, tensor in state.items()},
                    grad_scale,
                    self.betas,
                    self.eps,
                    corrections,
                    lr,
                    decay,
                )

    def state_dict(self) -> dict:
        return dict(state=self.state.state_dict(), steps=self.steps)

    def load_state_dict(self, saved: dict) -> None:
        self.state.load_state_dict(saved["state"])
        self.steps = saved["steps"]


def adamw_moment_dtype(parameter: Tensor) -> torch.dtype:
    """fp32, whatever the dtype of the weights."""
    return torch.float32


# ---------------------------------------------------------------- both

OPTIMIZERS = {"muon": Muon, "adamw": AdamW}


def build_optimizers(
    config: Config,
    parameters: dict[str, Tensor],
    offload: bool = False,
    fused: bool = False,
    gradient_offload: GradientOffload | None = None,
) -> dict[str, Muon | AdamW]:
    """The optimizer of each group in `optimizer_groups(config)`, by the group's name.

    `parameters` are all of the model's, by name, or the shards of them that this rank owns. Raises
    ExperimentError when host memory does not hold the state with `offload`.
    """
    optimizers = {}
    for name, group in optimizer_groups(config).items():
        names = set(group.parameters)
        own = {key: p for key, p in parameters.items() if parameter_of(key)[0] in names}
        optimizers[name] = OPTIMIZERS[name](
            own, config, group.weight_decay, offload, fused, gradient_offload
        )
    return optimizers


def scalar(value: float, device: torch.device) -> Tensor:
    """A number as a 0-d tensor.

    torch.compile would compile a function again for each new value of a Python number. A number
    beyond fp32 becomes its largest one: the run then diverges, and says so.
    """
    value = min(value, torch.finfo(torch.float32).max)
    return torch.full((), value, device=device)


KERNELS_OF_A_FUNCTION = 64  # at the most; no model has come near it


def compile_elementwise(function, dynamic: bool = False):
    """Compiles a function of elementwise operations: they become one or two kernels.

    There is a set of kernels for each shape, or with `dynamic` one for all shapes. Ranks of several
    GPUs own 1, 2, 4 ... matrices of each shape, which is more than torch._dynamo's limit of eight.
    """
    torch._dynamo.config.recompile_limit = max(
        KERNELS_OF_A_FUNCTION, torch._dynamo.config.recompile_limit
    )
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=COMPILE_OPTIONS)


def compile_for_any_number(function):
    """`compile_elementwise` for tensors [n, rows, columns], with one kernel for all n.

    Buckets hold different numbers n of matrices, and each rows and columns have their own kernel.
    n = 1 has a kernel of its own: torch.compile does not make a dimension of 1 dynamic.
    """
    compiled = compile_elementwise(function)

    def mark(value) -> None:
        if isinstance(value, Tensor) and value.ndim == 3 and len(value) > 1:
            torch._dynamo.mark_dynamic(value, 0)

    def call(*arguments):
        for argument in arguments:
            if isinstance(argument, dict):
                for tensor in argument.values():
                    mark(tensor)
            else:
                mark(argument)
        return compiled(*arguments)

    return call
