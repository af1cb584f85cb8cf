"""The tables of the checkpointing study: memory and time of each mode."""

from benchmarks.tables import table
from studies.analysis import MicroBatches, Runs, mean, mean_and_spread, micro_batches, speed_ratios
from studies.grids import MODES
from studies.reports.shared import UNKNOWN, value


def checkpointing(results: dict) -> str:
    """Memory and time of each checkpointing mode, at the micro-batches that fit with all modes."""
    batches = micro_batches(results)
    layers_and_modes = batches.fitted.keys() | batches.too_large.keys()
    depths = {layers for layers, _ in layers_and_modes}
    rows: list[list[str]] = []
    for layers in sorted(depths):
        rows += _checkpointing_rows(layers, batches)
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


def _checkpointing_rows(layers: int, batches: MicroBatches) -> list[list[str]]:
    """The rows of one depth: for each micro-batch that fits with all modes, a row for each mode."""
    runs_of = {mode: batches.fitted.get((layers, mode), {}) for mode in MODES}
    largest = {mode: _largest_that_fits(batches, layers, mode) for mode in MODES}
    fitting = [set(runs_at) for runs_at in runs_of.values()]
    fit_with_all = set.intersection(*fitting)
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


def _largest_that_fits(batches: MicroBatches, layers: int, mode: str) -> str:
    """The largest micro-batch that fits, with the smallest that does not if one was tried."""
    key = (layers, mode)
    largest = max(batches.fitted.get(key, {}), default=0)
    if key in batches.too_large:
        return f"{largest}, not {batches.too_large[key]}"
    return f"at least {largest}"


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
