"""The house: imports run downwards only, and no folder or file shadows an installed package.

import-linter (its contracts are in pyproject.toml) knows packages only. Here the files at the root
are held to the same floors.
"""

import ast
import functools
import importlib
import importlib.metadata
import re
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From top to bottom. A module imports from the floors below its own and from its own room.
FLOORS = [
    ["studies"],
    ["benchmarks"],
    ["run_experiment", "tools"],
    ["checkpoint", "cli", "trainer"],
    ["plot"],
    ["generate", "record"],
    ["data", "model"],
    ["corpus", "moe", "muon"],
    ["planner"],
    ["engine"],
    ["config"],
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def our_files() -> list[Path]:
    """The Python files of the program, relative to the root: those at the root and in its rooms."""
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    files = [path.relative_to(ROOT) for path in paths]
    return [file for file in files if file.parts[0] != "tests" and file.parts[0][0] != "."]


def top_level_name(file: Path) -> str:
    """What `import` calls it: the room, or the file at the root."""
    return Path(file.parts[0]).stem


def imports(file: Path) -> list[tuple[int, str]]:
    """(line, top-level name) of everything that a file imports, inside its functions too."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            found.append((node.lineno, node.module))
    return [(line, module.split(".")[0]) for line, module in found]


# ---------------------------------------------------------------- floors


def test_every_file_has_a_floor():
    assert {top_level_name(file) for file in our_files()} == set(FLOOR_OF)


@pytest.mark.parametrize("file", our_files(), ids=str)
def test_imports_run_downwards_only(file):
    name = top_level_name(file)
    wrong = [
        f"{file}:{line} imports {other}, which is not below {name}"
        for line, other in imports(file)
        if other in FLOOR_OF and other != name and FLOOR_OF[other] <= FLOOR_OF[name]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_the_tests():
    assert not [file for file in our_files() if "tests" in {name for _, name in imports(file)}]


def test_what_a_file_imports_of_us_is_there():
    """Also in files that no test runs, such as a benchmark that takes minutes."""
    missing = []
    for file in our_files():
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in FLOOR_OF:
                continue
            names = names_in(node.module)
            for alias in node.names:
                if alias.name not in names:
                    missing.append(f"{file}:{node.lineno}: {alias.name} of {node.module}")
    assert not missing, "\n".join(missing)


@functools.cache
def names_in(module: str) -> set[str]:
    """What can be imported from one of our modules: names of its top level, or files of a room."""
    path = ROOT / module.replace(".", "/")
    if path.is_dir():
        return {file.stem for file in path.glob("*.py")} | names_in(f"{module}.__init__")
    found = set()
    for node in ast.walk(ast.parse(path.with_suffix(".py").read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_plan_and_help_load_without_torch():
    """torch takes seconds to import: config and planner import it in functions only, if at all."""
    of_the_engine = {Path("engine/__init__.py"), Path("engine/ownership.py")}
    for file in our_files():
        if top_level_name(file) in ("config", "planner") or file in of_the_engine:
            tree = ast.parse((ROOT / file).read_text())
            at_once = {name for line, name in imports(file) if line in lines_at_module_level(tree)}
            assert "torch" not in at_once, file
            assert at_once & set(FLOOR_OF) <= {"config", "planner", "engine"}, file
            modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
            engine = {module for module in modules if module.startswith("engine")}
            assert engine <= {"engine.ownership"}, file


def lines_at_module_level(tree: ast.Module) -> set[int]:
    return {node.lineno for node in tree.body}


# ---------------------------------------------------------------- names


def installed_with_the_requirements() -> set[str]:
    """The distributions of both requirements files, and those that they require in turn."""
    waiting = []
    for path in (ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"):
        waiting += [line for line in path.read_text().splitlines() if re.match(r"\w", line)]
    found = set()
    while waiting:
        name = re.match(r"[\w.-]+", waiting.pop())[0]
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another system or Python, or not installed here
        found.add(name)
        waiting += [line for line in required or [] if "extra ==" not in line]
    return found


def test_no_name_of_ours_is_that_of_an_installed_package():
    """Else `import data` could give another package's module, by where Python was started."""
    installed = installed_with_the_requirements()
    assert {"torch", "transformers", "numpy"} <= installed
    clashes = {}
    for name, distributions in importlib.metadata.packages_distributions().items():
        owners = {re.sub(r"[-_.]+", "-", owner).lower() for owner in distributions}
        if name in {*FLOOR_OF, "tests"} and owners & installed:
            clashes[name] = owners & installed
    assert not clashes


def test_no_name_of_ours_is_that_of_a_package_that_transformers_looks_for():
    """transformers takes any module `kernels` for Hugging Face's package of that name."""
    assert "kernels" not in FLOOR_OF
    assert not (ROOT / "kernels").exists()


def test_no_name_of_ours_is_in_the_standard_library():
    assert not {*FLOOR_OF, "tests"} & set(sys.stdlib_module_names)


def test_every_folder_with_python_files_is_a_package():
    """Without __init__.py a folder loses against any installed package of its name."""
    folders = {path.parent for path in [*ROOT.glob("*/*.py"), *ROOT.glob("tests/**/*.py")]}
    assert folders
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing


# ---------------------------------------------------------------- the old name of a module


def test_the_old_name_of_the_checkpoint_module_warns_once_and_works(monkeypatch):
    monkeypatch.delitem(sys.modules, "checkpoint", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old = importlib.import_module("checkpoint")
        importlib.import_module("checkpoint")
    monkeypatch.delitem(sys.modules, "checkpoint")
    [warning] = [w for w in caught if "checkpoint" in str(w.message)]
    assert warning.category is DeprecationWarning
    assert "record.checkpoint" in str(warning.message)

    from record import checkpoint

    for name in ("load_model", "load", "CheckpointError"):
        assert getattr(old, name) is getattr(checkpoint, name)
