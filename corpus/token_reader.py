"""Tokens in files, read as they are needed: `TokenFiles`.

Files are read, not mapped into memory. A mapped file that is cut while it is in use kills the
process (SIGBUS), and as many mapped files as a large corpus has need as many open descriptors.
"""

import bisect
import contextlib
import functools
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import ExperimentError

# Files that a process holds open at a time. Systems allow 1,024 as a rule, and sockets, pipes of
# worker processes and log files need some of them.
OPEN_FILES = 128


class FileVersion(NamedTuple):
    """Two states of a file of equal version have equal content: writing sets the times."""

    size: int  # bytes
    mtime_ns: int  # of the last writing; `touch` and copying can set it
    ctime_ns: int  # of the inode's last change; nobody can set it


def file_version(file: int | str | Path) -> FileVersion:
    """The version of an open file, by its descriptor, or of the file at a path."""
    stat = os.stat(file)  # noqa: PTH116 (a Path cannot be a descriptor)
    return FileVersion(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class FilePart(NamedTuple):
    """Tokens that lie one after the other in a file."""

    path: str
    version: FileVersion  # of the file when it was opened
    dtype: np.dtype  # of a token
    offset: int  # of the first token, in bytes
    num_tokens: int


class TokenFiles:
    """The tokens of one or several files, used as one array [tokens].

    It has what batches need of an array: the length, and slices [first:last]. A slice is read from
    its files when it is taken. It is a new array, with the type of token that the file has.
    Forked processes may read too: each read names its offset, so they share no file position.

    `vocabulary`, if given, is the size of the vocabulary that all tokens must be in. `remedy` is
    the sentence with which messages about a damaged file end: it says what to do.

    A slice raises ExperimentError when its file cannot be read, was cut or replaced since it was
    opened, or holds a token that is not in the vocabulary.
    """

    def __init__(self, parts: list[FilePart], remedy: str, vocabulary: int | None = None):
        # The narrowest type that holds the tokens of every file.
        self.dtype = np.dtype(np.uint16)
        for part in parts:
            self.dtype = np.result_type(self.dtype, part.dtype)
        self.parts = [part for part in parts if part.num_tokens]
        self.remedy = remedy
        self.vocabulary = vocabulary
        # For each part, the number of tokens up to its end, all earlier parts included.
        self.ends = list(itertools.accumulate(part.num_tokens for part in self.parts))

    @property
    def paths(self) -> list[str]:
        return [part.path for part in self.parts]

    def __len__(self) -> int:
        if not self.ends:
            return 0
        return self.ends[-1]

    def __getitem__(self, window: slice) -> np.ndarray:
        first, last, step = window.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read in slices [first:last], without a step")
        arrays = [self._read(part) for part in self._parts_within(first, last)]
        if len(arrays) == 1:
            return arrays[0]
        if not arrays:
            return np.empty(0, self.dtype)
        return np.concatenate(arrays)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All tokens, for functions of numpy."""
        return self[:].astype(dtype or self.dtype, copy=False)

    def between(self, first: int, last: int) -> "TokenFiles":
        """The tokens [first:last] as TokenFiles. Nothing is read."""
        return TokenFiles(self._parts_within(first, last), self.remedy, self.vocabulary)

    def read_ahead(self, first: int, last: int) -> None:
        """Lets the kernel fetch the tokens [first:last] from the disk, without waiting for them."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        with contextlib.suppress(OSError):  # a file system need not take advice
            for part in self._parts_within(first, last):
                file = self._open(part)
                n_bytes = part.num_tokens * part.dtype.itemsize
                os.posix_fadvise(file.descriptor, part.offset, n_bytes, os.POSIX_FADV_WILLNEED)

    def _parts_within(self, first: int, last: int) -> list[FilePart]:
        """The parts that hold the tokens [first:last], and of each part only these tokens."""
        parts = []
        last = min(last, len(self))
        index = bisect.bisect_right(self.ends, first)  # of the part that holds token `first`
        while first < last:
            part = self.parts[index]
            end = self.ends[index]
            taken = min(last, end) - first
            skipped = part.num_tokens - (end - first)  # tokens of the part before `first`
            offset = part.offset + skipped * part.dtype.itemsize
            parts.append(part._replace(offset=offset, num_tokens=taken))
            first += taken
            index += 1
        return parts

    def _read(self, part: FilePart) -> np.ndarray:
        """The tokens of a part, in its own type. Returns [num_tokens]."""
        file = self._open(part)
        tokens = np.empty(part.num_tokens, part.dtype)
        unread = tokens.view(np.uint8).data
        offset = part.offset
        while unread:  # the kernel reads at most 2 GiB at a time
            try:
                n_bytes = os.preadv(file.descriptor, [unread], offset)
            except OSError as error:
                raise ExperimentError(self._cannot_read_message(part, error)) from error
            if n_bytes == 0:
                break
            unread = unread[n_bytes:]
            offset += n_bytes
        # After the reading, so that what was written meanwhile is noticed too.
        stat = os.fstat(file.descriptor)
        if unread or stat.st_size < part.version.size:
            raise ExperimentError(self._cut_message(part, stat.st_size))
        if stat.st_size != part.version.size or stat.st_mtime_ns != part.version.mtime_ns:
            raise ExperimentError(_changed_message(part))
        if self.vocabulary is not None and tokens.max() >= self.vocabulary:
            raise ExperimentError(self._bad_token_message(part, tokens, self.vocabulary))
        return tokens

    def _open(self, part: FilePart) -> "_OpenFile":
        try:
            return _open_file(part.path, part.version)
        except OSError as error:
            raise ExperimentError(self._cannot_read_message(part, error)) from error

    def _cannot_read_message(self, part: FilePart, error: OSError) -> str:
        return f"cannot read {part.path}: {error.strerror}. {self.remedy}"

    def _cut_message(self, part: FilePart, size: int) -> str:
        return (
            f"{part.path} was cut while it was in use: it had {part.version.size:,} bytes and has "
            f"{size:,} now. {self.remedy}"
        )

    def _bad_token_message(self, part: FilePart, tokens: np.ndarray, vocabulary: int) -> str:
        first_bad = int(np.argmax(tokens >= vocabulary))
        byte = part.offset + first_bad * part.dtype.itemsize
        return (
            f"{part.path} is damaged: token {tokens[first_bad]:,} at byte {byte:,} is not in the "
            f"vocabulary of {vocabulary:,} tokens. {self.remedy}"
        )


def _changed_message(part: FilePart) -> str:
    return (
        f"{part.path} was changed while it was in use. Run again; a run that was training "
        "continues with --resume latest"
    )


# --- descriptors


class _OpenFile:
    """A descriptor that is closed when nobody holds this object any more.

    So a reader can use it although another thread has just made the cache below forget it.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self, close=os.close):  # at the end of the program, `os` may be gone already
        close(self.descriptor)


# The version is part of the key: a corpus that was built again has the path of the old one.
@functools.lru_cache(maxsize=OPEN_FILES)
def _open_file(path: str, _version: FileVersion) -> _OpenFile:
    return _OpenFile(os.open(path, os.O_RDONLY))
