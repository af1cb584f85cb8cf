"""The plan's bytes against real tensors and measurements, the choice that follows from them, and the machine it is for."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from config import OPTIMIZER_BUCKET, PRESETS, Config, ConfigError
from model import COMPUTE_DTYPE, MoETransformer
from planner.choice import Choice, apply_choice, candidates, choose, could_fit, next_smaller
from planner.machine import (
    CONTEXT_GB,
    GPUS,
    USABLE,
    Machine,
    available_host_memory_gb,
    find_machine,
    is_out_of_memory,
    known_gpu,
    process_memory_gb,
)
from planner.plan import format_count, memory_table
from planner.sizes import CPU_LIBRARY_GB, activation_bytes_per_token, checkpoint_gb, predict_memory
from record import checkpoint
from tests.helpers import tiny_config
from trainer import Trainer

COMPONENTS = ("weights", "gradients", "master", "momentum", "adamw", "activations", "workspace")
MACHINES = {name: find_machine(gpu=name) for name in GPUS}
MODES = ("none", "selective", "full")


def config_of(preset: str, **changes) -> Config:
    return Config(**{**PRESETS[preset], **changes})


# ---------------------------------------------------------------- bytes


@pytest.fixture
def trained(tmp_path, capsys):
    """trained(**changes) is a Trainer on a CPU whose parameters have gradients."""

    def make(**changes) -> Trainer:
        c = tiny_config(
            **dict(
                d_model=64,
                d_ff=96,
                n_kv_heads=2,
                vocab_size=512,
                device="cpu",
                save_dir=str(tmp_path),
            )
            | changes
        )
        corpus = SimpleNamespace(tokenizer_json="x" * 20_000, data_hash="", tokenizer_hash="")
        trainer = Trainer(c, corpus)
        tokens = torch.zeros(c.batch_size, c.max_seq_len, dtype=torch.long)
        trainer.gradient_offload.micro_batch(0, 1)
        trainer.model(tokens, tokens)[0].backward()
        return trainer

    return make


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
def test_weights_gradients_and_state_are_those_of_a_trainer(trained, form):
    trainer = trained(**FORMS[form])
    parameters = trainer.parameters.values()
    states = [
        s for optimizer in trainer.optimizers.values() for s in optimizer.state.tensors.values()
    ]

    def state_bytes(*keys):
        return sum(s[key].nbytes for s in states for key in keys if key in s)

    expected = dict(
        weights=sum(p.nbytes for p in parameters),
        gradients=sum(p.grad.nbytes for p in parameters if p.grad is not None),
        master=state_bytes("residual"),
        momentum=state_bytes("momentum"),
        adamw=state_bytes("exp_avg", "exp_avg_sq"),
    )
    streamed = "streamed" in form
    host = sum(expected[k] for k in ("master", "momentum", "adamw")) if streamed else 0
    host += sum(t.nbytes for t in trainer.gradient_offload.tensors.values())
    if streamed:
        expected |= dict(master=0, momentum=0, adamw=0)
    found = predict_memory(trainer.config, "none", 2, streamed)
    assert {k: round(found[k] * 1e9) for k in (*expected, "host")} == expected | dict(host=host)
    assert found["total"] == pytest.approx(sum(found[k] for k in COMPONENTS))


@pytest.mark.parametrize("form", ["fp32", "bf16", "fp16-masters", "streamed"])
def test_checkpoint_has_the_predicted_size(trained, tmp_path, form):
    trainer = trained(**FORMS[form] | dict(d_model=128, d_ff=256))
    checkpoint.save(tmp_path / "c.pt", trainer.state_dict())
    size = (tmp_path / "c.pt").stat().st_size - len(trainer.corpus.tokenizer_json)
    assert size / 1e9 == pytest.approx(checkpoint_gb(trainer.config), rel=0.03)


SHAPES = {
    "dense": dict(num_experts=0),
    "dense grouped": dict(num_experts=0, n_kv_heads=2),
    "moe top-1": dict(top_k=1),
    "moe grouped": dict(n_kv_heads=1, top_k=3),
}


@pytest.mark.parametrize(
    "shape, mode",
    [
        *itertools.product(("dense", "moe grouped"), MODES),
        ("dense grouped", "selective"),
        ("moe top-1", "none"),
    ],
)
def test_activations_are_what_a_compiled_block_saves(shape, mode):
    c = tiny_config(
        **dict(
            d_model=128,
            d_ff=344,
            n_heads=4,
            n_layers=1,
            moe_every=1,
            num_experts=8,
            max_seq_len=256,
            precision="bf16",
            activation_checkpointing=mode,
        )
        | SHAPES[shape]
    )
    torch._dynamo.reset()
    model = MoETransformer(c)
    block, kept = (
        model.blocks[0],
        {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())},
    )
    block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept and tensor.dtype != torch.uint8:  # a generator's state
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(
        2, c.max_seq_len, c.d_model, dtype=COMPUTE_DTYPE[c.precision], requires_grad=True
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), model.autocast():
        out = block(x)  # what it saved lives as long as this does
    assert sum(saved.values()) / x[..., 0].numel() == pytest.approx(
        activation_bytes_per_token(c, 0, mode), rel=0.01
    )
    del out


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
def test_a_step_on_a_cpu_takes_the_predicted_memory(trained, shape, precision, mode):
    """Not far more, either; the libraries' own memory is none that PyTorch's allocator knows of."""
    c = dict(
        d_model=128,
        d_ff=208,
        n_heads=4,
        n_kv_heads=4,
        num_experts=8,
        n_layers=2,
        moe_every=1,
        max_seq_len=512,
        vocab_size=1024,
    )
    trainer = trained(
        **c | CPU_SHAPES[shape] | dict(precision=precision, activation_checkpointing=mode)
    )
    tokens = torch.zeros(2, trainer.config.max_seq_len, dtype=torch.long)
    backward = live_bytes(lambda: trainer.model(tokens, tokens)[0].backward())
    optimizer = live_bytes(lambda: [o.step(0.01, 1.0) for o in trainer.optimizers.values()])
    sizes = predict_memory(trainer.config, mode, 2, offload=False, cpu=True)
    predicted = (sizes["activations"] - CPU_LIBRARY_GB[4 if precision == "fp32" else 2]) * 1e9
    assert backward * 0.97 < predicted < backward * 1.2
    assert (
        optimizer * 0.97
        < predicted + sizes["workspace"] * 1e9
        < max(1.2 * optimizer, predicted + 1)
    )


def test_freed_memory_goes_back_to_the_system():
    code = (
        "from planner.machine import process_memory_gb, release_freed_memory\nrelease_freed_memory()\nlarge = bytearray(30_000_000)\ndel large\n"
        "blocks = [bytearray(b'1') * 8_000_000 for _ in range(40)]\ndel blocks[:-1]\nprint(*process_memory_gb())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    now, peak = map(float, done.stdout.split())
    assert peak > 0.3 and now < 0.1


@pytest.mark.parametrize(
    "batch_size, mode, measured_gb", [(2, "none", 129.06), (2, "full", 77.8), (1, "full", 76.0)]
)
def test_forward_and_backward_of_18b_are_as_measured_on_a_gpu(batch_size, mode, measured_gb):
    """Peaks of an 18B model of these shapes on an H200."""
    sizes = predict_memory(config_of("18b"), mode, batch_size, offload=True)
    assert sizes["weights"] + sizes["gradients"] + sizes["activations"] == pytest.approx(
        measured_gb, rel=0.02
    )


def test_workspace_is_what_the_optimizer_needs_beyond_the_activations():
    c = config_of("18b", max_seq_len=64, num_experts=0, vocab_size=512)
    here, streamed = (predict_memory(c, "full", 1, offload) for offload in (False, True))
    piece = OPTIMIZER_BUCKET // (4096 * 11008) * (4096 * 11008)  # whole matrices
    assert here["activations"] + here["workspace"] == pytest.approx(
        (4 * piece + 8 * 4096**2 * 5) / 1e9
    )
    assert streamed["workspace"] - here["workspace"] == pytest.approx(16 * piece / 1e9), (
        "groups under way"
    )
    plain = predict_memory(dataclasses.replace(c, master_weights="fp32"), "full", 1, False)
    assert plain["activations"] + plain["workspace"] == pytest.approx(24 * piece / 1e9)
    assert predict_memory(config_of("18b"), "selective", 4, offload=True)["workspace"] == 0


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize("preset, gpu", itertools.product(PRESETS, GPUS))
def test_every_preset_has_a_sane_choice_on_every_gpu(preset, gpu):
    c, machine = config_of(preset), MACHINES[gpu]
    choice, kept = choose(c, machine, fixed_batch=False)
    applied = apply_choice(c, choice)
    assert applied.tokens_per_step == c.tokens_per_step and 1 <= choice.batch_size <= c.batch_size
    assert choice.memory_gb == predict_memory(
        applied,
        choice.activation_checkpointing,
        choice.batch_size,
        choice.offload_optimizer,
        choice.lighter_blocks,
    )
    fits = (
        choice.memory_gb["total"] <= (machine.memory_gb - CONTEXT_GB) * USABLE
        and choice.memory_gb["host"] <= 0.9 * machine.host_memory_gb
    )
    assert choice.fits(machine) == fits
    if not fits:
        assert not kept and not any(x.fits(machine) for x in candidates(c))
        assert choice.memory_gb["total"] == min(x.memory_gb["total"] for x in candidates(c))


@pytest.mark.parametrize(
    "preset, gpu, fits, expected",
    [
        ("18b", "b200", True, dict(batch_size=4, offload_optimizer=False)),
        ("18b", "h200", True, dict(batch_size=4, offload_optimizer=True)),
        ("18b", "h100", True, dict(batch_size=2, offload_optimizer=True)),
        (
            "18b",
            "rtx4090",
            False,
            dict(batch_size=1, offload_optimizer=True, activation_checkpointing="full"),
        ),
        ("25b", "h200", True, dict(offload_optimizer=True)),
        ("5b", "h100", True, dict(batch_size=4, offload_optimizer=False)),
        ("2b", "a100-40", True, dict(batch_size=4, offload_optimizer=False)),
        (
            "small",
            "rtx4090",
            True,
            dict(batch_size=16, offload_optimizer=False, activation_checkpointing="none"),
        ),
    ],
)
def test_known_answers(preset, gpu, fits, expected):
    host = 256 if preset == "25b" else 0
    machine = find_machine(host, gpu)
    choice, _ = choose(config_of(preset), machine, fixed_batch=False)
    assert choice.fits(machine) == fits and expected.items() <= dataclasses.asdict(choice).items()


def test_auto_is_the_fastest_that_fits():
    c = config_of("18b", activation_checkpointing="auto")
    chosen = {}
    for memory_gb in (60, 84, 90, 100, 120, 150, 190, 230, 300, 600):
        machine = Machine("a GPU", memory_gb, 1000)
        choice, kept = choose(c, machine, fixed_batch=False)
        assert kept == choice.fits(machine) == (memory_gb > 60)
        chosen[memory_gb] = (
            choice.activation_checkpointing,
            choice.batch_size,
            choice.offload_optimizer,
        )
        if kept and choice.activation_checkpointing != "none":  # down to the last block
            more = predict_memory(
                c,
                choice.activation_checkpointing,
                choice.batch_size,
                choice.offload_optimizer,
                choice.lighter_blocks + 1,
            )
            assert choice.memory_gb["total"] <= machine.usable_gb < more["total"]
    assert (
        chosen[600] == ("none", 4, False)
        and chosen[300] == ("none", 4, False)
        and chosen[230] == ("none", 2, False)
    )
    assert (
        chosen[84] == ("full", 1, True)
        and chosen[100] == ("selective", 1, True)
        and chosen[120] == ("selective", 2, True)
    )


def test_the_last_blocks_recompute_less_where_the_configuration_says_so():
    """And the plan is told: with all of them lighter it is the next mode; the backward pass of a full block needs no room beside
    the lighter ones' activations, which are gone by then."""
    c = config_of("18b")
    full, selective = (
        predict_memory(c, mode, 2, offload=True)["total"] for mode in ("full", "selective")
    )
    totals = [
        predict_memory(c, "full", 2, True, lighter)["total"] for lighter in range(c.n_layers + 1)
    ]
    assert totals[0] == full and totals[-1] == selective and totals == sorted(totals)
    assert [c.checkpointing_of(i) for i in (0, 39)] == ["full", "full"]
    mixed = dataclasses.replace(c, lighter_blocks=1)
    assert [mixed.checkpointing_of(i) for i in (0, 38, 39)] == ["full", "full", "selective"]
    one, none = candidates(mixed, ["full"])[0], candidates(c, ["full"])[0]
    assert (one.lighter_blocks, none.lighter_blocks) == (1, 0) and {
        x.lighter_blocks for x in candidates(mixed)
    } == set(range(40))
    assert (
        "--lighter_blocks 1 " in one.options(c)
        and "lighter" not in none.options(c)
        and "--lighter_blocks 0 " in none.options(mixed)
    )
    assert apply_choice(c, one).lighter_blocks == 1


def test_advice_takes_back_lighter_blocks_that_do_not_fit():
    machine = find_machine(256, "h100")
    choice, kept = choose(
        config_of("18b", activation_checkpointing="auto"), machine, fixed_batch=False
    )
    assert kept and choice.lighter_blocks > 0
    less = next_smaller(apply_choice(config_of("18b"), choice), choice)
    assert less.memory_gb["total"] < 0.95 * choice.memory_gb["total"]
    choice, kept = choose(
        config_of("18b", activation_checkpointing="selective", lighter_blocks=38),
        machine,
        fixed_batch=False,
    )
    assert not kept and choice.fits(machine)


def test_what_the_configuration_fixes_is_kept_where_it_fits():
    big = Machine("a GPU", 1000, 1000)
    for mode, offload in itertools.product(MODES, ("true", "false")):
        choice, kept = choose(
            config_of("18b", activation_checkpointing=mode, offload_optimizer=offload),
            big,
            fixed_batch=True,
        )
        assert kept and (
            choice.activation_checkpointing,
            str(choice.offload_optimizer).lower(),
        ) == (mode, offload)
    choice, kept = choose(
        config_of("18b", offload_optimizer="false"), MACHINES["h200"], fixed_batch=False
    )
    assert not kept and choice.offload_optimizer and choice.fits(MACHINES["h200"]), (
        "fits, but not as configured"
    )
    choice, kept = choose(config_of("18b"), MACHINES["h100"], fixed_batch=True)
    assert not kept and choice.fits(MACHINES["h100"]) and choice.batch_size < 4


@pytest.mark.parametrize("preset, lighter", [("2b", 0), ("5b", 0), ("5b", 20), ("18b", 0)])
@pytest.mark.parametrize("gpu", ["rtx4090", "h100"])
def test_what_could_fit_is_what_a_search_of_all_candidates_finds(preset, lighter, gpu):
    c, machine = (
        Config(**PRESETS[preset] | dict(activation_checkpointing="full", lighter_blocks=lighter)),
        find_machine(0, gpu),
    )
    assert could_fit(c, machine) == choose(c, machine, fixed_batch=False)[0].fits(machine)


def test_advice_is_never_refused_for_gradients_on_the_host():
    """They need a streamed optimizer state: advice without one takes them back, and what goes on as asked has one."""
    c = config_of("small", host_gradient_blocks=12)
    for machine in (Machine("a GPU", 8, 16), Machine("a GPU", 90, 16), Machine(None, 0, 16)):
        choice, _ = choose(c, machine, fixed_batch=True)
        assert choice.offload_optimizer or "--host_gradient_blocks 0 " in choice.options(c)
    less = [next_smaller(c, x) for x in candidates(c)]
    assert all(
        x is None or x.offload_optimizer or "--host_gradient_blocks 0 " in x.options(c)
        for x in less
    )


def test_streaming_needs_the_hosts_memory():
    c = config_of("18b")
    assert choose(c, Machine("a GPU", 150, 84), fixed_batch=False)[0].fits(
        Machine("a GPU", 150, 84)
    )
    assert not choose(c, Machine("a GPU", 150, 80), fixed_batch=False)[0].fits(
        Machine("a GPU", 150, 80)
    )
    small, cpu = config_of("small", precision="bf16"), Machine(None, 0, 200)
    assert choose(small, cpu, False)[0].memory_gb == predict_memory(
        small, "none", 16, False, cpu=True
    ), "a CPU's figures"
    for machine in (cpu, Machine(None, 0, 20)):
        assert choose(c, machine, fixed_batch=False)[0].offload_optimizer is False, (
            "nothing to stream from on a CPU"
        )
    assert not Choice(1, 1, "full", False, dict(total=150, host=40)).fits(cpu)
    assert Choice(1, 1, "full", False, dict(total=140, host=30)).fits(cpu)


@pytest.mark.parametrize("preset", PRESETS)
def test_candidates_keep_the_tokens_of_a_step_and_smaller_needs_less(preset):
    c = config_of(preset)
    everything = candidates(c)
    assert {x.batch_size * x.gradient_accumulation_steps for x in everything} == {
        c.sequences_per_step
    }
    assert {x.batch_size for x in everything} == {
        b for b in range(1, c.batch_size + 1) if c.sequences_per_step % b == 0
    }
    smallest = min(x.memory_gb["total"] for x in everything)
    for used in everything[::17] + everything[-1:]:
        less = next_smaller(c, used)
        if less is None:
            assert smallest >= 0.95 * used.memory_gb["total"]
        else:
            assert less.memory_gb["total"] < 0.95 * used.memory_gb["total"]
            assert less.batch_size * less.gradient_accumulation_steps == c.sequences_per_step


# ---------------------------------------------------------------- machines


@pytest.mark.parametrize(
    "driver_name, expected",
    [
        ("NVIDIA B200", "b200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        # other peaks or another memory than their namesakes
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_known_by_the_drivers_name(driver_name, expected):
    assert known_gpu(driver_name) == expected


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """driver(line) puts an nvidia-smi that answers `line`, and notes how it was called, first on PATH."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def install(line, code=0):
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\necho "$@" > "{tmp_path}/called"\necho "{line}"\nexit {code}\n'
        )
        script.chmod(0o755)
        return tmp_path / "called"

    return install


def test_the_first_visible_gpu_is_found(driver, monkeypatch):
    called = driver("NVIDIA H200, 143771")
    machine = find_machine()
    assert (machine.name, machine.key) == ("NVIDIA H200", "h200") and "--id=0" in called.read_text()
    assert machine.memory_gb == pytest.approx(GPUS["h200"].memory_gb, rel=0.005)
    assert machine.host_memory_gb == pytest.approx(available_host_memory_gb(), rel=0.1)
    assert find_machine(77).host_memory_gb == 77
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert find_machine().name == "NVIDIA H200" and "--id=3" in called.read_text()


def test_no_visible_gpu_is_a_cpu(driver, monkeypatch):
    driver("NVIDIA H200, 143771")
    assert find_machine(cpu=True).name is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_machine().name is None and find_machine().memory_gb == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for line, code in (
        ("NVIDIA-SMI has failed", 9),
        ("No devices were found", 6),
        ("", 0),
        ("NVIDIA H200, 143771", 9),
        ("NVIDIA GB10, [N/A]", 0),
    ):
        driver(line, code)
        assert find_machine().name is None, line
    monkeypatch.setenv("PATH", "")
    assert find_machine().name is None


def test_a_gpu_by_name():
    assert (
        find_machine(gpu="h100") == Machine("h100", 84.9, 128, "h100")
        and find_machine(64, "h100").host_memory_gb == 64
    )
    with pytest.raises(ConfigError, match="unknown GPU 'h10'.*Did you mean h100.*b200"):
        find_machine(gpu="h10")


def test_an_allocation_that_fails_is_known_by_its_words():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(
        RuntimeError("shapes cannot be multiplied")
    ) and not is_out_of_memory(OSError("out of memory"))


def test_this_machines_memory():
    assert 0 < available_host_memory_gb() < 100_000
    now, peak = process_memory_gb()
    assert 0.05 < now <= peak * 1.01 and peak < 100


# ---------------------------------------------------------------- report


def test_table():
    sizes = dict.fromkeys((*COMPONENTS, "host"), 0.0) | dict(
        weights=10.0, gradients=10.0, activations=2.25, total=22.25
    )
    lines = memory_table(sizes, capacity_gb=25).splitlines()
    assert lines[0].split() == ["Component", "Predicted", "(GB)"] and set(lines[1]) == {"-"}
    assert len({len(line) for line in lines}) == 1 and "Host" not in "".join(lines)
    cells = {line.rsplit(None, 1)[0].strip(): line.split()[-1] for line in lines[2:]}
    assert (
        cells["Model weights"] == "10.00"
        and cells["Activations"] == "2.25"
        and cells["Total"] == "22.25"
    )
    assert cells["Headroom"] == "2.75" and len(cells) == len(COMPONENTS) + 2

    measured = dict(weights=10.0, activations=3.0, total=24.0)
    lines = memory_table(sizes | dict(host=70.0), measured, 25).splitlines()
    cells = {line[:30].strip(): line[30:].split() for line in lines[2:]}
    assert cells["Activations"] == ["2.25", "3.00"] and cells["Headroom"] == ["2.75", "1.00"]
    assert cells["Gradients"][-1] == "-" and cells["Host memory (streamed state)"] == ["70.00", "-"]
    assert "0.004" in memory_table(dict.fromkeys((*COMPONENTS, "host", "total"), 0.004))


def test_large_numbers_in_words():
    assert [format_count(n) for n in (17_966_970_880, 4_460_000, 1_920)] == [
        "17.97B",
        "4.46M",
        "1,920",
    ]
