"""Answers a research question with a grid of training runs, on any machine; a study that was cut off goes on where it was.

    python -m studies.run                                       list the studies
    python -m studies.run balance                               with `small`, on a GPU
    python -m studies.run balance --preset tiny --tokens 2e5    the machinery, in minutes on a CPU
    python -m studies.run balance --minutes 20                  stop after 20 minutes; the same command goes on

Writes studies/NAME/results.json after each run, with the runs' metrics compressed beside it, and studies/NAME/figure.png.
Any option of run_experiment.py holds for all runs. The trainer is used as it is: a run is a run_experiment.py of its own.
"""
import gzip
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import data
from config import Config, ConfigError, ExperimentError, nearest, resolve
from run_experiment import add_config_options, config_options, new_parser
from studies.figures import draw
from studies.grids import STUDIES, Run

ROOT = Path(__file__).resolve().parent.parent
MOST_PASSES = 4     # over the corpus; more is worth much less than new text (Muennighoff et al. 2023)
KEPT_METRICS_MB = 1
PERFORMED, CUT_OFF = "performed", "cut off"


def perform(run: Run, base: list[str], folder: Path, seconds_left: float) -> tuple[str, dict]:
    """Trains one run in `folder`, going on with what is there: (CUT_OFF, {}) when the time ends, else (PERFORMED, result)."""
    options = [word for name, value in run.changes.items() for word in (f"--{name}", str(value).lower())]
    command = [sys.executable, str(ROOT / "run_experiment.py"), *base, *options, "--save_dir", str(folder), "--resume", "latest"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONWARNINGS="ignore"))
    try:
        _, errors = process.communicate(timeout=None if math.isinf(seconds_left) else max(1.0, seconds_left))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGTERM)     # it finishes its step and saves
        process.communicate()
        return CUT_OFF, {}
    if process.returncode == 128 + signal.SIGTERM or process.returncode == 128 + signal.SIGINT:
        return CUT_OFF, {}
    if process.returncode and "out of memory" in errors:
        return PERFORMED, dict(failed="out of memory")
    if process.returncode:
        raise ExperimentError(f"the run '{run.label}' failed:\n{errors.strip()}\nMend it and give the same command again: what is "
                              "finished is kept.")
    return PERFORMED, summary(json.loads((folder / "training_results.json").read_text()))


def summary(r: dict) -> dict:
    """What a study keeps of a training_results.json."""
    config, rows = Config(**r["config"]), [row for row in r["history"] if "train_loss" in row]
    late = [layer for row in rows[-max(1, len(rows) // 10):] for layer in row.get("expert_load", [])]
    entropy = [-sum(p * math.log(p) for p in layer if p > 0) / math.log(len(layer)) for layer in late if len(layer) > 1]
    memory = r["memory_gb"]["measured"] or {}
    speeds = [row["tokens_per_second"] for row in rows[1:]] or [row["tokens_per_second"] for row in rows]
    return dict(val_loss=r["final_metrics"]["val_loss"], tokens=r["totals"]["tokens"], flops=config.flops_per_token * r["totals"]["tokens"],
                train_seconds=r["totals"]["train_seconds"], tokens_per_second=statistics.median(speeds),
                total_params=config.total_params, active_params=config.active_params, skipped_steps=r["totals"]["skipped_steps"],
                load_entropy=statistics.mean(entropy) if entropy else None, worst_share=max(map(max, late)) if late else None,
                state_bytes_per_parameter=sum(memory.get(k, 0) for k in ("weights", "gradients", "master", "momentum", "adamw"))
                * 1e9 / config.total_params, memory_gb=memory, passes=r["totals"]["tokens"] / r["data"]["train_tokens"],
                validation=[[row["step"] * config.tokens_per_step, row["val_loss"]] for row in r["history"] if "val_loss" in row],
                unigram_entropy=r["data"]["unigram_entropy"], machine=r["environment"])


def study(name: str, base: Config, options: list[str], tokens: float, seeds: list[int], folder: Path, minutes: float) -> bool:
    """Performs what the study still wants, and draws; False when the time ended first."""
    deadline, path = time.monotonic() + 60 * minutes, folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else dict(study=name, tokens=tokens, options=options, runs={})
    if (results["tokens"], results["options"]) != (tokens, options):
        raise ConfigError(f"{path} is of another study: --tokens {results['tokens']:g} and {' '.join(results['options'])}. Give the "
                          "same, or another --out")
    found = results["runs"]
    while True:
        wanted = [run for run in STUDIES[name](base, tokens, seeds, found)]
        missing = [run for run in wanted if run.label not in found]
        if not missing:
            draw(results, folder / "figure.png")
            return True
        run, place = missing[0], folder / "runs" / re.sub(r"[^\w.-]+", "_", missing[0].label)
        if time.monotonic() >= deadline:
            return False
        print(f"[{len(wanted) - len(missing) + 1} of {len(wanted)}] {run.label}", flush=True)
        state, result = perform(run, options, place, deadline - time.monotonic())
        if state == CUT_OFF:
            return False
        found[run.label] = dict(group=run.group, changes=run.changes, **result)
        keep_metrics(place, folder / "metrics" / f"{place.name}.jsonl.gz")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(path)
        shutil.rmtree(place, ignore_errors=True)        # its checkpoint; what it found is kept


def keep_metrics(place: Path, kept: Path) -> None:
    metrics = place / "metrics.jsonl"
    if metrics.exists() and (packed := gzip.compress(metrics.read_bytes(), mtime=0)) and len(packed) < KEPT_METRICS_MB * 1e6:
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(packed)


def main(argv: list[str]) -> int:
    if not argv:
        print(__doc__ + "\n" + "\n".join(f"{name:14s} {' '.join(function.__doc__.split())}" for name, function in STUDIES.items()))
        return 0
    parser = new_parser("python -m studies.run NAME [--preset P] [--tokens N] [--seeds N] [--minutes M] [--out DIR] [--FIELD VALUE ...]")
    parser.add_argument("name", help=" ".join(STUDIES))
    parser.add_argument("--preset", default="small", help="the base configuration [small]")
    parser.add_argument("--tokens", type=float, default=20e6, help="tokens of a run [2e7]")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each configuration that is compared by its loss [2]")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; the same command goes on")
    parser.add_argument("--out", type=Path, help="folder of the study [studies/NAME]")
    add_config_options(parser)
    try:
        args = parser.parse(argv)
        if args.name not in STUDIES:
            raise ConfigError(f"unknown study {args.name!r}.{nearest(args.name, STUDIES)} Studies: {', '.join(STUDIES)}")
        if not (args.tokens >= 1 and args.seeds >= 1 and args.minutes > 0):
            raise ConfigError("--tokens, --seeds and --minutes must be positive")
        given = config_options(args)
        base, _, _ = resolve(given, args.preset, None)
        corpus = data.prepare(base)
        if args.tokens > MOST_PASSES * len(corpus.train):
            raise ConfigError(f"--tokens {args.tokens:g} is more than {MOST_PASSES} passes over the corpus of {len(corpus.train):,} "
                              "tokens: give fewer, or more --data")
        options = ["--preset", args.preset, *[word for name, value in given.items() for word in (f"--{name}", str(value).lower()
                   if isinstance(value, bool) else str(value))], "--sample_tokens", "0", "--save_every", "0", "--save_minutes", "5",
                   "--eval_every", str(max(1, round(args.tokens / base.tokens_per_step / 20)))]
        folder = args.out or ROOT / "studies" / args.name
        folder.mkdir(parents=True, exist_ok=True)
        done = study(args.name, base, options, args.tokens, list(range(1, args.seeds + 1)), folder, args.minutes)
        print(f"{folder / 'results.json'}, {folder / 'figure.png'}" if done else "The time is over; the same command goes on.")
        return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
