import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"      # no test uses the network, nor what an earlier one downloaded
HUB = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = HUB.name

import pytest
import torch

from config import PRESETS, Config

TINY = dict(PRESETS["tiny"], d_model=32, n_layers=4, n_heads=4, d_ff=48, num_experts=4, moe_every=2, max_seq_len=16,
            vocab_size=264, batch_size=2)


def tiny_config(**changes) -> Config:
    """A configuration whose model runs in milliseconds on a CPU."""
    return Config(**{**TINY, **changes})


@pytest.fixture
def tiny() -> Config:
    return tiny_config()


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_num_threads(1)         # tiny models gain nothing from more, and wait for busy cores
    torch.manual_seed(0)
