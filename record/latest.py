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
    """A numbered checkpoint of which only the plain values were read, and not the tensors."""

    path: Path
    step: int
    branches: list[dict]  # see lineage.py; empty in a checkpoint of an older program


def newest_intact(folder: Path, run_branches: list[dict]) -> tuple[Path, dict] | None:
    """(path, state) of the checkpoint that a run continues from; None where there is none.

    `run_branches` are the branches that run.json holds (see lineage.py), or [].

    It is checkpoint_latest.pt if that is intact and of the current branch, or a later numbered
    checkpoint of this branch: its run was killed before it could link it. Otherwise it is the
    intact numbered checkpoint with the highest step that leads to the current branch. Each
    checkpoint that is passed over is named in a warning.

    Raises CheckpointError when there are checkpoints and none of them may be taken.
    """
    latest = latest_path(folder)
    state = None
    if os.path.lexists(latest):
        state = _load_or_warn(latest)
    latest_branches = _branches(latest, state)
    known = max(run_branches, latest_branches, key=lineage.began)
    # A start that went back to an earlier checkpoint has made that one the latest, unless the
    # disk was full or the program was killed just then.
    is_given_up = state is not None and lineage.is_given_up(latest_branches, state["step"], known)

    least_step = 0
    if state is not None and not is_given_up:
        least_step = state["step"] + 1
    candidates = _candidates(folder, latest, least_step)
    current = _current_branches(known, candidates)
    leading = [c for c in candidates if lineage.leads_to(c.branches, c.step, current)]
    may_be_taken = leading
    if state is not None and not is_given_up:
        may_be_taken = _descendants_of_latest(leading, latest_branches, state["step"], current)

    for candidate in _best_first(may_be_taken, current):
        other = _load_or_warn(candidate.path)
        if other is not None:
            if is_given_up:
                _warn(f"{latest} is of a branch that was given up")
            return candidate.path, other
    if state is not None:
        return latest, state
    if not os.path.lexists(latest) and not candidates and not _numbered(folder):
        return None
    raise CheckpointError(_none_left_message(folder, candidates, leading))


def _candidates(folder: Path, latest: Path, least_step: int) -> list[_Candidate]:
    """The numbered checkpoints from a step on whose plain values are intact.

    The one that `latest` stands for is left out. Damaged ones are named in warnings.
    """
    found = []
    for path in _numbered(folder):
        if checkpoint.is_same(path, latest) or checkpoint.step_of(path) < least_step:
            continue
        try:
            plain = checkpoint.load_plain(path)
        except checkpoint.UnusableFile as error:
            _warn(error.what)
            continue
        step = plain.get("step")
        branches = plain.get("lineage", [])
        if type(step) is not int or lineage.problem(branches):
            _warn(f"{path} is not what this program writes")
        elif step >= least_step:  # a renamed file has another step than its name says
            found.append(_Candidate(path, step, branches))
    return found


def _current_branches(known: list[dict], candidates: list[_Candidate]) -> list[dict]:
    """The branches up to the current one, which is the one that the last start began.

    `known` are those that run.json or checkpoint_latest.pt names. A start that could write neither
    is known from its numbered checkpoints, whose branches continue the known ones. Those of a
    copied file of another run do not.
    """
    later = [c.branches for c in candidates if lineage.extends(c.branches, known)]
    return max([known, *later], key=lineage.began)


def _descendants_of_latest(
    leading: list[_Candidate], branches: list[dict], step: int, current: list[dict]
) -> list[_Candidate]:
    """Those of `leading`, which lead to the current branch, that come after checkpoint_latest.pt.

    `branches` and `step` are those of checkpoint_latest.pt.
    """
    # Without any branches nobody knows which of the later checkpoints were given up.
    if not current or not lineage.leads_to(branches, step, current):
        return []
    return leading


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
        _warn(error.what)
        return None


def _warn(what: str) -> None:
    print(f"warning: {what}; it is passed over", file=sys.stderr)


def _none_left_message(
    folder: Path, candidates: list[_Candidate], leading: list[_Candidate]
) -> str:
    message = f"no checkpoint of {folder} can be resumed: those of its last run are damaged or gone"
    others = [candidate.path.name for candidate in candidates if candidate not in leading]
    if others:
        message += (
            f". There are those of branches that were given up ({', '.join(sorted(others))}): to "
            "take one, name it with --resume FILE"
        )
    return message + ". A new run needs --overwrite or another --save_dir"
