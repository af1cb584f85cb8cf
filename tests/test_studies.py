"""Studies: what they run, that a study that was cut off goes on, and what is called undecided."""
import json
import math

import pytest

from config import ConfigError
from conftest import tiny_config
from studies import run as runner
from studies.figures import draw, power_law, undecided
from studies.grids import STUDIES

BASE = tiny_config(batch_size=2, gradient_accumulation_steps=2)
TOKENS = 10 * BASE.tokens_per_step


def result(loss=5.0, **changes):
    return dict(val_loss=loss, tokens=TOKENS, flops=1e9 * loss, train_seconds=loss, tokens_per_second=100.0, total_params=1000 * loss,
                active_params=500 * loss, load_entropy=0.9, worst_share=0.3, memory_gb=dict(total=1.0),
                validation=[[0, 6.0], [TOKENS, loss]]) | changes


@pytest.fixture
def performed(monkeypatch):
    """Runs are not trained but noted; the loss of a run is what `losses` gives for it."""
    seen = []

    def perform(run, base, folder, seconds_left):
        seen.append(run.label)
        return runner.PERFORMED, result(5 + 0.1 * math.sin(len(run.label) + run.changes["seed"]))
    monkeypatch.setattr(runner, "perform", perform)
    return seen


def go(name, folder, minutes=math.inf, seeds=(1, 2)):
    folder.mkdir(exist_ok=True)
    return runner.study(name, BASE, ["--preset", "tiny"], TOKENS, list(seeds), folder, minutes)


@pytest.mark.parametrize("name, number", [("optimizer", 10), ("routing", 14), ("balance", 20), ("scaling", 16)])
def test_a_study_performs_each_run_once_and_draws(performed, tmp_path, name, number):
    assert go(name, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(performed) == len(set(performed)) == len(results["runs"]) == number
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert go(name, tmp_path) and len(performed) == number, "nothing is performed again"
    for label, run in results["runs"].items():      # one seed and one change at a time make a valid configuration
        tiny_config(**dict(batch_size=2, gradient_accumulation_steps=2) | run["changes"])


def test_a_study_goes_on_where_it_was(performed, tmp_path, monkeypatch):
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: (runner.CUT_OFF, {}) if len(performed) == 3 else whole(*a))
    assert not go("routing", tmp_path) and len(performed) == 3 and not (tmp_path / "figure.png").exists()
    monkeypatch.setattr(runner, "perform", whole)
    assert go("routing", tmp_path) and len(performed) == len(set(performed)) == 14
    assert not go("balance", tmp_path / "late", minutes=-1)


def test_the_optimizers_best_rates_get_the_other_seeds():
    found = {}
    wanted = STUDIES["optimizer"](BASE, TOKENS, [1, 2, 3], found)
    assert len(wanted) == 8 and all(run.changes["seed"] == 1 for run in wanted)
    for run in wanted:
        found[run.label] = result(4.0 if run.changes.get("muon_lr") == 0.02 or run.changes.get("adamw_lr") == 0.001 else 5.0)
    more = [run for run in STUDIES["optimizer"](BASE, TOKENS, [1, 2, 3], found) if run.label not in found]
    assert sorted((run.group, run.changes["seed"]) for run in more) == [
        (group, seed) for group in ("adamw, adamw_lr 0.001", "muon, muon_lr 0.02") for seed in (2, 3)]


def test_equal_flops_are_equal():
    import dataclasses
    flops = {}
    for run in STUDIES["routing"](BASE, 1000 * BASE.tokens_per_step, [1], {}):
        config = dataclasses.replace(BASE, **run.changes)
        flops[run.group] = config.flops_per_token * config.tokens_per_step * config.max_steps
    equal = [flops[group] for group in flops if "FLOPs" in group]
    assert len(equal) == 3 and all(f == pytest.approx(flops["top-2, equal tokens"], rel=2e-3) for f in equal)


def test_micro_batches_grow_until_memory_is_out():
    found = {}
    while missing := [run for run in STUDIES["checkpointing"](BASE, 20 * TOKENS, [1], found) if run.label not in found]:
        config = missing[0].changes
        fits = config["batch_size"] <= (1 if config["activation_checkpointing"] == "none" else 2)
        found[missing[0].label] = dict(group=missing[0].group, changes=config, **(result() if fits else dict(failed="out of memory")))
    tried = {(run["changes"]["activation_checkpointing"], run["changes"]["batch_size"]) for run in found.values()}
    assert tried == {("none", 1), ("none", 2), *((mode, b) for mode in ("selective", "full") for b in (1, 2, 4))}


def test_another_number_of_tokens_is_not_mixed_in(performed, tmp_path):
    go("routing", tmp_path)
    with pytest.raises(ConfigError, match="another study.*--out"):
        runner.study("routing", BASE, ["--preset", "tiny"], 2 * TOKENS, [1], tmp_path, math.inf)


def test_a_difference_inside_the_spread_is_undecided():
    a, b = [result(5.0), result(5.2)], [result(5.1), result(5.15)]
    assert undecided(a, b) and undecided([result(4.0)], b) and not undecided([result(4.0), result(4.1)], b)


def test_power_law_finds_exponent_and_its_uncertainty():
    x = [1e6, 1e7, 1e8, 1e9]
    a, b, error = power_law(x, [3 * v ** -0.07 for v in x])
    assert (a, b) == (pytest.approx(3), pytest.approx(0.07)) and error < 1e-6
    assert power_law(x, [3 * v ** -0.07 * (1 + 0.05 * (-1) ** i) for i, v in enumerate(x)])[2] > 0.005
    assert power_law(x[:2], [1.0, 0.5])[2] == math.inf


def test_a_run_is_trained_and_summed_up(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i * 7919 % 1000} of a text with some words in it\n" for i in range(3000)))
    base = ["--preset", "tiny", "--data", str(text), "--cache_dir", str(tmp_path / "cache"), "--d_model", "32", "--n_heads", "2", "--n_layers",
            "1", "--d_ff", "32", "--max_seq_len", "32", "--vocab_size", "300", "--batch_size", "2", "--device", "cpu", "--eval_steps", "1",
            "--save_every", "0", "--save_minutes", "5", "--sample_tokens", "0", "--validation_fraction", "0.1"]
    state, found = runner.perform(runner.Run("a", dict(seed=1, max_steps=2, load_balancing="bias")), base, tmp_path / "run", math.inf)
    assert state == runner.PERFORMED and found["tokens"] == 2 * 128 and found["flops"] > 0
    assert 0 < found["load_entropy"] <= 1 and 1 / 8 <= found["worst_share"] <= 1 and len(found["validation"]) == 2
    with pytest.raises(runner.ExperimentError, match="the run 'b, seed 1' failed(.|\n)*d_ff"):
        runner.perform(runner.Run("b", dict(seed=1, d_ff=33)), base, tmp_path / "b", math.inf)
