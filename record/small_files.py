"""The small files that a run leaves beside its checkpoints, as they are read again.

There is one reader for each file. Anyone may have edited a file, and a crash or a full disk may
have cut it short, so that a reader takes nothing for granted. No torch, numpy or matplotlib here.
"""

import json
from collections.abc import Callable
from pathlib import Path

METRICS = "metrics.jsonl"
RESULTS = "training_results.json"
CURVES = "training_curves.png"
RUN = "run.json"

# In an earlier start of run.json: the packages that this start had otherwise than the next one,
# each with its version, or None where it was not installed. `packages` itself is None then.
PACKAGES_UNLIKE_NEXT = "packages_unlike_next"

Rows = list[dict]  # of metrics.jsonl

# Whole numbers beyond this are in no file of ours. As a float they would overflow sooner or later.
LARGEST_WHOLE_NUMBER = 2**63


def run_files(folder: Path) -> list[Path]:
    """What a run has left in a folder."""
    found = []
    for name in (METRICS, RESULTS, CURVES, "checkpoint_latest.pt", RUN):
        if (folder / name).exists():
            found.append(folder / name)
    return found + sorted(folder.glob("checkpoint_step_*.pt"))


def read_whole(path: Path) -> bytes:
    """The bytes of a file. Raises OSError for what is no file, such as a folder or a pipe."""
    if path.exists() and not path.is_file():
        # Whoever reads from a pipe waits without end.
        raise OSError(f"{path} is no file")
    return path.read_bytes()


# ---------------------------------------------------------------- metrics.jsonl


def read_rows(path: Path) -> tuple[Rows, list[bytes]]:
    """(the rows of a metrics.jsonl, its lines that hold no row).

    A last line that a crash cut short is in neither. Raises OSError.
    """
    rows = []
    unreadable = []
    content = read_whole(path)
    for line in content.splitlines(keepends=True):
        text = line.strip()
        if not text:
            continue
        try:
            rows.append(parse_row(text))
        except ValueError:
            if line.endswith(b"\n"):
                unreadable.append(text)
    return rows, unreadable


def parse_row(line: bytes) -> dict:
    """The row of metrics in a line of metrics.jsonl. Raises ValueError when it holds none."""
    row = parse_object(line)
    step = row.get("step")
    if type(step) is not int or not 0 <= step < LARGEST_WHOLE_NUMBER:
        raise ValueError("no row with a step")
    for key, value in row.items():
        is_right = NOT_A_METRIC.get(key, _is_number)
        if not is_right(value):
            raise ValueError(f"{key} has a value of another kind")
    return row


def parse_object(text: bytes) -> dict:
    """The JSON object in the text. Raises ValueError for every other text."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets in brackets without end") from error
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _is_number(value) -> bool:
    """Whether the value is a number, or None where none was measured."""
    if type(value) is int:
        return abs(value) < LARGEST_WHOLE_NUMBER
    return value is None or type(value) is float


def _is_table(value) -> bool:
    """Whether the value is a list of lists of numbers, all of the same length."""
    if type(value) is not list:
        return False
    for line in value:
        if type(line) is not list or len(line) != len(value[0]):
            return False
        if not all(_is_number(number) for number in line):
            return False
    return True


def _is_text(value) -> bool:
    return type(value) is str


def _is_object(value) -> bool:
    return type(value) is dict


# Keys of a row whose value is no single number, each with the check of its value.
NOT_A_METRIC: dict[str, Callable[[object], bool]] = dict(
    expert_load=_is_table,
    grad_norm_spike=_is_object,
    sample=_is_text,
)


# ---------------------------------------------------------------- run.json


def read_run_file(path: Path) -> dict:
    """What run.json says of the last start of a run; the starts before are under `earlier`.

    Raises OSError, and ValueError when this program did not write it.
    """
    start = parse_object(read_whole(path))
    earlier = start.get("earlier")
    if type(earlier) is not list:
        raise ValueError("no list of earlier starts")
    if not all(_is_object(one) for one in earlier):
        raise ValueError("an earlier start is no JSON object")
    return start


def starts(run: dict) -> list[dict]:
    """All starts of a run of which `run` is the content of run.json; the oldest first.

    Each has its whole list of packages, of which the file holds the changes only.
    """
    following = {key: value for key, value in run.items() if key != "earlier"}
    found = [following]
    for start in reversed(run["earlier"]):
        following = _with_packages(start, following)
        found.insert(0, following)
    return found


def _with_packages(start: dict, following: dict) -> dict:
    """The start with its whole list of packages. `following` is the next start, which has one."""
    changes = start.get(PACKAGES_UNLIKE_NEXT)
    packages = following.get("packages")
    # Files of older programs hold the whole list of every start.
    if not isinstance(changes, dict) or not isinstance(packages, dict):
        return start
    both = {**packages, **changes}
    start = {key: value for key, value in start.items() if key != PACKAGES_UNLIKE_NEXT}
    start["packages"] = {name: both[name] for name in sorted(both) if both[name] is not None}
    return start


def without_repeats(all_starts: list[dict]) -> list[dict]:
    """The starts as run.json holds them: what the next start has too is not repeated.

    Otherwise a run that is restarted a thousand times would have a thousand lists of packages,
    and of the branches that led to each start. The last start is as it was. `starts` undoes this
    for the packages.
    """
    found = all_starts[-1:]
    for start, following in zip(reversed(all_starts[:-1]), reversed(all_starts)):
        found.insert(0, _without_packages(_with_last_branches(start), following))
    return found


def _without_packages(start: dict, following: dict) -> dict:
    own = start.get("packages")
    others = following.get("packages")
    if not isinstance(own, dict) or not isinstance(others, dict):
        return start
    names = sorted({*own, *others})
    changes = {name: own.get(name) for name in names if own.get(name) != others.get(name)}
    return {**start, "packages": None, PACKAGES_UNLIKE_NEXT: changes}


def _with_last_branches(start: dict) -> dict:
    """The start with its own branch and the branch that this one left.

    Those before are the own branches of still earlier starts.
    """
    branches = start.get("lineage")
    if type(branches) is not list:
        return start
    return {**start, "lineage": branches[-2:]}


def resume_points(starts_of_run: list[dict]) -> list[int]:
    """The steps at which a run was resumed, without those on branches that were given up.

    `starts_of_run` has the oldest start first.
    """
    points: list[int] = []
    for start in starts_of_run:
        step = start.get("step")
        if type(step) is not int:
            continue
        # What an earlier start trained beyond this step is given up.
        points = [point for point in points if point < step]
        if start.get("resumed_from") is not None:
            points.append(step)
    return points
