"""One of the four processes that tests/engine/test_distributed.py starts: trains every case.

    python -m tests.engine.group_of_ranks TEXT FOLDER      with torchrun's variables

For N = 2, 3 and 4 the first N processes train a case together, as the ranks of one run. Each
process trains some cases alone, which is the reference. FOLDER/NAME.json has the losses and norms.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import data
import trainer
from engine.distributed import Ranks, start_ranks
from tests.training import small_config

SIZE = 4
STEPS = 30


@dataclass
class Case:
    """A configuration that is trained on several numbers of ranks."""

    changes: dict = field(default_factory=dict)
    steps: int = STEPS
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


CASES = {
    "moe": Case(),
    "reduced in every micro-batch": Case(dict(reduce_gradients="micro_batch")),
    "tied": Case(dict(tie_embeddings=True, moe_every=2)),
    "tied, in every micro-batch": Case(
        dict(tie_embeddings=True, moe_every=2, reduce_gradients="micro_batch"), 5
    ),
    "dense": Case(dict(num_experts=0), 5),
    "bias": Case(dict(load_balancing="bias")),
    "adamw": Case(dict(optimizer="adamw"), 5),
    "offload": Case(dict(offload_optimizer="true"), 5),
    "idle expert": Case(disturb=idle_in_one),
    "overflow": Case(dict(precision="fp16", loss_scale=1024.0), 5, overflow_in_one),
    "bf16": Case(dict(precision="bf16", reduce_gradients="micro_batch"), 5),
}


def train(case: Case, text: Path, ranks: Ranks, reverse: bool = False) -> dict:
    """The losses and gradient norms of each step. `reverse` takes each step's micro-batches in
    reverse order, which changes nothing but rounding.
    """
    values = dict(batch_size=2, gradient_accumulation_steps=6, reduce_gradients="step")
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
        different = trainer.different_replicas(run.parameters, ranks)
    sums = {
        key: value.tolist() if isinstance(value, torch.Tensor) else value
        for key, value in run.interval.sums.items()
    }
    return dict(steps=steps, different=different, sums=sums)


def _reversed(batches: Iterator, count: int) -> Iterator:
    while True:
        yield from reversed([next(batches) for _ in range(count)])


def main() -> None:
    text, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    world = start_ranks(torch.device("cpu"))
    data.prepare(small_config(text, folder)) if world.is_first else None
    world.wait_for_all()
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3)}
    for number, (name, case) in enumerate(CASES.items()):
        results = {}
        if number % SIZE == world.rank:
            results["1"] = train(case, text, Ranks())
            results["reversed"] = train(case, text, Ranks(), reverse=True)
            (folder / f"{name} alone.json").write_text(json.dumps(results))
    for name, case in CASES.items():
        results = {}
        for size in (2, 3, 4):
            if world.rank >= size:
                continue
            group = groups.get(size)
            ranks = dataclasses.replace(
                world, size=size, local_size=size, group=group, machine=group, waiting=group
            )
            results[size] = train(case, text, ranks)
        if world.is_first:
            (folder / f"{name}.json").write_text(json.dumps(results))
    world.wait_for_all()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
