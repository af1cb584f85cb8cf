"""Which runs a study wants, and which ones what it found leads to."""

import dataclasses
import math
import types

import numpy as np
import pytest
from matplotlib.figure import Figure

import data
from config import Config, ConfigError
from studies import figures, grids, report
from studies import run as runner
from studies.grids import STUDIES
from tests.studies.untrained import BASE, CORPUS, TOKENS, go, loaded, result


def test_a_study_knows_what_it_sets_for_its_runs(monkeypatch, tmp_path):
    corpus = types.SimpleNamespace(
        data_hash="d",
        tokenizer_hash="t",
        train=range(10**7),
        validation=range(1000),
        unigram_entropy=7.0,
        rules=1,
    )
    monkeypatch.setattr(data, "prepare", lambda config: corpus)
    seen = []
    monkeypatch.setattr(
        runner,
        "study",
        lambda name, base, options, *rest: (
            seen.append((base, dict(zip(options[::2], options[1::2])))) or True
        ),
    )
    for more in ([], ["--eval_every", "7"]):
        assert (
            runner.exit_code(
                runner.run_study,
                [
                    "routing",
                    "--preset",
                    "tiny",
                    "--tokens",
                    "1e6",
                    "--out",
                    str(tmp_path / "out"),
                    *more,
                ],
            )
            == 0
        )
    (base, options), (other, given) = seen
    assert (
        base.eval_every
        == int(options["--eval_every"])
        == round(1e6 / base.tokens_per_step / runner.VALIDATIONS)
        and base.sample_tokens == 0
    )
    assert other.eval_every == int(given["--eval_every"]) == 7 and given["--save_every"] == "0"


def test_the_optimizers_rates_go_on_until_the_best_is_inside():
    """With best rates 0.08 and 0.002 for Muon, and 0.001 for AdamW, or 0.002 and better with a warm-up of 20%, and no better with 40%."""
    found = {}
    while missing := [
        run
        for run in STUDIES["optimizer"](BASE, 100 * TOKENS, [1, 2, 3], found)
        if run.label not in found
    ]:
        assert len({run.label for run in missing}) == len(missing)
        for run in missing:
            c = run.changes
            best = dict(
                muon_lr=0.08,
                adamw_lr=0.002 if c["optimizer"] == "muon" or "warmup_fraction" in c else 0.001,
            )
            found[run.label] = result(
                5
                - 0.1 * ("warmup_fraction" in c)
                + sum(abs(math.log2(c[field] / rate)) for field, rate in best.items() if field in c)
            )
    rates = [name.removesuffix(", seed 1") for name in found if "seed 1" in name and "_lr" in name]
    assert sorted(name for name in rates if name.startswith("adamw")) == sorted(
        [f"adamw, adamw_lr {rate:g}" for rate in (0.00025, 0.0005, 0.001, 0.002, 0.004)]
        + [f"adamw, adamw_lr {rate:g}, warmup_fraction 0.2" for rate in (0.001, 0.002, 0.004)]
        + [
            f"adamw, adamw_lr {rate:g}, warmup_fraction 0.4"
            for rate in (0.0005, 0.001, 0.002, 0.004, 0.008)
        ]
    )
    assert sorted(name for name in rates if name.startswith("muon")) == sorted(
        [f"muon, muon_lr {rate:g}, adamw_lr 0.002" for rate in (0.01, 0.02, 0.04, 0.08, 0.16)]
        + [f"muon, muon_lr 0.08, adamw_lr {rate:g}" for rate in (0.001, 0.004)]
    )
    ends = "adamw, adamw_lr 0.002, warmup_fraction 0.2", "muon, muon_lr 0.08, adamw_lr 0.002"
    assert sorted(
        name for name in found if "seed 1" not in name and "of the tokens" not in name
    ) == sorted(
        [
            f"{of}{best}, seed {seed}"
            for best in ends
            for of in ("", grids.QUARTER)
            for seed in (2, 3)
        ]
        + [f"speed of {name}, seed {seed}" for name in ("muon", "adamw") for seed in (2,)]
    )
    shorter = [
        run
        for run in STUDIES["optimizer"](BASE, 100 * TOKENS, [1], found)
        if "of the tokens" in run.group
    ]
    assert sorted(run.changes["max_steps"] for run in shorter) == [250, 500]
    assert all(
        (run.changes["muon_lr"], run.changes["adamw_lr"]) == (0.08, 0.002) for run in shorter
    )


@pytest.mark.slow
def test_an_end_of_a_sweep_beyond_which_all_diverged_is_no_end(performed, monkeypatch, tmp_path):
    """AdamW alone is best at 0.004 with 20%; 0.008, and all with 40%, diverge."""
    whole = runner.perform

    def perform(run, *rest):
        c, found = run.changes, whole(run, *rest)
        if "warmup_fraction" in c and (c["adamw_lr"] > 0.004 or c["warmup_fraction"] > 0.2):
            return dict(failed="diverged")
        best = 0.004 if "warmup_fraction" in c else 0.002
        return found | dict(
            val_loss=5 - ("warmup_fraction" in c) + abs(math.log2(c.get("adamw_lr", best) / best))
        )

    monkeypatch.setattr(runner, "perform", perform)
    assert go("optimizer", tmp_path)
    text = report.block("optimizer", tmp_path)
    assert "| warm-up | 5% | 20% |" in text
    assert (
        "0.004" in text
        and "sweep's end"
        not in next(line for line in text.splitlines() if "best peak rates" in line).split("|")[-2]
    )


def test_both_optimizers_are_tried_in_more_and_smaller_steps():
    """AdamW, best after a warm-up of 40%, with that and with one of 20%; each is best at half the rates and with the shorter warm-up."""
    found, base = {}, dataclasses.replace(BASE, batch_size=8, gradient_accumulation_steps=2)
    tokens = 20 * base.tokens_per_step
    while missing := [
        run for run in STUDIES["optimizer"](base, tokens, [1, 2], found) if run.label not in found
    ]:
        for run in missing:
            c, smaller = run.changes, "batch_size" in run.changes
            rate, warmup = 0.001 if smaller else 0.002, 0.2 if smaller else 0.4
            loss = (
                4
                - smaller
                + abs(math.log2(c.get("adamw_lr", rate) / rate))
                + abs(math.log2(c.get("muon_lr", 10 * rate) / rate / 10))
                + 0.01 * c["seed"]
                + (c["optimizer"] == "adamw") * (1 + abs(c.get("warmup_fraction", 0) - warmup))
            )
            found[run.label] = result(
                loss,
                group=run.group,
                changes=c,
                passes=0.1,
                tokens=c["max_steps"] * dataclasses.replace(base, **c).tokens_per_step,
            )
    smaller = {
        name: run["changes"] for name, run in found.items() if name.startswith(grids.QUARTER)
    }
    assert all(
        (c["batch_size"], c["gradient_accumulation_steps"], c["max_steps"]) == (4, 1, 80)
        for c in smaller.values()
    )
    assert [
        (c["adamw_lr"], c["muon_lr"]) for c in smaller.values() if c["optimizer"] == "muon"
    ] == [(0.0005, 0.005), (0.001, 0.01), (0.002, 0.02), (0.004, 0.04), (0.001, 0.01)]
    assert sorted(
        (c["warmup_fraction"], c["adamw_lr"])
        for c in smaller.values()
        if c["optimizer"] == "adamw" and c["seed"] == 1
    ) == [(warmup, rate) for warmup in (0.2, 0.4) for rate in (0.0005, 0.001, 0.002, 0.004)]
    results = dict(study="optimizer", tokens=tokens, options=["--preset", "tiny"], runs=found)
    text = report.optimizer(results)
    assert "| Muon's loss minus AdamW's | -1.000 nats (decided) |" in text
    assert "| the same with 4 times as many steps | -1.000 nats (decided) |" in text
    assert (
        "| with 4 times as many steps, of a quarter | 3.015 ± 0.005 (rates x 0.5) | 4.015 ± 0.005 (rates x 0.5; warm-up 20%) |"
        in text
    )
    rates = [found[f"speed of adamw, seed {seed}"]["tokens_per_second"] for seed in (1, 2)]
    found["speed of adamw, seed 2"]["tokens_per_second"] = 3 * rates[0]
    row = next(
        row
        for row in report.optimizer(results).splitlines()
        if row.startswith("| seconds of training at that speed")
    )
    assert row.endswith(f" | {tokens / (2 * rates[0]):.0f} |"), (
        "the mean of both times that it was measured"
    )
    assert grids.quarter(base) == dict(
        batch_size=4,
        gradient_accumulation_steps=1,
        eval_every=4 * base.eval_every,
    )
    assert grids.quarter(dataclasses.replace(base, batch_size=3)) == {}
    assert (
        grids.quarter(
            dataclasses.replace(base, batch_size=3, gradient_accumulation_steps=8)
        ).items()
        >= dict(batch_size=3, gradient_accumulation_steps=2).items()
    )
    held_out = np.arange(100_000, dtype=np.uint16)
    base = dataclasses.replace(base, eval_sequences=base.validation_sequences)  # as in a study
    windows = [
        np.concatenate(
            [
                inputs
                for inputs, _ in data.validation_batches(held_out, dataclasses.replace(base, **c))
            ]
        )
        for c in ({}, grids.quarter(base))
    ]
    assert np.array_equal(*windows), "what is compared is validated on the same text"
    wide = {
        name: run
        | dict(
            val_loss=run["val_loss"]
            - 9 * (name.startswith(grids.QUARTER) and run["changes"].get("adamw_lr") == 0.004)
        )
        for name, run in found.items()
    }
    assert "(rates x 2; the highest tried" in report.optimizer(results | dict(runs=wide))
    one = {name: run for name, run in found.items() if not name.startswith(f"{grids.QUARTER}adamw")}
    few = {
        name: run
        for name, run in found.items()
        if not (name.startswith(f"{grids.QUARTER}muon") and run["changes"]["adamw_lr"] == 0.0005)
    }
    assert all(
        "4 times" not in report.optimizer(results | dict(runs=runs)) for runs in (one, few)
    ), "not before all have been tried"
    other = {
        name: run
        for name, run in found.items()
        if not (name.startswith("muon, muon_lr") and "adamw_lr 0.002" in name)
    }
    assert "Muon 0.02 (swept beside another rate)" in report.optimizer(results | dict(runs=other))
    higher = {
        name: run
        for name, run in found.items()
        if not name.startswith(
            ("adamw, adamw_lr 0.001, warmup_fraction 0.4", "adamw, adamw_lr 0.0005, warmup")
        )
    }
    assert "| 0.002 (the sweep's end) |" in report.optimizer(results | dict(runs=higher)), (
        "lower rates of smaller steps are not of the sweep"
    )
    figure = Figure()
    figures._optimizer(figure, results)
    ends = {
        line.get_color(): list(np.round(line.get_ydata(), 3))
        for line in figure.axes[1].lines
        if line.get_marker() == "x" and len(line.get_ydata())
    }
    assert ends == {figures.BLUE: [3.01, 3.02], figures.ORANGE: [4.01, 4.02]}


def test_the_weight_of_one_expert_is_not_normalised():
    """With the base's derived value the router would not learn; what a study says itself stays."""
    one, two = (
        grids.runs(BASE, "one", TOKENS, [1], top_k=1)[0],
        grids.runs(BASE, "two", TOKENS, [1], top_k=2)[0],
    )
    assert one.changes["norm_topk_prob"] is False and "norm_topk_prob" not in two.changes
    with pytest.raises(ConfigError, match="would never learn"):
        grids.runs(BASE, "one", TOKENS, [1], top_k=1, norm_topk_prob=True)


def test_equal_flops_are_equal():
    flops = {}
    for run in STUDIES["routing"](BASE, 1000 * BASE.tokens_per_step, [1], {}):
        config = dataclasses.replace(BASE, **run.changes)
        flops[run.group] = config.flops_per_token * config.tokens_per_step * config.max_steps
    equal = [flops[group] for group in flops if "FLOPs" in group]
    assert len(equal) == 3 and all(
        f == pytest.approx(flops["top-2, equal tokens"], rel=2e-3) for f in equal
    )


def test_dense_models_have_the_active_parameters_of_the_moe():
    base = Config(
        d_model=768,
        n_layers=12,
        n_heads=12,
        d_ff=1280,
        moe_every=1,
        max_seq_len=1024,
        vocab_size=32768,
    )
    sizes = {}
    for run in STUDIES["scaling"](base, 1e6, [1], {}):
        if not run.alone:
            kind, _, size = run.group.partition(", ")
            sizes.setdefault(size, {})[kind] = dataclasses.replace(base, **run.changes)
    assert list(sizes) == ["4 x 256", "6 x 384", "9 x 576", "12 x 768"]
    for pair in sizes.values():
        router = pair["moe"].parameter_groups["router"]
        assert (
            pair["moe"].active_params - router
            == pair["dense"].active_params
            == pair["dense"].total_params
        )
        assert all(c.d_ff % 64 == 0 for c in pair.values())


def test_scaling_of_a_base_with_dense_blocks_or_few_heads():
    deep, small = (
        dataclasses.replace(BASE, moe_every=2, n_layers=8),
        dataclasses.replace(BASE, n_layers=2, n_heads=2, n_kv_heads=0),
    )
    for base, sizes in ((deep, 4), (small, 2)):
        wanted = STUDIES["scaling"](base, TOKENS, [1], {})
        active = {
            run.label: dataclasses.replace(base, **run.changes).active_params
            for run in wanted
            if not run.alone
        }
        assert len({run.label for run in wanted}) == len(wanted) and len(active) == 2 * sizes
        for label, number in active.items():
            if label.startswith("moe"):
                assert number == pytest.approx(active[label.replace("moe", "dense")], rel=0.05)


@pytest.mark.slow
def test_a_run_that_is_wanted_later_is_no_longer_than_the_corpus_allows(
    performed, monkeypatch, tmp_path
):
    whole = runner.perform
    monkeypatch.setattr(
        runner,
        "perform",
        lambda run, *rest: (
            (found := whole(run, *rest))
            | dict(
                tokens_per_second=found["tokens_per_second"] * (10 if "dense" in run.group else 1)
            )
        ),
    )
    monkeypatch.setitem(CORPUS, "train_tokens", TOKENS // 2)
    assert go("scaling", tmp_path)
    assert {
        run["changes"]["max_steps"]
        for run in loaded(tmp_path)["runs"].values()
        if run["group"].startswith("speed")
    } == {10}
    assert {
        run["tokens"]
        for run in loaded(tmp_path)["runs"].values()
        if run["group"].endswith("equal time")
    } == {2 * TOKENS}
    with pytest.raises(ConfigError, match="would pass over the corpus"):
        runner.study(
            "balance", BASE, ["--preset", "tiny"], 3 * TOKENS, [1], tmp_path / "other", CORPUS
        )


LARGER = [6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


@pytest.mark.slow
@pytest.mark.parametrize(
    "gb, expected",
    [
        (1000, dict(none=[2, 4, *LARGER], selective=[2, *LARGER[1:]], full=[2, 256])),
        (0.001, dict(none=[2, 4], selective=[2, 4, 6, 8, 12], full=[2, 4, *LARGER])),
    ],
)
def test_micro_batches_are_searched_to_the_end_of_memory(
    performed, tmp_path, monkeypatch, gb, expected
):
    """Whether the prediction is too high or too low."""
    monkeypatch.setattr(grids, "usable_gb", lambda cpu: gb)
    assert go("checkpointing", tmp_path)
    runs = [
        run
        for run in loaded(tmp_path)["runs"].values()
        if run["changes"]["n_layers"] == BASE.n_layers
    ]

    def tried(mode, seed, failed):
        return {
            run["changes"]["batch_size"]
            for run in runs
            if (run["changes"]["activation_checkpointing"], run["changes"]["seed"]) == (mode, seed)
            and ("failed" in run) <= failed
        }

    assert {mode: sorted(tried(mode, 1, failed=True)) for mode in expected} == expected
    assert all(tried(mode, 2, failed=True) == tried(mode, 1, failed=False) for mode in expected), (
        "what fits, and only that, runs with the second seed"
    )
    assert [label[-1] for label, _ in performed] == sorted(label[-1] for label, _ in performed), (
        "all once, then again"
    )
    text = report.block("checkpointing", tmp_path)
    assert "| 8, not 12 |" in text and "| at least 256 |" in text


@pytest.mark.slow
def test_a_search_from_below_ends_at_what_fits(performed, tmp_path, monkeypatch):
    """Of `none`, which alone is predicted not to fit more than 2, the first that does not fit is tried by no other mode."""
    monkeypatch.setattr(
        grids,
        "predict_memory",
        lambda config, mode, batch, **rest: dict(total=batch if mode == "none" else 0),
    )
    monkeypatch.setattr(grids, "usable_gb", lambda cpu: 3)
    assert go("checkpointing", tmp_path)
    changes = [run["changes"] for run in loaded(tmp_path)["runs"].values()]
    assert {c["activation_checkpointing"] for c in changes if c["batch_size"] == 4} == {"none"}


@pytest.mark.slow
def test_modes_are_compared_at_the_largest_micro_batch_that_all_fit(
    performed, tmp_path, monkeypatch
):
    whole = runner.perform
    monkeypatch.setattr(
        grids, "usable_gb", lambda cpu: 1000
    )  # so that all are predicted to fit the largest
    monkeypatch.setattr(
        runner,
        "perform",
        lambda run, *rest: (
            dict(failed="out of memory")
            if run.changes["batch_size"]
            > dict(none=8, selective=16, full=256)[run.changes["activation_checkpointing"]]
            else whole(dataclasses.replace(run, may_not_fit=False), *rest)
        ),
    )
    assert go("checkpointing", tmp_path)
    rows = [
        row.split(" | ")
        for row in report.block("checkpointing", tmp_path).splitlines()
        if row.startswith(f"| {BASE.n_layers} |")
    ]
    ends = ("none", "8, not 12"), ("selective", "16, not 24"), ("full", "at least 256")
    assert [(row[1], row[2], row[-1].removesuffix(" |")) for row in rows] == [
        (mode, batch, end) for batch in "28" for mode, end in ends
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_micro_batch_that_does_not_fit_the_second_time_does_not_fit(
    performed, tmp_path, monkeypatch, mode
):
    whole = runner.perform
    monkeypatch.setattr(grids, "usable_gb", lambda cpu: 1000)

    def perform(run, *rest):
        c = run.changes
        most = dict(none=8, selective=8, full=256)[c["activation_checkpointing"]] - (
            c["activation_checkpointing"] == mode and c["seed"] == 2
        )
        return (
            dict(failed="out of memory")
            if c["batch_size"] > most
            else whole(dataclasses.replace(run, may_not_fit=False), *rest)
        )

    monkeypatch.setattr(runner, "perform", perform)
    assert go("checkpointing", tmp_path)
    rows = [
        row.split(" | ")
        for row in report.block("checkpointing", tmp_path).splitlines()
        if row.startswith(f"| {BASE.n_layers} | {mode} |")
    ]
    assert [(row[2], row[-1]) for row in rows] == [("2", "6, not 8 |"), ("6", "6, not 8 |")], (
        "6 was tried, and is where the three are compared"
    )


def test_micro_batches_are_no_longer_than_a_run(performed, tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "usable_gb", lambda cpu: 1000)
    assert go("checkpointing", tmp_path, tokens=5 * 16 * BASE.max_seq_len)
    assert max(run["changes"]["batch_size"] for run in loaded(tmp_path)["runs"].values()) == 16


def test_a_speed_is_measured_over_enough_steps_and_not_too_many():
    def steps(tokens=1e9, **changes):
        run, again = grids.speeds(dataclasses.replace(BASE, max_seq_len=64), "x", tokens, **changes)
        assert run.alone and run.changes["eval_every"] == run.changes["max_steps"]
        assert (
            again == dataclasses.replace(run, changes=run.changes | dict(seed=2))
            and run.changes["seed"] == 1
        )
        return run.changes["max_steps"]

    assert (
        steps(batch_size=1) == 64
        and steps(batch_size=1024) == round(4e6 / 1024 / 64 / 2)
        and steps(batch_size=2**15) == 5
    )
    assert steps(1e6, batch_size=1024) == round(1e6 / 1024 / 64 / 2), "no more than a run's tokens"
