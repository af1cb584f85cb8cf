"""One figure for each study: points for single runs, a line through their means, so that the spread of the seeds shows."""
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from plot import BLUE, GREEN, ORANGE, RED, write_figure

COLOURS = (BLUE, ORANGE, GREEN, RED)


def groups(results: dict) -> dict[str, list[dict]]:
    """{group: its runs that did not fail}, in the order of the study."""
    found: dict[str, list[dict]] = {}
    for run in results["runs"].values():
        if "failed" not in run:
            found.setdefault(run["group"], []).append(run)
    return found


def mean_and_spread(runs: list[dict], key: str = "val_loss") -> tuple[float, float]:
    """The mean over seeds, and largest minus smallest."""
    values = [run[key] for run in runs]
    return sum(values) / len(values), max(values) - min(values)


def undecided(a: list[dict], b: list[dict]) -> bool:
    """Whether the losses of two groups differ by no more than the larger spread of their seeds, or have one seed only."""
    (mean_a, spread_a), (mean_b, spread_b) = mean_and_spread(a), mean_and_spread(b)
    return min(len(a), len(b)) < 2 or abs(mean_a - mean_b) <= max(spread_a, spread_b)


def power_law(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """(a, b, standard error of b) of y = a x^-b, by least squares of the logarithms; the error is inf for two points."""
    design, target = np.stack([np.ones(len(x)), np.log(x)], axis=1), np.log(y)
    (intercept, slope), *_ = np.linalg.lstsq(design, target, rcond=None)
    free = len(x) - 2
    if free <= 0:
        return math.exp(intercept), -slope, math.inf
    variance = ((target - design @ [intercept, slope]) ** 2).sum() / free
    return math.exp(intercept), -slope, math.sqrt(variance * np.linalg.inv(design.T @ design)[1, 1])


def draw(results: dict, path: Path) -> None:
    """Draws the study's figure into a PNG. Raises ExperimentError when it cannot be written."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    PANELS[results["study"]](figure, groups(results))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    write_figure(figure, path)


def _points(axes, named: dict[float, list[dict]], key: str, label: str, colour: str) -> None:
    """Single runs as points and their means as a line, over the named x values."""
    named = {x: runs for x, runs in named.items() if runs and runs[0].get(key) is not None}
    if not named:
        return
    axes.plot(list(named), [mean_and_spread(runs, key)[0] for runs in named.values()], color=colour, label=label)
    axes.plot([x for x, runs in named.items() for _ in runs], [run[key] for runs in named.values() for run in runs], "o", color=colour,
              markersize=4, alpha=0.7)


def _curves(axes, found: dict[str, list[dict]], names: list[str]) -> None:
    """Validation loss over tokens, a line a run."""
    for name, colour in zip(names, COLOURS):
        for i, run in enumerate(found[name]):
            tokens, loss = zip(*run["validation"])
            axes.plot(np.array(tokens), loss, color=colour, label=name if i == 0 else None, linewidth=1.2)
    axes.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _optimizer(figure: Figure, found: dict) -> None:
    rates, curves = figure.subplots(1, 2)
    best = []
    for name, field, colour in (("muon", "muon_lr", BLUE), ("adamw", "adamw_lr", ORANGE)):
        mine = {runs[0]["changes"][field]: runs for group, runs in found.items() if group.startswith(name)}
        _points(rates, dict(sorted(mine.items())), "val_loss", "Muon with AdamW" if name == "muon" else "AdamW alone", colour)
        best += [min((group for group in found if group.startswith(name)), key=lambda group: mean_and_spread(found[group])[0])]
    rates.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss (nats per token)")
    _curves(curves, found, best)


def _routing(figure: Figure, found: dict) -> None:
    loss, speed = figure.subplots(1, 2)
    for kind, colour in (("equal tokens", BLUE), ("equal FLOPs", ORANGE)):
        mine = {k: found.get(f"top-{k}, {kind}" if k != 2 else "top-2, equal tokens", []) for k in (1, 2, 3, 4)}
        _points(loss, mine, "val_loss", kind, colour)
    _points(speed, {k: found.get(f"top-{k}, equal tokens", []) for k in (1, 2, 3, 4)}, "tokens_per_second", "", GREEN)
    loss.set(xlabel="experts a token, of 8", ylabel="validation loss (nats per token)", xticks=[1, 2, 3, 4])
    speed.set(xlabel="experts a token, of 8", ylabel="tokens/s", xticks=[1, 2, 3, 4], ylim=(0, None))
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))


def _balance(figure: Figure, found: dict) -> None:
    loss, share = figure.subplots(1, 2)
    for axes, key, label in ((loss, "val_loss", "validation loss (nats per token)"), (share, "worst_share", "largest share of an expert")):
        for scope, colour in (("batch", BLUE), ("sequence", ORANGE)):
            mine = {weight: found.get(f"{scope}, weight {weight:g}", []) for weight in (1e-4, 1e-3, 1e-2, 1e-1)}
            _points(axes, mine, key, f"loss, scope {scope}", colour)
        for name, x, colour in (("none", 2e-5, RED), ("bias", 5e-5, GREEN)):
            for i, run in enumerate(found.get(name, [])):
                axes.plot([x], [run[key]], "D", color=colour, markersize=5, label=name if i == 0 else None)
        axes.set(xscale="log", xlabel="weight of the load-balancing loss", ylabel=label)


def _scaling(figure: Figure, found: dict) -> None:
    for axes, key, label in zip(figure.subplots(2, 2, sharey=True).flat, ("flops", "active_params", "total_params", "train_seconds"),
                                ("training FLOPs", "active parameters", "parameters", "seconds of training")):
        for kind, colour in (("dense", ORANGE), ("moe", BLUE)):
            runs = [run for group, members in found.items() if group.startswith(kind) for run in members]
            if not runs:
                continue
            x, y = [run[key] for run in runs], [run["val_loss"] for run in runs]
            axes.plot(x, y, "o", color=colour, markersize=4)
            a, b, error = power_law(x, y)
            line = np.geomspace(min(x), max(x), 50)
            name = "dense" if kind == "dense" else "top-2 of 8"
            axes.plot(line, a * line ** -b, color=colour, label=f"{name}, slope {-b:.3f} ± {error:.3f}")
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in figure.axes[::2]:
        axes.set_ylabel("validation loss (nats per token)")
    figure.set_size_inches(10, 8)


def _checkpointing(figure: Figure, found: dict) -> None:
    depths = sorted({run["changes"]["n_layers"] for runs in found.values() for run in runs})
    for row, depth in zip(np.atleast_2d(figure.subplots(len(depths), 2)), depths):
        for mode, colour in (("none", BLUE), ("selective", GREEN), ("full", ORANGE)):
            mine = {run["changes"]["batch_size"]: [run | dict(total_gb=run["memory_gb"].get("total"))] for runs in found.values() for run in runs
                    if (run["changes"]["activation_checkpointing"], run["changes"]["n_layers"]) == (mode, depth)}
            for axes, key in zip(row, ("total_gb", "tokens_per_second")):
                _points(axes, dict(sorted(mine.items())), key, mode, colour)
        row[0].set(xscale="log", xlabel="sequences in a micro-batch", ylabel="peak memory (GB)", title=f"{depth} layers")
        row[1].set(xscale="log", xlabel="sequences in a micro-batch", ylabel="tokens/s", title=f"{depth} layers")
    figure.set_size_inches(10, 3.6 * len(depths))


PANELS = dict(optimizer=_optimizer, routing=_routing, balance=_balance, scaling=_scaling, checkpointing=_checkpointing)
