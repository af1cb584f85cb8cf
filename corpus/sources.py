"""Where a corpus comes from: `open_source` makes the Source that --data names.

A source streams its text in chunks, as often as wanted and always the same; it never holds a
corpus in memory. To add one, write a class with the members of `Source` and let `open_source` pick
it. The split, the tokenizer, the shards, the cache and the evaluation know a source by these
members alone. Which files are read is decided in files.py, and how their formats are read in
formats.py. Only hf: sources use the network.
"""

import functools
import glob
import itertools
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from config import DATA_RULES, Config, ConfigError, ExperimentError, expanded, nearest
from corpus import near_duplicates
from corpus.files import (
    FoundFiles,
    count_suffixes,
    find_files,
    is_shard,
    nothing_to_read_message,
    walk,
)
from corpus.formats import (
    NAMED_PROBLEMS,
    Chunk,
    RowCounter,
    cut,
    file_chunks,
    no_field,
    value_chunks,
)
from planner.layout import quoted, say

BUILT_IN = ("python", "installed")
INSTALLED_SUFFIXES = (
    ".py",
    ".pyi",
    ".pyx",
    ".pxd",
    ".h",
    ".hpp",
    ".hh",
    ".cuh",
    ".txt",
    ".md",
    ".rst",
)
# Folders in which a package keeps copies of other packages.
VENDOR_FOLDERS = ("_vendor", "vendor", "_vendored", "vendored", "extern", "third_party")
# A long document is cut at the first line end after so many characters: least and most. A small
# corpus is cut into about CHUNKS_OF_A_CORPUS chunks, because whole chunks are held out.
CHUNK_CHARACTERS = (2048, 64 * 1024)
CHUNKS_OF_A_CORPUS = 200


class Source(Protocol):
    """A corpus as a stream of text.

    Caches and old runs depend on its chunks, on their order and on its identity.
    """

    name: str
    """What messages call it: the value of --data."""

    description: str
    """What a build calls it in the line that it prints, such as "12 files"."""

    token_shards: list[str]
    """Files that hold tokens already, which corpus.external imports. Empty if it has text."""

    scan_to_end: bool
    """Whether all text is read before the split and the tokenizer are made.

    False where reading means downloading. Then only the beginning is read for the split and the
    tokenizer, and all text is read once, to tokenize it.
    """

    rows: RowCounter
    """The lines and rows read since `chunks` was called, and those that were left out."""

    path: str | None
    """The file that the latest chunk came from; None if it came from no file."""

    def identity(self) -> list:
        """What identifies the text, as a list that JSON can hold.

        At least one value changes whenever the text may have changed. A hash of the list is part of
        the name of the cache's folder.
        """

    def chunks(self, start: dict | None = None) -> Iterator[Chunk]:
        """Yields (text, whether its document ends with it).

        A short document is one chunk, a long one is several. Each call reads from the beginning or,
        if `start` is a `position` of an earlier reading, from there.

        Raises ExperimentError when the text cannot be read, or when more rows are bad than
        config.max_bad_share allows.
        """

    def position(self, count: int) -> dict | None:
        """The position after the first `count` chunks, from which `chunks(start)` continues.

        These chunks have been read already; more may have been read too. The position is a dict
        that JSON can hold, with `count` under the key "pieces". The result is None where reading
        cannot continue exactly there; the caller tries again after a later chunk.
        """

    def expected_characters(self, scanned_characters: int, scanned_documents: int) -> int | None:
        """About how many characters the whole text has. None if unknown.

        It is estimated from the number of characters and documents of the scanned beginning.
        """

    def domain(self) -> str:
        """The name of the domain that the latest chunk belongs to, such as a folder of files.

        tools.evaluate reports a loss for each domain.
        """

    def group(self) -> str | None:
        """What the latest document belongs to, such as a package; None if to nothing.

        Documents of one group stay on one side of the split. Only a source that is scanned to its
        end may have groups. Version 1 of the rules of data does not know groups. A source may lack
        this member: then it has no groups.
        """


def open_source(config: Config, rules: int = DATA_RULES) -> Source:
    """The source that config.data names, under a version of the rules of data.

    Says once on stderr what of a folder or a glob is not read. Raises ExperimentError or
    ConfigError if there is no such source.
    """
    if config.data.startswith("hf:"):
        return HubDataset(config)
    if config.data in BUILT_IN:
        return BuiltIn(config, rules)
    check_path(config.data)
    path = os.path.expanduser(config.data)
    found = find_files(config, path, rules)
    left_out = found.left_out_message()
    if left_out:
        read = count_suffixes(found.read)
        _say_once(f"data: {quoted(path)}: {read} read; not read: {left_out}")
    if is_shard(found.read[0]):
        return TokenShards(config, found.read)
    return Files(config, found.read)


def check_path(data: str) -> None:
    """Raises ExperimentError when `data`, the value of --data, is a path and nothing is there."""
    if data in BUILT_IN or data.startswith("hf:"):
        return
    path = os.path.expanduser(data)
    if os.path.exists(path):
        return
    if not glob.has_magic(path):
        raise ExperimentError(_nothing_there_message(path, data))
    if not any(glob.iglob(path, recursive=True)):
        nothing_found = FoundFiles(path, read=[], left_out={}, hidden=0)
        raise ExperimentError(nothing_to_read_message(nothing_found))


@functools.cache
def _say_once(line: str) -> None:
    """Prints a line on stderr, unless this process has printed it before."""
    say(line, sys.stderr)


# --- text


class TextSource:
    """The base class of the sources here. A subclass adds `identity` and `chunks`.

    It counts what is read, ends the text after config.max_characters, and refuses a corpus of which
    a larger share than config.max_bad_share cannot be read. Members are described in `Source`.
    """

    scan_to_end = True
    path: str | None = None

    def __init__(self, config: Config):
        self.config = config
        self.name = config.data
        self.description = config.data
        self.token_shards: list[str] = []
        self._reset()

    def _reset(self) -> None:
        """Sets every count to zero, at the beginning of each reading."""
        self.rows = RowCounter()
        self.chunks_read = 0
        self.characters_read = 0

    def _counted(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks up to config.max_characters (0: all of them), counted.

        The chunk that reaches the limit ends its document. Raises ExperimentError after the last
        chunk when too many rows are bad.
        """
        limit = self.config.max_characters or float("inf")
        # A reading that continues from the end of an earlier one has nothing left to read.
        if self.characters_read >= limit:
            return
        for text, last in chunks:
            self.chunks_read += 1
            self.characters_read += len(text)
            reached = self.characters_read >= limit
            yield text, last or reached
            if reached:
                break
        self._check_bad_share()

    def _check_bad_share(self) -> None:
        rows = self.rows
        share = self.config.max_bad_share
        if rows.bad <= share * rows.read:
            return
        problems = "; ".join(rows.problems)
        if len(rows.problems) == NAMED_PROBLEMS:
            problems += "; ..."
        raise ExperimentError(
            f"{rows.bad:,} of {rows.read:,} lines or rows of {quoted(self.name)} cannot be read, "
            f"more than {share:.2%} (max_bad_share): {problems}. Correct them (what is not UTF-8 "
            "with iconv, for example), or leave more out with a larger --max_bad_share"
        )

    def _identity(self, kind: str | bool, files: list[str]) -> list:
        """The identity of a source that reads `files`. Old caches are found by exactly this list.

        `kind` tells the sources apart: False for files, True for a built-in corpus, the name of a
        data set of the hub.

        A file is known by its name, its size and its times. The time of the inode's change is one
        of them, because copying and `touch` cannot set it back.
        """
        facts = []
        for path in files:
            stat = os.stat(path)
            name = os.path.abspath(path)
            facts.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        return [
            CHUNK_CHARACTERS,
            self.config.text_field,
            self.config.max_characters,
            self.config.max_bad_share,
            kind,
            facts,
        ]

    def position(self, count: int) -> dict | None:
        # Sources in general have no stream with a state: the number of chunks says it all.
        return dict(pieces=count, characters=self.characters_read, stream=None)

    def expected_characters(self, scanned_characters: int, scanned_documents: int) -> int | None:
        # With scan_to_end the scan has read all of the text.
        return scanned_characters

    def domain(self) -> str:
        return self.name

    def group(self) -> str | None:
        return None


class Files(TextSource):
    """Text files, in the order of the list.

    To continue from a position they are read again, and the chunks before it are skipped.
    """

    def __init__(self, config: Config, files: list[str]):
        super().__init__(config)
        self.files = files
        self.description = "1 file"
        if len(files) != 1:
            self.description = f"{len(files):,} files"
        least, most = CHUNK_CHARACTERS
        corpus_bytes = sum(os.path.getsize(path) for path in files)
        self.chunk_characters = min(most, max(least, corpus_bytes // CHUNKS_OF_A_CORPUS))

    def identity(self) -> list:
        return self._identity(False, self.files)

    def chunks(self, start: dict | None = None) -> Iterator[Chunk]:
        self._reset()
        skipped = 0
        if start:
            skipped = start["pieces"]
        return itertools.islice(self._counted(self._all_chunks()), skipped, None)

    def _all_chunks(self) -> Iterator[Chunk]:
        for path in self._files_to_read():
            self.path = path
            yield from self._chunks_of(path)

    def _files_to_read(self) -> list[str]:
        return self.files

    def _chunks_of(self, path: str) -> Iterator[Chunk]:
        return file_chunks(path, self.config.text_field, self.chunk_characters, self.rows)

    @functools.cached_property
    def _root(self) -> str:
        """The deepest folder that all files are under."""
        folders = {os.path.dirname(os.path.abspath(path)) for path in self.files}
        return os.path.commonpath(folders)

    def domain(self) -> str:
        """The top-level folder of the latest file, seen from the folder that all files share.

        A file that lies directly in the shared folder belongs to the domain of its suffix, such as
        ".txt".
        """
        if self.path is None:
            return self.name
        first, *rest = Path(os.path.relpath(self.path, self._root)).parts
        if rest:
            return first
        return Path(first).suffix or first


class BuiltIn(Files):
    """Text that every machine has.

    `python` is the source of the standard library. `installed` is that and the source, the headers
    and the text of the installed packages.

    From version 2 of the rules of data on, near duplicates are left out. Packages hold copies of
    each other and of themselves, and what is held out would stand in the training text too.
    Where datasketch is not installed they stay, with a warning. That is another corpus.
    """

    def __init__(self, config: Config, rules: int):
        super().__init__(config, _built_in_files(config.data))
        self.keeps_near_duplicates = rules == 1
        self.lacks_datasketch = rules > 1 and not near_duplicates.installed()
        if self.lacks_datasketch:
            self.keeps_near_duplicates = True
            _say_once(
                "warning: near duplicates stay in the corpus, so that some held-out text stands in "
                "the training text too: the package datasketch is not installed. "
                "pip install -r requirements.txt"
            )

    def identity(self) -> list:
        identity = self._identity(True, self.files)
        if self.lacks_datasketch:
            identity.append("with near duplicates")
        return identity

    def _files_to_read(self) -> list[str]:
        if self.keeps_near_duplicates:
            return self.files
        return self._distinct_files

    @functools.cached_property
    def _distinct_files(self) -> list[str]:
        kept = near_duplicates.without_near_duplicates(self.files)
        self.description += (
            f" without {kept.dropped_files:,} near duplicates ({kept.dropped_share:.1%} of the "
            "text)"
        )
        return kept.files

    def group(self) -> str | None:
        """The package or module that the latest file belongs to."""
        if self.path is None:
            return None
        return package_of(self.path, self._roots)

    @functools.cached_property
    def _roots(self) -> list[str]:
        return [*_package_folders(), sysconfig.get_path("stdlib")]

    def _chunks_of(self, path: str) -> Iterator[Chunk]:
        try:
            text = Path(path).read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            # Libraries hold files in odd encodings on purpose, to test with.
            return
        yield from cut(StringIO(text, newline=""), self.chunk_characters)


class TokenShards(Files):
    """Token shards that another program wrote. They hold no text."""

    def __init__(self, config: Config, files: list[str]):
        super().__init__(config, files)
        self.token_shards = files

    def chunks(self, start: dict | None = None) -> Iterator[Chunk]:
        raise ExperimentError(
            f"{self.name} holds token shards, which have no bytes to count. "
            "Give the text itself with --data"
        )


class HubDataset(TextSource):
    """hf:DATASET[:CONFIG[:SPLIT]], a data set of the Hugging Face hub or one in a local folder.

    To continue from a position, nothing before it is downloaded again.
    """

    scan_to_end = False

    def __init__(self, config: Config):
        super().__init__(config)
        self.dataset, self.configuration, self.split = parse_hub_name(config.data)
        self.chunk_characters = CHUNK_CHARACTERS[1]
        self.stream: Any = None  # a datasets.IterableDataset, once it is being read
        self._document_ended = True

    def identity(self) -> list:
        """A data set of the hub is known by its name alone, as what was downloaded is kept.

        One in a folder is known by its files too.
        """
        folder = os.path.expanduser(self.dataset)
        files: list[str] = []
        if os.path.isdir(folder):
            files = walk(folder, suffixes=("",))  # every name ends with ""
        return self._identity(self.name, files)

    def chunks(self, start: dict | None = None) -> Iterator[Chunk]:
        self._reset()
        self.stream = _open_hub(self)
        if start:
            self.chunks_read = start["pieces"]
            self.characters_read = start["characters"]
            self.stream.load_state_dict(start["stream"])
        for text, last in self._counted(self._all_chunks()):
            self._document_ended = last
            yield text, last

    def _all_chunks(self) -> Iterator[Chunk]:
        try:
            yield from value_chunks(
                self._values(), self.config.text_field, self.chunk_characters, self.rows
            )
        except ExperimentError:
            raise
        except Exception as error:
            # The network, the file systems and the formats underneath raise errors of many types.
            raise ExperimentError(
                f"{self.name} could not be read to its end: {first_line(error)}. "
                "Run again: what was tokenized is kept, and the next run continues from there"
            ) from error

    def _values(self) -> Iterator[tuple[str, Any]]:
        field = self.config.text_field
        for row in self.stream:
            if field not in row:
                raise no_field(self.name, field, row)
            self.rows.read += 1
            yield f"{self.name}, row {self.rows.read}", row[field]

    def position(self, count: int) -> dict | None:
        """None unless `count` is all chunks read and the last of them ends its document.

        The stream's state is that after the row that was read last: it can continue nowhere else.
        """
        if count != self.chunks_read or not self._document_ended:
            return None
        return dict(pieces=count, characters=self.characters_read, stream=self.stream.state_dict())

    def expected_characters(self, scanned_characters: int, scanned_documents: int) -> int | None:
        """Assumes that the other documents are as long as those of the beginning.

        Most data sets say how many documents they have. For the others only config.max_characters
        is known, if it is set.
        """
        limit = self.config.max_characters
        if self.stream is None:
            # A build that continues after a kill has its scan from the file and has read nothing.
            self.stream = _open_hub(self)
        splits = self.stream.info.splits
        if not splits or self.split not in splits:
            return limit or None
        num_documents = splits[self.split].num_examples  # 0 where the data set does not say it
        total = num_documents * scanned_characters // scanned_documents
        if limit and total:
            return min(total, limit)
        return total or limit or None


def first_line(error: BaseException) -> str:
    """Names an exception and the first line of what it says."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# --- the Hugging Face hub


def parse_hub_name(data: str) -> tuple[str, str | None, str]:
    """(data set, configuration, split) of hf:DATASET[:CONFIG[:SPLIT]]."""
    name, *rest = data.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise ConfigError(
            f"data={data!r}: the form is hf:DATASET[:CONFIG[:SPLIT]], such as "
            "hf:roneneldan/TinyStories or hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2:train"
        )
    configuration = None
    split = "train"
    if rest and rest[0]:
        configuration = rest[0]
    if len(rest) == 2 and rest[1]:
        split = rest[1]
    return name, configuration, split


def _open_hub(source: HubDataset) -> Any:
    """Opens a data set as a datasets.IterableDataset, of which only the text field is read.

    Raises ExperimentError when it cannot be opened.
    """
    import datasets  # slow to import, and only hf: needs it

    folder = expanded(source.dataset)
    try:
        if (folder / "state.json").exists():
            # Dataset.save_to_disk wrote this folder; load_dataset refuses such a one.
            stream = datasets.load_from_disk(folder).to_iterable_dataset()
        else:
            name = source.dataset
            if folder.is_dir():
                name = str(folder)
            stream = datasets.load_dataset(
                name,
                source.configuration,
                split=source.split,
                streaming=True,
            )
    except ConnectionError as error:
        raise ExperimentError(_offline_message(source, error)) from error
    except Exception as error:
        raise ExperimentError(
            f"cannot open {source.name}: {first_line(error)}. The form is "
            "hf:DATASET[:CONFIG[:SPLIT]]; a data set that needs consent needs the login of the "
            "hub's own command, hf auth login"
        ) from error
    field = source.config.text_field
    if stream.column_names and field in stream.column_names:
        stream = stream.select_columns([field])
    return stream


def _offline_message(source: HubDataset, error: Exception) -> str:
    arguments = f"{source.dataset!r}, {source.configuration!r}, split={source.split!r}"
    return (
        f"{source.name} needs the network, and the Hugging Face hub cannot be reached: "
        f"{first_line(error)}. Go online (and unset HF_HUB_OFFLINE), or on a machine that is "
        f"online save the data set with datasets.load_dataset({arguments})"
        ".to_parquet('FILE.parquet') and give --data FILE.parquet here. --data python and "
        "installed need no network"
    )


# --- files


def _built_in_files(name: str) -> list[str]:
    """The files of the built-in corpus `python` or `installed`."""
    not_library = ("site-packages", "dist-packages", "__pycache__")
    files = walk(sysconfig.get_path("stdlib"), (".py",), not_library)
    if name == "installed":
        for root in _package_folders():
            files += walk(root, INSTALLED_SUFFIXES)
    if not files:
        raise ExperimentError(
            "this Python comes without its library's source files; give --data a file or folder"
        )
    return files


def _package_folders() -> list[str]:
    """The folders that hold the installed packages. Usually there is one."""
    return list(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))


def package_of(path: str, roots: list[str]) -> str:
    """The package or module that a file under one of the folders `roots` belongs to.

    It is the name of the topmost folder or file. A copy of a package within another one belongs to
    the package that it is a copy of, whose version may differ: pip/_vendor/rich/box.py to rich.
    """
    # The longest first: the packages are usually in a folder of the standard library.
    root = max((root for root in roots if path.startswith(root + os.sep)), key=len)
    parts = Path(os.path.relpath(path, root)).parts
    for index, folder in enumerate(parts[:-1]):
        if folder in VENDOR_FOLDERS:
            parts = parts[index + 1 :]
            break
    top = parts[0]
    if top.endswith((".dist-info", ".egg-info")):
        top = top.split("-")[0]
    return top.split(".")[0].lower()


def _nothing_there_message(path: str, data: str) -> str:
    return (
        f"there is no file or folder {quoted(path)}.{nearest(data, BUILT_IN)} Give --data python, "
        "installed, the path of a file, a folder or a glob, or hf:DATASET for one of the Hugging "
        "Face hub"
    )
