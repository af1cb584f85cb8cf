"""Files of tokens: their format, reading them without a copy, and counting what they hold.

A token shard of ours is a header of HEADER_BYTES bytes, then the tokens as little-endian uint16 or
uint32. corpus.shards writes such files; corpus.external reads those of other programs.
"""

import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import ExperimentError

# Raise it when the same text would give other shards: it is part of the cache key and the header.
FORMAT_VERSION = 2
MAGIC = b"MOETOKEN"
HEADER_BYTES = 1024
# Magic, version, bytes in a token, number of tokens, the tokenizer's sha256.
HEADER = struct.Struct("<8sIIQ32s")
TOKENS_AT_ONCE = 2**20  # tokens counted or hashed at a time


class ProgressBar:
    """A progress bar: characters or tokens a second, documents a second, and the time left.

    The time left is shown only when the total is known.
    """

    def __init__(self, title: str, total: int | None = None, done: int = 0, unit: str = "char"):
        self.bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=True,
            leave=False,
            mininterval=0.5,
        )
        self.start = time.perf_counter()
        self.documents = 0

    def add(self, count: int, documents: int = 0) -> None:
        self.documents += documents
        if self.documents:
            speed = self.documents / (time.perf_counter() - self.start)
            self.bar.set_postfix_str(f"{speed:,.0f} documents/s", refresh=False)
        self.bar.update(count)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def replace_file(path: Path, content: str) -> None:
    """Writes a file as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# --- reading


class FileHead(NamedTuple):
    """The beginning of a file and the size of the whole file, in bytes."""

    header: bytes  # the first HEADER_BYTES bytes, or all of a shorter file
    size: int


def read_head(path: Path) -> FileHead:
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    return FileHead(header, size)


def map_tokens(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    """Maps the tokens of a file into memory, [count]. `offset` is in bytes."""
    if count == 0:
        return np.empty(0, dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def open_shard(path: Path, tokenizer_hash: str) -> np.ndarray:
    """Maps a token shard of our own into memory, uint16 or uint32 [tokens].

    Raises ExperimentError when its header or size is not that of a whole shard of this tokenizer.
    """
    head = read_head(path)
    problem = _shard_problem(head, tokenizer_hash)
    if problem:
        raise ExperimentError(f"{path} {problem}: delete the folder {path.parent} and run again")
    _, _, token_bytes, count, _ = HEADER.unpack_from(head.header)
    return map_tokens(path, f"<u{token_bytes}", HEADER_BYTES, count)


def _shard_problem(head: FileHead, tokenizer_hash: str) -> str | None:
    if len(head.header) < HEADER_BYTES:
        return "is cut short"
    magic, version, token_bytes, count, tokenizer = HEADER.unpack_from(head.header)
    if magic != MAGIC:
        return "is not a token shard"
    if version != FORMAT_VERSION:
        return f"has format version {version}, not {FORMAT_VERSION}"
    if token_bytes not in (2, 4):
        return f"has tokens of {token_bytes} bytes, not 2 or 4"
    if tokenizer.hex() != tokenizer_hash:
        return "belongs to another tokenizer"
    if head.size != HEADER_BYTES + count * token_bytes:
        stored = head.size - HEADER_BYTES
        return f"holds {stored:,} bytes of tokens, not {count * token_bytes:,}"
    return None


# --- writing and counting


def write_header(path: Path, dtype: np.dtype, count: int, tokenizer_hash: str) -> None:
    """Fills in the header of a shard, for which the first HEADER_BYTES bytes were left free."""
    tokenizer = bytes.fromhex(tokenizer_hash)
    with open(path, "r+b") as file:
        file.write(HEADER.pack(MAGIC, FORMAT_VERSION, dtype.itemsize, count, tokenizer))


def count_tokens(tokens: np.ndarray, size: int, bar: ProgressBar, digest=None) -> np.ndarray:
    """How often each token occurs, int64 [size]. A hashlib `digest` is fed with the tokens too.

    Raises ValueError at a token that is out of range.
    """
    counts = np.zeros(size, np.int64)
    for first in range(0, len(tokens), TOKENS_AT_ONCE):
        part = tokens[first : first + TOKENS_AT_ONCE]
        if part.max() >= size:
            bad = int(np.argmax(part >= size))
            raise ValueError(f"token {part[bad]} at position {first + bad}")
        counts += np.bincount(part, minlength=size)
        if digest:
            digest.update(part.tobytes())
        bar.add(len(part))
    return counts


def entropy(counts: np.ndarray) -> float:
    """The entropy of the distribution with these counts, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
