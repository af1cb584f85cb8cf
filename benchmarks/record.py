"""What every benchmark does: runs the program, and writes what it found to benchmarks/results."""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = Path(os.environ.get("BENCHMARK_CACHE", ROOT / "cache"))        # tokenizers and tokens, kept between benchmarks
SHORT = ("--eval_steps", "1", "--log_every", "1", "--save_every", "0", "--save_minutes", "0", "--sample_tokens", "0",
         "--cache_dir", str(CACHE))


def train(folder: Path, *options: str) -> dict:
    """Runs run_experiment.py with the options in `folder` and returns its training_results.json."""
    subprocess.run([sys.executable, str(ROOT / "run_experiment.py"), "--save_dir", str(folder), *options], check=True)
    return json.loads((folder / "training_results.json").read_text())


def write(name: str, value: float, unit: str, repetitions: int, machine: dict, details: dict, command: str = "") -> None:
    """One result file; `machine` is the `environment` of the training_results.json of (one of) the runs behind it, and
    `command` made it if benchmarks.run did not."""
    gpu = memory.known_gpu(machine["gpu"]) or machine["gpu"].replace(" ", "_") if machine["gpu"] else "cpu"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = dict(name=name, gpu=machine["gpu"] or f"none, {machine['cpus']} CPU cores", value=value, unit=unit,
                  repetitions=repetitions, command=command or f"python -m benchmarks.run {name}", commit=commit or "unknown",
                  versions=dict(torch=machine["torch"], python=platform.python_version()), details=details)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{gpu}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: {value:.4g} {unit} -> {path}", flush=True)
