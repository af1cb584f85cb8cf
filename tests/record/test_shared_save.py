"""A checkpoint that several ranks write together: the file of one rank, or the old file stays."""

import errno
import multiprocessing
import os
import random
import resource
import threading
import zlib
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from engine.distributed import Ranks
from record import archive, checkpoint, shared_save
from record.archive import Rows
from record.checkpoint import CheckpointError
from tests.record.test_checkpoint import assert_same, names


class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank, size, board):
        super().__init__(rank, size)
        self.barrier, self.values = board

    def all_values(self, value):
        self.values[self.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


def on_all_ranks(size, function):
    """function(ranks) on each rank: the results or the errors, by rank."""
    board = threading.Barrier(size, timeout=20), [None] * size
    outcomes = [None] * size

    def run(rank):
        try:
            outcomes[rank] = function(ThreadRanks(rank, size, board))
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def whole_state(device="cpu"):
    """A state with tensors of many kinds, as one rank saves it."""
    g = torch.Generator().manual_seed(1)
    tied = torch.randn(9, generator=g)
    buffer = torch.randn(1000, generator=g).to(device)
    weight = torch.randn(13, 7, generator=g).to(device)
    return {
        "config": {"layers": 3, "name": "é", "list": [1, None, 2.5]},
        "step": 7,
        "model": {
            "fp32": weight,
            "bf16": torch.randn(50, generator=g).bfloat16().to(device),
            "bank": torch.randn(8, 3, 5, generator=g).bfloat16().to(device),
            "view": buffer[100:400].view(30, 10),
            "one_row": torch.randn(1, 6, generator=g).to(device),
            "no_rows": torch.empty(0, 4, device=device),
            "bias": torch.arange(4.0),
        },
        "optimizer": {
            "muon": {
                "state": {
                    "fp32": {
                        "momentum": torch.randn(13, 7, generator=g).to(device),
                        "residual": torch.arange(91, dtype=torch.int16).view(13, 7).to(device),
                    },
                    "uint16": {"low": torch.arange(20).view(10, 2).to(torch.uint16)},
                },
                "steps": 3,
            }
        },
        "random": {"torch": torch.arange(100, dtype=torch.uint8), "a": tied, "b": tied},
    }


def share(node, rank, owners, path=""):
    """The state of one rank: tensors of model and optimizer are Rows, of which it has its own.

    `owners` gives (owner, first row, last row + 1) for each part of a tensor.
    """
    mine = {}
    for key, value in node.items():
        name = f"{path}/{key}"
        is_shared = name.startswith(("/model", "/optimizer")) and key != "bias"
        if isinstance(value, dict):
            value = share(value, rank, owners, name)
        elif isinstance(value, torch.Tensor) and is_shared:
            parts = [
                (start, value[start:stop])
                for owner, start, stop in owners(name, len(value))
                if owner == rank
            ]
            value = Rows(tuple(value.shape), value.dtype, parts)
        elif rank > 0:
            value = None  # the first rank's counts
        mine[key] = value
    return mine


def equal_ranges(size):
    def owners(name, rows):
        bounds = [rows * rank // size for rank in range(size + 1)]
        return [(rank, bounds[rank], bounds[rank + 1]) for rank in range(size)]

    return owners


def all_to_the_last(size):
    return lambda name, rows: [(size - 1, 0, rows)]


def scattered(size):
    """Uneven ranges, of which a rank has several, and which it names in any order."""

    def owners(name, rows):
        rng = random.Random(name)
        cuts = sorted({0, rows, *(rng.randrange(rows + 1) for _ in range(6))})
        parts = [(rng.randrange(size), a, b) for a, b in zip(cuts, cuts[1:])]
        rng.shuffle(parts)
        return parts

    return owners


def saves(path, state, owners):
    """For on_all_ranks: each rank saves its share."""
    return lambda ranks: checkpoint.save(path, share(state, ranks.rank, owners), ranks)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("division", [equal_ranges, all_to_the_last, scattered])
def test_the_file_equals_that_of_one_rank(tmp_path, monkeypatch, size, division):
    monkeypatch.setattr(archive, "CHUNK", 100)
    state = whole_state()
    checkpoint.save(tmp_path / "one.pt", state)
    outcomes = on_all_ranks(size, saves(tmp_path / "all.pt", state, division(size)))
    assert outcomes == [None] * size
    assert (tmp_path / "all.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()
    assert names(tmp_path) == ["all.pt", "one.pt"]
    assert_same(checkpoint.load(tmp_path / "all.pt")["model"], state["model"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_file_equals_that_of_one_rank_on_a_gpu(tmp_path):
    state = whole_state("cuda:0")
    checkpoint.save(tmp_path / "one.pt", state)
    assert on_all_ranks(2, saves(tmp_path / "all.pt", state, scattered(2))) == [None, None]
    assert (tmp_path / "all.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()


def test_crc32_combine():
    rng = random.Random(0)
    for length in (0, 1, 2, 3, 31, 100, 4096, 70_000):
        first, second = rng.randbytes(rng.randrange(100)), rng.randbytes(length)
        combined = shared_save.crc32_combine(zlib.crc32(first), zlib.crc32(second), length)
        assert combined == zlib.crc32(first + second)
    # Parts of many GB, whose bytes nobody has: the order of combining makes no difference.
    combine = shared_save.crc32_combine
    a, b, c = (rng.getrandbits(32) for _ in range(3))
    b_length, c_length = 3 * 2**33 + 7, 2**40 + 1
    from_the_left = combine(combine(a, b, b_length), c, c_length)
    assert from_the_left == combine(a, combine(b, c, c_length), b_length + c_length)


# ---------------------------------------------------------------- failures


def in_this_thread(function, items):
    return [function(item) for item in items]


def failing_on(rank, function, error):
    def fail(*arguments):
        if threading.current_thread().name == str(rank):
            raise error
        return function(*arguments)

    return fail


@pytest.mark.parametrize(
    "module, function, rank",
    [
        (archive, "bytes_checksum", 1),
        (torch, "save", 0),
        (os, "open", 2),
        (os, "pwrite", 0),
        (os, "pwrite", 2),
        (os, "fsync", 0),
        (os, "fsync", 1),
        (os, "replace", 0),
    ],
)
def test_a_failure_on_one_rank_is_raised_on_all(tmp_path, monkeypatch, module, function, rank):
    path = tmp_path / "c.pt"
    path.write_bytes(b"old")
    # The work of a rank's threads is done by the rank itself, so that its name is known.
    monkeypatch.setattr(archive, "in_threads", in_this_thread)
    full = OSError(errno.ENOSPC, "x")
    monkeypatch.setattr(module, function, failing_on(rank, getattr(module, function), full))
    unlink, deleted_by = os.unlink, set()

    def noted_unlink(name):
        deleted_by.add(threading.current_thread().name)
        unlink(name)

    monkeypatch.setattr(os, "unlink", noted_unlink)
    outcomes = on_all_ranks(3, saves(path, whole_state(), equal_ranges(3)))
    assert deleted_by == {"0"}, "a slower rank would delete the file of the next attempt"
    for outcome in outcomes:
        assert type(outcome) is CheckpointError, outcome
        assert f"rank {rank}: No space left on device. It needs 0.00 GB, " in str(outcome)
        assert "The previous file of that name is untouched." in str(outcome)
    assert names(tmp_path) == ["c.pt"] and path.read_bytes() == b"old"


def test_an_interrupted_rank_ends_the_save_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "in_threads", in_this_thread)
    monkeypatch.setattr(os, "pwrite", failing_on(1, os.pwrite, KeyboardInterrupt()))
    outcomes = on_all_ranks(2, saves(tmp_path / "c.pt", whole_state(), equal_ranges(2)))
    assert type(outcomes[1]) is KeyboardInterrupt
    assert type(outcomes[0]) is CheckpointError and "rank 1: KeyboardInterrupt" in str(outcomes[0])
    assert names(tmp_path) == []
    # Nothing is left behind that keeps the next one from being saved.
    monkeypatch.undo()
    outcomes = on_all_ranks(2, saves(tmp_path / "c.pt", whole_state(), equal_ranges(2)))
    assert outcomes == [None, None] and checkpoint.load(tmp_path / "c.pt")["step"] == 7


def test_a_state_that_is_wrong_on_one_rank_is_an_error_on_all(tmp_path):
    rows = torch.arange(12.0).view(6, 2)

    def message(shares):
        """What all ranks raise when they save these shares."""

        def save(ranks):
            checkpoint.save(tmp_path / "c.pt", shares[ranks.rank], ranks)

        outcomes = on_all_ranks(2, save)
        assert all(type(outcome) is CheckpointError for outcome in outcomes), outcomes
        assert str(outcomes[0]) == str(outcomes[1]) and names(tmp_path) == []
        return str(outcomes[0])

    def part(start, stop, shape=(6, 2)):
        return {"w": Rows(shape, torch.float32, [(start, rows[start:stop])])}

    assert "row 2 of w is missing" in message([part(0, 2), part(3, 6)])
    assert "row 3 of w is missing, or two ranks have it" in message([part(0, 3), part(2, 6)])
    assert "w has 5 rows of 6" in message([part(0, 3), part(3, 5)])
    assert "rank 1 has rows of v, and the first" in message([part(0, 6), {"v": part(0, 6)["w"]}])
    assert "unlike on the first" in message([part(0, 3), part(3, 6, shape=(7, 2))])
    assert "rank 1: checkpoint: the rows of w" in message([part(0, 3), part(3, 6, shape=(6, 3))])
    transposed = {"w": Rows((2, 6), torch.float32, [(0, rows.t())])}
    assert "rank 1: checkpoint: the rows of w" in message(
        [{"w": Rows((2, 6), torch.float32, [])}, transposed]
    )
    assert "is a set" in message([part(0, 6) | {"x": {1}}, {}])


def test_one_rank_saves_no_rows(tmp_path):
    with pytest.raises(TypeError, match="w is a Rows"):
        checkpoint.save(tmp_path / "c.pt", {"w": Rows((2,), torch.float32, [])})


def test_loading_without_verifying_reads_no_tensor(tmp_path, monkeypatch):
    state = {"a": torch.arange(1000.0), "step": 3}
    checkpoint.save(tmp_path / "c.pt", state)
    monkeypatch.setattr(archive, "bytes_checksum", None)
    assert_same(checkpoint.load(tmp_path / "c.pt", verify=False), state)


# ---------------------------------------------------------------- real processes

ROWS = 8 * 2**20  # of 4 bytes, on each rank


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank_of_a_real_group(rank, size, folder, report):
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(0, 60)
    )
    ranks = Ranks(rank, size, rank, size)
    try:
        report.put((rank, *saves_of_a_real_rank(folder, ranks)))
    except BaseException as error:
        report.put((rank, repr(error), ""))
    ranks.wait_for_all()  # the first rank has the others' connections
    report.close()
    report.join_thread()


def saves_of_a_real_rank(folder, ranks):
    """(by how many bytes the memory grew while saving, the message of a save that fails)."""
    state = share(whole_state(), ranks.rank, equal_ranges(ranks.size))
    checkpoint.save(folder / "c.pt", state, ranks)  # the first save starts threads

    part = torch.full((ROWS,), float(ranks.rank))
    large = {"w": Rows((ranks.size * ROWS,), torch.float32, [(ranks.rank * ROWS, part)])}
    before = peak_memory()
    checkpoint.save(folder / "large.pt", large, ranks)
    grown = peak_memory() - before

    if ranks.rank == 1:
        # The system itself refuses the bytes of one rank. Python ignores SIGXFSZ.
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder / "large.pt", large, ranks)
    return grown, str(caught.value)


@pytest.mark.slow
def test_real_processes(tmp_path):
    """One group of processes: the bytes, the memory, and a file system that refuses one rank."""
    size = 3
    context = multiprocessing.get_context("fork")
    report = context.Queue()
    processes = [
        context.Process(target=rank_of_a_real_group, args=(rank, size, tmp_path, report))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        reports = [report.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size

    checkpoint.save(tmp_path / "one.pt", whole_state())
    assert (tmp_path / "c.pt").read_bytes() == (tmp_path / "one.pt").read_bytes()
    for _, grown, message in reports:
        # A rank has 32 MB of 96, and its chunks are views of them.
        assert grown < 16 * 2**20
        assert "rank 1: File too large" in message
    assert names(tmp_path) == ["c.pt", "large.pt", "one.pt", "store"]
    loaded = checkpoint.load(tmp_path / "large.pt")["w"]
    assert [loaded[ROWS * rank].item() for rank in range(size)] == [0, 1, 2]
