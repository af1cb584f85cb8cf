"""Reads a line of JSON of any length in bounded memory.

A document of 300 MB may be one line. `scan_line` checks such a line part by part, as json.loads
would check it whole, and finds where the string of one field begins. `string_stream` then decodes
that string, again part by part. The two readings make sure that nothing of a bad line is used.

Libraries that parse JSON as a stream (ijson, json-stream) yield every string as a whole, so they
would need as much memory as the document.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

LONG_LINE = 1 << 20  # characters; a line of fewer is parsed as a whole
PART = 1 << 16  # characters of a long line that are read at a time
NAME_LENGTH = 1000  # of a longer name of a field only the beginning is kept
NAMED_FIELDS = 20  # how many names of fields a message lists
LONGEST_SCALAR = 10_000  # characters of a number; json.loads refuses integers of over 4,300 digits
DEEPEST = 900  # objects and lists inside each other; json.loads ends at about 1,000

BRACKETS = {"{": "}", "[": "]"}
WHITESPACE = re.compile(r"[ \t\n\r]*+")
# A number or a constant, right or wrong: all characters up to one that cannot belong to it.
SCALAR = re.compile(r'[^ \t\n\r{}\[\]:,"]*+')
# The characters of a string and its whole escapes. Two escapes that are the halves of one character
# (a surrogate pair) are matched together. A first half matches alone only when it is seen that no
# second half follows.
HIGH_HALF = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
LOW_HALF = r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
NO_LOW_HALF = r"(?=[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F])"
STRING = re.compile(
    r'(?:[^"\\\x00-\x1f]++'
    r'|\\["\\/bfnrt]'
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"
    rf"|{HIGH_HALF}{LOW_HALF}"
    rf"|{HIGH_HALF}{NO_LOW_HALF}"
    r")*+"
)
LONGEST_ESCAPE = 12  # characters of a surrogate pair

# What may come next in a line of JSON.
VALUE = "a value"
VALUE_OR_END = "a value or ]"
NAME = "a name in double quotes"
NAME_OR_END = "a name in double quotes or }"
COLON = "':'"
COMMA_OR_END = "',' or the end of the object or list"
NOTHING = "the end of the line"


class LineParts:
    """Reads one line of a file in parts of at most PART characters. It can be read once.

    The last part ends with the line's end. `first_part` is the beginning of the line, if the caller
    has read it from the file already.
    """

    def __init__(self, file: TextIO, first_part: str = ""):
        self.file = file
        self.first_part = first_part
        self.length = 0  # characters of the line that were read
        self.latest = ""  # the part that was read last

    def __iter__(self) -> Iterator[str]:
        part = self.first_part or self.file.readline(PART)
        while part:
            self.length += len(part)
            self.latest = part
            yield part
            # If a part ends between "\r" and "\n", the "\n" is taken for a line of its own. It is
            # blank, so nothing is lost or gained.
            if part.endswith(("\n", "\r")):
                return
            part = self.file.readline(PART)


@dataclass
class ScannedLine:
    """What `scan_line` found in a valid line. "The field" is the one that it looks for."""

    is_blank: bool = False
    is_object: bool = False
    names: list[str] = field(default_factory=list)  # names of the first NAMED_FIELDS fields
    has_field: bool = False  # whether the object has the field

    # If the field's value is a string:
    start: int | None = None  # how many characters of the line stand before its first character
    bad_part: str | None = None  # the first part of the string that `is_valid` refuses
    bad_part_start: int = 0  # how many characters of the string stand before bad_part

    # If it is anything else: the value. An object or a list is given as an empty one.
    value: Any = None


def scan_line(parts: Iterator[str], name: str, is_valid: Callable[[str], bool]) -> ScannedLine:
    """Checks a line of JSON and finds its top-level field `name`, the last one of that name.

    `is_valid` says whether a part of the field's string is valid text.
    Raises ValueError, which says what is wrong and where, when json.loads would refuse the line.
    """
    text = _Characters(parts)
    found = ScannedLine()
    first = text.next_mark()
    if not first:
        found.is_blank = True
        return found
    found.is_object = first == "{"
    expected = VALUE
    open_brackets: list[str] = []
    field_follows = False  # the next value is that of the field
    while expected != NOTHING:
        mark = text.next_mark()
        top_level = found.is_object and len(open_brackets) == 1
        if expected in (NAME, NAME_OR_END) and mark == '"':
            parsed = _beginning(text.string(), NAME_LENGTH)
            if top_level:
                field_follows = parsed == name
                _note_name(found, parsed, field_follows)
            expected = COLON
        elif expected == COLON and mark == ":":
            text.skip(1)
            expected = VALUE
        elif expected == COMMA_OR_END and mark == ",":
            text.skip(1)
            expected = VALUE
            if open_brackets[-1] == "{":
                expected = NAME
        elif _may_close(mark, expected, open_brackets):
            text.skip(1)
            open_brackets.pop()
            expected = _after_value(open_brackets)
        elif _may_begin_value(mark, expected):
            if top_level and field_follows:
                _scan_field(text, mark, found, is_valid)
            else:
                _skip_value(text, mark)
            field_follows = False
            expected = _after_value(open_brackets)
            if mark in BRACKETS:
                expected = _open_bracket(text, mark, open_brackets)
        else:
            raise text.error(f"expecting {expected}")
    if text.next_mark():
        raise text.error(f"expecting {NOTHING}")
    return found


def string_stream(parts: Iterator[str]) -> TextIO:
    """The string whose first character the parts begin with, decoded, as a stream of text."""
    raw = io.BufferedReader(_Utf8(_Characters(parts).string_after_quote()), PART)
    return io.TextIOWrapper(raw, encoding="utf-8", newline="")


def _scan_field(
    text: "_Characters", mark: str, found: ScannedLine, is_valid: Callable[[str], bool]
) -> None:
    """Reads the field's value, whose first character is `mark`, and notes it in `found`.

    Of an object or a list nothing is read yet.
    """
    # A later field of the same name replaces an earlier one, as in json.loads.
    found.start = None
    found.bad_part = None
    found.value = None
    if mark == "{":
        found.value = {}
    elif mark == "[":
        found.value = []
    elif mark != '"':
        found.value = text.scalar()
    else:
        found.start = text.position + 1
        characters = 0
        for part in text.string():
            if found.bad_part is None and not is_valid(part):
                found.bad_part = part
                found.bad_part_start = characters
            characters += len(part)


def _skip_value(text: "_Characters", mark: str) -> None:
    """Reads a value whose first character is `mark`. Of an object or a list nothing is read yet."""
    if mark == '"':
        for _ in text.string():
            pass
    elif mark not in BRACKETS:
        text.scalar()


def _note_name(found: ScannedLine, name: str, is_field: bool) -> None:
    found.has_field |= is_field
    if name not in found.names and len(found.names) < NAMED_FIELDS:
        found.names.append(name)


def _open_bracket(text: "_Characters", mark: str, open_brackets: list[str]) -> str:
    """Reads a bracket that opens an object or a list. Returns what may come next."""
    text.skip(1)
    open_brackets.append(mark)
    if len(open_brackets) > DEEPEST:
        raise text.error("too many objects or lists inside each other")
    if mark == "{":
        return NAME_OR_END
    return VALUE_OR_END


def _may_close(mark: str, expected: str, open_brackets: list[str]) -> bool:
    if expected not in (COMMA_OR_END, NAME_OR_END, VALUE_OR_END):
        return False
    return bool(open_brackets) and BRACKETS[open_brackets[-1]] == mark


def _may_begin_value(mark: str, expected: str) -> bool:
    return expected in (VALUE, VALUE_OR_END) and mark not in ("", "]", "}", ",", ":")


def _after_value(open_brackets: list[str]) -> str:
    if open_brackets:
        return COMMA_OR_END
    return NOTHING


def _beginning(parts: Iterator[str], length: int) -> str:
    """The first `length` characters of the parts.

    All parts are read, so that what follows them in the line comes next.
    """
    beginning = ""
    for part in parts:
        beginning += part[: length - len(beginning)]
    return beginning


class _Characters:
    """The characters of a line, of which at most about two parts are in memory."""

    def __init__(self, parts: Iterator[str]):
        self.parts = parts
        self.buffer = ""
        self.next = 0  # index in the buffer of the first character that was not used yet
        self.dropped = 0  # characters of the line that were used and are not in the buffer any more

    @property
    def position(self) -> int:
        """How many characters of the line were used."""
        return self.dropped + self.next

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{problem}: character {self.position + 1}")

    def skip(self, count: int) -> None:
        self.next += count

    def next_mark(self) -> str:
        """The next character that is not white space; it is not read yet. Empty at the end."""
        while True:
            self.next = _end(WHITESPACE, self.buffer, self.next)
            if self.next < len(self.buffer):
                return self.buffer[self.next]
            if not self._read_more():
                return ""

    def scalar(self) -> Any:
        """Reads a number or a constant. Raises ValueError when it is neither."""
        end = _end(SCALAR, self.buffer, self.next)
        while end == len(self.buffer) and end - self.next < LONGEST_SCALAR and self._read_more():
            end = _end(SCALAR, self.buffer, self.next)
        try:
            value = json.loads(self.buffer[self.next : end])
        except ValueError:
            raise self.error(f"expecting {VALUE}") from None
        self.next = end
        return value

    def string(self) -> Iterator[str]:
        """Reads a string from its opening quote on and yields it decoded, in parts."""
        self.skip(1)
        return self.string_after_quote()

    def string_after_quote(self) -> Iterator[str]:
        while True:
            end = _end(STRING, self.buffer, self.next)
            if end > self.next:
                encoded = self.buffer[self.next : end]
                self.next = end
                if "\\" in encoded:
                    encoded = json.loads(f'"{encoded}"')
                yield encoded
            following = self.buffer[end : end + LONGEST_ESCAPE]
            if following.startswith('"'):
                self.skip(1)
                return
            # Where the buffer ends, or where its end may cut an escape, more is read first.
            may_continue = not following or following.startswith("\\")
            if may_continue and len(following) < LONGEST_ESCAPE and self._read_more():
                continue
            if not following or following[0] in "\r\n":
                raise self.error("unterminated string")
            if following.startswith("\\"):
                raise self.error("invalid escape")
            raise self.error("invalid control character")

    def _read_more(self) -> bool:
        """Adds the next part to the buffer, and drops the characters that were used.

        False at the line's end.
        """
        part = next(self.parts, "")
        self.dropped += self.next
        self.buffer = self.buffer[self.next :] + part
        self.next = 0
        return part != ""


def _end(pattern: re.Pattern, text: str, start: int) -> int:
    """The index where the match at `start` ends. The pattern may match nothing, but must match."""
    match = pattern.match(text, start)
    assert match is not None
    return match.end()


class _Utf8(io.RawIOBase):
    """Parts of text as a stream of bytes in UTF-8."""

    def __init__(self, parts: Iterator[str]):
        self.parts = parts
        self.waiting = b""  # bytes of the latest part that were not read yet

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        while not self.waiting:
            part = next(self.parts, None)
            if part is None:
                return 0
            self.waiting = part.encode()
        count = min(len(target), len(self.waiting))
        target[:count] = self.waiting[:count]
        self.waiting = self.waiting[count:]
        return count
