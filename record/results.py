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
from planner.plan import format_count
from plot import plot_training_curves

METRICS = "metrics.jsonl"
RESULTS = "training_results.json"
CURVES = "training_curves.png"
RUN = "run.json"

# A run without evaluations rewrites its results this often. They repeat the whole history.
RESULTS_MINUTES = 5
# Curves take a second or two, in which the GPU waits: they are drawn at most this often.
CURVES_SECONDS = 60
LONGEST_DIFF = 1_000_000  # characters of a diff that are kept

# Keys of a row whose value is a list, a dict or a text, and no number: `latest` leaves them out.
NOT_A_METRIC = ("expert_load", "grad_norm_spike", "sample")


class Record:
    """The metrics of one run: keeps their rows, and writes the three files that show them.

    metrics.jsonl has the rows, one a line. training_results.json and training_curves.png are made
    from all rows. `history` holds the rows, the oldest first. `track` is called with every new
    row: it sends the row to a tracker.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.history: list[dict] = []
        self.track: Callable[[dict], None] = lambda row: None
        # When the two files were last written; at the start there is nothing to write yet.
        self.last_results = time.monotonic()
        self.last_curves = time.monotonic()

    # ------------------------------------------------------------ rows

    def append(self, row: dict) -> None:
        """Adds a row. It is on its way to the disk and to the tracker when this returns."""
        self.history.append(row)
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.track(row)

    def load(self, folder: Path, step: int) -> None:
        """Reads the rows up to `step` that a run left in `folder`."""
        path = folder / METRICS
        if path.exists():
            self.history = [row for row in _rows(path) if row["step"] <= step]

    def begin(self) -> None:
        """Makes the file hold the history and nothing else. A file with more rows is set aside."""
        path = self.folder / METRICS
        rows_in_file = 0
        if path.exists():
            rows_in_file = len(_rows(path))
        dropped = rows_in_file - len(self.history)
        if dropped > 0:
            aside = set_aside(path)
            assert aside is not None  # the file is there: its rows were counted
            print(
                f"{dropped} rows of {METRICS} that are past the checkpoint are dropped; "
                f"the file as it was is {aside.name}"
            )
        if self.history:
            lines = [json.dumps(row) + "\n" for row in self.history]
            write_whole(path, "".join(lines))

    def evaluated(self, step: int) -> bool:
        """Whether the history has a validation loss at this step."""
        return any(row["step"] == step and "val_loss" in row for row in self.history)

    def latest(self) -> dict:
        """The last value of every metric that is a single number."""
        values = {}
        for row in self.history:
            for key, value in row.items():
                if key not in NOT_A_METRIC:
                    values[key] = value
        return values

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
    ) -> None:
        """Rewrites training_results.json: facts about the run, final metrics and history.

        `corpus` is the data.Corpus that the run is trained on.
        """
        content = dict(
            config=dataclasses.asdict(config),
            environment=environment(device),
            parameters=parameter_facts(config),
            data=data_facts(corpus),
            memory_gb=memory_gb,
            totals=totals,
            sample=sample,
            final_metrics=self.latest(),
            history=self.history,
        )
        write_whole(self.folder / RESULTS, json.dumps(content, indent=1))
        self.last_results = time.monotonic()

    def draw_curves(self, config: Config, unigram_cross_entropy: float) -> None:
        """Draws training_curves.png anew; whole or not at all."""
        total = format_count(config.total_params)
        active = format_count(config.active_params)
        plot_training_curves(
            self.history,
            self.folder / CURVES,
            title=f"{total} parameters, {active} active",
            unigram_cross_entropy=unigram_cross_entropy,
        )
        self.last_curves = time.monotonic()


def _rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl. A line that a crash cut short is passed over."""
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


# ---------------------------------------------------------------- files of a run


def run_files(folder: Path) -> list[Path]:
    """What a run has left in a folder."""
    found = []
    for name in (METRICS, RESULTS, CURVES, "checkpoint_latest.pt", RUN):
        if (folder / name).exists():
            found.append(folder / name)
    return found + sorted(folder.glob("checkpoint_step_*.pt"))


def set_aside(path: Path) -> Path | None:
    """Renames a file that would be written over to the first free name.1, name.2, ...

    Returns its new path, or None when there is no such file.
    """
    if not path.exists():
        return None
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.rename(path.with_name(f"{path.name}.{number}"))


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


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


def write_run_file(folder: Path, device: torch.device, **facts) -> None:
    """Writes run.json: what this start of the run is made of, and the starts before it.

    `facts` are added as they are. The starts before are under `earlier`, the oldest first.
    """
    path = folder / RUN
    earlier = _earlier_starts(path)
    content = dict(
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **facts,
        environment=environment(device),
        git=git_state(),
        gpu=_gpu_facts(device),
        packages=_packages(),
        earlier=earlier,
    )
    write_whole(path, json.dumps(content, indent=1))


@functools.cache
def _packages() -> dict[str, str]:
    """The version of every installed package. Reading them all takes a quarter of a second."""
    versions = [(found.name, found.version) for found in importlib.metadata.distributions()]
    return dict(sorted(versions))


def _earlier_starts(path: Path) -> list[dict]:
    """The starts that run.json holds; a file that this program did not write is set aside."""
    if not path.exists():
        return []
    try:
        last_start = json.loads(path.read_bytes())
        return [*last_start.pop("earlier"), last_start]
    except (ValueError, TypeError, AttributeError, KeyError):
        set_aside(path)
        return []


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
