"""The attack's cases and what it counts as a fault; a few cases of each kind are run."""

import re
import signal
import subprocess
import sys
from random import Random

import pytest

from benchmarks import attack, attack_commands, attack_damage
from benchmarks.attack_programs import Ended
from benchmarks.result_files import ROOT
from config import ConfigError


def test_a_seed_gives_the_same_command_lines_again():
    lines = [attack_commands.command_line(Random(f"1 {i}")) for i in range(50)]
    assert lines == [attack_commands.command_line(Random(f"1 {i}")) for i in range(50)]
    assert lines != [attack_commands.command_line(Random(f"2 {i}")) for i in range(50)]
    modules = {line[0] for line in lines}
    assert {"run_experiment", "plot", "tools.evaluate"} <= modules


def test_a_seed_gives_the_same_damage_again(tmp_path):
    def damaged(seed: int) -> list:
        found = []
        for i in range(60):
            file = tmp_path / f"{seed}-{i}"
            file.write_text('{"text": "one two"}\n' * 50)
            how = attack_damage.damage(file, Random(f"{seed} {i}"))
            found.append((how, file.is_file() and file.read_bytes()))
            attack_damage._remove(file)
        return found

    first = damaged(1)
    assert damaged(1) == first != damaged(2)
    # Every kind of damage occurs, to the bytes and to the name.
    kinds = {how for how, _ in first}
    assert {"cut_off", "flip_bytes", "folder", "pipe_without_writer"} <= kinds


@pytest.mark.parametrize(
    "ended, fault",
    [
        (Ended(0, "Done"), None),
        (Ended(2, "error: --n_layers: 'x' is not a whole number"), None),
        (Ended(1, ""), "traceback"),
        (Ended(1, "Traceback (most recent call last):\n  ..."), "traceback"),
        (Ended(0, "Exception ignored in: <function ...>"), "traceback"),
        (Ended(-signal.SIGSEGV, ""), "traceback"),
        (Ended(-signal.SIGKILL, "", hung=True), "hang"),
        (Ended(-signal.SIGKILL, ""), None),  # killed by the attack itself
    ],
)
def test_what_counts_as_a_fault(ended, fault):
    assert ended.fault() == fault


def test_the_options_choose_cases():
    assert len(attack.drawn_cases(1, None, None, None)) == 500 + 200 + 100 + 20 + 40
    assert len(attack.drawn_cases(1, None, None, 30)) == 4 * 30 + 20
    assert attack.drawn_cases(1, "kills", 39, None) == [attack.Case(1, "kills", 39)]
    with pytest.raises(ConfigError, match="kills"):
        attack.drawn_cases(1, "kill", None, None)
    with pytest.raises(ConfigError, match="--only"):
        attack.drawn_cases(1, None, 3, None)


@pytest.mark.slow
def test_a_case_of_each_kind_and_one_again():
    def run(*options: str) -> str:
        command = [sys.executable, "-m", "benchmarks.attack", "--seed", "5", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout

    counted = re.findall(
        r"^(\w+) +1 cases: 0 traceback, 0 hang, 0 unsaved;", run("--cases", "1"), re.M
    )
    assert counted == list(attack.KINDS)
    again = run("--only", "commands", "--case", "2")
    assert "python -m " in again and "exit code" in again
