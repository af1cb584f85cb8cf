"""Training on several GPUs: the ranks of a run and what they exchange. Built on torch.distributed.

A rank is a process with a GPU of its own, or on a CPU one of several processes. The variables of
torchrun's environment say which rank a process is. A single process has no process group, and none
of its work goes through this file's collectives.

Every rank holds all weights, and computes the gradients of its own micro-batches. Each row of a
parameter has one owner (engine/ownership.py). A step has four parts:

1. Backward passes. As soon as a block has its gradients, each goes to its owner (GradientReducer).
2. One sum over all ranks: losses, counts, squares of gradient norms, and the gradients of small
   parameters (`GradientReducer.finish`). Every decision of the step comes from this sum, so that
   all ranks decide alike: an inf on one rank is an inf on all.
3. The optimizers update what this rank owns.
4. New weights go to all ranks, while the optimizers are still at work (WeightGatherer).

This is ZeRO (Rajbhandari et al. 2020), stage 1 when gradients are reduced once a step and stage 2
when they are reduced in every micro-batch, with owners of whole matrices instead of equal slices.

With several machines, the owners are those of each machine. After the last backward pass each owner
adds up its sums with the owners of the same rows on the other machines.


Streams and memory: how to check this file for races

NCCL works on a stream of its own. A collective starts after what compute (the current stream) has
been given so far. `work.wait()` lets the current stream wait for the collective.

    compute     forward and backward passes, optimizers
    adding      waits for a block's collectives, and adds what arrives to the owner's sums

The memory of a tensor that NCCL reads or writes must not be used again before NCCL is done. So
GradientReducer holds a reference to every gradient until compute has waited for the event that
`adding` recorded behind it. At most WINDOW blocks are in flight.
"""

import collections
import contextlib
import datetime
import functools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from config import ConfigError, ExperimentError
from engine.offload import weakly
from engine.ownership import Ownership, is_even, parameter_of, shard_key
from engine.precision import gradient_norm

# Their names since torch 2.13, and those before
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

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
    # The groups of all ranks, of this machine's, and of one local rank on all machines; None stands
    # for all processes
    group: Any = None
    machine: Any = None
    across: Any = None
    # For what is exchanged outside of a step: a group with a timeout of its own, on CPUs
    waiting: Any = None

    @property
    def machines(self) -> int:
        return self.size // self.local_size

    @property
    def on_first_machine(self) -> bool:
        """Whether what this rank owns counts: on the other machines the same rows are owned."""
        return self.rank < self.local_size

    def micro_batches(self, of: int) -> range:
        """This rank's micro-batches of the `of` in a step."""
        return range(self.rank, of, self.size)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files, prints and samples for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
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
        dist.broadcast_object_list(values, group_src=0, group=self.waiting)
        return values[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error that a rank raises in the block is raised on all ranks at its end.

        The block itself must not use collectives: the rank with the error would miss them.
        """
        own_error = None
        try:
            yield
        except Exception as error:
            own_error = error
        self.raise_on_all(own_error)

    def raise_on_all(self, own_error: Exception | None) -> None:
        """Raises this rank's error, or that of another rank. Returns where no rank has one."""
        own_report = None
        if own_error is not None:
            own_report = (str(own_error), isinstance(own_error, ExperimentError))
        reports = [report for report in self.all_values(own_report) if report is not None]
        if not reports:
            return
        first_text, _ = reports[0]
        error = own_error or ExperimentError(first_text)
        if isinstance(error, ExperimentError):
            # A rank that has met a bug ends at once.
            error.of_all_ranks = all(is_expected for _, is_expected in reports)
        raise error

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
        options = dict(device_id=torch.device("cuda", torch.cuda.current_device()))
    dist.init_process_group(backend, timeout=STEP_TIMEOUT, **options)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    ranks = Ranks(rank, size, rank % local_size, local_size)
    ranks.waiting = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    check_machines(ranks.all_values((local_size, platform.node())))
    ranks.machine, ranks.across = _groups_of_machines(rank, size, local_size)
    return ranks


def check_machines(found: list[tuple[int, str]]) -> None:
    """Raises ConfigError unless all machines have equally many ranks, which are neighbours.

    `found` has LOCAL_WORLD_SIZE and the name of the machine of each rank.
    """
    local_size, _ = found[0]
    sizes = sorted({size for size, _ in found})
    if len(sizes) > 1 or len(found) % local_size != 0:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE is {' or '.join(map(str, sizes))} for {len(found)} ranks: start "
            "equally many ranks on every machine"
        )
    for first in range(0, len(found), local_size):
        hosts = sorted({host for _, host in found[first : first + local_size]})
        if len(hosts) > 1:
            raise ConfigError(
                f"ranks {first} to {first + local_size - 1} should be on one machine and are on "
                f"{', '.join(hosts)}: set LOCAL_WORLD_SIZE to the ranks of a machine, and give "
                "those of one machine neighbouring numbers"
            )


def _groups_of_machines(rank: int, size: int, local_size: int) -> tuple:
    """The groups `machine` and `across` of a rank. All ranks make all groups, in one order."""
    if size == local_size:
        return None, None
    for first in range(0, size, local_size):
        group = dist.new_group(list(range(first, first + local_size)), timeout=STEP_TIMEOUT)
        if first <= rank < first + local_size:
            machine = group
    for local_rank in range(local_size):
        group = dist.new_group(list(range(local_rank, size, local_size)), timeout=STEP_TIMEOUT)
        if rank % local_size == local_rank:
            across = group
    return machine, across


# ---------------------------------------------------------------- gradients to their owners


class GradientReducer:
    """Sums gradients over all ranks, each at its owner, while the backward pass makes them.

    `owned` has the shards that this rank owns, by `shard_key`: views of the weights, for the
    optimizers. `finish` gives each of them its gradient as `.grad`.

    With `every_micro_batch` gradients are reduced in every backward pass: a rank keeps the sums of
    what it owns, and no other gradient outlives its block's backward pass. Otherwise a rank adds up
    its own micro-batches in `.grad`, and gradients are reduced in the last pass of a step. That is
    faster, and takes memory for all gradients.

    Sums have the dtype of the gradients. Nothing is divided: an fp16 sum that overflows is inf.
    """

    WINDOW = 2  # blocks whose gradients may be on their way

    def __init__(
        self,
        parameters: dict[str, Tensor],
        ownership: Ownership,
        small: list[str],
        ranks: Ranks,
        every_micro_batch: bool,
    ):
        self.parameters = parameters
        self.ranks = ranks
        self.every_micro_batch = every_micro_batch
        self.small = small
        self.shards = {name: ownership[name] for name in parameters if name not in small}
        self.owned = _owned_views(parameters, ownership, ranks.local_rank)
        # Their order is the same on all ranks: the n-th collective of one is the n-th of each.
        self.blocks = _in_order_of_backward(list(self.shards))
        self.sums: dict[str, Tensor] = {}  # by shard_key
        self.in_flight: collections.deque = collections.deque()
        self.adding = None
        if next(iter(parameters.values())).is_cuda:
            self.adding = torch.cuda.Stream()
        self.passes = 0  # backward passes of this step that have begun
        made = weakly(self._gradient_made)
        for number, names in enumerate(self.blocks):
            for name in names:
                hook = functools.partial(made, number)
                parameters[name].register_post_accumulate_grad_hook(hook)

    # ------------------------------------------------------------ during a step

    def micro_batch(self, number: int, of: int) -> None:
        """Call before each backward pass: it is number `number`, from 0, of this rank's `of`."""
        if number > 0:
            self._end_pass()
        self._begin_pass(is_last=number == of - 1)

    def _begin_pass(self, is_last: bool) -> None:
        self.passes += 1
        self.sends = self.every_micro_batch or is_last
        self.next_block = 0
        self.missing = [len(names) for names in self.blocks]

    def _gradient_made(self, block: int, _parameter: Tensor) -> None:
        """A hook. Blocks are sent in their order, also where a gradient of a later one is first."""
        self.missing[block] -= 1
        while self.next_block < len(self.blocks) and self.missing[self.next_block] == 0:
            self._send_next_block()

    def _end_pass(self) -> None:
        """Sends the blocks of which a parameter got no gradient in this pass."""
        while self.next_block < len(self.blocks):
            self._send_next_block()

    @torch.no_grad()
    def _send_next_block(self) -> None:
        names = self.blocks[self.next_block]
        self.next_block += 1
        if not self.sends:
            return
        held = []  # what collectives read and write
        works = []
        arrivals: dict[str, Tensor] = {}  # by shard_key
        for name in names:
            gradient = self._take_gradient(name)
            held.append(gradient)
            works += self._reduce(name, gradient, arrivals)
        for key, part in arrivals.items():
            # The sum of a few rows must not keep the whole gradient in memory for the next passes.
            is_view = part.untyped_storage().nbytes() > part.nbytes
            if is_view and self.every_micro_batch and key not in self.sums:
                self.sums[key] = torch.zeros_like(part)
        self._add(arrivals, works, held)

    def _take_gradient(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        gradient = parameter.grad
        parameter.grad = None
        if gradient is None:
            gradient = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        return gradient

    def _reduce(self, name: str, gradient: Tensor, arrivals: dict[str, Tensor]) -> list:
        """Starts the reduction of a gradient to its owners. `arrivals` gets what this rank owns."""
        shards = self.shards[name]
        group = self.ranks.machine
        if is_even(shards, self.ranks.local_size):
            own = shards[self.ranks.local_rank]
            part = torch.empty_like(gradient[own.rows])
            arrivals[shard_key(name, own)] = part
            return [reduce_scatter(part, gradient, group=group, async_op=True)]
        works = []
        for shard in shards:
            part = gradient[shard.rows]
            works.append(dist.reduce(part, group_dst=shard.owner, group=group, async_op=True))
            if shard.owner == self.ranks.local_rank:
                arrivals[shard_key(name, shard)] = part
        return works

    def _add(self, arrivals: dict[str, Tensor], works: list, held: list[Tensor]) -> None:
        """Adds what arrives to the sums, on a stream of its own."""
        with self._adding_stream():
            for work in works:
                work.wait()
            for key, part in arrivals.items():
                if key in self.sums:
                    self.sums[key].add_(part)
                else:
                    self.sums[key] = part
            added = None
            if self.adding is not None:
                added = self.adding.record_event()
        self.in_flight.append((added, held, arrivals))
        while len(self.in_flight) > self.WINDOW:
            self._wait_for_oldest()

    def _adding_stream(self) -> contextlib.AbstractContextManager:
        if self.adding is None:
            return contextlib.nullcontext()
        self.adding.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.adding)

    def _wait_for_oldest(self) -> None:
        """Lets compute wait for the oldest block in flight. Its memory may then be used again."""
        added, _held, _arrivals = self.in_flight.popleft()
        if added is not None:
            torch.cuda.current_stream().wait_event(added)

    # ------------------------------------------------------------ after the last backward pass

    @torch.no_grad()
    def finish(self, totals: dict, passes: int) -> Tensor:
        """Ends a step's reductions. Returns the norm of each parameter's gradient, fp32 [n].

        `totals` are this rank's sums over its micro-batches, such as losses and counts. The tensors
        among them are replaced by their sums over all ranks. `passes` is the largest number of
        micro-batches of a rank: one that has fewer takes part with zeros.
        """
        self._end_pass()
        if self.every_micro_batch:
            while self.passes < passes:
                self._begin_pass(is_last=False)
                self._end_pass()
        self.passes = 0
        while self.in_flight:
            self._wait_for_oldest()
        if self.ranks.machines > 1:
            for total in self.sums.values():
                dist.all_reduce(total, group=self.ranks.across)

        small_gradients = {name: self._take_gradient(name) for name in self.small}
        own_sums = {name: value for name, value in totals.items() if isinstance(value, Tensor)}
        tensors = dict(own_sums)
        tensors["squares of norms"] = self._squares_of_norms()
        tensors.update(small_gradients)
        sums = _summed_over_ranks(tensors, self.ranks)
        for name in own_sums:
            totals[name] = sums[name]
        norms = dict(zip(self.shards, sums["squares of norms"].sqrt()))
        for name in self.small:
            self.parameters[name].grad = sums[name]
            norms[name] = gradient_norm(sums[name])
        self._give_gradients_to_owned()
        return torch.stack([norms[name].float() for name in self.parameters])

    def _squares_of_norms(self) -> Tensor:
        """Of the gradients of `shards`, in their order: what this rank's sums add. float64 [n]."""
        device = next(iter(self.parameters.values())).device
        squares = {
            name: torch.zeros((), dtype=torch.float64, device=device) for name in self.shards
        }
        # On all machines there are the same sums: they count once.
        if self.ranks.on_first_machine:
            for key, total in self.sums.items():
                name, _ = parameter_of(key)
                squares[name] += gradient_norm(total).double().square()
        return torch.stack(list(squares.values()))

    def _give_gradients_to_owned(self) -> None:
        for key, view in self.owned.items():
            name, rows = parameter_of(key)
            gradient = self.sums.get(key)
            if gradient is None:
                gradient = self.parameters[name].grad[rows]
            view.grad_dtype = gradient.dtype
            view.grad = gradient

    def on_device(self) -> list[Tensor]:
        """What this rank holds of a step's gradients once they are reduced."""
        small = [self.parameters[name].grad for name in self.small]
        return [*self.sums.values(), *small]

    def free(self) -> None:
        """Call when the optimizers have read the gradients."""
        self.sums.clear()
        for view in self.owned.values():
            view.grad = None
        for parameter in self.parameters.values():
            parameter.grad = None


def _owned_views(
    parameters: dict[str, Tensor], ownership: Ownership, rank: int
) -> dict[str, Tensor]:
    """The rows that a rank owns, as views of the weights, by `shard_key`."""
    views = {}
    for name, parameter in parameters.items():
        for shard in ownership[name]:
            if shard.owner == rank:
                views[shard_key(name, shard)] = parameter.data[shard.rows]
    return views


def _in_order_of_backward(names: list[str]) -> list[list[str]]:
    """The parameters by block, in the order in which the backward pass makes their gradients."""
    blocks: dict[int, list[str]] = {}
    for name in names:
        blocks.setdefault(_time_of_backward(name), []).append(name)
    return [blocks[time] for time in sorted(blocks)]


def _time_of_backward(name: str) -> int:
    """A number that is smaller the sooner the backward pass comes to this parameter."""
    first_part, *rest = name.split(".")
    if first_part == "blocks":
        return -int(rest[0])
    if first_part == "embedding":
        return 1
    return -(10**9)  # the head


def _summed_over_ranks(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The sum of each tensor over all ranks, in one collective.

    It goes through float64: counts stay exact, and squares of norms do not overflow.
    """
    flat = [tensor.double().flatten() for tensor in tensors.values()]
    packed = ranks.sum(torch.cat(flat))
    sums = {}
    for (name, tensor), part in zip(tensors.items(), packed.split([len(part) for part in flat])):
        sums[name] = part.view(tensor.shape).to(tensor.dtype)
    return sums


# ---------------------------------------------------------------- new weights to all


class WeightGatherer:
    """Sends new weights from their owners to all ranks, while the optimizers are still at work.

        with gatherer: ...     the optimizers' steps

    All ranks send and receive the parameters in one order. A rank takes part in the collective of a
    parameter as soon as it has updated its own rows of it, and of all that come before.
    """

    def __init__(self, reducer: GradientReducer, optimizers: dict):
        self.parameters = reducer.parameters
        self.ranks = reducer.ranks
        self.small = reducer.small
        self.shards = reducer.shards
        self.order = _in_order_of_update(self.shards, self.parameters, optimizers)
        for optimizer in optimizers.values():
            optimizer.state.after_bucket = self._updated

    def __enter__(self) -> "WeightGatherer":
        self.next = 0  # of `order`
        self.works: list = []
        self.to_update = collections.Counter()  # shards of this rank, by parameter
        for name, shards in self.shards.items():
            for shard in shards:
                if shard.owner == self.ranks.local_rank:
                    self.to_update[name] += 1
        return self

    def _updated(self, keys: list[str]) -> None:
        for key in keys:
            name, _ = parameter_of(key)
            self.to_update[name] -= 1
        self._send_what_is_updated()

    @torch.no_grad()
    def _send_what_is_updated(self) -> None:
        while self.next < len(self.order) and self.to_update[self.order[self.next]] <= 0:
            self._send(self.order[self.next])
            self.next += 1

    def _send(self, name: str) -> None:
        weight = self.parameters[name].data
        shards = self.shards[name]
        group = self.ranks.machine
        if is_even(shards, self.ranks.local_size):
            own = weight[shards[self.ranks.local_rank].rows]
            if not weight.is_cuda:
                own = own.clone()  # gloo does not gather in place
            self.works.append(all_gather(weight, own, group=group, async_op=True))
            return
        for shard in shards:
            rows = weight[shard.rows]
            work = dist.broadcast(rows, group_src=shard.owner, group=group, async_op=True)
            self.works.append(work)

    @torch.no_grad()
    def __exit__(self, error_type: type | None, *_error) -> None:
        """Lets compute wait for all weights."""
        if error_type is not None:
            return
        self._send_what_is_updated()
        assert self.next == len(self.order), "a parameter was not updated"
        self._send_small()
        for work in self.works:
            work.wait()
        self.works = []

    def _send_small(self) -> None:
        """All small parameters in one collective, from the first rank."""
        tensors = [self.parameters[name].data for name in self.small]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.broadcast(flat, group_src=0, group=self.ranks.machine)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


def _in_order_of_update(
    shards: Ownership, parameters: dict[str, Tensor], optimizers: dict
) -> list[str]:
    """The parameters in about the order in which the optimizers update them.

    An optimizer updates together what has matrices of one shape.
    """
    order = []
    for optimizer in optimizers.values():
        same_shape: dict[tuple, list[str]] = {}
        for name in shards:
            if name in optimizer.state.names:
                shape = tuple(parameters[name].shape[-2:])
                same_shape.setdefault(shape, []).append(name)
        for names in same_shape.values():
            order += names
    return order


# ---------------------------------------------------------------- replicas


@torch.no_grad()
def different_replicas(parameters: dict[str, Tensor], ranks: Ranks) -> list[str]:
    """The parameters whose bits are not the same on all ranks."""
    sums = torch.stack([_sum_of_bits(parameter.data) for parameter in parameters.values()])
    smallest = sums.clone()
    largest = sums.clone()
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=ranks.group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks.group)
    same = (smallest == largest).tolist()
    return [name for name, is_same in zip(parameters, same) if not is_same]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The tensor's bits, read as whole numbers and added up in an int64.

    Two tensors that differ have the same sum only if their differences cancel out.
    """
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.view(integers).sum(dtype=torch.int64)
