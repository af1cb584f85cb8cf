"""One run of a study: starts a process of run_experiment.py, and keeps its results and metrics.

It also says which GPU and how many CPU threads the process gets.
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

from cli import FolderInUse, locked
from config import Config, Diverged, ExperimentError, OutOfMemory
from engine.processes import STOP_SIGNALS, signal_with_parent
from planner.machine import cpu_cores
from studies.grids import Run

ROOT = Path(__file__).resolve().parent.parent
MOST_METRICS = 12e6  # bytes that metrics.jsonl.gz of a study may have
GRACE = 45  # seconds that a run has to save its checkpoint after SIGTERM
# Exit codes after a signal: where the run handled it, and where it did not
CUT_OFF_CODES = [128 + number for number in STOP_SIGNALS] + [-number for number in STOP_SIGNALS]
# Rows of the memory table that grow with the parameters
STATE = ("weights", "gradients", "master", "momentum", "adamw")
CPU = "cpu"  # stands in place of a GPU's name


# ---------------------------------------------------------------- training


def perform(
    run: Run, base: list[str], folder: Path, environment: dict, stop: threading.Event
) -> dict | None:
    """Trains one run in `folder`, from its latest checkpoint there if any.

    Returns what a study keeps of the run, or None if `stop` was set before its end. `base` are the
    command-line options of the study. Raises ExperimentError when the run fails.
    """
    _wait_for(folder, stop)
    for command in _commands(run, base, folder):
        code, errors = _start(command, folder, environment, stop)
        if code and (stop.is_set() or code in CUT_OFF_CODES):
            return None
        if code == OutOfMemory.exit_code and run.may_not_fit:
            return dict(failed="out of memory")
        if code == Diverged.exit_code:  # a result: it would diverge again
            return dict(failed="diverged")
        if code:
            raise ExperimentError(_failure_message(run, code, errors))
    result = summary(json.loads((folder / "training_results.json").read_text()))
    if run.analysed:
        result |= json.loads((folder / "experts.json").read_text())
    return result


def _commands(run: Run, base: list[str], folder: Path) -> list[list[str]]:
    """Arguments of Python: the command that trains and, for `analysed` runs, the analysis."""
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
    """Runs Python with these arguments. Returns its exit code and what it wrote to stderr."""
    with open(folder / "log.txt", "a") as log, open(folder / "errors.txt", "w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=log,
            stderr=errors,
            env=environment,
            # When the study is killed, the kernel sends SIGTERM to its runs, and they save.
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
    """Waits until no other process trains in the folder.

    A run that a killed study left behind needs some seconds to save and end. Raises FolderInUse
    if it has not ended after GRACE seconds.
    """
    began = time.monotonic()
    while True:
        try:
            with locked(folder, "--out"):
                # `locked` removes a folder that it made, unless something is in it.
                (folder / "log.txt").touch()
                return
        except FolderInUse:
            waited = time.monotonic() - began
            if stop.is_set() or waited > GRACE:
                raise
            time.sleep(0.2)


def _wait(process: subprocess.Popen, stop: threading.Event) -> int:
    """Waits for the process and returns its exit code.

    When `stop` is set the process gets SIGTERM, and SIGKILL if it has not ended GRACE seconds
    later.
    """
    terminated_at = None
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if terminated_at is None:
                if stop.is_set():
                    process.terminate()  # it finishes its step and saves
                    terminated_at = time.monotonic()
            elif time.monotonic() - terminated_at > GRACE:
                process.kill()


def environment_of(gpu: str, processes: int) -> dict:
    """The environment variables of a run: the GPU that it sees, and its share of the cores.

    `processes` runs share the machine. Where the user has set a number of threads, it stays.
    """
    threads = str(max(1, cpu_cores() // processes))
    python_path = str(ROOT)
    if os.environ.get("PYTHONPATH"):
        python_path += os.pathsep + os.environ["PYTHONPATH"]
    own = dict(PYTHONWARNINGS="ignore", PYTHONPATH=python_path)
    if gpu == CPU:
        return dict(OMP_NUM_THREADS=threads) | os.environ | own
    own["CUDA_VISIBLE_DEVICES"] = gpu
    return dict(TORCHINDUCTOR_COMPILE_THREADS=threads) | os.environ | own


def folder_of(study_folder: Path, run: Run) -> Path:
    return study_folder / "runs" / re.sub(r"[^\w.-]+", "_", run.label)


# ---------------------------------------------------------------- what is kept


def summary(results: dict) -> dict:
    """What a study keeps of a run's training_results.json.

    Losses are in nats per token, memory is in GB of 1e9 bytes. `validation` has [tokens, loss] of
    each validation; `passes` is how often the run saw each training token.
    """
    config = Config(**results["config"])
    totals = results["totals"]
    rows = [row for row in results["history"] if "train_loss" in row]
    validation = []
    for row in results["history"]:
        if "val_loss" in row:
            validation.append([row["step"] * config.tokens_per_step, row["val_loss"]])
    memory = results["memory_gb"]["measured"] or {}  # not measured in the first steps of a run
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
        validation=validation,
        machine={key: environment[key] for key in ("gpu", "cpus", "torch", "python")},
    )


def _median_speed(rows: list[dict]) -> float:
    """The median of tokens/s, without the first quarter of the rows: the model is compiled then."""
    timed_rows = rows[len(rows) // 4 :]
    return statistics.median(row["tokens_per_second"] for row in timed_rows)


def _expert_load(rows: list[dict]) -> dict:
    """How even the experts' load is over the last tenth of the rows; None in a dense model.

    `load_entropy` is the mean over layers of the entropy of the load, over that of an even load: 1
    is even. `worst_share` is the largest share of routed tokens of any expert in any layer.
    """
    last_rows = rows[-max(1, len(rows) // 10) :]
    loads = []  # shares of the experts, for each row and layer
    for row in last_rows:
        loads += row.get("expert_load", [])
    if not loads:
        return dict(load_entropy=None, worst_share=None)
    entropies = [_relative_entropy(load) for load in loads if len(load) > 1]
    load_entropy = None  # a single expert has no entropy to compare with
    if entropies:
        load_entropy = statistics.mean(entropies)
    return dict(load_entropy=load_entropy, worst_share=max(max(load) for load in loads))


def _relative_entropy(shares: list[float]) -> float:
    """The entropy of the shares over that of equal shares, from 0 to 1."""
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    return entropy / math.log(len(shares))


def _state_bytes(memory: dict, config: Config) -> float | None:
    """Measured bytes per parameter of weights, gradients and optimizer state."""
    if not memory:
        return None
    gb = sum(memory.get(key, 0) for key in STATE)
    return gb * 1e9 / config.total_params


def keep_metrics(label: str, folder: Path, kept: Path) -> None:
    """Adds a run's metrics.jsonl to the gzip file `kept`. Each row gets the run's label.

    Rows that an earlier run of that label left there are removed.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return
    rows = []
    if kept.exists():
        # How a row of this run begins: {"run": "LABEL",
        own_beginning = json.dumps(dict(run=label)).removesuffix("}") + ","
        for row in gzip.decompress(kept.read_bytes()).decode().splitlines():
            if not row.startswith(own_beginning):
                rows.append(row)
    for row in metrics.read_text().splitlines():
        rows.append(json.dumps(dict(run=label) | json.loads(row)))
    text = "".join(row + "\n" for row in rows)
    # mtime=0: the same rows give the same bytes, and so no difference in git.
    packed = gzip.compress(text.encode(), mtime=0)
    if len(packed) > MOST_METRICS:
        limit = f"{MOST_METRICS / 1e6:g} MB"
        print(f"the metrics of '{label}' are not kept: {kept} would be larger than {limit}")
        return
    temporary = kept.with_suffix(".tmp")
    temporary.write_bytes(packed)
    temporary.replace(kept)
