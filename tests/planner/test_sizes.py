"""Predicted bytes against real tensors and measured peaks."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from config import (
    OPTIMIZER_BUCKET,
    PRESETS,
    Config,
    FeedForward,
    OptimizerGroup,
    optimizer_groups,
    parameter_table,
)
from engine.offload import GradientOffload
from engine.ownership import is_even, ownership
from model import COMPUTE_DTYPE, MoETransformer
from moe import MoE, SwiGLU
from muon import build_optimizers
from planner.machine import Machine, find_machine
from planner.plan import build_plan, memory_table
from planner.sharing import gradient_groups, owned_elements
from planner.sizes import (
    CPU_LIBRARY_GB,
    MemoryPredictor,
    Summing,
    _gradients_under_way,
    activation_bytes_per_token,
    checkpoint_gb,
    optimizer_bytes,
    predict_memory,
)
from tests.helpers import shared_experts_by_seed, tiny_config, write_checkpoint

COMPONENTS = ("weights", "gradients", "master", "momentum", "adamw", "activations", "workspace")
MODES = ("none", "selective", "full")


def config_of(preset: str, **changes) -> Config:
    return Config(**{**PRESETS[preset], **changes})


# ---------------------------------------------------------------- what stays


def run_on_a_cpu(config: Config) -> SimpleNamespace:
    """A model, its optimizers, and the gradients in host memory."""
    model = MoETransformer(config)
    parameters = dict(model.named_parameters())
    gradient_offload = GradientOffload(model, config.host_gradient_blocks)
    offload = config.offload_optimizer == "true"
    optimizers = build_optimizers(
        config, parameters, offload=offload, gradient_offload=gradient_offload
    )
    return SimpleNamespace(
        model=model,
        parameters=parameters,
        optimizers=optimizers,
        gradient_offload=gradient_offload,
    )


SMALL = dict(d_model=64, d_ff=96, n_kv_heads=2, vocab_size=512)

FORMS = {
    "fp32": dict(precision="fp32"),
    "bf16": dict(precision="bf16"),
    "fp16": dict(precision="fp16"),
    "fp16-masters": dict(precision="fp16", master_weights="fp32"),
    "tied": dict(precision="bf16", tie_embeddings=True),
    "dense": dict(precision="fp16", num_experts=0),
    "streamed": dict(precision="bf16", offload_optimizer="true"),
    "gradients streamed": dict(precision="bf16", offload_optimizer="true", host_gradient_blocks=1),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_gradients_and_state_are_those_of_a_run(form):
    config = tiny_config(**SMALL | FORMS[form])
    run = run_on_a_cpu(config)
    run.gradient_offload.micro_batch(0, 1)
    tokens = torch.zeros(2, config.max_seq_len, dtype=torch.long)
    run.model(tokens, tokens)[0].backward()
    states = []
    for optimizer in run.optimizers.values():
        states += optimizer.state.tensors.values()

    def state_bytes(*keys):
        return sum(s[key].nbytes for s in states for key in keys if key in s)

    parameters = run.parameters.values()
    expected = dict(
        weights=sum(p.nbytes for p in parameters),
        gradients=sum(p.grad.nbytes for p in parameters if p.grad is not None),
        master=state_bytes("residual"),
        momentum=state_bytes("momentum"),
        adamw=state_bytes("exp_avg", "exp_avg_sq"),
        host=sum(t.nbytes for t in run.gradient_offload.tensors.values()),
    )
    offload = config.offload_optimizer == "true"
    if offload:
        for key in ("master", "momentum", "adamw"):
            expected["host"] += expected[key]
            expected[key] = 0
    found = predict_memory(config, "none", 2, offload)
    assert {key: round(found[key] * 1e9) for key in expected} == expected
    assert found["total"] == pytest.approx(sum(found[key] for key in COMPONENTS))


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp16-masters", "streamed"])
def test_checkpoint_has_the_predicted_size(tmp_path, form):
    config = tiny_config(**SMALL | FORMS[form] | dict(d_model=128, d_ff=256))
    path = tmp_path / "checkpoint.pt"
    state = write_checkpoint(path, config)
    size = path.stat().st_size - len(state["tokenizer_json"])
    assert size / 1e9 == pytest.approx(checkpoint_gb(config), rel=0.03)


# ---------------------------------------------------------------- what a block keeps

SHAPES = {
    "dense": dict(num_experts=0),
    "dense grouped": dict(num_experts=0, n_kv_heads=2),
    "moe top-1": dict(top_k=1),
    "moe grouped": dict(n_kv_heads=1, top_k=3),
}


def bytes_kept_per_token(config: Config) -> float:
    """What the first block keeps between its forward and its backward pass, when it is compiled."""
    torch._dynamo.reset()
    model = MoETransformer(config)
    block = model.blocks[0]
    block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    stays = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stays and tensor.dtype != torch.uint8:  # a generator's state
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(2, config.max_seq_len, config.d_model, dtype=COMPUTE_DTYPE[config.precision])
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), model.autocast():
        out = block(x)  # what was kept lives as long as this does
    del out
    return sum(kept.values()) / x[..., 0].numel()


BLOCK = dict(
    d_model=128,
    d_ff=344,
    n_heads=4,
    n_layers=1,
    moe_every=1,
    num_experts=8,
    max_seq_len=256,
    precision="bf16",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, mode",
    [
        *itertools.product(("dense", "moe grouped"), MODES),
        ("dense grouped", "selective"),
        ("moe top-1", "none"),
    ],
)
def test_activations_are_what_a_compiled_block_keeps(shape, mode):
    config = tiny_config(**BLOCK | SHAPES[shape] | dict(activation_checkpointing=mode))
    predicted = activation_bytes_per_token(config, 0, mode)
    assert bytes_kept_per_token(config) == pytest.approx(predicted, rel=0.01)


# ---------------------------------------------------------------- peaks

CPU_SHAPES = {
    "moe": dict(),
    "dense": dict(num_experts=0),
    "grouped": dict(n_kv_heads=1, top_k=3),
    "mixed": dict(moe_every=2),
    "few tokens": dict(max_seq_len=64, d_ff=512),
    "vocabulary": dict(vocab_size=8192),
    "tied": dict(tie_embeddings=True),
    "masters": dict(master_weights="fp32"),
    "adamw": dict(optimizer="adamw"),
}


def live_bytes(call) -> int:
    """The peak of what PyTorch's CPU allocator hands out in a call, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


STEP = dict(
    d_model=128,
    d_ff=208,
    n_heads=4,
    n_kv_heads=4,
    num_experts=8,
    n_layers=2,
    moe_every=1,
    max_seq_len=256,
    vocab_size=1024,
)


def check_step_on_a_cpu(config: Config) -> None:
    """Predicts no less than a step takes, and not far more.

    The libraries' own memory is none that PyTorch's allocator knows of.
    """
    run = run_on_a_cpu(config)
    for parameter in run.parameters.values():  # of the micro-batches before
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    tokens = torch.zeros(2, config.max_seq_len, dtype=torch.long)
    backward = live_bytes(lambda: run.model(tokens, tokens)[0].backward())
    optimizer = live_bytes(lambda: [o.step(0.01, 1.0) for o in run.optimizers.values()])

    sizes = predict_memory(config, config.activation_checkpointing, 2, offload=False, cpu=True)
    libraries = CPU_LIBRARY_GB[4 if config.precision == "fp32" else 2]
    activations = (sizes["activations"] - libraries) * 1e9
    workspace = sizes["workspace"] * 1e9
    assert backward * 0.97 < activations < backward * 1.2
    assert optimizer * 0.97 < activations + workspace < max(1.2 * optimizer, activations + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, precision, mode",
    [
        ("moe", "fp32", "none"),
        ("moe", "fp32", "full"),
        ("moe", "fp16", "full"),
        *itertools.product(("moe", "dense"), ("bf16",), MODES),
        *((shape, "bf16", "none") for shape in CPU_SHAPES if shape not in ("moe", "dense")),
    ],
)
def test_a_step_on_a_cpu_takes_the_predicted_memory(shape, precision, mode):
    values = STEP | CPU_SHAPES[shape]
    check_step_on_a_cpu(
        tiny_config(**values | dict(precision=precision, activation_checkpointing=mode))
    )


@pytest.mark.parametrize(
    "batch_size, mode, measured_gb", [(2, "none", 129.06), (2, "full", 77.8), (1, "full", 76.0)]
)
def test_forward_and_backward_of_18b_are_as_measured_on_a_gpu(batch_size, mode, measured_gb):
    """Peaks of an 18B model of these shapes on an H200."""
    sizes = predict_memory(config_of("18b"), mode, batch_size, offload=True)
    assert sizes["weights"] + sizes["gradients"] + sizes["activations"] == pytest.approx(
        measured_gb, rel=0.02
    )


def test_sums_of_up_to_four_blocks_are_under_way():
    """Of this block and the next one on their way in, of the two before on their way out."""
    under_way = [_gradients_under_way(layer, [1, 10, 100, 1000]) for layer in range(5)]
    assert under_way == [111, 1111, 1110, 1100, 0]


def test_workspace_is_what_the_optimizer_needs_beyond_the_activations():
    """Most is needed for attention's square matrices: 16 of 4096 x 4096 are a bucket."""
    c = config_of("18b", max_seq_len=64, num_experts=0, vocab_size=512)
    here, streamed = (predict_memory(c, "full", 1, offload) for offload in (False, True))
    bucket = 16 * 4096**2
    assert bucket == OPTIMIZER_BUCKET
    # in fp16 the matrices as they come and after the first half, and five Gram matrices of each
    assert here["activations"] + here["workspace"] == pytest.approx(2 * bucket * (2 + 5) / 1e9)
    assert streamed["workspace"] - here["workspace"] == pytest.approx(16 * bucket / 1e9), (
        "groups under way"
    )
    plain = predict_memory(dataclasses.replace(c, master_weights="fp32"), "full", 1, False)
    assert plain["activations"] + plain["workspace"] == pytest.approx(24 * bucket / 1e9)
    assert predict_memory(config_of("18b"), "selective", 4, offload=True)["workspace"] == 0


def test_muons_workspace_is_as_measured_on_a_gpu():
    """benchmarks/results/muon_step_18b_h200.json, without weights and gradients."""
    config = config_of("18b")
    matrices = sum(config.matrices_of(layer) for layer in range(config.n_layers))
    measured = 78_415_784_448 - (2 + 2) * matrices
    assert optimizer_bytes(config, offload=True, cpu=False) == pytest.approx(measured, rel=0.02)


def test_wide_matrices_need_the_most_when_they_are_multiplied_at_the_end():
    """Three copies and three Gram matrices then, which are small beside their matrices."""
    c = config_of("18b", n_heads=32, n_layers=1, moe_every=1)
    numel = c.parameter_groups["experts"] // 3 // 8
    wide = OPTIMIZER_BUCKET // numel * numel
    share = 4096 / 11008
    attention = 2 * 4 * 4096**2 * (2 + 5)  # one block has no full bucket of them
    expected = max(2 * wide * (3 + 3 * share), attention)
    assert optimizer_bytes(c, offload=False, cpu=False) == pytest.approx(expected)


@pytest.mark.parametrize("precision, low_bits", [("fp32", 0), ("fp16", 2)])
def test_only_16_bit_weights_have_low_bits_under_way(precision, low_bits):
    c = config_of("18b", optimizer="adamw", precision=precision)
    here, streamed = (optimizer_bytes(c, offload, cpu=False) for offload in (False, True))
    assert streamed - here == (8 + low_bits) * 4 * OPTIMIZER_BUCKET


# ---------------------------------------------------------------- what may be added


class MoEWithSharedExpert(MoE):
    """An expert that every token passes through, beside the routed ones."""

    def __init__(self, config, dtype):
        super().__init__(config, dtype)
        self.shared = SwiGLU(config, dtype)

    def forward(self, x_BSD):
        routed_BSD, statistics = super().forward(x_BSD)
        return routed_BSD + self.shared(x_BSD), statistics


@pytest.fixture
def shared_expert(monkeypatch):
    """The model and the configuration's tables with a shared expert in each MoE block."""
    feed_forwards = Config.feed_forwards

    def with_shared(config, layer):
        networks = feed_forwards(config, layer)
        if config.is_moe(layer):
            networks.append(FeedForward("ffn.shared", "dense_ffn", config.d_ff))
        return networks

    monkeypatch.setattr(Config, "feed_forwards", with_shared)
    monkeypatch.setattr("model.MoE", MoEWithSharedExpert)
    parameter_table.cache_clear()
    yield
    parameter_table.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_shared_experts_activations_are_counted(shared_expert, mode):
    config = tiny_config(**BLOCK | dict(top_k=3, activation_checkpointing=mode))
    predicted = activation_bytes_per_token(config, 0, mode)
    assert bytes_kept_per_token(config) == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_a_step_with_a_shared_expert_takes_the_predicted_memory(shared_expert, mode):
    check_step_on_a_cpu(tiny_config(**STEP | dict(precision="bf16", activation_checkpointing=mode)))


def test_muons_workspace_is_that_of_the_width_that_takes_the_most(monkeypatch):
    """Five of 18b's expert matrices fit into a bucket, but one of a network four times as wide."""
    shared_experts_by_seed(monkeypatch)
    narrow, wide = (config_of("18b", seed=seed) for seed in (1, 4))
    needed = optimizer_bytes(narrow, offload=False, cpu=False)
    assert optimizer_bytes(wide, offload=False, cpu=False) == needed


def with_third_group(config: Config) -> dict[str, OptimizerGroup]:
    """Experts have an optimizer of their own, with one fp32 moment."""
    groups = optimizer_groups(config)
    muon = groups["muon"]
    experts = tuple(name for name in muon.parameters if ".experts." in name)
    others = tuple(name for name in muon.parameters if name not in experts)
    lion = OptimizerGroup(
        parameters=experts,
        peak_lr=1e-4,
        weight_decay=0.1,
        state_bytes=dict(momentum=4),
        memory_key="lion",
        label="Lion momentum",
        orthogonalizes=False,
    )
    return groups | dict(muon=dataclasses.replace(muon, parameters=others), lion=lion)


def test_a_third_optimizer_group_is_one_more_row(monkeypatch):
    config = config_of("18b")
    before = predict_memory(config, "full", 1, offload=False)
    monkeypatch.setattr("planner.sizes.optimizer_groups", with_third_group)
    after = predict_memory(config, "full", 1, offload=False)
    experts = config.parameter_groups["experts"]

    assert list(after) == [
        *("weights", "gradients", "master", "momentum", "adamw", "lion"),
        *("activations", "workspace", "total", "host"),
    ]
    assert after["lion"] == 4 * experts / 1e9
    assert after["momentum"] == pytest.approx(before["momentum"] - 2 * experts / 1e9)
    assert after["adamw"] == before["adamw"] and after["master"] == before["master"]
    assert after["total"] == pytest.approx(sum(after[key] for key in (*COMPONENTS, "lion")))

    offloaded = predict_memory(config, "full", 1, offload=True)
    assert offloaded["lion"] == 0
    state = ("master", "momentum", "adamw", "lion")
    assert offloaded["host"] == pytest.approx(sum(after[key] for key in state))
    assert checkpoint_gb(config) == pytest.approx(
        after["weights"] + sum(after[key] for key in state)
    )
    table = memory_table(after, with_third_group(config))
    assert any(line.startswith("Lion momentum") for line in table.splitlines())
    assert "lion" in build_plan(config, "18b", Machine("a GPU", 150, 128))["memory_gb"]


# ---------------------------------------------------------------- several GPUs


def simulated(config: Config, gpus: int, gpu: int, in_every_pass: bool, passes: int):
    """Bytes of large gradients while each group is made, at most, and at the end of the step.

    What engine/distributed.py does, with a name and a size for each tensor: gradients that their
    parameters hold, those on their way, and sums.
    """
    table = parameter_table(config)
    shards = ownership(config, gpus)
    groups = gradient_groups(config)
    gradients, in_flight, sums = {}, [], {}  # what holds tensors: {name: (tensor, bytes)}
    at_most = [0] * len(groups)

    def alive() -> int:
        held = {**gradients}
        tensors = dict(held.values())
        for group in in_flight:
            tensors |= dict(group.values())
        return sum((tensors | dict(sums.values())).values())

    for number in range(passes):
        sends = in_every_pass or number == passes - 1
        for position, names in enumerate(groups):
            at_most[position] = max(at_most[position], alive())
            sent = {}
            for name in names:
                element = 2 if config.split_masters and "blocks" in name else 4
                whole = element * table[name].numel
                gradient = gradients.setdefault(name, (f"{name} {number}", whole))
                if not sends:
                    continue
                sent[name] = gradients.pop(name)
                even = is_even(shards[name], gpus)
                for shard in shards[name]:
                    if shard.owner != gpu:
                        continue
                    part = whole * (shard.stop - shard.start) // table[name].shape[0]
                    arrived = gradient
                    if even:
                        arrived = sent[name, "part"] = (f"part of {name} {number}", part)
                    elif in_every_pass and part < whole:
                        arrived = (f"sum of {name} {shard}", part)
                    sums.setdefault((name, shard), arrived)
            if sends and names:
                in_flight.append(sent)
                del in_flight[:-2]
    in_flight.clear()
    return at_most, alive()


@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
@pytest.mark.parametrize("in_every_pass", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_of_several_gpus_are_those_that_are_sent(gpus, in_every_pass, passes):
    config = tiny_config(**SMALL, precision="bf16", gradient_accumulation_steps=12)
    config = dataclasses.replace(config, gradient_accumulation_steps=2 * gpus * passes)
    owned = owned_elements(config, gpus)
    [gpu] = [gpu for gpu in range(gpus) if owned_by(config, gpus, gpu) == owned][:1]
    at_most, at_the_end = simulated(config, gpus, gpu, in_every_pass, passes)

    machines = 2 if gpus == 1 else 1  # one GPU of one machine sends nothing
    predictor = MemoryPredictor(config, gpus=gpus, machines=machines)
    over_gpus = "micro_batch" if in_every_pass else "step"
    found = predictor._gradients(Summing(False, over_gpus, several_passes=passes > 1))
    small = 4 * (config.parameter_groups["norms"] + config.parameter_groups["router"])
    assert found.stay == at_the_end + small
    assert found.at_the_loss + at_the_end == at_most[0]
    of_blocks = at_most[1:-1][::-1]
    assert [more + at_the_end for more in found.under_way] == of_blocks


def owned_by(config: Config, gpus: int, gpu: int) -> dict[str, int]:
    table = parameter_table(config)
    owned = {}
    for name, shards in ownership(config, gpus).items():
        for shard in shards:
            if shard.owner == gpu:
                numel = table[name].numel * (shard.stop - shard.start) // table[name].shape[0]
                owned[name] = owned.get(name, 0) + numel
    return owned


@pytest.mark.parametrize("gpus", [2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_of_several_gpus_is_the_share_of_the_largest(gpus, precision):
    config = tiny_config(**SMALL, precision=precision)
    element = 2 if config.split_masters else 4
    table = parameter_table(config)
    expected = dict(master=0, momentum=0, adamw=0)
    for name, numel in owned_elements(config, gpus).items():
        kind = table[name].kind
        if element == 2 and kind not in ("norms", "router"):
            expected["master"] += 2 * numel
        if kind in ("attention", "dense_ffn", "experts"):
            expected["momentum"] += element * numel
        else:
            expected["adamw"] += 8 * numel
    found = predict_memory(config, "none", 2, offload=False, gpus=gpus)
    assert {key: round(found[key] * 1e9) for key in expected} == expected
    offloaded = predict_memory(config, "none", 2, offload=True, gpus=gpus)
    assert round(offloaded["host"] * 1e9) == sum(expected.values())


def test_several_gpus_sum_no_gradients_in_host_memory():
    config = tiny_config(**SMALL, precision="bf16", gradient_accumulation_steps=8)
    on_host = dataclasses.replace(config, host_gradient_blocks=1, offload_optimizer="true")
    sizes, other = (predict_memory(c, "none", 2, True, gpus=2) for c in (config, on_host))
    assert sizes == other


def test_the_peak_of_four_gpus_is_the_measured_one():
    """121.6 GB, with 18b in micro-batches of 2, all state on the card and nothing recomputed."""
    config = config_of("18b", precision="bf16", batch_size=2, gradient_accumulation_steps=16)
    sizes = predict_memory(config, "none", 2, False, gpus=4, reduce_gradients="micro_batch")
    assert sizes["total"] == pytest.approx(121.6, rel=0.03)
    # and with two, and the state in host memory, it fits
    sizes = predict_memory(config, "none", 2, True, gpus=2, reduce_gradients="micro_batch")
    assert sizes["total"] < find_machine(gpu="h200", gpus=2).usable_gb
