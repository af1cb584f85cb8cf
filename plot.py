"""Training curves as a PNG, without a display.

python plot.py RUN                      redraws RUN/training_curves.png from RUN/metrics.jsonl
python plot.py RUN RUN ...              draws the losses of several runs into comparison.png, beside
                                        the first run
python plot.py RUN ... --out FILE.png
"""

import argparse
import contextlib
import itertools
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from config import ExperimentError, defaults
from record import small_files
from record.small_files import CURVES, METRICS, RESULTS, RUN, Rows, resume_points, starts

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PINK = "#CC79A7"
SKY = "#56B4E9"

# Lines of one panel differ in colour and in dashes.
LINE_STYLES = (
    (BLUE, "-"),
    (ORANGE, "--"),
    (GREEN, ":"),
    (PINK, "-."),
)
# Runs of one comparison: first the colours change, and then the dashes.
RUN_COLORS = (BLUE, ORANGE, GREEN, RED, PINK, SKY)
RUN_DASHES = ("-", "--", ":")

OPTIMIZER_LABELS = {"muon": "Muon", "adamw": "AdamW"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PLACES = ("save_dir", "cache_dir")  # fields that say where a run is kept, not what it does

# What a picture of this program says of itself, in PNG's field for the software that made it.
SOFTWARE = "run_experiment plot.py"
# Pictures of before this mark name matplotlib alone, and have one of these sizes in pixels.
SIZES_BEFORE = ((1800, 1500), (1350, 825))

# A line is drawn through at most about this many points. A panel is less than 800 pixels wide.
MOST_POINTS = 2000
# The panel of the experts shows this many rows at most: a row has a number for every expert.
MOST_EXPERT_ROWS = 500

# ---------------------------------------------------------------- one run


def plot_training_curves(
    history: Rows,
    path,
    title: str = "",
    unigram_cross_entropy: float | None = None,
    resumed_at: Iterable[int] = (),
) -> None:
    """Draws the rows of metrics.jsonl into a PNG of 1800 x 1500 pixels at `path`.

    The file is replaced as a whole. `history` may be short or empty; values that are missing, None,
    nan or infinite leave a gap. `unigram_cross_entropy` (nats per token) adds a reference line to
    the loss panel: the validation loss of a model that knows nothing but how often each token
    occurs in the training text. `resumed_at` are the steps at which the run was resumed; a dotted
    vertical line marks each. Raises ExperimentError when the file cannot be written.
    """
    train = _rows_with(history, "train_loss")
    validation = _rows_with(history, "val_loss")
    last_step = 1
    for row in history:
        last_step = max(last_step, row["step"])

    figure = Figure(figsize=(12, 10), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.suptitle(title, fontsize=14)
    panels = figure.subplots(3, 2)
    draw_loss(panels[0, 0], train, validation, unigram_cross_entropy)
    draw_perplexity(panels[0, 1], train, validation)
    draw_learning_rates(panels[1, 0], train)
    draw_throughput(panels[1, 1], train)
    draw_expert_load(panels[2, 0], train)
    draw_memory(panels[2, 1], train)

    for axes in panels.flat:
        label = None
        if axes is panels[0, 0]:  # the legend of the first panel explains the lines of all
            label = "resumed"
        _mark_steps(axes, resumed_at, label)
        _finish_panel(axes, last_step)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    write_figure(figure, Path(path))


def draw_loss(
    axes: Axes,
    train: Rows,
    validation: Rows,
    unigram_cross_entropy: float | None,
) -> None:
    """The training loss of each row, the same smoothed, and the validation loss.

    A dashed line shows the loss of token frequencies alone, where it is known.
    """
    axes.set_title("Loss (nats per token)")
    steps, loss = _series(train, "train_loss")
    _draw_training(axes, steps, loss, _smoothed(loss))
    _draw_validation(axes, validation, "val_loss")
    if unigram_cross_entropy is not None:
        label = "unigram cross-entropy of the held-out text"
        _reference_line(axes, unigram_cross_entropy, label, color="0.5")


def draw_perplexity(axes: Axes, train: Rows, validation: Rows) -> None:
    """The same lines as for the loss, as perplexity on a logarithmic axis.

    The smoothed line averages log(perplexity), which is the loss. So it shows the same as the
    smoothed line of the loss panel.
    """
    axes.set_title("Perplexity")
    steps, perplexity = _series(train, "train_perplexity")
    # A diverged run has inf, nan or 0 here. They become gaps in the line, not warnings of numpy.
    with np.errstate(invalid="ignore", divide="ignore"):
        loss = np.log(perplexity)
        smooth = np.exp(_smoothed(loss))
    _draw_training(axes, steps, perplexity, smooth)
    _draw_validation(axes, validation, "val_perplexity")
    _log_axis(axes)


def draw_learning_rates(axes: Axes, train: Rows) -> None:
    """A line for each optimizer: every key of the rows that ends in _lr."""
    axes.set_title("Learning rate")
    train = _spread(train, MOST_POINTS)
    styles = itertools.cycle(LINE_STYLES)
    for key in _learning_rate_keys(train):
        color, dashes = next(styles)
        optimizer = key.removesuffix("_lr")
        label = OPTIMIZER_LABELS.get(optimizer, optimizer)
        _draw_metric(axes, train, key, label, color, linestyle=dashes)
    # powers of ten below 1e-3 and above 1e3
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    _from_zero(axes)


def _learning_rate_keys(train: Rows) -> list[str]:
    """The keys that end in _lr, in the order in which they first come."""
    keys = dict.fromkeys(itertools.chain.from_iterable(train))
    return [key for key in keys if key.endswith("_lr")]


def draw_throughput(axes: Axes, train: Rows) -> None:
    axes.set_title("Throughput (tokens/s)")
    _draw_metric(axes, train, "tokens_per_second", None, GREEN, linewidth=1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _from_zero(axes)


def draw_expert_load(axes: Axes, train: Rows) -> None:
    """The share of a layer's tokens that its busiest expert gets, and that its idlest one gets.

    The lines show the median over the layers. The bands reach from the lowest to the highest layer.
    """
    axes.set_title("Expert load (share of a layer's tokens; bands: all layers)")
    rows = [row for row in train if row.get("expert_load")]
    if not rows:
        if train:
            _say(axes, "dense model: no experts")
        return
    # [rows], and [rows, layers, experts]
    rows = _spread(rows, MOST_EXPERT_ROWS)
    steps, load = _series(rows, "expert_load")
    n_experts = load.shape[-1]
    busiest = load.max(axis=-1)
    idlest = load.min(axis=-1)
    _draw_layers(axes, steps, busiest, "busiest expert, median layer", RED)
    _draw_layers(axes, steps, idlest, "idlest expert, median layer", BLUE)
    even = 1 / n_experts
    _reference_line(axes, even, f"even share, 1/{n_experts}", color="black")
    # Room above for the legend: matplotlib places it clear of lines, but not of bands.
    # A float of Python: where it overflows it becomes inf, without numpy's warning.
    largest = float(np.nan_to_num(load).max())
    top = max(2.5 * even, 1.5 * largest)
    top = min(1.5, top)
    axes.set_ylim(0, top)


def _draw_layers(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    label: str,
    color: str,
) -> None:
    """The median over the layers as a line, and a band over all layers; values [rows, layers]."""
    lowest = values.min(axis=1)
    median = np.median(values, axis=1)
    highest = values.max(axis=1)
    band = dict(color=color, alpha=0.2, linewidth=0)
    axes.fill_between(steps, lowest, highest, **band)
    _line(axes, steps, median, label, color)


def draw_memory(axes: Axes, train: Rows) -> None:
    """On a GPU the memory that PyTorch's allocator reports; on a CPU the process's resident memory.

    A CPU run has its resident memory under the key memory_allocated_gb, and nothing reserved.
    """
    train = _spread(train, MOST_POINTS)
    _, reserved = _series(train, "memory_reserved_gb")
    on_gpu = np.isfinite(reserved).any()
    title = "Memory (GB)"
    label = "resident"
    if on_gpu:
        title = "GPU memory (GB)"
        label = "allocated"
    axes.set_title(title)
    _draw_metric(axes, train, "memory_reserved_gb", "reserved", ORANGE, linestyle="--")
    _draw_metric(axes, train, "memory_peak_gb", "peak", RED)
    _draw_metric(axes, train, "memory_allocated_gb", label, BLUE)
    _from_zero(axes)


def _draw_training(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    smooth: np.ndarray,
) -> None:
    """The training values as a pale thin line, and the same smoothed as a thick one."""
    pale = dict(alpha=0.35, linewidth=0.8)
    _line(axes, steps, values, None, BLUE, **pale)
    _line(axes, steps, smooth, "training, smoothed", BLUE, linewidth=1.8)


def _draw_validation(axes: Axes, validation: Rows, name: str) -> None:
    points = dict(marker="o", markersize=4)
    if len(validation) > 30:
        points["markersize"] = 2
    _draw_metric(axes, validation, name, "validation", RED, linewidth=0.8, **points)


def _mark_steps(axes: Axes, steps: Iterable[int], label: str | None) -> None:
    """A dotted vertical line at each step, in a panel that shows data."""
    if not axes.lines:
        return
    # In front of the grid, whose lines it may meet, and behind the data.
    style = dict(color="0.3", linewidth=1, linestyle=":", zorder=1.7)
    for step in steps:
        axes.axvline(step, label=label, **style)
        label = None  # one entry of the legend stands for all


def _finish_panel(axes: Axes, last_step: int) -> None:
    """Gives a panel its axis of steps, its frame, and a legend or the text "no data yet"."""
    margin = 0.02 * last_step
    axes.set_xlim(-margin, 1.02 * last_step)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _plain_frame(axes)
    _, labels_shown = axes.get_legend_handles_labels()
    if labels_shown:
        axes.legend(frameon=False)
    elif not axes.lines and not axes.texts:
        _say(axes, "no data yet")
    if axes.texts:
        _hide_scale(axes)


# ---------------------------------------------------------------- several runs


def plot_comparison(
    runs: dict[str, Rows],
    path,
    title: str = "",
    resumed_at: Mapping[str, Iterable[int]] | None = None,
) -> None:
    """Draws the loss of several runs into one PNG at `path`.

    `runs` are rows of metrics.jsonl by label. Training loss is smoothed, validation loss is drawn
    as points. `resumed_at` are the steps at which each run was resumed, by label; a short stroke
    across the run's own line marks each. Raises ExperimentError when the file cannot be written.
    """
    resumed_at = resumed_at or {}
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    styles = itertools.cycle(itertools.product(RUN_DASHES, RUN_COLORS))
    for label, history in runs.items():
        dashes, color = next(styles)
        train = _rows_with(history, "train_loss")
        validation = _rows_with(history, "val_loss")
        steps, loss = _series(train, "train_loss")
        smooth = _smoothed(loss)
        line = dict(linewidth=1.5, linestyle=dashes)
        _line(axes, steps, smooth, _as_label(label), color, **line)
        _mark_on_line(axes, steps, smooth, resumed_at.get(label, ()), color)
        points = dict(marker="o", markersize=4, linestyle="")
        _draw_metric(axes, validation, "val_loss", None, color, **points)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token); points: validation")
    _plain_frame(axes)
    if axes.lines:
        if any(resumed_at.values()):
            _stroke(axes, [], [], "0.3", label="resumed")  # the marks' entry in the legend
        axes.legend(frameon=False, fontsize="small")
    else:
        _say(axes, "no data yet")
        _hide_scale(axes)
    write_figure(figure, Path(path))


def _mark_on_line(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    steps: Iterable[int],
    color: str,
) -> None:
    """A short stroke across the line (x, y) at each of the steps.

    Lines across the whole panel, as in one run's curves, would not say whose they are.
    """
    marked = np.array(list(steps), float)
    is_drawn = np.isfinite(y)
    if not marked.size or not is_drawn.any():
        return
    heights = np.interp(marked, x[is_drawn], y[is_drawn])
    _stroke(axes, marked, heights, color)


def _stroke(axes: Axes, x, y, color: str, label: str | None = None) -> None:
    """Short vertical strokes, centred on the points (x, y)."""
    stroke = dict(marker="|", markersize=15, markeredgewidth=1, linestyle="")
    axes.plot(x, y, color=color, label=label, **stroke)


def _as_label(text: str) -> str:
    """The text as matplotlib shows it in a legend, whatever it holds."""
    lines = textwrap.wrap(text, 60)
    text = "\n".join(lines)
    text = text.replace("$", r"\$")  # between two of them a formula would be set
    if text.startswith("_"):
        text = f" {text}"  # a label that begins with _ stays out of legends
    return text


# ---------------------------------------------------------------- drawing


def _draw_metric(
    axes: Axes,
    rows: Rows,
    name: str,
    label: str | None,
    color: str,
    **style,
) -> None:
    """The metric `name` of the rows as a line over the steps."""
    steps, values = _series(rows, name)
    _line(axes, steps, values, label, color, **style)


def _line(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    label: str | None,
    color: str,
    **style,
) -> None:
    """A line, unless it has no points. Few points get markers: the line might not be seen."""
    points = np.isfinite(y).sum()
    if points == 0:
        return
    if points <= 3:
        style.setdefault("marker", "o")
        style.setdefault("markersize", 4)
    shown = _extremes(y)
    x = x[shown]
    y = y[shown]
    axes.plot(x, y, label=label, color=color, **style)


def _extremes(y: np.ndarray) -> np.ndarray:
    """The indices of the points that are drawn: all, or of many those that make the same picture.

    The points are cut into runs of equal length, several to a pixel. Of each run its lowest and its
    highest point are drawn, so that no spike is lost. matplotlib takes seconds for 50,000 points.
    """
    length = 2 * _stride(y, MOST_POINTS)
    if length == 2:
        return np.arange(len(y))
    n_runs = len(y) // length
    cut = y[: n_runs * length].reshape(n_runs, length)
    # A run without any number is represented by its first point, and leaves a gap.
    is_number = np.isfinite(cut)
    lowest = np.where(is_number, cut, np.inf).argmin(axis=1)
    highest = np.where(is_number, cut, -np.inf).argmax(axis=1)
    first = np.arange(n_runs) * length
    rest = np.arange(n_runs * length, len(y))
    return np.unique(np.concatenate([first + lowest, first + highest, rest]))


def _spread(rows: Rows, most: int) -> Rows:
    """At most this many rows, evenly spread; the newest row is among them."""
    backwards = rows[:: -_stride(rows, most)]
    return backwards[::-1]


def _stride(items: Sequence | np.ndarray, most: int) -> int:
    """How far apart `most` items lie that are spread over all items; 1 where there are fewer."""
    return max(1, -(-len(items) // most))


def _reference_line(axes: Axes, y: float, label: str, color: str) -> None:
    """A thin dashed line across the panel, at height y."""
    style = dict(color=color, linewidth=1, linestyle="--")
    axes.axhline(y, label=label, **style)


def _say(axes: Axes, text: str) -> None:
    """Writes a text in the middle of the panel, in grey."""
    axes.text(
        0.5,
        0.5,
        text,
        color="0.4",
        transform=axes.transAxes,  # 0.5 is then half of the panel
        ha="center",
        va="center",
    )


def _hide_scale(axes: Axes) -> None:
    axes.grid(False)
    axes.set_yticks([], minor=False)
    axes.set_yticks([], minor=True)


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)


def _from_zero(axes: Axes) -> None:
    """Lets the y axis begin at 0, with some room above the largest value."""
    top = 1.0
    largest = axes.dataLim.ymax
    if 0 < largest < np.inf:
        top = 1.1 * largest
    axes.set_ylim(0, top)


def _log_axis(axes: Axes) -> None:
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


def _rows_with(history: Rows, name: str) -> Rows:
    return [row for row in history if name in row]


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric. None becomes nan; nan and inf leave a gap in a line."""
    steps = [row["step"] for row in rows]
    values = [row.get(name) for row in rows]
    return np.array(steps, float), np.array(values, float)


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Mean over a window of 1/25 of the points (at least 5) centred on each; skips nan.

    Centred windows do not lag. At the start, where a loss falls fast, the window shrinks on both
    sides; at the end only on the right.
    """
    n_points = len(y)
    index = np.arange(n_points)
    # 1/50 of the points on each side, and fewer where the start is nearer than that
    widest = max(2, n_points // 50)
    half_width = np.minimum(widest, index)
    first = index - half_width
    end = index + half_width + 1
    end = np.minimum(end, n_points)

    # The sum over a window is a difference of two cumulative sums: its cost does not grow with the
    # window.
    finite = np.isfinite(y)
    summands = np.where(finite, y, 0.0)
    sum_before = _cumulative_sum(summands)
    count_before = _cumulative_sum(finite)
    window_sum = sum_before[end] - sum_before[first]
    window_count = count_before[end] - count_before[first]
    mean = window_sum / np.maximum(window_count, 1)
    return np.where(finite, mean, np.nan)


def _cumulative_sum(values: np.ndarray) -> np.ndarray:
    """Element i is the sum of the values before i, so that there is one element more."""
    sums = np.cumsum(values)
    return np.concatenate([[0], sums])


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG to `path`, and empties the figure.

    A temporary file is written first and then renamed, so that `path` is never half a file. Raises
    ExperimentError when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    # Making this object attaches it to the figure: savefig then draws without a display.
    FigureCanvasAgg(figure)
    try:
        figure.savefig(temporary, format="png", metadata=dict(Software=SOFTWARE))
        temporary.replace(path)
    except OSError as error:
        raise ExperimentError(
            f"the plot {path} cannot be written: {error.strerror or error}. Choose another place."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # A figure and its axes refer to each other. Emptying it frees their memory at once, and not
        # only when Python collects such cycles: a run draws its curves many times.
        figure.clear()


# ---------------------------------------------------------------- files of a run


def read_metrics(path) -> Rows:
    """The rows of a metrics.jsonl. Lines that hold no row are left out, with a warning.

    Raises ExperimentError when the file cannot be read.
    """
    try:
        rows, unreadable = small_files.read_rows(Path(path))
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be read: {error.strerror or error}. Name the folder of a run."
        ) from error
    if unreadable:
        print(
            f"warning: lines of {path} that hold no row are left out: {len(unreadable)}",
            file=sys.stderr,
        )
    return rows


def read_config(run: Path) -> dict:
    """The configuration of a run, from its run.json or, in older runs, training_results.json.

    Empty without either.
    """
    for name in (RUN, RESULTS):
        content = _json_object(run / name)
        if isinstance(content.get("config"), dict):
            return content["config"]
    return {}


def _json_object(path: Path) -> dict:
    """The JSON object in a file; empty when there is none."""
    with contextlib.suppress(OSError, ValueError):
        return small_files.parse_object(small_files.read_whole(path))
    return {}


def read_unigram_cross_entropy(run: Path) -> float | None:
    """The reference for the validation loss, from run.json; None in a run of before it was kept."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return float(_json_object(run / RUN)["data"]["unigram_cross_entropy"])
    return None


def read_resume_points(run: Path) -> list[int]:
    """The steps at which a run was resumed, from run.json."""
    with contextlib.suppress(OSError, ValueError):
        return resume_points(starts(small_files.read_run_file(run / RUN)))
    return []


def check_replaceable(path: Path) -> None:
    """Raises ExperimentError when a file is there that this program did not draw."""
    if not path.exists() or _drawn_here(path):
        return
    raise ExperimentError(
        f"{path} is there already and is no picture of this program's: it is left as it is. Name "
        "another file with --out, or delete it."
    )


def _drawn_here(path: Path) -> bool:
    """Whether this program drew the picture: the PNG says so itself, before its pixels."""
    try:
        content = small_files.read_whole(path)[:4096]
    except OSError:
        return False
    if not content.startswith(PNG_SIGNATURE):
        return False
    # The width and the height are at a fixed place, right after the signature.
    width = int.from_bytes(content[16:20], "big")
    height = int.from_bytes(content[20:24], "big")
    of_before = b"Software\0Matplotlib" in content and (width, height) in SIZES_BEFORE
    return of_before or f"Software\0{SOFTWARE}".encode() in content


def labels(runs: list[Path], configs: list[dict]) -> list[str]:
    """A name for each run: the fields in which the runs differ.

    Where that leaves two runs the same or without a name, it is the folder.
    """
    fields = _fields_that_differ(configs)
    descriptions = []
    for config in configs:
        values = [f"{name}={config[name]}" for name in fields if name in config]
        descriptions.append(", ".join(values))

    found = []
    for run, description in zip(runs, descriptions):
        if not description:
            found.append(str(run))
        elif descriptions.count(description) == 1:
            found.append(description)
        else:
            found.append(f"{run} ({description})")
    return found


def _fields_that_differ(configs: list[dict]) -> list[str]:
    """The fields in which the runs differ, without those that say where a run is kept."""
    fields = {}  # a dict keeps the order in which the fields first come
    for config in configs:
        fields |= config
    found = []
    for name in fields:
        if name in PLACES:
            continue
        values = [_value(config, name) for config in configs]
        if any(value != values[0] for value in values):
            found.append(name)
    return found


def _value(config: dict, name: str):
    """A field of a run's configuration; None of a run without one.

    A field that is newer than the run has its default: with it a run does what it did before.
    """
    if not config:
        return None
    default = defaults().get(name)
    value = config.get(name, default)
    if name == "eval_sequences" and not value:
        # runs of before this field, which validated this number
        value = _value(config, "eval_steps") * _value(config, "batch_size")
    return value


# ---------------------------------------------------------------- command line


def main(argv=None) -> int:
    options = _parser().parse_args(argv)
    runs = _without_repeats(options.runs)
    if len(runs) < len(options.runs):
        names = ", ".join(str(run) for run in runs)
        print(f"note: a run that is named twice is drawn once: {names}", file=sys.stderr)
    try:
        out = draw_runs(runs, options.out)
    except (ExperimentError, OSError) as error:  # an OSError names its path: it is too long
        print(f"error: {error}", file=sys.stderr)
        return 1
    # A path may hold bytes that are no text.
    print(str(out).encode(errors="backslashreplace").decode())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draws a run's training curves, or several runs' losses, from metrics.jsonl."
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="folder of a run, with metrics.jsonl",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="PNG to write; its path is printed. Default: RUN/training_curves.png for one run; for "
        "several runs comparison.png in the folder that contains the first RUN",
    )
    return parser


def _without_repeats(runs: list[Path]) -> list[Path]:
    """The runs in their order, each folder once, under the first name that it has."""
    by_folder = {}
    for run in runs:
        by_folder.setdefault(run.resolve(), run)
    return list(by_folder.values())


def draw_runs(runs: list[Path], out: Path | None) -> Path:
    """Draws one run's curves or several runs' comparison; returns the path of the PNG."""
    if out is None:
        out = runs[0] / CURVES
        if len(runs) > 1:
            out = runs[0].resolve().parent / "comparison.png"
    check_replaceable(out)
    files = [run / METRICS for run in runs]
    histories = [read_metrics(file) for file in files]
    if not any(histories):
        names = " and ".join(str(file) for file in files)
        raise ExperimentError(f"{names}: no rows yet, the first is written after log_every steps.")
    try:
        _draw(runs, histories, out)
    except ExperimentError:
        raise
    except Exception as error:  # matplotlib raises what it likes, on rows that someone edited too
        raise ExperimentError(f"{out} cannot be drawn: {error}") from error
    return out


def _draw(runs: list[Path], histories: list[Rows], out: Path) -> None:
    if len(runs) == 1:
        plot_training_curves(
            histories[0],
            out,
            unigram_cross_entropy=read_unigram_cross_entropy(runs[0]),
            resumed_at=read_resume_points(runs[0]),
        )
        return
    configs = [read_config(run) for run in runs]
    names = labels(runs, configs)
    resumed_at = {name: read_resume_points(run) for name, run in zip(names, runs)}
    plot_comparison(dict(zip(names, histories)), out, resumed_at=resumed_at)


if __name__ == "__main__":
    sys.exit(main())
