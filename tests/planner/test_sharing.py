"""What several GPUs share: rows by owner, and micro-batches."""

import dataclasses

import pytest

from config import PRESETS, Config, ConfigError, parameter_table
from engine.ownership import ownership
from planner.sharing import (
    Batch,
    batch_for,
    check_ranks,
    evenly_owned,
    gradient_groups,
    owned_elements,
    passes_of_a_rank,
)
from tests.helpers import tiny_config


def config_of(preset: str, **changes) -> Config:
    return Config(**{**PRESETS[preset], **changes})


@pytest.mark.parametrize("gpus", [1, 2, 3, 4])
def test_a_gpu_owns_what_the_owners_table_gives_the_largest(gpus):
    config = tiny_config(vocab_size=514)
    table = parameter_table(config)
    owned = [0] * gpus
    for name, shards in ownership(config, gpus).items():
        for shard in shards:
            owned[shard.owner] += (
                table[name].numel * (shard.stop - shard.start) // table[name].shape[0]
            )
    assert sum(owned) == config.total_params
    assert sum(owned_elements(config, gpus).values()) == max(owned)


def test_even_parameters_are_banks_and_what_rows_divide():
    even = evenly_owned(tiny_config(vocab_size=512), 2)
    assert {"embedding.weight", "head.weight"} < even and any("experts" in name for name in even)
    assert not any("attention" in name or "norm" in name or "router" in name for name in even)
    assert "embedding.weight" not in evenly_owned(tiny_config(vocab_size=513), 2)


def test_gradients_travel_in_the_order_of_the_backward_pass():
    config = tiny_config()
    groups = gradient_groups(config)
    assert groups[0] == ["head.weight"] and groups[-1] == ["embedding.weight"]
    layers = [{name.split(".")[1] for name in group} for group in groups[1:-1]]
    assert layers == [{str(layer)} for layer in reversed(range(config.n_layers))]
    small = {name for name in parameter_table(config) if "norm" in name or "router" in name}
    assert {name for group in groups for name in group} == set(parameter_table(config)) - small
    assert gradient_groups(tiny_config(tie_embeddings=True))[0] == []


def test_micro_batches_are_dealt_out():
    assert [passes_of_a_rank(8, ranks) for ranks in (1, 2, 3, 8)] == [8, 4, 3, 1]


def test_more_gpus_than_micro_batches_are_refused_with_the_batch_they_need():
    config = config_of("18b")
    for ranks in (1, 3, 8):
        check_ranks(config, ranks)
    for ranks, options, words in (
        (9, "--batch_size 2 --gradient_accumulation_steps 16", "balanced over micro-batches of 2"),
        (32, "--batch_size 1 --gradient_accumulation_steps 32", "keeps the tokens of a step"),
        (64, "--batch_size 1 --gradient_accumulation_steps 64", "262,144 tokens a step instead"),
    ):
        with pytest.raises(ConfigError, match="another training") as error:
            check_ranks(config, ranks)
        assert options in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_experts=0),
        dict(load_balancing="bias"),
        dict(load_balancing_scope="sequence"),
        dict(load_balancing_weight=0.0),
    ],
)
def test_without_a_balancing_loss_over_it_the_micro_batch_is_free(changes):
    config = config_of("18b", **changes)
    assert not batch_for(config, 16).is_another_training(config)
    assert "same training" in batch_for(config, 16).difference(config)
    assert batch_for(config, 64).is_another_training(config)


def test_the_batch_is_the_nearest_with_a_micro_batch_for_each_rank():
    config = config_of("18b")
    assert batch_for(config, 8) == Batch(4, 8) and batch_for(config, 512) == Batch(1, 512)
    odd = dataclasses.replace(config, batch_size=6, gradient_accumulation_steps=2)
    assert [batch_for(odd, ranks) for ranks in (3, 4, 5)] == [Batch(4, 3), Batch(3, 4), Batch(2, 6)]
