"""A run's folder: what was left there, and which checkpoints the run keeps, and when."""

import os
import platform
import time
import uuid
from pathlib import Path

from config import Config, ExperimentError
from engine.distributed import Ranks
from planner.machine import GB
from planner.sizes import checkpoint_gb
from record import checkpoint, latest, run_file
from record.results import move_unreadable, set_aside
from record.small_files import CURVES, METRICS, RESULTS, RUN, read_run_file, run_files

# ---------------------------------------------------------------- what was left there


def set_odd_files_aside(folder: Path) -> None:
    """Sets aside what has the name of a run's file and is none: a folder, or a pipe.

    Whoever reads from a pipe waits without end, and no file can be renamed over a folder.
    """
    names = [METRICS, RESULTS, CURVES, RUN, "checkpoint_latest.pt"]
    paths = [folder / name for name in names] + sorted(folder.glob("checkpoint_step_*.pt"))
    for path in paths:
        if path.exists() and not path.is_file():
            move_unreadable(path, OSError("it is no file"))


def last_start(folder: Path) -> dict | None:
    """What run.json says of the run in the folder. A file that cannot be read is set aside."""
    path = folder / RUN
    if not os.path.lexists(path):
        return None
    try:
        found = read_run_file(path)
        run_file.branches(found)
        run_file.config_of(found, {})
    except (OSError, ValueError) as error:
        move_unreadable(path, error)
        return None
    return found


def leftovers(folder: Path) -> list[Path]:
    """The files of a checkpoint's size that no run reads: saves that were killed, and set-aside
    checkpoints."""
    return latest.unfinished_saves(folder) + checkpoint.set_aside_files(folder)


def delete_run(folder: Path, bytes_to_come: int) -> None:
    """Deletes the run in the folder, once the new one is sure to find space on the disk."""
    files = run_files(folder) + leftovers(folder)
    # A file with two names, such as the latest checkpoint, counts once.
    sizes = [os.lstat(file) for file in files]
    freed = sum(size.st_size / size.st_nlink for size in sizes)
    checkpoint.check_free_space(folder, int(bytes_to_come - freed))
    for file in files:
        file.unlink(missing_ok=True)


def set_run_aside(folder: Path) -> list[Path]:
    """Sets aside what a run left that starts again, and returns the new paths.

    run.json stays: the new start keeps it among its earlier ones.
    """
    paths = [set_aside(file) for file in run_files(folder) if file.name != RUN]
    return [path for path in paths if path is not None]


def is_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder, or is a link of the folder to a file elsewhere."""
    folders = (path.parent.resolve(), path.resolve().parent)
    return folder.resolve() in folders


def _run_id(path: Path) -> str | None:
    """The run that wrote a checkpoint; None for a file that does not say it."""
    try:
        return checkpoint.load_plain(path).get("run_id")
    except checkpoint.CheckpointError:
        return None


# ---------------------------------------------------------------- several machines


def check_shared(folder: Path, option: str, ranks: Ranks) -> None:
    """Raises ExperimentError on all ranks unless every machine sees the same folder.

    The first rank puts a file there, which all look for. `option` chose the folder. All ranks call
    this together.
    """
    if ranks.machines == 1:
        return
    mark = folder / f".shared_{ranks.value_of_first(uuid.uuid4().hex)}"
    try:
        with ranks.together():
            if ranks.is_first:
                folder.mkdir(parents=True, exist_ok=True)
                mark.touch()
        with ranks.together():
            if not mark.exists():
                raise ExperimentError(
                    f"{folder} of rank {ranks.rank} ({platform.node()}) is not the first rank's: "
                    f"all machines need the same folder. Choose an {option} on a shared file system"
                )
    finally:
        if ranks.is_first:
            mark.unlink(missing_ok=True)


# ---------------------------------------------------------------- the checkpoints of a run


class RunCheckpoints:
    """Two kinds of checkpoint of one run.

    checkpoint_step_N.pt   every save_every steps and at the end; the newest keep_checkpoints stay
    checkpoint_latest.pt   the newest checkpoint: a link to a numbered one, or a file of its own
                           that save_minutes or a signal wrote

    `saved_steps` are the steps of the numbered ones that this run wrote and kept. A checkpoint
    holds the list, so that a resumed run deletes its own old ones and none of another run in the
    same folder.
    `resumed_from` is the file that the run continues from.
    """

    def __init__(self, config: Config, resumed_from: Path | None):
        self.config = config
        self.folder = Path(config.save_dir)
        self.resumed_from = resumed_from
        self.latest = checkpoint.latest_path(self.folder)
        self.saved_steps: list[int] = []
        # Whether checkpoint_latest.pt is still that of the branch which this run has left.
        self.latest_is_of_other_branch = False
        self.last_saved_step = -1
        self.last_save = time.monotonic()

    # ------------------------------------------------------------ saving

    @property
    def enabled(self) -> bool:
        return bool(self.config.save_every or self.config.save_minutes)

    def numbered_due(self, step: int) -> bool:
        """Whether a numbered checkpoint is due after this step."""
        every = self.config.save_every
        if not every:
            return False
        return step % every == 0 or step == self.config.max_steps

    def latest_due(self, step: int) -> bool:
        """Whether checkpoint_latest.pt is due by the clock after this step."""
        minutes = self.config.save_minutes
        if not minutes:
            return False
        old = time.monotonic() - self.last_save > 60 * minutes
        return old or step == self.config.max_steps

    def begin_numbered(self, step: int) -> Path:
        """Where the checkpoint of this step goes, which counts among `saved_steps` from now on.

        A file of that name is set aside: this run was resumed from a step further back, and the
        file is the other branch's.
        """
        path = checkpoint.step_path(self.folder, step)
        set_aside(path)
        self.saved_steps.append(step)
        return path

    def finish_numbered(self, path: Path) -> None:
        """After the file is whole: makes it the latest."""
        self._make_latest(path)

    def begin_latest(self) -> Path:
        """Where a checkpoint goes that is checkpoint_latest.pt itself and no numbered one."""
        self._set_other_latest_aside()
        self.latest_is_of_other_branch = False
        return self.latest

    def _make_latest(self, path: Path) -> None:
        """Links checkpoint_latest.pt to `path`. When that fails, it is what it was before."""
        aside = self._set_other_latest_aside()
        try:
            latest.link_latest(path, self.latest)
        except BaseException:
            if aside is not None:
                aside.rename(self.latest)
            raise
        self.latest_is_of_other_branch = False

    def _set_other_latest_aside(self) -> Path | None:
        """Keeps the other branch's checkpoint_latest.pt, if it is the only copy; its new path."""
        is_there = self.latest_is_of_other_branch and self.latest.exists()
        if not is_there or self._latest_is_numbered():
            return None
        return set_aside(self.latest)

    def delete_oldest(self) -> None:
        """Deletes the oldest numbered checkpoints over the limit. Raises CheckpointError."""
        self.saved_steps = latest.prune(self.folder, self.saved_steps, self.config.keep_checkpoints)

    def note_saved(self, step: int) -> None:
        self.last_saved_step = step
        self.last_save = time.monotonic()

    # ------------------------------------------------------------ before the first step

    def bytes_to_come(self, step: int) -> int:
        """Bytes of disk that the checkpoints after this step take beside those that are there."""
        existing = 0
        for saved in self.saved_steps:
            if checkpoint.step_path(self.folder, saved).exists():
                existing += 1
        # A latest file that this run will write over makes room for itself. One of another run,
        # or of another branch of this one, makes none: it is set aside.
        own_latest = self._resumed_from_latest() and not self._latest_is_numbered()
        files = checkpoint.files_to_come(self.config, step, existing, own_latest)
        return int(files * checkpoint_gb(self.config) * GB)

    def take_over(self, step: int) -> None:
        """Makes the checkpoint that the run was resumed from the latest, when it is in this folder.

        Otherwise a run that branches off from an older checkpoint, and is killed before it saves,
        would be resumed from the other branch. Raises CheckpointError or OSError.
        """
        if self.resumed_from is None or not is_in(self.resumed_from, self.folder):
            return
        if not self._resumed_from_latest():
            self.latest_is_of_other_branch = True
            self._make_latest(self.resumed_from)
        self.last_saved_step = step

    def count_own(self, steps: list[int], run_id: str) -> None:
        """Sets `saved_steps` to those of a checkpoint whose files in the folder are this run's.

        A checkpoint may have been copied into the folder of another run. The files of that run
        must not be deleted as old ones of this run.
        """
        self.saved_steps = []
        for step in steps:
            path = checkpoint.step_path(self.folder, step)
            if path.exists() and _run_id(path) in (run_id, None):
                self.saved_steps.append(step)

    def _resumed_from_latest(self) -> bool:
        return self.resumed_from is not None and checkpoint.is_same(self.latest, self.resumed_from)

    def _latest_is_numbered(self) -> bool:
        """Whether checkpoint_latest.pt is a link to a numbered checkpoint of the folder."""
        numbered = self.folder.glob("checkpoint_step_*.pt")
        return any(checkpoint.is_same(self.latest, path) for path in numbered)
