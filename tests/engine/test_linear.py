"""One matmul and grouped ones: values, gradients, operators, and experts without rows."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import engine.linear as linear_module
from engine.linear import (
    _clear_idle_gradient,
    expert_loop,
    expert_loop_backward,
    fp32_matmul,
    grouped_linear,
    linear,
)

# ---------------------------------------------------------------- matmuls


def test_cublas_adds_parts_of_a_matmul_in_fp32():
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_matmul_gives_fp32_from_16_bits(dtype):
    ones = torch.ones(1, 4097, dtype=dtype)  # 4097 is no number of bfloat16, and none of float16
    found = fp32_matmul(ones, ones.T)
    assert found.dtype == torch.float32 and found.item() == 4097


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", ["compute dtype", "fp32"])
def test_a_matmul_that_is_recomputed_gives_the_same_bits(dtype, stored):
    x = torch.randn(2, 8, 16, dtype=dtype)
    weight = torch.randn(24, 16, dtype=torch.float32 if stored == "fp32" else dtype)
    upstream = torch.randn(2, 8, 24, dtype=dtype)
    results = []
    for recompute in (False, True):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = linear(*leaves, recompute=recompute)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for expected, found in zip(*results):
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        assert torch.equal(found, expected)


def test_what_addmm_would_add_is_not_read():
    x = torch.ones(2, 3)
    x[0, 0] = math.nan  # the addend is a view of this element
    out = linear(x, torch.ones(4, 3), recompute=True)
    assert out[0].isnan().all() and (out[1] == 3).all()


# ---------------------------------------------------------------- grouped linear

OFFS = [[3, 7, 12], [0, 5, 12], [5, 5, 12], [4, 12, 12], [0, 0, 12], [12, 12, 12], [0, 0, 0]]


def operands(offs, dtype=torch.float64, width=(5, 4)):
    x, weight = torch.randn(offs[-1], width[0]), torch.randn(len(offs), *reversed(width))
    return (
        x.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.tensor(offs, dtype=torch.int32),
    )


@pytest.mark.parametrize("offs", OFFS, ids=str)
def test_grouped_linear_is_a_matmul_for_each_expert(offs):
    x, weight, offs_E = operands(offs)
    expected = torch.cat([x[start:end] @ w.T for start, end, w in zip([0, *offs], offs, weight)])
    torch.testing.assert_close(grouped_linear(x, weight, offs_E), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("offs", OFFS[:2] + OFFS[-2:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_expert_loop_is_a_well_formed_operator_with_the_right_gradient(offs, dtype):
    x, weight, offs = operands(offs, dtype)
    torch.library.opcheck(expert_loop, (x, weight, offs))
    assert dtype != torch.float64 or gradcheck(expert_loop, (x, weight, offs))
    grad = torch.randn(len(x), weight.shape[1]).to(dtype)
    torch.library.opcheck(expert_loop_backward, (grad, x.detach(), weight.detach(), offs))


def test_an_idle_experts_gradient_is_cleared_whatever_it_holds():
    weight, offs = (
        torch.randn(4, 2, 3, requires_grad=True),
        torch.tensor([0, 2, 2, 5], dtype=torch.int32),
    )
    upstream = torch.randn(4, 2, 3)
    upstream[0], upstream[2], upstream[3, 0, 0] = math.nan, math.inf, math.inf
    _clear_idle_gradient(weight, offs).backward(upstream)
    assert (weight.grad[[0, 2]] == 0).all() and weight.grad[[1, 3]].equal(upstream[[1, 3]])


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("offs", [[8, 24, 32], [0, 8, 32], [5, 5, 32]], ids=str)
def test_the_grouped_gemm_of_gpus_agrees_with_the_loop(offs, monkeypatch):
    x, weight, offs = operands(offs, torch.bfloat16, width=(16, 24))
    expected = expert_loop(x, weight, offs)
    monkeypatch.setattr(linear_module, "expert_loop", None)
    y = grouped_linear(x.as_subclass(OnGpu), weight, offs)
    upstream = torch.randn_like(expected)
    found, wanted = (
        [out, *torch.autograd.grad(out, [x, weight], upstream)] for out in (y, expected)
    )
    torch.testing.assert_close(
        [t.as_subclass(torch.Tensor) for t in found], wanted, rtol=0.01, atol=0.02
    )
