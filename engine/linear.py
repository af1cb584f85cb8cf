"""The matmuls of a transformer block: one linear function, and one for all experts at once.

Attention, dense feed-forward networks and experts call these two functions for every matmul. The
router does not: it is fp32 throughout. A change of precision or of sharding is made here. The head
and its loss call `fp32_matmul`.

Shape suffixes: R rows (tokens, or routed tokens sorted by expert), I inputs, O outputs,
E experts. `offs` [E] are the ends of the experts' rows: expert e has rows offs[e-1] : offs[e].
An idle expert is one without rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.triton_kernels import GEMV_MAX_ROWS, grouped_gemv, triton

# cuBLAS may split a matmul into parts, each a sum over some of the inputs. It may add the parts in
# 16 bits, and PyTorch lets it. Here they are added in fp32, as everything within a part is.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

BLACKWELL = (10, 0)  # compute capability


def _leaves_idle_gradients_unwritten() -> bool:
    """Whether the GPU's grouped GEMM does not write the weight gradient of an idle expert.

    Blackwell's does not. Hopper's writes zeros.
    """
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= BLACKWELL


IDLE_GRADIENTS_UNWRITTEN = _leaves_idle_gradients_unwritten()


def linear(
    x: Tensor,
    weight_OI: Tensor,
    recompute: bool = False,
) -> Tensor:
    """x [..., I] times weight transposed, as [..., O]. Autocast casts both to the compute dtype.

    With `recompute`, selective checkpointing recomputes this matmul in the backward pass. It keeps
    the outputs of all other matmuls.

    Selective checkpointing decides by the operator, and sees no names. So a matmul to recompute
    must be another operator: aten.addmm, where F.linear is aten.mm. Both run the same GEMM, and
    have the same matmuls as gradients.
    """
    if not recompute:
        return F.linear(x, weight_OI)
    x_RI = x.flatten(0, -2)
    # addmm adds beta times its first argument. With beta=0 it does not read that argument, so any
    # tensor will do. A view of x costs no memory and no kernel.
    unread = x_RI[:1, :1].detach()
    out_RO = torch.addmm(unread, x_RI, weight_OI.T, beta=0)
    return out_RO.unflatten(0, x.shape[:-1])


def fp32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, with an fp32 result also from 16-bit inputs. Call it without autocast.

    On a GPU, 16-bit inputs get no gradient from here.
    """
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        # Tensor cores sum in fp32. Without out_dtype the sums would be rounded to 16 bits.
        return torch.mm(a, b, out_dtype=torch.float32)
    # A CPU has no such operator. 16-bit inputs are exact in fp32.
    return a.float() @ b.float()


# ---------------------------------------------------------------- all experts at once


def grouped_linear(
    x_RI: Tensor,
    weight_EOI: Tensor,
    offs_E: Tensor,
) -> Tensor:
    """Rows offs[e-1] : offs[e] of x times weight[e] transposed, for every expert e, as [R, O].

    An expert may have no rows. x and weight have the same dtype. `offs` is int32 and comes from
    `offs_for`; offs[-1] is R.

    There are three ways to compute the result:

    - bfloat16 on a GPU: one grouped GEMM, for which the host does not wait for the GPU.
    - Generation on a GPU (few rows, no gradients): the Triton kernel `grouped_gemv`.
    - Elsewhere: one matmul for each expert. F.grouped_mm lacks float64 and is broken in fp32 on
      CPUs. In fp16 it also copies `offs` to the host, so it would not save the wait.
    """
    if _loops_over_experts(x_RI):
        return expert_loop(x_RI, weight_EOI, offs_E)
    if _takes_gemv(x_RI):
        return grouped_gemv(x_RI, weight_EOI, offs_E)
    if IDLE_GRADIENTS_UNWRITTEN:
        weight_EOI = _clear_idle_gradient(weight_EOI, offs_E)
    weight_EIO = weight_EOI.transpose(-2, -1)
    return F.grouped_mm(x_RI, weight_EIO, offs=offs_E)


def offs_for(x_RI: Tensor, offs_E: Tensor) -> Tensor:
    """Copies `offs` to host memory if `grouped_linear` will loop over experts for these rows.

    The loop reads `offs` from host memory, the other two ways from the GPU. The copy waits for the
    GPU. So a layer calls this function once, for all its matmuls and their backward passes.
    """
    if _loops_over_experts(x_RI):
        return on_host(offs_E)
    return offs_E


def _takes_gemv(x_RI: Tensor) -> bool:
    """Whether `grouped_gemv` computes these rows."""
    # Training and validation have many rows. They alone compile blocks, and training alone needs
    # gradients, which the kernel does not compute.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if triton is None or not x_RI.is_cuda:
        return False
    return len(x_RI) <= GEMV_MAX_ROWS


def _loops_over_experts(x_RI: Tensor) -> bool:
    """Whether `expert_loop` computes these rows."""
    if _takes_gemv(x_RI):
        return False
    has_grouped_gemm = x_RI.is_cuda and x_RI.dtype == torch.bfloat16
    return not has_grouped_gemm


# ---------------------------------------------------------------- the loop over experts

# These functions are custom operators, because torch.compile cannot trace the loop: its ranges of
# rows depend on the data. Selective checkpointing, too, sees the whole loop as one operator.


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
    out_RO = _empty_output(x_RI, weight_EOI)
    for e, rows in enumerate(_row_ranges(offs_E)):
        weight_IO = weight_EOI[e].T
        torch.mm(x_RI[rows], weight_IO, out=out_RO[rows])
    return out_RO


def _empty_output(x_RI: Tensor, weight_EOI: Tensor) -> Tensor:
    num_rows = x_RI.shape[0]
    outputs = weight_EOI.shape[1]
    return x_RI.new_empty(num_rows, outputs)


@torch.library.custom_op("engine::expert_loop_backward", mutates_args=())
def expert_loop_backward(
    grad_RO: Tensor,
    x_RI: Tensor,
    weight_EOI: Tensor,
    offs_E: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `expert_loop` by x [R, I] and by weight [E, O, I].

    The gradient of an idle expert's weight is zero.
    """
    grad_x_RI = torch.empty_like(x_RI)
    grad_weight_EOI = torch.empty_like(weight_EOI)
    for e, rows in enumerate(_row_ranges(offs_E)):
        grad_rows = grad_RO[rows]
        torch.mm(grad_rows, weight_EOI[e], out=grad_x_RI[rows])
        # A matmul over no rows is an empty sum: it writes zeros.
        torch.mm(grad_rows.T, x_RI[rows], out=grad_weight_EOI[e])
    return grad_x_RI, grad_weight_EOI


# torch.compile needs the shapes and dtypes of the results, without computing them.


@expert_loop.register_fake
def _(x_RI, weight_EOI, offs_E):
    return _empty_output(x_RI, weight_EOI)


@expert_loop_backward.register_fake
def _(grad_RO, x_RI, weight_EOI, offs_E):
    return torch.empty_like(x_RI), torch.empty_like(weight_EOI)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _expert_loop_gradients(ctx, grad_RO):
    x_RI, weight_EOI, offs_E = ctx.saved_tensors
    grad_RO = grad_RO.contiguous()
    grad_x_RI, grad_weight_EOI = expert_loop_backward(grad_RO, x_RI, weight_EOI, offs_E)
    return grad_x_RI, grad_weight_EOI, None


expert_loop.register_autograd(_expert_loop_gradients, setup_context=_save_inputs)


def _row_ranges(offs_E: Tensor) -> list[slice]:
    """The rows of each expert. Waits for the GPU unless `offs` are in host memory."""
    ends = offs_E.tolist()
    starts = [0, *ends[:-1]]
    return [slice(start, end) for start, end in zip(starts, ends)]


# ---------------------------------------------------------------- idle experts on Blackwell


class _ClearIdleGradient(torch.autograd.Function):
    """Identity. Its backward pass sets the gradients of idle experts to zero."""

    @staticmethod
    def forward(ctx, weight_EOI, offs_E):
        ctx.save_for_backward(offs_E)
        return weight_EOI.view_as(weight_EOI)

    @staticmethod
    def backward(ctx, grad_EOI):
        (offs_E,) = ctx.saved_tensors
        first_row = offs_E.new_zeros(1)
        num_rows_E = torch.diff(offs_E, prepend=first_row)
        num_rows_E11 = num_rows_E[:, None, None]
        has_rows_E11 = num_rows_E11 > 0
        # `where` and not a multiplication: unwritten memory may hold nan, and 0 * nan is nan.
        return torch.where(has_rows_E11, grad_EOI, 0), None


_clear_idle_gradient = _ClearIdleGradient.apply
