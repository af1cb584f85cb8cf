"""Where a corpus comes from: `open_source` makes the Source that --data names.

A source streams its text in chunks, as often as wanted and always the same; it never holds a corpus in memory. To add one, write
a class with the members of `Source` and let `open_source` pick it: the split, the tokenizer, the shards, the cache and the
evaluation know sources by these members alone. Only hf: sources use the network.
"""

import functools
import glob
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from config import Config, ConfigError, ExperimentError, nearest
from corpus.formats import (
    NAMED_PROBLEMS,
    TEXT_SUFFIXES,
    Chunk,
    RowCounter,
    cannot_read,
    cut,
    file_chunks,
    no_field,
    row_chunks,
)

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
SHARD_SUFFIX = ".bin"
# A document is cut into chunks at the first line end after so many characters: least and most. A small corpus is cut
# more finely, as whole chunks are held out.
CHUNK_CHARACTERS = (2048, 64 * 1024)
CHUNKS_OF_A_CORPUS = 200


class Source(Protocol):
    """A corpus as a stream of text. Its chunks, their order and its identity are what caches and old runs depend on."""

    name: str
    """What messages call it: the value of --data."""

    description: str
    """What the line calls it that a build prints, such as "12 files"."""

    token_shards: list[str]
    """Files that hold tokens already, which corpus.external imports; of such a source no chunks are read. Empty for text."""

    scan_to_end: bool
    """Whether all of it is read before the split and the tokenizer are made. Where reading means downloading (False), only
    the beginning is read for them, and then all of it once to tokenize it."""

    rows: RowCounter
    """The lines and rows read so far, and those that were left out. `chunks` sets it back."""

    path: str | None
    """The file that the latest chunk came from; None when it is no file."""

    def identity(self) -> list:
        """Plain values of which at least one changes when the text may have changed. They go into the cache's key."""

    def chunks(self, start: dict | None = None) -> Iterator[Chunk]:
        """Yields (text, whether its document ends with it): a short document at once, a long one in several chunks. Each
        call begins anew; `start`, a `position` of an earlier reading, yields only what came after it.
        Raises ExperimentError when the text cannot be read or too many rows are bad."""

    def position(self, count: int) -> dict | None:
        """Where to continue after the first `count` chunks, as values that JSON keeps; "pieces" among them is `count`.
        At least count chunks have been read. None when no later reading can continue at just this chunk."""

    def expected_characters(self, scanned_characters: int, scanned_documents: int) -> int | None:
        """How long all of it is, judged by its beginning of so many characters and documents; None when unknown."""

    def domain(self) -> str:
        """The part of the corpus that the latest chunk belongs to, under which `tools.evaluate` reports its loss."""


def open_source(config: Config) -> Source:
    """The source that config.data names. Raises ExperimentError or ConfigError when there is none."""
    if config.data.startswith("hf:"):
        return HubDataset(config)
    if config.data in BUILT_IN:
        return BuiltIn(config)
    files = find_files(config)
    if files[0].lower().endswith(SHARD_SUFFIX):
        return TokenShards(config, files)
    return Files(config, files)


# --- text


class TextSource:
    """What the sources of text share: they count, end after config.max_characters, and refuse a corpus of which more than
    config.max_bad_share cannot be read. A subclass has `chunks` and `_identity`."""

    scan_to_end = True
    path: str | None = None

    def __init__(self, config: Config):
        self.config = config
        self.name = config.data
        self.description = config.data
        self.token_shards: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self.rows = RowCounter()
        self.chunks_read = 0
        self.characters_read = 0

    def _counted(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks up to config.max_characters, after which the last document ends."""
        limit = self.config.max_characters or float("inf")
        for text, last in chunks:
            self.chunks_read += 1
            self.characters_read += len(text)
            enough = self.characters_read >= limit
            yield text, last or enough
            if enough:
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
            f"{rows.bad:,} of {rows.read:,} lines or rows of {self.name} cannot be read, more than "
            f"{share:.2%} (max_bad_share): {problems}. Correct them (what is not UTF-8 with iconv, for "
            "example), or leave more out with a larger --max_bad_share"
        )

    def _identity(self, where: str | bool, files: list[str]) -> list:
        """Files are known by name, size and times of change, also the one that copying and `touch` cannot set back."""
        config = self.config
        stats = [(os.path.abspath(path), os.stat(path)) for path in files]
        return [
            CHUNK_CHARACTERS,
            config.text_field,
            config.max_characters,
            config.max_bad_share,
            where,
            [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats],
        ]

    def position(self, count: int) -> dict | None:
        return dict(pieces=count, characters=self.characters_read, stream=None)

    def expected_characters(self, scanned_characters: int, scanned_documents: int) -> int | None:
        return scanned_characters

    def domain(self) -> str:
        return self.name


class Files(TextSource):
    """Text files, in the order of the list. To continue from a position they are read again from the beginning."""

    def __init__(self, config: Config, files: list[str]):
        super().__init__(config)
        self.files = files
        self.description = f"{len(files):,} files"
        least, most = CHUNK_CHARACTERS
        size = sum(map(os.path.getsize, files))
        self.chunk_characters = min(most, max(least, size // CHUNKS_OF_A_CORPUS))

    def identity(self) -> list:
        return self._identity(False, self.files)

    def chunks(self, start: dict | None = None) -> Iterator[Chunk]:
        self._reset()
        skipped = start["pieces"] if start else 0
        return itertools.islice(self._counted(self._all_chunks()), skipped, None)

    def _all_chunks(self) -> Iterator[Chunk]:
        for path in self.files:
            self.path = path
            yield from self._chunks_of(path)

    def _chunks_of(self, path: str) -> Iterator[Chunk]:
        return file_chunks(path, self.config.text_field, self.chunk_characters, self.rows)

    @functools.cached_property
    def _root(self) -> str:
        return os.path.commonpath({os.path.dirname(os.path.abspath(path)) for path in self.files})

    def domain(self) -> str:
        """The top-level folder of the latest file or, beside such folders, its suffix."""
        if self.path is None:
            return self.name
        first, *rest = Path(os.path.relpath(self.path, self._root)).parts
        if rest:
            return first
        return Path(first).suffix or first


class BuiltIn(Files):
    """Text that every machine has: `python`, the standard library's source, and `installed`, which adds source, headers and
    text of the installed packages."""

    def __init__(self, config: Config):
        super().__init__(config, _built_in_files(config.data))

    def identity(self) -> list:
        return self._identity(True, self.files)

    def _chunks_of(self, path: str) -> Iterator[Chunk]:
        try:
            text = Path(path).read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            return  # libraries hold files in odd encodings on purpose, to test with
        yield from cut(StringIO(text, newline=""), self.chunk_characters)


class TokenShards(Files):
    """Token shards of other programs. They hold no text."""

    def __init__(self, config: Config, files: list[str]):
        super().__init__(config, files)
        self.token_shards = files

    def chunks(self, start: dict | None = None) -> Iterator[Chunk]:
        raise ExperimentError(
            f"{self.name} holds token shards, which have no bytes to count. Give the text itself with --data"
        )


class HubDataset(TextSource):
    """A data set of the Hugging Face hub, or one that `datasets` saved in a folder: hf:DATASET[:CONFIG[:SPLIT]].

    To continue from a position nothing of what came before is downloaded again.
    """

    scan_to_end = False

    def __init__(self, config: Config):
        super().__init__(config)
        self.dataset, self.configuration, self.split = parse_hub_name(config.data)
        self.chunk_characters = CHUNK_CHARACTERS[1]
        self.stream: Any = None  # a datasets.IterableDataset, once it is being read
        self._document_ended = True

    def identity(self) -> list:
        """A data set of the hub is known by its name, as what was downloaded is kept; one in a folder by its files too."""
        folder = os.path.expanduser(self.dataset)
        files = walk(folder, ("",)) if os.path.isdir(folder) else []
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
            yield from row_chunks(
                self._values(), self.config.text_field, self.chunk_characters, self.rows
            )
        except ExperimentError:
            raise
        except Exception as error:
            # Whatever the network, the file systems and the formats underneath raise.
            raise ExperimentError(
                f"{self.name} could not be read to its end: {first_line(error)}. Run again: what was tokenized is "
                "kept, and the next run continues from there"
            ) from error

    def _values(self) -> Iterator[tuple[str, Any]]:
        field = self.config.text_field
        for row in self.stream:
            if field not in row:
                raise no_field(self.name, field, f"the fields are {', '.join(row)}")
            self.rows.read += 1
            yield f"{self.name}, row {self.rows.read}", row[field]

    def position(self, count: int) -> dict | None:
        """The stream can be continued only behind the row that it has read last, so at the end of a document."""
        if count != self.chunks_read or not self._document_ended:
            return None
        return dict(pieces=count, characters=self.characters_read, stream=self.stream.state_dict())

    def expected_characters(self, scanned_characters: int, scanned_documents: int) -> int | None:
        """By the number of documents, which most data sets state, if all are as long as those of the beginning."""
        limit = self.config.max_characters
        splits = self.stream.info.splits
        if not splits or self.split not in splits:
            return limit or None
        total = splits[self.split].num_examples * scanned_characters // scanned_documents
        if limit and total:
            return min(total, limit)
        return total or limit or None


def first_line(error: Exception) -> str:
    """Names an exception and the first line of what it says."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# --- the Hugging Face hub


def parse_hub_name(data: str) -> tuple[str, str | None, str]:
    """(data set, configuration, split) of hf:DATASET[:CONFIG[:SPLIT]]."""
    name, *rest = data.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise ConfigError(
            f"data={data!r}: the form is hf:DATASET[:CONFIG[:SPLIT]], such as hf:roneneldan/TinyStories or "
            "hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2:train"
        )
    configuration, split, *_ = [*rest, "", ""]
    return name, configuration or None, split or "train"


def _open_hub(source: HubDataset) -> Any:
    """Opens a data set as a datasets.IterableDataset."""
    import datasets  # slow to import, and only hf: needs it

    folder = Path(source.dataset).expanduser()
    try:
        if (folder / "state.json").exists():
            # Dataset.save_to_disk left it, which load_dataset refuses.
            stream = datasets.load_from_disk(folder).to_iterable_dataset()
        else:
            stream = datasets.load_dataset(
                str(folder) if folder.is_dir() else source.dataset,
                source.configuration,
                split=source.split,
                streaming=True,
            )
    except ConnectionError as error:
        raise ExperimentError(_offline_message(source, error)) from error
    except Exception as error:
        raise ExperimentError(
            f"cannot open {source.name}: {first_line(error)}. The form is hf:DATASET[:CONFIG[:SPLIT]]; a data "
            "set that needs consent needs the login of the hub's own command, hf auth login"
        ) from error
    field = source.config.text_field
    if stream.column_names and field in stream.column_names:
        stream = stream.select_columns([field])
    return stream


def _offline_message(source: HubDataset, error: Exception) -> str:
    arguments = f"{source.dataset!r}, {source.configuration!r}, split={source.split!r}"
    return (
        f"{source.name} needs the network, and the Hugging Face hub cannot be reached: {first_line(error)}. "
        "Go online (and unset HF_HUB_OFFLINE), or on a machine that is online save the data set with "
        f"datasets.load_dataset({arguments}).to_parquet('FILE.parquet') and give --data FILE.parquet here. "
        "--data python and installed need no network"
    )


# --- files


def walk(
    root: str,
    suffixes: tuple[str, ...],
    skip: tuple[str, ...] = (),
    onerror: Callable[[OSError], None] | None = None,
) -> list[str]:
    """Files under `root` with one of the suffixes, in an order that depends only on their paths within `root`.

    Links to folders are followed; a folder to which several ways lead is read once. One that cannot be read is passed
    over, or given to `onerror`.
    """
    found = []
    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=onerror, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name not in skip)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.lower().endswith(suffixes) and os.path.isfile(path):  # no broken link
                found.append(path)
    return found


def _built_in_files(name: str) -> list[str]:
    not_library = ("site-packages", "dist-packages", "__pycache__")
    files = walk(sysconfig.get_path("stdlib"), (".py",), not_library)
    if name == "installed":
        packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        for root in dict.fromkeys(packages):  # they are the same folder as a rule
            files += walk(root, INSTALLED_SUFFIXES)
    if not files:
        raise ExperimentError(
            "this Python comes without its library's source files; give --data a file or folder"
        )
    return files


def find_files(config: Config) -> list[str]:
    """The files that config.data names by path, folder or glob, in reading order: all of them text, or all token shards.
    Raises ExperimentError when there are none."""
    suffixes = (*TEXT_SUFFIXES, SHARD_SUFFIX)
    path = os.path.expanduser(config.data)
    if os.path.isfile(path):
        files = [path]
    elif os.path.isdir(path):
        files = walk(path, suffixes, onerror=_raise_cannot_read)
    elif glob.has_magic(path):
        files = _glob(path)
    else:
        raise ExperimentError(
            f"there is no file or folder {path}.{nearest(config.data, BUILT_IN)} Give --data python, "
            "installed, the path of a file, a folder or a glob, or hf:DATASET for one of the Hugging Face hub"
        )
    files = [file for file in files if file.lower().endswith(suffixes)]
    if not os.path.isfile(path):
        cache = os.path.realpath(config.cache_dir)
        files = [file for file in files if not _made_by_a_run(file, cache)]
    if not files:
        raise ExperimentError(
            f"no text to read in {path}: it must be or hold {' '.join(suffixes)} files. "
            "Convert it, or correct --data"
        )
    shards = [file for file in files if file.lower().endswith(SHARD_SUFFIX)]
    texts = [file for file in files if not file.lower().endswith(SHARD_SUFFIX)]
    if shards and texts:
        raise ExperimentError(
            f"{path} holds both token shards ({shards[0]}) and text ({texts[0]}). "
            "Name one kind with a glob, such as --data 'folder/*.bin'"
        )
    return files


def _raise_cannot_read(error: OSError) -> None:
    raise cannot_read(error.filename, error) from error


def _glob(pattern: str) -> list[str]:
    """Sorted files of a glob. `**` follows links to folders too, round and round: a file is read once, by its shortest
    path."""
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    found.sort(key=lambda path: (-len(path), path))
    shortest = {}
    for path in found:  # the longest first, so that the shortest stays
        shortest[os.path.realpath(os.path.dirname(path)), os.path.basename(path)] = path
    return sorted(shortest.values())


def _made_by_a_run(path: str, cache: str) -> bool:
    """Whether this program wrote a file that lies among text: the metrics of a run, or a cached corpus."""
    folder, name = os.path.split(path)
    if name == "metrics.jsonl" and os.path.exists(os.path.join(folder, "run.json")):
        return True
    return os.path.commonpath([cache, os.path.realpath(path)]) == cache
