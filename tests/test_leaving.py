"""How a run ends when its output or its terminal goes away, and when signals come.

Most runs here are forks: a fork starts in milliseconds, a new interpreter needs seconds to import.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import data
import run_experiment
import trainer
from benchmarks import result_files
from cli import exit_code
from corpus import token_writer
from record import checkpoint, console, results, stop
from tests.training import SMALL, build, no_pictures, rows, settings, text

__all__ = ["no_pictures", "settings", "text"]  # fixtures

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = dict(max_steps=100_000, save_every=50_000, num_workers=1)
SHORT = dict(max_steps=4, save_every=4, log_every=2)
ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def handlers():
    """Python's own handlers of the signals, also where the tests were started with nohup."""
    own = [signal.default_int_handler] + [signal.SIG_DFL] * 3
    before = [signal.signal(number, handler) for number, handler in zip(ALL, own)]
    yield own
    for number, handler in zip(ALL, before):
        signal.signal(number, handler)


# ---------------------------------------------------------------- runs in processes of their own


def arguments(text: Path, folder: Path, **changes) -> list[str]:
    places = dict(data=text, cache_dir=text.parent / "cache", save_dir=folder)
    words = []
    for name, value in {**SMALL, **places, **changes}.items():
        words += [f"--{name}", str(value)]
    return words


def has_trained(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and "train_loss" in metrics.read_text()


def wait_until(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Forked:
    """The program in a fork. `prepare` runs there first, and sets its descriptors 1 and 2."""

    def __init__(self, argv: list[str], prepare):
        self.code = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                os.setsid()
                # The tokenizer's threads of the parent, if an earlier test made any, are not here.
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
                prepare()
                _streams_of_descriptors()
                code = _code_of(argv)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self) -> int:
        wait_until(lambda: self.poll() is not None)
        return self.code


def _streams_of_descriptors() -> None:
    """Makes Python's streams as they are when it starts with these descriptors."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
            stream = open(number, "w", closefd=False)
        except OSError:
            stream = None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _code_of(argv: list[str]) -> int:
    try:
        code = run_experiment.main(argv)
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def to_file(number: int, path: Path) -> None:
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)


# ---------------------------------------------------------------- output that is lost


def broken_pipe(number: int) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, number)


def full_disk(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lose, reason",
    [(broken_pipe, "Broken pipe"), (os.close, "closed from the start"), (full_disk, "No space")],
)
def test_a_run_that_loses_its_output_ends_as_any_other(text, tmp_path, lose, reason):
    run, other = tmp_path / "run", tmp_path / "other.txt"
    argv = arguments(text, run, **SHORT)

    def lose_stdout():
        to_file(2, other)
        lose(1)

    assert Forked(argv, lose_stdout).wait() == 0
    err = other.read_text()
    assert err.count("standard output is lost") == 1 and reason in err
    assert "Done: 4 steps" in err, "what must be heard is said where it can be"
    assert "Traceback" not in err

    def lose_both():
        lose(1)
        lose(2)

    again = [*argv, "--overwrite"]
    assert Forked(again, lose_both).wait() == 0
    assert checkpoint.load(run / "checkpoint_latest.pt")["step"] == 4


@pytest.mark.slow
def test_what_is_said_of_a_closed_stderr_does_not_get_into_files(text, tmp_path):
    """The next file that is opened would get the number 2, such as metrics.jsonl."""
    run, out = tmp_path / "run", tmp_path / "out.txt"

    def close_stderr():
        to_file(1, out)
        os.close(2)

    process = Forked(arguments(text, run, **ENDLESS), close_stderr)
    wait_until(lambda: has_trained(run))
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    assert "standard error is lost" in out.read_text() and "Stopped at step" in out.read_text()
    for file in [*run.glob("*.pt"), run / "metrics.jsonl"]:
        assert b"stopping after" not in file.read_bytes()
    assert checkpoint.load(run / "checkpoint_latest.pt")["step"] > 0


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """What a library or a signal handler writes to stderr would get into that file."""
    pid = os.fork()
    if pid == 0:
        os.closerange(0, 3)
        console._fill_closed_descriptors()
        os._exit(os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) > 2


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_away(text, tmp_path, ignored):
    """The kernel sends SIGHUP, and writing fails from then on. nohup ignores the signal."""
    run = tmp_path / "run"
    settings = {**ENDLESS, "log_every": 2}
    if ignored:
        settings = dict(max_steps=60, save_every=30, log_every=2)
    master, slave = pty.openpty()

    def in_the_terminal():
        os.close(master)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for number in (0, 1, 2):
            os.dup2(slave, number)
        os.close(slave)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = Forked(arguments(text, run, **settings), in_the_terminal)
    os.close(slave)
    os.set_blocking(master, False)

    def read_until_trained():
        with contextlib.suppress(BlockingIOError):
            os.read(master, 65536)
        return has_trained(run)

    wait_until(read_until_trained)
    os.close(master)
    if ignored:
        assert process.wait() == 0
        assert checkpoint.load(run / "checkpoint_latest.pt")["step"] == 60
    else:
        assert process.wait() == 128 + signal.SIGHUP
        assert 0 < checkpoint.load(run / "checkpoint_latest.pt")["step"] < 100_000


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_that_shows_a_tee(text, tmp_path):
    """A terminal sends it to tee too. All that the run prints from then on is lost."""
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "run_experiment.py"), *arguments(text, run, **ENDLESS)]
    words = " ".join(command)
    script = f"trap : INT; {words} 2>&1 | tee log; echo ${{PIPESTATUS[0]}} > code"
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execvp("bash", ["bash", "-c", script])
    os.set_blocking(master, False)

    def read(until):
        with contextlib.suppress(OSError):
            os.read(master, 65536)
        return until()

    wait_until(lambda: read(lambda: has_trained(run)))
    os.write(master, b"\x03")
    wait_until(lambda: read(lambda: os.waitpid(pid, os.WNOHANG)[0]))
    os.close(master)
    assert (tmp_path / "code").read_text() == "130\n"
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert checkpoint.load(run / "checkpoint_latest.pt")["step"] > 0


# ---------------------------------------------------------------- the streams


@pytest.fixture
def streams(monkeypatch):
    """streams(out, err) makes the descriptors Python's stdout and stderr, with `prepare`."""

    def make(out: int, err: int) -> None:
        for name, number in (("stdout", out), ("stderr", err)):
            stream = open(number, "w", closefd=False)
            monkeypatch.setattr(sys, name, stream)
            monkeypatch.setattr(sys, f"__{name}__", stream)
        replaced = console._replaced  # it takes the descriptors 1 and 2

        def with_numbers(stream, number, *rest, **more):
            return replaced(stream, {1: out, 2: err}[number], *rest, **more)

        monkeypatch.setattr(console, "_replaced", with_numbers)
        monkeypatch.setattr(console._State, "in_a_hurry", False)
        monkeypatch.setattr(console._State, "may_be_lost", False)
        console.prepare()

    return make


def test_a_stream_that_is_lost_is_said_once_on_the_other(streams, tmp_path):
    read, write = os.pipe()
    os.close(read)
    err = os.open(tmp_path / "err", os.O_CREAT | os.O_RDWR)
    streams(write, err)
    with console.output_may_be_lost():
        print("é" * 3)
        print("more")
        console.print_somewhere("the end")
    assert sys.stdout.isatty() is False and sys.stdout.fileno() == write
    written = (tmp_path / "err").read_text()
    assert written.count("standard output is lost (Broken pipe)") == 1
    assert written.endswith("the end\n")
    with contextlib.suppress(OSError):
        sys.stdout.close()


def test_where_output_is_the_purpose_it_must_be_written(streams, tmp_path):
    err = os.open(tmp_path / "err", os.O_CREAT | os.O_RDWR)
    streams(os.open("/dev/full", os.O_WRONLY), err)
    assert exit_code(lambda argv: print("the plan"), []) == 1
    sys.stdout.flush()  # as Python does when it exits
    assert (tmp_path / "err").read_text().count("\n") == 1
    assert "No space left on device: 'standard output'" in (tmp_path / "err").read_text()


def test_a_reader_that_does_not_read_is_not_waited_for_after_a_signal(streams, tmp_path):
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)
    streams(write, os.open(tmp_path / "err", os.O_CREAT | os.O_RDWR))
    with console.output_may_be_lost():
        console.write_in_a_signal_handler(b"")
        print("saved")
    assert "its reader does not read" in (tmp_path / "err").read_text()
    os.close(read)


# ---------------------------------------------------------------- signals while a run trains


def interrupt(monkeypatch, owner, name: str, *numbers: int) -> None:
    """The signals come whenever owner.name is called."""
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        for number in numbers:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    "owner, name, numbers",
    [
        (data, "validation_batches", [signal.SIGHUP]),
        (trainer, "stream", [signal.SIGUSR1]),
        (trainer.Trainer, "_draw_curves", [signal.SIGTERM, signal.SIGHUP]),
        (checkpoint, "save", [signal.SIGINT, signal.SIGINT]),
    ],
    ids=["validation", "sampling", "drawing", "saving"],
)
def test_a_signal_at_any_work_saves_and_stops(
    settings, tmp_path, monkeypatch, handlers, owner, name, numbers
):
    monkeypatch.setattr(stop.os, "_exit", lambda code: pytest.fail("not saved"))
    monkeypatch.setattr(results, "CURVES_SECONDS", 0)
    config = settings(max_steps=4, eval_every=2, save_every=2, log_every=1, sample_tokens=4)
    run = build(config)
    run._begin = lambda: None  # not before the first step
    interrupt(monkeypatch, owner, name, *numbers)
    with pytest.raises(SystemExit) as ended:
        run.run()
    assert ended.value.code == 128 + numbers[0]
    assert checkpoint.load(tmp_path / "run" / "checkpoint_latest.pt")["step"] == run.step == 2
    assert json.loads((tmp_path / "run" / "training_results.json").read_text())["history"]
    evaluated = [row["step"] for row in rows(config, "val_loss")]
    assert evaluated == ([2] if name == "_draw_curves" else [])
    assert [signal.getsignal(number) for number in ALL] == handlers


def test_a_signal_that_is_ignored_stays_ignored(settings, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt(monkeypatch, data, "validation_batches", signal.SIGHUP)
    build(settings(max_steps=1, eval_every=1, save_every=1)).run()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert checkpoint.load(tmp_path / "run" / "checkpoint_latest.pt")["step"] == 1


def test_a_signal_during_the_last_sample_keeps_the_finished_run(settings, tmp_path, monkeypatch):
    config = settings(max_steps=1, eval_every=1, save_every=1, sample_tokens=4)
    run = build(config)
    finish = run._finish

    def interrupted():
        interrupt(monkeypatch, trainer, "stream", signal.SIGTERM)
        finish()

    run._finish = interrupted
    with pytest.raises(SystemExit) as ended:
        run.run()
    assert ended.value.code == 143
    kept = json.loads((tmp_path / "run" / "training_results.json").read_text())
    assert kept["totals"]["steps"] == 1 and kept["sample"] is None
    assert rows(config, "val_loss")


def test_no_worker_is_left_when_a_run_fails(settings, tmp_path):
    """Workers ignore signals, and Python waits for its children when it exits: it would hang."""
    run = build(settings(max_steps=4, num_workers=1))
    take = run.train_step

    def train_step(batches):
        take(batches)
        raise ZeroDivisionError

    run.train_step = train_step
    with pytest.raises(ZeroDivisionError) as error:
        run.run()
    assert error.traceback, "which keeps the frames of the run"
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------- signals outside of a run


@pytest.mark.slow
def test_a_signal_while_tokenizing_ends_the_program_at_once(text, tmp_path, monkeypatch):
    interrupt(monkeypatch, token_writer, "_append", signal.SIGUSR1)
    err = tmp_path / "err.txt"

    def prepare():
        to_file(1, tmp_path / "out.txt")
        to_file(2, err)

    argv = arguments(text, tmp_path / "run", cache_dir=tmp_path / "cache", **SHORT)
    assert Forked(argv, prepare).wait() == 128 + signal.SIGUSR1
    assert "no training was under way" in err.read_text() and "Traceback" not in err.read_text()


def test_a_command_that_does_not_train_cleans_up(tmp_path, capsys):
    cleaned = []

    def command(_argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    assert exit_code(command, []) == 143 and cleaned
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_every_command_ends_as_the_others_do():
    """`exit_code` handles its signals, its errors and its lost output."""
    commands = 0
    for room in ("tools", "studies", "benchmarks"):
        for path in (ROOT / room).glob("*.py"):
            _, as_command, its_end = path.read_text().rpartition('\nif __name__ == "__main__":\n')
            if as_command:
                assert "sys.exit(exit_code(" in its_end, path
                commands += 1
    assert commands >= 16


def test_the_run_of_a_benchmark_ends_with_it(tmp_path, monkeypatch):
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(result_files, "train_command", lambda folder, options: sleeping)
    started = []
    popen = subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        signal.raise_signal(signal.SIGALRM)
        return started[0]

    def later(_number, _frame):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.2)

    before = signal.signal(signal.SIGALRM, later)
    monkeypatch.setattr(result_files.subprocess, "Popen", start)
    try:
        assert exit_code(lambda _argv: result_files.train(tmp_path, []), []) == 143
    finally:
        signal.signal(signal.SIGALRM, before)
    assert started[0].returncode == -signal.SIGKILL and result_files.RUNNING == []
