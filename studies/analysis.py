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
    texts = {}
    for option, text in zip(words[::2], words[1::2]):
        texts[option.removeprefix("--")] = text
    preset = texts.pop("preset")
    options = {name: parse_value(name, text) for name, text in texts.items()}
    config, _, _ = resolve(options, preset, None)
    return config


def groups(results: dict) -> Groups:
    """The runs by group, in the order of the study.

    Failed runs are left out, and so are those that only measured a speed.
    """
    runs = results["runs"].values()
    return _by_group(run for run in runs if not run["group"].startswith(SPEED))


def timed(results: dict) -> Groups:
    """The runs that measured a speed, by the configuration that they measured.

    Failed runs are left out.
    """
    runs = results["runs"].values()
    measured = _by_group(run for run in runs if run["group"].startswith(SPEED))
    return {group.removeprefix(SPEED): runs for group, runs in measured.items()}


def _by_group(runs: Iterable[dict]) -> Groups:
    found: Groups = {}
    for run in runs:
        if "failed" not in run:
            found.setdefault(run["group"], []).append(run)
    return found


def mean(runs: Runs, key: str = "val_loss") -> float:
    """The mean over seeds."""
    return mean_and_spread(runs, key)[0]


def mean_and_spread(runs: Runs, key: str = "val_loss") -> tuple[float, float]:
    """The mean over seeds, and the largest value minus the smallest."""
    values = [run[key] for run in runs]
    return sum(values) / len(values), max(values) - min(values)


# ---------------------------------------------------------------- significance over seeds


def _pooled_deviation(samples: Iterable[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation within several samples, and its degrees of freedom.

    All samples are taken to have the same deviation. It is inf if no sample has two values.
    """
    sum_of_squares = 0.0
    degrees_of_freedom = 0
    for values in samples:
        if len(values) < 2:
            continue
        # np.var divides the sum of squares by the number of values.
        sum_of_squares += float(np.var(values)) * len(values)
        degrees_of_freedom += len(values) - 1
    if not degrees_of_freedom:
        return math.inf, 0
    return math.sqrt(sum_of_squares / degrees_of_freedom), degrees_of_freedom


def seed_deviation(found: Groups, key: str = "val_loss") -> float:
    """The standard deviation over seeds, pooled over all groups; inf without a group of two."""
    deviation, _ = _pooled_deviation([run[key] for run in runs] for runs in found.values())
    return deviation


def tukey_hsd(found: Groups, key: str = "val_loss") -> float:
    """Tukey's honestly significant difference (1949) at the 5% level, for means of one seed each.

    Two groups differ significantly when their means differ by more than this, divided by the square
    root of the number of seeds; `tukey_kramer` divides. The test is among all groups with several
    seeds. The result is inf if there are no two such groups.
    """
    group_sizes = [len(runs) for runs in found.values() if len(runs) > 1]
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
    mean_of_inverse_sizes = (1 / len(a) + 1 / len(b)) / 2
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
    difference = sum(mean(first) - mean(second) for first, second in pairs) / len(pairs)
    sides = [_variance_of_mean(side) for side in zip(*pairs)]
    if not all(side.degrees_of_freedom for side in sides):
        return difference, math.inf
    variance = sum(side.variance for side in sides)
    if not variance:
        return difference, 0.0

    # The degrees of freedom of a sum of two variances, by Welch and Satterthwaite
    uncertainty = sum(side.variance**2 / side.degrees_of_freedom for side in sides)
    degrees_of_freedom = variance**2 / uncertainty
    quantile = float(student.ppf(0.975, degrees_of_freedom))
    return difference, quantile * math.sqrt(variance)


class _Variance(NamedTuple):
    variance: float
    degrees_of_freedom: int


def _variance_of_mean(side: Sequence[Runs]) -> _Variance:
    """The variance of the mean loss of several groups, by the seeds of all of them."""
    losses = [[run["val_loss"] for run in runs] for runs in side]
    deviation, degrees_of_freedom = _pooled_deviation(losses)
    # The mean of a group of n seeds has the variance deviation^2 / n. The mean of m such means has
    # their sum over m^2.
    sum_of_inverse_sizes = sum(1 / len(runs) for runs in side)
    variance = deviation**2 * sum_of_inverse_sizes / len(side) ** 2
    return _Variance(variance, degrees_of_freedom)


# ---------------------------------------------------------------- speeds


def speed_ratios(a: Runs, b: Runs) -> list[dict]:
    """The speed of `a` over the speed of `b`, in each round of measurements that has both.

    Returned as runs with the value `ratio`. The seed of a run is the number of its round.
    """
    speed_of_b = {run["changes"]["seed"]: run["tokens_per_second"] for run in b}
    ratios = []
    for run in a:
        seed = run["changes"]["seed"]
        if seed in speed_of_b:
            ratios.append(dict(ratio=run["tokens_per_second"] / speed_of_b[seed]))
    return ratios


def ratio_error(measurements: list[list[dict]]) -> float:
    """Half the 95% interval (Student's) of a mean speed ratio, relative to it: 0.02 is 2%.

    `measurements` has the `speed_ratios` of each size. Their deviation is pooled over the sizes;
    the result is for the size with the fewest rounds, and inf if no size has two.
    """
    # The deviation of a logarithm is a relative one.
    logarithms = [np.log([run["ratio"] for run in ratios]) for ratios in measurements]
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
    """The group that the sweep chose: the one whose first seed ends with the lowest loss."""
    return min(swept(found, optimizer), key=lambda runs: runs[0]["val_loss"])


def shorter(found: Groups) -> list[Runs]:
    """The groups of Muon that trained on a part of the tokens, the shortest first."""
    fewer = [runs for group, runs in found.items() if "of the tokens" in group]
    return sorted(fewer, key=lambda runs: runs[0]["tokens"])


# ---------------------------------------------------------------- the checkpointing study

# Number of layers, and mode of activation checkpointing.
LayersAndMode = tuple[int, str]


def micro_batches(
    results: dict,
) -> tuple[dict[LayersAndMode, dict[int, Runs]], dict[LayersAndMode, int]]:
    """The micro-batches (sequences) that fitted into memory, and the smallest that did not.

    Returns (runs by micro-batch, smallest micro-batch that ran out of memory), both by layers and
    mode. A micro-batch that fitted in one of two runs counts as one that did not.
    """
    too_large: dict[LayersAndMode, int] = {}
    for run in results["runs"].values():
        if run.get("failed") == "out of memory":
            key = _layers_and_mode(run)
            micro_batch = run["changes"]["batch_size"]
            too_large[key] = min(micro_batch, too_large.get(key, micro_batch))

    fitted: dict[LayersAndMode, dict[int, Runs]] = {}
    for runs in timed(results).values():
        key = _layers_and_mode(runs[0])
        micro_batch = runs[0]["changes"]["batch_size"]
        if micro_batch < too_large.get(key, math.inf):
            fitted.setdefault(key, {})[micro_batch] = runs
    return fitted, too_large


def _layers_and_mode(run: dict) -> LayersAndMode:
    changes = run["changes"]
    return changes["n_layers"], changes["activation_checkpointing"]


# ---------------------------------------------------------------- the scaling study


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
        return self.floor + self.rise * (np.asarray(x, float) / self.centre) ** -self.exponent

    def error_at(self, x: float) -> float:
        """The standard error of `at(x)`, to first order (the delta method)."""
        power = (x / self.centre) ** -self.exponent
        slope_of_exponent = -self.rise * power * math.log(x / self.centre)
        # The derivatives of `at(x)` by floor, rise and exponent
        slopes = np.array([1, power, slope_of_exponent])
        variance = slopes @ self.covariance @ slopes
        return math.sqrt(variance)

    def inverse(self, y: float) -> float:
        """The x at which the law has the value y; inf at the floor and below."""
        if y <= self.floor:
            return math.inf
        log_of_power = math.log((y - self.floor) / self.rise)
        log_x = math.log(self.centre) - log_of_power / self.exponent
        if log_x >= 700:  # exp would overflow
            return math.inf
        return math.exp(log_x)

    def inverse_between(self, y: float, error: float) -> tuple[float, float]:
        """The 95% interval of `inverse(y)`, from the law's covariance and the standard error of y.

        Laws and values of y are drawn from normal distributions (a parametric bootstrap). With two
        points at each of four sizes, a simulation finds the truth in 95% of such intervals. With
        Student's t instead of the normal distribution it would be in nearly all of them.
        """
        random = np.random.default_rng(0)
        fitted = (self.floor, self.rise, self.exponent)
        laws = random.multivariate_normal(fitted, self.covariance, 4000)
        ys = random.normal(y, error, 4000)
        inverses = []
        for (floor, rise, exponent), drawn_y in zip(laws, ys):
            if rise > 0 and exponent > 0:
                law = dataclasses.replace(self, floor=floor, rise=rise, exponent=exponent)
                inverses.append(law.inverse(drawn_y))
        # Without interpolation: between a number and inf there is nothing to interpolate.
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
    centre = math.exp(np.mean(np.log(x)))

    def law(x, floor, rise, exponent):
        return floor + rise * (x / centre) ** -exponent

    # The search starts with a floor a little below the lowest point. At the centre, the first law
    # has the mean of all points.
    lowest = min(y)
    start = (lowest - 0.1, np.mean(y) - lowest + 0.1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizeWarning)
        try:
            fit, covariance = curve_fit(law, np.array(x), np.array(y), p0=start, maxfev=10_000)
        except (RuntimeError, OptimizeWarning):
            return None
    floor, rise, exponent = map(float, fit)
    exponent_error = covariance[2, 2] ** 0.5
    if floor <= 0 or rise <= 0 or exponent <= 2 * exponent_error:
        return None
    return ScalingLaw(floor, rise, exponent, centre, covariance)


def of_kind(results: dict, kind: str) -> Runs:
    """The runs of a kind (dense, moe) at equal tokens, with their training FLOPs per token."""
    found = []
    for group, runs in groups(results).items():
        if group.startswith(kind) and not group.endswith(EQUAL_TIME):
            for run in runs:
                found.append(run | dict(flops_per_token=run["flops"] / run["tokens"]))
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
        tokens, losses = np.transpose(run["validation"])
        loss_halfway = float(np.interp(run["tokens"] / 2, tokens, losses))
        fall = loss_halfway - run["val_loss"]
        gains.append(fall / math.log(2))
    for short, long in longer:
        times_as_long = long[0]["tokens"] / short[0]["tokens"]
        # Of nearly equal lengths the quotient would be noise over almost nothing.
        if long[0]["tokens"] > 1.05 * short[0]["tokens"]:
            fall = mean(short) - mean(long)
            gains.append(fall / math.log(times_as_long))
    return max(gains)


class EqualTime(NamedTuple):
    """How uncertain the comparison at equal time is because speeds are uncertain."""

    worth_of_time: float  # nats that a dense model gains in e times the time
    speed_error: float  # half the 95% interval of the speed ratios, relative to them
    nats: float  # the loss that corresponds to speed_error; inf when no speed was measured twice


def equal_time(results: dict) -> EqualTime:
    found = groups(results)
    speeds = timed(results)
    ratios = []
    longer = []
    for size in sizes_with_experts(found):
        ratios.append(speed_ratios(speeds[f"moe, {size}"], speeds[f"dense, {size}"]))
        if f"dense, {size}{EQUAL_TIME}" in found:
            longer.append((found[f"dense, {size}"], found[f"dense, {size}{EQUAL_TIME}"]))
    worth = worth_of_time(of_kind(results, "dense"), longer)
    error = ratio_error(ratios)
    if error == math.inf:  # inf times a worth of 0 would be NaN
        return EqualTime(worth, error, math.inf)
    # A relative error of the speed is about as large an error of the logarithm of the time.
    return EqualTime(worth, error, worth * error)


def sizes_with_experts(found: Groups) -> list[str]:
    """The sizes (layers x width) at which the study trained an MoE model."""
    return [group.removeprefix("moe, ") for group in found if group.startswith("moe, ")]


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
    with np.errstate(invalid="ignore"):
        return counts_by_label / counts_by_label.sum(1, keepdims=True)


def divergence_from_average(counts) -> np.ndarray:
    """The Kullback-Leibler divergence of p(expert | label) from p(expert), in bits, [labels].

    It is 0 for a label whose tokens are routed as all tokens are. Its mean, weighted by the tokens
    of each label, is the mutual information between expert and label. `counts` are routed tokens,
    [experts, labels].
    """
    of_label = expert_shares(counts)
    of_all = np.array(counts, float).sum(1) / np.sum(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        # An expert that a label never uses gives 0 log 0, NaN in numpy: it counts as 0.
        return np.nansum(of_label * np.log2(of_label / of_all), axis=1)
