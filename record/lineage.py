"""Which checkpoint descends from which: the branches that led to it.

Each start of the program begins a branch: the first start at step 0, a resumed one at the step of
the checkpoint that it continues. A checkpoint holds the list of branches from its own back to the
first one, and so does run.json for the last start. A folder may hold checkpoints of branches that
were given up: run.json and the lists say which ones still count.

A list of branches has plain values, as checkpoints and JSON hold them. Checkpoints of older
versions of this program have no list: here it is empty.
"""

import math
import time
import uuid
from pathlib import Path

MOST_BRANCHES = 100_000


def begin(before: list[dict], step: int, resumed_from: Path | None) -> list[dict]:
    """The branches of a start that continues the checkpoint `resumed_from`, which is at `step`.

    `before` are those of the checkpoint. The new branch has an `id` of its own. `step` and `file`
    name its parent, and `began` is when it began, in seconds since 1970: never before the branches
    that it comes from, whatever the clock says.
    """
    file = None
    if resumed_from is not None:
        file = str(resumed_from.absolute())
    began = time.time()
    if before:
        began = max(began, before[-1]["began"] + 0.001)
    return [*before, dict(id=uuid.uuid4().hex, began=began, step=step, file=file)]


def problem(branches) -> str:
    """What is wrong with a list of branches that was read from a file; empty if nothing is."""
    if type(branches) is not list or len(branches) > MOST_BRANCHES:
        return "is no list of branches"
    step = 0
    for branch in branches:
        if not _is_branch(branch):
            return "has an entry that is no branch"
        if branch["step"] < step:
            return "has a branch that begins before its parent"
        step = branch["step"]
    return ""


def _is_branch(branch) -> bool:
    if type(branch) is not dict:
        return False
    step = branch.get("step")
    if type(step) is not int or step < 0:
        return False
    began = branch.get("began")
    if not isinstance(began, (int, float)) or not math.isfinite(began):
        return False
    file = branch.get("file")
    return type(branch.get("id")) is str and (file is None or type(file) is str)


def began(branches: list[dict]) -> float:
    """When the last of the branches began, in seconds since 1970; 0 where there is none."""
    if not branches:
        return 0.0
    return branches[-1]["began"]


def extends(branches: list[dict], others: list[dict]) -> bool:
    """Whether `branches` are the `others` and perhaps more that began from the last of them."""
    if len(branches) < len(others):
        return False
    return all(own["id"] == other["id"] for own, other in zip(branches, others))


def is_given_up(branches: list[dict], step: int, current: list[dict]) -> bool:
    """Whether the run of a checkpoint has gone back to an earlier one, and continued from there.

    `branches` and `step` are the checkpoint's. `current` are the branches up to the current one.
    Of a checkpoint of another run, whose first branch is another, it is not known.
    """
    if not branches or not current or branches[0]["id"] != current[0]["id"]:
        return False
    return not leads_to(branches, step, current)


def leads_to(branches: list[dict], step: int, current: list[dict]) -> bool:
    """Whether a checkpoint is on the way to the current branch, or on that branch itself.

    `branches` and `step` are the checkpoint's. `current` are the branches up to the current one.
    """
    if not extends(current, branches):
        return False
    following = current[len(branches) :]
    # The next branch left this one at a step: what came after that step was given up.
    return not following or step <= following[0]["step"]
