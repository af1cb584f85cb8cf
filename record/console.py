"""Standard output and standard error as streams that a training run can outlive.

A run of days may lose its terminal, the program that reads its output (`| head`, `| tee`), or the
space on the disk that its log is on. Then what it prints is lost, and nothing else.

`prepare` puts the streams of this file in the place of Python's. Everything else prints as usual.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator

# A pipe that `select` calls writable takes this many bytes at once without waiting (PIPE_BUF).
BYTES_AT_ONCE = select.PIPE_BUF
POLL_SECONDS = 0.2  # while the reader is slow: how often a request to stop is looked at


class _State:
    """What the streams of this process share."""

    # While False, output that cannot be written is an error of the program, as usual.
    may_be_lost = False
    # Set by a signal, which is to end the program: nothing waits for a slow reader any more.
    in_a_hurry = False


class _Descriptor(io.RawIOBase):
    """The file descriptor 1 or 2 as a file of bytes.

    `number` is None when the program was started without the descriptor, as with `>&-`.
    """

    def __init__(self, number: int | None, name: str, loss_is_always_fine: bool):
        self.number = number
        self.name = name
        self.loss_is_always_fine = loss_is_always_fine
        self.is_lost = False
        self.other: _Descriptor | None = None  # where the loss of this one is noted

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self.number is None:
            raise io.UnsupportedOperation(f"{self.name} is closed")
        return self.number

    def isatty(self) -> bool:
        return self.number is not None and os.isatty(self.number)

    def write(self, data) -> int:
        """Writes the beginning of `data`, and returns how many bytes these are.

        A loss is noted once on the other stream. It raises OSError only for stdout, in a program
        whose purpose is its output.
        """
        try:
            return self._write(data)
        except OSError as error:
            if not (self.loss_is_always_fine or _State.may_be_lost):
                raise OSError(error.errno, error.strerror, self.name) from error
            self.lose(error.strerror or str(error))
            return len(data)

    def _write(self, data) -> int:
        if self.number is None:
            raise OSError(errno.EBADF, "it was closed from the start")
        while True:
            if not _takes_bytes(self.number):
                raise OSError(errno.EAGAIN, "its reader does not read")
            # BlockingIOError: another program has made the terminal that it shares with us
            # non-blocking, and something else filled it since `select`.
            with contextlib.suppress(BlockingIOError):
                return os.write(self.number, data[:BYTES_AT_ONCE])

    def lose(self, reason: str) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        if self.other is None or self.other.is_lost:
            return
        note = f"\nnote: {self.name} is lost ({reason}); the program continues without it\n"
        self.other.write(note.encode())


def _takes_bytes(descriptor: int) -> bool:
    """Waits until the reader is ready. False when a signal came and the reader is not ready."""
    while not is_ready(descriptor):  # each call waits POLL_SECONDS
        if _State.in_a_hurry:
            return False
    return True


def is_ready(descriptor: int, seconds: float = POLL_SECONDS) -> bool:
    """Whether a descriptor takes some bytes. Waits for that, at most for so many seconds.

    A descriptor to which writing would fail at once counts as ready.
    """
    _, ready, _ = select.select([], [descriptor], [], seconds)
    return bool(ready)


# ---------------------------------------------------------------- the streams


def prepare() -> None:
    """Replaces sys.stdout and sys.stderr, unless they have been replaced already.

    A terminal that cannot print é must not end a run whose sample contains one: such letters are
    written as escapes.
    """
    _fill_closed_descriptors()
    stdout = _replaced("stdout", 1, "standard output", loss_is_always_fine=False)
    # A message of an error that cannot be shown must not hide the error's exit code.
    stderr = _replaced("stderr", 2, "standard error", loss_is_always_fine=True)
    if stdout and stderr:
        stdout.other = stderr
        stderr.other = stdout


def _fill_closed_descriptors() -> None:
    """Opens /dev/null in place of the closed ones of stdin, stdout and stderr.

    The next file to be opened would get the free number. What a library writes to stderr would then
    end in a checkpoint.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, and the lower ones are open.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _replaced(stream: str, number: int, name: str, loss_is_always_fine: bool) -> _Descriptor | None:
    """Replaces sys.stdout or sys.stderr; None when a caller, such as a test, has its own."""
    original = getattr(sys, stream)
    if original is not getattr(sys, f"__{stream}__"):
        if isinstance(original, io.TextIOWrapper):
            original.reconfigure(errors="backslashreplace")
        return None
    if isinstance(original, io.TextIOWrapper):
        original.flush()
        descriptor = _Descriptor(number, name, loss_is_always_fine)
        encoding = original.encoding
    else:  # None: it was closed when the program started
        descriptor = _Descriptor(None, name, loss_is_always_fine)
        encoding = "utf-8"
    text = io.TextIOWrapper(
        io.BufferedWriter(descriptor),
        encoding=encoding,
        errors="backslashreplace",
        # A line is out as soon as it is printed: a signal may end the program at any time.
        line_buffering=True,
    )
    setattr(sys, stream, text)
    return descriptor


@contextlib.contextmanager
def output_may_be_lost() -> Iterator[None]:
    """In the block, output that cannot be written is no error: the work is worth more."""
    before = _State.may_be_lost
    _State.may_be_lost = True
    try:
        yield
    finally:
        # What is still in the buffer must not fail outside of the block.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        _State.may_be_lost = before


def forget_output() -> None:
    """Lets what stdout still holds be lost, after an error that is reported already.

    Python flushes stdout when it exits. That would fail again, with a traceback.
    """
    _State.may_be_lost = True  # so that the flush raises no error
    descriptor = _descriptor_of(sys.stdout)
    if descriptor:
        descriptor.is_lost = True  # so that no note about the loss is written


def _descriptor_of(stream) -> _Descriptor | None:
    """The descriptor of a stream that `prepare` made; None for another stream."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if isinstance(raw, _Descriptor):
        return raw
    return None


# ---------------------------------------------------------------- what must be heard


def print_somewhere(text: str) -> None:
    """Prints to stdout, and to stderr when stdout is lost."""
    print(text, flush=True)
    descriptor = _descriptor_of(sys.stdout)
    if descriptor and descriptor.is_lost:
        print(text, file=sys.stderr)


def write_in_a_signal_handler(message: bytes) -> None:
    """Writes to stderr if that is possible at once.

    A handler may interrupt a print, and print takes a lock. So this writes to the descriptor.
    """
    # The signal is to end the program: a print that waits for a slow reader gives up.
    _State.in_a_hurry = True
    with contextlib.suppress(OSError, ValueError):
        if is_ready(2, seconds=0):
            os.write(2, message)
