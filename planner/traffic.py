"""What several GPUs send each other in a step: bytes, and the seconds that these take.

All of it is predicted, from datasheets and from an experiment with two H200s.
"""

from dataclasses import dataclass

from config import Config
from planner.choice import Choice
from planner.machine import GB, GPUS, Machine
from planner.sharing import passes_of_a_rank
from planner.sizes import gradients, weights

# Share of a link's bandwidth that a collective of many megabytes reaches: an estimate. In an
# experiment with two H200s, which no result file holds, a reduce-scatter of 1.4 GB, of which half
# crosses the link, ran at 507 GB/s, which makes 254 of 450.
LINK_SHARE = 0.55
# GB/s that a GPU whose link is not known is planned with: PCIe of version 4.
USUAL_LINK_GB_S = 32
# GB/s of each GPU to other machines, one way (assumed: an adapter of 400 Gbit/s for each GPU).
NETWORK_GB_S = 50


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends in a step, in GB, and the seconds that it takes.

    Gradients and weights travel within a machine. Between machines the owners of the same rows sum
    their gradients, once a step.
    """

    gradients_gb: float
    gradient_seconds: float
    weights_gb: float
    weight_seconds: float
    machines_gb: float
    machine_seconds: float
    # Of the forward and backward passes' time, the share during which gradients travel.
    share_of_passes: float


def traffic_of_a_step(config: Config, choice: Choice, machine: Machine) -> Traffic:
    """The traffic of each GPU; all zero with one."""
    passes = passes_of_a_rank(choice.gradient_accumulation_steps, machine.ranks)
    reductions = 1
    share_of_passes = 1 / passes  # the last of them
    if choice.reduce_gradients == "micro_batch":
        reductions = passes
        share_of_passes = 1

    # In a reduce-scatter and in an all-gather each GPU sends what it does not own.
    sent = (machine.gpus - 1) / machine.gpus
    gradients_gb = reductions * sent * gradients(config) / GB
    weights_gb = sent * weights(config) / GB
    link_gb_s = LINK_SHARE * _link_gb_s(machine)

    # A sum over machines is a reduce-scatter and an all-gather of what a GPU owns.
    between = 2 * (machine.machines - 1) / machine.machines
    machines_gb = between * gradients(config) / machine.gpus / GB
    return Traffic(
        gradients_gb=gradients_gb,
        gradient_seconds=gradients_gb / link_gb_s,
        weights_gb=weights_gb,
        weight_seconds=weights_gb / link_gb_s,
        machines_gb=machines_gb,
        machine_seconds=machines_gb / NETWORK_GB_S,
        share_of_passes=share_of_passes,
    )


def _link_gb_s(machine: Machine) -> float:
    """GB/s of a GPU to the others of its machine, one way."""
    if machine.key is None:
        return USUAL_LINK_GB_S
    return GPUS[machine.key].link_gb_s
