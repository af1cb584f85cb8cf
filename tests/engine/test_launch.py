"""--gpus N: how many ranks, what each of them gets, and how the launcher watches over them."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import run_experiment
from config import ConfigError
from engine import launch
from tests.engine.ranks import run_in_fork


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """This process is no rank, and sees four GPUs."""
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    for name in (*variables, "TORCHELASTIC_RUN_ID", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch.os, "environ", dict(os.environ, CUDA_VISIBLE_DEVICES="4,5,6,7"))


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    "gpus, device, ranks",
    [(None, "auto", 1), ("1", "auto", 1), ("all", "auto", 4), ("3", "cuda", 3), ("8", "cpu", 8)],
)
def test_the_number_of_ranks(gpus, device, ranks):
    assert launch.requested_ranks(gpus, device) == ranks


@pytest.mark.parametrize(
    "gpus, device, message",
    [
        ("5", "auto", "--gpus 5: 4 GPUs are visible"),
        ("all", "cpu", "no GPU is visible"),
        ("0", "cpu", "must be `all` or a number from 1"),
        ("-1", "cpu", "must be `all` or a number from 1"),
        ("two", "cpu", "must be `all` or a number from 1"),
        ("99999", "cpu", "must be `all` or a number from 1"),
    ],
)
def test_a_number_that_cannot_be_had(gpus, device, message):
    with pytest.raises(ConfigError, match=message):
        launch.requested_ranks(gpus, device)


def test_the_environment_of_a_launcher_decides():
    """torchrun and others have started the processes already."""
    launch.os.environ |= dict(RANK="1", WORLD_SIZE="16", MASTER_PORT="29500")
    with pytest.raises(ConfigError, match="WORLD_SIZE=16, but no MASTER_ADDR:"):
        launch.requested_ranks(None, "auto")
    launch.os.environ["MASTER_ADDR"] = "node1"
    assert launch.is_rank() and launch.rank() == 1
    for gpus in (None, "all", "16"):
        assert launch.requested_ranks(gpus, "auto") == 16
    with pytest.raises(ConfigError, match="--gpus 8 contradicts WORLD_SIZE=16"):
        launch.requested_ranks("8", "auto")
    # Some schedulers set the variables for a single process too.
    launch.os.environ |= dict(RANK="3", WORLD_SIZE="1")
    assert launch.requested_ranks("2", "auto") == 2 and launch.rank() == 0


def test_gpus_are_found_without_torch(monkeypatch):
    for named, gpus in (("", []), ("-1", []), ("2, GPU-abc,-1,3", ["2", "GPU-abc"])):
        launch.os.environ["CUDA_VISIBLE_DEVICES"] = named
        assert launch.visible_gpus() == gpus
    del launch.os.environ["CUDA_VISIBLE_DEVICES"]
    listed = (
        "GPU 0: NVIDIA H200 (UUID: GPU-1)\n  MIG 1g Device 0\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
    )
    done = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(launch.subprocess, "run", lambda *args, **kwargs: done)
    assert launch.visible_gpus() == ["0", "1"]

    def no_driver(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(launch.subprocess, "run", no_driver)
    assert launch.visible_gpus() == []


# ---------------------------------------------------------------- what a rank gets


def test_a_rank_sees_its_own_gpu_alone():
    launch.os.environ |= dict(RANK="6", WORLD_SIZE="8", LOCAL_RANK="2", LOCAL_WORLD_SIZE="4")
    launch.prepare_rank("auto", cores=16)
    environ = launch.os.environ
    assert environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert environ["OMP_NUM_THREADS"] == environ["TORCHINDUCTOR_COMPILE_THREADS"] == "4"
    assert environ["NCCL_NVLS_ENABLE"] == "0" and environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


def test_what_the_user_has_set_stays():
    """A scheduler may show each rank one GPU alone; torchrun sets OMP_NUM_THREADS=1 by itself."""
    launch.os.environ |= dict(RANK="1", WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="3")
    launch.os.environ["OMP_NUM_THREADS"] = "1"
    launch.prepare_rank("auto", cores=16)
    assert launch.os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert launch.os.environ["OMP_NUM_THREADS"] == "1"
    launch.os.environ["TORCHELASTIC_RUN_ID"] = "none"
    launch.prepare_rank("auto", cores=16)
    assert launch.os.environ["OMP_NUM_THREADS"] == "8"


def test_more_ranks_than_gpus_on_a_machine():
    launch.os.environ |= dict(RANK="4", WORLD_SIZE="8")
    with pytest.raises(ConfigError, match="8 ranks on this machine, where 4 GPUs are visible"):
        launch.prepare_rank("auto", cores=16)
    launch.prepare_rank("cpu", cores=16)  # there it does not matter


def test_the_first_rank_starts_the_others_with_its_own_command(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "launch", lambda *call: calls.append(call))
    monkeypatch.setattr(launch.lifeline, "begin", lambda *call: calls.append(call))
    monkeypatch.setattr(launch, "prepare_rank", lambda *call: calls.append(call))
    monkeypatch.setattr(run_experiment, "cpu_cores", lambda: 8)
    argv = ["--gpus", "2", "--device", "cpu"]
    run_experiment._become_rank(1, "cpu", argv)
    assert not calls, "one GPU takes no detour"
    run_experiment._become_rank(2, "cpu", argv)
    command = [sys.executable, run_experiment.__file__, *argv]
    assert calls == [(2, command), (0, 2), ("cpu", 8)]


# ---------------------------------------------------------------- the launcher

# Instead of the program: a worker notes its process and its environment, and lives for a minute.
WORKER = """
import os, sys, time
rank = os.environ["RANK"]
with open(sys.argv[1] + "/" + rank, "w") as file:
    print(os.getpid(), os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], file=file)
if rank == "2":
    {end}
time.sleep(60)
"""


class Launched:
    """A launcher in a fork, with the workers 1 and 2, of which 2 ends in the given way."""

    def __init__(self, folder: Path, end: str):
        self.folder = folder
        self.output = folder / "output"
        command = [sys.executable, "-S", "-c", WORKER.format(end=end), str(folder)]

        def command_of_launcher(_argv):
            launch.launch(3, command)
            time.sleep(60)

        self.pid = os.fork()
        if self.pid == 0:
            run_in_fork(self.output, command_of_launcher)

    def workers(self) -> list[int]:
        """The process numbers of the workers."""
        files = [self.folder / "1", self.folder / "2"]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        notes = [file.read_text().split() for file in files]
        assert [note[1:] for note in notes] == [["3", "1"], ["3", "2"]]
        return [int(note[0]) for note in notes]

    def code(self) -> int:
        """The exit code of the launcher, when it and all its workers are gone."""
        workers = self.workers()
        _, status = os.waitpid(self.pid, 0)
        wait_until(lambda: not any(is_alive(pid) for pid in workers))
        return os.waitstatus_to_exitcode(status)


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, and not yet waited for


@pytest.mark.slow
@pytest.mark.parametrize(
    "end, code, message",
    [
        ("os.kill(os.getpid(), 9)", 137, "rank 2: it was killed by SIGKILL"),
        ("print('rank 2: error: why', flush=True); os._exit(4)", 4, "rank 2: error: why"),
    ],
)
def test_a_worker_that_ends_before_the_run_ends_it(tmp_path, end, code, message):
    launched = Launched(tmp_path, end)
    assert launched.code() == code
    assert launched.output.read_text().startswith(message)
    assert launched.output.read_text().count("\n") == 1


@pytest.mark.parametrize(
    "returncode, code, text",
    [
        (-signal.SIGSEGV, 139, "it was killed by SIGSEGV"),
        (143, 143, "it was stopped by SIGTERM"),
        (77, 77, "it ended with exit code 77 before the run did"),
        (0, 1, "it ended with exit code 0 before the run did"),
        (2, 2, ""),  # it has printed why
    ],
)
def test_what_is_said_of_a_worker_that_said_nothing(returncode, code, text):
    assert launch._failure(2, returncode) == (2, code, text)


@pytest.mark.parametrize("has_left", [True, False])
def test_a_worker_that_has_said_goodbye_may_end(monkeypatch, has_left):
    """Before the launcher does, and with the exit code of a signal."""
    failures = []
    ended = types.SimpleNamespace(poll=lambda: 143, returncode=143)
    monkeypatch.setattr(launch, "_workers", {1: ended})
    monkeypatch.setattr(launch, "REPORT_SECONDS", 0)
    monkeypatch.setattr(launch.lifeline, "has_left", lambda rank: has_left)
    monkeypatch.setattr(launch.lifeline, "peer_failed", failures.append)
    launch._watch_workers()
    assert bool(failures) is not has_left


@pytest.mark.slow
def test_no_worker_outlives_its_launcher(tmp_path):
    launched = Launched(tmp_path, "pass")
    launched.workers()
    os.kill(launched.pid, signal.SIGKILL)
    assert launched.code() == -signal.SIGKILL
