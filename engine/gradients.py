"""The gradients of a training step on one GPU. engine/distributed.py has those of several."""

from torch import Tensor

from engine.offload import GradientOffload
from engine.precision import gradient_norms


class OwnGradients:
    """Sums a step's gradients in `.grad` of the parameters, or in host memory (`offload`).

    `owned` are the parameters that the optimizers update here: all of them. A trainer calls, in
    each step, `micro_batch` before each backward pass, `finish` after the last one, and `free` when
    the optimizers have read the gradients. engine.distributed.GradientReducer has these methods
    too.
    """

    def __init__(self, parameters: dict[str, Tensor], offload: GradientOffload):
        self.owned = parameters
        self.offload = offload

    def micro_batch(self, number: int, of: int) -> None:
        """The next backward pass is number `number`, from 0, of the step's `of`."""
        self.offload.micro_batch(number, of)

    def finish(self, _totals: dict, _passes: int) -> Tensor:
        """The norm of each parameter's gradient, fp32 [n]. One GPU has nothing to exchange."""
        return gradient_norms(list(self.owned.values()), self.offload.norms)

    def on_device(self) -> list[Tensor]:
        """The gradients that are in this device's memory."""
        gradients = [parameter.grad for parameter in self.owned.values()]
        return [gradient for gradient in gradients if gradient is not None]

    def free(self) -> None:
        for parameter in self.owned.values():
            parameter.grad = None
