"""Reads the documents of one file in chunks: text, JSON lines or parquet, compressed or not.

Lines and rows that hold no text, or no valid text, are left out and counted in a RowCounter. Which
files are read, and in which order, is decided in sources.py. A new file format is added here.

Text files and JSON lines are read in bounded memory, however long their lines and documents are.
Of a parquet file, Arrow holds the text field of one row group at a time.
"""

import codecs
import contextlib
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from config import ExperimentError
from corpus.json_lines import LONG_LINE, PART, LineParts, ScannedLine, scan_line, string_stream
from planner.layout import quoted

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PLAIN_SUFFIXES = (".txt", ".md", ".py")
JSON_LINES_SUFFIX = ".jsonl"
JSON_SUFFIX = ".json"  # such a file may have JSON lines, and may be anything else in JSON
PARQUET_SUFFIX = ".parquet"
READ_SUFFIXES = (*PLAIN_SUFFIXES, JSON_LINES_SUFFIX, JSON_SUFFIX, PARQUET_SUFFIX)
OTHER_COMPRESSIONS = (".bz2", ".xz", ".lz4", ".br", ".zip")  # not read
NAMED_PROBLEMS = 3  # how many of the lines and rows that are left out a message describes

# How files begin that are not what their names say, and what to do about it.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
OTHER_CONTENTS = {
    LFS_POINTER: ("a pointer of Git LFS and not the data. Get the data with: git lfs pull"),
    b"PAR1\x15": "a parquet file. Name it .parquet",
    b"\x1f\x8b": "compressed with gzip. Let its name end with .gz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Let its name end with .zst",
}

Chunk = tuple[str, bool]  # text, and whether its document ends with it


@dataclass
class RowCounter:
    """Counts the lines and rows that were read, and those of them that give no document."""

    read: int = 0
    empty: int = 0  # rows whose text is null or "". They are no mistake: any number is allowed
    bad: int = 0  # lines and rows that hold no valid text
    # "place: what is wrong" of the first NAMED_PROBLEMS places
    problems: list[str] = field(default_factory=list)

    def leave_out(self, place: str, describe: Callable[[], str], count: int = 1) -> None:
        """Counts `count` bad rows at a place.

        `describe` says what is wrong with the first of them. It may have to read the file again,
        so it is called only if a message will name this place.
        """
        named = any(problem.startswith(f"{place}: ") for problem in self.problems)
        if len(self.problems) < NAMED_PROBLEMS and not named:
            self.problems.append(f"{place}: {describe()}")
        self.bad += count


def format_of(path: str) -> str | None:
    """The format that a file has by its name, one of READ_SUFFIXES. None: it cannot be read."""
    name = path.lower()
    if is_compressed(name):
        name = name.rpartition(".")[0]
        if name.endswith(PARQUET_SUFFIX):  # it is compressed inside
            return None
    for suffix in READ_SUFFIXES:
        if name.endswith(suffix):
            return suffix
    return None


def suffix_of(path: str) -> str:
    """The suffix of a file in lower case, of a compressed one with the suffix before: .jsonl.gz."""
    name = Path(path.lower())
    if name.suffix in (*COMPRESSIONS, *OTHER_COMPRESSIONS):
        return Path(name.stem).suffix + name.suffix
    return name.suffix


def is_compressed(path: str) -> bool:
    return path.lower().endswith(tuple(COMPRESSIONS))


# --- chunks


def cut(text: TextIO, length: int) -> Iterator[Chunk]:
    """Cuts a document into chunks of at least `length` characters, which end where a line ends."""
    return _mark_last(_whole_lines(text, length))


def _whole_lines(text: TextIO, length: int) -> Iterator[str]:
    """Chunks of `length` characters, each extended to the end of its line.

    A chunk ends with a line, so that words and sentences are not cut in two. In a text without line
    ends it is cut after 2 * `length` characters, so that it stays small.
    """
    while chunk := text.read(length):
        if len(chunk) == length:
            chunk += text.readline(length)
        yield chunk


def _mark_last(chunks: Iterable[str]) -> Iterator[Chunk]:
    """Yields (chunk, whether it is the last one). It reads one chunk ahead to know that."""
    previous = None
    for chunk in chunks:
        if previous is not None:
            yield previous, False
        previous = chunk
    if previous is not None:
        yield previous, True


def file_chunks(path: str, text_field: str, length: int, rows: RowCounter) -> Iterator[Chunk]:
    """Yields the documents of a file, those longer than `length` characters in several chunks.

    A text file is one document. Each line of a .jsonl or .json file and each row of a .parquet file
    has one in its field `text_field`. Raises ExperimentError when the file cannot be read.
    """
    kind = format_of(path)
    try:
        _check_content(path, kind)
        if kind in (JSON_LINES_SUFFIX, JSON_SUFFIX):
            values = _json_values(path, text_field, rows)
            yield from value_chunks(values, text_field, length, rows)
        elif kind == PARQUET_SUFFIX:
            values = _parquet_values(path, text_field, rows)
            yield from value_chunks(values, text_field, length, rows)
        else:
            with open_text(path) as file:
                yield from _mark_last(_valid_lines(path, file, length, rows))
    except OSError as error:
        raise cannot_read(path, error) from error


def _check_content(path: str, kind: str | None) -> None:
    """Raises ExperimentError when the file is plainly something else than its name says."""
    with open(path, "rb") as file:
        beginning = file.read(64)
    is_pointer = beginning.startswith(LFS_POINTER)
    if not is_pointer and (kind == PARQUET_SUFFIX or is_compressed(path)):
        return  # their readers say what is wrong
    for mark, what in OTHER_CONTENTS.items():
        if beginning.startswith(mark):
            raise ExperimentError(f"{quoted(path)} is {what}")


def cannot_read(path: str, error: OSError) -> ExperimentError:
    # pyarrow raises OSError without a number when the compressed data are damaged.
    if is_compressed(path) and error.errno is None:
        return ExperimentError(
            f"{quoted(path)} is not a valid {Path(path).suffix} file ({error}). Make or download "
            "it again"
        )
    return ExperimentError(
        f"cannot read {quoted(path)}: {error.strerror}. Correct it or take it out of --data"
    )


def _valid_lines(path: str, file: TextIO, length: int, rows: RowCounter) -> Iterator[str]:
    """Chunks of a text file, without the lines that are not text. Counts both in `rows`."""
    for chunk in _whole_lines(file, length):
        if _is_text(chunk):
            rows.read += chunk.count("\n")
            if not chunk.endswith("\n"):
                rows.read += 1  # a last line without a line end
            yield chunk
            continue
        # Lines that end with "\r" alone are lines here too. If only the "\n" were counted, more
        # lines might be bad than were read.
        lines = list(io.StringIO(chunk, newline=""))
        rows.read += len(lines)
        valid = [line for line in lines if _is_text(line)]
        num_bad = len(lines) - len(valid)
        rows.leave_out(quoted(path), functools.partial(_problem_of_file, path), num_bad)
        if valid:
            yield "".join(valid)


def value_chunks(
    values: Iterable[tuple[str, Any]], text_field: str, length: int, rows: RowCounter
) -> Iterator[Chunk]:
    """Yields the documents that are values of a field, in chunks.

    `values` are (place, value): the place is that of the row, for messages. A value that is null,
    empty or not valid UTF-8 is left out and counted in `rows`. A long value may be a stream of
    valid text, which is read before the next value is taken.

    Raises ExperimentError when a value is no text.
    """
    for place, value in values:
        if value is None or value == "":
            rows.empty += 1
            continue
        if isinstance(value, io.TextIOWrapper):
            yield from cut(value, length)
            continue
        if not isinstance(value, str):
            raise ExperimentError(
                f"{place}: field {text_field!r} holds no text: {value!r:.60}. "
                "Correct it, or choose another field with --text_field"
            )
        if not _is_valid_utf8(value):
            rows.leave_out(place, functools.partial(_problem_of_field, text_field, value))
        elif len(value) > length:
            yield from cut(io.StringIO(value, newline=""), length)
        else:
            yield value, True


# --- formats


def open_text(path: str) -> TextIO:
    """Opens a text file, compressed or not, as a stream that keeps line ends as they are.

    Bytes that are not UTF-8 become lone surrogates, by which `_is_valid_utf8` detects them.
    """
    return io.TextIOWrapper(
        _open_bytes(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )


def _open_bytes(path: str) -> Any:
    """Opens a file as a stream of bytes, which are decompressed if its suffix says so."""
    compression = COMPRESSIONS.get(Path(path).suffix.lower())
    if not compression:
        return open(path, "rb")
    # pyarrow reads a file of no bytes as an empty text. It is damaged: even the archive of an empty
    # text has a header.
    if not Path(path).stat().st_size:
        raise OSError("it has no bytes")
    import pyarrow  # slow to import

    raw: Any = pyarrow.input_stream(path, compression=compression)
    return io.BufferedReader(raw, 1 << 20)


def _json_values(path: str, text_field: str, rows: RowCounter) -> Iterator[tuple[str, Any]]:
    """Yields (place, value of the field) of every line that is not blank.

    The value of a line of LONG_LINE characters or more is a stream, if it is a string.
    """
    position = 0  # characters of the file before the line
    number = 0
    with open_text(path) as file, contextlib.closing(_SecondReading(path)) as second_reading:
        while line := file.readline(LONG_LINE):
            number += 1
            place = f"{quoted(path)}:{number}"
            if len(line) < LONG_LINE or line.endswith("\n"):
                yield from _value_of_line(place, line, text_field, rows)
                position += len(line)
                continue
            parts = LineParts(file, line)
            found = _scan_long_line(place, parts, text_field, rows)
            if found is not None:
                value = found.value
                if found.start is not None:
                    value = second_reading.string_at(position + found.start)
                yield place, value
            position += parts.length


class _SecondReading:
    """Reads a file again, for the strings of its long lines.

    It moves forward only, and is opened for the first long line. So a file with long lines is read
    twice, also a compressed one.
    """

    def __init__(self, path: str):
        self.path = path
        self.file: TextIO | None = None
        self.line = LineParts(io.StringIO())
        self.line_start = 0  # characters of the file before `line`

    def string_at(self, position: int) -> TextIO:
        """The string of JSON that begins `position` characters after the file's beginning.

        It must be read before the next call.
        """
        if self.file is None:
            self.file = open_text(self.path)
        at = self.line_start + self.line.length
        while at < position:
            at += len(self.file.read(min(PART, position - at)))
        self.line_start = at
        self.line = LineParts(self.file)
        return string_stream(iter(self.line))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def has_json_lines(path: str, text_field: str) -> bool:
    """Whether the first line of a file is an object in JSON that has the field.

    Raises ExperimentError when the file cannot be read.
    """
    try:
        _check_content(path, JSON_SUFFIX)
        with open_text(path) as file:
            line = file.readline(LONG_LINE)
            while line.isspace():
                line = file.readline(LONG_LINE)
            if not line.lstrip().startswith("{"):
                return False
            found = scan_line(iter(LineParts(file, line)), text_field, _is_valid_utf8)
            return found.is_object and found.has_field
    except ValueError:  # such as the first line of an object that has several lines
        return False
    except OSError as error:
        raise cannot_read(path, error) from error


def _value_of_line(
    place: str, line: str, text_field: str, rows: RowCounter
) -> Iterator[tuple[str, Any]]:
    """Yields (place, value of the field) if the line has one."""
    if line.isspace():
        return
    rows.read += 1
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if place.endswith(":1") and line.strip() in ("[", "{"):
            raise _no_object(place, line) from None
        rows.leave_out(place, functools.partial(_problem_of_json, line, error))
        return
    if not isinstance(row, dict):
        raise _no_object(place, line)
    if text_field not in row:
        raise no_field(place, text_field, row)
    yield place, row[text_field]


def _scan_long_line(
    place: str, parts: LineParts, text_field: str, rows: RowCounter
) -> ScannedLine | None:
    """What a long line holds; None if that is nothing or nothing valid. Reads it to its end."""
    remaining = iter(parts)
    try:
        found = scan_line(remaining, text_field, _is_valid_utf8)
    except ValueError as error:
        rows.read += 1
        rows.leave_out(place, functools.partial(_problem_of_json, parts.latest, error))
        for _ in remaining:
            pass
        return None
    if found.is_blank:
        return None
    rows.read += 1
    if not found.is_object:
        raise _no_object(place, parts.first_part)
    if not found.has_field:
        raise no_field(place, text_field, found.names)
    if found.bad_part is not None:
        rows.leave_out(place, functools.partial(_problem_of_long_field, text_field, found))
        return None
    return found


def _parquet_values(path: str, text_field: str, rows: RowCounter) -> Iterator[tuple[str, Any]]:
    """Yields (place, value of the field) of every row.

    A parquet file is a sequence of row groups, and each can be read without the others. Of a
    damaged one the rows before the damage are yielded; the others are left out.

    Raises ExperimentError when the file is not parquet or has no such field.
    """
    import pyarrow.parquet  # slow to import and rarely needed

    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except PermissionError:
        raise  # file_chunks says it
    except (pyarrow.ArrowException, OSError) as error:
        raise ExperimentError(
            f"{quoted(path)} is not a valid parquet file ({error}). Make or download it again"
        ) from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise no_field(quoted(path), text_field, names)
    group_start = 1  # number of the group's first row; rows are counted from 1
    for group in range(file.num_row_groups):
        group_rows = file.metadata.row_group(group).num_rows
        rows.read += group_rows
        next_row = group_start
        try:
            batches = file.iter_batches(batch_size=1024, row_groups=[group], columns=[text_field])
            for batch in batches:
                for scalar in batch.column(0):
                    yield f"{quoted(path)}, row {next_row}", _python_value(scalar)
                    next_row += 1
        except (pyarrow.ArrowException, OSError) as error:
            place = f"{quoted(path)}, row group {group + 1} of {file.num_row_groups}"
            last_row = group_start + group_rows - 1
            describe = functools.partial(_problem_of_row_group, next_row, last_row, error)
            rows.leave_out(place, describe, last_row - next_row + 1)
        group_start += group_rows


def _python_value(scalar: Any) -> Any:
    """The Python value of an Arrow scalar.

    Bytes that are not UTF-8 become lone surrogates. `value_chunks` detects these and counts the row
    as bad, instead of ending the build.
    """
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        # The buffer of a scalar holds the bytes of this value alone, not those of its column.
        return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape")


def _no_object(place: str, line: str) -> ExperimentError:
    remedy = "jq -c . FILE > FILE.jsonl"
    if line.lstrip().startswith("["):
        remedy = "jq -c '.[]' FILE > FILE.jsonl"
    return ExperimentError(
        f"{place}: the line is not an object in JSON. Write one object a line, for example with "
        f"{remedy}"
    )


def no_field(place: str, text_field: str, names: Iterable[str]) -> ExperimentError:
    """The error of a row that has fields of these names, and not the field of the text."""
    found = ", ".join(map(quoted, names))
    return ExperimentError(
        f"{place}: no field {text_field!r}; the fields are {found}. Choose one with --text_field"
    )


# --- what is wrong with a text


def _is_valid_utf8(text: str) -> bool:
    """Whether it can be written as UTF-8: it has no lone surrogate, which a bad byte becomes."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_text(lines: str) -> bool:
    """Whether these may be lines of a text file.

    A NUL is valid UTF-8, but no text has one: it comes from UTF-16 and from binary files.
    """
    return "\0" not in lines and _is_valid_utf8(lines)


def _first_bad_byte(file: BinaryIO) -> str:
    """A message with the offset of the first byte that UTF-8 text does not have.

    It is called for what is known to be bad. Without such a byte the message is "no text".
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte of `part` in the file
    while True:
        part = file.read(PART)
        kept = len(decoder.getstate()[0])  # bytes of a character that began in the part before
        problem = ""
        valid_bytes = len(part)
        try:
            decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            # The decoder counts from the `kept` bytes. This is negative when the bad character
            # began in the part before.
            valid_bytes = error.start - kept
            problem = f"invalid byte at offset {offset + valid_bytes}"
        null = part.find(0, 0, max(valid_bytes, 0))
        if null >= 0:
            problem = f"a byte 0 at offset {offset + null}, as in UTF-16 and in binary files"
        if problem:
            return f"not text in UTF-8: {problem}"
        if not part:
            return "no text"
        offset += len(part)


def _problem_of_file(path: str) -> str:
    with _open_bytes(path) as file:
        return _first_bad_byte(file)


def _problem_of_value(value: str) -> str:
    try:
        return _first_bad_byte(io.BytesIO(value.encode(errors="surrogateescape")))
    except UnicodeEncodeError:
        # The bytes of the file were valid. JSON can write half of a pair as an escape: "\\ud83d".
        return "no valid text: it holds half of a surrogate pair"


def _problem_of_field(text_field: str, value: str) -> str:
    return f"field {text_field!r} is {_problem_of_value(value)}"


def _problem_of_long_field(text_field: str, found: ScannedLine) -> str:
    assert found.bad_part is not None
    return (
        f"field {text_field!r}, after its first {found.bad_part_start:,} characters, is "
        f"{_problem_of_value(found.bad_part)}"
    )


def _problem_of_json(line: str, error: Exception) -> str:
    # A line in another encoding is not valid JSON either, but the encoding is the cause.
    if not _is_text(line):
        return _problem_of_value(line)
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}: character {error.pos + 1})"
    return f"not valid JSON ({error})"


def _problem_of_row_group(first: int, last: int, error: Exception) -> str:
    return f"rows {first} to {last} are damaged ({error})"
