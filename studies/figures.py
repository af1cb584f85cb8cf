"""One figure for each study, from its results.

Points are single runs, and lines go through their means, so that the spread over seeds shows.
A study without a function in PANELS gets a list of its groups with their losses.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from config import ExperimentError
from plot import BLUE, GREEN, ORANGE, PINK, RED, SKY, write_figure
from studies.analysis import (
    SPEED,
    Groups,
    Runs,
    base_config,
    best_runs,
    divergence_from_average,
    equal_time,
    expert_shares,
    groups,
    mean,
    micro_batches,
    of_kind,
    scaling_law,
    sharpest_layer,
    shorter,
    sizes_with_experts,
    swept,
    timed,
    typical_resolution,
)
from studies.grids import ADAMW_RATES, EQUAL_TIME, LONG_WARMUPS, QUARTER, WEIGHTS

LOSS = "validation loss (nats per token)"
# Colour and marker of each mode of activation checkpointing
MODE_STYLES = dict(none=(BLUE, "o"), selective=(GREEN, "^"), full=(ORANGE, "s"))
# Label, colour and marker of each kind of model in the scaling study
DENSE_AND_MOE = dict(dense=("dense", ORANGE, "s"), moe=("top-2 of 8", BLUE, "o"))


def draw(results: dict, path: Path) -> None:
    """Draws the study's figure into a PNG.

    Raises ExperimentError when it cannot be written, or when a group that it needs has failed.
    """
    failed = _missing_groups(results)
    if failed:
        raise ExperimentError(
            f"the study has no answer, as {', '.join(sorted(failed))} diverged or did not fit: "
            "begin it anew with lower rates or a smaller base, and another --out"
        )
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(8, 3.4), dpi=160, layout=layout)
    draw_panels = PANELS.get(results["study"], _losses)
    draw_panels(figure, results)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        _add_legend(axes)
    write_figure(figure, path)


def _add_legend(axes: Axes) -> None:
    """Adds a legend if the axes have labels, in a smaller font if they have many."""
    _, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    fontsize = 8
    if len(labels) > 4:
        fontsize = 7
    axes.legend(frameon=False, fontsize=fontsize)


def _missing_groups(results: dict) -> set[str]:
    """The failed groups without which the study has no answer; empty if it has one."""
    failed_runs = []
    finished = set()  # groups of which at least one run finished
    for run in results["runs"].values():
        if "failed" in run:
            failed_runs.append(run)
        else:
            finished.add(run["group"])
    failed = {run["group"] for run in failed_runs}
    without_result = failed - finished  # groups of which no run finished

    study = results["study"]
    if study in ("routing", "scaling"):
        # All groups are needed. A speed needs both of its measurements.
        failed_speeds = {group for group in failed if group.startswith(SPEED)}
        return without_result | failed_speeds
    if study == "checkpointing":
        # That a run does not fit is a result. That it diverged is not.
        return {run["group"] for run in failed_runs if run["failed"] == "diverged"}
    if study == "optimizer":
        # A learning rate of a sweep may diverge, as long as others of its optimizer do not.
        speed_failed = any(group.startswith(SPEED) for group in without_result)
        muon_finished = _any_of(finished, "muon")
        adamw_finished = _any_of(finished, "adamw")
        if muon_finished and adamw_finished and not speed_failed:
            return set()
        return without_result
    # In the other studies a group may fail, as long as one finishes.
    if finished:
        return set()
    return without_result


def _any_of(groups: set[str], optimizer: str) -> bool:
    """Whether one of the groups is of the optimizer."""
    return any(group.startswith(f"{optimizer}, ") for group in groups)


# ---------------------------------------------------------------- what panels share


def _scatter(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    colour: str,
    marker: str = "o",
    label: str | None = None,
    size: float = 4.5,
) -> None:
    """Single runs as points."""
    axes.plot(
        x,
        y,
        marker,
        color=colour,
        markersize=size,
        alpha=0.8,
        label=label,
    )


def _points(
    axes: Axes,
    runs_at: Mapping[Any, Runs],
    key: str,
    label: str | None,
    colour: str,
    marker: str = "o",
) -> None:
    """Single runs as points, and a line through their means.

    `runs_at` has the runs by x; `key` names their value. An x without runs, or with runs that have
    no such value, is left out.
    """
    x_of_means = []
    means = []
    x_of_runs = []
    values = []
    for x, runs in runs_at.items():
        if not runs or runs[0].get(key) is None:
            continue
        x_of_means.append(x)
        means.append(mean(runs, key))
        for run in runs:
            x_of_runs.append(x)
            values.append(run[key])
    if x_of_means:
        axes.plot(x_of_means, means, color=colour, linewidth=1.2)
        _scatter(axes, x_of_runs, values, colour, marker, label)


def _shade(span: Callable, low: float, high: float, label: str) -> None:
    """Shades the interval from `low` to `high`; `span` is axhspan or axvspan of the axes."""
    span(low, high, color="0.93", linewidth=0, zorder=0, label=label)


def _shade_undecided_from_lowest(span: Callable, found: Groups, label: str) -> None:
    """Shades the means that do not differ significantly from the lowest mean."""
    resolution = typical_resolution(found)
    if resolution == math.inf:
        return
    lowest = min(mean(runs) for runs in found.values())
    _shade(span, lowest, lowest + resolution, label)


def _grid(axes: Axes) -> None:
    """Light grid lines behind the points."""
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)


def _room_above(axes: Axes, share: float) -> None:
    """Makes room for the legend: `share` of the present height is added at the top."""
    low, high = axes.get_ylim()
    height = high - low
    axes.set_ylim(low, high + share * height)


def _without_legend(several: Sequence[Axes]) -> None:
    """Removes the labels of panels whose lines are named in the legend of another panel."""
    for axes in several:
        for line in axes.lines:
            line.set_label(None)


# ---------------------------------------------------------------- a study without its own figure


def _losses(figure: Figure, results: dict) -> None:
    """A row for each group with its losses, or with its speeds if the study has only speeds."""
    axes = figure.subplots()
    found = groups(results)
    if found:
        key = "val_loss"
        axes.set_xlabel(LOSS)
    else:
        found = timed(results)
        key = "tokens_per_second"
        axes.set_xlabel("tokens/s")

    for row, runs in enumerate(found.values()):
        values = [run[key] for run in runs]
        rows = [row] * len(runs)
        _scatter(axes, values, rows, BLUE)
        axes.plot(mean(runs, key), row, "|", color=BLUE, markersize=14)
    if key == "val_loss":
        label = "means not told from the lowest"
        _shade_undecided_from_lowest(axes.axvspan, found, label)
    num_rows = len(found)
    axes.set_yticks(range(num_rows), list(found))
    axes.set_ylim(num_rows - 0.5, -0.5)  # the first row at the top
    figure.set_size_inches(8, 1.2 + 0.3 * num_rows)
    _grid(axes)


# ---------------------------------------------------------------- optimizer


def _optimizer(figure: Figure, results: dict) -> None:
    rates, curves = figure.subplots(1, 2)
    _draw_sweeps(rates, results)
    _draw_best_curves(curves, groups(results))
    for axes in (rates, curves):
        _grid(axes)


def _draw_sweeps(axes: Axes, results: dict) -> None:
    """Final loss over the peak learning rate that a sweep varied."""
    found = groups(results)
    sweeps = swept(found, "muon") + swept(found, "adamw")
    _draw_adamw_sweeps(axes, sweeps, base_config(results).warmup_fraction)

    adamw_lr = ADAMW_RATES[1]  # that of AdamW beside Muon while Muon's is swept
    same = dict(optimizer="muon", adamw_lr=adamw_lr)
    runs_at = _by_rate(sweeps, "muon_lr", same)
    label = f"Muon's rate, its AdamW's {adamw_lr:g}"
    _points(axes, runs_at, "val_loss", label, BLUE, "o")

    best_changes = best_runs(found, "muon")[0]["changes"]
    best_muon_lr = best_changes["muon_lr"]
    same = dict(optimizer="muon", muon_lr=best_muon_lr)
    runs_at = _by_rate(sweeps, "adamw_lr", same)
    label = f"its AdamW's rate, Muon's {best_muon_lr:g}"
    _points(axes, runs_at, "val_loss", label, GREEN, "^")

    axes.set(
        xscale="log",
        xlabel="peak learning rate",
        ylabel="final loss (nats per token)",
    )
    every_second = _rates_tried(sweeps)[::2]  # labels of all rates would overlap
    names = [f"{rate:g}" for rate in every_second]
    axes.set_xticks(every_second, names, fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    losses = []
    for runs in sweeps:
        losses += [run["val_loss"] for run in runs]
    highest = max(losses)
    room_for_legend = 0.6 * (highest - min(losses))
    axes.set_ylim(top=highest + room_for_legend)


def _draw_adamw_sweeps(axes: Axes, sweeps: list[Runs], base_warmup: float) -> None:
    """A line for each warm-up that AdamW alone was tried with, `base_warmup` first."""
    styles = [(ORANGE, "s"), (RED, "D"), (PINK, "v"), (SKY, "P")]
    warmups = [None, *LONG_WARMUPS]  # None: these groups do not change the base's warm-up
    for warmup, (colour, marker) in zip(warmups, styles):
        same = dict(optimizer="adamw", warmup_fraction=warmup)
        runs_at = _by_rate(sweeps, "adamw_lr", same)
        shown = warmup
        if warmup is None:
            shown = base_warmup
        label = f"AdamW alone, warm-up {shown:.0%}"
        _points(axes, runs_at, "val_loss", label, colour, marker)


def _by_rate(sweeps: list[Runs], field: str, same: dict) -> dict[float, Runs]:
    """The groups that have the changes `same`, by their learning rate `field`, ascending.

    A value of None in `same` stands for a field that the groups do not change.
    """
    runs_at = {}
    for runs in sweeps:
        changes = runs[0]["changes"]
        belongs = all(changes.get(key) == value for key, value in same.items())
        if belongs:
            runs_at[changes[field]] = runs
    return dict(sorted(runs_at.items()))


def _rates_tried(sweeps: list[Runs]) -> list[float]:
    """All learning rates of the sweeps, of either optimizer, ascending."""
    tried = set()
    for runs in sweeps:
        for field in ("muon_lr", "adamw_lr"):
            rate = runs[0]["changes"].get(field)
            if rate:
                tried.add(rate)
    return sorted(tried)


def _draw_best_curves(axes: Axes, found: Groups) -> None:
    """Validation losses over tokens at the best learning rates.

    The final losses of Muon's shorter runs, and of the runs with a quarter of the batch, are drawn
    as points.
    """
    for name, label, colour in (
        ("muon", "Muon with AdamW", BLUE),
        ("adamw", "AdamW alone", ORANGE),
    ):
        label_once = f"{label}, best rates"
        for run in best_runs(found, name):
            tokens, losses = np.array(run["validation"]).T
            axes.plot(
                tokens,
                losses,
                color=colour,
                linewidth=1.1,
                label=label_once,
            )
            label_once = None  # the legend names the first seed only
    target = mean(best_runs(found, "adamw"))
    axes.axhline(
        target,
        color="0.5",
        linewidth=0.8,
        linestyle="--",
        label="where AdamW alone ends",
    )
    if shorter(found):
        _draw_shorter_runs(axes, found)
    _draw_smaller_steps(axes, found)

    losses = []
    for runs in found.values():
        losses += [run["val_loss"] for run in runs]
    lowest = min(losses)
    # The curves begin far above their ends: most of that is cut off, so that the ends show.
    shown_above_target = 2.5 * max(0.4, target - lowest)
    axes.set(
        xlabel="tokens",
        ylabel=LOSS,
        ylim=(lowest - 0.1, target + shown_above_target),
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_shorter_runs(axes: Axes, found: Groups) -> None:
    """The ends of Muon's runs of fewer tokens, and the line through the means of all lengths.

    The report reads from this line how many tokens Muon needs for the loss of AdamW. The loss on it
    is linear in the logarithm of the tokens.
    """
    for runs in shorter(found):
        _draw_ends(axes, runs, BLUE, "o", alpha=0.8, markersize=4.5)
    of_all_lengths = [*shorter(found), best_runs(found, "muon")]
    lengths = [runs[0]["tokens"] for runs in of_all_lengths]
    means = [mean(runs) for runs in of_all_lengths]
    between = np.geomspace(lengths[0], lengths[-1], 50)
    losses = np.interp(np.log(between), np.log(lengths), means)
    axes.plot(between, losses, ":", color=BLUE, linewidth=1)
    # An empty line, which the legend shows with both the dots and the line.
    axes.plot(
        [],
        [],
        ":o",
        color=BLUE,
        linewidth=1,
        markersize=4.5,
        label="Muon, shorter runs' ends",
    )


def _draw_smaller_steps(axes: Axes, found: Groups) -> None:
    """The ends of the runs with a quarter of the batch, at their best learning rates."""
    drawn = False
    for name, colour in (("muon", BLUE), ("adamw", ORANGE)):
        if not swept(found, QUARTER + name):
            continue
        runs = best_runs(found, QUARTER + name)
        _draw_ends(axes, runs, colour, "x", markersize=5)
        drawn = True
    if drawn:
        # An empty line gives both optimizers one row of the legend.
        axes.plot(
            [],
            [],
            "x",
            color="0.4",
            markersize=5,
            label="either's end in 4 times the steps",
        )


def _draw_ends(axes: Axes, runs: Runs, colour: str, marker: str, **style) -> None:
    """The final loss of each run over its tokens."""
    tokens = [run["tokens"] for run in runs]
    losses = [run["val_loss"] for run in runs]
    axes.plot(tokens, losses, marker, color=colour, **style)


# ---------------------------------------------------------------- routing


def _routing(figure: Figure, results: dict) -> None:
    loss, speed = figure.subplots(1, 2)
    found = groups(results)
    top_ks = (1, 2, 3, 4)
    for kind, colour, marker in (
        ("equal tokens", BLUE, "o"),
        ("equal FLOPs", ORANGE, "s"),
    ):
        runs_at = {k: found.get(f"top-{k}, {kind}", []) for k in top_ks}
        # Equal FLOPs are those of top-2, so its runs at equal tokens stand in both lines.
        runs_at[2] = found.get("top-2, equal tokens", [])
        _points(loss, runs_at, "val_loss", kind, colour, marker)
    loss.set(
        xlabel="experts a token, of 8",
        ylabel=LOSS,
        xticks=top_ks,
    )
    resolution = typical_resolution(found)
    if resolution < math.inf:
        _draw_resolution(loss, resolution)

    speeds = timed(results)
    speed_at = {k: speeds[f"top-{k}"] for k in top_ks}
    _points(speed, speed_at, "tokens_per_second", None, GREEN)
    speed.set(
        xlabel="experts a token, of 8",
        ylabel="tokens/s",
        xticks=top_ks,
    )
    speed.set_ylim(0, 1.08 * speed.dataLim.ymax)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss, speed):
        _grid(axes)


def _draw_resolution(axes: Axes, resolution: float) -> None:
    """A bar as long as the smallest significant difference.

    It stands at the lower right, where no run is: at equal FLOPs, more experts end higher.
    """
    low, high = axes.get_ylim()
    foot = low + 0.02 * (high - low)
    half_length = resolution / 2
    middle = foot + half_length
    axes.errorbar(3.6, middle, half_length, color="0.4", capsize=3)
    axes.text(
        3.5,
        middle,
        "a smaller difference\nis undecided",
        fontsize=7,
        color="0.4",
        ha="right",
        va="center",
    )


# ---------------------------------------------------------------- balance


def _balance(figure: Figure, results: dict) -> None:
    found = {name: _with_unevenness(runs) for name, runs in groups(results).items()}
    loss, unevenness, share = figure.subplots(1, 3)
    _draw_balancing(loss, found, "val_loss", LOSS)
    _draw_balancing(unevenness, found, "unevenness", "1 - load entropy (0: even)")
    _draw_balancing(share, found, "worst_share", "largest share of an expert")

    figure.set_size_inches(9, 3.3)
    _shade_undecided_from_lowest(loss.axhspan, found, "not told from the lowest")
    _room_above(loss, 0.45)
    unevenness.set_yscale("log")
    even_share = 1 / base_config(results).num_experts
    share.axhline(even_share, color="0.5", linewidth=0.8, linestyle="--")
    share.text(
        0,
        even_share,
        "even",
        fontsize=8,
        color="0.4",
        va="bottom",
    )
    _without_legend([unevenness, share])


def _with_unevenness(runs: Runs) -> Runs:
    """The runs with one more value, `unevenness`: how far the load entropy is from that of even.

    load_entropy is near 1, so its distance from 1 is what a logarithmic axis can show.
    """
    wider = []
    for run in runs:
        unevenness = 1 - run["load_entropy"]
        wider.append(run | dict(unevenness=unevenness))
    return wider


def _draw_balancing(axes: Axes, found: Groups, key: str, label: str) -> None:
    """The value `key` over the weight of the load-balancing loss.

    x is 0 for no balancing, then 1, 2, ... for the weights, and one more for balancing by a bias.
    """
    for scope, colour, marker in (
        ("batch", BLUE, "o"),
        ("sequence", ORANGE, "s"),
    ):
        runs_at = {}
        for x, weight in enumerate(WEIGHTS, 1):
            runs_at[x] = found.get(f"{scope}, weight {weight:g}", [])
        _points(axes, runs_at, key, f"loss, scope {scope}", colour, marker)
    x_of_bias = len(WEIGHTS) + 1
    for name, x, words, colour, marker in (
        ("none", 0, "no balancing", RED, "v"),
        ("bias", x_of_bias, "bias instead of a loss", GREEN, "D"),
    ):
        values = [run[key] for run in found.get(name, [])]
        all_at_x = [x] * len(values)
        _scatter(
            axes,
            all_at_x,
            values,
            colour,
            marker,
            words,
            size=5,
        )

    axes.set(xlabel="weight of the balancing loss", ylabel=label)
    names = ["none"]
    for weight in WEIGHTS:
        exponent = round(math.log10(weight))
        names.append(f"$10^{{{exponent}}}$")  # such as $10^{-4}$, which matplotlib typesets
    names.append("bias")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    _grid(axes)


# ---------------------------------------------------------------- scaling


def _scaling(figure: Figure, results: dict) -> None:
    by_flops, by_parameters, differences = figure.subplots(1, 3)
    _draw_laws(by_flops, results, "flops_per_token", "training FLOPs of a token")
    _draw_laws(by_parameters, results, "total_params", "all parameters")
    _draw_differences(differences, results)
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
        _grid(axes)
    figure.set_size_inches(9.5, 3.5)


def _draw_laws(axes: Axes, results: dict, key: str, label: str) -> None:
    """The losses of dense and of MoE models over a measure of their size, with fitted laws."""
    for kind, (name, colour, marker) in DENSE_AND_MOE.items():
        runs = of_kind(results, kind)
        sizes = [run[key] for run in runs]
        losses = [run["val_loss"] for run in runs]
        _scatter(axes, sizes, losses, colour, marker, name)
        law = scaling_law(sizes, losses)
        if law:
            line = np.geomspace(min(sizes), max(sizes), 50)
            axes.plot(line, law.at(line), color=colour, linewidth=1.2)
    axes.set(xscale="log", xlabel=label, ylabel=LOSS)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_differences(axes: Axes, results: dict) -> None:
    """How much the MoE model ends above the dense one of the same size, by size."""
    found = groups(results)
    sizes = sizes_with_experts(found)
    resolution = typical_resolution(found)

    label_of_time = "equal time"
    resolution_at_equal_time = resolution + equal_time(results).nats
    if resolution_at_equal_time < math.inf:
        label_of_time += f" (undecided to ±{resolution_at_equal_time:.2f})"
    # Both comparisons stand side by side, a little to the left and to the right of their size.
    for shift, ending, label, colour, marker in (
        (-0.08, "", "equal tokens and FLOPs", BLUE, "o"),
        (0.08, EQUAL_TIME, label_of_time, GREEN, "^"),
    ):
        x = []
        y = []
        for number, size in enumerate(sizes):
            moe = found[f"moe, {size}"]
            dense = found.get(f"dense, {size}{ending}", [])
            differences = _differences_by_seed(moe, dense)
            x += [number + shift] * len(differences)
            y += differences
        _scatter(
            axes,
            x,
            y,
            colour,
            marker,
            label,
            size=5,
        )

    axes.axhline(0, color="0.4", linewidth=0.8)
    if resolution < math.inf:
        label = "means undecided at equal tokens"
        _shade(axes.axhspan, -resolution, resolution, label)
    names = [size.replace(" x ", "\n× ") for size in sizes]
    axes.set_xticks(range(len(sizes)), names)
    _room_above(axes, 0.55)
    axes.set(xlabel="layers × width", ylabel="loss of the MoE - dense (nats)")


def _differences_by_seed(a: Runs, b: Runs) -> list[float]:
    """The loss of each run of `a` minus that of the run of `b` with its seed."""
    differences = []
    for run in a:
        seed = run["changes"]["seed"]
        for other in b:
            if other["changes"]["seed"] == seed:
                differences.append(run["val_loss"] - other["val_loss"])
    return differences


# ---------------------------------------------------------------- checkpointing


def _checkpointing(figure: Figure, results: dict) -> None:
    """A row for each number of layers: peak memory and speed, over the micro-batch."""
    fitted = micro_batches(results).fitted
    depths = sorted({layers for layers, _ in fitted})
    batches = set()
    for runs_at in fitted.values():
        batches |= runs_at.keys()
    smallest = min(batches)
    x_limits = (0.8 * smallest, 1.25 * max(batches))  # the same in all rows
    rows = figure.subplots(len(depths), 2, squeeze=False)
    for (memory, speed), depth in zip(rows, depths):
        by_mode = {}
        for mode in MODE_STYLES:
            by_mode[mode] = fitted.get((depth, mode), {})
        ticks = _marked_batches(list(by_mode.values()), smallest)
        names = [str(batch) for batch in ticks]
        _draw_modes(memory, by_mode, "peak_gb", f"{depth} layers: peak memory (GB)")
        _draw_modes(speed, by_mode, "tokens_per_second", f"{depth} layers: tokens/s")
        speed.yaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in (memory, speed):
            axes.set_xlim(x_limits)
            axes.set_xticks(ticks, names)
            axes.xaxis.set_minor_locator(NullLocator())
    for axes in figure.axes[-2:]:  # the lowest row
        axes.set_xlabel("sequences in a micro-batch")
    _without_legend(figure.axes[1:])
    figure.set_size_inches(8, 2.8 * len(depths))


def _draw_modes(axes: Axes, by_mode: dict[str, dict[int, Runs]], key: str, label: str) -> None:
    """The value `key` over the micro-batch, a line for each mode."""
    for mode, runs_at in by_mode.items():
        colour, marker = MODE_STYLES[mode]
        ascending = dict(sorted(runs_at.items()))
        _points(axes, ascending, key, mode, colour, marker)
    axes.set(xscale="log", ylabel=label)
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    _grid(axes)


def _marked_batches(of_modes: list[dict[int, Runs]], smallest: int) -> list[int]:
    """The micro-batches that the axis names, ascending. `of_modes` has each mode's runs by them.

    The modes are compared at the smallest and at the largest micro-batch that fit with all of them,
    so both are named; `smallest` is named if none fits with all. The largest micro-batch that fits
    with any mode is named too.
    """
    fitting = [set(runs_at) for runs_at in of_modes]
    with_all = set.intersection(*fitting)
    with_any = set.union(*fitting)
    if not with_all:
        with_all = {smallest}
    return sorted({min(with_all), max(with_all), max(with_any)})


# ---------------------------------------------------------------- specialization


def _specialization(figure: Figure, results: dict) -> None:
    figure.set_size_inches(9, 8.4)
    (by_layer, by_kind), (kinds, domains) = figure.subplots(2, 2)
    analyses = []
    for runs in groups(results).values():
        analyses += [run["experts"] for run in runs]
    _draw_information_by_layer(by_layer, analyses)
    _draw_information_by_kind(by_kind, analyses[0])
    _draw_experts_of(kinds, analyses[0], "kind")
    _draw_experts_of(domains, analyses[0], "domain")


def _draw_information_by_layer(axes: Axes, analyses: list[dict]) -> None:
    """Mutual information between expert and token kind over the layer, a line for each checkpoint.

    `analyses` has one analysis for each seed; all but the first are dotted.
    """
    first = analyses[0]
    other_seeds = analyses[1:]
    layers = np.array(first["layers"]) + 1
    last = len(first["steps"]) - 1
    colour_map = colormaps["viridis"]
    for number, step in enumerate(first["steps"]):
        colour = colour_map(0.9 * number / last)  # the map's last tenth is too light
        bits = step["kind"]["bits"]
        axes.plot(
            layers,
            bits,
            color=colour,
            linewidth=1.1,
            label=_moment(step),
        )
        for other in other_seeds:
            bits = other["steps"][number]["kind"]["bits"]
            axes.plot(layers, bits, ":", color=colour, linewidth=1.1)
    chance = first["steps"][last]["kind"]["shuffled_most"]
    axes.plot(
        layers,
        chance,
        "--",
        color="0.4",
        linewidth=1,
        label="shuffled kinds",
    )

    most_bits = 0.0
    for analysis in analyses:
        for step in analysis["steps"]:
            most_bits = max(most_bits, *step["kind"]["bits"])
    title = "By layer"
    if other_seeds:
        title += " (dotted: the second seed)"
    axes.set(
        xlabel="layer",
        ylabel="bits that the expert says of the kind",
        title=title,
    )
    axes.set_ylim(0, 1.6 * most_bits)  # with room for the legend
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _grid(axes)


def _moment(step: dict) -> str:
    """When a checkpoint was written, for the legend."""
    if step["step"] == 0:
        return "before training"
    tokens = EngFormatter(sep="", places=0)(step["tokens"])
    return f"{tokens} tokens"


def _draw_information_by_kind(axes: Axes, experts: dict) -> None:
    """How much the experts of each token kind differ from those of all tokens, by layer."""
    occurring = _occurring(experts["kind_tokens"])
    by_layer = []
    for counts in experts["kind_table"]:
        divergences = divergence_from_average(counts)
        by_layer.append(divergences[occurring])
    bits = np.array(by_layer).T  # [kinds, layers]
    image = axes.imshow(bits, cmap="cividis", vmin=0, aspect="auto")
    names = [experts["kinds"][kind] for kind in occurring]
    layers = [layer + 1 for layer in experts["layers"]]
    _label_map(axes, image, names, layers, "bits that the kind says of the expert")
    axes.set(xlabel="layer", title="By kind of token")


def _draw_experts_of(axes: Axes, experts: dict, label: str) -> None:
    """Where the tokens of each kind or domain go, in the layer that distinguishes them most.

    A cell shows p(expert | label) in per cent. Its colour shows how many times p(expert) that is,
    from a quarter to four times. `label` is "kind" or "domain".
    """
    layer = sharpest_layer(experts, label)
    counts = np.array(experts[f"{label}_table"][layer], float)  # [experts, labels]
    occurring = _occurring(experts[f"{label}_tokens"])
    share = expert_shares(counts)[occurring]  # [labels that occur, experts]
    share_of_all_tokens = counts.sum(1) / counts.sum()  # [experts]
    with np.errstate(divide="ignore"):  # a share of 0 gives -inf, which clip makes -2
        doublings = np.log2(share / share_of_all_tokens).clip(-2, 2)
    image = axes.imshow(
        doublings,
        cmap="RdBu_r",
        vmin=-2,
        vmax=2,
        aspect="auto",
    )
    _write_percentages(axes, share, doublings)
    names = [experts[f"{label}s"][index] for index in occurring]
    num_experts = share.shape[1]
    numbers = range(1, num_experts + 1)
    bar = _label_map(axes, image, names, numbers, "times the expert's share of all choices")
    bar.set_ticks(range(-2, 3), labels=["≤ ¼", "½", "1", "2", "≥ 4"])  # 2 to the power of each
    layer_number = experts["layers"][layer] + 1
    axes.set(
        xlabel="expert (in the cells: % of the row)",
        title=f"{label.capitalize()}s in layer {layer_number}",
    )


def _write_percentages(axes: Axes, share: np.ndarray, doublings: np.ndarray) -> None:
    """Writes each share into its cell of the heat map, whose colours are `doublings`."""
    for (row, column), part in np.ndenumerate(share):
        # The colours at both ends of the map are dark.
        colour = "black"
        if abs(doublings[row, column]) > 1.4:
            colour = "white"
        axes.text(
            column,
            row,
            f"{100 * part:.0f}",
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
        )


def _occurring(tokens: list[int]) -> list[int]:
    """The indices of the labels that some token has."""
    return [label for label, number in enumerate(tokens) if number]


def _label_map(axes: Axes, image, rows: Sequence[str], columns: Sequence[int], label: str):
    """Names the rows and columns of a heat map, and adds its colour bar, which is returned.

    `image` is what imshow returned; `label` says what the colours mean.
    """
    column_names = [str(column) for column in columns]
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(column_names)), column_names, fontsize=8)
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(image, ax=axes, label=label, fraction=0.06, pad=0.02)
    bar.outline.set_visible(False)
    return bar


PANELS = dict(
    optimizer=_optimizer,
    routing=_routing,
    balance=_balance,
    specialization=_specialization,
    scaling=_scaling,
    checkpointing=_checkpointing,
)
