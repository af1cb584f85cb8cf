"""What training measures between two rows of metrics.jsonl."""

import math

import torch

from config import Config
from planner.machine import GPUS, Machine

# exp of more overflows a float: the perplexity of a run that diverges stays a number.
LARGEST_EXPONENT = 700.0


def perplexity(loss: float) -> float:
    return math.exp(min(loss, LARGEST_EXPONENT))


def mfu(config: Config, machine: Machine, tokens_per_second: float) -> float | None:
    """Model-FLOP utilisation: the share of the GPU's peak that the model's own FLOPs take.

    None on a GPU whose peak is not known: no number is shown rather than a wrong one.
    """
    if machine.key is None or config.precision == "fp32":
        return None
    gpu = GPUS[machine.key]
    return config.flops_per_token * tokens_per_second / (gpu.peak_tflops * 1e12)


class Interval:
    """Sums over the micro-batches since the last row of training metrics.

    The sums stay on the device, so that nobody waits for the GPU before `training_row` reads them.
    Means are weighted by sequences and not by micro-batches: a run may be resumed in the middle
    of an interval with another micro-batch.

    `sums` goes into checkpoints as it is. It holds the sums of the model's metrics, `sequences`,
    `seconds`, and of the last step `grad_norm` and, where there was one, `spike`.
    """

    def __init__(self, sums: dict | None = None):
        self.sums = sums or {}

    def add_micro_batch(self, metrics: dict[str, torch.Tensor], sequences: int) -> None:
        """Adds the metrics of a micro-batch of so many sequences."""
        for key, value in metrics.items():
            # These two are counts of tokens already; the others are means over the micro-batch.
            if key not in ("correct", "expert_counts"):
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
        """The means, as the first columns of a row of metrics. This waits for the GPU."""
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
        """Share of a layer's routed tokens that each of its experts received, by layer."""
        counts = self.sums["expert_counts"].double()
        shares = counts / counts.sum(1, keepdim=True)
        return [[round(share, 5) for share in layer] for layer in shares.tolist()]
