"""tracker.py: what each tracker was sent is read back from what it wrote. Without its package a test is skipped."""

import dataclasses
import json
import struct
import sys
from pathlib import Path

import pytest

from config import ExperimentError
from record import tracker
from tests.training import (  # some are fixtures
    build,
    no_pictures,  # noqa: F401
    resume,
    rows,
    run_to,
    settings,  # noqa: F401
    text,  # noqa: F401
)

NUMBERS = ("train_loss", "grad_norm", "tokens_per_second", "expert_load_max", "val_loss")


@pytest.fixture
def run(settings):  # noqa: F811
    """run(name) trains 4 steps, is stopped, goes on to 8 with a tracker, and returns (its configuration, its rows by step, its name)."""

    def make(name: str):
        config = settings(tracker=name, max_steps=8, eval_every=4, save_every=100, log_every=1)
        first = build(config)
        run_to(first, 4)
        resume(config, first.folder / "checkpoint_latest.pt").run()
        expected = {}
        for row in rows(config, "step"):
            expected.setdefault(row["step"], {}).update(tracker.numbers(row))
        assert sorted(expected) == list(range(9)) and set(NUMBERS) <= set(expected[8])
        return first.config, expected, f"run-{first.run_id[:8]}"

    return make


def check(found: dict[int, dict], expected: dict[int, dict], rel: float = 1e-6) -> None:
    assert sorted(found) == sorted(expected)
    for step, values in expected.items():
        assert {k: found[step].get(k) for k in values} == pytest.approx(values, rel=rel), step


@pytest.mark.slow
def test_tensorboard(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, expected, name = run("tensorboard")
    events = EventAccumulator(f"{config.save_dir}/tensorboard/{name}")  # both parts of the run
    events.Reload()
    found = {}
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            found.setdefault(event.step, {})[key] = event.value
    check(found, expected)
    written = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(written.strip("`\n")) == dataclasses.asdict(config)


@pytest.mark.slow
def test_tensorboard_hides_rows_past_the_checkpoint(settings):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(tracker="tensorboard", max_steps=8, eval_every=100, save_every=4, log_every=1)
    first = build(config)
    first.run()
    resume(dataclasses.replace(config, muon_lr=0.001), first.folder / "checkpoint_step_4.pt").run()
    events = EventAccumulator(f"{config.save_dir}/tensorboard/run-{first.run_id[:8]}")
    events.Reload()
    rates = {event.step: event.value for event in events.Scalars("muon_lr")}
    assert len(events.Scalars("muon_lr")) == 8 and rates[4] > 0.003 > 0.001 >= rates[5]


@pytest.mark.slow
def test_trackio(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    import trackio.utils  # noqa: F401 (one of the modules that know the folder)
    from trackio.sqlite_storage import SQLiteStorage

    for module in [
        m for n, m in sys.modules.items() if n.startswith("trackio") and hasattr(m, "TRACKIO_DIR")
    ]:
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    config, expected, name = run("trackio")
    found = {}
    for row in SQLiteStorage.get_logs(tracker.PROJECT, name):
        found.setdefault(row["step"], {}).update(row)
    check(found, expected)
    assert SQLiteStorage.get_runs(tracker.PROJECT) == [name] and (tmp_path / "trackio").exists()
    written = SQLiteStorage.get_run_config(tracker.PROJECT, name)
    assert {k: written[k] for k in dataclasses.asdict(config)} == dataclasses.asdict(config)


def wandb_records(path: Path):
    """The records of a .wandb file, a log in LevelDB's format: blocks of 32 KiB; of each part checksum, length and type."""
    raw, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(raw):
        _, length, kind = struct.unpack_from("<IHB", raw, place)
        if kind == 0:  # the rest of a block
            place = (place // 32768 + 1) * 32768
            continue
        whole += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if 32768 - place % 32768 < 7:
            place = (place // 32768 + 1) * 32768
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""


def test_wandb_offline(run, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config, expected, name = run("wandb")
    found, names = {}, set()
    for path in sorted(Path(config.save_dir).glob("wandb/offline-run-*/*.wandb")):
        for raw in wandb_records(path):
            record = Record()
            record.ParseFromString(raw)
            if record.HasField("run"):
                names.add((record.run.project, record.run.run_id))
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if items:
                found.setdefault(items["_step"], {}).update(items)
    check(found, expected)
    assert names == {(tracker.PROJECT, name)}


def test_numbers_are_what_can_be_drawn():
    row = dict(
        step=3,
        train_loss=2.5,
        mfu=None,
        expert_load=[[0.1, 0.9], [0.5, 0.5]],
        grad_norm_spike=dict(parameter="x"),
    )
    assert tracker.numbers(row) == dict(train_loss=2.5, expert_load_max=0.9, expert_load_min=0.1)


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_not_installed(name, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[-1:])
    monkeypatch.delitem(sys.modules, name, raising=False)
    for _ in range(2):
        with pytest.raises(
            ExperimentError, match=f"{name} is not installed.*pip install {name}.*--tracker none"
        ):
            tracker.require(name)
        (tmp_path / name).mkdir(exist_ok=True)  # a folder that such a tracker wrote is no package
    tracker.require("none")


def test_a_tracker_that_cannot_start_ends_the_run_before_it_begins(settings, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tracker, "_wandb", lambda *_: 1 / 0)
    trainer = build(settings(tracker="wandb"))
    with pytest.raises(
        ExperimentError,
        match="wandb could not be started: division by zero.*WANDB_MODE=offline.*--tracker none",
    ):
        trainer.run()
    assert trainer.step == 0 and not (trainer.folder / "run.json").exists()


def test_a_resumed_run_continues_without_a_tracker_that_cannot_start(settings, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(tracker, "_wandb", lambda *_: 1 / 0)
    with tracker.tracking(settings(tracker="wandb"), "a" * 32, 5) as track:
        track(dict(step=6, train_loss=1.0))
    assert "wandb could not be started: division by zero" in capsys.readouterr().err


def test_a_tracker_that_fails_costs_the_run_nothing(settings, monkeypatch, capsys):  # noqa: F811
    sent = []

    def send(values, step):
        sent.append(step)
        if step == 3:
            raise OSError("the network is gone")

    monkeypatch.setattr(tracker, "_trackio", lambda *_: (send, lambda: sent.append("end")))
    config = settings(tracker="trackio", max_steps=6, log_every=1)
    build(config).run()
    assert sent == [0, 1, 2, 3] and [row["step"] for row in rows(config, "train_loss")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert (
        capsys.readouterr().err.count("trackio failed and is off from here on: the network is gone")
        == 1
    )


@pytest.mark.parametrize("error", [None, SystemExit, RuntimeError])
def test_a_tracker_is_closed_however_the_run_ends(settings, monkeypatch, error):  # noqa: F811
    ends = []
    monkeypatch.setattr(
        tracker, "_trackio", lambda *_: (lambda values, step: None, lambda: ends.append(1))
    )
    try:
        with tracker.tracking(settings(tracker="trackio"), "a" * 32, 0) as track:
            track(dict(step=1, train_loss=1.0))
            if error:
                raise error
    except (SystemExit, RuntimeError):
        pass
    assert ends == [1]
