"""Studies: what they run and where, that a study that was cut off goes on, what is called undecided, and what is reported."""
import contextlib
import dataclasses
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import data
from config import Config, ConfigError, Diverged, ExperimentError, OutOfMemory
from conftest import tiny_config
from memory import count
from studies import experts as experts_of
from studies import figures, grids, report
from studies import run as runner
from studies.experts import KINDS
from studies.figures import mean_and_spread, scaling_law, timed
from studies.grids import STUDIES, Run

ROOT = Path(__file__).resolve().parent.parent
BASE = tiny_config(batch_size=2, gradient_accumulation_steps=2, n_heads=4, num_experts=8, moe_every=1)
TOKENS = 10 * BASE.tokens_per_step
CORPUS = dict(data="python", data_hash="d", tokenizer_hash="t", train_tokens=100 * TOKENS, validation_tokens=1000, unigram_entropy=7.0)


def result(loss=5.0, **changes):
    return dict(val_loss=loss, tokens=TOKENS, flops=1e9 * loss, train_seconds=loss, elapsed_seconds=loss, tokens_per_second=100.0 * loss,
                total_params=1000 * loss, active_params=500 * loss, load_entropy=0.9 + loss / 1000, worst_share=0.3, state_bytes_per_parameter=8 * loss,
                peak_gb=loss, memory_gb=dict(activations=loss), passes=0.1, validation=[[0, 6.0], [TOKENS, loss]],
                machine=dict(gpu=None, cpus=2, torch="2", python="3")) | changes


def experts(seed):
    """The analysis of a model of two layers, 8 experts, in which expert 1 takes half of the whitespace."""
    counts = np.random.default_rng(seed).integers(50, 100, (2, 8, len(KINDS)))
    counts[1, 0, -1] = 800
    def step(n):
        return dict(step=n, tokens=n * 100, **{label: dict(bits=[0.1 + n / 100, 0.2 + n / 100], shuffled=[0.01] * 2, shuffled_most=[0.02] * 2)
                                               for label in ("kind", "domain")})
    return dict(layers=[0, 1], tokens=1000, without_kind=3, kinds=list(KINDS), kind_tokens=[100] * len(KINDS), kind_entropy=3.4,
                kind_table=counts.tolist(), domains=["a", "b"], domain_tokens=[600, 400], domain_entropy=0.97,
                domain_table=counts[:, :, :2].tolist(), steps=[step(0), step(5), step(10)],
                top_tokens=[[[["|", 0.9], [" a`b", 0.8], ["\n", 0.7]] for _ in range(8)] for _ in range(2)])


@pytest.fixture
def performed(monkeypatch):
    """Runs are not trained but noted, with the GPU that they were on."""
    seen = []

    def perform(run, base, folder, environment, stop):
        seen.append((run.label, environment.get("CUDA_VISIBLE_DEVICES")))
        batch, mode = run.changes.get("batch_size", 0), run.changes.get("activation_checkpointing")
        if run.may_not_fit and batch > dict(none=2, selective=8, full=256)[mode]:
            return dict(failed="out of memory")
        config = dataclasses.replace(BASE, **run.changes)
        loss = 5 - 0.1 * math.log(config.active_params) + 0.02 * math.sin(7 * len(run.label) + run.changes["seed"])
        found = result(loss, tokens=config.max_steps * config.tokens_per_step, flops=config.flops_per_token * config.max_steps * config.tokens_per_step,
                       tokens_per_second=(0.98 + 0.02 * run.changes["seed"]) * 1e9 / config.active_params, peak_gb=1.0 + run.changes["seed"], total_params=config.total_params, active_params=config.active_params,
                       validation=[[0, 6.0], [config.max_steps * config.tokens_per_step, loss]])
        return found | (dict(experts=experts(run.changes["seed"])) if run.analysed else {})
    monkeypatch.setattr(runner, "perform", perform)
    return seen


def go(name, folder, seconds=math.inf, seeds=(1, 2), tokens=None, **options):
    folder.mkdir(exist_ok=True)
    tokens = tokens or (1e6 if name == "checkpointing" else TOKENS)
    return runner.study(name, BASE, ["--preset", "tiny", "--cache_dir", "/somewhere"], tokens, list(seeds), folder, CORPUS, seconds, **options)


def loaded(folder):
    return json.loads((folder / "results.json").read_text())


# ---------------------------------------------------------------- what is run

@pytest.mark.parametrize("name, least", [("optimizer", 16), ("routing", 22), ("balance", 20), ("specialization", 2), ("scaling", 32),
                                         ("checkpointing", 32)])
def test_a_study_performs_each_run_once_draws_and_is_reported(performed, tmp_path, name, least):
    assert go(name, tmp_path, jobs=3)
    results, labels = loaded(tmp_path), [label for label, _ in performed]
    assert len(labels) == len(set(labels)) == len(results["runs"]) >= least
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert go(name, tmp_path) and len(performed) == len(labels), "nothing is performed again"
    assert "/somewhere" not in results["options"] and results["budget"]["cpu_minutes"] > 0 == results["budget"]["gpu_minutes"]
    text = report.block(name, tmp_path)
    training = [run["tokens"] for run in results["runs"].values() if "tokens" in run and (name == "checkpointing" or "speed" not in run["group"])]
    assert f"see at most {count(max(training))} tokens" in text, "speeds are no training"
    assert "minutes on 2 CPU cores" in text and "| --- |" in text and "nan" not in text and "inf" not in text.replace("information", "")


def test_a_study_goes_on_where_it_was(performed, tmp_path, monkeypatch):
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 3 else whole(*a))
    assert not go("routing", tmp_path) and len(performed) == 3 and not (tmp_path / "figure.png").exists()
    assert f"`python -m studies.run routing --tokens {TOKENS:g} --out {tmp_path} --preset tiny` goes on" in report.block("routing", tmp_path)
    monkeypatch.setattr(runner, "perform", whole)
    assert go("routing", tmp_path) and len(performed) == len(set(performed)) == 22
    assert not go("balance", tmp_path / "late", seconds=0)


@pytest.mark.parametrize("name", ["optimizer", "routing", "balance", "specialization", "scaling"])
def test_one_seed_is_reported_without_numbers_that_need_two(performed, tmp_path, monkeypatch, name):
    monkeypatch.setattr(runner, "draw", lambda results, path: path.touch())
    assert go(name, tmp_path, seeds=(1,))
    text = report.block(name, tmp_path).replace("information", "")
    assert "| --- |" in text and "inf" not in text and "nan" not in text


def test_a_study_is_drawn_when_only_runs_that_others_led_to_are_missing(performed, tmp_path, monkeypatch):
    """Here one model's runs for equal time, and then those at equal tokens too, of which an earlier study's figure tells."""
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 37 else whole(*a))
    assert not go("scaling", tmp_path) and (tmp_path / "figure.png").stat().st_size > 10_000
    text = report.block("scaling", tmp_path)
    assert "Not finished" in text and "figure.png" in text and "and unknown at 1 with equal time" in text and "| not run yet |" in text
    (tmp_path / "results.json").unlink()
    performed.clear()
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 12 else whole(*a))
    assert not go("scaling", tmp_path) and not (tmp_path / "figure.png").exists() and "| --- |" not in report.block("scaling", tmp_path)


def test_what_did_not_run_changes_nothing_that_was_found(performed, tmp_path, monkeypatch):
    """Another machine, whose memory lets checkpointing want other runs, refuses; a study that was changed is drawn when its runs were."""
    def machine(gb, gpu=None):
        monkeypatch.setattr(grids, "usable_gb", lambda cpu: gb)
    machine(139)
    assert go("checkpointing", tmp_path)
    before, picture = loaded(tmp_path), (tmp_path / "figure.png").read_bytes()
    machine(0.02)
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: whole(*a) | dict(machine=dict(gpu="another", cpus=1)))
    with contextlib.suppress(ConfigError):
        go("checkpointing", tmp_path)
    assert loaded(tmp_path)["runs"] == before["runs"] and loaded(tmp_path)["finished"] and (tmp_path / "figure.png").read_bytes() == picture

    monkeypatch.setattr(runner, "perform", whole)
    folder = tmp_path / "routing"
    assert go("routing", folder)
    sized = grids.sized
    monkeypatch.setattr(grids, "sized", lambda *a: sized(*a) | dict(d_ff=48))
    done = len(performed)
    finished = []
    monkeypatch.setattr(runner, "perform", lambda *a: finished.append(loaded(folder)["finished"]) or (None if len(performed) == done + 4 else whole(*a)))
    assert not go("routing", folder) and finished == [True, False, False, False, False] and not (folder / "figure.png").exists() and not loaded(folder)["finished"], "two models are not one figure"


def test_equal_time_that_diverged_is_no_answer(performed, monkeypatch, tmp_path):
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 32 else whole(*a))
    assert not go("scaling", tmp_path) and (tmp_path / "figure.png").exists()
    monkeypatch.setattr(runner, "perform", lambda *_: dict(failed="diverged"))
    with pytest.raises(ExperimentError, match="equal time diverged"):
        go("scaling", tmp_path)
    assert not (tmp_path / "figure.png").exists() and "not run yet" not in report.block("scaling", tmp_path)


def test_runs_are_kept_in_the_order_of_the_study(performed, tmp_path, monkeypatch, capsys):
    whole = runner.perform

    def perform(run, *rest):
        time.sleep(0.1 if run.changes["seed"] == 1 else 0)
        found = whole(run, *rest)
        return found | dict(tokens_per_second=found["tokens_per_second"] * ((1.4, 1.6)[run.changes["seed"] - 1] if "dense" in run.group else 1))
    monkeypatch.setattr(runner, "perform", perform)
    assert go("scaling", tmp_path, jobs=2)
    found = loaded(tmp_path)["runs"]
    wanted = [run.label for run in STUDIES["scaling"](BASE, TOKENS, [1, 2], found)]
    begun = [label for label, _ in performed]
    speeds = [label for label in begun if label.startswith("speed of")]
    assert [label[-1] for label in speeds] == ["1"] * 8 + ["2"] * 8, "what is repeated runs at another time"
    assert begun.index(speeds[-1]) < min(begun.index(label) for label in begun if "equal time" in label)
    assert list(found) == wanted and all(run.startswith("speed of") for run in wanted[16:32]) and all("equal time" in run for run in wanted[32:])
    dense, longer = found["dense, 1 x 8, seed 1"], found["dense, 1 x 8, equal time, seed 1"]
    assert longer["tokens"] == 1.5 * dense["tokens"], "the dense model is that much faster here"
    assert longer["changes"] == dense["changes"] | dict(max_steps=longer["changes"]["max_steps"])
    assert "minutes to go" in capsys.readouterr().out


def test_a_signal_lets_runs_save_and_end(monkeypatch, tmp_path):
    def perform(run, base, folder, environment, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
        return result() if run.label == "none, seed 1" else None
    monkeypatch.setattr(runner, "perform", perform)
    with pytest.raises(SystemExit) as stop:
        go("balance", tmp_path, jobs=2)
    assert stop.value.code == 143 and list(loaded(tmp_path)["runs"]) == ["none, seed 1"], "one that ended all the same is kept"


def test_metrics_of_all_runs_are_in_one_file(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n{"step": 2}\n')
        runner.keep_metrics(label, tmp_path, tmp_path / "kept.gz")
    rows = [json.loads(row) for row in gzip.open(tmp_path / "kept.gz", "rt")]
    assert [(row["run"], row["step"]) for row in rows] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)] and rows[2]["train_loss"] == 2.0
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    runner.keep_metrics("a", tmp_path, tmp_path / "kept.gz")
    rows = [json.loads(row) for row in gzip.open(tmp_path / "kept.gz", "rt")]
    assert [(row["run"], row["step"]) for row in rows] == [("b", 1), ("b", 2), ("a", 3)], "a run that was made again"


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
    kept = loaded(tmp_path)["runs"].keys()      # perhaps also a run that began before the failure was seen
    assert "none, seed 1" in kept and not kept & {"batch, weight 0.0001, seed 1", "none, seed 2"}


def test_an_unforeseen_failure_costs_nothing_else(performed, tmp_path, monkeypatch):
    whole = runner.perform

    def perform(run, *rest):
        if run.label == "none, seed 2":
            raise KeyError("val_loss")
        time.sleep(0.5)
        return whole(run, *rest)
    monkeypatch.setattr(runner, "perform", perform)
    with pytest.raises(KeyError):
        go("balance", tmp_path, jobs=2)
    assert "none, seed 1" in loaded(tmp_path)["runs"]


def test_no_run_begins_shortly_before_the_end_of_the_time(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "perform", lambda *_: time.sleep(0.5) or result())
    assert not go("balance", tmp_path, seconds=0.6)
    assert len(loaded(tmp_path)["runs"]) == 1, "the second would begin in the last quarter"


def test_the_budget_of_several_times_is_added_up(performed, tmp_path, monkeypatch):
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 3 else time.sleep(0.1) or whole(*a))
    go("routing", tmp_path)
    before = loaded(tmp_path)["budget"]["cpu_minutes"]
    monkeypatch.setattr(runner, "perform", whole)
    go("routing", tmp_path)
    assert loaded(tmp_path)["budget"]["cpu_minutes"] > before >= 0.3 / 60


@pytest.mark.parametrize("error, may_not_fit, expected", [
    (OutOfMemory, True, dict(failed="out of memory")), (OutOfMemory, False, None), (Diverged, False, dict(failed="diverged")), (ExperimentError, True, None)])
def test_failures_that_are_results(monkeypatch, tmp_path, error, may_not_fit, expected):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "run_experiment.py").write_text(f"import sys; print('the words', file=sys.stderr); sys.exit({error.exit_code})")
    run = Run("a", dict(seed=1), may_not_fit=may_not_fit)
    if expected is None:
        with pytest.raises(ExperimentError, match="the words"):
            runner.perform(run, [], tmp_path / "run", {}, threading.Event())
    else:
        assert runner.perform(run, [], tmp_path / "run", {}, threading.Event()) == expected


def test_a_study_whose_runs_diverged_has_no_answer(performed, monkeypatch, tmp_path):
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda run, *rest: dict(failed="diverged") if run.group == "top-1, equal FLOPs" else whole(run, *rest))
    with pytest.raises(ExperimentError, match="top-1, equal FLOPs diverged"):
        go("routing", tmp_path)
    text = report.block("routing", tmp_path)
    with pytest.raises(ExperimentError, match="speed of adamw diverged"):
        monkeypatch.setattr(runner, "perform", lambda run, *rest: dict(failed="diverged") if run.group == "speed of adamw" else whole(run, *rest))
        go("optimizer", tmp_path / "optimizer")
    with pytest.raises(ExperimentError, match="adamw, adamw_lr 0.001.* diverged"):
        monkeypatch.setattr(runner, "perform", lambda run, *rest: dict(failed="diverged") if run.group.startswith("adamw, ") else whole(run, *rest))
        go("optimizer", tmp_path / "adamw")
    assert len(loaded(tmp_path)["runs"]) == 22 and "| --- |" not in text and "Not finished" in text
    monkeypatch.setattr(runner, "perform", lambda *_: dict(failed="diverged"))
    with pytest.raises(ExperimentError, match="none diverged|none, .* diverged"):
        go("balance", tmp_path / "balance")
    assert STUDIES["scaling"](BASE, TOKENS, [1], {run.label: dict(failed="diverged") for run in STUDIES["scaling"](BASE, TOKENS, [1], {})})


def test_an_end_of_a_sweep_beyond_which_all_diverged_is_no_end(performed, monkeypatch, tmp_path):
    """AdamW alone is best at 0.004 with 20%; 0.008, and all with 40%, diverge."""
    whole = runner.perform
    def perform(run, *rest):
        c, found = run.changes, whole(run, *rest)
        if "warmup_fraction" in c and (c["adamw_lr"] > 0.004 or c["warmup_fraction"] > 0.2):
            return dict(failed="diverged")
        best = 0.004 if "warmup_fraction" in c else 0.002
        return found | dict(val_loss=5 - ("warmup_fraction" in c) + abs(math.log2(c.get("adamw_lr", best) / best)))
    monkeypatch.setattr(runner, "perform", perform)
    assert go("optimizer", tmp_path)
    text = report.block("optimizer", tmp_path)
    assert "| warm-up | 5% | 20% |" in text
    assert "0.004" in text and "sweep's end" not in next(line for line in text.splitlines() if "best peak rates" in line).split("|")[-2]


def test_a_study_waits_for_the_runs_of_one_that_was_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "GRACE", 0.5)
    began = time.monotonic()
    with runner.locked(tmp_path, "--save_dir"), pytest.raises(ConfigError, match="another process"):
        runner.perform(Run("a", dict(seed=1)), [], tmp_path, {}, threading.Event())
    assert time.monotonic() - began > 0.5


def test_a_rate_that_diverges_is_not_the_best():
    found = {}
    for _ in range(9):
        for run in STUDIES["optimizer"](BASE, 100 * TOKENS, [1], found):
            rate = run.changes.get("adamw_lr", 0)
            end = dict(failed="diverged") if run.changes["optimizer"] == "adamw" and rate > 0.001 else result(5 - rate)
            found[run.label] = end | dict(changes=run.changes)
    assert max(run["changes"]["adamw_lr"] for run in found.values() if run["changes"]["optimizer"] == "adamw" and "adamw_lr" in run["changes"]) == 0.004
    assert report.best_runs({run: [r] for run, r in found.items() if "failed" not in r}, "adamw") == [found["adamw, adamw_lr 0.001, seed 1"]]


def test_an_error_in_the_study_ends_its_runs(monkeypatch, tmp_path):
    def perform(run, base, folder, environment, stop):
        if run.label == "none, seed 1":
            return result()
        assert stop.wait(20), "it was not told to end"
        ended.append(run.label)

    ended = []
    monkeypatch.setattr(runner, "perform", perform)
    monkeypatch.setattr(runner, "keep_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go("balance", tmp_path, jobs=2)
    assert ended == ["none, seed 2"]


def test_what_is_kept_of_a_run():
    config = tiny_config(num_experts=2, moe_every=1, n_layers=2)
    row = dict(tokens_per_second=100.0, memory_peak_gb=1.0, train_loss=1.0, expert_load=[[0.5, 0.5], [0.75, 0.25]])
    rates = [1.0, 1.0, 70.0, 90.0, 95.0, 105.0, 110.0, 150.0]       # the first ones compile
    history = [*(row | dict(step=step, tokens_per_second=rate, memory_peak_gb=2.0 / step) for step, rate in enumerate(rates, 1)), dict(step=8, val_loss=3.0)]
    kept = runner.summary(dict(config=dataclasses.asdict(config), history=history, final_metrics=dict(val_loss=3.0),
        totals=dict(tokens=800, train_seconds=8, elapsed_seconds=9, skipped_steps=0), data=dict(train_tokens=400),
        memory_gb=dict(measured=dict(weights=1e-3, momentum=2e-3, activations=5)), environment=dict(gpu=None, cpus=2, torch="2", python="3")))
    assert kept["tokens_per_second"] == 100 and kept["peak_gb"] == 2 and kept["passes"] == 2 and kept["flops"] == 800 * config.flops_per_token
    assert kept["worst_share"] == 0.75 and kept["load_entropy"] == pytest.approx((1 + 0.8113) / 2, abs=1e-4)
    assert kept["state_bytes_per_parameter"] == pytest.approx(3e6 / config.total_params)
    assert kept["validation"] == [[8 * config.tokens_per_step, 3.0]]


def test_kinds_of_characters():
    def kinds(text, suffix):
        return [KINDS[k] if k != experts_of.NONE else "" for k in experts_of.character_kinds(text, suffix)]
    assert kinds("if x1:  # so\n", ".py") == ["keyword"] * 2 + [""] + ["identifier"] * 2 + ["operator"] + [""] * 2 + ["comment"] * 4 + [""]
    assert set(kinds("#include <math.h>\n", ".h")) <= {"C code", ""}
    assert set(kinds("/* if */", ".h")) <= {"C comment", ""} and set(kinds("if", "")) == {"prose"}


def test_information_of_experts_that_read_the_kind():
    """Experts that are the kind say all of it; of the kinds moved by one token they say nothing, nor does the shuffled baseline."""
    kinds = np.random.default_rng(0).integers(0, 4, 20_000).astype(np.uint8)
    chosen = np.stack([kinds, kinds], 1)[None]
    there, moved = (experts_of.information(chosen, labels, 4, 4) for labels in (kinds, np.roll(kinds, 1)))
    assert there["bits"][0] == pytest.approx(2, abs=0.01) and moved["bits"][0] < 0.01 > there["shuffled_most"][0]
    labels = np.where(np.arange(20_000) % 5, kinds, experts_of.NONE).astype(np.uint8)
    counts = experts_of.table(chosen[0], labels, 4, 4)
    assert (counts == 2 * np.diag(np.bincount(kinds[labels != experts_of.NONE]))).all(), "end-of-text is left out"


def test_runs_are_spread_over_gpus_and_timed_ones_are_alone(monkeypatch, tmp_path):
    lock, running, most, together, threads = threading.Lock(), [], {}, [], set()
    monkeypatch.setattr(runner, "cores", lambda: 16)

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
    assert runner.free_gpu(other, {0: (timed_run, "0")}, ("0", "1"), 4) is None is runner.free_gpu(timed_run, {0: (other, "0")}, ("0", "1"), 4)
    assert runner.free_gpu(timed_run, {}, ("0", "1"), 4) == "0" and runner.free_gpu(other, {0: (other, "0")}, ("0", "1"), 2) == "1"
    assert runner.free_gpu(other, {0: (other, "0"), 1: (other, "0")}, ("0",), 2) is None


def test_runs_that_a_study_has_changed_are_made_again(performed, monkeypatch, tmp_path, capsys):
    """Speeds of other steps, and what follows from them, and nothing else; their metrics are replaced too."""
    monkeypatch.setattr(grids, "TIMED_STEPS", (5, 8))
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda run, *rest: whole(run, *rest) | dict(machine=dict(gpu="H100", cpus=2)))
    assert go("scaling", tmp_path)
    before, labels = loaded(tmp_path), [label for label, _ in performed]
    monkeypatch.setattr(grids, "TIMED_STEPS", (5, 10))
    performed.clear()
    monkeypatch.setattr(runner, "perform", lambda run, *rest: (found := whole(run, *rest)) | dict(
        machine=dict(gpu="H200", cpus=2), tokens_per_second=found["tokens_per_second"] * (2 if "dense" in run.group else 1)))
    assert go("scaling", tmp_path)
    again = [label for label, _ in performed]
    assert again == [label for label in labels if label.startswith("speed of")] + [label for label in labels if "equal time" in label]
    after = loaded(tmp_path)
    assert after["runs"].keys() == before["runs"].keys() and after["finished"]
    assert {run["changes"]["max_steps"] for label, run in after["runs"].items() if label in again and run["group"].startswith("speed")} == {10}
    assert "again, as the study has changed since" in capsys.readouterr().out


def test_speeds_of_two_kinds_of_gpu_are_not_mixed(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "perform", lambda run, *_: result(machine=dict(
        gpu="H200" if run.group in ("speed of top-3", "top-3, equal tokens") else "H100", cpus=2)))
    with pytest.raises(ConfigError, match="measured on H100, and this machine has H200.*--out"):
        go("routing", tmp_path)
    assert "speed of top-2, seed 1" in loaded(tmp_path)["runs"] and "speed of top-3, seed 1" not in loaded(tmp_path)["runs"]


def test_a_study_of_something_else_is_not_gone_on_with(performed, tmp_path):
    go("routing", tmp_path)
    with pytest.raises(ConfigError, match="--tokens was.*--out"):
        runner.study("routing", BASE, ["--preset", "tiny"], 2 * TOKENS, [1], tmp_path, CORPUS)
    with pytest.raises(ConfigError, match="study: the text"):
        runner.study("routing", BASE, ["--preset", "tiny"], TOKENS, [1], tmp_path, CORPUS | dict(data_hash="e"))


def test_no_run_passes_over_its_corpus_too_often(performed, tmp_path):
    with pytest.raises(ConfigError, match="top-1, equal FLOPs, seed 1' would pass.*more than 4: give fewer --tokens"):
        runner.study("routing", BASE, [], 100 * TOKENS, [1], tmp_path, CORPUS | dict(train_tokens=25 * TOKENS))
    assert not performed


def test_another_study_is_refused_before_its_text_is_read(performed, monkeypatch, tmp_path, capsys):
    go("routing", tmp_path)
    monkeypatch.setattr(data, "prepare", lambda config: pytest.fail("minutes of tokenizing"))
    assert runner.exit_code(runner.run_study, ["routing", "--preset", "tiny", "--out", str(tmp_path), "--grad_clip", "2"]) == 2
    assert "--grad_clip was not given and is 2" in (words := capsys.readouterr().err) and "another --out to begin anew" in words and "text" not in words


def test_a_study_of_your_own_needs_a_function_and_its_name(performed, monkeypatch, tmp_path, capsys):
    def experts(base, tokens, seeds, found):
        """Are more experts better? Four of them against eight."""
        return [run for n in (4, 8) for run in grids.runs(base, f"{n} experts", tokens, seeds, num_experts=n)] + grids.speeds(base, "4 experts", tokens, num_experts=4)
    monkeypatch.setitem(STUDIES, "experts", experts)
    assert go("experts", tmp_path) and (tmp_path / "figure.png").stat().st_size > 10_000
    said, text = capsys.readouterr().out, report.block("experts", tmp_path)
    assert said.count(" tokens/s, 4 s") == 2 and said.count(": validation loss 3.") == 4
    assert text.startswith("### Are more experts better?\n\n![Are more experts better?]") and "ends lowest, undecided against each of the others." in text
    rates = [run["tokens_per_second"] for run in loaded(tmp_path)["runs"].values() if run["group"] == "speed of 4 experts"]
    head, line, four, eight = [row for row in text.splitlines() if row.startswith("| ")]
    assert four.startswith("| 4 experts | 3.") and four.endswith(f" | {count(TOKENS)} | {sum(rates) / 2:,.0f} ± {(rates[1] - rates[0]) / 2:,.0f} |")
    assert eight.startswith("| 8 experts | 3.") and eight.endswith(f" | {count(TOKENS)} | – |") and (four + eight).count("undecided") == 1
    assert go("experts", tmp_path / "one", seeds=(1,)) and "too few seeds" in report.block("experts", tmp_path / "one")
    monkeypatch.setitem(STUDIES, "alone", lambda *arguments: experts(*arguments)[:2])
    assert go("alone", tmp_path / "alone") and report.block("alone", tmp_path / "alone").startswith("### alone\n")


def test_a_study_knows_what_it_sets_for_its_runs(monkeypatch, tmp_path):
    corpus = types.SimpleNamespace(data_hash="d", tokenizer_hash="t", train=range(10 ** 7), validation=range(1000), unigram_entropy=7.0)
    monkeypatch.setattr(data, "prepare", lambda config: corpus)
    seen = []
    monkeypatch.setattr(runner, "study", lambda name, base, options, *rest: seen.append((base, dict(zip(options[::2], options[1::2])))) or True)
    for more in ([], ["--eval_every", "7"]):
        assert runner.exit_code(runner.run_study, ["routing", "--preset", "tiny", "--tokens", "1e6", "--out", str(tmp_path / "out"), *more]) == 0
    (base, options), (other, given) = seen
    assert base.eval_every == int(options["--eval_every"]) == round(1e6 / base.tokens_per_step / runner.VALIDATIONS) and base.sample_tokens == 0
    assert other.eval_every == int(given["--eval_every"]) == 7 and given["--save_every"] == "0"


def test_one_process_at_a_time(tmp_path):
    with runner.locked(tmp_path, "--out"):
        assert runner.exit_code(runner.run_study, ["balance", *OPTIONS, "--out", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_the_optimizers_rates_go_on_until_the_best_is_inside():
    """With best rates 0.08 and 0.002 for Muon, and 0.001 for AdamW, or 0.002 and better with a warm-up of 20%, and no better with 40%."""
    found = {}
    while missing := [run for run in STUDIES["optimizer"](BASE, 100 * TOKENS, [1, 2, 3], found) if run.label not in found]:
        assert len({run.label for run in missing}) == len(missing)
        for run in missing:
            c = run.changes
            best = dict(muon_lr=0.08, adamw_lr=0.002 if c["optimizer"] == "muon" or "warmup_fraction" in c else 0.001)
            found[run.label] = result(5 - 0.1 * ("warmup_fraction" in c) + sum(abs(math.log2(c[field] / rate)) for field, rate in best.items() if field in c))
    rates = [name.removesuffix(", seed 1") for name in found if "seed 1" in name and "_lr" in name]
    assert sorted(name for name in rates if name.startswith("adamw")) == sorted(
        [f"adamw, adamw_lr {rate:g}" for rate in (0.00025, 0.0005, 0.001, 0.002, 0.004)]
        + [f"adamw, adamw_lr {rate:g}, warmup_fraction 0.2" for rate in (0.001, 0.002, 0.004)]
        + [f"adamw, adamw_lr {rate:g}, warmup_fraction 0.4" for rate in (0.0005, 0.001, 0.002, 0.004, 0.008)])
    assert sorted(name for name in rates if name.startswith("muon")) == sorted(
        [f"muon, muon_lr {rate:g}, adamw_lr 0.002" for rate in (0.01, 0.02, 0.04, 0.08, 0.16)]
        + [f"muon, muon_lr 0.08, adamw_lr {rate:g}" for rate in (0.001, 0.004)])
    ends = "adamw, adamw_lr 0.002, warmup_fraction 0.2", "muon, muon_lr 0.08, adamw_lr 0.002"
    assert sorted(name for name in found if "seed 1" not in name and "of the tokens" not in name) == sorted(
        [f"{of}{best}, seed {seed}" for best in ends for of in ("", grids.QUARTER) for seed in (2, 3)]
        + [f"speed of {name}, seed {seed}" for name in ("muon", "adamw") for seed in (2,)])
    shorter = [run for run in STUDIES["optimizer"](BASE, 100 * TOKENS, [1], found) if "of the tokens" in run.group]
    assert sorted(run.changes["max_steps"] for run in shorter) == [250, 500]
    assert all((run.changes["muon_lr"], run.changes["adamw_lr"]) == (0.08, 0.002) for run in shorter)


def test_both_optimizers_are_tried_in_more_and_smaller_steps():
    """AdamW, best after a warm-up of 40%, with that and with one of 20%; each is best at half the rates and with the shorter warm-up."""
    found, base = {}, dataclasses.replace(BASE, batch_size=8, gradient_accumulation_steps=2)
    tokens = 20 * base.tokens_per_step
    while missing := [run for run in STUDIES["optimizer"](base, tokens, [1, 2], found) if run.label not in found]:
        for run in missing:
            c, smaller = run.changes, "batch_size" in run.changes
            rate, warmup = 0.001 if smaller else 0.002, 0.2 if smaller else 0.4
            loss = (4 - smaller + abs(math.log2(c.get("adamw_lr", rate) / rate)) + abs(math.log2(c.get("muon_lr", 10 * rate) / rate / 10)) + 0.01 * c["seed"]
                    + (c["optimizer"] == "adamw") * (1 + abs(c.get("warmup_fraction", 0) - warmup)))
            found[run.label] = result(loss, group=run.group, changes=c, passes=0.1, tokens=c["max_steps"] * dataclasses.replace(base, **c).tokens_per_step)
    smaller = {name: run["changes"] for name, run in found.items() if name.startswith(grids.QUARTER)}
    assert all((c["batch_size"], c["gradient_accumulation_steps"], c["max_steps"]) == (4, 1, 80) for c in smaller.values())
    assert [(c["adamw_lr"], c["muon_lr"]) for c in smaller.values() if c["optimizer"] == "muon"] == [
        (0.0005, 0.005), (0.001, 0.01), (0.002, 0.02), (0.004, 0.04), (0.001, 0.01)]
    assert sorted((c["warmup_fraction"], c["adamw_lr"]) for c in smaller.values() if c["optimizer"] == "adamw" and c["seed"] == 1) == [
        (warmup, rate) for warmup in (0.2, 0.4) for rate in (0.0005, 0.001, 0.002, 0.004)]
    results = dict(study="optimizer", tokens=tokens, options=["--preset", "tiny"], runs=found)
    text = report.optimizer(results)
    assert "it is 1.000 nats lower (decided); with a quarter of the batch, and so 4 times the steps, 1.000 nats lower (decided)." in text
    assert "| with 4 times as many steps, of a quarter | 3.015 ± 0.005 (rates x 0.5) | 4.015 ± 0.005 (rates x 0.5; warm-up 20%) |" in text
    rates = [found[f"speed of adamw, seed {seed}"]["tokens_per_second"] for seed in (1, 2)]
    found["speed of adamw, seed 2"]["tokens_per_second"] = 3 * rates[0]
    row = next(row for row in report.optimizer(results).splitlines() if row.startswith("| seconds of training at that speed"))
    assert row.endswith(f" | {tokens / (2 * rates[0]):.0f} |"), "the mean of both times that it was measured"
    assert grids.quarter(base) == dict(batch_size=4, gradient_accumulation_steps=1, eval_steps=2 * base.eval_steps, eval_every=4 * base.eval_every)
    assert grids.quarter(dataclasses.replace(base, batch_size=3)) == {}
    assert grids.quarter(dataclasses.replace(base, batch_size=3, gradient_accumulation_steps=8)).items() >= dict(
        batch_size=3, gradient_accumulation_steps=2, eval_steps=base.eval_steps).items()
    held_out = np.arange(100_000, dtype=np.uint16)
    windows = [np.concatenate([inputs for inputs, _ in data.validation_batches(held_out, dataclasses.replace(base, **c))]) for c in ({}, grids.quarter(base))]
    assert np.array_equal(*windows), "what is compared is validated on the same text"
    wide = {name: run | dict(val_loss=run["val_loss"] - 9 * (name.startswith(grids.QUARTER) and run["changes"].get("adamw_lr") == 0.004)) for name, run in found.items()}
    assert "(rates x 2, the highest tried)" in report.optimizer(results | dict(runs=wide))
    one = {name: run for name, run in found.items() if not name.startswith(f"{grids.QUARTER}adamw")}
    few = {name: run for name, run in found.items() if not (name.startswith(f"{grids.QUARTER}muon") and run["changes"]["adamw_lr"] == 0.0005)}
    assert all("4 times" not in report.optimizer(results | dict(runs=runs)) for runs in (one, few)), "not before all have been tried"
    other = {name: run for name, run in found.items() if not (name.startswith("muon, muon_lr") and "adamw_lr 0.002" in name)}
    assert "Muon 0.02 (swept beside another rate)" in report.optimizer(results | dict(runs=other))
    higher = {name: run for name, run in found.items() if not name.startswith(("adamw, adamw_lr 0.001, warmup_fraction 0.4", "adamw, adamw_lr 0.0005, warmup"))}
    assert "| 0.002 (the sweep's end) |" in report.optimizer(results | dict(runs=higher)), "lower rates of smaller steps are not of the sweep"
    figure = Figure()
    figures._optimizer(figure, results)
    ends = {line.get_color(): list(np.round(line.get_ydata(), 3)) for line in figure.axes[1].lines
            if line.get_marker() == "x" and len(line.get_ydata())}
    assert ends == {figures.BLUE: [3.01, 3.02], figures.ORANGE: [4.01, 4.02]}


def test_scaling_of_a_base_with_dense_blocks_or_few_heads():
    deep, small = dataclasses.replace(BASE, moe_every=2, n_layers=8), dataclasses.replace(BASE, n_layers=2, n_heads=2, n_kv_heads=0)
    for base, sizes in ((deep, 4), (small, 2)):
        wanted = STUDIES["scaling"](base, TOKENS, [1], {})
        active = {run.label: dataclasses.replace(base, **run.changes).active_params for run in wanted if not run.alone}
        assert len({run.label for run in wanted}) == len(wanted) and len(active) == 2 * sizes
        for label, number in active.items():
            if label.startswith("moe"):
                assert number == pytest.approx(active[label.replace("moe", "dense")], rel=0.05)


def test_a_run_that_is_wanted_later_is_no_longer_than_the_corpus_allows(performed, monkeypatch, tmp_path):
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda run, *rest: (found := whole(run, *rest)) | dict(
        tokens_per_second=found["tokens_per_second"] * (10 if "dense" in run.group else 1)))
    monkeypatch.setitem(CORPUS, "train_tokens", TOKENS // 2)
    assert go("scaling", tmp_path)
    assert {run["changes"]["max_steps"] for run in loaded(tmp_path)["runs"].values() if run["group"].startswith("speed")} == {10}
    assert {run["tokens"] for run in loaded(tmp_path)["runs"].values() if run["group"].endswith("equal time")} == {2 * TOKENS}
    with pytest.raises(ConfigError, match="would pass over the corpus"):
        runner.study("balance", BASE, ["--preset", "tiny"], 3 * TOKENS, [1], tmp_path / "other", CORPUS)


def test_equal_flops_are_equal():
    flops = {}
    for run in STUDIES["routing"](BASE, 1000 * BASE.tokens_per_step, [1], {}):
        config = dataclasses.replace(BASE, **run.changes)
        flops[run.group] = config.flops_per_token * config.tokens_per_step * config.max_steps
    equal = [flops[group] for group in flops if "FLOPs" in group]
    assert len(equal) == 3 and all(f == pytest.approx(flops["top-2, equal tokens"], rel=2e-3) for f in equal)


def test_dense_models_have_the_active_parameters_of_the_moe():
    base = Config(d_model=768, n_layers=12, n_heads=12, d_ff=1280, moe_every=1, max_seq_len=1024, vocab_size=32768)
    sizes = {}
    for run in STUDIES["scaling"](base, 1e6, [1], {}):
        if not run.alone:
            kind, _, size = run.group.partition(", ")
            sizes.setdefault(size, {})[kind] = dataclasses.replace(base, **run.changes)
    assert list(sizes) == ["4 x 256", "6 x 384", "9 x 576", "12 x 768"]
    for pair in sizes.values():
        router = pair["moe"].parameter_groups["router"]
        assert pair["moe"].active_params - router == pair["dense"].active_params == pair["dense"].total_params
        assert all(c.d_ff % 64 == 0 for c in pair.values())


LARGER = [6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


@pytest.mark.parametrize("gb, expected", [
    (1000, dict(none=[2, 4, *LARGER], selective=[2, *LARGER[1:]], full=[2, 256])),
    (0.001, dict(none=[2, 4], selective=[2, 4, 6, 8, 12], full=[2, 4, *LARGER]))])
def test_micro_batches_are_searched_to_the_end_of_memory(performed, tmp_path, monkeypatch, gb, expected):
    """Whether the prediction is too high or too low."""
    monkeypatch.setattr(grids, "usable_gb", lambda cpu: gb)
    assert go("checkpointing", tmp_path)
    runs = [run for run in loaded(tmp_path)["runs"].values() if run["changes"]["n_layers"] == BASE.n_layers]

    def tried(mode, seed, failed):
        return {run["changes"]["batch_size"] for run in runs if (run["changes"]["activation_checkpointing"], run["changes"]["seed"]) == (mode, seed)
                and ("failed" in run) <= failed}
    assert {mode: sorted(tried(mode, 1, failed=True)) for mode in expected} == expected
    assert all(tried(mode, 2, failed=True) == tried(mode, 1, failed=False) for mode in expected), "what fits, and only that, runs with the second seed"
    assert [label[-1] for label, _ in performed] == sorted(label[-1] for label, _ in performed), "all once, then again"
    text = report.block("checkpointing", tmp_path)
    assert "| 8, not 12 |" in text and "| at least 256 |" in text


def test_modes_are_compared_at_the_largest_micro_batch_that_all_fit(performed, tmp_path, monkeypatch):
    whole = runner.perform
    monkeypatch.setattr(grids, "usable_gb", lambda cpu: 1000)      # so that all are predicted to fit the largest
    monkeypatch.setattr(runner, "perform", lambda run, *rest: dict(failed="out of memory") if run.changes["batch_size"] > dict(
        none=8, selective=16, full=256)[run.changes["activation_checkpointing"]] else whole(dataclasses.replace(run, may_not_fit=False), *rest))
    assert go("checkpointing", tmp_path)
    rows = [row.split(" | ") for row in report.block("checkpointing", tmp_path).splitlines() if row.startswith(f"| {BASE.n_layers} |")]
    ends = ("none", "8, not 12"), ("selective", "16, not 24"), ("full", "at least 256")
    assert [(row[1], row[2], row[-1].removesuffix(" |")) for row in rows] == [(mode, batch, end) for batch in "28" for mode, end in ends]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_micro_batch_that_does_not_fit_the_second_time_does_not_fit(performed, tmp_path, monkeypatch, mode):
    whole = runner.perform
    monkeypatch.setattr(grids, "usable_gb", lambda cpu: 1000)

    def perform(run, *rest):
        c = run.changes
        most = dict(none=8, selective=8, full=256)[c["activation_checkpointing"]] - (c["activation_checkpointing"] == mode and c["seed"] == 2)
        return dict(failed="out of memory") if c["batch_size"] > most else whole(dataclasses.replace(run, may_not_fit=False), *rest)
    monkeypatch.setattr(runner, "perform", perform)
    assert go("checkpointing", tmp_path)
    rows = [row.split(" | ") for row in report.block("checkpointing", tmp_path).splitlines() if row.startswith(f"| {BASE.n_layers} | {mode} |")]
    assert [(row[2], row[-1]) for row in rows] == [("2", "6, not 8 |"), ("6", "6, not 8 |")], "6 was tried, and is where the three are compared"


def test_a_speed_that_failed_once_is_no_answer(performed, tmp_path, monkeypatch):
    whole = runner.perform
    for name, label in (("scaling", "speed of moe, 2 x 16, seed 2"), ("routing", "speed of top-3, seed 2"), ("checkpointing", "speed of full, 4 layers, micro-batch 2, seed 2")):
        monkeypatch.setattr(runner, "perform", lambda run, *rest: dict(failed="diverged") if run.label == label else whole(run, *rest))
        with pytest.raises(ExperimentError, match="diverged"):
            go(name, tmp_path / name)


def test_what_checkpointing_costs_is_read_from_each_run(tmp_path):
    """Speeds 100, 80 and 50, activations of 10, 6 and 1 GB at a micro-batch of 4, half as fast in the second round, but for the 80; at 8
    one does not fit, and another only the first time."""
    runs = {}
    for mode, speed, gb in (("none", 100.0, 10), ("selective", 80.0, 6), ("full", 50.0, 1)):
        changes = dict(n_layers=2, activation_checkpointing=mode, seed=1, max_steps=5)
        runs[f"{mode} 2"] = result(memory_gb=dict(activations=1)) | dict(group=f"speed of {mode} 2", changes=changes | dict(batch_size=2))
        for seed, rate in ((1, speed), (2, speed / 2 if mode != "selective" else 44.0)):
            runs[f"{mode} 4, {seed}"] = result(tokens_per_second=rate, memory_gb=dict(activations=gb), peak_gb=gb + seed) | dict(
                group=f"speed of {mode} 4", changes=changes | dict(batch_size=4, seed=seed))
            failed = seed >= dict(none=1, selective=2).get(mode, 3)
            runs[f"{mode} 8, {seed}"] = (dict(failed="out of memory") if failed else result()) | dict(
                group=f"speed of {mode} 8", changes=changes | dict(batch_size=8, seed=seed))
    runs["none 8, 2"] |= result(memory_gb=dict(activations=1))
    del runs["none 8, 2"]["failed"]
    for mode in ("none", "selective"):
        runs[f"{mode} 40"] = dict(failed="out of memory", group=f"speed of {mode} 40", changes=dict(n_layers=6, activation_checkpointing=mode, seed=1, batch_size=40))
    text = report.checkpointing(dict(runs=runs))
    assert "`selective` saves 40% of the activations' memory for 19% more time a token, `full` 90% for 100% (the brief" in text
    assert [row for row in text.splitlines() if row.startswith("| 2 |") and " | 4 | " in row] == [
        "| 2 | none | 4 | 11.5 | 0% | 75 ± 25 |  | 4, not 8 |", "| 2 | selective | 4 | 7.5 | 40% | 62 ± 18 | +19% ± 6% | 4, not 8 |",
        "| 2 | full | 4 | 2.5 | 90% | 38 ± 12 | +100% ± 0% | at least 8 |"]
    assert "| 6 | none | – | – | – | – | – | 0, not 40 |" in text, "a depth at which nothing fits"


def test_a_speed_is_measured_over_enough_steps_and_not_too_many():
    def steps(tokens=1e9, **changes):
        run, again = grids.speeds(dataclasses.replace(BASE, max_seq_len=64), "x", tokens, **changes)
        assert run.alone and run.changes["eval_every"] == run.changes["max_steps"]
        assert again == dataclasses.replace(run, changes=run.changes | dict(seed=2)) and run.changes["seed"] == 1
        return run.changes["max_steps"]
    assert steps(batch_size=1) == 64 and steps(batch_size=1024) == round(4e6 / 1024 / 64 / 2) and steps(batch_size=2 ** 15) == 5
    assert steps(1e6, batch_size=1024) == round(1e6 / 1024 / 64 / 2), "no more than a run's tokens"


def test_micro_batches_are_no_longer_than_a_run(performed, tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "usable_gb", lambda cpu: 1000)
    assert go("checkpointing", tmp_path, tokens=5 * 16 * BASE.max_seq_len)
    assert max(run["changes"]["batch_size"] for run in loaded(tmp_path)["runs"].values()) == 16


# ---------------------------------------------------------------- how sure

def test_the_error_of_a_ratio_of_speeds_is_by_how_far_its_rounds_differ():
    """A host that is half as fast in one round changes no ratio; 6 configurations of two rounds with a deviation of 5% know it to about 4%."""
    a, b = ([result(tokens_per_second=rate * host, changes=dict(seed=seed)) for seed, host in ((1, 1.0), (2, 0.5))] for rate in (30.0, 20.0))
    assert [pair["ratio"] for pair in figures.speed_ratios(a, b)] == [1.5, 1.5] and figures.speed_ratios(a[1:], b[:1]) == []
    assert figures.ratio_error([figures.speed_ratios(a, b)]) == 0 and figures.ratio_error([[dict(ratio=2.0)], [dict(ratio=1.0)]]) == math.inf
    random, errors, within = np.random.default_rng(0), [], 0
    for _ in range(400):
        pairs = [[dict(ratio=ratio) for ratio in np.exp(random.normal(0, 0.05, 2))] for _ in range(6)]
        errors.append(figures.ratio_error(pairs))
        within += abs(np.log([pair["ratio"] for pair in pairs[0]]).mean()) < errors[-1]
    assert 0.92 < within / 400 < 0.98


def test_a_difference_inside_the_spread_is_undecided():
    a, b = [result(5.0), result(5.2)], [result(5.1), result(5.15)]
    assert report.undecided(a, b, 0) and report.undecided([result(4.0)], b, 0) and not report.undecided([result(4.0), result(4.1)], b, 0)
    assert report.undecided([result(5.0), result(5.0)], [result(5.05), result(5.05)], 0.08), "two seeds can be close by chance"
    assert mean_and_spread(a) == (pytest.approx(5.1), pytest.approx(0.2))
    assert report.value(a) == "5.100 ± 0.100" and report.against(a, b, 0) == "-0.025, undecided"
    assert report.against([result(4.0), result(4.1)], b, 0) == "-1.075"


def test_differences_by_chance_are_undecided_in_19_of_20_studies():
    """Ten configurations that do not differ: some pair of them is told apart in no more than about 5% of studies."""
    random = np.random.default_rng(0)
    apart = 0
    for _ in range(300):
        found = {str(i): [result(loss) for loss in random.normal(3, 0.01, 2)] for i in range(10)}
        honest = report.honest_difference(found)
        lowest, *_, highest = sorted(found.values(), key=lambda runs: mean_and_spread(runs)[0])
        apart += not report.undecided(lowest, highest, honest)
    assert 4 <= apart <= 27
    assert report.honest_difference(dict(a=[result(3.0)], b=[result(3.0), result(3.1)])) == math.inf


def test_scaling_law_finds_floor_exponent_and_their_uncertainty():
    x = [1e6, 1e6, 1e7, 1e7, 1e8, 1e8]
    exact = scaling_law(x, [2 + 3 * (v / 1e7) ** -0.4 for v in x])
    assert (exact.floor, exact.rise, exact.exponent) == (pytest.approx(2), pytest.approx(3), pytest.approx(0.4)) and max(exact.errors) < 1e-6
    assert exact.at(1e5) == pytest.approx(2 + 3 * 100 ** 0.4) and exact.inverse(exact.at(1e5)) == pytest.approx(1e5) and exact.inverse(1.99) == math.inf
    assert scaling_law(x[:4], [4.0, 4.1, 3.0, 3.1]) is None, "three unknowns need three sizes"


@pytest.mark.parametrize("y", [[3.0, 3.0, 3.0, 3.0], [5.0, 4.0, 3.0, 2.0], [5.0, 4.9, 4.0, 2.0], [3.0, 3.1, 2.9, 3.05]])
def test_a_scaling_law_that_nothing_determines_is_none(y):
    """Constant, straight in the logarithm, ever steeper, and noise alone."""
    assert scaling_law([1e6, 1e6, 1e7, 1e7, 1e8, 1e8, 1e9, 1e9], [value + noise for value in y for noise in (-0.01, 0.01)]) is None


def test_the_error_of_a_scaling_law_is_that_of_its_fits():
    """At a place between its points, against the spread of fits to the same points with other noise."""
    random, x = np.random.default_rng(0), np.repeat([1e6, 4e6, 2e7, 1e8], 2)
    laws = [scaling_law(list(x), list(2 + (x / 1e7) ** -0.5 + random.normal(0, 0.02, len(x)))) for _ in range(200)]
    assert np.mean([law.error_at(8e6) for law in laws]) == pytest.approx(np.std([law.at(8e6) for law in laws]), rel=0.15)
    assert laws[0].error_at(1e10) > 2 * laws[0].error_at(8e6), "farther out it is less known"


def test_a_scaling_law_needs_a_positive_floor_and_a_fit_that_ends(monkeypatch):
    x = [1e6, 1e6, 1e7, 1e7, 1e8, 1e8, 1e9, 1e9]
    assert scaling_law(x, [-5 + 8 * (v / 3e7) ** -0.02 for v in x]) is None
    assert scaling_law(x, [1 + 8 * (v / 3e7) ** -0.02 for v in x]).inverse(1.000001) == math.inf, "a number too large to write"
    monkeypatch.setattr(figures, "curve_fit", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no convergence")))
    assert scaling_law(x, [2 + (v / 1e7) ** -0.5 for v in x]) is None


def test_intervals_of_a_scaling_law_hold_the_truth():
    """In about 95% of experiments, with as few points as a study has."""
    random, x, held = np.random.default_rng(0), np.repeat([1e6, 4e6, 2e7, 1e8], 2), 0
    truth = 2 + (x / 1e7) ** -0.5
    for _ in range(200):
        law = scaling_law(list(x), list(truth + random.normal(0, 0.02, len(x))))
        low, high = law.inverse_between(3 + random.normal(0, 0.01), 0.01)
        held += low <= 1e7 <= high
    assert 0.92 <= held / 200 <= 0.98


def test_what_an_moe_is_worth_in_dense_flops(performed, tmp_path, monkeypatch):
    """A dense model whose loss follows a law, and MoEs that end as if they had twice the FLOPs, at the same speed and at half."""
    whole = runner.perform

    def perform(run, *rest):
        found, moe = whole(run, *rest), run.changes.get("num_experts") == 8
        flops, tokens = found["flops"] / found["tokens"], found["tokens"] / TOKENS
        loss = 2 + (flops * (1 + moe) / 1e5) ** -0.5 + 0.001 * run.changes["seed"] - 2 * math.log(tokens) * (not run.alone)
        return found | dict(val_loss=loss, tokens_per_second=(100 - 50 * moe) * (1 + 0.01 * moe * (run.changes["seed"] - 1)))
    monkeypatch.setattr(runner, "perform", perform)
    assert go("scaling", tmp_path)
    text = report.block("scaling", tmp_path)
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| ") and " x " in row.split(" | ")[0]][1:]
    assert len(rows) > 2 and rows[0][6].startswith("2.0") and rows[-1][6] == "beyond those tried"
    assert all(row[-1] == "0.50 ± 0.00 |" and row[5].startswith("-") and row[7].startswith("+") and "undecided" not in row[7] for row in rows)
    assert f"lower at {len(rows)} with equal tokens, FLOPs and parameters used, and higher at {len(rows)} with equal time" in text
    monkeypatch.setattr(report, "ratio_error", lambda pairs: {8: 0.5}[sum(map(len, pairs))])
    assert f"undecided at {len(rows)} with equal time" in report.block("scaling", tmp_path), "speeds that are not known decide nothing"


def test_equal_loss_flops_are_told_within_those_tried():
    """A law that falls from 3 at 1e7, and models of 1e7 that end where the law does with 2 times, half, or far from what was tried."""
    law = scaling_law([1e6, 1e6, 1e7, 1e7, 1e8, 1e8], [2 + (v / 1e7) ** -0.5 for v in [1e6, 1e6, 1e7, 1e7, 1e8, 1e8]])
    def told(flops, deviation=0.0):
        return report.equal_loss_flops(law, [result(float(law.at(flops)), flops=1e7, tokens=1)] * 2, deviation, [5e6, 1e7, 3e7])
    assert told(2e7) == "2.00 (2.00 to 2.00)" and told(6e6) == "0.60 (0.60 to 0.60)"
    assert told(1e8) == told(1e6) == "beyond those tried"
    assert told(2.8e7, 0.05).endswith("to > 3.00)") and "(< 0.50 to" in told(5.5e6, 0.2), told(5.5e6, 0.2)


def test_what_time_is_worth_is_the_most_that_was_seen():
    run = result(3.0, tokens=100, validation=[[0, 7.0], [50, 4.0], [100, 3.0]])
    assert report.worth_of_time([run], []) == pytest.approx(1 / math.log(2))
    longer = [result(1.0, tokens=200)]
    assert report.worth_of_time([run], [([run], longer)]) == pytest.approx(2 / math.log(2)) and report.worth_of_time([run], [([run], [run])]) < 2
    worse = result(3.0, tokens=100, validation=[[0, 2.0], [100, 3.0]])
    assert report.worth_of_time([worse], [([run], [result(4.0, tokens=200)])]) == 0, "never less than nothing"


def test_lengths_that_change_more_than_seeds_are_told():
    def sizes(longer):
        return {"4 x 256": ([], [result(3.03, tokens=100), result(3.04, tokens=100)], longer)}
    assert report._lengths(sizes([result(2.9, tokens=104), result(2.91, tokens=104)])) == (
        " The dense model ends -0.130 nats with +4% tokens at 4 x 256, much farther away than its seeds differ: such runs vary with their length too.")
    assert not report._lengths(sizes(None)) and not report._lengths(sizes([result(3.02, tokens=104), result(3.03, tokens=104)]))
    assert not report._lengths(sizes([result(2.9, tokens=140)])), "that is what more tokens do"


def test_differences_are_drawn_between_runs_of_one_seed(performed, tmp_path):
    assert go("scaling", tmp_path)
    results = loaded(tmp_path)
    runs = results["runs"]
    for run in runs.values():
        equal_time = run["group"].endswith("equal time")
        run["val_loss"] = 3 + 0.1 * run["changes"]["seed"] * (1 if "moe" in run["group"] else 2 if equal_time else 3)
    del runs["dense, 2 x 16, seed 1"]
    figure = Figure()
    figures._scaling(figure, results)
    tokens, time = ([list(map(float, np.round(line.get_ydata(), 9))) for line in figure.axes[2].lines if line.get_label() == f"equal {name}"][0]
                    for name in ("tokens and FLOPs", "time"))
    assert tokens == [-0.2, -0.4, -0.4, -0.2, -0.4, -0.2, -0.4] and time == [-0.1, -0.2] * 4
    assert [len(axes.lines) for axes in figure.axes[:2]] != [0, 0]
    found = figures.groups(results)
    least = figures.limit(found["moe, 1 x 8"], found["moe, 1 x 8"], figures.honest_difference(found))
    shade, = figure.axes[2].patches
    assert (shade.get_y(), shade.get_height()) == (pytest.approx(-least), pytest.approx(2 * least)), "what is undecided"


def test_tokens_to_equal_loss_are_read_between_runs():
    points = [(100, 6.0), (200, 5.0), (400, 4.0)]
    assert report.tokens_to(points, 4.5) == (pytest.approx(400 / 2 ** 0.5), "")
    assert report.tokens_to(points, 6.5) == (100, "at most ") and report.tokens_to(points, 3.9) is None
    assert report.tokens_to(points, 5.0)[0] == pytest.approx(200)


# ---------------------------------------------------------------- the report

def test_the_readme_says_what_the_results_say():
    readme = (ROOT / "README.md").read_text()
    assert report.filled(readme) == readme, "run python -m studies.report"
    assert all(f"<!-- study {name} -->" in readme for name in STUDIES)


def test_a_study_without_results_is_said_not_to_be_run(tmp_path):
    text = report.filled("before\n<!-- study balance -->\nold\n<!-- end -->\nafter", tmp_path)
    assert "Not run yet: `python -m studies.run balance`" in text and "old" not in text and text.startswith("before\n") and text.endswith("\nafter")


def test_tokens_are_shown_as_code():
    assert [report.code(token) for token in (" a", "\n", "a|b", "`", '"')] == ["`␣a`", "`\\n`", "`a\\|b`", "`` ` ``", '`"`']


# ---------------------------------------------------------------- runs in earnest

OPTIONS = ["--preset", "tiny", "--d_model", "32", "--n_heads", "2", "--n_layers", "2", "--d_ff", "32", "--max_seq_len", "32", "--vocab_size", "300",
           "--batch_size", "2", "--gradient_accumulation_steps", "2", "--device", "cpu", "--eval_steps", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of Python, C and prose, and where its tokens are cached."""
    folder, cache = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache")
    for i in range(60):
        (folder / "package").mkdir(exist_ok=True)
        (folder / "package" / f"m{i}.py").write_text(f'"""Module {i}."""\nimport os\n\ndef f{i}(x):\n    # adds {i * 7919}\n    return x + "é{i}"\n' * 4)
        (folder / f"p{i}.md").write_text(f"Page {i * 31} says that tea is good, and number {i} is better.\n" * 8)
    return ["--data", str(folder), "--cache_dir", str(cache), "--validation_fraction", "0.2"]


def train(run, text, folder, stop=None):
    options = [*OPTIONS, *text, "--sample_tokens", "0", "--save_every", "0", "--save_minutes", "5"]
    return runner.perform(run, options, folder, runner._environment("cpu", 1), stop or threading.Event())


def test_a_run_that_fails_says_why(tmp_path, text):
    with pytest.raises(ExperimentError, match="the run 'b, seed 1' failed(.|\n)*d_ff"):
        train(Run("b", dict(seed=1, d_ff=33)), text, tmp_path / "b")


def test_a_run_that_is_told_to_stop_saves(tmp_path, text):
    stop, run, folder = threading.Event(), Run("a", dict(seed=1, max_steps=40_000, log_every=5)), tmp_path / "run"
    def when_it_trains():
        while not (folder / "metrics.jsonl").exists() or "train_loss" not in (folder / "metrics.jsonl").read_text():
            time.sleep(0.05)
        stop.set()
    threading.Thread(target=when_it_trains, daemon=True).start()
    assert train(run, text, folder, stop) is None
    rows = len((folder / "metrics.jsonl").read_text().splitlines())
    assert (folder / "checkpoint_latest.pt").exists() and rows > 1
    assert json.loads((folder / "training_results.json").read_text())["totals"]["steps"] >= 5


def test_a_run_saves_and_ends_when_its_study_is_killed(tmp_path, text):
    folder = tmp_path / "run"
    script = (f"import threading; from studies import run; from studies.grids import Run; run.perform(Run('a', dict(seed=1, max_steps=40_000, "
              f"log_every=5)), {[*OPTIONS, *text, '--save_every', '0']!r}, run.Path({str(folder)!r}), run._environment('cpu', 1), threading.Event())")
    study = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not (folder / "metrics.jsonl").exists() or "train_loss" not in (folder / "metrics.jsonl").read_text():
        assert study.poll() is None
        time.sleep(0.05)
    study.kill()
    study.wait()
    for _ in range(300):
        with contextlib.suppress(ConfigError), runner.locked(folder, "--save_dir"):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the run goes on without its study")
    assert (folder / "checkpoint_latest.pt").exists()


def test_the_whole_command_with_the_analysis_of_experts(tmp_path, text, capsys):
    command = ["specialization", *OPTIONS, *text, "--out", str(tmp_path / "study"), "--tokens", "1280", "--eval_every", "5", "--seeds", "1", "--jobs",
               "2"]
    assert runner.exit_code(runner.run_study, command) == 0
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == ["figure.png", "metrics.jsonl.gz", "results.json", "runs"]
    assert not list((tmp_path / "study" / "runs").iterdir())
    rows = [json.loads(row) for row in gzip.open(tmp_path / "study" / "metrics.jsonl.gz", "rt")]
    assert {row["run"] for row in rows} == {"top-2 of 8, seed 1"} and any("train_loss" in row for row in rows)
    for run in loaded(tmp_path / "study")["runs"].values():
        assert run["tokens"] == 1280 and run["flops"] > 0 and run["peak_gb"] > 0 and run["passes"] < 1 and len(run["validation"]) > 2
        assert 0 < run["load_entropy"] <= 1 and 1 / 8 <= run["worst_share"] <= 1
        found = run["experts"]
        assert [step["step"] for step in found["steps"]] == [0, 2, 4, 6, 8, 10]
        assert np.array(found["kind_table"]).shape == (2, 8, len(KINDS)) and np.array(found["domain_table"]).shape == (2, 8, 2)
        assert np.array(found["kind_table"]).sum() == 2 * 2 * (found["tokens"] - found["without_kind"])
        assert {found["kinds"][k] for k, n in enumerate(found["kind_tokens"]) if n} >= {"keyword", "comment", "docstring", "string", "prose"}
        assert sorted(found["domains"]) == [".md", "package"] and found["steps"][-1]["domain"]["bits"][0] > 0
    assert "Layer" in report.block("specialization", tmp_path / "study")
    assert runner.exit_code(runner.run_study, [*command, "--grad_clip", "2"]) == 2
    assert "is of another study: --grad_clip was not given and is 2" in capsys.readouterr().err
    assert runner.exit_code(report.main, [str(tmp_path / "study")]) == 0 and f"({tmp_path / 'study' / 'figure.png'})" in capsys.readouterr().out
    assert runner.exit_code(report.main, [str(tmp_path)]) == 2


@pytest.mark.parametrize("options, words", [(["balence"], "Did you mean balance"), (["balance", "--jobs", "0"], "--jobs 0: must be a positive number"),
                                            (["balance", "--tokens", "inf"], "--tokens inf: must be"),
                                            (["balance", "--save_dir", "x"], "the study's is --out"),
                                            (["balance", "--max_steps", "9"], "--max_steps: the study sets it, by --tokens"),
                                            (["balance", "--seed", "9"], "--seed: the study sets it")])
def test_wrong_options_are_said(capsys, options, words):
    assert runner.exit_code(runner.run_study, options) == 2
    assert words in capsys.readouterr().err
