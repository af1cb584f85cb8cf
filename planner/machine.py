"""The machine of a run: its GPU, its host's memory, its CPU cores.

A new GPU is a line of GPUS. Torch is imported only by the functions that need a device of it.
"""

import contextlib
import ctypes
import dataclasses
import math
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config, ConfigError, ExperimentError, nearest

if TYPE_CHECKING:
    import torch

GB = 1e9


@dataclass(frozen=True)
class GPU:
    """A known GPU; the peaks are those of the vendors' datasheets."""

    memory_gb: float  # what PyTorch sees of it, in GB of 1e9 bytes: less than its label says
    peak_tflops: float  # of dense matmuls in 16 bits with fp32 sums, without sparsity
    peak_fp32_tflops: float  # of matmuls in fp32, without tensor cores
    host_memory_gb: float  # of a usual host, for each GPU
    link_gb_s: float  # to other GPUs of its machine, one way: NVLink, Infinity Fabric or PCIe
    words: tuple[str, ...]  # all of them are in the driver's name for it
    tested: bool = False  # whether this program has run on one


GPUS = {
    "b300": GPU(287.0, 2250, 75, 256, 900, ("B300",)),
    "mi300x": GPU(206.1, 1307, 163, 256, 448, ("MI300X",)),
    "b200": GPU(191.5, 2250, 75, 256, 900, ("B200",)),
    "h200": GPU(150.1, 989, 67, 128, 450, ("H200",), tested=True),
    "gh200": GPU(101.5, 989, 67, 256, 450, ("GH200", "480GB")),
    # the SXM card; PCIe and NVL cards have other peaks
    "h100": GPU(84.9, 989, 67, 128, 450, ("H100", "HBM3"), tested=True),
    "a100-80": GPU(85.1, 312, 19.5, 128, 300, ("A100", "80GB")),
    "a6000": GPU(51.0, 155, 38.7, 128, 32, ("RTX", "A6000")),
    "l40s": GPU(47.7, 362, 91.6, 128, 32, ("L40S",)),
    "a100-40": GPU(42.3, 312, 19.5, 128, 300, ("A100", "40GB")),
    "rtx5090": GPU(33.7, 209, 105, 64, 64, ("RTX", "5090")),
    "rtx4090": GPU(25.3, 165, 82.6, 64, 32, ("RTX", "4090")),
    "l4": GPU(23.7, 121, 30.3, 64, 32, ("L4",)),
}

# Host memory of a usual host, for a GPU that is not known: cards of up to 40 GB are in desktops.
DESKTOP_HOST_GB = 64
SERVER_HOST_GB = 128

# A card whose name has one of these words has another peak, or less memory, than the card of the
# same name without it.
OTHER_VARIANTS = {"NVL", "Laptop", "D", "MIG"}

# CUDA context and library workspaces, outside PyTorch's allocator (assumed).
CONTEXT_GB = 0.7
# What NCCL takes besides on each of several GPUs: its channels' buffers and their kernels' stacks,
# also outside PyTorch's allocator (assumed).
NCCL_GB = 1.0
# Share of the rest that is planned for. What remains is for fragmentation and for what the
# prediction misses (assumed).
USABLE = 0.97
# The program and its libraries in a CPU run (measured).
CPU_PROCESS_GB = 0.5
# Share of the host's memory that is planned for; the system needs the rest.
HOST_SHARE = 0.9


@dataclass(frozen=True)
class Machine:
    """Where a run trains: GPUs with their host, or a CPU (`name` is None). Memory in GB.

    All GPUs are alike, and so are all machines. On a CPU `gpus` counts processes.
    """

    name: str | None
    memory_gb: float  # of a GPU
    host_memory_gb: float  # of a machine; its GPUs share it
    key: str | None = None  # the GPU's name in GPUS, if it is a known one
    gpus: int = 1  # that train together on a machine
    machines: int = 1

    @property
    def is_cpu(self) -> bool:
        return self.name is None

    @property
    def ranks(self) -> int:
        """All GPUs that train together, on all machines."""
        return self.gpus * self.machines

    @property
    def host_gb_of_a_gpu(self) -> float:
        """A GPU's part of its host's memory, and a CPU process's."""
        return self.host_memory_gb / self.gpus

    @property
    def usable_gb(self) -> float:
        """Memory to plan with: of a GPU or, for a CPU run, of a process."""
        if self.name:
            outside = CONTEXT_GB
            if self.ranks > 1:
                outside += NCCL_GB
            return (self.memory_gb - outside) * USABLE
        return max(0, self.host_gb_of_a_gpu - CPU_PROCESS_GB) * HOST_SHARE

    @property
    def usable_host_gb(self) -> float:
        """Host memory to plan with for what is offloaded from one GPU."""
        return HOST_SHARE * self.host_gb_of_a_gpu


# One GPU with any memory: what a choice takes depends on the number of GPUs alone.
ONE_GPU = Machine("a GPU", math.inf, math.inf)


# ---------------------------------------------------------------- which machine


def known_gpu(driver_name: str) -> str | None:
    """The name in GPUS of a GPU, by its driver's name for it; None for an unknown one."""
    words = set(driver_name.replace("-", " ").split())
    if words & OTHER_VARIANTS:
        return None
    for key, gpu in GPUS.items():
        if words.issuperset(gpu.words):
            return key
    return None


def find_machine(
    host_gb: float = 0,
    gpu: str | None = None,
    cpu: bool = False,
    gpu_memory_gb: float | None = None,
    gpus: int = 1,
    machines: int = 1,
) -> Machine:
    """The machine to plan for, without torch.

    - With `gpu`, a name in GPUS: that GPU with a usual host, which has as much memory for each GPU.
    - With `gpu_memory_gb`: a GPU with that memory, called `gpu` if that is given, and a usual host.
    - With `cpu`: this machine's CPU.
    - With none: the first visible GPU that the driver reports, or the CPU if there is none.

    `host_gb` is the host's memory; 0 looks it up. `gpus` of it train together, on each of
    `machines`; nothing checks that they are there. Raises ConfigError for an unknown name.
    """
    if gpu_memory_gb is not None:
        machine = _gpu_with_memory(gpu, gpu_memory_gb, host_gb, gpus)
    elif gpu is not None:
        machine = _gpu_by_name(gpu.lower(), host_gb, gpus)
    else:
        machine = _this_machine(host_gb, cpu)
    return dataclasses.replace(machine, gpus=gpus, machines=machines)


def _this_machine(host_gb: float, cpu: bool) -> Machine:
    host_gb = host_gb or available_host_memory_gb()
    machine = None
    if not cpu:
        machine = _gpu_of_driver(host_gb)
    return machine or Machine(None, 0, host_gb)


def _gpu_by_name(name: str, host_gb: float, gpus: int) -> Machine:
    if name not in GPUS:
        raise ConfigError(
            f"unknown GPU {name!r}.{nearest(name, GPUS)} Known: {', '.join(GPUS)}. "
            "Plan for another one with --gpu_memory_gb N"
        )
    gpu = GPUS[name]
    return Machine(name, gpu.memory_gb, host_gb or gpus * gpu.host_memory_gb, name)


def _gpu_with_memory(name: str | None, memory_gb: float, host_gb: float, gpus: int) -> Machine:
    """A GPU that need not be known; a known one keeps its peak and its usual host."""
    key = None
    usual_host_gb: float = SERVER_HOST_GB
    if memory_gb <= 40:
        usual_host_gb = DESKTOP_HOST_GB
    if name is not None and name.lower() in GPUS:
        key = name.lower()
        usual_host_gb = GPUS[key].host_memory_gb
    return Machine(key or name or "a GPU", memory_gb, host_gb or gpus * usual_host_gb, key)


def _gpu_of_driver(host_gb: float) -> Machine | None:
    """The first visible GPU, as nvidia-smi reports it; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not visible or not shutil.which("nvidia-smi"):
        return None
    query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(
        ["nvidia-smi", f"--id={visible}", *query], capture_output=True, text=True
    )
    first_line = answer.stdout.partition("\n")[0]
    name, _, mib = first_line.rpartition(",")
    # A GPU that shares the host's memory reports no number.
    if answer.returncode != 0 or not mib.strip().isdigit():
        return None
    # The driver counts in MiB, and PyTorch sees 0.5% less than the driver's total.
    memory_gb = float(mib) * 2**20 / GB * 0.995
    return Machine(name.strip(), memory_gb, host_gb, known_gpu(name))


def find_device(config: Config) -> "torch.device":
    """The device that `config` trains on. Raises ExperimentError where it is missing."""
    import torch

    gpu_found = torch.cuda.is_available()
    if config.device == "cuda" and not gpu_found:
        # No ConfigError: after a reboot the driver may be late.
        raise ExperimentError(
            "device=cuda: PyTorch finds no GPU; check the driver and that torch is a CUDA build, "
            "or use --device cpu"
        )
    if config.device != "cpu" and gpu_found:
        return torch.device("cuda")
    return torch.device("cpu")


def machine_of_device(
    device: "torch.device", host_gb: float = 0, gpus: int = 1, machines: int = 1
) -> Machine:
    """The machine of a device, with the memory that PyTorch sees.

    `host_gb`, `gpus` and `machines` are as in find_machine.
    """
    import torch

    host_gb = host_gb or available_host_memory_gb()
    if device.type == "cpu":
        return Machine(None, 0, host_gb, gpus=gpus, machines=machines)
    name = torch.cuda.get_device_name()
    memory_gb = torch.cuda.get_device_properties(0).total_memory / GB
    return Machine(name, memory_gb, host_gb, known_gpu(name), gpus, machines)


# ---------------------------------------------------------------- host


def available_host_memory_gb() -> float:
    """Memory that the operating system and the container's limit leave to this process, in GB."""
    available = _available_in_system()
    left_in_container = _left_in_container()
    if left_in_container is not None:
        available = min(available, left_in_container)
    return available / GB


def _available_in_system() -> int:
    """Bytes of memory that the operating system could give to this process.

    Linux says it in /proc/meminfo: its estimate counts memory that cached files give back. Other
    systems are not queried for it: there it is all memory that the machine has.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        # MemAvailable:   123456 kB (a kB here has 1024 bytes)
        if line.startswith("MemAvailable"):
            _, kib, _ = line.split()
            return int(kib) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_container() -> int | None:
    """Bytes that the limit of the container (control group) leaves; None without a limit.

    The group counts cached files as used memory. They make room when memory is needed, so they are
    subtracted.
    """
    group = Path("/sys/fs/cgroup")
    try:
        # A group without a limit has the word "max" here, for which int raises ValueError.
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached_files = int(parts["inactive_file"]) + int(parts["active_file"])
    except (OSError, ValueError, KeyError):
        return None
    return limit - (used - cached_files)


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


# ---------------------------------------------------------------- this process


def process_memory_gb() -> tuple[float, float]:
    """Memory of this process that is in RAM, now and at its peak, in GB."""
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB
    if sys.platform != "darwin":
        peak_gb *= 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    try:
        # The second number is the resident set, in pages.
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak is all that is known
        return peak_gb, peak_gb
    resident_gb = pages * os.sysconf("SC_PAGE_SIZE") / GB
    return resident_gb, peak_gb


M_MMAP_THRESHOLD = -3  # in glibc's malloc.h


def release_freed_memory() -> None:
    """Lets glibc give memory of 4 MB and more back to the system as soon as it is freed.

    By default it keeps up to 32 MB in a heap that becomes fragmented: a CPU run takes up to a third
    more memory. With this a step takes a twentieth longer (both measured).
    """
    # Other C libraries have no mallopt.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


# How the errors of PyTorch and of the libraries under it say that memory ran out.
OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the GPU's or the host's memory ran out."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(words in str(error) for words in OUT_OF_MEMORY_WORDS)
