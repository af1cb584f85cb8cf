"""Whole runs that are resumed, overwritten, killed and stopped, and folders that are in use."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import run_experiment
import trainer
from cli import locked
from config import ConfigError, ExperimentError
from record import checkpoint
from record.small_files import starts
from tests.commands import (
    ROOT,
    arguments,
    assert_refused,
    base,
    cli,
    contents,
    finished,
    no_pictures,
    rows,
    run,
    step_of,
    steps_of,
)
from tools import evaluate

__all__ = ["base", "cli", "finished", "no_pictures", "run"]  # fixtures

# ---------------------------------------------------------------- resume and overwrite


def test_resume_goes_further_and_says_what_changed(cli, run):
    options = ("--max_steps", "12", "--muon-lr", "0.005", "--preset", "18b")
    code, out, _ = cli("--resume", "latest", "--save_dir", run, *options)
    assert code == 0 and f"Resuming {run / 'checkpoint_latest.pt'} at step 8" in out
    assert "max_steps: 8 -> 12" in out and "muon_lr: 0.02 -> 0.005" in out
    assert "adamw_lr" not in out.split("\n")[0]
    assert "--preset 18b is not used" in out, "a preset is for a fresh start"
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
    assert starts(again)[:-1] == [start]
    assert (again["step"], again["run_id"]) == (8, before["run_id"])
    assert again["resumed_from"] == str(run / "checkpoint_latest.pt")
    assert (again["config"]["muon_lr"], before["config"]["muon_lr"]) == (0.5, 0.02)

    (run / "run.json").write_text("my notes")
    assert cli(*resume, "--max_steps", "10")[0] == 0
    assert (run / "run.json.1").read_text() == "my notes"
    assert json.loads((run / "run.json").read_text())["step"] == 9


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
    for folder in (whole, killed):
        assert checkpoint.load(folder / "checkpoint_step_80.pt")["data_position"] == 320


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
    monkeypatch.setattr(run_experiment, "_start_from_file", find_start)
    file = finished / "checkpoint_step_4.pt"
    for how in (["--overwrite"], ["--resume", "latest"], ["--resume", file]):
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
