"""The plan of memory: bytes against real tensors and compiled blocks, the choice, the machines, the table."""
import dataclasses
import json
import os

import pytest
import torch
from conftest import tiny_config

import checkpoint
import memory
from config import PRESETS, Config, ConfigError
from memory import GPUS, Machine, activation_bytes_per_token, candidates, choose, known_gpu
from model import COMPUTE_DTYPE, MoETransformer
from muon import AdamW, Muon, split_parameters

C18B = Config(**PRESETS["18b"])
FORMS = {"fp32": dict(precision="fp32"), "bf16-split": dict(precision="bf16"),
         "fp16-fp32-masters": dict(precision="fp16", master_weights="fp32")}


def machine(name, host=None):
    return memory.find_machine(host or 0, name)


def built(c):
    model = MoETransformer(c)
    hidden, others = split_parameters(model)
    return model, Muon(hidden, c.muon_momentum, c.weight_decay), AdamW(others, c.adamw_beta1, c.adamw_beta2, c.adamw_eps, 0.1)


def state_bytes(optimizer, *keys):
    return sum(t.nbytes for s in optimizer.state.tensors.values() for k, t in s.items() if k in keys)


# ---------------------------------------------------------------- bytes

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("changes", [{}, dict(num_experts=0, tie_embeddings=True, n_kv_heads=2)], ids=["moe", "dense-tied"])
def test_weights_gradients_and_state_are_those_of_the_real_tensors(form, changes):
    c = tiny_config(**FORMS[form], **changes)
    model, muon, adamw = built(c)
    model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))[0].backward()
    parameters = list(model.parameters())
    real = dict(weights=sum(p.nbytes for p in parameters), gradients=sum(p.grad.nbytes for p in parameters),
                master=state_bytes(muon, "residual") + state_bytes(adamw, "residual"),
                momentum=state_bytes(muon, "momentum"), adamw=state_bytes(adamw, "exp_avg", "exp_avg_sq"))
    found = memory.memory(c, "none", 2, offload=False)
    assert {k: round(found[k] * 1e9) for k in real} == real and found["host"] == 0
    streamed = memory.memory(c, "none", 2, offload=True)
    assert round(streamed["host"] * 1e9) == real["master"] + real["momentum"] + real["adamw"]
    assert [streamed[k] for k in ("master", "momentum", "adamw")] == [0, 0, 0]
    assert streamed["weights"] == found["weights"] and streamed["activations"] == found["activations"]


@pytest.mark.parametrize("form", FORMS)
def test_total_is_the_sum_of_what_the_gpu_holds(form):
    for offload in (False, True):
        sizes = memory.memory(tiny_config(**FORMS[form]), "full", 2, offload)
        assert sizes["total"] == pytest.approx(sum(v for k, v in sizes.items() if k not in ("total", "host")))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("changes", [dict(num_experts=0), dict(num_experts=8, top_k=2, n_kv_heads=2)], ids=["dense", "moe-grouped"])
def test_kept_activations_are_those_of_the_compiled_block(mode, changes):
    """Bytes of the distinct storages that the compiled block saves for its backward pass."""
    torch._dynamo.reset()
    c = Config(d_model=256, d_ff=688, n_heads=4, n_layers=1, moe_every=1, vocab_size=300, max_seq_len=512, precision="bf16",
               activation_checkpointing=mode, **changes)
    model = MoETransformer(c)
    stays = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    block = model.blocks[0]
    block.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in stays:
            saved[t.untyped_storage().data_ptr()] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        block(torch.randn(1, 512, c.d_model, dtype=COMPUTE_DTYPE["bf16"], requires_grad=True))
    real = sum(t.untyped_storage().nbytes() for t in saved.values())
    predicted = 512 * activation_bytes_per_token(c, 0, mode)
    assert abs(predicted - real) <= 0.01 * real + 6000, (predicted, real)      # tables and offsets: a few kB a block


def test_a_checkpoint_has_the_predicted_size(tmp_path):
    c = Config(**{**PRESETS["tiny"], "precision": "bf16"})
    model, muon, adamw = built(c)
    checkpoint.save(tmp_path / "x.pt", dict(model=dict(model.named_parameters()),
                                            optimizer=dict(muon=muon.state_dict(), adamw=adamw.state_dict())))
    assert (tmp_path / "x.pt").stat().st_size == pytest.approx(memory.checkpoint_gb(c) * 1e9, rel=0.02)


@pytest.mark.parametrize("batch, mode, measured", [(4, "selective", 145.8), (2, "selective", 109.5), (2, "full", 77.8), (1, "full", 76.0)])
def test_18b_takes_what_was_measured(batch, mode, measured):
    """Weights, gradients and activations of an 18B model in 16 bits, measured on an H200."""
    sizes = memory.memory(C18B, mode, batch, offload=True)
    assert sizes["weights"] + sizes["gradients"] + sizes["activations"] == pytest.approx(measured, rel=0.02)


def test_streaming_needs_workspace_only_beyond_the_activations():
    c = tiny_config()
    hidden = sum(c.parameter_groups[k] for k in ("attention", "dense_ffn", "experts"))
    for offload, bytes_an_element in ((False, 24), (True, 36)):
        sizes = memory.memory(c, "full", 1, offload)
        assert (sizes["activations"] + sizes["workspace"]) * 1e9 == pytest.approx(hidden * bytes_an_element)
    assert memory.memory(C18B, "selective", 4, True)["workspace"] == 0


# ---------------------------------------------------------------- choice

@pytest.mark.parametrize("preset", ["18b", "small", "tiny"])
def test_candidates_keep_the_tokens_of_a_step_and_are_all_there(preset):
    c = Config(**PRESETS[preset])
    found = candidates(c)
    assert {x.batch_size * x.gradient_accumulation_steps for x in found} == {c.sequences_per_step}
    assert len({x.options() for x in found}) == len(found) == 3 * 2 * sum(c.sequences_per_step % b == 0 for b in range(1, c.batch_size + 1))
    assert (found[0].batch_size, found[0].activation_checkpointing, found[0].offload_optimizer) == (c.batch_size, "none", False)


def test_the_choice_is_the_fastest_that_fits():
    c = dataclasses.replace(C18B, activation_checkpointing="auto")
    for name in GPUS:
        choice, kept = choose(c, machine(name), fixed_batch=False)
        ordered = candidates(c)
        fits = [x for x in ordered if x.fits(machine(name))]
        assert kept == bool(fits) and (choice == fits[0] if fits else
                                       choice.memory_gb["total"] == min(x.memory_gb["total"] for x in ordered))
    b200 = choose(c, machine("b200"), fixed_batch=False)[0]
    assert (b200.batch_size, b200.activation_checkpointing, b200.offload_optimizer) == (4, "selective", True), \
        "a quarter of the time for recomputation costs more than streaming"


def test_the_choice_keeps_what_the_configuration_fixes():
    c = dataclasses.replace(C18B, activation_checkpointing="full", offload_optimizer="true", batch_size=2,
                            gradient_accumulation_steps=16)
    choice, kept = choose(c, machine("b200"), fixed_batch=True)
    assert kept and (choice.batch_size, choice.activation_checkpointing, choice.offload_optimizer) == (2, "full", True)
    c = dataclasses.replace(C18B, offload_optimizer="false")
    choice, kept = choose(c, machine("h200"), fixed_batch=True)
    assert not kept and choice.fits(machine("h200")) and choice.offload_optimizer
    assert memory.apply(c, choice).tokens_per_step == c.tokens_per_step
    assert memory.apply(c, choice).offload_optimizer == "true"
    cpu = Machine(None, 0, 64)
    assert choose(tiny_config(), cpu, fixed_batch=True)[0].offload_optimizer is False


def test_memory_of_the_gpu_and_of_the_host_both_count():
    streamed = next(x for x in candidates(C18B) if x.offload_optimizer and x.activation_checkpointing == "full" and x.batch_size == 1)
    total, host = streamed.memory_gb["total"], streamed.memory_gb["host"]
    assert streamed.fits(Machine("a GPU", 1.06 * total, 1.2 * host))
    assert not streamed.fits(Machine("a GPU", 1.01 * total, 1.2 * host)), "some is left for the context and fragmentation"
    assert not streamed.fits(Machine("a GPU", 1.06 * total, 1.05 * host)), "some is left for the rest of the host"
    assert not streamed.fits(Machine(None, 0, total + host)) and streamed.fits(Machine(None, 0, 1.2 * (total + host)))


@pytest.mark.parametrize("preset", ["18b", "small", "tiny"])
def test_smaller_always_needs_less_and_ends(preset):
    c = Config(**PRESETS[preset])
    used, steps = candidates(c)[0], 0
    while (less := memory.smaller(c, used)) is not None:
        assert less.memory_gb["total"] < 0.95 * used.memory_gb["total"]
        faster = candidates(c)[:[x.options() for x in candidates(c)].index(less.options())]
        assert all(x.memory_gb["total"] >= 0.95 * used.memory_gb["total"] for x in faster)
        used, steps = less, steps + 1
    assert steps >= 1 and used.memory_gb["total"] * 0.95 <= min(x.memory_gb["total"] for x in candidates(c))


def test_options_are_a_command_line():
    options = candidates(C18B)[0].options()
    assert options == "--batch_size 4 --gradient_accumulation_steps 8 --activation_checkpointing none --offload_optimizer false"


# ---------------------------------------------------------------- machines

@pytest.mark.parametrize("name, key", [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H200", "h200"),
    ("NVIDIA H200 NVL", None), ("NVIDIA GH200 480GB", None), ("NVIDIA B200", "b200"), ("NVIDIA GB200", None),
    ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100 80GB PCIe", "a100-80"), ("NVIDIA A100-SXM4-40GB", "a100-40"),
    ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla T4", None)])
def test_gpus_are_known_by_the_driver_s_name(name, key):
    assert known_gpu(name) == key


def test_host_memory_is_there():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    assert 0.01 < memory.host_memory_gb() <= physical
    now, peak = memory.resident_gb()
    assert 0.05 < now <= peak * 1.05 < physical


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """driver(answer) puts an nvidia-smi that prints the answer first on PATH, and notes how it was called."""
    def make(answer, code=0):
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n[ -z "{answer}" ] || echo "{answer}"\nexit {code}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return tmp_path / "called"
    return make


def test_the_machine_is_what_the_driver_reports(driver, monkeypatch):
    called = driver("NVIDIA H200, 143771")
    found = memory.find_machine()
    assert (found.name, found.key) == ("NVIDIA H200", "h200") and found.memory_gb == pytest.approx(GPUS["h200"].memory_gb, rel=0.01)
    assert found.host_memory_gb == pytest.approx(memory.host_memory_gb(), rel=0.2) and "--id=0" in called.read_text()
    assert memory.find_machine(host_gb=77).host_memory_gb == 77
    assert memory.find_machine(cpu=True).name is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    memory.find_machine()
    assert "--id=3" in called.read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert memory.find_machine().name is None


def test_a_driver_without_an_answer_means_no_gpu(driver):
    driver("No devices were found", code=6)
    assert memory.find_machine().name is None
    driver("")
    assert memory.find_machine().name is None


def test_a_named_gpu_comes_with_a_usual_host(driver):
    driver("NVIDIA H200, 143771")
    assert memory.find_machine(gpu="rtx4090") == Machine("rtx4090", 25.3, 64, "rtx4090")
    assert memory.find_machine(500, "rtx4090").host_memory_gb == 500
    with pytest.raises(ConfigError, match="Did you mean h200.*Known: b200"):
        memory.find_machine(gpu="h20")


# ---------------------------------------------------------------- report

def test_table():
    sizes = memory.memory(C18B, "full", 4, offload=True)
    lines = memory.table(sizes, capacity_gb=150.1).splitlines()
    cells = {line[:30].strip(): line[30:].split() for line in lines[2:]}
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == {"-"}
    assert cells["Model weights"] == ["35.94"] and cells["Total"] == ["84.63"] and cells["Headroom"] == ["65.47"]
    assert cells["Host memory (streamed state)"] == ["74.29"] and list(cells)[:7] == list(memory.COMPONENTS.values())
    there = memory.table(sizes, dict(weights=36.0, total=90.0, host=74.0), 150.1)
    cells = {line[:30].strip(): line[30:].split() for line in there.splitlines()[2:]}
    assert cells["Model weights"] == ["35.94", "36.00"] and cells["Gradients"] == ["35.94", "-"]
    assert cells["Headroom"] == ["65.47", "60.10"] and "Measured (GB)" in there.splitlines()[0]
    small = memory.table(memory.memory(tiny_config(), "none", 2, offload=False))
    assert "Host" not in small and "Headroom" not in small and ".000" in small


def test_large_numbers_in_words():
    assert [memory.count(n) for n in (17_966_970_880, 4_460_000, 1e9)] == ["17.97B", "4.46M", "1.00B"]


def test_hours_are_known_where_a_speed_was_measured(tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "train_18b_fp16_h200.json").write_text(json.dumps(dict(value=5000.0)))
    monkeypatch.setattr(memory, "__file__", str(tmp_path / "memory.py"))
    facts = memory.plan(C18B, "18b", machine("h200"))
    assert facts["hours"] == pytest.approx(131072 * 50_000 / 5000 / 3600) and facts["tokens_per_second"] == 5000
    assert memory.plan(C18B, "18b", machine("b200"))["hours"] is None
    assert memory.plan(dataclasses.replace(C18B, precision="bf16"), "18b", machine("h200"))["hours"] is None
    assert memory.plan(C18B, "18b", Machine("another GPU", 150, 128))["hours"] is None
