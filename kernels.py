"""Triton kernels, each beside the plain PyTorch that it computes faster; and how torch.compile is to make its own."""
import functools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:         # PyTorch's builds for CPUs come without
    triton = None

# Row with column reductions in one kernel read memory that nothing wrote (torch 2.10 to 2.13, pytorch/pytorch issue 193061).
COMPILE_OPTIONS = {"triton.mix_order_reduction": False}

TILE = 128, 256, 64         # rows, columns and depth; the fastest of six on an H200
GROUP = 8                   # rows of tiles whose programs run side by side, so that operands are read from the cache


def symmetric_product(a: Tensor, b: Tensor, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0,
                      diagonal: float = 0.0) -> Tensor:
    """alpha a b^T + beta add + diagonal I where that is known to be symmetric, as [n, m, m] in a's dtype; sums in fp32.

    a and b are [n, m, k], contiguous or the transpose of a contiguous tensor: a and a itself, or two symmetric matrices that
    commute, such as polynomials of one matrix. On Hopper GPUs and later only the tiles on and under the diagonal are
    computed, and mirrored: half the work.
    """
    n, m, k = a.shape
    if triton is None or not a.is_cuda or not _has_tensor_memory_access(a.device.index) or m % 8 or k % 8:
        return plain_symmetric_product(a, b, alpha, add, beta, diagonal)
    rows, columns, depth = TILE
    tall = a.stride(-1) != 1

    def blocks(x, height):
        return TensorDescriptor.from_tensor(x.mT, [1, depth, height]) if tall else TensorDescriptor.from_tensor(x, [1, height, depth])
    out = torch.empty(n, m, m, dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(m, rows) * triton.cdiv(m, columns), n)
    _symmetric_product[grid](blocks(a, rows), blocks(b, columns), out if add is None else add, out, m, k, alpha, beta, diagonal,
                             add is not None, tall, rows, columns, depth, GROUP, num_warps=8, num_stages=3)
    return out


def plain_symmetric_product(a: Tensor, b: Tensor, alpha: float, add: Tensor | None, beta: float, diagonal: float) -> Tensor:
    """`symmetric_product` in full, for any device and dtype."""
    out = torch.bmm(a, b.mT) * alpha if add is None else torch.baddbmm(add, a, b.mT, beta=beta, alpha=alpha)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


@functools.cache
def _has_tensor_memory_access(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def compile_with_barriers() -> None:
    """Lets torch.compile's kernels wait before they read what they have written.

    A reduction over rows that are longer than a block takes two loops, and the second may read back what the first wrote: other
    threads than those that wrote it, without a barrier (torch 2.11 to 2.13, pytorch/pytorch issue 191433). On an H100 an MoE
    block's gradients were garbage, other garbage each time. benchmarks/check_gpu.py looks for such kernels.
    """
    from torch._inductor.codegen.triton import TritonKernel     # a second's import, for who compiles
    load = TritonKernel.load

    def load_after_barrier(kernel, name, index):
        if name in kernel.store_buffer_names:
            kernel.body.writeline("tl.debug_barrier()")         # between the loops
        return load(kernel, name, index)
    TritonKernel.load = load_after_barrier
    torch.compiler.config.cache_key_tag = "barriers"        # kernels that were made without are not to come from the cache


if triton is not None:
    @triton.jit
    def _symmetric_product(a_blocks, b_blocks, add_ptr, out_ptr, m, k, alpha, beta, diagonal, ADD: tl.constexpr,
                           TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
        tiles_n = tl.cdiv(m, COLUMNS)
        tile = tl.program_id(0)
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(tl.cdiv(m, ROWS) - first, GROUP)
        row = (first + tile % (GROUP * tiles_n) % height) * ROWS
        column = tile % (GROUP * tiles_n) // height * COLUMNS
        if column >= row + ROWS:        # above the diagonal: another tile's mirror image
            return
        matrix = tl.program_id(1)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, k, DEPTH):        # what lies outside is read as zero
            if TALL:
                a = a_blocks.load([matrix, start, row]).reshape(DEPTH, ROWS).T
                b = b_blocks.load([matrix, start, column]).reshape(DEPTH, COLUMNS)
            else:
                a = a_blocks.load([matrix, row, start]).reshape(ROWS, DEPTH)
                b = b_blocks.load([matrix, column, start]).reshape(COLUMNS, DEPTH).T
            total = tl.dot(a, b, total)
        total *= alpha
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        corner = matrix.to(tl.int64) * m * m
        here = corner + rows.to(tl.int64)[:, None] * m + columns[None, :]
        lower = (rows[:, None] >= columns[None, :]) & (rows[:, None] < m)
        if ADD:
            total += beta * tl.load(add_ptr + here, mask=lower, other=0.0).to(tl.float32)
        total += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
        result = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + here, result, mask=lower)
        tl.store(out_ptr + corner + columns.to(tl.int64)[:, None] * m + rows[None, :], tl.trans(result), mask=tl.trans(lower))
