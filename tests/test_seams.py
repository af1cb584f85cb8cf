"""What may be added to the program at the cost of one place: a field of Config, an optimizer."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.small_model import SMALL_MODEL

ROOT = Path(__file__).parent.parent
OLD_RUNS = ROOT / "tests" / "fixtures" / "old_runs"
EXTRA_FIELD = '''
    extra: int = 0
    """A field with a default that changes nothing."""
'''

SMALL = dict(
    SMALL_MODEL,
    preset="tiny",
    gradient_accumulation_steps=1,
    max_steps=3,
    eval_steps=1,
    log_every=1,
    save_every=3,
    sample_tokens=0,
    validation_fraction=0.1,
)
# For a run that is resumed: an old run's own are folders of another machine.
OLD_DATA = dict(data=OLD_RUNS / "text.jsonl", tokenizer=OLD_RUNS / "tokenizer.json", log_every=1)


def command(*words, **options) -> str:
    """What run_experiment.py prints."""
    import run_experiment

    for name, value in options.items():
        words += (f"--{name}", str(value))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run_experiment.main([str(word) for word in words]) == 0, out.getvalue()
    return out.getvalue()


def losses(run: Path) -> list:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], row.get("train_loss"), row.get("val_loss")] for row in rows]


def behaviour(folder: Path) -> dict:
    """What the program that is imported chooses, plans and trains."""
    import plot
    import trainer
    from config import resolve
    from studies.one_run import summary

    trainer.plot_training_curves = lambda *args, **kwargs: None  # drawing takes longer
    chosen = [resolve({}, None, gpu_gb) for gpu_gb in (None, 10, 80, 150)]
    small = dict(SMALL, data=folder.parent / "text", cache_dir=folder / "cache", device="cpu")
    command(save_dir=folder / "new", **small)
    shutil.copytree(OLD_RUNS / "fp32", folder / "old")
    resumed = dict(OLD_DATA, cache_dir=folder / "cache", save_dir=folder / "old")
    command("--resume", folder / "old" / "checkpoint_step_6.pt", **resumed)

    shutil.copytree(OLD_RUNS / "fp32", folder / "untouched")
    pair = [folder / "old", folder / "untouched"]
    result = json.loads((folder / "new" / "training_results.json").read_text())
    return dict(
        presets=[(name, why) for _, name, why in chosen],
        parameters=[config.total_params for config, _, _ in chosen],
        plan=json.loads(command("plan", "--json", preset="5b", gpu="h200")),
        new_run=losses(folder / "new"),
        resumed_run=losses(folder / "old"),
        labels=[
            label.replace(str(ROOT), "")
            for label in plot.labels(pair, [plot.read_config(run) for run in pair])
        ],
        summary=sorted(summary(result)),
    )


def write_text(folder: Path) -> Path:
    folder.mkdir()
    draw = random.Random(0)
    words = draw.choices(["tree", "house", "river", "stone", "bird", "cloud"], k=3000)
    (folder / "words.txt").write_text(" ".join(words))
    return folder


def copy_of_the_program(folder: Path) -> Path:
    """The program as links, but for config.py, which has one more field."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name != "config.py" and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    text = (ROOT / "config.py").read_text()
    before_methods = "\n    def __post_init__"
    assert text.count(before_methods) == 1
    text = text.replace(before_methods, EXTRA_FIELD + before_methods)
    (folder / "config.py").write_text(text)
    return folder


@pytest.mark.slow
def test_a_field_with_an_inert_default_costs_its_line_and_its_docstring(tmp_path, monkeypatch):
    import trainer

    monkeypatch.setattr(trainer, "plot_training_curves", trainer.plot_training_curves)
    write_text(tmp_path / "text")
    for name in ("before", "after"):
        (tmp_path / name).mkdir()

    answer = tmp_path / "answer.json"
    program = copy_of_the_program(tmp_path / "program")
    fork = multiprocessing.get_context("fork")
    other = fork.Process(target=run_copy, args=(program, tmp_path / "after", answer))
    other.start()
    other.join()
    assert other.exitcode == 0
    before = json.loads(json.dumps(behaviour(tmp_path / "before")))
    after = json.loads(answer.read_text())
    assert [name for name, _ in after["presets"]] == ["tiny", "small", "5b", "18b"]
    assert len(before["new_run"]) >= 3
    assert after == before


def run_copy(program: Path, folder: Path, answer: Path) -> None:
    """Imports the program of another folder, in a fork, and writes its behaviour to `answer`.

    A new interpreter would need many seconds to import torch.
    """
    of_the_program = {path.stem for path in program.iterdir()}
    for name in list(sys.modules):
        if name.partition(".")[0] in of_the_program:
            del sys.modules[name]
    os.chdir(program)
    sys.path[:] = [str(program), *(path for path in sys.path if Path(path).resolve() != ROOT)]

    import config
    from tests import test_seams

    assert Path(config.__file__).parent == program
    assert config.defaults()["extra"] == 0
    assert "--extra" in test_seams.help_text()
    answer.write_text(json.dumps(test_seams.behaviour(folder)))


def help_text() -> str:
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        import run_experiment

        run_experiment.main(["--help"])
    return out.getvalue()


# ---------------------------------------------------------------- an optimizer


class SGD:
    """Stochastic gradient descent with momentum, on fp32 masters: all that an optimizer needs."""

    def __init__(self, parameters, config, weight_decay, offload, fused, gradient_offload):
        from engine.offload import OptimizerState

        self.state = OptimizerState(
            parameters, ("velocity",), float32, offload, False, gradient_offload
        )

    def step(self, lr, grad_scale):
        from engine.precision import read_master, write_master

        for bucket in self.state.buckets():
            for weight, gradient, state in bucket:
                state["velocity"].mul_(0.9).add_(gradient.float() * grad_scale)
                write_master(read_master(weight, state) - lr * state["velocity"], weight, state)

    def state_dict(self):
        return dict(state=self.state.state_dict())

    def load_state_dict(self, saved):
        self.state.load_state_dict(saved["state"])


def float32(parameter):
    import torch

    return torch.float32


def groups_with_sgd(optimizer_groups):
    """The groups, but embedding and head are SGD's instead of AdamW's."""
    from config import OptimizerGroup

    moved = ("embedding.weight", "head.weight")

    def groups(config):
        found = optimizer_groups(config)
        others = [name for name in found["adamw"].parameters if name not in moved]
        found["adamw"] = dataclasses.replace(found["adamw"], parameters=tuple(others))
        found["sgd"] = OptimizerGroup(
            parameters=moved,
            peak_lr=0.5,
            weight_decay=0.0,
            state_bytes=dict(velocity=4),
            memory_key="sgd",
            label="SGD velocity",
            orthogonalizes=False,
        )
        return found

    return groups


def test_an_optimizer_costs_its_class_and_its_group(tmp_path, monkeypatch, capsys):
    """Trainer, metrics, results, curves, planner and checkpoints loop over the groups."""
    import torch

    import config as configuration
    import muon
    import plot
    from record import checkpoint
    from tests.training import build, resume, rows, run_to, small_config, states

    original = configuration.optimizer_groups
    groups = groups_with_sgd(original)
    for module in list(sys.modules.values()):  # wherever it was imported by name
        if getattr(module, "optimizer_groups", None) is original:
            monkeypatch.setattr(module, "optimizer_groups", groups)
    monkeypatch.setitem(muon.OPTIMIZERS, "sgd", SGD)
    figures = []
    monkeypatch.setattr(plot, "write_figure", lambda figure, path: figures.append(figure))

    options = dict(precision="bf16", max_steps=4, eval_every=4, log_every=1, save_every=2)
    text = write_text(tmp_path / "text")
    config = small_config(text, tmp_path / "run", **options)
    whole = build(config)
    before = {name: tensor.clone() for name, tensor in states(whole).items()}
    whole.run()
    out = capsys.readouterr().out

    # It trains.
    for name in groups(config)["sgd"].parameters:
        assert not torch.equal(states(whole)[f"model/{name}"], before[f"model/{name}"])
        assert f"sgd/{name}/velocity" in before

    # Its rate stands in the metrics and in the curves.
    for row in rows(config, "train_loss"):
        assert row["sgd_lr"] / 0.5 == pytest.approx(row["adamw_lr"] / config.adamw_lr)
    rate_panel = figures[-1].axes[2]
    assert [line.get_label() for line in rate_panel.lines] == ["Muon", "AdamW", "sgd"]

    # Its state stands in the memory table, as predicted.
    [row] = [line for line in out.splitlines() if line.startswith("SGD velocity ")]
    predicted, measured = re.findall(r"[\d.]+ [GM]B", row)[:2]
    assert predicted == measured
    results = json.loads((tmp_path / "run" / "training_results.json").read_text())
    memory = results["memory_gb"]
    for key in ("master", "momentum", "adamw", "sgd"):
        assert memory["measured"][key] == pytest.approx(memory["predicted"][key])
        assert memory["measured"][key] > 0

    # It is saved, and a run that is stopped and resumed ends in the same bits.
    cut = small_config(text, tmp_path / "cut", **options)
    run_to(build(cut), 2)
    second = resume(cut, checkpoint.latest_path(cut.save_dir))
    second.run()
    found = states(second)
    assert found.keys() == states(whole).keys()
    for name, tensor in states(whole).items():
        assert torch.equal(found[name], tensor), name

    # The checkpoint opens as a model.
    model, _ = checkpoint.load_model(checkpoint.latest_path(cut.save_dir))
    assert torch.equal(model.head.weight.bfloat16(), whole.parameters["head.weight"])
