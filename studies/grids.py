"""What each study runs: lists of changes to one base configuration, with the question that they answer.

A study is a function of (base configuration, tokens of a run, seeds, results so far) that returns all runs that it wants by
now: it may look at results to choose the next ones, and is done when it wants nothing new.
"""
import dataclasses
from dataclasses import dataclass

from config import Config


@dataclass(frozen=True)
class Run:
    """One training run. Runs of a `group` differ by their seed alone."""
    group: str
    changes: dict

    @property
    def label(self) -> str:
        return f"{self.group}, seed {self.changes['seed']}"


def runs(base: Config, group: str, tokens: float, seeds: list[int], **changes) -> list[Run]:
    """`group` with each seed, for as many steps as `tokens` make."""
    config = dataclasses.replace(base, **changes)
    steps = max(1, round(tokens / config.tokens_per_step))
    return [Run(group, changes | dict(max_steps=steps, seed=seed)) for seed in seeds]


def optimizer(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """Is Muon worth it? Muon with AdamW against AdamW alone: a sweep of the learning rate with one seed, then the best rate of
    each with the others."""
    wanted = []
    for name, field, rates in (("muon", "muon_lr", (0.005, 0.01, 0.02, 0.04)), ("adamw", "adamw_lr", (0.0005, 0.001, 0.002, 0.004))):
        sweep = {f"{name}, {field} {rate:g}": dict(optimizer=name) | {field: rate} for rate in rates}
        first = [run for group, changes in sweep.items() for run in runs(base, group, tokens, seeds[:1], **changes)]
        wanted += first
        if all(run.label in found for run in first):
            best = min(first, key=lambda run: found[run.label]["val_loss"]).group
            wanted += runs(base, best, tokens, seeds[1:], **sweep[best])
    return wanted


def routing(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """How many experts a token? k = 1 to 4 of 8 at equal tokens, and at the FLOPs of k = 2."""
    wanted, flops = [], dataclasses.replace(base, top_k=2, norm_topk_prob=True).flops_per_token * tokens
    for k in (1, 2, 3, 4):
        changes = dict(top_k=k, norm_topk_prob=k > 1)
        wanted += runs(base, f"top-{k}, equal tokens", tokens, seeds, **changes)
        if k != 2:
            wanted += runs(base, f"top-{k}, equal FLOPs", flops / dataclasses.replace(base, **changes).flops_per_token, seeds, **changes)
    return wanted


def balance(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """How much load balancing? Weights of the loss in either scope, none, and a bias instead."""
    wanted = runs(base, "none", tokens, seeds, load_balancing_weight=0.0)
    for scope in ("batch", "sequence"):
        for weight in (1e-4, 1e-3, 1e-2, 1e-1):
            wanted += runs(base, f"{scope}, weight {weight:g}", tokens, seeds, load_balancing_scope=scope, load_balancing_weight=weight)
    return wanted + runs(base, "bias", tokens, seeds, load_balancing="bias")


def scaling(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """MoE against dense: top-2 of 8 and dense of the same width and depth, at four sizes."""
    wanted = []
    for heads, layers in ((0.5, 0.5), (0.75, 0.75), (1.0, 1.0), (1.5, 1.25)):
        n_heads = max(1, round(base.n_heads * heads))
        size = dict(n_heads=n_heads, n_kv_heads=0, d_model=n_heads * base.head_dim, n_layers=max(1, round(base.n_layers * layers)),
                    d_ff=max(8, round(base.d_ff * heads / 8) * 8))
        size["d_model"] = max(8, round(size["d_model"] / 8) * 8)
        for kind, changes in (("dense", dict(num_experts=0)), ("moe", dict(num_experts=8, top_k=2))):
            wanted += runs(base, f"{kind}, {size['n_layers']} x {size['d_model']}", tokens, seeds, **size, **changes)
    return wanted


def checkpointing(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """What does activation checkpointing cost? Each mode at two depths, and at micro-batches that double until memory is out."""
    wanted = []
    for layers in (base.n_layers, 2 * base.n_layers):
        for mode in ("none", "selective", "full"):
            batch, total = max(1, base.batch_size // 4), base.sequences_per_step
            while batch <= total:
                [run] = runs(base, f"{mode}, {layers} layers, micro-batch {batch}", tokens / 20, seeds[:1], n_layers=layers,
                             activation_checkpointing=mode, batch_size=batch, gradient_accumulation_steps=total // batch)
                wanted.append(run)
                if found.get(run.label, {}).get("failed"):
                    break
                batch *= 2
    return wanted


STUDIES = dict(optimizer=optimizer, routing=routing, balance=balance, scaling=scaling, checkpointing=checkpointing)
