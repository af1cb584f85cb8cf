"""The reference versions, which a CPU runs. benchmarks/check_gpu.py holds the kernels to them."""

import os

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torchtune.modules import RotaryPositionalEmbeddings

from engine import triton_kernels
from engine.triton_kernels import (
    any_order,
    attention_backends,
    qk_norm_rope,
    set_deterministic,
    swiglu,
    symmetric_matmul,
)


@pytest.mark.parametrize("workspace", [None, ":16:8", ":0:0"])
@pytest.mark.slow
def test_deterministic_is_set_and_unset_for_the_whole_process(monkeypatch, workspace):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace or "")
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert triton_kernels.COMPILE_OPTIONS["deterministic"] is True
        assert triton_kernels.COMPILE_OPTIONS["triton.autotune_pointwise"] is False
        expected = ":16:8" if workspace == ":16:8" else ":4096:8"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
        with any_order():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        torch.compile(torch.relu, options=triton_kernels.COMPILE_OPTIONS)  # knows the option
    finally:
        set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    for option in triton_kernels.DETERMINISTIC_OPTIONS:
        assert option not in triton_kernels.COMPILE_OPTIONS
    with any_order():
        pass
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_attention_is_not_cudnns():
    with attention_backends(torch.device("cuda"), deterministic=True):
        assert SDPBackend.CUDNN_ATTENTION not in _cur_sdpa_kernel_backends()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qk_norm_rope_is_a_norm_and_torchtunes_rotation(dtype):
    x, weight = torch.randn(2, 5, 3, 8, dtype=dtype), torch.rand(8) + 0.5
    rope, norm = RotaryPositionalEmbeddings(8, 16), torch.nn.RMSNorm(8, eps=1e-6)
    norm.weight.data.copy_(weight)
    results = []
    for function in (
        lambda x: qk_norm_rope(x, norm.weight, rope.cache, 1e-6),
        lambda x: rope(norm(x.float()).to(dtype)),
    ):
        leaf = x.clone().requires_grad_()
        norm.zero_grad()
        out = function(leaf)
        out.backward(torch.ones_like(out))
        results.append((out.detach(), leaf.grad, norm.weight.grad))
    torch.testing.assert_close(*results)


def test_swiglu_gates_and_weighs_each_row():
    gate_up, weights = torch.randn(4, 12, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    gate, up = gate_up[:, :6], gate_up[:, 6:]
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(swiglu(gate_up), expected)
    torch.testing.assert_close(swiglu(gate_up, weights), expected * weights[:, None])


def test_swiglu_keeps_the_rows_dtype_whatever_the_weights():
    assert swiglu(torch.randn(4, 12, dtype=torch.bfloat16), torch.rand(4)).dtype == torch.bfloat16


@pytest.mark.parametrize("tall", [False, True])
def test_symmetric_matmul_is_its_sum(tall):
    a = torch.randn(2, 6, 10, dtype=torch.float64)
    a = a.mT.contiguous().mT if tall else a
    add = torch.randn(2, 6, 6, dtype=torch.float64)
    kept = add.clone()
    found = symmetric_matmul(a, a, 0.7, add, -1.3, 0.4)
    torch.testing.assert_close(
        found, 0.7 * a @ a.mT - 1.3 * add + 0.4 * torch.eye(6, dtype=torch.float64)
    )
    torch.testing.assert_close(symmetric_matmul(a, a), a @ a.mT)
    torch.testing.assert_close(symmetric_matmul(a, a, 0.7), 0.7 * a @ a.mT)
    assert torch.equal(add, kept)
