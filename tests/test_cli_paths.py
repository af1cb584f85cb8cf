"""What is wrong is said before torch is imported, which takes many seconds on a busy machine."""

import subprocess
import sys
from pathlib import Path

import pytest

import cli
from config import ConfigError, ExperimentError

ROOT = Path(cli.__file__).parent

# Calls a command line after the other in one process, and prints what each ended with. A tool
# leaves at its first imports.
CALLS = """
import contextlib, io, runpy, sys
import run_experiment

def call(command, *words):
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        if command == "run_experiment":
            code = run_experiment.main(list(words))
        else:
            sys.argv = [command, *words]
            try:
                runpy.run_module(command, run_name="__main__")
            except SystemExit as end:
                code = end.code
    print(code, "torch" in sys.modules, stderr.getvalue().split(chr(10))[0], sep="|")

for line in sys.argv[1:]:
    call(*line.split())
"""


def test_what_is_wrong_is_said_before_torch_is_imported(tmp_path):
    (tmp_path / "file").write_text("a file, no folder")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    here = tmp_path / "file"
    gone = tmp_path / "gone"
    training = f"run_experiment --save_dir {tmp_path / 'run'}"
    expected = {
        f"{training} --data {gone}": f"there is no file or folder {gone}",
        f"{training} --data {gone}/*.txt": f"no text to read in {gone}/*.txt",
        f"{training} --tokenizer {gone}": f"cannot use the tokenizer {gone}: {gone}: No such file",
        f"{training} --tokenizer ~nobody.here": "cannot use the tokenizer ~nobody.here: ~nobody.here",
        f"{training} --tokenizer {tmp_path}": f"{tmp_path}/tokenizer.json: No such file",
        f"{training} --resume {gone}": f"checkpoint {gone} cannot be read: No such file",
        f"{training} --resume latest --data {gone}": f"there is no file or folder {gone}",
        f"run_experiment --save_dir {tmp_path / 'file' / 'run'}": "file/run cannot be written to",
        "run_experiment --save_dir /proc/run": "the folder /proc/run cannot be written to",
        f"run_experiment sample --prompt x --checkpoint {gone}": f"checkpoint {gone} cannot be read",
        f"tools.evaluate --checkpoint {gone}": f"checkpoint {gone} cannot be read",
        f"tools.evaluate --checkpoint={gone} --json": f"checkpoint {gone} cannot be read",
        f"tools.export_hf --out {gone} --checkpoint {gone}": f"checkpoint {gone} cannot be read",
        f"tools.export_hf --checkpoint {here} --out {tmp_path}": "is there already and no empty",
        f"tools.export_hf --checkpoint {here} --out /proc/model": "the folder /proc/model cannot be",
        f"tools.import_hf --out {gone} --model {gone}": f"cannot read {gone}/config.json: No such",
        f"tools.import_hf --model {tmp_path} --tokenizer {gone}": f"the tokenizer {gone}: {gone}:",
        f"tools.import_hf --model {tmp_path} --data {gone}": f"there is no file or folder {gone}",
        f"studies.run balance --data {here} --data {gone}": f"there is no file or folder {gone}",
        f"tools.import_hf --model {tmp_path} --out {'x' * 5000}": "File name too long",
        f"studies.run balance --out {here}": f"the folder {here} cannot be written to",
        f"benchmarks.run optimizer --data {gone}": f"there is no file or folder {gone}",
        f"benchmarks.harness --checkpoint {gone}": f"checkpoint {gone} cannot be read",
    }
    tiny = f"run_experiment --preset tiny --save_dir {tmp_path / 'run'}"
    wrong_usage = {
        "run_experiment --preset tini": "unknown preset 'tini'",
        "run_experiment --device gpu": "'gpu' is not one of auto, cuda, cpu.",
        f"{tiny} --top_k 9": "impossible configuration",
        f"{tiny} --device cpu --gpus 3": "3 GPUs for the 2 micro-batches of a step",
        f"run_experiment --save_dir {tmp_path}": "already holds a run (run.json)",
    }
    expected |= wrong_usage
    done = subprocess.run(
        [sys.executable, "-c", CALLS, *expected], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stderr
    for command, line in zip(expected, lines):
        code, torch_imported, message = line.split("|")
        exit_code = "2" if command in wrong_usage else "1"
        assert (code, torch_imported) == (exit_code, "False"), (command, line)
        assert message.startswith("error: ")
        assert expected[command] in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file", "run.json"]


def test_a_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint_step_3.pt").touch()
    with pytest.raises(ConfigError, match="is a folder.*--save_dir .* --resume latest"):
        cli.check_checkpoint(str(tmp_path), "--resume")
    with pytest.raises(ConfigError, match="--checkpoint .* is a folder: name a file of it"):
        cli.check_checkpoint(str(tmp_path), "--checkpoint")
    with pytest.raises(ExperimentError, match="there are: checkpoint_step_3.pt"):
        cli.check_checkpoint(str(tmp_path / "checkpoint_step_4.pt"), "--resume")


def test_right_paths_pass_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "tokenizer.json").write_text("{}")
    options = dict(
        data=str(tmp_path / "*.txt"), tokenizer=str(tmp_path), save_dir=str(tmp_path / "a" / "b")
    )
    cli.check_training_paths(options, None)
    cli.check_training_paths(options, "latest")
    cli.check_training_paths({}, str(tmp_path / "text.txt"))
    for name in ("train", "train:300", "hf:gpt2"):
        cli.check_tokenizer(name)
    assert len(list(tmp_path.iterdir())) == 2
