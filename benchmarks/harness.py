"""Runs lm-evaluation-harness on a checkpoint's exported folder, with the task in tools/lm_eval_tasks, which needs no network.

    python -m benchmarks.harness --checkpoint checkpoints/checkpoint_latest.pt

Writes benchmarks/results/lm_eval_cpu.json, with what lm_eval reports and the loss of tools.evaluate beside it. It needs
pip install 'lm_eval[hf]'.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.result_files import ROOT, write
from cli import exit_code, new_parser
from config import ExperimentError
from record.results import environment

TASK = "python_syntax"


def run(module: str, *arguments: str) -> str:
    """What `python -m module` prints; raises ExperimentError with the end of its complaint when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise ExperimentError(
            f"{module} failed: {done.stderr.strip().splitlines()[-1]}. lm_eval comes with pip install 'lm_eval[hf]'"
        )
    return done.stdout


def main(argv: list[str]) -> None:
    parser = new_parser("python -m benchmarks.harness --checkpoint PATH", __doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint file of a run")
    path = os.path.abspath(parser.parse(argv).checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        run(
            "tools.export_hf",
            "--checkpoint",
            path,
            "--out",
            f"{folder}/my_model",
            "--dtype",
            "fp32",
        )
        command = [
            "--model",
            "hf",
            "--model_args",
            f"pretrained={folder}/my_model,dtype=float32",
            "--tasks",
            TASK,
            "--include_path",
            "tools/lm_eval_tasks",
            "--device",
            "cpu",
            "--output_path",
            f"{folder}/out",
        ]
        run("lm_eval", *command)
        [report] = Path(folder, "out").rglob("results_*.json")
        theirs = json.loads(report.read_text())
    ours = json.loads(run("tools.evaluate", "--checkpoint", path, "--json", "--device", "cpu"))
    del ours["checkpoint"]
    write(
        "lm_eval",
        theirs["results"][TASK]["acc,none"],
        f"accuracy in {TASK}",
        1,
        environment(torch.device("cpu")),
        dict(
            lm_eval=importlib.metadata.version("lm_eval"),
            transformers=theirs["transformers_version"],
            one_liner="lm_eval " + " ".join(command).replace(folder + "/", ""),
            results=theirs["results"],
            n_samples=theirs["n-samples"],
            evaluate=ours,
        ),
        "python -m benchmarks.harness --checkpoint checkpoints/checkpoint_latest.pt",
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
