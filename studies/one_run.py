"""One run of a study: a run_experiment.py of its own, what a study keeps of it, and its share of
the machine.
"""

import gzip
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from cli import locked
from config import Config, ConfigError, Diverged, ExperimentError, OutOfMemory
from corpus.workers import signal_with_parent
from planner.machine import cpu_cores
from studies.grids import Run

ROOT = Path(__file__).resolve().parent.parent
MOST_METRICS = 12e6  # bytes of metrics that are kept
GRACE = 45  # seconds in which a run that is told to stop must save
CUT_OFF_CODES = (130, 143, -2, -15)  # of SIGINT and SIGTERM, handled by the run or not
STATE = ("weights", "gradients", "master", "momentum", "adamw")  # what a parameter takes
CPU = "cpu"


# ---------------------------------------------------------------- training


def perform(
    run: Run, base: list[str], folder: Path, environment: dict, stop: threading.Event
) -> dict | None:
    """Trains one run in `folder`, continuing what is there, and returns what a study keeps of it.

    None when it was stopped. Raises ExperimentError when it fails.
    """
    _wait_for(folder, stop)
    for command in _commands(run, base, folder):
        code, errors = _start(command, folder, environment, stop)
        if code and (stop.is_set() or code in CUT_OFF_CODES):
            return None
        if code == OutOfMemory.exit_code and run.may_not_fit:
            return dict(failed="out of memory")
        if code == Diverged.exit_code:  # it would diverge again
            return dict(failed="diverged")
        if code:
            raise ExperimentError(_failure_message(run, code, errors))
    result = summary(json.loads((folder / "training_results.json").read_text()))
    if run.analysed:
        result |= json.loads((folder / "experts.json").read_text())
    return result


def _commands(run: Run, base: list[str], folder: Path) -> list[list[str]]:
    """The arguments of Python that train and, where the study wants it, analyse the run."""
    training = [str(ROOT / "run_experiment.py"), *base]
    for name, value in run.changes.items():
        training += [f"--{name}", str(value).lower()]
    training += ["--save_dir", str(folder), "--resume", "latest"]
    if not run.analysed:
        return [training]
    return [training, ["-m", "studies.experts", str(folder)]]


def _start(
    command: list[str], folder: Path, environment: dict, stop: threading.Event
) -> tuple[int, str]:
    """Runs Python with these arguments; returns its exit code and what it wrote to stderr."""
    with open(folder / "log.txt", "a") as log, open(folder / "errors.txt", "w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=errors,
            env=environment,
            # a study that is killed lets its runs save
            preexec_fn=lambda: signal_with_parent(signal.SIGTERM),
        )
        code = _wait(process, stop)
        errors.seek(0)
        return code, errors.read()


def _failure_message(run: Run, code: int, errors: str) -> str:
    message = (
        f"the run '{run.label}' failed:\n{errors.strip()[-2000:]}\n"
        "Fix the cause and give the same command again: what is finished is kept."
    )
    if code == OutOfMemory.exit_code:
        message += " With fewer --jobs each run has more memory."
    return message


def _wait_for(folder: Path, stop: threading.Event) -> None:
    """Waits until a run that a killed study left has saved and ended. Raises ConfigError if it
    does not.
    """
    began = time.monotonic()
    while True:
        try:
            with locked(folder, "--out"):
                (folder / "log.txt").touch()  # an empty folder would be removed again
                return
        except ConfigError:
            if stop.is_set() or time.monotonic() - began > GRACE:
                raise
            time.sleep(0.2)


def _wait(process: subprocess.Popen, stop: threading.Event) -> int:
    """The exit code of the process, which is told to end when `stop` is set, and killed if it
    does not.
    """
    told_at = None
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if told_at is None and stop.is_set():
                told_at = time.monotonic()
                process.terminate()  # it finishes its step and saves
            elif told_at is not None and time.monotonic() - told_at > GRACE:
                process.kill()


def environment_of(gpu: str, processes: int) -> dict:
    """The environment of a run: the one GPU that it sees, and its share of the cores."""
    share = str(max(1, cpu_cores() // processes))
    paths = [path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path]
    own = dict(PYTHONWARNINGS="ignore", PYTHONPATH=os.pathsep.join(paths))
    if gpu == CPU:
        return dict(OMP_NUM_THREADS=share) | os.environ | own
    own["CUDA_VISIBLE_DEVICES"] = gpu
    return dict(TORCHINDUCTOR_COMPILE_THREADS=share) | os.environ | own


def folder_of(study_folder: Path, run: Run) -> Path:
    return study_folder / "runs" / re.sub(r"[^\w.-]+", "_", run.label)


# ---------------------------------------------------------------- what is kept


def summary(results: dict) -> dict:
    """What a study keeps of a training_results.json."""
    config = Config(**results["config"])
    totals = results["totals"]
    rows = [row for row in results["history"] if "train_loss" in row]
    memory = results["memory_gb"]["measured"] or {}
    environment = results["environment"]
    return dict(
        val_loss=results["final_metrics"]["val_loss"],
        tokens=totals["tokens"],
        flops=config.flops_per_token * totals["tokens"],
        tokens_per_second=_median_speed(rows),
        train_seconds=totals["train_seconds"],
        elapsed_seconds=totals["elapsed_seconds"],
        skipped_steps=totals["skipped_steps"],
        total_params=config.total_params,
        active_params=config.active_params,
        **_expert_load(rows),
        state_bytes_per_parameter=_state_bytes(memory, config),
        peak_gb=max(row["memory_peak_gb"] for row in rows),
        memory_gb=memory,
        passes=totals["tokens"] / results["data"]["train_tokens"],
        validation=[
            [row["step"] * config.tokens_per_step, row["val_loss"]]
            for row in results["history"]
            if "val_loss" in row
        ],
        machine={key: environment[key] for key in ("gpu", "cpus", "torch", "python")},
    )


def _median_speed(rows: list[dict]) -> float:
    """tokens/s, without the first quarter of the rows, in which the model is compiled."""
    return statistics.median(row["tokens_per_second"] for row in rows[len(rows) // 4 :])


def _expert_load(rows: list[dict]) -> dict:
    """Evenness of the experts' load over the last tenth of the rows; None in a dense model.

    load_entropy is relative to that of an even load. worst_share is the largest share of any
    expert.
    """
    last_rows = rows[-max(1, len(rows) // 10) :]
    layers = [layer for row in last_rows for layer in row.get("expert_load", [])]
    entropies = [_relative_entropy(layer) for layer in layers if len(layer) > 1]
    return dict(
        load_entropy=statistics.mean(entropies) if entropies else None,
        worst_share=max(map(max, layers)) if layers else None,
    )


def _relative_entropy(shares: list[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def _state_bytes(memory: dict, config: Config) -> float | None:
    """Bytes a parameter of weights, gradients and optimizer state, as measured."""
    if not memory:
        return None
    return sum(memory.get(key, 0) for key in STATE) * 1e9 / config.total_params


def keep_metrics(label: str, folder: Path, kept: Path) -> None:
    """Adds a run's metrics to the gzip file `kept`, each row with the run's name.

    They replace the rows of an earlier run of that name.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return
    rows = []
    if kept.exists():
        own_beginning = json.dumps(dict(run=label))[:-1] + ","
        for row in gzip.decompress(kept.read_bytes()).decode().splitlines():
            if not row.startswith(own_beginning):
                rows.append(row)
    for row in metrics.read_text().splitlines():
        rows.append(json.dumps(dict(run=label) | json.loads(row)))
    # mtime=0: the same rows give the same bytes, and so no difference in git
    packed = gzip.compress("".join(row + "\n" for row in rows).encode(), mtime=0)
    if len(packed) > MOST_METRICS:
        limit = f"{MOST_METRICS / 1e6:g} MB"
        print(f"the metrics of '{label}' are not kept: {kept} would be larger than {limit}")
        return
    temporary = kept.with_suffix(".tmp")
    temporary.write_bytes(packed)
    temporary.replace(kept)
