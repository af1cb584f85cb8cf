"""Speeds of training: those that were measured, and predictions for other models and GPUs.

A prediction scales a measured rate of model FLOPs by the peaks of the two GPUs. It is an estimate:
the measured runs, predicted from each other, are off by less than 15% (see its tests).
The caller reads the result files; nothing here does. Several GPUs are predicted from the
time of one: forward and backward passes are divided by the GPUs of all machines, and the optimizer
step by those of a machine. What planner/traffic.py says is not hidden behind these comes on top.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from config import PRESETS, Config, optimizer_groups, parameter_table
from engine.ownership import update_cost
from planner.choice import Choice, relative_time
from planner.machine import GPUS, Machine
from planner.sharing import passes_of_a_rank
from planner.traffic import Traffic, traffic_of_a_step

# Seconds that a micro-batch takes in a block at least, however small both are: the CPU has to
# launch the kernels of forward and backward pass, and the optimizer's. Measured: 0.51 s for a step
# of `small` on an H100, which passes its 12 blocks 4 times
# (benchmarks/results/profile_small_bf16_h100.json).
LEAST_SECONDS_OF_A_BLOCK = 0.51 / (4 * 12)

# A speed holds for a configuration that has the preset's values of these fields, and its table of
# parameters: their shapes, and how many of them a token uses.
SPEED_FIELDS = ("max_seq_len", "optimizer", "master_weights", "deterministic")


@dataclass(frozen=True)
class MeasuredRun:
    """The measured speed of a preset."""

    preset: str
    precision: str
    gpu: str  # its name in GPUS
    tokens_per_second: float
    options: str | None  # that choose micro-batch, recomputation and offload; None if unknown
    gpus: int = 1  # of one machine

    def choice(self) -> Choice | None:
        """The choice that the options name; None for a run that names none."""
        if self.options is None:
            return None
        words = self.options.split()
        values = dict(zip(words[::2], words[1::2]))
        return Choice(
            batch_size=int(values["--batch_size"]),
            gradient_accumulation_steps=int(values["--gradient_accumulation_steps"]),
            activation_checkpointing=values["--activation_checkpointing"],
            lighter_blocks=int(values.get("--lighter_blocks", 0)),
            reduce_gradients=values.get("--reduce_gradients"),
            offload_optimizer=values["--offload_optimizer"] == "true",
            memory_gb={},
        )


@dataclass(frozen=True)
class PredictedSpeed:
    tokens_per_second: float  # of all GPUs together
    source: MeasuredRun  # whose rate it scales


def runs_of(
    config: Config, preset: str, machine: Machine, runs: Sequence[MeasuredRun]
) -> list[MeasuredRun]:
    """The runs on this GPU, or as many of them, that computed what `config` does in a step."""
    wanted = (preset, config.precision, machine.key, machine.gpus)
    found = []
    for run in runs:
        same = (run.preset, run.precision, run.gpu, run.gpus) == wanted and machine.machines == 1
        if same and _as_fast(config, Config(**PRESETS[preset])):
            found.append(run)
    return found


def _as_fast(config: Config, measured: Config) -> bool:
    """Whether a step of `config` computes what a step of `measured` does."""
    if parameter_table(config) != parameter_table(measured):
        return False
    return all(getattr(config, name) == getattr(measured, name) for name in SPEED_FIELDS)


def predict_speed(
    config: Config, choice: Choice, machine: Machine, runs: Sequence[MeasuredRun]
) -> PredictedSpeed | None:
    """The speed of `config` with this choice, from the nearest of the runs measured on one GPU.

    None on a CPU and on a GPU whose peak is not known, and where no run can be compared.
    """
    comparable = [run for run in runs if run.gpu in GPUS and run.gpus == 1 and run.choice()]
    if machine.key is None or not comparable:
        return None

    def distance(run: MeasuredRun) -> tuple:
        """First the size of the model counts, then the GPU, then the precision."""
        measured = _config_of(run)
        ratio = config.flops_per_token / measured.flops_per_token
        other_gpu = run.gpu != machine.key
        return abs(math.log(ratio)), other_gpu, run.precision != config.precision

    source = min(comparable, key=distance)
    flops_per_second = _unhindered_utilization(source) * _peak_flops(machine.key, config)
    seconds = config.tokens_per_step * config.flops_per_token / flops_per_second
    seconds *= relative_time(config, choice, machine.gpus)
    passes = passes_of_a_rank(choice.gradient_accumulation_steps, machine.ranks)
    if machine.ranks > 1:
        share = passes / choice.gradient_accumulation_steps  # of the step's micro-batches
        traffic = traffic_of_a_step(config, choice, machine)
        seconds = _seconds_with_several_gpus(seconds, share, config, source, machine, traffic)
    launches = passes * config.n_layers
    seconds = max(seconds, launches * LEAST_SECONDS_OF_A_BLOCK)
    return PredictedSpeed(config.tokens_per_step / seconds, source)


def _seconds_with_several_gpus(
    seconds_of_one: float,
    share: float,
    config: Config,
    source: MeasuredRun,
    machine: Machine,
    traffic: Traffic,
) -> float:
    """Seconds of a step, from those of one GPU; the slowest rank has `share` of its micro-batches.

    The rate of the source holds for its whole steps: a part of that time is the optimizer's, which
    does not grow with the tokens of a step. It is taken out, and put in again for this model.
    """
    source_config = _config_of(source)
    passes_of_source = _flops_of_passes(source_config)
    optimizer_of_source = _flops_of_optimizer(source_config)
    share_of_passes = passes_of_source / (passes_of_source + optimizer_of_source)
    passes = seconds_of_one * share_of_passes
    optimizer = passes * _flops_of_optimizer(config) / _flops_of_passes(config)

    passes *= share
    optimizer /= machine.gpus
    # Gradients travel during the passes, and weights while the optimizer works on the next ones.
    waits = max(0, traffic.gradient_seconds - traffic.share_of_passes * passes)
    waits += max(0, traffic.weight_seconds - optimizer)
    return passes + optimizer + waits + traffic.machine_seconds


def _flops_of_passes(config: Config) -> float:
    """FLOPs of a step's forward and backward passes."""
    return config.tokens_per_step * config.flops_per_token


def _flops_of_optimizer(config: Config) -> float:
    """FLOPs of an optimizer step: those that orthogonalize matrices (Muon); others are few.

    They run about as fast as those of the passes: in a step of 16.2 s of 18b on an H200, 1.93 s
    were measured, and this makes them 1.7 s.
    """
    table = parameter_table(config)
    multiplications = 0
    for group in optimizer_groups(config).values():
        if group.orthogonalizes:
            multiplications += sum(update_cost(table[name]) for name in group.parameters)
    return 2 * multiplications


def _unhindered_utilization(run: MeasuredRun) -> float:
    """Model-FLOP utilization that the run would have had without recomputation and offload, at its
    preset's micro-batch."""
    config = _config_of(run)
    choice = run.choice()
    assert choice is not None
    flops_per_second = run.tokens_per_second * config.flops_per_token
    return relative_time(config, choice) * flops_per_second / _peak_flops(run.gpu, config)


def _config_of(run: MeasuredRun) -> Config:
    return Config(**{**PRESETS[run.preset], "precision": run.precision})


def _peak_flops(gpu: str, config: Config) -> float:
    """FLOP/s of matmuls in the configuration's precision."""
    if config.precision == "fp32":
        return GPUS[gpu].peak_fp32_tflops * 1e12
    return GPUS[gpu].peak_tflops * 1e12
