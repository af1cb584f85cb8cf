"""Files of tokens: their format, opening them, and counting what they hold.

A token shard of ours is a header of HEADER_BYTES bytes, then the tokens as little-endian uint16 or
uint32. corpus.token_writer writes such files; corpus.external reads those of other programs.
"""

import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import ExperimentError
from corpus.progress_bar import ProgressBar
from corpus.token_reader import FilePart, FileVersion, TokenFiles, file_version

# Increase it when the same text would give other shards. It is part of the cache's key and of every
# header, so old shards are no longer found.
FORMAT_VERSION = 2
MAGIC = b"MOETOKEN"
HEADER_BYTES = 1024
HEADER = struct.Struct("<8sIIQ32s")  # the bytes of a ShardHeader; zeros follow up to HEADER_BYTES
TOKENS_AT_ONCE = 2**20  # tokens counted or hashed at a time


class ShardHeader(NamedTuple):
    """The fields at the beginning of a token shard of ours, in their order."""

    magic: bytes
    version: int
    token_bytes: int  # bytes of one token
    num_tokens: int
    tokenizer: bytes  # sha256 of the tokenizer.json


def replace_file(path: Path, content: str) -> None:
    """Writes a file as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_own_json(path: Path) -> dict:
    """The JSON object in a file that this program wrote. Raises OSError, or ValueError."""
    if os.path.lexists(path) and not path.is_file():
        # Whoever reads from a pipe waits without end.
        raise ValueError(f"{path.name} is no file")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path.name} has brackets in brackets without end") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def discard_unreadable(path: Path, error: Exception) -> None:
    """Deletes what a killed build left and nobody can read, and says so: it is made again."""
    cause = str(error).partition("\n")[0] or type(error).__name__
    print(f"data: {path} cannot be read ({cause}); it is made again")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- reading


class FileHead(NamedTuple):
    """The beginning of a file, and the state of the whole file."""

    header: bytes  # the first HEADER_BYTES bytes, or all of a shorter file
    version: FileVersion

    @property
    def size(self) -> int:
        return self.version.size


def read_head(path: Path) -> FileHead:
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        version = file_version(file.fileno())
    return FileHead(header, version)


def open_shard(path: Path, tokenizer_hash: str, vocabulary: int | None = None) -> TokenFiles:
    """Opens a token shard of our own, uint16 or uint32 [tokens].

    `vocabulary` is the size of the tokenizer's vocabulary: tokens are compared with it when they
    are read. Raises ExperimentError when its header or size is not that of a whole shard of this
    tokenizer.
    """
    if not path.is_file():  # a pipe would be read without end
        raise ExperimentError(
            f"{path} is missing or no file: delete the folder {path.parent} and run again"
        )
    head = read_head(path)
    problem = _shard_problem(head, tokenizer_hash)
    if problem:
        raise ExperimentError(f"{path} {problem}: delete the folder {path.parent} and run again")
    header = ShardHeader(*HEADER.unpack_from(head.header))
    dtype = np.dtype(f"<u{header.token_bytes}")
    part = FilePart(str(path), head.version, dtype, HEADER_BYTES, header.num_tokens)
    return TokenFiles([part], f"Delete the folder {path.parent} and run again", vocabulary)


def _shard_problem(head: FileHead, tokenizer_hash: str) -> str | None:
    """What is wrong with a shard, to be put behind its path; None if nothing is."""
    if len(head.header) < HEADER_BYTES:
        return "is cut short"
    header = ShardHeader(*HEADER.unpack_from(head.header))
    if header.magic != MAGIC:
        return "is not a token shard"
    if header.version != FORMAT_VERSION:
        return f"has format version {header.version}, not {FORMAT_VERSION}"
    if header.token_bytes not in (2, 4):
        return f"has tokens of {header.token_bytes} bytes, not 2 or 4"
    if header.tokenizer.hex() != tokenizer_hash:
        return "belongs to another tokenizer"
    expected = header.num_tokens * header.token_bytes
    stored = head.size - HEADER_BYTES
    if stored != expected:
        return f"holds {stored:,} bytes of tokens, not {expected:,}"
    return None


# --- writing and counting


def write_header(path: Path, dtype: np.dtype, count: int, tokenizer_hash: str) -> None:
    """Fills in the header of a shard, for which the first HEADER_BYTES bytes were left free.

    `count` is the number of tokens.
    """
    tokenizer = bytes.fromhex(tokenizer_hash)
    header = ShardHeader(MAGIC, FORMAT_VERSION, dtype.itemsize, count, tokenizer)
    with open(path, "r+b") as file:
        file.write(HEADER.pack(*header))


def count_tokens(tokens: TokenFiles, size: int, bar: ProgressBar, digest=None) -> np.ndarray:
    """How often each token occurs, int64 [size]; `size` is that of the vocabulary.

    A `digest` of hashlib is updated with the bytes of the tokens, so that they are read once only.
    Raises ValueError at a token that is not in the vocabulary.
    """
    counts = np.zeros(size, np.int64)
    for first in range(0, len(tokens), TOKENS_AT_ONCE):
        part = tokens[first : first + TOKENS_AT_ONCE]
        if part.max() >= size:
            bad = int(np.argmax(part >= size))  # index of the first one
            raise ValueError(f"token {part[bad]} at position {first + bad}")
        counts += np.bincount(part, minlength=size)
        if digest:
            digest.update(part.tobytes())
        bar.add(len(part))
    return counts


def count_both(train: TokenFiles, validation: TokenFiles, size: int) -> np.ndarray:
    """How often each token occurs on each side, int64 [2, size]. Shows a progress bar.

    `size` is that of the vocabulary. Raises ValueError at a token that is not in it.
    """
    with ProgressBar("counting", len(train) + len(validation), unit="token") as bar:
        return np.stack([count_tokens(tokens, size, bar) for tokens in (train, validation)])


def entropy(counts: np.ndarray) -> float:
    """The entropy of the distribution with these counts, in nats."""
    # 0 log 0 counts as 0, and numpy would give nan: tokens that never occur are left out.
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def unigram_cross_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """The loss on held-out text of a model that knows training's frequencies alone, nats per token.

    `train_counts` and `validation_counts` say how often each token of the vocabulary occurs. Token
    v has the probability (train_counts[v] + 1) / (training tokens + size of the vocabulary): to add
    one to each count gives tokens that training lacks a probability too (Laplace smoothing). The
    result is the mean of -log p over the held-out tokens; nan without any.
    """
    held_out_tokens = validation_counts.sum()
    if held_out_tokens == 0:
        return math.nan
    smoothed = train_counts + 1
    log_p = np.log(smoothed / smoothed.sum())
    return float(-(validation_counts @ log_p) / held_out_tokens)
