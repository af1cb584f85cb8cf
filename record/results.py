"""What a run writes down about itself: lines of metrics, results, curves, measured memory, the machine it ran on."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from engine.offload import OptimizerState
from planner.machine import GB, process_memory_gb
from planner.plan import memory_table
from plot import plot_training_curves

METRICS, RESULTS, CURVES, RUN = (
    "metrics.jsonl",
    "training_results.json",
    "training_curves.png",
    "run.json",
)
LONGEST_DIFF = 1_000_000  # characters of a diff that are kept


class Record:
    """The rows of metrics.jsonl, in memory (`history`) and in the run's folder, and what is made of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.history: list[dict] = []
        self.track = lambda row: None

    def append(self, row: dict) -> None:
        """Adds a row; it is on its way to the disk when this returns, and to the tracker."""
        self.history.append(row)
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.track(row)

    def load(self, folder: Path, step: int) -> None:
        """Reads the rows up to `step` that a run left in `folder`; a line that a crash cut short is passed over."""
        if (folder / METRICS).exists():
            self.history = [row for row in _rows(folder / METRICS) if row["step"] <= step]

    def begin(self) -> None:
        """Makes the file hold the history and nothing else; a file with more rows is set aside."""
        path = self.folder / METRICS
        there = _rows(path) if path.exists() else []
        if len(there) > len(self.history):
            print(
                f"{len(there) - len(self.history)} rows of {METRICS} that are past the checkpoint are dropped; the file as "
                f"it was is {set_aside(path).name}"
            )
        if self.history:
            temporary = path.with_name(f".{METRICS}.tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.history))
            os.replace(temporary, path)

    def evaluated(self, step: int) -> bool:
        return any(row["step"] == step and "val_loss" in row for row in self.history)

    def latest(self) -> dict:
        """The last value of every metric that is a single number."""
        values: dict = {}
        for row in self.history:
            values.update(
                {
                    k: v
                    for k, v in row.items()
                    if k not in ("expert_load", "grad_norm_spike", "sample")
                }
            )
        return values

    def write_results(self, facts: dict) -> None:
        """Rewrites training_results.json: the facts, final metrics and history; whole or not at all."""
        temporary = self.folder / f".{RESULTS}.tmp"
        temporary.write_text(
            json.dumps(facts | dict(final_metrics=self.latest(), history=self.history), indent=1)
        )
        os.replace(temporary, self.folder / RESULTS)

    def draw_curves(self, title: str, unigram_entropy: float) -> None:
        """Draws training_curves.png anew; whole or not at all."""
        plot_training_curves(
            self.history, self.folder / CURVES, title=title, unigram_entropy=unigram_entropy
        )


def _rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def run_files(folder: Path) -> list[Path]:
    """What a run has left in a folder."""
    names = (METRICS, RESULTS, CURVES, "checkpoint_latest.pt", RUN)
    return [p for name in names if (p := folder / name).exists()] + sorted(
        folder.glob("checkpoint_step_*.pt")
    )


def set_aside(path: Path) -> Path | None:
    """Renames a file that would be written over to the first free name.1, name.2, ...; None when there is none."""
    if not path.exists():
        return None
    number = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.{n}").exists())
    return path.rename(path.with_name(f"{path.name}.{number}"))


class MemoryMeter:
    """Peaks of the forward and backward pass and of the optimizer step, as the memory plan names them."""

    def __init__(self, device: torch.device, predicted: dict, capacity_gb: float):
        self.gpu, self.predicted, self.capacity_gb = device.type == "cuda", predicted, capacity_gb
        self.steps, self.backward_gb, self.peak_gb = 0, 0.0, 0.0
        self.measured_gb: dict | None = None

    def note(self, phase: str) -> bool:
        """Call after each "backward" and each "optimizer" phase; True once, after the third step of this process, when
        the peaks are those of steps in which everything was there already."""
        peak = torch.cuda.max_memory_allocated() / GB if self.gpu else process_memory_gb()[1]
        self.peak_gb = max(self.peak_gb, peak)
        if self.gpu and self.steps in (1, 2):
            torch.cuda.reset_peak_memory_stats()
        if phase == "backward":
            self.backward_gb = peak
            return False
        self.optimizer_gb = peak
        self.steps += 1
        return self.steps == 3

    def table(
        self,
        parameters: list[Tensor],
        muon: OptimizerState,
        adamw: OptimizerState,
        host_gradients: dict[str, Tensor],
    ) -> str:
        """Predicted and measured memory side by side. On a CPU only what stays is known exactly, and the whole process."""
        state = {
            "master": [
                s["residual"] for o in (muon, adamw) for s in o.tensors.values() if "residual" in s
            ],
            "momentum": [s["momentum"] for s in muon.tensors.values()],
            "adamw": [t for s in adamw.tensors.values() for k, t in s.items() if k != "residual"],
        }
        state = {k: sum(t.nbytes for t in tensors) / GB for k, tensors in state.items()}
        sizes = dict(
            weights=sum(p.nbytes for p in parameters) / GB,
            gradients=sum(p.grad.nbytes for p in parameters if p.grad is not None) / GB,
            **{k: 0.0 if muon.offload else v for k, v in state.items()},
        )
        if self.gpu:
            sizes |= dict(
                activations=self.backward_gb - sum(sizes.values()),
                workspace=max(0.0, self.optimizer_gb - self.backward_gb),
            )
            sizes["total"] = sum(sizes.values())
        sizes["host"] = (
            sum(state.values()) + sum(t.nbytes for t in host_gradients.values()) / GB
            if muon.offload
            else 0.0
        )
        self.measured_gb = sizes
        table = memory_table(self.predicted, sizes, self.capacity_gb)
        return (
            table
            if self.gpu
            else f"{table}\nThe whole process: {self.peak_gb:.3f} GB of RAM at its peak"
        )

    def now(self) -> dict:
        """The memory columns of a row of metrics, in GB: PyTorch's allocator on a GPU, else the process's resident memory."""
        if self.gpu:
            now = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            return dict(
                memory_allocated_gb=now[0] / GB,
                memory_reserved_gb=now[1] / GB,
                memory_peak_gb=self.peak_gb,
            )
        resident, self.peak_gb = process_memory_gb()
        return dict(
            memory_allocated_gb=resident, memory_reserved_gb=None, memory_peak_gb=self.peak_gb
        )


def environment(device: torch.device) -> dict:
    """What the run ran on, as plain types."""
    return dict(
        command=shlex.join(sys.argv),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
        platform=platform.platform(),
        cpus=os.cpu_count(),
        cpu_threads=torch.get_num_threads(),
    )


def write_run_file(folder: Path, device: torch.device, **facts) -> None:
    """Writes run.json: what this start of the run is made of, and under `earlier` what the starts before it were."""
    path = folder / RUN
    earlier = []
    if path.exists():
        try:
            before = json.loads(path.read_bytes())
            earlier = [*before.pop("earlier"), before]
        except (ValueError, AttributeError, KeyError):  # not what was written here: it is not lost
            set_aside(path)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    facts = dict(
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **facts,
        environment=environment(device),
        git=git_state(),
        gpu=gpu
        and dict(
            name=gpu.name,
            memory_gb=gpu.total_memory / GB,
            count=torch.cuda.device_count(),
            capability=f"{gpu.major}.{gpu.minor}",
        ),
        packages=dict(sorted((d.name, d.version) for d in importlib.metadata.distributions())),
        earlier=earlier,
    )
    temporary = folder / f".{RUN}.tmp"
    temporary.write_text(json.dumps(facts, indent=1))
    os.replace(temporary, path)


def git_state() -> dict:
    """Commit of this program, whether its files are as committed, and how they differ; nulls outside a git repository."""

    def git(*arguments: str) -> str | None:
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
        return done.stdout if done.returncode == 0 else None

    commit, diff, untracked = (
        git("rev-parse", "HEAD"),
        git("diff", "HEAD"),
        git("ls-files", "--others", "--exclude-standard"),
    )
    if commit is None or diff is None:
        return dict(commit=None, clean=None, diff=None, diff_sha256=None, untracked=None)
    return dict(
        commit=commit.strip(),
        clean=not diff,
        diff=diff if len(diff) <= LONGEST_DIFF else None,
        diff_sha256=hashlib.sha256(diff.encode()).hexdigest(),
        untracked=(untracked or "").splitlines(),
    )
