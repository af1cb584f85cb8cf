"""What the benchmarks share: they run the program, and each figure becomes a file in results/."""

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
from engine.processes import kill_with_parent
from planner.machine import known_gpu

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Tokenizers and tokens, kept between benchmarks.
CACHE = Path(os.environ.get("BENCHMARK_CACHE", ROOT / "cache"))


def option_words(**fields) -> list[str]:
    """Fields of the configuration as words of a command line: --NAME VALUE for each."""
    words = []
    for name, value in fields.items():
        words += [f"--{name}", str(value)]
    return words


# Options for runs of a few steps: every step is measured, and no checkpoint is saved.
SHORT = option_words(
    eval_steps=1,
    log_every=1,
    save_every=0,
    save_minutes=0,
    sample_tokens=0,
    cache_dir=CACHE,
)

# The options that benchmarks.run was given. They go to every run, after its own options, and so
# they win over these.
EXTRA_OPTIONS: list[str] = []
# --gpus and its number, where benchmarks.run was given that
GPUS_OPTION: list[str] = []


# The runs of this process that are under way
RUNNING: list[subprocess.Popen] = []


# ---------------------------------------------------------------- runs


def train_command(folder: Path, options: list[str]) -> list[str]:
    """The command line of a training run that writes into `folder`."""
    script = str(ROOT / "run_experiment.py")
    return [sys.executable, script, "--save_dir", str(folder), *options, *EXTRA_OPTIONS]


def train(folder: Path, options: list[str], gpu: int | None = None, **variables: str) -> dict:
    """Trains in a new process and returns its training_results.json.

    The run sees only the GPU of number `gpu`; with None it sees those that this process sees.
    `variables` are added to its environment. Raises ExperimentError when the run fails.
    """
    environment = {**os.environ, **variables}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    command = train_command(folder, options)
    if _exit_code_of(command, environment) != 0:
        raise ExperimentError(f"this run failed: {shlex.join(command)}")
    return json.loads((folder / "training_results.json").read_text())


def _exit_code_of(command: list[str], environment: dict[str, str]) -> int:
    """Runs the command, and kills it when an exception ends the wait or this process ends."""
    process = subprocess.Popen(command, env=environment, preexec_fn=kill_with_parent)
    RUNNING.append(process)
    try:
        return process.wait()
    finally:
        process.kill()  # does nothing when it has ended
        process.wait()
        RUNNING.remove(process)


def train_side_by_side(runs: dict[str, list[str]], folder: Path) -> dict[str, dict]:
    """Trains all runs at the same time, and returns the training_results.json of each.

    `runs` are the options of each run by its label. The runs are spread over the GPUs, several on
    each. Each run has the losses that it would have alone, but it is slower.
    """
    running = {}
    with ThreadPoolExecutor(len(runs)) as pool:
        for number, (label, options) in enumerate(runs.items()):
            run_folder = folder / label.replace(" ", "_")
            gpu = number % torch.cuda.device_count()
            running[label] = pool.submit(train, run_folder, options, gpu)
        try:
            return {label: run.result() for label, run in running.items()}
        except BaseException:  # Ctrl-C too: the pool would wait for the other runs
            for process in list(RUNNING):
                process.kill()
            raise


# ---------------------------------------------------------------- result files


def write(
    name: str,
    value: float,
    unit: str,
    repetitions: int,
    machine: dict,
    details: dict,
    command: str = "",
    gpus: int = 1,
) -> None:
    """Writes results/NAME_GPU.json; of several `gpus` results/NAME_GPUxN.json.

    `machine` is what record.results.environment says of the machine; a training_results.json holds
    it as `environment`. `command` is the command that made the figure, if it is not benchmarks.run.
    """
    if not command:
        words = ["python -m benchmarks.run", name, *EXTRA_OPTIONS]
        if gpus > 1:
            words[2:2] = GPUS_OPTION
        command = " ".join(words)
    gpu = machine["gpu"] or f"none, {machine['cpus']} CPU cores"
    key = _gpu_key(machine["gpu"])
    if gpus > 1:
        gpu = f"{gpus} x {gpu}"
        key += f"x{gpus}"
    record = dict(
        name=name,
        gpu=gpu,
        value=value,
        unit=unit,
        repetitions=repetitions,
        command=command,
        commit=_commit(),
        versions=dict(torch=machine["torch"], python=platform.python_version()),
        details=details,
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{key}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: {value:.4g} {unit} -> {path}", flush=True)


def _gpu_key(driver_name: str | None) -> str:
    """The name of a GPU in file names, such as h100; "cpu" if the driver names no GPU.

    A GPU that the planner does not know keeps the driver's name.
    """
    if not driver_name:
        return "cpu"
    return known_gpu(driver_name) or driver_name.replace(" ", "_")


def _commit() -> str:
    """The commit of this tree by `git describe`, or "unknown"."""
    # A copy of the tree without its history learns the commit from the environment.
    given = os.environ.get("BENCHMARK_COMMIT")
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"
