"""Measures what waiting costs a run on a CPU: alone, and beside busy programs.

    python -m benchmarks.busy_cpu

OpenMP's threads wait for each other many times in a step. A waiting thread spins for a number of
turns (GOMP_SPINCOUNT), then sleeps. Spinning is the faster way to wait on an idle machine. On a
busy one the spinning thread keeps the core from the thread that it waits for. run_experiment.py
sets CHOSEN turns.

Each spin count gets a run of the preset `tiny`. The run's speed is measured alone, beside one busy
process for each core, and beside BUSY_PER_CORE. Writes benchmarks/results/busy_cpu_cpu.json.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

import torch

from benchmarks.result_files import ROOT, SHORT, option_words, train_command, write
from cli import exit_code
from config import PRESETS
from engine.processes import kill_with_parent
from planner.machine import cpu_cores
from record.results import METRICS, environment

PASSIVE = 0  # what OMP_WAIT_POLICY=passive means
CHOSEN = 10_000  # what run_experiment.py sets
LIBGOMP_DEFAULT = 300_000
SPIN_COUNTS = (PASSIVE, 1000, CHOSEN, LIBGOMP_DEFAULT)
ROUNDS = 3
BUSY_PER_CORE = 9
SECONDS_ALONE = 6
SECONDS_SHARED = 8
SECONDS_BUSY = 15
SECONDS_TO_START = 120
TOKENS_PER_STEP = PRESETS["tiny"]["max_seq_len"]  # of one sequence a step


def measure(spin_count: int, folder: Path) -> tuple[float, float, float]:
    """tokens/s of a run with this spin count: alone, beside one busy process for each core, and
    beside BUSY_PER_CORE.
    """
    options = option_words(
        preset="tiny",
        device="cpu",
        batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=10**6,
        eval_every=10**6,
    )
    variables = {**os.environ, "GOMP_SPINCOUNT": str(spin_count)}
    run = subprocess.Popen(
        train_command(folder, [*options, *SHORT]),
        env=variables,
        stdout=subprocess.DEVNULL,
        preexec_fn=kill_with_parent,
    )
    metrics = folder / METRICS
    try:
        _wait_for_training(metrics)
        alone = _speed(metrics, SECONDS_ALONE)
        with _busy_processes(cpu_cores()):
            shared = _speed(metrics, SECONDS_SHARED)
        with _busy_processes(BUSY_PER_CORE * cpu_cores()):
            busy = _speed(metrics, SECONDS_BUSY)
    finally:
        run.kill()
        run.wait()
    return alone, shared, busy


def _wait_for_training(metrics: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not metrics.exists() or _steps_done(metrics) == 0:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no training step within {SECONDS_TO_START} s")
        time.sleep(0.2)


def _steps_done(metrics: Path) -> int:
    """The last step that the run has written down; 0 before the first."""
    step = 0
    for line in metrics.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # the last line may be half written
            step = json.loads(line)["step"]
    return step


def _speed(metrics: Path, seconds: float) -> float:
    """tokens/s over the next `seconds`."""
    steps_before = _steps_done(metrics)
    start = time.perf_counter()
    time.sleep(seconds)
    tokens = TOKENS_PER_STEP * (_steps_done(metrics) - steps_before)
    return tokens / (time.perf_counter() - start)


@contextlib.contextmanager
def _busy_processes(count: int) -> Iterator[None]:
    """`count` processes that compute without end."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = []
    for _ in range(count):
        processes.append(subprocess.Popen(command, preexec_fn=kill_with_parent))
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def main(_argv: list[str]) -> None:
    alone: dict[int, list[float]] = {spin_count: [] for spin_count in SPIN_COUNTS}
    shared: dict[int, list[float]] = {spin_count: [] for spin_count in SPIN_COUNTS}
    busy: dict[int, list[float]] = {spin_count: [] for spin_count in SPIN_COUNTS}
    for round_number in range(ROUNDS):
        for spin_count in SPIN_COUNTS:
            with tempfile.TemporaryDirectory(dir=ROOT) as folder:
                speeds = measure(spin_count, Path(folder) / "run")
            alone[spin_count].append(speeds[0])
            shared[spin_count].append(speeds[1])
            busy[spin_count].append(speeds[2])
            print(
                f"round {round_number + 1} of {ROUNDS}, spin count {spin_count}: "
                f"{speeds[0]:,.0f} tokens/s alone, {speeds[1]:,.0f} beside {cpu_cores()} busy "
                f"processes, {speeds[2]:,.0f} beside {BUSY_PER_CORE * cpu_cores()}",
                flush=True,
            )
    write(
        "busy_cpu",
        value=statistics.median(busy[CHOSEN]),
        unit=f"tokens/s with GOMP_SPINCOUNT={CHOSEN}, beside busy processes",
        repetitions=ROUNDS,
        machine=environment(torch.device("cpu")),
        details=dict(
            busy_processes=BUSY_PER_CORE * cpu_cores(),
            cores=cpu_cores(),
            tokens_per_second_alone=alone,
            tokens_per_second_shared=shared,
            tokens_per_second_busy=busy,
        ),
        command="python -m benchmarks.busy_cpu",
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
