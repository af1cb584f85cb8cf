"""Answers a research question with a grid of training runs; continues a study that was cut off.

    python -m studies.run                      list the studies
    python -m studies.run balance              with `small`, on all visible GPUs, a run on each
    python -m studies.run balance --jobs 2     two runs on each GPU at a time
    python -m studies.run balance --minutes 8  stop after 8 minutes; the same command continues
    python -m studies.run balance --preset tiny --tokens 2e5
                                               try the machinery, on a CPU too

With `small` (65,536 tokens a step, --batch_size 64 --gradient_accumulation_steps 1 --precision
bf16):

    optimizer        about 55 runs of 16M tokens or less
    routing          22 runs of about 16M tokens
    balance          20 runs of 16M tokens
    specialization    2 runs of 50M tokens, and analyses
    scaling          40 runs of 16M tokens or more
    checkpointing    about 42 runs of 5 to 64 steps

docs/findings.md says how long each study took. Two GPUs take half as long, except where a speed is
measured, as in all runs of checkpointing: such a run has the machine for itself. Each run of
`small` needs 32 GB of GPU memory: on 80 GB give --jobs 2. Any option of run_experiment.py that the
study does not set holds for all runs. Each run is a process of run_experiment.py; its output is in
studies/NAME/runs until it has finished.

What is kept is small: studies/NAME/results.json, written anew after each run, metrics.jsonl.gz
with the metrics of all runs, and figure.png. With results.json a study continues on another
machine. Only runs that were cut off begin again there, because their checkpoints are in
studies/NAME/runs. `python -m studies.report` puts the results into docs/findings.md.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path

if __name__ == "__main__":  # before the imports below: slow, and they fail without their packages
    from cli import exit_at_a_wrong_path
    from config import explain_missing_packages

    explain_missing_packages()
    exit_at_a_wrong_path(sys.argv[1:])

import data
from cli import (
    Parser,
    add_config_options,
    config_options,
    exit_code,
    locked,
    new_parser,
    training,
)
from config import Config, ConfigError, nearest, resolve
from planner.layout import format_duration
from record.results import git_state, write_whole
from record.stop import handled
from studies.figures import draw
from studies.grids import STUDIES, TOKENS, Run
from studies.one_run import CPU, ROOT, environment_of, folder_of, keep_metrics, perform

# Passes over the corpus that a run may make. Repeated text is worth much less than new text beyond
# this (Muennighoff et al. 2023).
MOST_PASSES = 4
# Validations of a run. They are few, because training waits for them.
VALIDATIONS = 10
# Seconds before the end of --minutes from which on no run begins: it would be stopped while it
# compiles.
LAST_START = 75
# Seconds between two looks at the runs
POLL = 0.2


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
    """Performs the missing runs of a study and draws its figure. Returns whether it is finished.

    It ends early after `seconds`. On each of the `gpus`, `jobs` runs take place at a time. `name`,
    `tokens`, `options` and `corpus` must be those with which the study began. Raises
    ExperimentError when a run fails.
    """
    _check_passes(wanted_runs(name, base, tokens, seeds, {}), base, corpus["train_tokens"])
    grid = Grid(name, base, tokens, seeds, corpus["train_tokens"])
    identity = dict(study=name, tokens=tokens, options=_without_cache(options), corpus=corpus)
    record = StudyRecord(folder, identity, gpus)
    return _Scheduler(grid, record, options, gpus, jobs, seconds).work()


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs that a study wants, given the results so far."""

    name: str
    base: Config
    tokens: float
    seeds: list[int]
    train_tokens: int

    def runs(self, found: dict[str, dict]) -> list[Run]:
        most_tokens = MOST_PASSES * self.train_tokens
        wanted = wanted_runs(self.name, self.base, self.tokens, self.seeds, found)
        return [_within(run, self.base, most_tokens) for run in wanted]


class StudyRecord:
    """results.json of a study: what its runs ended with, and what they cost."""

    def __init__(self, folder: Path, identity: dict, gpus: tuple[str, ...]):
        self.folder = folder
        self.path = folder / "results.json"
        self.figure = folder / "figure.png"
        self.existed = self.path.exists()
        _refuse_another(self.path, identity)
        if self.existed:
            self.results = json.loads(self.path.read_text())
        else:
            budget = dict(tokens=0, gpu_minutes=0.0, cpu_minutes=0.0)
            self.results = identity | dict(budget=budget, commits=[], finished=False, runs={})
        self.found: dict[str, dict] = self.results["runs"]
        self.began = time.monotonic()
        self.num_gpus = len(gpus)
        self.minutes_key = "cpu_minutes" if gpus == (CPU,) else "gpu_minutes"
        self.minutes_before = self.results["budget"][self.minutes_key]
        self.commit = git_state()["commit"]

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def save(self, wanted: list[Run]) -> None:
        """Rewrites results.json, as a whole or not at all.

        Runs end in any order. In the file they have the order of `wanted`, and those that the study
        no longer wants come last.
        """
        position = {run.label: number for number, run in enumerate(wanted)}
        labels = sorted(self.found, key=lambda label: position.get(label, len(position)))
        self.results["runs"] = {label: self.found[label] for label in labels}
        minutes = self.minutes_before + self.elapsed() / 60 * self.num_gpus
        tokens = sum(run.get("tokens", 0) for run in self.found.values())
        self.results["budget"] |= {self.minutes_key: minutes, "tokens": tokens}
        if self.commit and self.commit not in self.results["commits"]:
            self.results["commits"].append(self.commit)
        write_whole(self.path, json.dumps(self.results, indent=1) + "\n")

    def add(self, run: Run, result: dict, wanted: list[Run]) -> None:
        """Keeps the result and the metrics of a run, and deletes its folder with checkpoints."""
        # `finished` is decided at the end of the study. A kill may prevent that.
        self.results["finished"] = False
        self.found[run.label] = dict(group=run.group, changes=run.changes, **result)
        folder = folder_of(self.folder, run)
        keep_metrics(run.label, folder, self.folder / "metrics.jsonl.gz")
        self.save(wanted)
        shutil.rmtree(folder, ignore_errors=True)


class _Scheduler:
    """Starts the runs that the study wants where there is room, and collects their results."""

    def __init__(
        self,
        grid: Grid,
        record: StudyRecord,
        options: list[str],
        gpus: tuple[str, ...],
        jobs: int,
        seconds: float,
    ):
        self.grid = grid
        self.record = record
        self.options = options
        self.gpus = gpus
        self.jobs = jobs
        self.seconds = seconds
        self.running: dict[concurrent.futures.Future, tuple[Run, str]] = {}  # the run, its GPU
        self.stop = threading.Event()  # the runs that are under way save and end when it is set
        self.failures: list[Exception] = []
        self.performed = 0  # runs that ended since this process began

    def work(self) -> bool:
        """Performs the runs. Returns whether the study is finished."""
        workers = len(self.gpus) * self.jobs
        # When an error ends the block, _signals tells the runs to save and then the pool waits.
        with (
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
            _signals(self.stop) as signals,
        ):
            missing = self._loop(pool, signals)
        self._finish(missing)
        if signals:
            print("Stopped; the same command continues.")
            raise SystemExit(128 + signals[0])  # the exit code that shells give for a signal
        return not missing

    def _loop(self, pool: concurrent.futures.Executor, signals: list[int]) -> list[Run]:
        """Starts and collects runs until none is running and none may start.

        After a signal, whose number is in `signals`, none may start and the running ones end.

        Returns the runs that are still missing.
        """
        while True:
            if signals or self.record.elapsed() >= self.seconds:
                self.stop.set()
            self._update_wanted()
            if not self._is_late():
                self._start(pool)
            if not self.running:
                return self.missing
            done, _ = concurrent.futures.wait(
                self.running, timeout=POLL, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                self._collect(future)

    def _update_wanted(self) -> None:
        """Finds the runs that the study wants now, and which of them are missing.

        `outstanding` counts the wanted runs without a result, and `missing` are those of them that
        are not running.
        """
        self.wanted = self.grid.runs(self.record.found)
        self.current = _up_to_date(self.record.found, self.wanted)
        without_result = [run for run in self.wanted if run.label not in self.current]
        running = {run.label for run, _ in self.running.values()}
        self.outstanding = len(without_result)
        self.missing = [run for run in without_result if run.label not in running]

    def _is_late(self) -> bool:
        """Whether no run may start any more."""
        last_start = self.seconds - min(LAST_START, self.seconds / 4)
        return self.stop.is_set() or self.record.elapsed() >= last_start

    def _start(self, pool: concurrent.futures.Executor) -> None:
        """Starts the missing runs in their order, until there is no room for the next one.

        They stay in `missing` until the next _update_wanted.
        """
        for run in self.missing:
            gpu = free_gpu(run, self.running, self.gpus, self.jobs)
            if gpu is None:
                return
            print(self._start_message(run), flush=True)
            processes = len(self.gpus) * self.jobs
            if run.alone:
                processes = 1
            environment = environment_of(gpu, processes)
            folder = folder_of(self.record.folder, run)
            future = pool.submit(perform, run, self.options, folder, environment, self.stop)
            self.running[future] = run, gpu

    def _start_message(self, run: Run) -> str:
        finished = len(self.wanted) - self.outstanding
        message = f"[{finished} of {len(self.wanted)} finished] {run.label}"
        if run.label in self.record.found:
            message += ", again, as the study has changed since"
        return message

    def _collect(self, future: concurrent.futures.Future) -> None:
        """Keeps the result of a run that has ended.

        When the run was stopped or failed, the other runs save and end too.
        """
        run, _ = self.running.pop(future)
        try:
            result = future.result()
            _check_timed(run, result, self.current)
        except Exception as error:  # of any kind: the other runs must save before it is raised
            self.failures.append(error)
            result = None
        if result is None:
            self.stop.set()
            return
        self.performed += 1
        self.outstanding -= 1
        self.record.add(run, result, self.wanted)
        print(f"{run.label}: {in_words(run, result)}; {self._time_left()} to go", flush=True)

    def _time_left(self) -> str:
        """An estimate: the outstanding runs take as long as those that were performed."""
        seconds_per_run = self.record.elapsed() / self.performed
        seconds = seconds_per_run * self.outstanding
        if seconds < 60:
            return "less than a minute"
        return f"about {format_duration(seconds)}"

    def _finish(self, missing: list[Run]) -> None:
        """Writes the results and draws them. Raises the first failure of a run."""
        record = self.record
        if self.performed or not missing or not record.path.exists():
            record.results["finished"] = not missing and not self.failures
            record.figure.unlink(missing_ok=True)  # it shows other results
        record.save(self.wanted)
        if self.failures:
            raise self.failures[0]
        # The figure needs the runs that the study wants without any results. Missing runs that
        # follow from results, such as a longer sweep, can come later.
        needed = {run.group for run in self.grid.runs({})}
        present = {run["group"] for run in self.current.values()}
        if needed <= present:
            draw(record.results, record.figure)


def wanted_runs(
    name: str, base: Config, tokens: float, seeds: list[int], found: dict[str, dict]
) -> list[Run]:
    """All runs that the study wants. `found` are the results so far, by label.

    Raises ConfigError when the study's function fails, as one that somebody has just written may.
    The message says in which line.
    """
    try:
        runs = list(STUDIES[name](base, tokens, seeds, found))
        labels = [run.label for run in runs]
    except ConfigError as error:
        raise ConfigError(f"the study {name}: {error}") from error
    except Exception as error:
        where = _place_in(STUDIES[name].__name__, error)
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the study {name} failed: {where}{what}") from error
    if not runs:
        raise ConfigError(f"the study {name} has no runs")
    if len(set(labels)) < len(labels):
        raise ConfigError(
            f"the study {name} has two runs with one name: {max(labels, key=labels.count)}. "
            "What differs by more than the seed needs a group of its own"
        )
    return runs


def _place_in(function: str, error: Exception) -> str:
    """The beginning of a message: the line of `function` where the error was raised."""
    innermost = None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.name == function:
            innermost = frame
    if innermost is None:  # the function has returned, and what it returned cannot be used
        return "its function must return a list of Run: "
    return f"{innermost.filename}, line {innermost.lineno}: "


def in_words(run: Run, result: dict) -> str:
    """The result of a run, for the line that reports it."""
    if "failed" in result:
        return result["failed"]
    duration = format_duration(result["elapsed_seconds"])
    if run.alone:
        return f"{result['tokens_per_second']:,.0f} tokens/s, {duration}"
    return f"validation loss {result['val_loss']:.4f}, {duration}"


def free_gpu(run: Run, running: dict, gpus: tuple[str, ...], jobs: int) -> str | None:
    """The GPU with the fewest runs, if this run may start there now, else None.

    A GPU has `jobs` runs at most. A run that is to be alone starts when nothing else runs.
    """
    one_is_alone = any(other.alone for other, _ in running.values())
    if one_is_alone or (run.alone and running):
        return None
    load = dict.fromkeys(gpus, 0)
    for _, gpu in running.values():
        load[gpu] += 1
    least_busy = min(gpus, key=load.get)
    if load[least_busy] >= jobs:
        return None
    return least_busy


def visible_gpus(config: Config) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that the runs may use, or the CPU."""
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return (CPU,)
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(named or map(str, range(torch.cuda.device_count())))


def _check_passes(wanted: list[Run], base: Config, train_tokens: int) -> None:
    """Raises ConfigError when a run would pass over its corpus more than MOST_PASSES times."""
    for run in wanted:
        if run.alone:  # it measures speed, not loss
            continue
        config = dataclasses.replace(base, **run.changes)
        passes = config.max_steps * config.tokens_per_step / train_tokens
        if passes > MOST_PASSES:
            raise ConfigError(
                f"the run '{run.label}' would pass over the corpus of {train_tokens:,} tokens "
                f"{passes:.1f} times, more than {MOST_PASSES}: give fewer --tokens, or more --data"
            )


def _up_to_date(found: dict[str, dict], wanted: list[Run]) -> dict[str, dict]:
    """The results without those of runs that the study now wants with other changes."""
    wanted_changes = {run.label: run.changes for run in wanted}
    current = {}
    for label, result in found.items():
        if label not in wanted_changes or result["changes"] == wanted_changes[label]:
            current[label] = result
    return current


def _within(run: Run, base: Config, most_tokens: float) -> Run:
    """The run, with as many steps as `most_tokens` allow at most.

    A run that trains for the time of another one may otherwise repeat its corpus too often.
    """
    config = dataclasses.replace(base, **run.changes)
    most_steps = int(most_tokens / config.tokens_per_step)
    if run.alone or run.changes["max_steps"] <= most_steps:
        return run
    return dataclasses.replace(run, changes=run.changes | dict(max_steps=most_steps))


def _check_timed(run: Run, result: dict | None, found: dict[str, dict]) -> None:
    """Raises ConfigError when the speeds of a study come from two kinds of GPU.

    `result` is that of the run that has just ended, `found` are those before it.
    """
    if not (run.alone and result and "machine" in result):
        return
    here = result["machine"]["gpu"]
    for other in found.values():
        if not other["group"].startswith("speed of") or "machine" not in other:
            continue
        there = other["machine"]["gpu"]
        if there != here:
            raise ConfigError(
                f"the study's speeds were measured on {there or 'a CPU'}, and this machine has "
                f"{here or 'no GPU'}: continue there, or begin anew with another --out"
            )


@contextlib.contextmanager
def _signals(stop: threading.Event):
    """Yields a list, to which the numbers of the received signals are added.

    An error in the block sets `stop`: the runs save and end.
    """
    received: list[int] = []

    def handle(number: int, _frame) -> None:
        # It must not set `stop`, which takes a lock: the line that it interrupts may have the lock.
        received.append(number)

    try:
        with handled(handle):
            yield received
    except BaseException:
        stop.set()
        raise


# ---------------------------------------------------------------- is it the same study?


def _without_cache(options: list[str]) -> list[str]:
    """The options without --cache_dir, which may be another folder on another machine."""
    kept = []
    for name, value in zip(options[::2], options[1::2]):
        if name != "--cache_dir":
            kept += [name, value]
    return kept


def _refuse_another(path: Path, identity: dict) -> None:
    """Raises ConfigError when the results at `path` are of a study with another identity.

    `identity` has the study's name, tokens and options, and its corpus once the text is tokenized.
    Without a corpus only the others are compared.
    """
    if not path.exists():
        return
    differences = _differences(json.loads(path.read_text()), identity)
    if differences:
        raise ConfigError(
            f"{path} is of another study: {'; '.join(differences)}. "
            "Give the same to continue it, or another --out to begin anew"
        )


def _differences(before: dict, now: dict) -> list[str]:
    """What differs between two identities of a study, in words."""
    settings_before = _settings(before)
    settings_now = _settings(now)
    found = []
    for name in settings_before | settings_now:
        old = settings_before.get(name, "not given")
        new = settings_now.get(name, "not given")
        if old != new:
            found.append(f"{name} was {old} and is {new}")
    if "corpus" not in now:
        return found
    # Results that are older than the versions of the rules are of version 1.
    corpus_before = dict(rules=1) | before["corpus"]
    corpus_now = dict(rules=1) | now["corpus"]
    if corpus_before["rules"] != corpus_now["rules"]:
        found.append(
            f"its runs follow version {corpus_before['rules']} of the rules of data (split and "
            f"windows), new ones version {corpus_now['rules']}"
        )
    elif corpus_before != corpus_now:
        difference = "the text or its tokenizer is another"
        if before["corpus"]["data"] == "installed":
            difference += ", as `installed` is what a machine has"
        found.append(difference)
    return found


def _settings(identity: dict) -> dict[str, str]:
    """Name and value of everything that was requested for a study."""
    options = dict(zip(identity["options"][::2], identity["options"][1::2]))
    return options | {"study": identity["study"], "--tokens": f"{identity['tokens']:,.15g}"}


# ---------------------------------------------------------------- the command


def run_study(argv: list[str]) -> None:
    began = time.monotonic()
    if not argv:
        print(_list_of_studies())
        return
    args = _parser().parse(argv)
    given = config_options(args)
    _check_arguments(args, given)
    tokens = TOKENS[args.name] if args.tokens is None else args.tokens
    seeds = list(range(1, args.seeds + 1))
    base, _, _ = resolve(given, args.preset, None)
    own = _own_settings(base, tokens, given)
    base = dataclasses.replace(base, **own)
    gpus = visible_gpus(base)
    _warn_of_a_slow_machine(gpus, args.preset)

    folder = args.out or _default_folder(args.name, args.preset)
    options = _options(args.preset, own | given)
    # These errors come before the minutes that tokenizing may take.
    identity = dict(study=args.name, tokens=tokens, options=_without_cache(options))
    _refuse_another(folder / "results.json", identity)
    if not (folder / "results.json").exists():
        # A study that has begun continues with whatever options it began with.
        _refuse_what_it_sets(args.name, given, args.preset, tokens, seeds)
    with training(), locked(folder, "--out"):
        corpus = _corpus_facts(base)
        seconds = 60 * args.minutes - (time.monotonic() - began)
        done = study(
            args.name, base, options, tokens, seeds, folder, corpus, seconds, gpus, args.jobs
        )
        if done:
            print(f"{folder / 'results.json'}, {folder / 'figure.png'}")
        else:
            print("The time is over; the same command continues.")


def _list_of_studies() -> str:
    lines = [__doc__]
    for name, function in STUDIES.items():
        lines.append(f"{name:15s} {' '.join(function.__doc__.split())}")
    return "\n".join(lines)


def _parser() -> Parser:
    usage = (
        "python -m studies.run NAME [--preset P] [--tokens N] [--seeds N] [--jobs N] "
        "[--minutes M] [--out DIR] [--FIELD VALUE ...]"
    )
    parser = new_parser(usage, __doc__)
    tokens = ", ".join(f"{name} {number / 1e6:g}e6" for name, number in TOKENS.items())
    parser.add_argument("name", help=" ".join(STUDIES))
    parser.add_argument("--preset", default="small", help="the base configuration [small]")
    parser.add_argument("--tokens", type=float, help=f"tokens of a run [{tokens}]")
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
        help="runs on each GPU at a time, except those whose speed is measured [1]",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="stop after this time; the same command continues",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the study [studies/NAME; studies/NAME-PRESET with another preset]",
    )
    add_config_options(parser)
    return parser


def _check_arguments(args, given: dict) -> None:
    """Raises ConfigError for arguments that make no study. `given` are the options of Config."""
    if args.name not in STUDIES:
        known = ", ".join(STUDIES)
        raise ConfigError(
            f"unknown study {args.name!r}.{nearest(args.name, STUDIES)} Studies: {known}"
        )
    _check_numbers(args)
    set_by_the_study = dict(
        save_dir="each run has a folder of its own; the study's is --out",
        max_steps="the study sets it, by --tokens",
        seed="the study sets it, 1 to --seeds",
    )
    for name, instead in set_by_the_study.items():
        if name in given:
            raise ConfigError(f"--{name}: {instead}")


def _check_numbers(args) -> None:
    """Raises ConfigError unless the numbers of a study are positive. Only --minutes may be inf."""
    wrong = []
    for name in ("tokens", "seeds", "jobs", "minutes"):
        number = getattr(args, name)
        if number is None:  # not given
            continue
        is_positive = number > 0  # false for NaN too
        is_endless = number == math.inf and name != "minutes"
        if is_endless or not is_positive:
            wrong.append(f"--{name} {number:g}")
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: must be a positive number")


def _warn_of_a_slow_machine(gpus: tuple[str, ...], preset: str) -> None:
    if gpus == (CPU,) and preset != "tiny":
        print(
            f"warning: no GPU was found, and {preset} takes days on a CPU; "
            "--preset tiny --tokens 2e5 tries the machinery",
            file=sys.stderr,
        )


def _default_folder(name: str, preset: str) -> Path:
    if preset == "small":
        return ROOT / "studies" / name
    return ROOT / "studies" / f"{name}-{preset}"


def _corpus_facts(base: Config) -> dict:
    """The identity and the size of the corpus, for results.json."""
    corpus = data.prepare(base)
    return dict(
        data=base.data,
        data_hash=corpus.data_hash,
        tokenizer_hash=corpus.tokenizer_hash,
        rules=corpus.rules,
        train_tokens=len(corpus.train),
        validation_tokens=len(corpus.validation),
        unigram_entropy=corpus.unigram_entropy,
    )


def _refuse_what_it_sets(
    name: str, given: dict, preset: str, tokens: float, seeds: list[int]
) -> None:
    """Raises ConfigError for an option that has no effect, because each run of the study sets it.

    An option has no effect when the study's runs are the same without it. A study may also derive
    what it sets from the given value: then the runs differ, and the option is allowed.
    """
    base, _, _ = resolve(given, preset, None)
    runs = wanted_runs(name, base, tokens, seeds, {})
    set_in_all = set.intersection(*(set(run.changes) for run in runs))
    for field in sorted(given.keys() & set_in_all):
        others = {other: value for other, value in given.items() if other != field}
        try:
            base_without, _, _ = resolve(others, preset, None)
            runs_without = wanted_runs(name, base_without, tokens, seeds, {})
        except ConfigError:  # no study is possible without this option
            continue
        changes_base = getattr(base_without, field) != getattr(base, field)
        if changes_base and runs_without == runs:
            raise ConfigError(f"--{field}: the study sets it for each of its runs")


def _own_settings(base: Config, tokens: float, given: dict) -> dict:
    """What a study sets for all its runs, unless it was given.

    There are few validations, no samples, and checkpoints only to continue after a kill.
    """
    steps = tokens / base.tokens_per_step
    own = dict(
        sample_tokens=0,
        save_every=0,
        save_minutes=5.0,
        eval_every=max(1, round(steps / VALIDATIONS)),
    )
    return {name: value for name, value in own.items() if name not in given}


def _options(preset: str, settings: dict) -> list[str]:
    """The preset and the settings as words of a command line."""
    words = ["--preset", preset]
    for name, value in settings.items():
        text = str(value)
        if isinstance(value, bool):
            text = text.lower()
        words += [f"--{name}", text]
    return words


if __name__ == "__main__":
    sys.exit(exit_code(run_study, sys.argv[1:]))
