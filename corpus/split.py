"""Which text is held out for validation: the rules of the split, in both versions.

Version 1 decides chunk by chunk, so that a long document may lie on both sides. Old runs depend on
it. Version 2 holds out whole documents, or one contiguous tail of a text of too few documents. This
file knows records of chunks, and neither sources nor files.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

CHUNKS_AT_ONCE = 2**20  # chunks whose hashes are compared or hashed at a time
HASHES = 2**64  # a hash of a text is one of so many numbers, all equally probable


class Split(NamedTuple):
    """Which chunks of a text are held out. A key is what decides the side of a chunk.

    In version 1 the key is the hash of the chunk. In version 2 it is the hash of the first chunk of
    its document, which is known when the document begins, or that of its source's group.
    """

    by_document: bool  # version 2
    held_out: np.ndarray  # bool [chunks that were scanned]
    limit: int  # of the chunks that were not scanned, those with a smaller key are held out
    passed_over: frozenset[int]  # smaller keys that are not held out

    def holds_out(self, key: int) -> bool:
        """Whether a chunk that was not scanned is held out."""
        return key < self.limit and key not in self.passed_over

    def blocks(self, chunks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (chunks, whether they are held out), CHUNKS_AT_ONCE or fewer at a time.

        `chunks` are the records of all chunks of the text, scanned or not. They may be mapped from
        a file.
        """
        scanned = len(self.held_out)
        for first in range(0, scanned, CHUNKS_AT_ONCE):
            last = min(first + CHUNKS_AT_ONCE, scanned)
            yield chunks[first:last], self.held_out[first:last]
        # What was scanned ends where a document ends.
        begun = None
        for first in range(scanned, len(chunks), CHUNKS_AT_ONCE):
            block = chunks[first : first + CHUNKS_AT_ONCE]
            keys = block["hash"]
            if self.by_document:
                keys = document_keys(block, begun)
                begun = None
                if not block["last"][-1]:
                    begun = int(keys[-1])
            held_out = keys < np.uint64(self.limit)
            if self.passed_over:
                held_out &= ~np.isin(keys, np.array(sorted(self.passed_over), np.uint64))
            yield block, held_out


def decide(
    chunks: np.ndarray, keys: np.ndarray, whole: bool, validation_fraction: float, rules: int
) -> Split:
    """The split of a text with these chunks (records with hash, length and last).

    `keys` (uint64 [chunks]) are those of version 2. `whole` says whether these are all chunks of
    the text, or the beginning of a text that is not scanned to its end.
    """
    if rules == 1:
        return _decide_by_chunk(chunks, validation_fraction)
    if whole:
        return _decide_by_document(chunks, keys, validation_fraction)
    return _decide_by_beginning(chunks, keys, validation_fraction)


def document_keys(chunks: np.ndarray, begun: int | None = None) -> np.ndarray:
    """The hash of the first chunk of each chunk's document, uint64 [chunks].

    `begun` is the key of a document that began before these chunks; None if none did.
    """
    is_first = np.empty(len(chunks), bool)
    is_first[0] = True
    is_first[1:] = chunks["last"][:-1]
    document = np.cumsum(is_first) - 1
    key_of_document = chunks["hash"][is_first]
    if begun is not None:
        key_of_document[0] = begun
    return key_of_document[document]


# --- version 1


def split_chunks(hashes: np.ndarray, lengths: np.ndarray, validation_fraction: float) -> np.ndarray:
    """Which chunks version 1 holds out, bool [chunks].

    They are the chunks of the lowest hashes, until these hold validation_fraction of all
    characters. Equal chunks have equal hashes, so they stay on one side. Two different chunks or
    more give two sides that are not empty.

    `lengths` are in characters.
    """
    by_hash = np.argsort(hashes, kind="stable")
    characters = np.cumsum(lengths[by_hash])
    wanted = validation_fraction * characters[-1]
    last = by_hash[np.searchsorted(characters, wanted)]
    held_out = hashes <= hashes[last]
    if held_out.all():
        return hashes < hashes.max()  # the chunk of the highest hash is left to train on
    return held_out


def _decide_by_chunk(chunks: np.ndarray, validation_fraction: float) -> Split:
    hashes = chunks["hash"]
    held_out = split_chunks(hashes, chunks["length"].astype(np.int64), validation_fraction)
    limit = 0
    if held_out.any():
        limit = int(hashes[held_out].max()) + 1
    return Split(by_document=False, held_out=held_out, limit=limit, passed_over=frozenset())


# --- version 2


def _decide_by_document(chunks: np.ndarray, keys: np.ndarray, validation_fraction: float) -> Split:
    """The split of a text that was scanned to its end.

    Keys are taken in their order, which is random, until they hold about validation_fraction of all
    characters. A key that holds more than that by itself is passed over: a giant document, or one
    that is repeated very often, is trained on. The last key is taken if that brings the held-out
    characters nearer to the wanted number. So their share is between half of validation_fraction
    and 1.5 times as much, or else there are too few documents and a tail is held out.
    """
    distinct, key_of_chunk = np.unique(keys, return_inverse=True)
    characters = np.bincount(key_of_chunk, weights=chunks["length"])
    wanted = validation_fraction * characters.sum()
    too_long = characters > wanted
    # The characters that are held out if keys are taken up to this one.
    sums = np.cumsum(np.where(too_long, 0, characters))
    last = np.abs(sums - wanted).argmin()
    if sums[last] < wanted / 2:
        held_out = _tail(chunks, wanted)
    else:
        is_taken = ~too_long
        is_taken[last + 1 :] = False
        held_out = is_taken[key_of_chunk]
    return Split(by_document=True, held_out=held_out, limit=0, passed_over=frozenset())


def _tail(chunks: np.ndarray, wanted: float) -> np.ndarray:
    """Which chunks are held out as one contiguous tail of the text, bool [chunks].

    The tail begins where a chunk begins: where its length is nearest to `wanted` characters. The
    first chunk is left to train on.
    """
    characters = np.cumsum(chunks["length"], dtype=np.int64)
    after = characters[-1] - characters  # characters behind each chunk
    held_out = np.zeros(len(chunks), bool)
    if len(chunks) > 1:
        last_trained = np.abs(after[:-1] - wanted).argmin()
        held_out[last_trained + 1 :] = True
    return held_out


def _decide_by_beginning(chunks: np.ndarray, keys: np.ndarray, validation_fraction: float) -> Split:
    """The split of a text of which only the beginning was scanned.

    Hashes are evenly distributed, so a fraction of them is about the same fraction of the
    documents, however many there are to come. A key that holds more than validation_fraction of the
    beginning is passed over, here and in all that follows.
    """
    distinct, key_of_chunk = np.unique(keys, return_inverse=True)
    characters = np.bincount(key_of_chunk, weights=chunks["length"])
    too_long = characters > validation_fraction * characters.sum()
    limit = int(validation_fraction * HASHES)
    is_low = distinct < np.uint64(limit)
    held_out = (is_low & ~too_long)[key_of_chunk]
    passed_over = frozenset(distinct[is_low & too_long].tolist())
    return Split(by_document=True, held_out=held_out, limit=limit, passed_over=passed_over)


# --- how good the held-out text is


def held_out_characters(split: Split, chunks: np.ndarray) -> tuple[int, int]:
    """(characters that are held out, how many of them stand in chunks that are trained on too)."""
    hashes = [np.empty(0, np.uint64)]
    lengths = [np.empty(0, np.int64)]
    for block, held_out in split.blocks(chunks):
        hashes.append(block["hash"][held_out])
        lengths.append(block["length"][held_out].astype(np.int64))
    held_out_hashes = np.concatenate(hashes)
    held_out_lengths = np.concatenate(lengths)
    is_trained_on = np.zeros(len(held_out_hashes), bool)
    for block, held_out in split.blocks(chunks):
        is_trained_on |= np.isin(held_out_hashes, block["hash"][~held_out])
    return int(held_out_lengths.sum()), int(held_out_lengths[is_trained_on].sum())
