"""Optimizer state and gradients in host memory, for what the GPU has no room for.

OptimizerState is the state of one optimizer. The optimizer walks over it in buckets. With `offload`
the state is in host memory, and a bucket is on the GPU only while the optimizer updates it.
GradientOffload sums the gradients of some blocks in host memory, as the backward pass makes them.
Both copy with StreamCopier on a GPU. On a CPU the same code runs with DirectCopier, without
streams.

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
    finish      compute waits for outward    before later work reads the host's tensors

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
from engine.ownership import parameter_of
from engine.precision import gradient_norm

PINNING_THREADS = 8  # one thread pins about 2 GB/s

# ---------------------------------------------------------------- copies

# A copy: the tensor that is written, then the tensor that is read.
Copy = tuple[Tensor, Tensor]


class StreamCopier:
    """Copies between host and GPU on two streams while the GPU computes; see the file's top.

    A batch is all that is sent between two calls of `end_batch`: a bucket, or a block's gradients.
    """

    def __init__(self):
        self.inward = torch.cuda.Stream()
        self.outward = torch.cuda.Stream()
        # The ends of the batches that may not have reached the host yet
        self.batch_ends: list[torch.cuda.Event] = []

    def begin(self) -> None:
        """Starts a pass over tensors of the host, after the copies of the pass before."""
        self.inward.wait_stream(self.outward)
        self.batch_ends = []

    def fetch(self, copies: list[Copy]) -> torch.cuda.Event:
        """Starts copies to the GPU. The event is for `wait_for`."""
        self.inward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.inward):
            for on_gpu, on_host in copies:
                on_gpu.copy_(on_host, non_blocking=True)
        return self.inward.record_event()

    def wait_for(self, fetched: torch.cuda.Event) -> None:
        """Lets compute wait for one fetch, while a later fetch still runs."""
        torch.cuda.current_stream().wait_event(fetched)

    def send(self, copies: list[Copy]) -> None:
        """Starts copies to the host."""
        self.outward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.outward):
            for on_host, on_gpu in copies:
                on_host.copy_(on_gpu, non_blocking=True)
                on_gpu.record_stream(self.outward)

    def end_batch(self) -> None:
        """Marks the end of a batch of sends, for `throttle`."""
        self.batch_ends.append(self.outward.record_event())

    def throttle(self) -> None:
        """Makes the CPU wait until all sent batches but the last one are in host memory.

        The CPU runs ahead of the GPU, and it takes GPU memory for a fetch when it starts the fetch.
        Without this wait it would soon hold memory for every bucket. It does not wait for the last
        batch, so that the GPU has work in the meantime.
        """
        if len(self.batch_ends) > 1:
            self.batch_ends.pop(0).synchronize()

    def finish(self) -> None:
        """Lets compute wait for all that was sent."""
        torch.cuda.current_stream().wait_stream(self.outward)


class DirectCopier:
    """StreamCopier's methods without streams, for a CPU: a copy is done when the call returns."""

    def begin(self) -> None:
        pass

    def fetch(self, copies: list[Copy]) -> None:
        for target, source in copies:
            target.copy_(source)

    def wait_for(self, fetched: None) -> None:
        pass

    def send(self, copies: list[Copy]) -> None:
        self.fetch(copies)

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
    """A slice of a parameter, with its gradient and state. The optimizer updates them in place."""

    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]


class Slice(NamedTuple):
    """Where a part is: a parameter's name, and a range of the dimension that buckets cut."""

    name: str
    cut: slice


class OptimizerState:
    """State tensors of a set of parameters, each shaped like its parameter, and the walk over them.

    `moments` names the optimizer's own tensors, of dtype `moment_dtype(parameter)`. Every 16-bit
    parameter also has "residual" (int16), the low bits of its fp32 master. `tensors` holds all of
    them: tensors[name of the parameter][key].

    With `matrices`, buckets are cut between matrices (the last two dimensions), for an optimizer
    that needs whole matrices. Otherwise they are cut between rows of the first dimension.

    A parameter may also be a shard: a view of some rows, whose name is a `shard_key`.
    `after_bucket`, if it is set, is called with the names of the parameters that are updated
    entirely, as soon as the optimizer has requested the next bucket.

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
        # Of whole parameters. With shards there may be more: those of which this rank has no row.
        self.names = {parameter_of(key)[0] for key in parameters}
        self.offload = offload
        self.matrices = matrices
        self.gradient_offload = gradient_offload
        self.host_gradients: dict[str, Tensor] = {}
        if gradient_offload is not None:
            self.host_gradients = gradient_offload.tensors
        assert offload or not self.host_gradients
        # An optimizer may have no parameters: the device is not used then.
        self.device = torch.device("cpu")
        if parameters:
            first = next(iter(parameters.values()))
            self.device = first.device
        self.copier = None
        if offload:
            self.copier = copier_for(self.device)
        self.after_bucket: Callable[[list[str]], None] | None = None
        self.moments = moments
        self.moment_dtype = moment_dtype
        self.tensors = self._zeros()

    def dtypes(self, parameter: Tensor) -> dict[str, torch.dtype]:
        """The dtype of each state tensor of a parameter, by its key."""
        found = {}
        if parameter.dtype != torch.float32:
            found["residual"] = torch.int16
        for moment in self.moments:
            found[moment] = self.moment_dtype(parameter)
        return found

    def _zeros(self) -> dict[str, dict[str, Tensor]]:
        """The state at the start. With low bits of 0, a master equals its weight."""
        keys = []
        specs = []
        for name, p in self.parameters.items():
            for key, dtype in self.dtypes(p).items():
                keys.append((name, key))
                specs.append(TensorSpec(p.shape, dtype))
        # all in one call, which pins host memory on several threads
        if self.offload:
            zeros = host_zeros(specs, self.device)
        else:
            zeros = device_zeros(specs, self.device)
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for (name, key), tensor in zip(keys, zeros):
            tensors[name][key] = tensor
        return tensors

    def buckets(self) -> Iterator[list[Part]]:
        """Yields parameters, gradients and state in buckets, to be updated in place.

        A bucket has at most BUCKET elements, unless a single matrix is larger. With `matrices`
        every tensor is [n, rows, columns], with the same rows and columns throughout a bucket.
        Otherwise tensors are [rows, ...]. Parameters without a gradient are left out.

        An offloaded bucket is written back when the next one is requested, so request all of them.
        """
        buckets = self._cut_into_buckets()
        walk = self._resident_buckets(buckets)
        if self.offload:
            walk = self._offloaded_buckets(buckets)
        # `walk` first: zip then asks it once more at the end, and its last copies are finished.
        for parts, bucket in zip(walk, buckets):
            yield parts
            if self.after_bucket is not None:
                self.after_bucket(self._updated_entirely(bucket))

    def _updated_entirely(self, bucket: list[Slice]) -> list[str]:
        """The parameters whose last rows the bucket holds: the rows come in their order."""
        names = []
        for name, cut in bucket:
            if cut.stop == len(self._view(self.parameters[name])):
                names.append(name)
        return names

    def _resident_buckets(self, buckets: list[list[Slice]]) -> Iterator[list[Part]]:
        for bucket in buckets:
            parts = []
            for name, cut in bucket:
                state = {}
                for key, tensor in self.tensors[name].items():
                    state[key] = self._view(tensor)[cut]
                parts.append(self._part(name, cut, state))
            yield parts

    def _offloaded_buckets(self, buckets: list[list[Slice]]) -> Iterator[list[Part]]:
        """While the optimizer works on bucket i, bucket i + 1 arrives and bucket i - 1 leaves."""
        # The gradients may still be on their way to the host. Compute waits for them here, and each
        # fetch below waits for compute.
        if self.gradient_offload is not None:
            self.gradient_offload.wait()
        self.copier.begin()
        fetches = [self._fetch(bucket) for bucket in buckets[:2]]
        for i, bucket in enumerate(buckets):
            parts, fetched = fetches.pop(0)
            self.copier.wait_for(fetched)
            yield parts
            self._send(bucket, parts)
            # The GPU now holds bucket i, which leaves, and bucket i + 1, which arrives. Bucket
            # i - 1 has left when `throttle` returns: bucket i + 2 takes its memory.
            if i + 2 < len(buckets):
                self.copier.throttle()
                fetches.append(self._fetch(buckets[i + 2]))
        self.copier.finish()

    def _fetch(self, bucket: list[Slice]) -> tuple[list[Part], torch.cuda.Event | None]:
        """Starts a bucket's copies to the GPU. Returns its parts, and the event for `wait_for`."""
        parts = []
        copies = []
        for name, cut in bucket:
            state = {}
            for key, tensor in self.tensors[name].items():
                state[key] = self._add_copy(tensor, cut, copies)
            gradient = None
            if name in self.host_gradients:
                gradient = self._add_copy(self.host_gradients[name], cut, copies)
            parts.append(self._part(name, cut, state, gradient))
        return parts, self.copier.fetch(copies)

    def _add_copy(
        self,
        tensor: Tensor,
        cut: slice,
        copies: list[Copy],
    ) -> Tensor:
        """A new GPU tensor for a slice of a host tensor. Adds the copy to `copies`."""
        on_host = self._view(tensor)[cut]
        # Allocated on compute: forward and backward pass have left free memory there.
        on_gpu = torch.empty_like(on_host, device=self.device)
        copies.append((on_gpu, on_host))
        return on_gpu

    def _send(self, bucket: list[Slice], parts: list[Part]) -> None:
        """Starts the copy of a bucket's state to the host. The gradients have not changed."""
        copies = []
        for (name, cut), part in zip(bucket, parts):
            host_state = self.tensors[name]
            for key, on_gpu in part.state.items():
                on_host = self._view(host_state[key])[cut]
                copies.append((on_host, on_gpu))
        self.copier.send(copies)
        self.copier.end_batch()

    def _part(
        self,
        name: str,
        cut: slice,
        state: dict[str, Tensor],
        gradient: Tensor | None = None,
    ) -> Part:
        """The slice `cut` of a parameter. Its gradient is that of `.grad`, unless one is given."""
        p = self.parameters[name]
        if gradient is None:
            gradient = self._view(p.grad)[cut]
        weight = self._view(p.data)
        return Part(weight[cut], gradient, state)

    def _view(self, tensor: Tensor) -> Tensor:
        """The shape in which buckets are cut along the first dimension.

        With `matrices` [..., rows, columns] becomes [n, rows, columns]. Otherwise the shape stays.
        """
        if self.matrices:
            return tensor.view(-1, *tensor.shape[-2:])
        return tensor

    def _cut_into_buckets(self) -> list[list[Slice]]:
        """The slices of every bucket. Together they cover each parameter that has a gradient.

        A parameter is cut into rows: matrices, or what its first dimension counts. Buckets are
        filled one after the other. A parameter whose rows do not all fit into a bucket continues in
        the next one.
        """
        buckets: list[list[Slice]] = []
        room = 0  # elements that the last bucket has room for
        bucket_row_shape = None  # the row shape of the last bucket
        for name, shape in self._shapes_with_gradients().items():
            num_rows = shape[0]
            row_shape = shape[1:]
            row_numel = math.prod(row_shape)
            start = 0
            while start < num_rows:
                # The matrices of a bucket are updated as one batch, so they have one shape.
                other_matrices = self.matrices and row_shape != bucket_row_shape
                if room < row_numel or other_matrices:
                    buckets.append([])
                    # A row larger than BUCKET has a bucket of its own.
                    room = max(self.BUCKET, row_numel)
                    bucket_row_shape = row_shape
                stop = min(num_rows, start + room // row_numel)
                buckets[-1].append(Slice(name, slice(start, stop)))
                room -= (stop - start) * row_numel
                start = stop
        return buckets

    def _shapes_with_gradients(self) -> dict[str, torch.Size]:
        """The shape of `_view` of each parameter that has a gradient.

        With `matrices`, parameters whose matrices have one shape follow each other, so that few
        buckets are left half empty. These groups come in the order of their first parameters.
        """
        shapes = {}
        for name, p in self.parameters.items():
            if p.grad is not None or name in self.host_gradients:
                shapes[name] = self._view(p).shape
        if not self.matrices:
            return shapes
        groups: dict[torch.Size, dict[str, torch.Size]] = {}
        for name, shape in shapes.items():
            matrix_shape = shape[1:]
            groups.setdefault(matrix_shape, {})[name] = shape
        grouped = {}
        for group in groups.values():
            grouped |= group
        return grouped

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The state tensors themselves. Waits for copies that are still under way."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.tensors

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Copies the tensors of `saved` into the present ones, on the device where those are.

        `saved` has whole tensors, by name of the parameter. A shard takes its rows of them.
        Raises ValueError when names, shapes or dtypes differ. torch's own optimizers would not:
        they cast loaded state to the dtype of the parameters, which would round fp32 moments.
        """
        if saved.keys() != self.names:
            different = sorted(saved.keys() ^ self.names)
            raise ValueError(f"optimizer state of other parameters: {different[:4]}")
        for shard, present in self.tensors.items():
            name, rows = parameter_of(shard)
            loaded = saved[name]
            unknown = loaded.keys() - present.keys()
            if unknown:
                raise ValueError(f"optimizer state {name}: unknown {sorted(unknown)}")
            for key, tensor in present.items():
                source = loaded.get(key)
                if source is not None and source.ndim:
                    source = source[rows]
                expected = _dtype_and_shape(tensor)
                found = _dtype_and_shape(source)
                if found != expected:
                    raise ValueError(
                        f"optimizer state {name}/{key}: expected {expected}, found {found}"
                    )
                tensor.copy_(source)


def _dtype_and_shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{tensor.dtype} {tuple(tensor.shape)}"


# ---------------------------------------------------------------- gradients


class GradientOffload:
    """Sums gradients of the first `n_blocks` blocks over a step's micro-batches, in host memory.

    The backward pass runs from block n_blocks - 1 to block 0. Hooks do the work:

    1. When it reaches the offloaded blocks (`_start_pass`), the sums of its first two blocks,
       n_blocks - 1 and n_blocks - 2, are fetched.
    2. When it has made a gradient (`_take`), the sum so far is added to it, the new sum is sent
       to the host, and `.grad` is emptied.
    3. When it has made all gradients of block i, the sums of block i - 2 are fetched.

    So at most the sums of two blocks are on the GPU. The first micro-batch fetches nothing.

    Only matrices are offloaded, and not the routers', which are small. The first blocks are
    offloaded because the GPU has least free memory at the end of the forward pass: the gradients
    of the first blocks are made last.

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

        specs = {}
        for block in self.blocks:
            for name, p in block.items():
                specs[name] = TensorSpec(p.shape, p.dtype)
        device = model.norm.weight.device
        sums = host_zeros(list(specs.values()), device)
        self.tensors = dict(zip(specs, sums))
        self.norms: dict[Tensor, Tensor] = {}
        self.copier = copier_for(device)
        self._register_hooks(model)

    def _register_hooks(self, model: torch.nn.Module) -> None:
        if not self.blocks:
            return
        # The norm whose gradient is made just before the backward pass reaches these blocks: the
        # first norm of the block that follows them, or the model's last norm.
        norm_before = model.norm
        n_blocks = len(self.blocks)
        if n_blocks < len(model.blocks):
            norm_before = model.blocks[n_blocks].attention_norm
        norm_before.weight.register_post_accumulate_grad_hook(weakly(self._start_pass))
        take = weakly(self._take)
        for i, block in enumerate(self.blocks):
            for name, p in block.items():
                p.register_post_accumulate_grad_hook(functools.partial(take, name, i))

    def micro_batch(self, number: int, of: int) -> None:
        """Call before each backward pass: it is number `number`, from 0, of the step's `of`."""
        self.first = number == 0
        self.last = number == of - 1

    def wait(self) -> None:
        """Lets compute wait for the sums to be in host memory. Call before they are read."""
        self.copier.finish()

    def _start_pass(self, _: Tensor) -> None:
        # How many gradients of each block are still to come
        self.missing = [len(block) for block in self.blocks]
        # The sums of a block on the GPU, by name, and the event for `wait_for`
        self.fetched: dict[int, tuple[dict[str, Tensor], torch.cuda.Event | None]] = {}
        self.copier.begin()
        last = len(self.blocks) - 1
        self._fetch(last)
        self._fetch(last - 1)

    @torch.no_grad()
    def _fetch(self, i: int) -> None:
        """Starts the copies of block i's sums to the GPU."""
        if self.first or i < 0:
            return
        sums = {}
        copies = []
        for name, p in self.blocks[i].items():
            sums[name] = torch.empty_like(p)
            copies.append((sums[name], self.tensors[name]))
        self.fetched[i] = (sums, self.copier.fetch(copies))

    @torch.no_grad()
    def _take(self, name: str, i: int, p: Tensor) -> None:
        """Adds the sum so far to the new gradient of p, and sends the new sum to the host."""
        gradient = p.grad
        # The next micro-batch must make a new tensor, as this one may still be on its way.
        p.grad = None
        if not self.first:
            sums, fetched = self.fetched[i]
            self.copier.wait_for(fetched)
            # popped, so that its memory is free at once
            gradient.add_(sums.pop(name))
        if self.last:
            self.norms[p] = gradient_norm(gradient)
        self.copier.send([(self.tensors[name], gradient)])
        # The gradients of a block come in no fixed order. So they are counted.
        self.missing[i] -= 1
        if self.missing[i] == 0:
            self.fetched.pop(i, None)
            self.copier.end_batch()
            self.copier.throttle()
            self._fetch(i - 2)


def weakly(method):
    """A function for a hook. It calls `method`, and does not keep the method's object alive.

    The object holds the parameters, and a parameter holds its hooks. Python does not collect a
    cycle that goes through a hook.
    """
    weak = weakref.WeakMethod(method)

    def call(*arguments):
        method_or_none = weak()
        if method_or_none is not None:
            method_or_none(*arguments)

    return call


# ---------------------------------------------------------------- host memory


class TensorSpec(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype


def device_zeros(specs: list[TensorSpec], device: torch.device) -> list[Tensor]:
    """Zeros of these shapes and dtypes on `device`."""
    zeros = []
    for shape, dtype in specs:
        zeros.append(torch.zeros(shape, dtype=dtype, device=device))
    return zeros


def host_zeros(
    specs: list[TensorSpec],
    device: torch.device,
) -> list[Tensor]:
    """Zeros of these shapes and dtypes in host memory, pinned where `device` is a GPU.

    Raises ExperimentError when host memory runs out.
    """
    try:
        if device.type != "cuda":
            return device_zeros(specs, torch.device("cpu"))
        with ThreadPoolExecutor(PINNING_THREADS) as pool:
            return list(pool.map(_pinned_zeros, specs))
    except (RuntimeError, MemoryError, OSError) as error:
        raise ExperimentError(_no_host_memory_message(error)) from error


def _no_host_memory_message(error: Exception) -> str:
    return (
        f"no host memory for optimizer and gradient offload ({error}).\n"
        "  Free host memory, use a smaller preset, or set --offload_optimizer false if the "
        "optimizer state fits the GPU ('plan' shows both)."
    )


def _pinned_zeros(spec: TensorSpec) -> Tensor:
    """Zeros in page-locked host memory, which the GPU copies from and to by itself.

    PyTorch's own pinned allocator rounds every request up to a power of two, which would waste up
    to half of the memory. So memory is mapped here and registered with CUDA in place.
    """
    size = math.prod(spec.shape) * spec.dtype.itemsize  # bytes
    if size < 2**20:
        # Small tensors share pages, and a page can be registered only once. PyTorch's allocator
        # takes care of that, and wastes less than 1 MiB on each.
        return torch.zeros(spec.shape, dtype=spec.dtype).pin_memory()
    # -1: memory that belongs to no file. The system fills it with zeros.
    pages = mmap.mmap(-1, size)
    # Pinning takes time for every page, so huge pages are requested where the system has them.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not every kernel has them
            pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=spec.dtype).view(spec.shape)
    address = tensor.data_ptr()
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(address, size, 0)
    torch.cuda.check_error(int(error))
    # when the tensor is collected, before its pages are unmapped
    weakref.finalize(tensor, cudart.cudaHostUnregister, address)
    return tensor
