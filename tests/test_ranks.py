"""The whole program with two ranks, as torchrun would start them: how it ends."""

import errno
import os
import signal
import time
from functools import partial

import pytest
import torch

import data
import run_experiment
import trainer
from config import DATA_RULES, ConfigError, ExperimentError
from engine import lifeline
from engine.distributed import Ranks, check_machines
from record import archive, checkpoint
from record.stop import AgreedStop
from tests.engine.ranks import Run
from tests.test_leaving import ENDLESS, SHORT, arguments, has_trained, wait_until
from tests.training import no_pictures, settings, small_config, text

__all__ = ["no_pictures", "settings", "text"]  # fixtures


@pytest.fixture(autouse=True)
def prepared(text, tmp_path):
    """The tokenized text. In a fork the tokenizer hangs whose threads this process has started."""
    data.prepare(small_config(text, tmp_path))


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


@pytest.mark.slow
def test_data_that_one_rank_cannot_read_end_the_run_saved(start, monkeypatch, tmp_path):
    read = data.sequences

    def sequences(tokens, seq_len, seed, position, *arguments):
        if position >= 60 and os.environ["RANK"] == "1":
            raise ExperimentError("cannot read the shard")
        return read(tokens, seq_len, seed, position, *arguments)

    def slow_results(run, *_arguments):
        if run.ranks.is_first:
            time.sleep(3)  # the other rank must wait
            (tmp_path / "results are written").touch()

    monkeypatch.setattr(data, "sequences", sequences)
    monkeypatch.setattr(trainer.Trainer, "_write_last_results", slow_results)
    run = start()
    assert run.codes(60) == [1, 1]
    assert "error: cannot read the shard" in run.printed() and "rank 1" not in run.printed()
    assert (tmp_path / "results are written").exists()
    state = checkpoint.load(tmp_path / "run" / "checkpoint_latest.pt")
    config = state["config"]
    sequences_of_a_step = config["batch_size"] * config["gradient_accumulation_steps"]
    assert state["data_position"] == state["step"] * sequences_of_a_step > 0


@pytest.mark.slow
def test_a_last_checkpoint_that_fails_is_an_error_of_all(text, monkeypatch, tmp_path):
    """The other rank must not end the first one while that writes the results."""

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def slow_results(run, *_arguments):
        if run.ranks.is_first:
            time.sleep(3)
            (tmp_path / "results are written").touch()

    monkeypatch.setattr(archive, "write_bytes", full)
    monkeypatch.setattr(trainer.Trainer, "_write_last_results", slow_results)
    argv = arguments(text, tmp_path / "run", **SHORT, num_workers=0)
    run = Run(tmp_path, 2, run_experiment.train, argv)
    assert run.codes(60) == [1, 1]
    assert (tmp_path / "results are written").exists()
    printed = run.printed()
    assert "rank 1: error" not in printed and printed.count("\nerror: ") == 1
    assert not list((tmp_path / "run").glob("*.pt")) + list((tmp_path / "run").glob(".*.tmp"))


def test_the_first_signal_of_a_rank_does_not_count_as_its_second(monkeypatch):
    """The ranks have agreed on a stop before the scheduler's signal has come to this one."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with AgreedStop() as stop:
        stop.agree([signal.SIGINT, None])
        signal.raise_signal(signal.SIGINT)
        assert not ended and stop.requested
        signal.raise_signal(signal.SIGINT)
    assert ended == [stop.exit_code] == [130]


def test_machines_with_different_numbers_of_ranks_are_refused():
    check_machines([(2, "a"), (2, "a"), (2, "b"), (2, "b")])
    for found, message in (
        ([(2, "a"), (2, "a"), (1, "b")], "1 or 2 for 3 ranks"),
        ([(4, "a"), (4, "a"), (4, "b"), (4, "b")], "are on a, b"),
        ([(2, "a"), (2, "b"), (2, "a"), (2, "b")], "neighbouring"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_machines(found)


def test_machines_with_other_data_are_refused(settings):
    class OtherText(Ranks):
        def all_values(self, value):
            return [value, {**value, "data_hash": "another"}]

    with pytest.raises(ExperimentError, match="rank 1 finds other text"):
        run_experiment._prepared_corpus(settings(), DATA_RULES, OtherText())


def test_another_rank_says_that_its_reader_has_died(monkeypatch):
    """The first rank alone prints, but a rank that has become slow must say it."""

    class Dead:
        def __iter__(self):
            raise RuntimeError("killed")

    output, stderr = os.pipe()
    monkeypatch.setattr(lifeline._state, "rank", 1)
    monkeypatch.setattr(lifeline._state, "stderr", stderr)
    assert list(data._until_a_worker_dies(Dead())) == []
    os.close(stderr)
    with open(output) as file:
        assert file.read().startswith("rank 1: warning: a worker that reads data has died (killed)")
