"""Writes the tables of docs/findings.md from studies/NAME/results.json.

    python -m studies.report
    python -m studies.report FOLDER     prints the tables of the study in another folder

A table stands between the marks <!-- study NAME --> and <!-- end -->. The sentences around it are
written by hand. A value of several runs is their mean ± half of their spread. The speed of a run is
the median of its steps.
"""

import collections
import functools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.tables import rewrite, table
from cli import exit_code, new_parser
from config import Config, ConfigError
from planner.plan import format_count
from studies.analysis import (
    SPEED,
    ScalingLaw,
    base_config,
    best_runs,
    equal_time,
    groups,
    mean_and_spread,
    mean_difference,
    micro_batches,
    of_kind,
    scaling_law,
    seed_deviation,
    sharpest_layer,
    shorter,
    speed_ratios,
    swept,
    timed,
    tukey_hsd,
    tukey_kramer,
    typical_resolution,
)
from studies.figures import MODES
from studies.grids import ADAMW_RATES, EQUAL_TIME, QUARTER, QUARTER_RATES, STUDIES, WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
SHOWN_TOKENS = 8
UNKNOWN = "–"

Runs = list[dict]


# ---------------------------------------------------------------- values and verdicts


def value(runs: Runs, key: str = "val_loss", digits: int = 3) -> str:
    """The mean over `runs` ± half of their spread."""
    mean, spread = mean_and_spread(runs, key)
    if len(runs) == 1:
        return f"{mean:,.{digits}f} (one run)"
    return f"{mean:,.{digits}f} ± {spread / 2:,.{digits}f}"


def undecided(
    a: Runs, b: Runs, resolution: float, more: float = 0.0, key: str = "val_loss"
) -> bool:
    """Whether the difference of two groups says nothing.

    So it is when a group has one seed only, or when the difference is no larger than the spread of
    the seeds on either side, or than Tukey's limit at the study's `resolution`. `more` adds another
    uncertainty to these limits.
    """
    if min(len(a), len(b)) < 2:
        return True
    mean_a, spread_a = mean_and_spread(a, key)
    mean_b, spread_b = mean_and_spread(b, key)
    noise_limit = max(spread_a, spread_b, tukey_kramer(a, b, resolution))
    return abs(mean_a - mean_b) <= noise_limit + more


def against(a: Runs, b: Runs, resolution: float, more: float = 0.0) -> str:
    """How much lower or higher the loss of a is than that of b, and whether that is undecided."""
    difference = f"{mean_and_spread(a)[0] - mean_and_spread(b)[0]:+.3f}"
    if undecided(a, b, resolution, more):
        return f"{difference}, undecided"
    return difference


def lowest(found: dict[str, Runs], resolution: float) -> tuple[str, str]:
    """The group with the lowest loss, and against which others that is undecided or decided."""
    best = min(found, key=lambda name: mean_and_spread(found[name])[0])
    others = [name for name in found if name != best]
    alike = [name for name in others if undecided(found[name], found[best], resolution)]
    if not alike:
        return best, "decided against each of the others"
    if len(alike) == len(others):
        return best, "undecided against each of the others"
    if len(alike) <= len(others) - len(alike):
        return best, f"undecided against {listed(alike)}"
    return best, f"decided only against {listed([name for name in others if name not in alike])}"


def smallest_difference(found: dict[str, Runs]) -> str:
    """The smallest difference of means that the study can decide."""
    smallest = typical_resolution(found)
    if smallest == math.inf:
        return "none: too few seeds"
    return f"{smallest:.3f} nats"


def listed(names: list[str]) -> str:
    """a, b and c"""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def span(words: list[str]) -> str:
    """The first and the last of some words, once where they are equal."""
    if words[0] == words[-1]:
        return words[0]
    return f"{words[0]} to {words[-1]}"


def code(token: str) -> str:
    """A token as Markdown code in a table, with visible spaces and line ends."""
    text = json.dumps(token, ensure_ascii=False)[1:-1]
    for written, shown in (('\\"', '"'), ("\\\\", "\\"), (" ", "␣"), ("|", "\\|")):
        text = text.replace(written, shown)
    if "`" in text:
        return f"`` {text} ``"
    return f"`{text}`"


def summary(rows: list[tuple[str, str]]) -> str:
    """A table of single quantities."""
    return table(["quantity", "value"], [list(row) for row in rows])


@dataclass
class Outcome:
    """The parts of a study's results that every report reads."""

    results: dict
    runs: dict[str, Runs]  # by group, without failed runs and those that only measured speed
    speeds: dict[str, Runs]  # by configuration, the runs that measured its speed
    resolution: float  # of Tukey's test among all groups with several seeds


def outcome(results: dict) -> Outcome:
    found = groups(results)
    return Outcome(results, found, timed(results), tukey_hsd(found))


# ---------------------------------------------------------------- what a study trained


def budget(results: dict) -> str:
    """What was trained, on what text, and how long that took."""
    every = [run for run in results["runs"].values() if "tokens" in run]
    # a run that only measures speed trains nothing worth counting, unless there is nothing else
    trained = [run for run in every if not run["group"].startswith(SPEED)] or every
    corpus = results["corpus"]
    base = base_config(results)
    passes = max(run["passes"] for run in trained)
    rows = [
        ("models, layers x width", _shapes(trained, base)),
        ("active parameters of all", _parameters(trained)),
        ("tokens of the longest run", format_count(max(run["tokens"] for run in trained))),
        ("tokens for each active parameter", _tokens_per_parameter(trained)),
        ("text", f"`{corpus['data']}`, {format_count(corpus['train_tokens'])} tokens"),
        ("passes over the text, at most", f"{passes:.2f}"),
        ("tokens a step", _tokens_per_step(trained)),
        ("precision", base.precision),
    ]
    rates = _common_rates(trained, base)
    if rates:
        rows.append(("peak learning rates", rates))
    rows += [
        ("runs", f"{len(results['runs'])}: {_kinds_of_runs(results, every)}"),
        ("tokens of all runs", format_count(results["budget"]["tokens"])),
        ("minutes of all runs", _minutes(results["budget"])),
        ("machines", machines(results)),
    ]
    return summary(rows)


def _shapes(runs: Runs, base: Config) -> str:
    def shape(run: dict) -> tuple[int, int]:
        changes = run["changes"]
        return changes.get("n_layers", base.n_layers), changes.get("d_model", base.d_model)

    return span([f"{layers} x {width}" for layers, width in sorted({shape(run) for run in runs})])


def _parameters(runs: Runs) -> str:
    sizes = sorted({(run["active_params"], run["total_params"]) for run in runs})
    return span([f"{format_count(active)} of {format_count(total)}" for active, total in sizes])


def _tokens_per_parameter(runs: Runs) -> str:
    ratios = sorted(run["tokens"] / run["active_params"] for run in runs)
    return span([f"{ratio:.2g}" for ratio in ratios])


def _tokens_per_step(runs: Runs) -> str:
    steps = sorted({round(run["tokens"] / run["changes"]["max_steps"]) for run in runs})
    return span([f"{tokens:,}" for tokens in steps])


def _common_rates(runs: Runs, base: Config) -> str:
    """The peak learning rates that no run of the study changes."""
    rates = []
    for field, optimizer in (("muon_lr", "Muon"), ("adamw_lr", "AdamW")):
        if not any(field in run["changes"] for run in runs):
            rates.append(f"{optimizer} {getattr(base, field):g}")
    return listed(rates)


def _kinds_of_runs(results: dict, finished: Runs) -> str:
    seeds = collections.Counter(
        len({run["changes"]["seed"] for run in group}) for group in groups(results).values()
    )
    kinds = [
        f"{counted(number, 'configuration')} with {counted(of, 'seed')}"
        for of, number in sorted(seeds.items(), reverse=True)
    ]
    measured_speed = sum(run["group"].startswith(SPEED) for run in finished)
    if measured_speed:
        kinds.append(f"{measured_speed} to measure speeds")
    failed = len(results["runs"]) - len(finished)
    if failed:
        kinds.append(f"{failed} that diverged or did not fit")
    return listed(kinds)


def counted(number: int, word: str) -> str:
    if number == 1:
        return f"1 {word}"
    return f"{number} {word}s"


def _minutes(spent: dict) -> str:
    kinds = (("gpu_minutes", "GPU"), ("cpu_minutes", "CPU"))
    return listed([f"{spent[key]:.0f} {name} minutes" for key, name in kinds if spent[key]])


def machines(results: dict) -> str:
    names = set()
    for run in results["runs"].values():
        if "machine" in run:
            names.add(run["machine"]["gpu"] or f"{run['machine']['cpus']} CPU cores")
    return listed(sorted(names))


# ---------------------------------------------------------------- optimizer


def tokens_to(points: list[tuple[float, float]], loss: float) -> tuple[float, str] | None:
    """How many tokens a whole run needs to reach `loss`, and "at most " if that is an upper bound.

    `points` are (tokens, loss) of runs of several lengths. Between them the loss is taken to be linear
    in the logarithm of the tokens. None when the longest run does not reach it.
    """
    points = sorted(points)
    if loss >= points[0][1]:
        return points[0][0], "at most "
    for (fewer, higher), (more, lower) in zip(points, points[1:]):
        if lower <= loss < higher:
            return fewer * (more / fewer) ** ((higher - loss) / (higher - lower)), ""
    return None


def optimizer(results: dict) -> str:
    """Muon with AdamW beside AdamW alone, each at the best rates that its sweep found."""
    study = outcome(results)
    muon = best_runs(study.runs, "muon")
    adamw = best_runs(study.runs, "adamw")
    tokens = adamw[0]["tokens"]
    lengths = [(runs[0]["tokens"], mean_and_spread(runs)[0]) for runs in shorter(study.runs)]
    lengths.append((muon[0]["tokens"], mean_and_spread(muon)[0]))
    reached = tokens_to(lengths, mean_and_spread(adamw)[0])
    rows = [
        _rates_row(study, muon, adamw),
        _warmup_row(study, adamw),
        [f"validation loss after {format_count(tokens)} tokens", value(muon), value(adamw)],
    ]
    quarter = _quarter_batch(study, muon, adamw)
    if quarter:
        rows.append(_quarter_row(study, quarter, muon, adamw))
    rows += _cost_rows(study, reached, adamw)
    header = ["", "Muon with AdamW", "AdamW alone"]
    return f"{table(header, rows)}\n\n{_optimizer_summary(study, muon, adamw, quarter, lengths)}"


def _within_noise(study: Outcome, a: Runs, b: Runs) -> bool:
    """Whether two learning rates cannot be told apart, also where they have one seed."""
    difference = abs(mean_and_spread(a)[0] - mean_and_spread(b)[0])
    return difference <= tukey_kramer(a, b, study.resolution)


def _swept_changes(study: Outcome) -> list[dict]:
    """The changes of every run of the sweeps, of those that diverged too."""
    return [
        run["changes"]
        for run in study.results["runs"].values()
        if "_lr" in run["group"] and not run["group"].startswith(QUARTER)
    ]


def _rates_row(study: Outcome, muon: Runs, adamw: Runs) -> list[str]:
    own = _rate(study, muon, "muon_lr")
    beside = _rate(study, muon, "adamw_lr")
    return [
        "best peak rates of the sweeps",
        f"Muon {own}, its AdamW {beside}",
        _rate(study, adamw, "adamw_lr"),
    ]


def _rate(study: Outcome, best: Runs, field: str) -> str:
    """The best value of a learning rate, and what the sweep leaves open.

    Other values may lie within the noise. Where the best value is the first or the last of its sweep, a
    better one may lie beyond.
    """
    mine = best[0]["changes"]
    same_sweep = dict(optimizer=mine["optimizer"], warmup_fraction=mine.get("warmup_fraction"))
    if mine["optimizer"] == "muon" and field == "muon_lr":
        same_sweep["adamw_lr"] = ADAMW_RATES[1]  # Muon's rate was swept at this rate of AdamW
    elif mine["optimizer"] == "muon":
        same_sweep["muon_lr"] = mine["muon_lr"]

    def in_sweep(changes: dict) -> bool:
        return same_sweep.items() <= (dict(warmup_fraction=None) | changes).items()

    requested = [changes[field] for changes in _swept_changes(study) if in_sweep(changes)]
    sweeps = swept(study.runs, "muon") + swept(study.runs, "adamw")
    tried = {runs[0]["changes"][field]: runs for runs in sweeps if in_sweep(runs[0]["changes"])}
    chosen = tried.get(mine[field])
    if chosen is None:
        return f"{mine[field]:g} (swept beside another rate)"
    alike = [
        f"{other:g}"
        for other, runs in sorted(tried.items())
        if runs is not chosen and _within_noise(study, runs, chosen)
    ]
    notes = []
    if alike:
        notes.append(f"within the noise: {listed(alike)}")
    if not min(requested) < mine[field] < max(requested):
        notes.append("the sweep's end")
    if not notes:
        return f"{mine[field]:g}"
    return f"{mine[field]:g} ({'; '.join(notes)})"


def _warmup_row(study: Outcome, adamw: Runs) -> list[str]:
    usual = base_config(study.results).warmup_fraction
    tried = [
        changes.get("warmup_fraction", usual)
        for changes in _swept_changes(study)
        if changes["optimizer"] == "adamw"
    ]
    chosen = adamw[0]["changes"].get("warmup_fraction", usual)
    note = " (the longest tried)" if usual < chosen == max(tried) else ""
    return ["warm-up", f"{usual:.0%}", f"{chosen:.0%}{note}"]


def _quarter_batch(study: Outcome, muon: Runs, adamw: Runs) -> dict[str, Runs]:
    """The best runs in steps of a quarter of the batch; empty until all their rates were tried."""
    best = dict(muon=muon, adamw=adamw)
    for name, runs in best.items():
        full_rate = runs[0]["changes"]["adamw_lr"]
        tried = {
            run["changes"]["adamw_lr"] / full_rate
            for run in study.results["runs"].values()
            if run["group"].startswith(f"{QUARTER}{name}, ")
        }
        if not set(QUARTER_RATES) <= tried or not swept(study.runs, QUARTER + name):
            return {}
    return {name: best_runs(study.runs, QUARTER + name) for name in best}


def _quarter_row(study: Outcome, quarter: dict[str, Runs], muon: Runs, adamw: Runs) -> list[str]:
    row = ["with 4 times as many steps, of a quarter"]
    for name, whole in (("muon", muon), ("adamw", adamw)):
        runs = quarter[name]
        row.append(f"{value(runs)} ({_quarter_settings(study, name, runs, whole)})")
    return row


def _quarter_settings(study: Outcome, name: str, runs: Runs, whole: Runs) -> str:
    """At which share of the whole batch's rates the smaller steps did best, and what is open."""
    mine = runs[0]["changes"]
    full = whole[0]["changes"]
    share = mine["adamw_lr"] / full["adamw_lr"]
    notes = [f"rates x {share:g}"]
    if share == min(QUARTER_RATES):
        notes.append("the lowest tried")
    if share == max(QUARTER_RATES):
        notes.append("the highest tried")
    alike = sorted(
        other[0]["changes"]["adamw_lr"] / full["adamw_lr"]
        for other in swept(study.runs, QUARTER + name)
        if other is not runs
        and other[0]["changes"].get("warmup_fraction") == mine.get("warmup_fraction")
        and _within_noise(study, other, runs)
    )
    if alike:
        notes.append(f"within the noise: {listed([f'{other:g}' for other in alike])}")
    if mine.get("warmup_fraction") != full.get("warmup_fraction"):
        notes.append(f"warm-up {mine['warmup_fraction']:.0%}")
    return "; ".join(notes)


def _cost_rows(study: Outcome, reached: tuple[float, str] | None, adamw: Runs) -> list[list[str]]:
    """What the loss of AdamW alone costs with each optimizer."""
    tokens = adamw[0]["tokens"]
    per_step = tokens / adamw[0]["changes"]["max_steps"]
    speeds = {name: study.speeds[name] for name in ("muon", "adamw")}
    rate = {name: mean_and_spread(runs, "tokens_per_second")[0] for name, runs in speeds.items()}

    def muon_cost(divisor: float, digits: int, unit: str = "") -> str:
        if reached is None:
            return "not reached"
        needed, bound = reached
        return f"{bound}{needed / divisor:.{digits}f}{unit}"

    gpu = speeds["muon"][0]["machine"]["gpu"] or "the CPU"
    return [
        ["tokens to AdamW's loss", muon_cost(1e6, 1, "M"), format_count(tokens)],
        ["steps", muon_cost(per_step, 0), f"{tokens / per_step:.0f}"],
        [
            "seconds of training at that speed",
            muon_cost(rate["muon"], 0),
            f"{tokens / rate['adamw']:.0f}",
        ],
        [
            "share of AdamW's tokens",
            muon_cost(tokens / 100, 0, "%"),
            "100%",
        ],
        [
            "share of AdamW's time",
            muon_cost(tokens * rate["muon"] / rate["adamw"] / 100, 0, "%"),
            "100%",
        ],
        [
            f"tokens/s, alone on {gpu}",
            *(value(runs, "tokens_per_second", 0) for runs in speeds.values()),
        ],
        [
            "bytes a parameter, measured",
            *(f"{runs[0]['state_bytes_per_parameter']:.1f}" for runs in speeds.values()),
        ],
        [
            "peak memory of a run, GB",
            *(f"{mean_and_spread(runs, 'peak_gb')[0]:.1f}" for runs in speeds.values()),
        ],
    ]


def _optimizer_summary(
    study: Outcome,
    muon: Runs,
    adamw: Runs,
    quarter: dict[str, Runs],
    lengths: list[tuple[float, float]],
) -> str:
    rows = [("Muon's loss minus AdamW's", _verdict(study, muon, adamw))]
    if quarter:
        verdict = _verdict(study, quarter["muon"], quarter["adamw"])
        rows.append(("the same with 4 times as many steps", verdict))
    rate = adamw[0]["changes"]["adamw_lr"]
    same_rate = [
        runs[0]["val_loss"]
        for runs in swept(study.runs, "muon")
        if runs[0]["changes"]["adamw_lr"] == rate
    ]
    if same_rate:
        difference = min(same_rate) - adamw[0]["val_loss"]
        label = f"the same with AdamW's rate {rate:g} beside Muon too"
        rows.append((label, f"{difference:+.3f} nats (one seed)"))
    rows.append(
        (
            "tokens of the runs that Muon's loss is interpolated between",
            listed([format_count(length) for length, _ in lengths]),
        )
    )
    rows.append(("less memory with Muon: weights, gradients and state", _bytes_saved(study)))
    rows.append(("less memory with Muon: peak of these runs", _peak_saved(study)))
    rows.append(("smallest difference that is decided", smallest_difference(study.runs)))
    return summary(rows)


def _verdict(study: Outcome, a: Runs, b: Runs) -> str:
    difference = f"{mean_and_spread(a)[0] - mean_and_spread(b)[0]:+.3f} nats"
    if min(len(a), len(b)) < 2:
        return f"{difference} (one seed so far)"
    if undecided(a, b, study.resolution):
        return f"{difference} (undecided)"
    return f"{difference} (decided)"


def _bytes_saved(study: Outcome) -> str:
    muon, adamw = (study.speeds[name][0]["state_bytes_per_parameter"] for name in ("muon", "adamw"))
    return f"{1 - muon / adamw:.0%}"


def _peak_saved(study: Outcome) -> str:
    muon, adamw = (mean_and_spread(study.speeds[name], "peak_gb")[0] for name in ("muon", "adamw"))
    return f"{1 - muon / adamw:.0%}"


# ---------------------------------------------------------------- routing


def routing(results: dict) -> str:
    """top-1 to top-4 at equal tokens and at equal FLOPs."""
    study = outcome(results)
    chosen = (1, 2, 3, 4)
    by_tokens = {f"top-{k}": study.runs[f"top-{k}, equal tokens"] for k in chosen}
    by_flops = {f"top-{k}": study.runs[f"top-{k}, equal FLOPs"] for k in chosen if k != 2}
    by_flops = {"top-1": by_flops.pop("top-1"), "top-2": by_tokens["top-2"], **by_flops}
    header = [
        "experts a token",
        "loss, equal tokens",
        "against top-2",
        "loss, equal FLOPs",
        "against top-2",
        "FLOPs a token",
        "tokens/s",
    ]
    rows = [_routing_row(study, name, by_tokens, by_flops) for name in by_tokens]
    return f"{table(header, rows)}\n\n{_routing_summary(study, by_tokens, by_flops)}"


def _routing_row(
    study: Outcome, name: str, by_tokens: dict[str, Runs], by_flops: dict[str, Runs]
) -> list[str]:
    row = [name]
    for found in (by_tokens, by_flops):
        row.append(value(found[name]))
        if name == "top-2":
            row.append("")
        else:
            row.append(against(found[name], found["top-2"], study.resolution))
    relative = _flops_per_token(by_tokens[name]) / _flops_per_token(by_tokens["top-2"])
    return [*row, f"{relative:.2f}x", value(study.speeds[name], "tokens_per_second", 0)]


def _flops_per_token(runs: Runs) -> float:
    return runs[0]["flops"] / runs[0]["tokens"]


def _routing_summary(study: Outcome, by_tokens: dict[str, Runs], by_flops: dict[str, Runs]) -> str:
    tokens = format_count(by_tokens["top-2"][0]["tokens"])
    more_tokens = by_flops["top-1"][0]["tokens"] / by_tokens["top-1"][0]["tokens"]
    gain = mean_and_spread(by_flops["top-1"])[0] - mean_and_spread(by_tokens["top-1"])[0]
    flops = by_flops["top-2"][0]["flops"]
    off = max(abs(runs[0]["flops"] / flops - 1) for runs in by_flops.values())
    rows = [
        (f"lowest at equal tokens ({tokens})", "; ".join(lowest(by_tokens, study.resolution))),
        ("lowest at equal FLOPs", "; ".join(lowest(by_flops, study.resolution))),
        ("tokens of top-1 at equal FLOPs, times those at equal tokens", f"{more_tokens:.2f}"),
        ("what these tokens alone change in its loss", f"{gain:+.3f} nats"),
        ("largest difference of the equal FLOPs, for whole steps", f"{off:.1%}"),
        ("smallest difference that is decided", smallest_difference(study.runs)),
    ]
    return summary(rows)


# ---------------------------------------------------------------- balance


def balance(results: dict) -> str:
    """Loss and evenness of each way of balancing."""
    study = outcome(results)
    labels = _balance_labels()
    found = {labels[name]: runs for name, runs in study.runs.items() if name in labels}
    resolution = tukey_hsd(found)
    best, verdict = lowest(found, resolution)
    rows = []
    for name, runs in found.items():
        compared = "" if name == best else against(runs, found[best], resolution)
        entropy = f"{1 - mean_and_spread(runs, 'load_entropy')[0]:.2g}"
        rows.append([name, value(runs), compared, entropy, value(runs, "worst_share")])
    header = [
        "balancing",
        "validation loss",
        f"against {best}",
        "1 - load entropy (0: even)",
        "largest share of an expert",
    ]
    return f"{table(header, rows)}\n\n{_balance_summary(results, found, resolution, best, verdict)}"


def _balance_labels() -> dict[str, str]:
    """How the table calls each group."""
    labels = {"none": "`none`"}
    for scope in ("batch", "sequence"):
        for weight in WEIGHTS:
            labels[f"{scope}, weight {weight:g}"] = f"`loss {weight:g}, {scope}`"
    return labels | {"bias": "`bias alone`"}


def _balance_summary(
    results: dict, found: dict[str, Runs], resolution: float, best: str, verdict: str
) -> str:
    base = base_config(results)
    as_low = {
        name: runs
        for name, runs in found.items()
        if name == best or undecided(runs, found[best], resolution)
    }

    def largest_share(name: str) -> float:
        return mean_and_spread(found[name], "worst_share")[0]

    evenest = min(as_low, key=largest_share)
    least_even = max(as_low, key=largest_share)
    of_shares = tukey_hsd(found, "worst_share")
    as_even = [
        name
        for name, runs in as_low.items()
        if name != evenest and undecided(runs, as_low[evenest], of_shares, key="worst_share")
    ]
    even = f"{evenest}: {value(found[evenest], 'worst_share')}"
    if as_even:
        even += f", undecided against {listed(as_even)}"
    uneven = f"{least_even}: {value(found[least_even], 'worst_share')}"
    return summary(
        [
            ("lowest loss", f"{best}; {verdict}"),
            ("of these alike, the smallest largest share", even),
            ("of these alike, the largest largest share", uneven),
            ("share of an expert at even load", f"{1 / base.num_experts:g}"),
            ("largest share that is possible", f"{1 / base.top_k:g}"),
            ("step of the bias", f"{base.load_balancing_bias_rate:g}"),
            ("smallest difference that is decided", smallest_difference(found)),
        ]
    )


# ---------------------------------------------------------------- specialization


def specialization(results: dict) -> str:
    """Mutual information between experts and token kinds and domains, over training."""
    analyses = [run["experts"] for runs in groups(results).values() for run in runs]
    first = analyses[0]
    seed = next(iter(results["runs"].values()))["changes"]["seed"]
    layer = sharpest_layer(first, "kind")
    where = f"layer {first['layers'][layer] + 1}, seed {seed}"
    parts = [
        _information_table(analyses),
        _specialization_summary(analyses, where),
        _experts_table(first, layer, where),
    ]
    return "\n\n".join(parts)


def _mean_bits(analyses: list[dict], step: int, label: str, key: str) -> Runs:
    """The mean over layers of each seed's mutual information, as runs with the value `bits`."""
    return [dict(bits=float(np.mean(each["steps"][step][label][key]))) for each in analyses]


def _information_table(analyses: list[dict]) -> str:
    rows = []
    for number, step in enumerate(analyses[0]["steps"]):
        row = ["before training" if step["step"] == 0 else format_count(step["tokens"])]
        for label in ("kind", "domain"):
            for key in ("bits", "shuffled_most"):
                row.append(value(_mean_bits(analyses, number, label, key), "bits"))
        rows.append(row)
    header = [
        "tokens of training",
        "bits of the kind",
        "shuffled",
        "bits of the domain",
        "shuffled",
    ]
    return table(header, rows)


def _specialization_summary(analyses: list[dict], where: str) -> str:
    first = analyses[0]
    last = len(first["steps"]) - 1
    kind = mean_and_spread(_mean_bits(analyses, last, "kind", "bits"), "bits")[0]
    possible = most_bits(first)
    rows = [
        ("held-out tokens", format_count(first["tokens"])),
        ("entropy of the kinds", f"{first['kind_entropy']:.2f} bits"),
        ("entropy of the domains", f"{first['domain_entropy']:.2f} bits"),
        ("what one of a token's experts can say at most", f"{possible:.2f} bits"),
    ]
    if possible:
        rows.append(("what it says of the kind, of that", f"{kind / possible:.0%}"))
    if "others" in first["domains"]:
        others = first["domain_tokens"][first["domains"].index("others")]
        share = others / sum(first["domain_tokens"])
        rows.append(("tokens of packages without a name of their own", f"{share:.0%}"))
    rows.append(("layer that says most of the kind", where))
    return summary(rows)


def _experts_table(analysis: dict, layer: int, where: str) -> str:
    """What each expert of a layer is chosen for."""
    routed = np.array(analysis["kind_table"][layer], float)  # [experts, kinds] of routed tokens

    def two_largest(shares: np.ndarray) -> str:
        largest = np.argsort(-shares)[:2]
        return listed([f"{analysis['kinds'][kind]} ({shares[kind]:.0%})" for kind in largest])

    rows = []
    for expert, counts in enumerate(routed):
        tokens = analysis["top_tokens"][layer][expert][:SHOWN_TOKENS]
        rows.append(
            [
                str(expert + 1),
                two_largest(counts / routed.sum(0).clip(1)),
                two_largest(counts / counts.sum().clip(1)),
                " ".join(code(token) for token, _ in tokens),
            ]
        )
    header = [
        f"expert ({where})",
        "is chosen, of all choices by a kind",
        "its tokens are",
        "tokens that set it apart",
    ]
    return table(header, rows)


def most_bits(analysis: dict) -> float:
    """How many bits one of a token's k experts can say of its kind, mean over the layers.

    No more than the entropy of the kinds, and no more than the entropy of the experts less log2(k),
    because it stays open which of the k experts it is.
    """
    choices = np.sum(analysis["kind_table"][0])
    k = choices / max(1, sum(analysis["kind_tokens"]))
    limits = []
    for counts in analysis["kind_table"]:
        share = np.sum(counts, axis=1) / np.sum(counts)
        entropy = -sum(p * math.log2(p) for p in share if p > 0)
        limits.append(min(analysis["kind_entropy"], entropy - math.log2(k)))
    return max(0.0, float(np.mean(limits)))


# ---------------------------------------------------------------- scaling


@dataclass
class Size:
    """The groups of one size of the scaling study."""

    name: str
    moe: Runs
    dense: Runs
    equal_time: Runs | None
    speed_ratios: Runs


def scaling(results: dict) -> str:
    """MoE against dense models of equal active parameters, at equal tokens and at equal time."""
    study = outcome(results)
    sizes = _sizes(study)
    law = _loss_law(of_kind(results, "dense"))
    _, _, nats_of_speeds = equal_time(results)
    deviation = _deviation_of_moe(study)
    tried = [run["flops_per_token"] for run in of_kind(results, "dense")]
    rows = []
    for size in sizes:
        worth = UNKNOWN
        if law and deviation < math.inf:
            worth = equal_loss_flops(law, size.moe, deviation, tried)
        timely = "not run yet"
        if size.equal_time:
            timely = against(size.moe, size.equal_time, study.resolution, nats_of_speeds)
        rows.append(
            [
                size.name,
                format_count(size.moe[0]["active_params"]),
                format_count(size.moe[0]["total_params"]),
                value(size.dense),
                value(size.moe),
                against(size.moe, size.dense, study.resolution),
                worth,
                timely,
                value(size.speed_ratios, "ratio"),
            ]
        )
    header = [
        "layers x width",
        "parameters used",
        "of the MoE's",
        "dense loss",
        "MoE loss",
        "MoE - dense, equal tokens, FLOPs and parameters used",
        "FLOPs a token of a dense model with the MoE's loss, times",
        "MoE - dense, equal time",
        "MoE's speed, times the dense one's",
    ]
    return f"{table(header, rows)}\n\n{_scaling_summary(study, sizes, rows)}"


def _sizes(study: Outcome) -> list[Size]:
    names = [group.removeprefix("moe, ") for group in study.runs if group.startswith("moe, ")]
    return [
        Size(
            name=name,
            moe=study.runs[f"moe, {name}"],
            dense=study.runs[f"dense, {name}"],
            equal_time=study.runs.get(f"dense, {name}{EQUAL_TIME}"),
            speed_ratios=speed_ratios(study.speeds[f"moe, {name}"], study.speeds[f"dense, {name}"]),
        )
        for name in names
    ]


def _loss_law(runs: Runs) -> ScalingLaw | None:
    """The loss as a function of FLOPs a token."""
    return scaling_law([run["flops_per_token"] for run in runs], [run["val_loss"] for run in runs])


def _deviation_of_moe(study: Outcome) -> float:
    """The standard deviation of the MoE's losses over seeds."""
    return seed_deviation(
        {name: runs for name, runs in study.runs.items() if name.startswith("moe, ")}
    )


def equal_loss_flops(law: ScalingLaw, runs: Runs, deviation: float, tried: list[float]) -> str:
    """How many times the FLOPs a token of `runs` a model that follows `law` needs for their loss.

    With a 95% interval, from the law's errors and the `deviation` of a loss over seeds. Nothing is
    extrapolated beyond the FLOPs that were `tried`.
    """
    own = _flops_per_token(runs)
    mean = mean_and_spread(runs)[0]
    low, high = law.inverse_between(mean, deviation / math.sqrt(len(runs)))

    def times(flops: float) -> str:
        if flops > max(tried):
            return f"> {max(tried) / own:.2f}"
        if flops < min(tried):
            return f"< {min(tried) / own:.2f}"
        return f"{flops / own:.2f}"

    if times(low).startswith(">") or times(high).startswith("<"):
        return "beyond those tried"
    return f"{times(law.inverse(mean))} ({times(low)} to {times(high)})"


def _scaling_summary(study: Outcome, sizes: list[Size], rows: list[list[str]]) -> str:
    mean, interval = mean_difference([(size.moe, size.dense) for size in sizes])
    worth_of_time, speed_error, nats_of_speeds = equal_time(study.results)
    extra = sorted(size.moe[0]["total_params"] / size.moe[0]["active_params"] for size in sizes)
    facts = [("the MoE's loss at equal tokens", _count_verdicts([row[5] for row in rows]))]
    if interval < math.inf:
        bounds = f"{mean:+.3f} ± {interval:.3f} nats (95% interval)"
        facts.append(("mean difference of all sizes at equal tokens", bounds))
    facts.append(("the MoE's loss at equal time", _count_verdicts([row[7] for row in rows])))
    facts.append(("smallest difference that is decided", smallest_difference(study.runs)))
    smallest_at_equal_time = typical_resolution(study.runs) + nats_of_speeds
    if smallest_at_equal_time < math.inf:
        facts += [
            ("the same at equal time", f"{smallest_at_equal_time:.3f} nats"),
            ("error of the ratio of the speeds (95% interval)", f"{speed_error:.0%}"),
            ("worth of 10% more time, at most", f"{worth_of_time * math.log(1.1):.2f} nats"),
        ]
    for kind, label in (("dense", "dense model"), ("moe", "MoE")):
        law = _loss_law(of_kind(study.results, kind))
        facts.append((f"fit of the {label}: floor, exponent ± standard error", _law_words(law)))
    facts.append(("parameters of the MoE, times those it uses", span([f"{x:.1f}" for x in extra])))
    facts += _against_equal_parameters(study, sizes)
    return summary(facts)


def _count_verdicts(cells: list[str]) -> str:
    """How many differences say lower, higher or nothing."""
    counts: dict[str, int] = {}
    for cell in cells:
        verdict = "undecided"
        if "undecided" not in cell:
            verdict = {"-": "lower", "+": "higher"}.get(cell[0], "unknown")
        counts[verdict] = counts.get(verdict, 0) + 1
    order = [word for word in ("lower", "higher", "undecided", "unknown") if word in counts]
    return listed([f"{word} at {counts[word]} of {len(cells)} sizes" for word in order])


def _law_words(law: ScalingLaw | None) -> str:
    if law is None:
        return "not determined by these losses"
    floor, _, exponent = law.errors
    return f"{law.floor:.2f} ± {floor:.2f}, {law.exponent:.2f} ± {exponent:.2f}"


def _against_equal_parameters(study: Outcome, sizes: list[Size]) -> list[tuple[str, str]]:
    """The MoE's loss minus that of a dense model of as many parameters in all, by a fit.

    Only for sizes that do not lie beyond the dense models that were trained.
    """
    dense = of_kind(study.results, "dense")
    parameters = [run["total_params"] for run in dense]
    law = scaling_law(parameters, [run["val_loss"] for run in dense])
    deviation = _deviation_of_moe(study)
    if law is None or deviation == math.inf:
        return []
    rows = []
    for size in sizes:
        total = size.moe[0]["total_params"]
        if total > max(parameters):
            continue
        difference = mean_and_spread(size.moe)[0] - law.at(total)
        error = math.hypot(law.error_at(total), deviation / math.sqrt(len(size.moe)))
        label = f"MoE - dense of as many parameters in all, by its fit, {size.name}"
        rows.append((label, f"{difference:+.3f} ± {error:.3f} nats"))
    return rows


# ---------------------------------------------------------------- checkpointing


def checkpointing(results: dict) -> str:
    """Memory and time of each mode, at micro-batches that all modes fit."""
    fitted, too_large = micro_batches(results)
    rows: list[list[str]] = []
    for layers in sorted({layers for layers, _ in fitted.keys() | too_large.keys()}):
        rows += _checkpointing_rows(layers, fitted, too_large)
    header = [
        "layers",
        "checkpointing",
        "micro-batch",
        "peak GB",
        "of the activations saved",
        "tokens/s",
        "time a token",
        "largest micro-batch that fits",
    ]
    return table(header, rows)


def _checkpointing_rows(layers: int, fitted: dict, too_large: dict) -> list[list[str]]:
    fits = {mode: fitted.get((layers, mode), {}) for mode in MODES}
    common = sorted(set.intersection(*map(set, fits.values())))
    largest = {}
    for mode in MODES:
        most = max(fits[mode], default=0)
        largest[mode] = f"at least {most}"
        if (layers, mode) in too_large:
            largest[mode] = f"{most}, not {too_large[layers, mode]}"
    if not common:
        return [[str(layers), mode, *[UNKNOWN] * 5, largest[mode]] for mode in MODES]
    rows = []
    for batch in common:
        none = fits["none"][batch]
        for mode in MODES:
            runs = fits[mode][batch]
            rows.append(
                [
                    str(layers),
                    mode,
                    str(batch),
                    f"{mean_and_spread(runs, 'peak_gb')[0]:.1f}",
                    _activations_saved(none, runs),
                    value(runs, "tokens_per_second", 0),
                    "" if mode == "none" else _more_time(none, runs),
                    largest[mode],
                ]
            )
    return rows


def _activations_saved(none: Runs, runs: Runs) -> str:
    all_kept = none[0]["memory_gb"].get("activations")
    kept = runs[0]["memory_gb"].get("activations")
    if kept is None or not all_kept:
        return UNKNOWN
    return f"{1 - kept / all_kept:.0%}"


def _more_time(none: Runs, runs: Runs) -> str:
    times = speed_ratios(none, runs)
    mean, spread = mean_and_spread(times, "ratio")
    percent = f"{round(100 * (mean - 1)):+d}%"
    if len(times) == 1:
        return f"{percent} (one run)"
    return f"{percent} ± {spread / 2:.0%}"


# ---------------------------------------------------------------- a study of the user's own


def losses(results: dict) -> str:
    """Losses and speeds of a study that has no report of its own."""
    study = outcome(results)
    best = ""
    if len(study.runs) > 1:
        best, verdict = lowest(study.runs, study.resolution)
    rows = []
    for name, runs in study.runs.items():
        compared = (
            "" if name == best or not best else against(runs, study.runs[best], study.resolution)
        )
        rows.append(
            [name, value(runs), compared, format_count(runs[0]["tokens"]), _speed(study, name)]
        )
    for name in study.speeds:
        if name not in study.runs:
            rows.append([name, UNKNOWN, "", UNKNOWN, _speed(study, name)])
    header = [
        "configuration",
        "validation loss",
        f"against {best or 'others'}",
        "tokens",
        "tokens/s, alone",
    ]
    facts = [("smallest difference that is decided", smallest_difference(study.runs))]
    if best:
        facts.insert(0, ("lowest loss", f"{best}; {verdict}"))
    if not study.runs:
        return table(header, rows)
    return f"{table(header, rows)}\n\n{summary(facts)}"


def _speed(study: Outcome, name: str) -> str:
    if name not in study.speeds:
        return UNKNOWN
    return value(study.speeds[name], "tokens_per_second", 0)


# ---------------------------------------------------------------- the page


REPORTS = dict(
    optimizer=optimizer,
    routing=routing,
    balance=balance,
    specialization=specialization,
    scaling=scaling,
    checkpointing=checkpointing,
)


def question(name: str) -> str:
    """The first sentence of a study's docstring."""
    words = " ".join((getattr(STUDIES.get(name), "__doc__", None) or name).split())
    return re.match(r".*?(?:[.?](?= |$)|$)", words)[0]


def block(name: str, folder: Path) -> str:
    """The tables of the study in `folder`, or how to run or finish it."""
    if not (folder / "results.json").exists():
        return f"Not run yet: `python -m studies.run {name}`."
    results = json.loads((folder / "results.json").read_text())
    if results["study"] != name:
        raise ValueError(f"{folder / 'results.json'} is of the study {results['study']}")
    drawn = (folder / "figure.png").exists()
    parts = []
    if not (results["finished"] and drawn):
        runs = f"{len(results['runs'])} runs so far"
        parts.append(f"Not finished ({runs}). Continue with `{_command(name, folder, results)}`.")
    if drawn:
        parts += [REPORTS.get(name, losses)(results), budget(results)]
    return "\n\n".join(parts)


def section(name: str, folder: Path) -> str:
    """What `python -m studies.report FOLDER` prints: the question, the figure and the tables."""
    parts = [f"### {question(name)}"]
    if (folder / "figure.png").exists():
        parts.append(f"![{question(name)}]({folder / 'figure.png'})")
    return "\n\n".join([*parts, block(name, folder)])


def _command(name: str, folder: Path, results: dict) -> str:
    """The command that continues a study."""
    command = ["python", "-m", "studies.run", name, "--tokens", format(results["tokens"], ".15g")]
    seeds = max((run["changes"]["seed"] for run in results["runs"].values()), default=1)
    if seeds > 2:
        command += ["--seeds", str(seeds)]
    if folder != ROOT / "studies" / name:
        command += ["--out", str(folder)]
    return shlex.join([*command, *results["options"]])


def blocks(folder: Path = ROOT / "studies") -> dict[str, Callable[[], str]]:
    """The function that makes each study's tables, by the name in its mark."""
    return {f"study {name}": functools.partial(block, name, folder / name) for name in STUDIES}


def main(argv: list[str]) -> None:
    parser = new_parser("python -m studies.report [FOLDER]", __doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse(argv).folder
    if folder is None:
        rewrite(blocks())
        return
    if not (folder / "results.json").exists():
        raise ConfigError(_no_results_message(folder))
    name = json.loads((folder / "results.json").read_text())["study"]
    print(section(name, folder))


def _no_results_message(folder: Path) -> str:
    message = f"there is no results.json in {folder}: name the folder of a study, its --out"
    beside = ROOT / "studies" / folder
    if (beside / "results.json").exists():
        message += f", such as {beside}"
    return message


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
