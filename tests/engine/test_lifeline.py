"""How the ranks of a run end together, as torchrun would see them: nobody hangs."""

import os
import signal
import socket
import time

import pytest

from config import Diverged
from engine import lifeline
from tests.engine.ranks import Run, steps_of_no_model


def run_of(folder, at, **changes) -> Run:
    return Run(folder, 3, lambda argv: steps_of_no_model(at, **changes))


def raises(error, at_rank: int):
    def at(rank: int, step: int) -> None:
        if step == 3 and rank == at_rank:
            raise error

    return at


def kills(victim: int, number: int = signal.SIGKILL):
    def at(rank: int, step: int) -> None:
        if step == 3 and rank == victim:
            os.kill(os.getpid(), number)

    return at


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_all_with_one_traceback(tmp_path, rank):
    run = run_of(tmp_path, raises(ZeroDivisionError("a bug"), rank))
    assert run.codes() == [1, 1, 1]
    printed = run.printed()
    assert printed.count("Traceback") == 1 and printed.count("ZeroDivisionError: a bug") == 1
    assert ("rank 1: Traceback" in printed) is (rank == 1)
    assert printed.count("a line of every rank") == 1, "only the first rank prints"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_killed_ends_all(tmp_path, rank):
    run = run_of(tmp_path, kills(rank))
    codes = [1, 1, 1]
    codes[rank] = -signal.SIGKILL
    assert run.codes() == codes
    printed = run.printed()
    assert printed.count("was killed or has crashed") == 1
    assert "Traceback" not in printed, "the collectives of the others fail for that reason alone"


@pytest.mark.slow
def test_an_error_that_all_ranks_have_is_the_first_ranks(tmp_path):
    """The first rank writes results before it ends, while the others have ended already."""

    def at(rank: int, step: int) -> None:
        if step == 3:
            if rank == 0:
                time.sleep(1.5)  # longer than the usual grace
            raise Diverged("the loss is nan")

    run = run_of(tmp_path, at)
    assert run.codes() == [3, 3, 3]
    assert run.printed().count("the loss is nan") == 1
    assert "\nerror: the loss is nan" in run.printed()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, rank):
    run = run_of(tmp_path, kills(rank, signal.SIGTERM))
    assert run.codes() == [143, 143, 143]
    assert "stopped after step 3\n" in run.printed()
    assert "rank" not in run.printed().replace("every rank", "")


@pytest.mark.slow
def test_a_run_to_its_end_says_nothing_of_ranks(tmp_path):
    run = run_of(tmp_path, lambda rank, step: None, steps=3)
    assert run.codes() == [0, 0, 0]
    assert run.printed() == "a line of every rank\ndone\n"


@pytest.mark.slow
def test_a_worker_that_outlives_its_killed_rank_hides_nothing(tmp_path):
    """A fork of a rank, such as a process that reads data, must not hold the connection open."""
    note = tmp_path / "worker"

    def at(rank: int, step: int) -> None:
        if step == 3 and rank == 1:
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            note.write_text(str(worker))
            os.kill(os.getpid(), signal.SIGKILL)

    run = run_of(tmp_path, at)
    try:
        assert run.codes() == [1, -signal.SIGKILL, 1]
    finally:
        os.kill(int(note.read_text()), signal.SIGKILL)


def test_a_stranger_that_connects_is_no_rank(monkeypatch):
    """Another program may try every port of a machine."""
    monkeypatch.setattr(lifeline, "_state", lifeline._State())
    strangers = []

    class Two:
        rank, size, local_size, is_first = 0, 2, 2, True

        def value_of_first(self, address):
            host, port, secret = address
            for greeting in (
                b"GET / HTTP/1.1\r\n",
                b'{"rank": 1, "secret": "x"}\n',
                b"7\n",
                b"\xff\n",
            ):
                strangers.append(socket.create_connection((host, port)))
                strangers[-1].sendall(greeting)
            peer = socket.create_connection((host, port))
            lifeline._send(peer, dict(rank=1, secret=secret))
            strangers.append(peer)

    lifeline.join(Two())
    assert list(lifeline._state.connections) == [1]
    lifeline._send(strangers[-1], lifeline.GOODBYE)
    deadline = time.monotonic() + 10
    while not lifeline.has_left(1) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lifeline.has_left(1)
