"""Training on several GPUs: the ranks of a run and what they exchange. Built on torch.distributed.

A rank is a process with a GPU of its own, or on a CPU one of several processes. The variables of
torchrun's environment say which rank a process is. A single process has no process group, and none
of its work goes through this file's collectives.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Within a step all ranks do the same work. The first step compiles, which takes minutes.
STEP_TIMEOUT = datetime.timedelta(minutes=15)
# One rank tokenizes or writes a checkpoint while the others wait.
WAIT_TIMEOUT = datetime.timedelta(days=2)


@dataclass
class Ranks:
    """The processes that train one run. `rank` is this one's number among `size`.

    `local_rank` and `local_size` count the ranks of this machine alone. All methods are called by
    all ranks together. With one rank they return at once.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    # For what is exchanged outside of a step: a group with a timeout of its own, on CPUs
    waiting: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files, prints and samples for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_values(self, value) -> list:
        """Every rank's value, in the order of the ranks; anything that pickle takes."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.waiting)
        return values

    def value_of_first(self, value=None):
        """The first rank's value, on all ranks. The others wait for it, if need be for days."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.waiting)
        return values[0]

    def wait_for_all(self) -> None:
        """Returns when all ranks have called it; a slow rank may take days."""
        if self.size > 1:
            dist.barrier(group=self.waiting)


def start_ranks(device: torch.device) -> Ranks:
    """Joins the run that torchrun's variables describe; without them a run of one process."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return Ranks()
    rank = int(os.environ["RANK"])
    options: dict = {}
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        options = dict(device_id=device)
    dist.init_process_group(backend, timeout=STEP_TIMEOUT, **options)
    return Ranks(
        rank,
        size,
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        waiting=dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT),
    )
