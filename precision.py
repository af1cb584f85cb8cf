"""What keeps 16-bit training exact: split fp32 master weights, loss scaling, fp32 gradient norms, streamed optimizer state.

A parameter that is stored in 16 bits has an fp32 master all the same: the 16-bit weight is the master rounded, and a
16-bit integer residual in the optimizer's state says how far. Nothing is held twice.
"""
import contextlib
import math
import mmap
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from config import OPTIMIZER_PIECE, ExperimentError


# ---------------------------------------------------------------- split master weights

def encode_master(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits fp32 masters into a weight of `dtype` (bfloat16 or float16) and an int16 residual.

    bfloat16 is exact: its bits are the upper half of the master's, rounded half up, and the residual is the lower half
    as a signed number. (Ties to even would need a residual of +0x8000, which int16 does not have.)
    float16 counts the residual in 1/2^16 of the weight's unit in the last place: exact for |weight| >= 2^-14, and to
    2^-40 below, where float16 is subnormal.
    """
    if dtype == torch.bfloat16:
        bits = master.view(torch.int32)
        upper = (bits + 0x8000) >> 16
        return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)
    weight = master.to(torch.float16)
    exponent, mantissa = _fp16_parts(weight)
    # +-0x8000 (a tie) is cut to 0x7fff: decoding rounds it back in fp32, and encoding what was decoded changes nothing
    residual = (master - mantissa.float() * _power_of_two(exponent - 25)) * _power_of_two(41 - exponent)
    return weight, residual.round().clamp(-0x7fff, 0x7fff).to(torch.int16)


def decode_master(weight: Tensor, residual: Tensor) -> Tensor:
    """The fp32 masters behind a 16-bit weight and its residual, as a new tensor: the inverse of `encode_master`."""
    if weight.dtype == torch.bfloat16:
        return ((weight.view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)).view(torch.float32)
    exponent, mantissa = _fp16_parts(weight)
    return ((mantissa << 16) + residual.to(torch.int32)).float() * _power_of_two(exponent - 41)


def _fp16_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e, m) of float16 numbers m 2^(e - 25), int32; e is at least 1 (subnormals). From the bits, because torch.compile
    takes a cast to float16 and back for nothing to be done, and the residual would be lost."""
    bits = weight.view(torch.int16).to(torch.int32)
    field = (bits >> 10) & 31
    mantissa = (bits & 0x3ff) + torch.where(field > 0, 0x400, 0)
    return field.clamp(min=1), torch.where(bits < 0, -mantissa, mantissa)


def _power_of_two(exponent: Tensor) -> Tensor:
    """fp32 2^exponent of int32 exponents in [-126, 127], exactly."""
    return ((exponent + 127) << 23).view(torch.float32)


# ---------------------------------------------------------------- loss scaling

class LossScaler:
    """Dynamic loss scale (Micikevicius et al. 2018, "Mixed Precision Training").

    torch.amp.GradScaler refuses fp16 gradients and rewrites `.grad` to unscale it, which rounds small ones to zero; here
    the optimizer divides by the scale in fp32 as it reads a gradient. Outside fp16 the scale is 1 and stays 1.
    """
    MINIMUM = 1.0

    def __init__(self, initial: float, growth_interval: int, enabled: bool):
        self.scale = initial if enabled else self.MINIMUM
        self.growth_interval, self.enabled = growth_interval, enabled
        self.good_steps = 0       # since the last overflow or growth
        self.stuck_steps = 0      # overflows in a row at the minimum scale, where halving no longer helps

    def update(self, overflow: bool) -> None:
        """Call once a step: halves the scale after an overflow, doubles it after `growth_interval` good steps."""
        if overflow:
            self.stuck_steps = self.stuck_steps + 1 if self.scale <= self.MINIMUM else 0
            self.scale = max(self.scale / 2, self.MINIMUM)
            self.good_steps = 0
            return
        self.stuck_steps = 0
        self.good_steps += 1
        if self.enabled and self.good_steps >= self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict:
        return dict(scale=self.scale, good_steps=self.good_steps, stuck_steps=self.stuck_steps)

    def load_state_dict(self, state: dict) -> None:
        self.scale, self.good_steps, self.stuck_steps = state["scale"], state["good_steps"], state["stuck_steps"]


@torch.no_grad()
def gradient_norms(parameters: list[Tensor]) -> Tensor:
    """L2 norm of each parameter's gradient, summed in fp32 (fp16 sums overflow), [len(parameters)] on their device.

    Any inf or nan in a gradient shows in its norm, so the global norm is the overflow test too. No host synchronisation.
    """
    zero = torch.zeros((), device=parameters[0].device)
    return torch.stack([zero if p.grad is None else torch.linalg.vector_norm(p.grad, dtype=torch.float32)
                        for p in parameters])


# ---------------------------------------------------------------- optimizer state, on the device or streamed

PINNING_THREADS = 8     # one thread pins about 2 GB/s


class OptimizerState:
    """State tensors of a set of parameters, each shaped like its parameter, walked through in pieces of bounded size.

    Every 16-bit parameter has a "residual" (int16) besides the optimizer's own moments. With `offload` the tensors live
    in host memory (pinned when the parameters are on a GPU): a piece is copied to the device while the one before it is
    computed with, and back while the next one is. The order of arithmetic is the same, so results are too.

    `matrices=True` cuts pieces between matrices (the last two dimensions), else between rows of the first dimension.
    Raises ExperimentError when host memory does not hold the state.
    """
    PIECE = OPTIMIZER_PIECE

    def __init__(self, parameters: dict[str, Tensor], moments: tuple[str, ...], moment_dtype, offload: bool, matrices: bool):
        self.parameters, self.offload, self.matrices = parameters, offload, matrices
        self.device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.pinned = offload and self.device.type == "cuda"
        wanted = []
        for name, p in parameters.items():
            kinds = {"residual": torch.int16} if p.dtype != torch.float32 else {}
            wanted += [(name, key, p.shape, dtype) for key, dtype in (kinds | {moment: moment_dtype(p) for moment in moments}).items()]
        self.tensors: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        with ThreadPoolExecutor(PINNING_THREADS if self.pinned else 1) as pool:
            for (name, key, *_), tensor in zip(wanted, pool.map(lambda want: self._zeros(*want[2:]), wanted)):
                self.tensors[name][key] = tensor

    def _zeros(self, shape, dtype) -> Tensor:
        if not self.offload:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        try:
            return _pinned_zeros(shape, dtype) if self.pinned else torch.zeros(shape, dtype=dtype)
        except (RuntimeError, MemoryError, OSError) as error:
            raise ExperimentError(
                f"no host memory for the streamed optimizer state ({error}).\n  Free host memory, use a smaller preset, or "
                "set --offload_optimizer false if the state fits the GPU ('plan' shows both).") from error

    def groups(self) -> Iterator[list[tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """Yields lists of (weight, gradient, state), views to be updated in place, together at most PIECE elements unless a
        single matrix is larger; a parameter without a gradient is passed over. With matrices=True each tensor is
        [n, rows, columns], and rows and columns are the same throughout a list; else [rows, ...]."""
        groups = self._groups()
        if not self.offload:
            for group in groups:
                yield [self._views(name, cut, {k: self._view(t)[cut] for k, t in self.tensors[name].items()}) for name, cut in group]
            return

        on_gpu = self.device.type == "cuda"
        compute = torch.cuda.current_stream() if on_gpu else None
        inward, outward = self._streams() if on_gpu else (None, None)
        stream = torch.cuda.stream if on_gpu else lambda _: contextlib.nullcontext()

        def fetch(group):
            """The group's state on its way to the device, and the event that says it is there."""
            # taken from the computation's own memory: what forward and backward have left is free now
            states = [{k: torch.empty_like(self._view(t)[cut], device=self.device) for k, t in self.tensors[name].items()}
                      for name, cut in group]
            if on_gpu:
                inward.wait_stream(compute)     # and may still be in use there
            with stream(inward):
                for (name, cut), state in zip(group, states):
                    for key, tensor in state.items():
                        tensor.copy_(self._view(self.tensors[name][key])[cut], non_blocking=True)
            return states, inward.record_event() if on_gpu else None

        if on_gpu:
            inward.wait_stream(outward)     # the last walk's results have arrived in host memory
        ahead, written = [fetch(group) for group in groups[:2]], []
        for i, group in enumerate(groups):
            states, arrived = ahead.pop(0)
            tensors = [(self._view(self.tensors[name][key])[cut], tensor)
                       for (name, cut), state in zip(group, states) for key, tensor in state.items()]
            if on_gpu:
                compute.wait_event(arrived)     # this group's; the next one's copy goes on meanwhile
            yield [self._views(name, cut, state) for (name, cut), state in zip(group, states)]
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
        shape = {name: self._view(p).shape for name, p in self.parameters.items() if p.grad is not None}
        if self.matrices:       # equal shapes side by side, in the order in which they first come
            first = {rows_columns: i for i, rows_columns in reversed(list(enumerate(s[1:] for s in shape.values())))}
            shape = dict(sorted(shape.items(), key=lambda item: first[item[1][1:]]))
        groups, room, last = [], 0, None
        for name, (n, *rest) in shape.items():
            size, start = math.prod(rest), 0
            while start < n:
                if room < size or (self.matrices and rest != last):
                    groups.append([])
                    room, last = max(self.PIECE, size), rest
                stop = min(n, start + room // size)
                groups[-1].append((name, slice(start, stop)))
                room -= (stop - start) * size
                start = stop
        return groups

    def _views(self, name, cut, state):
        p = self.parameters[name]
        return self._view(p.data)[cut], self._view(p.grad)[cut], state

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
            raise ValueError(f"optimizer state of other parameters: {sorted(state.keys() ^ self.tensors.keys())[:4]}")
        for name, own in self.tensors.items():
            if unknown := state[name].keys() - own.keys():
                raise ValueError(f"optimizer state {name}: unknown {sorted(unknown)}")
            for key, tensor in own.items():
                saved = state[name].get(key)
                if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                    raise ValueError(f"optimizer state {name}/{key}: expected {tensor.dtype} {tuple(tensor.shape)}, found "
                                     + ("nothing" if saved is None else f"{saved.dtype} {tuple(saved.shape)}"))
                tensor.copy_(saved)


def _pinned_zeros(shape, dtype: torch.dtype) -> Tensor:
    """Zeros in host memory that a GPU copies from and to by itself.

    Registered in place, because PyTorch's own pinned allocator rounds every request up to a power of two; in huge pages
    where the system has them, because pinning takes its time by the page.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < 2 ** 20:
        return torch.zeros(shape, dtype=dtype).pin_memory()         # small ones share pages, and a page is registered once
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(pages, dtype=dtype).view(shape)
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(int(cudart.cudaHostRegister(tensor.data_ptr(), size, 0)))
    weakref.finalize(tensor, cudart.cudaHostUnregister, tensor.data_ptr())
    return tensor


def read_master(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """fp32 master of a piece: a new tensor for a 16-bit weight, the weight itself for an fp32 one."""
    return decode_master(weight, state["residual"]) if "residual" in state else weight


def write_master(master: Tensor, weight: Tensor, state: dict[str, Tensor]) -> None:
    """Stores an updated fp32 master in the piece that it was read from."""
    if "residual" in state:
        master, residual = encode_master(master, weight.dtype)
        state["residual"].copy_(residual)
    weight.copy_(master)
