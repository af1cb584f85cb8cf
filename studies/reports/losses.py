"""The tables of a study that has no file of its own here: its losses and speeds."""

from benchmarks.tables import table
from planner.layout import format_count
from studies.reports.shared import (
    UNKNOWN,
    Outcome,
    against,
    lowest,
    outcome,
    smallest_difference,
    summary,
    value,
)


def losses(results: dict) -> str:
    """Losses and speeds of a study that has no report of its own.

    A study may have only speeds. It then has a table and no facts about losses.
    """
    study = outcome(results)
    best = ""  # the group with the lowest loss; a single group is compared with nothing
    if len(study.runs) > 1:
        best, verdict = lowest(study.runs, study.resolution)
    rows = []
    for name, runs in study.runs.items():
        difference = ""
        if best and name != best:
            difference = against(runs, study.runs[best], study.resolution)
        tokens = format_count(runs[0]["tokens"])
        rows.append([name, value(runs), difference, tokens, _speed(study, name)])
    for name in study.speeds:
        if name not in study.runs:
            rows.append([name, UNKNOWN, "", UNKNOWN, _speed(study, name)])
    header = [
        "configuration",
        "validation loss",
        f"against {best or 'others'}",
        "tokens",
        "tokens/s, alone",
    ]
    if not study.runs:
        return table(header, rows)
    facts = []
    if best:
        facts.append(("lowest loss", f"{best}; {verdict}"))
    facts.append(("smallest difference that is decided", smallest_difference(study.runs)))
    return f"{table(header, rows)}\n\n{summary(facts)}"


def _speed(study: Outcome, name: str) -> str:
    if name not in study.speeds:
        return UNKNOWN
    return value(study.speeds[name], "tokens_per_second", 0)
