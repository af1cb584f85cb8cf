"""What several GPUs share of one run: micro-batches, and the rows that each one owns.

Every GPU holds all weights. Gradients and optimizer state are split by owner, as
engine/ownership.py says. Owners are the GPUs of one machine, and every machine has the same. The
micro-batches of a step are dealt out to all GPUs of all machines: a rank is one of these.
"""

import math
from dataclasses import dataclass

from config import Config, ConfigError, parameter_table
from engine.ownership import SMALL_KINDS, is_even, ownership

# ---------------------------------------------------------------- rows


def owned_elements(config: Config, gpus: int) -> dict[str, int]:
    """Elements of each parameter that a GPU owns: the one that owns most of all `gpus`.

    Parameters of which it owns nothing are left out. One GPU owns all.
    """
    table = parameter_table(config)
    if gpus == 1:
        return {name: spec.numel for name, spec in table.items()}
    owned: list[dict[str, int]] = [{} for _ in range(gpus)]
    for name, shards in ownership(config, gpus).items():
        numel_of_a_row = table[name].numel // table[name].shape[0]
        for shard in shards:
            of_owner = owned[shard.owner]
            rows = shard.stop - shard.start
            of_owner[name] = of_owner.get(name, 0) + rows * numel_of_a_row
    return max(owned, key=lambda of_owner: sum(of_owner.values()))


def evenly_owned(config: Config, gpus: int) -> set[str]:
    """The parameters of which every GPU owns equally many rows.

    One collective reduces the gradient of such a parameter: a GPU gets a new tensor, its rows' sum.
    All others are reduced in place.
    """
    shards = ownership(config, gpus)
    table = parameter_table(config)
    return {
        name
        for name in table
        if table[name].kind not in SMALL_KINDS and is_even(shards[name], gpus)
    }


def gradient_groups(config: Config) -> list[list[str]]:
    """The parameters whose gradients travel together: those of a block, the head, the embedding.

    They are in the order in which the backward pass makes them. Small parameters are left out:
    their gradients are summed at the end of a step.
    """
    head: list[str] = []
    embedding: list[str] = []
    blocks: list[list[str]] = [[] for _ in range(config.n_layers)]
    for name, spec in parameter_table(config).items():
        if spec.kind in SMALL_KINDS:
            continue
        if spec.kind == "head":
            head.append(name)
        elif spec.kind == "embedding":
            embedding.append(name)
        else:
            layer = int(name.split(".")[1])  # blocks.LAYER.NAME
            blocks[layer].append(name)
    return [head, *reversed(blocks), embedding]


# ---------------------------------------------------------------- micro-batches


def passes_of_a_rank(micro_batches: int, ranks: int) -> int:
    """Micro-batches of a step on the rank that has most of them."""
    return math.ceil(micro_batches / ranks)


def check_ranks(config: Config, ranks: int) -> None:
    """Raises ConfigError where a step has fewer micro-batches than there are ranks.

    The micro-batch is the configuration's and never follows from the number of GPUs: another one
    would be another training. So the error names the options, and does not take them.
    """
    micro_batches = config.gradient_accumulation_steps
    if ranks <= micro_batches:
        return
    batch = batch_for(config, ranks)
    raise ConfigError(
        f"{ranks} GPUs for the {micro_batches} micro-batches of a step: each GPU needs at least "
        f"one. Use at most {micro_batches} GPUs, or {batch.options()}. {batch.difference(config)}"
    )


@dataclass(frozen=True)
class Batch:
    """A step's sequences, in as many micro-batches as ranks need."""

    batch_size: int
    gradient_accumulation_steps: int

    def options(self) -> str:
        return (
            f"--batch_size {self.batch_size} "
            f"--gradient_accumulation_steps {self.gradient_accumulation_steps}"
        )

    def is_another_training(self, config: Config) -> bool:
        """Whether a step with this batch computes something else than a step of `config`."""
        sequences = self.batch_size * self.gradient_accumulation_steps
        if sequences != config.sequences_per_step:
            return True
        return self.batch_size != config.batch_size and micro_batch_matters(config)

    def difference(self, config: Config) -> str:
        """A sentence: how the training with this batch differs from that of `config`."""
        sequences = self.batch_size * self.gradient_accumulation_steps
        if sequences != config.sequences_per_step:
            tokens = sequences * config.max_seq_len
            return (
                f"That is another training: {tokens:,} tokens a step instead of "
                f"{config.tokens_per_step:,}."
            )
        if self.is_another_training(config):
            return (
                "That keeps the tokens of a step, and still is another training: the experts are "
                f"balanced over micro-batches of {self.batch_size} instead of {config.batch_size} "
                "sequences."
            )
        return "That is the same training."


def micro_batch_matters(config: Config) -> bool:
    """Whether what is learned depends on the size of the micro-batch: by its balancing loss."""
    balances = config.num_experts > 0 and config.load_balancing == "loss"
    over_micro_batch = config.load_balancing_scope == "batch"
    return balances and over_micro_batch and config.load_balancing_weight > 0


def batch_for(config: Config, ranks: int) -> Batch:
    """The batch nearest to the configuration's that has a micro-batch for each rank.

    It keeps the sequences of a step where they suffice, in the largest micro-batches. Otherwise
    each rank has one sequence, and a step has more tokens.
    """
    if ranks <= config.gradient_accumulation_steps:
        return Batch(config.batch_size, config.gradient_accumulation_steps)
    sequences = config.sequences_per_step
    for batch_size in range(config.batch_size, 0, -1):
        if sequences % batch_size == 0 and sequences // batch_size >= ranks:
            return Batch(batch_size, sequences // batch_size)
    return Batch(1, ranks)
