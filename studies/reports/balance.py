"""The tables of the balance study: ways of balancing the load of experts."""

from benchmarks.tables import table
from studies.analysis import Groups, base_config, mean, tukey_hsd
from studies.grids import WEIGHTS
from studies.reports.shared import (
    against,
    listed,
    lowest,
    outcome,
    smallest_difference,
    summary,
    undecided,
    value,
)


def balance(results: dict) -> str:
    """Loss and evenness of each way of balancing."""
    study = outcome(results)
    labels = _balance_labels()
    found = {labels[name]: runs for name, runs in study.runs.items() if name in labels}
    resolution = tukey_hsd(found)
    best, verdict = lowest(found, resolution)
    rows = []
    for name, runs in found.items():
        difference = ""
        if name != best:
            difference = against(runs, found[best], resolution)
        unevenness = f"{1 - mean(runs, 'load_entropy'):.2g}"
        rows.append([name, value(runs), difference, unevenness, value(runs, "worst_share")])
    header = [
        "balancing",
        "validation loss",
        f"against {best}",
        "1 - load entropy (0: even)",
        "largest share of an expert",
    ]
    return f"{table(header, rows)}\n\n{_balance_summary(results, found, resolution, best, verdict)}"


def _balance_labels() -> dict[str, str]:
    """How the table calls each group."""
    labels = {"none": "`none`"}
    for scope in ("batch", "sequence"):
        for weight in WEIGHTS:
            labels[f"{scope}, weight {weight:g}"] = f"`loss {weight:g}, {scope}`"
    return labels | {"bias": "`bias alone`"}


def _balance_summary(
    results: dict, found: Groups, resolution: float, best: str, verdict: str
) -> str:
    """The ways of balancing with the lowest loss, and how even their experts' load is.

    `best` has the lowest loss, and `verdict` says against which others that is decided.
    """
    base = base_config(results)
    # Ways whose loss is as low as the lowest, as far as the seeds can tell
    as_low = []
    for name, runs in found.items():
        if name == best or undecided(runs, found[best], resolution):
            as_low.append(name)

    def largest_share(name: str) -> float:
        return mean(found[name], "worst_share")

    most_even = min(as_low, key=largest_share)
    least_even = max(as_low, key=largest_share)
    hsd_of_shares = tukey_hsd(found, "worst_share")
    as_even = []
    for name in as_low:
        if name == most_even:
            continue
        if undecided(found[name], found[most_even], hsd_of_shares, key="worst_share"):
            as_even.append(name)
    even = f"{most_even}: {value(found[most_even], 'worst_share')}"
    if as_even:
        even += f", undecided against {listed(as_even)}"
    uneven = f"{least_even}: {value(found[least_even], 'worst_share')}"
    return summary(
        [
            ("lowest loss", f"{best}; {verdict}"),
            ("of these alike, the smallest largest share", even),
            ("of these alike, the largest largest share", uneven),
            ("share of an expert at even load", f"{1 / base.num_experts:g}"),
            ("largest share that is possible", f"{1 / base.top_k:g}"),
            ("step of the bias", f"{base.load_balancing_bias_rate:g}"),
            ("smallest difference that is decided", smallest_difference(found)),
        ]
    )
