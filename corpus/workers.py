"""How worker processes end with the process that started them."""

import ctypes
import multiprocessing
import os
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


def ignore_stop_signals() -> None:
    """Lets this worker process run on: its parent decides when to stop.

    A terminal sends Ctrl-C to all processes of the program alike, and job schedulers do so with
    SIGTERM.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Lets the kernel end this worker process when its parent is killed.

    Without it the worker would wait for ever to hand over its work, and would hold the lock of the
    folder that the killed build left.
    """
    signal_with_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    # If the parent was killed just before, this process already has another parent, and no signal
    # will come.
    if parent is None or os.getppid() != parent.pid:
        os._exit(1)
