"""Choices of micro-batch, activation checkpointing and optimizer offload, and which of them fits.

Every choice trains the same model on the same tokens a step; choices differ in memory and in time.
The fastest that fits is taken. Where none fits, the advice names the nearest thing that would.
"""

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from config import LIGHTER, PRESETS, Config, ConfigError, OutOfMemory
from planner.layout import format_size
from planner.machine import GB, HOST_SHARE, ONE_GPU, Machine
from planner.sizes import MemoryPredictor, weights

# Time of a step relative to that without recomputation; it orders the choices. Measured on an H200
# with four layers of 18b and the head, forward and backward
# (benchmarks/results/vs_transformers_h200.json): selective 1.05, full 1.22. The head, which
# recomputes nothing, is a ninth of that time, and less of a whole model's: full is set to 1.26.
RECOMPUTATION_TIME = {"none": 1.0, "selective": 1.05, "full": 1.26}

# Time of a step relative to that with twice the micro-batch (2 against 4, measured) ...
HALVED_BATCH_TIME = 1.02
# ... and relative to that with the optimizer's state on the GPU. This is with one GPU. More GPUs
# divide the time of a step, and copy the same state through the same host memory: the copies' share
# grows with their number (an experiment with 4: 1.06 to 1.07; this gives 1.08).
OFFLOAD_TIME = 1.02

# Time of a step on several GPUs relative to a step without exchange of gradients: collectives slow
# down the matmuls beside them. Estimates from experiments with 2 and 4 H200s, which no result file
# holds. So in the order of time come: gradients once a step; those in every micro-batch; selective
# recomputation of all blocks with the former; full recomputation.
REDUCTION_TIME = {"step": 1.023, "micro_batch": 1.065}

# After a choice ran out of memory, the next one may take at most this share of its memory: 5% less,
# or 1% less where no choice saves 5%. The optimizer's workspace may leave no more to save.
MUCH_SMALLER = 0.95
SMALLER = 0.99


@dataclass(frozen=True)
class Choice:
    """Values of the fields that trade memory for time, and the memory that they take (in GB)."""

    batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: str
    offload_optimizer: bool
    memory_gb: dict[str, float]
    lighter_blocks: int = 0
    reduce_gradients: str | None = None  # None with one GPU

    @property
    def device_gb(self) -> float:
        """Memory of the device that trains. What is offloaded to the host is not in it."""
        return self.memory_gb["total"]

    @property
    def offloaded_gb(self) -> float:
        """Host memory of what is offloaded; 0 without offload."""
        return self.memory_gb["host"]

    def fits(self, machine: Machine) -> bool:
        """Whether the machine has room for the choice: on each GPU and, for offload, its host."""
        if machine.is_cpu:  # device and host are the same memory
            return self.device_gb + self.offloaded_gb <= machine.usable_gb
        on_gpu = self.device_gb <= machine.usable_gb
        on_host = self.offloaded_gb <= machine.usable_host_gb
        return on_gpu and on_host

    def shortage(self, machine: Machine) -> str:
        """What does not fit, in words; empty when everything does."""
        if self.fits(machine):
            return ""
        if machine.is_cpu:
            return _needed_and_usable(self.device_gb, machine.usable_gb)
        short = []
        if self.device_gb > machine.usable_gb:
            short.append("the GPU: " + _needed_and_usable(self.device_gb, machine.usable_gb))
        if self.offloaded_gb > machine.usable_host_gb:
            needed = _needed_and_usable(self.offloaded_gb, machine.usable_host_gb)
            short.append(_host_of(machine) + needed)
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
        # Gradients in host memory need an offloaded optimizer, and one GPU.
        if config.host_gradient_blocks and (self.reduce_gradients or not self.offload_optimizer):
            options.append("--host_gradient_blocks 0")
        if self.reduce_gradients:
            options.append(f"--reduce_gradients {self.reduce_gradients}")
        # The last one: measured speeds are found by the options up to here.
        options.append(f"--offload_optimizer {_true_or_false(self.offload_optimizer)}")
        return " ".join(options)


def _host_of(machine: Machine) -> str:
    if machine.gpus == 1:
        return "the host: "
    return f"the host, for each of {machine.gpus} GPUs: "


def _needed_and_usable(needed_gb: float, usable_gb: float) -> str:
    return f"{needed_gb:.1f} GB needed, {usable_gb:.1f} usable"


def _true_or_false(value: bool) -> str:
    return str(value).lower()


# ---------------------------------------------------------------- search

# How much is recomputed: a mode, and the number of last blocks that recompute less.
Level = tuple[str, int]


class Placement(NamedTuple):
    """Where optimizer state is, and when several GPUs sum their gradients."""

    offload: bool
    reduce_gradients: str | None = None  # None with one GPU


# A step at which micro-batches and placements are tried, see `_steps`.
Step = tuple[Sequence[int], Sequence[Placement]]


def all_levels(config: Config) -> list[Level]:
    """Every level, from the one that recomputes most. Each takes no less memory than the last."""
    levels = []
    for mode in ("full", "selective"):
        for lighter in range(config.n_layers):  # all of them would be the next mode
            levels.append((mode, lighter))
    levels.append(("none", 0))
    return levels


def auto_levels(config: Config, machine: Machine = ONE_GPU) -> list[Level]:
    """What activation_checkpointing=auto chooses from: each block is full or selective.

    Checkpointing stays on: `none` is for those who request it, and for several GPUs. These share
    gradients and state, and what that leaves free makes recomputation unnecessary.
    """
    levels = all_levels(config)
    if machine.ranks > 1:
        return levels
    return levels[: levels.index(("selective", 0)) + 1]


def _configured_levels(config: Config, machine: Machine) -> list[Level]:
    mode = config.activation_checkpointing
    if mode == "auto":
        return auto_levels(config, machine)
    return [(mode, _configured_lighter_blocks(config, mode))]


def _configured_lighter_blocks(config: Config, mode: str) -> int:
    if mode == "none":  # nothing recomputes less
        return 0
    return config.lighter_blocks


def candidates(
    config: Config,
    modes: Sequence[str] | None = None,
    offloads: Sequence[bool] | None = None,
    batches: Sequence[int] | None = None,
    machine: Machine = ONE_GPU,
) -> list[Choice]:
    """Every choice with the same tokens a step, the fastest first.

    None leaves a field free. With the mode free, any number of the last blocks may recompute less;
    with the mode fixed, as many as the configuration says. These may be thousands: `choose` finds
    the same without looking at all of them. With several GPUs there is a choice for each way to sum
    gradients that the configuration leaves.
    """
    if batches is None:
        batches = _possible_batches(config, machine)
    if offloads is None:
        offloads = (False, True)
    if modes is None:
        levels = all_levels(config)
    else:
        levels = [(mode, _configured_lighter_blocks(config, mode)) for mode in modes]

    search = _Search(config, machine)
    placements = _placements(offloads, _configured_reductions(config, machine))
    found = []
    for batch in batches:
        for level in levels:
            for placement in placements:
                found.append(search.choice(level, batch, placement))
    return sorted(found, key=search.speed_key)


def _possible_batches(config: Config, machine: Machine) -> list[int]:
    """Micro-batches, up to the configuration's, that divide the sequences of a step.

    They leave one micro-batch at least for each rank.
    """
    sequences = config.sequences_per_step
    largest = max(1, min(config.batch_size, sequences // machine.ranks))
    sizes = range(1, largest + 1)
    return [size for size in sizes if sequences % size == 0]


def _placements(offloads: Sequence[bool], reductions: Sequence[str | None]) -> list[Placement]:
    return [Placement(offload, reduction) for offload in offloads for reduction in reductions]


class _Search:
    """Finds choices for a configuration without predicting the memory of all of them.

    At a micro-batch and a placement, a level of recomputation that takes more memory takes less
    time. So the fastest that fits is the last level that fits, and bisection finds it.
    """

    def __init__(self, config: Config, machine: Machine):
        self.config = config
        self.machine = machine
        self.predictor = MemoryPredictor(config, machine.is_cpu, machine.gpus, machine.machines)

    def choice(self, level: Level, batch: int, placement: Placement) -> Choice:
        mode, lighter = level
        offload, reduction = placement
        memory_gb = self.predictor.predict(mode, batch, offload, lighter, reduction or "step")
        accumulation = self.config.sequences_per_step // batch
        return Choice(batch, accumulation, mode, offload, memory_gb, lighter, reduction)

    def speed_key(self, choice: Choice) -> tuple:
        """Sorts choices: the fastest first. Of equally fast ones, the one with the smaller
        micro-batch comes first, which takes less memory."""
        time = relative_time(self.config, choice, self.machine.gpus)
        return time, choice.batch_size, choice.offload_optimizer

    def fastest(
        self,
        fits: Callable[[Choice], bool],
        levels: Sequence[Level],
        batches: Iterable[int],
        placements: Sequence[Placement],
    ) -> Choice | None:
        """The fastest choice that `fits`; None when none does.

        `levels` and `batches` must be sorted by the memory that they take. If a choice `fits`,
        every choice that takes less memory must fit too.
        """
        found = []
        for placement in placements:
            number_that_fit = len(levels)
            for batch in batches:
                # A larger micro-batch leaves no room for more levels.
                number_that_fit = self._number_that_fit(
                    fits, levels[:number_that_fit], batch, placement
                )
                if number_that_fit == 0:
                    break
                found.append(self.choice(levels[number_that_fit - 1], batch, placement))
        return min(found, key=self.speed_key, default=None)

    def _number_that_fit(
        self,
        fits: Callable[[Choice], bool],
        levels: Sequence[Level],
        batch: int,
        placement: Placement,
    ) -> int:
        """How many of the levels fit: these are the first ones, as levels are sorted by memory."""

        def too_large(level: Level) -> bool:
            return not fits(self.choice(level, batch, placement))

        return bisect_left(levels, True, key=too_large)

    def smallest(self, placements: Sequence[Placement]) -> list[Choice]:
        """The choice that takes the least memory, for each placement."""
        most_recomputation = all_levels(self.config)[0]
        return [self.choice(most_recomputation, 1, placement) for placement in placements]

    def least_gb(self, placements: Sequence[Placement]) -> float:
        """The least memory of the device that any choice takes."""
        return min(choice.device_gb for choice in self.smallest(placements))


def relative_time(config: Config, choice: Choice, gpus: int = 1) -> float:
    """Time of a step, relative to that at the configuration's micro-batch with nothing recomputed,
    nothing offloaded, and nothing exchanged between the `gpus` of a machine."""
    mode = choice.activation_checkpointing
    time = RECOMPUTATION_TIME[mode]
    # The last `lighter_blocks` of the n_layers blocks recompute what the next lighter mode does.
    lighter_time = RECOMPUTATION_TIME[LIGHTER.get(mode, mode)]
    time += (lighter_time - time) * choice.lighter_blocks / config.n_layers
    if choice.offload_optimizer:
        time *= 1 + (OFFLOAD_TIME - 1) * gpus
    if choice.reduce_gradients:
        time *= REDUCTION_TIME[choice.reduce_gradients]
    # A step costs HALVED_BATCH_TIME - 1 more for each micro-batch more in it, counted in those of
    # the configuration: half the micro-batch is one more, a quarter of it three.
    added_batches = config.batch_size / choice.batch_size - 1
    return time * (1 + (HALVED_BATCH_TIME - 1) * added_batches)


def choose(config: Config, machine: Machine, fixed_batch: bool) -> tuple[Choice, bool]:
    """The choice for `config` on `machine`, and whether it fits and keeps what `config` fixes.

    `config` fixes the fields that are not auto, and with `fixed_batch` the micro-batch. The choice
    is the first of these that there is:

    1. The fastest that fits and keeps what is fixed, in the order of `_steps`.
    2. The fastest that fits, with all fields free; with several GPUs the micro-batch comes last.
    3. The one that takes the least memory, which does not fit.
    """
    search = _Search(config, machine)

    def fits(choice: Choice) -> bool:
        return choice.fits(machine)

    levels = _configured_levels(config, machine)
    for batches, placements in _steps(config, machine, fixed_batch):
        choice = search.fastest(fits, levels, batches, placements)
        if choice:
            return choice, True

    choice = None
    if machine.ranks > 1:
        choice = fastest(config, machine, fixed_batch=True)
    choice = choice or fastest(config, machine)
    choice = choice or _smallest(search)
    return choice, False


def _steps(config: Config, machine: Machine, fixed_batch: bool) -> list[Step]:
    """The micro-batches and placements that the configuration leaves, in the order of the trials.

    With one GPU, first come its own micro-batch without offload, and then with it. Only where
    neither fits are smaller micro-batches tried.

    With several GPUs time alone decides between offload, recomputation and the ways to sum
    gradients. The micro-batch stays: experts are balanced over it, so a number of GPUs that chose
    it would choose what is trained.
    """
    offloads = _configured_offloads(config, machine)
    if machine.ranks > 1:
        reductions = _configured_reductions(config, machine)
        return [([config.batch_size], _placements(offloads, reductions))]
    steps: list[Step] = [([config.batch_size], [Placement(offload)]) for offload in offloads]
    if not fixed_batch:
        placements = [Placement(offload) for offload in offloads]
        steps.append((_possible_batches(config, machine), placements))
    return steps


def fastest(config: Config, machine: Machine, fixed_batch: bool = False) -> Choice | None:
    """The fastest choice that fits; None if nothing fits.

    All fields are free, but with `fixed_batch` the micro-batch: activation_checkpointing=none is
    possible too, unlike with auto.
    """
    batches = _possible_batches(config, machine)
    if fixed_batch:
        batches = [config.batch_size]
    return _Search(config, machine).fastest(
        lambda choice: choice.fits(machine),
        all_levels(config),
        batches,
        _free_placements(machine),
    )


def _smallest(search: _Search) -> Choice:
    """The choice that takes the least memory of the device.

    Of several it is the fastest of those that recompute equally much in all blocks.
    """
    placements = _free_placements(search.machine)
    least_gb = search.least_gb(placements)
    same_in_all_blocks = [level for level in all_levels(search.config) if level[1] == 0]
    choice = search.fastest(
        lambda choice: choice.device_gb <= least_gb,
        same_in_all_blocks,
        _possible_batches(search.config, search.machine),
        placements,
    )
    assert choice is not None  # one of `search.smallest` is among those searched
    return choice


def _configured_offloads(config: Config, machine: Machine) -> list[bool]:
    if config.offload_optimizer != "auto":
        return [config.offload_optimizer == "true"]
    if config.host_gradient_blocks and machine.ranks == 1:
        return [True]  # the optimizer reads these gradients in host memory, with its state
    return [False, True]


def _configured_reductions(config: Config, machine: Machine) -> list[str | None]:
    """When gradients are summed, as the configuration says: a choice of several GPUs alone."""
    if config.reduce_gradients != "auto" and machine.ranks > 1:
        return [config.reduce_gradients]
    return _possible_reductions(machine)


def _possible_reductions(machine: Machine) -> list[str | None]:
    if machine.ranks == 1:
        return [None]
    if machine.gpus == 1:  # a GPU owns all that its machine sums
        return ["step"]
    return ["step", "micro_batch"]


def _free_placements(machine: Machine) -> list[Placement]:
    """All that make sense on this machine."""
    offloads = [False, True]
    if machine.is_cpu:
        offloads = [False]  # device and host are the same memory
    return _placements(offloads, _possible_reductions(machine))


def next_smaller(config: Config, used: Choice, machine: Machine = ONE_GPU) -> Choice | None:
    """What to try after `used` ran out of memory: the fastest choice that takes clearly less.

    That is 5% less, or 1% less where no choice saves 5%; None where none saves 1% either.
    """
    search = _Search(config, machine)
    placements = _free_placements(machine)
    limit_gb = MUCH_SMALLER * used.device_gb
    if search.least_gb(placements) >= limit_gb:
        limit_gb = SMALLER * used.device_gb
    return search.fastest(
        lambda choice: choice.device_gb < limit_gb,
        all_levels(config),
        _possible_batches(config, machine),
        placements,
    )


def could_fit(config: Config, machine: Machine) -> bool:
    """Whether any choice fits. Looks only at the smallest: where they do not fit, no other does."""
    placements = _placements((False, True), _possible_reductions(machine))
    smallest = _Search(config, machine).smallest(placements)
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
    if choice.reduce_gradients:
        values |= _several_gpus_values(choice.reduce_gradients)
    return dataclasses.replace(config, **values)


def _several_gpus_values(reduce_gradients: str) -> dict[str, Any]:
    """Fields that several GPUs resolve. They share the gradients, and sum none in host memory."""
    return dict(reduce_gradients=reduce_gradients, host_gradient_blocks=0)


def resolve_autos(config: Config, machine: Machine) -> tuple[Config, dict, Choice | None]:
    """The configuration with every auto resolved, its predicted memory, and None.

    `reduce_gradients` is resolved for several GPUs alone: with one it has no meaning.

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
    values: dict[str, Any] = dict(
        activation_checkpointing=mode, offload_optimizer=_true_or_false(offload)
    )
    reduction = _configured_reductions(config, machine)[-1]  # the last one takes the least memory
    if reduction:
        values |= _several_gpus_values(reduction)
    level = (mode, config.lighter_blocks)
    used = _Search(config, machine).choice(level, config.batch_size, Placement(offload, reduction))
    return dataclasses.replace(config, **values), used.memory_gb, choice


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
            if choice.fits(machine):
                return f"This would fit: {options}", choice
            host_gb = math.ceil(machine.gpus * choice.offloaded_gb / HOST_SHARE)
            return f"With {host_gb:,} GB of host memory this would fit: {options}", None
    return _use_a_smaller_preset(machine), None


def _with_more_gradients_on_host(config: Config, machine: Machine) -> tuple[Choice, str] | None:
    """A choice that fits the GPU, with as few blocks' gradients in host memory as possible.

    No fewer than the configuration has there. Returns the choice and its command-line options; None
    if nothing fits. The host may lack memory for the choice: then it lacks it for all others too,
    since the GPU has no room for a choice with less in host memory.
    """
    any_host = dataclasses.replace(machine, host_memory_gb=math.inf)
    if could_fit(config, any_host):
        choice, _ = choose(config, any_host, fixed_batch=False)
        return choice, choice.options(config)
    if machine.ranks > 1:  # they share the gradients, and sum none in host memory
        return None

    def changed(blocks: int) -> Config:
        return dataclasses.replace(config, host_gradient_blocks=blocks, offload_optimizer="true")

    # Each block more takes memory from the GPU, or at least adds none, so bisection finds the
    # fewest.
    more = range(config.host_gradient_blocks + 1, config.n_layers + 1)
    index = bisect_left(more, True, key=lambda blocks: could_fit(changed(blocks), any_host))
    if index == len(more):
        return None
    blocks = more[index]
    choice, _ = choose(changed(blocks), any_host, fixed_batch=False)
    return choice, f"--host_gradient_blocks {blocks} {choice.options(changed(blocks))}"


def _use_a_smaller_preset(machine: Machine) -> str:
    advice = "No choice for this model would fit: use a smaller --preset"
    if machine.ranks > 1:
        advice = (
            "No choice for this model would fit: use more GPUs in a machine, or a smaller --preset"
        )
    fitting = [name for name in PRESETS if _preset_could_fit(name, machine)]
    if fitting:
        advice += f"; these fit: {' '.join(fitting)}"
    return advice


def _preset_could_fit(name: str, machine: Machine) -> bool:
    try:
        config = Config(**PRESETS[name])
    except ConfigError:  # with a default that was edited in config.py, such as lighter_blocks
        return False
    return could_fit(config, machine)


def check_fits(config: Config, machine: Machine) -> None:
    """Raises OutOfMemory on a CPU that lacks the predicted memory.

    There the system would kill the process without a word. A GPU reports that its memory ran out.
    """
    if machine.name:
        return
    _, sizes, choice = resolve_autos(config, machine)
    needed_gb = sizes["total"] + sizes["host"]
    needed_gb *= machine.gpus
    if choice and needed_gb > machine.host_memory_gb:
        advice, _ = advise(choice, config, machine)
        raise OutOfMemory(
            f"no memory for this run: {format_size(needed_gb)} are predicted and "
            f"{format_size(machine.host_memory_gb)} of this machine are free.\n"
            f"  {advice}; if the machine has more than the operating system reports, say so with "
            "--host_memory_gb."
        )


# The share of a GPU's memory that the weights may take where several GPUs train. Each one holds
# all weights, and activations need the rest.
WEIGHTS_SHARE = 0.45


def check_weights(config: Config, machine: Machine) -> None:
    """Raises ConfigError where several GPUs train and the weights alone take too much of each."""
    if machine.ranks == 1 or machine.is_cpu:
        return
    weights_gb = weights(config) / GB
    if weights_gb <= WEIGHTS_SHARE * machine.memory_gb:
        return
    raise ConfigError(
        f"the weights take {weights_gb:.1f} GB, {weights_gb / machine.memory_gb:.0%} of the memory "
        f"of {machine.name} ({machine.memory_gb:.1f} GB). Each of several GPUs holds all weights, "
        f"and more than {WEIGHTS_SHARE:.0%} leaves activations too little: take GPUs with more "
        "memory, one GPU (--gpus 1), or a smaller --preset"
    )
