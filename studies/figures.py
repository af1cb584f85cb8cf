"""One figure for each study. Points are single runs and lines go through their means, so that the spread of the seeds shows."""

import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from config import ExperimentError
from plot import BLUE, GREEN, ORANGE, PINK, RED, SKY, write_figure
from studies.analysis import (
    SPEED,
    base_config,
    best_runs,
    equal_time,
    groups,
    mean_and_spread,
    micro_batches,
    of_kind,
    scaling_law,
    sharpest_layer,
    shorter,
    swept,
    timed,
    typical_resolution,
)
from studies.grids import ADAMW_RATES, EQUAL_TIME, LONG_WARMUPS, QUARTER, WEIGHTS

LOSS = "validation loss (nats per token)"
MODES = dict(none=(BLUE, "o"), selective=(GREEN, "^"), full=(ORANGE, "s"))
DENSE_AND_MOE = dict(dense=("dense", ORANGE, "s"), moe=("top-2 of 8", BLUE, "o"))


def _lost(results: dict) -> set[str]:
    """The groups that failed, when what is left is no answer."""
    runs = results["runs"].values()
    left = {run["group"] for run in runs if "failed" not in run}
    failed = {run["group"] for run in runs} - left
    if results["study"] in ("routing", "scaling"):
        return failed | {
            run["group"] for run in runs if "failed" in run and run["group"].startswith(SPEED)
        }  # one of its repeats
    if results["study"] == "checkpointing":
        return {
            run["group"] for run in runs if run.get("failed") == "diverged"
        }  # what does not fit is a result
    if results["study"] == "optimizer" and failed:
        needed = [group.startswith(SPEED) for group in failed] + [
            not any(group.startswith(f"{name}, ") for group in left) for name in ("muon", "adamw")
        ]
        return failed if any(needed) else set()
    return failed if not left else set()


def draw(results: dict, path: Path) -> None:
    """Draws the study's figure into a PNG. Raises ExperimentError when it cannot be written, or when what it needs has diverged."""
    if lost := _lost(results):
        raise ExperimentError(
            f"the study has no answer, as {', '.join(sorted(lost))} diverged or did not fit: begin it anew with lower rates or "
            "a smaller base, and another --out"
        )
    figure = Figure(figsize=(8, 3.4), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    PANELS.get(results["study"], _losses)(figure, results)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                frameon=False, fontsize=7 if len(axes.get_legend_handles_labels()[0]) > 4 else 8
            )
    write_figure(figure, path)


def _points(
    axes,
    named: dict[float, list[dict]],
    key: str,
    label: str | None,
    colour: str,
    marker: str = "o",
) -> None:
    """Single runs as points and a line through their means, over the named x values."""
    named = {x: runs for x, runs in named.items() if runs and runs[0].get(key) is not None}
    if not named:
        return
    axes.plot(
        list(named),
        [mean_and_spread(runs, key)[0] for runs in named.values()],
        color=colour,
        linewidth=1.2,
    )
    axes.plot(
        [x for x, runs in named.items() for _ in runs],
        [run[key] for runs in named.values() for run in runs],
        marker,
        color=colour,
        markersize=4.5,
        alpha=0.8,
        label=label,
    )


def _undecided(span, found: dict[str, list[dict]], middle: float | None, words: str) -> None:
    """Shades, with axhspan or axvspan, what lies within the study's honest difference: above the lowest loss of `found`, or on both sides
    of `middle`."""
    least = typical_resolution(found)
    if least < math.inf:
        low = (
            min(mean_and_spread(runs)[0] for runs in found.values())
            if middle is None
            else middle - least
        )
        span(
            low,
            low + least if middle is None else middle + least,
            color="0.93",
            linewidth=0,
            zorder=0,
            label=words,
        )


def _grid(axes) -> None:
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)


def _losses(figure: Figure, results: dict) -> None:
    """A study that has no figure of its own."""
    axes, found = figure.subplots(), groups(results)
    key, label = ("val_loss", LOSS) if found else ("tokens_per_second", "tokens/s")
    found = found or timed(results)
    for place, runs in enumerate(found.values()):
        axes.plot(
            [run[key] for run in runs],
            [place] * len(runs),
            "o",
            color=BLUE,
            markersize=4.5,
            alpha=0.8,
        )
        axes.plot(mean_and_spread(runs, key)[0], place, "|", color=BLUE, markersize=14)
    if key == "val_loss":
        _undecided(axes.axvspan, found, None, "means not told from the lowest")
    axes.set_yticks(range(len(found)), list(found))
    axes.set(xlabel=label, ylim=(len(found) - 0.5, -0.5))
    figure.set_size_inches(8, 1.2 + 0.3 * len(found))
    _grid(axes)


def _optimizer(figure: Figure, results: dict) -> None:
    rates, curves = figure.subplots(1, 2)
    found = groups(results)
    sweeps = swept(found, "muon") + swept(found, "adamw")
    muon = best_runs(found, "muon")[0]["changes"]
    lines = (
        (
            "adamw",
            "adamw_lr",
            dict(warmup_fraction=None),
            f"AdamW alone, warm-up {base_config(results).warmup_fraction:.0%}",
            ORANGE,
            "s",
        ),
        *(
            (
                "adamw",
                "adamw_lr",
                dict(warmup_fraction=warmup),
                f"AdamW alone, warm-up {warmup:.0%}",
                colour,
                marker,
            )
            for warmup, colour, marker in zip(LONG_WARMUPS, (RED, PINK, SKY), "DvP")
        ),
        (
            "muon",
            "muon_lr",
            dict(adamw_lr=ADAMW_RATES[1]),
            f"Muon's rate, its AdamW's {ADAMW_RATES[1]:g}",
            BLUE,
            "o",
        ),
        (
            "muon",
            "adamw_lr",
            dict(muon_lr=muon["muon_lr"]),
            f"its AdamW's rate, Muon's {muon['muon_lr']:g}",
            GREEN,
            "^",
        ),
    )
    for name, field, same, label, colour, marker in lines:
        mine = {
            runs[0]["changes"][field]: runs
            for runs in sweeps
            if all(
                runs[0]["changes"].get(key) == value
                for key, value in (dict(optimizer=name) | same).items()
            )
        }
        _points(rates, dict(sorted(mine.items())), "val_loss", label, colour, marker)
    for name, label, colour in (
        ("muon", "Muon with AdamW", BLUE),
        ("adamw", "AdamW alone", ORANGE),
    ):
        for i, run in enumerate(best_runs(found, name)):
            tokens, loss = np.array(run["validation"]).T
            curves.plot(
                tokens,
                loss,
                color=colour,
                linewidth=1.1,
                label=f"{label}, best rates" if i == 0 else None,
            )
    target = mean_and_spread(best_runs(found, "adamw"))[0]
    curves.axhline(
        target, color="0.5", linewidth=0.8, linestyle="--", label="where AdamW alone ends"
    )
    for runs in shorter(found):
        curves.plot(
            [run["tokens"] for run in runs],
            [run["val_loss"] for run in runs],
            "o",
            color=BLUE,
            markersize=4.5,
            alpha=0.8,
        )
    if shorter(found):
        lengths = [
            *shorter(found),
            best_runs(found, "muon"),
        ]  # the report reads the tokens to AdamW's loss from this line
        ends = [runs[0]["tokens"] for runs in lengths]
        between = np.geomspace(ends[0], ends[-1], 50)
        curves.plot(
            between,
            np.interp(
                np.log(between), np.log(ends), [mean_and_spread(runs)[0] for runs in lengths]
            ),
            ":",
            color=BLUE,
            linewidth=1,
        )
        curves.plot(
            [], [], ":o", color=BLUE, linewidth=1, markersize=4.5, label="Muon, shorter runs' ends"
        )
    smaller = [
        (best_runs(found, QUARTER + name), colour)
        for name, colour in (("muon", BLUE), ("adamw", ORANGE))
        if swept(found, QUARTER + name)
    ]
    for ends, colour in smaller:
        curves.plot(
            [run["tokens"] for run in ends],
            [run["val_loss"] for run in ends],
            "x",
            color=colour,
            markersize=5,
        )
    if smaller:
        curves.plot(
            [], [], "x", color="0.4", markersize=5, label="either's end in 4 times the steps"
        )
    low = min(run["val_loss"] for runs in found.values() for run in runs)
    curves.set(
        xlabel="tokens", ylabel=LOSS, ylim=(low - 0.1, target + 2.5 * max(0.4, target - low))
    )
    curves.xaxis.set_major_formatter(EngFormatter(sep=""))
    rates.set(xscale="log", xlabel="peak learning rate", ylabel="final loss (nats per token)")
    tried = sorted(
        {
            rate
            for runs in sweeps
            for field in ("muon_lr", "adamw_lr")
            if (rate := runs[0]["changes"].get(field))
        }
    )
    rates.set_xticks(tried[::2], [f"{rate:g}" for rate in tried[::2]], fontsize=7)
    rates.xaxis.set_minor_locator(NullLocator())
    ends = [run["val_loss"] for runs in sweeps for run in runs]
    rates.set_ylim(top=max(ends) + 0.6 * (max(ends) - min(ends)))  # room for the legend
    for axes in (rates, curves):
        _grid(axes)


def _routing(figure: Figure, results: dict) -> None:
    loss, speed = figure.subplots(1, 2)
    found, speeds = groups(results), timed(results)
    for kind, colour, marker in (("equal tokens", BLUE, "o"), ("equal FLOPs", ORANGE, "s")):
        _points(
            loss,
            {
                k: found.get(f"top-{k}, {kind}" if k != 2 else "top-2, equal tokens", [])
                for k in (1, 2, 3, 4)
            },
            "val_loss",
            kind,
            colour,
            marker,
        )
    _points(speed, {k: speeds[f"top-{k}"] for k in (1, 2, 3, 4)}, "tokens_per_second", None, GREEN)
    loss.set(xlabel="experts a token, of 8", ylabel=LOSS, xticks=[1, 2, 3, 4])
    least = typical_resolution(found)
    if least < math.inf:
        place = (
            loss.get_ylim()[0] + 0.02 * np.ptp(loss.get_ylim()) + least / 2
        )  # where no run is: with more experts equal FLOPs end higher
        loss.errorbar(3.6, place, least / 2, color="0.4", capsize=3)
        loss.text(
            3.5,
            place,
            "a smaller difference\nis undecided",
            fontsize=7,
            color="0.4",
            ha="right",
            va="center",
        )
    speed.set(
        xlabel="experts a token, of 8",
        ylabel="tokens/s",
        xticks=[1, 2, 3, 4],
        ylim=(0, 1.08 * speed.dataLim.ymax),
    )
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss, speed):
        _grid(axes)


def _balance(figure: Figure, results: dict) -> None:
    found = groups(results)
    found = {
        name: [run | dict(unevenness=1 - run["load_entropy"]) for run in runs]
        for name, runs in found.items()
    }
    for axes, key, label in zip(
        figure.subplots(1, 3),
        ("val_loss", "unevenness", "worst_share"),
        (LOSS, "1 - load entropy (0: even)", "largest share of an expert"),
    ):
        for scope, colour, marker in (("batch", BLUE, "o"), ("sequence", ORANGE, "s")):
            _points(
                axes,
                {
                    x: found.get(f"{scope}, weight {weight:g}", [])
                    for x, weight in enumerate(WEIGHTS, 1)
                },
                key,
                f"loss, scope {scope}",
                colour,
                marker,
            )
        for name, x, words, colour, marker in (
            ("none", 0, "no balancing", RED, "v"),
            ("bias", len(WEIGHTS) + 1, "bias instead of a loss", GREEN, "D"),
        ):
            runs = found.get(name, [])
            axes.plot(
                [x] * len(runs),
                [run[key] for run in runs],
                marker,
                color=colour,
                markersize=5,
                alpha=0.8,
                label=words,
            )
        axes.set(xlabel="weight of the balancing loss", ylabel=label)
        axes.set_xticks(
            range(len(WEIGHTS) + 2),
            ["none", *(f"$10^{{{round(math.log10(weight))}}}$" for weight in WEIGHTS), "bias"],
            fontsize=8,
        )
        _grid(axes)
    figure.set_size_inches(9, 3.3)
    loss, unevenness, share = figure.axes
    _undecided(loss.axhspan, found, None, "not told from the lowest")
    unevenness.set_yscale("log")
    even = 1 / base_config(results).num_experts
    share.axhline(even, color="0.5", linewidth=0.8, linestyle="--")
    share.text(0, even, "even", fontsize=8, color="0.4", va="bottom")
    low, high = loss.get_ylim()
    loss.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    for axes in figure.axes[1:]:  # one legend is enough
        for line in axes.lines:
            line.set_label(None)


def _scaling(figure: Figure, results: dict) -> None:
    *losses, differences = figure.subplots(1, 3)
    for axes, key, label in zip(
        losses, ("flops_per_token", "total_params"), ("training FLOPs of a token", "all parameters")
    ):
        for kind, (name, colour, marker) in DENSE_AND_MOE.items():
            runs = of_kind(results, kind)
            x, y = [run[key] for run in runs], [run["val_loss"] for run in runs]
            axes.plot(x, y, marker, color=colour, markersize=4.5, alpha=0.8, label=name)
            if law := scaling_law(x, y):
                line = np.geomspace(min(x), max(x), 50)
                axes.plot(line, law.at(line), color=colour, linewidth=1.2)
        axes.set(xscale="log", xlabel=label, ylabel=LOSS)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
    found = groups(results)
    sizes = [group.removeprefix("moe, ") for group in found if group.startswith("moe, ")]
    limit_of_time = typical_resolution(found) + equal_time(results)[-1]
    timely = "equal time" + (
        f" (undecided to ±{limit_of_time:.2f})" if limit_of_time < math.inf else ""
    )
    for shift, ending, label, colour, marker in (
        (-0.08, "", "equal tokens and FLOPs", BLUE, "o"),
        (0.08, EQUAL_TIME, timely, GREEN, "^"),
    ):
        pairs = [
            (place + shift, a["val_loss"] - b["val_loss"])
            for place, size in enumerate(sizes)
            for a in found[f"moe, {size}"]
            for b in found.get(f"dense, {size}{ending}", [])
            if a["changes"]["seed"] == b["changes"]["seed"]
        ]
        differences.plot(
            [x for x, _ in pairs],
            [y for _, y in pairs],
            marker,
            color=colour,
            markersize=5,
            alpha=0.8,
            label=label,
        )
    differences.axhline(0, color="0.4", linewidth=0.8)
    _undecided(differences.axhspan, found, 0.0, "means undecided at equal tokens")
    differences.set_xticks(range(len(sizes)), [size.replace(" x ", "\n× ") for size in sizes])
    low, high = differences.get_ylim()
    differences.set_ylim(low, high + 0.55 * (high - low))  # room for the legend
    differences.set(xlabel="layers × width", ylabel="loss of the MoE - dense (nats)")
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
        _grid(axes)
    figure.set_size_inches(9.5, 3.5)


def _checkpointing(figure: Figure, results: dict) -> None:
    fitted, _ = micro_batches(results)
    depths = sorted({layers for layers, _ in fitted})
    every = [batch for batches in fitted.values() for batch in batches]
    for row, depth in zip(figure.subplots(len(depths), 2, squeeze=False), depths):
        tried = [fitted.get((depth, mode), {}) for mode in MODES]
        common = set.intersection(*map(set, tried)) or {min(every)}
        sizes = sorted(
            {min(common), max(common), max(map(max, filter(None, tried)))}
        )  # where the modes are compared, and the largest that fits
        for mode, (colour, marker) in MODES.items():
            for axes, key in zip(row, ("peak_gb", "tokens_per_second")):
                _points(
                    axes,
                    dict(sorted(fitted.get((depth, mode), {}).items())),
                    key,
                    mode,
                    colour,
                    marker,
                )
        for axes, label in zip(row, ("peak memory (GB)", "tokens/s")):
            axes.set(
                xscale="log",
                ylabel=f"{depth} layers: {label}",
                xlim=(0.8 * min(every), 1.25 * max(every)),
                ylim=(0, 1.08 * axes.dataLim.ymax),
            )
            axes.set_xticks(sizes, map(str, sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            _grid(axes)
        row[1].yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in figure.axes[-2:]:
        axes.set_xlabel("sequences in a micro-batch")
    for axes in figure.axes[1:]:
        for line in axes.lines:
            line.set_label(None)
    figure.set_size_inches(8, 2.8 * len(depths))


def use(counts) -> np.ndarray:
    """[labels, experts]: where the tokens of a label go, each row summing to 1 (nan for a label that does not occur)."""
    counts = np.array(counts, float).T
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def bits_of_each(counts) -> np.ndarray:
    """What knowing a label says of the expert, in bits: the divergence of the label's experts from those of all tokens."""
    share, all_share = use(counts), np.array(counts, float).sum(1) / np.sum(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum(share * np.log2(share / all_share), axis=1)


def _specialization(figure: Figure, results: dict) -> None:
    figure.set_size_inches(9, 8.4)
    (by_layer, by_kind), (kinds, domains) = figure.subplots(2, 2)
    runs = [run for found in groups(results).values() for run in found]
    first, layers = runs[0]["experts"], np.array(runs[0]["experts"]["layers"]) + 1
    steps = first["steps"]
    for i, step in enumerate(steps):
        for n, run in enumerate(runs):
            label = (
                (
                    "before training"
                    if step["step"] == 0
                    else f"{EngFormatter(sep='', places=0)(step['tokens'])} tokens"
                )
                if n == 0
                else None
            )
            by_layer.plot(
                layers,
                run["experts"]["steps"][i]["kind"]["bits"],
                color=colormaps["viridis"](0.9 * i / (len(steps) - 1)),
                linewidth=1.1,
                linestyle="-" if n == 0 else ":",
                label=label,
            )
    by_layer.plot(
        layers,
        steps[-1]["kind"]["shuffled_most"],
        "--",
        color="0.4",
        linewidth=1,
        label="shuffled kinds",
    )
    most = max(max(step["kind"]["bits"]) for run in runs for step in run["experts"]["steps"])
    by_layer.set(
        xlabel="layer",
        ylabel="bits that the expert says of the kind",
        ylim=(0, 1.6 * most),
        title="By layer (dotted: the second seed)" if len(runs) > 1 else "By layer",
    )
    by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    _grid(by_layer)

    occurring = [k for k, number in enumerate(first["kind_tokens"]) if number]
    bits = np.array([bits_of_each(counts)[occurring] for counts in first["kind_table"]]).T
    image = by_kind.imshow(bits, cmap="cividis", vmin=0, aspect="auto")
    _label_map(
        figure,
        by_kind,
        image,
        [first["kinds"][k] for k in occurring],
        layers,
        "bits that the kind says of the expert",
    )
    by_kind.set(xlabel="layer", title="By kind of token")
    for axes, label in ((kinds, "kind"), (domains, "domain")):
        layer, names = sharpest_layer(first, label), first[f"{label}s"]
        there = [k for k, number in enumerate(first[f"{label}_tokens"]) if number]
        table = np.array(first[f"{label}_table"][layer], float)
        share, average = use(table)[there], table.sum(1) / table.sum()
        with np.errstate(divide="ignore"):
            times = np.log2(share / average).clip(-2, 2)
        image = axes.imshow(times, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
        for (row, column), part in np.ndenumerate(share):
            axes.text(
                column,
                row,
                f"{100 * part:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(times[row, column]) > 1.4 else "black",
            )
        bar = _label_map(
            figure,
            axes,
            image,
            [names[k] for k in there],
            range(1, share.shape[1] + 1),
            "times the expert's share of all choices",
        )
        bar.set_ticks(range(-2, 3), labels=["≤ ¼", "½", "1", "2", "≥ 4"])
        axes.set(
            xlabel="expert (in the cells: % of the row)",
            title=f"{label.capitalize()}s in layer {layers[layer]}",
        )


def _label_map(figure: Figure, axes, image, rows: list[str], columns, label: str):
    """Names of a heat map's rows, columns and colours; returns its colour bar."""
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.06, pad=0.02)
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
