"""The statistics of a study's results: means of groups, significance over seeds, fitted laws.

The figure and the tables of a study are made from these numbers. Nothing is read or written here.
Losses are in nats per token.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import studentized_range
from scipy.stats import t as student

from config import Config, parse_value, resolve
from studies.grids import EQUAL_TIME

# A group of runs with this prefix only measured speed.
SPEED = "speed of "

# The runs of one group, as results.json has them. They differ in their seed alone.
Runs = list[dict]
# Groups by their name, or another description of what their runs have in common
Groups = dict[str, Runs]

# ---------------------------------------------------------------- groups of runs


def base_config(results: dict) -> Config:
    """The configuration that the study's runs change."""
    words = results["options"]  # such as --preset small --batch_size 64
    preset = None
    options = {}
    for option, text in zip(words[::2], words[1::2]):
        name = option.removeprefix("--")
        if name == "preset":
            preset = text
        else:
            options[name] = parse_value(name, text)
    config, _, _ = resolve(options, preset, None)
    return config


def groups(results: dict) -> Groups:
    """The runs by group, in the order of the study.

    Failed runs are left out, and so are those that only measured a speed.
    """
    trained = []
    for run in results["runs"].values():
        if not measured_speed(run):
            trained.append(run)
    return _by_group(trained)


def timed(results: dict) -> Groups:
    """The runs that measured a speed, by the configuration that they measured.

    Failed runs are left out.
    """
    measured = []
    for run in results["runs"].values():
        if measured_speed(run):
            measured.append(run)
    by_configuration = {}
    for group, runs in _by_group(measured).items():
        configuration = group.removeprefix(SPEED)
        by_configuration[configuration] = runs
    return by_configuration


def measured_speed(run: dict) -> bool:
    """Whether the run only measured a speed. Its loss is of a few steps and says nothing."""
    return run["group"].startswith(SPEED)


def _by_group(runs: list[dict]) -> Groups:
    found: Groups = {}
    for run in runs:
        if "failed" in run:
            continue
        group = found.setdefault(run["group"], [])
        group.append(run)
    return found


def mean(runs: Runs, key: str = "val_loss") -> float:
    """The mean over seeds."""
    average, _ = mean_and_spread(runs, key)
    return average


def mean_and_spread(runs: Runs, key: str = "val_loss") -> tuple[float, float]:
    """The mean over seeds, and the largest value minus the smallest."""
    values = [run[key] for run in runs]
    average = sum(values) / len(values)
    spread = max(values) - min(values)
    return average, spread


# ---------------------------------------------------------------- significance over seeds


def _pooled_deviation(samples: Iterable[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation within several samples, and its degrees of freedom.

    All samples are taken to have the same deviation. It is inf if no sample has two values.
    """
    sum_of_squares = 0.0
    degrees_of_freedom = 0
    for values in samples:
        size = len(values)
        if size < 2:
            continue
        # np.var divides the sum of squares by the size.
        sum_of_squares += float(np.var(values)) * size
        degrees_of_freedom += size - 1
    if not degrees_of_freedom:
        return math.inf, 0
    variance = sum_of_squares / degrees_of_freedom
    return math.sqrt(variance), degrees_of_freedom


def seed_deviation(found: Groups, key: str = "val_loss") -> float:
    """The standard deviation over seeds, pooled over all groups; inf without a group of two."""
    samples = []
    for runs in found.values():
        samples.append([run[key] for run in runs])
    deviation, _ = _pooled_deviation(samples)
    return deviation


def tukey_hsd(found: Groups, key: str = "val_loss") -> float:
    """Tukey's honestly significant difference (1949) at the 5% level, for means of one seed each.

    Two groups differ significantly when their means differ by more than this, divided by the square
    root of the number of seeds; `tukey_kramer` divides. The test is among all groups with several
    seeds. The result is inf if there are no two such groups.
    """
    group_sizes = []
    for runs in found.values():
        if len(runs) > 1:
            group_sizes.append(len(runs))
    num_groups = len(group_sizes)
    if num_groups < 2:
        return math.inf
    degrees_of_freedom = sum(group_sizes) - num_groups
    quantile = _studentized_range(num_groups, degrees_of_freedom)
    return quantile * seed_deviation(found, key)


# Cached, because scipy integrates numerically.
@functools.cache
def _studentized_range(num_groups: int, degrees_of_freedom: int) -> float:
    return float(studentized_range.ppf(0.95, num_groups, degrees_of_freedom))


def tukey_kramer(a: Runs, b: Runs, hsd: float) -> float:
    """The smallest significant difference between the means of these two groups.

    `hsd` is what tukey_hsd returned. Kramer's form (1956) allows groups of unequal size.
    """
    sum_of_inverse_sizes = 1 / len(a) + 1 / len(b)
    mean_of_inverse_sizes = sum_of_inverse_sizes / 2
    return hsd * math.sqrt(mean_of_inverse_sizes)


def typical_resolution(found: Groups) -> float:
    """The smallest significant difference between two groups of the study.

    Both have as many seeds as the study's first group with several seeds. It is inf without one.
    """
    for runs in found.values():
        if len(runs) > 1:
            return tukey_kramer(runs, runs, tukey_hsd(found))
    return math.inf


def mean_difference(pairs: list[tuple[Runs, Runs]]) -> tuple[float, float]:
    """The mean of (first loss - second loss) over pairs of groups, and half its 95% interval.

    The interval is Welch's (1947): the first groups have one deviation over seeds, and the second
    groups have another. It is inf if all groups of one side have a single seed.
    """
    differences = [mean(first) - mean(second) for first, second in pairs]
    difference = sum(differences) / len(pairs)
    a = _variance_of_mean([first for first, _ in pairs])
    b = _variance_of_mean([second for _, second in pairs])
    if not a.degrees_of_freedom or not b.degrees_of_freedom:
        return difference, math.inf
    variance = a.variance + b.variance
    if not variance:
        return difference, 0.0

    # The degrees of freedom of a sum of two variances, by Welch and Satterthwaite
    a_uncertainty = a.variance**2 / a.degrees_of_freedom
    b_uncertainty = b.variance**2 / b.degrees_of_freedom
    degrees_of_freedom = variance**2 / (a_uncertainty + b_uncertainty)
    quantile = float(student.ppf(0.975, degrees_of_freedom))
    return difference, quantile * math.sqrt(variance)


class _Variance(NamedTuple):
    variance: float
    degrees_of_freedom: int


def _variance_of_mean(side: Sequence[Runs]) -> _Variance:
    """The variance of the mean loss of several groups, by the seeds of all of them."""
    losses = []
    for runs in side:
        losses.append([run["val_loss"] for run in runs])
    deviation, degrees_of_freedom = _pooled_deviation(losses)
    # The mean of a group of n seeds has the variance deviation^2 / n. The mean of m such means has
    # their sum over m^2.
    sum_of_inverse_sizes = sum(1 / len(runs) for runs in side)
    num_groups = len(side)
    variance = deviation**2 * sum_of_inverse_sizes / num_groups**2
    return _Variance(variance, degrees_of_freedom)


# ---------------------------------------------------------------- speeds


def speed_ratios(a: Runs, b: Runs) -> list[dict]:
    """The speed of `a` over the speed of `b`, in each round of measurements that has both.

    Returned as runs with the value `ratio`. The seed of a run is the number of its round.
    """
    b_in_round = {run["changes"]["seed"]: run for run in b}
    ratios = []
    for run in a:
        other = b_in_round.get(run["changes"]["seed"])
        if other is None:
            continue
        ratio = run["tokens_per_second"] / other["tokens_per_second"]
        ratios.append(dict(ratio=ratio))
    return ratios


def ratio_error(measurements: list[list[dict]]) -> float:
    """Half the 95% interval (Student's) of a mean speed ratio, relative to it: 0.02 is 2%.

    `measurements` has the `speed_ratios` of each size. Their deviation is pooled over the sizes;
    the result is for the size with the fewest rounds, and inf if no size has two.
    """
    # The deviation of a logarithm is a relative one.
    logarithms = []
    for ratios in measurements:
        logarithms.append(np.log([run["ratio"] for run in ratios]))
    deviation, degrees_of_freedom = _pooled_deviation(logarithms)
    if not degrees_of_freedom:
        return math.inf
    quantile = float(student.ppf(0.975, degrees_of_freedom))
    fewest_rounds = min(len(ratios) for ratios in measurements)
    return quantile * deviation / math.sqrt(fewest_rounds)


# ---------------------------------------------------------------- the optimizer study


def swept(found: Groups, optimizer: str) -> list[Runs]:
    """The groups of an optimizer's sweep over learning rates.

    `optimizer` is "muon" or "adamw" for the sweep at the whole batch. With the prefix QUARTER it is
    the sweep at a quarter of the batch.
    """
    sweep = []
    for group, runs in found.items():
        if group.startswith(f"{optimizer}, ") and "_lr" in group:
            sweep.append(runs)
    return sweep


def best_runs(found: Groups, optimizer: str) -> Runs:
    """The group that the sweep chose: the one whose first seed ends with the lowest loss.

    Only the first seed counts, because the sweep has no other: the rest of the seeds follow for the
    best group alone.
    """

    def first_loss(runs: Runs) -> float:
        return runs[0]["val_loss"]

    return min(swept(found, optimizer), key=first_loss)


def shorter(found: Groups) -> list[Runs]:
    """The groups of Muon that trained on a part of the tokens, the shortest first."""
    fewer = []
    for group, runs in found.items():
        if "of the tokens" in group:
            fewer.append(runs)
    return sorted(fewer, key=lambda runs: runs[0]["tokens"])


# ---------------------------------------------------------------- the checkpointing study

# Number of layers, and mode of activation checkpointing.
LayersAndMode = tuple[int, str]


class MicroBatches(NamedTuple):
    """Which micro-batches (sequences) fitted into memory, by layers and mode."""

    fitted: dict[LayersAndMode, dict[int, Runs]]  # the runs by micro-batch
    too_large: dict[LayersAndMode, int]  # the smallest micro-batch that ran out of memory


def micro_batches(results: dict) -> MicroBatches:
    """A micro-batch that fitted in one of two runs only counts as one that did not fit."""
    too_large: dict[LayersAndMode, int] = {}
    for run in results["runs"].values():
        if run.get("failed") == "out of memory":
            key = _layers_and_mode(run)
            micro_batch = run["changes"]["batch_size"]
            smallest = too_large.get(key, micro_batch)
            too_large[key] = min(micro_batch, smallest)

    fitted: dict[LayersAndMode, dict[int, Runs]] = {}
    for runs in timed(results).values():
        key = _layers_and_mode(runs[0])
        micro_batch = runs[0]["changes"]["batch_size"]
        if micro_batch < too_large.get(key, math.inf):
            runs_at = fitted.setdefault(key, {})
            runs_at[micro_batch] = runs
    return MicroBatches(fitted, too_large)


def _layers_and_mode(run: dict) -> LayersAndMode:
    changes = run["changes"]
    return changes["n_layers"], changes["activation_checkpointing"]


# ---------------------------------------------------------------- the scaling study

# Laws that are drawn for an interval. More than some thousands do not change its second digit.
DRAWS = 4000


@dataclass
class ScalingLaw:
    """y = floor + rise * (x / centre)^-exponent: Hoffmann et al. (2022), equation 2.

    y is a loss in nats per token and x a size of the model. Equation 2 has a term for the number of
    tokens as well. That number is fixed here, so its term is a part of the floor.

    `centre` is the geometric mean of the fitted x, so `rise` is how far a typical model is above
    the floor.
    """

    floor: float
    rise: float
    exponent: float
    centre: float
    covariance: np.ndarray  # [3, 3] of floor, rise and exponent

    @property
    def errors(self) -> np.ndarray:
        """The standard errors of floor, rise and exponent."""
        return np.sqrt(np.diag(self.covariance))

    def at(self, x):
        """The value of the law at a number or at each of an array."""
        relative_x = np.asarray(x, float) / self.centre
        power = relative_x**-self.exponent
        return self.floor + self.rise * power

    def error_at(self, x: float) -> float:
        """The standard error of `at(x)`, to first order (the delta method)."""
        relative_x = x / self.centre
        power = relative_x**-self.exponent
        slope_of_exponent = -self.rise * power * math.log(relative_x)
        # The derivatives of `at(x)` by floor, rise and exponent
        slopes = np.array([1, power, slope_of_exponent])
        variance = slopes @ self.covariance @ slopes
        return math.sqrt(variance)

    def inverse(self, y: float) -> float:
        """The x at which the law has the value y; inf at the floor and below."""
        if y <= self.floor:
            return math.inf
        power = (y - self.floor) / self.rise
        log_of_power = math.log(power)
        log_x = math.log(self.centre) - log_of_power / self.exponent
        if log_x >= 700:  # exp would overflow
            return math.inf
        return math.exp(log_x)

    def inverse_between(self, y: float, error: float) -> tuple[float, float]:
        """The 95% interval of `inverse(y)`, from the law's covariance and the standard error of y.

        A parametric bootstrap: DRAWS laws and values of y are drawn from normal distributions, and
        the interval holds 95% of their inverses.

        In simulated studies with two points at each of four sizes, 95% of these intervals contain
        the true x (tests/studies/test_report.py). Student's t in place of the normal distribution
        makes them too wide: then nearly all contain it.
        """
        random = np.random.default_rng(0)
        fitted = (self.floor, self.rise, self.exponent)
        laws = random.multivariate_normal(fitted, self.covariance, DRAWS)
        ys = random.normal(y, error, DRAWS)
        inverses = []
        for (floor, rise, exponent), drawn_y in zip(laws, ys):
            # A law that does not fall with x has no inverse.
            if rise <= 0 or exponent <= 0:
                continue
            law = dataclasses.replace(
                self,
                floor=floor,
                rise=rise,
                exponent=exponent,
            )
            inverses.append(law.inverse(drawn_y))
        # "nearest" takes one of the inverses. Interpolation between a number and inf gives NaN.
        low, high = np.percentile(inverses, (2.5, 97.5), method="nearest")
        return float(low), float(high)


def scaling_law(x: list[float], y: list[float]) -> ScalingLaw | None:
    """Fits the law to the points by least squares.

    Returns None when the points do not determine it. That is so with fewer than three different x
    or fewer than four points, as the law has three parameters. It is also so when no law fits
    whose exponent is above twice its standard error.
    """
    if len(set(x)) < 3 or len(x) < 4:
        return None
    mean_log_x = np.mean(np.log(x))
    centre = math.exp(mean_log_x)

    def law(x, floor, rise, exponent):
        return floor + rise * (x / centre) ** -exponent

    # The search starts with a floor a little below the lowest point, and with a rise that gives the
    # mean of all points at the centre.
    lowest = min(y)
    first_floor = lowest - 0.1
    first_rise = np.mean(y) - lowest + 0.1
    first_exponent = 0.5
    start = (first_floor, first_rise, first_exponent)
    with warnings.catch_warnings():
        # scipy warns when it cannot estimate the covariance.
        warnings.simplefilter("error", OptimizeWarning)
        try:
            fit, covariance = curve_fit(
                law,
                np.array(x),
                np.array(y),
                p0=start,
                maxfev=10_000,
            )
        except (RuntimeError, OptimizeWarning):
            return None
    floor, rise, exponent = map(float, fit)
    exponent_error = covariance[2, 2] ** 0.5
    exponent_is_known = exponent > 2 * exponent_error
    if floor <= 0 or rise <= 0 or not exponent_is_known:
        return None
    return ScalingLaw(floor, rise, exponent, centre, covariance)


def of_kind(results: dict, kind: str) -> Runs:
    """The runs of a kind (dense, moe) at equal tokens, with their training FLOPs per token."""
    found = []
    for group, runs in groups(results).items():
        if not group.startswith(kind) or group.endswith(EQUAL_TIME):
            continue
        for run in runs:
            flops_per_token = run["flops"] / run["tokens"]
            found.append(run | dict(flops_per_token=flops_per_token))
    return found


def worth_of_time(dense: Runs, longer: list[tuple[Runs, Runs]]) -> float:
    """Nats that a dense model gains when it trains e times as long (e = 2.718).

    The loss is taken to fall linearly in the logarithm of the tokens. Each run in `dense` gives one
    estimate: the fall of its loss over the second half of its tokens. Each pair in `longer` gives
    another: the fall between (runs, the same model with more tokens). The largest estimate is
    returned, so that the worth of time is overestimated rather than underestimated.
    """
    gains = [0.0]
    for run in dense:
        gains.append(_fall_in_second_half(run) / math.log(2))
    for short, long in longer:
        short_tokens = short[0]["tokens"]
        long_tokens = long[0]["tokens"]
        # For nearly equal lengths the quotient is the noise of two losses over almost nothing.
        if long_tokens <= 1.05 * short_tokens:
            continue
        fall = mean(short) - mean(long)
        gains.append(fall / math.log(long_tokens / short_tokens))
    return max(gains)


def _fall_in_second_half(run: dict) -> float:
    """The run's validation loss after half of its tokens, minus that at its end."""
    tokens, losses = np.transpose(run["validation"])
    halfway = run["tokens"] / 2
    loss_halfway = float(np.interp(halfway, tokens, losses))
    return loss_halfway - run["val_loss"]


class EqualTime(NamedTuple):
    """How uncertain a loss at equal time is, because the speeds that made the times equal are.

    The loss is taken to be linear in the logarithm of the training time. A small relative error of
    the time is the error of its logarithm. So the error of the loss is their product.
    """

    worth_of_time: float  # nats for each unit of log(time): what e times the time gains
    speed_error: float  # half the 95% interval of a speed ratio, relative to the ratio
    nats: float  # worth_of_time * speed_error; inf when no speed was measured twice


def equal_time(results: dict) -> EqualTime:
    """The uncertainty of the scaling study's comparison at equal time."""
    found = groups(results)
    speeds = timed(results)
    ratios = []
    longer = []
    for size in sizes_with_experts(found):
        moe_speeds = speeds[f"moe, {size}"]
        dense_speeds = speeds[f"dense, {size}"]
        ratios.append(speed_ratios(moe_speeds, dense_speeds))
        dense = found.get(f"dense, {size}")
        dense_longer = found.get(f"dense, {size}{EQUAL_TIME}")
        if dense_longer:
            longer.append((dense, dense_longer))
    worth = worth_of_time(of_kind(results, "dense"), longer)
    error = ratio_error(ratios)
    nats = math.inf
    if error < math.inf:  # inf times a worth of 0 would be NaN
        nats = worth * error
    return EqualTime(worth, error, nats)


def sizes_with_experts(found: Groups) -> list[str]:
    """The sizes (layers x width) at which the study trained an MoE model."""
    sizes = []
    for group in found:
        if group.startswith("moe, "):
            sizes.append(group.removeprefix("moe, "))
    return sizes


# ---------------------------------------------------------------- the specialization study


def sharpest_layer(experts: dict, label: str) -> int:
    """The index of the MoE block with the most mutual information between expert and label.

    `experts` is what studies.experts kept of a run; `label` is "kind" or "domain".
    """
    last = experts["steps"][-1]
    return int(np.argmax(last[label]["bits"]))


def expert_shares(counts) -> np.ndarray:
    """p(expert | label), [labels, experts]: the share of a label's routed tokens on each expert.

    `counts` are routed tokens, [experts, labels]. A label that does not occur has a row of NaN.
    """
    counts_by_label = np.array(counts, float).T
    tokens_of_label = counts_by_label.sum(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a label that does not occur
        return counts_by_label / tokens_of_label


def divergence_from_average(counts) -> np.ndarray:
    """The Kullback-Leibler divergence of p(expert | label) from p(expert), in bits, [labels].

    It is 0 for a label whose tokens are routed as all tokens are. Its mean, weighted by the tokens
    of each label, is the mutual information between expert and label. `counts` are routed tokens,
    [experts, labels].
    """
    of_label = expert_shares(counts)
    tokens_of_expert = np.array(counts, float).sum(1)
    of_all = tokens_of_expert / np.sum(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        # An expert that a label never uses gives 0 log 0, NaN in numpy: nansum counts it as 0.
        terms = of_label * np.log2(of_label / of_all)
        return np.nansum(terms, axis=1)
