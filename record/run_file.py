"""What run.json says about starting a run again. small_files.py reads it, results.py writes it."""

from pathlib import Path

from config import DATA_RULES, KNOWN_DATA_RULES, Config, ConfigError, restarted_config
from record import lineage

# --skip_steps takes no more. No run has as many, and data positions stay numbers of 64 bits.
MOST_SKIPPED_STEPS = 10**9


def branches(last_start: dict) -> list[dict]:
    """The branches up to the last start (see lineage.py); older files have none.

    Raises ValueError for what is no list of branches.
    """
    found = last_start.get("lineage", [])
    problem = lineage.problem(found)
    if problem:
        raise ValueError(f"its lineage {problem}")
    return found


def config_of(last_start: dict, options: dict) -> tuple[Config, list[str]]:
    """(the configuration of the last start, changed by `options`; a text for each change).

    What was auto is auto again: another machine may resolve it otherwise. Raises ValueError where
    the file holds no configuration of this program, and ConfigError for the options.
    """
    fields = last_start.get("config")
    requested = last_start.get("requested", {})  # older files have none
    if not isinstance(fields, dict) or not isinstance(requested, dict):
        raise ValueError("it has no configuration")
    fields = {**fields, **requested}
    # First without the options: whatever is wrong then is the file's fault and not the user's.
    try:
        restarted_config(fields, {})
    except ConfigError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return restarted_config(fields, options)


def beginning(last_start: dict) -> Path | None:
    """The checkpoint that the run in this folder began from; None where it began at step 0."""
    first_start = [*last_start["earlier"], last_start][0]
    known = first_start.get("lineage", [])
    file = first_start.get("resumed_from")
    if known and not lineage.problem(known):
        file = known[-1]["file"]
    if type(file) is not str or not file:
        return None
    return Path(file)


def skipped_steps(last_start: dict, state: dict) -> int:
    """The number of steps whose data the last start skipped, and no checkpoint says so.

    `state` is that of the checkpoint which is to be resumed. If the last start began from it, that
    start was killed before it could save.
    """
    branches = last_start.get("lineage", [])
    if not branches or branches[-1]["step"] != state["step"]:
        return 0
    if branches[:-1] != state.get("lineage", []):
        return 0
    entries = last_start.get("skipped_data")
    if type(entries) is not list:
        return 0
    saved_entries = len(state.get("skipped_data", []))
    steps = 0
    for entry in entries[saved_entries:]:
        skipped = isinstance(entry, dict) and entry.get("steps")
        if type(skipped) is int and 1 <= skipped <= MOST_SKIPPED_STEPS:
            steps += skipped
    return steps


def data_rules(last_start: dict) -> int:
    """The version of the rules of data of the last start; older files, which name none, have 1.

    A file that says nothing usable about its data gets the present version. The run then starts
    at step 0, and no model has seen the text that it will hold out.
    """
    data = last_start.get("data")
    if not isinstance(data, dict):
        return DATA_RULES
    rules = data.get("rules", 1)
    if type(rules) is not int or rules not in KNOWN_DATA_RULES:
        return DATA_RULES
    return rules
