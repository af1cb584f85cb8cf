"""The matmuls of a transformer block: one linear function, and one for all experts at once.

Attention, dense feed-forward networks and experts call these two functions for every matmul. The
router does not: it is fp32 throughout. A change of precision or of sharding is made here.

Shape suffixes: R rows (tokens, or routed tokens sorted by expert), I inputs, O outputs,
E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.triton_kernels import GEMV_MAX_ROWS, grouped_gemv, triton

BLACKWELL = (10, 0)
# Blackwell's grouped GEMM leaves the weight gradient of an expert without rows unwritten. Hopper's
# writes zeros.
IDLE_GRADIENTS_UNWRITTEN = (
    torch.cuda.is_available() and torch.cuda.get_device_capability() >= BLACKWELL
)


def linear(x: Tensor, weight_OI: Tensor, recompute: bool = False) -> Tensor:
    """x [..., I] times weight transposed, as [..., O]. Autocast casts both to the compute dtype.

    With `recompute`, selective checkpointing makes this output again in the backward pass, and it
    keeps the outputs of all other matmuls. Its policy sees operators and no names, so such a matmul
    is another operator: aten.addmm, where F.linear is aten.mm. Both are the same GEMM, and have the
    same matmuls as gradients.
    """
    if not recompute:
        return F.linear(x, weight_OI)
    x_RI = x.flatten(0, -2)
    # beta=0: the addend is not read, so it may be anything. A view of x costs no kernel.
    unread = x_RI[:1, :1].detach()
    return torch.addmm(unread, x_RI, weight_OI.T, beta=0).unflatten(0, x.shape[:-1])


# ---------------------------------------------------------------- all experts at once


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
    """Rows offs[e-1] : offs[e] of x times weight[e] transposed, for every expert e, as [R, O].

    The range of an expert may be empty. x and weight have one dtype. `offs` is int32, comes from
    `offs_for`, and offs[-1] is R.

    In bfloat16 on a GPU this is one grouped GEMM, and the host does not wait for the GPU. Elsewhere
    it is one matmul for each expert: F.grouped_mm lacks float64, is broken in fp32 on CPUs, and
    copies `offs` to the host in fp16 anyway. A few rows without gradients, which generation has,
    take a kernel of their own.
    """
    if _loops_over_experts(x_RI):
        return expert_loop(x_RI, weight_EOI, offs_E)
    if _takes_gemv(x_RI):
        return grouped_gemv(x_RI, weight_EOI, offs_E)
    if IDLE_GRADIENTS_UNWRITTEN:
        weight_EOI = _clear_idle_gradient(weight_EOI, offs_E)
    return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=offs_E)


def offs_for(x_RI: Tensor, offs_E: Tensor) -> Tensor:
    """`offs` on the device from which `grouped_linear` reads them, for rows such as x.

    That is host memory where it loops over experts. The copy waits for the GPU: a layer makes it
    once, for all its matmuls and their backward passes.
    """
    if _loops_over_experts(x_RI):
        return on_host(offs_E)
    return offs_E


def _takes_gemv(x_RI: Tensor) -> bool:
    # only blocks of training and validation are compiled, and they have many rows
    generating = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return generating and x_RI.is_cuda and triton is not None and len(x_RI) <= GEMV_MAX_ROWS


def _loops_over_experts(x_RI: Tensor) -> bool:
    if _takes_gemv(x_RI):
        return False
    return not (x_RI.is_cuda and x_RI.dtype == torch.bfloat16)


# ---------------------------------------------------------------- the loop over experts

# Custom operators, so that torch.compile and selective checkpointing see one matmul instead of a
# loop that depends on data.


@torch.library.custom_op("engine::on_host", mutates_args=())
def on_host(offs_E: Tensor) -> Tensor:
    """A copy of `offs` in host memory."""
    return offs_E.to("cpu", copy=True)


@on_host.register_fake
def _(offs_E):
    return torch.empty_like(offs_E, device="cpu")


@torch.library.custom_op("engine::expert_loop", mutates_args=())
def expert_loop(x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
    """`grouped_linear` as a loop over experts, for any dtype and device."""
    out_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    for e, rows in enumerate(_row_ranges(offs_E)):
        torch.mm(x_RI[rows], weight_EOI[e].T, out=out_RO[rows])
    return out_RO


@torch.library.custom_op("engine::expert_loop_backward", mutates_args=())
def expert_loop_backward(
    grad_RO: Tensor, x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `expert_loop` by x and by weight, zeros for the weight of an idle expert."""
    grad_x = torch.empty_like(x_RI)
    grad_weight = torch.empty_like(weight_EOI)
    for e, rows in enumerate(_row_ranges(offs_E)):
        torch.mm(grad_RO[rows], weight_EOI[e], out=grad_x[rows])
        # no rows: a sum of nothing, which writes zeros
        torch.mm(grad_RO[rows].T, x_RI[rows], out=grad_weight[e])
    return grad_x, grad_weight


@expert_loop.register_fake
def _(x_RI, weight_EOI, offs_E):
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@expert_loop_backward.register_fake
def _(grad_RO, x_RI, weight_EOI, offs_E):
    return torch.empty_like(x_RI), torch.empty_like(weight_EOI)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _expert_loop_gradients(ctx, grad_RO):
    grad_x, grad_weight = expert_loop_backward(grad_RO.contiguous(), *ctx.saved_tensors)
    return grad_x, grad_weight, None


expert_loop.register_autograd(_expert_loop_gradients, setup_context=_save_inputs)


def _row_ranges(offs_E: Tensor) -> list[slice]:
    """The rows of each expert. Waits for the GPU unless `offs` lie in host memory."""
    ends = offs_E.tolist()
    starts = [0, *ends[:-1]]
    return [slice(start, end) for start, end in zip(starts, ends)]


# ---------------------------------------------------------------- idle experts on Blackwell


class _ClearIdleGradient(torch.autograd.Function):
    """Identity whose gradient is zero for experts without rows."""

    @staticmethod
    def forward(ctx, weight_EOI, offs_E):
        ctx.save_for_backward(offs_E)
        return weight_EOI.view_as(weight_EOI)

    @staticmethod
    def backward(ctx, grad_EOI):
        (offs_E,) = ctx.saved_tensors
        rows_E = torch.diff(offs_E, prepend=offs_E.new_zeros(1))
        # `where` and not a product: what was never written may be nan
        return torch.where(rows_E[:, None, None] > 0, grad_EOI, 0), None


_clear_idle_gradient = _ClearIdleGradient.apply
