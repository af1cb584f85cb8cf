"""How texts for people look: numbers in short, and lines that fit a terminal.

It imports nothing of the program, so that every module may import it.
"""

import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TextIO

# Of a text whose width does not depend on a terminal's, such as what `plan` prints.
COLUMNS = 80

# ---------------------------------------------------------------- numbers in short


def format_count(n: float) -> str:
    """A large number in short: 17.97B, 4.46M, 1,920."""
    if n >= 1e9:
        return f"{n / 1e9:,.2f}B"
    if n >= 1e6:
        return f"{n / 1e6:,.2f}M"
    return f"{n:,.0f}"


def format_duration(seconds: float) -> str:
    """A duration for people, in a unit that fits it: 8.3 seconds, 12 minutes, 364 hours."""
    unit = "hours"
    value = seconds / 3600
    if seconds < 60:
        unit = "seconds"
        value = seconds
    elif seconds < 3600:
        unit = "minutes"
        value = seconds / 60
    if value < 10:
        return f"{value:.1f} {unit}"
    return f"{value:,.0f} {unit}"


def format_size(gb: float, digits: int = 1) -> str:
    """A size of memory or disk, given in GB: 74.5 GB, or 35 MB and 1.2 MB under 0.1 GB.

    `digits` are those behind the point of a size in GB.
    """
    if gb == 0:
        return "0"
    if abs(gb) >= 0.1:
        return f"{gb:,.{digits}f} GB"
    mb = 1000 * gb
    if abs(mb) >= 10:
        return f"{mb:.0f} MB"
    return f"{mb:.1f} MB"


def format_rate(rate: float) -> str:
    """A learning rate: 3.0e-4."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def quoted(name: str | Path) -> str:
    """A file's name or suffix for a message: as it is, or as a literal of Python.

    A line break or control character of the name would break the line that the message is.
    """
    text = str(name)
    if text.isprintable():
        return text
    return repr(text)


# ---------------------------------------------------------------- lines that fit


def wrapped(text: str, columns: int = COLUMNS, hanging: str = "") -> str:
    """The text with its long lines broken between words.

    A broken line continues under its own indent, plus `hanging`. A word that is longer than a
    line, such as a path, is not broken. An option stays on one line with its value.
    """
    lines = [_broken(line, columns, hanging) for line in text.split("\n")]
    return "\n".join(lines)


# Stands for the space between an option and its value while a line is broken.
UNBROKEN = "\0"


def _broken(line: str, columns: int, hanging: str) -> str:
    if len(line) <= columns:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    words = re.sub(r"(--\w+) (?=\S)", rf"\1{UNBROKEN}", line.strip())
    broken = textwrap.fill(
        words,
        columns,
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return broken.replace(UNBROKEN, " ")


def command_lines(options: str, indent: str, columns: int = COLUMNS) -> str:
    r"""Options of a command line on several lines, which a shell reads as one: each but the last
    ends in \."""
    broken = wrapped(indent + options, columns - len(" \\"))
    return broken.replace("\n", " \\\n")


def fitted(text: str, stream: TextIO) -> str:
    """The text as it is printed on `stream`: broken to a terminal's width, otherwise as it is.

    In a file a long line is better than a broken one: it is searched for words.
    """
    if not stream.isatty():
        return text
    return wrapped(text, shutil.get_terminal_size().columns)


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a text on `stream`, or on stdout, with lines that fit."""
    if stream is None:
        stream = sys.stdout
    print(fitted(text, stream), file=stream, flush=True)
