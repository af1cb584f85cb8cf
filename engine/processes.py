"""Processes that end with the process that started them, and the signals at which programs end."""

import ctypes
import signal
import sys

# The signals at which a program ends; record/stop.py says how.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

PR_SET_PDEATHSIG = 1  # a constant of Linux's prctl(2)

_libc = ctypes.CDLL(None)


def signal_with_parent(number: int) -> None:
    """Lets the kernel send this process a signal when its parent ends.

    Only Linux can do that; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, number)


def kill_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends: for `preexec_fn` of subprocess."""
    signal_with_parent(signal.SIGKILL)
