"""Training curves as a PNG, without a display.

python plot.py RUN                      redraws RUN/training_curves.png from RUN/metrics.jsonl
python plot.py RUN RUN ...              draws the losses of several runs into comparison.png, beside the first run
python plot.py RUN ... --out FILE.png
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from config import ExperimentError, defaults

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PINK, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
PLACES = ("save_dir", "cache_dir")  # fields that say where a run is kept, not what it does


def plot_training_curves(
    history: list[dict], path, title: str = "", unigram_entropy: float | None = None
):
    """Draws the rows of metrics.jsonl into a PNG of 1800 x 1500 pixels at `path`, which is replaced as a whole.

    `history` may be short or empty; values that are missing, None, nan or infinite leave a gap. `unigram_entropy` (nats
    per token) adds a reference line to the loss panel. Raises ExperimentError when the file cannot be written.
    """
    figure = Figure(figsize=(12, 10), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    (loss, perplexity), (rate, speed), (experts, memory) = panels = figure.subplots(3, 2)
    figure.suptitle(title, fontsize=14)
    train = [row for row in history if "train_loss" in row]
    validation = [row for row in history if "val_loss" in row]

    for axes, name in ((loss, "loss"), (perplexity, "perplexity")):
        x, y = _series(train, f"train_{name}")
        _line(axes, x, y, None, BLUE, alpha=0.35, linewidth=0.8)
        with np.errstate(invalid="ignore", divide="ignore"):
            smooth = _smoothed(y) if axes is loss else np.exp(_smoothed(np.log(y)))
        _line(axes, x, smooth, "training, smoothed", BLUE, linewidth=1.8)
        size = 4 if len(validation) <= 30 else 2
        _line(
            axes,
            *_series(validation, f"val_{name}"),
            "validation",
            RED,
            linewidth=0.8,
            marker="o",
            markersize=size,
        )
    loss.set_title("Loss (nats per token)")
    perplexity.set_title("Perplexity")
    _log_axis(perplexity)
    if unigram_entropy is not None:
        loss.axhline(
            unigram_entropy, color="0.5", linewidth=1, linestyle="--", label="unigram entropy"
        )

    _line(rate, *_series(train, "muon_lr"), "Muon", BLUE)
    _line(rate, *_series(train, "adamw_lr"), "AdamW", ORANGE, linestyle="--")
    rate.set_title("Learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))

    _line(speed, *_series(train, "tokens_per_second"), None, GREEN, linewidth=1)
    speed.set_title("Throughput (tokens/s)")
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))

    _expert_panel(experts, train)

    # A CPU run has the process's resident memory as memory_allocated_gb, and nothing reserved.
    on_gpu = bool(np.isfinite(_series(train, "memory_reserved_gb")[1]).any())
    _line(memory, *_series(train, "memory_reserved_gb"), "reserved", ORANGE, linestyle="--")
    _line(memory, *_series(train, "memory_peak_gb"), "peak", RED)
    _line(
        memory, *_series(train, "memory_allocated_gb"), "allocated" if on_gpu else "resident", BLUE
    )
    memory.set_title("GPU memory (GB)" if on_gpu else "Memory (GB)")

    last = max([1, *(row["step"] for row in history)])
    for axes in panels.flat:
        axes.set_xlim(-0.02 * last, 1.02 * last)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.8)
        if axes in (rate, speed, memory):
            top = axes.dataLim.ymax
            axes.set_ylim(0, 1.1 * top if 0 < top < np.inf else 1)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
        elif not axes.lines:
            _say(
                axes,
                "no data yet" if axes is not experts or not train else "dense model: no experts",
            )
    for axes in panels[-1]:
        axes.set_xlabel("step")
    write_figure(figure, Path(path))


def plot_comparison(runs: dict[str, list[dict]], path, title: str = ""):
    """Draws the loss of several runs, {label: rows of metrics.jsonl}, into one PNG at `path`: smoothed training loss, and
    validation loss as points. Raises ExperimentError when the file cannot be written."""
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    styles = itertools.cycle(
        itertools.product(("-", "--", ":"), (BLUE, ORANGE, GREEN, RED, PINK, SKY))
    )
    for (label, history), (dashes, color) in zip(runs.items(), styles):
        x, y = _series([row for row in history if "train_loss" in row], "train_loss")
        label = "\n".join(textwrap.wrap(label, 60)).replace("$", r"\$")  # else a formula
        label = f" {label}" if label.startswith("_") else label  # else not in the legend
        _line(axes, x, _smoothed(y), label, color, linewidth=1.5, linestyle=dashes)
        _line(
            axes,
            *_series([row for row in history if "val_loss" in row], "val_loss"),
            None,
            color,
            marker="o",
            markersize=4,
            linestyle="",
        )
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token); points: validation")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    else:
        _say(axes, "no data yet")
    write_figure(figure, Path(path))


def _expert_panel(axes, train: list[dict]):
    """Each layer's largest and smallest share of the tokens among its experts: the median layer, and the range."""
    axes.set_title("Expert load (share of a layer's tokens; bands: all layers)")
    rows = [row for row in train if row.get("expert_load")]
    if not rows:
        return
    x = np.array([row["step"] for row in rows])
    load = np.array([row["expert_load"] for row in rows], float)  # (rows, layers, experts)
    for share, label, color in (
        (load.max(-1), "busiest expert", RED),
        (load.min(-1), "idlest expert", BLUE),
    ):
        axes.fill_between(x, share.min(1), share.max(1), color=color, alpha=0.2, linewidth=0)
        _line(axes, x, np.median(share, axis=1), f"{label}, median layer", color)
    even = 1 / load.shape[-1]
    axes.axhline(
        even, color="black", linewidth=1, linestyle="--", label=f"even share, 1/{load.shape[-1]}"
    )
    axes.set_ylim(
        0, min(1.5, max(2.5 * even, 1.5 * float(np.nan_to_num(load).max())))
    )  # room above for the legend, which sees lines alone


def _line(axes, x, y, label, color, **style):
    """A line, unless it has no points; so few points that a line might not be seen get markers."""
    points = np.isfinite(y).sum()
    if points:
        axes.plot(
            x,
            y,
            label=label,
            color=color,
            **(dict(marker="o", markersize=4) if points <= 3 else {}) | style,
        )


def _say(axes, text: str):
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")
    axes.grid(False)
    axes.set_yticks([], minor=False)
    axes.set_yticks([], minor=True)


def _series(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; None becomes nan, and nan and inf leave a gap in a line."""
    return np.array([row["step"] for row in rows], float), np.array(
        [row.get(name) for row in rows], float
    )


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Mean over a window of 1/25 of the points (at least 5) centred on each, so that it does not lag; skips nan.

    At the start, where a loss falls fast, the window shrinks on both sides; at the end only on the right.
    """
    n, i = len(y), np.arange(len(y))
    half = np.minimum(max(2, n // 50), i)
    low, high = i - half, np.minimum(i + half + 1, n)
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    return np.where(
        finite, (total[high] - total[low]) / np.maximum(count[high] - count[low], 1), np.nan
    )


def _log_axis(axes):
    """Logarithmic y axis that has a few labels however small or large its range."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if high < 5 * low:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    elif high < 300 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def write_figure(figure: Figure, path: Path):
    """Renders to a temporary file that then takes the name `path`. Raises ExperimentError."""
    temporary = path.with_name(f".{path.name}.tmp")
    FigureCanvasAgg(figure)
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    except OSError as error:
        raise ExperimentError(
            f"the plot {path} cannot be written: {error.strerror or error}. Choose another place."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        figure.clear()


def read_metrics(path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that is only half written is left out. Raises ExperimentError."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be read: {error.strerror}. Name the folder of a run."
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("no row with a step")
            rows.append(row)
        except ValueError as error:
            if number < len(lines):
                raise ExperimentError(
                    f"{path}, line {number}: {error}. Remove that line."
                ) from error
    return rows


def read_config(run: Path) -> dict:
    """The configuration in a run's run.json or, as older runs have it, in training_results.json; empty without either."""
    for name in ("run.json", "training_results.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads((run / name).read_bytes())["config"])
    return {}


def labels(runs: list[Path], configs: list[dict]) -> list[str]:
    """A name for each run: the fields in which the runs differ, with the folder where that leaves two the same."""
    fields = [
        name
        for name in dict.fromkeys(itertools.chain.from_iterable(configs))
        if name not in PLACES
        and any(_value(config, name) != _value(configs[0], name) for config in configs)
    ]
    found = [
        ", ".join(f"{name}={config[name]}" for name in fields if name in config)
        for config in configs
    ]
    return [
        label if label and found.count(label) == 1 else f"{run} ({label})" if label else str(run)
        for run, label in zip(runs, found)
    ]


def _value(config: dict, name: str):
    """A field of a run's configuration; None of a run without one.

    A field that is newer than the run has its default: with it a run does what it did before.
    """
    if not config:
        return None
    return config.get(name, defaults().get(name))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Draws a run's training curves, or several runs' losses, from metrics.jsonl."
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, with metrics.jsonl"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="PNG to write; default: training_curves.png in the folder of one run, "
        "comparison.png beside the folder of the first of several",
    )
    options = parser.parse_args(argv)
    runs = list({run.resolve(): run for run in reversed(options.runs)}.values())[::-1]
    if len(runs) < len(options.runs):
        print(
            f"note: a run that is named twice is drawn once: {', '.join(map(str, runs))}",
            file=sys.stderr,
        )
    out = options.out or (
        runs[0] / "training_curves.png"
        if len(runs) == 1
        else runs[0].resolve().parent / "comparison.png"
    )
    try:
        histories = [read_metrics(run / "metrics.jsonl") for run in runs]
        if not any(histories):
            raise ExperimentError(
                f"{' and '.join(str(run / 'metrics.jsonl') for run in runs)}: no rows yet, the first is written after log_every steps."
            )
        if len(runs) == 1:
            plot_training_curves(histories[0], out)
        else:
            plot_comparison(
                dict(zip(labels(runs, [read_config(run) for run in runs]), histories)), out
            )
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
