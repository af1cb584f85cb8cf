"""What several test modules build: a tiny configuration, a text, its tokenizer, a checkpoint."""

import dataclasses
import functools

import torch

from config import PRESETS, Config, FeedForward
from corpus.tokenizer import train_tokenizer
from engine.precision import write_master
from model import MoETransformer
from muon import build_optimizers
from record import checkpoint

TINY = dict(
    PRESETS["tiny"],
    d_model=32,
    n_layers=4,
    n_heads=4,
    d_ff=48,
    num_experts=4,
    moe_every=2,
    max_seq_len=16,
    vocab_size=264,
    batch_size=2,
)


def tiny_config(**changes) -> Config:
    """A configuration whose model runs in milliseconds on a CPU."""
    return Config(**{**TINY, **changes})


TEXT = (
    "The naïve café's menu lists 7 kinds of tea; all of them are good. "
    "In winter 漢字 are on it too.\n"
) * 40


@functools.cache
def tokenizer_json() -> str:
    """A byte-level BPE of at most 264 tokens."""
    return train_tokenizer([TEXT], 264)


def write_checkpoint(path, config: Config, **changes) -> dict:
    """Saves what a run of `config` would, with random fp32 masters, and returns the state.

    `changes` replace parts of the state.
    """
    model = MoETransformer(config)
    parameters = dict(model.named_parameters())
    saved = parameters | model.balancing_biases()
    optimizer = {
        name: optimizer.state_dict()
        for name, optimizer in build_optimizers(config, parameters).items()
    }
    optimizer_state = checkpoint.optimizer_tensors(dict(optimizer=optimizer))
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.ndim == 1:
                master = torch.rand(parameter.shape) + 0.5  # a norm's weight
            else:
                master = torch.randn(parameter.shape) * config.init_std
            write_master(master, parameter, optimizer_state[name])
    state = dict(
        config=dataclasses.asdict(config),
        run_id="run",
        step=7,
        data_position=0,
        tokens_seen=700,
        skipped_steps=0,
        saved_steps=[],
        train_seconds=2.0,
        mean_norm=None,
        model={name: tensor.detach() for name, tensor in saved.items()},
        optimizer=optimizer,
        schedule={},
        loss_scaler={},
        random={},
        interval={},
        metrics={},
        data=dict(data_hash="d" * 32, tokenizer_hash="t" * 64),
        tokenizer_json=tokenizer_json(),
    )
    state |= changes
    checkpoint.save(path, state)
    return state


def shared_experts_by_seed(monkeypatch) -> None:
    """Config's tables describe shared experts: as many in each MoE block as `seed` says, under 10.

    A field of that name would do the same. The seed stands for it, because a configuration without
    one keeps its tables, and the cache of tables keeps the two apart.
    """
    feed_forwards = Config.feed_forwards

    def with_shared(config: Config, layer: int) -> list[FeedForward]:
        networks = feed_forwards(config, layer)
        if config.is_moe(layer) and 0 < config.seed < 10:
            networks.append(FeedForward("ffn.shared", "dense_ffn", config.seed * config.d_ff))
        return networks

    monkeypatch.setattr(Config, "feed_forwards", with_shared)
