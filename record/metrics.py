"""What training measures between two rows of metrics.jsonl."""

import math

import torch

from config import Config
from planner.machine import GPUS, Machine

# exp of more than 709 overflows a float. With this limit the perplexity of a run that diverges
# stays a number.
LARGEST_EXPONENT = 700.0


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token."""
    return math.exp(min(loss, LARGEST_EXPONENT))


def mfu(config: Config, machine: Machine, tokens_per_second: float) -> float | None:
    """Model-FLOP utilisation: the model's FLOP/s over the GPU's peak FLOP/s in 16 bits, 0 to 1.

    Recomputed activations do not count. None on a GPU whose peak is not known, on a CPU and in
    fp32, whose peak is another: no number is better than a wrong one.
    """
    if machine.key is None or config.precision == "fp32":
        return None
    flops_per_second = config.flops_per_token * tokens_per_second
    peak_flops_per_second = GPUS[machine.key].peak_tflops * 1e12
    return flops_per_second / peak_flops_per_second


class Interval:
    """Sums of metrics over the micro-batches since the last row of training metrics.

    The sums stay on the device, so that the CPU does not wait for the GPU before `training_row`
    reads them. Means are weighted by sequences and not by micro-batches, because a run may be
    resumed in the middle of an interval with another micro-batch.

    `sums` goes into checkpoints as it is. Its keys are those of the model's metrics, and
    `sequences` and `seconds`. `grad_norm` is not a sum but the gradient norm of the last step, and
    `spike` has facts about it if it was unusually large.
    """

    def __init__(self, sums: dict | None = None):
        self.sums = sums or {}

    def add_micro_batch(self, metrics: dict[str, torch.Tensor], sequences: int) -> None:
        """Adds the metrics that the model returned for a micro-batch of `sequences` sequences."""
        for key, value in metrics.items():
            # These two are counts of tokens. The others are means over the micro-batch.
            is_count = key in ("correct", "expert_counts")
            if not is_count:
                value = value * sequences
            self._add(key, value)
        self._add("sequences", sequences)

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
        return self.sums["sequences"] * config.max_seq_len / self.sums["seconds"]

    def training_row(self, config: Config) -> dict:
        """The means of the interval, as the first columns of a row of metrics. Waits for the GPU.

        Losses are in nats per token; the accuracy is a share of the tokens.
        """
        sequences = self.sums["sequences"]
        tokens = sequences * config.max_seq_len
        loss = float(self.sums["cross_entropy"]) / sequences
        row = dict(
            train_loss=loss,
            train_perplexity=perplexity(loss),
            train_accuracy=float(self.sums["correct"]) / tokens,
        )
        if config.n_moe_layers:
            row["load_balancing_loss"] = float(self.sums["load_balancing_loss"]) / sequences
            row["router_z_loss"] = float(self.sums["router_z_loss"]) / sequences
            row["expert_load"] = self._expert_load()
        return row

    def _expert_load(self) -> list[list[float]]:
        """The share of a layer's routed tokens that each expert received: [MoE layers, experts]."""
        counts = self.sums["expert_counts"].double()
        shares = counts / counts.sum(1, keepdim=True)
        rounded = []
        for layer in shares.tolist():
            rounded.append([round(share, 5) for share in layer])
        return rounded
