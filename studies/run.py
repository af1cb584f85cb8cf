"""Answers a research question with a grid of training runs, on any machine; a study that was cut off goes on where it was.

    python -m studies.run                                       list the studies
    python -m studies.run balance                               with `small`, on all visible GPUs, a run on each
    python -m studies.run balance --jobs 2                      two runs on each GPU at a time
    python -m studies.run balance --preset tiny --tokens 2e5    the machinery, on a CPU too, in studies/balance-tiny
    python -m studies.run balance --minutes 8                   stop after 8 minutes; the same command goes on

With `small` (65,536 tokens a step, --batch_size 64 --gradient_accumulation_steps 1 --precision bf16):

    optimizer        55 runs or so of 16M tokens or less
    routing          22 runs of 16M tokens or so
    balance          20 runs of 16M tokens
    specialization    2 runs of 50M tokens, and analyses
    scaling          40 runs of 16M tokens or more
    checkpointing    42 runs or so of 5 to 64 steps

What a study took is in its results, as `budget`, and in the README. Two GPUs take half as long, but not where a speed is measured, all
of checkpointing: such a run has the machine for itself. Each run of `small` needs 32 GB: on 80 GB give --jobs 2. Any option of
run_experiment.py that the study does not set holds for all runs. The trainer is used as it is: a run is a run_experiment.py of its
own, and its output is in studies/NAME/runs until it has finished.

What is kept is small: studies/NAME/results.json, written anew after each run, metrics.jsonl.gz, the metrics of all runs, and
figure.png. With results.json a study goes on on another machine; only runs that were cut off begin again there, as their
checkpoints are in studies/NAME/runs. `python -m studies.report` puts what was found into the README.
"""

import concurrent.futures
import contextlib
import dataclasses
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
import threading
import time
import traceback
from pathlib import Path

import data
from cli import add_config_options, config_options, exit_code, locked, new_parser
from config import Config, ConfigError, Diverged, ExperimentError, OutOfMemory, nearest, resolve
from corpus.workers import signal_with_parent
from planner.machine import cpu_cores
from record.results import git_state
from studies.figures import draw
from studies.grids import STUDIES, TOKENS, Run

ROOT = Path(__file__).resolve().parent.parent
MOST_PASSES = 4  # over the corpus; more is worth much less than new text (Muennighoff et al. 2023)
MOST_METRICS = 12e6  # bytes of metrics that are kept
VALIDATIONS = 10  # of a run, which waits for them
GRACE = 45  # seconds in which a run that is told to stop saves
LAST_START = 75  # seconds before the end of the time after which no run begins, as it would be stopped while it compiles
CUT_OFF_CODES = (130, 143, -2, -15)  # of SIGINT and SIGTERM, handled or not
CPU = "cpu"


# ---------------------------------------------------------------- one run


def perform(
    run: Run, base: list[str], folder: Path, environment: dict, stop: threading.Event
) -> dict | None:
    """Trains one run in `folder`, going on with what is there, and returns what a study keeps of it; None when it was stopped.
    Raises ExperimentError when it fails."""
    options = [
        word for name, value in run.changes.items() for word in (f"--{name}", str(value).lower())
    ]
    commands = [
        [
            str(ROOT / "run_experiment.py"),
            *base,
            *options,
            "--save_dir",
            str(folder),
            "--resume",
            "latest",
        ]
    ]
    if run.analysed:
        commands.append(["-m", "studies.experts", str(folder)])
    _wait_for(folder, stop)
    for command in commands:
        with open(folder / "log.txt", "a") as log, open(folder / "errors.txt", "w+") as errors:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=errors,
                env=environment,
                preexec_fn=lambda: signal_with_parent(signal.SIGTERM),
            )  # it saves when the study is killed
            code = _wait(process, stop)
            errors.seek(0)
            words = errors.read()
        if code and (stop.is_set() or code in CUT_OFF_CODES):
            return None
        if code == OutOfMemory.exit_code and run.may_not_fit:
            return dict(failed="out of memory")
        if code == Diverged.exit_code:  # it would again
            return dict(failed="diverged")
        if code:
            raise ExperimentError(
                f"the run '{run.label}' failed:\n{words.strip()[-2000:]}\nMend it and give the same command again: what is "
                "finished is kept."
                + (
                    " With fewer --jobs each has more memory."
                    if code == OutOfMemory.exit_code
                    else ""
                )
            )
    result = summary(json.loads((folder / "training_results.json").read_text()))
    return result | (json.loads((folder / "experts.json").read_text()) if run.analysed else {})


def _wait_for(folder: Path, stop: threading.Event) -> None:
    """Until a run that a killed study left has saved and ended. Raises ConfigError when it goes on."""
    began = time.monotonic()
    while True:
        try:
            with locked(folder, "--out"):
                (folder / "log.txt").touch()  # else the folder would be removed again
                return
        except ConfigError:
            if stop.is_set() or time.monotonic() - began > GRACE:
                raise
            time.sleep(0.2)


def _wait(process: subprocess.Popen, stop: threading.Event) -> int:
    """The process's exit code; it is asked to end when `stop` is set, and made to when it does not."""
    asked = None
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if asked is None and stop.is_set():
                asked = time.monotonic()
                process.terminate()  # it finishes its step and saves
            elif asked is not None and time.monotonic() - asked > GRACE:
                process.kill()


def summary(r: dict) -> dict:
    """What a study keeps of a training_results.json."""
    config, totals, rows = (
        Config(**r["config"]),
        r["totals"],
        [row for row in r["history"] if "train_loss" in row],
    )
    late = [
        layer for row in rows[-max(1, len(rows) // 10) :] for layer in row.get("expert_load", [])
    ]
    entropy = [
        -sum(p * math.log(p) for p in layer if p > 0) / math.log(len(layer))
        for layer in late
        if len(layer) > 1
    ]
    memory = r["memory_gb"]["measured"] or {}
    rates = [row["tokens_per_second"] for row in rows[len(rows) // 4 :]]  # the first ones compile
    state = (
        sum(memory.get(k, 0) for k in ("weights", "gradients", "master", "momentum", "adamw")) * 1e9
    )
    return dict(
        val_loss=r["final_metrics"]["val_loss"],
        tokens=totals["tokens"],
        flops=config.flops_per_token * totals["tokens"],
        tokens_per_second=statistics.median(rates),
        train_seconds=totals["train_seconds"],
        elapsed_seconds=totals["elapsed_seconds"],
        skipped_steps=totals["skipped_steps"],
        total_params=config.total_params,
        active_params=config.active_params,
        load_entropy=statistics.mean(entropy) if entropy else None,
        worst_share=max(map(max, late)) if late else None,
        state_bytes_per_parameter=state / config.total_params if memory else None,
        peak_gb=max(row["memory_peak_gb"] for row in rows),
        memory_gb=memory,
        passes=totals["tokens"] / r["data"]["train_tokens"],
        validation=[
            [row["step"] * config.tokens_per_step, row["val_loss"]]
            for row in r["history"]
            if "val_loss" in row
        ],
        machine={k: r["environment"][k] for k in ("gpu", "cpus", "torch", "python")},
    )


# ---------------------------------------------------------------- the study


def study(
    name: str,
    base: Config,
    options: list[str],
    tokens: float,
    seeds: list[int],
    folder: Path,
    corpus: dict,
    seconds: float = math.inf,
    gpus: tuple[str, ...] = (CPU,),
    jobs: int = 1,
) -> bool:
    """Performs what the study still wants, `jobs` runs at a time on each of the GPUs, and draws what there is; False when it was
    stopped before the end. What `asked` holds must be the same each time."""
    path, figure = folder / "results.json", folder / "figure.png"
    asked = dict(study=name, tokens=tokens, options=_without_cache(options), corpus=corpus)
    results = (
        json.loads(path.read_text())
        if path.exists()
        else asked
        | dict(
            budget=dict(tokens=0, gpu_minutes=0.0, cpu_minutes=0.0),
            commits=[],
            finished=False,
            runs={},
        )
    )
    _refuse_another(path, asked)
    found, began, kind = (
        results["runs"],
        time.monotonic(),
        "cpu_minutes" if gpus == (CPU,) else "gpu_minutes",
    )
    before, commit = results["budget"][kind], git_state()["commit"]
    running: dict[concurrent.futures.Future, tuple[Run, str]] = {}
    stop, failures, performed = threading.Event(), [], 0
    _check_passes(wanted_runs(name, base, tokens, seeds, {}), base, corpus["train_tokens"])

    def grid(results: dict[str, dict]) -> list[Run]:
        return [
            _within(run, base, MOST_PASSES * corpus["train_tokens"])
            for run in wanted_runs(name, base, tokens, seeds, results)
        ]

    def save() -> None:
        order = {
            run.label: place for place, run in enumerate(wanted)
        }  # runs end in any order; tables go by the study's
        results["runs"] = dict(
            sorted(found.items(), key=lambda item: order.get(item[0], len(order)))
        )
        results["budget"] |= {
            kind: before + (time.monotonic() - began) / 60 * len(gpus),
            "tokens": sum(run.get("tokens", 0) for run in found.values()),
        }
        if commit and commit not in results["commits"]:
            results["commits"].append(commit)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(path)

    with concurrent.futures.ThreadPoolExecutor(len(gpus) * jobs) as pool, _signals(stop) as signals:
        while True:
            if time.monotonic() - began >= seconds:
                stop.set()
            wanted = grid(found)
            current = _up_to_date(found, wanted)
            busy = [run.label for run, _ in running.values()]
            missing = [run for run in wanted if run.label not in current and run.label not in busy]
            outstanding = sum(run.label not in current for run in wanted)
            late = stop.is_set() or time.monotonic() - began >= seconds - min(
                LAST_START, seconds / 4
            )
            for run in [] if late else missing:
                gpu = free_gpu(run, running, gpus, jobs)
                if gpu is None:
                    break
                again = ", again, as the study has changed since" * (run.label in found)
                print(
                    f"[{len(wanted) - outstanding} of {len(wanted)} finished] {run.label}{again}",
                    flush=True,
                )
                environment = _environment(gpu, 1 if run.alone else len(gpus) * jobs)
                running[
                    pool.submit(perform, run, options, _place(folder, run), environment, stop)
                ] = run, gpu
            if not running:
                break
            done, _ = concurrent.futures.wait(
                running, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                run, _ = running.pop(future)
                try:
                    result = future.result()
                    _check_timed(run, result, current)
                except Exception as error:  # of whatever kind: what runs beside it is saved
                    failures.append(error)
                    result = None
                if (
                    result is None
                ):  # stopped, from here or elsewhere, or failed: the others save and end too
                    stop.set()
                    continue
                performed, outstanding = performed + 1, outstanding - 1
                results["finished"] = False  # until the end, which a kill may keep from coming
                found[run.label] = dict(group=run.group, changes=run.changes, **result)
                keep_metrics(run.label, _place(folder, run), folder / "metrics.jsonl.gz")
                save()
                shutil.rmtree(
                    _place(folder, run), ignore_errors=True
                )  # its checkpoints; what it found is kept
                left = (time.monotonic() - began) / performed * outstanding / 60
                print(
                    f"{run.label}: {in_words(run, result)}; {f'about {left:.0f} minutes' if left >= 1 else 'less than a minute'} to go",
                    flush=True,
                )
    if performed or not missing or not path.exists():  # else all is as it was, but for the time
        results["finished"] = not missing and not failures
        figure.unlink(missing_ok=True)  # it is of other results
    save()
    if failures:
        raise failures[0]
    if {run.group for run in grid({})} <= {
        run["group"] for run in current.values()
    }:  # what is missing are runs that others led to
        draw(results, figure)
    if signals:
        print("Stopped; the same command goes on.")
        raise SystemExit(128 + signals[0])
    return not missing


def wanted_runs(
    name: str, base: Config, tokens: float, seeds: list[int], found: dict[str, dict]
) -> list[Run]:
    """What the study wants. Raises ConfigError when its function fails, as one that somebody has just written may, with the place."""
    try:
        runs = list(STUDIES[name](base, tokens, seeds, found))
        labels = [run.label for run in runs]
    except ConfigError as error:
        raise ConfigError(f"the study {name}: {error}") from error
    except Exception as error:
        *_, place = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.name == STUDIES[name].__name__
        ] or [None]
        where = (
            f"{place.filename}, line {place.lineno}: "
            if place
            else "its function must return a list of Run: "
        )
        raise ConfigError(
            f"the study {name} failed: {where}{type(error).__name__}: {error}"
        ) from error
    if not runs:
        raise ConfigError(f"the study {name} has no runs")
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"the study {name} has two runs with one name: {max(labels, key=labels.count)}. What differs by more than the seed "
            "needs a group of its own"
        )
    return runs


def in_words(run: Run, result: dict) -> str:
    """What a run found out."""
    if "failed" in result:
        return result["failed"]
    found = (
        f"{result['tokens_per_second']:,.0f} tokens/s"
        if run.alone
        else f"validation loss {result['val_loss']:.4f}"
    )
    return f"{found}, {result['elapsed_seconds']:.0f} s"


def free_gpu(run: Run, running: dict, gpus: tuple[str, ...], jobs: int) -> str | None:
    """The GPU with the fewest runs, if this run may start on it now."""
    if any(other.alone for other, _ in running.values()) or run.alone and running:
        return None
    on = {gpu: sum(place == gpu for _, place in running.values()) for gpu in gpus}
    gpu = min(gpus, key=on.get)
    return gpu if on[gpu] < jobs else None


def _environment(gpu: str, processes: int) -> dict:
    """Of a run: the one GPU that it sees, and its share of the cores."""
    share = str(max(1, cpu_cores() // processes))
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = (
        dict(OMP_NUM_THREADS=share) if gpu == CPU else dict(TORCHINDUCTOR_COMPILE_THREADS=share)
    )
    own = dict(PYTHONWARNINGS="ignore", PYTHONPATH=paths) | (
        {} if gpu == CPU else dict(CUDA_VISIBLE_DEVICES=gpu)
    )
    return threads | os.environ | own


def visible_gpus(config: Config) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that the runs may use, or the CPU."""
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return (CPU,)
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(named or map(str, range(torch.cuda.device_count())))


def _check_passes(wanted: list[Run], base: Config, train_tokens: int) -> None:
    for run in wanted:
        if run.alone:  # it measures no loss
            continue
        config = dataclasses.replace(base, **run.changes)
        passes = config.max_steps * config.tokens_per_step / train_tokens
        if passes > MOST_PASSES:
            raise ConfigError(
                f"the run '{run.label}' would pass over the corpus of {train_tokens:,} tokens {passes:.1f} times, more than "
                f"{MOST_PASSES}: give fewer --tokens, or more --data"
            )


def _up_to_date(found: dict[str, dict], wanted: list[Run]) -> dict[str, dict]:
    """Results without those of runs that are now wanted with other changes."""
    changes = {run.label: run.changes for run in wanted}
    return {
        label: result
        for label, result in found.items()
        if result["changes"] == changes.get(label, result["changes"])
    }


def _within(run: Run, base: Config, most_tokens: float) -> Run:
    """A run that a study came to want, such as one for another's time, made no longer than its corpus allows."""
    steps = int(most_tokens / dataclasses.replace(base, **run.changes).tokens_per_step)
    return (
        run
        if run.alone or run.changes["max_steps"] <= steps
        else dataclasses.replace(run, changes=run.changes | dict(max_steps=steps))
    )


def _check_timed(run: Run, result: dict | None, found: dict[str, dict]) -> None:
    """Speeds and memory of one study are of one kind of GPU."""
    if not (run.alone and result and "machine" in result):
        return
    there = {
        other["machine"]["gpu"]
        for other in found.values()
        if other["group"].startswith("speed of") and "machine" in other
    }
    if there - {result["machine"]["gpu"]}:
        raise ConfigError(
            f"the study's speeds were measured on {there.pop() or 'a CPU'}, and this machine has "
            f"{result['machine']['gpu'] or 'no GPU'}: go on there, or begin anew with another --out"
        )


def _without_cache(options: list[str]) -> list[str]:
    """The options without the place of the cache, which another machine may have elsewhere."""
    return [
        word
        for name, value in zip(options[::2], options[1::2])
        if name != "--cache_dir"
        for word in (name, value)
    ]


def _refuse_another(path: Path, asked: dict) -> None:
    """Raises ConfigError when the results at `path` are of another study than is `asked` for, of which the corpus may not be known yet."""
    if path.exists() and (different := _differences(json.loads(path.read_text()), asked)):
        raise ConfigError(
            f"{path} is of another study: {'; '.join(different)}. Give the same to go on with it, or another --out to begin anew"
        )


def _differences(before: dict, now: dict) -> list[str]:
    """In words, what was asked for otherwise."""
    given = [
        dict(zip(asked["options"][::2], asked["options"][1::2]))
        | {"study": asked["study"], "--tokens": f"{asked['tokens']:,.15g}"}
        for asked in (before, now)
    ]
    found = [
        f"{name} was {given[0].get(name, 'not given')} and is {given[1].get(name, 'not given')}"
        for name in given[0] | given[1]
        if given[0].get(name) != given[1].get(name)
    ]
    return found + [
        "the text or its tokenizer is another"
        + ", as `installed` is what a machine has" * (before["corpus"]["data"] == "installed")
    ] * ("corpus" in now and before["corpus"] != now["corpus"])


def _place(folder: Path, run: Run) -> Path:
    return folder / "runs" / re.sub(r"[^\w.-]+", "_", run.label)


@contextlib.contextmanager
def _signals(stop: threading.Event):
    """Ctrl-C, SIGTERM and an error in here let the runs save and end. Yields a list that the signals are put into."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: (came.append(number), stop.set()))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield came
    except BaseException:
        stop.set()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_metrics(label: str, place: Path, kept: Path) -> None:
    """Adds a run's metrics, each row with the run's name, to the gzip file `kept`, in place of an earlier run's of that name."""
    metrics = place / "metrics.jsonl"
    if not metrics.exists():
        return
    rows = [
        json.dumps(dict(run=label) | json.loads(row)) for row in metrics.read_text().splitlines()
    ]
    there = gzip.decompress(kept.read_bytes()).decode().splitlines() if kept.exists() else []
    mine = json.dumps(dict(run=label))[:-1] + ","
    packed = gzip.compress(
        "".join(
            row + "\n" for row in [*(row for row in there if not row.startswith(mine)), *rows]
        ).encode(),
        mtime=0,
    )
    if len(packed) > MOST_METRICS:
        print(
            f"the metrics of '{label}' are not kept: {kept} would be larger than {MOST_METRICS / 1e6:g} MB"
        )
        return
    temporary = kept.with_suffix(".tmp")
    temporary.write_bytes(packed)
    temporary.replace(kept)


# ---------------------------------------------------------------- the command


def run_study(argv: list[str]) -> None:
    began = time.monotonic()
    if not argv:
        print(
            __doc__
            + "\n"
            + "\n".join(
                f"{name:15s} {' '.join(function.__doc__.split())}"
                for name, function in STUDIES.items()
            )
        )
        return
    parser = new_parser(
        "python -m studies.run NAME [--preset P] [--tokens N] [--seeds N] [--jobs N] [--minutes M] [--out DIR] "
        "[--FIELD VALUE ...]",
        __doc__,
    )
    parser.add_argument("name", help=" ".join(STUDIES))
    parser.add_argument("--preset", default="small", help="the base configuration [small]")
    parser.add_argument(
        "--tokens",
        type=float,
        help=f"tokens of a run [{', '.join(f'{n} {t / 1e6:g}e6' for n, t in TOKENS.items())}]",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=2,
        help="runs of each configuration that is compared by its loss [2]",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs on each GPU at a time, but for those whose speed is measured [1]",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after this time; the same command goes on",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the study [studies/NAME, and studies/NAME-PRESET with another preset than small]",
    )
    add_config_options(parser)
    args = parser.parse(argv)
    if args.name not in STUDIES:
        raise ConfigError(
            f"unknown study {args.name!r}.{nearest(args.name, STUDIES)} Studies: {', '.join(STUDIES)}"
        )
    tokens = TOKENS[args.name] if args.tokens is None else args.tokens
    numbers = dict(tokens=tokens, seeds=args.seeds, jobs=args.jobs, minutes=args.minutes)
    if wrong := [
        f"--{name} {number:g}"
        for name, number in numbers.items()
        if not number > 0 or name != "minutes" and number == math.inf
    ]:
        raise ConfigError(f"{', '.join(wrong)}: must be a positive number")
    given = config_options(args)
    for name, instead in dict(
        save_dir="each run has a folder of its own; the study's is --out",
        max_steps="the study sets it, by --tokens",
        seed="the study sets it, 1 to --seeds",
    ).items():
        if name in given:
            raise ConfigError(f"--{name}: {instead}")
    base, _, _ = resolve(given, args.preset, None)
    own = {name: value for name, value in _own_settings(base, tokens).items() if name not in given}
    base = dataclasses.replace(base, **own)
    if visible_gpus(base) == (CPU,) and args.preset != "tiny":
        print(
            f"warning: no GPU was found, and {args.preset} takes days on a CPU; --preset tiny --tokens 2e5 tries the machinery",
            file=sys.stderr,
        )
    folder = args.out or ROOT / "studies" / (
        args.name if args.preset == "small" else f"{args.name}-{args.preset}"
    )
    options = _options(args.preset, own | given)
    _refuse_another(
        folder / "results.json",
        dict(study=args.name, tokens=tokens, options=_without_cache(options)),
    )  # before minutes of tokenizing
    seeds = list(range(1, args.seeds + 1))
    if not (folder / "results.json").exists():  # else it goes on as it began
        _refuse_what_it_sets(args.name, given, args.preset, tokens, seeds)
    with locked(folder, "--out"):
        corpus = data.prepare(base)
        facts = dict(
            data=base.data,
            data_hash=corpus.data_hash,
            tokenizer_hash=corpus.tokenizer_hash,
            train_tokens=len(corpus.train),
            validation_tokens=len(corpus.validation),
            unigram_entropy=corpus.unigram_entropy,
        )
        done = study(
            args.name,
            base,
            options,
            tokens,
            seeds,
            folder,
            facts,
            60 * args.minutes - (time.monotonic() - began),
            visible_gpus(base),
            args.jobs,
        )
    print(
        f"{folder / 'results.json'}, {folder / 'figure.png'}"
        if done
        else "The time is over; the same command goes on."
    )


def _refuse_what_it_sets(
    name: str, given: dict, preset: str, tokens: float, seeds: list[int]
) -> None:
    """Raises ConfigError for an option that no run of the study has, as the study sets it in each, whatever the option is."""
    base, _, _ = resolve(given, preset, None)
    runs = wanted_runs(name, base, tokens, seeds, {})
    for field in sorted(given.keys() & set.intersection(*(set(run.changes) for run in runs))):
        try:
            without, _, _ = resolve(
                {other: value for other, value in given.items() if other != field}, preset, None
            )
            same = wanted_runs(name, without, tokens, seeds, {}) == runs
        except ConfigError:  # no study is possible without it
            continue
        if same and getattr(without, field) != getattr(base, field):
            raise ConfigError(f"--{field}: the study sets it for each of its runs")


def _own_settings(base: Config, tokens: float) -> dict:
    """What a study sets for all runs: a few validations, no checkpoints but to go on with, and no samples."""
    return dict(
        sample_tokens=0,
        save_every=0,
        save_minutes=5.0,
        eval_every=max(1, round(tokens / base.tokens_per_step / VALIDATIONS)),
    )


def _options(preset: str, settings: dict) -> list[str]:
    return [
        "--preset",
        preset,
        *(
            word
            for name, value in settings.items()
            for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
        ),
    ]


if __name__ == "__main__":
    sys.exit(exit_code(run_study, sys.argv[1:]))
