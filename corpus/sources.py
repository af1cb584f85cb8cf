"""Reads the text that --data names: built-in corpora, files in several formats, data sets of the Hugging Face hub.

Text is streamed, never held: `Text.documents` yields a corpus in pieces, as often as wanted and always the same. Only
hf: sources use the network.
"""

import glob
import io
import itertools
import json
import os
import sysconfig
from pathlib import Path

from config import Config, ConfigError, ExperimentError, nearest

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
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_SUFFIXES = (".txt", ".md", ".py", *JSON_SUFFIXES, ".parquet")
SHARD_SUFFIX = ".bin"
PIECE_CHARACTERS = (
    2048,
    64 * 1024,
)  # after which a long document is cut at the next line end: least, most
SHOWN_BAD_ROWS = 3  # rows left out that a message names


# --- files


def _walk(
    root: str, suffixes: tuple[str, ...], skip: tuple[str, ...] = (), onerror=None
) -> list[str]:
    """Files under `root` with one of the suffixes, in an order that depends only on their paths within `root`. Links to
    folders are followed; a folder to which several ways lead is read once. One that cannot be read is passed over, or
    given to `onerror`."""
    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, onerror=onerror, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if s not in skip)
        found += [os.path.join(folder, n) for n in sorted(names) if n.lower().endswith(suffixes)]
    return [f for f in found if os.path.isfile(f)]  # not broken links


def _cannot_read(error: OSError):
    raise ExperimentError(
        f"cannot read {error.filename}: {error.strerror}. Mend it or take it out of --data"
    ) from error


def find_files(config: Config) -> list[str]:
    """The corpus's files in reading order: all of text, or all token shards. Raises ExperimentError when there are none."""
    if config.data in BUILT_IN:
        files = _walk(
            sysconfig.get_path("stdlib"),
            (".py",),
            ("site-packages", "dist-packages", "__pycache__"),
        )
        if config.data == "installed":
            for root in dict.fromkeys(
                [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
            ):
                files += _walk(root, INSTALLED_SUFFIXES)
        if not files:
            raise ExperimentError(
                "this Python comes without its library's source files; give --data a file or folder"
            )
        return files
    suffixes = (*TEXT_SUFFIXES, SHARD_SUFFIX)
    path = os.path.expanduser(config.data)
    if os.path.isfile(path):
        files = [path]
    elif os.path.isdir(path):
        files = _walk(path, suffixes, onerror=_cannot_read)
    elif glob.has_magic(path):
        # ** follows links to folders too, round and round: a file is read once, by its shortest path
        found = sorted(
            filter(os.path.isfile, glob.glob(path, recursive=True)), key=lambda f: (-len(f), f)
        )
        files = sorted(
            {(os.path.realpath(os.path.dirname(f)), os.path.basename(f)): f for f in found}.values()
        )
    else:
        raise ExperimentError(
            f"there is no file or folder {path}.{nearest(config.data, BUILT_IN)} Give --data python, "
            "installed, the path of a file, a folder or a glob, or hf:DATASET for one of the Hugging Face hub"
        )
    files = [f for f in files if f.lower().endswith(suffixes)]
    if not os.path.isfile(
        path
    ):  # a run's own rows and what was made of a corpus are no text, though they lie among it
        cache = os.path.realpath(config.cache_dir)
        files = [
            f
            for f in files
            if not (
                os.path.basename(f) == "metrics.jsonl"
                and os.path.exists(os.path.join(os.path.dirname(f), "run.json"))
            )
            and os.path.commonpath([cache, os.path.realpath(f)]) != cache
        ]
    if not files:
        raise ExperimentError(
            f"no text to read in {path}: it must be or hold {' '.join(suffixes)} files. "
            "Convert it, or correct --data"
        )
    shards = [f for f in files if f.lower().endswith(SHARD_SUFFIX)]
    if shards and len(shards) < len(files):
        raise ExperimentError(
            f"{path} holds both token shards ({shards[0]}) and text ({(set(files) - set(shards)).pop()}). "
            "Name one kind with a glob, such as --data 'folder/*.bin'"
        )
    return files


def _open(path: str):
    """A text file, compressed or not, as a stream that keeps line ends as they are and turns bytes that are not UTF-8
    into lone surrogates."""
    if (suffix := Path(path).suffix.lower()) in (".gz", ".zst"):
        if not os.path.getsize(
            path
        ):  # even of no text an archive has a header; pyarrow takes it for an empty one
            raise OSError("it has no bytes")
        import pyarrow  # slow to import

        raw = io.BufferedReader(
            pyarrow.input_stream(path, compression={".gz": "gzip", ".zst": "zstd"}[suffix]), 1 << 20
        )
    else:
        raw = open(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _sound(text: str) -> bool:
    """Whether the text can be written as UTF-8: it holds no half of a surrogate pair, so no byte that was not UTF-8."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _plain(line: str) -> bool:
    """Whether it may be a line of a text file. A NUL, though UTF-8, is in none: it comes from UTF-16 and binary files."""
    return "\0" not in line and _sound(line)


def _first_bad_byte(file: io.BufferedIOBase) -> str:
    """Where the first byte is that no text has, for messages."""
    offset = 0
    with file:
        for line in file:  # a line end is never inside a character
            try:
                if "\0" in line.decode():
                    return f"not text in UTF-8: a byte 0 at offset {offset + line.index(0)}, as in UTF-16 and in binary files"
            except UnicodeDecodeError as error:
                return f"not text in UTF-8: invalid byte at offset {offset + error.start}"
            offset += len(line)
    return "no text"


# --- text


class Text:
    """The text that config.data names. Raises ExperimentError when it cannot be read.

    Lines and rows that hold no valid text are left out and counted, `bad` of `rows`, up to the share
    config.max_bad_share; `bad_rows` says where the first ones are.
    """

    def __init__(self, config: Config):
        self.config = config
        self.hub = config.data.startswith("hf:")
        self.files = [] if self.hub else find_files(config)
        least, most = PIECE_CHARACTERS
        size = sum(map(os.path.getsize, self.files))
        self.length = (
            most if self.hub else min(most, max(least, size // 200))
        )  # a small corpus is cut more finely
        self.stream = None
        self.rows = self.bad = self.pieces = self.characters = 0
        self.bad_rows: list[str] = []

    def identity(self) -> list:
        """Changes with whatever may change the text; files are told apart by name, size and times of change, also the one
        that copying and `touch` cannot set back. A data set of the hub is known by its name: what was downloaded is kept."""
        c = self.config
        files, local = self.files, os.path.expanduser(_hub_name(c.data)[0]) if self.hub else ""
        if os.path.isdir(local):
            files = _walk(local, ("",))
        stats = [(os.path.abspath(path), os.stat(path)) for path in files]
        return [
            PIECE_CHARACTERS,
            c.text_field,
            c.max_characters,
            c.max_bad_share,
            c.data if self.hub else c.data in BUILT_IN,
            [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats],
        ]

    def documents(self, start: dict | None = None):
        """Yields (text, whether its document ends with it): a short document at once, a long one in pieces, each
        prolonged to the end of its line unless that is as far again. `start`, a `position` of an earlier reading,
        yields what came after it; nothing of that is downloaded again, but files are read again."""
        self.rows = self.bad = self.pieces = self.characters = 0
        self.bad_rows = []
        if self.hub:
            self.stream = _open_hub(self.config)
            if start:
                self.pieces, self.characters = start["pieces"], start["characters"]
                self.stream.load_state_dict(start["stream"])
        limit = self.config.max_characters or float("inf")
        skipped = start["pieces"] if start and not self.hub else 0
        for text, last in (
            self._hub_pieces()
            if self.hub
            else itertools.chain.from_iterable(map(self._file_pieces, self.files))
        ):
            self.pieces += 1
            self.characters += len(text)
            over = self.characters >= limit
            if self.pieces > skipped:
                yield text, last or over
            if over:
                break
        self._check_share()

    def position(self) -> dict:
        """Where the reading is, as plain types, for `documents`. Of a hub's data set only after the end of a document."""
        return dict(
            pieces=self.pieces,
            characters=self.characters,
            stream=self.stream.state_dict() if self.hub else None,
        )

    def expected_characters(self, characters: int, documents: int) -> int | None:
        """How long a hub's data set is if its documents are as long as those; None when it does not say how many it has."""
        splits, (_, _, split) = self.stream.info.splits, _hub_name(self.config.data)
        there = (
            splits[split].num_examples * characters // documents
            if splits and split in splits
            else 0
        )
        limit = self.config.max_characters
        return min(there, limit) if there and limit else there or limit or None

    def _leave_out(self, place: str, why, count: int = 1) -> None:
        """Counts rows that cannot be read; why() says what is wrong with the first of them at this place."""
        if len(self.bad_rows) < SHOWN_BAD_ROWS and not any(
            row.startswith(f"{place}: ") for row in self.bad_rows
        ):
            self.bad_rows.append(f"{place}: {why()}")
        self.bad += count

    def _check_share(self) -> None:
        share = self.config.max_bad_share
        if self.bad > share * self.rows:
            raise ExperimentError(
                f"{self.bad:,} of {self.rows:,} lines or rows of {self.config.data} cannot be read, more than {share:.2%} "
                f"(max_bad_share): {'; '.join(self.bad_rows)}{'; ...' if len(self.bad_rows) == SHOWN_BAD_ROWS else ''}. Correct "
                "them (what is not UTF-8 with iconv, for example), or leave more out with a larger --max_bad_share"
            )

    # ------------------------------------------------------------ pieces

    def _cut(self, stream, path: str | None = None):
        """Yields (piece, whether it is the last one) of a text stream; of a file, without the lines that are not UTF-8."""

        def read() -> str:
            while piece := stream.read(self.length):
                if len(piece) == self.length:
                    piece += stream.readline(self.length)
                rows = piece.count("\n") + (piece[-1] != "\n") if path else 0
                if path and not _plain(piece):
                    lines = list(io.StringIO(piece, newline=""))
                    rows = len(lines)  # a \r alone ends one too
                    plain = [line for line in lines if _plain(line)]
                    self._leave_out(
                        path, lambda: _first_bad_byte(open(path, "rb")), len(lines) - len(plain)
                    )
                    piece = "".join(plain)
                self.rows += rows
                if piece:
                    return piece
            return ""

        piece = read()
        while piece:
            following = read()
            yield piece, not following
            piece = following

    def _file_pieces(self, path: str):
        name = path.lower()
        try:
            if self.config.data in BUILT_IN:
                try:
                    yield from self._cut(io.StringIO(Path(path).read_bytes().decode(), newline=""))
                except (OSError, UnicodeDecodeError):
                    pass  # libraries hold files in odd encodings on purpose, to test with
            elif name.endswith(JSON_SUFFIXES):
                yield from self._row_pieces(self._json_rows(path))
            elif name.endswith(".parquet"):
                yield from self._row_pieces(self._parquet_rows(path))
            else:
                with _open(path) as file:
                    yield from self._cut(file, path)
        except OSError as error:
            compressed = name.endswith((".gz", ".zst")) and error.errno is None
            raise ExperimentError(
                f"{path} is no sound {Path(path).suffix} file ({error}). Make or download it again"
                if compressed
                else f"cannot read {path}: {error.strerror}. Mend it or take it out of --data"
            ) from error

    def _row_pieces(self, rows):
        """Pieces of the documents that are values of a field: (place, value) each."""
        for place, value in rows:
            if value is None:
                continue
            if not isinstance(value, str):
                raise ExperimentError(
                    f"{place}: field {self.config.text_field!r} holds no text: {value!r:.60}. Correct it, "
                    "or choose another field with --text_field"
                )
            if not _sound(value):
                self._leave_out(
                    place, lambda: f"field {self.config.text_field!r} is {_bad_value(value)}"
                )
            elif len(value) > self.length:
                yield from self._cut(io.StringIO(value, newline=""))
            elif value:
                yield value, True

    def _json_rows(self, path: str):
        """Yields (place, value of the field) for every line that is not blank."""
        field = self.config.text_field
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                self.rows += 1
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    problem = (
                        f"{error.msg}: character {error.pos + 1}"
                        if isinstance(error, json.JSONDecodeError)
                        else str(error)
                    )
                    self._leave_out(
                        f"{path}:{number}",
                        lambda: f"not valid JSON ({problem})" if _plain(line) else _bad_value(line),
                    )
                    continue
                if not isinstance(row, dict) or field not in row:
                    there = (
                        f"the fields are {', '.join(row)}"
                        if isinstance(row, dict)
                        else "the line is not an object"
                    )
                    raise ExperimentError(
                        f"{path}:{number}: no field {field!r}; {there}. Choose one with --text_field"
                    )
                yield f"{path}:{number}", row[field]

    def _parquet_rows(self, path: str):
        """Yields (place, value of the field) for every row. A row group that cannot be read is left out from there on."""
        import pyarrow.parquet  # slow to import and rarely needed

        field, first = self.config.text_field, 1
        try:
            file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ExperimentError(
                f"{path} is not a sound parquet file ({error}). Make or download it again"
            ) from error
        if field not in (names := file.schema_arrow.names):
            raise ExperimentError(
                f"{path}: no field {field!r}; the fields are {', '.join(names)}. Choose one with "
                "--text_field"
            )
        for group in range(file.num_row_groups):
            count, read = file.metadata.row_group(group).num_rows, 0
            self.rows += count
            try:
                for batch in file.iter_batches(
                    batch_size=1024, row_groups=[group], columns=[field]
                ):
                    for value in map(_python, batch.column(0)):
                        read += 1
                        yield f"{path}, row {first + read - 1}", value
            except (pyarrow.ArrowException, OSError) as error:
                place, problem = (
                    f"{path}, row group {group + 1} of {file.num_row_groups}",
                    str(error),
                )
                self._leave_out(
                    place,
                    lambda: f"rows {first + read} to {first + count - 1} are damaged ({problem})",
                    count - read,
                )
            first += count

    def _hub_pieces(self):
        field, place = self.config.text_field, self.config.data

        def rows():
            for row in self.stream:
                if field not in row:
                    raise ExperimentError(
                        f"{place}: no field {field!r}; the fields are {', '.join(row)}. Choose one with "
                        "--text_field"
                    )
                self.rows += 1
                yield f"{place}, row {self.rows}", row[field]

        try:
            yield from self._row_pieces(rows())
        except ExperimentError:
            raise
        except (
            Exception
        ) as error:  # whatever the network, the file systems and the formats underneath raise
            raise ExperimentError(
                f"{place} could not be read to its end: {first_line(error)}. Run again: what was tokenized "
                "is kept, and it goes on from there"
            ) from error


def _bad_value(value: str) -> str:
    """Where a value that is not `_sound`, or a line, has its first byte that is not UTF-8, for messages."""
    try:
        return _first_bad_byte(io.BytesIO(value.encode(errors="surrogateescape")))
    except UnicodeEncodeError:  # valid UTF-8 and JSON, which can write one with an escape
        return "no valid text: it holds half of a surrogate pair"


def _python(scalar):
    """The Python value of an Arrow scalar; text that is not UTF-8 gets lone surrogates."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape")


# --- the Hugging Face hub


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _hub_name(data: str) -> tuple[str, str | None, str]:
    """(data set, configuration, split) of hf:DATASET[:CONFIG[:SPLIT]]."""
    name, *rest = data.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise ConfigError(
            f"data={data!r}: the form is hf:DATASET[:CONFIG[:SPLIT]], such as hf:roneneldan/TinyStories or "
            "hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2:train"
        )
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or "train"


def _open_hub(config: Config):
    """A data set of the hub, or one that lies in a folder, as datasets streams it."""
    name, configuration, split = _hub_name(config.data)
    import datasets  # slow to import, and only hf: needs it

    local = Path(name).expanduser()
    try:
        if (local / "state.json").exists():  # of save_to_disk, which load_dataset refuses
            stream = datasets.load_from_disk(local).to_iterable_dataset()
        else:
            stream = datasets.load_dataset(
                str(local) if local.is_dir() else name, configuration, split=split, streaming=True
            )
    except ConnectionError as error:
        raise ExperimentError(
            f"{config.data} needs the network, and the Hugging Face hub cannot be reached: {first_line(error)}. Go online (and "
            "unset HF_HUB_OFFLINE), or on a machine that is online save the data set with "
            f"datasets.load_dataset({name!r}, {configuration!r}, split={split!r}).to_parquet('FILE.parquet') and give --data "
            "FILE.parquet here. --data python and installed need no network"
        ) from error
    except Exception as error:
        raise ExperimentError(
            f"cannot open {config.data}: {first_line(error)}. The form is hf:DATASET[:CONFIG[:SPLIT]]; a data "
            "set that needs consent needs the login of the hub's own command, hf auth login"
        ) from error
    if stream.column_names and config.text_field in stream.column_names:
        stream = stream.select_columns([config.text_field])
    return stream
