"""TODO choice"""

import dataclasses
import math
from dataclasses import dataclass

from config import LIGHTER, PRESETS, Config, OutOfMemory
from planner.machine import Machine
from planner.sizes import predict_memory

# Time of a step relative to keeping everything, for the planner's order of preference. Four layers of 18b and the head on an
# H200, forward and backward (benchmarks/results/vs_transformers_h200.json): selective 1.05, full 1.22, of which the head, which
# recomputes nothing, is a ninth. Micro-batch 2 against 4 loses 2%.
RECOMPUTATION_TIME = {"none": 1.0, "selective": 1.05, "full": 1.26}
HALVED_BATCH_TIME = 1.02
OFFLOAD_TIME = 1.02


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
        if machine.name is None:  # on a CPU all of it is host memory
            return self.memory_gb["total"] + self.memory_gb["host"] <= machine.usable_gb
        return (
            self.memory_gb["total"] <= machine.usable_gb
            and self.memory_gb["host"] <= 0.9 * machine.host_memory_gb
        )

    def shortage(self, machine: Machine) -> str:
        """What does not fit, in words; empty when all does."""
        if machine.name is None:
            return (
                ""
                if self.fits(machine)
                else f"{self.memory_gb['total']:.1f} GB needed, {machine.usable_gb:.1f} usable"
            )
        sides = (
            ("the GPU", self.memory_gb["total"], machine.usable_gb),
            ("the host", self.memory_gb["host"], 0.9 * machine.host_memory_gb),
        )
        return "; ".join(
            f"{where}: {needed:.1f} GB needed, {there:.1f} usable"
            for where, needed, there in sides
            if needed > there
        )

    def options(self, c: Config) -> str:
        """The choice as command-line options beside those that made `c`."""
        return (
            f"--batch_size {self.batch_size} --gradient_accumulation_steps {self.gradient_accumulation_steps} "
            f"--activation_checkpointing {self.activation_checkpointing} "
            + (
                f"--lighter_blocks {self.lighter_blocks} "
                if self.lighter_blocks or c.lighter_blocks
                else ""
            )
            + (
                "--host_gradient_blocks 0 "
                if c.host_gradient_blocks and not self.offload_optimizer
                else ""
            )
            + f"--offload_optimizer {str(self.offload_optimizer).lower()}"
        )


def candidates(
    c: Config, modes=None, offloads=None, batches=None, cpu: bool = False
) -> list[Choice]:
    """Every choice with the same tokens per step, the fastest first; None leaves a field free. With the mode free, blocks may differ
    in it, else as the configuration says."""
    n = c.sequences_per_step
    found = []
    for batch in batches or [b for b in range(1, c.batch_size + 1) if n % b == 0]:
        for mode in modes or RECOMPUTATION_TIME:
            time, less = RECOMPUTATION_TIME[mode], RECOMPUTATION_TIME[LIGHTER.get(mode, mode)]
            for lighter in (
                [0]
                if mode == "none"
                else range(c.n_layers)
                if modes is None
                else [c.lighter_blocks]
            ):
                for offload in offloads if offloads is not None else (False, True):
                    relative = (time + (less - time) * lighter / c.n_layers) * (
                        OFFLOAD_TIME if offload else 1
                    )
                    relative *= 1 + (HALVED_BATCH_TIME - 1) * (c.batch_size / batch - 1)
                    found.append(
                        (
                            relative,
                            Choice(
                                batch,
                                n // batch,
                                mode,
                                offload,
                                predict_memory(c, mode, batch, offload, lighter, cpu),
                                lighter,
                            ),
                        )
                    )
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]


def choose(c: Config, machine: Machine, fixed_batch: bool) -> tuple[Choice, bool]:
    """(the fastest choice that fits and keeps what the configuration fixes, True); when none fits, (the fastest that
    fits with everything free, or the smallest of all, False). `fixed_batch` keeps the micro-batch too."""
    modes = None if c.activation_checkpointing == "auto" else [c.activation_checkpointing]
    offloads = {
        "auto": [True] if c.host_gradient_blocks else None,
        "true": [True],
        "false": [False],
    }[c.offload_optimizer]
    cpu = machine.name is None
    kept = candidates(c, modes, offloads, [c.batch_size] if fixed_batch else None, cpu)
    for choice in kept:
        if choice.fits(machine):
            return choice, True
    free = candidates(c, offloads=[False] if cpu else None, cpu=cpu)
    return next(
        (choice for choice in free if choice.fits(machine)),
        min(free, key=lambda x: (x.memory_gb["total"], x.lighter_blocks)),
    ), False


def next_smaller(c: Config, used: Choice, cpu: bool = False) -> Choice | None:
    """The fastest choice that needs at least 5% less memory than `used`: what to try after running out."""
    return next(
        (
            x
            for x in candidates(c, offloads=[False] if cpu else None, cpu=cpu)
            if x.memory_gb["total"] < 0.95 * used.memory_gb["total"]
        ),
        None,
    )


def apply_choice(c: Config, choice: Choice) -> Config:
    """The configuration with every field that was auto decided."""
    return dataclasses.replace(
        c,
        batch_size=choice.batch_size,
        gradient_accumulation_steps=choice.gradient_accumulation_steps,
        activation_checkpointing=choice.activation_checkpointing,
        lighter_blocks=choice.lighter_blocks,
        offload_optimizer=str(choice.offload_optimizer).lower(),
    )


def resolve_autos(c: Config, machine: Machine) -> tuple[Config, dict, Choice | None]:
    """(`c` with every auto decided, its predicted memory, None); where no choice that keeps what `c` fixes fits, as it was asked for,
    with the choice to advise."""
    choice, kept = choose(c, machine, fixed_batch=True)
    if kept:
        return apply_choice(c, choice), choice.memory_gb, None
    mode = c.activation_checkpointing if c.activation_checkpointing != "auto" else "full"
    offload = c.offload_optimizer == "true" or (
        c.offload_optimizer == "auto" and bool(machine.name or c.host_gradient_blocks)
    )
    c = dataclasses.replace(
        c, activation_checkpointing=mode, offload_optimizer=str(offload).lower()
    )
    return (
        c,
        predict_memory(c, mode, c.batch_size, offload, c.lighter_blocks, machine.name is None),
        choice,
    )


def could_fit(c: Config, machine: Machine) -> bool:
    """Whether a sequence at a time fits, in one mode or another: if not, nothing does, and there is no need to look through all candidates."""
    plain = dataclasses.replace(c, lighter_blocks=0)
    return any(
        choice.fits(machine)
        for choice in candidates(plain, RECOMPUTATION_TIME, batches=[1], cpu=machine.name is None)
    )


def advise(choice: Choice, c: Config, machine: Machine) -> tuple[str, Choice | None]:
    """In words, what would fit instead of `c`: the `choice` for it, or the gradients of as few more blocks as need be on the host, or a host
    with more memory, or another preset; and that choice, when it is one for this model on this machine."""
    if choice.fits(machine):
        return f"This would fit: {choice.options(c)}", choice
    larger = dataclasses.replace(machine, host_memory_gb=math.inf)
    for where in (machine, larger) if machine.name else ():
        for blocks in range(c.host_gradient_blocks, c.n_layers + 1):
            more = (
                dataclasses.replace(c, host_gradient_blocks=blocks, offload_optimizer="true")
                if blocks > c.host_gradient_blocks
                else c
            )
            if could_fit(more, where):
                choice, _ = choose(more, where, fixed_batch=False)
                options = f"--host_gradient_blocks {blocks} " * (more is not c) + choice.options(
                    more
                )
                return (
                    (f"This would fit: {options}", choice)
                    if where is machine
                    else (
                        f"With {math.ceil(choice.memory_gb['host'] / 0.9):,} GB of host memory this would fit: {options}",
                        None,
                    )
                )
    fitting = [name for name, preset in PRESETS.items() if could_fit(Config(**preset), machine)]
    return "No choice for this model would fit: use a smaller --preset" + (
        f"; these fit: {' '.join(fitting)}" if fitting else ""
    ), None


def check_fits(c: Config, machine: Machine) -> None:
    """Raises OutOfMemory where the system would kill the process without a word: on a CPU that has not the predicted memory."""
    if machine.name:
        return
    _, sizes, choice = resolve_autos(c, machine)
    needed = sizes["total"] + sizes["host"]
    if choice and needed > machine.host_memory_gb:
        raise OutOfMemory(
            f"no memory for this run: {needed:.1f} GB are predicted and {machine.host_memory_gb:.1f} GB of this machine "
            f"are free.\n  {advise(choice, c, machine)[0]}; if the machine has more than the operating system reports, say "
            "so with --host_memory_gb."
        )
