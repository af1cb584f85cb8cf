"""Text to token files: it is cut into batches, tokenized on all cores, and appended to the files.

Every SHARD_CHARACTERS characters `write_shards` writes down how far it is, so that a build that was
killed continues from there. The key "pieces" in progress.json is older than the word "chunk".
"""

import collections
import contextlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from config import Config, ExperimentError
from corpus.progress_bar import ProgressBar
from corpus.safe_cuts import SafeCuts
from corpus.sources import Source
from corpus.split import Split
from corpus.text_scan import CHUNK, Scan, changed_error, text_hash
from corpus.token_files import (
    HEADER_BYTES,
    discard_unreadable,
    read_own_json,
    replace_file,
)
from corpus.tokenizer import (
    UNKNOWN_SHARE,
    ChunkEncoder,
    character_before_next,
    unknown_share,
    unknown_token,
)
from corpus.workers import die_with_parent, ignore_stop_signals
from planner.layout import say
from planner.machine import cpu_cores

TOKENIZE_CHARACTERS = 1_000_000  # characters that one core tokenizes at a time
SHARD_CHARACTERS = 64_000_000  # characters after which the tokens outlive a kill

TOKEN_FILES = ("train.bin", "validation.bin")
CHUNK_FILE = "pieces.bin"
PROGRESS_FILE = "progress.json"


# --- text in batches


class _MarkedChunk(NamedTuple):
    """A chunk of text, and what the tokens need to know about it."""

    text: str  # what is encoded: the chunk as corpus.safe_cuts cuts it
    before: str  # the last character before `text` in its document; empty at its beginning
    hash: int  # of the chunk as it was read
    length: int  # of the chunk as it was read, in characters
    moved: int  # how many characters of the next chunk are at the end of `text`
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
    source: Source, start: dict | None, split: Split, cuts: SafeCuts
) -> Iterator[_MarkedChunk]:
    """The chunks after `start`, a position of the source.

    A chunk is yielded when the next one of its document is known, since that decides two things.
    In version 1 of the rules, an end-of-text token follows a chunk if the next one goes into the
    other file. In version 2, the first characters of the next one may be encoded with a chunk.
    An end-of-text token follows the last chunk of a document in both versions.
    """
    number = 0  # how many chunks of the text come before this one
    before = ""  # the last character that is encoded with the chunks before it
    moved = 0  # how many of its first characters are encoded with the chunk before it
    if start:
        number = start["pieces"]
        before = start.get("before", "")
        moved = start.get("moved", 0)
    previous = None
    key = None  # decides on which side a chunk is (see Split); None where a document begins
    for text, last in source.chunks(start):
        digest = text_hash(text)
        if key is None or not split.by_document:
            key = digest
        if number < len(split.held_out):
            held_out = bool(split.held_out[number])
        else:
            held_out = split.holds_out(key)
        number += 1
        if last:
            key = None
        if previous is not None:
            changes_side = previous.held_out != held_out
            if split.by_document and not changes_side:
                moved = cuts.moved(previous.before, previous.text, text)
                previous = previous._replace(text=previous.text + text[:moved], moved=moved)
                before = previous.text[-1]
            yield previous._replace(separated=changes_side and not split.by_document)
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
    source: Source, found: Scan, split: Split, cuts: SafeCuts, start: dict | None
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
    for chunk in _marked_chunks(source, start, split, cuts):
        if count < len(expected) and chunk.hash != expected[count]:
            raise changed_error(source)
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
        raise changed_error(source)
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


class BatchEncoder(Dataset[list[np.ndarray] | str]):
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
class Progress:
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


def _resume(folder: Path, token_bytes: int) -> Progress:
    """Prepares the files to append to. Returns how much of the build they hold.

    A killed build's files are kept up to the progress that it last wrote down. Without such files,
    new ones are made.
    """
    done = _read_progress(folder, token_bytes)
    if done is None:
        done = Progress(tokens=[0, 0], characters=0, position=None)
        for name in done.file_sizes(token_bytes):
            # A new file is made: an old one may be a hard link to that of another cache folder,
            # which must not change.
            (folder / name).unlink(missing_ok=True)
            (folder / name).touch()
    for name, size in done.file_sizes(token_bytes).items():
        # Cuts off what a killed build appended after its last progress. A new file grows instead,
        # by room for its header.
        os.truncate(folder / name, size)
    if done.position:
        say(f"data: continuing after {done.characters:,} characters that were tokenized before")
    return done


def _read_progress(folder: Path, token_bytes: int) -> Progress | None:
    """The progress that a killed build wrote down; None if the files do not hold as much."""
    path = folder / PROGRESS_FILE
    if not path.exists():
        return None
    try:
        done = _checked_progress(read_own_json(path))
    except (OSError, ValueError) as error:
        discard_unreadable(path, error)
        return None
    for name, size in done.file_sizes(token_bytes).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size < size:
            return None
    return done


def _checked_progress(content: dict) -> Progress:
    """Raises ValueError unless this is the content of a progress.json, every digit of it."""
    content = dict(content)
    checksum = content.pop("crc32", None)  # older programs wrote none
    if checksum is not None and checksum != _crc32(content):
        raise ValueError("its checksum is wrong")
    if content.keys() != {"tokens", "characters", "position"}:
        raise ValueError("it has other keys")
    position = content["position"]
    if position is not None and not isinstance(position, dict):
        raise ValueError("it has no position")
    counts = content["tokens"]
    if not isinstance(counts, list) or len(counts) != len(TOKEN_FILES):
        raise ValueError("it does not have a number of tokens for each file")
    chunks = (position or {}).get("pieces", 0)
    for number in (*counts, content["characters"], chunks):
        if type(number) is not int or not 0 <= number < 2**60:
            raise ValueError("it has a number that counts nothing")
    return Progress(**content)


def _crc32(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_shards(
    folder: Path,
    source: Source,
    found: Scan,
    split: Split,
    cuts: SafeCuts,
    batch_encoder: BatchEncoder,
    unknown: "UnknownTokens",
) -> Progress:
    """Appends the tokens of the text to the TOKEN_FILES, and its chunks' records to CHUNK_FILE.

    Returns the progress at the end. Raises ExperimentError when the text cannot be tokenized.
    """
    done = _resume(folder, batch_encoder.dtype.itemsize)
    batches = unknown.checked(_batches(source, found, split, cuts, done.position))
    workers = _worker_count(found)
    total = _expected_characters(source, found)
    try:
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = []
            for name in (*TOKEN_FILES, CHUNK_FILE):
                files.append(stack.enter_context(open(folder / name, "ab")))
            bar = stack.enter_context(ProgressBar("tokenizing", total, done.characters))
            # Closed at an error too: else its traceback would keep the workers, and Python would
            # wait for them at its exit.
            encoded = stack.enter_context(
                contextlib.closing(_encoded(batches, batch_encoder, workers))
            )
            for tokens, facts in encoded:
                _append(files, tokens, facts, done)
                unknown.count(tokens)
                bar.add(facts.characters, facts.documents)
                if facts.position:
                    done.position = facts.position
                    _save_progress(folder, files, done)
    except RuntimeError as error:
        # A signal handler of DataLoader raises it at any line of the above when a worker is gone.
        raise ExperimentError(_worker_died_message(error)) from error
    unknown.warn_at_end()
    return done


def _append(
    files: list[BinaryIO], tokens: list[np.ndarray], facts: _BatchFacts, done: Progress
) -> None:
    """Writes a batch to the files (train.bin, validation.bin, CHUNK_FILE).

    Its tokens and characters are added to `done`. The position is left to the caller: only some
    batches have one.
    """
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
    batches: Iterator[tuple[_EncoderInput, _BatchFacts]], batch_encoder: BatchEncoder, workers: int
) -> Generator[tuple[list[np.ndarray], _BatchFacts], None, None]:
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


class UnknownTokens:
    """Warns, once, when the tokenizer does not know much of the text."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.name = config.tokenizer
        self.tokenizer = tokenizer
        # The id of the token that stands for unknown text; None if the tokenizer has none.
        self.unknown_id = unknown_token(tokenizer)
        self.num_tokens = 0
        self.num_unknown = 0
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
            self._warn(f"{share:.0%} of the characters at the beginning of the text")

    def count(self, tokens: list[np.ndarray]) -> None:
        """Counts the unknown ones among the tokens of a batch, [training, validation]."""
        for ids in tokens:
            self.num_tokens += len(ids)
            if self.unknown_id is not None:
                self.num_unknown += int((ids == self.unknown_id).sum())

    def warn_at_end(self) -> None:
        """Warns if many of the counted tokens are unknown, and there was no warning before."""
        share = self.num_unknown / max(1, self.num_tokens)
        if share > UNKNOWN_SHARE and not self.has_warned:
            self._warn(f"{share:.0%} of the text's tokens")

    def _warn(self, unknown_part: str) -> None:
        self.has_warned = True
        say(
            f"warning: the tokenizer {self.name} does not know {unknown_part}. The model cannot "
            "learn what is lost there: choose a tokenizer made for such text with --tokenizer, or "
            "train one (--tokenizer train)",
            sys.stderr,
        )


def _save_progress(folder: Path, files: list[BinaryIO], done: Progress) -> None:
    # The files reach the disk first: progress.json must not promise more than they hold.
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    content = asdict(done)
    content["crc32"] = _crc32(content)
    replace_file(folder / PROGRESS_FILE, json.dumps(content))
