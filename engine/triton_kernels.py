"""Triton kernels, each beside the reference version in plain PyTorch that it computes faster.

A public function calls its kernel where the kernel can run. Elsewhere it calls the reference: on
CPUs, in fp32, and without Triton. benchmarks/check_gpu.py compares the kernels with the references
in float64.

It also has the settings of torch.compile, and the order in which attention kernels are tried.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # PyTorch's builds for CPUs come without
    triton = None

HOPPER = (9, 0)


# ---------------------------------------------------------------- symmetric matmul (SYRK)

# A tile of the output, and how much of the inner dimension is multiplied at a time: the fastest of
# five on an H200.
SYRK_ROWS = 256
SYRK_COLUMNS = 128
SYRK_DEPTH = 64
SYRK_WARPS = 8
SYRK_STAGES = 3
# Rows of tiles whose programs run side by side, so that operands are read from the cache.
SYRK_GROUP = 8


def symmetric_matmul(
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    add: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """alpha a b^T + beta add + diagonal I, where that is known to be symmetric.

    a and b are [n, m, k], contiguous or the transpose of a contiguous tensor: either a and a
    itself, or two symmetric matrices that commute, such as polynomials of one matrix. Returns
    [n, m, m] in a's dtype; sums in fp32.

    On Hopper GPUs and later only the tiles on and under the diagonal are computed, and mirrored:
    half the work.
    """
    n, m, k = a.shape
    # the tensor memory access of these GPUs wants rows of a multiple of 16 bytes
    if triton is None or not a.is_cuda or not _is_hopper(a.device.index) or m % 8 or k % 8:
        return symmetric_matmul_reference(a, b, alpha, add, beta, diagonal)
    out = torch.empty(n, m, m, dtype=a.dtype, device=a.device)
    tall = a.stride(-1) != 1
    half_tile = [1, SYRK_ROWS, SYRK_COLUMNS // 2]
    mirrored_half_tile = [1, SYRK_COLUMNS // 2, SYRK_ROWS]
    grid = (triton.cdiv(m, SYRK_ROWS) * triton.cdiv(m, SYRK_COLUMNS), n)
    _symmetric_matmul_kernel[grid](
        _operand_blocks(a, SYRK_ROWS, tall),
        _operand_blocks(b, SYRK_COLUMNS, tall),
        TensorDescriptor.from_tensor(out if add is None else add, half_tile),
        TensorDescriptor.from_tensor(out, half_tile),
        TensorDescriptor.from_tensor(out, mirrored_half_tile),
        m,
        k,
        alpha,
        beta,
        diagonal,
        ADD=add is not None,
        TALL=tall,
        ROWS=SYRK_ROWS,
        COLUMNS=SYRK_COLUMNS,
        DEPTH=SYRK_DEPTH,
        GROUP=SYRK_GROUP,
        num_warps=SYRK_WARPS,
        num_stages=SYRK_STAGES,
    )
    return out


def symmetric_matmul_reference(
    a: Tensor, b: Tensor, alpha: float, add: Tensor | None, beta: float, diagonal: float
) -> Tensor:
    """`symmetric_matmul` for any device and dtype. It computes both triangles."""
    if add is None:
        out = torch.bmm(a, b.mT) * alpha
    else:
        out = torch.baddbmm(add, a, b.mT, beta=beta, alpha=alpha)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


@functools.cache
def _is_hopper(device: int) -> bool:
    """Whether this GPU is of the Hopper generation or later, which has tensor memory access."""
    return torch.cuda.get_device_capability(device) >= HOPPER


def _operand_blocks(x: Tensor, height: int, tall: bool):
    """Blocks of `height` rows and SYRK_DEPTH columns of x; their transposes if x is `tall`, as the
    last dimension in memory must be contiguous."""
    if tall:
        return TensorDescriptor.from_tensor(x.mT, [1, SYRK_DEPTH, height])
    return TensorDescriptor.from_tensor(x, [1, height, SYRK_DEPTH])


if triton is not None:

    @triton.jit
    def _symmetric_matmul_kernel(
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
        GROUP: tl.constexpr,
    ):
        """Program (tile, matrix) computes one tile [ROWS, COLUMNS] of the output, and its mirror
        image. It returns at once for a tile above the diagonal."""
        # programs in order walk down GROUP rows of tiles, then on to the next column of tiles
        tile = tl.program_id(0)
        matrix = tl.program_id(1)
        tiles_in_row = tl.cdiv(m, COLUMNS)
        tiles_in_group = GROUP * tiles_in_row
        first_of_group = tile // tiles_in_group * GROUP
        rows_in_group = min(tl.cdiv(m, ROWS) - first_of_group, GROUP)
        row = (first_of_group + tile % tiles_in_group % rows_in_group) * ROWS
        column = tile % tiles_in_group // rows_in_group * COLUMNS
        if column >= row + ROWS:  # above the diagonal: another tile's mirror image
            return

        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, k, DEPTH):  # what lies outside is read as zero, and not written
            if TALL:
                a = a_blocks.load([matrix, start, row]).reshape(DEPTH, ROWS).T
                b = b_blocks.load([matrix, start, column]).reshape(DEPTH, COLUMNS)
            else:
                a = a_blocks.load([matrix, row, start]).reshape(ROWS, DEPTH)
                b = b_blocks.load([matrix, column, start]).reshape(COLUMNS, DEPTH).T
            total = tl.dot(a, b, total)

        # what follows the matmul is done for half of the columns at a time: less shared memory
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(total.reshape(ROWS, 2, HALF).permute(0, 2, 1))
        for side in tl.static_range(2):
            result = alpha * (left if side == 0 else right)
            begin = column + side * HALF
            if ADD:
                added = add_blocks.load([matrix, row, begin]).reshape(ROWS, HALF)
                result += beta * added.to(tl.float32)
            row_numbers = row + tl.arange(0, ROWS)[:, None]
            column_numbers = begin + tl.arange(0, HALF)[None, :]
            result += tl.where(row_numbers == column_numbers, diagonal, 0.0)
            result = result.to(out_blocks.dtype)
            out_blocks.store([matrix, row, begin], result.reshape(1, ROWS, HALF))
            if column + COLUMNS <= row:  # tiles on the diagonal hold both halves themselves
                mirror_blocks.store([matrix, begin, row], result.T.reshape(1, HALF, ROWS))


# ---------------------------------------------------------------- QK-norm and RoPE

# Rows (heads of tokens) at a time: few enough for many programs on a multiprocessor.
ROPE_ROWS = 8
# How often a program of the backward pass does that: each program makes one row of partial sums of
# the weight's gradient.
ROPE_REPEAT = 8


def qk_norm_rope(x: Tensor, weight: Tensor, angles: Tensor, eps: float) -> Tensor:
    """RMSNorm over each head, then the rotary embedding of neighbouring pairs (Su et al. 2021).

    x is [B, S, H, hd] at positions 0 ... S-1; angles [positions, hd / 2, 2] hold cosines and sines.
    weight [hd] and angles are fp32, and both steps compute in fp32. The norm is rounded to x's
    dtype in between, as by two modules. On a GPU one kernel reads x once. torch.compile's kernels
    take three times the time.
    """
    is_power_of_2 = x.shape[-1] & (x.shape[-1] - 1) == 0
    if triton is None or not x.is_cuda or x.dtype == torch.float32 or not is_power_of_2:
        return qk_norm_rope_reference(x, weight, angles, eps)
    return torch.ops.engine.qk_norm_rope(x, weight, angles, eps)[0]


def qk_norm_rope_reference(x: Tensor, weight: Tensor, angles: Tensor, eps: float) -> Tensor:
    """`qk_norm_rope` for any device and dtype."""
    wide = x.to(weight.dtype)
    inverse_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normal = (wide * inverse_rms * weight).to(x.dtype)
    even, odd = normal.to(weight.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles[: x.shape[1], None].unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


@torch.library.custom_op("engine::qk_norm_rope", mutates_args=())
def _qk_norm_rope(x: Tensor, weight: Tensor, angles: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the result [B, S, H, hd], and 1 / rms [B, S, H] for the backward pass."""
    x = x.contiguous()
    out = torch.empty_like(x)
    inverse_rms = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows = inverse_rms.numel()
    _qk_norm_rope_kernel[(triton.cdiv(rows, ROPE_ROWS),)](
        x,
        weight,
        angles,
        out,
        inverse_rms,
        rows,
        x.shape[2],
        x.shape[1],
        eps,
        DIM=x.shape[-1],
        ROWS=ROPE_ROWS,
    )
    return out, inverse_rms


@torch.library.custom_op("engine::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, angles: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by x and by weight."""
    x = x.contiguous()
    # attention returns gradients in its own layout: the kernel takes any with contiguous heads
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    batch_stride, position_stride, head_stride = grad.stride()[:3]
    rows = inverse_rms.numel()
    programs = triton.cdiv(rows, ROPE_ROWS * ROPE_REPEAT)
    grad_x = torch.empty_like(x)
    partial_grad_weight = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    _qk_norm_rope_backward_kernel[(programs,)](
        grad,
        x,
        weight,
        angles,
        inverse_rms,
        grad_x,
        partial_grad_weight,
        rows,
        x.shape[2],
        x.shape[1],
        batch_stride,
        position_stride,
        head_stride,
        DIM=x.shape[-1],
        ROWS=ROPE_ROWS,
        REPEAT=ROPE_REPEAT,
    )
    return grad_x, partial_grad_weight.sum(dim=0)


@_qk_norm_rope.register_fake
def _(x, weight, angles, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_qk_norm_rope_backward.register_fake
def _(grad, x, weight, angles, inverse_rms):
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save_for_qk_norm_rope(ctx, inputs, output):
    x, weight, angles, _eps = inputs
    _out, inverse_rms = output
    ctx.save_for_backward(x, weight, angles, inverse_rms)


def _qk_norm_rope_gradients(ctx, grad, _grad_inverse_rms):
    grad_x, grad_weight = _qk_norm_rope_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, None, None


_qk_norm_rope.register_autograd(_qk_norm_rope_gradients, setup_context=_save_for_qk_norm_rope)


if triton is not None:

    @triton.jit
    def _qk_norm_rope_kernel(
        x_ptr,
        weight_ptr,
        angles_ptr,
        out_ptr,
        inverse_rms_ptr,
        rows,
        heads,
        positions,
        eps,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """A program computes ROWS rows of out.

        x and out are contiguous, [B, S, H, DIM], with H `heads` and S `positions`. A row is one
        head of one token, and there are B S H `rows`: row r is of head r % H, at position
        (r // H) % S. angles are [S, DIM / 2, 2]: a position has DIM numbers, with cosine and sine
        of each angle side by side.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, DIM)
        row_exists = row < rows
        mask = row_exists[:, None]
        offsets = row.to(tl.int64)[:, None] * DIM + column[None, :]

        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column)[None, :]
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
        normal = x * inverse_rms[:, None] * weight
        # Rounded to 16 bits and back, as RMSNorm rounds its result before the rotation reads it.
        normal = normal.to(out_ptr.dtype.element_ty).to(tl.float32)

        # The columns 2 i and 2 i + 1 are a point, which is rotated by angle i of the position.
        even, odd = tl.split(normal.reshape(ROWS, DIM // 2, 2))
        # (row // heads) % positions
        position = row // heads % positions
        angles = tl.load(angles_ptr + position[:, None] * DIM + column[None, :])
        cos, sin = tl.split(angles.reshape(ROWS, DIM // 2, 2))
        out = tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(ROWS, DIM)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(inverse_rms_ptr + row, inverse_rms, mask=row_exists)

    @triton.jit
    def _qk_norm_rope_backward_kernel(
        grad_ptr,
        x_ptr,
        weight_ptr,
        angles_ptr,
        inverse_rms_ptr,
        grad_x_ptr,
        partial_grad_weight_ptr,
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
        """A program computes REPEAT * ROWS rows of grad_x, ROWS at a time.

        Their sum of the weight's gradient is row program_id of partial_grad_weight,
        [programs, DIM]. Rows are those of `_qk_norm_rope_kernel`. grad may have any layout in which
        a head is contiguous, so its strides are given.
        """
        column = tl.arange(0, DIM)
        weight = tl.load(weight_ptr + column)[None, :]
        grad_weight = tl.zeros((DIM,), dtype=tl.float32)
        for i in range(REPEAT):
            row = (tl.program_id(0) * REPEAT + i) * ROWS + tl.arange(0, ROWS)
            row_exists = row < rows
            mask = row_exists[:, None]
            offsets = row.to(tl.int64)[:, None] * DIM + column[None, :]
            head = row % heads
            position = row // heads % positions
            sequence = row // heads // positions
            grad_row = (
                sequence.to(tl.int64) * batch_stride
                + position.to(tl.int64) * position_stride
                + head * head_stride
            )
            grad_offsets = grad_row[:, None] + column[None, :]
            grad = tl.load(grad_ptr + grad_offsets, mask=mask, other=0.0).to(tl.float32)

            # The gradient of a rotation is the rotation by the opposite angle. It is rounded to 16
            # bits, as the rotation's backward pass would return it to the norm's.
            even, odd = tl.split(grad.reshape(ROWS, DIM // 2, 2))
            angles = tl.load(angles_ptr + position[:, None] * DIM + column[None, :])
            cos, sin = tl.split(angles.reshape(ROWS, DIM // 2, 2))
            grad = tl.join(even * cos + odd * sin, odd * cos - even * sin).reshape(ROWS, DIM)
            grad = grad.to(grad_x_ptr.dtype.element_ty).to(tl.float32)

            # The norm is y = normal * weight with normal = x / rms(x). With g = grad * weight:
            # grad_weight = sum of grad * normal over all rows,
            # grad_x = (g - normal * mean(g * normal)) / rms(x).
            inverse_rms = tl.load(inverse_rms_ptr + row, mask=row_exists, other=0.0)[:, None]
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            normal = x * inverse_rms
            grad_weight += tl.sum(grad * normal, axis=0)
            grad *= weight
            mean = (tl.sum(grad * normal, axis=1) / DIM)[:, None]
            grad_x = inverse_rms * (grad - normal * mean)
            tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        tl.store(partial_grad_weight_ptr + tl.program_id(0) * DIM + column, grad_weight)


# ---------------------------------------------------------------- SwiGLU

SWIGLU_BLOCK = 2048  # columns at a time


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020) of rows gate_up [N, 2 F], as [N, F].

    The first F numbers of a row are gate, the others are up. If `weights` (fp32 [N]) are given,
    each row is multiplied by its weight. On a GPU one kernel computes the backward pass, with the
    gradients of the weights. It reads and writes every number once.
    """
    if triton is None or not gate_up.is_cuda or gate_up.dtype == torch.float32:
        return swiglu_reference(gate_up, weights)
    return torch.ops.engine.swiglu(gate_up, weights)


def swiglu_reference(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """`swiglu` for any device and dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    if weights is None:
        return hidden
    return (hidden * weights[:, None]).to(hidden.dtype)


@torch.library.custom_op("engine::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate_up = gate_up.contiguous()
    rows = len(gate_up)
    width = gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _swiglu_kernel[(rows, triton.cdiv(width, SWIGLU_BLOCK))](
        gate_up,
        gate_up if weights is None else weights,
        out,
        width,
        WEIGHTED=weights is not None,
        BLOCK=SWIGLU_BLOCK,
    )
    return out


@torch.library.custom_op("engine::swiglu_backward", mutates_args=())
def _swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients by gate_up and by weights. The second is not written without weights."""
    grad = grad.contiguous()
    gate_up = gate_up.contiguous()
    rows = len(gate_up)
    grad_gate_up = torch.empty_like(gate_up)
    grad_weights = gate_up.new_empty(rows, dtype=torch.float32)
    _swiglu_backward_kernel[(rows,)](
        grad,
        gate_up,
        gate_up if weights is None else weights,
        grad_gate_up,
        grad_weights,
        grad.shape[1],
        WEIGHTED=weights is not None,
        BLOCK=SWIGLU_BLOCK,
        num_warps=8,
    )
    return grad_gate_up, grad_weights


@_swiglu.register_fake
def _(gate_up, weights):
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


@_swiglu_backward.register_fake
def _(grad, gate_up, weights):
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(len(gate_up), dtype=torch.float32)


def _save_for_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_gradients(ctx, grad):
    # Read once: under checkpointing, to read saved_tensors a second time is an error.
    gate_up, weights = ctx.saved_tensors
    grad_gate_up, grad_weights = _swiglu_backward(grad, gate_up, weights)
    if weights is None:
        return grad_gate_up, None
    return grad_gate_up, grad_weights


_swiglu.register_autograd(_swiglu_gradients, setup_context=_save_for_swiglu)


if triton is not None:

    @triton.jit
    def _swiglu_kernel(
        gate_up_ptr, weights_ptr, out_ptr, width, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Program (row, block) computes BLOCK columns of one row of the output [N, width].

        A row of gate_up [N, 2 width] is `width` numbers of gate, then `width` numbers of up.
        """
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < width
        gate_row = gate_up_ptr + row * 2 * width
        up_row = gate_up_ptr + (row * 2 + 1) * width
        gate = tl.load(gate_row + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_row + column, mask=mask, other=0.0).to(tl.float32)
        hidden = gate * tl.sigmoid(gate) * up
        if WEIGHTED:
            hidden *= tl.load(weights_ptr + row)
        tl.store(out_ptr + row * width + column, hidden.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _swiglu_backward_kernel(
        grad_ptr,
        gate_up_ptr,
        weights_ptr,
        grad_gate_up_ptr,
        grad_weights_ptr,
        width,
        WEIGHTED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """A program computes one row of grad_gate_up [N, 2 width].

        It also computes the gradient of the row's weight, which is a sum over the whole row.
        """
        row = tl.program_id(0).to(tl.int64)
        gate_row = row * 2 * width
        up_row = (row * 2 + 1) * width
        weight = tl.load(weights_ptr + row) if WEIGHTED else 1.0
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        out_type = grad_gate_up_ptr.dtype.element_ty
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < width
            grad = tl.load(grad_ptr + row * width + column, mask=mask, other=0.0)
            gate = tl.load(gate_up_ptr + gate_row + column, mask=mask, other=0.0)
            up = tl.load(gate_up_ptr + up_row + column, mask=mask, other=0.0)
            grad = grad.to(tl.float32)
            gate = gate.to(tl.float32)
            up = up.to(tl.float32)

            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            if WEIGHTED:
                total += grad * silu * up
            grad *= weight
            # d silu / d gate = sigmoid + gate sigmoid (1 - sigmoid)
            grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
            grad_up = grad * silu
            tl.store(grad_gate_up_ptr + gate_row + column, grad_gate.to(out_type), mask=mask)
            tl.store(grad_gate_up_ptr + up_row + column, grad_up.to(out_type), mask=mask)
        if WEIGHTED:
            tl.store(grad_weights_ptr + row, tl.sum(total, axis=0))


# ---------------------------------------------------------------- grouped GEMV

GEMV_MAX_ROWS = 64  # up to here, grouped matmuls of generation go row by row
GEMV_OUTPUTS = 16  # outputs at a time
GEMV_INPUTS = 256  # inputs at a time


def grouped_gemv(x_RI: Tensor, weight_EOI: Tensor, offs_E: Tensor) -> Tensor:
    """`linear.grouped_linear` without gradients, for the few rows that generation has: [R, O].

    Each row is multiplied by its expert's weight, with sums in fp32. The host does not read `offs`,
    whatever the dtype, so a CUDA graph can record the call. It needs a GPU with Triton. The
    reference is `linear.expert_loop`.
    """
    assert weight_EOI.is_contiguous()
    x_RI = x_RI.contiguous()
    experts, width, depth = weight_EOI.shape
    out_RO = x_RI.new_empty(len(x_RI), width)
    with torch.cuda.device_of(x_RI):
        _grouped_gemv_kernel[(len(x_RI), triton.cdiv(width, GEMV_OUTPUTS))](
            x_RI,
            weight_EOI,
            offs_E,
            out_RO,
            width,
            depth,
            experts,
            EXPERTS=triton.next_power_of_2(experts),
            OUTPUTS=GEMV_OUTPUTS,
            INPUTS=GEMV_INPUTS,
        )
    return out_RO


if triton is not None:

    @triton.jit
    def _grouped_gemv_kernel(
        x_ptr,
        weight_ptr,
        offs_ptr,
        out_ptr,
        width,
        depth,
        experts,
        EXPERTS: tl.constexpr,
        OUTPUTS: tl.constexpr,
        INPUTS: tl.constexpr,
    ):
        """Program (row, block) computes OUTPUTS numbers of one row of the output [R, width]: sums
        over `depth` inputs, in fp32."""
        row = tl.program_id(0)
        column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        # the row's expert is the number of experts whose rows all come before it
        e = tl.arange(0, EXPERTS)
        offs = tl.load(offs_ptr + e, mask=e < experts, other=row + 1)
        expert = tl.sum((offs <= row).to(tl.int64))
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
        out = tl.sum(total, axis=1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * width + column, out, mask=column < width)


# ---------------------------------------------------------------- torch.compile's kernels

# Row and column reductions in one kernel read memory that nothing wrote (torch 2.10 to 2.13,
# pytorch/pytorch issue 193061).
COMPILE_OPTIONS: dict[str, bool] = {"triton.mix_order_reduction": False}

# torch.compile would trace a backward pass under the autocast of its forward pass. Where the
# forward pass leaves autocast for an fp32 matmul, as the router does, the matmuls of its gradients
# would be 16-bit. Without torch.compile no backward pass runs under autocast, and so it is here.
functorch_config.backward_pass_autocast = "off"


@functools.cache
def compile_with_barriers() -> None:
    """Puts a barrier before each read of what the same kernel of torch.compile has written.

    A reduction over rows that are longer than a block takes two loops. The second loop may read
    what the first has written. Other threads may read a number than the one that wrote it, and
    torch.compile puts no barrier between (torch 2.11 to 2.13, pytorch/pytorch issue 191433). On an
    H100 the gradients of an MoE block were wrong, and differently wrong each time.
    benchmarks/check_gpu.py looks for such kernels.
    """
    # This import takes a second, so it is not at the top of the file.
    from torch._inductor.codegen.triton import TritonKernel

    load = TritonKernel.load

    def load_after_barrier(kernel, name, index):
        if name in kernel.store_buffer_names:
            kernel.body.writeline("tl.debug_barrier()")
        return load(kernel, name, index)

    TritonKernel.load = load_after_barrier
    # kernels that were made without barriers must not come from the cache
    torch.compiler.config.cache_key_tag = "barriers"


# ---------------------------------------------------------------- deterministic runs

# torch.compile would time variants of a kernel and take the fastest: not the same one in each
# process. Its own option `deterministic` stops that for reductions, which add in another order.
# Elementwise kernels vary too: with another block size the compiler merges another multiplication
# with the addition that follows it, and an element differs in its last bit (seen in AdamW's
# exp_avg_sq on an H200).
DETERMINISTIC_OPTIONS = {"deterministic": True, "triton.autotune_pointwise": False}

# The workspaces with which cuBLAS adds in a fixed order, of which PyTorch accepts no others.
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")


def set_deterministic(deterministic: bool) -> None:
    """Makes every kernel add in a fixed order, or lets it choose: for the whole process.

    Two runs on the same kind of GPU, with the same versions, then give the same bits. An operator
    that has no such kernel raises RuntimeError. The kernels of this file always add in a fixed
    order: none has atomics.

    Call it before the first matmul, at which cuBLAS reads its environment variable, and before
    torch.compile.
    """
    torch.use_deterministic_algorithms(deterministic)
    # PyTorch would also fill all memory that it hands out, to show reads of what nothing wrote.
    torch.utils.deterministic.fill_uninitialized_memory = False
    for option in DETERMINISTIC_OPTIONS:
        COMPILE_OPTIONS.pop(option, None)
    if deterministic:
        COMPILE_OPTIONS.update(DETERMINISTIC_OPTIONS)
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in DETERMINISTIC_WORKSPACES:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = DETERMINISTIC_WORKSPACES[0]


@contextlib.contextmanager
def any_order() -> Iterator[None]:
    """Lets kernels add in any order inside, for what does not enter a run's results.

    PyTorch calls a GPU's cumsum of fractions not deterministic, and generation needs it.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


# ---------------------------------------------------------------- attention


def attention_backends(device: torch.device, deterministic: bool = False):
    """The context that sets the order in which fused attention kernels are tried.

    cuDNN's is the fastest on Hopper and later (542 against 313 TFLOP/s forward on an H100), flash
    on earlier GPUs. It must hold for the whole run, as backward passes recompute attention too.

    With `deterministic` cuDNN's is left out, whose backward pass PyTorch does not call
    deterministic. After `set_deterministic(True)` the others take backward passes that are.
    """
    if device.type == "cpu":
        return contextlib.nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if deterministic:
        return sdpa_kernel(order, set_priority=True)
    if torch.cuda.get_device_capability() >= HOPPER:
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    else:
        order.insert(1, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)
