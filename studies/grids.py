"""The studies: each is a question and a grid of runs that answers it.

A study is a function of (base configuration, tokens of a run, seeds, results so far). It returns
all runs that it wants, those that have a result included. It may look at the results to choose
further runs. The study is finished when every run that it wants has a result. The results are a
dict from a run's label to what studies.one_run.summary kept, or to {"failed": ...}.

To add a study, write the function and name it in STUDIES. Its figure and its table then show the
losses of its groups, under the first sentence of the function's docstring.

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
    """One training run of a study. Runs of a group differ in the seed alone."""

    group: str
    changes: dict  # fields of Config with other values than in the base
    alone: bool = False  # no other run of the study may run at the same time
    may_not_fit: bool = False  # running out of memory is a result, not an error
    analysed: bool = False  # studies.experts analyses its checkpoints after the training

    @property
    def label(self) -> str:
        return f"{self.group}, seed {self.changes['seed']}"


# --- runs

# A run that measures a speed has at most so many tokens, and at least and at most so many steps.
TIMED_TOKENS = 4e6
TIMED_STEPS = (5, 64)
# Each speed is measured in two rounds. The seed of a run is the number of its round.
REPEATS = (1, 2)


def changed(base: Config, group: str, changes: dict) -> tuple[dict, Config]:
    """The changes with those that they imply, and the changed configuration.

    Raises ConfigError for an impossible configuration; its message names the group.
    """
    if changes.get("top_k") == 1:
        # A base with a larger top_k divides the weights of a token's experts by their sum. With
        # top_k=1 the only weight would then always be 1, and the router would not learn.
        changes = dict(norm_topk_prob=False) | changes
    known = [field.name for field in dataclasses.fields(base)]
    for name in changes:
        if name not in known:
            raise ConfigError(f"{group}: Config has no {name}.{nearest(name, known)}")
    return changes, dataclasses.replace(base, **changes)


def runs(base: Config, group: str, tokens: float, seeds: list[int], **changes) -> list[Run]:
    """The runs of a group, one for each seed, of as many steps as read `tokens` tokens.

    Raises ConfigError for an impossible configuration.
    """
    changes, config = changed(base, group, changes)
    steps = max(1, round(tokens / config.tokens_per_step))
    wanted = []
    for seed in seeds:
        own = dict(max_steps=steps, seed=seed)
        wanted.append(Run(group, changes | own))
    return wanted


def speeds(base: Config, name: str, tokens: float, **changes) -> list[Run]:
    """Two runs of a few steps, alone on the machine, that measure tokens/s and memory.

    One run is not enough on a host that others use too: its speed differs more between two times of
    a day than between two steps of a run.
    """
    group = f"speed of {name}"
    changes, config = changed(base, group, changes)
    fewest_steps, most_steps = TIMED_STEPS
    steps = round(min(tokens, TIMED_TOKENS) / config.tokens_per_step)
    steps = max(steps, fewest_steps)
    steps = min(steps, most_steps)
    changes = changes | dict(
        max_steps=steps,
        log_every=1,
        eval_every=steps,
        eval_steps=1,
        save_minutes=0,
    )
    wanted = []
    for seed in REPEATS:
        own = dict(seed=seed)
        wanted.append(Run(group, changes | own, alone=True))
    return wanted


def in_rounds(timed: list[Run]) -> list[Run]:
    """The runs that measure speeds, sorted by round: first all of seed 1, then all of seed 2.

    The speed of a machine drifts with time. In this order the configurations of one round are
    measured at about the same time and can be compared. The two measurements of one configuration
    lie far apart, so their difference shows the drift.
    """
    return sorted(timed, key=lambda run: run.changes["seed"])


def sized(base: Config, factor: float) -> dict:
    """The changes that multiply the base's width and depth by a factor.

    The size of a head stays, as far as a width that is a multiple of 8 allows.
    """
    heads = max(1, round(base.n_heads * factor))
    layers = max(1, round(base.n_layers * factor))
    return dict(
        n_heads=heads,
        n_kv_heads=0,  # as many as n_heads
        d_model=_nearest_multiple(heads * base.head_dim, 8),
        n_layers=layers,
        d_ff=_nearest_multiple(base.d_ff * factor, _d_ff_unit(base)),
    )


def _d_ff_unit(base: Config) -> int:
    """What d_ff is a multiple of. A GPU is fastest at matmuls whose sizes are multiples of 64."""
    if base.d_ff >= 128:
        return 64
    return 8  # a tiny model could not be made smaller in steps of 64


def _nearest_multiple(number: float, unit: int) -> int:
    return max(unit, round(number / unit) * unit)


# --- optimizer

# Peak learning rates that a sweep tries first, and how many it tries at most
MUON_RATES = (0.01, 0.02, 0.04)
ADAMW_RATES = (0.001, 0.002, 0.004)
MOST_RATES = 6
# Warm-ups that AdamW alone tries beside the base's, as shares of the steps
LONG_WARMUPS = (0.2, 0.4, 0.6)
# Shares of the tokens for which Muon's shorter runs train
FRACTIONS = (0.25, 0.5)
# A group with this prefix has steps of a quarter of the batch.
QUARTER = "a quarter of the batch: "
# Its learning rates, times those that are best at the whole batch
QUARTER_RATES = (0.25, 0.5, 1, 2)


def quarter(base: Config) -> dict:
    """The changes that leave a step a quarter of its sequences; none if 4 does not divide them.

    The number of tokens between two validations stays the same. So does the validated text, which
    does not depend on the micro-batch.
    """
    # Both divisors together make 4. The number of micro-batches is divided first, by 4, 2 or 1: the
    # size of a micro-batch, which a GPU's speed depends on, is divided only by what is left.
    divisor_of_number = math.gcd(4, base.gradient_accumulation_steps)
    divisor_of_size = 4 // divisor_of_number
    if base.batch_size % divisor_of_size:
        return {}
    return dict(
        batch_size=base.batch_size // divisor_of_size,
        gradient_accumulation_steps=base.gradient_accumulation_steps // divisor_of_number,
        eval_every=4 * base.eval_every,
    )


def _optimizer_name(changes: dict) -> str:
    """The group of these changes, such as "muon, muon_lr 0.02, adamw_lr 0.002"."""
    name = changes["optimizer"]
    for field in ("muon_lr", "adamw_lr", "warmup_fraction"):
        if field in changes:
            name += f", {field} {changes[field]:g}"
    return name


class _Sweeps:
    """The sweeps of the optimizer study over learning rates and warm-ups, with the first seed.

    Each method adds the runs that it needs to `wanted` and returns what their results say. It
    returns None as long as one of these results is missing.
    """

    def __init__(self, base: Config, tokens: float, seed: int, found: dict[str, dict]):
        self.base = base
        self.tokens = tokens
        self.seed = seed
        self.found = found
        self.wanted: list[Run] = []

    def losses(self, tried: Iterable[dict], prefix: str = "") -> list[float] | None:
        """The final validation loss with each of the changes; inf where the run diverged."""
        labels = []
        for changes in tried:
            group = prefix + _optimizer_name(changes)
            (run,) = runs(self.base, group, self.tokens, [self.seed], **changes)
            labels.append(run.label)
            if run not in self.wanted:
                self.wanted.append(run)
        losses = []
        for label in labels:
            if label not in self.found:
                return None
            result = self.found[label]
            losses.append(result.get("val_loss", math.inf))
        return losses

    def best_rate(self, field: str, rates: Sequence[float], **changes) -> dict | None:
        """`changes` together with the best value of the learning rate `field`.

        While the lowest or the highest rate is the best one, the sweep continues beyond it, until
        it has tried MOST_RATES.
        """
        tried = sorted(rates)
        while True:
            sweep = [changes | {field: lr} for lr in tried]
            losses = self.losses(sweep)
            if losses is None:
                return None
            best = tried[losses.index(min(losses))]
            lowest = tried[0]
            highest = tried[-1]
            best_is_inside = lowest < best < highest
            if best_is_inside or len(tried) == MOST_RATES:
                return changes | {field: best}
            times = 2.0
            if best == lowest:
                times = 0.5
            # Two rates together, because one after the other would take twice as long.
            beyond = [best * times, best * times**2]
            left_to_try = MOST_RATES - len(tried)
            tried = sorted(tried + beyond[:left_to_try])

    def best_adamw(self) -> dict | None:
        """The best changes with AdamW alone. The warm-up is made longer as long as that helps."""
        best = self.best_rate("adamw_lr", ADAMW_RATES, optimizer="adamw")
        for warmup in LONG_WARMUPS:
            if best is None:
                return None
            # A longer warm-up may allow higher rates.
            rates = [times * best["adamw_lr"] for times in (1, 2, 4)]
            longer = self.best_rate(
                "adamw_lr",
                rates,
                optimizer="adamw",
                warmup_fraction=warmup,
            )
            if longer is None:
                return None
            losses = self.losses([best, longer])
            if losses is None:
                return None
            loss, loss_with_longer_warmup = losses
            if not loss_with_longer_warmup < loss:
                return best
            best = longer
        return best

    def best_muon(self) -> dict | None:
        """The best changes with Muon: first Muon's learning rate, then that of its AdamW.

        Muon updates the hidden matrices; AdamW updates the other parameters in the same run.
        """
        best = self.best_rate(
            "muon_lr",
            MUON_RATES,
            optimizer="muon",
            adamw_lr=ADAMW_RATES[1],
        )
        if best is None:
            return None
        return self.best_rate(
            "adamw_lr",
            ADAMW_RATES,
            optimizer="muon",
            muon_lr=best["muon_lr"],
        )

    def best_in_smaller_steps(self, best: dict) -> dict | None:
        """The best changes with a quarter of the batch; `best` are those of the whole batch.

        The best warm-up and learning rates may differ there, so several are tried.

        Returns None if a result is missing, or if the batch cannot be divided by 4.
        """
        quarter_batch = quarter(self.base)
        if not quarter_batch:
            return None
        tried = []
        for warmup in self._quarter_warmups(best):
            for factor in QUARTER_RATES:
                rates = _multiplied_rates(best, factor)
                tried.append(best | quarter_batch | warmup | rates)
        losses = self.losses(tried, prefix=QUARTER)
        if losses is None:
            return None
        return tried[losses.index(min(losses))]

    def _quarter_warmups(self, best: dict) -> list[dict]:
        """The changes of the warm-up that are tried with a quarter of the batch."""
        if "warmup_fraction" not in best:
            return [{}]  # the base's warm-up stays
        # With 4 times as many steps a shorter warm-up may suffice, so the shortest of the long ones
        # is tried beside the best one.
        fractions = {LONG_WARMUPS[0], best["warmup_fraction"]}
        return [dict(warmup_fraction=fraction) for fraction in sorted(fractions)]


def _multiplied_rates(changes: dict, factor: float) -> dict:
    """The learning rates of the changes, multiplied by one factor.

    One factor serves for both: a sweep over each rate would take too many runs.
    """
    rates = {}
    for field in ("muon_lr", "adamw_lr"):
        if field in changes:
            rates[field] = factor * changes[field]
    return rates


def optimizer(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """Is Muon worth it here?

    Muon with AdamW is compared with AdamW alone.

    The learning rates of each are swept with one seed: Muon's first, then that of the AdamW beside
    it. A sweep continues past its three rates if the best is the lowest or the highest. A short
    warm-up may hold AdamW back, so AdamW alone is tried with longer ones too, as long as they help.
    The best of each gets the other seeds.

    With how many tokens does Muon reach AdamW's loss? It also runs for a quarter and for half of
    the tokens, each with a whole schedule.

    Is Muon better because the steps are few? Both also run in 4 times as many steps of a quarter of
    the batch. There the best rates are multiplied by several factors, and AdamW is tried with the
    shortest of the long warm-ups too.
    """
    sweeps = _Sweeps(base, tokens, seeds[0], found)
    adamw = sweeps.best_adamw()
    muon = sweeps.best_muon()
    wanted = sweeps.wanted  # the sweeps add to this list too
    other_seeds = seeds[1:]
    for best in (adamw, muon):
        if best is None:  # its sweep has not finished
            continue
        wanted += runs(base, _optimizer_name(best), tokens, other_seeds, **best)
        best_of_quarter = sweeps.best_in_smaller_steps(best)
        if best_of_quarter is not None:
            group = QUARTER + _optimizer_name(best_of_quarter)
            wanted += runs(base, group, tokens, other_seeds, **best_of_quarter)
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
    flops_of_top_2 = top_2.flops_per_token * tokens
    timed = []
    wanted = []
    for k in (1, 2, 3, 4):
        # The base's norm_topk_prob was derived from its own top_k, so it is derived again. With
        # top_k=1 the only weight, divided by itself, would be 1, and the router would not learn.
        changes = size | dict(top_k=k, norm_topk_prob=k > 1)
        timed += speeds(base, f"top-{k}", tokens, **changes)
        wanted += runs(base, f"top-{k}, equal tokens", tokens, seeds, **changes)
        if k == 2:
            continue
        model = dataclasses.replace(base, **changes)
        equal_flops_tokens = flops_of_top_2 / model.flops_per_token
        wanted += runs(base, f"top-{k}, equal FLOPs", equal_flops_tokens, seeds, **changes)
    return wanted + in_rounds(timed)


WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the load-balancing loss


def balance(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """What is the best load-balancing weight?

    A load-balancing loss with several weights, over the batch and over each sequence, is compared
    with no balancing and with balancing by a bias on the router's scores. The models have two
    thirds of the base's width and depth.
    """
    size = sized(base, 2 / 3)
    changes = size | dict(load_balancing_weight=0.0)
    wanted = runs(base, "none", tokens, seeds, **changes)
    for scope in ("batch", "sequence"):
        for weight in WEIGHTS:
            changes = size | dict(
                load_balancing_scope=scope,
                load_balancing_weight=weight,
            )
            group = f"{scope}, weight {weight:g}"
            wanted += runs(base, group, tokens, seeds, **changes)
    changes = size | dict(load_balancing="bias")
    wanted += runs(base, "bias", tokens, seeds, **changes)
    return wanted


# --- specialization

KEPT_CHECKPOINTS = 6


def specialization(
    base: Config, tokens: float, seeds: list[int], found: dict[str, dict]
) -> list[Run]:
    """Do experts learn different patterns?

    The study counts which experts the tokens of the held-out text are sent to, by kind of token
    and by package, in every layer, before training and at six checkpoints.
    """
    wanted = []
    for run in runs(base, "top-2 of 8", tokens, seeds, num_experts=8, top_k=2):
        # Rounded up, so that there are KEPT_CHECKPOINTS at most, the one of the last step included.
        # The limit is one higher, so none of them is ever deleted.
        save_every = math.ceil(run.changes["max_steps"] / KEPT_CHECKPOINTS)
        changes = run.changes | dict(
            save_every=save_every,
            keep_checkpoints=KEPT_CHECKPOINTS + 1,
        )
        wanted.append(dataclasses.replace(run, analysed=True, changes=changes))
    return wanted


# --- scaling

SIZES = (1 / 3, 1 / 2, 3 / 4, 1)  # of the base's width and depth
EQUAL_TIME = ", equal time"  # how the group of a dense model ends that trains in the MoE's time


def scaling(base: Config, tokens: float, seeds: list[int], found: dict[str, dict]) -> list[Run]:
    """How does MoE scale compared with dense?

    Top-2 of 8 experts is compared with a dense model at four sizes and equal tokens. The dense
    model's feed-forward networks are twice as wide, so both have as many active parameters and
    FLOPs. The dense model also runs for as long as the MoE model takes: with more tokens, by the
    measured speeds.
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
        dense_speed = _tokens_per_second(dense_speeds, found)
        moe_speed = _tokens_per_second(moe_speeds, found)
        if dense_speed is not None and moe_speed is not None:
            equal_time_tokens = tokens * (dense_speed / moe_speed)
            longer += runs(base, f"dense, {name}{EQUAL_TIME}", equal_time_tokens, seeds, **dense)
    return wanted + in_rounds(timed) + longer


def _scaling_sizes(base: Config) -> dict[str, dict]:
    """The changes that make each size, by its name (layers x width).

    There are fewer than four if the base is so small that some of its sizes are rounded to one.
    Raises ConfigError if there is one only.
    """
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
    """The sum of the measured speeds, of which callers take a ratio; None if one is missing."""
    total = 0.0
    for run in timed:
        result = found.get(run.label)
        if not result or "failed" in result:
            return None
        total += result["tokens_per_second"]
    return total


# --- checkpointing

# The largest micro-batch that fits is searched among these multiples of the base's micro-batch. A
# run needs tokens for TIMED_STEPS[0] steps, so a multiple that is too large for that is left out.
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
MODES = ("none", "selective", "full")


# Cached: studies.run calls the study several times a second while runs are under way.
@functools.cache
def usable_gb(cpu: bool) -> float:
    """GB of this machine's GPU, or of its host, that a run may use."""
    return find_machine(cpu=cpu).usable_gb


class _MicroBatches:
    """The runs of the checkpointing study at one depth, and their results."""

    def __init__(self, base: Config, layers: int, tokens: float, found: dict[str, dict]):
        self.base = base
        self.layers = layers
        self.tokens = tokens
        self.found = found
        fewest_steps, _ = TIMED_STEPS
        most_sequences = tokens / fewest_steps / base.max_seq_len
        self.sizes = [base.batch_size]  # micro-batches to choose from, ascending
        for multiple in MULTIPLES[1:]:
            if base.batch_size * multiple <= most_sequences:
                self.sizes.append(base.batch_size * multiple)
        self.wanted: list[Run] = []
        self._runs: dict[tuple[str, int], list[Run]] = {}

    def at(self, mode: str, batch: int) -> list[Run]:
        """The runs of a mode at a micro-batch.

        A step keeps the base's number of sequences, or as many as whole micro-batches allow.
        """
        if (mode, batch) not in self._runs:
            sequences = self.base.sequences_per_step
            timed = speeds(
                self.base,
                f"{mode}, {self.layers} layers, micro-batch {batch}",
                self.tokens,
                n_layers=self.layers,
                activation_checkpointing=mode,
                batch_size=batch,
                offload_optimizer="false",
                gradient_accumulation_steps=max(1, sequences // batch),
            )
            may_not_fit = [dataclasses.replace(run, may_not_fit=True) for run in timed]
            self._runs[mode, batch] = may_not_fit
        return self._runs[mode, batch]

    def want(self, batch: int) -> None:
        """Adds the runs of every mode at a micro-batch to `wanted`."""
        for mode in MODES:
            self.wanted += self.at(mode, batch)

    def fits(self, mode: str, batch: int) -> bool | None:
        """Whether all runs so far of a mode at a micro-batch fitted; None if there is none yet."""
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
            memory = predict_memory(deep, mode, batch, offload=False, cpu=cpu)
            return memory["total"]

        # More sequences take more memory, so those that fit come first.
        fitting = bisect.bisect_right(self.sizes, usable, key=predicted_gb)
        return max(0, fitting - 1)

    def largest(self, mode: str) -> int | None:
        """The largest micro-batch that fits, 0 if none does, or None as long as it is not known.

        The search begins at the predicted micro-batch. It moves to larger ones as long as they fit,
        or to smaller ones until one fits. The runs that it needs are added to `wanted`.
        """
        index = self.predicted(mode)
        first_fits = self._try(mode, index)
        if first_fits is None:
            return None
        if first_fits:
            return self._largest_above(mode, index)
        return self._largest_below(mode, index)

    def _try(self, mode: str, index: int) -> bool | None:
        """Adds the runs at a micro-batch of `sizes` to `wanted`; returns whether it fits."""
        batch = self.sizes[index]
        self.wanted += self.at(mode, batch)
        return self.fits(mode, batch)

    def _largest_above(self, mode: str, index: int) -> int | None:
        """The last of `sizes` before the first that does not fit; the one at `index` fits.

        None as long as it is not known.
        """
        for larger in range(index + 1, len(self.sizes)):
            fits = self._try(mode, larger)
            if fits is None:
                return None
            if not fits:
                return self.sizes[larger - 1]
        return self.sizes[-1]  # all fit

    def _largest_below(self, mode: str, index: int) -> int | None:
        """The largest of `sizes` before `index` that fits; the one at `index` does not.

        0 if none fits, None as long as it is not known.
        """
        for smaller in reversed(range(index)):
            fits = self._try(mode, smaller)
            if fits is None:
                return None
            if fits:
                return self.sizes[smaller]
        return 0


def checkpointing(
    base: Config, tokens: float, seeds: list[int], found: dict[str, dict]
) -> list[Run]:
    """What does checkpointing cost?

    Each mode of activation checkpointing runs at two depths: with the base's micro-batch, and from
    the largest micro-batch that is predicted to fit until one fits and the next larger one does
    not. Then all modes run with the largest micro-batch that fits with each of them. What fits runs
    a second time, and counts as fitting if it fits both times.
    """
    wanted: list[Run] = []
    for layers in (base.n_layers, 2 * base.n_layers):
        search = _MicroBatches(base, layers, tokens, found)
        search.want(base.batch_size)
        largest = [search.largest(mode) for mode in MODES]
        fitting = [batch for batch in largest if batch]
        if len(fitting) == len(MODES):
            # The modes are compared here.
            search.want(min(fitting))
        wanted += search.wanted
    return _once_then_again(wanted, found)


def _once_then_again(wanted: list[Run], found: dict[str, dict]) -> list[Run]:
    """The runs of the first seed, then those of the second seed whose first run fitted.

    Each run is in the list once, even if it is wanted for two reasons. Runs of one depth and one
    micro-batch follow each other, because their modes are compared.
    """
    first_seed = REPEATS[0]
    fitted_once = set()
    for run in wanted:
        result = found.get(run.label)
        finished = result is not None and "failed" not in result
        if run.changes["seed"] == first_seed and finished:
            fitted_once.add(run.group)
    chosen = {}
    for run in wanted:
        if run.changes["seed"] == first_seed or run.group in fitted_once:
            chosen[run.label] = run

    def order(run: Run) -> list[int]:
        return [run.changes[field] for field in ("seed", "n_layers", "batch_size")]

    return sorted(chosen.values(), key=order)


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

# Tokens of a run, by study. Routing and scaling use the learning rates that the optimizer study
# finds best, so they have as many tokens. The runs of checkpointing measure speed and memory; only
# those with the largest micro-batches are as long as this.
TOKENS = dict.fromkeys(STUDIES, 16e6) | dict(specialization=50e6, checkpointing=12e6)
