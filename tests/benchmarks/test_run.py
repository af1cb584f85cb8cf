"""The command lines and result files of the benchmarks; nothing is trained."""

import json
import re

import pytest

from benchmarks import harness, result_files, run
from cli import add_config_options, config_options, new_parser
from planner.machine import find_machine

ON_A_CPU = dict(gpu=None, cpus=2, torch="2.9.0")
ON_A_GPU = dict(gpu="NVIDIA H100 80GB HBM3", cpus=16, torch="2.9.0")


@pytest.fixture
def extra_options():
    """What benchmarks.run was given, as a list to be filled; emptied again after the test."""
    yield result_files.EXTRA_OPTIONS
    result_files.EXTRA_OPTIONS.clear()


def parsed(words):
    parser = new_parser("", "")
    parser.add_argument("--preset")
    add_config_options(parser)
    return config_options(parser.parse(words))


# ---------------------------------------------------------------- names


def test_the_docstring_lists_every_benchmark():
    listed = re.findall(r"^    ([a-z]\w+) {2,}\S", run.__doc__, re.MULTILINE)
    assert listed == list(run.BENCHMARKS)


def test_without_a_name_the_list_is_printed(capsys, extra_options):
    run.main([])
    assert "memory_prediction_error" in capsys.readouterr().out


def test_options_after_the_names_are_for_all_runs(monkeypatch, tmp_path, extra_options):
    folders = []
    monkeypatch.setitem(run.BENCHMARKS, "default_run", folders.append)
    run.main(["default_run", "default_run", "--host_memory_gb", "120"])
    assert len(folders) == 2
    command = result_files.train_command(tmp_path, ["--max_steps", "7"])
    options = ["--save_dir", str(tmp_path), "--max_steps", "7", "--host_memory_gb", "120"]
    assert command[2:] == options


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("preset, precision", [("18b", "bf16"), ("18b", "fp16"), ("25b", "bf16")])
def test_advised_options_parse(monkeypatch, extra_options, preset, precision):
    def an_h200(host_gb):
        return find_machine(host_gb, gpu="h200")

    monkeypatch.setattr(run, "find_machine", an_h200)
    extra_options += ["--host_memory_gb", "120"]
    options = parsed(run.advised_options(preset, precision))
    assert options["activation_checkpointing"] != "auto"
    assert options["offload_optimizer"] == "true"


def test_options_of_the_small_runs_parse():
    runs = run._runs_of_small_precisions()
    assert list(runs) == ["fp16, seed 1", "bf16, seed 1", "fp16, seed 2", "bf16, seed 2"]
    options = parsed([*runs["bf16, seed 2"], *result_files.SHORT])
    assert (options["precision"], options["seed"]) == ("bf16", 2)
    assert options["max_characters"] == 300_000_000
    assert options["cache_dir"] == str(result_files.CACHE)


def test_lm_eval_names_no_folder_of_this_machine_in_its_one_liner():
    words = harness.lm_eval_arguments("my_model", "out")
    assert "pretrained=my_model,dtype=float32" in words
    assert words[-2:] == ["--output_path", "out"]


# ---------------------------------------------------------------- result files


@pytest.mark.parametrize(
    "machine, file, gpu",
    [
        (ON_A_CPU, "speed_cpu.json", "none, 2 CPU cores"),
        (ON_A_GPU, "speed_h100.json", "NVIDIA H100 80GB HBM3"),
        (ON_A_GPU | dict(gpu="Some Card"), "speed_Some_Card.json", "Some Card"),
    ],
)
def test_a_result_file_has_the_documented_keys(
    monkeypatch, tmp_path, extra_options, machine, file, gpu
):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    extra_options += ["--host_memory_gb", "120"]
    result_files.write("speed", 1.5, "tokens/s", 3, machine, dict(all=[1, 2]))
    record = json.loads((tmp_path / "results" / file).read_text())
    documented = run.__doc__.rpartition("figures: ")[2].strip().rstrip(".").split(", ")
    assert list(record) == documented
    assert record["gpu"] == gpu
    assert record["command"] == "python -m benchmarks.run speed --host_memory_gb 120"
    assert record["commit"] == "abc1234"
    assert record["details"] == dict(all=[1, 2])


def test_a_result_file_may_name_another_command(monkeypatch, tmp_path):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    result_files.write("speed", 1.5, "s", 3, ON_A_CPU, {}, command="python -m other")
    assert json.loads((tmp_path / "speed_cpu.json").read_text())["command"] == "python -m other"
