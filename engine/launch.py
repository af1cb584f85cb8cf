"""Starts the ranks of a run from a plain `python`, and gives each its own GPU.

The environment variables of torchrun are the contract: RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. A process that has them is a rank already, whoever
started it. This file imports no torch: all of it happens before torch is imported.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from config import ConfigError
from engine import lifeline
from engine.processes import STOP_SIGNALS, kill_with_parent

MOST_GPUS = 4096  # a larger number is a slip of the finger
POLL_SECONDS = 0.1
# A rank that fails has said why over its lifeline, before its process ends.
REPORT_SECONDS = 0.5
# At the end of a run, a rank's process takes less.
LEAVE_SECONDS = 30
# Before the lifelines are connected, a rank that ends with one of these has printed why.
EXPLAINED_CODES = (1, 2, 3, 4)

_workers: dict[int, subprocess.Popen] = {}  # by rank; those that this process has started


def is_rank() -> bool:
    """Whether this process was started as one of several ranks."""
    return size() > 1


def rank() -> int:
    if not is_rank():
        return 0
    return int(os.environ.get("RANK", 0))


def size() -> int:
    """Processes of the run. Some schedulers set WORLD_SIZE=1: that is a run of one process."""
    return int(os.environ.get("WORLD_SIZE", 1))


# ---------------------------------------------------------------- how many, and which GPUs


def requested_ranks(gpus: str | None, device: str) -> int:
    """The ranks that the value of --gpus requests, for a run on `device`.

    Raises ConfigError where they cannot be had.
    """
    if is_rank():
        return _ranks_of_environment(gpus)
    if gpus is None:
        return 1
    visible: list[str] = []
    if device != "cpu":
        visible = visible_gpus()
    if gpus == "all":
        if not visible:
            raise ConfigError(
                "--gpus all: no GPU is visible. On a CPU, --gpus N trains with N processes"
            )
        return len(visible)
    ranks = _number(gpus)
    if visible and ranks > len(visible):
        raise ConfigError(
            f"--gpus {ranks}: {_gpus_are(len(visible))} visible. Give at most as many, or use "
            "torchrun for several machines"
        )
    return ranks


def _ranks_of_environment(gpus: str | None) -> int:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment has WORLD_SIZE={size()}, but no {', '.join(missing)}: set what "
            "torchrun sets, or unset WORLD_SIZE"
        )
    if gpus not in (None, "all") and _number(gpus) != size():
        raise ConfigError(
            f"--gpus {gpus} contradicts WORLD_SIZE={size()} of the environment: whoever set "
            "WORLD_SIZE has started the processes already. Leave --gpus out"
        )
    return size()


def _number(gpus: str) -> int:
    if not gpus.isdecimal() or not 1 <= int(gpus) <= MOST_GPUS:
        raise ConfigError(f"--gpus {gpus}: must be `all` or a number from 1 to {MOST_GPUS}")
    return int(gpus)


def _gpus_are(number: int) -> str:
    if number == 1:
        return "1 GPU is"
    return f"{number} GPUs are"


def visible_gpus() -> list[str]:
    """The GPUs that a program would see, each by what CUDA_VISIBLE_DEVICES calls it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return _gpus_of_driver()
    gpus = []
    for name in named.split(","):
        if name.strip() in ("", "-1"):  # CUDA ends its list there
            break
        gpus.append(name.strip())
    return gpus


def _gpus_of_driver() -> list[str]:
    """The numbers of the NVIDIA GPUs of this machine; none where the driver is missing."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]


def prepare_rank(device: str, cores: int) -> None:
    """Gives this rank its GPU and its settings, once, and before torch is imported.

    `cores` are the CPU cores of this machine, which its ranks share.
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    if device != "cpu":
        _isolate_gpu(local_size)
    share = str(max(1, cores // local_size))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", share)
    # torchrun sets 1 where nothing is set, however many cores there are.
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]
    os.environ.setdefault("OMP_NUM_THREADS", share)
    # Multicast of NVLink must not be used on a host that others share: a program that is killed
    # while it uses it may leave the GPUs of all in a bad state.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def _isolate_gpu(local_size: int) -> None:
    """Lets this rank see its own GPU alone, which is then device 0."""
    gpus = visible_gpus()
    if len(gpus) <= 1:  # a scheduler may already show each rank one GPU alone
        return
    local_rank = int(os.environ.get("LOCAL_RANK", rank()))
    if local_rank >= len(gpus):
        raise ConfigError(
            f"{local_size} ranks on this machine, where {len(gpus)} GPUs are visible: start "
            "one rank for each GPU, or train on the CPU with --device cpu"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank]


# ---------------------------------------------------------------- starting the other ranks


def launch(ranks: int, command: list[str]) -> None:
    """Makes this process the first of `ranks` ranks, and starts `command` as each of the others.

    When one of them fails, this process ends with its exit code. When this process ends, the kernel
    kills them.
    """
    os.environ["WORLD_SIZE"] = str(ranks)
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(_free_port())
    gpus = visible_gpus()
    if gpus:  # else every rank would query the driver, which takes a second
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if sys.platform == "linux":
        # gloo would take the address that the host's name stands for, which may be none.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for worker_rank in range(1, ranks):
        own = dict(RANK=str(worker_rank), LOCAL_RANK=str(worker_rank))
        _workers[worker_rank] = subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            # A terminal sends Ctrl-C to all processes of a session: the first rank alone gets it,
            # and all ranks stop at the same step.
            start_new_session=True,
            preexec_fn=kill_with_parent,
        )
    os.environ["RANK"] = "0"
    os.environ["LOCAL_RANK"] = "0"
    threading.Thread(target=_watch_workers, daemon=True).start()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _watch_workers() -> None:
    """Ends the run when a worker has ended without a goodbye."""
    running = dict(_workers)
    while running:
        for worker_rank, worker in list(running.items()):
            if worker.poll() is None:
                continue
            del running[worker_rank]
            time.sleep(REPORT_SECONDS)
            if not lifeline.has_left(worker_rank):
                lifeline.peer_failed(_failure(worker_rank, worker.returncode))
        time.sleep(POLL_SECONDS)


def _failure(worker_rank: int, returncode: int) -> lifeline.Failure:
    """What a rank died of that has not said it over its lifeline."""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        text = f"it was killed by {name}"
        if name == "SIGKILL":
            text += ", as the system does when the host's memory is full"
        return lifeline.Failure(worker_rank, 128 - returncode, text)
    if returncode - 128 in STOP_SIGNALS:
        name = signal.Signals(returncode - 128).name
        return lifeline.Failure(worker_rank, returncode, f"it was stopped by {name}")
    text = ""
    if lifeline.is_connected() or returncode not in EXPLAINED_CODES:
        text = f"it ended with exit code {returncode} before the run did"
    return lifeline.Failure(worker_rank, returncode or 1, text)


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Lets all ranks end together at the good end of the block, also after a signal."""
    stopped = None
    try:
        yield
    except SystemExit as error:  # a signal has stopped the run, and it is saved
        stopped = error
    lifeline.leave()
    _wait_for_workers()
    if stopped is not None:
        raise stopped


def _wait_for_workers() -> None:
    """Lets the other ranks' processes end, which the end of this process would kill."""
    deadline = time.monotonic() + LEAVE_SECONDS
    for worker in _workers.values():
        try:
            worker.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return
