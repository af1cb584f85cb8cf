"""Optimizer state and gradients in host memory, for what the GPU has no room for.

OptimizerState is the state of one optimizer. The optimizer walks over it in buckets; with `offload`
each bucket visits the GPU while it is worked on. GradientOffload sums the gradients of some blocks
in host memory, as the backward pass makes them. Both copy with StreamCopier on a GPU. On a CPU the
same code runs with DirectCopier, without streams.

Nothing here changes arithmetic or its order: results are those of everything on the GPU, to the
bit.


Streams: how to check this file for races

Three CUDA streams take part. Work on one stream runs in order. Work on two streams runs in any
order, unless one waits for the other.

    compute     the current stream: forward, backward and optimizer kernels
    inward      copies from host to GPU
    outward     copies from GPU to host

Every wait is in a method of StreamCopier:

    begin       inward waits for outward     so that a pass reads what the pass before wrote
    fetch       inward waits for compute     which may still use the memory that is copied to
    wait_for    compute waits for a fetch    before it reads what was fetched
    send        outward waits for compute    before it copies what compute has made
    throttle    the CPU waits for a send     before it takes GPU memory for one more fetch
    finish      compute waits for outward    before what follows reads the host's tensors

Memory: all tensors are allocated on compute. PyTorch's allocator gives freed memory to the next
tensor of the same stream at once. That is safe for compute, whose work runs in order, and for
inward, which waits for compute in `fetch`. Outward may still read a tensor that Python has freed:
`record_stream` keeps that memory until outward is done with it.
"""

import contextlib
import functools
import math
import mmap
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from config import OPTIMIZER_BUCKET, ExperimentError
from engine.precision import gradient_norm

PINNING_THREADS = 8  # one thread pins about 2 GB/s

# ---------------------------------------------------------------- copies


class StreamCopier:
    """Copies between host and GPU on two streams beside the computation; see the file's top."""

    def __init__(self):
        self.inward = torch.cuda.Stream()
        self.outward = torch.cuda.Stream()
        self.sent: list[torch.cuda.Event] = []  # of batches that may not have left the GPU yet

    def begin(self) -> None:
        """Starts a pass over tensors of the host, after the copies of the pass before."""
        self.inward.wait_stream(self.outward)
        self.sent = []

    def fetch(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Copies host tensors to the GPU, for each (on_gpu, on_host). The event says: arrived."""
        self.inward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.inward):
            for on_gpu, on_host in pairs:
                on_gpu.copy_(on_host, non_blocking=True)
        return self.inward.record_event()

    def wait_for(self, fetched: torch.cuda.Event) -> None:
        """Lets compute wait for one fetch, while a later fetch still runs."""
        torch.cuda.current_stream().wait_event(fetched)

    def send(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copies GPU tensors to the host, for each (on_host, on_gpu)."""
        self.outward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.outward):
            for on_host, on_gpu in pairs:
                on_host.copy_(on_gpu, non_blocking=True)
                on_gpu.record_stream(self.outward)

    def end_batch(self) -> None:
        """Marks the end of a batch of sends, for `throttle`."""
        self.sent.append(self.outward.record_event())

    def throttle(self) -> None:
        """Lets the CPU wait until every batch but the last one has left the GPU.

        The CPU runs ahead of the GPU. It takes GPU memory for a fetch when it launches it, so
        without this it would soon hold memory for every bucket. The GPU has the last batch to
        work on meanwhile.
        """
        if len(self.sent) > 1:
            self.sent.pop(0).synchronize()

    def finish(self) -> None:
        """Lets compute wait for all that was sent."""
        torch.cuda.current_stream().wait_stream(self.outward)


class DirectCopier:
    """StreamCopier's methods without streams, for a CPU: a copy is done when the call returns."""

    def begin(self) -> None:
        pass

    def fetch(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            target.copy_(source)

    def wait_for(self, fetched: None) -> None:
        pass

    def send(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.fetch(pairs)

    def end_batch(self) -> None:
        pass

    def throttle(self) -> None:
        pass

    def finish(self) -> None:
        pass


def copier_for(device: torch.device) -> StreamCopier | DirectCopier:
    if device.type == "cuda":
        return StreamCopier()
    return DirectCopier()


# ---------------------------------------------------------------- optimizer state


class Part(NamedTuple):
    """A slice of a parameter with what belongs to it: views, to be updated in place."""

    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


# A part before its tensors are at hand: a parameter's name and a range of its first dimension.
Slice = tuple[str, slice]


class OptimizerState:
    """State tensors of a set of parameters, each shaped like its parameter, and the walk over them.

    `moments` are the optimizer's own tensors, of dtype `moment_dtype(parameter)`. Every 16-bit
    parameter also has "residual" (int16), the low bits of its fp32 master. `tensors` holds all:
    name, key, tensor.

    `matrices=True` cuts buckets between matrices (the last two dimensions), for an optimizer that
    needs whole matrices; `matrices=False` cuts between rows of the first dimension.

    `offload` keeps the tensors in host memory, pinned when the parameters are on a GPU. The
    gradients of `gradient_offload` then come from the host with the state. Raises ExperimentError
    when host memory does not hold the state.
    """

    BUCKET = OPTIMIZER_BUCKET

    def __init__(
        self,
        parameters: dict[str, Tensor],
        moments: tuple[str, ...],
        moment_dtype: Callable[[Tensor], torch.dtype],
        offload: bool,
        matrices: bool,
        gradient_offload: "GradientOffload | None" = None,
    ):
        self.parameters = parameters
        self.offload = offload
        self.matrices = matrices
        self.gradient_offload = gradient_offload
        self.host_gradients: dict[str, Tensor] = {}
        if gradient_offload is not None:
            self.host_gradients = gradient_offload.tensors
        assert offload or not self.host_gradients
        self.device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.copier = copier_for(self.device) if offload else None
        self.tensors = self._zeros(moments, moment_dtype)

    def _zeros(
        self, moments: tuple[str, ...], moment_dtype: Callable[[Tensor], torch.dtype]
    ) -> dict[str, dict[str, Tensor]]:
        """The state at the start. Low bits of 0 say that a master is its weight exactly."""
        keys = []
        wanted = []
        for name, p in self.parameters.items():
            dtypes = {}
            if p.dtype != torch.float32:
                dtypes["residual"] = torch.int16
            for moment in moments:
                dtypes[moment] = moment_dtype(p)
            for key, dtype in dtypes.items():
                keys.append((name, key))
                wanted.append((p.shape, dtype))
        if self.offload:
            zeros = host_zeros(wanted, self.device)
        else:
            zeros = [torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in wanted]
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for (name, key), tensor in zip(keys, zeros):
            tensors[name][key] = tensor
        return tensors

    def buckets(self) -> Iterator[list[Part]]:
        """Yields parameters, gradients and state in buckets, to be updated in place.

        A bucket has at most BUCKET elements, unless a single matrix is larger. With matrices=True
        every tensor is [n, rows, columns], with the same rows and columns throughout a bucket;
        otherwise [rows, ...]. Parameters without a gradient are left out. An offloaded bucket is
        written back when the next one is requested, so take all of them.
        """
        if self.offload:
            yield from self._offloaded_buckets()
            return
        for bucket in self._cut_into_buckets():
            parts = []
            for name, cut in bucket:
                state = {key: self._view(t)[cut] for key, t in self.tensors[name].items()}
                parts.append(self._part(name, cut, state))
            yield parts

    def _offloaded_buckets(self) -> Iterator[list[Part]]:
        """While the optimizer works on bucket i, bucket i + 1 arrives and bucket i - 1 leaves."""
        buckets = self._cut_into_buckets()
        # The gradients have left for the host. Each fetch below waits for compute, so it is enough
        # that compute waits for them here.
        if self.gradient_offload is not None:
            self.gradient_offload.wait()
        self.copier.begin()
        ahead = [self._fetch(bucket) for bucket in buckets[:2]]
        for i, bucket in enumerate(buckets):
            parts, fetched = ahead.pop(0)
            self.copier.wait_for(fetched)
            yield parts
            self._send(bucket, parts)
            # On the GPU are now bucket i, which leaves, and bucket i + 1, which arrives. The one
            # before has left when `throttle` returns, so there is room for one more.
            if i + 2 < len(buckets):
                self.copier.throttle()
                ahead.append(self._fetch(buckets[i + 2]))
        self.copier.finish()

    def _fetch(self, bucket: list[Slice]) -> tuple[list[Part], torch.cuda.Event | None]:
        """Starts a bucket's copies to the GPU. Returns its parts and when they are there."""
        # Allocated on compute, whose memory has room: forward and backward have left it.
        parts = []
        pairs = []
        for name, cut in bucket:
            state = {}
            for key, tensor in self.tensors[name].items():
                on_host = self._view(tensor)[cut]
                state[key] = torch.empty_like(on_host, device=self.device)
                pairs.append((state[key], on_host))
            gradient = None
            if name in self.host_gradients:
                on_host = self._view(self.host_gradients[name])[cut]
                gradient = torch.empty_like(on_host, device=self.device)
                pairs.append((gradient, on_host))
            parts.append(self._part(name, cut, state, gradient))
        return parts, self.copier.fetch(pairs)

    def _send(self, bucket: list[Slice], parts: list[Part]) -> None:
        """Starts a bucket's state on its way back to the host. Its gradients have not changed."""
        pairs = []
        for (name, cut), part in zip(bucket, parts):
            for key, tensor in part.state.items():
                pairs.append((self._view(self.tensors[name][key])[cut], tensor))
        self.copier.send(pairs)
        self.copier.end_batch()

    def _part(
        self, name: str, cut: slice, state: dict[str, Tensor], gradient: Tensor | None = None
    ) -> Part:
        p = self.parameters[name]
        if gradient is None:
            gradient = self._view(p.grad)[cut]
        return Part(self._view(p.data)[cut], gradient, state)

    def _view(self, tensor: Tensor) -> Tensor:
        """A parameter, or what is shaped like it, with the dimension first that buckets cut."""
        if self.matrices:
            return tensor.view(-1, *tensor.shape[-2:])
        return tensor

    def _cut_into_buckets(self) -> list[list[Slice]]:
        """The slices of every bucket, which together cover each parameter that has a gradient."""
        shapes = {
            name: self._view(p).shape
            for name, p in self.parameters.items()
            if p.grad is not None or name in self.host_gradients
        }
        names = list(shapes)
        if self.matrices:
            # Matrices of one shape side by side; shapes in the order in which they first come.
            by_shape: dict[torch.Size, list[str]] = {}
            for name in names:
                by_shape.setdefault(shapes[name][1:], []).append(name)
            names = []
            for names_of_shape in by_shape.values():
                names += names_of_shape

        # Fills one bucket after the other. A parameter that does not fit into what is left of a
        # bucket continues in the next one.
        buckets: list[list[Slice]] = []
        room = 0  # elements that the last bucket still takes
        bucket_shape = None  # of its matrices
        for name in names:
            count, *shape = shapes[name]
            size = math.prod(shape)
            start = 0
            while start < count:
                if room < size or (self.matrices and shape != bucket_shape):
                    buckets.append([])
                    room = max(self.BUCKET, size)  # a matrix larger than BUCKET has its own bucket
                    bucket_shape = shape
                stop = min(count, start + room // size)
                buckets[-1].append((name, slice(start, stop)))
                room -= (stop - start) * size
                start = stop
        return buckets

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The state tensors themselves, not copies, once every copy on its way has arrived."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.tensors

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Copies `saved` into the tensors that are there, which keep their dtype and device.

        torch's own optimizers would cast them to those of the parameters. Raises ValueError when
        names, shapes or dtypes differ.
        """
        if saved.keys() != self.tensors.keys():
            different = sorted(saved.keys() ^ self.tensors.keys())
            raise ValueError(f"optimizer state of other parameters: {different[:4]}")
        for name, own in self.tensors.items():
            unknown = saved[name].keys() - own.keys()
            if unknown:
                raise ValueError(f"optimizer state {name}: unknown {sorted(unknown)}")
            for key, tensor in own.items():
                found = saved[name].get(key)
                if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                    raise ValueError(
                        f"optimizer state {name}/{key}: expected {_dtype_and_shape(tensor)}, "
                        f"found {_dtype_and_shape(found)}"
                    )
                tensor.copy_(found)


def _dtype_and_shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{tensor.dtype} {tuple(tensor.shape)}"


# ---------------------------------------------------------------- gradients


class GradientOffload:
    """Sums gradients of the first `n_blocks` blocks over a step's micro-batches, in host memory.

    Hooks do the work while the backward pass runs, from the last block to the first:

    1. When it reaches the blocks (`_start_pass`), the sums of the last two of them are fetched.
    2. When it has made a gradient (`_take`), the sum so far is added to it, the new sum is sent
       to the host, and `.grad` is emptied.
    3. When it has left a block, the sums of the block two further on are fetched.

    So at most the sums of two blocks are on the GPU. The first micro-batch fetches nothing.

    Only matrices are offloaded, without the routers' (small). The first blocks are taken because
    memory is scarcest at the end of the forward pass: their gradients are made last.

    `tensors` holds the sums, by name of the parameter. `norms` holds their norms after the last
    micro-batch of a step, by parameter. Raises ExperimentError when host memory does not hold the
    sums.
    """

    def __init__(self, model: torch.nn.Module, n_blocks: int):
        self.blocks: list[dict[str, Tensor]] = []
        for i, block in enumerate(model.blocks[:n_blocks]):
            matrices = {}
            for name, p in block.named_parameters():
                if p.ndim > 1 and "router" not in name:
                    matrices[f"blocks.{i}.{name}"] = p
            self.blocks.append(matrices)

        named = {name: p for block in self.blocks for name, p in block.items()}
        device = model.norm.weight.device
        sums = host_zeros([(p.shape, p.dtype) for p in named.values()], device)
        self.tensors = dict(zip(named, sums))
        self.norms: dict[Tensor, Tensor] = {}
        self.copier = copier_for(device)
        self._register_hooks(model)

    def _register_hooks(self, model: torch.nn.Module) -> None:
        if not self.blocks:
            return
        # The norm that the backward pass comes through just before it reaches the blocks
        norm_before = model.norm
        if len(self.blocks) < len(model.blocks):
            norm_before = model.blocks[len(self.blocks)].attention_norm
        norm_before.weight.register_post_accumulate_grad_hook(_weakly(self._start_pass))
        take = _weakly(self._take)
        for i, block in enumerate(self.blocks):
            for name, p in block.items():
                p.register_post_accumulate_grad_hook(functools.partial(take, name, i))

    def micro_batch(self, number: int, of: int) -> None:
        """Call before each backward pass of a step: it is the `number`-th, from 0, of so many."""
        self.first = number == 0
        self.last = number == of - 1

    def wait(self) -> None:
        """Lets compute wait for the sums to be in host memory. Call before they are read."""
        self.copier.finish()

    def _start_pass(self, _: Tensor) -> None:
        self.missing = [len(block) for block in self.blocks]  # gradients still to come
        self.fetched: dict[int, tuple[dict[str, Tensor], torch.cuda.Event | None]] = {}
        self.copier.begin()
        last = len(self.blocks) - 1
        self._fetch(last)
        self._fetch(last - 1)

    @torch.no_grad()
    def _fetch(self, i: int) -> None:
        """Starts the sums of block i on their way to the GPU."""
        if self.first or i < 0:
            return
        sums = {}
        pairs = []
        for name, p in self.blocks[i].items():
            sums[name] = torch.empty_like(p)
            pairs.append((sums[name], self.tensors[name]))
        self.fetched[i] = (sums, self.copier.fetch(pairs))

    @torch.no_grad()
    def _take(self, name: str, i: int, p: Tensor) -> None:
        """Adds the sum so far to a gradient that has just been made, and sends it to the host."""
        gradient = p.grad
        p.grad = None  # the next micro-batch makes a new tensor, while this one is still being sent
        if not self.first:
            sums, fetched = self.fetched[i]
            self.copier.wait_for(fetched)
            gradient.add_(sums.pop(name))  # pop: the memory is free again at once
        if self.last:
            self.norms[p] = gradient_norm(gradient)
        self.copier.send([(self.tensors[name], gradient)])
        self.missing[i] -= 1
        # The backward pass does not make a block's gradients in a fixed order: the last one counts.
        if self.missing[i] == 0:
            self.fetched.pop(i, None)
            self.copier.end_batch()
            self.copier.throttle()
            self._fetch(i - 2)


def _weakly(method):
    """A method for a hook that does not keep its object alive.

    Python does not collect a cycle that goes through a parameter's hook.
    """
    weak = weakref.WeakMethod(method)

    def call(*arguments):
        alive = weak()
        if alive is not None:
            alive(*arguments)

    return call


# ---------------------------------------------------------------- host memory


def host_zeros(wanted: list[tuple[torch.Size, torch.dtype]], device: torch.device) -> list[Tensor]:
    """Zeros of these shapes and dtypes in host memory, pinned where `device` is a GPU.

    Raises ExperimentError when host memory runs out.
    """
    try:
        if device.type != "cuda":
            return [torch.zeros(shape, dtype=dtype) for shape, dtype in wanted]
        with ThreadPoolExecutor(PINNING_THREADS) as pool:
            return list(pool.map(lambda shape_dtype: _pinned_zeros(*shape_dtype), wanted))
    except (RuntimeError, MemoryError, OSError) as error:
        raise ExperimentError(_no_host_memory_message(error)) from error


def _no_host_memory_message(error: Exception) -> str:
    return (
        f"no host memory for optimizer and gradient offload ({error}).\n"
        "  Free host memory, use a smaller preset, or set --offload_optimizer false if the "
        "optimizer state fits the GPU ('plan' shows both)."
    )


def _pinned_zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros in page-locked host memory, which the GPU copies from and to by itself.

    PyTorch's own pinned allocator rounds every request up to a power of two, which would waste up
    to half of the memory. So memory is mapped here and registered with CUDA in place.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < 2**20:
        # Small tensors share pages, and a page can be registered once only: PyTorch handles those.
        return torch.zeros(shape, dtype=dtype).pin_memory()
    pages = mmap.mmap(-1, size)
    # Pinning takes its time by the page, so huge pages are requested where the system has them.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not every kernel has them
            pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(int(cudart.cudaHostRegister(tensor.data_ptr(), size, 0)))
    weakref.finalize(tensor, cudart.cudaHostUnregister, tensor.data_ptr())
    return tensor
