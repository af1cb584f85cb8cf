"""What an error's cause is, in a few words for a message."""

import os


def cause_of(error: BaseException) -> str:
    """The cause in a few words: the system's own, or else the first line of the error."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = str(error) or type(error).__name__
    first_line = text.split("\n")[0]
    return " ".join(first_line.split())[:200]


def all_causes(error: BaseException) -> list[BaseException]:
    """The error, the one that was being handled when it was raised, and so on back to the first.

    When writing fails, torch's zip writer raises a RuntimeError of its own on top of the error
    that stopped it, be that a full disk or Ctrl-C.
    """
    causes = [error]
    while causes[-1].__context__ is not None:
        causes.append(causes[-1].__context__)
    return causes


def interruption_behind(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt or SystemExit that lies behind `error`, if one does."""
    for cause in all_causes(error):
        if not isinstance(cause, Exception):
            return cause
    return None


def root_cause_of(error: BaseException) -> str:
    """`cause_of` the system's own error, where one lies behind `error`; else of `error`.

    The system's error says more than the one that torch raises on top of it.
    """
    system_errors = [cause for cause in all_causes(error) if isinstance(cause, OSError)]
    return cause_of([*system_errors, error][0])
