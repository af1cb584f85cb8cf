"""Triton kernels, each beside the plain PyTorch that it computes faster; how torch.compile is to make its own, and which of attention's
are taken."""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # PyTorch's builds for CPUs come without
    triton = None

# Row with column reductions in one kernel read memory that nothing wrote (torch 2.10 to 2.13, pytorch/pytorch issue 193061).
COMPILE_OPTIONS = {"triton.mix_order_reduction": False}

TILE = 256, 128, 64  # rows, columns and depth; the fastest of five on an H200
PARTS, WARPS, STAGES = 2, 8, 3
HEADS, REPEAT = (
    8,
    8,
)  # heads of the rotation at a time, few enough for many programs on a multiprocessor; times of a program, back
SWIGLU_BLOCK = 2048  # columns at a time
GEMV_MAX_ROWS = 64  # up to here an expert's product is one row's after the other
GEMV_BLOCK = 16, 256  # outputs and inputs at a time
GROUP = 8  # rows of tiles whose programs run side by side, so that operands are read from the cache


def symmetric_matmul(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    add: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """alpha a b^T + beta add + diagonal I where that is known to be symmetric, as [n, m, m] in a's dtype; sums in fp32.

    a and b are [n, m, k], contiguous or the transpose of a contiguous tensor: a and a itself, or two symmetric matrices that
    commute, such as polynomials of one matrix. On Hopper GPUs and later only the tiles on and under the diagonal are
    computed, and mirrored: half the work.
    """
    n, m, k = a.shape
    if (
        triton is None
        or not a.is_cuda
        or not _has_tensor_memory_access(a.device.index)
        or m % 8
        or k % 8
    ):
        return symmetric_matmul_reference(a, b, alpha, add, beta, diagonal)
    rows, columns, depth = TILE
    tall = a.stride(-1) != 1

    def blocks(x, height):
        return (
            TensorDescriptor.from_tensor(x.mT, [1, depth, height])
            if tall
            else TensorDescriptor.from_tensor(x, [1, height, depth])
        )

    out = torch.empty(n, m, m, dtype=a.dtype, device=a.device)
    part = [1, rows, columns // PARTS]
    grid = (triton.cdiv(m, rows) * triton.cdiv(m, columns), n)
    _symmetric_matmul[grid](
        blocks(a, rows),
        blocks(b, columns),
        TensorDescriptor.from_tensor(out if add is None else add, part),
        TensorDescriptor.from_tensor(out, part),
        TensorDescriptor.from_tensor(out, [1, part[2], part[1]]),
        m,
        k,
        alpha,
        beta,
        diagonal,
        add is not None,
        tall,
        rows,
        columns,
        depth,
        PARTS,
        GROUP,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def symmetric_matmul_reference(
    a: Tensor, b: Tensor, alpha: float, add: Tensor | None, beta: float, diagonal: float
) -> Tensor:
    """`symmetric_matmul` in full, for any device and dtype."""
    out = (
        torch.bmm(a, b.mT) * alpha
        if add is None
        else torch.baddbmm(add, a, b.mT, beta=beta, alpha=alpha)
    )
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


@functools.cache
def _has_tensor_memory_access(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


# ---------------------------------------------------------------- queries and keys: normalised, then rotated


def qk_norm_rope_reference(x: Tensor, weight: Tensor, angles: Tensor, eps: float) -> Tensor:
    """`qk_norm_rope` for any device and dtype."""
    wide = x.to(weight.dtype)
    normal = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight).to(
        x.dtype
    )
    even, odd = normal.to(weight.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles[: x.shape[1], None].unbind(-1)
    return (
        torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        .flatten(-2)
        .to(x.dtype)
    )


def qk_norm_rope(x: Tensor, weight: Tensor, angles: Tensor, eps: float) -> Tensor:
    """RMSNorm over heads, then rotary embedding of neighbouring pairs (Su et al. 2021), of x [B, S, H, hd] at positions 0 ... S-1.

    weight [hd] and angles [positions, hd / 2, 2] (cosine, sine) are fp32; both steps compute in fp32, the norm is rounded to x's
    dtype in between, as by two modules. On a GPU one kernel reads x once, where torch.compile's takes three times the time.
    """
    if (
        triton is None
        or not x.is_cuda
        or x.dtype == torch.float32
        or x.shape[-1] & (x.shape[-1] - 1)
    ):
        return qk_norm_rope_reference(x, weight, angles, eps)
    return torch.ops.engine.qk_norm_rope(x, weight, angles, eps)[0]


@torch.library.custom_op("engine::qk_norm_rope", mutates_args=())
def _qk_norm_rope(x: Tensor, weight: Tensor, angles: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _rotate_rows[(triton.cdiv(scale.numel(), HEADS),)](
        x,
        weight,
        angles,
        out,
        scale,
        scale.numel(),
        x.shape[2],
        x.shape[1],
        eps,
        x.shape[-1],
        HEADS,
    )
    return out, scale


@torch.library.custom_op("engine::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, angles: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    programs = triton.cdiv(scale.numel(), HEADS * REPEAT)
    grad_x, grad_weight = (
        torch.empty_like(x),
        x.new_empty(programs, x.shape[-1], dtype=torch.float32),
    )
    _rotate_rows_back[(programs,)](
        grad,
        x,
        weight,
        angles,
        scale,
        grad_x,
        grad_weight,
        scale.numel(),
        x.shape[2],
        x.shape[1],
        *grad.stride()[:3],
        x.shape[-1],
        HEADS,
        REPEAT,
    )
    return grad_x, grad_weight.sum(dim=0)


@_qk_norm_rope.register_fake
def _(x, weight, angles, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_qk_norm_rope_backward.register_fake
def _(grad, x, weight, angles, scale):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[1])


_qk_norm_rope.register_autograd(
    lambda ctx, grad, _: (*_qk_norm_rope_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=_save,
)


# ---------------------------------------------------------------- SwiGLU


def swiglu_reference(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """`swiglu` for any device and dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    return hidden if weights is None else (hidden * weights[:, None]).to(hidden.dtype)


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020) of rows gate_up [N, 2 F], as [N, F]; times a weight of each row, fp32 [N], if they are given.

    On a GPU the backward pass is one kernel, which reads and writes everything once, the weights' gradients too.
    """
    if triton is None or not gate_up.is_cuda or gate_up.dtype == torch.float32:
        return swiglu_reference(gate_up, weights)
    return torch.ops.engine.swiglu(gate_up, weights)


@torch.library.custom_op("engine::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate_up = gate_up.contiguous()
    n, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(n, width)
    _swiglu_rows[(n, triton.cdiv(width, SWIGLU_BLOCK))](
        gate_up,
        gate_up if weights is None else weights,
        out,
        width,
        weights is not None,
        SWIGLU_BLOCK,
    )
    return out


@torch.library.custom_op("engine::swiglu_backward", mutates_args=())
def _swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    out, grad_weights = (
        torch.empty_like(gate_up),
        gate_up.new_empty(len(gate_up), dtype=torch.float32),
    )
    _swiglu_rows_back[(len(gate_up),)](
        grad,
        gate_up,
        gate_up if weights is None else weights,
        out,
        grad_weights,
        grad.shape[1],
        weights is not None,
        SWIGLU_BLOCK,
        num_warps=8,
    )
    return out, grad_weights


@_swiglu.register_fake
def _(gate_up, weights):
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


@_swiglu_backward.register_fake
def _(grad, gate_up, weights):
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(len(gate_up), dtype=torch.float32)


def _swiglu_gradients(ctx, grad):
    gate_up, weights = ctx.saved_tensors  # once: under checkpointing a second look is an error
    grad_gate_up, grad_weights = _swiglu_backward(grad, gate_up, weights)
    return grad_gate_up, None if weights is None else grad_weights


_swiglu.register_autograd(
    _swiglu_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


# ---------------------------------------------------------------- experts on a few rows


def grouped_gemv(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`moe.grouped_linear` without gradients, for the few rows of text that is being written: each row times its expert's weight
    in fp32, read as it lies. The host need not know the ranges, in any dtype. For GPUs with Triton."""
    assert weight_EOI.is_contiguous()
    x_RI, (experts, width, depth), (outputs, inputs) = (
        x_RI.contiguous(),
        weight_EOI.shape,
        GEMV_BLOCK,
    )
    out_RO = x_RI.new_empty(len(x_RI), width)
    with torch.cuda.device_of(x_RI):
        _row_times_expert[(len(x_RI), triton.cdiv(width, outputs))](
            x_RI,
            weight_EOI,
            ends_E,
            out_RO,
            width,
            depth,
            experts,
            triton.next_power_of_2(experts),
            outputs,
            inputs,
        )
    return out_RO


# ---------------------------------------------------------------- torch.compile's kernels


@functools.cache
def compile_with_barriers() -> None:
    """Lets torch.compile's kernels wait before they read what they have written.

    A reduction over rows that are longer than a block takes two loops, and the second may read back what the first wrote: other
    threads than those that wrote it, without a barrier (torch 2.11 to 2.13, pytorch/pytorch issue 191433). On an H100 an MoE
    block's gradients were garbage, other garbage each time. benchmarks/check_gpu.py looks for such kernels.
    """
    from torch._inductor.codegen.triton import TritonKernel  # a second's import, for who compiles

    load = TritonKernel.load

    def load_after_barrier(kernel, name, index):
        if name in kernel.store_buffer_names:
            kernel.body.writeline("tl.debug_barrier()")  # between the loops
        return load(kernel, name, index)

    TritonKernel.load = load_after_barrier
    torch.compiler.config.cache_key_tag = (
        "barriers"  # kernels that were made without are not to come from the cache
    )


if triton is not None:

    @triton.jit
    def _symmetric_matmul(
        a_blocks,
        b_blocks,
        add_blocks,
        out_blocks,
        mirror_blocks,
        m,
        k,
        alpha,
        beta,
        diagonal,
        ADD: tl.constexpr,
        TALL: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        PARTS: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        tiles_n = tl.cdiv(m, COLUMNS)
        tile = tl.program_id(0)
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(tl.cdiv(m, ROWS) - first, GROUP)
        row = (first + tile % (GROUP * tiles_n) % height) * ROWS
        column = tile % (GROUP * tiles_n) // height * COLUMNS
        if column >= row + ROWS:  # above the diagonal: another tile's mirror image
            return
        matrix = tl.program_id(1)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, k, DEPTH):  # what lies outside is read as zero, and not written
            if TALL:
                a = a_blocks.load([matrix, start, row]).reshape(DEPTH, ROWS).T
                b = b_blocks.load([matrix, start, column]).reshape(DEPTH, COLUMNS)
            else:
                a = a_blocks.load([matrix, row, start]).reshape(ROWS, DEPTH)
                b = b_blocks.load([matrix, column, start]).reshape(COLUMNS, DEPTH).T
            total = tl.dot(a, b, total)
        # what follows the product in parts, which take less shared memory
        WIDTH: tl.constexpr = COLUMNS // PARTS
        if PARTS == 2:
            left, right = tl.split(total.reshape(ROWS, 2, WIDTH).permute(0, 2, 1))
        for part in tl.static_range(PARTS):
            result = alpha * (total if PARTS == 1 else left if part == 0 else right)
            begin = column + part * WIDTH
            if ADD:
                result += beta * add_blocks.load([matrix, row, begin]).reshape(ROWS, WIDTH).to(
                    tl.float32
                )
            result += tl.where(
                row + tl.arange(0, ROWS)[:, None] == begin + tl.arange(0, WIDTH)[None, :],
                diagonal,
                0.0,
            )
            result = result.to(out_blocks.dtype)
            out_blocks.store([matrix, row, begin], result.reshape(1, ROWS, WIDTH))
            if column + COLUMNS <= row:  # the square tiles on the diagonal are whole as they are
                mirror_blocks.store([matrix, begin, row], result.T.reshape(1, WIDTH, ROWS))

    @triton.jit
    def _rotate_rows(
        x_ptr,
        weight_ptr,
        angles_ptr,
        out_ptr,
        scale_ptr,
        rows,
        heads,
        positions,
        eps,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
        there = row < rows
        here, inside = row.to(tl.int64)[:, None] * DIM + column[None, :], there[:, None]
        x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
        normal = (
            (x * scale[:, None] * tl.load(weight_ptr + column)[None, :])
            .to(out_ptr.dtype.element_ty)
            .to(tl.float32)
        )
        even, odd = tl.split(normal.reshape(ROWS, DIM // 2, 2))
        angles = tl.load(angles_ptr + (row // heads % positions)[:, None] * DIM + column[None, :])
        cos, sin = tl.split(angles.reshape(ROWS, DIM // 2, 2))
        out = tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(ROWS, DIM)
        tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + row, scale, mask=there)

    @triton.jit
    def _rotate_rows_back(
        grad_ptr,
        x_ptr,
        weight_ptr,
        angles_ptr,
        scale_ptr,
        grad_x_ptr,
        grad_weight_ptr,
        rows,
        heads,
        positions,
        batch_stride,
        position_stride,
        head_stride,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
        REPEAT: tl.constexpr,
    ):
        column = tl.arange(0, DIM)
        weight, grad_weight = (
            tl.load(weight_ptr + column)[None, :],
            tl.zeros((DIM,), dtype=tl.float32),
        )
        for time in range(REPEAT):
            row = (tl.program_id(0) * REPEAT + time) * ROWS + tl.arange(0, ROWS)
            there = row < rows
            here, inside = row.to(tl.int64)[:, None] * DIM + column[None, :], there[:, None]
            position, head = row // heads % positions, row % heads
            place = (
                (row // heads // positions).to(tl.int64) * batch_stride
                + position.to(tl.int64) * position_stride
                + head * head_stride
            )
            grad = tl.load(grad_ptr + place[:, None] + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            even, odd = tl.split(grad.reshape(ROWS, DIM // 2, 2))
            angles = tl.load(angles_ptr + position[:, None] * DIM + column[None, :])
            cos, sin = tl.split(angles.reshape(ROWS, DIM // 2, 2))
            grad = tl.join(even * cos + odd * sin, odd * cos - even * sin).reshape(ROWS, DIM)
            grad = grad.to(grad_x_ptr.dtype.element_ty).to(tl.float32)
            scale = tl.load(scale_ptr + row, mask=there, other=0.0)[:, None]
            normal = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32) * scale
            grad_weight += tl.sum(grad * normal, axis=0)
            grad *= weight
            grad_x = scale * (grad - normal * (tl.sum(grad * normal, axis=1) / DIM)[:, None])
            tl.store(grad_x_ptr + here, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_weight_ptr + tl.program_id(0) * DIM + column, grad_weight)

    @triton.jit
    def _row_times_expert(
        x_ptr,
        weight_ptr,
        ends_ptr,
        out_ptr,
        width,
        depth,
        experts,
        EXPERTS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        INPUTS: tl.constexpr,
    ):
        row, e = tl.program_id(0), tl.arange(0, EXPERTS)
        column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        ends = tl.load(ends_ptr + e, mask=e < experts, other=row + 1)
        expert = tl.sum((ends <= row).to(tl.int64))
        total = tl.zeros((OUTPUTS, INPUTS), dtype=tl.float32)
        for start in range(0, depth, INPUTS):
            k = start + tl.arange(0, INPUTS)
            x = tl.load(x_ptr + row * depth + k, mask=k < depth, other=0.0).to(tl.float32)
            weight = tl.load(
                weight_ptr + (expert * width + column)[:, None] * depth + k[None, :],
                mask=(column < width)[:, None] & (k < depth)[None, :],
                other=0.0,
            )
            total += weight.to(tl.float32) * x[None, :]
        tl.store(
            out_ptr + row * width + column,
            tl.sum(total, axis=1).to(out_ptr.dtype.element_ty),
            mask=column < width,
        )

    @triton.jit
    def _swiglu_rows(
        gate_up_ptr, weights_ptr, out_ptr, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
    ):
        row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0).to(
            tl.float32
        )
        up = tl.load(gate_up_ptr + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(
            tl.float32
        )
        hidden = gate * tl.sigmoid(gate) * up
        if WEIGHTED:
            hidden *= tl.load(weights_ptr + row)
        tl.store(out_ptr + row * width + column, hidden.to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _swiglu_rows_back(
        grad_ptr,
        gate_up_ptr,
        weights_ptr,
        out_ptr,
        grad_weights_ptr,
        width,
        WEIGHTED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        weight = tl.load(weights_ptr + row) if WEIGHTED else 1.0
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0).to(
                tl.float32
            )
            up = tl.load(gate_up_ptr + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(
                tl.float32
            )
            gating = tl.sigmoid(gate)
            silu = gate * gating
            if WEIGHTED:
                total += grad * silu * up
            grad *= weight
            grad_gate = grad * up * (gating + silu * (1 - gating))
            tl.store(
                out_ptr + row * 2 * width + column,
                grad_gate.to(out_ptr.dtype.element_ty),
                mask=inside,
            )
            tl.store(
                out_ptr + (row * 2 + 1) * width + column,
                (grad * silu).to(out_ptr.dtype.element_ty),
                mask=inside,
            )
        if WEIGHTED:
            tl.store(grad_weights_ptr + row, tl.sum(total, axis=0))


# ---------------------------------------------------------------- attention


def attention_backends(device: torch.device):
    """Fused attention's order of preference: cuDNN's is the faster one on Hopper and later (542 against 313 TFLOP/s
    forward on an H100), flash before. It holds for the whole run, as backward passes recompute attention too."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    order.insert(0 if hopper else 1, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)
