"""The whole program with two ranks, as torchrun would start them: how it ends."""

import os
import signal
from functools import partial

import pytest
import torch

import run_experiment
import trainer
from config import ExperimentError
from record import checkpoint
from tests.engine.ranks import Run
from tests.test_leaving import ENDLESS, arguments, has_trained, wait_until
from tests.training import no_pictures, text

__all__ = ["no_pictures", "text"]  # fixtures


@pytest.fixture
def start(text, tmp_path):
    """start() starts an endless run of two ranks in tmp_path/run."""
    argv = arguments(text, tmp_path / "run", **ENDLESS, log_every=2)
    return partial(Run, tmp_path, 2, run_experiment.train, argv)


@pytest.mark.slow
def test_a_signal_to_a_rank_that_is_not_the_first_saves_and_stops_all(start, tmp_path):
    run = start()
    wait_until(lambda: has_trained(tmp_path / "run"))
    os.kill(run.pids[1], signal.SIGTERM)
    assert run.codes(30) == [143, 143]
    assert run.printed().count("Stopped at step") == 1 and "--gpus 2" in run.printed()
    assert checkpoint.load(tmp_path / "run" / "checkpoint_latest.pt")["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, code",
    [(torch.OutOfMemoryError("out of memory"), 4), (ExperimentError("out of shards"), 1)],
)
def test_an_error_of_one_rank_ends_the_run(start, monkeypatch, error, code):
    """It must reach the others: a rank that saved first would wait for them without end."""
    take = trainer.Trainer.train_step

    def train_step(run, batches):
        if run.step == 2 and run.ranks.rank == 1:
            raise error
        return take(run, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    run = start()
    assert run.codes(30) == [code, code]
    assert run.printed().count("out of") == 1 and "rank 1: error: " in run.printed()
