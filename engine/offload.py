"""What one GPU has no room for, streamed from host memory: optimizer state as the step walks over it, and gradients as the
backward pass makes them.

Copies run on streams of their own beside the computation, in and out at once. The order of arithmetic is that of everything on
the device, so results are too, to the last bit. On a CPU the same code runs without streams.
"""

import contextlib
import functools
import math
import mmap
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from config import OPTIMIZER_BUCKET, ExperimentError
from engine.precision import gradient_norm

PINNING_THREADS = 8  # one thread pins about 2 GB/s


class OptimizerState:
    """State tensors of a set of parameters, each shaped like its parameter, walked through in pieces of bounded size.

    Every 16-bit parameter has a "residual" (int16) besides the optimizer's own moments. With `offload` the tensors live
    in host memory (pinned when the parameters are on a GPU): a piece is copied to the device while the one before it is
    computed with, and back while the next one is. The order of arithmetic is the same, so results are too.

    `matrices=True` cuts pieces between matrices (the last two dimensions), else between rows of the first dimension.
    `gradients` are those that lie on the host, by name (GradientOffload.tensors); they come with the state, which is streamed then.
    Raises ExperimentError when host memory does not hold the state.
    """

    BUCKET = OPTIMIZER_BUCKET

    def __init__(
        self,
        parameters: dict[str, Tensor],
        moments: tuple[str, ...],
        moment_dtype,
        offload: bool,
        matrices: bool,
        gradients: dict[str, Tensor] = {},
    ):
        assert offload or not gradients
        self.parameters, self.offload, self.matrices, self.host_gradients = (
            parameters,
            offload,
            matrices,
            gradients,
        )
        self.device = next((p.device for p in parameters.values()), torch.device("cpu"))
        wanted = []
        for name, p in parameters.items():
            kinds = {"residual": torch.int16} if p.dtype != torch.float32 else {}
            wanted += [
                (name, key, p.shape, dtype)
                for key, dtype in (kinds | {moment: moment_dtype(p) for moment in moments}).items()
            ]
        shapes = [(shape, dtype) for _, _, shape, dtype in wanted]
        zeros = (
            host_zeros(shapes, self.device)
            if offload
            else [torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in shapes]
        )
        self.tensors: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        for (name, key, *_), tensor in zip(wanted, zeros):
            self.tensors[name][key] = tensor

    def groups(self) -> Iterator[list[tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """Yields lists of (weight, gradient, state), views to be updated in place, together at most BUCKET elements unless a
        single matrix is larger; a parameter without a gradient is passed over. With matrices=True each tensor is
        [n, rows, columns], and rows and columns are the same throughout a list; else [rows, ...]."""
        groups = self._groups()
        if not self.offload:
            for group in groups:
                yield [
                    (
                        *self._weight_and_gradient(name, cut),
                        {k: self._view(t)[cut] for k, t in self.tensors[name].items()},
                    )
                    for name, cut in group
                ]
            return

        on_gpu = self.device.type == "cuda"
        compute = torch.cuda.current_stream() if on_gpu else None
        inward, outward = self._streams() if on_gpu else (None, None)
        stream = torch.cuda.stream if on_gpu else lambda _: contextlib.nullcontext()

        def fetch(group):
            """The group's state, and its gradients that lie on the host, on their way to the device, and the event that says they
            are there."""
            # taken from the computation's own memory: what forward and backward have left is free now
            sources = [
                self.tensors[name]
                | ({"gradient": self.host_gradients[name]} if name in self.host_gradients else {})
                for name, _ in group
            ]
            states = [
                {
                    k: torch.empty_like(self._view(t)[cut], device=self.device)
                    for k, t in source.items()
                }
                for (_, cut), source in zip(group, sources)
            ]
            if on_gpu:
                inward.wait_stream(compute)  # and may still be in use there
            with stream(inward):
                for (_, cut), source, state in zip(group, sources, states):
                    for key, tensor in state.items():
                        tensor.copy_(self._view(source[key])[cut], non_blocking=True)
            return states, inward.record_event() if on_gpu else None

        if on_gpu:
            inward.wait_stream(outward)  # the last walk's results have arrived in host memory
        ahead, written = [fetch(group) for group in groups[:2]], []
        for i, group in enumerate(groups):
            states, arrived = ahead.pop(0)
            gradients = [state.pop("gradient", None) for state in states]
            tensors = [
                (self._view(self.tensors[name][key])[cut], tensor)
                for (name, cut), state in zip(group, states)
                for key, tensor in state.items()
            ]
            if on_gpu:
                compute.wait_event(arrived)  # this group's; the next one's copy goes on meanwhile
            yield [
                (*self._weight_and_gradient(name, cut, gradient), state)
                for (name, cut), gradient, state in zip(group, gradients, states)
            ]
            with stream(outward):
                if on_gpu:
                    outward.wait_stream(compute)
                for on_host, tensor in tensors:
                    on_host.copy_(tensor, non_blocking=True)
                    if on_gpu:
                        tensor.record_stream(outward)
                if on_gpu:
                    written.append(outward.record_event())
            if i + 2 < len(groups):
                if on_gpu:
                    # never more than two groups ahead: the host, which takes their memory, waits for the group before
                    # this one to have left (the GPU has this one to go on with)
                    if len(written) > 1:
                        written.pop(0).synchronize()
                ahead.append(fetch(groups[i + 2]))
        if on_gpu:
            compute.wait_stream(outward)

    def _streams(self):
        if not hasattr(self, "_side_streams"):
            self._side_streams = torch.cuda.Stream(), torch.cuda.Stream()
        return self._side_streams

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1, *tensor.shape[-2:]) if self.matrices else tensor

    def _groups(self) -> list[list[tuple[str, slice]]]:
        """(name, slice of its matrices or rows) of every piece, those that are worked on together in one list."""
        shape = {
            name: self._view(p).shape
            for name, p in self.parameters.items()
            if p.grad is not None or name in self.host_gradients
        }
        if self.matrices:  # equal shapes side by side, in the order in which they first come
            first = {
                rows_columns: i
                for i, rows_columns in reversed(list(enumerate(s[1:] for s in shape.values())))
            }
            shape = dict(sorted(shape.items(), key=lambda item: first[item[1][1:]]))
        groups, room, last = [], 0, None
        for name, (n, *rest) in shape.items():
            size, start = math.prod(rest), 0
            while start < n:
                if room < size or (self.matrices and rest != last):
                    groups.append([])
                    room, last = max(self.BUCKET, size), rest
                stop = min(n, start + room // size)
                groups[-1].append((name, slice(start, stop)))
                room -= (stop - start) * size
                start = stop
        return groups

    def _weight_and_gradient(self, name, cut, gradient=None):
        p = self.parameters[name]
        return self._view(p.data)[cut], self._view(p.grad)[cut] if gradient is None else gradient

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The state tensors themselves, not copies, once every copy on its way has arrived."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.tensors

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copies into the tensors that are there, so dtype and place stay (torch's optimizers cast both).

        Raises ValueError when names, shapes or dtypes differ."""
        if state.keys() != self.tensors.keys():
            raise ValueError(
                f"optimizer state of other parameters: {sorted(state.keys() ^ self.tensors.keys())[:4]}"
            )
        for name, own in self.tensors.items():
            if unknown := state[name].keys() - own.keys():
                raise ValueError(f"optimizer state {name}: unknown {sorted(unknown)}")
            for key, tensor in own.items():
                saved = state[name].get(key)
                if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                    raise ValueError(
                        f"optimizer state {name}/{key}: expected {tensor.dtype} {tuple(tensor.shape)}, found "
                        + ("nothing" if saved is None else f"{saved.dtype} {tuple(saved.shape)}")
                    )
                tensor.copy_(saved)


class GradientOffload:
    """Gradients of some blocks of the model, summed over a step's micro-batches in host memory.

    As soon as the backward pass has made a gradient, the sum so far, which was fetched while the block after was computed with,
    is added to it, and the new sum leaves for the host; `.grad` stays empty. `tensors` holds the sums by name, `norms` their norms
    after a step's last micro-batch by parameter.

    These are the matrices of the model's first `n_blocks` blocks but their routers', so that the room is there when it is short, at
    the end of the forward pass. Raises ExperimentError when host memory does not hold the sums.
    """

    def __init__(self, model, n_blocks: int):
        self.blocks = [
            {
                f"blocks.{i}.{name}": p
                for name, p in block.named_parameters()
                if p.ndim > 1 and "router" not in name
            }
            for i, block in enumerate(model.blocks[:n_blocks])
        ]
        named = {name: p for block in self.blocks for name, p in block.items()}
        device = model.norm.weight.device
        self.gpu, self.norms = device.type == "cuda", {}
        self.tensors = dict(
            zip(named, host_zeros([(p.shape, p.dtype) for p in named.values()], device))
        )
        if self.gpu:
            self.inward, self.outward = torch.cuda.Stream(), torch.cuda.Stream()
        if n_blocks:  # the last gradient of what the backward pass comes through before
            before = (
                model.norm
                if n_blocks == len(model.blocks)
                else model.blocks[n_blocks].attention_norm
            )
            before.weight.register_post_accumulate_grad_hook(_weakly(self._begin))
        take = _weakly(self._take)
        for i, block in enumerate(self.blocks):
            for name, p in block.items():
                p.register_post_accumulate_grad_hook(functools.partial(take, name, i))

    def micro_batch(self, number: int, of: int) -> None:
        """Call before each backward pass of a step: it is the `number`-th, from 0, of so many."""
        self.first, self.last = number == 0, number == of - 1

    def _begin(self, _: Tensor) -> None:
        self.missing, self.fetched, self.left = [len(block) for block in self.blocks], {}, []
        if self.gpu:
            self.inward.wait_stream(self.outward)  # the sums of the micro-batch before have arrived
        for i in (len(self.blocks) - 1, len(self.blocks) - 2):
            self._fetch(i)

    @torch.no_grad()
    def _fetch(self, i: int) -> None:
        """Starts a block's sums on their way to the device."""
        if self.first or i < 0:
            return
        sums = {name: torch.empty_like(p) for name, p in self.blocks[i].items()}
        if self.gpu:
            self.inward.wait_stream(torch.cuda.current_stream())  # which may still use that memory
        with self._on("inward"):
            for name, tensor in sums.items():
                tensor.copy_(self.tensors[name], non_blocking=True)
        self.fetched[i] = sums, self.inward.record_event() if self.gpu else None

    @torch.no_grad()
    def _take(self, name: str, i: int, p: Tensor) -> None:
        """Adds the sum so far to a gradient that has just been made, and sends it to the host."""
        gradient, p.grad = p.grad, None
        if not self.first:
            sums, arrived = self.fetched[i]
            if self.gpu:
                torch.cuda.current_stream().wait_event(arrived)
            gradient.add_(sums.pop(name))
        if self.last:
            self.norms[p] = gradient_norm(gradient)
        if self.gpu:
            self.outward.wait_stream(torch.cuda.current_stream())
        with self._on("outward"):
            self.tensors[name].copy_(gradient, non_blocking=True)
            if self.gpu:
                gradient.record_stream(self.outward)
        self.missing[i] -= 1
        if self.missing[i] == 0:
            self.fetched.pop(i, None)
            if self.gpu:  # the host, which takes memory for what is fetched, waits for the block after this one to have left
                self.left.append(self.outward.record_event())
                if len(self.left) > 1:
                    self.left.pop(0).synchronize()
            self._fetch(i - 2)

    def _on(self, stream: str):
        return torch.cuda.stream(getattr(self, stream)) if self.gpu else contextlib.nullcontext()

    def wait(self) -> None:
        """Call before the sums are read: lets the computation wait for them to have arrived."""
        if self.gpu:
            torch.cuda.current_stream().wait_stream(self.outward)


def _weakly(method):
    """A method for a hook that does not keep its object: Python does not collect a cycle through a parameter's hook."""
    weak = weakref.WeakMethod(method)

    def call(*arguments):
        if (alive := weak()) is not None:
            alive(*arguments)

    return call


def host_zeros(wanted: list[tuple[torch.Size, torch.dtype]], device: torch.device) -> list[Tensor]:
    """Zeros of these shapes and dtypes in host memory, pinned where `device` is a GPU. Raises ExperimentError when it runs out."""
    try:
        if device.type != "cuda":
            return [torch.zeros(shape, dtype=dtype) for shape, dtype in wanted]
        with ThreadPoolExecutor(PINNING_THREADS) as pool:
            return list(pool.map(lambda want: _pinned_zeros(*want), wanted))
    except (RuntimeError, MemoryError, OSError) as error:
        raise ExperimentError(
            f"no host memory for what is streamed ({error}).\n  Free host memory, use a smaller preset, or set "
            "--offload_optimizer false if the optimizer state fits the GPU ('plan' shows both)."
        ) from error


def _pinned_zeros(shape, dtype: torch.dtype) -> Tensor:
    """Zeros in host memory that a GPU copies from and to by itself.

    Registered in place, because PyTorch's own pinned allocator rounds every request up to a power of two; in huge pages
    where the system has them, because pinning takes its time by the page.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < 2**20:
        return torch.zeros(
            shape, dtype=dtype
        ).pin_memory()  # small ones share pages, and a page is registered once
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(int(cudart.cudaHostRegister(tensor.data_ptr(), size, 0)))
    weakref.finalize(tensor, cudart.cudaHostUnregister, tensor.data_ptr())
    return tensor
