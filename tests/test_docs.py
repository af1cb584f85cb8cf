"""README.md and docs/ say what is so: tables, snippets, links, commands."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from benchmarks.tables import ROOT, blocks, fill, pages
from config import PRESETS, Config, defaults
from planner.choice import choose
from planner.machine import find_machine
from planner.sizes import predict_memory
from studies.report import blocks as study_blocks

README = (ROOT / "README.md").read_text()
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in pages()}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The names by which headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_those_of_the_result_files(page):
    made_by = blocks() | study_blocks()
    # a new field of Config must fail no test: the table of options is brought up to date by hand
    del made_by["options"]
    remedy = "run python -m benchmarks.tables and python -m studies.report"
    assert fill(TEXTS[page], made_by) == TEXTS[page], remedy
    marks = re.findall(r"^<!-- (?!end)([\w -]+) -->$", TEXTS[page], flags=re.M)
    assert set(marks) <= made_by.keys() | {"options"}


@pytest.mark.parametrize("page", [*TEXTS, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in LINK.findall(path.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


def test_the_readme_is_a_door():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1500


def test_the_table_of_options_names_fields_only():
    rows = re.findall(r"^\| `(\w+)` \|", TEXTS["docs/options.md"], flags=re.M)
    of_the_run = re.findall(r"^\| `--(\w+)", TEXTS["docs/options.md"], flags=re.M)
    assert len(rows) > 60 and set(rows) <= set(defaults())
    assert set(of_the_run) == {"preset", "gpus", "resume", "skip_steps", "overwrite"}


@pytest.mark.parametrize("number, preset", enumerate(["5b", "2b", "25b"]))
def test_snippet_pasted_into_the_config_gives_the_preset(tmp_path, number, preset):
    snippets = re.findall(r"```python\n(    d_model.*?)```", TEXTS["docs/memory.md"], flags=re.S)
    source = (ROOT / "config.py").read_text()
    for line in snippets[number].splitlines():
        name = line.split(":")[0].strip()
        source, replaced = re.subn(rf"^    {name}: .*$", line, source, count=1, flags=re.M)
        assert replaced == 1
    edited = import_file(tmp_path / "edited_config.py", source)
    config, name, why = edited.resolve({}, None, 190.0)
    expected = edited.Config(**PRESETS[preset])
    assert name == "config.py" and "edited" in why
    for field in ("total_params", "active_params", "batch_size", "moe_every"):
        assert getattr(config, field) == getattr(expected, field)


def import_file(path: Path, source: str):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # a dataclass looks its own module up there
    spec.loader.exec_module(module)
    return module


def test_memory_of_the_brief_is_that_of_full_checkpointing_on_its_gpu():
    c = Config(**PRESETS["18b"] | dict(activation_checkpointing="full"))
    sizes = predict_memory(c, "full", 4, offload=False)
    assert choose(c, find_machine(gpu="b200"), fixed_batch=False)[0].memory_gb == sizes


def test_commands_are_the_required_ones():
    assert "pip install -r requirements.txt && python run_experiment.py\n" in README
    test_command = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n"
    assert test_command in README
