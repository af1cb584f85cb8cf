"""A disk that is full for a moment, or for good: what a run keeps, and what it says."""

import builtins
import errno
import io
import json
import os
from pathlib import Path

import pytest

import trainer as trainer_module
from config import ExperimentError
from record import checkpoint, results, side_work
from record.checkpoint import CheckpointError
from tests.training import build, resume, settings, text  # noqa: F401 (two are fixtures)


class Disk:
    """A disk whose writers in one folder are counted, and refused where `is_full` says so.

    `is_full(number)` is called with the number of the call, from 1.
    """

    def __init__(self, monkeypatch, folder: Path):
        self.folder = str(folder)
        self.calls = 0
        self.names = []
        self.is_full = lambda number: False
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self.guarded_open(module.open))
        for name in ("replace", "rename", "link", "symlink", "mkdir"):
            monkeypatch.setattr(os, name, self.guarded(name, getattr(os, name)))
        monkeypatch.setattr(os, "pwrite", self.guarded("pwrite", os.pwrite, anywhere=True))

    def guarded(self, name, function, anywhere=False):
        def call(*arguments, **options):
            if anywhere or self.folder in str(arguments):
                self.count(name if anywhere else f"{name} {arguments}")
            return function(*arguments, **options)

        return call

    def guarded_open(self, function):
        def call(path, mode="r", *arguments, **options):
            if set(mode) & set("wax+") and self.folder in str(path):
                self.count(f"open {path}")
            return function(path, mode, *arguments, **options)

        return call

    def count(self, name):
        if name == "pwrite" and self.names[-1:] == [name]:
            return  # a checkpoint has one for each tensor
        self.calls += 1
        self.names.append(name)
        if self.is_full(self.calls):
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setattr(side_work, "PAUSES", (0, 0))
    monkeypatch.setattr(trainer_module, "PAUSES", (0, 0))
    monkeypatch.setattr(checkpoint, "check_free_space", lambda *_: None)
    monkeypatch.setattr("trainer.plot_training_curves", draw)
    monkeypatch.setattr(results, "CURVES_SECONDS", 0)
    return Disk(monkeypatch, tmp_path)


def draw(history, path, **options):
    """A picture that takes no time: it says how many rows it shows."""
    results.write_whole(path, str(len(history)))


def numbers(folder: Path) -> list[tuple]:
    """What the rows of metrics.jsonl hold, without times."""
    keys = ("step", "train_loss", "val_loss", "grad_norm", "sample")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(key) for key in keys) for line in lines]


def check_whole(folder: Path, expected: list[tuple]) -> None:
    """Everything that a run leaves is there and complete."""
    assert numbers(folder) == expected
    written = json.loads((folder / "training_results.json").read_text())
    assert len(written["history"]) == len(expected)
    assert written["sample"]["text"]
    assert json.loads((folder / "run.json").read_text())["step"] == 0
    assert (folder / "training_curves.png").read_text() == str(len(expected))
    assert checkpoint.load(checkpoint.latest_path(folder))["step"] == 4
    assert not list(folder.glob(".*")), "no temporary file is left"


SHORT = dict(max_steps=4, log_every=1, eval_every=2, save_every=2, sample_tokens=2)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_moment_costs_a_run_nothing(settings, tmp_path, disk, capfd):
    """Each call that writes is refused, in a run of its own."""
    whole = build(settings(save_dir=str(tmp_path / "whole"), **SHORT))
    disk.calls = 0
    disk.names.clear()
    whole.run()
    expected = numbers(tmp_path / "whole")
    check_whole(tmp_path / "whole", expected)
    # The last call of each kind: no later step makes up for it.
    last_of_its_name = dict(zip(disk.names, range(1, disk.calls + 1)))
    assert len(last_of_its_name) >= 15
    for refused in last_of_its_name.values():
        folder = tmp_path / f"run{refused}"
        trainer = build(settings(save_dir=str(folder), **SHORT))
        disk.calls = 0
        disk.names.clear()
        disk.is_full = lambda number, refused=refused: number == refused
        trainer.run()
        disk.is_full = lambda number: False
        refused_call = disk.names[refused - 1]
        said = [line for line in capfd.readouterr().err.splitlines() if "No space left" in line]
        assert len(said) <= 1, refused_call
        for line in said:
            assert str(folder) in line, f"{refused_call}: the path is named"
        check_whole(folder, expected)


def test_a_disk_that_is_full_for_steps_is_written_to_later(settings, tmp_path, disk, capfd):
    changes = dict(SHORT, max_steps=12, save_every=3, eval_every=100)
    trainer = build(settings(**changes))
    disk.is_full = lambda number: 2 <= trainer.step < 5
    saved = []
    save = trainer.save

    def save_and_note(numbered):
        try:
            save(numbered)
            saved.append(trainer.step)
        except CheckpointError:
            saved.append(-trainer.step)
            raise

    trainer.save = save_and_note
    trainer.run()
    assert saved == [-3, -4, 6, 9, 12], "the next attempt came one step later, and then two"
    assert trainer.checkpoints.saved_steps == [6, 9, 12]
    assert [row[0] for row in numbers(trainer.folder) if row[1]] == list(range(1, 13))
    said = capfd.readouterr().err
    assert said.count("warning: metrics.jsonl failed: ") == 1
    assert said.count("note: metrics.jsonl works again") == 1
    assert said.count("saving is tried again after step 4") == 1
    assert said.count("saving is tried again after step 6") == 1
    assert said.count("note: step 6: the checkpoint is saved") == 1


@pytest.mark.parametrize("end", ["signal", "max_steps"])
def test_only_a_failed_last_save_is_an_error(settings, tmp_path, disk, capfd, end):
    trainer = build(settings(**SHORT))
    disk.is_full = lambda number: trainer.step >= 3
    take = trainer.train_step

    def train_step(batches):
        trainer.stop.number = 15 if end == "signal" and trainer.step == 2 else None
        return take(batches)

    trainer.train_step = train_step
    step = 3 if end == "signal" else 4
    with pytest.raises(CheckpointError, match=f"ends at step {step} and is not saved") as error:
        trainer.run()
    assert error.value.exit_code == 1
    assert "No space left" in str(error.value)
    assert str(trainer.folder) in str(error.value)
    assert checkpoint.load(checkpoint.latest_path(trainer.folder))["step"] == 2
    assert "metrics.jsonl is not as it should be when the run ends" in capfd.readouterr().err


def test_data_that_cannot_be_read_any_more_cost_no_step(settings, tmp_path, disk, capfd):
    """The resumed run ends as one run does; an interval of rows goes across the error."""
    changes = dict(SHORT, log_every=4, eval_every=4, save_every=100)
    whole = build(settings(save_dir=str(tmp_path / "whole"), **changes))
    whole.run()
    trainer = build(settings(**changes))
    micro_batches = trainer._batches

    def unreadable_after_five():
        """The third step has the first of its two micro-batches."""
        for number, batch in enumerate(micro_batches()):
            if number == 5:
                raise ExperimentError("the tokens cannot be read")
            yield batch

    trainer._batches = unreadable_after_five
    with pytest.raises(ExperimentError, match="cannot be read"):
        trainer.run()
    assert "--resume latest" in capfd.readouterr().err
    latest = checkpoint.latest_path(trainer.folder)
    assert checkpoint.load(latest)["step"] == 2
    resume(trainer.config, latest).run()
    assert numbers(trainer.folder) == numbers(whole.folder)


def test_old_checkpoints_that_cannot_be_deleted_fail_no_save(settings, disk, monkeypatch, capfd):
    trainer = build(settings(**dict(SHORT, save_every=1, keep_checkpoints=1)))
    monkeypatch.setattr(trainer.checkpoints, "delete_oldest", lambda: 1 / 0)
    trainer.run()
    assert len(list(trainer.folder.glob("checkpoint_step_*.pt"))) == 4
    said = capfd.readouterr().err
    assert said.count("warning: deleting old checkpoints failed") == 1
    assert "saving is tried again" not in said
