"""The files of docs/operations: they parse, name right options and exit codes, and restart a run as
docs/operations.md says. The programs of a cluster are replaced by small ones on the PATH.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_experiment
from cli import config_options
from config import ConfigError, Diverged
from engine.processes import STOP_SIGNALS
from tests.small_model import SMALL_MODEL

ROOT = Path(run_experiment.__file__).parent
FOLDER = ROOT / "docs" / "operations"
UNIT = FOLDER / "training.service"
JOB = FOLDER / "training.sbatch"
LOOP = FOLDER / "keep_training.sh"

# In the place of the program: ends with the next code of the file CODES. At "wait" it waits for a
# signal, as a run does, and ends with 128 + its number.
FAKE_PYTHON = """#!/bin/bash
echo "$@" >> "$CALLS"
code=$(head -n 1 "$CODES")
sed -i 1d "$CODES"
if [ "$code" = wait ]; then
    trap 'sleep 0.3; echo saved >> "$REQUEUED"; exit 138' USR1
    while true; do sleep 0.05; done
fi
exit "$code"
"""


def write_program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path):
    """A folder for the PATH with srun, scontrol and python, and the environment that has it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder, "srun", '#!/bin/bash\nexec "$@"\n')
    write_program(folder, "scontrol", '#!/bin/bash\necho "$@" >> "$REQUEUED"\n')
    write_program(folder, "python", FAKE_PYTHON)
    return dict(
        os.environ,
        PATH=f"{folder}:{os.environ['PATH']}",
        CALLS=str(tmp_path / "calls"),
        CODES=str(tmp_path / "codes"),
        REQUEUED=str(tmp_path / "requeued"),
        SLURM_JOB_ID="77",
        SLURM_RESTART_COUNT="0",
        PAUSE="0",
    )


def lines(path: str) -> list[str]:
    if not Path(path).exists():
        return []
    return Path(path).read_text().splitlines()


def run_script(script: Path, programs: dict, codes: list, **changes) -> tuple[int, int]:
    """(exit code, how often the program was called)."""
    Path(programs["CODES"]).write_text("".join(f"{code}\n" for code in codes))
    Path(programs["CALLS"]).unlink(missing_ok=True)
    Path(programs["REQUEUED"]).unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(script)], env={**programs, **changes}, capture_output=True, timeout=60
    )
    return done.returncode, len(lines(programs["CALLS"]))


# ---------------------------------------------------------------- what the files say


def unit() -> dict[str, str]:
    """The settings of the unit file; each is there once."""
    settings = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            assert name not in settings
            settings[name] = value
    return settings


def command_of(file: Path) -> list[str]:
    """The words behind run_experiment.py in the one line that starts it."""
    [words] = re.findall(r"^[^#\n]*python run_experiment\.py (.*)$", file.read_text(), re.MULTILINE)
    return shlex.split(words.replace('"$@"', "").replace("&", ""))


@pytest.mark.parametrize("file", [UNIT, JOB, LOOP], ids=lambda file: file.name)
def test_the_command_has_right_options_and_resumes(file):
    args = run_experiment._train_parser().parse(command_of(file))
    assert args.resume == "latest"
    assert config_options(args)["device"] == "cuda"


@pytest.mark.parametrize("file", [JOB, LOOP], ids=lambda file: file.name)
def test_bash_reads_the_script(file):
    subprocess.run(["bash", "-n", file], check=True)


def test_the_unit_has_the_exit_codes_of_the_program():
    settings = unit()
    hopeless = {ConfigError.exit_code, Diverged.exit_code}
    assert {int(code) for code in settings["RestartPreventExitStatus"].split()} == hopeless
    stopped = {128 + number for number in STOP_SIGNALS}
    assert {int(code) for code in settings["SuccessExitStatus"].split()} == stopped
    assert settings["Restart"] == "on-failure"
    assert int(settings["StartLimitBurst"]) >= 2


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_reads_the_unit(tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    write_program(python.parent, "python", "#!/bin/sh\n")
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/srv/training", str(tmp_path)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=60
    )
    assert UNIT.name not in done.stderr, done.stderr  # it may complain of the machine's own units
    assert done.returncode == 0, done.stderr


def test_the_page_has_the_codes_and_files():
    page = (ROOT / "docs" / "operations.md").read_text()
    assert {file.name for file in FOLDER.iterdir()} == {UNIT.name, JOB.name, LOOP.name}
    for file in FOLDER.iterdir():
        assert f"(operations/{file.name})" in page
    assert f"| {ConfigError.exit_code} | wrong options" in page
    assert f"| {Diverged.exit_code} | training diverged" in page


# ---------------------------------------------------------------- what the scripts do


@pytest.mark.parametrize(
    "codes, calls",
    [
        ([1, 137, 4, 0], 4),
        ([2], 1),
        ([1, 3], 2),
        ([130], 1),
        ([143], 1),
        ([1, 1, 1, 1, 1, 1, 0], 5),  # five failures in a row are enough
    ],
)
def test_the_loop_restarts_what_may_succeed(programs, codes, calls):
    assert run_script(LOOP, programs, codes) == (codes[calls - 1], calls)


def test_the_loop_counts_anew_after_a_long_run(programs):
    assert run_script(LOOP, programs, [1] * 7 + [0], LONG="0") == (0, 8)


@pytest.mark.parametrize(
    "code, restarts, requeued",
    [
        (0, 0, False),
        (1, 0, True),
        (137, 49, True),
        (137, 50, False),  # the limit
        (2, 0, False),
        (3, 0, False),
        (143, 0, False),
    ],
)
def test_the_job_is_requeued_when_it_may_succeed(programs, code, restarts, requeued):
    ended, calls = run_script(JOB, programs, [code], SLURM_RESTART_COUNT=str(restarts))
    assert calls == 1
    assert lines(programs["REQUEUED"]) == ["requeue 77"] * requeued
    if not requeued:
        assert ended == code


def wait_until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_end_of_a_jobs_time_saves_and_requeues(programs):
    Path(programs["CODES"]).write_text("wait\n")
    job = subprocess.Popen(["bash", str(JOB)], env=programs, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: lines(programs["CALLS"]))
    time.sleep(0.3)  # until the program has set its trap
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=60)
    assert "The program ended with exit code 138." in out
    assert lines(programs["REQUEUED"]) == ["saved", "requeue 77"], "not before it has saved"


@pytest.mark.slow
def test_a_real_run_comes_back_after_the_end_of_its_job(programs, tmp_path):
    """The job's script with the real program: stopped at the end of its time, then to its end."""
    write_program(tmp_path / "bin", "python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    words = " ".join(f"word{i % 7}" for i in range(20_000))
    (tmp_path / "text.txt").write_text(words)
    small = dict(
        SMALL_MODEL,
        preset="tiny",
        gradient_accumulation_steps=1,
        eval_steps=1,
        sample_tokens=0,
        device="cpu",
        validation_fraction=0.1,
        log_every=1,
        data=tmp_path / "text.txt",
        cache_dir=tmp_path / "cache",
        save_dir=tmp_path / "run",
    )
    options = [word for name, value in small.items() for word in (f"--{name}", str(value))]

    def start(max_steps: int) -> subprocess.Popen:
        command = ["bash", str(JOB), *options, "--max_steps", str(max_steps)]
        return subprocess.Popen(
            command,
            env=programs,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    metrics = tmp_path / "run" / "metrics.jsonl"
    job = start(100_000)
    wait_until(lambda: len(lines(str(metrics))) > 5)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert "The program ended with exit code 138." in out, out
    assert "\rstep" not in out and "it/s" not in out
    assert re.search(
        r"^step \d+/100000: loss \d\.\d+, [\d,]+ tokens/s, .* left, busiest expert", out, re.M
    )
    assert lines(programs["REQUEUED"]) == ["requeue 77"]
    stopped = json.loads(lines(str(metrics))[-1])["step"]

    job = start(stopped + 3)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0, out
    assert f"at step {stopped}" in out
    assert len(lines(programs["REQUEUED"])) == 1
