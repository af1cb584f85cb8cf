"""The table of what a study trained, on what text, and how long that took."""

import collections

from config import Config
from planner.layout import format_count
from studies.analysis import SPEED, Runs, base_config, groups
from studies.reports.shared import listed, span, summary


def budget(results: dict) -> str:
    """What was trained, on what text, and how long that took."""
    # A failed run has no tokens.
    finished = [run for run in results["runs"].values() if "tokens" in run]
    # Runs that measured speeds are described only if the study has no others.
    trained = [run for run in finished if not run["group"].startswith(SPEED)]
    if not trained:
        trained = finished
    corpus = results["corpus"]
    base = base_config(results)
    passes = max(run["passes"] for run in trained)
    most_tokens = max(run["tokens"] for run in trained)
    train_tokens = format_count(corpus["train_tokens"])
    num_runs = len(results["runs"])
    rows = [
        ("models, layers x width", _shapes(trained, base)),
        ("active parameters of all", _parameters(trained)),
        ("tokens of the longest run", format_count(most_tokens)),
        ("tokens for each active parameter", _tokens_per_parameter(trained)),
        ("text", f"`{corpus['data']}`, {train_tokens} tokens"),
        ("passes over the text, at most", f"{passes:.2f}"),
        ("tokens a step", _tokens_per_step(trained)),
        ("precision", base.precision),
    ]
    rates = _common_rates(trained, base)
    if rates:
        rows.append(("peak learning rates", rates))
    rows += [
        ("runs", f"{num_runs}: {_kinds_of_runs(results, finished)}"),
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
    sizes = set()
    for run in runs:
        sizes.add((run["active_params"], run["total_params"]))
    words = []
    for active, total in sorted(sizes):
        words.append(f"{format_count(active)} of {format_count(total)}")
    return span(words)


def _tokens_per_parameter(runs: Runs) -> str:
    ratios = []
    for run in runs:
        ratios.append(run["tokens"] / run["active_params"])
    return span([f"{ratio:.2g}" for ratio in sorted(ratios)])


def _tokens_per_step(runs: Runs) -> str:
    sizes = set()
    for run in runs:
        steps = run["changes"]["max_steps"]
        sizes.add(round(run["tokens"] / steps))
    return span([f"{tokens:,}" for tokens in sorted(sizes)])


def _common_rates(runs: Runs, base: Config) -> str:
    """The peak learning rates that no run of the study changes."""
    rates = []
    for field, optimizer in (("muon_lr", "Muon"), ("adamw_lr", "AdamW")):
        is_changed = any(field in run["changes"] for run in runs)
        if not is_changed:
            lr = getattr(base, field)
            rates.append(f"{optimizer} {lr:g}")
    return listed(rates)


def _kinds_of_runs(results: dict, finished: Runs) -> str:
    """How many configurations have how many seeds, and how many other runs there are."""
    configurations: collections.Counter = collections.Counter()  # by their number of seeds
    for runs in groups(results).values():
        seeds = {run["changes"]["seed"] for run in runs}
        configurations[len(seeds)] += 1
    kinds = []
    for num_seeds, number in sorted(configurations.items(), reverse=True):
        count = counted(number, "configuration")
        seeds_of_each = counted(num_seeds, "seed")
        kinds.append(f"{count} with {seeds_of_each}")
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
    """The minutes that all runs took on GPUs and on CPUs. Zero minutes are not named."""
    words = []
    for key, name in (("gpu_minutes", "GPU"), ("cpu_minutes", "CPU")):
        minutes = spent[key]
        if minutes:
            words.append(f"{minutes:.0f} {name} minutes")
    return listed(words)


def machines(results: dict) -> str:
    """The GPUs of the study's runs, or the number of cores where a run had no GPU."""
    names = set()
    for run in results["runs"].values():
        if "machine" not in run:  # it failed
            continue
        machine = run["machine"]
        names.add(machine["gpu"] or f"{machine['cpus']} CPU cores")
    return listed(sorted(names))
