"""A tokenized corpus, opened or made: its cache, its shards, and batches in an order that can be resumed.

`prepare(config)` turns the corpus into memory-mapped token arrays, once; later runs open them from the cache. `batches`
and `validation_batches` cut windows of max_seq_len + 1 tokens from them. The order of the training windows is a pure
function of (seed, position), so a resumed run continues with exactly the sequences it has not seen.
"""

import ctypes
import functools
import mmap
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader

from config import Config
from corpus.cache import Corpus, prepare
from corpus.shards import die_with_parent

__all__ = ["Corpus", "batches", "prepare", "sequences", "validation_batches"]

READ_AHEAD = 8  # micro-batches: from a cold disk measured 20 times as fast, and no faster beyond
_libc = ctypes.CDLL(None)


# --- order of the windows


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(n_windows)
    order.flags.writeable = False  # it is shared through the cache
    return order


def sequences(tokens: np.ndarray, seq_len: int, seed: int, position: int, count: int) -> np.ndarray:
    """The sequences at data positions position ... position + count - 1, counted since the beginning of the run.

    Returns int64 [count, seq_len + 1]. Window i is tokens[i * seq_len : (i + 1) * seq_len + 1]; every epoch takes each
    window once, in an order of its own. A function of nothing but its arguments; tokens must hold at least one window.
    """
    rows = np.empty((count, seq_len + 1), np.int64)
    for row, window in zip(rows, _windows(tokens, seq_len, seed, position, count)):
        row[:] = window
    return rows


def _windows(tokens: np.ndarray, seq_len: int, seed: int, position: int, count: int):
    n_windows = (len(tokens) - 1) // seq_len
    for index in range(position, position + count):
        epoch, place = divmod(index, n_windows)
        start = int(_permutation(seed, epoch, n_windows)[place]) * seq_len
        yield tokens[start : start + seq_len + 1]


def _read_ahead(window: np.ndarray) -> None:
    """Lets the kernel fetch a mapped array's pages from the disk, without waiting for them."""
    first = window.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    _libc.madvise(
        ctypes.c_void_p(first),
        ctypes.c_size_t(window.ctypes.data + window.nbytes - first),
        mmap.MADV_WILLNEED,
    )


def _inputs_and_targets(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class _TrainingBatches:
    """What DataLoader indexes: the micro-batch that begins at a data position. The one of READ_AHEAD micro-batches later is
    fetched from the disk meanwhile, as reads in random order would wait for it, one after the other."""

    def __init__(self, tokens: np.ndarray, config: Config):
        self.tokens, self.config = tokens, config

    def __getitem__(self, position: int):
        c = self.config
        for window in _windows(
            self.tokens, c.max_seq_len, c.seed, position + READ_AHEAD * c.batch_size, c.batch_size
        ):
            _read_ahead(window)
        return _inputs_and_targets(
            sequences(self.tokens, c.max_seq_len, c.seed, position, c.batch_size)
        )


def _leave_signals_to_the_trainer(_worker: int):
    """A signal to the whole process group must not kill the workers under the trainer, which saves first; they end with
    the iterator, or with the trainer."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(tokens: np.ndarray, config: Config, position: int, pin_memory: bool = False):
    """Endless iterator of (inputs, targets), int64 [batch_size, max_seq_len] each, from data position `position` on.

    With config.num_workers > 0 background processes read ahead; they end when the iterator is closed or collected.
    """
    yield from DataLoader(
        _TrainingBatches(tokens, config),
        sampler=range(position, 2**62, config.batch_size),
        batch_size=None,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
        multiprocessing_context="fork"
        if config.num_workers
        else None,  # the others would copy the mapped tokens
        generator=torch.Generator(),
    )  # its own, or starting workers would advance the global one


def validation_batches(tokens: np.ndarray, config: Config):
    """Iterator of (inputs, targets) over eval_steps * batch_size windows, or as many as there are: always the same ones,
    spread evenly over the tokens (the first ones would be a few documents), int64 [batch_size, max_seq_len] each; the
    last batch may hold fewer sequences."""
    seq_len = config.max_seq_len
    there = (len(tokens) - 1) // seq_len
    taken = min(config.eval_steps * config.batch_size, there)
    starts = np.arange(taken) * there // taken * seq_len
    for first in range(0, taken, config.batch_size):
        rows = [
            tokens[start : start + seq_len + 1]
            for start in starts[first : first + config.batch_size]
        ]
        yield _inputs_and_targets(np.stack(rows).astype(np.int64))
