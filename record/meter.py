"""Measures the memory of a run, by the same components as the planner's prediction."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from config import OptimizerGroup
from planner.layout import format_size
from planner.machine import GB, process_memory_gb
from planner.plan import memory_table

# The optimizer step of this process after which memory is measured. From the second step on
# everything is allocated that stays: gradients, compiled kernels, buffers of copies.
MEASURED_STEP = 3


class MemoryMeter:
    """Measures the peak memory of the two phases of a step, and what stays in memory between them.

        with meter.phase("backward"): ...     the forward and backward passes of a step
        with meter.phase("optimizer"): ...    the update of the weights

    `measured_gb` is None until the third optimizer phase of this process has ended. Then it has GB
    (1e9 bytes) by component, which `table` shows beside the prediction.

    `gradients` returns the gradients on this device.

    `optimizers` and `groups` (config.optimizer_groups) have the same keys. `host_gradients` are the
    gradients that are accumulated in host memory, by name of the parameter.
    """

    def __init__(
        self,
        device: torch.device,
        predicted: dict[str, float],
        capacity_gb: float,
        parameters: dict[str, Tensor],
        optimizers: dict,
        groups: dict[str, OptimizerGroup],
        host_gradients: dict[str, Tensor],
        gradients: Callable[[], list[Tensor]],
    ):
        self.gpu = device.type == "cuda"
        self.predicted = predicted
        self.capacity_gb = capacity_gb
        self.parameters = parameters
        self.optimizers = optimizers
        self.groups = groups
        self.host_gradients = host_gradients
        self.gradients = gradients

        self.steps = 0  # optimizer phases of this process
        self.peak_gb = 0.0  # over this process
        self.phase_gb: dict[str, float] = {}  # the last peak of each phase
        self.measured_gb: dict[str, float] | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes the peak memory of the block. After an error in the block nothing is noted."""
        yield
        if self.gpu:
            # Reading the allocator's counters does not wait for the GPU.
            peak = torch.cuda.max_memory_allocated() / GB
            # The allocator's peak counts from the last reset. Resets after the phases of the second
            # step and after the third step's backward phase give each phase of the third step its
            # own peak. The first step is not followed by a reset: it compiles, and its peak belongs
            # to the second step's first phase.
            if 0 < self.steps < MEASURED_STEP:
                torch.cuda.reset_peak_memory_stats()
        else:
            _, peak = process_memory_gb()
        self.phase_gb[name] = peak
        self.peak_gb = max(self.peak_gb, peak)
        if name == "optimizer":
            self.steps += 1
            if self.steps == MEASURED_STEP:
                self.measured_gb = self._measure()

    def _measure(self) -> dict[str, float]:
        """GB by component, measured at the end of an optimizer phase.

        The gradients must not have been freed yet. On a CPU there is no allocator to query, so
        activations, workspace and total are left out.
        """
        weights = sum(parameter.nbytes for parameter in self.parameters.values())
        gradients = _bytes_of_storages(self.gradients())
        host_gradients = sum(tensor.nbytes for tensor in self.host_gradients.values())
        state = self._state_bytes()
        offloaded = any(optimizer.state.offload for optimizer in self.optimizers.values())

        sizes = dict(weights=weights / GB, gradients=gradients / GB)
        for key, size in state.items():
            if offloaded:
                sizes[key] = 0.0
            else:
                sizes[key] = size / GB
        if self.gpu:
            stays = sum(sizes.values())
            sizes["activations"] = self.phase_gb["backward"] - stays
            # Activations and the optimizer's workspace never exist at the same time. So the
            # workspace counts only as far as it raises the peak.
            added = self.phase_gb["optimizer"] - self.phase_gb["backward"]
            sizes["workspace"] = max(0.0, added)
            sizes["total"] = sum(sizes.values())
        sizes["host"] = 0.0
        if offloaded:
            sizes["host"] = (sum(state.values()) + host_gradients) / GB
        return sizes

    def _state_bytes(self) -> dict[str, int]:
        """Bytes of the optimizers' state, by key of the memory table."""
        sizes = dict(master=0)
        for name, group in self.groups.items():
            sizes.setdefault(group.memory_key, 0)
            for tensors in self.optimizers[name].state.tensors.values():
                for key, tensor in tensors.items():
                    # The low bits of the fp32 masters belong to the masters, not to the moments.
                    component = group.memory_key
                    if key == "residual":
                        component = "master"
                    sizes[component] += tensor.nbytes
        return sizes

    def table(self) -> str:
        """Predicted and measured memory side by side."""
        table = memory_table(self.predicted, self.groups, self.measured_gb, self.capacity_gb)
        if self.gpu:
            return table
        return f"{table}\nThe whole process: {format_size(self.peak_gb, 3)} of RAM at its peak"

    def now(self) -> dict[str, float | None]:
        """The memory columns of a row of metrics, in GB.

        On a GPU they are those of PyTorch's allocator, else the process's resident memory.
        """
        if self.gpu:
            return dict(
                memory_allocated_gb=torch.cuda.memory_allocated() / GB,
                memory_reserved_gb=torch.cuda.memory_reserved() / GB,
                memory_peak_gb=self.peak_gb,
            )
        resident, self.peak_gb = process_memory_gb()
        return dict(
            memory_allocated_gb=resident,
            memory_reserved_gb=None,
            memory_peak_gb=self.peak_gb,
        )


def _bytes_of_storages(tensors: list[Tensor]) -> int:
    """The memory that these tensors keep: of a view that is its whole storage, counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
