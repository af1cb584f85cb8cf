"""The arithmetic of the profile; what it measures needs a GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import muon
from benchmarks import profile_step
from tests.helpers import shared_experts_by_seed, tiny_config


def event(name, start, end):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_kernels_are_summed_by_kind_and_the_optimizers_are_apart():
    events = [
        event(profile_step.OPTIMIZER, 10, 20),
        event("nvjet_tst_128x256", 0, 5),
        event("nvjet_tst_128x256", 5, 6),
        event("triton_poi_fused_add_0", 4, 8),
        event("_symmetric_matmul", 12, 15),
    ]
    found = profile_step._by_kind(events, wall=20e-6)
    assert found.kinds == pytest.approx(
        {
            "products": 6e-6,
            "elementwise": 4e-6,
            "optimizer: products": 3e-6,
            "optimizer (wall)": 10e-6,
            "gaps": 9e-6,  # 20 less the union of the kernels: 0 to 8, 12 to 15
        }
    )
    longest = found.kernels[0]
    assert (longest.name, longest.calls) == ("nvjet_tst_128x256", 2)


@pytest.mark.parametrize("m, k", [(24, 24), (24, 40)])
def test_gram_newton_schulz_flops_are_those_of_its_matmuls(monkeypatch, m, k):
    """Counted on a CPU, where a symmetric matmul computes both triangles."""
    symmetric = []

    def counted(a, b, *arguments, **named_arguments):
        with FlopCounterMode(display=False) as counter:
            product = original(a, b, *arguments, **named_arguments)
        symmetric.append(counter.get_total_flops())
        return product

    original = muon.symmetric_matmul
    monkeypatch.setattr(muon, "symmetric_matmul", counted)
    with FlopCounterMode(display=False) as counter:
        x = torch.randn(1, m, k)
        muon.gram_newton_schulz(x / x.norm())
    whole = counter.get_total_flops()
    assert profile_step.gram_newton_schulz_flops(m, k) == whole - sum(symmetric) / 2


def test_floors_grow_with_the_batch_but_for_the_optimizers():
    config = tiny_config(precision="bf16")
    twice = tiny_config(precision="bf16", batch_size=2 * config.batch_size)
    one = profile_step.floors(config, matmul_rate=1e12, bandwidth=1e12)
    two = profile_step.floors(twice, matmul_rate=1e12, bandwidth=1e12)
    assert two["products"] == pytest.approx(2 * one["products"])
    assert two["attention"] == pytest.approx(2 * one["attention"])
    assert two["optimizer: products"] == one["optimizer: products"] > 0
    assert two["optimizer: elementwise"] == one["optimizer: elementwise"] > 0


def test_elementwise_floor_counts_every_network_of_a_block(monkeypatch):
    shared_experts_by_seed(monkeypatch)
    config = tiny_config(precision="bf16")
    wider = tiny_config(precision="bf16", seed=2)
    without, floor = (
        profile_step.floors(c, 1e12, bandwidth=1)["elementwise"] for c in (config, wider)
    )

    # SwiGLU's 3 and 5 rows of the hidden width, and a row more in two sums
    elements = 8 * 2 * config.d_ff + 2 * config.d_model
    activations = 2 * elements * config.n_moe_layers * config.tokens_per_step
    accumulated = config.gradient_accumulation_steps - 1
    gradients = 3 * 2 * accumulated * (wider.total_params - config.total_params)
    assert floor - without == activations + gradients


def test_elementwise_floor_of_a_dense_block():
    """Rows that each pass reads and writes for a token, summed by hand."""
    config = tiny_config(precision="bf16", num_experts=0)
    d = config.d_model
    queries_and_keys = d + config.n_kv_heads * config.head_dim
    attention_norm = 2 * d
    sum_and_ffn_norm = 4 * d
    second_sum = 3 * d
    norms_backward = 2 * 4 * d
    rotations = (2 + 3) * queries_and_keys
    swiglu = (3 + 5) * config.d_ff
    expected = attention_norm + sum_and_ffn_norm + second_sum + norms_backward + rotations + swiglu
    assert profile_step._elementwise_per_token(config, layer=0) == expected
