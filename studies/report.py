"""Writes the tables of docs/findings.md from studies/NAME/results.json.

    python -m studies.report
    python -m studies.report FOLDER     prints the tables of the study in another folder

A table stands between the marks <!-- study NAME --> and <!-- end -->. The sentences around it are
written by hand. A value of several runs is their mean ± half of their spread (the largest minus the
smallest). The speed of a run is the median of its steps. Losses are in nats per token.
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
from typing import NamedTuple

import numpy as np

from benchmarks.tables import rewrite, table
from cli import exit_code, new_parser
from config import Config, ConfigError
from planner.plan import format_count
from studies.analysis import (
    SPEED,
    Groups,
    Runs,
    ScalingLaw,
    base_config,
    best_runs,
    equal_time,
    groups,
    mean,
    mean_and_spread,
    mean_difference,
    micro_batches,
    of_kind,
    scaling_law,
    seed_deviation,
    sharpest_layer,
    shorter,
    sizes_with_experts,
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
SHOWN_TOKENS = 8  # top tokens that the table shows of an expert
UNKNOWN = "–"


# ---------------------------------------------------------------- values and verdicts


def value(runs: Runs, key: str = "val_loss", digits: int = 3) -> str:
    """The mean over `runs` ± half of their spread."""
    average, spread = mean_and_spread(runs, key)
    if len(runs) == 1:
        return f"{average:,.{digits}f} (one run)"
    return f"{average:,.{digits}f} ± {spread / 2:,.{digits}f}"


def undecided(
    a: Runs, b: Runs, resolution: float, more: float = 0.0, key: str = "val_loss"
) -> bool:
    """Whether the difference between the means of two groups is not significant.

    It is not when a group has one seed only. Otherwise the difference must exceed the spread over
    the seeds of either group and the limit of Tukey's test, where `resolution` is tukey_hsd of the
    study. `more` is another uncertainty, by which it must exceed these limits.
    """
    if min(len(a), len(b)) < 2:
        return True
    mean_a, spread_a = mean_and_spread(a, key)
    mean_b, spread_b = mean_and_spread(b, key)
    limit = max(spread_a, spread_b, tukey_kramer(a, b, resolution))
    return abs(mean_a - mean_b) <= limit + more


def against(a: Runs, b: Runs, resolution: float, more: float = 0.0) -> str:
    """The mean loss of `a` minus that of `b`, with a note if the difference is undecided."""
    difference = f"{mean(a) - mean(b):+.3f}"
    if undecided(a, b, resolution, more):
        return f"{difference}, undecided"
    return difference


def lowest(found: Groups, resolution: float) -> tuple[str, str]:
    """(the group with the lowest mean loss, which other groups it is decided against).

    The words name the groups of the shorter list: of the undecided or of the decided ones.
    """
    best = min(found, key=lambda name: mean(found[name]))
    alike = []
    different = []
    for name, runs in found.items():
        if name == best:
            continue
        if undecided(runs, found[best], resolution):
            alike.append(name)
        else:
            different.append(name)
    if not alike:
        return best, "decided against each of the others"
    if not different:
        return best, "undecided against each of the others"
    if len(alike) <= len(different):
        return best, f"undecided against {listed(alike)}"
    return best, f"decided only against {listed(different)}"


def smallest_difference(found: Groups) -> str:
    """The smallest significant difference between the means of two groups of the study."""
    smallest = typical_resolution(found)
    if smallest == math.inf:
        return "none: too few seeds"
    return f"{smallest:.3f} nats"


def listed(names: list[str]) -> str:
    """The names as words of a sentence: "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def span(words: list[str]) -> str:
    """The first and the last of sorted words ("1 to 3"), or one word where both are equal."""
    if words[0] == words[-1]:
        return words[0]
    return f"{words[0]} to {words[-1]}"


def code(token: str) -> str:
    """A token as Markdown code in a cell of a table, with visible spaces and line ends."""
    text = json.dumps(token, ensure_ascii=False)[1:-1]  # line ends as \\n, without the quotes
    # JSON also escapes quotes and backslashes, which need no escape here. A bar would end the cell.
    for written, shown in (('\\"', '"'), ("\\\\", "\\"), (" ", "␣"), ("|", "\\|")):
        text = text.replace(written, shown)
    if "`" in text:  # code that holds a backtick stands between two of them
        return f"`` {text} ``"
    return f"`{text}`"


def summary(rows: list[tuple[str, str]]) -> str:
    """A table with a row for each (name of a quantity, its value)."""
    return table(["quantity", "value"], [list(row) for row in rows])


@dataclass
class Outcome:
    """The parts of a study's results that every report reads."""

    results: dict  # what results.json holds
    runs: Groups  # analysis.groups: by group, without those that measured speeds
    speeds: Groups  # analysis.timed: by the configuration that was measured
    resolution: float  # analysis.tukey_hsd of the runs


def outcome(results: dict) -> Outcome:
    found = groups(results)
    return Outcome(results, found, timed(results), tukey_hsd(found))


# ---------------------------------------------------------------- what a study trained


def budget(results: dict) -> str:
    """What was trained, on what text, and how long that took."""
    finished = [run for run in results["runs"].values() if "tokens" in run]
    # Runs that measured speeds are described only if the study has no others.
    trained = [run for run in finished if not run["group"].startswith(SPEED)]
    if not trained:
        trained = finished
    corpus = results["corpus"]
    base = base_config(results)
    passes = max(run["passes"] for run in trained)
    most_tokens = max(run["tokens"] for run in trained)
    rows = [
        ("models, layers x width", _shapes(trained, base)),
        ("active parameters of all", _parameters(trained)),
        ("tokens of the longest run", format_count(most_tokens)),
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
        ("runs", f"{len(results['runs'])}: {_kinds_of_runs(results, finished)}"),
        ("tokens of all runs", format_count(results["budget"]["tokens"])),
        ("minutes of all runs", _minutes(results["budget"])),
        ("machines", machines(results)),
    ]
    return summary(rows)


def _shapes(runs: Runs, base: Config) -> str:
    """The smallest and the largest shape, as "layers x width"."""
    shapes = set()
    for run in runs:
        changes = run["changes"]
        layers = changes.get("n_layers", base.n_layers)
        width = changes.get("d_model", base.d_model)
        shapes.add((layers, width))
    return span([f"{layers} x {width}" for layers, width in sorted(shapes)])


def _parameters(runs: Runs) -> str:
    """The active and all parameters of the smallest and of the largest model."""
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
    """How many configurations have how many seeds, and how many other runs there are."""
    configurations: collections.Counter = collections.Counter()  # by their number of seeds
    for runs in groups(results).values():
        seeds = {run["changes"]["seed"] for run in runs}
        configurations[len(seeds)] += 1
    kinds = []
    for num_seeds, number in sorted(configurations.items(), reverse=True):
        kinds.append(f"{counted(number, 'configuration')} with {counted(num_seeds, 'seed')}")
    measured_speed = sum(run["group"].startswith(SPEED) for run in finished)
    if measured_speed:
        kinds.append(f"{measured_speed} to measure speeds")
    failed = len(results["runs"]) - len(finished)
    if failed:
        kinds.append(f"{failed} that diverged or did not fit")
    return listed(kinds)


def counted(number: int, word: str) -> str:
    """The number and the word, in the plural if need be: "1 seed", "2 seeds"."""
    if number == 1:
        return f"1 {word}"
    return f"{number} {word}s"


def _minutes(spent: dict) -> str:
    kinds = (("gpu_minutes", "GPU"), ("cpu_minutes", "CPU"))
    return listed([f"{spent[key]:.0f} {name} minutes" for key, name in kinds if spent[key]])


def machines(results: dict) -> str:
    names = set()
    for run in results["runs"].values():
        if "machine" not in run:  # it failed
            continue
        machine = run["machine"]
        names.add(machine["gpu"] or f"{machine['cpus']} CPU cores")
    return listed(sorted(names))


# ---------------------------------------------------------------- optimizer


class Reached(NamedTuple):
    """The tokens after which a run would end with a certain loss."""

    tokens: float
    bound: str  # "at most " if `tokens` is an upper bound, else ""


def tokens_to(points: list[tuple[float, float]], loss: float) -> Reached | None:
    """How many tokens a whole run needs to end with `loss`.

    `points` are (tokens, loss) of runs of several lengths. Between them the loss is taken to be
    linear in the logarithm of the tokens. Where the shortest run ends lower already, its tokens are
    an upper bound. None when the longest run does not reach the loss.
    """
    points = sorted(points)
    shortest, its_loss = points[0]
    if loss >= its_loss:
        return Reached(shortest, "at most ")
    for (fewer, higher), (more, lower) in zip(points, points[1:]):
        if lower <= loss < higher:
            part_of_the_way = (higher - loss) / (higher - lower)
            return Reached(fewer * (more / fewer) ** part_of_the_way, "")
    return None


def optimizer(results: dict) -> str:
    """Muon with AdamW beside AdamW alone, each at the best rates that its sweep found."""
    study = outcome(results)
    muon = best_runs(study.runs, "muon")
    adamw = best_runs(study.runs, "adamw")
    tokens = adamw[0]["tokens"]
    lengths = []  # (tokens, loss) of Muon's runs of several lengths
    for runs in [*shorter(study.runs), muon]:
        lengths.append((runs[0]["tokens"], mean(runs)))
    reached = tokens_to(lengths, mean(adamw))
    rows = [
        _rates_row(study, muon, adamw),
        _warmup_row(study, adamw),
        [f"validation loss after {format_count(tokens)} tokens", value(muon), value(adamw)],
    ]
    quarter = _quarter_batch(study, muon, adamw)
    if quarter:
        rows.append(_quarter_row(study, quarter, muon, adamw))
    rows += _tokens_and_time_rows(study, reached, adamw)
    rows += _speed_and_memory_rows(study)
    header = ["", "Muon with AdamW", "AdamW alone"]
    return f"{table(header, rows)}\n\n{_optimizer_summary(study, muon, adamw, quarter, lengths)}"


def _within_noise(study: Outcome, a: Runs, b: Runs) -> bool:
    """Whether the losses of two learning rates do not differ significantly.

    Unlike `undecided` it also answers for groups of one seed, as the other rates of a sweep are.
    """
    difference = abs(mean(a) - mean(b))
    return difference <= tukey_kramer(a, b, study.resolution)


def _swept_changes(study: Outcome) -> list[dict]:
    """The changes of every run of the sweeps at the whole batch, diverged runs included."""
    found = []
    for run in study.results["runs"].values():
        group = run["group"]
        if "_lr" in group and not group.startswith(QUARTER):
            found.append(run["changes"])
    return found


def _rates_row(study: Outcome, muon: Runs, adamw: Runs) -> list[str]:
    muon_lr = _rate(study, muon, "muon_lr")
    lr_of_its_adamw = _rate(study, muon, "adamw_lr")
    return [
        "best peak rates of the sweeps",
        f"Muon {muon_lr}, its AdamW {lr_of_its_adamw}",
        _rate(study, adamw, "adamw_lr"),
    ]


def _rate(study: Outcome, best: Runs, field: str) -> str:
    """The best value of the learning rate `field`, and what its sweep leaves open.

    Other values may lie within the noise. Where the best value is the first or the last of its
    sweep, a better one may lie beyond it. `best` are the runs at the best values.
    """
    own = best[0]["changes"]
    in_sweep = _sweep_of(own, field)
    requested = []  # values of the sweep, those that diverged included
    for changes in _swept_changes(study):
        if in_sweep(changes):
            requested.append(changes[field])
    tried: dict[float, Runs] = {}  # values of the sweep whose runs finished
    for runs in swept(study.runs, "muon") + swept(study.runs, "adamw"):
        changes = runs[0]["changes"]
        if in_sweep(changes):
            tried[changes[field]] = runs
    chosen = tried.get(own[field])
    if chosen is None:
        return f"{own[field]:g} (swept beside another rate)"

    alike = []
    for other, runs in sorted(tried.items()):
        if runs is not chosen and _within_noise(study, runs, chosen):
            alike.append(f"{other:g}")
    notes = []
    if alike:
        notes.append(f"within the noise: {listed(alike)}")
    if not min(requested) < own[field] < max(requested):
        notes.append("the sweep's end")
    if not notes:
        return f"{own[field]:g}"
    return f"{own[field]:g} ({'; '.join(notes)})"


def _sweep_of(best: dict, field: str) -> Callable[[dict], bool]:
    """Whether changes belong to the sweep over `field` that the changes `best` come from.

    All runs of a sweep have the same optimizer and warm-up. With Muon, the learning rate that is
    not swept is the same too.
    """
    same = dict(optimizer=best["optimizer"], warmup_fraction=best.get("warmup_fraction"))
    if best["optimizer"] == "muon":
        if field == "muon_lr":
            same["adamw_lr"] = ADAMW_RATES[1]  # Muon's rate was swept at this rate of AdamW
        else:
            same["muon_lr"] = best["muon_lr"]

    def in_sweep(changes: dict) -> bool:
        return all(changes.get(name) == wanted for name, wanted in same.items())

    return in_sweep


def _warmup_row(study: Outcome, adamw: Runs) -> list[str]:
    """The warm-ups of both optimizers, as shares of the steps. Only that of AdamW alone varies."""
    usual = base_config(study.results).warmup_fraction
    tried = []
    for changes in _swept_changes(study):
        if changes["optimizer"] == "adamw":
            tried.append(changes.get("warmup_fraction", usual))
    chosen = adamw[0]["changes"].get("warmup_fraction", usual)
    note = ""
    if chosen > usual and chosen == max(tried):
        note = " (the longest tried)"
    return ["warm-up", f"{usual:.0%}", f"{chosen:.0%}{note}"]


def _quarter_batch(study: Outcome, muon: Runs, adamw: Runs) -> Groups:
    """The best runs with a quarter of the batch, by optimizer; empty until all rates were tried.

    `muon` and `adamw` are the best runs at the whole batch.
    """
    found = {}
    for name, whole in (("muon", muon), ("adamw", adamw)):
        whole_lr = whole[0]["changes"]["adamw_lr"]
        tried = set()
        for run in study.results["runs"].values():
            if run["group"].startswith(f"{QUARTER}{name}, "):
                tried.add(run["changes"]["adamw_lr"] / whole_lr)
        all_tried = set(QUARTER_RATES) <= tried
        if not all_tried or not swept(study.runs, QUARTER + name):
            return {}
        found[name] = best_runs(study.runs, QUARTER + name)
    return found


def _quarter_row(study: Outcome, quarter: Groups, muon: Runs, adamw: Runs) -> list[str]:
    row = ["with 4 times as many steps, of a quarter"]
    for name, whole in (("muon", muon), ("adamw", adamw)):
        runs = quarter[name]
        row.append(f"{value(runs)} ({_quarter_settings(study, name, runs, whole)})")
    return row


def _quarter_settings(study: Outcome, name: str, runs: Runs, whole: Runs) -> str:
    """The factor of the learning rates that is best for a quarter of the batch, and what is open.

    `runs` are the best runs with a quarter of the batch, `whole` those with the whole batch.
    """
    own = runs[0]["changes"]
    of_whole = whole[0]["changes"]
    own_warmup = own.get("warmup_fraction")

    def factor(changes: dict) -> float:
        return changes["adamw_lr"] / of_whole["adamw_lr"]

    notes = [f"rates x {factor(own):g}"]
    if factor(own) == min(QUARTER_RATES):
        notes.append("the lowest tried")
    if factor(own) == max(QUARTER_RATES):
        notes.append("the highest tried")
    alike = []
    for other in swept(study.runs, QUARTER + name):
        changes = other[0]["changes"]
        same_warmup = changes.get("warmup_fraction") == own_warmup
        if other is not runs and same_warmup and _within_noise(study, other, runs):
            alike.append(factor(changes))
    if alike:
        notes.append(f"within the noise: {listed([f'{other:g}' for other in sorted(alike)])}")
    if own_warmup != of_whole.get("warmup_fraction"):
        notes.append(f"warm-up {own_warmup:.0%}")
    return "; ".join(notes)


def _tokens_and_time_rows(study: Outcome, reached: Reached | None, adamw: Runs) -> list[list[str]]:
    """What it takes with each optimizer to reach the final loss of AdamW alone.

    `reached` are the tokens that Muon needs; None if it does not reach that loss.
    """
    tokens = adamw[0]["tokens"]
    tokens_per_step = tokens / adamw[0]["changes"]["max_steps"]
    muon_speed = mean(study.speeds["muon"], "tokens_per_second")
    adamw_speed = mean(study.speeds["adamw"], "tokens_per_second")
    # So many tokens of Muon take as long as one per cent of AdamW's run.
    muon_tokens_per_percent_of_time = tokens * muon_speed / adamw_speed / 100

    def muon_needs(tokens_per_unit: float, digits: int, unit: str = "") -> str:
        """The tokens that Muon needs, in a unit of `tokens_per_unit` tokens."""
        if reached is None:
            return "not reached"
        number = reached.tokens / tokens_per_unit
        return f"{reached.bound}{number:.{digits}f}{unit}"

    return [
        ["tokens to AdamW's loss", muon_needs(1e6, 1, "M"), format_count(tokens)],
        ["steps", muon_needs(tokens_per_step, 0), f"{tokens / tokens_per_step:.0f}"],
        [
            "seconds of training at that speed",
            muon_needs(muon_speed, 0),
            f"{tokens / adamw_speed:.0f}",
        ],
        ["share of AdamW's tokens", muon_needs(tokens / 100, 0, "%"), "100%"],
        ["share of AdamW's time", muon_needs(muon_tokens_per_percent_of_time, 0, "%"), "100%"],
    ]


def _speed_and_memory_rows(study: Outcome) -> list[list[str]]:
    """Speed and memory with each optimizer, from the runs that measured speeds."""
    gpu = study.speeds["muon"][0]["machine"]["gpu"] or "the CPU"
    speed = [f"tokens/s, alone on {gpu}"]
    state_bytes = ["bytes a parameter, measured"]
    peak = ["peak memory of a run, GB"]
    for name in ("muon", "adamw"):
        runs = study.speeds[name]
        speed.append(value(runs, "tokens_per_second", 0))
        state_bytes.append(f"{runs[0]['state_bytes_per_parameter']:.1f}")
        peak.append(f"{mean(runs, 'peak_gb'):.1f}")
    return [speed, state_bytes, peak]


def _optimizer_summary(
    study: Outcome,
    muon: Runs,
    adamw: Runs,
    quarter: Groups,
    lengths: list[tuple[float, float]],
) -> str:
    """How Muon compares with AdamW alone, and what is left open.

    `muon` and `adamw` are the best runs, `quarter` those with a quarter of the batch, and `lengths`
    the (tokens, loss) of Muon's runs of several lengths.
    """
    rows = [("Muon's loss minus AdamW's", _verdict(study, muon, adamw))]
    if quarter:
        verdict = _verdict(study, quarter["muon"], quarter["adamw"])
        rows.append(("the same with 4 times as many steps", verdict))
    adamw_lr = adamw[0]["changes"]["adamw_lr"]
    losses_at_this_lr = []
    for runs in swept(study.runs, "muon"):
        if runs[0]["changes"]["adamw_lr"] == adamw_lr:
            losses_at_this_lr.append(runs[0]["val_loss"])
    if losses_at_this_lr:
        difference = min(losses_at_this_lr) - adamw[0]["val_loss"]
        label = f"the same with AdamW's rate {adamw_lr:g} beside Muon too"
        rows.append((label, f"{difference:+.3f} nats (one seed)"))
    interpolated_between = listed([format_count(tokens) for tokens, _ in lengths])
    rows.append(
        ("tokens of the runs that Muon's loss is interpolated between", interpolated_between)
    )
    rows.append(("less memory with Muon: weights, gradients and state", _bytes_saved(study)))
    rows.append(("less memory with Muon: peak of these runs", _peak_saved(study)))
    rows.append(("smallest difference that is decided", smallest_difference(study.runs)))
    return summary(rows)


def _verdict(study: Outcome, a: Runs, b: Runs) -> str:
    """The mean loss of `a` minus that of `b`, and whether the difference is significant."""
    difference = f"{mean(a) - mean(b):+.3f} nats"
    if min(len(a), len(b)) < 2:
        return f"{difference} (one seed so far)"
    if undecided(a, b, study.resolution):
        return f"{difference} (undecided)"
    return f"{difference} (decided)"


def _bytes_saved(study: Outcome) -> str:
    muon = study.speeds["muon"][0]["state_bytes_per_parameter"]
    adamw = study.speeds["adamw"][0]["state_bytes_per_parameter"]
    return f"{1 - muon / adamw:.0%}"


def _peak_saved(study: Outcome) -> str:
    muon = mean(study.speeds["muon"], "peak_gb")
    adamw = mean(study.speeds["adamw"], "peak_gb")
    return f"{1 - muon / adamw:.0%}"


# ---------------------------------------------------------------- routing


def routing(results: dict) -> str:
    """top-1 to top-4 at equal tokens and at equal FLOPs."""
    study = outcome(results)
    by_tokens = {}
    by_flops = {}
    for k in (1, 2, 3, 4):
        by_tokens[f"top-{k}"] = study.runs[f"top-{k}, equal tokens"]
        # Equal FLOPs are those of top-2, so it has no other runs for them.
        kind = "equal tokens" if k == 2 else "equal FLOPs"
        by_flops[f"top-{k}"] = study.runs[f"top-{k}, {kind}"]
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


def _routing_row(study: Outcome, name: str, by_tokens: Groups, by_flops: Groups) -> list[str]:
    row = [name]
    for found in (by_tokens, by_flops):
        row.append(value(found[name]))
        if name == "top-2":
            row.append("")
        else:
            row.append(against(found[name], found["top-2"], study.resolution))
    times_top_2 = _flops_per_token(by_tokens[name]) / _flops_per_token(by_tokens["top-2"])
    row.append(f"{times_top_2:.2f}x")
    row.append(value(study.speeds[name], "tokens_per_second", 0))
    return row


def _flops_per_token(runs: Runs) -> float:
    return runs[0]["flops"] / runs[0]["tokens"]


def _routing_summary(study: Outcome, by_tokens: Groups, by_flops: Groups) -> str:
    tokens = format_count(by_tokens["top-2"][0]["tokens"])
    more_tokens = by_flops["top-1"][0]["tokens"] / by_tokens["top-1"][0]["tokens"]
    gain = mean(by_flops["top-1"]) - mean(by_tokens["top-1"])
    # FLOPs are equal but for a part of a step, because runs consist of whole steps.
    flops = by_flops["top-2"][0]["flops"]
    deviations = [abs(runs[0]["flops"] / flops - 1) for runs in by_flops.values()]
    rows = [
        (f"lowest at equal tokens ({tokens})", "; ".join(lowest(by_tokens, study.resolution))),
        ("lowest at equal FLOPs", "; ".join(lowest(by_flops, study.resolution))),
        ("tokens of top-1 at equal FLOPs, times those at equal tokens", f"{more_tokens:.2f}"),
        ("what these tokens alone change in its loss", f"{gain:+.3f} nats"),
        ("largest difference of the equal FLOPs, for whole steps", f"{max(deviations):.1%}"),
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
        difference = ""
        if name != best:
            difference = against(runs, found[best], resolution)
        unevenness = f"{1 - mean(runs, 'load_entropy'):.2g}"
        rows.append([name, value(runs), difference, unevenness, value(runs, "worst_share")])
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
    results: dict, found: Groups, resolution: float, best: str, verdict: str
) -> str:
    """The ways of balancing with the lowest loss, and how even their experts' load is.

    `best` has the lowest loss, and `verdict` says against which others that is decided.
    """
    base = base_config(results)
    # Ways whose loss is as low as the lowest, as far as the seeds can tell
    as_low = []
    for name, runs in found.items():
        if name == best or undecided(runs, found[best], resolution):
            as_low.append(name)

    def largest_share(name: str) -> float:
        return mean(found[name], "worst_share")

    most_even = min(as_low, key=largest_share)
    least_even = max(as_low, key=largest_share)
    hsd_of_shares = tukey_hsd(found, "worst_share")
    as_even = []
    for name in as_low:
        if name == most_even:
            continue
        if undecided(found[name], found[most_even], hsd_of_shares, key="worst_share"):
            as_even.append(name)
    even = f"{most_even}: {value(found[most_even], 'worst_share')}"
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
    """Mutual information between experts and token kinds and domains, over training.

    The detailed table is of the first seed, for the layer that distinguishes kinds most.
    """
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
    """Each seed's mutual information at a step, mean over layers, as runs with the value `bits`.

    `step` is an index of the analyses' steps, `label` is "kind" or "domain", and `key` is "bits" or
    a baseline with shuffled labels.
    """
    found = []
    for analysis in analyses:
        by_layer = analysis["steps"][step][label][key]
        found.append(dict(bits=float(np.mean(by_layer))))
    return found


def _information_table(analyses: list[dict]) -> str:
    """A row for each checkpoint: mutual information with the labels and with shuffled ones."""
    rows = []
    for number, step in enumerate(analyses[0]["steps"]):
        row = [format_count(step["tokens"])]
        if step["step"] == 0:
            row = ["before training"]
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
    bits_of_kind = mean(_mean_bits(analyses, last, "kind", "bits"), "bits")
    possible = most_bits(first)
    rows = [
        ("held-out tokens", format_count(first["tokens"])),
        ("entropy of the kinds", f"{first['kind_entropy']:.2f} bits"),
        ("entropy of the domains", f"{first['domain_entropy']:.2f} bits"),
        ("what one of a token's experts can say at most", f"{possible:.2f} bits"),
    ]
    if possible:
        rows.append(("what it says of the kind, of that", f"{bits_of_kind / possible:.0%}"))
    if "others" in first["domains"]:
        index = first["domains"].index("others")
        share = first["domain_tokens"][index] / sum(first["domain_tokens"])
        rows.append(("tokens of packages without a name of their own", f"{share:.0%}"))
    rows.append(("layer that says most of the kind", where))
    return summary(rows)


def _experts_table(analysis: dict, layer: int, where: str) -> str:
    """A row for each expert of a layer, with the kinds that choose it, and its tokens.

    `where` names the layer in the header.
    """
    routed = np.array(analysis["kind_table"][layer], float)  # [experts, kinds] of routed tokens
    routed_by_kind = routed.sum(0).clip(1)  # clip: a kind without tokens has shares of 0, not NaN

    def two_largest(shares: np.ndarray) -> str:
        words = []
        for kind in np.argsort(-shares)[:2]:
            words.append(f"{analysis['kinds'][kind]} ({shares[kind]:.0%})")
        return listed(words)

    rows = []
    for expert, counts in enumerate(routed):
        share_of_kind = counts / routed_by_kind  # p(expert | kind)
        share_of_expert = counts / counts.sum().clip(1)  # p(kind | expert)
        tokens = analysis["top_tokens"][layer][expert][:SHOWN_TOKENS]
        rows.append(
            [
                str(expert + 1),
                two_largest(share_of_kind),
                two_largest(share_of_expert),
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
    """An upper bound of the mutual information between expert and token kind, mean over the layers.

    The mutual information is at most the entropy of the kinds. It is also at most the entropy of
    the experts less log2(k). A token has k experts and counts once for each, so that even if its
    kind says which k experts they are, it does not say which of the k is meant.
    """
    routed_tokens = np.sum(analysis["kind_table"][0])
    k = routed_tokens / max(1, sum(analysis["kind_tokens"]))
    bounds = []
    for counts in analysis["kind_table"]:
        load = np.sum(counts, axis=1) / np.sum(counts)  # share of each expert
        entropy_of_experts = -sum(p * math.log2(p) for p in load if p > 0)
        bounds.append(min(analysis["kind_entropy"], entropy_of_experts - math.log2(k)))
    return max(0.0, float(np.mean(bounds)))


# ---------------------------------------------------------------- scaling


@dataclass
class Size:
    """The groups of one size of the scaling study, and how its MoE and dense model compare."""

    name: str  # layers x width
    moe: Runs
    dense: Runs  # as many tokens as `moe`
    dense_equal_time: Runs | None  # as much time as `moe`; None if not run yet
    speed_ratios: Runs  # the MoE's speed over the dense one's, as runs with the value `ratio`
    at_equal_tokens: str  # the MoE's loss minus the dense one's, and whether that is undecided
    at_equal_time: str


def scaling(results: dict) -> str:
    """MoE against dense models of equal active parameters, at equal tokens and at equal time."""
    study = outcome(results)
    sizes = _sizes(study)
    law = _loss_law(of_kind(results, "dense"))
    deviation = _deviation_of_moe(study)
    tried = [run["flops_per_token"] for run in of_kind(results, "dense")]
    rows = []
    for size in sizes:
        dense_flops = UNKNOWN
        if law and deviation < math.inf:
            dense_flops = equal_loss_flops(law, size.moe, deviation, tried)
        rows.append(
            [
                size.name,
                format_count(size.moe[0]["active_params"]),
                format_count(size.moe[0]["total_params"]),
                value(size.dense),
                value(size.moe),
                size.at_equal_tokens,
                dense_flops,
                size.at_equal_time,
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
    return f"{table(header, rows)}\n\n{_scaling_summary(study, sizes)}"


def _sizes(study: Outcome) -> list[Size]:
    nats_of_speeds = equal_time(study.results).nats
    sizes = []
    for name in sizes_with_experts(study.runs):
        moe = study.runs[f"moe, {name}"]
        dense = study.runs[f"dense, {name}"]
        dense_equal_time = study.runs.get(f"dense, {name}{EQUAL_TIME}")
        at_equal_time = "not run yet"
        if dense_equal_time:
            at_equal_time = against(moe, dense_equal_time, study.resolution, nats_of_speeds)
        sizes.append(
            Size(
                name=name,
                moe=moe,
                dense=dense,
                dense_equal_time=dense_equal_time,
                speed_ratios=speed_ratios(
                    study.speeds[f"moe, {name}"], study.speeds[f"dense, {name}"]
                ),
                at_equal_tokens=against(moe, dense, study.resolution),
                at_equal_time=at_equal_time,
            )
        )
    return sizes


def _loss_law(runs: Runs) -> ScalingLaw | None:
    """The loss as a function of training FLOPs per token."""
    flops = [run["flops_per_token"] for run in runs]
    losses = [run["val_loss"] for run in runs]
    return scaling_law(flops, losses)


def _deviation_of_moe(study: Outcome) -> float:
    """The standard deviation of the MoE's losses over seeds."""
    moe = {name: runs for name, runs in study.runs.items() if name.startswith("moe, ")}
    return seed_deviation(moe)


def equal_loss_flops(law: ScalingLaw, runs: Runs, deviation: float, tried: list[float]) -> str:
    """The FLOPs per token with which a model that follows `law` reaches the mean loss of `runs`.

    They are written as a multiple of the FLOPs per token of `runs`, with a 95% interval. The
    interval comes from the errors of the law and the `deviation` of a loss over seeds. What lies
    outside of the FLOPs per token that were `tried` is not extrapolated: it is written as "> " or
    "< " the outermost one.
    """
    own = _flops_per_token(runs)
    loss = mean(runs)
    standard_error = deviation / math.sqrt(len(runs))
    low, high = law.inverse_between(loss, standard_error)

    def times(flops: float) -> str:
        if flops > max(tried):
            return f"> {max(tried) / own:.2f}"
        if flops < min(tried):
            return f"< {min(tried) / own:.2f}"
        return f"{flops / own:.2f}"

    if low > max(tried) or high < min(tried):
        return "beyond those tried"
    return f"{times(law.inverse(loss))} ({times(low)} to {times(high)})"


def _scaling_summary(study: Outcome, sizes: list[Size]) -> str:
    at_equal_tokens = [size.at_equal_tokens for size in sizes]
    at_equal_time = [size.at_equal_time for size in sizes]
    difference, half_interval = mean_difference([(size.moe, size.dense) for size in sizes])
    facts = [("the MoE's loss at equal tokens", _count_verdicts(at_equal_tokens))]
    if half_interval < math.inf:
        bounds = f"{difference:+.3f} ± {half_interval:.3f} nats (95% interval)"
        facts.append(("mean difference of all sizes at equal tokens", bounds))
    facts.append(("the MoE's loss at equal time", _count_verdicts(at_equal_time)))
    facts.append(("smallest difference that is decided", smallest_difference(study.runs)))
    facts += _equal_time_facts(study)
    for kind, label in (("dense", "dense model"), ("moe", "MoE")):
        law = _loss_law(of_kind(study.results, kind))
        facts.append((f"fit of the {label}: floor, exponent ± standard error", _law_words(law)))
    total_over_active = []
    for size in sizes:
        total_over_active.append(size.moe[0]["total_params"] / size.moe[0]["active_params"])
    times = span([f"{ratio:.1f}" for ratio in sorted(total_over_active)])
    facts.append(("parameters of the MoE, times those it uses", times))
    facts += _against_equal_parameters(study, sizes)
    return summary(facts)


def _equal_time_facts(study: Outcome) -> list[tuple[str, str]]:
    """How exact the comparison at equal time is; nothing if no speed was measured twice."""
    uncertainty = equal_time(study.results)
    resolution = typical_resolution(study.runs) + uncertainty.nats
    if resolution == math.inf:
        return []
    nats_of_10_percent = uncertainty.worth_of_time * math.log(1.1)
    return [
        ("the same at equal time", f"{resolution:.3f} nats"),
        ("error of the ratio of the speeds (95% interval)", f"{uncertainty.speed_error:.0%}"),
        ("worth of 10% more time, at most", f"{nats_of_10_percent:.2f} nats"),
    ]


def _count_verdicts(differences: list[str]) -> str:
    """At how many sizes the difference says that the MoE's loss is lower, higher or undecided.

    `differences` are those of `against`, or other words where a comparison has not been run.
    """
    counts = dict(lower=0, higher=0, undecided=0, unknown=0)
    for difference in differences:
        if "undecided" in difference:
            counts["undecided"] += 1
        elif difference.startswith("-"):
            counts["lower"] += 1
        elif difference.startswith("+"):
            counts["higher"] += 1
        else:
            counts["unknown"] += 1
    words = []
    for verdict, count in counts.items():
        if count:
            words.append(f"{verdict} at {count} of {len(differences)} sizes")
    return listed(words)


def _law_words(law: ScalingLaw | None) -> str:
    """Floor and exponent of a law, each ± its standard error."""
    if law is None:
        return "not determined by these losses"
    floor_error, _, exponent_error = law.errors
    return f"{law.floor:.2f} ± {floor_error:.2f}, {law.exponent:.2f} ± {exponent_error:.2f}"


def _against_equal_parameters(study: Outcome, sizes: list[Size]) -> list[tuple[str, str]]:
    """The MoE's loss minus that of a dense model with as many parameters in total.

    No such dense model was trained: its loss comes from a law that is fitted to the dense models.
    Sizes whose MoE has more parameters than any dense model are left out.
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
        difference = mean(size.moe) - law.at(total)
        error_of_mean = deviation / math.sqrt(len(size.moe))
        error = math.hypot(law.error_at(total), error_of_mean)
        label = f"MoE - dense of as many parameters in all, by its fit, {size.name}"
        rows.append((label, f"{difference:+.3f} ± {error:.3f} nats"))
    return rows


# ---------------------------------------------------------------- checkpointing


def checkpointing(results: dict) -> str:
    """Memory and time of each checkpointing mode, at the micro-batches that fit with all modes."""
    fitted, too_large = micro_batches(results)
    depths = {layers for layers, _ in fitted.keys() | too_large.keys()}
    rows: list[list[str]] = []
    for layers in sorted(depths):
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
    """The rows of one depth. `fitted` and `too_large` are those of analysis.micro_batches."""
    runs_of = {mode: fitted.get((layers, mode), {}) for mode in MODES}
    largest = {}
    for mode in MODES:
        most = max(runs_of[mode], default=0)
        largest[mode] = f"at least {most}"
        if (layers, mode) in too_large:
            largest[mode] = f"{most}, not {too_large[layers, mode]}"

    fit_with_all = set.intersection(*(set(runs_at) for runs_at in runs_of.values()))
    if not fit_with_all:
        unknown = [UNKNOWN] * 5
        return [[str(layers), mode, *unknown, largest[mode]] for mode in MODES]
    rows = []
    for batch in sorted(fit_with_all):
        without = runs_of["none"][batch]
        for mode in MODES:
            runs = runs_of[mode][batch]
            more_time = ""
            if mode != "none":
                more_time = _more_time(without, runs)
            rows.append(
                [
                    str(layers),
                    mode,
                    str(batch),
                    f"{mean(runs, 'peak_gb'):.1f}",
                    _activations_saved(without, runs),
                    value(runs, "tokens_per_second", 0),
                    more_time,
                    largest[mode],
                ]
            )
    return rows


def _activations_saved(without: Runs, runs: Runs) -> str:
    """The share of the activation memory that checkpointing saves; unknown on a CPU.

    `without` are runs without checkpointing. Both seeds take the same memory, so the first counts.
    """
    gb_without = without[0]["memory_gb"].get("activations")
    gb = runs[0]["memory_gb"].get("activations")
    if gb is None or not gb_without:
        return UNKNOWN
    return f"{1 - gb / gb_without:.0%}"


def _more_time(without: Runs, runs: Runs) -> str:
    """How much longer a token takes than without checkpointing, in per cent."""
    times = speed_ratios(without, runs)  # the time of a token over that without checkpointing
    average, spread = mean_and_spread(times, "ratio")
    percent = f"{round(100 * (average - 1)):+d}%"
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
        difference = ""
        if best and name != best:
            difference = against(runs, study.runs[best], study.resolution)
        tokens = format_count(runs[0]["tokens"])
        rows.append([name, value(runs), difference, tokens, _speed(study, name)])
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
    """The first sentence of a study's docstring; the study's name if it has none."""
    text = getattr(STUDIES.get(name), "__doc__", None) or name
    one_line = " ".join(text.split())
    # Up to the first full stop or question mark that a space or the end follows
    return re.match(r".*?(?:[.?](?= |$)|$)", one_line)[0]


def block(name: str, folder: Path) -> str:
    """The tables of the study in `folder`, or the command that runs or continues it."""
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
    """The function that makes the tables of a study, by the name in the study's mark."""
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
