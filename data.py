"""A tokenized corpus, opened or made: its cache, its shards, and batches in an order that can be resumed.

`prepare(config)` turns the corpus into memory-mapped token arrays, once; later runs open them from the cache. `batches`
and `validation_batches` cut windows of max_seq_len + 1 tokens from them. The order of the training windows is a pure
function of (seed, position), so a resumed run continues with exactly the sequences it has not seen.
"""
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import signal
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from config import Config, ConfigError, ExperimentError
from shards import (FORMAT_VERSION, HEADER, HEADER_BYTES, MAGIC, Bar, build, count_tokens, data_hash, die_with_parent,
                    entropy, recipe, replace_file, survey)
from sources import SHARD_SUFFIX, Text
from tokenizer import check_vocabulary, load_tokenizer, read_tokenizer, sha256, trained_size, vocabulary

UNFINISHED_DAYS = 7                      # after which what a killed build left is deleted
READ_AHEAD = 8                           # micro-batches: from a cold disk measured 20 times as fast, and no faster beyond
_libc = ctypes.CDLL(None)
# Shards of llm.c (dev/data/data_common.py; modded-nanogpt's are the first kind) begin with 256 int32, of which magic,
# version and the number of tokens are the first three.
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}    # magic: version, type of a token
LLM_C_EVALUATION = 20240522


class Joined:
    """Token arrays one after the other as one, without a copy: its length, and slices [first:last] of it."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        first, last, _ = place.indices(len(self))
        taken = []
        for number in range(int(np.searchsorted(self.ends, first, side="right")), len(self.parts)):
            begin = int(self.ends[number]) - len(self.parts[number])
            if begin >= last:
                break
            taken.append(self.parts[number][max(0, first - begin):last - begin])
        return taken[0] if len(taken) == 1 else np.concatenate(taken or [self.parts[0][:0]])


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus. `train` and `validation` are memory-mapped arrays of uint16 or uint32 [tokens]."""
    train: np.memmap | Joined
    validation: np.memmap | Joined
    tokenizer: Tokenizer
    tokenizer_json: str
    end_of_text: int
    data_hash: str           # of the documents' contents in order; the same on every machine
    tokenizer_hash: str      # sha256 of tokenizer_json
    characters: int          # of both splits; of foreign shards, what their tokens decode to one by one
    documents: int           # of both splits, a piece of a long one counted as one
    unigram_entropy: float   # nats per token: the loss of the best model that ignores the context


def prepare(config: Config) -> Corpus:
    """Opens the tokenized corpus that `config` describes, building it in config.cache_dir the first time.

    Raises ExperimentError when the text, the tokenizer or the cache folder cannot be used, or when the corpus is too
    small to give each split one window of max_seq_len + 1 tokens.
    """
    if config.num_workers > os.cpu_count():
        raise ConfigError(f"num_workers={config.num_workers}: more than this machine's {os.cpu_count()} cores, so that they would "
                          "wait for each other. 0 or 1 is enough as a rule")
    text = Text(config)
    foreign = bool(text.files) and text.files[0].lower().endswith(SHARD_SUFFIX)
    if foreign and trained_size(config):
        raise ExperimentError(f"{config.data}: token shards do not say which tokenizer made them. Name it with --tokenizer, such "
                              "as hf:gpt2 for those of nanoGPT and modded-nanogpt, or the path of a tokenizer.json")
    # A tokenizer of the hub is known by its name, so that a corpus that is there needs no network.
    tokenizer_json = None if trained_size(config) or config.tokenizer.startswith("hf:") else read_tokenizer(config)
    cache = Path(config.cache_dir).expanduser()
    folder = cache / _cache_key(config, text, tokenizer_json)
    try:
        corpus = _open_or_discard(folder)
        if corpus is None:   # built beside its place and renamed when whole, so that there is never half a cache
            if config.tokenizer.startswith("hf:"):
                tokenizer_json = read_tokenizer(config)
            _delete_old_leftovers(cache)
            with _unfinished(cache, folder.name) as unfinished:
                if foreign:
                    adopt(config, text.files, tokenizer_json, unfinished)
                else:
                    _build_or_link(config, text, tokenizer_json, unfinished)
                try:
                    unfinished.rename(folder)
                except OSError:   # another process was faster; its folder has the same content
                    if not folder.is_dir():
                        raise
            corpus = _open(folder)
    except OSError as error:
        raise ExperimentError(f"cannot keep the tokenized corpus in the folder {cache}: {error}. Free some space there "
                              "or choose another folder with --cache_dir; what is finished is kept") from error
    check_vocabulary(corpus.tokenizer, config)
    least = config.max_seq_len + 1
    if min(len(corpus.train), len(corpus.validation)) < least:
        raise ExperimentError(
            f"the corpus is too small: {len(corpus.train):,} training tokens and {len(corpus.validation):,} validation "
            f"tokens from {corpus.documents:,} documents, and each needs at least {least:,} (max_seq_len + 1). Give "
            "more text, a smaller --max_seq_len or, if only validation is short, a larger --validation_fraction")
    return corpus


# --- order of the windows

@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(n_windows)
    order.flags.writeable = False   # it is shared through the cache
    return order


def sequences(tokens: np.ndarray, seq_len: int, seed: int, position: int, count: int) -> np.ndarray:
    """The sequences at data positions position ... position + count - 1, counted since the beginning of the run.

    Returns int64 [count, seq_len + 1]. Window i is tokens[i * seq_len : (i + 1) * seq_len + 1]; every epoch takes each
    window once, in an order of its own. A function of nothing but its arguments; tokens must hold at least one window.
    """
    rows = np.empty((count, seq_len + 1), np.int64)
    for row, window in zip(rows, _windows(tokens, seq_len, seed, position, count)):
        row[:] = window
    return rows


def _windows(tokens: np.ndarray, seq_len: int, seed: int, position: int, count: int):
    n_windows = (len(tokens) - 1) // seq_len
    for index in range(position, position + count):
        epoch, place = divmod(index, n_windows)
        start = int(_permutation(seed, epoch, n_windows)[place]) * seq_len
        yield tokens[start:start + seq_len + 1]


def _read_ahead(window: np.ndarray) -> None:
    """Lets the kernel fetch a mapped array's pages from the disk, without waiting for them."""
    first = window.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(window.ctypes.data + window.nbytes - first), mmap.MADV_WILLNEED)


def _inputs_and_targets(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class _TrainingBatches:
    """What DataLoader indexes: the micro-batch that begins at a data position. The one of READ_AHEAD micro-batches later is
    fetched from the disk meanwhile, as reads in random order would wait for it, one after the other."""

    def __init__(self, tokens: np.ndarray, config: Config):
        self.tokens, self.config = tokens, config

    def __getitem__(self, position: int):
        c = self.config
        for window in _windows(self.tokens, c.max_seq_len, c.seed, position + READ_AHEAD * c.batch_size, c.batch_size):
            _read_ahead(window)
        return _inputs_and_targets(sequences(self.tokens, c.max_seq_len, c.seed, position, c.batch_size))


def _leave_signals_to_the_trainer(_worker: int):
    """A signal to the whole process group must not kill the workers under the trainer, which saves first; they end with
    the iterator, or with the trainer."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(tokens: np.ndarray, config: Config, position: int, pin_memory: bool = False):
    """Endless iterator of (inputs, targets), int64 [batch_size, max_seq_len] each, from data position `position` on.

    With config.num_workers > 0 background processes read ahead; they end when the iterator is closed or collected.
    """
    yield from DataLoader(
        _TrainingBatches(tokens, config), sampler=range(position, 2**62, config.batch_size), batch_size=None,
        num_workers=config.num_workers, pin_memory=pin_memory, worker_init_fn=_leave_signals_to_the_trainer,
        multiprocessing_context="fork" if config.num_workers else None,   # the others would copy the mapped tokens
        generator=torch.Generator())   # its own, or starting workers would advance the global one


def validation_batches(tokens: np.ndarray, config: Config):
    """Iterator of (inputs, targets) over eval_steps * batch_size windows, or as many as there are: always the same ones,
    spread evenly over the tokens (the first ones would be a few documents), int64 [batch_size, max_seq_len] each; the
    last batch may hold fewer sequences."""
    seq_len = config.max_seq_len
    there = (len(tokens) - 1) // seq_len
    taken = min(config.eval_steps * config.batch_size, there)
    starts = np.arange(taken) * there // taken * seq_len
    for first in range(0, taken, config.batch_size):
        rows = [tokens[start:start + seq_len + 1] for start in starts[first:first + config.batch_size]]
        yield _inputs_and_targets(np.stack(rows).astype(np.int64))


# --- the cache

def _cache_key(config: Config, text: Text, tokenizer_json: str | None) -> str:
    """Changes with whatever changes the shards."""
    return sha256(json.dumps([recipe(config, tokenizer_json), text.identity()]))[:16]


def _open_or_discard(folder: Path) -> Corpus | None:
    try:
        return _open(folder) if folder.exists() else None
    except ExperimentError as error:
        print(f"data: {error}. Building it anew.")
        shutil.rmtree(folder)


def _delete_old_leftovers(cache: Path) -> None:
    """Builds that were killed long ago and that nobody goes on with."""
    for old in cache.glob("*.unfinished"):
        with contextlib.suppress(FileNotFoundError):    # another process has finished it meanwhile
            if time.time() - old.stat().st_mtime > 86_400 * UNFINISHED_DAYS and (lock := _lock(old)) is not None:
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)


@contextlib.contextmanager
def _unfinished(cache: Path, key: str):
    """A folder to build in, locked: one that a killed build of the same corpus left, or a new one. A build that fails
    leaves it only if it holds finished work."""
    cache.mkdir(parents=True, exist_ok=True)
    left = ((folder, lock) for folder in sorted(cache.glob(f"{key}.*.unfinished")) if (lock := _lock(folder)) is not None)
    folder, lock = next(left, (None, None))
    if folder is None:
        new = cache / f"{uuid.uuid4().hex[:8]}.unfinished"
        new.mkdir()
        lock = _lock(new)           # None where folders cannot be locked: then no other process can take it either
        folder = new.rename(cache / f"{key}.{new.name}")        # the name by which others find it, now that it is locked
    try:
        yield folder
    finally:
        if not (folder / "progress.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Locks a folder for this process, until the descriptor it returns is closed; None when another one has it. The kernel
    takes the lock from a process that is killed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):     # else it was finished and renamed meanwhile
                return descriptor
        except OSError:
            pass
        os.close(descriptor)


def _build_or_link(config: Config, text: Text, tokenizer_json: str | None, folder: Path) -> None:
    """Makes the shards, unless the cache has those of the same text, from wherever it was read, and the same recipe."""
    found = survey(text, folder)
    if found["bad"]:
        print(f"data: {found['bad']:,} of {found['rows']:,} lines or rows cannot be read and are left out: {found['bad_rows']}")
    same = dict(data_hash=data_hash(found["pieces"]) if found["whole"] else None, recipe=recipe(config, tokenizer_json))
    for other in folder.parent.glob("*/corpus.json"):
        with contextlib.suppress(OSError, ValueError, ExperimentError):     # no links on this file system, or damaged
            facts = json.loads(other.read_bytes())
            if same.items() <= facts.items() and _open(other.parent):
                print(f"data: the same text was tokenized before; its shards in {other.parent} are used")
                for name in ("train.bin", "validation.bin"):
                    (folder / name).unlink(missing_ok=True)
                    os.link(other.parent / name, folder / name)
                replace_file(folder / "tokenizer.json", (other.parent / "tokenizer.json").read_bytes().decode())
                replace_file(folder / "corpus.json", json.dumps(facts | dict(data=config.data, left_out=found["bad"]), indent=1) + "\n")
                break
    else:
        build(config, text, found, tokenizer_json, folder)
    for name in ("survey.npz", "pieces.bin", "progress.json"):      # what only an unfinished build needs
        (folder / name).unlink(missing_ok=True)


# --- shards

def _open(folder: Path) -> Corpus:
    """Opens a cache folder. Raises ExperimentError when it is damaged."""
    try:
        facts = json.loads((folder / "corpus.json").read_bytes())
        tokenizer_json = (folder / "tokenizer.json").read_bytes().decode()
        tokenizer_hash = sha256(tokenizer_json)
        if facts["tokenizer_hash"] != tokenizer_hash:
            raise ValueError("tokenizer.json was changed")
        tokenizer, end_of_text = load_tokenizer(tokenizer_json)
        if "files" in facts:
            train, validation = _cut([open_foreign_shard(path) for path in facts["files"]], facts["train_tokens"])
        else:
            train, validation = (open_shard(folder / name, tokenizer_hash) for name in ("train.bin", "validation.bin"))
        return Corpus(train=train, validation=validation, tokenizer=tokenizer,
                      tokenizer_json=tokenizer_json, end_of_text=end_of_text, tokenizer_hash=tokenizer_hash,
                      **{name: facts[name] for name in ("data_hash", "characters", "documents", "unigram_entropy")})
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"the cache folder {folder} is damaged ({error}): delete it and run again") from error


def _cut(shards: list[np.ndarray], first: int) -> tuple[np.ndarray | Joined, np.ndarray | Joined]:
    """The first tokens of several shards, and the others."""
    sides = ([], [])
    for shard in shards:
        taken = min(first, len(shard))
        first -= taken
        for side, part in zip(sides, (shard[:taken], shard[taken:])):
            if len(part):
                side.append(part)
    return tuple(parts[0] if len(parts) == 1 else Joined(parts or [np.empty(0, np.uint16)]) for parts in sides)


def _header(path) -> tuple[bytes, int]:
    """The first HEADER_BYTES bytes of a file, or fewer, and its size."""
    with open(path, "rb") as file:
        return file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size


def _map(path: Path, dtype, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,)) if count else np.empty(0, dtype)


def open_shard(path, tokenizer_hash: str) -> np.ndarray:
    """Maps a token shard of our own into memory, uint16 or uint32 [tokens]. Raises ExperimentError when its header or size
    is not what a whole shard of this tokenizer has."""
    path = Path(path)
    header, size = _header(path)
    problem = "is cut short"
    if len(header) == HEADER_BYTES:
        magic, version, width, count, tokenizer = HEADER.unpack_from(header)
        problem = ("is not a token shard" if magic != MAGIC else
                   f"has format version {version}, not {FORMAT_VERSION}" if version != FORMAT_VERSION else
                   f"has tokens of {width} bytes, not 2 or 4" if width not in (2, 4) else
                   "belongs to another tokenizer" if tokenizer.hex() != tokenizer_hash else
                   f"holds {size - HEADER_BYTES:,} bytes of tokens, not {count * width:,}"
                   if size != HEADER_BYTES + count * width else None)
    if problem:
        raise ExperimentError(f"{path} {problem}: delete the folder {path.parent} and run again")
    return _map(path, np.dtype(f"<u{width}"), HEADER_BYTES, count)


def open_foreign_shard(path) -> np.ndarray:
    """Maps a .bin file of nanoGPT (uint16 without a header), modded-nanogpt or llm.c into memory, uint16 or uint32 [tokens].
    Raises ExperimentError when it is not whole."""
    try:
        header, size = _header(path)
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {error.strerror}. Mend it or take it out of --data") from error
    magic, version, count = np.frombuffer(header[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic not in LLM_C and magic != LLM_C_EVALUATION and not header.startswith(MAGIC):
        if size % 2 or not size:
            raise ExperimentError(f"{path} is cut short: {size:,} bytes are no whole number of uint16 tokens. Make or download "
                                  "it again")
        return _map(path, "<u2", 0, size // 2)
    if header.startswith(MAGIC):
        raise ExperimentError(f"{path} belongs to this program's cache. Give --data and --tokenizer as they were when it was "
                              "made, and it is used again")
    if magic == LLM_C_EVALUATION:
        raise ExperimentError(f"{path} holds llm.c's multiple-choice questions, not text. Take it out of --data")
    known, dtype = LLM_C[magic]
    if version != known:
        raise ExperimentError(f"{path} has llm.c's format version {version}, not {known}. Make it again with a current llm.c")
    if len(header) < HEADER_BYTES or size != HEADER_BYTES + count * np.dtype(dtype).itemsize:
        raise ExperimentError(f"{path} is cut short: it holds {max(0, size - HEADER_BYTES):,} bytes of tokens, not "
                              f"{count * np.dtype(dtype).itemsize:,}. Make or download it again")
    return _map(path, dtype, HEADER_BYTES, count)


def adopt(config: Config, files: list[str], tokenizer_json: str, folder: Path) -> None:
    """Checks and counts foreign shards, which are used where they lie, and writes tokenizer.json and corpus.json into
    `folder`. Held out are the files named val or validation, else the last tokens. Raises ExperimentError."""
    held_out = [path for path in files if re.search(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", Path(path).stem.lower())]
    files = [path for path in files if path not in held_out] + held_out
    shards = [open_foreign_shard(path) for path in files]
    tokens = [sum(len(s) for path, s in zip(files, shards) if (path in held_out) is side) for side in (False, True)]
    if not all(tokens):     # none is held out by its name, or all are
        tokens = [sum(tokens) - (last := math.ceil(sum(tokens) * config.validation_fraction)), last]
    tokenizer, end_of_text = load_tokenizer(tokenizer_json)
    counts, digest, first = np.zeros((2, vocabulary(tokenizer)), np.int64), hashlib.blake2b(digest_size=16), 0
    with Bar("checking the tokens", sum(tokens), unit="token") as bar:
        for path, shard in zip(files, shards):
            cut = min(max(0, tokens[0] - first), len(shard))
            for side, part in enumerate((shard[:cut], shard[cut:])):
                try:
                    counts[side] += count_tokens(part, counts.shape[1], bar, digest)
                except ValueError as error:
                    raise ExperimentError(
                        f"{path}: {error} of its {'validation' if side else 'training'} part is out of range: the tokenizer "
                        f"{config.tokenizer} has {counts.shape[1]:,} tokens. Give the --tokenizer that made the shards; if it is "
                        "the one, the file is damaged or no token shard") from error
            first += len(shard)
    lengths = np.array([len(tokenizer.decode([token], skip_special_tokens=False)) for token in range(counts.shape[1])])
    total = counts.sum(0)
    facts = dict(data=config.data, files=[os.path.abspath(path) for path in files], documents=int(total[end_of_text]),
                 characters=int(total @ lengths), train_tokens=tokens[0], validation_tokens=tokens[1],
                 vocabulary=counts.shape[1], data_hash=digest.hexdigest(), tokenizer_hash=sha256(tokenizer_json),
                 unigram_entropy=entropy(counts[0]), left_out=0)
    replace_file(folder / "tokenizer.json", tokenizer_json)
    replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
    print(f"data: {len(files):,} token shards, {tokens[0]:,} training and {tokens[1]:,} validation tokens"
          + ("" if held_out and len(held_out) < len(files) else ": the last ones, as no file is named val"))
