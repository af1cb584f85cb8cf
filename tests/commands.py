"""The program called in this process, a small run, and what it leaves: for tests of the command line.

`base`, `cli`, `finished`, `run` and `no_pictures` are fixtures: a test module imports them by name.
"""

import json
import random
import shutil
from pathlib import Path

import pytest

import run_experiment
from record import checkpoint
from tests.small_model import SMALL_MODEL

ROOT = Path(run_experiment.__file__).parent
SMALL = dict(
    SMALL_MODEL,
    preset="tiny",
    gradient_accumulation_steps=2,
    max_steps=8,
    eval_every=1000,
    eval_steps=2,
    log_every=2,
    save_every=4,
    sample_tokens=0,
    device="cpu",
    validation_fraction=0.1,
)


# What the fixtures below have made, for all modules that import them: pytest takes a fixture for
# another one in each module.
MADE: dict[str, Path] = {}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with some text; the cache goes there too."""
    if "base" not in MADE:
        MADE["base"] = write_text(tmp_path_factory.mktemp("with a space"))
    return MADE["base"]


def write_text(folder: Path) -> Path:
    draw = random.Random(0)
    (folder / "text").mkdir()
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]
    for i in range(10):
        lines = (" ".join(draw.choices(words[: 8 + i], k=10)) for _ in range(60))
        (folder / "text" / f"{i}.txt").write_text("\n".join(lines))
    return folder


def arguments(base, **options) -> list[str]:
    """The command line of a small run, with these options."""
    options = {**SMALL, "data": base / "text", "cache_dir": base / "cache", **options}
    words = []
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return words


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than the training; the runs in processes of their own draw."""
    monkeypatch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)


@pytest.fixture
def cli(capsys):
    """cli(*arguments) is (exit code, stdout, stderr) of the program called in this process."""

    def call(*argv):
        capsys.readouterr()
        try:
            code = run_experiment.main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


def unbroken(text: str) -> str:
    """The text on one line, and options that stand on several lines of a command as one line."""
    return " ".join(text.replace("\\\n", " ").split())


def contents(folder: Path) -> dict:
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(folder: Path, kind: str) -> list[dict]:
    """The rows of a run's metrics.jsonl that have this key."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if kind in row]


def steps_of(folder: Path, kind: str) -> list[int]:
    return [row["step"] for row in rows(folder, kind)]


def step_of(folder: Path) -> int:
    """The step of a run's latest checkpoint."""
    return checkpoint.load(folder / "checkpoint_latest.pt")["step"]


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """The folder of a run of 8 steps; not to be written to."""
    if "finished" in MADE:
        return MADE["finished"]
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)
        assert run_experiment.main(arguments(base, save_dir=folder)) == 0
    MADE["finished"] = folder
    return folder


def assert_refused(result, code, *words):
    assert result[0] == code, result
    assert result[2].split("\r")[-1].lstrip().startswith("error: ") or "\nerror: " in result[2]
    assert "Traceback" not in result[2] and result[2].count("error:") == 1
    for word in words:
        assert word in result[2], (word, result[2])


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
