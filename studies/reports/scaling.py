"""The tables of the scaling study: MoE against dense models of several sizes."""

import math
from dataclasses import dataclass

from benchmarks.tables import table
from planner.layout import format_count
from studies.analysis import (
    Runs,
    ScalingLaw,
    equal_time,
    mean,
    mean_difference,
    of_kind,
    scaling_law,
    seed_deviation,
    sizes_with_experts,
    speed_ratios,
    typical_resolution,
)
from studies.grids import EQUAL_TIME
from studies.reports.shared import (
    UNKNOWN,
    Outcome,
    against,
    flops_per_token,
    listed,
    outcome,
    smallest_difference,
    span,
    summary,
    value,
)


@dataclass
class Size:
    """The groups of one size of the scaling study, and how its MoE and dense model compare."""

    name: str  # layers x width
    moe: Runs
    dense: Runs  # as many tokens as `moe`
    dense_equal_time: Runs | None  # as much time as `moe`; None if not run yet
    speed_ratios: Runs  # the MoE's speed over the dense one's, as runs with the value `ratio`
    at_equal_tokens: str  # the MoE's loss minus the dense one's, and whether that is undecided
    at_equal_time: str


def scaling(results: dict) -> str:
    """MoE against dense models of equal active parameters, at equal tokens and at equal time."""
    study = outcome(results)
    sizes = _sizes(study)
    law = _loss_law(of_kind(results, "dense"))
    deviation = _deviation_of_moe(study)
    tried = [run["flops_per_token"] for run in of_kind(results, "dense")]
    rows = []
    for size in sizes:
        dense_flops = UNKNOWN
        if law and deviation < math.inf:
            dense_flops = equal_loss_flops(law, size.moe, deviation, tried)
        rows.append(
            [
                size.name,
                format_count(size.moe[0]["active_params"]),
                format_count(size.moe[0]["total_params"]),
                value(size.dense),
                value(size.moe),
                size.at_equal_tokens,
                dense_flops,
                size.at_equal_time,
                value(size.speed_ratios, "ratio"),
            ]
        )
    header = [
        "layers x width",
        "parameters used",
        "of the MoE's",
        "dense loss",
        "MoE loss",
        "MoE - dense, equal tokens, FLOPs and parameters used",
        "FLOPs a token of a dense model with the MoE's loss, times",
        "MoE - dense, equal time",
        "MoE's speed, times the dense one's",
    ]
    return f"{table(header, rows)}\n\n{_scaling_summary(study, sizes)}"


def _sizes(study: Outcome) -> list[Size]:
    nats_of_speeds = equal_time(study.results).nats
    sizes = []
    for name in sizes_with_experts(study.runs):
        moe = study.runs[f"moe, {name}"]
        dense = study.runs[f"dense, {name}"]
        dense_equal_time = study.runs.get(f"dense, {name}{EQUAL_TIME}")
        at_equal_time = "not run yet"
        if dense_equal_time:
            at_equal_time = against(moe, dense_equal_time, study.resolution, nats_of_speeds)
        sizes.append(
            Size(
                name=name,
                moe=moe,
                dense=dense,
                dense_equal_time=dense_equal_time,
                speed_ratios=speed_ratios(
                    study.speeds[f"moe, {name}"], study.speeds[f"dense, {name}"]
                ),
                at_equal_tokens=against(moe, dense, study.resolution),
                at_equal_time=at_equal_time,
            )
        )
    return sizes


def _loss_law(runs: Runs) -> ScalingLaw | None:
    """The loss as a function of training FLOPs per token."""
    flops = [run["flops_per_token"] for run in runs]
    losses = [run["val_loss"] for run in runs]
    return scaling_law(flops, losses)


def _deviation_of_moe(study: Outcome) -> float:
    """The standard deviation of the MoE's losses over seeds."""
    moe = {name: runs for name, runs in study.runs.items() if name.startswith("moe, ")}
    return seed_deviation(moe)


def equal_loss_flops(law: ScalingLaw, runs: Runs, deviation: float, tried: list[float]) -> str:
    """The FLOPs per token with which a model that follows `law` reaches the mean loss of `runs`.

    They are written as a multiple of the FLOPs per token of `runs`, with a 95% interval. The
    interval comes from the errors of the law and the `deviation` of a loss over seeds. What lies
    outside of the FLOPs per token that were `tried` is not extrapolated: it is written as "> " or
    "< " the outermost one.
    """
    own = flops_per_token(runs)
    loss = mean(runs)
    standard_error = deviation / math.sqrt(len(runs))
    low, high = law.inverse_between(loss, standard_error)

    def times(flops: float) -> str:
        if flops > max(tried):
            return f"> {max(tried) / own:.2f}"
        if flops < min(tried):
            return f"< {min(tried) / own:.2f}"
        return f"{flops / own:.2f}"

    if low > max(tried) or high < min(tried):
        return "beyond those tried"
    return f"{times(law.inverse(loss))} ({times(low)} to {times(high)})"


def _scaling_summary(study: Outcome, sizes: list[Size]) -> str:
    at_equal_tokens = [size.at_equal_tokens for size in sizes]
    at_equal_time = [size.at_equal_time for size in sizes]
    difference, half_interval = mean_difference([(size.moe, size.dense) for size in sizes])
    facts = [("the MoE's loss at equal tokens", _count_verdicts(at_equal_tokens))]
    if half_interval < math.inf:
        bounds = f"{difference:+.3f} ± {half_interval:.3f} nats (95% interval)"
        facts.append(("mean difference of all sizes at equal tokens", bounds))
    facts.append(("the MoE's loss at equal time", _count_verdicts(at_equal_time)))
    facts.append(("smallest difference that is decided", smallest_difference(study.runs)))
    facts += _equal_time_facts(study)
    for kind, label in (("dense", "dense model"), ("moe", "MoE")):
        law = _loss_law(of_kind(study.results, kind))
        facts.append((f"fit of the {label}: floor, exponent ± standard error", _law_words(law)))
    total_over_active = []
    for size in sizes:
        total_over_active.append(size.moe[0]["total_params"] / size.moe[0]["active_params"])
    times = span([f"{ratio:.1f}" for ratio in sorted(total_over_active)])
    facts.append(("parameters of the MoE, times those it uses", times))
    facts += _against_equal_parameters(study, sizes)
    return summary(facts)


def _equal_time_facts(study: Outcome) -> list[tuple[str, str]]:
    """How exact the comparison at equal time is; nothing if no speed was measured twice."""
    uncertainty = equal_time(study.results)
    resolution = typical_resolution(study.runs) + uncertainty.nats
    if resolution == math.inf:
        return []
    nats_of_10_percent = uncertainty.worth_of_time * math.log(1.1)
    return [
        ("the same at equal time", f"{resolution:.3f} nats"),
        ("error of the ratio of the speeds (95% interval)", f"{uncertainty.speed_error:.0%}"),
        ("worth of 10% more time, at most", f"{nats_of_10_percent:.2f} nats"),
    ]


def _count_verdicts(differences: list[str]) -> str:
    """At how many sizes the difference says that the MoE's loss is lower, higher or undecided.

    `differences` are those of `against`, or other words where a comparison has not been run.
    """
    counts = dict(lower=0, higher=0, undecided=0, unknown=0)
    for difference in differences:
        if "undecided" in difference:
            counts["undecided"] += 1
        elif difference.startswith("-"):
            counts["lower"] += 1
        elif difference.startswith("+"):
            counts["higher"] += 1
        else:
            counts["unknown"] += 1
    words = []
    for verdict, count in counts.items():
        if count:
            words.append(f"{verdict} at {count} of {len(differences)} sizes")
    return listed(words)


def _law_words(law: ScalingLaw | None) -> str:
    """Floor and exponent of a law, each ± its standard error."""
    if law is None:
        return "not determined by these losses"
    floor_error, _, exponent_error = law.errors
    return f"{law.floor:.2f} ± {floor_error:.2f}, {law.exponent:.2f} ± {exponent_error:.2f}"


def _against_equal_parameters(study: Outcome, sizes: list[Size]) -> list[tuple[str, str]]:
    """The MoE's loss minus that of a dense model with as many parameters in total.

    No such dense model was trained: its loss comes from a law that is fitted to the dense models.
    Sizes whose MoE has more parameters than any dense model are left out.
    """
    dense = of_kind(study.results, "dense")
    parameters = [run["total_params"] for run in dense]
    law = scaling_law(parameters, [run["val_loss"] for run in dense])
    deviation = _deviation_of_moe(study)
    if law is None or deviation == math.inf:
        return []
    rows = []
    for size in sizes:
        total = size.moe[0]["total_params"]
        if total > max(parameters):
            continue
        difference = mean(size.moe) - law.at(total)
        error_of_mean = deviation / math.sqrt(len(size.moe))
        error = math.hypot(law.error_at(total), error_of_mean)
        label = f"MoE - dense of as many parameters in all, by its fit, {size.name}"
        rows.append((label, f"{difference:+.3f} ± {error:.3f} nats"))
    return rows
