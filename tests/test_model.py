"""The whole model: an independent implementation, checkpointing, accumulation, the chunked loss, tables, compilation."""

import dataclasses
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import model as model_module
from config import IGNORED_TARGET, ExperimentError
from engine.linear import linear
from engine.triton_kernels import qk_norm_rope
from generate import generate
from model import Attention, MoETransformer, SwiGLU, chunked_cross_entropy
from tests.helpers import tiny_config

MODES = ["none", "selective", "full"]


def build(**changes) -> MoETransformer:
    model = MoETransformer(tiny_config(**changes))
    with torch.no_grad():  # initial norms are all ones and would hide a missing one
        for p in model.parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5)
    return model


def batch(model, sequences=2, seed=0):
    c = model.config
    tokens = torch.randint(
        c.vocab_size, (sequences, c.max_seq_len + 1), generator=torch.Generator().manual_seed(seed)
    )
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model, inputs, targets, scale=1.0):
    model.zero_grad()
    loss, metrics = model(inputs, targets)
    (loss * scale).backward()
    return loss.detach(), metrics, {name: p.grad.clone() for name, p in model.named_parameters()}


def error(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_close(found: dict, expected: dict, bound: float):
    assert found.keys() == expected.keys()
    wrong = {
        name: e
        for name in expected
        if not (e := error(found[name].double(), expected[name].double())) <= bound
    }
    assert not wrong


# ---------------------------------------------------------------- an independent implementation


def to_hugging_face(name: str, value: torch.Tensor, c) -> dict[str, torch.Tensor]:
    """Our tensor under Hugging Face's names and layout. Rotary pairs are neighbours here, and half a head apart there."""

    def halves(x, heads):
        return x.unflatten(0, (heads, c.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    parts = name.split(".")
    if parts[0] != "blocks":
        return {
            dict(embedding="model.embed_tokens", norm="model.norm", head="lm_head")[parts[0]]
            + ".weight": value
        }
    layer, rest = f"model.layers.{parts[1]}.", ".".join(parts[2:])
    if rest == "attention.q.weight":
        return {layer + "self_attn.q_proj.weight": halves(value, c.n_heads)}
    if rest == "attention.k.weight":
        return {layer + "self_attn.k_proj.weight": halves(value, c.n_kv_heads)}
    if rest in ("attention.q_norm.weight", "attention.k_norm.weight"):
        return {layer + "self_attn." + parts[3] + ".weight": halves(value, 1)}
    if rest == "ffn.gate_up":
        return {layer + "mlp.gate_proj.weight": value[0], layer + "mlp.up_proj.weight": value[1]}
    if rest == "ffn.experts.gate_up":
        return {layer + "mlp.experts.gate_up_proj": value.flatten(1, 2)}
    theirs = {
        "attention_norm.weight": "input_layernorm.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "attention.v.weight": "self_attn.v_proj.weight",
        "attention.o.weight": "self_attn.o_proj.weight",
        "ffn.down": "mlp.down_proj.weight",
        "ffn.experts.down": "mlp.experts.down_proj",
        "ffn.router.weight": "mlp.gate.weight",
    }
    return {layer + theirs[rest]: value}


def hugging_face(model):
    c = model.config
    theirs = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            moe_intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            num_experts=c.num_experts,
            num_experts_per_tok=c.top_k,
            decoder_sparse_step=c.moe_every,
            mlp_only_layers=[],
            norm_topk_prob=c.norm_topk_prob,
            max_position_embeddings=c.max_seq_len,
            tie_word_embeddings=c.tie_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
            attn_implementation="eager",
            use_cache=False,
        )
    )
    state = {
        k: v
        for name, p in model.named_parameters()
        for k, v in to_hugging_face(name, p.detach(), c).items()
    }
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if c.tie_embeddings else set())
    return theirs.train()


@pytest.mark.parametrize(
    "changes",
    [
        dict(moe_every=1),
        dict(moe_every=2, n_kv_heads=2),
        dict(moe_every=3, n_layers=6),
        dict(moe_every=1, tie_embeddings=True),
        dict(moe_every=2, n_kv_heads=1, tie_embeddings=True, top_k=1),
        dict(moe_every=1, top_k=3, norm_topk_prob=False),
        dict(moe_every=3, n_kv_heads=2, rope_theta=1e6),
    ],
    ids=str,
)
def test_logits_and_gradients_equal_an_independent_implementation(changes):
    ours = build(load_balancing_weight=0.0, init_std=0.2, **changes)
    theirs = hugging_face(ours)
    inputs, targets = batch(ours)
    expected = theirs(inputs).logits
    assert error(ours(inputs), expected) < 1e-4
    loss, _, found = gradients(ours, inputs, targets)
    reference = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    found = {
        k: v for name, g in found.items() for k, v in to_hugging_face(name, g, ours.config).items()
    }
    assert_close(found, expected, 1e-4)


def test_a_later_token_changes_nothing_before_it():
    model = build()
    inputs, _ = batch(model)
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % model.config.vocab_size
    before, after = model(inputs), model(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5) and not torch.allclose(
        before[:, 9:], after[:, 9:], atol=1e-3
    )


# ---------------------------------------------------------------- checkpointing and accumulation


class Count(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[str(op)] = self.calls.get(str(op), 0) + 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "mode, lighter", [("selective", 0), ("full", 0), ("selective", 2), ("full", 3)]
)
def test_checkpointing_changes_neither_gradients_nor_routing(mode, lighter, precision):
    models = [
        build(precision=precision, **changes)
        for changes in (
            dict(activation_checkpointing="none"),
            dict(activation_checkpointing=mode, lighter_blocks=lighter),
        )
    ]
    models[1].load_state_dict(models[0].state_dict())
    (_, kept, expected), (_, recomputed, found) = (gradients(m, *batch(m)) for m in models)
    assert torch.equal(kept["expert_counts"], recomputed["expert_counts"])
    assert_close(found, expected, 1e-6)


def test_checkpointing_recomputes_what_it_should():
    """In the backward pass: none runs no forward product again, selective those of values and of attention's output, full each
    once; no mode chooses experts a second time."""
    calls = {}
    for mode in MODES:
        model = build(activation_checkpointing=mode)
        loss, _ = model(*batch(model))
        with Count() as count:
            loss.backward()
        calls[mode] = count.calls
    attention, experts = (
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "engine.expert_loop.default",
    )
    for op, forward in ((attention, 4), (experts, 4)):
        assert [calls[mode].get(op, 0) for mode in MODES] == [0, 0, forward]
    # values and attention's output, of 4 blocks
    matmul, recomputed_matmul = "aten.mm.default", "aten.addmm.default"
    assert [calls[mode].get(recomputed_matmul, 0) for mode in MODES] == [0, 4 * 2, 4 * 2]
    assert calls["selective"][matmul] == calls["none"][matmul]
    # 4 blocks x (q, k) + 2 dense x gate_up + 2 routers; nothing needs the outcome of a dense block's last product
    assert calls["full"][matmul] == calls["none"][matmul] + 4 * 2 + 2 + 2
    assert not any("topk" in op or "on_host" in op for mode in MODES for op in calls[mode])
    model = build(activation_checkpointing="full", lighter_blocks=3)
    loss, _ = model(*batch(model))
    with Count() as count:
        loss.backward()
    assert count.calls[attention] == 1, "the first block alone attends again"
    assert (
        calls["selective"].get("aten.silu.default", 0)
        > 0
        == calls["none"].get("aten.silu.default", 0)
    )


def concatenated_project(attention, x_BSD, positions_S=None):
    """`Attention.project` with one matmul for queries, keys and values, which is then split."""
    weights = [attention.q.weight, attention.k.weight, attention.v.weight]
    heads = [len(weight) // attention.head_dim for weight in weights]
    out = linear(x_BSD, torch.cat(weights)).unflatten(-1, (-1, attention.head_dim))
    q, k, v = out.split(heads, dim=2)
    angles = attention.rope.cache
    q = qk_norm_rope(q, attention.q_norm.weight, angles, attention.q_norm.eps)
    k = qk_norm_rope(k, attention.k_norm.weight, angles, attention.k_norm.eps)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def recomputed_operators() -> Counter:
    """Calls in a backward pass under selective checkpointing beyond those without checkpointing."""
    calls = {}
    for mode in ("none", "selective"):
        model = build(n_kv_heads=2, activation_checkpointing=mode)
        loss, _ = model(*batch(model))
        with Count() as count:
            loss.backward()
        calls[mode] = Counter(count.calls)
    calls["selective"].subtract(calls["none"])
    return calls["selective"]


def test_what_is_recomputed_does_not_depend_on_the_number_of_matmuls(monkeypatch):
    """The policy names operators. One that counted matmuls would now keep or recompute others."""
    separate = recomputed_operators()
    monkeypatch.setattr(Attention, "project", concatenated_project)
    concatenated = recomputed_operators()
    for operator in (
        "aten.mm.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "engine.expert_loop.default",
        "aten.topk.default",
    ):
        assert separate[operator] == concatenated[operator] == 0, operator
    # attention's output in 4 blocks, and values where they have a matmul of their own
    assert separate["aten.addmm.default"] == 4 * 2
    assert concatenated["aten.addmm.default"] == 4
    for operator in ("aten.rsqrt.default", "aten.silu.default", "aten.stack.default"):
        assert separate[operator] == concatenated[operator] > 0, operator


@pytest.mark.parametrize(
    "changes, equal",
    [
        (dict(load_balancing_weight=0.0), True),
        (dict(load_balancing_weight=1.0, load_balancing_scope="sequence"), True),
        (dict(load_balancing_weight=1.0, load_balancing_scope="batch"), False),
    ],
    ids=str,
)
def test_eight_micro_batches_of_one_are_one_of_eight(changes, equal):
    model = build(router_z_loss_weight=0.1, moe_every=1, **changes)
    inputs, targets = batch(model, 8)
    _, _, expected = gradients(model, inputs, targets)
    model.zero_grad()
    for i in range(8):
        (model(inputs[i : i + 1], targets[i : i + 1])[0] / 8).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    if equal:
        assert_close(found, expected, 1e-5)
    else:
        assert (
            error(found["blocks.1.ffn.router.weight"], expected["blocks.1.ffn.router.weight"])
            > 0.01
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_embedding_and_head_sum_their_gradients_in_fp32(precision, tied):
    """Over the tokens of a micro-batch, over micro-batches, and over both uses of a tied weight."""
    shape = dict(precision=precision, n_layers=1, num_experts=0)
    model = build(**shape, tie_embeddings=tied)
    inputs, targets = batch(model, 8)
    parameters = dict(model.named_parameters())
    names = {"embedding.weight", "head.weight"} & parameters.keys()

    def accumulate(i: int) -> None:
        model(inputs[i : i + 1], targets[i : i + 1])[0].backward()

    expected = {name: torch.zeros_like(parameters[name], dtype=torch.float64) for name in names}
    for i in range(8):
        model.zero_grad()
        accumulate(i)
        for name in names:
            assert parameters[name].grad.dtype == torch.float32
            expected[name] += parameters[name].grad
    model.zero_grad()
    for i in range(8):
        accumulate(i)
    assert_close({name: parameters[name].grad for name in names}, expected, 1e-6)

    if tied:
        untied = build(**shape)
        with torch.no_grad():
            for name, p in untied.named_parameters():
                p.copy_(parameters.get(name, parameters["embedding.weight"]))
        _, _, parts = gradients(untied, inputs, targets)
        _, _, whole = gradients(model, inputs, targets)
        parts_sum = parts["embedding.weight"] + parts["head.weight"]
        assert error(whole["embedding.weight"], parts_sum) < 1e-6


def test_metrics_are_those_of_the_logits():
    for c in (dict(moe_every=2), dict(num_experts=0)):
        model = build(load_balancing_weight=0.5, router_z_loss_weight=0.25, **c)
        inputs, targets = batch(model)
        loss, metrics = model(inputs, targets)
        logits = model(inputs)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert metrics["cross_entropy"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
        assert metrics["correct"].item() == (logits.argmax(-1) == targets).sum().item()
        if model.config.num_experts:
            assert (
                metrics["expert_counts"].shape == (2, 4)
                and (metrics["expert_counts"].sum(1) == 2 * 16 * 2).all()
            )
            auxiliary = 2 * (0.5 * metrics["load_balancing_loss"] + 0.25 * metrics["router_z_loss"])
            assert loss.item() == pytest.approx((cross_entropy + auxiliary).item(), rel=1e-5)
        else:
            assert loss == metrics["cross_entropy"] and "expert_counts" not in metrics


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("masters", ["split", "fp32"])
def test_every_precision_gives_fp32_logits_and_about_the_same_gradients(precision, masters):
    exact = build()
    model = MoETransformer(tiny_config(precision=precision, master_weights=masters))
    with torch.no_grad():
        for p, q in zip(model.parameters(), exact.parameters()):
            p.copy_(q)
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        precision if masters == "split" else "", torch.float32
    )
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if p.ndim == 1 or "router" in name else narrow), name
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: streams.append(out[0].dtype))
    assert model(batch(model)[0]).dtype == torch.float32
    assert set(streams) == {model_module.COMPUTE_DTYPE[precision]}
    scale = 1024.0 if precision == "fp16" else 1.0
    loss, metrics, found = gradients(model, *batch(model), scale)
    expected_loss, exact_metrics, expected = gradients(exact, *batch(model))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(
        expected_loss.item(), rel=2e-3
    )
    if torch.equal(metrics["expert_counts"], exact_metrics["expert_counts"]):
        for name in (
            "embedding.weight",
            "head.weight",
            "blocks.0.attention.q.weight",
            "blocks.3.ffn.experts.down",
        ):
            assert error(found[name].float() / scale, expected[name]) < 0.1, name


# ---------------------------------------------------------------- the loss


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("gradient", [0.1, 1.0, 4096.0])
def test_chunked_loss_equals_plain_cross_entropy(monkeypatch, dtype, bound, gradient):
    monkeypatch.setattr(model_module, "LOSS_CHUNK", 16)
    x = torch.randn(100, 24).to(dtype).requires_grad_()
    weight = torch.randn(501, 24).div(5).to(dtype).requires_grad_()
    targets = torch.randint(501, (100,))
    with Largest() as largest:
        loss, correct = chunked_cross_entropy(x, weight, targets)
        (loss * gradient).backward()
    assert largest.elements <= max(weight.numel(), 16 * 501), (
        "the [tokens, vocabulary] matrix never exists"
    )
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = wide_x @ wide_weight.T
    expected = F.cross_entropy(logits, targets)
    (expected * gradient).backward()
    # The logits of 16-bit inputs are not rounded to 16 bits.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert correct == (logits.argmax(-1) == targets).sum()
    assert x.grad.dtype == weight.grad.dtype == dtype  # autograd rounds what it adds to weight.grad
    assert (
        error(x.grad.double(), wide_x.grad) < bound
        and error(weight.grad.double(), wide_weight.grad) < bound
    )


@torch.no_grad()
def test_ignored_targets_are_in_no_loss(monkeypatch):
    """Also where a whole chunk is ignored."""
    monkeypatch.setattr(model_module, "LOSS_CHUNK", 16)
    x, weight = torch.randn(100, 24), torch.randn(501, 24)
    targets = torch.randint(501, (100,))
    targets[5:9] = (x[5:9] @ weight.T).argmax(-1)
    x[50:60] = 10 * weight[0]  # predicts token 0, which stands in for an ignored target
    ignored = targets.clone()
    ignored[40:] = IGNORED_TARGET
    loss, correct = chunked_cross_entropy(x, weight, ignored)
    expected, expected_correct = chunked_cross_entropy(x[:40], weight, targets[:40])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert correct == expected_correct >= 4


def test_chunked_loss_sums_the_heads_gradient_in_fp32(monkeypatch):
    """128 chunks summed in bfloat16 would be 1.4% off."""
    monkeypatch.setattr(model_module, "LOSS_CHUNK", 8)
    x, weight = torch.randn(1024, 16).bfloat16(), torch.randn(64, 16).bfloat16().requires_grad_()
    targets = torch.randint(4, (1024,))
    chunked_cross_entropy(x, weight, targets)[0].backward()
    wide = weight.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ wide.T, targets).backward()
    assert error(weight.grad.double(), wide.grad) < 4e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_logits_are_not_rounded_to_16_bits(precision):
    model = build(precision=precision)
    inputs, _ = batch(model)
    with torch.no_grad():
        logits = model(inputs)
        x, _ = model.hidden(inputs)
    exact = x.double() @ model.head_weight.double().T
    assert logits.dtype == torch.float32
    assert error(logits.double(), exact) < 1e-6


def test_small_probabilities_reach_the_head_in_fp16():
    """Probabilities of 1e-8 are zero in fp16, unless they are scaled up first."""
    weight = torch.zeros(300, 8, dtype=torch.float16)
    weight[0, 0] = 18.0
    weight.requires_grad_()
    x = torch.ones(4, 8, dtype=torch.float16)
    loss, _ = chunked_cross_entropy(x, weight, torch.zeros(4, dtype=torch.long))
    (loss * 65536).backward()
    assert weight.grad[1:].float().mean().item() == pytest.approx(65536 * 1.523e-8, rel=0.02)


def test_no_gradient_forward_equals_the_training_forward():
    model = build()
    trained = model(*batch(model))[0]
    with torch.no_grad():
        assert model(*batch(model))[0] == trained


# ---------------------------------------------------------------- materialising and tables


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
    ],
)
def test_rotary_tables_are_fresh_fp32_after_any_move(move):
    fresh = build().rope.cache.clone()
    with torch.device("meta"):
        bare = MoETransformer(tiny_config())
    for model in (move(build()), bare.to_empty(device="cpu") and move(bare)):
        assert model.rope.cache.dtype == torch.float32 and torch.equal(model.rope.cache, fresh)
        assert all(block.attention.rope is model.rope for block in model.blocks)


def test_gradients_stay_fp32_when_parameters_are_replaced():
    with torch.device("meta"):
        model = MoETransformer(tiny_config(precision="bf16"))
    assert model.embedding.weight.grad_dtype == torch.float32
    model.materialize("cpu")
    for weight in (model.embedding.weight, model.head.weight):
        assert weight.dtype == torch.bfloat16 and weight.grad_dtype == torch.float32
    assert model.blocks[0].attention.q.weight.grad_dtype == torch.bfloat16
    model.double()
    assert model.head.weight.grad_dtype == torch.float64


def test_a_materialised_model_is_the_directly_built_one():
    config = tiny_config(precision="bf16")
    with torch.device("meta"):
        late = MoETransformer(config)
    late.materialize("cpu")
    for p, q in zip(late.parameters(), MoETransformer(config).parameters()):
        assert torch.equal(p, q) and p.dtype == q.dtype
    other = MoETransformer(dataclasses.replace(config, seed=5))
    assert not torch.equal(other.head.weight, late.head.weight)


def test_initial_weights_have_their_spread():
    model = MoETransformer(tiny_config(d_model=128, d_ff=256))
    parameters = dict(model.named_parameters())
    residual = 0.02 / 8**0.5
    for name, std in (
        ("embedding.weight", 0.02),
        ("blocks.1.ffn.experts.gate_up", 0.02),
        ("blocks.0.attention.q.weight", 0.02),
        ("blocks.0.attention.o.weight", residual),
        ("blocks.0.ffn.down", residual),
        ("blocks.1.ffn.experts.down", residual),
    ):
        assert parameters[name].std().item() == pytest.approx(std, rel=0.05), name
    assert not torch.equal(
        parameters["blocks.1.ffn.experts.down"][0], parameters["blocks.1.ffn.experts.down"][1]
    )
    starts = [
        m.flatten()[:100].sign()
        for p in parameters.values()
        if p.ndim > 1
        for m in p.detach().view(-1, *p.shape[-2:])
    ]
    assert len(torch.stack(starts).unique(dim=0)) == len(starts), (
        "every matrix draws numbers of its own"
    )
    assert (parameters["norm.weight"] == 1).all()


def test_a_model_with_other_parameters_than_the_table_is_refused(monkeypatch):
    """The planner, the optimizers and the counts read the table, and not the model."""
    config = tiny_config()

    class WithGateBias(SwiGLU):
        def __init__(self, config, dtype):
            super().__init__(config, dtype)
            self.bias = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(model_module, "SwiGLU", WithGateBias)
    total = f"{config.total_params:,}"
    more = f"{config.total_params + 2 * 3:,}"  # in 2 dense blocks
    with pytest.raises(ExperimentError, match=f"{more} parameters, .*{total}") as raised:
        MoETransformer(config)
    names = re.findall(r"^  (\S+): \(3,\) in the model, absent", str(raised.value), re.M)
    assert names == ["blocks.0.ffn.bias", "blocks.2.ffn.bias"]


def test_a_parameter_of_another_shape_than_in_the_table_is_refused(monkeypatch):
    class Narrow(SwiGLU):
        def __init__(self, config, dtype):
            super().__init__(dataclasses.replace(config, d_ff=24), dtype)

    monkeypatch.setattr(model_module, "SwiGLU", Narrow)
    with pytest.raises(ExperimentError, match=r"ffn.down: \(32, 24\) in the model, \(32, 48\)"):
        MoETransformer(tiny_config())


# ---------------------------------------------------------------- compilation


def block_graphs(monkeypatch, make_backend) -> list:
    """The graphs that compile_blocks makes of blocks from now on; the loss is not compiled."""
    torch._dynamo.reset()
    seen = []
    run = make_backend()

    def backend(graph, inputs):
        seen.append(graph)
        return run(graph, inputs)

    compile_module = torch.nn.Module.compile
    compile_function = torch.compile

    def compile_block(self, **kwargs):
        return compile_module(self, **kwargs | dict(backend=backend, options=None))

    def compile_other(function, **kwargs):
        if function is model_module.chunk_loss:
            return function
        return compile_function(function, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    monkeypatch.setattr(torch, "compile", compile_other)
    return seen


def aot_eager():
    """Forward and backward pass are traced, cut apart and run as they are."""
    from torch._dynamo.backends.debugging import aot_eager as backend

    return backend


def eager():
    """The graph is run as it was captured: several times faster to make."""
    return lambda graph, inputs: graph.forward


@pytest.fixture
def traced_graphs(monkeypatch):
    yield block_graphs(monkeypatch, aot_eager)
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    yield block_graphs(monkeypatch, eager)
    torch._dynamo.reset()


# Of two modes, the first half of the blocks has one and the second half the lighter one.
@pytest.mark.slow
@pytest.mark.parametrize("mode, lighter, count", [("none", 0, 2), ("full", 4, 4)])
@pytest.mark.filterwarnings("ignore")
def test_all_layers_share_one_graph_for_dense_and_one_for_moe_blocks(
    traced_graphs, mode, lighter, count
):
    shape = dict(n_layers=8, moe_every=2, activation_checkpointing=mode, lighter_blocks=lighter)
    reference, compiled = build(**shape), build(**shape)
    compiled.load_state_dict(reference.state_dict())
    compiled.compile_blocks()
    loss, metrics, found = gradients(compiled, *batch(compiled))
    assert len(traced_graphs) == count
    gradients(compiled, *batch(compiled, seed=1))
    assert len(traced_graphs) == count
    expected_loss, expected_metrics, expected = gradients(reference, *batch(reference))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert torch.equal(metrics["expert_counts"], expected_metrics["expert_counts"])
    assert_close(found, expected, 1e-5)


@pytest.mark.slow
def test_a_graph_break_is_an_error(graphs):
    """A block that cannot be compiled whole must fail, not fall back silently."""
    model = build(n_layers=2)
    model.blocks[0].ffn.forward = lambda x: (torch._dynamo.graph_break(), x)[1]
    model.compile_blocks()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(*batch(model))


@pytest.mark.slow
def test_batches_of_other_shapes_leave_training_with_graphs_of_fixed_shape(graphs):
    model = build(n_layers=2, moe_every=1)
    model.compile_blocks()
    with torch.no_grad():
        for sequences in (3, 2):
            model(*batch(model, sequences))
    gradients(model, *batch(model, 3))
    inputs = [
        node.meta["example_value"]
        for graph in graphs
        for node in graph.graph.nodes
        if node.op == "placeholder"
    ]
    # Of the one kind of block: two shapes without gradients, and training.
    assert len(graphs) == 3
    assert not any(isinstance(value, torch.SymInt) for value in inputs)


@pytest.mark.slow
def test_training_and_validation_compile_at_most_six_graphs(graphs):
    """torch._dynamo's limit is eight for one function, and one more would be an error."""
    model = build(n_layers=4, moe_every=2, activation_checkpointing="full", lighter_blocks=2)
    model.compile_blocks()
    for _ in range(2):
        gradients(model.train(), *batch(model))
        model.eval()
        inputs, targets = batch(model)
        targets = targets.clone()  # a view of the inputs' tensor
        targets[-1] = IGNORED_TARGET
        with torch.no_grad():
            model(inputs, targets)
        assert len(graphs) == 6


@pytest.mark.slow
def test_evaluation_and_generation_compile_no_graph_for_each_length(graphs):
    model = build(n_layers=2)
    model.compile_blocks()
    gradients(model, *batch(model))
    model.eval()
    with torch.no_grad():
        model(*batch(model))
    before = len(graphs)
    assert before <= 4
    generate(model, [1, 2], 12)
    assert len(graphs) == before
