"""The command line: what it answers, what it refuses and how, what a run writes down, samples."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import run_experiment
from cli import Parser, add_config_options, config_options, new_parser
from config import Config, ConfigError, defaults, field_docs
from engine.distributed import Ranks
from record import checkpoint, results, run_folder
from tests.commands import (
    ROOT,
    arguments,
    assert_refused,
    base,
    cli,
    contents,
    finished,
    no_pictures,
)

__all__ = ["base", "cli", "finished", "no_pictures"]  # fixtures

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


# ---------------------------------------------------------------- refusals


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


# ---------------------------------------------------------------- ranks


class RanksOfOneProcess(Ranks):
    """The first of several ranks, whose others are not there."""

    def value_of_first(self, value=None):
        return value


def test_more_ranks_than_micro_batches_are_refused(cli, monkeypatch, tmp_path):
    ranks = RanksOfOneProcess(size=3, local_size=3)
    monkeypatch.setattr("engine.distributed.start_ranks", lambda device: ranks)
    monkeypatch.setattr("engine.lifeline.join", lambda ranks: None)
    # What comes next is not reached.
    monkeypatch.setattr(run_folder, "check_shared", lambda *_: pytest.fail("not refused"))
    save_dir = tmp_path / "run"
    code, _, err = cli("--preset", "tiny", "--device", "cpu", "--save_dir", save_dir)
    assert code == 2 and "3 GPUs for the 2 micro-batches of a step" in err
    assert "--batch_size 4 --gradient_accumulation_steps 4" in err and not contents(save_dir)
