"""Small runs for tests: a text that is learned at once, a configuration, and what runs leave.

`text`, `settings` and `no_pictures` are fixtures: a test module imports them by name.
"""

import contextlib
import io
import json
import random
import signal
from pathlib import Path

import pytest
from torch import Tensor

import data
from config import PRESETS, Config
from record import checkpoint
from tests.small_model import SMALL_MODEL
from trainer import Trainer

SMALL = PRESETS["tiny"] | dict(
    SMALL_MODEL,
    gradient_accumulation_steps=2,
    max_steps=12,
    eval_every=4,
    eval_steps=2,
    log_every=4,
    save_every=6,
    sample_tokens=0,
    device="cpu",
    validation_fraction=0.1,
)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder of twenty documents of words with some grammar in them."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]

    def line() -> str:
        length = draw.randint(5, 15)
        return " ".join(draw.choice(words[j % 40 : j % 40 + 4]) for j in range(length))

    for i in range(20):
        (folder / f"{i:02}.txt").write_text("\n".join(line() for _ in range(60)))
    return folder


def small_config(text: Path, save_dir: Path, **changes) -> Config:
    """The configuration of a run of a second."""
    places = dict(data=str(text), cache_dir=str(text.parent / "cache"), save_dir=str(save_dir))
    return Config(**{**SMALL, **places, **changes})


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than the training here. Tests that look at curves have it in their
    name."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)


@pytest.fixture
def settings(text, tmp_path):
    """settings(**changes) is the Config of a small run in tmp_path/run."""

    def make(**changes) -> Config:
        return small_config(text, **{"save_dir": tmp_path / "run", **changes})

    return make


def build(config: Config, state: dict | None = None, resumed_from: Path | None = None) -> Trainer:
    Path(config.save_dir).mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return Trainer(config, data.prepare(config), state, resumed_from)


def resume(config: Config, path: Path) -> Trainer:
    return build(config, checkpoint.load(path), path)


def rows(config: Config, kind: str) -> list[dict]:
    """The rows of the run's metrics.jsonl that have this key."""
    lines = (Path(config.save_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if kind in row]


def stop_after(trainer: Trainer, step: int, number=signal.SIGTERM) -> None:
    """Makes the trainer see a signal while it takes the given step."""
    take = trainer.train_step

    def train_step(batches):
        if trainer.step == step - 1:
            signal.raise_signal(number)
        return take(batches)

    trainer.train_step = train_step


def run_to(trainer: Trainer, step: int) -> None:
    """Runs until a signal stops the run after the given step."""
    stop_after(trainer, step)
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert trainer.step == step


def states(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that training changes, by name."""
    found = {}
    for name, tensor in (trainer.parameters | trainer.model.balancing_biases()).items():
        found[f"model/{name}"] = tensor.detach()
    for optimizer_name, optimizer in trainer.optimizers.items():
        for name, tensors in optimizer.state.tensors.items():
            for key, tensor in tensors.items():
                found[f"{optimizer_name}/{name}/{key}"] = tensor
    return found
