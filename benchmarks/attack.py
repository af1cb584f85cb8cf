"""Attacks the program, and counts what it must never do.

    python -m benchmarks.attack --seed 1
    python -m benchmarks.attack --seed 1 --only kills --case 17   this case again, with its output

Five kinds of case: odd command lines, damaged data, damaged files beside a run, signals and lost
outputs, kills. Three kinds of fault:

traceback   a Python traceback, a crash, or a failure without a word
hang        a program that does not end within seconds, SIGTERM included
unsaved     a run that does not survive a signal, a lost output, a kill or a damaged file: it cannot
            be resumed, loses steps that it had saved, or ends with other tensors than a run that
            nothing happened to

Every case has a folder of its own in one temporary folder. What happens in it is drawn from the
seed, the kind and the number of the case. The moments of signals and kills are drawn too; what the
program does in such a moment also depends on the speed of the machine.

Writes benchmarks/results/attack_cpu.json, unless only a part of the cases runs. The exit code is 1
when there was a fault.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import NamedTuple

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

# Before torch is imported. Only a process without further threads can be forked safely, and the
# cores are busy with several cases.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # a drawn name of a data set must not be downloaded

import torch

from benchmarks.attack_cases import KINDS, Expected, build_base
from benchmarks.attack_programs import default_signals, import_programs
from benchmarks.result_files import write
from cli import exit_code, new_parser
from config import ConfigError, nearest
from planner.machine import cpu_cores
from record.results import environment

FAULTS = ("traceback", "hang", "unsaved")
OUTPUT_LINES = 15  # of a failed case that are shown


class Case(NamedTuple):
    """A case: all that happens in it is drawn from these three."""

    seed: int
    kind: str
    number: int

    def command(self) -> str:
        """The command that repeats this case alone."""
        return (
            f"python -m benchmarks.attack --seed {self.seed} --only {self.kind} "
            f"--case {self.number}"
        )


class Outcome(NamedTuple):
    """What became of a case."""

    case: Case
    what: str  # what was done
    output: str
    fault: str | None  # one of FAULTS
    seconds: float


def run_case(case: Case, base: Path, expected: Expected) -> Outcome:
    """Runs one case in a new copy of the base, which is deleted afterwards."""
    start = time.perf_counter()
    folder = base.parent / f"{case.kind}-{case.number}"
    shutil.copytree(base, folder)
    draw = Random(f"{case.seed} {case.kind} {case.number}")
    found = KINDS[case.kind].run(folder, draw, expected)
    shutil.rmtree(folder)
    seconds = time.perf_counter() - start
    return Outcome(case, found.what, found.output, found.fault, seconds)


def run_cases(cases: list[Case]) -> list[Outcome]:
    """Runs the cases, as many at a time as there are cores, and prints each that fails."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        folder = Path(name)
        # Matplotlib's list of fonts is made once, not in every case.
        os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
        base = folder / "base"
        expected = build_base(base)
        arguments = [(case, base, expected) for case in cases]
        with multiprocessing.get_context("fork").Pool(cpu_cores()) as pool:
            for outcome in pool.imap_unordered(_run_case, arguments):
                outcomes.append(outcome)
                _report(outcome, len(outcomes), len(cases))
    return outcomes


def _run_case(arguments: tuple[Case, Path, Expected]) -> Outcome:
    return run_case(*arguments)


def _report(outcome: Outcome, done: int, cases: int) -> None:
    if outcome.fault:
        print(f"\n{outcome.fault}: {outcome.case.command()}\n{outcome.what}")
        print("\n".join(outcome.output.splitlines()[-OUTPUT_LINES:]))
    if done % 50 == 0 or done == cases:
        print(f"{done} of {cases} cases done", flush=True)


# ---------------------------------------------------------------- counting


def counts(outcomes: Iterable[Outcome]) -> dict[str, dict]:
    """Cases, faults of each kind and seconds, by kind of case."""
    found = {}
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.case.kind == kind]
        if not of_kind:
            continue
        faults = [outcome.fault for outcome in of_kind]
        found[kind] = dict(cases=len(of_kind))
        for fault in FAULTS:
            found[kind][fault] = faults.count(fault)
        found[kind]["longest_seconds"] = max(outcome.seconds for outcome in of_kind)
    return found


def print_counts(found: dict[str, dict]) -> None:
    for kind, numbers in found.items():
        faults = ", ".join(f"{numbers[fault]} {fault}" for fault in FAULTS)
        print(
            f"{kind:10} {numbers['cases']:5} cases: {faults}; "
            f"the longest took {numbers['longest_seconds']:.0f} s"
        )


# ---------------------------------------------------------------- the command


def drawn_cases(seed: int, only: str | None, number: int | None, most: int | None) -> list[Case]:
    """The cases that the options choose: of all kinds or `only` one, and of each the first `most`.

    With a `number` it is one case of the kind `only`.
    """
    kinds = KINDS
    if only is not None:
        if only not in KINDS:
            raise ConfigError(f"--only {only}: there is no such kind.{nearest(only, KINDS)}")
        kinds = {only: KINDS[only]}
    elif number is not None:
        raise ConfigError("--case needs --only, the kind of the case")
    if number is not None:
        return [Case(seed, only, number)]
    cases = []
    for name, kind in kinds.items():
        count = kind.cases if most is None else min(most, kind.cases)
        cases += [Case(seed, name, i) for i in range(count)]
    return cases


def main(argv: list[str]) -> None:
    parser = new_parser("python -m benchmarks.attack [--seed N] [--only KIND [--case K]]", __doc__)
    parser.add_argument("--seed", type=int, default=1, help="what all cases are drawn from [1]")
    parser.add_argument("--only", metavar="KIND", help="one kind of: " + ", ".join(KINDS))
    parser.add_argument("--case", type=int, metavar="K", help="one case of that kind, from 0")
    parser.add_argument("--cases", type=int, metavar="N", help="at most N cases of each kind")
    args = parser.parse(argv)
    cases = drawn_cases(args.seed, args.only, args.case, args.cases)
    default_signals()
    import_programs()
    start = time.perf_counter()
    outcomes = run_cases(cases)
    found = counts(outcomes)
    if args.case is not None:
        print(f"{outcomes[0].what}\n{outcomes[0].output}")
    print_counts(found)
    faults = sum(outcome.fault is not None for outcome in outcomes)
    if args.only is None and args.cases is None:
        write(
            "attack",
            value=faults,
            unit=f"faults in {len(cases):,} cases",
            repetitions=1,
            machine=environment(torch.device("cpu")),
            details=dict(seed=args.seed, seconds=time.perf_counter() - start, kinds=found),
            command=f"python -m benchmarks.attack --seed {args.seed}",
        )
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
