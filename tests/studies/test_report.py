"""What a study says: what is called undecided, fits and their errors, figures and the report."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks.tables import fill
from config import ExperimentError
from studies import analysis, figures, report
from studies import run as runner
from studies.analysis import mean_and_spread, scaling_law
from studies.grids import STUDIES
from studies.reports.optimizer import tokens_to
from studies.reports.scaling import equal_loss_flops
from studies.reports.shared import against, undecided, value
from studies.reports.specialization import code, most_bits
from tests.studies.untrained import BASE, TOKENS, go, loaded, result

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", ["optimizer", "routing", "balance", "specialization", "scaling"])
def test_one_seed_is_reported_without_numbers_that_need_two(performed, tmp_path, monkeypatch, name):
    monkeypatch.setattr(runner, "draw", lambda results, path: path.touch())
    assert go(name, tmp_path, seeds=(1,))
    text = report.block(name, tmp_path).replace("information", "")
    assert "| --- |" in text and "inf" not in text and "nan" not in text


@pytest.mark.slow
def test_a_study_whose_runs_diverged_has_no_answer(performed, monkeypatch, tmp_path):
    whole = runner.perform
    monkeypatch.setattr(
        runner,
        "perform",
        lambda run, *rest: (
            dict(failed="diverged") if run.group == "top-1, equal FLOPs" else whole(run, *rest)
        ),
    )
    with pytest.raises(ExperimentError, match="top-1, equal FLOPs diverged"):
        go("routing", tmp_path)
    text = report.block("routing", tmp_path)
    with pytest.raises(ExperimentError, match="speed of adamw diverged"):
        monkeypatch.setattr(
            runner,
            "perform",
            lambda run, *rest: (
                dict(failed="diverged") if run.group == "speed of adamw" else whole(run, *rest)
            ),
        )
        go("optimizer", tmp_path / "optimizer")
    with pytest.raises(ExperimentError, match="adamw, adamw_lr 0.001.* diverged"):
        monkeypatch.setattr(
            runner,
            "perform",
            lambda run, *rest: (
                dict(failed="diverged") if run.group.startswith("adamw, ") else whole(run, *rest)
            ),
        )
        go("optimizer", tmp_path / "adamw")
    assert len(loaded(tmp_path)["runs"]) == 22 and "| --- |" not in text and "Not finished" in text
    monkeypatch.setattr(runner, "perform", lambda *_: dict(failed="diverged"))
    with pytest.raises(ExperimentError, match="none diverged|none, .* diverged"):
        go("balance", tmp_path / "balance")
    assert STUDIES["scaling"](
        BASE,
        TOKENS,
        [1],
        {run.label: dict(failed="diverged") for run in STUDIES["scaling"](BASE, TOKENS, [1], {})},
    )


@pytest.mark.slow
def test_equal_time_that_diverged_is_no_answer(performed, monkeypatch, tmp_path):
    whole = runner.perform
    monkeypatch.setattr(runner, "perform", lambda *a: None if len(performed) == 32 else whole(*a))
    assert not go("scaling", tmp_path) and (tmp_path / "figure.png").exists()
    monkeypatch.setattr(runner, "perform", lambda *_: dict(failed="diverged"))
    with pytest.raises(ExperimentError, match="equal time diverged"):
        go("scaling", tmp_path)
    assert not (tmp_path / "figure.png").exists() and "not run yet" not in report.block(
        "scaling", tmp_path
    )


def test_a_rate_that_diverges_is_not_the_best():
    found = {}
    for _ in range(9):
        for run in STUDIES["optimizer"](BASE, 100 * TOKENS, [1], found):
            rate = run.changes.get("adamw_lr", 0)
            end = (
                dict(failed="diverged")
                if run.changes["optimizer"] == "adamw" and rate > 0.001
                else result(5 - rate)
            )
            found[run.label] = end | dict(changes=run.changes)
    assert (
        max(
            run["changes"]["adamw_lr"]
            for run in found.values()
            if run["changes"]["optimizer"] == "adamw" and "adamw_lr" in run["changes"]
        )
        == 0.004
    )
    assert analysis.best_runs(
        {run: [r] for run, r in found.items() if "failed" not in r}, "adamw"
    ) == [found["adamw, adamw_lr 0.001, seed 1"]]


@pytest.mark.slow
def test_a_speed_that_failed_once_is_no_answer(performed, tmp_path, monkeypatch):
    whole = runner.perform
    for name, label in (
        ("scaling", "speed of moe, 2 x 16, seed 2"),
        ("routing", "speed of top-3, seed 2"),
        ("checkpointing", "speed of full, 4 layers, micro-batch 2, seed 2"),
    ):
        monkeypatch.setattr(
            runner,
            "perform",
            lambda run, *rest: dict(failed="diverged") if run.label == label else whole(run, *rest),
        )
        with pytest.raises(ExperimentError, match="diverged"):
            go(name, tmp_path / name)


def test_what_checkpointing_costs_is_read_from_each_run(tmp_path):
    """Speeds 100, 80 and 50, activations of 10, 6 and 1 GB at a micro-batch of 4, half as fast in the second round, but for the 80; at 8
    one does not fit, and another only the first time."""
    runs = {}
    for mode, speed, gb in (("none", 100.0, 10), ("selective", 80.0, 6), ("full", 50.0, 1)):
        changes = dict(n_layers=2, activation_checkpointing=mode, seed=1, max_steps=5)
        runs[f"{mode} 2"] = result(memory_gb=dict(activations=1)) | dict(
            group=f"speed of {mode} 2", changes=changes | dict(batch_size=2)
        )
        for seed, rate in ((1, speed), (2, speed / 2 if mode != "selective" else 44.0)):
            runs[f"{mode} 4, {seed}"] = result(
                tokens_per_second=rate, memory_gb=dict(activations=gb), peak_gb=gb + seed
            ) | dict(group=f"speed of {mode} 4", changes=changes | dict(batch_size=4, seed=seed))
            failed = seed >= dict(none=1, selective=2).get(mode, 3)
            runs[f"{mode} 8, {seed}"] = (
                dict(failed="out of memory") if failed else result()
            ) | dict(group=f"speed of {mode} 8", changes=changes | dict(batch_size=8, seed=seed))
    runs["none 8, 2"] |= result(memory_gb=dict(activations=1))
    del runs["none 8, 2"]["failed"]
    for mode in ("none", "selective"):
        runs[f"{mode} 40"] = dict(
            failed="out of memory",
            group=f"speed of {mode} 40",
            changes=dict(n_layers=6, activation_checkpointing=mode, seed=1, batch_size=40),
        )
    text = report.checkpointing(dict(runs=runs))
    assert [row for row in text.splitlines() if row.startswith("| 2 |") and " | 4 | " in row] == [
        "| 2 | none | 4 | 11.5 | 0% | 75 ± 25 |  | 4, not 8 |",
        "| 2 | selective | 4 | 7.5 | 40% | 62 ± 18 | +19% ± 6% | 4, not 8 |",
        "| 2 | full | 4 | 2.5 | 90% | 38 ± 12 | +100% ± 0% | at least 8 |",
    ]
    assert "| 6 | none | – | – | – | – | – | 0, not 40 |" in text, "a depth at which nothing fits"


def test_the_error_of_a_ratio_of_speeds_is_by_how_far_its_rounds_differ():
    """A host that is half as fast in one round changes no ratio; 6 configurations of two rounds with a deviation of 5% know it to about 4%."""
    a, b = (
        [
            result(tokens_per_second=rate * host, changes=dict(seed=seed))
            for seed, host in ((1, 1.0), (2, 0.5))
        ]
        for rate in (30.0, 20.0)
    )
    assert [pair["ratio"] for pair in analysis.speed_ratios(a, b)] == [
        1.5,
        1.5,
    ] and analysis.speed_ratios(a[1:], b[:1]) == []
    assert (
        analysis.ratio_error([analysis.speed_ratios(a, b)]) == 0
        and analysis.ratio_error([[dict(ratio=2.0)], [dict(ratio=1.0)]]) == math.inf
    )
    random, errors, within = np.random.default_rng(0), [], 0
    for _ in range(400):
        pairs = [
            [dict(ratio=ratio) for ratio in np.exp(random.normal(0, 0.05, 2))] for _ in range(6)
        ]
        errors.append(analysis.ratio_error(pairs))
        within += abs(np.log([pair["ratio"] for pair in pairs[0]]).mean()) < errors[-1]
    assert 0.92 < within / 400 < 0.98


def test_a_difference_inside_the_spread_is_undecided():
    a, b = [result(5.0), result(5.2)], [result(5.1), result(5.15)]
    assert (
        undecided(a, b, 0)
        and undecided([result(4.0)], b, 0)
        and not undecided([result(4.0), result(4.1)], b, 0)
    )
    assert undecided([result(5.0), result(5.0)], [result(5.05), result(5.05)], 0.08), (
        "two seeds can be close by chance"
    )
    assert mean_and_spread(a) == (pytest.approx(5.1), pytest.approx(0.2))
    assert value(a) == "5.100 ± 0.100" and against(a, b, 0) == "-0.025, undecided"
    assert against([result(4.0), result(4.1)], b, 0) == "-1.075"


def test_differences_by_chance_are_undecided_in_19_of_20_studies():
    """Ten configurations that do not differ: some pair of them is told apart in no more than about 5% of studies."""
    random = np.random.default_rng(0)
    apart = 0
    for _ in range(300):
        found = {str(i): [result(loss) for loss in random.normal(3, 0.01, 2)] for i in range(10)}
        honest = analysis.tukey_hsd(found)
        lowest, *_, highest = sorted(found.values(), key=lambda runs: mean_and_spread(runs)[0])
        apart += not undecided(lowest, highest, honest)
    assert 4 <= apart <= 27
    assert analysis.tukey_hsd(dict(a=[result(3.0)], b=[result(3.0), result(3.1)])) == math.inf


def test_scaling_law_finds_floor_exponent_and_their_uncertainty():
    x = [1e6, 1e6, 1e7, 1e7, 1e8, 1e8]
    exact = scaling_law(x, [2 + 3 * (v / 1e7) ** -0.4 for v in x])
    assert (exact.floor, exact.rise, exact.exponent) == (
        pytest.approx(2),
        pytest.approx(3),
        pytest.approx(0.4),
    ) and max(exact.errors) < 1e-6
    assert (
        exact.at(1e5) == pytest.approx(2 + 3 * 100**0.4)
        and exact.inverse(exact.at(1e5)) == pytest.approx(1e5)
        and exact.inverse(1.99) == math.inf
    )
    assert scaling_law(x[:4], [4.0, 4.1, 3.0, 3.1]) is None, "three unknowns need three sizes"


@pytest.mark.parametrize(
    "y", [[3.0, 3.0, 3.0, 3.0], [5.0, 4.0, 3.0, 2.0], [5.0, 4.9, 4.0, 2.0], [3.0, 3.1, 2.9, 3.05]]
)
def test_a_scaling_law_that_nothing_determines_is_none(y):
    """Constant, straight in the logarithm, ever steeper, and noise alone."""
    assert (
        scaling_law(
            [1e6, 1e6, 1e7, 1e7, 1e8, 1e8, 1e9, 1e9],
            [value + noise for value in y for noise in (-0.01, 0.01)],
        )
        is None
    )


def test_the_error_of_a_scaling_law_is_that_of_its_fits():
    """At a place between its points, against the spread of fits to the same points with other noise."""
    random, x = np.random.default_rng(0), np.repeat([1e6, 4e6, 2e7, 1e8], 2)
    laws = [
        scaling_law(list(x), list(2 + (x / 1e7) ** -0.5 + random.normal(0, 0.02, len(x))))
        for _ in range(200)
    ]
    assert np.mean([law.error_at(8e6) for law in laws]) == pytest.approx(
        np.std([law.at(8e6) for law in laws]), rel=0.15
    )
    assert laws[0].error_at(1e10) > 2 * laws[0].error_at(8e6), "farther out it is less known"


def test_a_scaling_law_needs_a_positive_floor_and_a_fit_that_ends(monkeypatch):
    x = [1e6, 1e6, 1e7, 1e7, 1e8, 1e8, 1e9, 1e9]
    assert scaling_law(x, [-5 + 8 * (v / 3e7) ** -0.02 for v in x]) is None
    assert scaling_law(x, [1 + 8 * (v / 3e7) ** -0.02 for v in x]).inverse(1.000001) == math.inf, (
        "a number too large to write"
    )
    monkeypatch.setattr(
        analysis,
        "curve_fit",
        lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no convergence")),
    )
    assert scaling_law(x, [2 + (v / 1e7) ** -0.5 for v in x]) is None


@pytest.mark.slow
def test_intervals_of_a_scaling_law_hold_the_truth(monkeypatch):
    """In about 95% of experiments, with as few points as a study has.

    A tenth of a study's draws: an interval is then less exact, and on average as long.
    """
    monkeypatch.setattr(analysis, "DRAWS", 400)
    random, x, held = np.random.default_rng(0), np.repeat([1e6, 4e6, 2e7, 1e8], 2), 0
    truth = 2 + (x / 1e7) ** -0.5
    for _ in range(200):
        law = scaling_law(list(x), list(truth + random.normal(0, 0.02, len(x))))
        low, high = law.inverse_between(3 + random.normal(0, 0.01), 0.01)
        held += low <= 1e7 <= high
    assert 0.92 <= held / 200 <= 0.98


@pytest.mark.slow
def test_what_an_moe_is_worth_in_dense_flops(performed, tmp_path, monkeypatch):
    """A dense model whose loss follows a law, and MoEs that end as if they had twice the FLOPs, at the same speed and at half."""
    whole = runner.perform

    def perform(run, *rest):
        found, moe = whole(run, *rest), run.changes.get("num_experts") == 8
        flops, tokens = found["flops"] / found["tokens"], found["tokens"] / TOKENS
        loss = (
            2
            + (flops * (1 + moe) / 1e5) ** -0.5
            + 0.001 * run.changes["seed"]
            - 2 * math.log(tokens) * (not run.alone)
        )
        return found | dict(
            val_loss=loss,
            tokens_per_second=(100 - 50 * moe) * (1 + 0.01 * moe * (run.changes["seed"] - 1)),
        )

    monkeypatch.setattr(runner, "perform", perform)
    assert go("scaling", tmp_path)
    text = report.block("scaling", tmp_path)
    rows = [row.split(" | ") for row in text.splitlines() if re.match(r"\| \d+ x \d+ \|", row)]
    assert len(rows) > 2 and rows[0][6].startswith("2.0") and rows[-1][6] == "beyond those tried"
    assert all(
        row[-1] == "0.502 ± 0.003 |"
        and row[5].startswith("-")
        and row[7].startswith("+")
        and "undecided" not in row[7]
        for row in rows
    )
    of = f"{len(rows)} of {len(rows)} sizes"
    assert f"| the MoE's loss at equal tokens | lower at {of} |" in text
    assert "| mean difference of all sizes at equal tokens | -" in text
    assert f"| the MoE's loss at equal time | higher at {of} |" in text
    monkeypatch.setattr(analysis, "ratio_error", lambda pairs: {8: 0.5}[sum(map(len, pairs))])
    undecided = f"| the MoE's loss at equal time | undecided at {of} |"
    assert undecided in report.block("scaling", tmp_path), "unknown speeds decide nothing"


def test_equal_loss_flops_are_told_within_those_tried():
    """A law that falls from 3 at 1e7, and models of 1e7 that end where the law does with 2 times, half, or far from what was tried."""
    law = scaling_law(
        [1e6, 1e6, 1e7, 1e7, 1e8, 1e8],
        [2 + (v / 1e7) ** -0.5 for v in [1e6, 1e6, 1e7, 1e7, 1e8, 1e8]],
    )

    def told(flops, deviation=0.0):
        return equal_loss_flops(
            law, [result(float(law.at(flops)), flops=1e7, tokens=1)] * 2, deviation, [5e6, 1e7, 3e7]
        )

    assert told(2e7) == "2.00 (2.00 to 2.00)" and told(6e6) == "0.60 (0.60 to 0.60)"
    assert told(1e8) == told(1e6) == "beyond those tried"
    assert told(2.8e7, 0.05).endswith("to > 3.00)") and "(< 0.50 to" in told(5.5e6, 0.2), told(
        5.5e6, 0.2
    )


def test_what_time_is_worth_is_the_most_that_was_seen():
    run = result(3.0, tokens=100, validation=[[0, 7.0], [50, 4.0], [100, 3.0]])
    assert analysis.worth_of_time([run], []) == pytest.approx(1 / math.log(2))
    longer = [result(1.0, tokens=200)]
    assert (
        analysis.worth_of_time([run], [([run], longer)]) == pytest.approx(2 / math.log(2))
        and analysis.worth_of_time([run], [([run], [run])]) < 2
    )
    worse = result(3.0, tokens=100, validation=[[0, 2.0], [100, 3.0]])
    assert analysis.worth_of_time([worse], [([run], [result(4.0, tokens=200)])]) == 0, (
        "never less than nothing"
    )


def test_the_mean_difference_of_pairs_and_its_interval():
    """Two pairs of two seeds each: of the same spread there are 4 degrees of freedom, and those of one side when the other has no noise."""

    def runs(*losses):
        return [result(loss) for loss in losses]

    pairs = [(runs(2.9, 3.0), runs(3.1, 3.2)), (runs(1.8, 1.9), runs(1.9, 2.0))]
    error = math.sqrt(0.005) * math.sqrt(4 / 2) / 2
    assert analysis.mean_difference(pairs) == pytest.approx((-0.15, 2.776 * error), abs=1e-4)
    certain = [(a, runs(3.0, 3.0)) for a, _ in pairs]
    assert analysis.mean_difference(certain)[1] == pytest.approx(
        4.303 * error / math.sqrt(2), abs=1e-4
    )
    assert analysis.mean_difference([(b, b) for _, b in certain]) == (0, 0)
    assert analysis.mean_difference([(runs(2.9, 3.0), runs(3.1))])[1] == math.inf, (
        "of one side nothing is known"
    )
    assert analysis.mean_difference([(runs(2.9), runs(3.1))]) == (pytest.approx(-0.2), math.inf)


def test_an_expert_says_no_more_bits_than_its_tokens_choices_leave():
    """Of 4 experts that are used evenly, two by each token, one says a bit at most; of 2 that every token chooses, none; and never more
    than the kinds have."""

    def most(table, tokens, entropy):
        return most_bits(dict(kind_table=[table], kind_tokens=tokens, kind_entropy=entropy))

    even = [[10, 0], [10, 0], [0, 10], [0, 10]]
    assert most(even, [10, 10], 3.0) == pytest.approx(1) and most(even, [10, 10], 0.5) == 0.5
    assert most([[10, 10], [10, 10], [0, 0]], [10, 10], 1.0) == 0 == most(even, [10, 10], 0.0)
    assert analysis.divergence_from_average(even)[0] == pytest.approx(1), (
        "which these experts reach"
    )


def test_a_speed_that_was_measured_once_decides_nothing_even_if_time_is_worth_nothing():
    run = result(3.0, validation=[[0, 3.0], [TOKENS, 3.0]])
    groups = ("moe, 1 x 8", "dense, 1 x 8", "speed of moe, 1 x 8", "speed of dense, 1 x 8")
    results = dict(runs={group: run | dict(group=group, changes=dict(seed=1)) for group in groups})
    assert analysis.equal_time(results) == (0.0, math.inf, math.inf)


def test_which_shares_of_the_busiest_expert_are_smallest_is_by_their_own_noise(performed, tmp_path):
    """Losses are all alike, with more noise than the shares have; of those the two smallest are."""
    assert go("balance", tmp_path)
    results = loaded(tmp_path)
    shares = {
        "bias": (0.131, 0.139),
        "batch, weight 0.01": (0.138, 0.142),
        "sequence, weight 0.01": (0.178, 0.182),
    }
    for run in results["runs"].values():
        seed = run["changes"]["seed"]
        run |= dict(
            val_loss=3 + 0.1 * seed, worst_share=shares.get(run["group"], (0.3, 0.3))[seed - 1]
        )
    text = report.balance(results)
    evenest = "`bias alone`: 0.135 ± 0.004, undecided against `loss 0.01, batch`"
    assert f"| of these alike, the smallest largest share | {evenest} |" in text
    assert re.search(r"of these alike, the largest largest share \| [^|]*: 0.300 ± 0.000", text)


@pytest.mark.slow
def test_differences_are_drawn_between_runs_of_one_seed(performed, tmp_path):
    assert go("scaling", tmp_path)
    results = loaded(tmp_path)
    runs = results["runs"]
    for run in runs.values():
        equal_time = run["group"].endswith("equal time")
        run["val_loss"] = 3 + 0.1 * run["changes"]["seed"] * (
            1 if "moe" in run["group"] else 2 if equal_time else 3
        )
    del runs["dense, 2 x 16, seed 1"]
    figure = Figure()
    figures._scaling(figure, results)
    tokens, time = (
        [
            list(map(float, np.round(line.get_ydata(), 9)))
            for line in figure.axes[2].lines
            if line.get_label().startswith(f"equal {name}")
        ][0]
        for name in ("tokens and FLOPs", "time")
    )
    assert tokens == [-0.2, -0.4, -0.4, -0.2, -0.4, -0.2, -0.4] and time == [-0.1, -0.2] * 4
    assert [len(axes.lines) for axes in figure.axes[:2]] != [0, 0]
    found = analysis.groups(results)
    least = analysis.tukey_kramer(
        found["moe, 1 x 8"], found["moe, 1 x 8"], analysis.tukey_hsd(found)
    )
    (shade,) = figure.axes[2].patches
    assert (shade.get_y(), shade.get_height()) == (
        pytest.approx(-least),
        pytest.approx(2 * least),
    ), "what is undecided"


def test_tokens_to_equal_loss_are_read_between_runs():
    points = [(100, 6.0), (200, 5.0), (400, 4.0)]
    assert tokens_to(points, 4.5) == (pytest.approx(400 / 2**0.5), "")
    assert tokens_to(points, 6.5) == (100, "at most ") and tokens_to(points, 3.9) is None
    assert tokens_to(points, 5.0)[0] == pytest.approx(200)


def test_every_study_has_its_place_on_the_page():
    page = (ROOT / "docs" / "findings.md").read_text()
    assert all(f"<!-- study {name} -->" in page for name in STUDIES)


def test_a_study_without_results_is_said_not_to_be_run(tmp_path):
    page = "before\n<!-- study balance -->\nold\n<!-- end -->\nafter"
    text = fill(page, report.blocks(tmp_path))
    assert "Not run yet: `python -m studies.run balance`" in text
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter")


def test_tokens_are_shown_as_code():
    assert [code(token) for token in (" a", "\n", "a|b", "`", '"')] == [
        "`␣a`",
        "`\\n`",
        "`a\\|b`",
        "`` ` ``",
        '`"`',
    ]
