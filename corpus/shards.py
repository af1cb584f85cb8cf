"""A text becomes token shards: `build` splits it, trains the tokenizer, and has it tokenized.

text_scan.py has read the text before; token_writer.py tokenizes it. The build writes into the
folder that it is given, which corpus.cache locks.
"""

import json
import time
from pathlib import Path

import numpy as np

from config import Config
from corpus import text_scan
from corpus.checksums import checksum
from corpus.safe_cuts import SafeCuts
from corpus.sources import Source
from corpus.split import Split, held_out_characters
from corpus.text_scan import CHUNK, SCAN_FILE, Scan, data_hash, split_of, train_or_read_tokenizer
from corpus.token_files import (
    FORMAT_VERSION,
    count_both,
    entropy,
    open_shard,
    replace_file,
    unigram_cross_entropy,
    write_header,
)
from corpus.token_writer import (
    CHUNK_FILE,
    PROGRESS_FILE,
    TOKEN_FILES,
    BatchEncoder,
    Progress,
    UnknownTokens,
    write_shards,
)
from corpus.tokenizer import ChunkEncoder, load_tokenizer, sha256, trained_size, vocabulary
from planner.layout import format_duration, say

# What only an unfinished build needs.
TEMPORARY_FILES = (SCAN_FILE, CHUNK_FILE, PROGRESS_FILE)


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
        tokenizer = [text_scan.TOKENIZER_SAMPLE, size]
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

    `found` is the scan of the source. A tokenizer is trained when tokenizer_json is None. Where a
    killed build left files in the folder, the build continues from them.
    Raises ExperimentError when the text has changed since the scan or cannot be tokenized.
    """
    start = time.perf_counter()
    split = split_of(found, config.validation_fraction, rules)
    say(_scan_message(source, found, split.held_out))

    if tokenizer_json is None:
        training = ~split.held_out
        tokenizer_json = train_or_read_tokenizer(config, source, found, training, folder, rules)
    replace_file(folder / "tokenizer.json", tokenizer_json)
    tokenizer, end_of_text = load_tokenizer(tokenizer_json, config.end_of_text)

    encode = ChunkEncoder(tokenizer, rules)
    batch_encoder = BatchEncoder(encode, end_of_text, token_dtype(config))
    unknown = UnknownTokens(config, tokenizer)
    written = write_shards(folder, source, found, split, SafeCuts(encode), batch_encoder, unknown)
    for name, count in zip(TOKEN_FILES, written.tokens):
        write_header(folder / name, batch_encoder.dtype, count, sha256(tokenizer_json))

    vocabulary_size = vocabulary(tokenizer)
    facts = _facts(config, found, split, written, tokenizer_json, vocabulary_size, folder, rules)
    replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
    say(_done_message(written.tokens, time.perf_counter() - start))


def _facts(
    config: Config,
    found: Scan,
    split: Split,
    written: Progress,
    tokenizer_json: str,
    vocabulary_size: int,
    folder: Path,
    rules: int,
) -> dict:
    """What corpus.json says of the finished shards in the folder."""
    tokenizer_hash = sha256(tokenizer_json)
    train_tokens, validation_tokens = written.tokens
    train_counts, validation_counts = _count_shards(folder, tokenizer_hash, vocabulary_size)
    chunks = np.memmap(folder / CHUNK_FILE, CHUNK, mode="r")
    held_out, repeated = held_out_characters(split, chunks)
    return dict(
        data=config.data,
        documents=len(chunks),
        characters=written.characters,
        train_tokens=train_tokens,
        validation_tokens=validation_tokens,
        vocabulary=vocabulary_size,
        data_hash=data_hash(chunks),
        tokenizer_hash=tokenizer_hash,
        unigram_entropy=entropy(train_counts),
        unigram_cross_entropy=unigram_cross_entropy(train_counts, validation_counts),
        left_out=found.bad,
        recipe=_key_of_same_text(config, found, tokenizer_json, rules),
        rules=rules,
        held_out_characters=held_out,
        repeated_characters=repeated,  # held-out characters in chunks that are trained on too
        crc32={name: checksum(folder / name) for name in TOKEN_FILES},
    )


def _key_of_same_text(config: Config, found: Scan, tokenizer_json: str, rules: int) -> str | None:
    """The key by which corpus.cache finds these shards when the same text is read from elsewhere.

    None when the split depends on the source: on how much of it was scanned, or on its groups.
    """
    grouped = rules > 1 and found.grouped
    if not found.whole or grouped:
        return None
    return build_key(config, tokenizer_json, rules)


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


def _done_message(tokens: list[int], seconds: float) -> str:
    training, validation = tokens
    return (
        f"data: {training:,} training and {validation:,} validation tokens, "
        f"{format_duration(seconds)}"
    )


def _count_shards(folder: Path, tokenizer_hash: str, vocabulary_size: int) -> np.ndarray:
    """How often each token occurs in the shards of training and validation, int64 [2, size]."""
    train, validation = [open_shard(folder / name, tokenizer_hash) for name in TOKEN_FILES]
    return count_both(train, validation, vocabulary_size)
