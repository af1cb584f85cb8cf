"""Token shards of other programs as a corpus: nanoGPT, modded-nanogpt and llm.c.

The shards are checked and counted once and read where they lie. Only tokenizer.json and the facts
in corpus.json are written, into the folder that corpus.cache gives.
"""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from config import Config, ExperimentError
from corpus.progress_bar import ProgressBar
from corpus.token_files import (
    HEADER_BYTES,
    MAGIC,
    FileHead,
    count_tokens,
    entropy,
    read_head,
    replace_file,
    unigram_cross_entropy,
)
from corpus.token_reader import FilePart, TokenFiles, file_version
from corpus.tokenizer import load_tokenizer, sha256, vocabulary
from planner.layout import quoted, say


class _Format(NamedTuple):
    """The header's version and the tokens' type of a kind of shard that llm.c writes."""

    version: int
    dtype: str  # of a token


# Shards of llm.c (dev/data/data_common.py) begin with a header of 256 int32. The first three are
# the magic number, the version and the number of tokens. Keys are magic numbers; modded-nanogpt
# writes the first kind.
LLM_C_FORMATS = {20240520: _Format(1, "<u2"), 20240801: _Format(7, "<u4")}
LLM_C_EVALUATION = 20240522  # the magic number of llm.c's multiple-choice questions
NUMPY_MAGIC = b"\x93NUMPY"  # numpy.save writes it: the header's letters would be read as tokens
SIDES = ("training", "validation")

NANO_GPT = "<u2"  # nanoGPT writes tokens of this type without a header
MOST_OF_16_BITS = 2**16  # so many tokens can 16 bits tell apart
LARGEST_VOCABULARY = 2**19  # more tokens than the tokenizers of our time have
SAMPLE_TOKENS = 2**16  # of a shard, from which the width of its tokens is known
# So many tokens of twice the width show it: that every second one of 32 is 0 is no chance.
CLEAR_TOKENS = 16
WRITE_IT_AGAIN = (
    "Write it again with llm.c's header, which names the width (256 int32: 20240520, 1 and the "
    "number of tokens for 16 bits; 20240801, 7 and the number for 32 bits)"
)


# --- one shard


def open_external_shard(path: str, without_header: str = NANO_GPT) -> TokenFiles:
    """Opens a .bin file of nanoGPT, modded-nanogpt or llm.c, uint16 or uint32 [tokens].

    A file without a header holds tokens of the type `without_header`. Raises ExperimentError when
    the file is not whole.
    """
    try:
        head = read_head(Path(path))
    except OSError as error:
        raise ExperimentError(
            f"cannot read {quoted(path)}: {error.strerror}. Make it readable or take it out of "
            "--data"
        ) from error
    if head.header.startswith(MAGIC):
        raise ExperimentError(_our_own_shard_message(path))
    if head.header.startswith(NUMPY_MAGIC):
        raise ExperimentError(
            f"{quoted(path)} was written by numpy.save, whose header is no token. Write the array "
            "with its tofile"
        )
    if not head.header:
        raise ExperimentError(f"{quoted(path)} is empty. Take it out of --data, or make it again")
    magic, version, count = _llm_c_header(head)
    if magic == LLM_C_EVALUATION:
        raise ExperimentError(
            f"{quoted(path)} holds llm.c's multiple-choice questions, not text. Take it out of "
            "--data"
        )
    if magic not in LLM_C_FORMATS:
        return _open_without_header(path, head, np.dtype(without_header))
    known = LLM_C_FORMATS[magic]
    if version != known.version:
        raise ExperimentError(
            f"{quoted(path)} has llm.c's format version {version}, not {known.version}. Make it "
            "again with a current llm.c"
        )
    dtype = np.dtype(known.dtype)
    stored = max(0, head.size - HEADER_BYTES)
    expected = count * dtype.itemsize
    if len(head.header) < HEADER_BYTES or stored != expected:
        raise ExperimentError(_wrong_size_message(path, stored, expected))
    return _token_files(path, head, dtype, HEADER_BYTES, count)


def _token_files(path: str, head: FileHead, dtype: np.dtype, offset: int, count: int) -> TokenFiles:
    part = FilePart(path, head.version, dtype, offset, count)
    return TokenFiles([part], "Make or download it again")


def _llm_c_header(head: FileHead) -> tuple[int, int, int]:
    """The magic number, version and number of tokens; zeros where the file is too short."""
    first_numbers = head.header[:12].ljust(12, b"\0")
    magic, version, count = np.frombuffer(first_numbers, "<i4").tolist()
    return magic, version, count


def _open_without_header(path: str, head: FileHead, dtype: np.dtype) -> TokenFiles:
    """Opens a file that holds nothing but tokens. Returns [tokens]."""
    if head.size % dtype.itemsize:
        raise ExperimentError(
            f"{quoted(path)} is cut short: {head.size:,} bytes are no whole number of {dtype.name} "
            "tokens. Make or download it again"
        )
    return _token_files(path, head, dtype, 0, head.size // dtype.itemsize)


def _our_own_shard_message(path: str) -> str:
    return (
        f"{quoted(path)} belongs to this program's cache. Give --data and --tokenizer as they were "
        "when it was made, and it is used again"
    )


def _wrong_size_message(path: str, stored: int, expected: int) -> str:
    what = "is cut short: it holds"
    if stored > expected:
        what = "is longer than its header says: it holds"
    return (
        f"{quoted(path)} {what} {stored:,} bytes of tokens, not {expected:,}. Make or download it "
        "again"
    )


# --- the width of the tokens
#
# Little-endian tokens of 32 bits, read as 16 bits, are twice as many, and every second one is 0:
# the upper half of a small number. All of them are in the vocabulary, so nothing else shows it.


def open_checked_shard(path: str, config: Config, vocabulary_size: int) -> TokenFiles:
    """Opens an external shard, of which the tokens' width is compared with what it holds.

    A file without a header is read as 16 or as 32 bits, whichever it is. Raises ExperimentError
    when its tokens are of another width, or can be read in both ways, or when the tokenizer has so
    many tokens that it cannot have made the file.
    """
    shard = open_external_shard(path)
    if not len(shard):
        return shard
    [part] = shard.parts
    has_header = part.offset > 0
    too_narrow = part.dtype.itemsize == 2 and vocabulary_size > MOST_OF_16_BITS
    wider = _widest_reading(shard, vocabulary_size)
    if wider is not None and wider.is_clear and (has_header or wider.bits == 64):
        raise ExperimentError(_other_width_message(part, wider))
    if wider is None or has_header:
        if too_narrow:
            raise ExperimentError(_too_narrow_message(path, config, vocabulary_size))
        return shard
    if not wider.is_clear and not too_narrow:
        raise ExperimentError(_ambiguous_message(part, wider))
    return open_external_shard(path, wider.dtype.str)


class _Reading(NamedTuple):
    """A way to read the tokens of a file."""

    dtype: np.dtype
    is_clear: bool  # whether a file of narrower tokens could not look like this

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize


def _widest_reading(shard: TokenFiles, vocabulary_size: int) -> _Reading | None:
    """The widest type as which the first tokens of a shard look like tokens.

    None when that is the shard's own type.
    """
    beginning = shard[:SAMPLE_TOKENS].tobytes()
    whole = len(beginning) // 8 * 8
    for dtype in (np.dtype("<u8"), np.dtype("<u4")):
        tokens = np.frombuffer(beginning[:whole], dtype)
        is_wider = dtype.itemsize > shard.dtype.itemsize
        if is_wider and len(tokens) and _look_like_tokens(tokens, vocabulary_size):
            return _Reading(dtype, len(tokens) >= CLEAR_TOKENS and bool(tokens.any()))
    return None


def _look_like_tokens(tokens: np.ndarray, vocabulary_size: int) -> bool:
    """Whether numbers of 32 or 64 bits are tokens, and not several narrower tokens each."""
    largest = tokens.max()
    if largest < vocabulary_size:
        return True
    # Tokens of another tokenizer, perhaps: their upper half is small and their lower half is not.
    # Narrower tokens of a vocabulary of a few letters are small in both halves.
    lower_half = tokens & 0xFFFF
    return largest < LARGEST_VOCABULARY and lower_half.max() >= 256


def _too_narrow_message(path: str, config: Config, vocabulary_size: int) -> str:
    return (
        f"{quoted(path)} holds 16-bit tokens, and the tokenizer {config.tokenizer} has "
        f"{vocabulary_size:,}, more than 16 bits can tell apart: it was not made with this "
        "tokenizer. Give the --tokenizer that made it"
    )


def _other_width_message(part: FilePart, wider: _Reading) -> str:
    bits = 8 * part.dtype.itemsize
    return (
        f"{quoted(part.path)} holds tokens of {wider.bits} bits: read with {bits} bits, every "
        f"second one or more would be 0. {WRITE_IT_AGAIN}"
    )


def _ambiguous_message(part: FilePart, wider: _Reading) -> str:
    narrow = part.num_tokens
    wide = narrow * part.dtype.itemsize // wider.dtype.itemsize
    return (
        f"{quoted(part.path)} has no header that names the width of its tokens, and can be read in "
        f"two ways: {narrow:,} tokens of 16 bits, of which every second one is 0, or {wide:,} "
        f"tokens of {wider.bits} bits. {WRITE_IT_AGAIN}"
    )


# --- several shards as one corpus


def joined(shards: list[TokenFiles], vocabulary: int | None = None) -> TokenFiles:
    """The tokens of external shards, one after the other.

    `vocabulary` is the size of the vocabulary that they are compared with when they are read.
    """
    parts = [part for shard in shards for part in shard.parts]
    return TokenFiles(parts, "Make or download it again", vocabulary)


def open_counted(facts: dict, vocabulary: int) -> tuple[TokenFiles, TokenFiles]:
    """The training and the validation tokens of shards that were imported before.

    `facts` are those in corpus.json. Raises ExperimentError when a file was changed since.
    """
    paths = facts["files"]
    # What was imported before the width was checked has 16 bits where no header says otherwise.
    dtypes = facts.get("dtypes", [NANO_GPT] * len(paths))
    # Before the versions of the files were kept, the name of the cache's folder alone held them.
    versions = facts.get("versions", [None] * len(paths))
    shards = []
    for path, dtype, version in zip(paths, dtypes, versions, strict=True):
        shard = open_external_shard(path, dtype)
        _check_unchanged(path, version)
        shards.append(shard)
    tokens = joined(shards, vocabulary)
    train_tokens = facts["train_tokens"]
    return tokens.between(0, train_tokens), tokens.between(train_tokens, len(tokens))


def _check_unchanged(path: str, version: list[int] | None) -> None:
    """Raises ExperimentError when a file's size or times are not those of `version`."""
    if version is not None and list(file_version(path)) != list(version):
        raise ExperimentError(
            f"{quoted(path)} was changed since its tokens were counted: run again"
        )


def import_shards(
    config: Config, files: list[str], tokenizer_json: str, folder: Path, rules: int
) -> None:
    """Checks and counts external shards; writes tokenizer.json and corpus.json into `folder`.

    The tokens of files named val or validation are held out. If no file or every file has such a
    name, the last config.validation_fraction of all tokens are held out.
    Raises ExperimentError when a shard is not whole or was made by another tokenizer.
    """
    tokenizer, end_of_text = load_tokenizer(tokenizer_json, config.end_of_text)
    vocabulary_size = vocabulary(tokenizer)
    named_validation = [path for path in files if _is_named_validation(path)]
    named_training = [path for path in files if not _is_named_validation(path)]
    files = named_training + named_validation
    shards = [open_checked_shard(path, config, vocabulary_size) for path in files]
    versions = [file_version(path) for path in files]
    total = sum(len(shard) for shard in shards)
    train_tokens = sum(len(shard) for shard in shards[: len(named_training)])
    if train_tokens == 0 or train_tokens == total:  # the names leave one side empty
        train_tokens = total - math.ceil(total * config.validation_fraction)

    counts, data_hash = _count_and_hash(config, files, shards, train_tokens, vocabulary_size)
    for path, version in zip(files, versions):
        _check_unchanged(path, list(version))
    train_counts, validation_counts = counts
    counts_of_both = counts.sum(0)
    facts = dict(
        data=config.data,
        # Path.resolve would follow links, which the cache's key does not.
        files=[os.path.abspath(path) for path in files],  # noqa: PTH100
        versions=versions,
        dtypes=[shard.dtype.str for shard in shards],
        # Each document has one end-of-text token, before or after it.
        documents=int(counts_of_both[end_of_text]),
        characters=int(counts_of_both @ _token_lengths(tokenizer)),
        train_tokens=train_tokens,
        validation_tokens=total - train_tokens,
        vocabulary=vocabulary_size,
        data_hash=data_hash,
        tokenizer_hash=sha256(tokenizer_json),
        unigram_entropy=entropy(train_counts),
        unigram_cross_entropy=unigram_cross_entropy(train_counts, validation_counts),
        left_out=0,  # shards hold no lines or rows that could be bad
        rules=rules,  # they decide where windows begin; the split is the same in all versions
    )
    replace_file(folder / "tokenizer.json", tokenizer_json)
    replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
    say(
        f"data: {len(files):,} token shards, {train_tokens:,} training and "
        f"{total - train_tokens:,} validation tokens"
        + _which_are_held_out(named_training, named_validation)
    )
    wide = [shard for shard in shards if shard.dtype.itemsize == 4]
    if wide:
        say(f"data: {len(wide):,} of the shards hold 32-bit tokens, the others 16-bit tokens")


def _is_named_validation(path: str) -> bool:
    """Whether val, valid or validation is a word of the file's name, as in fineweb_val_000000."""
    name = Path(path).stem.lower()
    return re.search(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", name) is not None


def _which_are_held_out(named_training: list[str], named_validation: list[str]) -> str:
    if named_training and named_validation:
        return ""
    return ": the last ones, as no file is named val"


def _count_and_hash(
    config: Config,
    files: list[str],
    shards: list[TokenFiles],
    train_tokens: int,
    vocabulary_size: int,
) -> tuple[np.ndarray, str]:
    """Reads all tokens once. Returns how often each occurs, and the data hash.

    The counts are int64 [SIDES, vocabulary_size]: the first `train_tokens` tokens of all shards
    are the training side, the others the validation side. `files` are the paths of `shards`.
    Raises ExperimentError at a token that is not in the vocabulary.
    """
    counts = np.zeros((len(SIDES), vocabulary_size), np.int64)
    digest = hashlib.blake2b(digest_size=16)
    total = sum(len(shard) for shard in shards)
    left_to_train = train_tokens
    with ProgressBar("checking the tokens", total, unit="token") as bar:
        for path, shard in zip(files, shards):
            cut = min(left_to_train, len(shard))
            left_to_train -= cut
            parts = (shard.between(0, cut), shard.between(cut, len(shard)))
            for side, part in enumerate(parts):
                try:
                    counts[side] += count_tokens(part, vocabulary_size, bar, digest)
                except ValueError as error:  # "token TOKEN at position POSITION"
                    raise ExperimentError(
                        f"{quoted(path)}: {error} of its {SIDES[side]} part is out of range: "
                        + _other_tokenizer_message(config, vocabulary_size)
                    ) from error
    return counts, digest.hexdigest()


def _other_tokenizer_message(config: Config, vocabulary_size: int) -> str:
    return (
        f"the tokenizer {config.tokenizer} has {vocabulary_size:,} tokens. Give the --tokenizer "
        "that made the shards; if it is this one, the file is damaged or no token shard"
    )


def _token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many characters each token decodes to by itself."""
    lengths = []
    for token in range(vocabulary(tokenizer)):
        lengths.append(len(tokenizer.decode([token], skip_special_tokens=False)))
    return np.array(lengths)
