"""Text to token shards: the split by document, and tokenizing on all cores.

`build` appends to two shards and writes down, every SHARD_CHARACTERS characters, how far it is, so that a build that was
killed goes on from there.
"""

import collections
import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import struct
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Config, ExperimentError
from corpus.sources import Source
from corpus.tokenizer import (
    encoder,
    load_tokenizer,
    sha256,
    train_tokenizer,
    trained_size,
    vocabulary,
)
from planner.machine import cpu_cores

TOKENIZER_SAMPLE = (
    20_000_000  # characters that a tokenizer is trained on: measured 4 to 8 s on 2 cores
)
TOKENIZE_CHARACTERS = 1_000_000  # characters tokenized at a time, by one core
SHARD_CHARACTERS = 64_000_000  # characters after which what is tokenized outlives a kill
COUNT_TOKENS = 2**20  # tokens counted at a time
PR_SET_PDEATHSIG = 1  # of Linux's prctl
FORMAT_VERSION = 2  # of the cache: raise it when the same files would give other shards
MAGIC, HEADER_BYTES = b"MOETOKEN", 1024
HEADER = struct.Struct(
    "<8sIIQ32s"
)  # magic, version, bytes in a token, tokens, the tokenizer's sha256
# A piece of text: its hash, its length in characters, whether its document ends with it.
CHUNK = np.dtype([("hash", "<u8"), ("length", "<u4"), ("last", "?")])


# --- what the text is like


class Bar:
    """A progress bar: characters or tokens a second, documents a second and, with a total, the time left."""

    def __init__(self, what: str, total: int | None = None, done: int = 0, unit: str = "char"):
        self.bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=True,
            leave=False,
            mininterval=0.5,
        )
        self.start, self.documents = time.perf_counter(), 0

    def add(self, count: int, documents: int = 0) -> None:
        self.documents += documents
        if self.documents:
            self.bar.set_postfix_str(
                f"{self.documents / (time.perf_counter() - self.start):,.0f} documents/s",
                refresh=False,
            )
        self.bar.update(count)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def data_hash(pieces: np.ndarray) -> str:
    """The identity of a corpus, of its pieces (CHUNK array, which may be mapped): the same on every machine."""
    total = hashlib.blake2b(digest_size=16)
    for name in ("hash", "last"):
        for first in range(0, len(pieces), COUNT_TOKENS):
            total.update(pieces[name][first : first + COUNT_TOKENS].tobytes())
    return total.hexdigest()


def scan(text: Source, folder: Path) -> dict:
    """Reads the text once; of a hub's data set only as much as a tokenizer is trained on. Kept in the folder for the next
    time. Returns pieces (CHUNK array), whole (whether they are all), and rows, bad, bad_rows of its RowCounter."""
    path = folder / "survey.npz"
    if path.exists():
        with np.load(path) as saved:
            return {name: saved[name] if saved[name].ndim else saved[name].item() for name in saved}
    hashes, lengths, ends, whole = array("Q"), array("L"), bytearray(), True
    characters = 0
    with Bar("reading the corpus") as bar:
        for piece, last in text.chunks():
            hashes.append(text_hash(piece))
            lengths.append(len(piece))
            ends.append(last)
            bar.add(len(piece), last)
            characters += len(piece)
            if (
                not text.scan_to_end and characters >= TOKENIZER_SAMPLE and last
            ):  # `surveyed` says the same
                whole = False
                break
    if not hashes:
        raise ExperimentError(f"{text.name} is empty. Give --data a corpus with text")
    pieces = np.empty(len(hashes), CHUNK)
    pieces["hash"], pieces["length"], pieces["last"] = hashes, lengths, np.frombuffer(ends, bool)
    found = dict(
        pieces=pieces,
        whole=whole,
        rows=text.rows.read,
        bad=text.rows.bad,
        bad_rows="; ".join(text.rows.problems),
    )
    np.savez(folder / "survey.tmp.npz", **found)
    os.replace(folder / "survey.tmp.npz", path)
    return found


def scanned(pieces: np.ndarray) -> np.ndarray:
    """Of all pieces of a hub's data set, those that `survey` reads."""
    enough = (np.cumsum(pieces["length"], dtype=np.int64) >= TOKENIZER_SAMPLE) & pieces["last"]
    return pieces[: enough.argmax() + 1] if enough.any() else pieces


def split(hashes: np.ndarray, lengths: np.ndarray, validation_fraction: float) -> np.ndarray:
    """Which documents are held out, bool [documents]: those of the lowest hashes, until they hold validation_fraction
    of all characters. Equal documents have equal hashes, so they stay together; two different ones give two sides."""
    order = np.argsort(hashes, kind="stable")
    characters = np.cumsum(lengths[order])
    last = order[np.searchsorted(characters, validation_fraction * characters[-1])]
    validation = hashes <= hashes[last]
    return hashes < hashes.max() if validation.all() else validation


def last_held_out(pieces: np.ndarray, validation_fraction: float) -> int:
    """The highest hash that is held out of a text with these pieces (CHUNK array); -1 when none is."""
    held_out = split(pieces["hash"], pieces["length"].astype(np.int64), validation_fraction)
    return int(pieces["hash"][held_out].max()) if held_out.any() else -1


def _changed(text: Source) -> ExperimentError:
    return ExperimentError(f"the corpus {text.name} changed while it was being read; run again")


# --- building shards


def token_dtype(config: Config) -> np.dtype:
    return np.dtype("<u2" if config.vocab_size <= 65536 else "<u4")


def build_key(config: Config, tokenizer_json: str | None) -> str:
    """Changes with whatever changes the shards of a text, besides the text."""
    size = trained_size(config)
    tokenizer = (
        [TOKENIZER_SAMPLE, size]
        if size
        else config.tokenizer
        if tokenizer_json is None
        else sha256(tokenizer_json)
    )
    return sha256(
        json.dumps([FORMAT_VERSION, tokenizer, token_dtype(config).str, config.validation_fraction])
    )[:16]


def replace_file(path: Path, content: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def build(
    config: Config, text: Source, found: dict, tokenizer_json: str | None, folder: Path
) -> None:
    """Trains the tokenizer when tokenizer_json is None, and writes train.bin, validation.bin, tokenizer.json and the facts
    in corpus.json; `found` is the text's survey. Goes on from what a killed build left in the folder."""
    start, made_by = time.perf_counter(), build_key(config, tokenizer_json)
    pieces, lengths = found["pieces"], found["pieces"]["length"].astype(np.int64)
    limit, characters = last_held_out(pieces, config.validation_fraction), int(lengths.sum())
    held_out = pieces["hash"] <= limit
    what = text.description
    if not found["whole"]:
        what = f"the beginning of {what}"
    print(
        f"data: {what}, {len(pieces):,} documents, {characters:,} characters, {lengths[held_out].sum() / characters:.2%} held out"
    )
    if tokenizer_json is None and (folder / "tokenizer.json").exists():
        tokenizer_json = (folder / "tokenizer.json").read_bytes().decode()
    elif tokenizer_json is None:
        began, sample = time.perf_counter(), ~held_out
        share = min(1, TOKENIZER_SAMPLE / lengths[sample].sum())
        sample[sample] = (
            np.diff(np.floor(np.arange(sample.sum() + 1) * share)) > 0
        )  # spread evenly over the corpus
        tokenizer_json = train_tokenizer(_chosen(text, pieces, sample), trained_size(config))
        print(
            f"data: tokenizer trained on {lengths[sample].sum():,} characters in {time.perf_counter() - began:.1f} s"
        )
    replace_file(folder / "tokenizer.json", tokenizer_json)

    tokenizer, end_of_text = load_tokenizer(tokenizer_json)
    dtype, tokenizer_hash = token_dtype(config), sha256(tokenizer_json)
    done = _write_shards(
        folder, text, found, limit, _Encoder(encoder(tokenizer), end_of_text, dtype)
    )
    for name, tokens in zip(("train.bin", "validation.bin"), done["tokens"]):
        with open(folder / name, "r+b") as file:
            file.write(
                HEADER.pack(
                    MAGIC, FORMAT_VERSION, dtype.itemsize, tokens, bytes.fromhex(tokenizer_hash)
                )
            )
    with Bar("counting", done["tokens"][0], unit="token") as bar:
        counts = count_tokens(
            np.memmap(folder / "train.bin", dtype, mode="r", offset=HEADER_BYTES),
            vocabulary(tokenizer),
            bar,
        )
    read = np.memmap(folder / "pieces.bin", CHUNK, mode="r")
    facts = dict(
        data=config.data,
        documents=len(read),
        characters=done["characters"],
        train_tokens=done["tokens"][0],
        validation_tokens=done["tokens"][1],
        vocabulary=vocabulary(tokenizer),
        data_hash=data_hash(read),
        tokenizer_hash=tokenizer_hash,
        unigram_entropy=entropy(counts),
        left_out=found["bad"],
        recipe=made_by if found["whole"] else None,
    )  # else the same text from files is split otherwise
    replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
    print(
        f"data: {done['tokens'][0]:,} training and {done['tokens'][1]:,} validation tokens, {time.perf_counter() - start:.1f} s"
    )


def _chosen(text: Source, pieces: np.ndarray, chosen: np.ndarray):
    """The chosen pieces of a text that was surveyed."""
    with Bar("training the tokenizer", int(pieces["length"][chosen].sum())) as bar:
        for (piece, last), expected, take in zip(text.chunks(), pieces["hash"], chosen):
            if text_hash(piece) != expected:
                raise _changed(text)
            if take:
                yield piece
                bar.add(len(piece), last)


class _Encoder:
    """What DataLoader indexes, by (texts, the side of each, whether end-of-text follows it): the tokens of both sides."""

    def __init__(self, encode, end_of_text: int, dtype: np.dtype):
        self.encode, self.end_of_text, self.dtype = (
            encode,
            np.array([end_of_text], np.uint32),
            dtype,
        )

    def __getitem__(self, batch: tuple):
        texts, sides, separated = batch
        try:
            encoded = self.encode(texts)
        except (
            Exception
        ) as error:  # tokenizers raises plain Exception; DataLoader would add a traceback to it
            return str(error)
        parts = ([self.end_of_text[:0]], [self.end_of_text[:0]])
        for ids, side, separate in zip(encoded, sides, separated):
            parts[side].extend([ids, self.end_of_text] if separate else [ids])
        return [np.concatenate(part).astype(self.dtype) for part in parts]


LIBC = ctypes.CDLL(None)


def signal_with_parent(number: int) -> None:
    """Lets the kernel send this process a signal when the one that made it has ended (Linux alone can)."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, number)


def die_with_parent() -> None:
    """Lets the kernel end this worker process when the one that made it is killed. Else it would wait for ever to hand
    over its work, and hold the lock of the folder that the killed build left."""
    signal_with_parent(signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # it was killed just before
        os._exit(1)


def _start_worker(_number: int):
    """Texts are spread over processes, each on one core; the first process alone decides when to stop."""
    die_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _batches(text: Source, found: dict, limit: int, start: dict | None):
    """Cuts the text after `start` into batches: yields (what _Encoder is indexed by, its CHUNK array, a position to go on
    from or None). Pieces whose hash is at most `limit` are held out. Raises ExperimentError when the text has changed."""
    pieces, number, since = found["pieces"], start["pieces"] if start else 0, 0

    def marked():
        """(text, hash, last, side, separate): end-of-text follows the last piece of a document, and a piece whose successor
        is on the other side."""
        previous = None
        for piece, last in text.chunks(start):
            digest = text_hash(piece)
            side = digest <= limit
            if previous:
                yield *previous, previous[-1] != side
            previous = None if last else (piece, digest, last, side)
            if last:
                yield piece, digest, last, side, True

    def packed(batch: list, position: dict | None):
        texts, hashes, last, sides, separated = zip(*batch)
        record = np.empty(len(batch), CHUNK)
        record["hash"], record["length"], record["last"] = hashes, list(map(len, texts)), last
        return (list(texts), sides, separated), record, position

    batch, size = [], 0
    for one in marked():
        piece, digest, *_ = one
        if number < len(pieces) and pieces["hash"][number] != digest:
            raise _changed(text)
        batch.append(one)
        number, size, since = number + 1, size + len(piece), since + len(piece)
        if size >= TOKENIZE_CHARACTERS:
            position = None
            if since >= SHARD_CHARACTERS:
                position = text.position(number)
                if position is not None:
                    since = 0
            yield packed(batch, position)
            batch, size = [], 0
    if found["whole"] and number != len(pieces):
        raise _changed(text)
    if batch:
        yield packed(batch, None)


def _progress(folder: Path, names: tuple, width: int) -> dict:
    """What a killed build wrote down of its work, after cutting off what it appended later; else an empty beginning."""
    done = empty = dict(tokens=[0, 0], characters=0, position=None)
    if (folder / "progress.json").exists():
        done = json.loads((folder / "progress.json").read_bytes())

    def sizes(done: dict) -> dict:
        pieces = done["position"]["pieces"] if done["position"] else 0
        return dict(
            zip(
                names,
                [HEADER_BYTES + width * n for n in done["tokens"]] + [CHUNK.itemsize * pieces],
            )
        )

    if any(
        not (folder / name).exists() or (folder / name).stat().st_size < size
        for name, size in sizes(done).items()
    ):
        done = empty
        for name in names:
            (folder / name).unlink(missing_ok=True)  # it may be a link to another cache folder's
            (folder / name).touch()
    for name, size in sizes(done).items():
        os.truncate(folder / name, size)
    if done["position"]:
        print(f"data: going on after {done['characters']:,} characters that were tokenized before")
    return done


def _write_shards(folder: Path, text: Source, found: dict, limit: int, tokens_of: _Encoder) -> dict:
    """Appends the tokens of the text to train.bin and validation.bin, after room for their headers, and what it read to
    pieces.bin. Returns tokens (of both) and characters, all that there are."""
    names = ("train.bin", "validation.bin", "pieces.bin")
    done = _progress(folder, names, tokens_of.dtype.itemsize)
    total = int(found["pieces"]["length"].sum())
    workers = 0 if found["whole"] and total <= 2 * TOKENIZE_CHARACTERS else cpu_cores()
    if not found["whole"]:
        total = text.expected_characters(total, int(found["pieces"]["last"].sum()))
    waiting = (
        collections.deque()
    )  # of the batches whose tokens are being made: CHUNK array, position

    def batches():
        for batch, *rest in _batches(text, found, limit, done["position"]):
            waiting.append(rest)
            yield batch

    files = [open(folder / name, "ab") for name in names]
    try:
        with Bar("tokenizing", total, done["characters"]) as bar:
            for tokens in DataLoader(
                tokens_of,
                sampler=batches(),
                batch_size=None,
                num_workers=workers,
                collate_fn=lambda x: x,
                worker_init_fn=_start_worker,
                multiprocessing_context="fork" if workers else None,
                generator=torch.Generator(),
            ):  # its own, or it would advance the global one
                if isinstance(tokens, str):
                    raise ExperimentError(
                        f"the tokenizer cannot encode this corpus: {tokens}. Choose another with --tokenizer"
                    )
                record, position = waiting.popleft()
                for file, content in zip(files, (*tokens, record)):
                    file.write(content.tobytes())
                done["tokens"] = [n + len(t) for n, t in zip(done["tokens"], tokens)]
                characters = int(record["length"].sum())
                done["characters"] += characters
                bar.add(characters, int(record["last"].sum()))
                if position:
                    for file in files:
                        file.flush()
                        os.fsync(file.fileno())
                    done["position"] = position
                    replace_file(folder / "progress.json", json.dumps(done))
    except RuntimeError as error:  # DataLoader's, of a worker that is gone
        raise ExperimentError(
            f"a tokenizing process ended, most often for lack of memory ({error}). Run again: what was "
            "tokenized is kept, and it goes on from there"
        ) from error
    finally:
        for file in files:
            file.close()
    return done


# --- counting


def count_tokens(tokens: np.ndarray, size: int, bar: Bar, digest=None) -> np.ndarray:
    """How often each token occurs, int64 [size]; feeds the tokens to a hash too. Raises ValueError at one out of range."""
    counts = np.zeros(size, np.int64)
    for first in range(0, len(tokens), COUNT_TOKENS):
        chunk = tokens[first : first + COUNT_TOKENS]
        if chunk.max() >= size:
            place = int(np.argmax(chunk >= size))
            raise ValueError(f"token {chunk[place]} at place {first + place}")
        counts += np.bincount(chunk, minlength=size)
        if digest:
            digest.update(chunk.tobytes())
        bar.add(len(chunk))
    return counts


def entropy(counts: np.ndarray) -> float:
    """Of the distribution with these counts, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# --- opening shards


def read_header(path) -> tuple[bytes, int]:
    """The first HEADER_BYTES bytes of a file, or fewer, and its size."""
    with open(path, "rb") as file:
        return file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size


def map_tokens(path: Path, dtype, offset: int, count: int) -> np.ndarray:
    return (
        np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))
        if count
        else np.empty(0, dtype)
    )


def open_shard(path, tokenizer_hash: str) -> np.ndarray:
    """Maps a token shard of our own into memory, uint16 or uint32 [tokens]. Raises ExperimentError when its header or size
    is not what a whole shard of this tokenizer has."""
    path = Path(path)
    header, size = read_header(path)
    problem = "is cut short"
    if len(header) == HEADER_BYTES:
        magic, version, width, count, tokenizer = HEADER.unpack_from(header)
        problem = (
            "is not a token shard"
            if magic != MAGIC
            else f"has format version {version}, not {FORMAT_VERSION}"
            if version != FORMAT_VERSION
            else f"has tokens of {width} bytes, not 2 or 4"
            if width not in (2, 4)
            else "belongs to another tokenizer"
            if tokenizer.hex() != tokenizer_hash
            else f"holds {size - HEADER_BYTES:,} bytes of tokens, not {count * width:,}"
            if size != HEADER_BYTES + count * width
            else None
        )
    if problem:
        raise ExperimentError(f"{path} {problem}: delete the folder {path.parent} and run again")
    return map_tokens(path, np.dtype(f"<u{width}"), HEADER_BYTES, count)
