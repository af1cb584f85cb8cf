"""The command line: what it answers, what it refuses and how, and whole runs that end, are killed, stopped and resumed."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import run_experiment
import trainer
from cli import Parser, add_config_options, config_options, locked, new_parser
from config import PRESETS, Config, ConfigError, ExperimentError, defaults, field_docs
from planner.machine import GPUS, find_machine
from planner.speed import runs_of
from record import checkpoint, results
from tests.helpers import shared_experts_by_seed
from tools import evaluate

ROOT = Path(run_experiment.__file__).parent
SMALL = dict(
    preset="tiny",
    d_model=32,
    n_layers=2,
    n_heads=2,
    d_ff=32,
    num_experts=4,
    max_seq_len=16,
    vocab_size=300,
    batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=8,
    eval_every=1000,
    eval_steps=2,
    log_every=2,
    save_every=4,
    sample_tokens=0,
    device="cpu",
    validation_fraction=0.1,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with some text; the cache goes there too."""
    folder, draw = tmp_path_factory.mktemp("with a space"), random.Random(0)
    (folder / "text").mkdir()
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    for i in range(10):
        lines = (" ".join(draw.choices(words[: 8 + i], k=10)) for _ in range(60))
        (folder / "text" / f"{i}.txt").write_text("\n".join(lines))
    return folder


def arguments(base, **options) -> list[str]:
    """The command line of a small run, with these options."""
    options = {**SMALL, "data": base / "text", "cache_dir": base / "cache", **options}
    words = []
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the training; the runs in processes of their own draw."""
    monkeypatch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)


@pytest.fixture
def cli(capsys):
    """cli(*arguments) is (exit code, stdout, stderr) of the program called in this process."""

    def call(*argv):
        capsys.readouterr()
        try:
            code = run_experiment.main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


def unbroken(text: str) -> str:
    """The text on one line, and options that stand on several lines of a command as one line."""
    return " ".join(text.replace("\\\n", " ").split())


def contents(folder: Path) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder: Path, kind: str) -> list[dict]:
    """The rows of a run's metrics.jsonl that have this key."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if kind in row]


def steps_of(folder: Path, kind: str) -> list[int]:
    return [row["step"] for row in rows(folder, kind)]


def step_of(folder: Path) -> int:
    """The step of a run's latest checkpoint."""
    return checkpoint.load(folder / "checkpoint_latest.pt")["step"]


# ---------------------------------------------------------------- answers without torch


WITHOUT_TORCH = """
import sys, runpy
sys.argv[:] = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
finally:
    assert 'torch' not in sys.modules and 'numpy' not in sys.modules
"""


def answer(*argv):
    """(stdout, seconds of CPU time) of the program in a process of its own, which must not import
    torch. A clock on the wall would measure the tests beside this one too.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, ROOT / "run_experiment.py", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["plan", "--help"],
        ["sample", "--help"],
        ["plan", "--preset", "18b", "--gpu", "h200"],
        ["plan", "--json"],
    ],
    ids=" ".join,
)
def test_help_and_plan_answer_within_three_seconds_without_torch(argv):
    out, seconds = answer(*argv)
    assert seconds < 3 and len(out) > 300


def test_help_documents_every_field(cli):
    code, out, _ = cli("--help")
    # argparse breaks lines at hyphens too
    text = " ".join(out.split()).replace("- ", "-")
    assert code == 0
    for word in ("run_experiment.py plan", "--resume", "--overwrite"):
        assert word in text
    assert "--precision fp16|bf16|fp32 " in text and "--optimizer muon|adamw " in text
    assert list(field_docs()) == list(defaults())
    for name, doc in field_docs().items():
        shown = "derived" if defaults()[name] is None else defaults()[name]
        help_of_the_field = f"{doc} [{shown}]".replace("- ", "-")
        assert re.search(rf"--{name} \S+ {re.escape(help_of_the_field)}", text), name


def test_a_reader_that_leaves_is_no_error():
    for argv in (["--help"], ["plan", "--gpu", "h200"]):
        process = subprocess.Popen(
            [sys.executable, "run_experiment.py", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() in (0, 1)


# ---------------------------------------------------------------- plan

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
    assert "to other machines" in unbroken(out)
    assert cli(*argv, "64")[1] == out, "8 GPUs a machine are usual"

    for words, cause in (
        (("12",), "--gpus 12: all machines have the same number of GPUs"),
        (("0",), "--gpus 0: must lie between 1 and"),
        (("2", "--gpus_per_node", "0"), "--gpus_per_node 0: must lie between 1 and"),
    ):
        code, _, err = cli(*argv, *words)
        assert code == 2 and cause in unbroken(err)
    code, _, err = cli("plan", "--preset", "25b", "--gpu", "h100", "--gpus", "8")
    assert code == 2 and "58% of a h100" in unbroken(err)


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


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a run of 8 steps; not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)
        assert run_experiment.main(arguments(base, save_dir=folder)) == 0
    return folder


def assert_refused(result, code, *words):
    assert result[0] == code, result
    assert result[2].split("\r")[-1].lstrip().startswith("error: ") or "\nerror: " in result[2]
    assert "Traceback" not in result[2] and result[2].count("error:") == 1
    for word in words:
        assert word in result[2], (word, result[2])


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--max_stps 3", ["--max_stps", "--max_steps?"]),
        ("--preset 18bb", ["unknown preset '18bb'", "mean 18b?", "tiny"]),
        ("trian --preset tiny", ["unknown command 'trian'", "mean train?"]),
        ("plan --gpu h10", ["unknown GPU 'h10'", "mean h100?", "b200"]),
        ("plan --max_stps 3", ["--max_steps?"]),
        ("plan extra", ["unexpected argument 'extra'"]),
        ("tiny --device cpu", ["tiny is a preset, not a command: use --preset tiny"]),
        ("train tiny", ["unexpected argument 'tiny': use --preset tiny"]),
        ("plan 18b --json", ["unexpected argument '18b': use --preset 18b"]),
        (
            "--d_model abc --n_layers x --precision fp61",
            ["--d_model: 'abc' is not a whole number", "--n_layers: 'x'", "mean fp16?"],
        ),
        ("--tie_embeddings maybe", ["--tie_embeddings: 'maybe' is not true or false"]),
        (
            "--preset tiny --d_model 30 --n_layers 0 --top_k 9",
            ["n_layers=0: must be at least 1", "change n_heads", "top_k=9: must not exceed"],
        ),
        ("--muon_lr nan", ["muon_lr=nan"]),
        ("--d_model", ["--d_model", "expected one argument"]),
        ("--resume latest --overwrite --device cpu", ["--resume", "--overwrite", "choose one"]),
        ("--tracker tensorbord --device cpu", ["--tracker: 'tensorbord'", "mean tensorboard?"]),
        ("sample --prompt a", ["--checkpoint"]),
        ("sample --checkpoint x --prompt a --tokens 5", ["'--tokens'", "mean --max_new_tokens?"]),
        ("--learning_rate 1e-3", ["Here it is --muon_lr and --adamw_lr."]),
        ("--fp16", ["Here it is --precision fp16."]),
        ("sample --checkpoint x --prompt a --temperature warm", ["--temperature", "'warm'"]),
        ("sample --checkpoint x --prompt a --temperature -1", ["--temperature must lie between 0"]),
        (
            "sample --checkpoint x --prompt a --seed 99999999999999999999",
            ["--seed must lie between 0"],
        ),
        (
            "sample --checkpoint x --prompt a --max_new_tokens 0",
            ["--max_new_tokens must lie between 1"],
        ),
    ],
)
def test_wrong_usage(cli, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.prepare", lambda _: pytest.fail("it trains"))
    result = cli(*argv.split())
    assert_refused(result, 2, *words)
    assert result[1] == "" and not list(tmp_path.iterdir())


def test_what_comes_to_nothing_leaves_no_folder(cli, base, tmp_path):
    (tmp_path / "there").mkdir()
    for code, changes in ((1, dict(data="/nowhere")), (4, dict(host_memory_gb=1e-6))):
        assert cli(*arguments(base, save_dir=tmp_path / "run", **changes))[0] == code
        assert cli(*arguments(base, save_dir=tmp_path / "there", **changes))[0] == code
        assert [path.name for path in tmp_path.iterdir()] == ["there"], "only what it made itself"


def test_a_folder_that_holds_a_run_is_not_written_to(cli, base, finished):
    before = contents(finished)
    assert_refused(
        cli(*arguments(base, save_dir=finished)),
        2,
        "already holds a run",
        "--resume latest",
        "--save_dir",
        "--overwrite",
    )
    assert_refused(
        cli(*arguments(base, save_dir=finished, data="/nowhere"), "--overwrite"), 1, "/nowhere"
    )
    assert_refused(
        cli("--resume", finished), 2, "is a folder", f"--save_dir {finished} --resume latest"
    )
    assert contents(finished) == before


@pytest.mark.parametrize(
    "name, written, words",
    [
        ("missing.txt", None, ["missing.txt", "--data"]),
        ("empty.txt", b"", ["empty.txt is empty"]),
        ("bad.txt", b"ab\xff\xfe", ["bad.txt", "offset 2", "UTF-8"]),
        ("short.txt", b"hello", ["too small", "max_seq_len"]),
        ("broken.jsonl", b'{"text": "a"}\n{', ["broken.jsonl:2"]),
        ("broken.parquet", b"PAR1", ["broken.parquet"]),
    ],
)
def test_unusable_data(cli, base, tmp_path, name, written, words):
    if written is not None:
        (tmp_path / name).write_bytes(written)
    assert_refused(
        cli(*arguments(base, data=tmp_path / name, save_dir=tmp_path / "run")), 1, *words
    )
    assert not list((tmp_path / "run").glob("*"))


def test_more_readers_than_cores_and_a_missing_tracker_are_refused(
    cli, base, tmp_path, monkeypatch
):
    argv = arguments(base, save_dir=tmp_path / "run", num_workers=os.cpu_count() + 1)
    assert_refused(cli(*argv), 2, f"num_workers={os.cpu_count() + 1}", f"{os.cpu_count()} cores")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(
        "data.prepare", lambda _: pytest.fail("minutes of tokenizing before it is refused")
    )
    assert_refused(
        cli(*arguments(base, save_dir=tmp_path / "run", tracker="wandb")),
        1,
        "wandb is not installed",
        "pip install wandb",
        "--tracker none",
    )
    assert not list((tmp_path / "run").glob("*"))


def damaged(finished, tmp_path, how) -> Path:
    path = tmp_path / "damaged.pt"
    raw = bytearray((finished / "checkpoint_latest.pt").read_bytes())
    if how == "flipped":
        raw[len(raw) // 2] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if how == "truncated" else b"" if how == "empty" else raw)
    if how == "mismatched":
        state = checkpoint.load(path)
        state["model"]["norm.weight"] = state["model"]["norm.weight"][:-1].clone()
        checkpoint.save(path, state)
    if how == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "missing", "mismatched"])
def test_unusable_checkpoint(cli, base, finished, tmp_path, how):
    path = damaged(finished, tmp_path, how)
    before = contents(tmp_path)
    assert_refused(
        cli("--resume", path, "--save_dir", tmp_path / "run"),
        1,
        "norm.weight" if how == "mismatched" else "damaged.pt",
    )
    if how != "mismatched":
        assert_refused(cli("sample", "--checkpoint", path, "--prompt", "a"), 1, "damaged.pt")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "changes, code, words",
    [
        (
            dict(d_model=64, seed=7),
            2,
            ["d_model: the checkpoint has 32, not 64", "seed: the checkpoint has"],
        ),
        (dict(batch_size=64), 2, ["4 sequences"]),
        (dict(data="other"), 1, ["other text", "--data"]),
        (dict(tokenizer="tokenizer.json"), 1, ["with another tokenizer", "same --tokenizer"]),
    ],
    ids=str,
)
def test_a_resumed_run_keeps_its_model_and_its_data(
    cli, base, finished, tmp_path, changes, code, words
):
    if "data" in changes:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.txt").write_text((base / "text" / "1.txt").read_text() * 3)
        changes = dict(data=tmp_path / "other")
    if "tokenizer" in changes:
        text = checkpoint.load(finished / "checkpoint_latest.pt")["tokenizer_json"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(text)))
        changes = dict(tokenizer=tmp_path / "tokenizer.json")
    before, argv = (
        contents(finished),
        [text for name, value in changes.items() for text in (f"--{name}", value)],
    )
    assert_refused(cli("--resume", "latest", "--save_dir", finished, *argv), code, *words)
    result = cli(
        "--resume", finished / "checkpoint_step_4.pt", "--save_dir", tmp_path / "run", *argv
    )
    assert_refused(result, code, *words)
    assert contents(finished) == before and not contents(tmp_path / "run"), (
        "nothing that would look like a run"
    )


@pytest.mark.parametrize("place", ["file.txt/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_to(cli, base, tmp_path, place):
    (tmp_path / "file.txt").write_text("text")
    result = cli(*arguments(base, save_dir=tmp_path / place))
    assert_refused(result, 1, "cannot be written to", "--save_dir")
    assert "tokens a step" not in result[1], "before the work on the data"
    assert contents(tmp_path) == {Path("file.txt"): b"text"}


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_checkpoint(cli, base, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = contents(run)
    size, limits = (
        (run / "checkpoint_step_8.pt").stat().st_size,
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size // 2, limits[1])
    )  # Python ignores the signal that comes with it
    try:
        result = cli("--resume", "latest", "--save_dir", run, "--max_steps", "16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, 1, "checkpoint_step_12.pt was not saved", "Free some space")
    after = contents(run)
    assert all(after[name] == before[name] for name in before if name.suffix == ".pt") and not list(
        run.glob(".*")
    )
    assert cli("--resume", "latest", "--save_dir", run, "--max_steps", "16")[0] == 0
    assert checkpoint.load(run / "checkpoint_latest.pt")["step"] == 16


def test_free_space_is_checked_before_anything(cli, base, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), dict(free=1000)))
    assert_refused(
        cli(*arguments(base, save_dir=tmp_path / "run")),
        1,
        "not enough disk space",
        "--save_every 0",
    )
    assert not (tmp_path / "run").exists()


def test_an_os_error_is_one_line(cli, monkeypatch):
    def broken(_):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(run_experiment, "plan", broken)
    assert_refused(cli("plan"), 1, "Permission denied", "/somewhere")
    monkeypatch.setattr(run_experiment, "plan", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli("plan")[0] == 130


# ---------------------------------------------------------------- resume and overwrite


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_resume_goes_further_and_says_what_changed(cli, run):
    options = ("--max_steps", "12", "--muon-lr", "0.005", "--preset", "18b")
    code, out, _ = cli("--resume", "latest", "--save_dir", run, *options)
    assert code == 0 and f"Resuming {run / 'checkpoint_latest.pt'} at step 8" in out
    assert "max_steps: 8 -> 12" in out and "muon_lr: 0.02 -> 0.005" in out
    assert "adamw_lr" not in out.split("\n")[0]
    assert "18b ignored" in out, "a preset is for a fresh start"
    # after 8 of 12 steps, and of 8
    assert "muon_lr continues at 1.4e-3, where it was 2.0e-3; adamw_lr continues at" in out
    assert steps_of(run, "train_loss") == [2, 4, 6, 8, 10, 12]
    assert steps_of(run, "val_loss")[-1] == 12
    assert step_of(run) == 12


def test_resume_to_a_step_that_is_past_is_refused(cli, base, run):
    before = contents(run)
    assert_refused(
        cli("--save_dir", run, "--resume", "latest", "--max_steps", 3), 2, "max_steps=3", "step 8"
    )
    assert contents(run) == before


def test_resume_of_a_finished_run_changes_no_weights(cli, run):
    before = (run / "checkpoint_latest.pt").read_bytes()
    code, out, _ = cli("--resume", "latest", "--save_dir", run)
    assert code == 0 and "Done: 8 steps" in out
    assert "learning rates continue" not in out
    assert (run / "checkpoint_latest.pt").read_bytes() == before
    assert steps_of(run, "val_loss") == [0, 8]


@pytest.mark.slow
def test_resume_latest_stays_in_its_folder_and_a_path_in_the_folder_of_its_run(
    cli, finished, run, monkeypatch
):
    before = contents(finished)
    monkeypatch.chdir(run.parent)
    run.rename("checkpoints")  # the default save_dir; the checkpoint names another
    code, out, _ = cli("--resume", "latest", "--max_steps", "10")
    assert code == 0 and f"save_dir: {finished} -> checkpoints" in out
    assert contents(finished) == before
    moved = Path("checkpoints").rename("moved")
    assert cli("--resume", "latest", "--save_dir", moved, "--max_steps", "11")[0] == 0
    assert cli("--resume", moved / "checkpoint_latest.pt", "--max_steps", "12")[0] == 0
    assert step_of(moved) == 12 and not Path("checkpoints").exists()
    assert contents(finished) == before


def test_resume_latest_takes_a_checkpoint_whose_link_was_never_made(cli, run):
    (run / "checkpoint_latest.pt").unlink()
    os.utime(run / "checkpoint_step_4.pt", (1, 1))
    code, out, _ = cli("--resume", "latest", "--save_dir", run, "--max_steps", "8")
    assert code == 0 and f"Resuming {run / 'checkpoint_step_8.pt'} at step 8" in out


def test_resume_from_elsewhere_takes_the_history_along(cli, finished, tmp_path):
    before, folder = contents(finished), tmp_path / "branch"
    code, out, _ = cli("--resume", finished / "checkpoint_step_4.pt", "--save_dir", folder)
    assert code == 0 and "at step 4" in out and contents(finished) == before
    assert steps_of(folder, "train_loss") == [2, 4, 6, 8]
    losses = [[row["train_loss"] for row in rows(run, "train_loss")] for run in (folder, finished)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_keeps_the_version_of_its_rules_of_data(cli, base, tmp_path, monkeypatch, capsys):
    """Also when the cache is gone and new runs follow another version."""
    folder = tmp_path / "run"
    options = dict(save_dir=folder, cache_dir=tmp_path / "cache", max_steps=4)
    monkeypatch.setattr(run_experiment, "DATA_RULES", 2)
    assert cli(*arguments(base, **options))[0] == 0
    monkeypatch.setattr(run_experiment, "DATA_RULES", 1)
    [first] = (tmp_path / "cache").iterdir()
    content = contents(first)
    shutil.rmtree(first)
    code, _, err = cli("--resume", "latest", "--save_dir", folder, "--max_steps", 8)
    assert code == 0, err
    [second] = (tmp_path / "cache").iterdir()
    assert second == first and contents(second) == content
    assert json.loads((folder / "run.json").read_text())["data"]["rules"] == 2

    # The text that is evaluated is what this version holds out.
    results = json.loads((folder / "training_results.json").read_text())
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(folder / "checkpoint_latest.pt"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == results["data"]["validation_tokens"]

    state = checkpoint.load(folder / "checkpoint_latest.pt")
    state["data"]["rules"] = 3
    checkpoint.save(folder / "checkpoint_latest.pt", state)
    result = cli("--resume", "latest", "--save_dir", folder, "--max_steps", 12)
    assert_refused(result, 1, "version 3 of the rules", "knows versions 1 and 2")


def test_resume_latest_without_a_checkpoint_is_a_fresh_start(cli, base, tmp_path, run):
    new = tmp_path / "new"
    code, out, _ = cli(*arguments(base, save_dir=new, max_steps=2), "--resume", "latest")
    assert code == 0 and "Preset tiny: chosen with --preset" in out and "Done: 2 steps" in out
    assert f"Nothing to resume: no checkpoint in {new}. A new run starts." in out
    assert step_of(new) == 2
    assert "Nothing to resume" not in cli("--resume", "latest", "--save_dir", new)[1]

    metrics = (run / "metrics.jsonl").read_bytes()
    for path in run.glob("*.pt"):
        path.unlink()
    code, out, _ = cli(*arguments(base, save_dir=run, max_steps=2), "--resume", "latest")
    assert code == 0 and "Nothing to resume: no checkpoint in" in out
    assert (run / "metrics.jsonl.1").read_bytes() == metrics, "set aside, not lost"
    assert json.loads((run / "training_results.json.1").read_text())["totals"]["steps"] == 8
    assert steps_of(run, "train_loss") == [2]


def test_overwrite_starts_anew_and_leaves_other_files(cli, base, run):
    (run / "notes.txt").write_text("mine")
    code, _, _ = cli(*arguments(base, save_dir=run, max_steps=2, save_every=2), "--overwrite")
    assert code == 0 and [r["step"] for r in rows(run, "train_loss")] == [2]
    assert {p.name for p in run.glob("*.pt")} == {"checkpoint_latest.pt", "checkpoint_step_2.pt"}
    assert (run / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------- run.json


def test_run_json_says_what_the_run_is_made_of(finished):
    facts = json.loads((finished / "run.json").read_text())
    results = json.loads((finished / "training_results.json").read_text())
    state = checkpoint.load(finished / "checkpoint_latest.pt")
    assert facts["config"] == results["config"] and facts["config"]["d_model"] == 32
    assert facts["data"] == results["data"]
    for key in ("data_hash", "tokenizer_hash"):
        assert facts["data"][key] == state["data"][key]
    assert facts["run_id"] == state["run_id"]
    assert (facts["step"], facts["resumed_from"], facts["earlier"]) == (0, None, [])
    assert facts["packages"]["torch"] == torch.__version__ and facts["packages"]["numpy"]
    assert facts["gpu"] is None
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert git.returncode != 0 or facts["git"]["commit"] == git.stdout.strip()


def test_run_json_of_a_resumed_run_keeps_the_earlier_ones(cli, run, monkeypatch):
    before = json.loads((run / "run.json").read_text())
    monkeypatch.setattr(sys, "argv", ["run_experiment.py", "--save_dir", "a folder"])
    resume = ("--resume", "latest", "--save_dir", run)
    assert cli(*resume, "--max_steps", "9", "--muon_lr", "0.5")[0] == 0
    again = json.loads((run / "run.json").read_text())
    assert again["environment"]["command"] == "run_experiment.py --save_dir 'a folder'"
    start = {k: v for k, v in before.items() if k != "earlier"}
    if start["git"]["diff"]:
        start["git"]["diff"] = None  # it stands at the newest start
    assert again["earlier"] == [start]
    assert (again["step"], again["run_id"]) == (8, before["run_id"])
    assert again["resumed_from"] == str(run / "checkpoint_latest.pt")
    assert (again["config"]["muon_lr"], before["config"]["muon_lr"]) == (0.5, 0.02)

    (run / "run.json").write_text("my notes")
    assert cli(*resume, "--max_steps", "10")[0] == 0
    assert (run / "run.json.1").read_text() == "my notes"
    assert json.loads((run / "run.json").read_text())["step"] == 9


def test_git_state(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "record" / "results.py"))
    assert set(results.git_state().values()) == {None}, "no repository"
    for argv in (
        ["init", "-q"],
        ["add", "report.py"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
    ):
        (tmp_path / "report.py").write_text("one\n")
        subprocess.run(["git", *argv], cwd=tmp_path, check=True)
    clean = results.git_state()
    assert (
        clean["clean"] is True
        and clean["diff"] == ""
        and clean["untracked"] == []
        and len(clean["commit"]) == 40
    )
    (tmp_path / "report.py").write_text("two\n")
    (tmp_path / "new.py").write_text("")
    (tmp_path / "env" / "lib").mkdir(parents=True)
    for number in range(3):  # as a virtual environment that lies in the repository's folder
        (tmp_path / "env" / "lib" / f"{number}.py").write_text("")
    changed = results.git_state()
    assert (
        changed["clean"] is False
        and "-one\n+two" in changed["diff"]
        and changed["untracked"] == ["env/", "new.py"]
    )
    assert changed["commit"] == clean["commit"] and changed["diff_sha256"] != clean["diff_sha256"]
    monkeypatch.setattr(results, "LONGEST_DIFF", 10)
    assert results.git_state() == changed | dict(diff=None)
    monkeypatch.setenv("PATH", "")
    assert set(results.git_state().values()) == {None}, "no git"


# ---------------------------------------------------------------- the option parser


def values(name: str):
    """Any value that a field's type allows, whether or not Config would take it."""
    kind = typing.get_type_hints(Config)[name]
    text = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1).filter(
        lambda t: not t.startswith("-")
    )
    return (
        st.sampled_from(typing.get_args(kind))
        if typing.get_origin(kind) is typing.Literal
        else {int: st.integers(), float: st.floats(allow_nan=False), str: text}.get(
            kind, st.booleans()
        )
    )


def option_parser() -> Parser:
    parser = new_parser("", "")
    add_config_options(parser)
    return parser


OPTION_PARSER = option_parser()  # parsing changes nothing in it


@given(
    st.data(),
    st.lists(st.sampled_from(list(defaults())), unique=True, max_size=6),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_options_are_read_as_they_were_written(draw, names, dashes, joined):
    expected = {name: draw.draw(values(name), label=name) for name in names}
    argv = []
    for name, value in expected.items():
        option = "--" + (name.replace("_", "-") if dashes else name)
        if joined or str(value).startswith("-"):
            argv.append(f"{option}={value}")
        else:
            argv += [option, str(value)]
    read = config_options(OPTION_PARSER.parse(argv))
    assert read == expected
    for name, value in expected.items():
        assert type(read[name]) is type(value)


@given(
    st.lists(
        st.one_of(
            st.text(),
            st.sampled_from([f"--{name}" for name in defaults()]),
            st.text().map("--{}".format),
        )
    )
)
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_any_arguments_are_read_or_refused(argv):
    with contextlib.suppress(ConfigError, SystemExit):  # --help leaves
        assert set(config_options(OPTION_PARSER.parse(argv))) <= set(defaults())


# ---------------------------------------------------------------- sample


@pytest.mark.slow
def test_sample(cli, finished):
    assert_refused(
        cli("sample", "--checkpoint", finished, "--prompt", "a"),
        2,
        "is a folder",
        "checkpoint_latest.pt",
    )

    def text(*argv, prompt="abc"):
        code, out, err = cli(
            "sample",
            "--checkpoint",
            finished / "checkpoint_latest.pt",
            "--prompt",
            prompt,
            "--max_new_tokens",
            "12",
            *argv,
        )
        assert code == 0 and err == "" and out.startswith(prompt) and len(out) > len(prompt) + 5
        return out

    assert text() == text("--seed", "0") != text("--seed", "1")
    assert (
        text("--temperature", "0", "--seed", "1")
        == text("--temperature", "0")
        == text("--top_k", "1")
        == text("--temperature", "1e-40")
    )
    assert text("--top_k", "0") and text(prompt="") and text(prompt="--not-an-option in the prompt")


# ---------------------------------------------------------------- whole runs in processes of their own


def start(*argv) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "run_experiment.py", *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class Fork:
    """The program in a forked process, in a process group of its own.

    A fork starts in milliseconds; a new interpreter needs seconds to import. What it writes comes
    into files in `folder`.
    """

    def __init__(self, folder: Path, *argv):
        self.written = [folder / "stdout.txt", folder / "stderr.txt"]
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=self.run, args=([str(word) for word in argv],))
        self.process.start()
        self.pid = self.process.pid

    def run(self, argv: list[str]) -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # pytest captures what the copies of its own streams get.
        for number, path in enumerate(self.written, start=1):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False, buffering=1)
        try:
            code = run_experiment.main(argv)
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        # The exception is gone, and with it the frames that hold the readers of the data.
        sys.exit(code)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def outputs(self) -> list[str]:
        """What it wrote to stdout and to stderr so far."""
        return [path.read_text() for path in self.written]


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.outputs()
        time.sleep(0.005)


def trained(folder):
    return lambda: (
        (folder / "metrics.jsonl").exists()
        and "train_loss" in (folder / "metrics.jsonl").read_text()
    )


def alive_in_group(group: int) -> list[str]:
    """Processes of the group. One that has ended and waits for its parent is none."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(of_group) == group and state != "Z":
            alive.append(stat.parent.name)
    return alive


def assert_group_ends(process):
    """No worker outlives the run."""
    deadline = time.monotonic() + 10
    while alive_in_group(process.pid):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.02)


def tensors(path: Path) -> dict:
    """Every tensor of the model and of the optimizers in a checkpoint."""
    state = checkpoint.load(path)
    found = dict(state["model"])
    for optimizer, saved in state["optimizer"].items():
        for name, buffers in saved["state"].items():
            for key, tensor in buffers.items():
                found[optimizer, name, key] = tensor
    return found


@pytest.mark.slow
def test_a_run_and_one_that_is_killed_and_resumed_are_equal_to_the_bit(cli, base, tmp_path):
    """The first runs in this process; the second is killed in a fork, and resumed by a new one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = dict(max_steps=80, eval_every=40, save_every=20, sample_tokens=8)
    process = Fork(tmp_path, *arguments(base, save_dir=killed, **settings, num_workers=1))
    wait_for(process, (killed / "checkpoint_latest.pt").exists)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (killed / "checkpoint_step_80.pt").exists()
    process = start("--resume", "latest", "--save_dir", killed)
    code, out, _ = cli(*arguments(base, save_dir=whole, **settings))
    assert code == 0
    for step in (0, 40, 80):
        assert f"step {step}: validation loss" in out
    assert "A sample" in out and "Done: 80 steps" in out

    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Resuming" in out and "Traceback" not in err
    assert {path.name for path in killed.iterdir()} == {
        "metrics.jsonl",
        "training_results.json",
        "training_curves.png",
        "run.json",
        "checkpoint_latest.pt",
        "checkpoint_step_40.pt",
        "checkpoint_step_60.pt",
        "checkpoint_step_80.pt",
    }
    assert (killed / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((killed / "training_results.json").read_text())
    assert results["totals"]["steps"] == 80 and results["sample"]["text"]
    assert results["config"]["d_model"] == 32

    same = ("step", "train_loss", "val_loss", "grad_norm", "expert_load", "tokens_seen", "muon_lr")
    for kind in ("train_loss", "val_loss"):
        expected, found = (
            [[row.get(key) for key in same] for row in rows(folder, kind)]
            for folder in (whole, killed)
        )
        assert expected == found
    expected, found = (tensors(run / "checkpoint_step_80.pt") for run in (whole, killed))
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    for run in (whole, killed):
        assert checkpoint.load(run / "checkpoint_step_80.pt")["data_position"] == 320


def test_skipped_data_are_left_out_and_noted(cli, base, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert cli(*arguments(base, save_dir=run))[0] == 0
    old = run / "checkpoint_step_4.pt"
    drawn = []
    batches = trainer.data.batches
    monkeypatch.setattr(
        trainer.data, "batches", lambda *args, **kw: drawn.append(args[2]) or batches(*args, **kw)
    )
    # Killed before its first step: what was skipped is on the disk already.
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer.Trainer, "_train", mock.Mock(side_effect=ZeroDivisionError))
        cli(*arguments(base, save_dir=run), "--resume", old, "--skip_steps", 3)
    [start] = json.loads((run / "run.json").read_text())["skipped_data"]
    assert start == dict(step=4, steps=3, sequences=12)
    code, out, err = cli(*arguments(base, save_dir=run), "--resume", "latest")
    assert code == 0, err
    assert "at step 4" in out
    assert drawn == [4 * 4 + 3 * 4]
    state = checkpoint.load(run / "checkpoint_step_8.pt")
    assert state["skipped_data"] == [start]
    assert state["data_position"] == 8 * 4 + 3 * 4
    assert state["step"] == 8


def test_steps_are_skipped_after_a_named_checkpoint_only(cli, finished):
    file = finished / "checkpoint_step_4.pt"
    for words, problem in (
        (["--skip_steps", 3], "--skip_steps is for --resume PATH"),
        (["--resume", "latest", "--skip_steps", 3], "--skip_steps is for --resume PATH"),
        (["--resume", file, "--skip_steps", 0], "must lie between 1 and"),
        (["--resume", file, "--skip_steps", 10**10], "must lie between 1 and"),
    ):
        assert_refused(cli(*words), 2, problem)


def test_a_folder_in_use_is_left_alone(cli, base, finished):
    before = contents(finished)
    with locked(finished, "--save_dir"):
        for how in (
            ("--resume", "latest"),
            ("--resume", finished / "checkpoint_step_4.pt"),
            ("--overwrite",),
        ):
            assert_refused(
                cli(*arguments(base, save_dir=finished), *how),
                1,  # no wrong option: it works when the other process has ended
                "another process is at work",
                "--save_dir",
            )
    assert contents(finished) == before
    with locked(finished, "--save_dir"):  # and it is free again
        pass


def test_the_folder_is_looked_into_only_when_it_is_locked(cli, base, finished, monkeypatch):
    def find_start(*_):
        with (
            pytest.raises(ExperimentError, match="another process"),
            locked(finished, "--save_dir"),
        ):
            pass
        raise ConfigError("seen")

    monkeypatch.setattr(run_experiment, "find_start", find_start)
    for how in ([], ["--resume", "latest"]):
        assert_refused(cli(*arguments(base, save_dir=finished), *how), 2, "seen")


def test_who_has_no_lock_removes_no_folder(tmp_path):
    folder, exists = tmp_path / "run", Path.exists
    with locked(folder, "--save_dir"):

        class Late(type(folder)):  # as it was before the other process made it
            def exists(self):
                return False

        with (
            pytest.raises(ExperimentError, match="another process"),
            locked(Late(folder), "--save_dir"),
        ):
            pass
        assert exists(folder)
    assert not exists(folder), "nothing came into it"


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(monkeypatch, tmp_path):
    """The process that had the lock removes it; nobody else would find the folder that we hold."""
    folder, flock = tmp_path / "run", fcntl.flock

    def late(handle, operation):
        monkeypatch.setattr("cli.fcntl.flock", flock)
        folder.rmdir()
        flock(handle, operation)

    monkeypatch.setattr("cli.fcntl.flock", late)
    with locked(folder, "--save_dir"):
        assert folder.is_dir()


def test_a_disk_too_small_for_the_new_run_keeps_the_old_one(cli, base, finished, monkeypatch):
    before, size = contents(finished), (finished / "checkpoint_step_8.pt").stat().st_size
    usage = shutil.disk_usage(finished)
    there = sum(path.stat().st_size for path in finished.glob("checkpoint_step_*"))

    # The new run takes five checkpoints, and deleting the old one frees two: its latest is a link.
    # If it counted as a third, room for two and a half would seem to be enough.
    def disk_usage(folder):
        used = sum(path.stat().st_size for path in Path(folder).glob("checkpoint_step_*"))
        return usage._replace(free=there + 5 * size // 2 - used)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_usage)
    assert_refused(
        cli(
            *arguments(base, save_dir=finished, max_steps=40, save_every=8, keep_checkpoints=3),
            "--overwrite",
        ),
        1,
        "not enough disk space",
    )
    assert contents(finished) == before


def test_a_file_system_without_locks_is_good_enough(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr("cli.fcntl.flock", flock)
    with locked(tmp_path / "new", "--save_dir"):
        assert (tmp_path / "new").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(cli, base, tmp_path, number, code):
    run = tmp_path / "run"
    endless = dict(max_steps=100_000, save_every=50_000, num_workers=1)
    process = Fork(tmp_path, *arguments(base, save_dir=run, **endless))
    wait_for(process, trained(run))
    os.killpg(process.pid, number)  # as a terminal does: the worker gets it too
    assert process.wait(60) == code
    out, err = process.outputs()
    assert "Traceback" not in err and "stopping after this step" in err
    assert_group_ends(process)
    step = step_of(run)
    assert step > 0 and f"Stopped at step {step}" in out and "--resume latest" in out
    resume = ("--resume", "latest", "--save_dir", run, "--num_workers", "0")
    code, out, _ = cli(*resume, "--max_steps", step + 3)
    assert code == 0 and f"Done: {step + 3} steps" in out


@pytest.mark.slow
def test_the_second_interrupt_stops_at_once(base, tmp_path):
    run = tmp_path / "run"
    hours = dict(gradient_accumulation_steps=1_000_000, num_workers=1)
    process = Fork(tmp_path, *arguments(base, save_dir=run, **hours))
    wait_for(process, (run / "metrics.jsonl").exists)
    time.sleep(0.5)  # the first step is under way
    os.killpg(process.pid, signal.SIGINT)
    wait_for(process, lambda: "stopping after this step" in process.outputs()[1])
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 130
    assert "Traceback" not in process.outputs()[1]
    assert not list(run.glob("*.pt"))
    assert_group_ends(process)


@pytest.mark.parametrize(
    "given, used",
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_openmp_spins_briefly_unless_the_user_says_otherwise(given, used):
    variables = {**os.environ, **given}
    for name in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} - set(given):
        variables.pop(name, None)
    code = "import os, sys, run_experiment; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == [used, "False"]
