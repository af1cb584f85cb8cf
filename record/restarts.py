"""Restarts by torchrun: a run that cannot succeed is not trained again.

`torchrun --max-restarts N` starts all ranks again after any failure, whatever the exit code was.
After wrong options (exit code 2) or a run that diverged (3), that would fail in the same way,
perhaps hours later. So the first rank notes such an end in the run's folder, and a restart ends at
once with the same exit code. torchrun counts its restarts in TORCHELASTIC_RESTART_COUNT.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from config import ConfigError, Diverged, ExperimentError

VERDICT = "cannot_succeed.json"
RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"


def is_restart() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get(RESTART_COUNT, 0)) > 0


@contextlib.contextmanager
def not_in_vain(folder: Path, is_first: bool) -> Iterator[None]:
    """Around a run in `folder`: raises its last error at once where a restart would be in vain.

    The first rank notes the errors with which a restart would be in vain.
    """
    path = folder / VERDICT
    if is_restart():
        _raise_noted(path)
    elif is_first:
        with contextlib.suppress(OSError):
            path.unlink()
    try:
        yield
    except (ConfigError, Diverged) as error:
        if is_first and RESTART_COUNT in os.environ:
            _note(path, error)
        raise


def _raise_noted(path: Path) -> None:
    """Raises the error that the file notes. What cannot be read notes none."""
    try:
        noted = json.loads(path.read_text())
        message = f"not trained again by torchrun: {noted['message']}"
        code = noted["exit_code"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if code == Diverged.exit_code:
        raise Diverged(message)
    raise ConfigError(message)


def _note(path: Path, error: ExperimentError) -> None:
    noted = dict(exit_code=error.exit_code, message=str(error))
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(noted))
