"""How signals end a program: while it trains, before that, and in commands that do not train.

    SIGINT      Ctrl-C
    SIGTERM     kill, and job schedulers at the end of a job's time
    SIGHUP      the terminal was closed
    SIGUSR1     Slurm, some time before the end (sbatch --signal=USR1@120)

A signal that was ignored when the program started, as nohup does with SIGHUP, stays ignored. The
exit code is always 128 + the number of the signal, as shells have it.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from engine.processes import STOP_SIGNALS
from record import console

STOPPING = b"\nstopping after this step; Ctrl-C again to stop at once without saving\n"
SAVING = b"\na checkpoint is being written; the program ends when it is whole\n"
INTERRUPTED = b"\ninterrupted\n"
NOTHING_TRAINED = b"\nstopped; no training was under way. What was tokenized is kept\n"


@contextlib.contextmanager
def handled(handle: Callable) -> Iterator[None]:
    """Lets `handle` handle the signals in the block, except those that are ignored."""
    before = {}
    for number in STOP_SIGNALS:
        handler = signal.getsignal(number)
        if handler is not signal.SIG_IGN:
            before[number] = handler
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is None:  # it was set by a library in C: Python cannot set it again
                handler = signal.SIG_DFL
            signal.signal(number, handler)


# ---------------------------------------------------------------- while a run trains


class StopSignal:
    """The first signal lets the step finish, save and stop. A second Ctrl-C exits at once.

    As a context manager it takes over the signals. The handler only notes them; the loop looks at
    `requested`. `number` is the signal that came first.
    """

    def __init__(self):
        self.number: int | None = None
        self.is_saving = False
        self.handlers = contextlib.ExitStack()
        self.process = os.getpid()

    @property
    def requested(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """The program's, after the requested stop."""
        assert self.number is not None
        return 128 + self.number

    def __enter__(self) -> "StopSignal":
        self.process = os.getpid()
        self.handlers.enter_context(handled(self._handle))
        return self

    def __exit__(self, *_error) -> None:
        self.handlers.close()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """In the block a second Ctrl-C waits: it must not lose the checkpoint."""
        self.is_saving = True
        try:
            yield
        finally:
            self.is_saving = False

    def _handle(self, number: int, _frame) -> None:
        """Raises nothing: an exception could come up at any line of the program."""
        if os.getpid() != self.process:
            return  # a worker that was forked a moment ago: the trainer ends it
        if self.number is None:
            self.number = number
            console.write_in_a_signal_handler(STOPPING)
        elif number == signal.SIGINT and self.is_saving:
            console.write_in_a_signal_handler(SAVING)
        elif number == signal.SIGINT:
            os._exit(128 + number)


class AgreedStop(StopSignal):
    """A StopSignal of several ranks: all of them stop after the same step.

    A signal may come to one rank, and to each at another time. So a signal alone requests nothing.
    It is the rank's vote in the next step's sum, and `agree` is called where that has votes.

    `number` stays this rank's own first signal: a scheduler signals one rank after the other, and
    the first signal of a rank must not count as its second.
    """

    def __init__(self):
        super().__init__()
        self.agreed_number: int | None = None

    @property
    def requested(self) -> bool:
        return self.agreed_number is not None

    @property
    def exit_code(self) -> int:
        assert self.agreed_number is not None
        return 128 + self.agreed_number

    @property
    def vote(self) -> bool:
        """Whether a signal has come to this rank."""
        return self.number is not None

    def agree(self, numbers: list[int | None]) -> None:
        """Requests the stop. `numbers` are the ranks' signals; None where none has come."""
        self.agreed_number = next(number for number in numbers if number is not None)


# ---------------------------------------------------------------- outside of a run


@contextlib.contextmanager
def exit_at_once(message: bytes = INTERRUPTED) -> Iterator[None]:
    """In the block a signal ends the process where it is, after this message on stderr.

    This is for work of which SIGKILL would lose nothing either.
    """
    process = os.getpid()

    def handle(number: int, _frame) -> None:
        if os.getpid() != process:
            return  # a worker that was forked a moment ago: it ends with this process
        console.write_in_a_signal_handler(message)
        os._exit(128 + number)

    with handled(handle):
        yield


class Interrupted(KeyboardInterrupt):
    """A signal has ended a command that has something to clean up."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """In the block the signals raise Interrupted, so that temporary files are removed."""

    def handle(number: int, _frame) -> None:
        raise Interrupted(number)

    with handled(handle):
        yield


def by_default() -> None:
    """Lets Ctrl-C end the process as the other signals do: at once, and without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
