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
"""Token ids, uint16 or uint32 [number of tokens]. Batches use only its length and its slices."""

# How many micro-batches ahead the disk is read. Measured from a cold disk: 20 times as fast as
# without, and no faster with more.
READ_AHEAD = 8

# The functions of the C library that this process runs with: `madvise` is one of them.
_libc = ctypes.CDLL(None)


# ---------------------------------------------------------------- order of the training windows


def sequences(
    tokens: Tokens,
    seq_len: int,
    seed: int,
    position: int,  # of the first sequence
    count: int,
) -> np.ndarray:
    """The `count` training sequences from data position `position` on.

    A data position counts the sequences since the beginning of the run. Returns int64
    [count, seq_len + 1]: seq_len inputs, and one more token as the target of the last input.

    The corpus is cut into windows: window i is tokens[i * seq_len : (i + 1) * seq_len + 1]. Each
    epoch takes every window once, in its own random order. The result depends on nothing but the
    arguments. `tokens` must hold at least one window.
    """
    rows = np.empty((count, seq_len + 1), np.int64)
    windows = _windows(tokens, seq_len, seed, position, count)
    for row, window in zip(rows, windows):
        row[:] = window
    return rows


def _windows(
    tokens: Tokens,
    seq_len: int,
    seed: int,
    position: int,
    count: int,
) -> Iterator[np.ndarray]:
    """The windows of `sequences` as slices. A slice of a mapped array is not read from the disk."""
    n_windows = _number_of_windows(tokens, seq_len)
    for index in range(position, position + count):
        epoch, index_in_epoch = divmod(index, n_windows)
        order = _order_of_windows(seed, epoch, n_windows)
        start = int(order[index_in_epoch]) * seq_len
        yield tokens[start : start + seq_len + 1]


def _number_of_windows(tokens: Tokens, seq_len: int) -> int:
    # The last token of the corpus is a target only.
    return (len(tokens) - 1) // seq_len


# Reading ahead begins the next epoch before this one has ended, so two orders are used in turn.
@functools.lru_cache(maxsize=4)
def _order_of_windows(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    """The windows 0 ... n_windows - 1 in the order in which an epoch takes them."""
    # This order must never change: a checkpoint stores only the position in it.
    order = np.random.default_rng([seed, epoch]).permutation(n_windows)
    order.flags.writeable = False  # the cache shares it among callers
    return order


# ---------------------------------------------------------------- training batches


def batches(
    tokens: Tokens,
    config: Config,
    position: int,
    pin_memory: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (inputs, targets) without end, int64 [batch_size, max_seq_len] each.

    The first sequence is the one at data position `position`. `pin_memory` puts the tensors in
    page-locked memory, from which a GPU copies while the CPU continues. With config.num_workers > 0
    background processes read in advance. They end when the iterator is closed or collected.
    """
    start_method = None
    if config.num_workers:
        start_method = "fork"  # the other methods would copy the mapped tokens to the workers
    first_sequences = range(position, 2**62, config.batch_size)  # of each micro-batch, endless
    yield from DataLoader(
        _TrainingBatches(tokens, config),
        sampler=first_sequences,
        batch_size=None,  # an item is a whole micro-batch already
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=start_method,
        # A generator of its own: otherwise starting workers would advance the global one.
        generator=torch.Generator(),
    )


class _TrainingBatches(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A dataset whose item at a data position is the micro-batch that begins there.

    Each item also starts the disk's reading of the micro-batch that is READ_AHEAD later. Without
    that, reads in random order would wait for the disk one after the other.
    """

    def __init__(self, tokens: Tokens, config: Config):
        self.tokens = tokens
        self.seq_len = config.max_seq_len
        self.seed = config.seed
        self.batch_size = config.batch_size

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        later = position + READ_AHEAD * self.batch_size
        windows = _windows(self.tokens, self.seq_len, self.seed, later, self.batch_size)
        for window in windows:
            _read_ahead(window)
        rows = sequences(self.tokens, self.seq_len, self.seed, position, self.batch_size)
        return _inputs_and_targets(rows)


def _read_ahead(window: np.ndarray) -> None:
    """Lets the kernel fetch a mapped array's pages from the disk, without waiting for them."""
    start = window.ctypes.data
    end = start + window.nbytes
    first_page = start // mmap.PAGESIZE * mmap.PAGESIZE  # madvise takes the address of a page
    length = end - first_page
    _libc.madvise(ctypes.c_void_p(first_page), ctypes.c_size_t(length), mmap.MADV_WILLNEED)


def _inputs_and_targets(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, S + 1] as inputs and targets [B, S]: the target of a token is the next one."""
    tensor = torch.from_numpy(rows)
    inputs = tensor[:, :-1].contiguous()
    targets = tensor[:, 1:].contiguous()
    return inputs, targets


def _start_worker(_worker: int) -> None:
    """Makes a worker ignore signals, and end with the trainer.

    Ctrl-C goes to the trainer and its workers alike. It must not kill the workers before the
    trainer has saved. They end with the iterator, or with the trainer's process.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------- validation batches


def validation_batches(
    tokens: Tokens, config: Config
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (inputs, targets), int64 [batch_size, max_seq_len] each: always the same windows.

    There are eval_steps * batch_size windows, or all where there are fewer. They are spread evenly
    over the tokens: the first ones would come from a few documents. The last batch may hold fewer
    sequences.
    """
    seq_len = config.max_seq_len
    n_windows = _number_of_windows(tokens, seq_len)
    taken = min(config.eval_steps * config.batch_size, n_windows)
    evenly_spread = np.arange(taken) * n_windows // taken
    starts = evenly_spread * seq_len
    for first in range(0, taken, config.batch_size):
        batch_starts = starts[first : first + config.batch_size]
        windows = [tokens[start : start + seq_len + 1] for start in batch_starts]
        rows = np.stack(windows).astype(np.int64)
        yield _inputs_and_targets(rows)
