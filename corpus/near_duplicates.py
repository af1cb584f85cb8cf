"""Finds files that are nearly the same as another one, by MinHash.

Two files are near duplicates if NEAR of the different lines that they have together are in both:
the Jaccard similarity of their sets of lines (Broder, On the resemblance and containment of
documents, 1997). MinHash estimates it from PERMUTATIONS numbers for each file, so no two files are
compared line by line. Python imports datasketch only here.
"""

import importlib.util
import zlib
from pathlib import Path
from typing import NamedTuple

from corpus.progress_bar import ProgressBar

# Version 2 of the rules of data depends on these numbers: they must not change within it.
NEAR = 0.7
PERMUTATIONS = 64  # the estimate's standard error is 0.06 at most
SEED = 1


class Kept(NamedTuple):
    """The files that are no near duplicates of an earlier one, and how much the others hold."""

    files: list[str]
    dropped_files: int
    dropped_share: float  # of the bytes of all files


def installed() -> bool:
    """Whether the package is there that `without_near_duplicates` needs."""
    return importlib.util.find_spec("datasketch") is not None


def without_near_duplicates(files: list[str]) -> Kept:
    """Drops each file that is a near duplicate of one that stands before it in the list.

    It reads the files once: about 30 MB a second. Files without lines and those that cannot be read
    are kept.
    """
    # Slow to import, and only built-in corpora need it.
    from datasketch import MinHash, MinHashLSH

    # crc32 gives the same numbers on every machine, and is the fastest such hash in Python.
    empty = MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=zlib.crc32, scheme="affine32")
    index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
    hash_of: dict[str, MinHash] = {}
    kept = []
    bytes_read = 0
    bytes_dropped = 0
    total = sum(Path(path).stat().st_size for path in files)
    with ProgressBar("looking for near duplicates", total, unit="B") as bar:
        for path in files:
            content = _content(path)
            bytes_read += len(content)
            bar.add(len(content), 1)
            lines = {line.strip() for line in content.splitlines()} - {b""}
            if not lines:
                kept.append(path)
                continue
            minhash = empty.copy()
            minhash.update_batch(lines)
            # The index names candidates, of which a few are less alike.
            candidates = index.query(minhash)
            if any(hash_of[other].jaccard(minhash) >= NEAR for other in candidates):
                bytes_dropped += len(content)
                continue
            index.insert(path, minhash)
            hash_of[path] = minhash
            kept.append(path)
    share = bytes_dropped / max(1, bytes_read)
    return Kept(files=kept, dropped_files=len(files) - len(kept), dropped_share=share)


def _content(path: str) -> bytes:
    """The bytes of a file; none if it cannot be read, so that it is kept as one without lines."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
