"""What every benchmark does: runs the program, and writes what it found to benchmarks/results."""

import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from config import ExperimentError
from planner.machine import known_gpu

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = Path(
    os.environ.get("BENCHMARK_CACHE", ROOT / "cache")
)  # tokenizers and tokens, kept between benchmarks
SHORT = (
    "--eval_steps",
    "1",
    "--log_every",
    "1",
    "--save_every",
    "0",
    "--save_minutes",
    "0",
    "--sample_tokens",
    "0",
    "--cache_dir",
    str(CACHE),
)


FOR_ALL: list[str] = []  # options that benchmarks.run was given for every run


def train(folder: Path, *options: str, gpu: int | None = None) -> dict:
    """Runs run_experiment.py with the options in `folder`, on the first GPU or this one; returns its training_results.json."""
    environment = (
        dict(os.environ) if gpu is None else dict(os.environ, CUDA_VISIBLE_DEVICES=str(gpu))
    )
    command = [
        sys.executable,
        str(ROOT / "run_experiment.py"),
        "--save_dir",
        str(folder),
        *options,
        *FOR_ALL,
    ]
    if subprocess.run(command, env=environment).returncode:
        raise ExperimentError(f"this run failed: {shlex.join(command)}")
    return json.loads((folder / "training_results.json").read_text())


def train_side_by_side(runs: dict[str, list[str]], folder: Path) -> dict[str, dict]:
    """{name: options} to {name: its training_results.json}: all at once, in turn over the GPUs, several on each. Their losses
    are what they would be alone, their speeds are not."""
    with ThreadPoolExecutor(len(runs)) as pool:
        running = {
            name: pool.submit(
                train, folder / name.replace(" ", "_"), *options, gpu=i % torch.cuda.device_count()
            )
            for i, (name, options) in enumerate(runs.items())
        }
        return {name: run.result() for name, run in running.items()}


def write(
    name: str,
    value: float,
    unit: str,
    repetitions: int,
    machine: dict,
    details: dict,
    command: str = "",
) -> None:
    """One result file; `machine` is the `environment` of the training_results.json of (one of) the runs behind it, and
    `command` made it if benchmarks.run did not."""
    gpu = known_gpu(machine["gpu"]) or machine["gpu"].replace(" ", "_") if machine["gpu"] else "cpu"
    # a copy of the tree without its history is told the commit
    commit = (
        os.environ.get("BENCHMARK_COMMIT")
        or subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    )
    record = dict(
        name=name,
        gpu=machine["gpu"] or f"none, {machine['cpus']} CPU cores",
        value=value,
        unit=unit,
        repetitions=repetitions,
        command=command or " ".join(["python -m benchmarks.run", name, *FOR_ALL]),
        commit=commit or "unknown",
        versions=dict(torch=machine["torch"], python=platform.python_version()),
        details=details,
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{gpu}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: {value:.4g} {unit} -> {path}", flush=True)
