"""The four processes that tests/engine/test_distributed.py starts, and what they train.

For N = 2, 3 and 4 the first N processes train a case together, as the ranks of one run. All four
also are two machines of two ranks. Each process trains some cases alone, which is the reference.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import data
import trainer
from config import ExperimentError
from engine.distributed import Ranks, _groups_of_machines, start_ranks
from record import checkpoint
from tests.training import small_config

SIZE = 4
STEPS = 30


@dataclass
class Case:
    """A configuration that is trained on several numbers of ranks."""

    changes: dict = field(default_factory=dict)
    steps: int = 3
    # Called with the trainer and the number of a micro-batch of the run before it is computed
    disturb: Callable = lambda run, micro_batch: None


def overflow_in_one(run: trainer.Trainer, micro_batch: int) -> None:
    """Lets the gradients of one micro-batch of the second step overflow fp16."""
    accumulation = run.config.gradient_accumulation_steps
    run.model.loss_factor = 1e30 if micro_batch == accumulation + 1 else 1.0


def idle_in_one(run: trainer.Trainer, micro_batch: int) -> None:
    """No token of every fifth micro-batch goes to expert 0."""
    for block in run.model.blocks:
        router = block.ffn.router
        router.bias = torch.zeros(run.config.num_experts)
        if micro_batch % 5 == 1:
            router.bias[0] = -10.0


MICRO = dict(reduce_gradients="micro_batch")
CASES = {
    "moe": Case(steps=STEPS),
    "every micro-batch": Case(dict(MICRO, load_balancing="bias")),
    "tied": Case(dict(tie_embeddings=True, moe_every=2)),
    "tied, every micro-batch": Case(dict(MICRO, tie_embeddings=True, moe_every=2)),
    "dense": Case(dict(num_experts=0)),
    "adamw": Case(dict(optimizer="adamw")),
    "offload": Case(dict(offload_optimizer="true")),
    "idle expert": Case(disturb=idle_in_one),
    "overflow": Case(dict(precision="fp16", loss_scale=1024.0), disturb=overflow_in_one),
    "bf16": Case(dict(MICRO, precision="bf16")),
}


def train(case: Case, text: Path, ranks: Ranks, reverse: bool = False) -> dict:
    """The losses and gradient norms of each step. `reverse` takes each step's micro-batches in
    reverse order, which changes nothing but rounding.
    """
    values = dict(batch_size=2, gradient_accumulation_steps=5, reduce_gradients="step")
    config = small_config(text, text.parent / "never_written", **{**values, **case.changes})
    run = trainer.Trainer(config, data.prepare(config), ranks=ranks)
    steps = []
    watch = run._watch_norm
    run._watch_norm = lambda norm, norms: (steps[-1].update(norm=norm), watch(norm, norms))
    check = run._check_loss
    run._check_loss = lambda loss: (steps[-1].update(loss=loss), check(loss))
    own = ranks.micro_batches(config.gradient_accumulation_steps)
    forward = run.model.forward
    count = iter(range(10**9))
    run.model.loss_factor = 1.0

    def disturbed(tokens, targets):
        step, index = divmod(next(count), len(own))
        case.disturb(run, step * config.gradient_accumulation_steps + own[index])
        loss, metrics = forward(tokens, targets)
        return loss * run.model.loss_factor, metrics

    run.model.forward = disturbed
    batches = run._batches()
    if reverse:
        batches = _reversed(batches, config.gradient_accumulation_steps)
    for _ in range(case.steps):
        steps.append({})
        run.train_step(batches)
    different = []
    if ranks.size > 1:
        replicas = dict(run.parameters)
        if config.load_balancing == "bias":
            replicas |= run.model.balancing_biases()
        different = trainer.different_replicas(replicas, ranks)
    sums = {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in run.interval.sums.items()
    }
    memory = dict(
        predicted=run.predicted,
        measured=ranks.all_values(run.meter.measured_gb),  # of each rank
    )
    return dict(steps=steps, different=different, sums=sums, memory=memory)


def _reversed(batches: Iterator, count: int) -> Iterator:
    while True:
        yield from reversed([next(batches) for _ in range(count)])


def save_and_resume(text: Path, folder: Path, runs: dict[str, Ranks | None]) -> None:
    """Two ranks train to step 6, and save at 3. From there 1, 2 and 3 ranks train to step 6.

    So do two machines of two ranks, and one rank alone.
    """

    def go(name: str, ranks: Ranks | None, resumed_from: Path | None = None) -> None:
        if ranks is None:
            return
        config = small_config(
            text, folder / name, max_steps=6, save_every=3, gradient_accumulation_steps=4
        )
        (folder / name).mkdir(exist_ok=True)
        state = None
        if resumed_from is not None:
            state = checkpoint.load(resumed_from)
        run = trainer.Trainer(config, data.prepare(config), state, resumed_from, ranks=ranks)
        run.run()
        if name == "resumed by 3":
            _check_that_a_stopped_evaluation_ends(run)
            _check_that_unreadable_data_are_an_error_of_all(run)

    go("saved by two machines", runs["two machines"])
    go("saved by 2", runs["2"])
    runs["4"].wait_for_all()
    saved = folder / "saved by 2" / "checkpoint_step_3.pt"
    go("resumed by 2", runs["2"], saved)
    go("resumed by 3", runs["3"], saved)
    if runs["2"] is None and runs["3"] is None:
        go("resumed by 1", Ranks(), saved)
        go("alone", Ranks())


def _check_that_a_stopped_evaluation_ends(run: trainer.Trainer) -> None:
    """All ranks leave it at the same place, although there is no batch for the last one."""
    batches = list(data.validation_batches(run.corpus.validation, run.config))
    assert len(batches) < run.ranks.size
    run.stop.agree([None, 15, None])
    assert run._validate() is None
    assert run.stop.exit_code == 128 + 15


def _check_that_unreadable_data_are_an_error_of_all(run: trainer.Trainer) -> None:
    """A rank cannot read the data of an evaluation: all ranks raise that, and could still save."""
    read = data.validation_batches

    def unreadable(*arguments):
        if run.ranks.rank == 1:
            raise ExperimentError("cannot read the held-out text")
        return read(*arguments)

    data.validation_batches = unreadable
    with pytest.raises(ExperimentError, match="held-out text") as raised:
        run._validate()
    data.validation_batches = read
    assert raised.value.of_all_ranks


def _check_that_memory_is_measured_first(text: Path, folder: Path, ranks: Ranks) -> None:
    """No rank takes memory before all have seen what is free, however slow one of them is."""
    times = {}
    measure = trainer.machine_of_device

    def slowly(*arguments):
        if ranks.rank == ranks.size - 1:
            time.sleep(0.3)
        times["measured"] = time.monotonic()
        return measure(*arguments)

    class Timed(trainer.Trainer):
        def _build(self, config):
            times["built"] = time.monotonic()
            super()._build(config)

    trainer.machine_of_device = slowly
    config = small_config(text, folder, gradient_accumulation_steps=4)
    Timed(config, data.prepare(config), ranks=ranks)
    trainer.machine_of_device = measure
    all_times = ranks.all_values(times)
    last_measured = max(times["measured"] for times in all_times)
    assert last_measured < min(times["built"] for times in all_times)


def main(rank: int, port: int, text: Path, folder: Path) -> None:
    """What process `rank` does. Writes losses and norms to FOLDER/NAME.json, by number of ranks."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    sys.stdout = sys.stderr = open(folder / f"output_of_{rank}", "w", buffering=1)
    torch.set_num_threads(1)
    trainer.plot_training_curves = lambda *_arguments, **_options: None  # it takes longer than all
    world = start_ranks(torch.device("cpu"))
    if world.is_first:
        data.prepare(small_config(text, folder))
    world.wait_for_all()
    runs = {str(size): _first_ranks(world, size) for size in (2, 3, 4)}
    runs["two machines"] = _two_machines(world)
    for number, (name, case) in enumerate(CASES.items()):
        if number % SIZE == rank:
            results = {"1": train(case, text, Ranks())}
            results["reversed"] = train(case, text, Ranks(), reverse=True)
            (folder / f"{name} alone.json").write_text(json.dumps(results))
    for name, case in CASES.items():
        results = {}
        for kind, ranks in runs.items():
            if ranks is not None:
                results[kind] = train(case, text, ranks)
        if world.is_first:
            (folder / f"{name}.json").write_text(json.dumps(results))
    save_and_resume(text, folder, runs)
    _check_that_memory_is_measured_first(text, folder, runs["4"])
    world.wait_for_all()
    dist.destroy_process_group()


def _first_ranks(world: Ranks, size: int) -> Ranks | None:
    """The first `size` processes as the ranks of a run; None in the others."""
    group = dist.new_group(list(range(size)))
    if world.rank >= size:
        return None
    return dataclasses.replace(
        world, size=size, local_size=size, group=group, machine=group, waiting=group
    )


def _two_machines(world: Ranks) -> Ranks:
    machine, across = _groups_of_machines(world.rank, SIZE, 2)
    local_rank = world.rank % 2
    return dataclasses.replace(
        world, local_rank=local_rank, local_size=2, machine=machine, across=across
    )
