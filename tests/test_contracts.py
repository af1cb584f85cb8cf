"""What others rely on is still there: commands, options, exit codes, files, their keys, defaults.

fixtures/contracts.json holds what commit 4af493f had. contracts.py wrote it, and here it looks at
the program of today. There may be more than there was, and nothing less.
"""

import importlib.util
import json

import pytest

from tests import contracts

OLD = json.loads((contracts.FIXTURES / "contracts.json").read_text())


# What was changed on purpose since then: the first command trains at the speed that the GPU's memory
# allows, and small cards get the largest preset that fits.
CHANGED_DEFAULTS = dict(activation_checkpointing="auto")
CHANGED_PRESET_BY_GPU_MEMORY = [[130, "18b"], [70, "5b"], [22, "2b"], [7, "small"], [0, "tiny"]]


def missing(old, new) -> list:
    """What of `old` is not in `new`."""
    return [name for name in old if name not in new]


def required(command: dict) -> list[str]:
    return [name for name, option in command["options"].items() if option["required"]]


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", OLD["commands"])
def test_a_command_has_its_options(command):
    old, new = OLD["commands"][command], contracts.options_of(command)
    assert new["exit_code"] == old["exit_code"]
    assert missing(old["arguments"], new["arguments"]) == []
    assert missing(old["options"], new["options"]) == []
    for name, option in old["options"].items():
        assert new["options"][name]["default"] == option["default"], name
        assert missing(option["choices"] or [], new["options"][name]["choices"] or []) == [], name
    # An old command line would fail for want of a new option.
    assert missing(required(new), required(old)) == []


@pytest.mark.parametrize("command", OLD["commands_without_help"])
def test_a_command_without_options_is_there(command):
    assert importlib.util.find_spec(command)


# They train for many steps or draw a picture.
LONG_CALLS = ("a run that diverges", "a plot of a run")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LONG_CALLS else [])
        for name in OLD["calls"]
    ],
)
def test_a_call_ends_with_its_exit_code(name, tmp_path):
    old = OLD["calls"][name]
    code, out, err = contracts.answer(old["words"], tmp_path, old["before"])
    assert code == old["exit_code"], err
    # What could be named instead of a wrong name.
    assert missing(old["names"], err.replace(",", " ").split()) == []
    if old["keys"]:
        assert missing(old["keys"], contracts.keys_of(json.loads(out))) == []


@pytest.mark.parametrize("name", OLD["plans"])
def test_a_plan_has_its_keys(name):
    old = OLD["plans"][name]
    new = contracts.plan_of(old["arguments"])
    assert new["exit_code"] == old["exit_code"]
    assert missing(old["keys"], new["keys"]) == []


# ---------------------------------------------------------------- files


@pytest.mark.slow
def test_a_run_writes_its_files_with_their_keys(tmp_path):
    old, new = OLD["files"], contracts.files_of_a_run(tmp_path)
    assert missing(old["names"], new["names"]) == []
    for name, keys in old["keys"].items():
        assert missing(keys, new["keys"][name]) == [], name
    assert new["checkpoint_format"] == old["checkpoint_format"]


# ---------------------------------------------------------------- the configuration


def test_the_configuration_has_its_fields_and_presets():
    old, new = OLD["config"], json.loads(json.dumps(contracts.configuration()))
    for name, value in (old["defaults"] | CHANGED_DEFAULTS).items():
        assert name in new["defaults"], name
        # Equal in type too: 1 is no 1.0 in a checkpoint.
        assert json.dumps(new["defaults"][name]) == json.dumps(value), name
    for name, choices in old["choices"].items():
        assert missing(choices, new["choices"][name]) == [], name
    assert missing(old["properties"], new["properties"]) == []
    for name, values in old["presets"].items():
        kept = dict(values)
        if name == "18b":  # it names the shipped defaults
            kept |= CHANGED_DEFAULTS
        assert new["presets"][name].items() >= kept.items(), name
    assert new["preset_by_gpu_memory"] == CHANGED_PRESET_BY_GPU_MEMORY
    assert missing(old["frozen_on_resume"], new["frozen_on_resume"]) == []
    assert new["exit_codes"].items() >= old["exit_codes"].items()
