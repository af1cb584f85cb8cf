"""Batches of training and validation windows, and their order."""

import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import IGNORED_TARGET
from tests.corpus.conftest import folder  # noqa: F401 (a fixture)
from tests.corpus.stories import config_for, forked

# --- order


@given(
    windows=st.integers(1, 40),
    extra=st.integers(1, 8),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_every_window_once_an_epoch(windows, extra, seed, epoch):
    seq_len = 8
    tokens = np.arange(windows * seq_len + extra, dtype=np.uint16)
    rows = data.sequences(tokens, seq_len, seed, epoch * windows, windows, rules=1)
    assert rows.dtype == np.int64 and rows.shape == (windows, seq_len + 1)
    assert sorted(rows[:, 0].tolist()) == [i * seq_len for i in range(windows)]
    assert (np.diff(rows) == 1).all()  # S inputs and the target of the last


@given(
    windows=st.integers(1, 60),
    seed=st.integers(0, 2**43 - 1),
    world=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_every_window_once_an_epoch_for_any_seed_and_world_size(
    windows, seed, world, batch_size, epoch
):
    """Ranks take micro-batches in turn from one order of positions; an epoch is what they read together."""
    tokens = np.arange(windows * 8 + 1, dtype=np.uint16)
    begin, end, read = epoch * windows, (epoch + 1) * windows, []
    for rank in range(world):
        for position in range(begin + rank * batch_size, end, world * batch_size):
            read += data.sequences(
                tokens, 8, seed, position, min(batch_size, end - position), rules=1
            )[:, 0].tolist()
    assert sorted(read) == list(range(0, windows * 8, 8))


def test_epochs_and_seeds_differ():
    tokens = np.arange(801, dtype=np.uint16)
    first, second = (
        data.sequences(tokens, 8, 1, 0, 100)[:, 0],
        data.sequences(tokens, 8, 1, 100, 100)[:, 0],
    )
    other = data.sequences(tokens, 8, 2, 0, 100)[:, 0]
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    assert not np.array_equal(first, np.sort(first))


def test_order_is_pinned():
    """A checkpoint stores only the position, so this order must never change."""
    tokens = np.arange(81, dtype=np.uint16)
    assert (data.sequences(tokens, 8, 1234, 8, 6, rules=1)[:, 0] // 8).tolist() == [
        1,
        3,
        1,
        4,
        0,
        5,
    ]


@given(
    position=st.integers(0, 10**6),
    count=st.integers(1, 20),
    cut=st.integers(0, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_sequences_depend_on_the_position_alone(position, count, cut, seed):
    tokens, cut = np.arange(100, dtype=np.uint16), min(cut, count)
    whole = data.sequences(tokens, 7, seed, position, count)
    parts = [
        data.sequences(tokens, 7, seed, position, cut),
        data.sequences(tokens, 7, seed, position + cut, count - cut),
    ]
    assert np.array_equal(whole, np.concatenate(parts))


# --- the windows of version 2


@given(
    length=st.integers(9, 400),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_windows_of_version_2_begin_at_an_offset(length, seed, epoch):
    """Every window once an epoch, all with the epoch's offset, and the same number in each epoch."""
    seq_len = 8
    tokens = np.arange(length, dtype=np.uint16)
    windows = max(1, (length - seq_len) // seq_len)
    rows = data.sequences(tokens, seq_len, seed, epoch * windows, windows, rules=2)
    assert (np.diff(rows) == 1).all(), "a window is cut short, or is not of the corpus"
    starts = np.sort(rows[:, 0])
    assert starts[0] < 2 * seq_len
    assert starts.tolist() == [starts[0] + i * seq_len for i in range(windows)]


def test_every_offset_of_version_2_occurs_and_every_token_is_read():
    for length in (9, 12, 17, 23, 40):
        tokens = np.arange(length, dtype=np.uint16)
        windows = max(1, (length - 8) // 8)
        rows = data.sequences(tokens, 8, 1, 0, 200 * windows, rules=2)
        offsets = {rows[i * windows : (i + 1) * windows, 0].min() for i in range(200)}
        assert offsets == set(range(length - 8 * windows))
        assert set(rows.ravel().tolist()) == set(range(length))


def test_order_of_version_2_is_pinned():
    tokens = np.arange(97, dtype=np.uint16)
    assert data.sequences(tokens, 8, 1234, 9, 6, rules=2)[:, 0].tolist() == [25, 81, 79, 7, 15, 47]


@given(position=st.integers(0, 10**6), count=st.integers(1, 20), first=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_sequences_of_version_2_depend_on_the_position_alone(position, count, first):
    tokens = np.arange(100, dtype=np.uint16)
    first = min(first, count)
    whole = data.sequences(tokens, 7, 5, position, count, rules=2)
    before = data.sequences(tokens, 7, 5, position, first, rules=2)
    after = data.sequences(tokens, 7, 5, position + first, count - first, rules=2)
    assert np.array_equal(whole, np.concatenate([before, after]))


def test_batches_follow_the_version(tmp_path):
    tokens, config = np.arange(1000, dtype=np.uint16), config_for(tmp_path, batch_size=4)
    for rules in (1, 2):
        got = take(data.batches(tokens, config, 60, rules=rules), 20)
        expected = data.sequences(tokens, 16, config.seed, 60, 80, rules=rules)
        assert torch.equal(torch.cat([i for i, _ in got]), torch.from_numpy(expected[:, :-1]))


# --- training batches


def take(iterator, n: int):
    return [next(iterator) for _ in range(n)]


def test_cut_into_micro_batches_does_not_matter(tmp_path):
    tokens, config = np.arange(1000, dtype=np.uint16), config_for(tmp_path)
    seen = []
    for batch_size, n in ((1, 80), (8, 10), (16, 5)):
        got = take(data.batches(tokens, replace(config, batch_size=batch_size), 0), n)
        assert all(
            i.shape == t.shape == (batch_size, 16) and i.dtype == t.dtype == torch.int64
            for i, t in got
        )
        assert all(torch.equal(i[:, 1:], t[:, :-1]) and torch.equal(t, i + 1) for i, t in got)
        assert all(x.is_contiguous() for pair in got for x in pair)
        seen.append(torch.cat([i for i, _ in got]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(
        seen[0], seen[2]
    )  # 80 sequences, beyond the first epoch
    assert torch.equal(
        seen[0], torch.from_numpy(data.sequences(tokens, 16, config.seed, 0, 80)[:, :-1])
    )


def test_beginning_at_a_position_is_skipping_to_it(tmp_path):
    tokens, config = np.arange(1000, dtype=np.uint16), config_for(tmp_path, batch_size=4)
    from_start, from_there = (
        take(data.batches(tokens, config, 0), 20),
        take(data.batches(tokens, config, 60), 5),
    )
    for (a, _), (b, _) in zip(from_start[15:], from_there):
        assert torch.equal(a, b)


def test_what_is_read_later_is_fetched_from_the_disk_now(tmp_path, folder, monkeypatch):
    config, announced = config_for(tmp_path, batch_size=4), []
    tokens = data.prepare(config).train

    def announce(tokens, first, last):
        announced.append(tokens[first:last].tolist())

    monkeypatch.setattr(data.TokenFiles, "read_ahead", announce)
    batches = data.batches(tokens, config, 8)
    got = [next(batches) for _ in range(data.READ_AHEAD + 1)]
    assert announced[:4] == np.concatenate([got[-1][0], got[-1][1][:, -1:]], 1).tolist() and len(
        announced
    ) == 4 * len(got)
    monkeypatch.undo()
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *place: advised.append(place))
    for first, last in ((0, 17), (len(tokens) - 17, len(tokens)), (5, 5), (1, 10**9)):
        tokens.read_ahead(first, last)
    will_need = os.POSIX_FADV_WILLNEED
    assert advised == [
        (1024, 34, will_need),
        (1024 + 2 * (len(tokens) - 17), 34, will_need),
        (1026, 2 * (len(tokens) - 1), will_need),
    ]


def test_workers_give_the_same_batches_and_end(tmp_path, folder, capfd):
    config = config_for(tmp_path, num_workers=2)
    tokens = data.prepare(config).train  # tokenizing first: forking afterwards must not warn
    state = torch.get_rng_state()
    for close in (True, False):
        parallel = data.batches(tokens, config, 3)
        in_process = data.batches(tokens, replace(config, num_workers=0), 3)
        for (a, b), (c, d) in zip(take(parallel, 30), take(in_process, 30)):
            assert torch.equal(a, c) and torch.equal(b, d)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            ignored = int(
                re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text()).group(
                    1
                ),
                16,
            )
            assert ignored >> (signal.SIGINT - 1) & 1
            os.kill(worker.pid, signal.SIGINT)
        take(parallel, 10)
        if close:
            parallel.close()
        del parallel
        deadline = time.monotonic() + 10
        while multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not multiprocessing.active_children()
    assert torch.equal(
        state, torch.get_rng_state()
    )  # reading data does not shift the model's random numbers
    assert "forked" not in capfd.readouterr().err


@pytest.mark.slow
def test_workers_end_when_the_trainer_is_killed(tmp_path):
    def train():
        batches = data.batches(np.arange(10_000), config_for(tmp_path, num_workers=1), 0)
        next(batches)
        (tmp_path / "pid").write_text(str(multiprocessing.active_children()[0].pid))
        os.kill(os.getpid(), signal.SIGKILL)

    start = time.monotonic()
    assert forked(train) == -signal.SIGKILL  # it returns when the worker has ended too
    assert time.monotonic() - start < 4  # sooner than PyTorch looks
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


# --- validation batches


def test_validation_batches_are_the_same_windows_each_time_spread_evenly(tmp_path):
    tokens = np.arange(16 * 10 + 5, dtype=np.uint16)
    config = config_for(tmp_path, batch_size=4, eval_steps=20)
    for _ in range(2):
        got = list(data.validation_batches(tokens, config))
        assert [len(i) for i, _ in got] == [4, 4, 4]
        inputs = torch.cat([i for i, _ in got])
        targets = torch.cat([t for _, t in got])
        # all ten windows there are, and two rows that fill up the last batch
        assert torch.equal(inputs[:10], torch.arange(160).view(10, 16))
        assert torch.equal(targets[:10], torch.arange(1, 161).view(10, 16))
        assert (targets[10:] == IGNORED_TARGET).all() and (inputs[10:] == 0).all()
    short = list(data.validation_batches(tokens, replace(config, eval_steps=2)))
    assert [len(i) for i, _ in short] == [4, 4]
    assert [i[r, 0].item() // 16 for i, _ in short for r in range(4)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all(x.dtype == torch.int64 and x.is_contiguous() for pair in short for x in pair)


def test_validation_reads_the_same_windows_for_every_micro_batch(tmp_path):
    tokens = np.arange(16 * 50 + 1, dtype=np.uint16)
    config = config_for(tmp_path, eval_sequences=7)
    for batch_size in (1, 3, 4, 8):
        batches = data.validation_batches(tokens, replace(config, batch_size=batch_size))
        inputs, targets = map(torch.cat, zip(*batches))
        read = (targets != IGNORED_TARGET).all(dim=1)
        assert len(inputs) % batch_size == 0
        assert (inputs[read][:, 0] // 16).tolist() == [0, 7, 14, 21, 28, 35, 42], batch_size
