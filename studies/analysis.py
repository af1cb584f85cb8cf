"""What the results of a study are in numbers: groups of runs, what two seeds can tell apart, fits.

The figure and the tables of a study are made from these numbers. Nothing is read or written here.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import studentized_range
from scipy.stats import t as student

from config import Config, parse_value, resolve
from studies.grids import EQUAL_TIME

# A group of runs with this prefix only measured speed.
SPEED = "speed of "

# One group's runs, which differ in their seed alone.
Runs = list[dict]

# ---------------------------------------------------------------- groups of runs


def base_config(results: dict) -> Config:
    """The configuration that the study's runs change."""
    names = results["options"][::2]
    values = results["options"][1::2]
    given = {name.removeprefix("--"): value for name, value in zip(names, values)}
    preset = given.pop("preset")
    options = {name: parse_value(name, value) for name, value in given.items()}
    config, _, _ = resolve(options, preset, None)
    return config


def groups(results: dict) -> dict[str, Runs]:
    """The runs that did not fail by group, in the order of the study, without those for speed."""
    runs = results["runs"].values()
    return _by_group(run for run in runs if not run["group"].startswith(SPEED))


def timed(results: dict) -> dict[str, Runs]:
    """By configuration, the runs that measured its speed and did not fail."""
    runs = results["runs"].values()
    measured = _by_group(run for run in runs if run["group"].startswith(SPEED))
    return {group.removeprefix(SPEED): runs for group, runs in measured.items()}


def _by_group(runs: Iterable[dict]) -> dict[str, Runs]:
    found: dict[str, Runs] = {}
    for run in runs:
        if "failed" not in run:
            found.setdefault(run["group"], []).append(run)
    return found


def mean_and_spread(runs: Runs, key: str = "val_loss") -> tuple[float, float]:
    """The mean over seeds, and the largest value minus the smallest."""
    values = [run[key] for run in runs]
    return sum(values) / len(values), max(values) - min(values)


# ---------------------------------------------------------------- what seeds can tell apart


def seed_deviation(found: dict[str, Runs], key: str = "val_loss") -> float:
    """The standard deviation over seeds, pooled over all groups; inf without a group of two."""
    squares = 0.0
    freedom = 0
    for runs in found.values():
        if len(runs) > 1:
            squares += float(np.var([run[key] for run in runs])) * len(runs)
            freedom += len(runs) - 1
    if not freedom:
        return math.inf
    return math.sqrt(squares / freedom)


def tukey_hsd(found: dict[str, Runs], key: str = "val_loss") -> float:
    """The smallest significant difference between the means of two groups, for one seed a group.

    Tukey's honestly significant difference (1949) at the 5% level, among all groups with more than
    one seed. `tukey_kramer` divides it by the root of the seeds. inf without two such groups.
    """
    seeds = [len(runs) for runs in found.values() if len(runs) > 1]
    if len(seeds) < 2:
        return math.inf
    return _studentized_range(len(seeds), sum(seeds) - len(seeds)) * seed_deviation(found, key)


@functools.cache  # it integrates numerically
def _studentized_range(means: int, freedom: int) -> float:
    return float(studentized_range.ppf(0.95, means, freedom))


def tukey_kramer(a: Runs, b: Runs, hsd: float) -> float:
    """The smallest significant difference between the means of these two groups.

    `hsd` is tukey_hsd's. Kramer's form (1956) allows groups of unequal size.
    """
    return hsd * math.sqrt((1 / len(a) + 1 / len(b)) / 2)


def typical_resolution(found: dict[str, Runs]) -> float:
    """The smallest significant difference between groups as large as the first with two seeds."""
    for runs in found.values():
        if len(runs) > 1:
            return tukey_kramer(runs, runs, tukey_hsd(found))
    return math.inf


def mean_difference(pairs: list[tuple[Runs, Runs]]) -> tuple[float, float]:
    """How much the first group of a pair ends above the second, and half its 95% interval.

    Both are of the mean over all pairs. The interval is Welch's (1947), with one deviation over
    seeds for all first groups and one for all second; it is inf without two seeds on either side.
    """
    difference = sum(mean_and_spread(a)[0] - mean_and_spread(b)[0] for a, b in pairs) / len(pairs)
    sides: list[dict[str, Runs]] = []
    for side in zip(*pairs):
        sides.append({str(pair): runs for pair, runs in enumerate(side)})
    freedom = [sum(len(runs) - 1 for runs in side.values()) for side in sides]
    if not all(freedom):
        return difference, math.inf

    # the variance of each side's part in the mean difference
    variances = []
    for side in sides:
        sum_of_inverses = sum(1 / len(runs) for runs in side.values())
        variances.append(seed_deviation(side) ** 2 * sum_of_inverses / len(pairs) ** 2)
    if not sum(variances):
        return difference, 0.0

    # Welch and Satterthwaite's degrees of freedom
    uncertainty = sum(variance**2 / n for variance, n in zip(variances, freedom))
    effective_freedom = sum(variances) ** 2 / uncertainty
    quantile = float(student.ppf(0.975, effective_freedom))
    return difference, quantile * math.sqrt(sum(variances))


# ---------------------------------------------------------------- speeds


def speed_ratios(a: Runs, b: Runs) -> list[dict]:
    """How many times as fast a is as b, in each round of measurements that has both.

    Returned as runs with the value `ratio`. A round is known by its seed.
    """
    speed_of_b = {run["changes"]["seed"]: run["tokens_per_second"] for run in b}
    ratios = []
    for run in a:
        seed = run["changes"]["seed"]
        if seed in speed_of_b:
            ratios.append(dict(ratio=run["tokens_per_second"] / speed_of_b[seed]))
    return ratios


def ratio_error(pairs: list[list[dict]]) -> float:
    """Half the 95% interval (Student's) of the mean of speed ratios, as a part of that mean.

    The deviation is pooled over the rounds of all `pairs`; inf when none was measured twice.
    """
    squares = 0.0
    freedom = 0
    for ratios in pairs:
        if len(ratios) > 1:
            logs = np.log([pair["ratio"] for pair in ratios])
            squares += float(np.var(logs)) * len(logs)
            freedom += len(logs) - 1
    if not freedom:
        return math.inf
    deviation = math.sqrt(squares / freedom)
    fewest = min(len(ratios) for ratios in pairs)
    return float(student.ppf(0.975, freedom)) * deviation / math.sqrt(fewest)


# ---------------------------------------------------------------- the optimizer study


def swept(found: dict[str, Runs], optimizer: str) -> list[Runs]:
    """The groups of an optimizer's sweep over learning rates.

    `optimizer` is its name, for steps of the whole batch, or its name after the prefix QUARTER.
    """
    sweep = []
    for group, runs in found.items():
        if group.startswith(f"{optimizer}, ") and "_lr" in group:
            sweep.append(runs)
    return sweep


def best_runs(found: dict[str, Runs], optimizer: str) -> Runs:
    """The group that the sweep chose: its first seed ends lowest."""
    return min(swept(found, optimizer), key=lambda runs: runs[0]["val_loss"])


def shorter(found: dict[str, Runs]) -> list[Runs]:
    """The groups of Muon with fewer tokens, fewest first."""
    fewer = [runs for group, runs in found.items() if "of the tokens" in group]
    return sorted(fewer, key=lambda runs: runs[0]["tokens"])


# ---------------------------------------------------------------- the checkpointing study

# Number of layers, and mode of activation checkpointing.
LayersAndMode = tuple[int, str]


def micro_batches(
    results: dict,
) -> tuple[dict[LayersAndMode, dict[int, Runs]], dict[LayersAndMode, int]]:
    """The runs by micro-batch, of those micro-batches that fitted each time.

    The second value is the smallest micro-batch that did not fit once. Both are by layers and mode.
    """
    too_large: dict[LayersAndMode, int] = {}
    for run in results["runs"].values():
        if run.get("failed") == "out of memory":
            where = _layers_and_mode(run)
            batch = run["changes"]["batch_size"]
            too_large[where] = min(batch, too_large.get(where, batch))

    fitted: dict[LayersAndMode, dict[int, Runs]] = {}
    for runs in timed(results).values():
        where = _layers_and_mode(runs[0])
        batch = runs[0]["changes"]["batch_size"]
        if batch < too_large.get(where, math.inf):
            fitted.setdefault(where, {})[batch] = runs
    return fitted, too_large


def _layers_and_mode(run: dict) -> LayersAndMode:
    changes = run["changes"]
    return changes["n_layers"], changes["activation_checkpointing"]


# ---------------------------------------------------------------- the scaling study


@dataclass
class ScalingLaw:
    """y = floor + rise (x / centre)^-exponent: Hoffmann et al. (2022), equation 2.

    The number of tokens is fixed, and its part is in the floor.
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
        """The standard error of `at(x)`, to first order."""
        power = (x / self.centre) ** -self.exponent
        slope = np.array([1, power, -self.rise * power * math.log(x / self.centre)])
        return math.sqrt(slope @ self.covariance @ slope)

    def inverse(self, y: float) -> float:
        """The x at which the law has the value y; inf at the floor and below."""
        if y <= self.floor:
            return math.inf
        logarithm = math.log(self.centre) - math.log((y - self.floor) / self.rise) / self.exponent
        if logarithm >= 700:  # exp would overflow
            return math.inf
        return math.exp(logarithm)

    def inverse_between(self, y: float, error: float) -> tuple[float, float]:
        """The 95% interval of `inverse(y)`, given the law's covariance and the standard error of y.

        The draws are normal. With two points at each of four sizes, a simulation finds the truth in
        95% of such intervals; with Student's t it would be in nearly all of them.
        """
        random = np.random.default_rng(0)
        centre = (self.floor, self.rise, self.exponent)
        laws = random.multivariate_normal(centre, self.covariance, 4000)
        ys = random.normal(y, error, 4000)
        found = []
        for (floor, rise, exponent), drawn_y in zip(laws, ys):
            if min(rise, exponent) > 0:
                law = dataclasses.replace(self, floor=floor, rise=rise, exponent=exponent)
                found.append(law.inverse(drawn_y))
        # the nearest draw: a mean of a number and inf is none
        low, high = np.percentile(found, (2.5, 97.5), method="nearest")
        return float(low), float(high)


def scaling_law(x: list[float], y: list[float]) -> ScalingLaw | None:
    """The law by least squares.

    None with fewer than three different x or fewer than four points, and when none fits with an
    exponent above twice its error: the covariance would say little then, and the law less.
    """
    if len(set(x)) < 3 or len(x) < 4:
        return None
    centre = math.exp(np.mean(np.log(x)))

    def law(x, floor, rise, exponent):
        return floor + rise * (x / centre) ** -exponent

    start = (min(y) - 0.1, np.mean(y) - min(y) + 0.1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizeWarning)
        try:
            fit, covariance = curve_fit(law, np.array(x), np.array(y), p0=start, maxfev=10_000)
        except (RuntimeError, OptimizeWarning):
            return None
    floor, rise, exponent = map(float, fit)
    error = covariance[2, 2] ** 0.5
    if min(floor, rise) <= 0 or exponent <= 2 * error:
        return None
    return ScalingLaw(floor, rise, exponent, centre, covariance)


def of_kind(results: dict, kind: str) -> Runs:
    """The runs of a kind (dense, moe) at equal tokens, with their FLOPs of a token."""
    found = []
    for group, runs in groups(results).items():
        if group.startswith(kind) and not group.endswith(EQUAL_TIME):
            for run in runs:
                found.append(run | dict(flops_per_token=run["flops"] / run["tokens"]))
    return found


def worth_of_time(dense: Runs, longer: list[tuple[Runs, Runs]]) -> float:
    """Nats that a dense model gains when it trains e times as long.

    Rather too many than too few: the most that is seen in the second half of a run, and between
    the groups of `longer`, pairs of (runs, the same for more tokens).
    """
    gains = [0.0]
    for run in dense:
        tokens, losses = np.transpose(run["validation"])
        halfway = float(np.interp(run["tokens"] / 2, tokens, losses))
        gains.append((halfway - run["val_loss"]) / math.log(2))
    for short, long in longer:
        times_as_long = long[0]["tokens"] / short[0]["tokens"]
        if long[0]["tokens"] > 1.05 * short[0]["tokens"]:
            gain = mean_and_spread(short)[0] - mean_and_spread(long)[0]
            gains.append(gain / math.log(times_as_long))
    return max(gains)


def equal_time(results: dict) -> tuple[float, float, float]:
    """What the comparison at equal time leaves open.

    Returns the nats that e times the time is worth to a dense model; half the 95% interval of the
    speed ratios, as a part of them; and the nats that so uncertain a speed is worth, inf when no
    speed was measured twice.
    """
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
    if error == math.inf:
        return worth, error, math.inf
    return worth, error, worth * error


def sizes_with_experts(found: dict[str, Runs]) -> list[str]:
    """The sizes (layers x width) at which the study trained an MoE model."""
    return [group.removeprefix("moe, ") for group in found if group.startswith("moe, ")]


# ---------------------------------------------------------------- the specialization study


def sharpest_layer(experts: dict, label: str) -> int:
    """The index of the MoE block with the most mutual information between expert and label."""
    last = experts["steps"][-1]
    return int(np.argmax(last[label]["bits"]))


def expert_shares(counts) -> np.ndarray:
    """Where the tokens of each label go, [labels, experts]; a row sums to 1.

    `counts` are routed tokens, [experts, labels]. A label that does not occur has a row of nan.
    """
    tokens = np.array(counts, float).T
    with np.errstate(invalid="ignore"):
        return tokens / tokens.sum(1, keepdims=True)


def divergence_from_average(counts) -> np.ndarray:
    """How much a label's experts differ from those of all tokens, in bits, [labels].

    The Kullback-Leibler divergence. Its mean over the labels, by their tokens, is the mutual
    information between expert and label. `counts` are routed tokens, [experts, labels].
    """
    share = expert_shares(counts)
    average = np.array(counts, float).sum(1) / np.sum(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum(share * np.log2(share / average), axis=1)
