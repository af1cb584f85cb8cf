"""The studies: each is a question and a grid of runs that answers it.

A study is a function of (base configuration, tokens of a run, seeds, results so far). It returns
all runs that it wants by now. It may look at the results to choose the next runs, and it is done
when it wants no run that has no result. To add one, write the function and name it in STUDIES:
its runs are then drawn and reported as the losses of their groups, under the first sentence of its
docstring.

The speed of a configuration is measured in short runs that have the machine for themselves, because
a small model waits for the host. Other runs may share a GPU.
"""

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from config import Config, ConfigError, nearest
from planner.machine import find_machine
from planner.sizes import predict_memory


@dataclass(frozen=True)
class Run:
    """One training run: `changes` to the base configuration. Runs of a group differ in the seed."""

    group: str
    changes: dict
    alone: bool = False  # no other run of the study runs at the same time
    may_not_fit: bool = False  # running out of memory is a result
    analysed: bool = False  # its checkpoints are kept, and studies.experts analyses them

    @property
    def label(self) -> str:
        return f"{self.group}, seed {self.changes['seed']}"


# --- runs

# A speed is measured over at most so many tokens, and over at least and at most so many steps.
TIMED_TOKENS = 4e6
TIMED_STEPS = (5, 64)
# It is measured twice, with these seeds.
REPEATS = (1, 2)


def changed(base: Config, group: str, changes: dict) -> tuple[dict, Config]:
    """The changes with what they imply, and the configuration that they make.

    Raises ConfigError for an impossible configuration.
    """
    if changes.get("top_k") == 1:
        # A base with a larger top_k normalizes the weights of its experts. The one weight of
        # top_k=1 would always be 1 then, and the router would not learn.
        changes = dict(norm_topk_prob=False) | changes
    known = [field.name for field in dataclasses.fields(base)]
    for name in changes:
        if name not in known:
            raise ConfigError(f"{group}: Config has no {name}.{nearest(name, known)}")
    return changes, dataclasses.replace(base, **changes)


def runs(base: Config, group: str, tokens: float, seeds: list[int], **changes) -> list[Run]:
    """The group with each seed, for as many steps as read `tokens` tokens.

    Raises ConfigError for an impossible configuration.
    """
    changes, config = changed(base, group, changes)
    steps = max(1, round(tokens / config.tokens_per_step))
    return [Run(group, changes | dict(max_steps=steps, seed=seed)) for seed in seeds]


def speeds(base: Config, name: str, tokens: float, **changes) -> list[Run]:
    """Two runs of a few steps, alone on the machine, that measure tokens/s and memory.

    Two, because a host that others use too is slower at one time than at another. That differs by
    more than steps that follow each other.
    """
    group = f"speed of {name}"
    changes, config = changed(base, group, changes)
    fewest, most = TIMED_STEPS
    steps = round(min(tokens, TIMED_TOKENS) / config.tokens_per_step)
    steps = min(most, max(fewest, steps))
    changes = changes | dict(
        max_steps=steps,
        log_every=1,
        eval_every=steps,
        eval_steps=1,
        save_minutes=0,
    )
    return [Run(group, changes | dict(seed=seed), alone=True) for seed in REPEATS]


def in_rounds(timed: list[Run]) -> list[Run]:
    """All runs once, and then all again.

    So configurations that are compared run at about the same time, and repetitions do not.
    """
    return sorted(timed, key=lambda run: run.changes["seed"])


def sized(base: Config, factor: float) -> dict:
    """The changes that multiply the base's width and depth by a factor; the head size stays."""
    # A GPU is fastest at matmuls whose sizes are multiples of 64.
    unit = 64 if base.d_ff >= 128 else 8
    heads = max(1, round(base.n_heads * factor))
    return dict(
        n_heads=heads,
        n_kv_heads=0,
        d_model=max(8, round(heads * base.head_dim / 8) * 8),
        n_layers=max(1, round(base.n_layers * factor)),
        d_ff=max(unit, round(base.d_ff * factor / unit) * unit),
    )


# --- optimizer

MUON_RATES = (0.01, 0.02, 0.04)
ADAMW_RATES = (0.001, 0.002, 0.004)
MOST_RATES = 6  # that a sweep tries
LONG_WARMUPS = (0.2, 0.4, 0.6)
FRACTIONS = (0.25, 0.5)  # of the tokens
QUARTER = "a quarter of the batch: "
QUARTER_RATES = (0.25, 0.5, 1, 2)  # of the learning rates that are best at the whole batch


def quarter(base: Config) -> dict:
    """The changes that make a step a quarter as long; none if its sequences cannot be divided so.

    The validated text, and how many tokens are between validations, stay the same.
    """
    # Fewer micro-batches first; what is missing to a quarter, by smaller micro-batches.
    fewer = math.gcd(4, base.gradient_accumulation_steps)
    smaller = 4 // fewer
    if base.batch_size % smaller:
        return {}
    return dict(
        batch_size=base.batch_size // smaller,
        gradient_accumulation_steps=base.gradient_accumulation_steps // fewer,
        eval_steps=base.eval_steps * smaller,
        eval_every=4 * base.eval_every,
    )


def _optimizer_name(changes: dict) -> str:
    name = changes["optimizer"]
    for field in ("muon_lr", "adamw_lr", "warmup_fraction"):
        if field in changes:
            name += f", {field} {changes[field]:g}"
    return name


class _Sweeps:
    """The sweeps of the optimizer study, each with the first seed.

    Each method adds the runs that it needs to `wanted`. It returns what follows from their results,
    or None as long as a result is missing.
    """

    def __init__(self, base: Config, tokens: float, seed: int, found: dict[str, dict]):
        self.base = base
        self.tokens = tokens
        self.seed = seed
        self.found = found
        self.wanted: list[Run] = []

    def losses(self, tried: Iterable[dict], prefix: str = "") -> list[float] | None:
        """The final validation losses with each of the changes."""
        found = []
        for changes in tried:
            group = prefix + _optimizer_name(changes)
            (run,) = runs(self.base, group, self.tokens, [self.seed], **changes)
            if run not in self.wanted:
                self.wanted.append(run)
            found.append(self.found.get(run.label))
        if any(result is None for result in found):
            return None
        return [result.get("val_loss", math.inf) for result in found]  # inf: it diverged

    def best_rate(self, field: str, rates: Sequence[float], **changes) -> dict | None:
        """The changes with the learning rate `field` at its best.

        While the best is the lowest or the highest one, the sweep continues beyond it.
        """
        tried = sorted(rates)
        while True:
            losses = self.losses(changes | {field: lr} for lr in tried)
            if losses is None:
                return None
            best = tried[losses.index(min(losses))]
            if tried[0] < best < tried[-1] or len(tried) == MOST_RATES:
                return changes | {field: best}
            times = 0.5 if best == tried[0] else 2
            # Two rates together, because one after the other would take twice as long.
            beyond = [best * times, best * times**2]
            tried = sorted(tried + beyond[: MOST_RATES - len(tried)])

    def best_adamw(self) -> dict | None:
        """AdamW alone at its best. Its warm-up gets longer as long as that helps."""
        best = self.best_rate("adamw_lr", ADAMW_RATES, optimizer="adamw")
        for warmup in LONG_WARMUPS:
            if best is None:
                return None
            rates = [times * best["adamw_lr"] for times in (1, 2, 4)]
            longer = self.best_rate("adamw_lr", rates, optimizer="adamw", warmup_fraction=warmup)
            if longer is None:
                return None
            losses = self.losses([best, longer])
            if losses is None:
                return None
            if not losses[1] < losses[0]:
                return best
            best = longer
        return best

    def best_muon(self) -> dict | None:
        """Muon at its best: first its own learning rate, then that of the AdamW beside it."""
        best = self.best_rate("muon_lr", MUON_RATES, optimizer="muon", adamw_lr=ADAMW_RATES[1])
        if best is None:
            return None
        return self.best_rate("adamw_lr", ADAMW_RATES, optimizer="muon", muon_lr=best["muon_lr"])

    def best_in_smaller_steps(self, best: dict) -> dict | None:
        """What is best in steps of a quarter, if `best` is best in whole ones."""
        smaller = quarter(self.base)
        if not smaller:
            return None
        warmups: list[dict] = [{}]
        if "warmup_fraction" in best:
            fractions = sorted({LONG_WARMUPS[0], best["warmup_fraction"]})
            warmups = [dict(warmup_fraction=fraction) for fraction in fractions]
        fields = [field for field in ("muon_lr", "adamw_lr") if field in best]
        tried = []
        for warmup in warmups:
            for share in QUARTER_RATES:
                rates = {field: share * best[field] for field in fields}
                tried.append(best | smaller | warmup | rates)
        losses = self.losses(tried, QUARTER)
        if losses is None:
            return None
        return tried[losses.index(min(losses))]


def optimizer(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """Is Muon worth it here?

    Muon with AdamW is compared with AdamW alone. The learning rates of each are swept with one
    seed: Muon's first, then that of the AdamW beside it. A sweep continues past its three rates
    if the best is the lowest or the highest. A short warm-up may hold AdamW back, so AdamW
    alone is tried with longer ones too, as long as they help. The best of each gets the other
    seeds. Muon also runs for a quarter and for half of the tokens, each with a whole schedule:
    with how many tokens does it reach AdamW's loss? And both run in 4 times as many steps of a
    quarter of the batch, at these rates and at lower and higher ones, AdamW also with the
    shortest of the long warm-ups: is Muon better because the steps are few?
    """
    sweeps = _Sweeps(base, tokens, seeds[0], found)
    adamw = sweeps.best_adamw()
    muon = sweeps.best_muon()
    wanted = sweeps.wanted
    for best in (adamw, muon):
        if best is None:
            continue
        wanted += runs(base, _optimizer_name(best), tokens, seeds[1:], **best)
        smaller = sweeps.best_in_smaller_steps(best)
        if smaller is not None:
            group = QUARTER + _optimizer_name(smaller)
            wanted += runs(base, group, tokens, seeds[1:], **smaller)
    if muon is not None:
        for share in FRACTIONS:
            group = f"muon, {share:g} of the tokens"
            wanted += runs(base, group, tokens * share, seeds, **muon)
    timed = []
    for name in ("muon", "adamw"):
        timed += speeds(base, name, tokens, optimizer=name)
    return wanted + in_rounds(timed)


# --- routing and balance


def routing(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """Is top-2 best, or top-1, top-3?

    Models with k = 1 to 4 of 8 experts are compared at equal tokens, and at the FLOPs of k = 2.
    They have two thirds of the base's width and depth.
    """
    size = sized(base, 2 / 3)
    base = dataclasses.replace(base, **size)
    top_2 = dataclasses.replace(base, top_k=2, norm_topk_prob=True)
    flops = top_2.flops_per_token * tokens
    timed = []
    wanted = []
    for k in (1, 2, 3, 4):
        # The base has decided norm_topk_prob already, for its own top_k.
        changes = size | dict(top_k=k, norm_topk_prob=k > 1)
        timed += speeds(base, f"top-{k}", tokens, **changes)
        wanted += runs(base, f"top-{k}, equal tokens", tokens, seeds, **changes)
        if k != 2:
            equal = flops / dataclasses.replace(base, **changes).flops_per_token
            wanted += runs(base, f"top-{k}, equal FLOPs", equal, seeds, **changes)
    return wanted + in_rounds(timed)


WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1)


def balance(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """What is the best load-balancing weight?

    The loss has several weights in either scope, or there is no such loss, or a bias instead.
    The models have two thirds of the base's width and depth.
    """
    size = sized(base, 2 / 3)
    wanted = runs(base, "none", tokens, seeds, **size, load_balancing_weight=0.0)
    for scope in ("batch", "sequence"):
        for weight in WEIGHTS:
            changes = dict(load_balancing_scope=scope, load_balancing_weight=weight)
            group = f"{scope}, weight {weight:g}"
            wanted += runs(base, group, tokens, seeds, **size, **changes)
    return wanted + runs(base, "bias", tokens, seeds, **size, load_balancing="bias")


# --- specialization

KEPT_CHECKPOINTS = 6


def specialization(
    base: Config, tokens: float, seeds: list[int], found: dict[str, dict]
) -> list[Run]:
    """Do experts learn different patterns?

    It counts which experts the tokens of the held-out text are sent to, by kind of token and by
    package, in every layer, before training and at six checkpoints.
    """
    wanted = runs(base, "top-2 of 8", tokens, seeds, num_experts=8, top_k=2)
    every = math.ceil(wanted[0].changes["max_steps"] / KEPT_CHECKPOINTS)
    kept = dict(save_every=every, keep_checkpoints=KEPT_CHECKPOINTS + 1)
    return [dataclasses.replace(run, analysed=True, changes=run.changes | kept) for run in wanted]


# --- scaling

SIZES = (1 / 3, 1 / 2, 3 / 4, 1)
EQUAL_TIME = ", equal time"


def scaling(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """How does MoE scale compared with dense?

    Top-2 of 8 experts is compared with a dense model at four sizes and equal tokens. The dense
    model's feed-forward networks are twice as wide, so both have as many active parameters and
    FLOPs. The dense model also runs with as many tokens as take the MoE's time, by the speeds
    that were measured.
    """
    timed = []
    wanted = []
    longer = []
    for name, size in _scaling_sizes(base).items():
        dense = size | dict(num_experts=0, d_ff=2 * size["d_ff"])
        moe = size | dict(num_experts=8, top_k=2)
        dense_speeds = speeds(base, f"dense, {name}", tokens, **dense)
        moe_speeds = speeds(base, f"moe, {name}", tokens, **moe)
        timed += dense_speeds + moe_speeds
        wanted += runs(base, f"dense, {name}", tokens, seeds, **dense)
        wanted += runs(base, f"moe, {name}", tokens, seeds, **moe)
        dense_rate = _tokens_per_second(dense_speeds, found)
        moe_rate = _tokens_per_second(moe_speeds, found)
        if dense_rate is not None and moe_rate is not None:
            equal = tokens * (dense_rate / moe_rate)
            longer += runs(base, f"dense, {name}{EQUAL_TIME}", equal, seeds, **dense)
    return wanted + in_rounds(timed) + longer


def _scaling_sizes(base: Config) -> dict[str, dict]:
    """The sizes by their names. Of a small base, some of the four are alike."""
    sizes = {}
    for factor in SIZES:
        size = sized(base, factor) | dict(moe_every=1)
        sizes[f"{size['n_layers']} x {size['d_model']}"] = size
    if len(sizes) == 1:
        raise ConfigError(
            "this model is too small to have smaller ones of its shape: give a larger --preset, "
            "--n_layers or --n_heads"
        )
    return sizes


def _tokens_per_second(timed: list[Run], found: dict[str, dict]) -> float | None:
    """The sum of the measured speeds; None if one is missing or failed."""
    total = 0.0
    for run in timed:
        result = found.get(run.label)
        if not result or "failed" in result:
            return None
        total += result["tokens_per_second"]
    return total


# --- checkpointing

# The largest micro-batch that fits is searched among these multiples of the base's micro-batch, as
# far as a run's tokens allow.
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MODES = ("none", "selective", "full")


# Cached, because runs are chosen several times a second while speeds are measured.
@functools.cache
def usable_gb(cpu: bool) -> float:
    """Memory of this machine's GPU, or of its host, that a run may plan with."""
    return find_machine(cpu=cpu).usable_gb


class _MicroBatches:
    """The runs of the checkpointing study at one depth, and their results."""

    def __init__(self, base: Config, layers: int, tokens: float, found: dict[str, dict]):
        self.base = base
        self.layers = layers
        self.tokens = tokens
        self.found = found
        longest = tokens / TIMED_STEPS[0] / base.max_seq_len
        self.sizes = [base.batch_size]
        for multiple in MULTIPLES[1:]:
            if base.batch_size * multiple <= longest:
                self.sizes.append(base.batch_size * multiple)
        self.wanted: list[Run] = []
        self._runs: dict[tuple[str, int], list[Run]] = {}

    def at(self, mode: str, batch: int) -> list[Run]:
        """The runs of a mode at a micro-batch. The batch of a step stays as large as it can."""
        if (mode, batch) not in self._runs:
            timed = speeds(
                self.base,
                f"{mode}, {self.layers} layers, micro-batch {batch}",
                self.tokens,
                n_layers=self.layers,
                activation_checkpointing=mode,
                batch_size=batch,
                offload_optimizer="false",
                gradient_accumulation_steps=max(1, self.base.sequences_per_step // batch),
            )
            self._runs[mode, batch] = [dataclasses.replace(run, may_not_fit=True) for run in timed]
        return self._runs[mode, batch]

    def want(self, batch: int) -> None:
        for mode in MODES:
            self.wanted += self.at(mode, batch)

    def fits(self, mode: str, batch: int) -> bool | None:
        """Whether each run so far fits; None if there was none yet."""
        results = []
        for run in self.at(mode, batch):
            if run.label in self.found:
                results.append(self.found[run.label])
        if not results:
            return None
        return all("failed" not in result for result in results)

    def predicted(self, mode: str) -> int:
        """The index in `sizes` of the largest micro-batch that is predicted to fit, or 0."""
        cpu = self.base.device == "cpu"
        usable = usable_gb(cpu)
        deep = dataclasses.replace(self.base, n_layers=self.layers)

        def predicted_gb(batch: int) -> float:
            return predict_memory(deep, mode, batch, offload=False, cpu=cpu)["total"]

        # More sequences take more memory, so those that fit come first.
        fitting = bisect.bisect_right(self.sizes, usable, key=predicted_gb)
        return max(0, fitting - 1)

    def largest(self, mode: str) -> int | None:
        """The largest micro-batch that fits, 0 if none does, or None as long as it is not known.

        The search begins at the predicted one. It moves to larger ones as long as they fit, or to
        smaller ones until one fits. The runs that it needs are added to `wanted`.
        """
        index = self.predicted(mode)
        fitted_before = None
        while 0 <= index < len(self.sizes):
            batch = self.sizes[index]
            self.wanted += self.at(mode, batch)
            fits = self.fits(mode, batch)
            if fits is None:
                return None
            if fits and fitted_before is False:  # a larger one did not fit
                return batch
            if not fits and fitted_before:
                return self.sizes[index - 1]
            fitted_before = fits
            index += 1 if fits else -1
        return self.sizes[-1] if fitted_before else 0


def checkpointing(
    base: Config, tokens: float, seeds: list[int], found: dict[str, dict]
) -> list[Run]:
    """What does checkpointing cost?

    Each mode runs at two depths: at the base's micro-batch, and from the largest micro-batch
    that is predicted to fit until one fits and the next one does not. Then all modes run at the
    largest one that fits with each of them. What fits once runs again, and it fits if it does
    both times.
    """
    wanted: list[Run] = []
    for layers in (base.n_layers, 2 * base.n_layers):
        search = _MicroBatches(base, layers, tokens, found)
        search.want(base.batch_size)
        largest = [search.largest(mode) for mode in MODES]
        known = [batch for batch in largest if batch]
        if len(known) == len(MODES):
            search.want(min(known))  # where the modes are compared
        wanted += search.wanted
    return _once_then_again(wanted, found)


def _once_then_again(wanted: list[Run], found: dict[str, dict]) -> list[Run]:
    """Each run with the first seed, then those that fit with the second one too.

    What is compared runs side by side. A run that is wanted for two reasons is returned once.
    """
    fit_once = set()
    for run in wanted:
        result = found.get(run.label)
        first = run.changes["seed"] == REPEATS[0]
        if first and result is not None and "failed" not in result:
            fit_once.add(run.group)
    chosen = {}
    for run in wanted:
        if run.changes["seed"] == REPEATS[0] or run.group in fit_once:
            chosen[run.label] = run
    order = ("seed", "n_layers", "batch_size")
    return sorted(chosen.values(), key=lambda run: [run.changes[field] for field in order])


# --- all studies

Study = Callable[[Config, float, list[int], dict[str, dict]], list[Run]]

STUDIES: dict[str, Study] = dict(
    optimizer=optimizer,
    routing=routing,
    balance=balance,
    specialization=specialization,
    scaling=scaling,
    checkpointing=checkpointing,
)

# Tokens of a run. Routing and scaling use the learning rates that the optimizer study finds best,
# so they have as many tokens. The runs of checkpointing measure speed and memory; only those with
# the largest micro-batches are as long as this.
TOKENS = dict.fromkeys(STUDIES, 16e6) | dict(specialization=50e6, checkpointing=12e6)
