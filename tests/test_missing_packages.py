"""A missing package ends every command with one line that names it and the remedy."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).parent
COMMANDS = [
    path.relative_to(ROOT)
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    if path.parent.name != "tests" and '__name__ == "__main__"' in path.read_text()
]


def first_import(file: Path) -> str:
    """The first module that a command imports, of those that may be missing or need a package."""
    names = []
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    present = {*sys.stdlib_module_names, "config"}
    return next(name for name in names if name.partition(".")[0] not in present)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("file", COMMANDS, ids=str)
def test_a_command_names_the_package_that_it_lacks(file, monkeypatch, capsys):
    """Here its first import fails, so that what explains the failure must come before it."""
    name = "torch"
    if file != Path("run_experiment.py"):  # it imports packages in functions only
        name = first_import(file)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", [str(file), "--device", "cuda"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    code = 1  # Python's own, after an exception that nobody caught
    try:
        runpy.run_module(".".join(file.with_suffix("").parts), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except ModuleNotFoundError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    line = rf"error: the package {re.escape(name)} is not installed: .*requirements.txt\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    assert code == 1


def test_other_errors_keep_their_traceback(monkeypatch, capsys):
    import config

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    config.explain_missing_packages()
    sys.excepthook(ValueError, ValueError("of a bug"), None)
    assert "ValueError: of a bug" in capsys.readouterr().err
