"""How worker processes that were forked end with the process that started them."""

import multiprocessing
import os
import signal

from engine.processes import STOP_SIGNALS, signal_with_parent


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
