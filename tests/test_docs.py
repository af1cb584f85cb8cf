"""The README says what is so: snippets, options, figures, presets."""

import importlib.util
import re
import typing
from pathlib import Path

import pytest

from benchmarks.tables import filled
from config import PRESETS, Config, defaults
from planner.choice import choose
from planner.machine import find_machine
from planner.sizes import predict_memory

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_options_names_no_other_ones():
    """A field may be missing there: --help prints them all, and test_run_experiment.py holds it to that."""
    options = README[README.index("## Every option") : README.index("## The brief's claims")]
    rows = [line.split("|")[2] for line in options.splitlines() if line.startswith("| ")][1:]
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", " ".join(rows)))))
    choices = {
        choice
        for kind in typing.get_type_hints(Config).values()
        for choice in typing.get_args(kind)
    }
    others = {"preset", "NAME", "resume", "latest", "overwrite"}
    assert len(words & defaults().keys()) > 60
    assert words <= defaults().keys() | choices | others


def test_tables_are_those_of_the_result_files():
    assert filled(README) == README, "run python -m benchmarks.tables"


@pytest.mark.parametrize("number, preset", enumerate(["5b", "2b", "25b"]))
def test_snippet_pasted_into_the_config_gives_the_preset(tmp_path, number, preset):
    snippet = re.findall(r"```python\n(    d_model.*?)```", README, flags=re.S)[number]
    source = (ROOT / "config.py").read_text()
    for line in snippet.splitlines():
        name = line.split(":")[0].strip()
        source, replaced = re.subn(rf"^    {name}: .*$", line, source, count=1, flags=re.M)
        assert replaced == 1
    (tmp_path / "edited_config.py").write_text(source)
    spec = importlib.util.spec_from_file_location("edited_config", tmp_path / "edited_config.py")
    edited = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["edited_config"] = edited
    spec.loader.exec_module(edited)
    config, name, why = edited.resolve({}, None, 190.0)
    assert name == "config.py" and "edited" in why
    expected = edited.Config(**PRESETS[preset])
    assert (config.total_params, config.active_params) == (
        expected.total_params,
        expected.active_params,
    )
    assert (config.batch_size, config.moe_every) == (expected.batch_size, expected.moe_every)


def test_memory_of_the_brief_is_what_plan_predicts():
    c, sizes = (
        Config(**PRESETS["18b"]),
        predict_memory(Config(**PRESETS["18b"]), "full", 4, offload=False),
    )
    assert choose(c, find_machine(gpu="b200"), fixed_batch=False)[0].memory_gb == sizes
    parts = (
        f"{sizes['weights']:.1f} + {sizes['gradients']:.1f} + {sizes['momentum']:.1f}, fp32 masters {sizes['master']:.1f} (a 16-bit "
        f"residual beside the weight), AdamW {sizes['adamw']:.1f}, activations {sizes['activations']:.1f} with full checkpointing: {sizes['total']:.1f} GB"
    )
    assert parts in README


def test_commands_are_the_required_ones():
    assert "pip install -r requirements.txt && python run_experiment.py\n" in README
    assert (
        "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n" in README
    )
