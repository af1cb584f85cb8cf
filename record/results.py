"""What a run writes down about itself: rows of metrics, results, curves, the machine it ran on."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from config import Config
from planner.machine import GB
from record.side_work import SideWork, cause_of, path_named, warn
from record.small_files import (
    METRICS,
    NOT_A_METRIC,
    RESULTS,
    RUN,
    read_rows,
    read_run_file,
    starts,
    without_repeats,
)

# A run without evaluations rewrites its results this often.
RESULTS_MINUTES = 5
# Curves take a second or two, in which the GPU waits: they are drawn at most this often.
CURVES_SECONDS = 60
LONGEST_DIFF = 1_000_000  # characters of a diff that are kept

# While a run trains, its results repeat a part of its rows: at most this many in all, and at most
# this many bytes of training rows and of evaluations. Rewriting them takes some milliseconds then,
# however long the run is.
THINNED_ROWS = 2000
THINNED_BYTES = 4_000_000


class ThinnedRows:
    """Some of the rows of one kind, spread evenly over all of them, as lines of JSON.

    `lines` holds (index, line); the index is that of the row in the history. They are those of
    every `stride`-th row. When there are too many lines every second one is dropped, and the stride
    doubles.
    """

    # There are two kinds of rows. The newest row is added to both when they are written.
    MOST_LINES = THINNED_ROWS // 2 - 1

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.stride = 1
        self.rows_seen = 0
        self.bytes = 0

    def add(self, index: int, row: dict) -> None:
        if self.rows_seen % self.stride == 0:
            line = json.dumps(row)
            self.lines.append((index, line))
            self.bytes += len(line)
        self.rows_seen += 1
        while self._too_many():
            self.lines = self.lines[::2]
            self.stride *= 2
            self.bytes = sum(len(line) for _, line in self.lines)

    def _too_many(self) -> bool:
        if len(self.lines) == 1:
            return False
        return len(self.lines) > self.MOST_LINES or self.bytes > THINNED_BYTES


class Record:
    """The metrics of one run: keeps their rows, and writes the three files that show them.

    metrics.jsonl has the rows, one a line. training_results.json and training_curves.png are made
    from all rows. `history` holds the rows, the oldest first. `track` is called with every new
    row: it sends the row to a tracker. A row that cannot be written stays in the history and is
    written with a later one.
    """

    def __init__(self, folder: Path, side_work: SideWork | None = None):
        self.folder = folder
        self.side_work = side_work or SideWork()
        self.history: list[dict] = []
        self.track: Callable[[dict], None] = lambda row: None
        # Made from the history, so that no row is looked at twice.
        self.last_values: dict = {}
        self.thinned = dict(training=ThinnedRows(), evaluation=ThinnedRows())
        # What this object knows of metrics.jsonl: nothing until `begin` has made it anew.
        self.begun = False
        self.loaded_step = -1  # rows of the file up to this step are in the history
        self.rows_in_file = 0
        self.bytes_in_file = 0
        # The steps at which the run was resumed: the curves mark them.
        self.resume_points: list[int] = []
        # When the two files were last written; at the start there is nothing to write yet.
        self.last_results = time.monotonic()
        self.last_curves = time.monotonic()

    # ------------------------------------------------------------ rows

    def append(self, row: dict) -> None:
        """Adds a row. It is on its way to the disk and to the tracker when this returns."""
        self._remember(row)
        self.side_work.run(METRICS, self.write_rows)
        self.track(row)

    def _remember(self, row: dict) -> None:
        self.history.append(row)
        for key, value in row.items():
            if key not in NOT_A_METRIC:
                self.last_values[key] = value
        kind = "training"
        if "val_loss" in row:
            kind = "evaluation"
        self.thinned[kind].add(len(self.history), row)

    def load(self, folder: Path, step: int) -> None:
        """Reads the rows up to `step` that a run left in `folder`."""
        path = folder / METRICS
        if not path.exists():
            return
        found = self.side_work.value(str(path), lambda: read_rows(path))
        if found is None:
            return
        rows, unreadable = found
        if unreadable and folder != self.folder:  # `begin` looks at the file of this folder
            warn(f"warning: lines of {path} that hold no row are left out: {len(unreadable)}")
        self.loaded_step = step
        for row in rows:
            if row["step"] <= step:
                self._remember(row)

    def begin(self) -> None:
        """Makes the file hold the history and nothing else.

        What it holds more is moved to metrics.jsonl.1, or the first such name that is free.
        """
        path = self.folder / METRICS
        if path.exists():
            self._move_other_lines(path)
        lines = [json.dumps(row) + "\n" for row in self.history]
        text = "".join(lines)
        if lines or path.exists():
            write_whole(path, text)
        self.rows_in_file = len(lines)
        self.bytes_in_file = len(text.encode())
        self.begun = True

    def _move_other_lines(self, path: Path) -> None:
        """Keeps what is in the file and not in the history in a file of its own."""
        try:
            rows, unreadable = read_rows(path)
        except OSError as error:
            move_unreadable(path, error)
            return
        dropped = [row for row in rows if row["step"] > self.loaded_step]
        if not dropped and not unreadable:
            return
        aside = first_free_name(path)
        lines = [json.dumps(row).encode() for row in dropped]
        write_whole(aside, b"\n".join([*lines, *unreadable, b""]))
        if dropped:
            print(
                f"{len(dropped)} rows of {METRICS} that are past the checkpoint are dropped; "
                f"they are in {aside.name}"
            )
        if unreadable:
            warn(f"warning: lines of {METRICS} that hold no row are in {aside.name}")

    def write_rows(self) -> None:
        """Appends the rows that are not in the file yet."""
        if not self.begun:
            self.begin()
        path = self.folder / METRICS
        with path_named(path), open(path, "ab") as file:
            size = file.tell()
            if size > self.bytes_in_file:
                # A full disk has cut a row short. Its beginning goes, and the row is written anew.
                file.truncate(self.bytes_in_file)
            elif size < self.bytes_in_file:
                # Someone has deleted the file, or a part of it.
                file.truncate(0)
                self.rows_in_file = 0
                self.bytes_in_file = 0
            lines = [json.dumps(row) + "\n" for row in self.history[self.rows_in_file :]]
            text = "".join(lines).encode()
            file.write(text)
        # Only what is in the file for certain is counted: closing it may raise an error too.
        self.rows_in_file = len(self.history)
        self.bytes_in_file += len(text)

    def evaluated(self, step: int) -> bool:
        """Whether the history has a validation loss at this step."""
        return any(row["step"] == step and "val_loss" in row for row in self.history)

    def latest(self) -> dict:
        """The last value of every metric that is a single number."""
        return dict(self.last_values)

    # ------------------------------------------------------------ results and curves

    def results_are_old(self) -> bool:
        """Whether the results are due although no evaluation rewrote them."""
        return time.monotonic() - self.last_results > 60 * RESULTS_MINUTES

    def curves_are_old(self) -> bool:
        return time.monotonic() - self.last_curves > CURVES_SECONDS

    def write_results(
        self,
        config: Config,
        device: torch.device,
        corpus,
        memory_gb: dict,
        totals: dict,
        sample: dict | None,
        all_rows: bool = False,
    ) -> None:
        """Rewrites training_results.json: facts about the run, final metrics and history.

        `corpus` is the data.Corpus that the run is trained on. The history has all rows at a stop
        and at the end of a run (`all_rows`), and while it trains THINNED_ROWS at most.
        """
        # A failed attempt counts: the next one comes as late as after a successful one.
        self.last_results = time.monotonic()
        facts = dict(
            config=dataclasses.asdict(config),
            environment=self.side_work.value("environment", lambda: environment(device)),
            parameters=parameter_facts(config),
            data=data_facts(corpus),
            memory_gb=memory_gb,
            totals=totals,
            sample=sample,
            final_metrics=self.latest(),
        )
        if all_rows:
            lines = [json.dumps(row) for row in self.history]
        else:
            lines = self._thinned_lines()
        write_whole(self.folder / RESULTS, _results_text(facts, lines))

    def _thinned_lines(self) -> list[str]:
        """Some of the rows as lines of JSON, in their order; the newest row is among them."""
        kept: dict[int, str] = {}
        for rows in self.thinned.values():
            kept.update(rows.lines)
        if self.history:
            kept[len(self.history)] = json.dumps(self.history[-1])
        return [kept[index] for index in sorted(kept)]

    def note_curves(self) -> None:
        """An attempt to draw the curves counts like a success: the GPU waits for it as long."""
        self.last_curves = time.monotonic()


def _results_text(facts: dict, lines: list[str]) -> str:
    """The JSON of `facts` with one key more: `history`, a list of the lines.

    json.dumps with an indent is written in Python, and takes seconds for the rows of a long run.
    """
    text = json.dumps(facts, indent=1)
    rows = ",\n  ".join(lines)
    return text.removesuffix("\n}") + f',\n "history": [\n  {rows}\n ]\n}}'


# ---------------------------------------------------------------- files of a run


def set_aside(path: Path) -> Path | None:
    """Renames a file that would be written over to the first free name.1, name.2, ...

    Returns its new path, or None when there is no such file.
    """
    if not os.path.lexists(path):
        return None
    return path.rename(first_free_name(path))


def first_free_name(path: Path) -> Path:
    """The first of name.1, name.2, ... that no file has."""
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}.{number}")):
        number += 1
    return path.with_name(f"{path.name}.{number}")


def move_unreadable(path: Path, error: Exception) -> None:
    """Sets a file aside that cannot be read, and says so."""
    aside = set_aside(path)
    if aside is not None:
        warn(f"warning: {path} cannot be read ({cause_of(error)}); it is now {aside.name}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises OSError, which names the path.
    """
    if isinstance(content, str):
        content = content.encode()
    temporary = path.with_name(f".{path.name}.tmp")
    with path_named(path):
        try:
            # What is there already may be a pipe: opening it would wait without end.
            temporary.unlink(missing_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except BaseException:
            # What was written takes space that a full disk does not have.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


# ---------------------------------------------------------------- facts


def parameter_facts(config: Config) -> dict[str, int]:
    """The sizes of the model: in all, those that one token uses, and by group."""
    return dict(
        total=config.total_params,
        active=config.active_params,
        **config.parameter_groups,
    )


def data_identity(corpus) -> dict:
    """What a run that is resumed must find again: text, tokenizer, and version of the rules."""
    return dict(
        data_hash=corpus.data_hash, tokenizer_hash=corpus.tokenizer_hash, rules=corpus.rules
    )


def data_facts(corpus) -> dict:
    """What the run was trained on. `corpus` is a data.Corpus."""
    return dict(
        data_identity(corpus),
        train_tokens=len(corpus.train),
        validation_tokens=len(corpus.validation),
        unigram_entropy=corpus.unigram_entropy,
        unigram_cross_entropy=corpus.unigram_cross_entropy,
    )


def environment(device: torch.device) -> dict:
    """What the run ran on, as plain types."""
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name()
    return dict(
        command=shlex.join(sys.argv),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpu=gpu,
        platform=platform.platform(),
        cpus=os.cpu_count(),
        cpu_threads=torch.get_num_threads(),
    )


def _gpu_facts(device: torch.device) -> dict | None:
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    return dict(
        name=gpu.name,
        memory_gb=gpu.total_memory / GB,
        count=torch.cuda.device_count(),
        capability=f"{gpu.major}.{gpu.minor}",
    )


def start_facts(device: torch.device, side_work: SideWork, **facts) -> dict:
    """What this start of a run is made of, for run.json. `facts` are added as they are.

    What cannot be found out is None: a broken package beside the run is no reason to end it.
    """
    return dict(
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **facts,
        environment=side_work.value("environment", lambda: environment(device)),
        git=side_work.value("the state of git", git_state),
        gpu=side_work.value("the facts about the GPU", lambda: _gpu_facts(device)),
        packages=side_work.value("the list of packages", _packages),
    )


def earlier_starts(folder: Path) -> list[dict]:
    """The starts of the run that run.json holds, the oldest first.

    A file that cannot be read, or that this program did not write, is set aside.
    """
    path = folder / RUN
    if not os.path.lexists(path):
        return []
    try:
        return starts(read_run_file(path))
    except (OSError, ValueError) as error:
        move_unreadable(path, error)
        return []


def write_run_file(folder: Path, start: dict, earlier: list[dict]) -> None:
    """Writes run.json: this start of the run, and under `earlier` those before it."""
    *earlier, start = without_repeats(_with_each_diff_once([*earlier, start]))
    content = dict(start, earlier=earlier)
    write_whole(folder / RUN, json.dumps(content, indent=1))


def _with_each_diff_once(all_starts: list[dict]) -> list[dict]:
    """The starts, where a diff stands at the last start that has it, and is None at the others.

    Their diff_sha256 says which diff it was. Otherwise a run that is restarted a hundred times
    would have a hundred copies of it.
    """
    seen = set()
    found: list[dict] = []
    for start in reversed(all_starts):
        git = start.get("git")
        if isinstance(git, dict) and git.get("diff"):
            if git.get("diff_sha256") in seen:
                start = dict(start, git=dict(git, diff=None))
            seen.add(git.get("diff_sha256"))
        found.insert(0, start)
    return found


@functools.cache
def _packages() -> dict[str, str]:
    """The version of every installed package. Reading them all takes a quarter of a second.

    A package whose files are damaged or half removed is left out.
    """
    versions: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        try:
            name = found.metadata["Name"]
            version = found.version
        except Exception:  # whatever its files hold
            continue
        if isinstance(name, str) and isinstance(version, str):
            versions.setdefault(name, version)  # the first one is imported
    return dict(sorted(versions.items()))


def git_state() -> dict:
    """Commit of this program, whether its files are as committed, and how they differ.

    All values are None outside a git repository and without git.
    """
    commit = _git("rev-parse", "HEAD")
    diff = _git("diff", "HEAD")
    # A folder in which nothing is tracked is one name: a virtual environment has 30,000 files.
    untracked = _git(
        "ls-files", "--others", "--exclude-standard", "--directory", "--no-empty-directory"
    )
    if commit is None or diff is None:
        return dict(commit=None, clean=None, diff=None, diff_sha256=None, untracked=None)
    kept_diff = None
    if len(diff) <= LONGEST_DIFF:
        kept_diff = diff
    return dict(
        commit=commit.strip(),
        clean=not diff,
        diff=kept_diff,
        diff_sha256=hashlib.sha256(diff.encode()).hexdigest(),
        untracked=(untracked or "").splitlines(),
    )


def _git(*arguments: str) -> str | None:
    """What a git command prints in this program's folder; None when it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError:  # git is not installed
        return None
    if done.returncode != 0:
        return None
    return done.stdout
