"""Token shards of other programs as a corpus: nanoGPT, modded-nanogpt and llm.c.

The shards are checked and counted once and used where they lie. Only tokenizer.json and the facts
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
from corpus.token_files import (
    HEADER_BYTES,
    MAGIC,
    FileHead,
    ProgressBar,
    count_tokens,
    entropy,
    map_tokens,
    read_head,
    replace_file,
    unigram_cross_entropy,
)
from corpus.tokenizer import load_tokenizer, sha256, vocabulary


class _Format(NamedTuple):
    """The header's version and the tokens' type of a kind of shard that llm.c writes."""

    version: int
    dtype: str  # of a token


# Shards of llm.c (dev/data/data_common.py) begin with a header of 256 int32. The first three are
# the magic number, the version and the number of tokens. Keys are magic numbers; modded-nanogpt
# writes the first kind.
LLM_C_FORMATS = {20240520: _Format(1, "<u2"), 20240801: _Format(7, "<u4")}
LLM_C_EVALUATION = 20240522  # the magic number of llm.c's multiple-choice questions
SIDES = ("training", "validation")


# --- one shard


def open_external_shard(path: str) -> np.ndarray:
    """Maps a .bin file of nanoGPT, modded-nanogpt or llm.c into memory, uint16 or uint32 [tokens].

    A file of nanoGPT is uint16 without a header. Raises ExperimentError when the file is not whole.
    """
    try:
        head = read_head(Path(path))
    except OSError as error:
        raise ExperimentError(
            f"cannot read {path}: {error.strerror}. Make it readable or take it out of --data"
        ) from error
    if head.header.startswith(MAGIC):
        raise ExperimentError(_our_own_shard_message(path))
    magic, version, count = _llm_c_header(head)
    if magic == LLM_C_EVALUATION:
        raise ExperimentError(
            f"{path} holds llm.c's multiple-choice questions, not text. Take it out of --data"
        )
    if magic not in LLM_C_FORMATS:
        return _open_without_header(path, head.size)
    known = LLM_C_FORMATS[magic]
    if version != known.version:
        raise ExperimentError(
            f"{path} has llm.c's format version {version}, not {known.version}. Make it again with "
            "a current llm.c"
        )
    expected = count * np.dtype(known.dtype).itemsize
    if len(head.header) < HEADER_BYTES or head.size != HEADER_BYTES + expected:
        stored = max(0, head.size - HEADER_BYTES)
        raise ExperimentError(
            f"{path} is cut short: it holds {stored:,} bytes of tokens, not {expected:,}. Make or "
            "download it again"
        )
    return map_tokens(Path(path), known.dtype, HEADER_BYTES, count)


def _llm_c_header(head: FileHead) -> tuple[int, int, int]:
    """The magic number, version and number of tokens; zeros where the file is too short."""
    first_numbers = head.header[:12].ljust(12, b"\0")
    magic, version, count = np.frombuffer(first_numbers, "<i4").tolist()
    return magic, version, count


def _open_without_header(path: str, size: int) -> np.ndarray:
    """Maps a file of nanoGPT, `size` bytes of uint16 tokens without a header. Returns [tokens]."""
    if size % 2 or not size:
        raise ExperimentError(
            f"{path} is cut short: {size:,} bytes are no whole number of uint16 tokens. Make or "
            "download it again"
        )
    return map_tokens(Path(path), "<u2", 0, size // 2)


def _our_own_shard_message(path: str) -> str:
    return (
        f"{path} belongs to this program's cache. Give --data and --tokenizer as they were when it "
        "was made, and it is used again"
    )


# --- several shards as one corpus


class Joined:
    """Token arrays, one after the other, that are used as one array without a copy.

    It has what batches need of an array: the length, and slices [first:last].
    """

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        # The position after each part's last token.
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, window: slice) -> np.ndarray:
        first, last, _ = window.indices(len(self))
        slices = []
        for number in range(self._part_of(first), len(self.parts)):
            part = self.parts[number]
            part_start = int(self.ends[number]) - len(part)
            if part_start >= last:
                break
            slices.append(part[max(0, first - part_start) : last - part_start])
        if len(slices) == 1:
            return slices[0]
        if not slices:
            return self.parts[0][:0]
        return np.concatenate(slices)

    def _part_of(self, position: int) -> int:
        """The number of the part that holds this position; len(parts) past the end."""
        return int(np.searchsorted(self.ends, position, side="right"))


def cut_shards(
    shards: list[np.ndarray], train_tokens: int
) -> tuple[np.ndarray | Joined, np.ndarray | Joined]:
    """The first `train_tokens` tokens of several shards, and the others."""
    training = []
    validation = []
    left_to_train = train_tokens
    for shard in shards:
        cut = min(left_to_train, len(shard))
        left_to_train -= cut
        training.append(shard[:cut])
        validation.append(shard[cut:])
    return _join(training), _join(validation)


def _join(parts: list[np.ndarray]) -> np.ndarray | Joined:
    filled = [part for part in parts if len(part)]
    if len(filled) == 1:
        return filled[0]
    return Joined(filled or [np.empty(0, np.uint16)])


def import_shards(
    config: Config, files: list[str], tokenizer_json: str, folder: Path, rules: int
) -> None:
    """Checks and counts external shards; writes tokenizer.json and corpus.json into `folder`.

    The tokens of files named val or validation are held out. If no file or every file has such a
    name, the last config.validation_fraction of all tokens are held out.
    Raises ExperimentError when a shard is not whole or was made by another tokenizer.
    """
    named_validation = [path for path in files if _is_named_validation(path)]
    named_training = [path for path in files if not _is_named_validation(path)]
    files = named_training + named_validation
    shards = [open_external_shard(path) for path in files]
    total = sum(len(shard) for shard in shards)
    train_tokens = sum(len(shard) for shard in shards[: len(named_training)])
    if train_tokens == 0 or train_tokens == total:  # the names leave one side empty
        train_tokens = total - math.ceil(total * config.validation_fraction)

    tokenizer, end_of_text = load_tokenizer(tokenizer_json, config.end_of_text)
    counts, data_hash = _count(config, files, shards, train_tokens, vocabulary(tokenizer))
    train_counts, validation_counts = counts
    counts_of_both = counts.sum(0)
    facts = dict(
        data=config.data,
        # Path.resolve would follow links, which the cache's key does not.
        files=[os.path.abspath(path) for path in files],  # noqa: PTH100
        # Each document has one end-of-text token, before or after it.
        documents=int(counts_of_both[end_of_text]),
        characters=int(counts_of_both @ _token_lengths(tokenizer)),
        train_tokens=train_tokens,
        validation_tokens=total - train_tokens,
        vocabulary=vocabulary(tokenizer),
        data_hash=data_hash,
        tokenizer_hash=sha256(tokenizer_json),
        unigram_entropy=entropy(train_counts),
        unigram_cross_entropy=unigram_cross_entropy(train_counts, validation_counts),
        left_out=0,  # shards hold no lines or rows that could be bad
        rules=rules,  # they decide where windows begin; the split is the same in all versions
    )
    replace_file(folder / "tokenizer.json", tokenizer_json)
    replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
    print(
        f"data: {len(files):,} token shards, {train_tokens:,} training and "
        f"{total - train_tokens:,} validation tokens"
        + _which_are_held_out(named_training, named_validation)
    )


def _is_named_validation(path: str) -> bool:
    """Whether val, valid or validation is a word of the file's name, as in fineweb_val_000000."""
    name = Path(path).stem.lower()
    return re.search(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", name) is not None


def _which_are_held_out(named_training: list[str], named_validation: list[str]) -> str:
    if named_training and named_validation:
        return ""
    return ": the last ones, as no file is named val"


def _count(
    config: Config,
    files: list[str],
    shards: list[np.ndarray],
    train_tokens: int,
    vocabulary_size: int,
) -> tuple[np.ndarray, str]:
    """How often each token occurs, int64 [2 SIDES, tokens of the vocabulary], and the data hash.

    `files` are the paths of `shards`. Raises ExperimentError at a token that is not in the
    vocabulary.
    """
    counts = np.zeros((len(SIDES), vocabulary_size), np.int64)
    digest = hashlib.blake2b(digest_size=16)
    total = sum(len(shard) for shard in shards)
    left_to_train = train_tokens
    with ProgressBar("checking the tokens", total, unit="token") as bar:
        for path, shard in zip(files, shards):
            cut = min(left_to_train, len(shard))
            left_to_train -= cut
            for side, part in enumerate((shard[:cut], shard[cut:])):
                try:
                    counts[side] += count_tokens(part, vocabulary_size, bar, digest)
                except ValueError as error:
                    raise ExperimentError(
                        f"{path}: {error} of its {SIDES[side]} part is out of range: "
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
