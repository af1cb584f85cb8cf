"""Makes the figures that the README quotes, each from a whole run of the program with every feature on.

    python -m benchmarks.run                    list the names
    python -m benchmarks.run default_run        the default run on a CPU, from an empty cache
    python -m benchmarks.run small_precisions   on a GPU: `small` in fp16 and bf16, two seeds each, on one plot
    python -m benchmarks.run memory_5b          on a GPU: predicted against measured memory of `5b`

Each writes benchmarks/results/NAME_GPU.json: name, gpu, value, unit, repetitions, command, commit, versions, details.
"""
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import memory
from plot import plot_comparison

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def train(folder: Path, *options: str) -> dict:
    """Runs run_experiment.py with the options in `folder` and returns its training_results.json."""
    subprocess.run([sys.executable, str(ROOT / "run_experiment.py"), "--save_dir", str(folder), *options], check=True)
    return json.loads((folder / "training_results.json").read_text())


def write(name: str, value: float, unit: str, repetitions: int, results: dict, details: dict) -> None:
    """One result file; `results` is the training_results.json of (one of) the runs behind it."""
    machine = results["environment"]
    gpu = memory.known_gpu(machine["gpu"]) or machine["gpu"].replace(" ", "_") if machine["gpu"] else "cpu"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = dict(name=name, gpu=machine["gpu"] or f"none, {machine['cpus']} CPU cores", value=value, unit=unit,
                  repetitions=repetitions, command=f"python -m benchmarks.run {name}", commit=commit or "unknown",
                  versions=dict(torch=machine["torch"], python=platform.python_version()), details=details)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}_{gpu}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{name}: {value:.4g} {unit} -> {path}")


def default_run(folder: Path) -> None:
    """The default run as a newcomer has it: no cache, no GPU."""
    r = train(folder / "run", "--device", "cpu", "--cache_dir", str(folder / "cache"))
    totals, entropy = r["totals"], r["data"]["unigram_entropy"]
    (folder / "run" / "training_curves.png").rename(ROOT / "benchmarks" / "default_run.png")
    write("default_run", r["final_metrics"]["val_loss"], "nats per token (final validation loss)", 1, r, dict(
        unigram_entropy=entropy, below_unigram_entropy=entropy - r["final_metrics"]["val_loss"],
        seconds_to_first_step=totals["seconds_to_first_step"], tokens_per_second=totals["tokens_per_second"],
        seconds_in_all=totals["elapsed_seconds"], steps=totals["steps"], tokens=totals["tokens"],
        train_loss=r["final_metrics"]["train_loss"], sample=r["sample"]))


def small_precisions(folder: Path) -> None:
    """`small` for 500 steps on `installed`: do fp16 and bf16 end within the spread of two seeds?"""
    runs, cache = {}, str(folder / "cache")
    for precision in ("fp16", "bf16"):
        for seed in ("1", "2"):
            runs[f"{precision}, seed {seed}"] = train(
                folder / f"{precision}_{seed}", "--preset", "small", "--data", "installed", "--precision", precision, "--seed", seed,
                "--max_steps", "500", "--save_every", "0", "--save_minutes", "0", "--cache_dir", cache)
    final = {label: r["final_metrics"]["val_loss"] for label, r in runs.items()}
    means = {p: statistics.mean(v for label, v in final.items() if label.startswith(p)) for p in ("fp16", "bf16")}
    spread = max(abs(final[f"{p}, seed 1"] - final[f"{p}, seed 2"]) for p in means)
    plot_comparison({label: r["history"] for label, r in runs.items()}, ROOT / "benchmarks" / "small_precisions.png",
                    title="small on the installed packages' text")
    write("small_precisions", means["fp16"] - means["bf16"], "nats per token (fp16 minus bf16, final validation loss)", 2,
          next(iter(runs.values())), dict(
              final_validation_loss=final, spread_of_seeds=spread,
              skipped_steps_after_warmup={label: _skipped_after_warmup(r) for label, r in runs.items()},
              tokens_per_second={label: r["totals"]["tokens_per_second"] for label, r in runs.items()}))


def _skipped_after_warmup(results: dict) -> int:
    warmup = results["config"]["warmup_fraction"] * results["config"]["max_steps"]
    counts = [row["skipped_steps"] for row in results["history"] if "skipped_steps" in row and row["step"] >= warmup]
    return counts[-1] - counts[0]


def memory_5b(folder: Path) -> None:
    """20 steps of `5b`: the largest error of a predicted component of at least 1 GB, and of the total."""
    r = train(folder / "run", "--preset", "5b", "--data", "python", "--max_steps", "20", "--eval_steps", "2", "--log_every", "1",
              "--save_every", "0", "--save_minutes", "0", "--sample_tokens", "0", "--cache_dir", str(folder / "cache"))
    predicted, measured = r["memory_gb"]["predicted"], r["memory_gb"]["measured"]
    errors = {k: abs(predicted[k] - v) / v for k, v in measured.items() if v >= 1}
    write("memory_5b", 100 * max(errors.values()), "% (largest error of a component of at least 1 GB)", 1, r,
          dict(predicted_gb=predicted, measured_gb=measured, errors=errors,
               tokens_per_second=[row["tokens_per_second"] for row in r["history"] if "train_loss" in row]))


BENCHMARKS = dict(default_run=default_run, small_precisions=small_precisions, memory_5b=memory_5b)


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        print(__doc__ if not names else f"error: unknown benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}",
              file=sys.stdout if not names else sys.stderr)
        return 2 if unknown else 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
