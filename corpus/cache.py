"""The cache folder: opens the tokenized corpus of a configuration, or builds it there first.

Every corpus has a folder, named by a key that changes with the text and with whatever makes shards
of it. A corpus is built in a folder of its own, KEY.RANDOM.unfinished, which is renamed when it is
whole: there is never half a corpus under a key. The builder holds a lock on its folder. When it is
killed, the kernel takes the lock away, and the next build of the same key continues there.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from config import DATA_RULES, KNOWN_DATA_RULES, Config, ConfigError, ExperimentError, expanded
from corpus import checksums, sources
from corpus.external import import_shards, open_counted
from corpus.shards import TEMPORARY_FILES, build, build_key
from corpus.sources import Source
from corpus.text_scan import Scan, data_hash, scan
from corpus.token_files import (
    count_both,
    open_shard,
    read_own_json,
    replace_file,
    unigram_cross_entropy,
)
from corpus.token_reader import TokenFiles
from corpus.token_writer import PROGRESS_FILE, TOKEN_FILES
from corpus.tokenizer import (
    check_vocabulary,
    load_tokenizer,
    read_tokenizer,
    sha256,
    trained_size,
    vocabulary,
)
from planner.layout import say

# Between these multiples of validation_fraction, the held-out share is as wanted.
SHARE_TOO_SMALL = 0.5
SHARE_TOO_LARGE = 2
MOST_HELD_OUT = 2 / 3  # of the text; beyond it, it is refused
REPEATED_SHARE = 0.01  # of the held-out characters; beyond it there is a warning
UNFINISHED_DAYS = 7  # after so many days what a killed build left is deleted


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    `train` and `validation` are token ids, uint16 or uint32 [tokens]: see TokenFiles.
    """

    train: TokenFiles
    validation: TokenFiles
    tokenizer: Tokenizer
    tokenizer_json: str
    end_of_text: int
    data_hash: str  # of the documents' contents in order; the same on every machine
    tokenizer_hash: str  # sha256 of tokenizer_json
    # Of training and validation together. For external shards, each token is decoded by itself.
    characters: int
    documents: int  # of training and validation; each chunk of a long document counts as one
    # In nats per token: the loss of the best model that ignores the context, on the training text
    # and on the held-out text (see corpus.token_files).
    unigram_entropy: float
    unigram_cross_entropy: float
    rules: int  # the version of the rules of data that made the corpus: see config.DATA_RULES
    # The characters of validation, and how many of them stand in chunks of text that are trained on
    # too. None if not known.
    held_out_characters: int | None
    repeated_characters: int | None


def prepare(config: Config, rules: int = DATA_RULES) -> Corpus:
    """Opens the tokenized corpus that `config` describes.

    The first time it is built in config.cache_dir. `rules` is the version of the rules of data:
    DATA_RULES for a new run, that of its checkpoint for a resumed one.
    Raises ExperimentError when the text, the tokenizer or the cache folder cannot be used, or when
    the corpus is too small to give each split one window of max_seq_len + 1 tokens.
    """
    _check_num_workers(config)
    if rules not in KNOWN_DATA_RULES:
        raise ExperimentError(_unknown_rules_message(rules))
    source = sources.open_source(config, rules)
    if source.token_shards and trained_size(config):
        raise ExperimentError(_unknown_tokenizer_message(config))
    cache = expanded(config.cache_dir)
    tokenizer_json = _local_tokenizer(config)
    folder = cache / _cache_key(config, source, tokenizer_json, rules)
    try:
        corpus = _open_or_discard(folder, config.end_of_text)
        if corpus is None:
            _build_folder(config, source, tokenizer_json, folder, rules)
            corpus = _open(folder, config.end_of_text)
    except OSError as error:
        raise ExperimentError(_cannot_keep_message(cache, error)) from error
    check_vocabulary(corpus.tokenizer, config)
    _check_size(corpus, config)
    _check_held_out(corpus, config)
    return corpus


def _check_num_workers(config: Config) -> None:
    cores = os.cpu_count() or 1
    if config.num_workers > cores:
        raise ConfigError(
            f"num_workers={config.num_workers}: more than this machine's {cores} cores, so that "
            "they would wait for each other. 0 or 1 is enough as a rule"
        )


def _check_size(corpus: Corpus, config: Config) -> None:
    needed = config.max_seq_len + 1
    if min(len(corpus.train), len(corpus.validation)) < needed:
        raise ExperimentError(
            f"the corpus is too small: {len(corpus.train):,} training tokens and "
            f"{len(corpus.validation):,} validation tokens from {corpus.documents:,} documents, "
            f"and each needs at least {needed:,} (max_seq_len + 1). Give more text, a smaller "
            "--max_seq_len or, if only validation is short, a larger --validation_fraction"
        )


def _check_held_out(corpus: Corpus, config: Config) -> None:
    """Warns when the validation loss says little, each time that a corpus is opened.

    Raises ExperimentError when far more text is held out than is trained on.
    """
    held_out = corpus.held_out_characters
    repeated = corpus.repeated_characters
    if corpus.rules == 1 or not held_out or repeated is None:
        return
    share = held_out / corpus.characters
    wanted = config.validation_fraction
    if share > MOST_HELD_OUT and share > SHARE_TOO_LARGE * wanted:
        raise ExperimentError(_far_share_message(corpus, share, wanted))
    validation_tokens = len(corpus.validation)
    share_of_tokens = validation_tokens / (validation_tokens + len(corpus.train))
    if _is_far(share, wanted):
        say(f"warning: {_far_share_message(corpus, share, wanted)}", sys.stderr)
    elif _is_far(share_of_tokens, wanted):
        say(f"warning: {_far_tokens_message(share_of_tokens, wanted)}", sys.stderr)
    if repeated > REPEATED_SHARE * held_out:
        say(f"warning: {_repeated_message(repeated / held_out)}", sys.stderr)


def _is_far(share: float, wanted: float) -> bool:
    return not wanted * SHARE_TOO_SMALL <= share <= wanted * SHARE_TOO_LARGE


def _far_tokens_message(share: float, wanted: float) -> str:
    """For a text of which one side takes far more tokens a character, such as one giant word."""
    return (
        f"{share:.2%} of the tokens are held out for validation, though {wanted:.2%} of the "
        "characters are (validation_fraction): a part of the text has far fewer tokens a character "
        "than the rest. Look whether such text belongs there"
    )


def _far_share_message(corpus: Corpus, share: float, wanted: float) -> str:
    return (
        f"{share:.2%} of the text is held out for validation, not {wanted:.2%} "
        f"(validation_fraction): its {corpus.documents:,} documents, or parts of long documents, "
        "are too few or too different in length. Give more text, documents in smaller parts, or "
        "another --validation_fraction"
    )


def _repeated_message(share: float) -> str:
    return (
        f"{share:.1%} of the text that is held out for validation is in the training text too, "
        "word for word: the validation loss will be too low. Take repeated text out of --data"
    )


def _unknown_rules_message(rules: int) -> str:
    known = " and ".join(str(version) for version in KNOWN_DATA_RULES)
    return (
        f"the checkpoint was made with version {rules} of the rules of data (split and windows), "
        f"and this program knows versions {known}. Resume it with the newer program that made it"
    )


def _unknown_tokenizer_message(config: Config) -> str:
    return (
        f"{config.data}: token shards do not say which tokenizer made them. Name it with "
        "--tokenizer, such as hf:gpt2 for those of nanoGPT and modded-nanogpt, or the path of a "
        "tokenizer.json"
    )


def _cannot_keep_message(cache: Path, error: OSError) -> str:
    return (
        f"cannot keep the tokenized corpus in the folder {cache}: {error}. Free some space there "
        "or choose another folder with --cache_dir; what is finished is kept"
    )


# --- the key and the tokenizer


def _cache_key(config: Config, source: Source, tokenizer_json: str | None, rules: int) -> str:
    """The name of the corpus's folder in the cache: a hash that depends on text and build key.

    Caches on disk are found by it, so it must not change for the same shards.
    """
    parts = [build_key(config, tokenizer_json, rules), source.identity()]
    return sha256(json.dumps(parts))[:16]


def _local_tokenizer(config: Config) -> str | None:
    """The tokenizer.json that config.tokenizer names by its path, else None.

    A tokenizer of the hub is known by its name, so that a corpus in the cache needs no network.
    """
    if trained_size(config) or config.tokenizer.startswith("hf:"):
        return None
    return read_tokenizer(config)


# --- opening


def _open_or_discard(folder: Path, end_of_text: str) -> Corpus | None:
    """Opens a cache folder. None when there is none, or when it was damaged and is now deleted."""
    if not folder.exists():
        return None
    try:
        return _open(folder, end_of_text)
    except ExperimentError as error:
        say(f"data: {error}. Building it anew.")
        shutil.rmtree(folder)
        return None


def _open(folder: Path, end_of_text: str) -> Corpus:
    """Opens a cache folder. Raises ExperimentError when it is damaged."""
    try:
        return _open_files(folder, end_of_text)
    except (
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        raise ExperimentError(
            f"the cache folder {folder} is damaged ({error}): delete it and run again"
        ) from error


def _open_files(folder: Path, end_of_text: str) -> Corpus:
    """`_open`, which turns the errors of damaged files that this raises into ExperimentError."""
    facts = read_own_json(folder / "corpus.json")
    _check_facts(facts)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError("tokenizer.json is missing or no file")
    tokenizer_json = (folder / "tokenizer.json").read_bytes().decode()
    tokenizer_hash = sha256(tokenizer_json)
    if facts["tokenizer_hash"] != tokenizer_hash:
        raise ValueError("tokenizer.json was changed")
    tokenizer, end_of_text_id = load_tokenizer(tokenizer_json, end_of_text)
    size = vocabulary(tokenizer)
    if "files" in facts:
        train, validation = open_counted(facts, size)
    else:
        train_file, validation_file = TOKEN_FILES
        train = open_shard(folder / train_file, tokenizer_hash, size)
        validation = open_shard(folder / validation_file, tokenizer_hash, size)
        # A cache that an older version of this program made has no checksums.
        checksums.compare(folder, facts.get("crc32", {}))
    if "unigram_cross_entropy" not in facts:
        _add_unigram_cross_entropy(folder, facts, train, validation, size)
    return Corpus(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        tokenizer_json=tokenizer_json,
        end_of_text=end_of_text_id,
        data_hash=facts["data_hash"],
        tokenizer_hash=tokenizer_hash,
        characters=facts["characters"],
        documents=facts["documents"],
        unigram_entropy=facts["unigram_entropy"],
        unigram_cross_entropy=facts["unigram_cross_entropy"],
        rules=facts.get("rules", 1),
        held_out_characters=facts.get("held_out_characters"),
        repeated_characters=facts.get("repeated_characters"),
    )


# The facts in corpus.json that every version of this program wrote, and those of newer ones, with
# their types.
FACTS = dict(
    data_hash=str, tokenizer_hash=str, characters=int, documents=int, unigram_entropy=float
)
NEWER_FACTS = dict(
    unigram_cross_entropy=float,
    rules=int,
    held_out_characters=int,
    repeated_characters=int,
    files=list,
    crc32=dict,
)


def _check_facts(facts: dict) -> None:
    """Raises ValueError for facts of other types: the file is damaged."""
    for name, kind in FACTS.items():
        if type(facts.get(name)) is not kind:
            raise ValueError(f"{name} in corpus.json is {facts.get(name)!r:.40}")
    for name, kind in NEWER_FACTS.items():
        # What is not known is None.
        if facts.get(name) is not None and type(facts[name]) is not kind:
            raise ValueError(f"{name} in corpus.json is {facts[name]!r:.40}")


def _add_unigram_cross_entropy(
    folder: Path,
    facts: dict,
    train: TokenFiles,
    validation: TokenFiles,
    vocabulary_size: int,
) -> None:
    """Counts the tokens of a cache folder that an older version of this program built.

    The result is added to `facts` and to corpus.json.
    """
    train_counts, validation_counts = count_both(train, validation, vocabulary_size)
    facts["unigram_cross_entropy"] = unigram_cross_entropy(train_counts, validation_counts)
    # In a folder that cannot be written, the tokens are counted again next time.
    with contextlib.suppress(OSError):
        # Another process may open the same folder: each writes a file of its own and renames it.
        own_file = folder / f"corpus.{os.getpid()}.json"
        replace_file(own_file, json.dumps(facts, indent=1) + "\n")
        own_file.replace(folder / "corpus.json")


# --- building


def _build_folder(
    config: Config, source: Source, tokenizer_json: str | None, folder: Path, rules: int
) -> None:
    """Builds the corpus beside its folder, then renames what was built."""
    if config.tokenizer.startswith("hf:"):
        tokenizer_json = read_tokenizer(config)
    _delete_old_unfinished(folder.parent)
    with _unfinished(folder.parent, folder.name) as unfinished:
        if source.token_shards:
            assert tokenizer_json is not None  # `prepare` refuses to train one on token shards
            import_shards(config, source.token_shards, tokenizer_json, unfinished, rules)
        else:
            _build_or_link(config, source, tokenizer_json, unfinished, rules)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster: its folder has the same content.
            if not folder.is_dir():
                raise


def _build_or_link(
    config: Config, source: Source, tokenizer_json: str | None, folder: Path, rules: int
) -> None:
    """Makes the shards, unless the cache has those of the same text with the same build key.

    It does not matter from where the text was read: a copy of a folder gives the same shards.
    """
    found = scan(source, folder)
    _say_what_is_left_out(config, found)
    key = build_key(config, tokenizer_json, rules)
    # Groups may split the same text otherwise; version 1 does not know them.
    may_link = rules == 1 or not found.grouped
    if not (may_link and _link_same_text(config, found, key, folder)):
        build(config, source, found, tokenizer_json, folder, rules)
    for name in TEMPORARY_FILES:
        (folder / name).unlink(missing_ok=True)


def _say_what_is_left_out(config: Config, found: Scan) -> None:
    if found.empty:
        say(
            f"data: {found.empty:,} of {found.rows:,} rows have no text in the field "
            f"{config.text_field!r} (null or empty) and are left out"
        )
    if found.bad:
        say(
            f"data: {found.bad:,} of {found.rows:,} lines or rows cannot be read and are left out: "
            f"{found.bad_rows}"
        )


def _link_same_text(config: Config, found: Scan, key: str, folder: Path) -> bool:
    """Links the shards of another cache folder into `folder`. Returns whether it has done so.

    The other folder must have the same text (data hash) and the same build key, `key`.
    """
    if not found.whole:
        return False  # the hash of the whole text is not known
    same = dict(data_hash=data_hash(found.chunks), recipe=key)
    for facts_file in folder.parent.glob("*/corpus.json"):
        other = facts_file.parent
        # The file system may have no links, or the other folder may be damaged or just deleted.
        with contextlib.suppress(OSError, ValueError, AttributeError, ExperimentError):
            facts = read_own_json(facts_file)
            if not same.items() <= facts.items():
                continue
            opened = _open(other, config.end_of_text)
            say(f"data: the same text was tokenized before; its shards in {other} are used")
            for name in TOKEN_FILES:
                (folder / name).unlink(missing_ok=True)
                os.link(other / name, folder / name)
            tokenizer_json = (other / "tokenizer.json").read_bytes().decode()
            replace_file(folder / "tokenizer.json", tokenizer_json)
            facts |= dict(
                data=config.data,
                left_out=found.bad,
                unigram_cross_entropy=opened.unigram_cross_entropy,
            )
            replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
            return True
    return False


# --- folders of unfinished builds


def _delete_old_unfinished(cache: Path) -> None:
    """Deletes the folders of builds that were killed more than UNFINISHED_DAYS ago."""
    for folder in cache.glob("*.unfinished"):
        with contextlib.suppress(FileNotFoundError):  # another process finished it meanwhile
            age = time.time() - folder.stat().st_mtime
            if age < 86_400 * UNFINISHED_DAYS:
                continue
            lock = _lock(folder)
            if lock is not None:  # no process builds in it
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


@contextlib.contextmanager
def _unfinished(cache: Path, key: str) -> Iterator[Path]:
    """A folder to build in, locked: one that a killed build of the same corpus left, or a new one.

    A build that fails leaves it only if it holds finished work.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder, lock = _left_by_killed_build(cache, key) or _new_unfinished(cache, key)
    try:
        yield folder
    finally:
        if not (folder / PROGRESS_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _left_by_killed_build(cache: Path, key: str) -> tuple[Path, int] | None:
    """A folder of this key that no process builds in, with its lock."""
    for folder in sorted(cache.glob(f"{key}.*.unfinished")):
        lock = _lock(folder)
        if lock is not None:
            return folder, lock
    return None


def _new_unfinished(cache: Path, key: str) -> tuple[Path, int | None]:
    """A new folder with its lock.

    The lock is None where folders cannot be locked: then no other process can lock it either.
    """
    new = cache / f"{uuid.uuid4().hex[:8]}.unfinished"
    new.mkdir()
    lock = _lock(new)
    # Only now that it is locked does it get the name by which other processes find it.
    folder = new.rename(cache / f"{key}.{new.name}")
    return folder, lock


def _lock(folder: Path) -> int | None:
    """Locks a folder for this process; None when another one has it.

    The lock lasts until the descriptor that is returned is closed. The kernel takes the lock from a
    process that is killed.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have finished the folder and renamed it before we had the lock.
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
