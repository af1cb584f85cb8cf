"""The command `plan`: what fits, what does not and what would, and how long it takes."""

import json
import re
import types

import pytest
import torch

import run_experiment
from config import PRESETS, Config
from planner.machine import GPUS, find_machine
from planner.speed import runs_of
from tests.commands import cli, unbroken
from tests.helpers import shared_experts_by_seed

__all__ = ["cli"]  # a fixture

COMPONENTS = ("weights", "gradients", "master", "momentum", "adamw", "activations", "workspace")


def planned(cli, *argv) -> dict:
    code, out, err = cli("plan", "--json", *argv)
    facts = json.loads(out)
    assert (code, err) == (0 if facts["fits"] else 1, "")
    return facts


PLAN_KEYS = {
    "preset",
    "total_params",
    "active_params",
    "gpu",
    "fits",
    "tokens_per_step",
    "checkpoint_gb",
    "hours",
}
CHOICE_KEYS = {
    "batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "offload_optimizer",
}


# The larger a model, the more choices its plan weighs.
PRESETS_BY_COST = [
    pytest.param(name, marks=[] if name in ("tiny", "2b") else pytest.mark.slow) for name in PRESETS
]


@pytest.mark.parametrize("preset", PRESETS_BY_COST)
def test_plan_of_every_preset_on_every_gpu(cli, preset):
    c = Config(**PRESETS[preset])
    for gpu in GPUS:
        facts = planned(cli, "--preset", preset, "--gpu", gpu)
        memory_gb, choice = facts["memory_gb"], facts["choice"]
        assert facts.keys() >= PLAN_KEYS
        assert memory_gb.keys() == {*COMPONENTS, "total", "host"}
        assert choice.keys() - {"lighter_blocks"} == CHOICE_KEYS
        assert (facts["preset"], facts["gpu"]) == (preset, gpu)
        assert facts["total_params"] == c.total_params
        assert facts["active_params"] == c.active_params
        assert facts["tokens_per_step"] == c.tokens_per_step
        total_gb = sum(memory_gb[key] for key in COMPONENTS)
        assert memory_gb["total"] == pytest.approx(total_gb, abs=0.005)
        assert (memory_gb["host"] > 0) == choice["offload_optimizer"]
        sequences = choice["batch_size"] * choice["gradient_accumulation_steps"]
        assert sequences * c.max_seq_len == c.tokens_per_step
        assert facts["fits"] == (memory_gb["total"] < 0.97 * facts["gpu_memory_gb"] - 0.6)
        bytes_per_parameter = 6 if c.precision == "fp16" else 8
        checkpoint_gb = c.total_params * bytes_per_parameter / 1e9
        assert facts["checkpoint_gb"] == pytest.approx(checkpoint_gb, rel=0.15)
        assert facts["options"].split()[1] == str(choice["batch_size"])


@pytest.mark.parametrize(
    "gpu, fits, offload, at_most",
    [
        pytest.param("b200", True, False, 4, marks=pytest.mark.slow),
        ("h200", True, True, 4),
        pytest.param("h100", True, True, 2, marks=pytest.mark.slow),
        ("rtx4090", False, True, 2),
    ],
)
def test_plan_of_18b(cli, gpu, fits, offload, at_most):
    facts = planned(cli, "--preset", "18b", "--gpu", gpu)
    assert facts["fits"] is fits
    assert facts["choice"]["offload_optimizer"] is offload
    assert facts["choice"]["batch_size"] <= at_most
    code, out, _ = cli("plan", "--preset", "18b", "--gpu", gpu)
    assert code == (0 if fits else 1)
    assert ("does not fit" in out) is not fits
    for words in (facts["options"], "17.97B", "Headroom"):
        assert words in unbroken(out)
    assert max(map(len, out.splitlines())) <= 80


def test_plan_knows_the_hosts_memory_and_fixed_fields(cli):
    assert not planned(cli, "--preset", "18b", "--gpu", "h200", "--host_memory_gb", "60")["fits"]
    full = planned(cli, "--preset", "18b", "--gpu", "b200", "--activation_checkpointing", "full")
    auto = planned(cli, "--preset", "18b", "--gpu", "b200")
    assert "lighter_blocks" not in full["choice"] and auto["choice"]["lighter_blocks"] > 10
    assert full["fits"] and auto["fits"]
    code, out, _ = cli("plan", "--preset", "18b", "--gpu", "h200", "--offload_optimizer", "false")
    assert code == 0 and "fits, but not as configured" in out and "--offload_optimizer true" in out


def test_plan_says_whose_host_memory_it_counts_on(cli):
    argv = ("--preset", "18b", "--gpu", "h200")
    stated = (*argv, "--host_memory_gb", "200")
    own = ("--preset", "tiny", "--device", "cpu")  # this machine's, not a usual one of that GPU
    assert planned(cli, *argv)["host_memory_assumed"]
    assert not planned(cli, *stated)["host_memory_assumed"]
    assert not planned(cli, *own)["host_memory_assumed"]
    assert "host with 128 GB (assumed; --host_memory_gb" in cli("plan", *argv)[1]
    assert "host with 200 GB: fits" in cli("plan", *stated)[1]


def test_several_gpus_and_one_that_is_used(cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=80e9)
    )
    for count in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        assert (
            "2 GPUs are visible; this run uses one. --gpus all" in cli("--resume", __file__)[1]
        ) is (count == 2)


def test_plan_of_several_gpus(cli):
    argv = ("plan", "--preset", "18b", "--gpu", "h200", "--gpus")
    code, out, _ = cli(*argv, "4")
    words = "plan for 4 x h200 (150.1 GB), host with 512 GB (assumed"
    assert code == 0 and words in unbroken(out) and "traffic" in out
    assert "--reduce_gradients micro_batch" in unbroken(out)
    assert max(map(len, out.splitlines())) <= 80

    code, out, _ = cli(*argv, "64", "--gpus_per_node", "8")
    assert code == 0 and "plan for 8 machines with 8 x h200" in unbroken(out)
    assert "64 GPUs need as many micro-batches a step. That is another training" in unbroken(out)
    assert "to the others of its machine" in unbroken(out) and "to other machines" in unbroken(out)
    assert cli(*argv, "64")[1] == out, "8 GPUs a machine are usual"

    for words, cause in (
        (("12",), "--gpus 12: all machines have the same number of GPUs"),
        (("0",), "--gpus 0: must lie between 1 and"),
        (("2", "--gpus_per_node", "0"), "--gpus_per_node 0: must lie between 1 and"),
    ):
        code, _, err = cli(*argv, *words)
        assert code == 2 and cause in unbroken(err)
    code, _, err = cli("plan", "--preset", "25b", "--gpu", "h100", "--gpus", "8")
    assert code == 2 and "58% of the memory of h100" in unbroken(err)


def test_plan_says_what_is_short(cli):
    def shortage(preset, *argv):
        return unbroken(cli("plan", "--preset", preset, *argv)[1])

    out = shortage("18b", "--gpu", "h200", "--host_memory_gb", "20")
    assert "does not fit (the host: 74.3 GB needed, 18.0 usable)" in out
    out = shortage("18b", "--gpu", "rtx4090", "--host_memory_gb", "500")
    assert "does not fit (the GPU: " in out
    out = shortage("18b", "--device", "cpu", "--host_memory_gb", "130")
    assert "does not fit" in out
    assert "--offload_optimizer false" in out, "offloading frees no host memory"


def test_plan_names_as_few_blocks_with_gradients_on_the_host_as_fit(cli):
    argv = ("--preset", "5b", "--gpu", "rtx4090")
    out = cli("plan", *argv)[1]
    words = r"This would fit: (--host_gradient_blocks (\d+) .*), with this memory:"
    options, blocks = re.search(words, unbroken(out)).groups()
    advised = planned(cli, *argv, *options.split())
    assert advised["fits"] and advised["as_configured"] and int(blocks) > 1
    assert advised["advice"] is advised["advised_memory_gb"] is None

    facts = planned(cli, *argv)
    assert not facts["fits"] and facts["advice"] == f"This would fit: {options}"
    assert facts["advised_memory_gb"] == advised["memory_gb"]
    # the table that is printed is that of the advised options
    gradients = f"{advised['memory_gb']['gradients']:.2f}"
    assert gradients in re.search(r"Gradients +(.*)", out)[1]
    assert not re.search(r"Headroom +-", out)

    fewer = options.replace(f"blocks {blocks} ", f"blocks {int(blocks) - 1} ")
    assert not planned(cli, *argv, *fewer.split())["fits"]


def test_plan_names_the_micro_batch_that_fits(cli):
    argv = ("--preset", "small", "--gpu", "rtx4090", "--gradient_accumulation_steps", "1")
    out = cli("plan", *argv, "--batch_size", "512")[1]
    assert "fits, in micro-batches of 64 instead of 512 --batch_size 64 " in unbroken(out)
    assert "\n  --batch_size 64 --gradient_accumulation_steps 8 \\\n  --activation" in out


def test_plan_names_the_host_memory_that_would_do(cli):
    argv = ("--preset", "25b", "--gpu", "h100")
    out = cli("plan", *argv)[1]
    words = (
        r"With (\d+) GB of host memory this would fit: (--host_gradient_blocks .*)"
        r" The smallest choice"
    )
    needed, options = re.search(words, unbroken(out)).groups()
    for host_gb, fits in ((int(needed), True), (int(needed) - 1, False)):
        facts = planned(cli, *argv, "--host_memory_gb", str(host_gb), *options.split())
        assert facts["fits"] is fits


def test_plan_names_the_presets_that_fit(cli):
    out = cli("plan", "--preset", "18b", "--gpu", "rtx4090")[1]
    words = "No choice for this model would fit: use a smaller --preset; these fit: 2b small tiny "
    assert words in unbroken(out)
    assert planned(cli, "--preset", "2b", "--gpu", "rtx4090")["fits"]
    assert not planned(cli, "--preset", "25b", "--gpu", "rtx4090")["fits"]


def test_plan_gives_hours_only_where_they_were_measured(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("run_experiment.__file__", str(tmp_path / "run_experiment.py"))
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)

    def measured(options: str) -> None:
        result = dict(value=5000.0, details=dict(options=options))
        (folder / "train_18b_fp16_h200.json").write_text(json.dumps(result))

    argv = ("--preset", "18b", "--gpu", "h200")
    assert planned(cli, *argv)["hours"] is None
    assert "training time  not measured" in cli("plan", *argv)[1]

    used = (
        "--batch_size 2 --gradient_accumulation_steps 16 --activation_checkpointing none "
        "--offload_optimizer true"
    )
    measured(f"--preset 18b {used} --eval_steps 1")
    facts = planned(cli, *argv)
    assert facts["hours"] == pytest.approx(50_000 * 131_072 / 5000 / 3600)
    out = cli("plan", *argv)[1]
    assert f"364 hours at 5,000 tokens/s, measured with {used} " in unbroken(out)
    assert "not measured for the setup below; 364" in unbroken(out)
    assert "predicted for the setup below: " in out and facts["predicted_hours"] > 364

    measured(facts["options"])
    out = cli("plan", *argv)[1]
    assert "training time  364 hours at" in out and "predicted for" not in out
    for other in (
        ("--preset", "5b", "--gpu", "h200"),
        ("--preset", "18b", "--gpu", "h100"),
        (*argv, "--precision", "bf16"),
        (*argv, "--d_ff", "1024"),
        (*argv, "--max_seq_len", "8192"),
        (*argv, "--num_experts", "0"),
    ):
        facts = planned(cli, *other)
        assert facts["hours"] is None and facts["predicted_hours"] > 0
        assert facts["predicted_from"] == "18b in fp16 on h200"

    # several GPUs have files of their own; the names of some GPUs end like theirs
    for gpu, speed in (("h200x4", 20_000.0), ("rtx4090", 900.0)):
        (folder / f"train_18b_fp16_{gpu}.json").write_text(json.dumps(dict(value=speed)))
    assert planned(cli, *argv)["tokens_per_second"] == 5000
    assert planned(cli, *argv, "--gpus", "4")["tokens_per_second"] == 20_000
    assert [(run.gpu, run.gpus) for run in run_experiment.measured_runs()] == [
        ("h200", 1),
        ("h200", 4),
        ("rtx4090", 1),
    ]


def test_plan_takes_the_first_commands_speed_for_its_options(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("run_experiment.__file__", str(tmp_path / "run_experiment.py"))
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    argv = ("--preset", "18b", "--gpu", "h200")
    details = dict(preset="18b", precision="fp16", options=planned(cli, *argv)["options"])
    result = dict(value=7700.0, details=details)
    (folder / "first_command_h200.json").write_text(json.dumps(result))
    facts = planned(cli, *argv)
    assert (facts["tokens_per_second"], facts["measured_with"]) == (7700.0, facts["options"])


def test_a_measured_speed_is_not_that_of_a_model_with_one_more_network(monkeypatch):
    shared_experts_by_seed(monkeypatch)
    found = []
    for seed in (1234, 1):
        config = Config(**PRESETS["18b"], seed=seed)
        runs = run_experiment.measured_runs()
        found.append(runs_of(config, "18b", find_machine(gpu="h200"), runs))
    assert found[0] and not found[1]


def test_plan_for_a_gpu_that_is_not_known(cli):
    facts = planned(cli, "--gpu_memory_gb", "24")
    assert (facts["preset"], facts["gpu"], facts["gpu_memory_gb"]) == ("2b", "a GPU", 24)
    assert facts["fits"] and facts["host_memory_assumed"] and not facts["gpu_tested"]
    assert planned(cli, "--gpu", "RTX3090", "--gpu_memory_gb", "25.3")["gpu"] == "RTX3090"
    h100_nvl = planned(cli, "--gpu", "h100", "--gpu_memory_gb", "99")
    assert h100_nvl["gpu_memory_gb"] == 99 and h100_nvl["predicted_hours"] > 0
    assert "h200 (150.1 GB), host" in cli("plan", "--gpu", "h200")[1]
    assert "l4 (23.7 GB, untested), host" in cli("plan", "--gpu", "l4")[1]
    for wrong in ("0", "-1", "nan", "inf", "1e9", "much"):
        code, _, err = cli("plan", "--gpu_memory_gb", wrong)
        assert code == 2 and err.startswith("error: ") and "--gpu_memory_gb" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv", ["--n_layers 1e9", "--n_layers 1000000000", "--batch_size 99999999"]
)
def test_an_absurd_whole_number_is_refused_by_its_name(cli, argv):
    code, _, err = cli("plan", *argv.split())
    assert code == 2 and argv.split()[0][2:] in err and "Traceback" not in err


def test_precedence_on_the_command_line(cli, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert planned(cli)["preset"] == "tiny" and planned(cli, "--gpu", "h200")["preset"] == "18b"
    assert planned(cli, "--gpu", "h200", "--preset", "2b")["preset"] == "2b"
    facts = planned(
        cli, "--gpu", "h200", "--preset", "2b", "--batch_size", "3", "--max-seq-len=100"
    )
    assert facts["tokens_per_step"] == 3 * 8 * 100
    for argv, reason in (
        (["--gpu", "h200"], "18b: the GPU has 150 GB"),
        ([], "tiny: no GPU was found"),
        (["--preset", "5b"], "5b: chosen with --preset"),
    ):
        assert reason in cli("plan", *argv)[1]
    monkeypatch.setitem(PRESETS["18b"], "grad_clip", 0.5)  # so the default differs from it
    assert (
        planned(cli, "--gpu", "h200")["preset"] == "config.py"
        and planned(cli, "--preset", "5b")["preset"] == "5b"
    )
    assert "its defaults were edited" in cli("plan")[1]
