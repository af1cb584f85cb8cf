"""What the command `plan` reports: the facts as plain types, and the table of memory."""

import dataclasses

from config import Config, OptimizerGroup
from planner.choice import Choice, advise, choose
from planner.machine import Machine
from planner.sizes import checkpoint_gb

# Labels of the memory table's rows, by key. Those of optimizer state are the groups' own.
COMPONENTS = dict(
    weights="Model weights",
    gradients="Gradients",
    master="fp32 master (16-bit residual)",
    activations="Activations",
    workspace="Optimizer workspace",
)


def build_plan(
    config: Config,
    preset: str,
    machine: Machine,
    measured: tuple[float, str] | None = None,
) -> dict:
    """Everything that `plan` prints, as plain types. Sizes are in GB of 1e9 bytes.

    `measured` is a training speed in tokens/s and the options that it was measured with.

    `choice`, `options` and `memory_gb` are the fastest choice that fits, or else the smallest one;
    `advice` then says what would fit, and `advised_memory_gb` what that takes.
    """
    choice, kept = choose(config, machine, fixed_batch=False)
    fits = choice.fits(machine)
    tokens_per_run = config.tokens_per_step * config.max_steps

    speed = None
    hours = None
    measured_with = None
    if measured:
        speed, measured_with = measured
        hours = tokens_per_run / speed / 3600

    advice = None
    advised_memory_gb = None
    if not fits:
        advice, advised = advise(choice, config, machine)
        if advised:
            advised_memory_gb = _rounded(advised.memory_gb)

    return dict(
        preset=preset,
        total_params=config.total_params,
        active_params=config.active_params,
        gpu=machine.name,
        gpu_memory_gb=round(machine.memory_gb, 1),
        host_memory_gb=round(machine.host_memory_gb, 1),
        fits=fits,
        as_configured=kept,
        tokens_per_step=config.tokens_per_step,
        tokens_per_run=tokens_per_run,
        checkpoint_gb=round(checkpoint_gb(config), 3),
        tokens_per_second=speed,
        hours=hours,
        measured_with=measured_with,
        memory_gb=_rounded(choice.memory_gb),
        shortage=choice.shortage(machine),
        advice=advice,
        advised_memory_gb=advised_memory_gb,
        choice=_chosen_values(choice),
        options=choice.options(config),
    )


def _rounded(memory_gb: dict[str, float]) -> dict[str, float]:
    return {key: round(size, 3) for key, size in memory_gb.items()}


def _chosen_values(choice: Choice) -> dict:
    values = dataclasses.asdict(choice)
    del values["memory_gb"]  # it has an entry of its own
    if not choice.lighter_blocks:
        del values["lighter_blocks"]
    return values


# ---------------------------------------------------------------- text


def memory_table(
    predicted: dict[str, float],
    groups: dict[str, OptimizerGroup],
    measured: dict[str, float] | None = None,
    capacity_gb: float | None = None,
) -> str:
    """The table of memory in GB: predicted, and measured where known.

    It has a row for each component, the total, the headroom under `capacity_gb`, and host memory if
    there is any. `groups` (config.optimizer_groups) name the rows of optimizer state.
    """
    labels = COMPONENTS | {group.memory_key: group.label for group in groups.values()}
    digits = 2 if predicted["total"] >= 10 else 3

    header = ["Component", "Predicted (GB)"]
    columns = [predicted]
    if measured:
        header.append("Measured (GB)")
        columns.append(measured)

    def row(label: str, key: str) -> list[str]:
        """The cells of a line: its label, then the size `key` of each column; "-" if unknown."""
        cells = [label]
        for sizes in columns:
            cells.append(f"{sizes[key]:.{digits}f}" if key in sizes else "-")
        return cells

    rows = [header]
    for key in predicted:
        if key not in ("total", "host"):
            rows.append(row(labels[key], key))
    rows.append(row("Total", "total"))

    # A CPU's measured sizes have no total: only what stays is known exactly.
    if capacity_gb and "total" in columns[-1]:
        left = [f"{capacity_gb - sizes['total']:.{digits}f}" for sizes in columns]
        rows.append(["Headroom", *left])

    if predicted["host"]:
        rows.append(row("Host memory (offloaded state)", "host"))
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    """Rows as text, the first column to the left, with a line under the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for label, *numbers in rows:
        cells = [label.ljust(widths[0])]
        for number, width in zip(numbers, widths[1:]):
            cells.append(number.rjust(width))
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def format_count(n: float) -> str:
    """A large number in short: 17.97B, 4.46M, 1,920."""
    if n >= 1e9:
        return f"{n / 1e9:,.2f}B"
    if n >= 1e6:
        return f"{n / 1e6:,.2f}M"
    return f"{n:,.0f}"


def format_duration(seconds: float) -> str:
    """A duration for people, in a unit that fits it: 8.3 seconds, 12 minutes, 364 hours."""
    unit = "hours"
    value = seconds / 3600
    if seconds < 60:
        unit = "seconds"
        value = seconds
    elif seconds < 3600:
        unit = "minutes"
        value = seconds / 60
    if value < 10:
        return f"{value:.1f} {unit}"
    return f"{value:,.0f} {unit}"
