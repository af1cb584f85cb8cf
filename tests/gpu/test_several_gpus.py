"""Two GPUs train as one does. A race gives wrong gradients on GPUs alone: the norms tell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--preset",
    "small",
    "--n_layers",
    "4",
    "--batch_size",
    "2",
    "--gradient_accumulation_steps",
    "8",
    "--max_steps",
    "6",
    "--log_every",
    "1",
    "--eval_every",
    "6",
    "--eval_steps",
    "1",
    "--save_every",
    "0",
    "--save_minutes",
    "0",
    "--sample_tokens",
    "0",
]


def rows(folder: Path, *options: str) -> list[dict]:
    """The rows of training metrics of a run with these options."""
    command = [sys.executable, "run_experiment.py", *OPTIONS, "--save_dir", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train_loss" in row]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "precision, loss_tolerance, norm_tolerance",
    [("fp32", 1e-4, 1e-3), ("bf16", 2e-3, 2e-2), ("fp16", 2e-3, 2e-2)],
)
def test_losses_and_norms_of_two_gpus_are_those_of_one(
    precision, loss_tolerance, norm_tolerance, tmp_path
):
    precision_option = ("--precision", precision, "--cache_dir", str(tmp_path / "cache"))
    alone = rows(tmp_path / "alone", *precision_option)
    for reduce in ("step", "micro_batch"):
        folder = tmp_path / reduce
        together = rows(folder, *precision_option, "--gpus", "2", "--reduce_gradients", reduce)
        assert len(together) == len(alone)
        for row, expected in zip(together, alone):
            for key, tolerance in (("train_loss", loss_tolerance), ("grad_norm", norm_tolerance)):
                assert row[key] == pytest.approx(expected[key], rel=tolerance), (
                    reduce,
                    row["step"],
                )
