"""The checkpoints of a folder: which is the latest, which go, which one a run is resumed from.

`checkpoint_latest.pt` is a link to a numbered checkpoint, a text that names one, or a checkpoint of
its own. When it is damaged, or was not yet linked to the newest checkpoint, lineage.py says which
of the others may take its place.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

from record import checkpoint, lineage
from record.checkpoint import CheckpointError, latest_path, step_path

# ---------------------------------------------------------------- checkpoint_latest.pt


def link_latest(path, latest) -> None:
    """Makes `latest` the same file as `path`. There is no moment without a `latest`.

    It is a hard link. Where the file system has none, it is a relative symbolic link, and where it
    has no links at all, a pointer file: see checkpoint.POINTER. Raises CheckpointError.
    """
    path = Path(path)
    latest = Path(latest)
    temporary = checkpoint.temporary_path(latest)
    try:
        # For two links to one file replace() does nothing, and the temporary name would stay.
        if checkpoint.is_same(path, latest):
            return
        path.stat()  # raises for a missing file, which a symbolic link would not notice
        temporary.unlink(missing_ok=True)
        _link(temporary, path)
        temporary.replace(latest)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"{latest} could not be made a link to {path}: {checkpoint.cause_of(error)}. "
            "Choose another --save_dir."
        ) from error
    checkpoint.sync_folder(latest.parent)


def _link(new: Path, path: Path) -> None:
    """Makes the file `new` stand for `path`, by the best means that the file system has."""
    with contextlib.suppress(OSError):
        new.hardlink_to(path)
        return
    # Relative, so that the folder of the run can be moved.
    target = os.path.relpath(path.resolve(), new.parent.resolve())
    try:
        new.symlink_to(target)
    except OSError:
        # A pointer names a file of its own folder only.
        if target != path.name:
            raise
        new.write_text(f"{checkpoint.POINTER}{target}\n")


# ---------------------------------------------------------------- old checkpoints and leftovers


def prune(folder, steps, keep: int) -> list[int]:
    """Deletes the oldest checkpoints of a run so that `keep` remain.

    `steps` are those that this run saved in `folder`. Checkpoints of other steps are not touched,
    nor one that checkpoint_latest.pt is a symbolic link or a pointer to. Returns the steps that
    remain, ascending; those whose file is missing are left out. Raises CheckpointError.
    """
    assert keep >= 1
    steps = [step for step in sorted(set(steps)) if step_path(folder, step).exists()]
    latest = latest_path(folder)
    pinned = checkpoint.followed(latest).resolve()
    for step in steps[:-keep]:
        path = step_path(folder, step)
        if path.resolve() != pinned:
            _delete(path, f"the old checkpoint {path}", "Delete it, or raise --keep_checkpoints.")
    return [step for step in steps if step_path(folder, step).exists()]


def unfinished_saves(folder) -> list[Path]:
    """The temporary files in `folder` of saves that were killed."""
    return sorted(Path(folder).glob(".checkpoint*.tmp"))


def remove_leftovers(folder) -> None:
    """Deletes the temporary files of saves in `folder` that were killed. Raises CheckpointError."""
    for path in unfinished_saves(folder):
        what = f"{path}, left by a save that was killed,"
        _delete(path, what, "Delete it, or choose another --save_dir.")


def _delete(path: Path, what: str, remedy: str) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        cause = checkpoint.cause_of(error)
        raise CheckpointError(f"{what} could not be deleted: {cause}. {remedy}") from error


# ---------------------------------------------------------------- the one to resume


class _Candidate(NamedTuple):
    """A numbered checkpoint of which only the plain values were read."""

    path: Path
    step: int
    branches: list[dict]  # see lineage.py; empty in a checkpoint of an older program


def newest_intact(folder: Path, last_start: list[dict]) -> tuple[Path, dict] | None:
    """(path, state) of the checkpoint that a run continues from; None where there is none.

    It is checkpoint_latest.pt, or a later numbered checkpoint of the same branch: its run was
    killed before it could link it. Where checkpoint_latest.pt is missing or damaged, it is the
    intact checkpoint with the highest step on the way to the current branch. Each damaged one is
    named in a warning. `last_start` are the branches that run.json holds, or [].

    Raises CheckpointError when there are checkpoints and none of them may be taken.
    """
    latest = latest_path(folder)
    state = None
    if os.path.lexists(latest):
        state = _load_or_warn(latest)
    above = -1
    if state is not None:
        above = state["step"]
    candidates = _candidates(folder, latest, above)
    branches_of_latest = _branches(latest, state)
    # Each start was somebody's decision: the branch that began last is the current one.
    known = [last_start, branches_of_latest, *(other.branches for other in candidates)]
    current = max(known, key=lineage.began)

    on_the_way = [c for c in candidates if lineage.leads_to(c.branches, c.step, current)]
    if state is not None:
        latest_counts = lineage.leads_to(branches_of_latest, state["step"], current)
        # Without any branches nobody knows which of the later checkpoints were given up.
        if not current or not latest_counts:
            on_the_way = []
    for candidate in _best_first(on_the_way, current):
        other = _load_or_warn(candidate.path)
        if other is not None:
            return candidate.path, other
    if state is not None:
        return latest, state
    if not os.path.lexists(latest) and not candidates and not _numbered(folder):
        return None
    raise CheckpointError(_none_left_message(folder, candidates, on_the_way))


def _candidates(folder: Path, latest: Path, above: int) -> list[_Candidate]:
    """The numbered checkpoints of steps over `above` whose plain values are intact.

    The one that `latest` stands for is left out. Damaged ones are named in warnings.
    """
    found = []
    for path in _numbered(folder):
        step = checkpoint.step_of(path)
        if checkpoint.is_same(path, latest) or step <= above:
            continue
        try:
            plain = checkpoint.load_plain(path)
        except checkpoint.UnusableFile as error:
            _warn(error)
            continue
        branches = plain.get("lineage", [])
        if not lineage.problem(branches):
            found.append(_Candidate(path, step, branches))
    return found


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint_step_*.pt") if path.is_file()]


def _best_first(candidates: list[_Candidate], current: list[dict]) -> list[_Candidate]:
    """The highest step first, or where no branches are known the one that was written last."""
    if current:
        return sorted(candidates, key=lambda candidate: candidate.step, reverse=True)
    return sorted(candidates, key=lambda c: checkpoint.time_and_step(c.path), reverse=True)


def _branches(path: Path, state: dict | None) -> list[dict]:
    """The branches of a checkpoint. `state` is None for one that is missing or damaged."""
    if state is None:
        try:
            state = checkpoint.load_plain(path)
        except checkpoint.UnusableFile:
            return []
    branches = state.get("lineage", [])
    if lineage.problem(branches):
        return []
    return branches


def _load_or_warn(path: Path) -> dict | None:
    """The state of a checkpoint, with its content checked; None after a warning."""
    try:
        return checkpoint.load_run(path)
    except checkpoint.UnusableFile as error:
        _warn(error)
        return None


def _warn(error: checkpoint.UnusableFile) -> None:
    print(f"warning: {error.what}; it is passed over", file=sys.stderr)


def _none_left_message(
    folder: Path, candidates: list[_Candidate], on_the_way: list[_Candidate]
) -> str:
    message = f"no checkpoint of {folder} can be resumed: those of its last run are damaged or gone"
    others = [candidate.path.name for candidate in candidates if candidate not in on_the_way]
    if others:
        message += (
            f". There are those of branches that were given up ({', '.join(sorted(others))}): to "
            "take one, name it with --resume FILE"
        )
    return message + ". A new run needs --overwrite or another --save_dir"
