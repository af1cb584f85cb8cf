"""One reading of a text: the hash and the length of every chunk, and what is decided from them.

`scan` notes them. From a scan follow which documents are held out, the identity of the corpus, and
the sample that a tokenizer is trained on.

File names and keys in files are what caches on disk have: survey.npz, pieces.bin and the key
"pieces" are older than the words "scan" and "chunk" in this code.
"""

import hashlib
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import Config, ExperimentError
from corpus import split
from corpus.progress_bar import ProgressBar
from corpus.sources import Source
from corpus.split import CHUNKS_AT_ONCE, Split
from corpus.token_files import discard_unreadable
from corpus.tokenizer import load_tokenizer, train_tokenizer, trained_size
from planner.layout import format_duration, say

# Characters that a tokenizer is trained on: measured 4 to 8 s on 2 cores.
TOKENIZER_SAMPLE = 20_000_000
SCAN_FILE = "survey.npz"

# What is kept of a chunk of text: its hash, its length in characters, whether its document ends
# with it.
CHUNK = np.dtype([("hash", "<u8"), ("length", "<u4"), ("last", "?")])


@dataclass(frozen=True)
class Scan:
    """What one reading of a text found. All fields but `chunks` are keys of the scan's file."""

    chunks: np.ndarray  # CHUNK records, in reading order
    keys: np.ndarray  # uint64 [chunks], by which version 2 of the rules splits the text
    grouped: bool  # whether the source keeps groups of documents on one side
    whole: bool  # whether these are all chunks of the text
    rows: int  # lines and rows that were read
    empty: int  # of these, how many rows have no text: null or an empty string
    bad: int  # of these, how many cannot be read and are left out
    bad_rows: str  # where the first of them are, and what is wrong with them

    @property
    def lengths(self) -> np.ndarray:
        return self.chunks["length"].astype(np.int64)


def scan(source: Source, folder: Path) -> Scan:
    """Reads the text once, or only its beginning when reading the rest means downloading it.

    What was found is kept in `folder` for a build that continues there after a kill.
    Raises ExperimentError when there is no text.
    """
    path = folder / SCAN_FILE
    if path.exists():
        try:
            return _load_scan(path)
        except Exception as error:  # a damaged zip file can raise anything
            discard_unreadable(path, error)
    found = read_text(source, to_end=source.scan_to_end)
    _save_scan(found, path)
    return found


def read_text(source: Source, to_end: bool) -> Scan:
    """Reads the text of a source and notes hash, key, length and end of every chunk.

    Without `to_end`, it stops at the end of the first document with which it has read
    TOKENIZER_SAMPLE characters. Raises ExperimentError when there is no text.
    """
    # These arrays take 25 bytes a chunk; lists of Python's numbers would take five times as much.
    hashes = array("Q")
    keys = array("Q")
    lengths = array("L")
    ends = bytearray()
    characters = 0
    whole = True
    grouped = False
    group_of_latest = getattr(source, "group", _no_group)  # of the latest document
    document_begins = True  # with the next chunk
    with ProgressBar("reading the corpus") as bar:
        for text, last in source.chunks():
            hashes.append(text_hash(text))
            if document_begins:
                group = group_of_latest()
                if group is not None:
                    grouped = True
                key = document_key(hashes[-1], group)
            keys.append(key)  # all chunks of a document have its key
            lengths.append(len(text))
            ends.append(last)
            document_begins = last
            characters += len(text)
            bar.add(len(text), last)
            # `_beginning` cuts a whole scan at the same chunk: change both together.
            if not to_end and last and characters >= TOKENIZER_SAMPLE:
                whole = False
                break
    if not hashes:
        raise _no_text_error(source)
    chunks = np.empty(len(hashes), CHUNK)
    chunks["hash"] = hashes
    chunks["length"] = lengths
    chunks["last"] = np.frombuffer(ends, bool)
    rows = source.rows
    return Scan(
        chunks=chunks,
        keys=np.frombuffer(keys, np.uint64),
        grouped=grouped,
        whole=whole,
        rows=rows.read,
        empty=rows.empty,
        bad=rows.bad,
        bad_rows="; ".join(rows.problems),
    )


def _no_text_error(source: Source) -> ExperimentError:
    rows = source.rows
    if rows.empty:
        return ExperimentError(
            f"{source.name} holds no text: in {rows.empty:,} of {rows.read:,} rows it is null or "
            "empty. Choose another field with --text_field"
        )
    return ExperimentError(f"{source.name} is empty. Give --data a corpus with text")


def _no_group() -> None:
    return None


def document_key(first_hash: int, group: str | None) -> int:
    """The key of a document, by which version 2 of the rules splits a text.

    It is the hash of the document's group or, without a group, of its first chunk. So the side of
    a document is known when it begins.
    """
    if group is None:
        return first_hash
    return text_hash(f"group {group}")


def _save_scan(found: Scan, path: Path) -> None:
    temporary = path.with_name("survey.tmp.npz")
    np.savez(
        temporary,
        pieces=found.chunks,
        keys=found.keys,
        grouped=found.grouped,
        whole=found.whole,
        rows=found.rows,
        empty=found.empty,
        bad=found.bad,
        bad_rows=found.bad_rows,
    )
    temporary.replace(path)


def _load_scan(path: Path) -> Scan:
    """The scan that a killed build left. Raises an error of any kind if it is damaged."""
    if not path.is_file():
        raise ValueError("it is no file")
    with np.load(path) as saved:
        chunks = saved["pieces"]
        # An older program saved scans without keys and groups. They belong to builds by version 1
        # of the rules, which reads neither: any values will do.
        keys = chunks["hash"]
        grouped = False
        if "keys" in saved:
            keys = saved["keys"]
            grouped = saved["grouped"].item()
        empty = 0  # an older program did not count them
        if "empty" in saved:
            empty = saved["empty"].item()
        found = Scan(
            chunks=chunks,
            keys=keys,
            grouped=grouped,
            whole=saved["whole"].item(),
            rows=saved["rows"].item(),
            empty=empty,
            bad=saved["bad"].item(),
            bad_rows=saved["bad_rows"].item(),
        )
    _check_scan(found)
    return found


def _check_scan(found: Scan) -> None:
    """Raises ValueError where the content of a scan's file is not what `_save_scan` writes."""
    if found.chunks.dtype != CHUNK or found.chunks.ndim != 1 or len(found.chunks) == 0:
        raise ValueError("it has no records of chunks")
    if found.keys.dtype != np.uint64 or found.keys.shape != found.chunks.shape:
        raise ValueError("it does not have a key for each chunk")
    kinds = dict(grouped=bool, whole=bool, rows=int, empty=int, bad=int, bad_rows=str)
    for name, kind in kinds.items():
        if type(getattr(found, name)) is not kind:
            raise ValueError(f"{name} is of another kind")


def text_hash(text: str) -> int:
    """64 bits that identify a text: the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def data_hash(chunks: np.ndarray) -> str:
    """The identity of a corpus with these chunks (CHUNK records): the same on every machine.

    The records may be mapped from a file: they are read a part at a time.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in ("hash", "last"):
        for first in range(0, len(chunks), CHUNKS_AT_ONCE):
            digest.update(chunks[name][first : first + CHUNKS_AT_ONCE].tobytes())
    return digest.hexdigest()


def split_of(found: Scan, validation_fraction: float, rules: int) -> Split:
    """What is held out of the text of a scan."""
    return split.decide(found.chunks, found.keys, found.whole, validation_fraction, rules)


def held_out_chunks(
    source: Source, found: Scan, validation_fraction: float, rules: int
) -> np.ndarray:
    """Which chunks a build holds out, bool [chunks]. `found` is a scan of the text to its end."""
    chunks = found.chunks
    if not source.scan_to_end:
        # The build knew the beginning only.
        found = _beginning(found)
    blocks = split_of(found, validation_fraction, rules).blocks(chunks)
    return np.concatenate([held_out for _, held_out in blocks])


def _beginning(found: Scan) -> Scan:
    """Shortens a scan of the whole text to what `read_text` without `to_end` finds.

    It ends at the end of the first document with which it has TOKENIZER_SAMPLE characters.
    """
    characters = np.cumsum(found.lengths)
    enough = (characters >= TOKENIZER_SAMPLE) & found.chunks["last"]
    if not enough.any():
        return found
    count = enough.argmax() + 1
    return replace(found, chunks=found.chunks[:count], keys=found.keys[:count], whole=False)


def changed_error(source: Source) -> ExperimentError:
    return ExperimentError(f"the corpus {source.name} changed while it was being read; run again")


# --- the tokenizer


def train_or_read_tokenizer(
    config: Config,
    source: Source,
    found: Scan,
    training: np.ndarray,
    folder: Path,
    rules: int,
) -> str:
    """The tokenizer.json that a killed build left in the folder, else that of a new tokenizer.

    `training` (bool) says which of the scanned chunks are not held out.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return _left_tokenizer(path, config)
        except (OSError, ValueError, ExperimentError) as error:
            discard_unreadable(path, error)
    start = time.perf_counter()
    sample = _even_sample(training, found.lengths)
    size = trained_size(config)
    assert size is not None  # else the tokenizer is a given one
    texts = _sampled_texts(source, found.chunks, sample)
    tokenizer_json = train_tokenizer(texts, size, rules)
    seconds = time.perf_counter() - start
    characters = found.lengths[sample].sum()
    say(f"data: tokenizer trained on {characters:,} characters in {format_duration(seconds)}")
    return tokenizer_json


def _left_tokenizer(path: Path, config: Config) -> str:
    """The tokenizer.json that a killed build left. Raises an error if it is damaged."""
    if not path.is_file():
        raise ValueError("it is no file")
    tokenizer_json = path.read_bytes().decode()
    load_tokenizer(tokenizer_json, config.end_of_text)
    return tokenizer_json


def _even_sample(training: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which chunks a tokenizer is trained on, bool [chunks].

    They are about TOKENIZER_SAMPLE characters of the training chunks, spread evenly over the text.
    `training` (bool) says which chunks are not held out; `lengths` are in characters.
    """
    share = min(1, TOKENIZER_SAMPLE / lengths[training].sum())
    # Training chunk i is taken where i * share passes a whole number: with a share of 1/3 these are
    # every third chunk.
    totals = np.floor(np.arange(training.sum() + 1) * share)
    sample = training.copy()
    sample[training] = np.diff(totals) > 0
    return sample


def _sampled_texts(source: Source, chunks: np.ndarray, sample: np.ndarray) -> Iterator[str]:
    """The texts of the chunks that `sample` (bool [chunks]) takes, read from the source again.

    Raises ExperimentError when the text is not what was scanned.
    """
    characters = int(chunks["length"][sample].sum())
    with ProgressBar("training the tokenizer", characters) as bar:
        for (text, last), expected, taken in zip(source.chunks(), chunks["hash"], sample):
            if text_hash(text) != expected:
                raise changed_error(source)
            if taken:
                yield text
                bar.add(len(text), last)
