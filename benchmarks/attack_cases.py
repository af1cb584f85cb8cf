"""The five kinds of case of the attack: what is done in a case, and what counts as a fault.

A case has a folder of its own, a copy of the base, and a random.Random. Its function returns a
Finding. The tensors that a disturbed run must end with are `expected`: those of a run that nothing
happened to.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from benchmarks.attack_commands import STEPS, STOPPED_AT, command_line, shown, train_words
from benchmarks.attack_damage import damaged_data, damaged_small_file, write_formats, write_text
from benchmarks.attack_programs import (
    OUTPUT,
    SIGNALS,
    Ended,
    Process,
    fork,
    last_step,
    run_forked,
    saved_step,
    stop_at,
    tensors_of,
)
from record.checkpoint import step_path

LONG_STEPS = 20  # of the runs that get signals and kills
LONG = train_words("long", LONG_STEPS)
MOST_DELAY = 0.06  # seconds after an event in which a signal or a kill comes: about a step
KILLED_TWICE = 0.3  # share of the killed runs whose resumed run is killed too

Tensors = dict[str, int]  # checksums by name
Expected = dict[str, Tensors]  # the tensors that an undisturbed run ends with, by the run's name


class Finding(NamedTuple):
    """What was done in a case, what became of it, and its fault, if it has one."""

    what: str
    output: str
    fault: str | None


def finding(what: str, ended: Ended, unsaved: bool = False) -> Finding:
    """What was done, and the fault of the program that `ended`.

    `unsaved` says that a run has lost something or has not come to the right end. It is the fault
    where the program has no other one.
    """
    fault = ended.fault()
    if fault is None and unsaved:
        fault = "unsaved"
    return Finding(what, f"{ended.output}\n(exit code {ended.code})", fault)


# ---------------------------------------------------------------- the base


def build_base(base: Path) -> Expected:
    """Makes what each case gets a copy of, and returns the tensors that undisturbed runs end with.

    text/            a corpus
    formats/         a whole file of each format
    tokenizer.json   trained on the corpus
    run/             a run of STEPS steps that a signal has stopped after STOPPED_AT
    exported/        an export of it

    The tensors are those of `run`, when it is finished, and of a run of LONG_STEPS steps. Raises
    RuntimeError when all this fails without any attack.
    """
    base.mkdir()
    write_text(base / "text")
    expected = {}
    for name, steps in dict(run=STEPS, long=LONG_STEPS).items():
        _must_end(0, run_forked(train_words(f"whole_{name}", steps), base))
        expected[name] = tensors_of(step_path(base / f"whole_{name}", steps), base)
        shutil.rmtree(base / f"whole_{name}")
    stop = functools.partial(stop_at, STOPPED_AT)
    _must_end(128 + signal.SIGTERM, run_forked(train_words("run", STEPS), base, action=stop))
    checkpoint = ["--checkpoint", "run/checkpoint_latest.pt"]
    export = ["tools.export_hf", *checkpoint, "--out", "exported"]
    _must_end(0, run_forked(export, base))
    [tokenizer] = base.glob("cache/*/tokenizer.json")
    shutil.copy(tokenizer, base)
    _must_end(0, fork(lambda: write_formats(base / "formats", tokenizer.read_text()), base))
    shutil.rmtree(base / "cache")  # the corpus of a case has another path, and so another cache
    (base / OUTPUT).unlink()  # a case's copy of it would hold what was printed here
    return expected


def _must_end(code: int, ended: Ended) -> None:
    """Raises RuntimeError unless a program ended with this exit code, and without a fault."""
    if ended.code != code or ended.fault():
        raise RuntimeError(f"the base cannot be made, exit code {ended.code}:\n{ended.output}")


# ---------------------------------------------------------------- odd and damaged inputs


def command_line_case(folder: Path, draw: Random, expected: Expected) -> Finding:
    argv = command_line(draw)
    return finding(shown(argv), run_forked(argv, folder))


def data_case(folder: Path, draw: Random, expected: Expected) -> Finding:
    damaged = damaged_data(folder, draw)
    return finding(damaged.shown(), run_forked(damaged.argv, folder))


def small_file_case(folder: Path, draw: Random, expected: Expected) -> Finding:
    run_forked(train_words("other", 1), folder)  # makes the cache
    (folder / OUTPUT).unlink()
    damaged = damaged_small_file(folder, draw)
    ended = run_forked(damaged.argv, folder)
    unsaved = False
    if damaged.must_finish:
        unsaved = ended.code != 0 or not _finished(folder, "run", STEPS, expected)
    return finding(damaged.shown(), ended, unsaved)


def _finished(folder: Path, run: str, steps: int, expected: Expected) -> bool:
    """Whether a run has ended with the tensors that the undisturbed one has."""
    return tensors_of(step_path(folder / run, steps), folder) == expected[run]


# ---------------------------------------------------------------- signals and lost outputs


class Moment(NamedTuple):
    """When something happens to a long run."""

    step: int  # after which step; 0: when the corpus begins to be tokenized
    delay: float  # in seconds

    def wait(self, process: Process) -> None:
        def happened() -> bool:
            if self.step == 0:
                # Tokenizing makes the cache's folder first. The run has none yet.
                return any(process.folder.glob("cache/*"))
            return last_step(process.folder / "long") >= self.step

        process.wait_until(happened)
        time.sleep(self.delay)

    def __str__(self) -> str:
        if self.step == 0:
            return f"{self.delay:.3f} s after tokenizing began"
        return f"{self.delay:.3f} s after step {self.step}"


def _draw_moment(draw: Random) -> Moment:
    step = draw.choice([0, LONG_STEPS, *range(1, LONG_STEPS)])
    return Moment(step, draw.uniform(0, MOST_DELAY))


def signal_case(folder: Path, draw: Random, expected: Expected) -> Finding:
    """A signal stops a run, or its output is lost while it works."""
    moment = _draw_moment(draw)
    # Plain signals are what happens most: three of eight cases.
    attack = draw.choice(
        [_stop, _stop, _stop, _interrupt_pipeline, _lose_reader, _lose_output, _ignore, _hang_up]
    )
    return attack(folder, draw, moment, expected)


def _stop(folder: Path, draw: Random, moment: Moment, expected: Expected) -> Finding:
    """A signal to the process, or to its group as a terminal sends it."""
    number = draw.choice(SIGNALS)
    group = draw.random() < 0.5
    process = Process(LONG, folder)
    moment.wait(process)
    process.send(number, group)
    ended = process.end()
    what = f"{number.name} {moment}; {shown(LONG)}"
    unsaved = ended.code not in (0, 128 + number)
    return _resume_stopped(folder, what, ended, unsaved, expected)


def _interrupt_pipeline(folder: Path, draw: Random, moment: Moment, expected: Expected) -> Finding:
    """Ctrl-C at a terminal where the output goes through tee, which the signal ends too."""
    process = Process(LONG, folder, shell='"$@" 2>&1 | tee log.txt')
    moment.wait(process)
    process.send(signal.SIGINT, whole_group=True)
    ended = process.end()
    what = f"SIGINT {moment}; {shown(LONG)} 2>&1 | tee log.txt"
    # The exit code is the shell's, and says nothing of the run.
    return _resume_stopped(folder, what, ended, unsaved=False, expected=expected)


def _hang_up(folder: Path, draw: Random, moment: Moment, expected: Expected) -> Finding:
    """The terminal of a run goes away."""
    ours, theirs = os.openpty()
    process = Process(LONG, folder, terminal=theirs)
    with open(folder / OUTPUT, "ab") as printed:
        reader = subprocess.Popen(["cat"], stdin=ours, stdout=printed, stderr=subprocess.DEVNULL)
    # The reader alone has the other end of the terminal now.
    os.close(theirs)
    os.close(ours)
    moment.wait(process)
    reader.kill()
    reader.wait()
    ended = process.end()
    what = f"the terminal goes away {moment}; {shown(LONG)}"
    unsaved = ended.code not in (0, 128 + signal.SIGHUP)
    return _resume_stopped(folder, what, ended, unsaved, expected)


def _resume_stopped(
    folder: Path, what: str, ended: Ended, unsaved: bool, expected: Expected
) -> Finding:
    """Resumes a run that was stopped. It must continue after the last step that it took.

    `unsaved` says that its exit code is not that of a run that has saved.
    """
    found = finding(what, ended, unsaved)
    if found.fault:
        return found
    taken = last_step(folder / "long")
    return _resume_and_finish(folder, what, taken, expected)


def _resume_and_finish(folder: Path, what: str, at_least: int, expected: Expected) -> Finding:
    """Resumes a long run, which must finish. `at_least` is the step that it must not have lost."""
    (folder / OUTPUT).unlink()  # a run that was killed twice has been resumed before
    ended = run_forked([*LONG, "--resume", "latest"], folder)
    found = re.search(r"Resuming .* at step (\d+)", ended.output)
    resumed_at = int(found[1]) if found else 0
    unsaved = ended.code != 0
    unsaved |= resumed_at < at_least
    unsaved |= not _finished(folder, "long", LONG_STEPS, expected)
    what += f"; resumed at step {resumed_at}, {at_least} had to be kept"
    return finding(what, ended, unsaved)


def _lose_reader(folder: Path, draw: Random, moment: Moment, expected: Expected) -> Finding:
    """The reader of the output stops reading."""
    lines = draw.choice([0, 1, 5, 20])
    pipe = draw.choice([f"2>&1 | head -n {lines}", f"| head -n {lines}", "| true", "2>&1 | true"])
    process = Process(LONG, folder, shell=f'"$@" {pipe}')
    return _must_finish(process, f"{shown(LONG)} {pipe}", expected)


def _lose_output(folder: Path, draw: Random, moment: Moment, expected: Expected) -> Finding:
    """An output is closed from the beginning, or its disk is full."""
    redirect = draw.choice([">&-", "2>&-", ">&- 2>&-", ">/dev/full", ">/dev/full 2>&1", "<&- >&-"])
    process = Process(LONG, folder, shell=f'exec "$@" {redirect}')
    return _must_finish(process, f"{shown(LONG)} {redirect}", expected)


def _ignore(folder: Path, draw: Random, moment: Moment, expected: Expected) -> Finding:
    """nohup: the run inherits that SIGHUP is ignored."""
    process = Process(LONG, folder, shell='trap "" HUP; exec "$@"')
    moment.wait(process)
    process.send(signal.SIGHUP)
    return _must_finish(process, f"SIGHUP {moment}; nohup {shown(LONG)}", expected)


def _must_finish(process: Process, what: str, expected: Expected) -> Finding:
    """Waits for a run that must reach its last step as if nothing had happened."""
    ended = process.end()
    unsaved = not _finished(process.folder, "long", LONG_STEPS, expected)
    return finding(what, ended, unsaved)


# ---------------------------------------------------------------- kills


def kill_case(folder: Path, draw: Random, expected: Expected) -> Finding:
    """SIGKILL to a run, sometimes to the resumed one too."""
    times = 2 if draw.random() < KILLED_TWICE else 1
    argv = LONG
    moments = []
    for _ in range(times):
        moment = _draw_moment(draw)
        process = Process(argv, folder)
        moment.wait(process)
        process.send(signal.SIGKILL, whole_group=True)
        ended = process.end()
        moments.append(str(moment))
        argv = [*LONG, "--resume", "latest"]
        if ended.fault():
            break
    what = f"killed {' and '.join(moments)}; {shown(LONG)}"
    if ended.fault():
        return finding(what, ended)
    return _resume_and_finish(folder, what, saved_step(folder / "long"), expected)


CaseFunction = Callable[[Path, Random, Expected], Finding]


class Kind(NamedTuple):
    """A kind of case, and how many of them the whole attack has."""

    run: CaseFunction
    cases: int


KINDS = dict(
    commands=Kind(command_line_case, 500),
    data=Kind(data_case, 200),
    files=Kind(small_file_case, 100),
    signals=Kind(signal_case, 20),
    kills=Kind(kill_case, 40),
)
