"""Studies whose runs are not trained: what they would end with is made up, so that a test of a study takes no time."""

import dataclasses
import json
import math

import numpy as np
import pytest

from studies import run as runner
from studies.experts import KINDS
from tests.helpers import tiny_config

BASE = tiny_config(
    batch_size=2, gradient_accumulation_steps=2, n_heads=4, num_experts=8, moe_every=1
)
TOKENS = 10 * BASE.tokens_per_step
CORPUS = dict(
    data="python",
    data_hash="d",
    tokenizer_hash="t",
    train_tokens=100 * TOKENS,
    validation_tokens=1000,
    unigram_entropy=7.0,
)


def result(loss=5.0, **changes):
    return (
        dict(
            val_loss=loss,
            tokens=TOKENS,
            flops=1e9 * loss,
            train_seconds=loss,
            elapsed_seconds=loss,
            tokens_per_second=100.0 * loss,
            total_params=1000 * loss,
            active_params=500 * loss,
            load_entropy=0.9 + loss / 1000,
            worst_share=0.3,
            state_bytes_per_parameter=8 * loss,
            peak_gb=loss,
            memory_gb=dict(activations=loss),
            passes=0.1,
            validation=[[0, 6.0], [TOKENS, loss]],
            machine=dict(gpu=None, cpus=2, torch="2", python="3"),
        )
        | changes
    )


def experts(seed):
    """The analysis of a model of two layers, 8 experts, in which expert 1 takes half of the whitespace."""
    counts = np.random.default_rng(seed).integers(50, 100, (2, 8, len(KINDS)))
    counts[1, 0, -1] = 800

    def step(n):
        return dict(
            step=n,
            tokens=n * 100,
            **{
                label: dict(
                    bits=[0.1 + n / 100, 0.2 + n / 100],
                    shuffled=[0.01] * 2,
                    shuffled_most=[0.02] * 2,
                )
                for label in ("kind", "domain")
            },
        )

    return dict(
        layers=[0, 1],
        tokens=1000,
        without_kind=3,
        kinds=list(KINDS),
        kind_tokens=[100] * len(KINDS),
        kind_entropy=3.4,
        kind_table=counts.tolist(),
        domains=["a", "b"],
        domain_tokens=[600, 400],
        domain_entropy=0.97,
        domain_table=counts[:, :, :2].tolist(),
        steps=[step(0), step(5), step(10)],
        top_tokens=[[[["|", 0.9], [" a`b", 0.8], ["\n", 0.7]] for _ in range(8)] for _ in range(2)],
    )


@pytest.fixture
def performed(monkeypatch):
    """Runs are not trained but noted, with the GPU that they were on."""
    seen = []

    def perform(run, base, folder, environment, stop):
        seen.append((run.label, environment.get("CUDA_VISIBLE_DEVICES")))
        batch, mode = run.changes.get("batch_size", 0), run.changes.get("activation_checkpointing")
        if run.may_not_fit and batch > dict(none=2, selective=8, full=256)[mode]:
            return dict(failed="out of memory")
        config = dataclasses.replace(BASE, **run.changes)
        loss = (
            5
            - 0.1 * math.log(config.active_params)
            + 0.02 * math.sin(7 * len(run.label) + run.changes["seed"])
        )
        found = result(
            loss,
            tokens=config.max_steps * config.tokens_per_step,
            flops=config.flops_per_token * config.max_steps * config.tokens_per_step,
            tokens_per_second=(0.98 + 0.02 * run.changes["seed"]) * 1e9 / config.active_params,
            peak_gb=1.0 + run.changes["seed"],
            total_params=config.total_params,
            active_params=config.active_params,
            validation=[[0, 6.0], [config.max_steps * config.tokens_per_step, loss]],
        )
        return found | (dict(experts=experts(run.changes["seed"])) if run.analysed else {})

    monkeypatch.setattr(runner, "perform", perform)
    return seen


def go(name, folder, seconds=math.inf, seeds=(1, 2), tokens=None, **options):
    folder.mkdir(exist_ok=True)
    tokens = tokens or (1e6 if name == "checkpointing" else TOKENS)
    return runner.study(
        name,
        BASE,
        ["--preset", "tiny", "--cache_dir", "/somewhere"],
        tokens,
        list(seeds),
        folder,
        CORPUS,
        seconds,
        **options,
    )


def loaded(folder):
    return json.loads((folder / "results.json").read_text())
