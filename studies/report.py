"""Writes the tables of docs/findings.md from studies/NAME/results.json.

    python -m studies.report
    python -m studies.report FOLDER     prints the tables of the study in another folder

A table stands between the marks <!-- study NAME --> and <!-- end -->. The sentences around it are
written by hand. A value of several runs is their mean ± half of their spread (the largest minus the
smallest). The speed of a run is the median of its steps. Losses are in nats per token.
"""

import functools
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

from benchmarks.tables import rewrite
from cli import exit_code, new_parser
from config import ConfigError
from studies.grids import STUDIES
from studies.reports.balance import balance
from studies.reports.budget import budget
from studies.reports.checkpointing import checkpointing
from studies.reports.losses import losses
from studies.reports.optimizer import optimizer
from studies.reports.routing import routing
from studies.reports.scaling import scaling
from studies.reports.specialization import specialization

ROOT = Path(__file__).resolve().parent.parent


REPORTS = dict(
    optimizer=optimizer,
    routing=routing,
    balance=balance,
    specialization=specialization,
    scaling=scaling,
    checkpointing=checkpointing,
)


def question(name: str) -> str:
    """The first sentence of a study's docstring; the study's name if it has none."""
    text = getattr(STUDIES.get(name), "__doc__", None) or name
    one_line = " ".join(text.split())
    # Up to the first full stop or question mark that a space or the end follows
    return re.match(r".*?(?:[.?](?= |$)|$)", one_line)[0]


def block(name: str, folder: Path) -> str:
    """The tables of the study in `folder`, or the command that runs or continues it."""
    if not (folder / "results.json").exists():
        return f"Not run yet: `python -m studies.run {name}`."
    results = json.loads((folder / "results.json").read_text())
    if results["study"] != name:
        raise ValueError(f"{folder / 'results.json'} is of the study {results['study']}")
    drawn = (folder / "figure.png").exists()
    parts = []
    if not (results["finished"] and drawn):
        runs = f"{len(results['runs'])} runs so far"
        parts.append(f"Not finished ({runs}). Continue with `{_command(name, folder, results)}`.")
    if drawn:
        parts += [REPORTS.get(name, losses)(results), budget(results)]
    return "\n\n".join(parts)


def section(name: str, folder: Path) -> str:
    """What `python -m studies.report FOLDER` prints: the question, the figure and the tables."""
    parts = [f"### {question(name)}"]
    if (folder / "figure.png").exists():
        parts.append(f"![{question(name)}]({folder / 'figure.png'})")
    return "\n\n".join([*parts, block(name, folder)])


def _command(name: str, folder: Path, results: dict) -> str:
    """The command that continues a study."""
    command = ["python", "-m", "studies.run", name, "--tokens", format(results["tokens"], ".15g")]
    seeds = max((run["changes"]["seed"] for run in results["runs"].values()), default=1)
    if seeds > 2:
        command += ["--seeds", str(seeds)]
    if folder != ROOT / "studies" / name:
        command += ["--out", str(folder)]
    return shlex.join([*command, *results["options"]])


def blocks(folder: Path = ROOT / "studies") -> dict[str, Callable[[], str]]:
    """The function that makes the tables of a study, by the name in the study's mark."""
    return {f"study {name}": functools.partial(block, name, folder / name) for name in STUDIES}


def main(argv: list[str]) -> None:
    parser = new_parser("python -m studies.report [FOLDER]", __doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse(argv).folder
    if folder is None:
        rewrite(blocks())
        return
    if not (folder / "results.json").exists():
        raise ConfigError(_no_results_message(folder))
    name = json.loads((folder / "results.json").read_text())["study"]
    print(section(name, folder))


def _no_results_message(folder: Path) -> str:
    message = f"there is no results.json in {folder}: name the folder of a study, its --out"
    # The user may have given the name of a committed study, which is a folder of studies/.
    committed = ROOT / "studies" / folder
    if (committed / "results.json").exists():
        message += f", such as {committed}"
    return message


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
