"""Values, verdicts and tables that the reports of several studies use."""

import math
from dataclasses import dataclass

from benchmarks.tables import table
from studies.analysis import (
    Groups,
    Runs,
    groups,
    mean,
    mean_and_spread,
    timed,
    tukey_hsd,
    tukey_kramer,
    typical_resolution,
)

UNKNOWN = "–"


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

    A difference from a group with a single seed never is. Others must exceed the limit of Tukey's
    test, where `resolution` is tukey_hsd of the study, and the spread over the seeds of either
    group. `more` is added to these limits: another uncertainty of the difference, in its unit.
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
    """(the group with the lowest mean loss, a verdict on the other groups in words).

    The verdict names the groups whose difference from the lowest is undecided, or those whose
    difference is decided, whichever are fewer.
    """

    def mean_loss(name: str) -> float:
        return mean(found[name])

    best = min(found, key=mean_loss)
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
    """What a report reads of what results.json holds."""
    found = groups(results)
    return Outcome(results, found, timed(results), tukey_hsd(found))


def flops_per_token(runs: Runs) -> float:
    """Training FLOPs per token, which are the same for all runs of a group."""
    return runs[0]["flops"] / runs[0]["tokens"]
