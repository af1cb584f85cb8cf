"""Several ranks train as one does: the same losses and gradient norms, and replicas alike."""

import json
import multiprocessing
import socket
import time
from functools import partial

import pytest
import torch

from record import archive, checkpoint
from tests.engine import group_of_ranks
from tests.engine.group_of_ranks import CASES
from tests.training import text  # noqa: F401  (a fixture)

RUNS = ("2", "3", "4", "two machines")
EPSILON = 2.0**-23  # of fp32
# 16-bit sums over ranks round otherwise than those of one rank, from the first step on.
FIRST_STEP = {"overflow": 1e-4, "bf16": 1e-2}


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):  # noqa: F811
    """trained(case): the results of group_of_ranks.train by number of ranks, trained once."""
    folder = tmp_path_factory.mktemp("group")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # the other methods import torch four times
    processes = []
    for rank in range(group_of_ranks.SIZE):
        process = fork.Process(target=group_of_ranks.main, args=(rank, port, text, folder))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + 300
    for process in processes:
        process.join(deadline - time.monotonic())
        process.kill()
    outputs = [(folder / f"output_of_{rank}").read_text() for rank in range(len(processes))]
    assert all(process.exitcode == 0 for process in processes), "\n".join(outputs)[-3000:]

    def results(case: str) -> dict:
        alone = json.loads((folder / f"{case} alone.json").read_text())
        return alone | json.loads((folder / f"{case}.json").read_text())

    results.folder = folder
    return results


def column(result: dict, key: str) -> list[float]:
    return [step[key] for step in result["steps"] if key in step]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_norms_are_those_of_one_rank(trained, case):
    results = trained(case)
    for key in ("loss", "norm"):
        alone = column(results["1"], key)
        differently_rounded = column(results["reversed"], key)
        for run in RUNS:
            found = column(results[run], key)
            assert len(found) == len(alone), "another step was skipped"
            near = partial(pytest.approx, abs=0)
            assert found[0] == near(alone[0], rel=FIRST_STEP.get(case, 1e-6)), (run, key)
            rounding = max(abs(a - b) for a, b in zip(differently_rounded, alone))
            tolerance = 2 * max(rounding, FIRST_STEP.get(case, 4 * EPSILON) * alone[-1])
            assert found[-1] == pytest.approx(alone[-1], abs=tolerance, rel=0), (run, key)


@pytest.mark.parametrize("case", CASES)
def test_replicas_and_sums_of_metrics_are_alike(trained, case):
    results = trained(case)
    alone = results["1"]["sums"]
    for run in RUNS:
        assert results[run]["different"] == []
        assert results[run]["sums"].keys() == alone.keys()
        assert results[run]["sums"]["sequences"] == alone["sequences"]
        if case not in FIRST_STEP and "expert_counts" in alone:
            assert results[run]["sums"]["expert_counts"] == alone["expert_counts"]


@pytest.mark.parametrize("case", CASES)
def test_a_rank_has_the_predicted_gradients_and_state(trained, case):
    results = trained(case)
    for run in ("1", *RUNS):
        memory = results[run]["memory"]
        if memory["measured"][0] is None:  # a step was skipped, and the first ones are not measured
            continue
        keys = ("weights", "gradients", "master", "momentum", "adamw", "host")
        expected = [round(1e9 * memory["predicted"][key]) for key in keys]
        # predicted for the rank that owns most
        found = [[round(1e9 * rank[key]) for key in keys] for rank in memory["measured"]]
        assert expected in found, (run, expected, found)


def test_an_overflow_on_one_rank_is_one_on_all(trained):
    results = trained("overflow")
    for run in ("1", *RUNS):
        skipped = [
            number for number, step in enumerate(results[run]["steps"]) if "norm" not in step
        ]
        assert skipped == [1]


# ---------------------------------------------------------------- checkpoints


def tensors_at(trained, run: str, step: int) -> dict:
    state = checkpoint.load(trained.folder / run / f"checkpoint_step_{step}.pt")
    tensors, _ = archive.split(state)
    return tensors


@pytest.mark.parametrize("run", ["saved by 2", "saved by two machines"])
def test_a_checkpoint_of_several_ranks_has_what_one_rank_saves(trained, run):
    alone = tensors_at(trained, "alone", 3)
    found = tensors_at(trained, run, 3)
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        assert found[name].dtype == tensor.dtype
        if not name.startswith("random/"):
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_the_same_number_of_ranks_resumes_to_the_bit(trained):
    whole = tensors_at(trained, "saved by 2", 6)
    resumed = tensors_at(trained, "resumed by 2", 6)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize("run", ["resumed by 1", "resumed by 3"])
def test_another_number_of_ranks_resumes(trained, run):
    whole = tensors_at(trained, "saved by 2", 6)
    resumed = tensors_at(trained, run, 6)
    for name, tensor in whole.items():
        if not name.startswith("random/"):
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_the_first_rank_alone_writes(trained):
    rows = (trained.folder / "saved by 2" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows if "train_loss" in row]
    assert steps == sorted(set(steps))
    assert json.loads(rows[-1])["step"] == 6
    left = {path.name for path in (trained.folder / "saved by 2").iterdir()}
    assert not [name for name in left if name.endswith(".tmp")]
