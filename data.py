"""Batches of a tokenized corpus, in an order that can be resumed.

`prepare(config)` turns the corpus into a Corpus of token files for training and for validation,
once; later runs open them from the cache (package corpus). `batches` and `validation_batches` read
windows of max_seq_len + 1 tokens from these files. The order of the training windows is a pure
function of (seed, position), so a resumed run continues with exactly the sequences it has not seen.
"""

import functools
import itertools
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from config import DATA_RULES, IGNORED_TARGET, Config, ExperimentError
from corpus.cache import Corpus, prepare
from corpus.token_reader import TokenFiles
from corpus.workers import die_with_parent, ignore_stop_signals
from engine import lifeline

__all__ = ["Corpus", "Tokens", "batches", "prepare", "sequences", "validation_batches"]

Tokens = np.ndarray | TokenFiles
"""Token ids, uint16 or uint32 [number of tokens]. Batches use only its length and its slices."""

# How many micro-batches ahead the disk is read. Measured from a cold disk: 20 times as fast as
# without, and no faster with more.
READ_AHEAD = 8


# ---------------------------------------------------------------- order of the training windows


def sequences(
    tokens: Tokens,
    seq_len: int,
    seed: int,
    position: int,  # of the first sequence
    count: int,
    rules: int = DATA_RULES,
) -> np.ndarray:
    """The `count` training sequences from data position `position` on.

    A data position counts the sequences since the beginning of the run. Returns int64
    [count, seq_len + 1]: seq_len inputs, and one more token as the target of the last input.

    The corpus is cut into windows: window i begins at token offset + i * seq_len. Each epoch takes
    every window once, in its own random order. The offset is 0 in version 1 of the `rules` of data.
    In version 2 each epoch has its own, so that the corpus is cut in other places. The result
    depends on nothing but the arguments. `tokens` must hold at least one window.
    """
    rows = np.empty((count, seq_len + 1), np.int64)
    starts = _window_starts(tokens, seq_len, seed, position, count, rules)
    for row, start in zip(rows, starts):
        row[:] = tokens[start : start + seq_len + 1]
    return rows


def _window_starts(
    tokens: Tokens,
    seq_len: int,
    seed: int,
    position: int,
    count: int,
    rules: int,
) -> Iterator[int]:
    """The first token of each window of `sequences`, as an index into `tokens`."""
    n_windows = _windows_of_an_epoch(tokens, seq_len, rules)
    offsets = 1  # how many offsets an epoch may have
    if rules >= 2:
        # The largest offset is that with which the last window ends with the corpus, so that no
        # token is left out of all epochs: seq_len - 1 or more, except in a very short corpus.
        offsets = len(tokens) - n_windows * seq_len
    for index in range(position, position + count):
        epoch, index_in_epoch = divmod(index, n_windows)
        order, offset = _order_of_windows(seed, epoch, n_windows, offsets)
        yield offset + int(order[index_in_epoch]) * seq_len


def _windows_of_an_epoch(tokens: Tokens, seq_len: int, rules: int) -> int:
    """How many windows an epoch has: the same number for every offset."""
    if rules == 1:
        return _number_of_windows(tokens, seq_len)
    # One window less than without an offset: what is left over is seq_len tokens at least.
    return max(1, (len(tokens) - seq_len) // seq_len)


def _number_of_windows(tokens: Tokens, seq_len: int) -> int:
    # The last token of the corpus is a target only.
    return (len(tokens) - 1) // seq_len


# Reading ahead begins the next epoch before this one has ended, so two orders are used in turn.
@functools.lru_cache(maxsize=4)
def _order_of_windows(
    seed: int,
    epoch: int,
    n_windows: int,
    offsets: int,
) -> tuple[np.ndarray, int]:
    """(the order in which an epoch takes the windows 0 ... n_windows - 1, its offset in tokens).

    The offset is one of 0 ... offsets - 1.
    """
    # Neither may ever change: a checkpoint stores only the position.
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(n_windows)
    order.flags.writeable = False  # the cache shares it among callers
    return order, int(rng.integers(offsets))


# ---------------------------------------------------------------- training batches


def batches(
    tokens: Tokens,
    config: Config,
    position: int,
    pin_memory: bool = False,
    rules: int = DATA_RULES,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (inputs, targets) without end, int64 [batch_size, max_seq_len] each.

    The first step begins at data position `position`. Of each step's micro-batches `rank` gets the
    numbers rank, rank + ranks, ... So a step has the same micro-batches on any number of ranks.
    `pin_memory` puts the tensors in page-locked memory, from which a GPU copies while the CPU
    continues. With config.num_workers > 0 background processes read in advance. They end when the
    iterator is closed or collected. When one of them dies, this process reads on from the same
    position.
    """
    dataset = _TrainingBatches(tokens, config, rules, ranks)
    read = 0  # micro-batches
    if config.num_workers:
        positions = _positions(config, position, rank, ranks)
        loader = _loader(dataset, positions, config.num_workers, pin_memory)
        for batch in _until_a_worker_dies(loader):
            yield _checked(batch)
            read += 1
    positions = itertools.islice(_positions(config, position, rank, ranks), read, None)
    for batch in _loader(dataset, positions, 0, pin_memory):
        yield _checked(batch)


def _positions(config: Config, position: int, rank: int, ranks: int) -> Iterator[int]:
    """The data position at which each of the rank's micro-batches begins, endless."""
    for step in itertools.count(position, config.sequences_per_step):
        for micro_batch in range(rank, config.gradient_accumulation_steps, ranks):
            yield step + micro_batch * config.batch_size


def _loader(
    dataset: "_TrainingBatches", positions: Iterator[int], num_workers: int, pin_memory: bool
) -> DataLoader:
    """A loader of the micro-batches that begin at these positions. It can be read once."""
    start_method = None
    if num_workers:
        start_method = "fork"  # the other methods import torch again, and copy arrays of tokens
    return DataLoader(
        dataset,
        sampler=positions,
        batch_size=None,  # an item is a whole micro-batch already
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=start_method,
        # A generator of its own: otherwise starting workers would advance the global one.
        generator=torch.Generator(),
    )


def _checked(item: tuple[torch.Tensor, torch.Tensor] | str) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch that an item of _TrainingBatches is.

    Raises ExperimentError when the item is a message instead: its tokens could not be read.
    """
    if isinstance(item, str):
        raise ExperimentError(item)
    return item


def _until_a_worker_dies(loader: DataLoader) -> Iterator:
    """Yields the items of a loader with workers. Ends, with a warning, when a worker has died.

    The system kills a worker when memory runs out, for example. PyTorch notices it within seconds.
    """
    iterator = None
    try:
        iterator = _iterator_without_handler(loader)
        while True:
            yield next(iterator)
    except Exception as error:  # a half-sent item can make the loader raise anything
        cause = str(error).partition("\n")[0]
        lifeline.warn(
            f"warning: a worker that reads data has died ({cause}). The main process reads the "
            "data from here on, which may be slower; a resumed run has workers again."
        )
        if iterator is not None:
            _kill_workers(iterator)


def _iterator_without_handler(loader: DataLoader) -> Iterator:
    """iter(loader), without the signal handler that PyTorch adds when it starts workers.

    The handler would raise an error the moment a worker dies, in the middle of whatever training
    does then. Without it the error comes out of the iterator.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if is_main_thread:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator


def _kill_workers(iterator: Iterator) -> None:
    """Kills the workers that are left.

    They may wait for a lock that the dead worker held, and they ignore PyTorch's SIGTERM.
    """
    for worker in iterator._workers:
        worker.kill()


class _TrainingBatches(Dataset[tuple[torch.Tensor, torch.Tensor] | str]):
    """A dataset whose item at a data position is the micro-batch that begins there.

    When its tokens cannot be read, the item is the message of the error. Raised in a worker, the
    error would come out of DataLoader with the worker's traceback in its message.

    Each item also starts the disk's reading of the micro-batch that is READ_AHEAD later, counted
    in those of one of the `ranks`. Without that, reads in random order would wait for the disk one
    after the other.
    """

    def __init__(self, tokens: Tokens, config: Config, rules: int, ranks: int = 1):
        self.tokens = tokens
        self.rules = rules
        self.seq_len = config.max_seq_len
        self.seed = config.seed
        self.batch_size = config.batch_size
        self.ahead = READ_AHEAD * ranks * config.batch_size  # sequences

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor] | str:
        try:
            self._read_ahead(position + self.ahead)
            rows = sequences(
                self.tokens, self.seq_len, self.seed, position, self.batch_size, self.rules
            )
        except ExperimentError as error:
            return str(error)
        return _inputs_and_targets(rows)

    def _read_ahead(self, position: int) -> None:
        """Starts the disk's reading of the micro-batch at a data position, if it is on the disk."""
        if not isinstance(self.tokens, TokenFiles):
            return
        starts = _window_starts(
            self.tokens, self.seq_len, self.seed, position, self.batch_size, self.rules
        )
        for start in starts:
            self.tokens.read_ahead(start, start + self.seq_len + 1)


def _inputs_and_targets(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, S + 1] as inputs and targets [B, S]: the target of a token is the next one."""
    tensor = torch.from_numpy(rows)
    inputs = tensor[:, :-1].contiguous()
    targets = tensor[:, 1:].contiguous()
    return inputs, targets


def _start_worker(_worker: int) -> None:
    """Makes a worker ignore signals, and end with the trainer.

    A signal must not kill the workers before the trainer has saved. They end with the iterator, or
    with the trainer's process.
    """
    die_with_parent()
    ignore_stop_signals()


# ---------------------------------------------------------------- validation batches


def validation_batches(
    tokens: Tokens, config: Config
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (inputs, targets), int64 [batch_size, max_seq_len] each: always the same windows.

    There are config.validation_sequences windows, or all where there are fewer. They are spread
    evenly over the tokens: the first ones would come from a few documents. They do not depend on
    batch_size.

    All batches have the same shape, so that none needs a compiled graph of its own. Where the
    windows do not fill the last batch, its further rows have the inputs 0 and the targets
    IGNORED_TARGET.
    """
    seq_len = config.max_seq_len
    n_windows = _number_of_windows(tokens, seq_len)
    taken = min(config.validation_sequences, n_windows)
    evenly_spread = np.arange(taken) * n_windows // taken
    starts = evenly_spread * seq_len
    for first in range(0, taken, config.batch_size):
        batch_starts = starts[first : first + config.batch_size]
        rows = np.zeros((config.batch_size, seq_len + 1), np.int64)
        for row, start in zip(rows, batch_starts):
            row[:] = tokens[start : start + seq_len + 1]
        inputs, targets = _inputs_and_targets(rows)
        targets[len(batch_starts) :] = IGNORED_TARGET
        yield inputs, targets
