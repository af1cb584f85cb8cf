import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from moe import (
    MoE,
    Router,
    _Combine,
    _Dispatch,
    load_balancing_loss,
    router_z_loss,
)
from tests.helpers import tiny_config

B, S, D = 2, 6, 8


def make_moe(num_experts=4, top_k=2, norm_topk_prob=None, dtype=torch.float64, **changes) -> MoE:
    chosen = dict(num_experts=num_experts, top_k=top_k, norm_topk_prob=norm_topk_prob)
    layer = MoE(tiny_config(d_model=D, n_heads=2, d_ff=16, **chosen, **changes), torch.float32)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer.to(dtype)


def make_input(dtype=torch.float64):
    """Random tokens whose first feature is 1, so that the router's first column is a bias."""
    x = torch.randn(B, S, D, dtype=dtype)
    x[..., 0] = 1
    return x.requires_grad_()


def naive(layer: MoE, x):
    """The layer's output and its pairs per expert, a token and an expert at a time."""
    out, counts = [], [0] * layer.num_experts
    for token in x.flatten(0, 1):
        probs = (layer.router.weight @ token).softmax(0)
        chosen = sorted(range(len(probs)), key=lambda e: -probs[e].item())[: layer.top_k]
        total = sum(probs[e] for e in chosen) if layer.router.norm_topk_prob else 1
        y = 0
        for e in chosen:
            gate, up = layer.experts.gate_up[e]
            y = y + probs[e] / total * (
                layer.experts.down[e] @ (F.silu(gate @ token) * (up @ token))
            )
            counts[e] += 1
        out.append(y)
    return torch.stack(out).view_as(x), counts


def gradients(layer, x, y):
    return torch.autograd.grad(
        y, [x, *layer.parameters()], torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    )


def assert_equals_naive(layer):
    """Compares output, counts and all gradients with the loop's; returns the gradients, the balance and the counts."""
    x = make_input()
    y, (balance, _, counts) = layer(x)
    expected, expected_counts = naive(layer, x)
    assert y.shape == x.shape and counts.tolist() == expected_counts
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    found = gradients(layer, x, y)
    torch.testing.assert_close(found, gradients(layer, x, expected), rtol=1e-9, atol=1e-12)
    return found, balance, expected_counts


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize(
    "num_experts, top_k, norm",
    [
        (4, 2, True),
        (4, 2, False),
        (4, 1, False),
        (5, 3, True),
        (4, 4, True),
        (4, 4, False),
        (1, 1, False),
    ],
)
def test_layer_equals_a_loop_over_tokens(num_experts, top_k, norm):
    assert_equals_naive(make_moe(num_experts, top_k, norm))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("idle", [0, 1, 3])
def test_an_expert_without_tokens_has_gradients_of_exactly_zero(top_k, idle):
    layer = make_moe(top_k=top_k)
    layer.router.weight.data[idle, 0] = -100
    (_, _, *banks), _, counts = assert_equals_naive(layer)
    assert counts[idle] == 0
    for bank in banks:
        assert [(bank[e] != 0).any().item() for e in range(4)] == [count > 0 for count in counts]


@pytest.mark.parametrize("busy", [0, 2, 3])
def test_all_tokens_may_go_to_one_expert(busy):
    layer = make_moe(top_k=1)
    layer.router.weight.data[busy, 0] = 12
    _, balance, counts = assert_equals_naive(layer)
    assert counts == [B * S if e == busy else 0 for e in range(4)] and 3.9 < balance < 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["16 bits", "fp32"])
def test_layer_computes_in_the_dtype_of_its_input(dtype, stored):
    layer = make_moe(dtype=torch.float32)
    layer.experts.to(dtype if stored == "16 bits" else torch.float32)
    x = make_input(torch.float32).detach().to(dtype)
    with torch.autocast("cpu", dtype):
        y, _ = layer(x)
    assert y.dtype == dtype
    expected, _ = naive(layer.float(), x.float())
    torch.testing.assert_close(
        y.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item()
    )


# ---------------------------------------------------------------- router


def test_router_runs_in_fp32_under_autocast():
    router, x = make_moe(dtype=torch.float32).router, make_input(torch.float32).detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits, probs, weights, experts, _ = router(x)
    assert logits.dtype == probs.dtype == weights.dtype == torch.float32
    assert logits.equal(F.linear(x.float(), router.weight))
    assert probs.equal(logits.softmax(-1)) and probs.gather(-1, experts).equal(
        probs.sort(descending=True)[0][..., :2]
    )


@pytest.mark.parametrize("norm", [False, True])
def test_router_learns_from_one_expert_a_token_only_if_its_weight_is_not_normalised(norm):
    router = Router(tiny_config(d_model=D, n_heads=2, top_k=1)).double()
    torch.nn.init.normal_(router.weight)
    assert router.norm_topk_prob is False
    router.norm_topk_prob = norm
    x = make_input().detach()
    weights = router(x)[2]
    (weights * torch.randn_like(weights)).sum().backward()
    assert router.weight.grad.abs().max() < 1e-14 if norm else router.weight.grad.abs().max() > 1e-2
    assert (weights == 1).all() if norm else (weights < 1).all()


@pytest.mark.slow
def test_the_routers_gradients_are_fp32_when_it_is_compiled_under_autocast():
    """torch.compile would trace the matmuls of the backward pass under autocast, in bfloat16."""
    router = Router(tiny_config(d_model=32, top_k=2))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 64, 32, dtype=torch.bfloat16)
    results = []
    for function in (router, torch.compile(router, fullgraph=True, backend="aot_eager")):
        router.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = function(leaf)[0]
        logits.square().sum().backward()
        results.append((logits.detach(), router.weight.grad, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


# ---------------------------------------------------------------- tokens to experts and back


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("function", [_Dispatch, _Combine])
def test_dispatch_and_combine_have_the_right_gradients(function, k):
    order = torch.randperm(4 * k)
    rows = torch.randn(
        4 if function is _Dispatch else 4 * k, 3, dtype=torch.float64, requires_grad=True
    )
    assert gradcheck(function.apply, (rows, order, order.argsort(), k))


class Accumulations(TorchDispatchMode):
    """Records the shape of what operators add to at given indices, which on a GPU may happen in any order."""

    shapes: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(
            word in str(func)
            for word in ("index_put", "index_add", "scatter_add", "scatter_reduce", "embedding")
        ):
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_gradients_are_the_same_in_every_pass_and_rows_are_never_scattered():
    layer, x = make_moe(dtype=torch.float32), make_input(torch.float32)
    passes = []
    for _ in range(2):
        y, _ = layer(x)
        with Accumulations():
            passes.append(gradients(layer, x, y))
    assert all(a.equal(b) for a, b in zip(*passes))
    assert all(
        len(shape) == 1 for shape in Accumulations.shapes
    )  # the router's weights alone, each to a place of its own


# ---------------------------------------------------------------- balance


def balance_formula(probs, counts):
    """E sum_e f_e P_e of probabilities [tokens][E] and counts [E]."""
    mean = [sum(p[e] for p in probs) / len(probs) for e in range(len(counts))]
    return len(counts) * sum(c / sum(counts) * m for c, m in zip(counts, mean))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("num_experts, k", [(4, 1), (4, 2), (3, 3), (1, 1)])
def test_load_balancing_loss_is_one_at_perfect_balance_and_largest_at_collapse(
    scope, num_experts, k
):
    probs = torch.full((3, S, num_experts), 1 / num_experts)
    assert load_balancing_loss(
        probs, torch.full((3, num_experts), S * k // num_experts), scope
    ).item() == pytest.approx(1)
    one = F.one_hot(torch.zeros(3, S, dtype=torch.long), num_experts)
    assert load_balancing_loss(one.float(), one.sum(dim=1), scope).item() == pytest.approx(
        num_experts
    )


def test_load_balancing_loss_of_a_batch_takes_all_its_tokens_and_of_a_sequence_its_own():
    probs = (torch.randn(3, S, 4) * 2).softmax(-1)
    counts = F.one_hot(probs.topk(2).indices, 4).sum(dim=(1, 2))
    batch = balance_formula(probs.flatten(0, 1).tolist(), counts.sum(0).tolist())
    each = [balance_formula(p.tolist(), c.tolist()) for p, c in zip(probs, counts)]
    assert load_balancing_loss(probs, counts, "batch").item() == pytest.approx(batch, rel=1e-5)
    assert load_balancing_loss(probs, counts, "sequence").item() == pytest.approx(
        sum(each) / len(each), rel=1e-5
    )
    assert abs(batch - sum(each) / len(each)) > 1e-3


def test_router_z_loss_is_the_mean_squared_log_partition():
    logits = torch.randn(2, 3, 4) * 3
    values = [
        math.log(sum(math.exp(v) for v in token)) ** 2 for token in logits.flatten(0, 1).tolist()
    ]
    assert router_z_loss(logits).item() == pytest.approx(sum(values) / 6, rel=1e-5)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_layer_returns_the_losses_of_its_routing(scope):
    layer, x = make_moe(load_balancing_scope=scope), make_input()
    _, (balance, z, counts) = layer(x)
    logits, probs, _, experts, _ = layer.router(x)
    counts_BE = F.one_hot(experts, 4).sum(dim=(1, 2))
    assert counts.equal(counts_BE.sum(0)) and z.equal(router_z_loss(logits))
    assert balance.equal(load_balancing_loss(probs, counts_BE, scope))
    assert all(
        (torch.autograd.grad(loss, layer.router.weight, retain_graph=True)[0] != 0).any()
        for loss in (balance, z)
    )
