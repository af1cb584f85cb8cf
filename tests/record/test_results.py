"""What a run writes down: rows, sums, results, run.json, measured memory, which checkpoints stay."""

import errno
import functools
import json
import os
import signal
import time
import types

import pytest
import torch

from config import optimizer_groups
from engine.gradients import OwnGradients
from muon import build_optimizers
from planner.machine import GB, Machine, known_gpu
from record import checkpoint, lineage, meter, results, run_file
from record import side_work as side_work_module
from record.meter import MemoryMeter
from record.metrics import Interval, mfu, perplexity
from record.results import (
    Record,
    earlier_starts,
    set_aside,
    start_facts,
    write_run_file,
)
from record.run_folder import RunCheckpoints
from record.side_work import SideWork
from record.small_files import resume_points, run_files
from tests.helpers import tiny_config

CPU = torch.device("cpu")

# Lines of metrics.jsonl that are no rows of this program's.
STRANGE_LINES = [
    b"123",
    b'{"a": 1}',
    b"\xff",
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": 1.0}',
    b'{"step": 1e400}',
    b'{"step": 1, "elapsed_seconds": "long"}',
    b'{"step": 1, "train_loss": [1]}',
    b'{"step": 1, "expert_load": [[0.5], [0.5, 0.5]]}',
    b'{"step": 1, "expert_load": [1]}',
    b'{"step": 1, "train_loss": 1' + b"0" * 400 + b"}",
    b"[" * 100_000,
]


# ---------------------------------------------------------------- rows


def test_a_record_continues_with_the_rows_up_to_its_step(tmp_path, capsys):
    first = Record(tmp_path)
    for step in range(1, 5):
        first.append(dict(step=step, train_loss=1.0 / step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "tr')  # a crash in the middle of a line

    second = Record(tmp_path)
    second.load(tmp_path, 2)
    assert [row["step"] for row in second.history] == [1, 2]
    second.begin()
    assert "2 rows of metrics.jsonl" in capsys.readouterr().out
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    dropped = (tmp_path / "metrics.jsonl.1").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped] == [3, 4], "the dropped rows alone"

    sent = []
    second.track = sent.append
    second.append(dict(step=3, val_loss=2.0))
    assert sent == [dict(step=3, val_loss=2.0)]
    assert second.evaluated(3)
    assert not second.evaluated(2)


def test_the_latest_metrics_are_single_numbers(tmp_path):
    record = Record(tmp_path)
    record.append(dict(step=1, train_loss=3.0, expert_load=[[0.5, 0.5]], grad_norm_spike={}))
    record.append(dict(step=2, val_loss=2.0, sample="a text"))
    assert record.latest() == dict(step=2, train_loss=3.0, val_loss=2.0)


def test_files_are_set_aside_under_the_first_free_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert set_aside(path) is None
    for name in ("metrics.jsonl.1", "metrics.jsonl.2"):
        path.write_text(name)
        assert set_aside(path).name == name
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "metrics.jsonl.1",
        "metrics.jsonl.2",
    ]


def test_run_files_are_those_of_a_run(tmp_path):
    for name in ("checkpoint_step_2.pt", "checkpoint_latest.pt", "run.json", "notes.txt"):
        (tmp_path / name).write_text("")
    assert [path.name for path in run_files(tmp_path)] == [
        "checkpoint_latest.pt",
        "run.json",
        "checkpoint_step_2.pt",
    ]


@pytest.mark.parametrize("line", STRANGE_LINES)
def test_a_line_without_a_row_is_moved_and_said(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train_loss": 2.0}\n' + line + b'\n{"step": 2}\n')
    record = Record(tmp_path)
    record.load(tmp_path, 1)
    record.begin()
    record.append(dict(step=2, train_loss=1.0))
    assert [row["step"] for row in record.history] == [1, 2]
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == b'{"step": 2}\n' + line + b"\n"
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2]
    assert capsys.readouterr().err.count("hold no row are in metrics.jsonl.1") == 1


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_metrics_that_are_no_file_are_set_aside(tmp_path, capsys, kind):
    path = tmp_path / "metrics.jsonl"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    record = Record(tmp_path)
    record.load(tmp_path, 5)
    record.begin()
    record.append(dict(step=6))
    assert path.read_text() == '{"step": 6}\n'
    assert (tmp_path / "metrics.jsonl.1").exists()
    assert "it is now metrics.jsonl.1" in capsys.readouterr().err


class FullDisk:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file, free):
        self.file = file
        self.free = free

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.file.write(content[: self.free])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch, capsys):
    record = Record(tmp_path)
    record.append(dict(step=1))
    monkeypatch.setattr(
        results, "open", lambda path, mode: FullDisk(open(path, mode), 5), raising=False
    )
    record.append(dict(step=2))
    record.append(dict(step=3))
    path = tmp_path / "metrics.jsonl"
    assert path.read_text() == '{"step": 1}\n{"ste', "the last write was cut short"
    monkeypatch.undo()
    record.append(dict(step=4))
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count(f"warning: metrics.jsonl failed: {path}: No space left on device") == 1
    assert said.count("note: metrics.jsonl works again") == 1
    path.unlink()  # by someone who tidies up
    record.append(dict(step=5))
    assert len(path.read_text().splitlines()) == 5


def write_start(folder, **facts) -> dict:
    """Writes run.json as a start of a run does, and returns its content."""
    start = start_facts(CPU, SideWork(), **facts)
    write_run_file(folder, start, earlier_starts(folder))
    return json.loads((folder / "run.json").read_text())


def test_run_json_keeps_the_earlier_starts(tmp_path, capsys):
    (tmp_path / "run.json").write_text("[1]")  # not this program's: it is not lost
    for step in (0, 5, 9):
        facts = write_start(tmp_path, step=step)
    assert facts["step"] == 9
    assert [start["step"] for start in facts["earlier"]] == [0, 5]
    assert facts["gpu"] is None
    assert facts["packages"]["torch"]
    assert (tmp_path / "run.json.1").read_text() == "[1]"
    assert capsys.readouterr().err.count("it is now run.json.1") == 1


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff", b"[" * 10**5, b'{"earlier": 1}', b'{"earlier": [1]}', b"1e999"]
)
def test_a_run_json_that_is_not_ours_is_set_aside(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    assert earlier_starts(tmp_path) == []
    assert (tmp_path / "run.json.1").read_bytes() == content


def test_a_diff_is_stored_once(tmp_path, monkeypatch):
    states = [("one", "a"), ("one", "a"), ("two", "b"), ("one", "a"), ("", "c"), ("", "c")]
    for step, (diff, sha) in enumerate(states):
        state = dict(commit="x", clean=not diff, diff=diff, diff_sha256=sha)
        monkeypatch.setattr(results, "git_state", lambda state=state: state)
        facts = write_start(tmp_path, step=step)
    found = [start["git"] for start in [*facts["earlier"], facts]]
    assert [git["diff"] for git in found] == [None, None, "two", "one", "", ""]
    assert [git["diff_sha256"] for git in found] == ["a", "a", "b", "a", "c", "c"]


def test_what_the_next_start_has_too_is_stored_once(tmp_path, monkeypatch):
    first = dict(a="1", b="1", c="1")
    lists = [first, first, dict(a="2", c="1"), None, dict(a="2", c="1", d="1"), dict(d="1")]
    branches: list = []
    before = []
    for step, packages in enumerate(lists):
        monkeypatch.setattr(results, "_packages", lambda packages=packages: packages)
        branches = lineage.begin(branches, step, None)
        facts = write_start(tmp_path, step=step, lineage=branches)
        before.append({key: value for key, value in facts.items() if key != "earlier"})
    assert facts["packages"] == dict(d="1") and len(facts["lineage"]) == 6
    changes = [start.get("packages_unlike_next") for start in facts["earlier"]]
    assert changes == [{}, dict(a="1", b="1"), None, None, dict(a="2", c="1")]
    assert max(len(start["lineage"]) for start in facts["earlier"]) == 2

    whole = earlier_starts(tmp_path)
    assert [start["packages"] for start in whole] == lists
    assert run_file.beginning(facts) is None

    # A file of an older program has all lists in full, and gets the new form.
    text = json.dumps(dict(before[-1], earlier=before[:-1]))
    (tmp_path / "run.json").write_text(text)
    assert earlier_starts(tmp_path) == before
    write_run_file(tmp_path, before[-1], before[:-1])
    assert json.loads((tmp_path / "run.json").read_text())["earlier"] == facts["earlier"]


def test_what_cannot_be_found_out_about_a_machine_is_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "~orch-2.4.0.dist-info").mkdir()  # as a package that was removed halfway
    monkeypatch.syspath_prepend(str(tmp_path))
    results._packages.cache_clear()
    facts = write_start(tmp_path, step=0)
    assert facts["packages"]["torch"] == torch.__version__
    results._packages.cache_clear()

    monkeypatch.setattr(results, "environment", lambda device: 1 / 0)
    facts = write_start(tmp_path, step=1)
    assert facts["environment"] is None
    assert facts["packages"]["torch"]
    assert "warning: environment failed: division by zero" in capsys.readouterr().err


def test_resume_points_are_those_of_the_branch():
    def start(step, resumed=True):
        return dict(step=step, resumed_from="a checkpoint" if resumed else None)

    assert resume_points([start(0, False), start(5), start(9)]) == [5, 9]
    assert resume_points([start(0, False), start(5), start(9), start(6)]) == [5, 6]
    assert resume_points([start(0, False), start(5), start(5)]) == [5]
    assert resume_points([start(0, False), start(5), start(0, False)]) == []
    assert resume_points([dict(step="5"), dict()]) == []


def test_results_are_written_whole(tmp_path):
    corpus = types.SimpleNamespace(
        data_hash="d",
        tokenizer_hash="t",
        train=[0] * 9,
        validation=[0],
        unigram_entropy=3.0,
        unigram_cross_entropy=3.5,
        rules=1,
    )
    record = Record(tmp_path)
    record.append(dict(step=1, train_loss=3.0))
    config = tiny_config()
    record.write_results(config, CPU, corpus, {}, dict(steps=1), None)
    before = (tmp_path / results.RESULTS).read_text()
    written = json.loads(before)
    assert written["final_metrics"] == dict(step=1, train_loss=3.0)
    assert written["parameters"]["total"] == config.total_params
    assert written["data"]["train_tokens"] == 9
    assert written["data"]["unigram_entropy"] == 3.0
    assert written["data"]["unigram_cross_entropy"] == 3.5
    with pytest.raises(TypeError):
        record.write_results(config, CPU, corpus, {}, dict(steps=object()), None)
    assert (tmp_path / results.RESULTS).read_text() == before
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def long_record(folder, n_rows: int, numbers: int) -> Record:
    """A record of training rows with so many numbers each, and an evaluation every 50 rows."""
    record = Record(folder)
    record.begun = True  # its file is not what is tested
    record.write_rows = lambda: None
    load = [[0.12345] * (numbers // 4)] * 4
    for step in range(1, n_rows + 1):
        record.append(dict(step=step, train_loss=3.0 / step, expert_load=load))
        if step % 50 == 0:
            record.append(dict(step=step, val_loss=3.0))
    return record


@pytest.mark.parametrize("n_rows, numbers", [(900, 4), (5000, 4), (600, 4000)])
def test_results_hold_few_rows_while_training_and_all_at_the_end(tmp_path, n_rows, numbers):
    corpus = types.SimpleNamespace(
        data_hash="d",
        tokenizer_hash="t",
        train=[0],
        validation=[0],
        unigram_entropy=3.0,
        unigram_cross_entropy=3.5,
        rules=2,
    )
    record = long_record(tmp_path, n_rows, numbers)

    def written(**options) -> list[dict]:
        record.write_results(tiny_config(), CPU, corpus, {}, {}, None, **options)
        return json.loads((tmp_path / results.RESULTS).read_text())["history"]

    thinned = written()
    assert len(thinned) <= 2000
    assert (tmp_path / results.RESULTS).stat().st_size < 9e6
    assert thinned[-1] == record.history[-1]
    assert thinned[0]["step"] == 1
    steps = [row["step"] for row in thinned]
    assert steps == sorted(steps)
    if n_rows == 900:
        assert thinned == record.history, "nothing is left out of a short history"
    distances = {b - a for a, b in zip(steps, steps[1:])}
    assert max(distances) <= n_rows / 50, "they are spread over the run"
    assert sum("val_loss" in row for row in thinned) == n_rows // 50
    start = time.process_time()
    written()
    # About 15 ms on an idle machine, reading the file included.
    assert time.process_time() - start < 1
    assert written(all_rows=True) == record.history


# ---------------------------------------------------------------- work beside training


class Panic(BaseException):
    """As packages that are written in Rust raise it."""


@pytest.mark.parametrize("error", [ValueError, MemoryError, Panic])
def test_side_work_warns_once_until_it_works_again(capsys, error):
    side_work = SideWork()
    broken = [True]

    def action():
        if broken[0]:
            raise error("it broke\nfor a reason")

    for _ in range(3):
        assert not side_work.run("the picture", action)
    assert side_work.failing == {"the picture": "it broke"}
    broken[0] = False
    for _ in range(2):
        assert side_work.run("the picture", action)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: the picture failed: it broke. Training continues")
    assert lines[1:] == ["note: the picture works again"]
    assert side_work.value("a value", lambda: 5) == 5
    assert side_work.value("a value", lambda: 1 / 0) is None
    with pytest.raises(KeyboardInterrupt):
        side_work.run("the picture", lambda: signal.raise_signal(signal.SIGINT))


def test_the_last_side_work_is_tried_again(capsys, monkeypatch):
    monkeypatch.setattr(side_work_module, "PAUSES", (0, 0, 0))
    fails = dict(never=0, twice=2, always=99)
    done = []

    def action(name):
        fails[name] -= 1
        if fails[name] >= 0:
            raise OSError(errno.ENOSPC, "full", f"/a/{name}")
        done.append(name)

    actions = {name: functools.partial(action, name) for name in fails}
    assert not SideWork().finish(actions)
    assert done == ["never", "twice"]
    said = capsys.readouterr().err
    end = "warning: always is not as it should be when the run ends: /a/always: No space left"
    assert end in said
    assert "never" not in said


# ---------------------------------------------------------------- sums


def test_means_of_an_interval_are_weighted_by_sequences():
    config = tiny_config(n_layers=2, moe_every=1)
    counts = torch.tensor([[1, 3, 0, 0], [1, 1, 1, 1]])
    interval = Interval()
    for loss, sequences in ((2.0, 3), (4.0, 1)):
        metrics = dict(
            cross_entropy=torch.tensor(loss),
            correct=torch.tensor(8 * sequences),
            load_balancing_loss=torch.tensor(1.0),
            router_z_loss=torch.tensor(0.0),
            expert_counts=counts,
        )
        interval.add_micro_batch(metrics, sequences)
    interval.add_seconds(1.0)
    interval.add_seconds(1.0)
    row = interval.training_row(config)
    assert row["train_loss"] == 2.5
    assert row["train_perplexity"] == perplexity(2.5)
    assert row["train_accuracy"] == 0.5, "8 of 16 tokens of each sequence"
    assert row["load_balancing_loss"] == 1.0
    assert row["expert_load"] == [[0.25, 0.75, 0, 0], [0.25, 0.25, 0.25, 0.25]]
    assert interval.tokens_per_second(config) == 4 * 16 / 2

    resumed = Interval(dict(interval.sums))
    assert resumed.training_row(config) == row


def test_mfu_only_for_known_gpus():
    config = tiny_config(precision="bf16")
    name = "NVIDIA H100 80GB HBM3"
    h100 = Machine(name, 84.9, 128, known_gpu(name))
    assert mfu(config, h100, 1e6) == pytest.approx(config.flops_per_token * 1e6 / 989e12)
    assert mfu(tiny_config(precision="fp32"), h100, 1e6) is None
    assert mfu(config, Machine(None, 0, 16), 1e6) is None
    assert known_gpu("NVIDIA H100 PCIe") is None
    assert known_gpu("Tesla T4") is None


def test_the_perplexity_of_a_run_that_diverges_is_a_number():
    assert perplexity(1e6) == perplexity(700) < float("inf")


# ---------------------------------------------------------------- memory


def meter_of(config, offload: bool, host_gradients: dict) -> MemoryMeter:
    parameters = {"embedding.weight": torch.zeros(264, 32, dtype=torch.bfloat16)}
    groups = optimizer_groups(config)
    for group in groups.values():
        for parameter in group.parameters:
            parameters.setdefault(parameter, torch.zeros(2, 3, dtype=torch.bfloat16))
    optimizers = build_optimizers(config, parameters, offload)
    gradients = OwnGradients(parameters, None).on_device
    return MemoryMeter(CPU, {}, 0.0, parameters, optimizers, groups, host_gradients, gradients)


@pytest.mark.parametrize("offload", [False, True])
def test_memory_is_measured_once_by_the_groups_keys(offload):
    config = tiny_config(precision="bf16")
    host_gradients = {"x": torch.zeros(10)} if offload else {}
    measured = meter_of(config, offload, host_gradients)
    measured.parameters["embedding.weight"].grad_dtype = torch.float32
    for parameter in measured.parameters.values():
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    for step in range(4):
        assert (measured.measured_gb is not None) == (step >= meter.MEASURED_STEP)
        with measured.phase("backward"):
            pass
        with measured.phase("optimizer"):
            pass
    elements = sum(p.numel() for p in measured.parameters.values())
    groups = optimizer_groups(config)
    muon = sum(measured.parameters[name].numel() for name in groups["muon"].parameters)
    state = dict(master=2 * elements, momentum=2 * muon, adamw=8 * (elements - muon))
    sizes = {key: round(value * GB) for key, value in measured.measured_gb.items()}
    assert sizes["weights"] == 2 * elements
    assert sizes["gradients"] == 2 * elements + 2 * 264 * 32  # the embedding's are fp32
    assert {key: sizes[key] for key in state} == (dict.fromkeys(state, 0) if offload else state)
    assert sizes["host"] == (sum(state.values()) + 40 if offload else 0)
    assert "total" not in sizes, "activations of a CPU are not known"


def test_a_phase_that_fails_is_not_noted():
    measured = meter_of(tiny_config(precision="bf16"), False, {})
    with pytest.raises(ZeroDivisionError), measured.phase("optimizer"):
        raise ZeroDivisionError
    assert measured.steps == 0
    assert measured.phase_gb == {}


def test_each_phase_of_the_measured_step_has_a_peak_of_its_own(monkeypatch):
    """A stand-in for PyTorch's allocator: its peak counts from the last reset."""
    peaks = iter([9, 9, 9, 9, 5, 6, 8, 8])
    resets = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks) * GB)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    measured = meter_of(tiny_config(precision="bf16"), False, {})
    measured.gpu = True
    for _ in range(4):
        with measured.phase("backward"):
            pass
        with measured.phase("optimizer"):
            pass
    sizes = measured.measured_gb
    assert sizes["workspace"] == 1
    assert sizes["total"] == pytest.approx(6)
    assert measured.peak_gb == 9
    assert len(resets) == 4, "two phases of the second and the third step"


# ---------------------------------------------------------------- which checkpoints stay


def checkpoints_of(folder, **changes) -> RunCheckpoints:
    return RunCheckpoints(tiny_config(save_dir=str(folder), max_steps=10, **changes), None)


def test_when_checkpoints_are_due(tmp_path):
    every = checkpoints_of(tmp_path, save_every=4, save_minutes=0)
    assert [step for step in range(1, 11) if every.numbered_due(step)] == [4, 8, 10]
    assert not any(every.latest_due(step) for step in range(1, 11))
    by_time = checkpoints_of(tmp_path, save_every=0, save_minutes=30)
    assert [step for step in range(1, 11) if by_time.latest_due(step)] == [10]
    by_time.last_save -= 31 * 60
    assert by_time.latest_due(1)
    assert not checkpoints_of(tmp_path, save_every=0, save_minutes=0).enabled


def test_the_oldest_of_the_runs_own_checkpoints_go(tmp_path):
    (tmp_path / "checkpoint_step_1.pt").write_text("another run's")
    own = checkpoints_of(tmp_path, keep_checkpoints=2)
    for step in (2, 4, 6):
        path = own.begin_numbered(step)
        assert step in own.saved_steps, "the checkpoint itself says that it is there"
        path.write_text(str(step))
        own.finish_numbered(path)
        own.delete_oldest()
        own.note_saved(step)
    assert own.saved_steps == [4, 6]
    assert own.last_saved_step == 6
    assert own.latest.samefile(checkpoint.step_path(tmp_path, 6))
    assert (tmp_path / "checkpoint_step_1.pt").exists()


def test_the_checkpoints_of_another_run_are_not_counted_as_own(tmp_path):
    """The checkpoint that is resumed was copied into the folder of another run."""
    for step, run_id in ((1, "other"), (2, "own"), (4, "other")):
        checkpoint.save(checkpoint.step_path(tmp_path, step), dict(run_id=run_id, step=step))
    checkpoint.step_path(tmp_path, 3).write_text("damaged")
    run = checkpoints_of(tmp_path)
    run.count_own([1, 2, 3, 4, 5], "own")
    assert run.saved_steps == [2, 3]


def test_a_numbered_checkpoint_that_leads_nowhere_stops_no_run(tmp_path):
    run = checkpoints_of(tmp_path)
    run.latest.write_text("a file of its own")
    for step, target in ((2, "checkpoint_step_2.pt"), (4, "missing")):
        checkpoint.step_path(tmp_path, step).symlink_to(target)
    run.take_over(1)
    assert run.bytes_to_come(1) > 0
    # A pointer to a checkpoint that is gone is replaced.
    run.latest.write_text(f"{checkpoint.POINTER}checkpoint_step_2.pt\n")
    path = checkpoint.step_path(tmp_path, 6)
    path.write_text("six")
    run.finish_numbered(path)
    assert run.latest.samefile(path)
