"""What training measures between two rows of metrics.jsonl."""

import math

from torch import Tensor

from config import Config
from planner.machine import GPUS, Machine

# exp of more than 709 overflows a float. With this limit the perplexity of a run that diverges
# stays a number.
LARGEST_EXPONENT = 700.0

# Metrics of a micro-batch that count tokens. All others are means over the micro-batch.
COUNTS = ("correct", "expert_counts")


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token."""
    exponent = min(loss, LARGEST_EXPONENT)
    return math.exp(exponent)


def mfu(config: Config, machine: Machine, tokens_per_second: float) -> float | None:
    """Model-FLOP utilisation: the model's FLOP/s over the GPU's peak FLOP/s in 16 bits, 0 to 1.

    Recomputed activations do not count. None on a GPU whose peak is not known, on a CPU and in
    fp32, whose peak is another: no number is better than a wrong one.
    """
    if machine.key is None or config.precision == "fp32":
        return None
    gpu = GPUS[machine.key]
    peak_flops_per_second = gpu.peak_tflops * 1e12
    flops_per_second = config.flops_per_token * tokens_per_second
    return flops_per_second / peak_flops_per_second


class Interval:
    """Sums of metrics over the micro-batches since the last row of training metrics.

    The sums stay on the device, so that the CPU does not wait for the GPU before `training_row`
    reads them. Means are weighted by sequences and not by micro-batches, because a run may be
    resumed in the middle of an interval with another micro-batch.

    `sums` goes into checkpoints as it is. It holds the model's metrics under their own keys,
    `sequences` and `seconds`. Two of its values are no sums: `grad_norm` is the gradient norm of
    the last step, and `spike` has facts about the last norm that was unusually large.
    """

    def __init__(self, sums: dict | None = None):
        self.sums: dict = {}
        if sums is not None:
            self.sums = sums

    def add_micro_batch(self, metrics: dict[str, Tensor], sequences: int) -> None:
        """Adds the metrics that the model returned for a micro-batch of `sequences` sequences."""
        for key, value in metrics.items():
            if key not in COUNTS:
                value = value * sequences
            self._add(key, value)
        self._add("sequences", sequences)

    def add_loss(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch, auxiliary losses included. `pop_loss` takes it out."""
        self._add("loss", loss)

    def pop_loss(self) -> Tensor:
        """The sum of the losses over micro-batches, which is of no use after the step."""
        return self.sums.pop("loss")

    def add_step(self, step: "Interval") -> None:
        """Adds the sums of a step's micro-batches."""
        for key, value in step.sums.items():
            self._add(key, value)

    def add_seconds(self, seconds: float) -> None:
        self._add("seconds", seconds)

    def note_gradient_norm(self, norm: float) -> None:
        self.sums["grad_norm"] = norm

    def note_spike(self, **facts) -> None:
        self.sums["spike"] = facts

    def _add(self, key: str, value) -> None:
        if key in self.sums:
            value = self.sums[key] + value
        self.sums[key] = value

    def tokens_per_second(self, config: Config) -> float:
        seconds = self.sums["seconds"]
        return self._tokens(config) / seconds

    def _tokens(self, config: Config) -> int:
        return self.sums["sequences"] * config.max_seq_len

    def training_row(self, config: Config) -> dict:
        """The means of the interval, as the first columns of a row of metrics. Waits for the GPU.

        Losses are in nats per token; the accuracy is a share of the tokens.
        """
        loss = self._mean("cross_entropy")
        correct = float(self.sums["correct"])
        row: dict[str, float | list[list[float]]] = dict(
            train_loss=loss,
            train_perplexity=perplexity(loss),
            train_accuracy=correct / self._tokens(config),
        )
        if config.n_moe_layers:
            row["load_balancing_loss"] = self._mean("load_balancing_loss")
            row["router_z_loss"] = self._mean("router_z_loss")
            row["expert_load"] = self._expert_load()
        return row

    def _mean(self, key: str) -> float:
        """The mean over sequences of a metric that is no count."""
        total = float(self.sums[key])
        return total / self.sums["sequences"]

    def _expert_load(self) -> list[list[float]]:
        """The share of a layer's routed tokens that each expert received: [MoE layers, experts]."""
        counts = self.sums["expert_counts"].double()
        tokens_of_layer = counts.sum(1, keepdim=True)
        shares = counts / tokens_of_layer
        rounded = []
        for shares_of_layer in shares.tolist():
            rounded.append([round(share, 5) for share in shares_of_layer])
        return rounded
