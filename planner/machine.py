"""TODO machine"""

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from config import Config, ConfigError, nearest

GB = 1e9


@dataclass(frozen=True)
class GPU:
    """A known GPU: usable memory in GB, dense 16-bit peak in TFLOP/s, a usual host's memory in GB, and the words in the
    driver's name for it. The peaks are the vendors' datasheets'."""

    memory_gb: float
    peak_tflops: float
    host_memory_gb: float
    words: tuple[str, ...]


GPUS = {
    "b200": GPU(191.5, 2250, 256, ("B200",)),
    "h200": GPU(150.1, 989, 128, ("H200",)),
    "h100": GPU(
        84.9, 989, 128, ("H100", "HBM3")
    ),  # the SXM card; PCIe and NVL cards have other peaks
    "a100-80": GPU(85.1, 312, 128, ("A100", "80GB")),
    "a100-40": GPU(42.3, 312, 128, ("A100", "40GB")),
    "rtx4090": GPU(25.3, 165, 64, ("RTX", "4090")),
}
OTHER_VARIANTS = {
    "NVL",
    "Laptop",
    "D",
    "MIG",
}  # have other peaks or less memory than the cards of that name

CONTEXT_GB = 0.7  # CUDA context and library workspaces, outside PyTorch's allocator (assumed)
CPU_PROCESS_GB = 0.5  # the program and its libraries, of a CPU run (measured)
USABLE = 0.97  # share of the rest that is planned for: fragmentation and what the estimate misses (assumed)


@dataclass(frozen=True)
class Machine:
    """Where a run goes: a GPU (or None for a CPU run) with its memory, and its host's memory, in GB."""

    name: str | None
    memory_gb: float
    host_memory_gb: float
    key: str | None = None  # its name in GPUS, when it is a known one

    @property
    def usable_gb(self) -> float:
        return (
            (self.memory_gb - CONTEXT_GB) * USABLE
            if self.name
            else max(0, self.host_memory_gb - CPU_PROCESS_GB) * 0.9
        )


# ---------------------------------------------------------------- machines


def known_gpu(driver_name: str) -> str | None:
    """The name in GPUS of a GPU by its driver's name for it; None for one whose figures are not known."""
    words = set(driver_name.replace("-", " ").split())
    if words & OTHER_VARIANTS:
        return None
    return next((key for key, gpu in GPUS.items() if words.issuperset(gpu.words)), None)


M_MMAP_THRESHOLD = -3  # in glibc's malloc.h


def available_host_memory_gb() -> float:
    """Memory that the operating system and the container's limit leave to this process, in GB."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = (
            int((group / "memory.current").read_text())
            - int(used["inactive_file"])
            - int(used["active_file"])
        )
        free = min(
            free, int((group / "memory.max").read_text()) - taken
        )  # files in memory make room when asked
    except (OSError, ValueError, KeyError):
        pass  # no limit
    return free / GB


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )  # macOS has no affinity


def process_memory_gb() -> tuple[float, float]:
    """(now, peak) memory of this process that is in RAM, in GB."""
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / GB
    )
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        ) / GB, peak
    except OSError:
        return peak, peak


def release_freed_memory() -> None:
    """Tells glibc to give tensors of 4 MB and more back to the system when they are freed. It would keep up to 32 MB ones in a heap
    that falls into pieces: up to a third more memory in a CPU run; but a step takes a twentieth longer (both measured)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's or the host's memory ran out: PyTorch has several ways to say so."""
    words = "out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED"
    return (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and any(word in str(error) for word in words)
    )


def find_machine(host_gb: float = 0, gpu: str | None = None, cpu: bool = False) -> Machine:
    """The GPU named `gpu` with a usual host, or else the first GPU that the driver reports, or (with `cpu`, or without a
    GPU) this machine's CPU. `host_gb` states the host's memory; 0 looks. Raises ConfigError for an unknown name."""
    if gpu is not None:
        gpu = gpu.lower()
        if gpu not in GPUS:
            raise ConfigError(f"unknown GPU {gpu!r}.{nearest(gpu, GPUS)} Known: {', '.join(GPUS)}")
        return Machine(gpu, GPUS[gpu].memory_gb, host_gb or GPUS[gpu].host_memory_gb, gpu)
    host_gb = host_gb or available_host_memory_gb()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if shutil.which("nvidia-smi") and visible and not cpu:
        answer = subprocess.run(
            [
                "nvidia-smi",
                f"--id={visible}",
                "--query-gpu=name,memory.total",
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
        )
        name, _, mib = answer.stdout.partition("\n")[0].rpartition(",")
        if (
            answer.returncode == 0 and mib.strip().isdigit()
        ):  # no number: memory shared with the host
            # the driver's total holds 0.5% that PyTorch does not see
            return Machine(name.strip(), float(mib) * 2**20 / GB * 0.995, host_gb, known_gpu(name))
    return Machine(None, 0, host_gb)


def find_device(c: Config):
    """The torch.device that `c` trains on. Raises ConfigError."""
    import torch  # here and below only: `plan` answers without it

    if c.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda: PyTorch finds no GPU; check the driver and that torch is a CUDA build, or use --device cpu"
        )
    return torch.device("cuda" if c.device != "cpu" and torch.cuda.is_available() else "cpu")


def machine_of_device(device, host_gb: float = 0) -> Machine:
    """The machine of a torch.device, with what PyTorch sees of its memory; `host_gb` as in find_machine."""
    import torch

    host_gb = host_gb or available_host_memory_gb()
    if device.type == "cpu":
        return Machine(None, 0, host_gb)
    name = torch.cuda.get_device_name()
    return Machine(
        name, torch.cuda.get_device_properties(0).total_memory / GB, host_gb, known_gpu(name)
    )
