"""What the results of a study are in numbers, for its figure and its report: groups of runs, what two seeds can tell apart, fits."""

import dataclasses
import functools
import math
import warnings
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import studentized_range
from scipy.stats import t as student

from config import Config, parse_value, resolve
from studies.grids import EQUAL_TIME

SPEED = "speed of "


def base_config(results: dict) -> Config:
    """The configuration that the study's runs change."""
    given = {
        name.removeprefix("--"): value
        for name, value in zip(results["options"][::2], results["options"][1::2])
    }
    preset = given.pop("preset")
    return resolve({name: parse_value(name, value) for name, value in given.items()}, preset, None)[
        0
    ]


def groups(results: dict) -> dict[str, list[dict]]:
    """{group: its runs that did not fail}, in the order of the study, without those that only measured speed."""
    return _grouped(run for run in results["runs"].values() if not run["group"].startswith(SPEED))


def timed(results: dict) -> dict[str, list[dict]]:
    """{configuration: the runs that measured its speed}, without those that failed."""
    found = _grouped(run for run in results["runs"].values() if run["group"].startswith(SPEED))
    return {group.removeprefix(SPEED): runs for group, runs in found.items()}


def _grouped(runs) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for run in runs:
        if "failed" not in run:
            found.setdefault(run["group"], []).append(run)
    return found


def micro_batches(results: dict) -> tuple[dict[tuple, dict[int, list[dict]]], dict[tuple, int]]:
    """Of the checkpointing study, by (layers, mode): {micro-batch that always fitted: its runs}, and the smallest that once did not."""

    def where(run: dict) -> tuple[int, str]:
        return run["changes"]["n_layers"], run["changes"]["activation_checkpointing"]

    fitted: dict[tuple, dict[int, list[dict]]] = {}
    too_large: dict[tuple, int] = {}
    for run in results["runs"].values():
        if run.get("failed") == "out of memory":
            too_large[where(run)] = min(
                run["changes"]["batch_size"], too_large.get(where(run), math.inf)
            )
    for runs in timed(results).values():
        place, batch = where(runs[0]), runs[0]["changes"]["batch_size"]
        if batch < too_large.get(place, math.inf):
            fitted.setdefault(place, {})[batch] = runs
    return fitted, too_large


def speed_ratios(a: list[dict], b: list[dict]) -> list[dict]:
    """How many times as fast a is as b, in each round of measurements that has both, as runs with the value `ratio`."""
    rounds = [{run["changes"]["seed"]: run["tokens_per_second"] for run in runs} for runs in (a, b)]
    return [
        dict(ratio=rate / rounds[1][seed]) for seed, rate in rounds[0].items() if seed in rounds[1]
    ]


def ratio_error(pairs: list[list[dict]]) -> float:
    """Half the 95% interval (Student's) of the mean of such ratios, as a part of it, by how far the rounds of all of `pairs` differ; inf
    when none was measured twice."""
    twice = [np.log([pair["ratio"] for pair in ratios]) for ratios in pairs if len(ratios) > 1]
    freedom = sum(len(logs) - 1 for logs in twice)
    if not freedom:
        return math.inf
    deviation = math.sqrt(sum(np.var(logs) * len(logs) for logs in twice) / freedom)
    return float(student.ppf(0.975, freedom)) * deviation / math.sqrt(min(map(len, pairs)))


def mean_and_spread(runs: list[dict], key: str = "val_loss") -> tuple[float, float]:
    """The mean over seeds, and largest minus smallest."""
    values = [run[key] for run in runs]
    return sum(values) / len(values), max(values) - min(values)


def seed_deviation(found: dict[str, list[dict]], key: str = "val_loss") -> float:
    """The standard deviation over seeds, taken to be the same in all groups; inf without a group of two."""
    several = [[run[key] for run in runs] for runs in found.values() if len(runs) > 1]
    if not several:
        return math.inf
    return math.sqrt(
        sum(np.var(values) * len(values) for values in several)
        / sum(len(values) - 1 for values in several)
    )


def tukey_hsd(found: dict[str, list[dict]], key: str = "val_loss") -> float:
    """The smallest difference of the means of two groups that Tukey's test (1949) finds at the 5% level among all groups of a study
    with more than one seed, times the root of the seeds; inf without two such groups."""
    seeds = [len(runs) for runs in found.values() if len(runs) > 1]
    return (
        _studentized_range(len(seeds), sum(seeds) - len(seeds)) * seed_deviation(found, key)
        if len(seeds) > 1
        else math.inf
    )


@functools.cache  # a numerical integral
def _studentized_range(means: int, freedom: int) -> float:
    return float(studentized_range.ppf(0.95, means, freedom))


def tukey_kramer(a: list[dict], b: list[dict], honest: float) -> float:
    """The smallest difference of the means of two groups that is decided (Tukey and Kramer's form for groups of unequal size)."""
    return honest * math.sqrt((1 / len(a) + 1 / len(b)) / 2)


def typical_resolution(found: dict[str, list[dict]]) -> float:
    """The smallest difference that is decided between groups of as many seeds as the first one with several."""
    several = [runs for runs in found.values() if len(runs) > 1]
    return tukey_kramer(several[0], several[0], tukey_hsd(found)) if several else math.inf


def mean_difference(pairs: list[tuple[list[dict], list[dict]]]) -> tuple[float, float]:
    """The mean over pairs of groups of how much the first ends above the second, and half its 95% interval (Welch 1947), with one noise
    for all first groups and one for all second; inf without two seeds on either side."""
    difference = sum(mean_and_spread(a)[0] - mean_and_spread(b)[0] for a, b in pairs) / len(pairs)
    sides = [dict(enumerate(side)) for side in zip(*pairs)]
    freedom = [sum(len(runs) - 1 for runs in side.values()) for side in sides]
    if not all(freedom):
        return difference, math.inf
    squares = [
        seed_deviation(side) ** 2 * sum(1 / len(runs) for runs in side.values()) / len(pairs) ** 2
        for side in sides
    ]
    if not sum(squares):
        return difference, 0.0
    effective = sum(squares) ** 2 / sum(square**2 / n for square, n in zip(squares, freedom))
    return difference, float(student.ppf(0.975, effective)) * math.sqrt(sum(squares))


def swept(found: dict[str, list[dict]], optimizer: str) -> list[list[dict]]:
    """The optimizer study's groups with one of its optimizers at some rates, in steps of the whole batch or after the words QUARTER."""
    return [
        runs
        for group, runs in found.items()
        if group.startswith(f"{optimizer}, ") and "_lr" in group
    ]


def best_runs(found: dict[str, list[dict]], optimizer: str) -> list[dict]:
    """Those of them at the rates that the sweep chose: they end lowest by their first seed."""
    return min(swept(found, optimizer), key=lambda runs: runs[0]["val_loss"])


def shorter(found: dict[str, list[dict]]) -> list[list[dict]]:
    """The optimizer study's groups of Muon with fewer tokens, fewest first."""
    return sorted(
        (runs for group, runs in found.items() if "of the tokens" in group),
        key=lambda runs: runs[0]["tokens"],
    )


@dataclass
class ScalingLaw:
    """y = floor + rise (x / centre)^-exponent: Hoffmann et al. (2022), equation 2, with the tokens fixed, whose part is in the floor."""

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
        """The standard error of that, to first order."""
        power = (x / self.centre) ** -self.exponent
        slope = np.array([1, power, -self.rise * power * math.log(x / self.centre)])
        return math.sqrt(slope @ self.covariance @ slope)

    def inverse(self, y: float) -> float:
        """The x at which the law has the value y; inf at the floor and below."""
        if y <= self.floor:
            return math.inf
        logarithm = math.log(self.centre) - math.log((y - self.floor) / self.rise) / self.exponent
        return math.exp(logarithm) if logarithm < 700 else math.inf

    def inverse_between(self, y: float, error: float) -> tuple[float, float]:
        """The 95% interval of that x, by what the covariance, and the standard error of y, leave open. (Normal draws: with two points
        at each of four sizes a simulation finds the truth in 95% of such intervals, and in nearly all with Student's t.)"""
        random = np.random.default_rng(0)
        draws = random.multivariate_normal(
            (self.floor, self.rise, self.exponent), self.covariance, 4000
        )
        ys = random.normal(y, error, 4000)
        found = [
            dataclasses.replace(self, floor=law[0], rise=law[1], exponent=law[2]).inverse(v)
            for law, v in zip(draws, ys)
            if min(law[1:]) > 0
        ]
        low, high = np.percentile(
            found, (2.5, 97.5), method="nearest"
        )  # no mean of a number and inf
        return float(low), float(high)


def scaling_law(x: list[float], y: list[float]) -> ScalingLaw | None:
    """The law by least squares, or None when there are fewer than three different x, or no more than three points, or when none fits
    with an exponent above twice its error: the covariance would say little then, and the law less."""
    if len(set(x)) < 3 or len(x) < 4:
        return None
    centre = math.exp(np.mean(np.log(x)))

    def law(x, floor, rise, exponent):
        return floor + rise * (x / centre) ** -exponent

    with warnings.catch_warnings():
        warnings.simplefilter("error", OptimizeWarning)
        try:
            fit, covariance = curve_fit(
                law,
                np.array(x),
                np.array(y),
                p0=(min(y) - 0.1, np.mean(y) - min(y) + 0.1, 0.5),
                maxfev=10_000,
            )
        except (RuntimeError, OptimizeWarning):
            return None
    floor, rise, exponent = map(float, fit)
    return (
        ScalingLaw(floor, rise, exponent, centre, covariance)
        if min(floor, rise) > 0 and exponent > 2 * covariance[2, 2] ** 0.5
        else None
    )


def of_kind(results: dict, kind: str) -> list[dict]:
    """The scaling study's runs of a kind at equal tokens, with their FLOPs a token."""
    return [
        run | dict(flops_per_token=run["flops"] / run["tokens"])
        for group, runs in groups(results).items()
        if group.startswith(kind) and not group.endswith(EQUAL_TIME)
        for run in runs
    ]


def worth_of_time(dense: list[dict], longer: list[tuple[list[dict], list[dict]]]) -> float:
    """Nats that e times the time gains a dense model, rather too many than too few: the most that is seen in the second half of a run,
    and from groups of runs to the longer ones beside them."""
    within = [
        (float(np.interp(run["tokens"] / 2, *np.transpose(run["validation"]))) - run["val_loss"])
        / math.log(2)
        for run in dense
    ]
    between = [
        (mean_and_spread(short)[0] - mean_and_spread(long)[0])
        / math.log(long[0]["tokens"] / short[0]["tokens"])
        for short, long in longer
        if long[0]["tokens"] > 1.05 * short[0]["tokens"]
    ]
    return max(0.0, *within, *between)


def equal_time(results: dict) -> tuple[float, float, float]:
    """Of the scaling study: the nats that e times the time is worth to a dense model; half the 95% interval of the ratios of the speeds, as
    a part of them; and the nats at equal time that so uncertain a speed is worth, inf when none was measured twice."""
    found, speeds = groups(results), timed(results)
    names = [group.removeprefix("moe, ") for group in found if group.startswith("moe, ")]
    longer = [
        (found[f"dense, {name}"], found[f"dense, {name}{EQUAL_TIME}"])
        for name in names
        if f"dense, {name}{EQUAL_TIME}" in found
    ]
    ratios = [speed_ratios(speeds[f"moe, {name}"], speeds[f"dense, {name}"]) for name in names]
    worth, error = worth_of_time(of_kind(results, "dense"), longer), ratio_error(ratios)
    return worth, error, worth * error if error < math.inf else math.inf


def sharpest_layer(experts: dict, label: str) -> int:
    """The place of the MoE block whose experts say most of a label at the end."""
    return int(np.argmax(experts["steps"][-1][label]["bits"]))
