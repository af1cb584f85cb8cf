"""Config.flops_per_token against PyTorch's own counter.

The counter takes operators that it does not know for free; FORMULAS give it their FLOPs.
"""

import dataclasses
import functools
import operator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import engine.linear  # noqa: F401  defines the operators
from config import Config
from model import MoETransformer
from tests.helpers import tiny_config


def matmul_flops(*shape: int) -> int:
    return functools.reduce(operator.mul, shape, 2)


def grouped(x, weight, *_, **__) -> int:
    """Rows [R, I] with weights [E, O, I]: each row meets one expert."""
    return matmul_flops(*x, weight[1])


def grouped_backward(grad, x, weight, *_, **__) -> int:
    return 2 * matmul_flops(*x, weight[1])


def causal_attention(q, k, v, dropout=0.0, causal=False, *_, **__) -> int:
    """Two matmuls of [S, hd] with [hd, S] for each head; the causal mask leaves half of each."""
    assert causal
    *heads, queries, width = q
    return 2 * matmul_flops(*heads, queries, k[-2], width) // 2


def causal_attention_backward(grad, q, k, v, out, logsumexp, dropout, causal, *_, **__) -> int:
    """Two gradients for each matmul; that the scores are computed again is not counted."""
    return 2 * causal_attention(q, k, v, dropout, causal)


FORMULAS = {
    torch.ops.engine.expert_loop: grouped,
    torch.ops.engine.expert_loop_backward: grouped_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: causal_attention_backward,
}
MODELS = {
    "MoE in every second block": dict(),
    "MoE in every block, top-3": dict(moe_every=1, top_k=3),
    "top-1": dict(moe_every=1, top_k=1),
    "dense": dict(num_experts=0),
    "grouped queries": dict(n_kv_heads=2),
    "tied embeddings": dict(tie_embeddings=True),
    "dense, grouped and tied": dict(
        num_experts=0, n_kv_heads=1, tie_embeddings=True, max_seq_len=64
    ),
}


@functools.cache
def counted(config: Config) -> float:
    """FLOPs that a forward and backward pass makes for each token."""
    model = MoETransformer(config)
    tokens = torch.randint(0, config.vocab_size, (config.batch_size, config.max_seq_len))
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(tokens, tokens)[0].backward()
    return counter.get_total_flops() / tokens.numel()


def without_norms(config: Config) -> int:
    """The formula counts norms' weights as if they were matrices: 0.1% of `tiny`, else less."""
    return config.flops_per_token - 6 * config.parameter_groups["norms"]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_the_formula_is_what_is_counted(changes):
    config = tiny_config(**changes)
    assert without_norms(config) == counted(config)


WRONG = {
    "all experts": lambda c: c.flops_per_token + 6 * (c.total_params - c.active_params),
    "the embedding's look-up": lambda c: c.flops_per_token + 6 * c.parameter_groups["embedding"],
    "no head": lambda c: c.flops_per_token - 6 * c.vocab_size * c.d_model,
    "no router": lambda c: c.flops_per_token - 6 * c.parameter_groups["router"],
    "attention without its mask": lambda c: (
        c.flops_per_token + 6 * c.n_layers * c.max_seq_len * c.d_model
    ),
    "attention of the forward pass alone": lambda c: (
        c.flops_per_token - 4 * c.n_layers * c.max_seq_len * c.d_model
    ),
    "recomputation": lambda c: c.flops_per_token * 4 // 3,
}


@pytest.mark.parametrize("formula", WRONG.values(), ids=WRONG)
def test_a_wrong_formula_is_noticed(monkeypatch, formula):
    config = tiny_config()
    wrong = formula(config)
    monkeypatch.setattr(Config, "flops_per_token", wrong)
    assert without_norms(config) != counted(config)


def test_recomputation_is_counted_by_the_counter_but_not_by_the_formula():
    config = tiny_config()
    extra = {
        mode: counted(dataclasses.replace(config, activation_checkpointing=mode))
        - without_norms(config)
        for mode in ("none", "selective", "full")
    }
    assert extra["none"] == 0 < extra["selective"] < extra["full"] / 2
