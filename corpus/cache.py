"""TODO cache"""

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from config import Config, ConfigError, ExperimentError
from corpus import sources
from corpus.external import Joined, cut_shards, import_shards, open_external_shard
from corpus.shards import (
    build,
    build_key,
    data_hash,
    open_shard,
    replace_file,
    scan,
)
from corpus.sources import Source
from corpus.tokenizer import check_vocabulary, load_tokenizer, read_tokenizer, sha256, trained_size

UNFINISHED_DAYS = 7  # after which what a killed build left is deleted


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus. `train` and `validation` are memory-mapped arrays of uint16 or uint32 [tokens]."""

    train: np.memmap | Joined
    validation: np.memmap | Joined
    tokenizer: Tokenizer
    tokenizer_json: str
    end_of_text: int
    data_hash: str  # of the documents' contents in order; the same on every machine
    tokenizer_hash: str  # sha256 of tokenizer_json
    characters: int  # of both splits; of foreign shards, what their tokens decode to one by one
    documents: int  # of both splits, a piece of a long one counted as one
    unigram_entropy: float  # nats per token: the loss of the best model that ignores the context


def prepare(config: Config) -> Corpus:
    """Opens the tokenized corpus that `config` describes, building it in config.cache_dir the first time.

    Raises ExperimentError when the text, the tokenizer or the cache folder cannot be used, or when the corpus is too
    small to give each split one window of max_seq_len + 1 tokens.
    """
    if config.num_workers > os.cpu_count():
        raise ConfigError(
            f"num_workers={config.num_workers}: more than this machine's {os.cpu_count()} cores, so that they would "
            "wait for each other. 0 or 1 is enough as a rule"
        )
    text = sources.open_source(config)
    if text.token_shards and trained_size(config):
        raise ExperimentError(
            f"{config.data}: token shards do not say which tokenizer made them. Name it with --tokenizer, such "
            "as hf:gpt2 for those of nanoGPT and modded-nanogpt, or the path of a tokenizer.json"
        )
    # A tokenizer of the hub is known by its name, so that a corpus that is there needs no network.
    tokenizer_json = (
        None
        if trained_size(config) or config.tokenizer.startswith("hf:")
        else read_tokenizer(config)
    )
    cache = Path(config.cache_dir).expanduser()
    folder = cache / _cache_key(config, text, tokenizer_json)
    try:
        corpus = _open_or_discard(folder)
        if (
            corpus is None
        ):  # built beside its place and renamed when whole, so that there is never half a cache
            if config.tokenizer.startswith("hf:"):
                tokenizer_json = read_tokenizer(config)
            _delete_old_leftovers(cache)
            with _unfinished(cache, folder.name) as unfinished:
                if text.token_shards:
                    import_shards(config, text.token_shards, tokenizer_json, unfinished)
                else:
                    _build_or_link(config, text, tokenizer_json, unfinished)
                try:
                    unfinished.rename(folder)
                except OSError:  # another process was faster; its folder has the same content
                    if not folder.is_dir():
                        raise
            corpus = _open(folder)
    except OSError as error:
        raise ExperimentError(
            f"cannot keep the tokenized corpus in the folder {cache}: {error}. Free some space there "
            "or choose another folder with --cache_dir; what is finished is kept"
        ) from error
    check_vocabulary(corpus.tokenizer, config)
    least = config.max_seq_len + 1
    if min(len(corpus.train), len(corpus.validation)) < least:
        raise ExperimentError(
            f"the corpus is too small: {len(corpus.train):,} training tokens and {len(corpus.validation):,} validation "
            f"tokens from {corpus.documents:,} documents, and each needs at least {least:,} (max_seq_len + 1). Give "
            "more text, a smaller --max_seq_len or, if only validation is short, a larger --validation_fraction"
        )
    return corpus


# --- the cache


def _cache_key(config: Config, text: Source, tokenizer_json: str | None) -> str:
    """Changes with whatever changes the shards."""
    return sha256(json.dumps([build_key(config, tokenizer_json), text.identity()]))[:16]


def _open_or_discard(folder: Path) -> Corpus | None:
    try:
        return _open(folder) if folder.exists() else None
    except ExperimentError as error:
        print(f"data: {error}. Building it anew.")
        shutil.rmtree(folder)


def _delete_old_leftovers(cache: Path) -> None:
    """Builds that were killed long ago and that nobody goes on with."""
    for old in cache.glob("*.unfinished"):
        with contextlib.suppress(FileNotFoundError):  # another process has finished it meanwhile
            if (
                time.time() - old.stat().st_mtime > 86_400 * UNFINISHED_DAYS
                and (lock := _lock(old)) is not None
            ):
                shutil.rmtree(old, ignore_errors=True)
                os.close(lock)


@contextlib.contextmanager
def _unfinished(cache: Path, key: str):
    """A folder to build in, locked: one that a killed build of the same corpus left, or a new one. A build that fails
    leaves it only if it holds finished work."""
    cache.mkdir(parents=True, exist_ok=True)
    left = (
        (folder, lock)
        for folder in sorted(cache.glob(f"{key}.*.unfinished"))
        if (lock := _lock(folder)) is not None
    )
    folder, lock = next(left, (None, None))
    if folder is None:
        new = cache / f"{uuid.uuid4().hex[:8]}.unfinished"
        new.mkdir()
        lock = _lock(
            new
        )  # None where folders cannot be locked: then no other process can take it either
        folder = new.rename(
            cache / f"{key}.{new.name}"
        )  # the name by which others find it, now that it is locked
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
            if os.path.samestat(
                os.fstat(descriptor), os.stat(folder)
            ):  # else it was finished and renamed meanwhile
                return descriptor
        except OSError:
            pass
        os.close(descriptor)


def _build_or_link(config: Config, text: Source, tokenizer_json: str | None, folder: Path) -> None:
    """Makes the shards, unless the cache has those of the same text, from wherever it was read, and the same recipe."""
    found = scan(text, folder)
    if found["bad"]:
        print(
            f"data: {found['bad']:,} of {found['rows']:,} lines or rows cannot be read and are left out: {found['bad_rows']}"
        )
    same = dict(
        data_hash=data_hash(found["pieces"]) if found["whole"] else None,
        recipe=build_key(config, tokenizer_json),
    )
    for other in folder.parent.glob("*/corpus.json"):
        with contextlib.suppress(
            OSError, ValueError, ExperimentError
        ):  # no links on this file system, or damaged
            facts = json.loads(other.read_bytes())
            if same.items() <= facts.items() and _open(other.parent):
                print(
                    f"data: the same text was tokenized before; its shards in {other.parent} are used"
                )
                for name in ("train.bin", "validation.bin"):
                    (folder / name).unlink(missing_ok=True)
                    os.link(other.parent / name, folder / name)
                replace_file(
                    folder / "tokenizer.json",
                    (other.parent / "tokenizer.json").read_bytes().decode(),
                )
                replace_file(
                    folder / "corpus.json",
                    json.dumps(facts | dict(data=config.data, left_out=found["bad"]), indent=1)
                    + "\n",
                )
                break
    else:
        build(config, text, found, tokenizer_json, folder)
    for name in (
        "survey.npz",
        "pieces.bin",
        "progress.json",
    ):  # what only an unfinished build needs
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
            train, validation = cut_shards(
                [open_external_shard(path) for path in facts["files"]], facts["train_tokens"]
            )
        else:
            train, validation = (
                open_shard(folder / name, tokenizer_hash)
                for name in ("train.bin", "validation.bin")
            )
        return Corpus(
            train=train,
            validation=validation,
            tokenizer=tokenizer,
            tokenizer_json=tokenizer_json,
            end_of_text=end_of_text,
            tokenizer_hash=tokenizer_hash,
            **{
                name: facts[name]
                for name in ("data_hash", "characters", "documents", "unigram_entropy")
            },
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"the cache folder {folder} is damaged ({error}): delete it and run again"
        ) from error
