"""Runs lm-evaluation-harness on the exported folder of a checkpoint.

    python -m benchmarks.harness --checkpoint checkpoints/checkpoint_latest.pt

Its task is that of tools/lm_eval_tasks, which needs no network. The result file is
benchmarks/results/lm_eval_cpu.json: what lm_eval reports, and the loss of tools.evaluate beside it.
lm_eval must be installed: pip install 'lm_eval[hf]'.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # before the imports below: slow, and they fail without their packages
    from cli import exit_at_a_wrong_path
    from config import explain_missing_packages

    explain_missing_packages()
    exit_at_a_wrong_path(sys.argv[1:])

import torch

from benchmarks.result_files import ROOT, write
from cli import exit_code, new_parser
from config import ExperimentError
from record.results import environment

TASK = "python_syntax"


def run_module(module: str, arguments: list[str]) -> str:
    """What `python -m MODULE` prints. Raises ExperimentError with its last line of stderr."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise ExperimentError(_failure_message(module, done.stderr))
    return done.stdout


def _failure_message(module: str, stderr: str) -> str:
    lines = stderr.strip().splitlines() or ["it gave no reason"]
    return f"{module} failed: {lines[-1]}. lm_eval comes with pip install 'lm_eval[hf]'"


def export_arguments(checkpoint: Path, model: Path) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--out", str(model), "--dtype", "fp32"]


def lm_eval_arguments(model: str, out: str) -> list[str]:
    arguments = ["--model", "hf"]
    arguments += ["--model_args", f"pretrained={model},dtype=float32"]
    arguments += ["--tasks", TASK]
    arguments += ["--include_path", "tools/lm_eval_tasks"]
    arguments += ["--device", "cpu"]
    arguments += ["--output_path", out]
    return arguments


def lm_eval_report(checkpoint: Path) -> dict:
    """The report that lm_eval writes about the exported checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "my_model"
        out = folder / "out"
        run_module("tools.export_hf", export_arguments(checkpoint, model))
        run_module("lm_eval", lm_eval_arguments(str(model), str(out)))
        [report] = out.rglob("results_*.json")
        return json.loads(report.read_text())


def own_evaluation(checkpoint: Path) -> dict:
    """What tools.evaluate measures of the same checkpoint."""
    arguments = ["--checkpoint", str(checkpoint), "--json", "--device", "cpu"]
    found = json.loads(run_module("tools.evaluate", arguments))
    del found["checkpoint"]  # the path on this machine
    return found


def main(argv: list[str]) -> None:
    parser = new_parser("python -m benchmarks.harness --checkpoint PATH", __doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint file of a run")
    # The modules run in the repository's folder, wherever this command was called.
    checkpoint = Path(parser.parse(argv).checkpoint).absolute()
    report = lm_eval_report(checkpoint)
    write(
        "lm_eval",
        report["results"][TASK]["acc,none"],
        f"accuracy in {TASK}",
        1,
        environment(torch.device("cpu")),
        dict(
            lm_eval=importlib.metadata.version("lm_eval"),
            transformers=report["transformers_version"],
            one_liner=" ".join(["lm_eval", *lm_eval_arguments("my_model", "out")]),
            results=report["results"],
            n_samples=report["n-samples"],
            evaluate=own_evaluation(checkpoint),
        ),
        command="python -m benchmarks.harness --checkpoint checkpoints/checkpoint_latest.pt",
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
