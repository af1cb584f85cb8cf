"""What the command `plan` reports: the facts as plain types, and the table of memory."""

import dataclasses
from collections.abc import Sequence

from config import Config, OptimizerGroup
from planner.choice import Choice, advise, check_weights, choose, fastest
from planner.layout import format_size
from planner.machine import GPUS, Machine
from planner.sharing import Batch, batch_for
from planner.sizes import checkpoint_gb
from planner.speed import MeasuredRun, PredictedSpeed, predict_speed, runs_of
from planner.traffic import traffic_of_a_step

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
    runs: Sequence[MeasuredRun] = (),
) -> dict:
    """Everything that `plan` prints, as plain types. Sizes are in GB of 1e9 bytes.

    `runs` are all measured speeds. `tokens_per_second` and `hours` are those of a run of this
    configuration on this GPU, with the options in `measured_with`. `predicted_tokens_per_second`
    and `predicted_hours` are for the options of this plan, from the run in `predicted_from`.

    `choice`, `options` and `memory_gb` are what a run chooses, or else the smallest choice;
    `advice` then says what would fit, and `advised_memory_gb` what that takes. `fastest_options`
    are those of the fastest choice that fits, with every field free.

    With several GPUs sizes are those of one GPU, speeds those of all, and `traffic` is what each
    one sends in a step. `needed_batch` is the batch of the plan where that of `config` cannot be:
    it has fewer micro-batches than there are GPUs, or larger ones than fit. Raises ConfigError
    where the weights are too large for several GPUs.
    """
    check_weights(config, machine)
    requested = config
    batch = batch_for(config, machine.ranks)
    config = dataclasses.replace(config, **dataclasses.asdict(batch))
    choice, kept = choose(config, machine, fixed_batch=False)
    fits = choice.fits(machine)
    advice, planned = _advice(choice, config, machine)
    advised_memory_gb = None
    if planned and not fits:
        advised_memory_gb = _rounded(planned.memory_gb)

    free = fastest(config, machine)
    measured = _measured_run(runs_of(config, preset, machine, runs), choice.options(config))
    predicted = None
    if planned:
        predicted = predict_speed(config, planned, machine, runs)

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
        tokens_per_run=config.tokens_per_step * config.max_steps,
        checkpoint_gb=round(checkpoint_gb(config), 3),
        **_measured_speed(config, measured),
        **_predicted_speed(config, predicted),
        memory_gb=_rounded(choice.memory_gb),
        shortage=choice.shortage(machine),
        advice=advice,
        advised_memory_gb=advised_memory_gb,
        choice=_chosen_values(choice),
        options=choice.options(config),
        fastest_options=free.options(config) if free else None,
        gpu_tested=machine.key is not None and GPUS[machine.key].tested,
        **_facts_of_several_gpus(requested, choice, machine),
    )


def _advice(choice: Choice, config: Config, machine: Machine) -> tuple[str | None, Choice | None]:
    """What would fit, where `choice` does not, and the choice that a speed is predicted for."""
    if choice.fits(machine):
        return None, choice
    return advise(choice, config, machine)


def _facts_of_several_gpus(requested: Config, choice: Choice, machine: Machine) -> dict:
    return dict(
        gpus=machine.ranks,
        gpus_per_node=machine.gpus,
        reduce_gradients=choice.reduce_gradients,
        needed_batch=_needed_batch(requested, choice, machine),
        traffic=_traffic(requested, choice, machine),
    )


def _needed_batch(requested: Config, choice: Choice, machine: Machine) -> dict | None:
    """The batch that several GPUs take instead of the requested one; None where they keep that."""
    kept = choice.gradient_accumulation_steps == requested.gradient_accumulation_steps
    if machine.ranks == 1 or kept:
        return None
    reason = "the requested micro-batch does not fit"
    if machine.ranks > requested.gradient_accumulation_steps:
        reason = f"{machine.ranks:,} GPUs need as many micro-batches a step"
    batch = Batch(choice.batch_size, choice.gradient_accumulation_steps)
    return dict(
        batch_size=batch.batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        reason=reason,
        another_training=batch.is_another_training(requested),
        difference=batch.difference(requested),
    )


def _traffic(config: Config, choice: Choice, machine: Machine) -> dict | None:
    """What each GPU sends in a step, by what it is; None with one GPU."""
    if machine.ranks == 1:
        return None
    traffic = traffic_of_a_step(config, choice, machine)
    return {key: round(value, 4) for key, value in dataclasses.asdict(traffic).items()}


def _measured_run(runs: Sequence[MeasuredRun], options: str) -> MeasuredRun | None:
    """The run with these options; where there is none, any run of the configuration."""
    for run in runs:
        if run.options == options:
            return run
    return runs[0] if runs else None


def _measured_speed(config: Config, run: MeasuredRun | None) -> dict:
    if run is None:
        return dict(tokens_per_second=None, hours=None, measured_with=None)
    return dict(
        tokens_per_second=run.tokens_per_second,
        hours=_hours(config, run.tokens_per_second),
        measured_with=run.options or "options that its file does not name",
    )


def _predicted_speed(config: Config, predicted: PredictedSpeed | None) -> dict:
    if predicted is None:
        return dict(predicted_tokens_per_second=None, predicted_hours=None, predicted_from=None)
    run = predicted.source
    return dict(
        predicted_tokens_per_second=round(predicted.tokens_per_second, 1),
        predicted_hours=_hours(config, predicted.tokens_per_second),
        predicted_from=f"{run.preset} in {run.precision} on {run.gpu}",
    )


def _hours(config: Config, tokens_per_second: float) -> float:
    """Hours of a whole run."""
    return config.tokens_per_step * config.max_steps / tokens_per_second / 3600


def _rounded(memory_gb: dict[str, float]) -> dict[str, float]:
    return {key: round(size, 3) for key, size in memory_gb.items()}


def _chosen_values(choice: Choice) -> dict:
    values = dataclasses.asdict(choice)
    del values["memory_gb"]  # it has an entry of its own
    if not choice.lighter_blocks:
        del values["lighter_blocks"]
    if choice.reduce_gradients is None:
        del values["reduce_gradients"]
    return values


# ---------------------------------------------------------------- text


def memory_table(
    predicted: dict[str, float],
    groups: dict[str, OptimizerGroup],
    measured: dict[str, float] | None = None,
    capacity_gb: float | None = None,
) -> str:
    """The table of memory: predicted, and measured where known. All sizes given are in GB.

    It has a row for each component, the total, the headroom under `capacity_gb`, and host memory if
    there is any. `groups` (config.optimizer_groups) name the rows of optimizer state.
    """
    labels = COMPONENTS | {group.memory_key: group.label for group in groups.values()}
    digits = 2 if predicted["total"] >= 10 else 3

    header = ["Component", "Predicted"]
    columns = [predicted]
    if measured:
        header.append("Measured")
        columns.append(measured)

    def row(label: str, key: str) -> list[str]:
        """The cells of a line: its label, then the size `key` of each column; "-" if unknown."""
        cells = [label]
        for sizes in columns:
            cell = "-"
            if key in sizes:
                cell = format_size(sizes[key], digits)
            cells.append(cell)
        return cells

    rows = [header]
    for key in predicted:
        if key not in ("total", "host"):
            rows.append(row(labels[key], key))
    rows.append(row("Total", "total"))

    # A CPU's measured sizes have no total: only what stays is known exactly.
    if capacity_gb and "total" in columns[-1]:
        left = [format_size(capacity_gb - sizes["total"], digits) for sizes in columns]
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
