"""Work beside training: what may fail without ending a run.

Curves, results, rows of metrics, run.json, samples and trackers are made from what a run has
learned. None of them is worth the run, so that no error of theirs leaves this module.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from planner.layout import fitted

# How long the last writing of a run waits before each of its attempts, in seconds.
PAUSES = (0.0, 0.5, 2.0)
# What ends a program on purpose. Everything else that is raised is an error, also what is no
# Exception: packages that are written in Rust raise a BaseException when they panic.
ON_PURPOSE = (KeyboardInterrupt, SystemExit, GeneratorExit)

Result = TypeVar("Result")


class SideWork:
    """Runs actions beside training, and says which of them fail: once each, until it works again.

    `failing` has the names of the actions whose last attempt failed, each with the cause.
    """

    def __init__(self) -> None:
        self.failing: dict[str, str] = {}

    def run(self, name: str, action: Callable[[], object]) -> bool:
        """Calls the action. False when it raised an error, which becomes a warning.

        `name` is what the action makes, such as a file's name. The caller tries it again later.
        """
        try:
            action()
        except ON_PURPOSE:  # the program is to end
            raise
        except BaseException as error:  # also a panic in Rust, which is no Exception
            self._note_failure(name, error)
            return False
        self._note_success(name)
        return True

    def value(self, name: str, function: Callable[[], Result]) -> Result | None:
        """What the function returns; None when it raised an error, which becomes a warning."""
        results: list[Result] = []
        self.run(name, lambda: results.append(function()))
        if not results:
            return None
        return results[0]

    def finish(self, actions: dict[str, Callable[[], object]]) -> bool:
        """Runs the last actions of a run by their names. Whether all of them worked in the end.

        A disk that is full for a moment costs nothing: what failed is tried again after a pause.
        """
        remaining = dict(actions)
        for pause in PAUSES:
            time.sleep(pause)
            for name, action in list(remaining.items()):
                if self.run(name, action):
                    del remaining[name]
            if not remaining:
                return True
        for name in remaining:
            warn(f"warning: {name} is not as it should be when the run ends: {self.failing[name]}")
        return False

    def _note_failure(self, name: str, error: BaseException) -> None:
        cause = cause_of(error)
        if name not in self.failing:
            warn(f"warning: {name} failed: {cause}. Training continues, and it is tried again")
        self.failing[name] = cause

    def _note_success(self, name: str) -> None:
        if name in self.failing:
            del self.failing[name]
            warn(f"note: {name} works again")


class NoSideWork(SideWork):
    """For the ranks of a run that write nothing: another rank does the work beside training."""

    def run(self, name: str, action: Callable[[], object]) -> bool:
        return True

    def finish(self, actions: dict[str, Callable[[], object]]) -> bool:
        return True


def warn(text: str) -> None:
    """Prints a line on stderr, above a progress bar."""
    tqdm.write(fitted(text, sys.stderr), file=sys.stderr)


def cause_of(error: BaseException) -> str:
    """The cause of an error in one line: with the path, for an error of the file system."""
    if isinstance(error, OSError) and error.errno:
        text = os.strerror(error.errno)
        if error.filename is not None:
            text = f"{error.filename}: {text}"
    else:
        text = str(error) or type(error).__name__
    first_line = text.split("\n")[0]
    return " ".join(first_line.split())[:1000]


@contextlib.contextmanager
def path_named(path: Path) -> Iterator[None]:
    """Adds the path to an error of the file system that names none.

    A write to an open file that finds the disk full is such an error.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
