"""How the attack runs the program: in a forked child, or as a process of its own.

A forked child starts in milliseconds, because its parent has imported torch and the program. It is
used where only the input is attacked. Where the process is attacked, by signals, pipes and kills,
it is a new process. Both run in the folder of their case, and write what they print into a file
there.
"""

import contextlib
import fcntl
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import termios
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import trainer
from benchmarks.result_files import ROOT
from engine.processes import signal_with_parent
from record import archive, checkpoint, results

OUTPUT = "output.txt"  # what the programs of a case print, in its folder
MEMORY = 8 * 10**9  # bytes of address space of a forked child, so that none fills the machine
FORKED_SECONDS = 45  # until a forked child that still works gets SIGTERM
STOP_SECONDS = 30  # from SIGTERM until a forked child counts as hanging
PROCESS_SECONDS = 120  # the limit of a process, its start and imports included
POLL_SECONDS = 0.005

# What a program must never print.
TRACES = ("Traceback (most recent call last)", "Fatal Python error", "Exception ignored in")
STOPPED = "Stopped at step"  # what a training says that a signal has ended
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Ended(NamedTuple):
    """How a program ended: its exit code (-N after signal N) and what it printed.

    `hung` says that it did not end in time, and was killed.
    """

    code: int
    output: str
    hung: bool = False

    def fault(self) -> str | None:
        """The kind of fault that is seen from outside, or None."""
        if self.hung:
            return "hang"
        if any(trace in self.output for trace in TRACES):
            return "traceback"
        if self.code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE):
            return "traceback"
        # An error has a line that says so. `plan` says "does not fit" in its answer instead.
        if self.code > 0 and not self.output.strip():
            return "traceback"
        return None


# ---------------------------------------------------------------- forked children


def import_programs() -> None:
    """Imports what forked children need, so that no child has to."""
    for module in ("plot", "tools.evaluate", "tools.export_hf", "tools.import_hf"):
        importlib.import_module(module)


def run_forked(argv: list[str], folder: Path, action: Callable | None = None) -> Ended:
    """Runs a command line of the program in a forked child, in `folder`.

    `action` is called first, in the child.
    """

    def program() -> None:
        trainer.plot_training_curves = _draw_nothing
        if action is not None:
            action()
        run_module(argv)

    return fork(program, folder)


def run_module(argv: list[str]) -> None:
    """What `python -m MODULE ARGUMENTS` does."""
    module, *arguments = argv
    script = str(script_of(module))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def script_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def _draw_nothing(*_arguments, **_options) -> None:
    """Stands for plot.plot_training_curves, which takes longer than all the rest of a small run."""


def fork(program: Callable[[], None], folder: Path) -> Ended:
    """Calls `program` in a forked child, and waits for its end.

    After FORKED_SECONDS the child gets SIGTERM. To train for so long is no fault: a training must
    then stop and say so. Any other program has hung.
    """
    output = folder / OUTPUT
    child = os.fork()
    if child == 0:
        _become_program(program, folder, output)
    code = _wait_for(child, FORKED_SECONDS)
    hung = False
    if code is None:
        os.kill(child, signal.SIGTERM)
        code = _wait_for(child, STOP_SECONDS)
        hung = code is None or STOPPED not in _read(output)
    _kill_group(child)
    if code is None:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, _read(output), hung)


def _become_program(program: Callable[[], None], folder: Path, output: Path) -> None:
    """Turns a forked child into a program of its own. It never returns."""
    code = 70  # of a failure before `program` is called or after it
    try:
        os.setsid()  # a group of its own, with the workers that it starts
        signal_with_parent(signal.SIGKILL)
        default_signals()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(folder)
        os.environ["HOME"] = str(folder)
        printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        # New ones, because those of the parent may hold text that is not written yet.
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(
            2, "w", buffering=1, errors="backslashreplace", closefd=False
        )
        program()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _wait_for(child: int, seconds: float) -> int | None:
    """The exit code of a child, or None if it has not ended in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS)
    return None


def default_signals() -> None:
    """Python's handlers of a new process. A shell lets a job in the background ignore SIGINT."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _kill_group(leader: int) -> None:
    """Ends what is left of the group of a program that has a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _read(output: Path) -> str:
    if not output.exists():
        return ""
    return output.read_bytes().decode(errors="backslashreplace")


# ---------------------------------------------------------------- processes


class Process:
    """A command line of the program in a process of its own, with its own session.

    What it prints goes into the file OUTPUT of `folder`. `shell` is a command of bash instead,
    which has the command line in "$@" and may redirect its output. `terminal` is the end of a
    pseudo terminal, which then controls the process and takes its output.
    """

    def __init__(self, argv: list[str], folder: Path, shell: str = "", terminal: int | None = None):
        self.folder = folder
        module, *arguments = argv
        command = [sys.executable, str(script_of(module)), *arguments]
        if shell:
            command = ["bash", "-c", shell, "bash", *command]
        with open(folder / OUTPUT, "ab") as printed:
            output = printed if terminal is None else terminal
            self.popen = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "HOME": str(folder)},
                start_new_session=True,
                preexec_fn=_end_with_parent if terminal is None else _take_terminal,
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=output,
                stderr=output,
            )

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Waits for an event. False if the process ended before it, or PROCESS_SECONDS passed."""
        deadline = time.monotonic() + PROCESS_SECONDS
        while not happened():
            if self.popen.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def send(self, number: int, whole_group: bool = False) -> None:
        """Sends a signal to the process, or to all of its group as a terminal does."""
        if self.popen.poll() is not None:
            return
        if whole_group:
            os.killpg(self.popen.pid, number)
        else:
            os.kill(self.popen.pid, number)

    def end(self) -> Ended:
        """Waits for the end, and kills what has not ended in time."""
        hung = False
        try:
            self.popen.wait(PROCESS_SECONDS)
        except subprocess.TimeoutExpired:
            hung = True
        _kill_group(self.popen.pid)
        return Ended(self.popen.wait(), _read(self.folder / OUTPUT), hung)


def _end_with_parent() -> None:
    """For a child: it is killed when the attack itself ends."""
    signal_with_parent(signal.SIGKILL)


def _take_terminal() -> None:
    """For a child of a new session: makes its standard input the terminal that controls it.

    Then it gets SIGHUP when the terminal goes away.
    """
    _end_with_parent()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


# ---------------------------------------------------------------- what a run leaves


def last_step(run: Path) -> int:
    """The last step of which a run has written a row of metrics; 0 before the first."""
    step = 0
    try:
        lines = (run / results.METRICS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    for line in lines:
        if line.endswith(b"\n"):  # the last line may be half written
            step = json.loads(line).get("step", step)
    return step


def saved_step(run: Path) -> int:
    """The highest step of a numbered checkpoint in a folder; 0 if there is none."""
    steps = [int(path.stem.rpartition("_")[2]) for path in run.glob("checkpoint_step_*.pt")]
    return max(steps, default=0)


def stop_at(step: int) -> None:
    """Makes a training of this process see SIGTERM while it takes a step."""
    train_step = trainer.Trainer.train_step

    def stopped_step(self, batches):
        if self.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self, batches)

    trainer.Trainer.train_step = stopped_step


def tensors_of(file: Path, folder: Path) -> dict[str, int]:
    """The checksum of each tensor in a checkpoint. Empty if the file cannot be read."""
    answer = folder / "checksums.json"
    answer.unlink(missing_ok=True)

    def write_checksums() -> None:
        state = checkpoint.load(file)
        tensors, _ = archive.split(dict(model=state["model"], optimizer=state["optimizer"]))
        answer.write_text(json.dumps(archive.checksums(tensors, plain={})))

    fork(write_checksums, folder)
    if not answer.exists():
        return {}
    return json.loads(answer.read_text())
