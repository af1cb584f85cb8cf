"""Predicts every byte of a run, and picks activation checkpointing, micro-batch and the place of optimizer state.

All sizes are in GB of 1e9 bytes. The counts of what a block keeps are those of the compiled block (a test compares them
with what torch.compile saves), and on a CPU of the plain one; what the backward pass holds for a moment is an upper estimate.
No torch at import, so that `plan` answers at once and needs no GPU.
"""
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from config import LIGHTER, LOSS_CHUNK, OPTIMIZER_PIECE, PRESETS, Config, ConfigError, OutOfMemory, block_modes, nearest

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
    "h100": GPU(84.9, 989, 128, ("H100", "HBM3")),      # the SXM card; PCIe and NVL cards have other peaks
    "a100-80": GPU(85.1, 312, 128, ("A100", "80GB")),
    "a100-40": GPU(42.3, 312, 128, ("A100", "40GB")),
    "rtx4090": GPU(25.3, 165, 64, ("RTX", "4090")),
}
OTHER_VARIANTS = {"NVL", "Laptop", "D", "MIG"}       # have other peaks or less memory than the cards of that name

# Bytes of an element that the optimizer updates on a CPU, of temporary fp32 and integer tensors (measured; fp16's residual is arithmetic).
CPU_UPDATE_BYTES = {"fp32": 20, "bf16": 26, "fp16": 51}

# What the libraries for products keep on a CPU, and what its heap does, by bytes of the compute dtype: in 16 bits a kernel is made for
# each number of rows that an expert gets (measured; fp32 0.3, bf16 and fp16 0.5 to 0.7).
CPU_LIBRARY_GB = {4: 0.35, 2: 0.8}

CONTEXT_GB = 0.7        # CUDA context and library workspaces, outside PyTorch's allocator (assumed)
CPU_PROCESS_GB = 0.5    # the program and its libraries, of a CPU run (measured)
USABLE = 0.97           # share of the rest that is planned for: fragmentation and what the estimate misses (assumed)

# Time of a step relative to keeping everything, for the planner's order of preference. Four layers of 18b and the head on an
# H200, forward and backward (benchmarks/results/vs_transformers_h200.json): selective 1.05, full 1.22, of which the head, which
# recomputes nothing, is a ninth. Micro-batch 2 against 4 loses 2%.
RECOMPUTATION_TIME = {"none": 1.0, "selective": 1.05, "full": 1.26}
HALVED_BATCH_TIME = 1.02
OFFLOAD_TIME = 1.02


@dataclass(frozen=True)
class Machine:
    """Where a run goes: a GPU (or None for a CPU run) with its memory, and its host's memory, in GB."""
    name: str | None
    memory_gb: float
    host_memory_gb: float
    key: str | None = None      # its name in GPUS, when it is a known one

    @property
    def usable_gb(self) -> float:
        return (self.memory_gb - CONTEXT_GB) * USABLE if self.name else max(0, self.host_memory_gb - CPU_PROCESS_GB) * 0.9


# ---------------------------------------------------------------- bytes

def activation_bytes_per_token(c: Config, layer: int, checkpointing: str, cpu: bool = False) -> int:
    """Bytes that block `layer` keeps for its backward pass, per token: its input, and with "selective" the outputs of attention
    and of most products, with "none" of all of them and the normalised inputs, rotated queries and keys, and the gated product.
    On a CPU nothing is fused: every norm keeps two fp32 tensors, SwiGLU its factors, and "selective" the outputs that are read no more."""
    w, moe = _compute_bytes(c), c.is_moe(layer)
    d, kv, paths = c.d_model, c.n_kv_heads * c.head_dim, c.top_k if moe else 1
    routing = 8 * c.top_k if moe else 0                                                       # the chosen experts
    if cpu and moe:
        routing += 4 * c.top_k      # and their probabilities
    if checkpointing == "full":
        return w * d + routing
    log_sum_exp = 4 * c.n_heads
    if checkpointing == "selective":
        unread = w * d * paths if cpu else 0
        return w * (3 * d + kv + 2 * c.d_ff * paths) + unread + log_sum_exp + routing + (4 * c.num_experts if moe else 0)
    statistics = 4 * (c.n_heads + c.n_kv_heads) + 8
    if cpu:
        norms, attention = 8 * (3 * d + kv), w * (3 * d + 2 * kv)
        ffn = 4 * d + w * paths * (d + 5 * c.d_ff) if moe else w * (d + 4 * c.d_ff)
        routing = 24 * c.top_k + (c.top_k + 8) * c.num_experts + 8 if moe else 0
        return norms + attention + ffn + log_sum_exp + statistics + routing
    routing += (4 * c.num_experts + 20 * c.top_k + 12) if moe else 0
    return w * (7 * d + 3 * kv + 3 * c.d_ff * paths + (d * (c.top_k - 1) if moe else 0)) + log_sum_exp + statistics + routing


def memory(c: Config, checkpointing: str, batch_size: int, offload: bool, lighter_blocks: int = 0, cpu: bool = False) -> dict[str, float]:
    """Predicted memory in GB of `c` with these values instead of its own: weights, gradients, master, momentum, adamw (0 when they live on the host), activations,
    workspace, their total, and host.

    activations: the peak of forward and backward beyond what stays. workspace: what the optimizer step needs beyond
    that, as the two do not meet. On a `cpu` nothing is compiled, so both are larger.
    """
    p = c.parameter_groups
    wide = p["norms"] + p["router"]                                       # always fp32
    hidden = p["attention"] + p["dense_ffn"] + p["experts"] if c.optimizer == "muon" else 0       # Muon's
    narrow = c.total_params - wide
    weight_bytes = 2 if c.split_masters else 4
    weights = narrow * weight_bytes + wide * 4
    state = dict(master=narrow * 2 if c.split_masters else 0,
                 momentum=hidden * (2 if c.split_masters else 4),
                 adamw=(c.total_params - hidden) * 8)

    modes = block_modes(checkpointing, c.n_layers, lighter_blocks)
    tokens, w, head = batch_size * c.max_seq_len, _compute_bytes(c), c.vocab_size * c.d_model
    loss = 2 * tokens * c.d_model * w + head * (4 + w) + 3 * 4 * min(tokens, LOSS_CHUNK) * c.vocab_size
    if cpu:     # the last norm's tensors, the head's gradient, and logits as they come, in fp32 and a copy, or what follows and a product
        logits = min(tokens, LOSS_CHUNK) * c.vocab_size
        loss = tokens * c.d_model * (8 + 2 * w) + 4 * head + (4 if w == 4 else 6) * logits + 4 * max(logits, head)
    matrices = [weight_bytes * c.matrices_of(i) for i in range(c.host_gradient_blocks if offload else 0)]
    kept, peak = 0, 0       # of the blocks so far; of the backward passes, each with what the blocks before it keep
    for i, mode in enumerate(modes):
        # fp32 weights are cast for 16-bit products, which keep the cast ones
        casts = w * c.matrices_of(i) if cpu and w < weight_bytes else 0
        kept += tokens * activation_bytes_per_token(c, i, mode, cpu) + (casts if mode == "none" else 0)
        # sums of gradients on their way from the host and back: of this block and the next, and of the two before
        streamed = sum(matrices[max(i - 1, 0):i + 3]) if i < len(matrices) else 0
        peak = max(peak, kept + _backward_bytes(c, i, mode, tokens, weight_bytes, cpu) + streamed + (casts if mode != "none" else 0))
    activations = max(peak, kept + loss)

    # a group of matrices, as they come and orthogonalised, and four Gram matrices each; in fp32, not fused, more copies
    # of each; streamed state of this group, of two on their way in and of one on its way out, or of three with their gradients
    matrix, gram = c.d_model * max(c.d_ff, c.d_model), min(c.d_model, c.d_ff) ** 2
    piece = min(max(OPTIMIZER_PIECE // matrix, 1) * matrix, hidden)
    streamed = max(4 * 4, 3 * (4 + weight_bytes) if matrices else 0) if offload else 0
    optimizer = piece * (4 + 8 * gram / matrix if c.split_masters else 24)
    others = c.total_params - hidden                                      # AdamW's groups: the same of its larger state
    adamw = 0 if c.split_masters else 16 * min(OPTIMIZER_PIECE, others)
    if cpu:     # in fp32; updates are made a parameter at a time, with every step of the arithmetic a tensor
        update = CPU_UPDATE_BYTES[c.precision if c.split_masters else "fp32"]
        banks = [c.num_experts if c.is_moe(i) else 1 for i in range(c.n_layers)]
        gate_up = 2 * c.d_ff * c.d_model
        group = min(piece, max(gate_up * sum(banks), p["attention"]) if c.d_ff != c.d_model else hidden)
        optimizer = max(group * (12 + 10 * gram / matrix), 8 * group + update * min(group, gate_up * max(banks)))
        adamw = update * min(OPTIMIZER_PIECE, head if hidden else max(head, gate_up * max(banks)))
    optimizer = max(optimizer + piece * streamed, adamw + (10 * min(4 * OPTIMIZER_PIECE, others) if offload else 0))

    sizes = dict(weights=weights, gradients=weights - sum(matrices), **{k: 0 if offload else v for k, v in state.items()},
                 activations=activations + (CPU_LIBRARY_GB[w] * GB if cpu else 0), workspace=max(0, optimizer - activations))
    sizes["total"] = sum(sizes.values())
    sizes["host"] = sum(state.values()) + sum(matrices) if offload else 0
    return {k: v / GB for k, v in sizes.items()}


def _backward_bytes(c: Config, layer: int, checkpointing: str, tokens: int, weight_bytes: int, cpu: bool) -> int:
    """What the backward pass of block `layer` needs, in its feed-forward part, beyond what was kept: what it recomputes, gradients
    of the residual stream, and either those of the products (the gated product is gone by then, where a kernel does SwiGLU's
    backward) and of one weight, or, when the products' are used up, of all three weights and the rows' own."""
    w, (paths, experts) = _compute_bytes(c), (c.top_k, c.num_experts) if c.is_moe(layer) else (1, 1)
    recomputed = activation_bytes_per_token(c, layer, "none", cpu) - activation_bytes_per_token(c, layer, checkpointing, cpu)
    gated, weight, row = w * c.d_ff * paths * tokens, experts * c.d_ff * c.d_model * weight_bytes, w * c.d_model * tokens
    if cpu:     # the gated product's gradient, and by 16-bit ones two in fp32; then weights', when it is used up
        return tokens * recomputed + 3 * row + max((2 if w == 4 else 5) * gated, 2 * weight)
    return tokens * recomputed + 3 * row + max((2 if w == 2 else 3) * gated + weight, 3 * weight - 3 * gated + 3 * row)


def checkpoint_gb(c: Config) -> float:
    """Size of a checkpoint file: weights and optimizer state."""
    m = memory(c, "full", 1, offload=False)
    return sum(m[k] for k in ("weights", "master", "momentum", "adamw"))


def _compute_bytes(c: Config) -> int:
    return 4 if c.precision == "fp32" else 2


# ---------------------------------------------------------------- choice

@dataclass(frozen=True)
class Choice:
    batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: str
    offload_optimizer: bool
    memory_gb: dict
    lighter_blocks: int = 0

    def fits(self, machine: Machine) -> bool:
        if machine.name is None:        # on a CPU all of it is host memory
            return self.memory_gb["total"] + self.memory_gb["host"] <= machine.usable_gb
        return self.memory_gb["total"] <= machine.usable_gb and self.memory_gb["host"] <= 0.9 * machine.host_memory_gb

    def shortage(self, machine: Machine) -> str:
        """What does not fit, in words; empty when all does."""
        if machine.name is None:
            return "" if self.fits(machine) else f"{self.memory_gb['total']:.1f} GB needed, {machine.usable_gb:.1f} usable"
        sides = (("the GPU", self.memory_gb["total"], machine.usable_gb), ("the host", self.memory_gb["host"], 0.9 * machine.host_memory_gb))
        return "; ".join(f"{where}: {needed:.1f} GB needed, {there:.1f} usable" for where, needed, there in sides if needed > there)

    def options(self, c: Config) -> str:
        """The choice as command-line options beside those that made `c`."""
        return (f"--batch_size {self.batch_size} --gradient_accumulation_steps {self.gradient_accumulation_steps} "
                f"--activation_checkpointing {self.activation_checkpointing} "
                + (f"--lighter_blocks {self.lighter_blocks} " if self.lighter_blocks or c.lighter_blocks else "")
                + ("--host_gradient_blocks 0 " if c.host_gradient_blocks and not self.offload_optimizer else "")
                + f"--offload_optimizer {str(self.offload_optimizer).lower()}")


def candidates(c: Config, modes=None, offloads=None, batches=None, cpu: bool = False) -> list[Choice]:
    """Every choice with the same tokens per step, the fastest first; None leaves a field free. With the mode free, blocks may differ
    in it, else as the configuration says."""
    n = c.sequences_per_step
    found = []
    for batch in batches or [b for b in range(1, c.batch_size + 1) if n % b == 0]:
        for mode in modes or RECOMPUTATION_TIME:
            time, less = RECOMPUTATION_TIME[mode], RECOMPUTATION_TIME[LIGHTER.get(mode, mode)]
            for lighter in [0] if mode == "none" else range(c.n_layers) if modes is None else [c.lighter_blocks]:
                for offload in offloads if offloads is not None else (False, True):
                    relative = (time + (less - time) * lighter / c.n_layers) * (OFFLOAD_TIME if offload else 1)
                    relative *= 1 + (HALVED_BATCH_TIME - 1) * (c.batch_size / batch - 1)
                    found.append((relative, Choice(batch, n // batch, mode, offload, memory(c, mode, batch, offload, lighter, cpu), lighter)))
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]


def choose(c: Config, machine: Machine, fixed_batch: bool) -> tuple[Choice, bool]:
    """(the fastest choice that fits and keeps what the configuration fixes, True); when none fits, (the fastest that
    fits with everything free, or the smallest of all, False). `fixed_batch` keeps the micro-batch too."""
    modes = None if c.activation_checkpointing == "auto" else [c.activation_checkpointing]
    offloads = {"auto": [True] if c.host_gradient_blocks else None, "true": [True], "false": [False]}[c.offload_optimizer]
    cpu = machine.name is None
    kept = candidates(c, modes, offloads, [c.batch_size] if fixed_batch else None, cpu)
    for choice in kept:
        if choice.fits(machine):
            return choice, True
    free = candidates(c, offloads=[False] if cpu else None, cpu=cpu)
    return next((choice for choice in free if choice.fits(machine)), min(free, key=lambda x: (x.memory_gb["total"], x.lighter_blocks))), False


def smaller(c: Config, used: Choice, cpu: bool = False) -> Choice | None:
    """The fastest choice that needs at least 5% less memory than `used`: what to try after running out."""
    return next((x for x in candidates(c, offloads=[False] if cpu else None, cpu=cpu) if x.memory_gb["total"] < 0.95 * used.memory_gb["total"]), None)


def apply(c: Config, choice: Choice) -> Config:
    """The configuration with every field that was auto decided."""
    return dataclasses.replace(c, batch_size=choice.batch_size,
                               gradient_accumulation_steps=choice.gradient_accumulation_steps,
                               activation_checkpointing=choice.activation_checkpointing, lighter_blocks=choice.lighter_blocks,
                               offload_optimizer=str(choice.offload_optimizer).lower())


def settle(c: Config, machine: Machine) -> tuple[Config, dict, Choice | None]:
    """(`c` with every auto decided, its predicted memory, None); where no choice that keeps what `c` fixes fits, as it was asked for,
    with the choice to advise."""
    choice, kept = choose(c, machine, fixed_batch=True)
    if kept:
        return apply(c, choice), choice.memory_gb, None
    mode = c.activation_checkpointing if c.activation_checkpointing != "auto" else "full"
    offload = c.offload_optimizer == "true" or (c.offload_optimizer == "auto" and bool(machine.name or c.host_gradient_blocks))
    c = dataclasses.replace(c, activation_checkpointing=mode, offload_optimizer=str(offload).lower())
    return c, memory(c, mode, c.batch_size, offload, c.lighter_blocks, machine.name is None), choice


def could_fit(c: Config, machine: Machine) -> bool:
    """Whether a sequence at a time fits, in one mode or another: if not, nothing does, and there is no need to look through all candidates."""
    plain = dataclasses.replace(c, lighter_blocks=0)
    return any(choice.fits(machine) for choice in candidates(plain, RECOMPUTATION_TIME, batches=[1], cpu=machine.name is None))


def advice(choice: Choice, c: Config, machine: Machine) -> tuple[str, Choice | None]:
    """In words, what would fit instead of `c`: the `choice` for it, or the gradients of as few more blocks as need be on the host, or a host
    with more memory, or another preset; and that choice, when it is one for this model on this machine."""
    if choice.fits(machine):
        return f"This would fit: {choice.options(c)}", choice
    larger = dataclasses.replace(machine, host_memory_gb=math.inf)
    for where in (machine, larger) if machine.name else ():
        for blocks in range(c.host_gradient_blocks, c.n_layers + 1):
            more = dataclasses.replace(c, host_gradient_blocks=blocks, offload_optimizer="true") if blocks > c.host_gradient_blocks else c
            if could_fit(more, where):
                choice, _ = choose(more, where, fixed_batch=False)
                options = f"--host_gradient_blocks {blocks} " * (more is not c) + choice.options(more)
                return (f"This would fit: {options}", choice) if where is machine else (
                    f"With {math.ceil(choice.memory_gb['host'] / 0.9):,} GB of host memory this would fit: {options}", None)
    fitting = [name for name, preset in PRESETS.items() if could_fit(Config(**preset), machine)]
    return "No choice for this model would fit: use a smaller --preset" + (f"; these fit: {' '.join(fitting)}" if fitting else ""), None


def refuse_what_cannot_fit(c: Config, machine: Machine) -> None:
    """Raises OutOfMemory where the system would kill the process without a word: on a CPU that has not the predicted memory."""
    if machine.name:
        return
    _, sizes, choice = settle(c, machine)
    needed = sizes["total"] + sizes["host"]
    if choice and needed > machine.host_memory_gb:
        raise OutOfMemory(f"no memory for this run: {needed:.1f} GB are predicted and {machine.host_memory_gb:.1f} GB of this machine "
                          f"are free.\n  {advice(choice, c, machine)[0]}; if the machine has more than the operating system reports, say "
                          "so with --host_memory_gb.")


# ---------------------------------------------------------------- machines

def known_gpu(driver_name: str) -> str | None:
    """The name in GPUS of a GPU by its driver's name for it; None for one whose figures are not known."""
    words = set(driver_name.replace("-", " ").split())
    if words & OTHER_VARIANTS:
        return None
    return next((key for key, gpu in GPUS.items() if words.issuperset(gpu.words)), None)


M_MMAP_THRESHOLD = -3       # in glibc's malloc.h


def host_memory_gb() -> float:
    """Memory that the operating system and the container's limit leave to this process, in GB."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / "memory.current").read_text()) - int(used["inactive_file"]) - int(used["active_file"])
        free = min(free, int((group / "memory.max").read_text()) - taken)      # files in memory make room when asked
    except (OSError, ValueError, KeyError):
        pass        # no limit
    return free / GB


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1      # macOS has no affinity


def resident_gb() -> tuple[float, float]:
    """(now, peak) memory of this process that is in RAM, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GB
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GB, peak
    except OSError:
        return peak, peak


def return_freed_memory() -> None:
    """Tells glibc to give tensors of 4 MB and more back to the system when they are freed. It would keep up to 32 MB ones in a heap
    that falls into pieces: up to a third more memory in a CPU run; but a step takes a twentieth longer (both measured)."""
    with contextlib.suppress(OSError, AttributeError):      # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 * 2 ** 20)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's or the host's memory ran out: PyTorch has several ways to say so."""
    words = "out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED"
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def find_machine(host_gb: float = 0, gpu: str | None = None, cpu: bool = False) -> Machine:
    """The GPU named `gpu` with a usual host, or else the first GPU that the driver reports, or (with `cpu`, or without a
    GPU) this machine's CPU. `host_gb` states the host's memory; 0 looks. Raises ConfigError for an unknown name."""
    if gpu is not None:
        gpu = gpu.lower()
        if gpu not in GPUS:
            raise ConfigError(f"unknown GPU {gpu!r}.{nearest(gpu, GPUS)} Known: {', '.join(GPUS)}")
        return Machine(gpu, GPUS[gpu].memory_gb, host_gb or GPUS[gpu].host_memory_gb, gpu)
    host_gb = host_gb or host_memory_gb()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if shutil.which("nvidia-smi") and visible and not cpu:
        answer = subprocess.run(["nvidia-smi", f"--id={visible}", "--query-gpu=name,memory.total",
                                 "--format=csv,noheader,nounits"], capture_output=True, text=True)
        name, _, mib = answer.stdout.partition("\n")[0].rpartition(",")
        if answer.returncode == 0 and mib.strip().isdigit():        # no number: memory shared with the host
            # the driver's total holds 0.5% that PyTorch does not see
            return Machine(name.strip(), float(mib) * 2 ** 20 / GB * 0.995, host_gb, known_gpu(name))
    return Machine(None, 0, host_gb)


def find_device(c: Config):
    """The torch.device that `c` trains on. Raises ConfigError."""
    import torch        # here and below only: `plan` answers without it
    if c.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: PyTorch finds no GPU; check the driver and that torch is a CUDA build, or use --device cpu")
    return torch.device("cuda" if c.device != "cpu" and torch.cuda.is_available() else "cpu")


def machine_of(device, host_gb: float = 0) -> Machine:
    """The machine of a torch.device, with what PyTorch sees of its memory; `host_gb` as in find_machine."""
    import torch
    host_gb = host_gb or host_memory_gb()
    if device.type == "cpu":
        return Machine(None, 0, host_gb)
    name = torch.cuda.get_device_name()
    return Machine(name, torch.cuda.get_device_properties(0).total_memory / GB, host_gb, known_gpu(name))


# ---------------------------------------------------------------- report

COMPONENTS = dict(weights="Model weights", gradients="Gradients", master="fp32 master (16-bit residual)",
                  momentum="Muon momentum", adamw="AdamW moments", activations="Activations", workspace="Optimizer workspace")


def table(predicted: dict, measured: dict | None = None, capacity_gb: float | None = None) -> str:
    """The memory table in GB: predicted, and measured where known, with the total and the headroom."""
    rows = [("Component", "Predicted (GB)") + (("Measured (GB)",) if measured else ())]

    digits = 2 if predicted["total"] >= 10 else 3

    def row(label, key):
        rows.append((label, f"{predicted[key]:.{digits}f}")
                    + ((f"{measured[key]:.{digits}f}" if key in measured else "-",) if measured else ()))

    for key, label in COMPONENTS.items():
        row(label, key)
    row("Total", "total")
    if capacity_gb and "total" in (measured or predicted):
        rows.append(("Headroom", f"{capacity_gb - predicted['total']:.{digits}f}")
                    + ((f"{capacity_gb - measured['total']:.{digits}f}",) if measured else ()))
    if predicted["host"]:
        row("Host memory (streamed state)", "host")
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([r[0].ljust(widths[0])] + [x.rjust(n) for x, n in zip(r[1:], widths[1:])]) for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def count(n: float) -> str:
    """A large number in words: 17.97B, 4.46M, 1,920."""
    return f"{n / 1e9:,.2f}B" if n >= 1e9 else f"{n / 1e6:,.2f}M" if n >= 1e6 else f"{n:,.0f}"


SHAPE = """d_model n_layers n_heads n_kv_heads d_ff num_experts top_k moe_every max_seq_len vocab_size tie_embeddings optimizer
master_weights""".split()


def measured_speed(c: Config, preset: str, gpu: str | None) -> tuple[float, str] | None:
    """(median training speed in tokens/s, the options it was measured with) from benchmarks/results, where there is one for this
    preset, unchanged in shape, this precision and this GPU."""
    path = Path(__file__).parent / "benchmarks" / "results" / f"train_{preset}_{c.precision}_{gpu}.json"
    if gpu is None or not path.exists() or any(getattr(c, name) != getattr(Config(**PRESETS[preset]), name) for name in SHAPE):
        return None
    result = json.loads(path.read_text())
    options = re.search(r"--batch_size .*--offload_optimizer \w+", result.get("details", {}).get("options", ""))
    return result["value"], options[0] if options else "options that its file does not name"


def plan(c: Config, preset: str, machine: Machine) -> dict:
    """Everything `plan` prints, as plain types; see its keys."""
    choice, kept = choose(c, machine, fixed_batch=False)
    speed, measured_with = measured_speed(c, preset, machine.key) or (None, None)
    words, instead = (None, None) if choice.fits(machine) else advice(choice, c, machine)

    def rounded(memory_gb: dict) -> dict:
        return {k: round(v, 3) for k, v in memory_gb.items()}
    return dict(preset=preset, total_params=c.total_params, active_params=c.active_params, gpu=machine.name,
                gpu_memory_gb=round(machine.memory_gb, 1), host_memory_gb=round(machine.host_memory_gb, 1),
                fits=choice.fits(machine), as_configured=kept, tokens_per_step=c.tokens_per_step,
                tokens_per_run=c.tokens_per_step * c.max_steps, checkpoint_gb=round(checkpoint_gb(c), 3),
                tokens_per_second=speed, hours=c.tokens_per_step * c.max_steps / speed / 3600 if speed else None,
                measured_with=measured_with,
                memory_gb=rounded(choice.memory_gb), shortage=choice.shortage(machine), advice=words,
                advised_memory_gb=rounded(instead.memory_gb) if instead else None,
                choice={f.name: getattr(choice, f.name) for f in dataclasses.fields(choice)
                        if f.name != "memory_gb" and (f.name != "lighter_blocks" or choice.lighter_blocks)},
                options=choice.options(c))
