"""Choices of micro-batch, activation checkpointing and optimizer offload, and which of them fits.

Every choice trains the same model on the same tokens a step; choices differ in memory and in time.
The fastest that fits is taken. Where none fits, the advice names the nearest thing that would.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from config import LIGHTER, PRESETS, Config, OutOfMemory
from planner.machine import HOST_SHARE, Machine
from planner.sizes import MemoryPredictor

# Time of a step relative to that without recomputation; it orders the choices. Measured on an H200
# with four layers of 18b and the head, forward and backward
# (benchmarks/results/vs_transformers_h200.json): selective 1.05, full 1.22. The head, which
# recomputes nothing, is a ninth of that time, and less of a whole model's: full is set to 1.26.
RECOMPUTATION_TIME = {"none": 1.0, "selective": 1.05, "full": 1.26}

# Time of a step relative to that with twice the micro-batch (2 against 4, measured) ...
HALVED_BATCH_TIME = 1.02
# ... and relative to that with the optimizer's state on the GPU.
OFFLOAD_TIME = 1.02

# What has to be saved for a choice to count as smaller than one that ran out of memory.
SMALLER = 0.95


@dataclass(frozen=True)
class Choice:
    """Values of the fields that trade memory for time, and the memory that they take (in GB)."""

    batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: str
    offload_optimizer: bool
    memory_gb: dict[str, float]
    lighter_blocks: int = 0

    @property
    def device_gb(self) -> float:
        """Memory of the device that trains. What is offloaded to the host is not in it."""
        return self.memory_gb["total"]

    @property
    def offloaded_gb(self) -> float:
        """Host memory of what is offloaded; 0 without offload."""
        return self.memory_gb["host"]

    def fits(self, machine: Machine) -> bool:
        """Whether the machine has room for the choice: on its GPU and, for offload, its host."""
        if machine.name is None:  # a CPU: device and host are the same memory
            return self.device_gb + self.offloaded_gb <= machine.usable_gb
        on_gpu = self.device_gb <= machine.usable_gb
        on_host = self.offloaded_gb <= machine.usable_host_gb
        return on_gpu and on_host

    def shortage(self, machine: Machine) -> str:
        """What does not fit, in words; empty when everything does."""
        if self.fits(machine):
            return ""
        if machine.name is None:
            return _needed_and_usable(self.device_gb, machine.usable_gb)
        short = []
        if self.device_gb > machine.usable_gb:
            short.append("the GPU: " + _needed_and_usable(self.device_gb, machine.usable_gb))
        if self.offloaded_gb > machine.usable_host_gb:
            needed = _needed_and_usable(self.offloaded_gb, machine.usable_host_gb)
            short.append("the host: " + needed)
        return "; ".join(short)

    def options(self, config: Config) -> str:
        """The choice as command-line options, to be added to those that made `config`."""
        options = [
            f"--batch_size {self.batch_size}",
            f"--gradient_accumulation_steps {self.gradient_accumulation_steps}",
            f"--activation_checkpointing {self.activation_checkpointing}",
        ]
        if self.lighter_blocks or config.lighter_blocks:
            options.append(f"--lighter_blocks {self.lighter_blocks}")
        # Gradients in host memory need an offloaded optimizer.
        if config.host_gradient_blocks and not self.offload_optimizer:
            options.append("--host_gradient_blocks 0")
        options.append(f"--offload_optimizer {_true_or_false(self.offload_optimizer)}")
        return " ".join(options)


def _needed_and_usable(needed_gb: float, usable_gb: float) -> str:
    return f"{needed_gb:.1f} GB needed, {usable_gb:.1f} usable"


def _true_or_false(value: bool) -> str:
    return str(value).lower()


# ---------------------------------------------------------------- search


def candidates(
    config: Config,
    modes: Sequence[str] | None = None,
    offloads: Sequence[bool] | None = None,
    batches: Sequence[int] | None = None,
    cpu: bool = False,
) -> list[Choice]:
    """Every choice with the same tokens a step, the fastest first.

    None leaves a field free. With the mode free, any number of the last blocks may recompute less;
    with the mode fixed, as many as the configuration says.
    """
    return list(_fastest_first(config, modes, offloads, batches, cpu))


def _fastest_first(
    config: Config,
    modes: Sequence[str] | None = None,
    offloads: Sequence[bool] | None = None,
    batches: Sequence[int] | None = None,
    cpu: bool = False,
) -> Iterator[Choice]:
    """`candidates` one at a time: a search that stops at the first fit predicts no further."""
    if batches is None:
        batches = _possible_batches(config)
    if offloads is None:
        offloads = (False, True)

    ordered = []
    for batch in batches:
        for mode in modes or RECOMPUTATION_TIME:
            for lighter in _possible_lighter_blocks(config, mode, fixed=modes is not None):
                for offload in offloads:
                    time = _relative_time(config, batch, mode, lighter, offload)
                    ordered.append((time, batch, mode, lighter, offload))
    ordered.sort(key=lambda item: item[0])

    predictor = MemoryPredictor(config, cpu)
    for _, batch, mode, lighter, offload in ordered:
        memory_gb = predictor.predict(mode, batch, offload, lighter)
        accumulation = config.sequences_per_step // batch
        yield Choice(batch, accumulation, mode, offload, memory_gb, lighter)


def _possible_batches(config: Config) -> list[int]:
    """Micro-batches, up to the configuration's, that divide the sequences of a step."""
    sizes = range(1, config.batch_size + 1)
    return [size for size in sizes if config.sequences_per_step % size == 0]


def _possible_lighter_blocks(config: Config, mode: str, fixed: bool) -> Sequence[int]:
    if mode == "none":
        return [0]
    if fixed:
        return [config.lighter_blocks]
    return range(config.n_layers)  # all of them would be the next mode


def _relative_time(config: Config, batch: int, mode: str, lighter: int, offload: bool) -> float:
    time = RECOMPUTATION_TIME[mode]
    lighter_time = RECOMPUTATION_TIME[LIGHTER.get(mode, mode)]
    time += (lighter_time - time) * lighter / config.n_layers
    if offload:
        time *= OFFLOAD_TIME
    return time * (1 + (HALVED_BATCH_TIME - 1) * (config.batch_size / batch - 1))


def choose(config: Config, machine: Machine, fixed_batch: bool) -> tuple[Choice, bool]:
    """The choice for `config` on `machine`, and whether it fits and keeps what `config` fixes.

    That is the fastest choice that fits and keeps what the configuration fixes. Where there is
    none, it is the fastest that fits with everything free, or else the smallest of all.
    `fixed_batch` keeps the micro-batch too.
    """
    cpu = machine.name is None
    batches = [config.batch_size] if fixed_batch else None
    as_configured = _fastest_first(
        config, _configured_modes(config), _configured_offloads(config), batches, cpu
    )
    for choice in as_configured:
        if choice.fits(machine):
            return choice, True

    free = []
    for choice in _fastest_first(config, offloads=_sensible_offloads(cpu), cpu=cpu):
        if choice.fits(machine):
            return choice, False
        free.append(choice)
    # Of equal ones the plainest.
    return min(free, key=lambda choice: (choice.memory_gb["total"], choice.lighter_blocks)), False


def _configured_modes(config: Config) -> list[str] | None:
    """The modes of activation checkpointing to search over. None: all of them."""
    if config.activation_checkpointing == "auto":
        return None
    return [config.activation_checkpointing]


def _configured_offloads(config: Config) -> list[bool] | None:
    if config.offload_optimizer != "auto":
        return [config.offload_optimizer == "true"]
    if config.host_gradient_blocks:
        return [True]  # the optimizer reads these gradients in host memory, with its state
    return None


def _sensible_offloads(cpu: bool) -> list[bool] | None:
    """On a CPU there is nothing to offload from."""
    return [False] if cpu else None


def next_smaller(config: Config, used: Choice, cpu: bool = False) -> Choice | None:
    """What to try after `used` ran out of memory: the fastest choice that needs 5% less."""
    for choice in _fastest_first(config, offloads=_sensible_offloads(cpu), cpu=cpu):
        if choice.memory_gb["total"] < SMALLER * used.memory_gb["total"]:
            return choice
    return None


def could_fit(config: Config, machine: Machine) -> bool:
    """Whether any choice fits. Looks only at those of one sequence at a time, and no mixed modes.

    They are the smallest: where none of them fits, no other does.
    """
    unmixed = dataclasses.replace(config, lighter_blocks=0)
    cpu = machine.name is None
    smallest = _fastest_first(unmixed, tuple(RECOMPUTATION_TIME), batches=[1], cpu=cpu)
    return any(choice.fits(machine) for choice in smallest)


# ---------------------------------------------------------------- the resolved configuration


def apply_choice(config: Config, choice: Choice) -> Config:
    """The configuration with the choice's values; no field of it is auto any more."""
    values: dict[str, Any] = dict(
        batch_size=choice.batch_size,
        gradient_accumulation_steps=choice.gradient_accumulation_steps,
        activation_checkpointing=choice.activation_checkpointing,
        lighter_blocks=choice.lighter_blocks,
        offload_optimizer=_true_or_false(choice.offload_optimizer),
    )
    return dataclasses.replace(config, **values)


def resolve_autos(config: Config, machine: Machine) -> tuple[Config, dict, Choice | None]:
    """The configuration with every auto resolved, its predicted memory, and None.

    Where no choice fits that keeps what the configuration fixes, the fixed values stay, the smaller
    value is taken for every auto, and the third value is the choice to advise.
    """
    choice, kept = choose(config, machine, fixed_batch=True)
    if kept:
        return apply_choice(config, choice), choice.memory_gb, None

    mode = config.activation_checkpointing
    if mode == "auto":
        mode = "full"
    offload = config.offload_optimizer == "true"
    if config.offload_optimizer == "auto":
        offload = bool(machine.name or config.host_gradient_blocks)
    predictor = MemoryPredictor(config, cpu=machine.name is None)
    memory_gb = predictor.predict(mode, config.batch_size, offload, config.lighter_blocks)
    values: dict[str, Any] = dict(
        activation_checkpointing=mode, offload_optimizer=_true_or_false(offload)
    )
    return dataclasses.replace(config, **values), memory_gb, choice


# ---------------------------------------------------------------- advice


def advise(choice: Choice, config: Config, machine: Machine) -> tuple[str, Choice | None]:
    """What would fit instead of `config`, in words.

    `choice` is what `choose` found. If it does not fit, the advice is, in this order: gradients of
    more blocks in host memory, as few as needed; a host with more memory; another preset.

    Returns the text, and the choice that it names, if it is for this model on this machine.
    """
    if choice.fits(machine):
        return f"This would fit: {choice.options(config)}", choice
    if machine.name:
        found = _with_more_gradients_on_host(config, machine)
        if found:
            choice, options = found
            return f"This would fit: {options}", choice

        any_host = dataclasses.replace(machine, host_memory_gb=math.inf)
        found = _with_more_gradients_on_host(config, any_host)
        if found:
            choice, options = found
            host_gb = math.ceil(choice.memory_gb["host"] / HOST_SHARE)
            return f"With {host_gb:,} GB of host memory this would fit: {options}", None
    return _use_a_smaller_preset(machine), None


def _with_more_gradients_on_host(config: Config, machine: Machine) -> tuple[Choice, str] | None:
    """A choice that fits, with as few additional blocks' gradients in host memory as possible.

    Returns the choice and its command-line options; None if nothing fits.
    """
    for blocks in range(config.host_gradient_blocks, config.n_layers + 1):
        changed = config
        options = ""
        if blocks > config.host_gradient_blocks:
            changed = dataclasses.replace(
                config, host_gradient_blocks=blocks, offload_optimizer="true"
            )
            options = f"--host_gradient_blocks {blocks} "
        if could_fit(changed, machine):
            choice, _ = choose(changed, machine, fixed_batch=False)
            return choice, options + choice.options(changed)
    return None


def _use_a_smaller_preset(machine: Machine) -> str:
    advice = "No choice for this model would fit: use a smaller --preset"
    fitting = []
    for name, preset in PRESETS.items():
        if could_fit(Config(**preset), machine):
            fitting.append(name)
    if fitting:
        advice += f"; these fit: {' '.join(fitting)}"
    return advice


def check_fits(config: Config, machine: Machine) -> None:
    """Raises OutOfMemory on a CPU that lacks the predicted memory.

    There the system would kill the process without a word. A GPU reports that its memory ran out.
    """
    if machine.name:
        return
    _, sizes, choice = resolve_autos(config, machine)
    needed_gb = sizes["total"] + sizes["host"]
    if choice and needed_gb > machine.host_memory_gb:
        advice, _ = advise(choice, config, machine)
        raise OutOfMemory(
            f"no memory for this run: {needed_gb:.1f} GB are predicted and "
            f"{machine.host_memory_gb:.1f} GB of this machine are free.\n"
            f"  {advice}; if the machine has more than the operating system reports, say so with "
            "--host_memory_gb."
        )
