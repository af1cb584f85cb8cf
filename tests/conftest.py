"""What holds for every test: no network, one thread, a fixed seed."""

import os
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses the network, nor what an earlier one downloaded
HUB = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = HUB.name

# A shell lets what it starts in the background ignore Ctrl-C, and nohup SIGHUP. Programs keep to that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
import torch

from config import Config
from tests.helpers import tiny_config


@pytest.fixture
def tiny() -> Config:
    return tiny_config()


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_num_threads(1)  # tiny models gain nothing from more, and wait for busy cores
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ctrl_c():
    """A command that a test runs in this process must not change what Ctrl-C does to the next."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
