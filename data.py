"""Batches of a tokenized corpus, in an order that can be resumed.

`prepare(config)` turns the corpus into a Corpus of two memory-mapped token arrays, once; later runs
open them from the cache (package corpus). `batches` and `validation_batches` cut windows of
max_seq_len + 1 tokens from these arrays. The order of the training windows is a pure function of
(seed, position), so a resumed run continues with exactly the sequences it has not seen.
"""

import ctypes
import functools
import mmap
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from config import Config
from corpus.cache import Corpus, prepare
from corpus.external import Joined
from corpus.workers import die_with_parent

__all__ = ["Corpus", "Tokens", "batches", "prepare", "sequences", "validation_batches"]

Tokens = np.ndarray | Joined
"""uint16 or uint32 [tokens]; batches need only its length and its slices."""

# Micro-batches that are fetched from the disk in advance. Measured from a cold disk: 20 times as
# fast as without, and no faster with more.
READ_AHEAD = 8

_libc = ctypes.CDLL(None)


# --- the order of the training windows


def sequences(tokens: Tokens, seq_len: int, seed: int, position: int, count: int) -> np.ndarray:
    """The sequences at data positions position ... position + count - 1 of a run.

    Returns int64 [count, seq_len + 1]: the inputs and the target of the last one. Positions are
    counted from the beginning of the run. Window i is tokens[i * seq_len : (i + 1) * seq_len + 1].
    Every epoch takes each window once, in an order of its own. The result depends on nothing but
    the arguments; tokens must hold at least one window.
    """
    rows = np.empty((count, seq_len + 1), np.int64)
    for row, window in enumerate(_windows(tokens, seq_len, seed, position, count)):
        rows[row] = window
    return rows


def _windows(
    tokens: Tokens, seq_len: int, seed: int, position: int, count: int
) -> Iterator[np.ndarray]:
    """The windows of `sequences` as slices: of a mapped array, without reading it from the disk."""
    # The last token of the corpus is a target only.
    windows_per_epoch = (len(tokens) - 1) // seq_len
    for index in range(position, position + count):
        epoch, index_in_epoch = divmod(index, windows_per_epoch)
        window = int(_permutation(seed, epoch, windows_per_epoch)[index_in_epoch])
        start = window * seq_len
        yield tokens[start : start + seq_len + 1]


# At the end of an epoch two permutations are in use: reading ahead has begun the next one.
@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    # A checkpoint stores only the position: this order must never change.
    order = np.random.default_rng([seed, epoch]).permutation(n_windows)
    order.flags.writeable = False  # the cache shares it among callers
    return order


# --- training batches


def batches(
    tokens: Tokens, config: Config, position: int, pin_memory: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (inputs, targets) without end, int64 [batch_size, max_seq_len] each.

    The first sequence is that of data position `position`. With config.num_workers > 0 background
    processes read in advance; they end when the iterator is closed or collected.
    """
    # The other start methods would copy the mapped tokens to the workers.
    start_method = "fork" if config.num_workers else None
    yield from DataLoader(
        _TrainingBatches(tokens, config),
        sampler=range(position, 2**62, config.batch_size),
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=start_method,
        # A generator of its own: otherwise starting workers would advance the global one.
        generator=torch.Generator(),
    )


class _TrainingBatches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What DataLoader indexes with a data position: the micro-batch that begins there.

    The windows of READ_AHEAD micro-batches later are fetched from the disk meanwhile. Without that,
    reads in random order would wait for the disk one after the other.
    """

    def __init__(self, tokens: Tokens, config: Config):
        self.tokens = tokens
        self.seq_len = config.max_seq_len
        self.seed = config.seed
        self.batch_size = config.batch_size

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        later = position + READ_AHEAD * self.batch_size
        for window in _windows(self.tokens, self.seq_len, self.seed, later, self.batch_size):
            _read_ahead(window)
        rows = sequences(self.tokens, self.seq_len, self.seed, position, self.batch_size)
        return _inputs_and_targets(rows)


def _read_ahead(window: np.ndarray) -> None:
    """Lets the kernel fetch a mapped array's pages from the disk, without waiting for them."""
    start = window.ctypes.data
    first_page = start // mmap.PAGESIZE * mmap.PAGESIZE
    length = start + window.nbytes - first_page
    _libc.madvise(ctypes.c_void_p(first_page), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


def _inputs_and_targets(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    tensor = torch.from_numpy(rows)
    inputs = tensor[:, :-1].contiguous()
    targets = tensor[:, 1:].contiguous()
    return inputs, targets


def _start_worker(_worker: int) -> None:
    """Leaves signals to the trainer.

    A signal to the whole process group must not kill the workers before the trainer has saved. They
    end with the iterator, or with the trainer.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# --- validation batches


def validation_batches(
    tokens: Tokens, config: Config
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (inputs, targets), int64 [batch_size, max_seq_len] each: always the same windows.

    They are eval_steps * batch_size windows, or all when there are fewer, spread evenly over the
    tokens: the first ones would be a few documents. The last batch may hold fewer sequences.
    """
    seq_len = config.max_seq_len
    n_windows = (len(tokens) - 1) // seq_len
    taken = min(config.eval_steps * config.batch_size, n_windows)
    starts = np.arange(taken) * n_windows // taken * seq_len
    for first in range(0, taken, config.batch_size):
        batch_starts = starts[first : first + config.batch_size]
        rows = [tokens[start : start + seq_len + 1] for start in batch_starts]
        yield _inputs_and_targets(np.stack(rows).astype(np.int64))
