"""Ranks of a run in forks, which start in milliseconds: for tests of how they end together.

Each fork has the environment that torchrun would give it. What all of them print is in one file, as
on a terminal.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cli import exit_code, training
from engine import distributed, launch, lifeline
from record.stop import StopSignal

STEP_SECONDS = 0.02
# The waiting times of the program in tests, where nothing but the ranks runs.
SECONDS = dict(
    GRACE_SECONDS=0.3,
    ECHO_SECONDS=0.8,
    ECHO_SECONDS_OF_FIRST=0.4,
    LAUNCHER_SECONDS=0.2,
    MARGIN_SECONDS=3.0,
    UNCONNECTED_SECONDS=1.0,
)

At = Callable[[int, int], None]  # called with (rank, step) in each step


def steps_of_no_model(at: At, steps: int = 10**6) -> None:
    """What the program does with its ranks, without a model: steps whose sum all ranks share."""
    lifeline.begin(launch.rank(), launch.size())
    print("a line of every rank")
    ranks = distributed.start_ranks(torch.device("cpu"))
    lifeline.join(ranks)
    with training(), launch.ended_together(), StopSignal() as stop:
        for step in range(steps):
            at(ranks.rank, step)
            number = ranks.sum(torch.tensor(stop.number or 0)).item()
            if number:
                print(f"stopped after step {step}")
                raise SystemExit(128 + number)
            time.sleep(STEP_SECONDS)
    print("done")


class Run:
    """`size` ranks in forks, each of which runs the command with `argv`.

    `codes` are their exit codes, minus the signal for a killed one.
    """

    def __init__(self, folder: Path, size: int, command: Callable, argv: list[str] = ()):
        self.output = folder / "output"
        self.output.touch()
        port = str(launch._free_port())
        self.pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                os.environ |= dict(
                    RANK=str(rank),
                    WORLD_SIZE=str(size),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                    GLOO_SOCKET_IFNAME="lo",
                )
                run_in_fork(self.output, command, argv)
            self.pids.append(pid)

    def codes(self, seconds: float = 10) -> list[int]:
        """The exit codes; fails where a rank is still there after so many seconds."""
        deadline = time.monotonic() + seconds
        codes: dict[int, int] = {}
        while len(codes) < len(self.pids) and time.monotonic() < deadline:
            for pid in set(self.pids) - codes.keys():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        for pid in set(self.pids) - codes.keys():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return [codes.get(pid) for pid in self.pids]

    def printed(self) -> str:
        return self.output.read_text()


def run_in_fork(output: Path, command: Callable, argv: list[str] = ()) -> None:
    """Runs a command as the program would, and ends this process. `output` gets what it prints."""
    code = 99
    try:
        os.setsid()
        for name, value in SECONDS.items():
            setattr(lifeline, name, value)
        launch.REPORT_SECONDS = 0.2
        to = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(to, number)
            stream = open(number, "w", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        try:
            code = exit_code(command, list(argv), cleans_up=False)
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    finally:
        os._exit(code)
