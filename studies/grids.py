"""What each study runs: lists of changes to one base configuration, with the question that they answer.

A study is a function of (base configuration, tokens of a run, seeds, results so far) that returns all runs that it wants by now: it
may look at results to choose the next ones, and is done when it wants nothing new. Its name in STUDIES is all that it needs: it is
then drawn and told as its groups' losses, under its docstring's first sentence. How fast a configuration is, is measured in short
runs that have the machine for themselves, as small models wait for the host; the others may share a GPU.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

from config import Config, ConfigError, nearest
from planner.machine import find_machine
from planner.sizes import predict_memory


@dataclass(frozen=True)
class Run:
    """One training run. Runs of a `group` differ by their seed alone."""

    group: str
    changes: dict
    alone: bool = False  # nothing else of the study runs beside it
    may_not_fit: bool = False  # running out of memory is a result
    analysed: bool = False  # its checkpoints are kept and analysed by studies.experts

    @property
    def label(self) -> str:
        return f"{self.group}, seed {self.changes['seed']}"


TIMED_TOKENS, TIMED_STEPS = 4e6, (5, 64)  # of a speed, at most those of a run; steps within these
REPEATS = (1, 2)  # of a speed, the seeds


def changed(base: Config, group: str, changes: dict) -> tuple[dict, Config]:
    """The changes, with what they imply, and the configuration that they make. Raises ConfigError for an impossible one."""
    if (
        changes.get("top_k") == 1
    ):  # what the base derived from its own would keep the router from learning
        changes = dict(norm_topk_prob=False) | changes
    known = [field.name for field in dataclasses.fields(base)]
    if unknown := [name for name in changes if name not in known]:
        raise ConfigError(f"{group}: Config has no {unknown[0]}.{nearest(unknown[0], known)}")
    return changes, dataclasses.replace(base, **changes)


def runs(base: Config, group: str, tokens: float, seeds: list[int], **changes) -> list[Run]:
    """`group` with each seed, for as many steps as `tokens` make. Raises ConfigError for an impossible configuration."""
    changes, config = changed(base, group, changes)
    steps = max(1, round(tokens / config.tokens_per_step))
    return [Run(group, changes | dict(max_steps=steps, seed=seed)) for seed in seeds]


def speeds(base: Config, name: str, tokens: float, **changes) -> list[Run]:
    """A few steps of a configuration alone on the machine, twice: tokens/s and memory. A host that others use too is slower at one time
    than at another, by more than steps that follow each other differ."""
    fewest, most = TIMED_STEPS
    changes, config = changed(base, f"speed of {name}", changes)
    steps = min(most, max(fewest, round(min(tokens, TIMED_TOKENS) / config.tokens_per_step)))
    own = dict(max_steps=steps, log_every=1, eval_every=steps, eval_steps=1, save_minutes=0)
    return [
        Run(f"speed of {name}", changes | own | dict(seed=seed), alone=True) for seed in REPEATS
    ]


def in_rounds(timed: list[Run]) -> list[Run]:
    """Each once, then each again: what is compared runs at about the same time, what is repeated at another."""
    return sorted(timed, key=lambda run: run.changes["seed"])


def sized(base: Config, factor: float) -> dict:
    """The changes that make the base so many times as wide and as deep, with its head dimension."""
    unit = 64 if base.d_ff >= 128 else 8  # the GPU's products like multiples of 64
    heads = max(1, round(base.n_heads * factor))
    return dict(
        n_heads=heads,
        n_kv_heads=0,
        d_model=max(8, round(heads * base.head_dim / 8) * 8),
        n_layers=max(1, round(base.n_layers * factor)),
        d_ff=max(unit, round(base.d_ff * factor / unit) * unit),
    )


MUON_RATES, ADAMW_RATES = (0.01, 0.02, 0.04), (0.001, 0.002, 0.004)
MOST_RATES = 6
LONG_WARMUPS = (0.2, 0.4, 0.6)
FRACTIONS = (0.25, 0.5)
QUARTER, QUARTER_RATES = (
    "a quarter of the batch: ",
    (0.25, 0.5, 1, 2),
)  # the rates as shares of the best at the whole batch


def quarter(base: Config) -> dict:
    """The changes that make a step a quarter as long, and leave what is validated, and how often a token, as it is; none when the
    step's sequences cannot be divided so."""
    steps = math.gcd(4, base.gradient_accumulation_steps)
    batches = 4 // steps
    if base.batch_size % batches:
        return {}
    return dict(
        batch_size=base.batch_size // batches,
        gradient_accumulation_steps=base.gradient_accumulation_steps // steps,
        eval_steps=base.eval_steps * batches,
        eval_every=4 * base.eval_every,
    )


def optimizer(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """Is Muon worth it here? Muon with AdamW against AdamW alone: the learning rates of each are swept with one seed (Muon's first, then
    that of the AdamW beside it), on past the first three when the best is at an end; AdamW alone, which a short warm-up may hold
    back, also with longer ones, as long as they help; the best get the other seeds. Muon also for a quarter and half of the tokens, each
    with a whole schedule: with how many does it reach AdamW's loss? And both in 4 times as many steps of a quarter of the batch, at
    these rates, lower and higher ones, AdamW also with the shortest of the long warm-ups: is Muon better because the steps are few?"""
    wanted: list[Run] = []

    def name_of(changes: dict) -> str:
        return ", ".join(
            [
                changes["optimizer"],
                *(
                    f"{field} {changes[field]:g}"
                    for field in ("muon_lr", "adamw_lr", "warmup_fraction")
                    if field in changes
                ),
            ]
        )

    def losses(tried: dict[float, dict], of: str = "") -> dict[float, float] | None:
        """Wants a run with each of the changes, and returns where they ended when all have."""
        those = {
            rate: runs(base, of + name_of(changes), tokens, seeds[:1], **changes)[0]
            for rate, changes in tried.items()
        }
        wanted.extend(run for run in those.values() if run not in wanted)
        if not all(run.label in found for run in those.values()):
            return None
        return {
            rate: found[run.label].get("val_loss", math.inf) for rate, run in those.items()
        }  # inf: it diverged

    def sweep(field: str, rates: tuple[float, ...], **changes) -> dict | None:
        """Wants the runs of a sweep, and returns the changes with the best rate when that is known."""
        rates = list(rates)
        while True:
            ends = losses({rate: changes | {field: rate} for rate in sorted(rates)})
            if ends is None:
                return None
            best = min(ends, key=ends.get)
            if min(rates) < best < max(rates) or len(rates) == MOST_RATES:
                return changes | {field: best}
            times = (
                0.5 if best == min(rates) else 2
            )  # two at once, as each round takes as long as a run
            rates += [best * times, best * times**2][: MOST_RATES - len(rates)]

    def in_smaller_steps(best: dict) -> dict | None:
        """Wants the best of an optimizer in steps of a quarter, and returns the changes with which it did best there when that is known."""
        warmups = (
            [dict(warmup_fraction=w) for w in sorted({LONG_WARMUPS[0], best["warmup_fraction"]})]
            if "warmup_fraction" in best
            else [{}]
        )
        tried = [
            best
            | quarter(base)
            | warmup
            | {field: share * best[field] for field in ("muon_lr", "adamw_lr") if field in best}
            for warmup in warmups
            for share in QUARTER_RATES
            if quarter(base)
        ]
        ends = losses(dict(enumerate(tried)), QUARTER)
        return tried[min(ends, key=ends.get)] if ends else None

    adamw, longest = sweep("adamw_lr", ADAMW_RATES, optimizer="adamw"), None
    for warmup in LONG_WARMUPS:
        if (
            adamw is None or adamw.get("warmup_fraction") != longest
        ):  # not known yet, or a longer one did not help
            break
        rates = tuple(times * adamw["adamw_lr"] for times in (1, 2, 4))
        warmed = sweep("adamw_lr", rates, optimizer="adamw", warmup_fraction=warmup)
        ends = warmed and losses({0: adamw, 1: warmed})
        adamw, longest = ends and (adamw, warmed)[min(ends, key=ends.get)], warmup
    muon = sweep("muon_lr", MUON_RATES, optimizer="muon", adamw_lr=ADAMW_RATES[1])
    muon = muon and sweep(
        "adamw_lr",
        ADAMW_RATES,
        **{field: value for field, value in muon.items() if field != "adamw_lr"},
    )
    for changes in filter(None, (adamw, muon)):
        wanted += runs(base, name_of(changes), tokens, seeds[1:], **changes)
        if smaller := in_smaller_steps(changes):
            wanted += runs(base, QUARTER + name_of(smaller), tokens, seeds[1:], **smaller)
    if muon:
        wanted += [
            run
            for share in FRACTIONS
            for run in runs(base, f"muon, {share:g} of the tokens", tokens * share, seeds, **muon)
        ]
    return wanted + in_rounds(
        [run for name in ("muon", "adamw") for run in speeds(base, name, tokens, optimizer=name)]
    )


def routing(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """Is top-2 best, or top-1, top-3? k = 1 to 4 of 8 at equal tokens, and at the FLOPs of k = 2; two thirds of the base's width and depth."""
    size = sized(base, 2 / 3)
    base = dataclasses.replace(base, **size)
    flops = dataclasses.replace(base, top_k=2, norm_topk_prob=True).flops_per_token * tokens
    timed, wanted = [], []
    for k in (1, 2, 3, 4):
        changes = size | dict(
            top_k=k, norm_topk_prob=k > 1
        )  # the base's is decided already, for its own top_k
        timed += speeds(base, f"top-{k}", tokens, **changes)
        wanted += runs(base, f"top-{k}, equal tokens", tokens, seeds, **changes)
        if k != 2:
            wanted += runs(
                base,
                f"top-{k}, equal FLOPs",
                flops / dataclasses.replace(base, **changes).flops_per_token,
                seeds,
                **changes,
            )
    return wanted + in_rounds(timed)


WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1)


def balance(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """What is the best load-balancing weight? Weights of the loss in either scope, none, and a bias instead; two thirds of the base's width and
    depth."""
    size = sized(base, 2 / 3)
    wanted = runs(base, "none", tokens, seeds, **size, load_balancing_weight=0.0)
    for scope in ("batch", "sequence"):
        for weight in WEIGHTS:
            wanted += runs(
                base,
                f"{scope}, weight {weight:g}",
                tokens,
                seeds,
                **size,
                load_balancing_scope=scope,
                load_balancing_weight=weight,
            )
    return wanted + runs(base, "bias", tokens, seeds, **size, load_balancing="bias")


KEPT_CHECKPOINTS = 6


def specialization(
    base: Config, tokens: float, seeds: list[int], found: dict[str, dict]
) -> list[Run]:
    """Do experts learn different patterns? Which experts the held-out text's tokens go to, by kind and by package, in every
    layer, before training and at six checkpoints."""
    wanted = runs(base, "top-2 of 8", tokens, seeds, num_experts=8, top_k=2)
    every = math.ceil(wanted[0].changes["max_steps"] / KEPT_CHECKPOINTS)
    kept = dict(save_every=every, keep_checkpoints=KEPT_CHECKPOINTS + 1)
    return [dataclasses.replace(run, analysed=True, changes=run.changes | kept) for run in wanted]


SIZES = (1 / 3, 1 / 2, 3 / 4, 1)
EQUAL_TIME = ", equal time"


def scaling(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """How does MoE scale compared with dense? Top-2 of 8, and a dense model with feed-forward networks twice as wide, so that it has as many active
    parameters and FLOPs, at four sizes and equal tokens; and the dense one with as many tokens as take the MoE's time, by the speeds
    that were measured."""
    timed, wanted, longer = [], [], []
    sizes = {
        (size["n_layers"], size["d_model"]): size
        for size in (sized(base, factor) | dict(moe_every=1) for factor in SIZES)
    }
    if len(sizes) == 1:
        raise ConfigError(
            "this model is too small to have smaller ones of its shape: give a larger --preset, --n_layers or --n_heads"
        )
    for size in sizes.values():  # of a small base some are alike
        kinds = dict(
            dense=size | dict(num_experts=0, d_ff=2 * size["d_ff"]),
            moe=size | dict(num_experts=8, top_k=2),
        )
        name = f"{size['n_layers']} x {size['d_model']}"
        for kind, changes in kinds.items():
            timed += speeds(base, f"{kind}, {name}", tokens, **changes)
            wanted += runs(base, f"{kind}, {name}", tokens, seeds, **changes)
        dense, moe = (
            [found.get(run.label) for run in timed if run.group == f"speed of {kind}, {name}"]
            for kind in kinds
        )
        if all(dense + moe) and not any("failed" in run for run in dense + moe):
            more = sum(run["tokens_per_second"] for run in dense) / sum(
                run["tokens_per_second"] for run in moe
            )
            longer += runs(
                base, f"dense, {name}{EQUAL_TIME}", tokens * more, seeds, **kinds["dense"]
            )
    return wanted + in_rounds(timed) + longer


MULTIPLES = (
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
)  # of the base's micro-batch, among which the largest that fits is sought, as far as a run's tokens allow


@functools.cache  # a study asks what it wants several times a second, while speeds are measured
def usable_gb(cpu: bool) -> float:
    """Memory of this machine's GPU, or of its host, that a run may plan with."""
    return find_machine(cpu=cpu).usable_gb


def checkpointing(
    base: Config, tokens: float, seeds: list[int], found: dict[str, dict]
) -> list[Run]:
    """What does checkpointing cost? Each mode at two depths: at the base's micro-batch, from the largest that it is predicted to fit
    on, until one fits and the next does not, and at the largest that all fit; what fits once is tried again, and fits when it does both
    times."""
    usable, wanted, longest = (
        usable_gb(base.device == "cpu"),
        [],
        tokens / TIMED_STEPS[0] / base.max_seq_len,
    )
    sizes = [
        base.batch_size * multiple
        for multiple in MULTIPLES
        if multiple == 1 or base.batch_size * multiple <= longest
    ]
    for layers in (base.n_layers, 2 * base.n_layers):

        def at(mode: str, batch: int) -> list[Run]:
            runs = speeds(
                base,
                f"{mode}, {layers} layers, micro-batch {batch}",
                tokens,
                n_layers=layers,
                activation_checkpointing=mode,
                batch_size=batch,
                offload_optimizer="false",
                gradient_accumulation_steps=max(1, base.sequences_per_step // batch),
            )
            return [dataclasses.replace(run, may_not_fit=True) for run in runs]

        def predicted(mode: str) -> int:
            """The place in `sizes` of the largest micro-batch that should fit."""
            deep = dataclasses.replace(base, n_layers=layers)
            totals = [
                predict_memory(deep, mode, batch, offload=False, cpu=base.device == "cpu")["total"]
                for batch in sizes
            ]
            return max(0, sum(total <= usable for total in totals) - 1)

        def fits(mode: str, batch: int) -> bool | None:
            """None: it was not tried yet."""
            tried = [found[run.label] for run in at(mode, batch) if run.label in found]
            return all("failed" not in result for result in tried) if tried else None

        def largest(mode: str) -> int | None:
            """Wants what finds the largest micro-batch that fits, and returns it when it is known; 0 when none does."""
            place, step = predicted(mode), 0
            while 0 <= place < len(sizes):
                wanted.extend(at(mode, sizes[place]))
                if fits(mode, sizes[place]) is None:
                    return None
                towards = 1 if fits(mode, sizes[place]) else -1
                if step == -towards:  # it fits here and not there, or the other way round
                    return sizes[place if towards == 1 else place - 1]
                step, place = towards, place + towards
            return sizes[-1] if place > 0 else 0

        modes = "none", "selective", "full"
        wanted += [run for mode in modes for run in at(mode, base.batch_size)]
        most = [largest(mode) for mode in modes]
        if None not in most and min(most):  # where the three are compared
            wanted += [run for mode in modes for run in at(mode, min(most))]
    once = {
        run.group
        for run in wanted
        if run.changes["seed"] == REPEATS[0]
        and "failed" not in found.get(run.label, dict(failed="not run yet"))
    }
    wanted = [
        run
        for run in {run.label: run for run in wanted}.values()
        if run.changes["seed"] == REPEATS[0] or run.group in once
    ]
    return sorted(
        wanted, key=lambda run: [run.changes[field] for field in ("seed", "n_layers", "batch_size")]
    )  # what is compared, side by side


STUDIES = dict(
    optimizer=optimizer,
    routing=routing,
    balance=balance,
    specialization=specialization,
    scaling=scaling,
    checkpointing=checkpointing,
)

# Tokens of a run. Routing and scaling, which use the rates that the optimizer study finds best, have as many as that. checkpointing's
# runs measure speed and memory, and are this long with the largest micro-batches alone.
TOKENS = dict.fromkeys(STUDIES, 16e6) | dict(specialization=50e6, checkpointing=12e6)
