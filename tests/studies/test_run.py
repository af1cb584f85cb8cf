"""Running a study: what is run and where, failures, signals, and that a study that was cut off goes on."""

import contextlib
import dataclasses
import gzip
import json
import multiprocessing
import os
import re
import shlex
import signal
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

import data
from cli import FolderInUse
from config import PRESETS, ConfigError, Diverged, ExperimentError, OutOfMemory
from planner.layout import format_count
from studies import grids, one_run, report
from studies import run as runner
from studies.experts import KINDS
from studies.grids import STUDIES, Run
from tests.helpers import tiny_config
from tests.studies.untrained import BASE, CORPUS, TOKENS, go, loaded, result

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, least",
    [
        ("optimizer", 16),
        ("routing", 22),
        ("balance", 20),
        ("specialization", 2),
        ("scaling", 32),
        ("checkpointing", 32),
    ],
)
def test_a_study_performs_each_run_once_draws_and_is_reported(performed, tmp_path, name, least):
    assert go(name, tmp_path, jobs=3)
    results, labels = loaded(tmp_path), [label for label, _ in performed]
    assert len(labels) == len(set(labels)) == len(results["runs"]) >= least
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert go(name, tmp_path) and len(performed) == len(labels), "nothing is performed again"
    assert (
        "/somewhere" not in results["options"]
        and results["budget"]["cpu_minutes"] > 0 == results["budget"]["gpu_minutes"]
    )
    text = report.block(name, tmp_path)
    training = [
        run["tokens"]
        for run in results["runs"].values()
        if "tokens" in run and (name == "checkpointing" or "speed" not in run["group"])
    ]
    longest = f"| tokens of the longest run | {format_count(max(training))} |"
    assert longest in text, "speeds are no training"
    assert (
        "CPU minutes |" in text
        and "| machines | 2 CPU cores |" in text
        and "| --- |" in text
        and "nan" not in text
        and "inf" not in text.replace("information", "")
    )


def test_a_study_goes_on_where_it_was(performed, tmp_path, monkeypatch):
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 3 else whole(*a))
    assert (
        not go("routing", tmp_path)
        and len(performed) == 3
        and not (tmp_path / "figure.png").exists()
    )
    assert (
        f"Continue with `python -m studies.run routing --tokens {TOKENS:g} --out {tmp_path} --preset tiny`."
        in report.block("routing", tmp_path)
    )
    monkeypatch.setattr(runner, "perform", whole)
    assert go("routing", tmp_path) and len(performed) == len(set(performed)) == 22
    assert not go("balance", tmp_path / "late", seconds=0)


@pytest.mark.slow
def test_a_study_is_drawn_when_only_runs_that_others_led_to_are_missing(
    performed, tmp_path, monkeypatch
):
    """Here one model's runs for equal time, and then those at equal tokens too, of which an earlier study's figure tells."""
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 37 else whole(*a))
    assert not go("scaling", tmp_path) and (tmp_path / "figure.png").stat().st_size > 10_000
    text = report.block("scaling", tmp_path)
    assert (
        "Not finished" in text
        and "and unknown at 1 of 4 sizes |" in text
        and "| not run yet |" in text
    )
    (tmp_path / "results.json").unlink()
    performed.clear()
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 12 else whole(*a))
    assert (
        not go("scaling", tmp_path)
        and not (tmp_path / "figure.png").exists()
        and "| --- |" not in report.block("scaling", tmp_path)
    )


@pytest.mark.slow
def test_what_did_not_run_changes_nothing_that_was_found(performed, tmp_path, monkeypatch):
    """Another machine, whose memory lets checkpointing want other runs, refuses; a study that was changed is drawn when its runs were."""

    def machine(gb, gpu=None):
        monkeypatch.setattr(grids, "usable_gb", lambda cpu: gb)

    machine(139)
    assert go("checkpointing", tmp_path)
    before, picture = loaded(tmp_path), (tmp_path / "figure.png").read_bytes()
    machine(0.02)
    whole = runner.perform
    monkeypatch.setattr(
        runner, "perform", lambda *a: whole(*a) | dict(machine=dict(gpu="another", cpus=1))
    )
    with contextlib.suppress(ConfigError):
        go("checkpointing", tmp_path)
    assert (
        loaded(tmp_path)["runs"] == before["runs"]
        and loaded(tmp_path)["finished"]
        and (tmp_path / "figure.png").read_bytes() == picture
    )

    monkeypatch.setattr(runner, "perform", whole)
    folder = tmp_path / "routing"
    assert go("routing", folder)
    sized = grids.sized
    monkeypatch.setattr(grids, "sized", lambda *a: sized(*a) | dict(d_ff=48))
    done = len(performed)
    finished = []
    monkeypatch.setattr(
        runner,
        "perform",
        lambda *a: (
            finished.append(loaded(folder)["finished"])
            or (None if len(performed) == done + 4 else whole(*a))
        ),
    )
    assert (
        not go("routing", folder)
        and finished == [True, False, False, False, False]
        and not (folder / "figure.png").exists()
        and not loaded(folder)["finished"]
    ), "two models are not one figure"


@pytest.mark.slow
def test_runs_are_kept_in_the_order_of_the_study(performed, tmp_path, monkeypatch, capsys):
    whole = runner.perform

    def perform(run, *rest):
        time.sleep(0.03 if run.changes["seed"] == 1 else 0)
        found = whole(run, *rest)
        return found | dict(
            tokens_per_second=found["tokens_per_second"]
            * ((1.4, 1.6)[run.changes["seed"] - 1] if "dense" in run.group else 1)
        )

    monkeypatch.setattr(runner, "perform", perform)
    assert go("scaling", tmp_path, jobs=2)
    found = loaded(tmp_path)["runs"]
    wanted = [run.label for run in STUDIES["scaling"](BASE, TOKENS, [1, 2], found)]
    begun = [label for label, _ in performed]
    speeds = [label for label in begun if label.startswith("speed of")]
    assert [label[-1] for label in speeds] == ["1"] * 8 + ["2"] * 8, (
        "what is repeated runs at another time"
    )
    assert begun.index(speeds[-1]) < min(
        begun.index(label) for label in begun if "equal time" in label
    )
    assert (
        list(found) == wanted
        and all(run.startswith("speed of") for run in wanted[16:32])
        and all("equal time" in run for run in wanted[32:])
    )
    dense, longer = found["dense, 1 x 8, seed 1"], found["dense, 1 x 8, equal time, seed 1"]
    assert longer["tokens"] == 1.5 * dense["tokens"], "the dense model is that much faster here"
    assert longer["changes"] == dense["changes"] | dict(max_steps=longer["changes"]["max_steps"])
    assert "less than a minute to go" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_runs_save_and_end(monkeypatch, tmp_path, number):
    def perform(run, base, folder, environment, stop):
        os.kill(os.getpid(), number)
        assert stop.wait(10)
        return result() if run.label == "none, seed 1" else None

    monkeypatch.setattr(runner, "perform", perform)
    with pytest.raises(SystemExit) as stop:
        go("balance", tmp_path, jobs=2)
    assert stop.value.code == 128 + number and list(loaded(tmp_path)["runs"]) == ["none, seed 1"], (
        "one that ended all the same is kept"
    )


def test_metrics_of_all_runs_are_in_one_file(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n{"step": 2}\n')
        runner.keep_metrics(label, tmp_path, tmp_path / "kept.gz")
    rows = [json.loads(row) for row in gzip.open(tmp_path / "kept.gz", "rt")]
    assert [(row["run"], row["step"]) for row in rows] == [
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
    ] and rows[2]["train_loss"] == 2.0
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    runner.keep_metrics("a", tmp_path, tmp_path / "kept.gz")
    rows = [json.loads(row) for row in gzip.open(tmp_path / "kept.gz", "rt")]
    assert [(row["run"], row["step"]) for row in rows] == [("b", 1), ("b", 2), ("a", 3)], (
        "a run that was made again"
    )


def test_what_finished_beside_a_failed_run_is_kept(performed, tmp_path, monkeypatch):
    whole = runner.perform

    def perform(run, base, folder, environment, stop):
        if run.label == "batch, weight 0.0001, seed 1":
            raise ExperimentError("the disk is full")
        if run.label == "none, seed 2":
            assert stop.wait(10), "the others are told to stop"
            return None
        return whole(run, base, folder, environment, stop)

    monkeypatch.setattr(runner, "perform", perform)
    with pytest.raises(ExperimentError, match="disk is full"):
        go("balance", tmp_path, jobs=3)
    kept = loaded(tmp_path)[
        "runs"
    ].keys()  # perhaps also a run that began before the failure was seen
    assert "none, seed 1" in kept and not kept & {"batch, weight 0.0001, seed 1", "none, seed 2"}


def test_an_unforeseen_failure_costs_nothing_else(performed, tmp_path, monkeypatch):
    whole = runner.perform

    def perform(run, *rest):
        if run.label == "none, seed 2":
            raise KeyError("val_loss")
        time.sleep(0.1)
        return whole(run, *rest)

    monkeypatch.setattr(runner, "perform", perform)
    with pytest.raises(KeyError):
        go("balance", tmp_path, jobs=2)
    assert "none, seed 1" in loaded(tmp_path)["runs"]


def test_no_run_begins_shortly_before_the_end_of_the_time(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "perform", lambda *_: time.sleep(0.5) or result())
    assert not go("balance", tmp_path, seconds=0.6)
    assert len(loaded(tmp_path)["runs"]) == 1, "the second would begin in the last quarter"


@pytest.mark.slow
def test_the_budget_of_several_times_is_added_up(performed, tmp_path, monkeypatch):
    whole = runner.perform
    monkeypatch.setattr(
        runner, "perform", lambda *a: None if len(performed) == 3 else time.sleep(0.1) or whole(*a)
    )
    go("routing", tmp_path)
    before = loaded(tmp_path)["budget"]["cpu_minutes"]
    monkeypatch.setattr(runner, "perform", whole)
    go("routing", tmp_path)
    assert loaded(tmp_path)["budget"]["cpu_minutes"] > before >= 0.3 / 60


@pytest.mark.parametrize(
    "error, may_not_fit, expected",
    [
        (OutOfMemory, True, dict(failed="out of memory")),
        (OutOfMemory, False, None),
        (Diverged, False, dict(failed="diverged")),
        (ExperimentError, True, None),
    ],
)
def test_failures_that_are_results(monkeypatch, tmp_path, error, may_not_fit, expected):
    monkeypatch.setattr(one_run, "ROOT", tmp_path)
    (tmp_path / "run_experiment.py").write_text(
        f"import sys; print('the words', file=sys.stderr); sys.exit({error.exit_code})"
    )
    run = Run("a", dict(seed=1), may_not_fit=may_not_fit)
    if expected is None:
        with pytest.raises(ExperimentError, match="the words"):
            runner.perform(run, [], tmp_path / "run", {}, threading.Event())
    else:
        assert runner.perform(run, [], tmp_path / "run", {}, threading.Event()) == expected


def test_a_study_waits_for_the_runs_of_one_that_was_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(one_run, "GRACE", 0.2)
    began = time.monotonic()
    with runner.locked(tmp_path, "--save_dir"), pytest.raises(FolderInUse):
        runner.perform(Run("a", dict(seed=1)), [], tmp_path, {}, threading.Event())
    assert time.monotonic() - began > 0.2


def test_an_error_in_the_study_ends_its_runs(monkeypatch, tmp_path):
    def perform(run, base, folder, environment, stop):
        if run.label == "none, seed 1":
            return result()
        assert stop.wait(20), "it was not told to end"
        ended.append(run.label)
        return None

    ended = []
    monkeypatch.setattr(runner, "perform", perform)
    monkeypatch.setattr(runner, "keep_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go("balance", tmp_path, jobs=2)
    assert ended == ["none, seed 2"]


def test_what_is_kept_of_a_run():
    config = tiny_config(num_experts=2, moe_every=1, n_layers=2)
    row = dict(
        tokens_per_second=100.0,
        memory_peak_gb=1.0,
        train_loss=1.0,
        expert_load=[[0.5, 0.5], [0.75, 0.25]],
    )
    rates = [1.0, 1.0, 70.0, 90.0, 95.0, 105.0, 110.0, 150.0]  # the first ones compile
    history = [
        *(
            row | dict(step=step, tokens_per_second=rate, memory_peak_gb=2.0 / step)
            for step, rate in enumerate(rates, 1)
        ),
        dict(step=8, val_loss=3.0),
    ]
    kept = one_run.summary(
        dict(
            config=dataclasses.asdict(config),
            history=history,
            final_metrics=dict(val_loss=3.0),
            totals=dict(tokens=800, train_seconds=8, elapsed_seconds=9, skipped_steps=0),
            data=dict(train_tokens=400),
            memory_gb=dict(measured=dict(weights=1e-3, momentum=2e-3, activations=5)),
            environment=dict(gpu=None, cpus=2, torch="2", python="3"),
        )
    )
    assert (
        kept["tokens_per_second"] == 100
        and kept["peak_gb"] == 2
        and kept["passes"] == 2
        and kept["flops"] == 800 * config.flops_per_token
    )
    assert kept["worst_share"] == 0.75 and kept["load_entropy"] == pytest.approx(
        (1 + 0.8113) / 2, abs=1e-4
    )
    assert kept["state_bytes_per_parameter"] == pytest.approx(3e6 / config.total_params)
    assert kept["validation"] == [[8 * config.tokens_per_step, 3.0]]


def test_runs_are_spread_over_gpus_and_timed_ones_are_alone(monkeypatch, tmp_path):
    lock, running, most, together, threads = threading.Lock(), [], {}, [], set()
    monkeypatch.setattr(one_run, "cpu_cores", lambda: 16)

    def perform(run, base, folder, environment, stop):
        gpu = environment["CUDA_VISIBLE_DEVICES"]
        with lock:
            running.append((gpu, run.alone))
            most[gpu] = max(most.get(gpu, 0), sum(other == gpu for other, _ in running))
            together.append(len(running) > 1 and any(alone for _, alone in running))
            threads.add((run.alone, int(environment["TORCHINDUCTOR_COMPILE_THREADS"])))
        time.sleep(0.02)
        with lock:
            running.remove((gpu, run.alone))
        return result(machine=dict(gpu="G", cpus=2))

    monkeypatch.setattr(runner, "perform", perform)
    assert go("routing", tmp_path, gpus=("3", "GPU-7"), jobs=2)
    assert most == {"3": 2, "GPU-7": 2} and not any(together)
    assert threads == {(True, 16), (False, 4)}, "a share of the cores, or all"
    assert loaded(tmp_path)["budget"]["gpu_minutes"] > 0


def test_nothing_starts_beside_a_run_whose_speed_is_measured():
    timed_run, other = Run("speed of x", dict(seed=1), alone=True), Run("y", dict(seed=1))
    assert (
        runner.free_gpu(other, {0: (timed_run, "0")}, ("0", "1"), 4)
        is None
        is runner.free_gpu(timed_run, {0: (other, "0")}, ("0", "1"), 4)
    )
    assert (
        runner.free_gpu(timed_run, {}, ("0", "1"), 4) == "0"
        and runner.free_gpu(other, {0: (other, "0")}, ("0", "1"), 2) == "1"
    )
    assert runner.free_gpu(other, {0: (other, "0"), 1: (other, "0")}, ("0",), 2) is None


@pytest.mark.slow
def test_runs_that_a_study_has_changed_are_made_again(performed, monkeypatch, tmp_path, capsys):
    """Speeds of other steps, and what follows from them, and nothing else; their metrics are replaced too."""
    monkeypatch.setattr(grids, "TIMED_STEPS", (5, 8))
    whole = runner.perform
    monkeypatch.setattr(
        runner,
        "perform",
        lambda run, *rest: whole(run, *rest) | dict(machine=dict(gpu="H100", cpus=2)),
    )
    assert go("scaling", tmp_path)
    before, labels = loaded(tmp_path), [label for label, _ in performed]
    monkeypatch.setattr(grids, "TIMED_STEPS", (5, 10))
    performed.clear()
    monkeypatch.setattr(
        runner,
        "perform",
        lambda run, *rest: (
            (found := whole(run, *rest))
            | dict(
                machine=dict(gpu="H200", cpus=2),
                tokens_per_second=found["tokens_per_second"] * (2 if "dense" in run.group else 1),
            )
        ),
    )
    assert go("scaling", tmp_path)
    again = [label for label, _ in performed]
    assert again == [label for label in labels if label.startswith("speed of")] + [
        label for label in labels if "equal time" in label
    ]
    after = loaded(tmp_path)
    assert after["runs"].keys() == before["runs"].keys() and after["finished"]
    assert {
        run["changes"]["max_steps"]
        for label, run in after["runs"].items()
        if label in again and run["group"].startswith("speed")
    } == {10}
    assert "again, as the study has changed since" in capsys.readouterr().out


def test_speeds_of_two_kinds_of_gpu_are_not_mixed(monkeypatch, tmp_path):
    monkeypatch.setattr(
        runner,
        "perform",
        lambda run, *_: result(
            machine=dict(
                gpu="H200" if run.group in ("speed of top-3", "top-3, equal tokens") else "H100",
                cpus=2,
            )
        ),
    )
    with pytest.raises(ConfigError, match="measured on H100, and this machine has H200.*--out"):
        go("routing", tmp_path)
    assert (
        "speed of top-2, seed 1" in loaded(tmp_path)["runs"]
        and "speed of top-3, seed 1" not in loaded(tmp_path)["runs"]
    )


def test_a_study_of_something_else_is_not_gone_on_with(performed, tmp_path):
    go("routing", tmp_path)
    with pytest.raises(ConfigError, match="--tokens was.*--out"):
        runner.study("routing", BASE, ["--preset", "tiny"], 2 * TOKENS, [1], tmp_path, CORPUS)
    with pytest.raises(ConfigError, match="study: the text"):
        runner.study(
            "routing",
            BASE,
            ["--preset", "tiny"],
            TOKENS,
            [1],
            tmp_path,
            CORPUS | dict(data_hash="e"),
        )
    with pytest.raises(ConfigError, match="version 1 of the rules of data.*new ones version 2"):
        corpus = CORPUS | dict(data_hash="e", rules=2)
        runner.study("routing", BASE, ["--preset", "tiny"], TOKENS, [1], tmp_path, corpus)
    corpus = CORPUS | dict(rules=1)
    runner.study("routing", BASE, ["--preset", "tiny"], TOKENS, [1], tmp_path, corpus)


def test_no_run_passes_over_its_corpus_too_often(performed, tmp_path):
    with pytest.raises(
        ConfigError,
        match="top-1, equal FLOPs, seed 1' would pass.*more than 4: give fewer --tokens",
    ):
        runner.study(
            "routing",
            BASE,
            [],
            100 * TOKENS,
            [1],
            tmp_path,
            CORPUS | dict(train_tokens=25 * TOKENS),
        )
    assert not performed


def test_another_study_is_refused_before_its_text_is_read(performed, monkeypatch, tmp_path, capsys):
    go("routing", tmp_path)
    monkeypatch.setattr(data, "prepare", lambda config: pytest.fail("minutes of tokenizing"))
    assert (
        runner.exit_code(
            runner.run_study,
            ["routing", "--preset", "tiny", "--out", str(tmp_path), "--grad_clip", "2"],
        )
        == 2
    )
    assert (
        "--grad_clip was not given and is 2" in (words := capsys.readouterr().err)
        and "another --out to begin anew" in words
        and "text" not in words
    )


@pytest.mark.slow
def test_a_study_of_your_own_needs_a_function_and_its_name_to_be_drawn(
    performed, monkeypatch, tmp_path, capsys
):
    def experts(base, tokens, seeds, found):
        """Are more experts better? Four of them against eight."""
        return [
            run
            for n in (4, 8)
            for run in grids.runs(base, f"{n} experts", tokens, seeds, num_experts=n)
        ] + grids.speeds(base, "4 experts", tokens, num_experts=4)

    monkeypatch.setitem(STUDIES, "experts", experts)
    assert go("experts", tmp_path) and (tmp_path / "figure.png").stat().st_size > 10_000
    said, text = capsys.readouterr().out, report.section("experts", tmp_path)
    assert (
        len(re.findall(r" tokens/s, [\d.]+ seconds", said)) == 2
        and said.count(": validation loss 3.") == 4
    )
    assert (
        text.startswith("### Are more experts better?\n\n![Are more experts better?]")
        and "experts; undecided against each of the others |" in text
    )
    rates = [
        run["tokens_per_second"]
        for run in loaded(tmp_path)["runs"].values()
        if run["group"] == "speed of 4 experts"
    ]
    four, eight = [row for row in text.splitlines() if re.match(r"\| [48] experts \|", row)]
    assert four.startswith("| 4 experts | 3.") and four.endswith(
        f" | {format_count(TOKENS)} | {sum(rates) / 2:,.0f} ± {(rates[1] - rates[0]) / 2:,.0f} |"
    )
    assert (
        eight.startswith("| 8 experts | 3.")
        and eight.endswith(f" | {format_count(TOKENS)} | – |")
        and (four + eight).count("undecided") == 1
    )
    assert go("experts", tmp_path / "one", seeds=(1,)) and "too few seeds" in report.block(
        "experts", tmp_path / "one"
    )
    monkeypatch.setitem(STUDIES, "alone", lambda *arguments: experts(*arguments)[:2])
    assert go("alone", tmp_path / "alone") and report.section(
        "alone", tmp_path / "alone"
    ).startswith("### alone\n")


@pytest.mark.parametrize(
    "function, words",
    [
        (
            lambda base, tokens, seeds, found: grids.runs(base, "four", tokens, seeds, n_experts=4),
            "four: Config has no n_experts. Did you mean num_experts?",
        ),
        (
            lambda base, tokens, seeds, found: grids.runs(base, "nine", tokens, seeds, top_k=9),
            "top_k=9: must not exceed num_experts",
        ),
        (lambda base, tokens, seeds, found: None, "must return a list of Run"),
        (lambda base, tokens, seeds, found: [], "the study mine has no runs"),
        (
            lambda base, tokens, seeds, found: grids.runs(base, "a", tokens, seeds) * 2,
            "two runs with one name: a, seed 1",
        ),
        (
            lambda base, tokens, seeds, found: grids.speeds(base, "a", tokens, n_experts=4),
            "speed of a: Config has no n_experts. Did you mean num_experts?",
        ),
        (
            lambda base, tokens, seeds, found: dataclasses.replace(base, n_experts=4),
            "test_run.py, line",
        ),
    ],
)
def test_a_study_of_your_own_that_fails_says_where(monkeypatch, tmp_path, capsys, function, words):
    """Before its text is read, and without a traceback."""
    monkeypatch.setitem(STUDIES, "mine", function)
    monkeypatch.setitem(runner.TOKENS, "mine", TOKENS)
    monkeypatch.setattr(data, "prepare", lambda config: pytest.fail("not needed"))
    assert (
        runner.exit_code(
            runner.run_study, ["mine", "--preset", "tiny", "--out", str(tmp_path / "out")]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        words in error
        and error.startswith("error: the study mine")
        and not (tmp_path / "out").exists()
    )


def test_an_option_that_a_study_derives_its_runs_from_is_none_that_it_sets(monkeypatch, tmp_path):
    """Sizes of the scaling study are shares of the width that is given, the preset's own too; a study of one's own may use its seeds as it
    likes, and yield its runs."""

    def mine(base, tokens, seeds, found):
        first, second = seeds
        yield from grids.runs(base, "a", tokens, [second])

    monkeypatch.setitem(STUDIES, "mine", mine)
    monkeypatch.setitem(runner.TOKENS, "mine", TOKENS)
    monkeypatch.setattr(
        data, "prepare", lambda config: (_ for _ in ()).throw(ConfigError("reached"))
    )
    own_width = str(PRESETS["tiny"]["d_model"])
    for name, option, value in (
        ("scaling", "--d_model", "64"),
        ("scaling", "--d_model", own_width),
        ("checkpointing", "--batch_size", "4"),
        ("balance", "--muon_lr", "0.01"),
        ("mine", "--muon_lr", "0.01"),
    ):
        with pytest.raises(ConfigError, match="reached"):
            runner.run_study(
                [name, "--preset", "tiny", option, value, "--out", str(tmp_path / name)]
            )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("balance", "scaling") else pytest.mark.slow)
        for name in STUDIES
    ],
)
def test_the_command_that_the_report_prints_goes_on(performed, monkeypatch, tmp_path, name):
    """Also with what the study set itself, and with an option that no run has, of a study that began before it was refused."""
    corpus = types.SimpleNamespace(
        data_hash="d",
        tokenizer_hash="t",
        train=range(10**7),
        validation=range(1000),
        unigram_entropy=7.0,
        rules=1,
    )
    monkeypatch.setattr(data, "prepare", lambda config: corpus)
    whole, folder = runner.perform, tmp_path / name
    monkeypatch.setattr(runner, "perform", lambda *a: None if performed else whole(*a))
    command = [name, "--preset", "tiny", "--tokens", "1e5", "--out", str(folder)]
    assert runner.exit_code(runner.run_study, command) == 0 and len(performed) == 1
    monkeypatch.setattr(
        runner, "_own_settings", lambda base, tokens, given: {}
    )  # all come from the command
    goes_on = shlex.split(
        re.search("with `python -m studies.run (.*)`", report.block(name, folder))[1]
    )
    performed.clear()
    assert (
        "--save_every" in goes_on
        and runner.exit_code(runner.run_study, goes_on) == 0
        and len(performed) == 1
    ), "another run"


def test_one_process_at_a_time(tmp_path):
    with runner.locked(tmp_path, "--out"):
        command = ["balance", *OPTIONS, "--out", str(tmp_path)]
        assert runner.exit_code(runner.run_study, command) == 1  # it may succeed later
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- runs in earnest

OPTIONS = [
    "--preset",
    "tiny",
    "--d_model",
    "32",
    "--n_heads",
    "2",
    "--n_layers",
    "2",
    "--d_ff",
    "32",
    "--max_seq_len",
    "32",
    "--vocab_size",
    "300",
    "--batch_size",
    "2",
    "--gradient_accumulation_steps",
    "2",
    "--device",
    "cpu",
    "--eval_steps",
    "1",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of Python, C and prose, and where its tokens are cached."""
    folder, cache = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache")
    for i in range(60):
        (folder / "package").mkdir(exist_ok=True)
        (folder / "package" / f"m{i}.py").write_text(
            f'"""Module {i}."""\nimport os\n\ndef f{i}(x):\n    # adds {i * 7919}\n    return x + "é{i}"\n'
            * 4
        )
        (folder / f"p{i}.md").write_text(
            f"Page {i * 31} says that tea is good, and number {i} is better.\n" * 8
        )
    return ["--data", str(folder), "--cache_dir", str(cache), "--validation_fraction", "0.2"]


def train(run, text, folder, stop=None):
    options = [*OPTIONS, *text, "--sample_tokens", "0", "--save_every", "0", "--save_minutes", "5"]
    return runner.perform(
        run, options, folder, runner.environment_of("cpu", 1), stop or threading.Event()
    )


@pytest.mark.slow
def test_a_run_that_fails_says_why(tmp_path, text):
    with pytest.raises(ExperimentError, match="the run 'b, seed 1' failed(.|\n)*d_ff"):
        train(Run("b", dict(seed=1, d_ff=33)), text, tmp_path / "b")


# Stands for run_experiment.py, which takes seconds to start.
PROGRAM_THAT_SAVES = """
import signal, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--save_dir") + 1])

def save(number, frame):
    time.sleep(0.5)  # longer than perform takes to look again
    (folder / "saved").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, save)
(folder / "trains").touch()
time.sleep(60)
"""


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves(monkeypatch, tmp_path):
    monkeypatch.setattr(one_run, "ROOT", tmp_path)
    (tmp_path / "run_experiment.py").write_text(PROGRAM_THAT_SAVES)
    stop, folder = threading.Event(), tmp_path / "run"

    def when_it_trains():
        wait_until((folder / "trains").exists)
        stop.set()

    threading.Thread(target=when_it_trains, daemon=True).start()
    run = Run("a", dict(seed=1))
    assert runner.perform(run, [], folder, runner.environment_of("cpu", 1), stop) is None
    assert (folder / "saved").exists()


def test_a_run_saves_when_its_study_is_killed(monkeypatch, tmp_path):
    """That run_experiment.py saves and ends after SIGTERM is a test of its own."""
    monkeypatch.setattr(one_run, "ROOT", tmp_path)
    (tmp_path / "run_experiment.py").write_text(PROGRAM_THAT_SAVES)
    folder = tmp_path / "run"
    arguments = (
        Run("a", dict(seed=1)),
        [],
        folder,
        runner.environment_of("cpu", 1),
        threading.Event(),
    )
    # A fork starts at once; a new interpreter needs seconds to import.
    context = multiprocessing.get_context("fork")
    study = context.Process(target=runner.perform, args=arguments)
    study.start()
    wait_until((folder / "trains").exists)
    study.kill()
    study.join()
    wait_until((folder / "saved").exists, seconds=30)


@pytest.mark.slow
def test_the_whole_command_with_the_analysis_of_experts(tmp_path, text, capsys):
    command = [
        "specialization",
        *OPTIONS,
        *text,
        "--out",
        str(tmp_path / "study"),
        "--tokens",
        "1280",
        "--eval_every",
        "5",
        "--seeds",
        "1",
        "--jobs",
        "2",
    ]
    assert runner.exit_code(runner.run_study, command) == 0
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == [
        "figure.png",
        "metrics.jsonl.gz",
        "results.json",
        "runs",
    ]
    assert not list((tmp_path / "study" / "runs").iterdir())
    rows = [json.loads(row) for row in gzip.open(tmp_path / "study" / "metrics.jsonl.gz", "rt")]
    assert {row["run"] for row in rows} == {"top-2 of 8, seed 1"} and any(
        "train_loss" in row for row in rows
    )
    for run in loaded(tmp_path / "study")["runs"].values():
        assert (
            run["tokens"] == 1280
            and run["flops"] > 0
            and run["peak_gb"] > 0
            and run["passes"] < 1
            and len(run["validation"]) > 2
        )
        assert 0 < run["load_entropy"] <= 1 and 1 / 8 <= run["worst_share"] <= 1
        found = run["experts"]
        assert [step["step"] for step in found["steps"]] == [0, 2, 4, 6, 8, 10]
        assert np.array(found["kind_table"]).shape == (2, 8, len(KINDS)) and np.array(
            found["domain_table"]
        ).shape == (2, 8, 2)
        assert np.array(found["kind_table"]).sum() == 2 * 2 * (
            found["tokens"] - found["without_kind"]
        )
        assert {found["kinds"][k] for k, n in enumerate(found["kind_tokens"]) if n} >= {
            "keyword",
            "comment",
            "docstring",
            "string",
            "prose",
        }
        assert (
            sorted(found["domains"]) == [".md", "package"]
            and found["steps"][-1]["domain"]["bits"][0] > 0
        )
    assert "layer" in report.block("specialization", tmp_path / "study")
    assert runner.exit_code(runner.run_study, [*command, "--grad_clip", "2"]) == 2
    assert "is of another study: --grad_clip was not given and is 2" in capsys.readouterr().err
    assert (
        runner.exit_code(report.main, [str(tmp_path / "study")]) == 0
        and f"({tmp_path / 'study' / 'figure.png'})" in capsys.readouterr().out
    )
    assert runner.exit_code(report.main, [str(tmp_path)]) == 2


@pytest.mark.parametrize(
    "options, words",
    [
        (["balence"], "Did you mean balance"),
        (["balance", "--jobs", "0"], "--jobs 0: must be a positive number"),
        (["balance", "--tokens", "inf"], "--tokens inf: must be"),
        (["balance", "--save_dir", "x"], "the study's is --out"),
        (["balance", "--max_steps", "9"], "--max_steps: the study sets it, by --tokens"),
        (["balance", "--seed", "9"], "--seed: the study sets it"),
        (
            ["routing", "--preset", "tiny", "--top_k", "3"],
            "--top_k: the study sets it for each of its runs",
        ),
    ],
)
def test_wrong_options_are_said(capsys, options, words):
    assert runner.exit_code(runner.run_study, options) == 2
    assert words in capsys.readouterr().err
