"""The loop: exact resume, overflow, schedule, what is written down, signals, memory errors."""

import dataclasses
import json
import math
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy
import pytest
import torch

import data
from config import (
    DATA_RULES,
    PRESETS,
    Config,
    ConfigError,
    Diverged,
    ExperimentError,
    OutOfMemory,
    resumed_config,
)
from engine.precision import read_master
from planner.choice import Choice, check_fits
from planner.machine import Machine
from planner.sizes import CPU_LIBRARY_GB, checkpoint_gb, predict_memory
from record import checkpoint, results
from tests.training import (  # some are fixtures
    build,
    no_pictures,  # noqa: F401
    resume,
    rows,
    run_to,
    settings,  # noqa: F401
    small_config,
    states,
    text,  # noqa: F401
)
from trainer import Trainer, lr_schedule

FORMS = {
    "fp32": dict(precision="fp32"),
    "bf16-split": dict(precision="bf16"),
    "fp16-split": dict(precision="fp16", loss_scale_growth_interval=3),
    "bf16-fp32-masters": dict(precision="bf16", master_weights="fp32"),
    "fp16-offload": dict(precision="fp16", offload_optimizer="true", host_gradient_blocks=2),
    "adamw-bias": dict(optimizer="adamw", load_balancing="bias", load_balancing_bias_rate=0.01),
}


# ---------------------------------------------------------------- resume


def test_a_deterministic_run_samples_and_the_next_run_is_free(settings, tmp_path):
    changes = dict(max_steps=2, save_every=0, sample_tokens=3, eval_every=2)
    losses = []
    for deterministic in (True, False):
        run = build(
            settings(
                save_dir=str(tmp_path / str(deterministic)), deterministic=deterministic, **changes
            )
        )
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        run.run()
        losses.append([row["val_loss"] for row in rows(run.config, "val_loss")])
    assert losses[0] == losses[1], "on a CPU every kernel adds in a fixed order"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_stopped_and_resumed_run_equals_one_run_to_the_bit(settings, tmp_path, form):
    whole = build(settings(save_dir=str(tmp_path / "whole"), **FORMS[form]))
    whole.run()
    config = settings(**FORMS[form])
    run_to(build(config), 6)  # in the middle of an interval between rows
    torch.manual_seed(99)  # a new process has other random states
    random.seed(99)
    numpy.random.seed(99)
    latest = checkpoint.latest_path(config.save_dir)
    second = resume(config, latest)
    saved = checkpoint.load(latest)["random"]
    assert torch.equal(torch.get_rng_state(), saved["torch"])
    assert list(random.getstate()[1]) == saved["python"][1]
    assert numpy.random.get_state()[1].tolist() == saved["numpy"][1]
    second.run()

    expected = states(whole)
    found = states(second)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    exact = ("step", "grad_norm", "loss_scale", "expert_load", "tokens_seen")
    for kind in ("train_loss", "val_loss"):
        pairs = zip(rows(whole.config, kind), rows(config, kind), strict=True)
        for one_run, two_runs in pairs:
            for key in (kind, *exact):
                assert one_run.get(key) == two_runs.get(key), key


@pytest.mark.slow
def test_a_worker_that_dies_costs_a_run_nothing(settings, tmp_path, capsys):
    """It waits five seconds until PyTorch notices."""
    short = dict(max_steps=8, log_every=1, eval_every=100, save_every=0)
    whole = settings(save_dir=str(tmp_path / "whole"), **short)
    build(whole).run()
    trainer = build(settings(num_workers=2, **short))
    take = trainer.train_step

    def train_step(batches):
        if trainer.step == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return take(batches)

    trainer.train_step = train_step
    trainer.run()
    for one, other in zip(rows(whole, "train_loss"), rows(trainer.config, "train_loss")):
        for key in ("step", "train_loss", "grad_norm", "tokens_seen"):
            assert one[key] == other[key], key
    assert trainer.step == 8
    assert capsys.readouterr().err.count("warning: a worker that reads data has died") == 1
    assert not multiprocessing.active_children()


def test_rows_past_the_checkpoint_are_dropped_and_kept_aside(settings, tmp_path):
    config = settings(save_every=2, log_every=1, max_steps=4, eval_every=100)
    folder = tmp_path / "run"
    build(config).run()
    before = (folder / "metrics.jsonl").read_text()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train_lo')  # a crash in the middle of a line
    run_to(resume(config, checkpoint.step_path(config.save_dir, 2)), 3)
    assert [row["step"] for row in rows(config, "train_loss")] == [1, 2, 3]
    resume(config, checkpoint.latest_path(config.save_dir)).run()
    assert [row["step"] for row in rows(config, "train_loss")] == [1, 2, 3, 4]
    dropped = (folder / "metrics.jsonl.1").read_text()
    assert before.endswith(dropped), "the dropped rows and nothing else"
    assert [json.loads(line)["step"] for line in dropped.splitlines()] == [3, 4, 4]
    # The first branch's later checkpoint is not written over.
    assert (folder / "checkpoint_step_4.pt.1").exists()


def test_a_branch_makes_its_checkpoint_the_latest(settings, tmp_path):
    """Otherwise a branch that is killed before its first save would be resumed from the other
    branch's weights."""
    config = settings(save_every=2, keep_checkpoints=10, max_steps=5, eval_every=100)
    folder = tmp_path / "run"
    latest = checkpoint.latest_path(folder)
    run_to(build(config), 5)  # saved as the numbered one of the end and the latest
    (folder / "checkpoint_step_5.pt").unlink()  # now latest is the only copy
    branch = resume(config, checkpoint.step_path(folder, 2))
    assert checkpoint.load(latest)["step"] == 5, "nothing is written before run"
    branch.checkpoints.take_over(branch.step)
    assert checkpoint.load(latest)["step"] == 2
    assert checkpoint.load(folder / "checkpoint_latest.pt.1")["step"] == 5
    assert branch.checkpoints.last_saved_step == 2


@pytest.mark.slow
def test_metrics_after_a_resume_with_another_micro_batch(settings, tmp_path):
    """The sums of a half-finished interval are weighted by sequences."""
    whole = settings(log_every=4, load_balancing_scope="sequence", max_steps=4, eval_every=100)
    cut = dataclasses.replace(whole, save_dir=str(tmp_path / "cut"))
    build(whole).run()
    run_to(build(cut), 3)
    smaller = dataclasses.replace(cut, batch_size=1, gradient_accumulation_steps=4)
    resume(smaller, checkpoint.latest_path(cut.save_dir)).run()
    [expected] = rows(whole, "train_loss")
    [found] = rows(cut, "train_loss")
    for key in ("train_loss", "train_accuracy", "load_balancing_loss", "router_z_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-3), key


def test_an_evaluation_that_was_cut_off_is_made_up(settings, monkeypatch):
    config = settings(save_every=2, eval_every=2, max_steps=4)
    first = build(config)
    evaluate = first.evaluate

    def evaluate_at_first():
        if first.step:
            raise KeyboardInterrupt
        evaluate()

    monkeypatch.setattr(first, "evaluate", evaluate_at_first)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert [row["step"] for row in rows(config, "val_loss")] == [0], "saved before evaluating"
    resume(config, checkpoint.latest_path(config.save_dir)).run()
    assert [row["step"] for row in rows(config, "val_loss")] == [0, 2, 4]


@pytest.fixture(scope="module")
def two_steps(text, tmp_path_factory) -> Config:  # noqa: F811
    """The configuration of a run of two steps that is done and saved."""
    folder = tmp_path_factory.mktemp("two_steps")
    config = small_config(text, folder, max_steps=2, save_every=2, eval_every=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)
        build(config).run()
    return config


def test_resume_refuses_other_data_and_other_tokenizer(two_steps, tmp_path):
    config = two_steps
    state = checkpoint.load(checkpoint.latest_path(config.save_dir))
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(config.data).glob("*.txt"):
        (other / file.name).write_text(file.read_text() + "!")
    with pytest.raises(ExperimentError, match="other text.*--data"):
        build(dataclasses.replace(config, data=str(other)), state, Path(config.save_dir))
    state["data"]["tokenizer_hash"] = "0" * 64
    with pytest.raises(ExperimentError, match="with another tokenizer.*--tokenizer"):
        build(config, state, Path(config.save_dir))


def test_resume_refuses_a_corpus_of_another_version_of_the_rules(two_steps):
    """Also one that has the same text and the same tokenizer: it is split otherwise."""
    config = two_steps
    state = checkpoint.load(checkpoint.latest_path(config.save_dir))
    assert state["data"]["rules"] == checkpoint.data_rules(state) == DATA_RULES
    other = dataclasses.replace(data.prepare(config, DATA_RULES), rules=3 - DATA_RULES)
    message = f"under version {DATA_RULES} of.*made under version {3 - DATA_RULES}"
    with pytest.raises(ExperimentError, match=message):
        Trainer(config, other, state, Path(config.save_dir))
    del state["data"]["rules"]  # an older checkpoint: version 1
    with pytest.raises(ExperimentError, match="under version 1 of.*made under version 2"):
        Trainer(config, dataclasses.replace(other, rules=2), state, Path(config.save_dir))


def test_resume_refuses_a_state_that_does_not_fit_the_model(two_steps):
    config = two_steps
    state = checkpoint.load(checkpoint.latest_path(config.save_dir))
    state["model"]["norm.weight"] = state["model"]["norm.weight"].half()
    with pytest.raises(checkpoint.CheckpointError, match="norm.weight"):
        build(config, state, Path(config.save_dir))


def test_resumed_config_keeps_shape_and_data_order():
    saved = dataclasses.asdict(Config(**PRESETS["tiny"]))
    config, changes = resumed_config(
        saved, dict(muon_lr=0.5, batch_size=4, gradient_accumulation_steps=4, eval_every=50)
    )
    assert config.muon_lr == 0.5 and config.batch_size == 4
    assert any(c.startswith("muon_lr: 0.02 -> 0.5") for c in changes) and not any(
        "eval_every" in c for c in changes
    )
    with pytest.raises(ConfigError) as refused:
        resumed_config(saved, dict(d_model=256, seed=7, batch_size=64))
    for name in ("d_model", "seed", "batch_size x gradient_accumulation_steps"):
        assert name in str(refused.value)


@pytest.mark.parametrize(
    "saved, options, sequences",
    [
        ({}, {}, 64),
        ({}, dict(batch_size=2, gradient_accumulation_steps=8), 64),
        ({}, dict(batch_size=2, gradient_accumulation_steps=8, eval_steps=4), 32),
        ({}, dict(eval_steps=4, eval_sequences=5), 5),
        (dict(eval_sequences=40), {}, 40),
        (dict(eval_sequences=40), dict(batch_size=4, gradient_accumulation_steps=4), 40),
        (dict(eval_sequences=40), dict(eval_steps=4), 20),
        (dict(eval_sequences=40), dict(eval_sequences=0), 40),
    ],
)
def test_a_resumed_run_validates_the_same_sequences(saved, options, sequences):
    """A checkpoint of before eval_sequences has eval_steps times its batch_size: 8 x 8 in tiny."""
    fields = dataclasses.asdict(Config(**PRESETS["tiny"]))
    del fields["eval_sequences"]
    config, changes = resumed_config(fields | saved, options)
    assert config.eval_sequences == sequences
    said = [words for words in changes if words.startswith("eval_sequences")]
    before = saved.get("eval_sequences", 64)
    expected = []
    if sequences != before:
        expected = [f"eval_sequences: {before} -> {sequences}"]
    assert said == expected


# ---------------------------------------------------------------- overflow and divergence


def poison(trainer, value, when):
    """Puts inf or nan into one gradient of the model at the micro-batches for which when(n) holds."""
    p, seen = trainer.parameters["blocks.1.ffn.experts.down"], [0]

    def hook(grad):
        seen[0] += 1
        if when(seen[0]):
            grad = grad.clone()
            grad[1, 2, 3] = value
        return grad

    p.register_hook(hook)


@pytest.mark.parametrize(
    "form, value",
    [
        ("fp16-split", math.inf),
        ("fp16-split", math.nan),
        ("fp16-offload", math.inf),
        ("bf16-split", math.nan),
        ("fp32", math.inf),
    ],
)
def test_overflow_changes_nothing_but_the_scale_and_the_run_goes_on(settings, form, value):
    config = settings(save_every=0, save_minutes=0, **FORMS[form])
    trainer = build(config)
    poison(trainer, value, when=lambda n: n == 7)  # the fourth step's first micro-batch
    batches = data.batches(trainer.corpus.train, config, 0)
    for _ in range(3):
        assert trainer.train_step(batches)
    before = {k: t.clone() for k, t in states(trainer).items()}
    scale, steps = trainer.scaler.scale, trainer.optimizers["adamw"].steps
    assert not trainer.train_step(batches)
    assert all(torch.equal(before[k], t) for k, t in states(trainer).items())
    assert (trainer.step, trainer.optimizers["adamw"].steps, trainer.tokens_seen) == (
        3,
        steps,
        3 * config.tokens_per_step,
    )
    assert trainer.scaler.scale == (scale / 2 if form.startswith("fp16") else 1)
    assert trainer.data_position == 4 * config.sequences_per_step, "the batch is not retried"
    assert trainer.skipped_steps == 1 and all(p.grad is None for p in trainer.parameters.values())
    assert trainer.train_step(batches) and trainer.step == 4
    assert all(torch.isfinite(t.float()).all() for t in states(trainer).values())


def test_overflow_at_the_smallest_scale_stops_with_advice(settings):
    trainer = build(settings(precision="fp16", loss_scale=4.0))
    poison(trainer, math.inf, when=lambda n: True)
    with pytest.raises(
        Diverged, match="10 batches in a row.*smallest loss scale.*\n.*muon_lr.*bf16"
    ):
        trainer.run()
    assert trainer.skipped_steps == 2 + 10 and trainer.step == 0  # 4 -> 2 -> 1, then ten at 1


def test_fp32_is_not_told_to_try_fp32_and_has_no_loss_scale(settings, capsys):
    trainer = build(settings(precision="fp32"))
    poison(trainer, math.inf, when=lambda n: True)
    with pytest.raises(Diverged, match="--warmup_fraction\\.\n") as diverged:
        trainer.run()
    out = capsys.readouterr().out
    assert "step 1: the gradients are inf or nan; batch skipped" in out
    assert "loss scale" not in str(diverged.value) + out


def test_a_dense_model_has_nothing_to_balance_with_a_bias(settings):
    trainer = build(settings(num_experts=0, load_balancing="bias", max_steps=2))
    trainer.run()
    assert trainer.step == 2


@pytest.mark.slow
def test_search_for_the_scale_does_not_stop_a_run(settings):
    trainer = build(settings(precision="fp16", loss_scale=2.0**40, max_steps=1, eval_every=100))
    trainer.run()
    assert trainer.step == 1 and trainer.skipped_steps > 10 and trainer.scaler.scale < 2.0**30


def test_a_loss_that_is_not_finite_stops_with_advice_and_saves_nothing(settings):
    trainer = build(settings(precision="fp16"))
    with torch.no_grad():
        trainer.parameters["norm.weight"].fill_(math.nan)
    with pytest.raises(Diverged, match="loss is nan.*bf16(.|\n)*muon_lr(.|\n)*No checkpoint"):
        trainer.train_step(data.batches(trainer.corpus.train, trainer.config, 0))


# ---------------------------------------------------------------- the step


def test_clipping_and_scale_are_one_factor_on_gradients_that_stay_as_they_are(
    settings, monkeypatch
):
    for form in ("fp32", "fp16-split"):
        trainer = build(settings(grad_clip=0.01, loss_scale=1024.0, **FORMS[form]))
        seen = {}
        monkeypatch.setattr(
            trainer.optimizers["muon"],
            "step",
            lambda lr, grad_scale: seen.update(
                grad_scale=grad_scale, grads=[p.grad.clone() for p in trainer.parameters.values()]
            ),
        )
        monkeypatch.setattr(
            trainer.optimizers["adamw"],
            "step",
            lambda lr, grad_scale: seen.update(adamw=grad_scale),
        )
        trainer.train_step(data.batches(trainer.corpus.train, trainer.config, 0))
        norm = torch.stack([g.double().norm() for g in seen["grads"]]).norm().item()
        assert seen["grad_scale"] == seen["adamw"]
        assert norm * seen["grad_scale"] == pytest.approx(0.01, rel=1e-3)
        assert trainer.interval.sums["grad_norm"] == pytest.approx(
            norm / trainer.scaler.scale, rel=1e-4
        )
        trainer.config = dataclasses.replace(trainer.config, grad_clip=1000.0)
        trainer.train_step(data.batches(trainer.corpus.train, trainer.config, 0))
        assert seen["grad_scale"] == 1 / trainer.scaler.scale, "smaller gradients do not grow"


def test_the_split_into_micro_batches_does_not_change_a_step(settings):
    """With balancing within sequences; a batch is then a sum over its sequences."""
    results = []
    for batch, accumulation in ((1, 4), (4, 1)):
        trainer = build(
            settings(
                batch_size=batch,
                gradient_accumulation_steps=accumulation,
                load_balancing_scope="sequence",
                grad_clip=0,
            )
        )
        batches = data.batches(trainer.corpus.train, trainer.config, 0)
        for _ in range(3):
            trainer.train_step(batches)
        results.append({k: p.detach().clone() for k, p in trainer.parameters.items()})
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-4, atol=2e-5), name


def test_schedule_is_a_pure_function_of_the_step():
    c = Config(max_steps=100, warmup_fraction=0.1, min_lr_fraction=0.2)
    factors = [lr_schedule(s, c) for s in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert (
        factors[10] == 1
        and factors[-1] == pytest.approx(0.2)
        and factors[54:56] == pytest.approx([0.6, 0.6], abs=0.02)
    )
    assert all(a >= b for a, b in zip(factors[10:], factors[11:]))
    assert lr_schedule(0, dataclasses.replace(c, warmup_fraction=0.0)) == 1


# ---------------------------------------------------------------- what is written down


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):  # noqa: F811
    """A run of 30 steps that is done: (the trainer, the calls of check_free_space)."""
    config = small_config(
        text,
        tmp_path_factory.mktemp("finished") / "run",
        max_steps=30,
        log_every=1,
        eval_every=10,
        eval_steps=3,
        save_every=4,
        keep_checkpoints=2,
        sample_tokens=5,
    )
    checks = []
    with pytest.MonkeyPatch.context() as patch:
        trainer = build(config)
        patch.setattr(
            checkpoint, "check_free_space", lambda folder, size: checks.append((trainer.step, size))
        )
        trainer.run()
    return trainer, checks


@pytest.mark.slow
def test_rows_of_training_metrics(finished):
    config = finished[0].config
    train = rows(config, "train_loss")
    assert [row["step"] for row in train] == list(range(1, 31)), "a step is an optimizer step"
    assert train[-1]["train_loss"] < train[0]["train_loss"] - 0.5
    for row in train:
        assert row["train_perplexity"] == pytest.approx(math.exp(row["train_loss"]))
        assert len(row["expert_load"]) == 2
        for layer in row["expert_load"]:
            assert sum(layer) == pytest.approx(1, abs=1e-3)
        assert 0 <= row["train_accuracy"] <= 1
        assert row["tokens_per_second"] > 0
        assert row["mfu"] is None
        lr_share = lr_schedule(row["step"] - 1, config)
        assert row["muon_lr"] == pytest.approx(config.muon_lr * lr_share)
        assert row["adamw_lr"] == pytest.approx(config.adamw_lr * lr_share)
        assert row["tokens_seen"] == row["step"] * config.tokens_per_step


def test_rows_of_evaluations(finished):
    validation = rows(finished[0].config, "val_loss")
    assert [row["step"] for row in validation] == [0, 10, 20, 30]
    samples = [row["sample"] for row in validation]
    assert all(samples)
    assert len(set(samples)) > 1
    assert validation[-1]["val_loss"] < validation[0]["val_loss"] - 0.5


def test_results_and_curves(finished):
    trainer, _ = finished
    config = trainer.config
    last = rows(config, "val_loss")[-1]
    results = json.loads((trainer.folder / "training_results.json").read_text())
    assert results.keys() >= {"config", "environment", "parameters", "data", "memory_gb"}
    assert results["final_metrics"]["val_loss"] == last["val_loss"]
    assert "sample" not in results["final_metrics"]
    assert results["totals"]["steps"] == 30
    assert results["history"][-1]["sample"] == last["sample"]
    assert len(results["history"]) == 34
    assert results["parameters"]["total"] == config.total_params
    assert results["sample"]["text"]
    assert Config(**results["config"]) == config
    assert (trainer.folder / "training_curves.png").stat().st_size > 10_000
    assert not list(trainer.folder.glob(".*")), "no temporary file is left"


@pytest.mark.slow
def test_curves_are_drawn_now_and_then_and_at_the_end(settings, monkeypatch):
    drawn = []

    def draw(history, *args, **kwargs):
        drawn.append(history[-1]["step"])

    monkeypatch.setattr("trainer.plot_training_curves", draw)
    short = dict(max_steps=4, eval_every=2, save_every=0)
    build(settings(**short)).run()
    assert drawn == [4], "in less than a minute, at the end alone"

    drawn.clear()
    monkeypatch.setattr(results, "CURVES_SECONDS", 0)
    build(settings(**short)).run()
    assert drawn == [0, 2, 4, 4]

    drawn.clear()
    monkeypatch.setattr(results, "CURVES_SECONDS", 60)
    trainer = build(settings(**short))
    trainer.record.last_curves -= 61
    trainer.run()
    assert drawn == [0, 4], "and then not for a minute"

    drawn.clear()
    run_to(build(settings(**short)), 1)
    assert drawn == [0], "also when a signal ends the run"

    drawn.clear()
    trainer = build(settings(**short, precision="fp16", loss_scale=1.0))
    poison(trainer, math.inf, when=lambda n: trainer.step == 2)
    with pytest.raises(Diverged):
        trainer.run()
    assert drawn == [2], "and when it diverges"


def test_curves_that_cannot_be_drawn_do_not_hide_why_a_run_diverged(settings, monkeypatch):
    def draw(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr("trainer.plot_training_curves", draw)
    trainer = build(settings(precision="fp16", loss_scale=1.0))
    poison(trainer, math.inf, when=lambda n: True)
    with pytest.raises(Diverged):
        trainer.run()


def test_validation_loss_is_the_mean_over_its_windows(finished):
    trainer, _ = finished
    config = trainer.config
    batches = list(data.validation_batches(trainer.corpus.validation, config))
    inputs = torch.cat([batch[0] for batch in batches])
    targets = torch.cat([batch[1] for batch in batches])
    assert inputs.shape == (6, 16)
    with torch.no_grad():
        logits = trainer.model(inputs).flatten(0, 1).double()
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten())
    assert rows(config, "val_loss")[-1]["val_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_validation_is_the_same_for_every_micro_batch(settings):
    """Also where the sequences do not fill the last batch."""
    found = []
    for batch_size in (1, 3, 4, 8):
        trainer = build(settings(batch_size=batch_size, eval_sequences=7))
        found.append(trainer._validate())
    for validation in found:
        assert validation["val_tokens"] == 7 * 16
        assert validation["val_loss"] == pytest.approx(found[0]["val_loss"], rel=1e-6)
        assert validation["val_accuracy"] == found[0]["val_accuracy"]


@pytest.mark.slow
def test_a_spike_of_the_gradient_norm_names_its_parameter(settings):
    trainer = build(settings(log_every=1, eval_every=100))
    poison(trainer, 1e4, when=lambda n: n == 2 * 12)
    trainer.run()
    spikes = []
    for row in rows(trainer.config, "grad_norm_spike"):
        spikes.append((row["step"], row["grad_norm_spike"]["parameter"]))
    assert spikes == [(12, "blocks.1.ffn.experts.down")]
    assert "sample" not in rows(trainer.config, "val_loss")[-1], "sample_tokens is 0"


def test_checkpoints_are_numbered_kept_and_linked(finished):
    trainer, _ = finished
    folder = trainer.folder
    assert {path.name for path in folder.glob("*.pt")} == {
        "checkpoint_step_28.pt",
        "checkpoint_step_30.pt",
        "checkpoint_latest.pt",
    }
    assert (folder / "checkpoint_latest.pt").samefile(folder / "checkpoint_step_30.pt")
    state = torch.load(folder / "checkpoint_latest.pt", weights_only=True)
    assert state.keys() >= {
        "model",
        "optimizer",
        "schedule",
        "loss_scaler",
        "random",
        "data_position",
        "metrics",
        "config",
        "step",
    }
    assert state["config"]["d_model"] == 32
    assert state["data_position"] == 30 * trainer.config.sequences_per_step


def test_free_space_is_checked_before_the_first_step(finished):
    trainer, checks = finished
    [(step, size)] = checks
    assert step == 0
    # keep_checkpoints 2, one more while it is written, and the latest that save_minutes writes
    assert size == pytest.approx(4 * checkpoint_gb(trainer.config) * 1e9)
    file_size = checkpoint.latest_path(trainer.folder).stat().st_size
    tokenizer_and_plain = 100_000
    assert abs(size / 4 - file_size) < tokenizer_and_plain + 0.05 * file_size


def test_saving_by_minutes_writes_latest_alone_and_zero_switches_off(settings, tmp_path):
    build(settings(save_every=0, save_minutes=1e-9, max_steps=3)).run()
    assert [path.name for path in (tmp_path / "run").glob("*.pt")] == ["checkpoint_latest.pt"]
    off = settings(save_every=0, save_minutes=0, max_steps=3, save_dir=str(tmp_path / "off"))
    run_to(build(off), 2)
    assert not list((tmp_path / "off").glob("*.pt"))


@pytest.mark.parametrize(
    "form", ["fp32", pytest.param("bf16-split", marks=pytest.mark.slow), "fp16-split"]
)
def test_load_model_decodes_the_exact_masters(settings, form):
    trainer = build(settings(max_steps=3, save_every=3, eval_every=100, **FORMS[form]))
    trainer.run()
    model, config = checkpoint.load_model(checkpoint.latest_path(trainer.config.save_dir))
    assert not model.training and config.precision == trainer.config.precision
    all_states = {
        **trainer.optimizers["muon"].state.tensors,
        **trainer.optimizers["adamw"].state.tensors,
    }
    for name, p in model.named_parameters():
        weight = trainer.parameters[name].detach()
        master = read_master(weight, all_states[name])
        assert p.dtype == torch.float32 and torch.equal(p, master)
        if form != "fp32" and weight.ndim > 1 and "router" not in name:
            assert not torch.equal(p, weight.float()), "the residual counts"
    assert model(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.float32


# ---------------------------------------------------------------- before the first step, and running out


@pytest.mark.slow
def test_a_branch_needs_room_beside_the_other(settings):
    config = settings(max_steps=6, save_every=2, save_minutes=0, keep_checkpoints=3)
    build(config).run()
    first = checkpoint.step_path(config.save_dir, 2)
    branch = Trainer(config, data.prepare(config), checkpoint.load(first), first)
    assert branch.checkpoint_bytes_to_come() == pytest.approx(2 * checkpoint_gb(config) * 1e9)
    checkpoint.step_path(
        config.save_dir, 6
    ).unlink()  # the latest is the only copy then, and is kept
    assert branch.checkpoint_bytes_to_come() == pytest.approx(2 * checkpoint_gb(config) * 1e9)


def test_forecast_warns_above_four_passes(settings, capsys):
    trainer = build(settings(max_steps=5000))
    trainer._open_folder()
    out = capsys.readouterr()
    assert (
        "training tokens" in out.out
        and "passes over the corpus" in out.out
        and "warning" in out.err
    )
    build(settings(max_steps=10))._open_folder()
    assert "warning" not in capsys.readouterr().err


def test_out_of_memory_carries_the_plans_advice(settings, monkeypatch):
    monkeypatch.setitem(
        CPU_LIBRARY_GB, 4, 0
    )  # nearly all of so small a run's memory, whatever the choice
    trainer = build(settings(activation_checkpointing="none", batch_size=8, max_seq_len=128))

    def no_memory(batches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(trainer, "train_step", no_memory)
    with pytest.raises(
        OutOfMemory,
        match=r"out of memory at step 1.*\n.*--batch_size \d+ --gradient_accumulation_steps",
    ):
        trainer.run()


def test_no_host_memory_for_streaming(settings):
    trainer = build(settings(offload_optimizer="true"))
    trainer.machine = Machine("a GPU", 80, 1e-6)
    with pytest.raises(ExperimentError, match="no host memory.*--host_memory_gb"):
        trainer._build(trainer.config)


def test_a_configuration_that_is_not_expected_to_fit_goes_on_with_its_gradients_on_the_host(
    settings, monkeypatch
):
    monkeypatch.setattr(Choice, "fits", lambda *_: False)
    assert build(settings(host_gradient_blocks=1)).config.offload_optimizer == "true"


def test_a_run_larger_than_a_cpu_has_memory_is_refused(settings):
    """All of it, as the system would kill it in the first step; and with what would fit, where something does."""
    with pytest.raises(
        ExperimentError,
        match="B are predicted and 0.0 MB of this machine.*\n.*smaller --preset.*--host_memory_gb",
    ):
        build(settings(host_memory_gb=1e-6))
    large = settings(batch_size=64, max_seq_len=16384)
    with pytest.raises(
        ExperimentError, match="2.0 GB of this machine.*\n.*This would fit: --batch_size"
    ):
        check_fits(large, Machine(None, 0, 2))


def test_only_a_run_that_is_short_of_memory_pays_for_returning_it(settings, monkeypatch):
    returned = []
    monkeypatch.setattr("trainer.release_freed_memory", lambda: returned.append(True))
    needed = build(settings(host_memory_gb=1000)).predicted["total"]
    assert not returned
    build(settings(host_memory_gb=1.9 * needed))
    assert returned


@pytest.mark.slow
def test_adamw_alone_trains_every_parameter(settings):
    trainer = build(settings(optimizer="adamw", max_steps=20, eval_every=20))
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run()
    assert (
        not trainer.optimizers["muon"].state.tensors
        and trainer.optimizers["adamw"].state.tensors.keys() == trainer.parameters.keys()
    )
    assert all((p != before[name]).any() for name, p in trainer.parameters.items())
    first, last = rows(trainer.config, "val_loss")
    assert last["val_loss"] < first["val_loss"] - 0.1
    sizes, c = predict_memory(trainer.config, "none", 2, offload=False), trainer.config
    assert sizes["momentum"] == 0 and sizes["adamw"] == pytest.approx(8 * c.total_params / 1e9)


def test_a_bias_evens_the_load_that_the_router_would_not(settings):
    model = build(
        settings(load_balancing="bias", load_balancing_bias_rate=0.005, n_layers=1, top_k=2)
    ).model
    router, x = model.blocks[0].ffn.router, torch.randn(4, 64, 32)
    x[..., 0] = 3
    router.weight.data *= 8
    router.weight.data[:2, 0] = 0.5  # experts 0 and 1 for nearly every token
    loads = []
    for _ in range(120):
        with torch.no_grad():
            counts = model.blocks[0].ffn(x)[1][2]
        loads.append(counts.max().item() / counts.sum().item())
        model.balance(counts[None])
    assert loads[0] > 0.4 and max(loads[-10:]) < 0.3
    loss, metrics = model(*(torch.randint(300, (2, 16)) for _ in range(2)))
    assert loss == metrics["cross_entropy"], "no balancing loss beside it"


def test_a_bias_does_not_touch_the_weights_of_the_chosen(settings):
    trainer = build(settings(load_balancing="bias", top_k=2))
    router, x = trainer.model.blocks[0].ffn.router, torch.randn(2, 8, 32)
    router.bias.copy_(torch.tensor([0, 0, 9.0, 9.0]))
    _, probs, weights, experts, _ = router(x)
    assert (experts >= 2).all()
    chosen = probs.gather(-1, experts)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    model, _ = checkpoint.model_from_state(trainer.state_dict())
    assert torch.equal(model.blocks[0].ffn.router.bias, router.bias)
