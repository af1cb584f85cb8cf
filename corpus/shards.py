"""Text to token shards: scan the text, split it by document, tokenize it on all cores, write it.

`scan` reads the text once and notes the hash and length of every chunk. `build` decides from these
which documents are held out, trains the tokenizer, and appends tokens to train.bin and
validation.bin. Every SHARD_CHARACTERS characters it writes down how far it is, so that a build that
was killed continues from there.

It writes into the folder that it is given, which corpus.cache locks. File names and keys in files
are what caches on disk have: survey.npz, pieces.bin and the key "pieces" are older than the words
"scan" and "chunk" in this code.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from config import Config, ExperimentError
from corpus import split
from corpus.checksums import checksum
from corpus.safe_cuts import SafeCuts
from corpus.sources import Source
from corpus.split import CHUNKS_AT_ONCE, Split
from corpus.token_files import (
    FORMAT_VERSION,
    HEADER_BYTES,
    ProgressBar,
    count_both,
    entropy,
    open_shard,
    replace_file,
    unigram_cross_entropy,
    write_header,
)
from corpus.tokenizer import (
    UNKNOWN_SHARE,
    ChunkEncoder,
    character_before_next,
    load_tokenizer,
    sha256,
    train_tokenizer,
    trained_size,
    unknown_share,
    unknown_token,
    vocabulary,
)
from corpus.workers import die_with_parent, ignore_stop_signals
from planner.machine import cpu_cores
from planner.plan import format_duration

# Characters that a tokenizer is trained on: measured 4 to 8 s on 2 cores.
TOKENIZER_SAMPLE = 20_000_000
TOKENIZE_CHARACTERS = 1_000_000  # characters that one core tokenizes at a time
SHARD_CHARACTERS = 64_000_000  # characters after which the tokens outlive a kill

TOKEN_FILES = ("train.bin", "validation.bin")
CHUNK_FILE = "pieces.bin"
SCAN_FILE = "survey.npz"
PROGRESS_FILE = "progress.json"
# What only an unfinished build needs.
TEMPORARY_FILES = (SCAN_FILE, CHUNK_FILE, PROGRESS_FILE)

# What is kept of a chunk of text: its hash, its length in characters, whether its document ends
# with it.
CHUNK = np.dtype([("hash", "<u8"), ("length", "<u4"), ("last", "?")])


# --- scanning the text


@dataclass(frozen=True)
class Scan:
    """What one reading of a text found. All fields but `chunks` are keys of the scan's file."""

    chunks: np.ndarray  # CHUNK records, in reading order
    keys: np.ndarray  # uint64 [chunks], by which version 2 of the rules splits the text
    grouped: bool  # whether the source keeps groups of documents on one side
    whole: bool  # whether these are all chunks of the text
    rows: int  # lines and rows that were read
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
        return _load_scan(path)
    found = read_text(source, to_end=source.scan_to_end)
    _save_scan(found, path)
    return found


def read_text(source: Source, to_end: bool) -> Scan:
    """Reads the text of a source and notes hash, length and end of every chunk.

    Unless `to_end`, it stops after the first document that brings the characters to
    TOKENIZER_SAMPLE. Raises ExperimentError when there is no text.
    """
    # These arrays take 25 bytes a chunk; lists of Python's numbers would take five times as much.
    hashes = array("Q")
    keys = array("Q")
    lengths = array("L")
    ends = bytearray()
    characters = 0
    whole = True
    grouped = False
    group_of_latest = getattr(source, "group", _no_group)
    first = True  # whether the next chunk is the first one of its document
    with ProgressBar("reading the corpus") as bar:
        for text, last in source.chunks():
            hashes.append(text_hash(text))
            if first:
                group = group_of_latest()
                grouped |= group is not None
                key = document_key(hashes[-1], group)
            keys.append(key)
            lengths.append(len(text))
            ends.append(last)
            first = last
            characters += len(text)
            bar.add(len(text), last)
            # `_beginning` cuts a whole scan at the same chunk: change both together.
            if not to_end and last and characters >= TOKENIZER_SAMPLE:
                whole = False
                break
    if not hashes:
        raise ExperimentError(f"{source.name} is empty. Give --data a corpus with text")
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
        bad=rows.bad,
        bad_rows="; ".join(rows.problems),
    )


def _no_group() -> None:
    return None


def document_key(first_hash: int, group: str | None) -> int:
    """What version 2 of the rules splits a text by: the hash of a document's group.

    Where it has no group, it is the hash of its first chunk. So the side of a document is known
    when it begins.
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
        bad=found.bad,
        bad_rows=found.bad_rows,
    )
    temporary.replace(path)


def _load_scan(path: Path) -> Scan:
    with np.load(path) as saved:
        chunks = saved["pieces"]
        # Scans of version 1 that an older program saved have neither keys nor groups.
        keys = chunks["hash"]
        grouped = False
        if "keys" in saved:
            keys = saved["keys"]
            grouped = saved["grouped"].item()
        return Scan(
            chunks=chunks,
            keys=keys,
            grouped=grouped,
            whole=saved["whole"].item(),
            rows=saved["rows"].item(),
            bad=saved["bad"].item(),
            bad_rows=saved["bad_rows"].item(),
        )


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
    decided = split_of(found, validation_fraction, rules)
    return np.concatenate([held_out for _, held_out in decided.blocks(chunks)])


def _beginning(found: Scan) -> Scan:
    """The scan of a text that is not scanned to its end, of one that was scanned to its end.

    It ends with the first document that brings the characters to TOKENIZER_SAMPLE.
    """
    characters = np.cumsum(found.lengths)
    enough = (characters >= TOKENIZER_SAMPLE) & found.chunks["last"]
    if not enough.any():
        return found
    count = enough.argmax() + 1
    return replace(found, chunks=found.chunks[:count], keys=found.keys[:count], whole=False)


# --- the build


def token_dtype(config: Config) -> np.dtype:
    """The type of the tokens in a shard: uint16 if it can hold every id of the vocabulary."""
    if config.vocab_size <= 65536:
        return np.dtype("<u2")
    return np.dtype("<u4")


def build_key(config: Config, tokenizer_json: str | None, rules: int) -> str:
    """Changes with whatever changes the shards of a text, apart from the text.

    A tokenizer that is trained is known by its sample and size; a given one by its tokenizer.json
    or, when that has not been read (None), by its name. Caches on disk are found by this key.
    """
    size = trained_size(config)
    tokenizer: list | str
    if size:
        tokenizer = [TOKENIZER_SAMPLE, size]
    elif tokenizer_json is None:
        tokenizer = config.tokenizer
    else:
        tokenizer = sha256(tokenizer_json)
    parts = [FORMAT_VERSION, tokenizer, token_dtype(config).str, config.validation_fraction]
    if rules > 1:  # the caches of version 1 are older than the rules' version
        parts.append(rules)
    if config.end_of_text:  # older caches know none
        parts.append(config.end_of_text)
    return sha256(json.dumps(parts))[:16]


def build(
    config: Config,
    source: Source,
    found: Scan,
    tokenizer_json: str | None,
    folder: Path,
    rules: int,
) -> None:
    """Writes train.bin, validation.bin, tokenizer.json and the facts in corpus.json.

    `found` is the scan of the source. A tokenizer is trained when tokenizer_json is None. The build
    continues from what a killed one left in the folder.
    Raises ExperimentError when the text has changed since the scan or cannot be tokenized.
    """
    start = time.perf_counter()
    decided = split_of(found, config.validation_fraction, rules)
    print(_scan_message(source, found, decided.held_out))

    if tokenizer_json is None:
        training = ~decided.held_out
        tokenizer_json = _train_or_read_tokenizer(config, source, found, training, folder, rules)
    replace_file(folder / "tokenizer.json", tokenizer_json)
    tokenizer, end_of_text = load_tokenizer(tokenizer_json, config.end_of_text)
    tokenizer_hash = sha256(tokenizer_json)
    dtype = token_dtype(config)
    # The key of the build, by which corpus.cache finds these shards for the same text from another
    # place. It has none when a beginning or groups decided the split: the same text from files is
    # split otherwise.
    key = None
    if found.whole and not (rules > 1 and found.grouped):
        key = build_key(config, tokenizer_json, rules)

    encode = ChunkEncoder(tokenizer, rules)
    batch_encoder = _BatchEncoder(encode, end_of_text, dtype)
    unknown = _Unknown(config, tokenizer)
    done = _write_shards(folder, source, found, decided, SafeCuts(encode), batch_encoder, unknown)
    for name, count in zip(TOKEN_FILES, done.tokens):
        write_header(folder / name, dtype, count, tokenizer_hash)

    train_tokens, validation_tokens = done.tokens
    vocabulary_size = vocabulary(tokenizer)
    train_counts, validation_counts = _count_shards(folder, tokenizer_hash, vocabulary_size)
    chunks = np.memmap(folder / CHUNK_FILE, CHUNK, mode="r")
    held_out, repeated = split.held_out_characters(decided, chunks)
    facts = dict(
        data=config.data,
        documents=len(chunks),
        characters=done.characters,
        train_tokens=train_tokens,
        validation_tokens=validation_tokens,
        vocabulary=vocabulary_size,
        data_hash=data_hash(chunks),
        tokenizer_hash=tokenizer_hash,
        unigram_entropy=entropy(train_counts),
        unigram_cross_entropy=unigram_cross_entropy(train_counts, validation_counts),
        left_out=found.bad,
        recipe=key,
        rules=rules,
        held_out_characters=held_out,
        repeated_characters=repeated,  # of these, how many stand in chunks that are trained on too
        crc32={name: checksum(folder / name) for name in TOKEN_FILES},
    )
    replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
    seconds = time.perf_counter() - start
    print(
        f"data: {train_tokens:,} training and {validation_tokens:,} validation tokens, "
        f"{format_duration(seconds)}"
    )


def _scan_message(source: Source, found: Scan, held_out: np.ndarray) -> str:
    what = source.description
    if not found.whole:
        what = f"the beginning of {what}"
    characters = found.lengths.sum()
    share = found.lengths[held_out].sum() / characters
    return (
        f"data: {what}, {len(found.chunks):,} documents, {characters:,} characters, "
        f"{share:.2%} held out"
    )


def _changed(source: Source) -> ExperimentError:
    return ExperimentError(f"the corpus {source.name} changed while it was being read; run again")


def _count_shards(folder: Path, tokenizer_hash: str, vocabulary_size: int) -> np.ndarray:
    """How often each token occurs in the shards of training and validation, int64 [2, size]."""
    train, validation = [open_shard(folder / name, tokenizer_hash) for name in TOKEN_FILES]
    return count_both(train, validation, vocabulary_size)


# --- the tokenizer


def _train_or_read_tokenizer(
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
        return path.read_bytes().decode()
    start = time.perf_counter()
    sample = _even_sample(training, found.lengths)
    size = trained_size(config)
    assert size is not None  # else the tokenizer is a given one
    texts = _sampled_texts(source, found.chunks, sample)
    tokenizer_json = train_tokenizer(texts, size, rules)
    seconds = time.perf_counter() - start
    characters = found.lengths[sample].sum()
    print(f"data: tokenizer trained on {characters:,} characters in {format_duration(seconds)}")
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
                raise _changed(source)
            if taken:
                yield text
                bar.add(len(text), last)


# --- text in batches


class _MarkedChunk(NamedTuple):
    """A chunk of text, and what the tokens need to know about it."""

    text: str  # what is encoded with it: it is cut where corpus.safe_cuts says
    before: str  # the last character before the text in its document; empty at its beginning
    hash: int
    length: int  # of the chunk itself, in characters
    moved: int  # characters of the next chunk that are encoded with this one
    last: bool  # its document ends with it
    held_out: bool  # its tokens go into validation.bin, not into train.bin
    separated: bool  # an end-of-text token follows it


class _EncoderInput(NamedTuple):
    """The part of a batch that is sent to a worker process. Each list has one element a chunk."""

    texts: list[str]
    before: list[str]
    ends: list[bool]
    held_out: list[bool]
    separated: list[bool]


class _BatchFacts(NamedTuple):
    """The part of a batch that stays in this process, and is written together with its tokens."""

    records: np.ndarray  # one CHUNK record for each chunk
    # Where a later build continues after this batch. None: it cannot continue at this point.
    position: dict | None

    @property
    def characters(self) -> int:
        return int(self.records["length"].sum())

    @property
    def documents(self) -> int:
        return int(self.records["last"].sum())


def _marked_chunks(
    source: Source, start: dict | None, decided: Split, cuts: SafeCuts
) -> Iterator[_MarkedChunk]:
    """The chunks after `start`, a position of the source.

    End-of-text follows the last chunk of a document. In version 1 of the rules, it also follows a
    chunk whose successor goes into the other file. In version 2, the beginning of the successor may
    be encoded with a chunk. So a chunk is yielded when its successor is known.
    """
    number = 0  # of the chunk, counted from the beginning of the text
    before = ""
    moved = 0
    if start:
        number = start["pieces"]
        before = start.get("before", "")
        moved = start.get("moved", 0)
    previous = None
    key = None  # of the document, once it has begun
    for text, last in source.chunks(start):
        digest = text_hash(text)
        if key is None or not decided.by_document:
            key = digest
        if number < len(decided.held_out):
            held_out = bool(decided.held_out[number])
        else:
            held_out = decided.holds_out(key)
        number += 1
        if last:
            key = None
        if previous is not None:
            changes_side = previous.held_out != held_out
            if decided.by_document and not changes_side:
                moved = cuts.moved(previous.before, previous.text, text)
                previous = previous._replace(text=previous.text + text[:moved], moved=moved)
                before = previous.text[-1]
            yield previous._replace(separated=changes_side and not decided.by_document)
        chunk = _MarkedChunk(
            text=text[moved:],
            before=before,
            hash=digest,
            length=len(text),
            moved=0,
            last=last,
            held_out=held_out,
            separated=True,
        )
        moved = 0
        before = character_before_next(text, last)
        if last:
            yield chunk
            previous = None
        else:
            previous = chunk


def _batches(
    source: Source, found: Scan, decided: Split, cuts: SafeCuts, start: dict | None
) -> Iterator[tuple[_EncoderInput, _BatchFacts]]:
    """Cuts the text after `start` into batches of about TOKENIZE_CHARACTERS characters.

    Raises ExperimentError when the text is not what was scanned.
    """
    expected = found.chunks["hash"]
    count = 0  # chunks from the beginning of the text
    if start:
        count = start["pieces"]
    chunks: list[_MarkedChunk] = []
    characters = 0
    characters_since_position = 0
    for chunk in _marked_chunks(source, start, decided, cuts):
        if count < len(expected) and chunk.hash != expected[count]:
            raise _changed(source)
        chunks.append(chunk)
        count += 1
        characters += chunk.length
        if characters < TOKENIZE_CHARACTERS:
            continue
        characters_since_position += characters
        # Not every batch has a position: writing down the progress waits for the disk.
        position = None
        if characters_since_position >= SHARD_CHARACTERS:
            position = source.position(count)
        if position is not None:
            characters_since_position = 0
            if not chunk.last:
                position["before"] = chunk.text[-1]
                position["moved"] = chunk.moved
        yield _encoder_input(chunks), _BatchFacts(_records(chunks), position)
        chunks = []
        characters = 0
    if found.whole and count != len(expected):
        raise _changed(source)
    if chunks:
        yield _encoder_input(chunks), _BatchFacts(_records(chunks), None)


def _encoder_input(chunks: list[_MarkedChunk]) -> _EncoderInput:
    return _EncoderInput(
        texts=[chunk.text for chunk in chunks],
        before=[chunk.before for chunk in chunks],
        ends=[chunk.last for chunk in chunks],
        held_out=[chunk.held_out for chunk in chunks],
        separated=[chunk.separated for chunk in chunks],
    )


def _records(chunks: list[_MarkedChunk]) -> np.ndarray:
    records = np.empty(len(chunks), CHUNK)
    records["hash"] = [chunk.hash for chunk in chunks]
    records["length"] = [chunk.length for chunk in chunks]
    records["last"] = [chunk.last for chunk in chunks]
    return records


# --- batches to tokens


class _BatchEncoder(Dataset[list[np.ndarray] | str]):
    """A Dataset whose index is an _EncoderInput and whose item is its tokens.

    An item is two arrays, [training, validation]. When the tokenizer fails, the item is the message
    of the error, a str.
    """

    def __init__(self, encode: ChunkEncoder, end_of_text: int, dtype: np.dtype):
        self.encode = encode
        self.end_of_text = np.array([end_of_text], np.uint32)
        self.dtype = dtype

    def __getitem__(self, batch: _EncoderInput) -> list[np.ndarray] | str:
        try:
            encoded = self.encode(batch.texts, batch.before, batch.ends)
        except Exception as error:
            # The tokenizers library raises plain Exception. Raised here, DataLoader would add the
            # worker's traceback to its message.
            return str(error)
        nothing = self.end_of_text[:0]  # concatenate needs one array at least
        training = [nothing]
        validation = [nothing]
        for ids, held_out, separated in zip(encoded, batch.held_out, batch.separated):
            side = training
            if held_out:
                side = validation
            side.append(ids)
            if separated:
                side.append(self.end_of_text)
        return [self._joined(training), self._joined(validation)]

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(self.dtype)


def _start_worker(_number: int) -> None:
    die_with_parent()
    # Batches are spread over processes: each uses one core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ignore_stop_signals()


# --- tokens to files


@dataclass
class _Progress:
    """How much of a build is finished. The fields are the keys of progress.json."""

    tokens: list[int]  # of train.bin and of validation.bin
    characters: int
    position: dict | None  # of the source; its key "pieces" is the number of chunks

    def file_sizes(self, token_bytes: int) -> dict[str, int]:
        """How many bytes of each file are finished, with tokens of `token_bytes` bytes."""
        chunks = 0
        if self.position:
            chunks = self.position["pieces"]
        sizes = {CHUNK_FILE: CHUNK.itemsize * chunks}
        for name, count in zip(TOKEN_FILES, self.tokens):
            sizes[name] = HEADER_BYTES + token_bytes * count
        return sizes


def _resume(folder: Path, token_bytes: int) -> _Progress:
    """Prepares the files of a build: what a killed build finished, or empty files.

    What the killed build appended after it last wrote down its progress is cut off.
    """
    done = _read_progress(folder, token_bytes)
    if done is None:
        done = _Progress(tokens=[0, 0], characters=0, position=None)
        for name in done.file_sizes(token_bytes):
            # A new file is made: an old one may be a hard link to that of another cache folder,
            # which must not change.
            (folder / name).unlink(missing_ok=True)
            (folder / name).touch()
    for name, size in done.file_sizes(token_bytes).items():
        os.truncate(folder / name, size)  # makes room for the header in an empty file
    if done.position:
        print(f"data: continuing after {done.characters:,} characters that were tokenized before")
    return done


def _read_progress(folder: Path, token_bytes: int) -> _Progress | None:
    """The progress that a killed build wrote down; None if the files do not hold as much."""
    path = folder / PROGRESS_FILE
    if not path.exists():
        return None
    done = _Progress(**json.loads(path.read_bytes()))
    for name, size in done.file_sizes(token_bytes).items():
        file = folder / name
        if not file.exists() or file.stat().st_size < size:
            return None
    return done


def _write_shards(
    folder: Path,
    source: Source,
    found: Scan,
    decided: Split,
    cuts: SafeCuts,
    batch_encoder: _BatchEncoder,
    unknown: "_Unknown",
) -> _Progress:
    """Appends the tokens of the text to the TOKEN_FILES, and its chunks' records to CHUNK_FILE.

    Returns the progress at the end. Raises ExperimentError when the text cannot be tokenized.
    """
    done = _resume(folder, batch_encoder.dtype.itemsize)
    batches = unknown.checked(_batches(source, found, decided, cuts, done.position))
    workers = _worker_count(found)
    total = _expected_characters(source, found)
    try:
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = []
            for name in (*TOKEN_FILES, CHUNK_FILE):
                files.append(stack.enter_context(open(folder / name, "ab")))
            bar = stack.enter_context(ProgressBar("tokenizing", total, done.characters))
            for tokens, facts in _encoded(batches, batch_encoder, workers):
                _append(files, tokens, facts, done)
                unknown.count(tokens)
                bar.add(facts.characters, facts.documents)
                if facts.position:
                    done.position = facts.position
                    _save_progress(folder, files, done)
    except RuntimeError as error:
        # A signal handler of DataLoader raises it at any line of the above when a worker is gone.
        raise ExperimentError(_worker_died_message(error)) from error
    unknown.warn()
    return done


def _append(
    files: list[BinaryIO], tokens: list[np.ndarray], facts: _BatchFacts, done: _Progress
) -> None:
    """Writes a batch to the files (train.bin, validation.bin, CHUNK_FILE) and adds it to `done`."""
    training, validation = tokens
    train_file, validation_file, chunk_file = files
    train_file.write(training.tobytes())
    validation_file.write(validation.tobytes())
    chunk_file.write(facts.records.tobytes())
    done.tokens[0] += len(training)
    done.tokens[1] += len(validation)
    done.characters += facts.characters


def _worker_count(found: Scan) -> int:
    """How many processes tokenize. 0 is this one: for two batches, starting others takes longer."""
    if found.whole and found.lengths.sum() <= 2 * TOKENIZE_CHARACTERS:
        return 0
    return cpu_cores()


def _expected_characters(source: Source, found: Scan) -> int | None:
    characters = int(found.lengths.sum())
    if found.whole:
        return characters
    return source.expected_characters(characters, int(found.chunks["last"].sum()))


def _encoded(
    batches: Iterator[tuple[_EncoderInput, _BatchFacts]], batch_encoder: _BatchEncoder, workers: int
) -> Iterator[tuple[list[np.ndarray], _BatchFacts]]:
    """Tokenizes the batches in worker processes, and yields them in their order.

    Each is (tokens, facts); tokens are two arrays, [training, validation]. Raises ExperimentError
    when the tokenizer fails.
    """
    # The facts of the batches that are being tokenized, the first of them at the left. They are not
    # sent to the workers, and DataLoader returns the tokens in the order of the batches.
    waiting: collections.deque[_BatchFacts] = collections.deque()

    def inputs() -> Iterator[_EncoderInput]:
        """The texts of each batch, whose facts join the queue at the same moment.

        DataLoader runs this generator in this process, a few batches ahead of the tokens.
        """
        for encoder_input, facts in batches:
            waiting.append(facts)
            yield encoder_input

    context = None
    if workers:
        context = "fork"
    # DataLoader gives every element of a sampler to a worker, as the index of an item of the
    # dataset. Here this index is the batch of texts itself.
    loader = DataLoader(
        batch_encoder,
        sampler=inputs(),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        multiprocessing_context=context,
        # A generator of its own: otherwise DataLoader would advance the global one.
        generator=torch.Generator(),
    )
    for tokens in loader:
        if isinstance(tokens, str):  # the message of an error in the worker
            raise ExperimentError(_cannot_encode_message(tokens))
        yield tokens, waiting.popleft()


def _unchanged(tokens):
    return tokens


def _cannot_encode_message(problem: str) -> str:
    return (
        f"the tokenizer cannot encode this corpus: {problem}. Choose another tokenizer with "
        "--tokenizer"
    )


def _worker_died_message(error: RuntimeError) -> str:
    return (
        f"a tokenizing process ended, most often for lack of memory ({error}). Run again: what was "
        "tokenized is kept, and the next run continues from there"
    )


class _Unknown:
    """Warns, once, when the tokenizer does not know much of the text."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.name = config.tokenizer
        self.tokenizer = tokenizer
        self.token = unknown_token(tokenizer)
        self.unknown = 0  # of the tokens so far
        self.tokens = 0
        self.has_warned = False

    def checked(
        self, batches: Iterator[tuple[_EncoderInput, _BatchFacts]]
    ) -> Iterator[tuple[_EncoderInput, _BatchFacts]]:
        """The same batches, after a warning if the first one has many unknown characters.

        The first batch is read at once, so that the warning comes before anything is tokenized.
        """
        first = next(batches, None)
        if first is None:
            return batches
        batch, _ = first
        self._look_at(batch.texts)
        return itertools.chain([first], batches)

    def _look_at(self, texts: list[str]) -> None:
        try:
            share = unknown_share(self.tokenizer, texts)
        except Exception:  # tokenizers raises plain Exception
            return  # tokenizing the batch fails too, and says why
        if share > UNKNOWN_SHARE:
            self._print(f"{share:.0%} of the characters at the beginning of the text")

    def count(self, tokens: list[np.ndarray]) -> None:
        for side in tokens:
            self.tokens += len(side)
            if self.token is not None:
                self.unknown += int((side == self.token).sum())

    def warn(self) -> None:
        share = self.unknown / max(1, self.tokens)
        if share > UNKNOWN_SHARE and not self.has_warned:
            self._print(f"{share:.0%} of the text's tokens")

    def _print(self, what: str) -> None:
        self.has_warned = True
        print(
            f"warning: the tokenizer {self.name} does not know {what}. The model cannot learn what "
            "is lost there: choose a tokenizer made for such text with --tokenizer, or train one "
            "(--tokenizer train)",
            file=sys.stderr,
        )


def _save_progress(folder: Path, files: list[BinaryIO], done: _Progress) -> None:
    # The files reach the disk first: progress.json must not promise more than they hold.
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    replace_file(folder / PROGRESS_FILE, json.dumps(asdict(done)))
