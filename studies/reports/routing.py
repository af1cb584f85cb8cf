"""The tables of the routing study: top-1 to top-4."""

from benchmarks.tables import table
from planner.layout import format_count
from studies.analysis import Groups, mean
from studies.reports.shared import (
    Outcome,
    against,
    flops_per_token,
    lowest,
    outcome,
    smallest_difference,
    summary,
    value,
)


def routing(results: dict) -> str:
    """top-1 to top-4 at equal tokens and at equal FLOPs."""
    study = outcome(results)
    by_tokens = {}
    by_flops = {}
    for k in (1, 2, 3, 4):
        by_tokens[f"top-{k}"] = study.runs[f"top-{k}, equal tokens"]
        # The equal FLOPs are those of top-2 at equal tokens, so top-2 has no other runs for them.
        kind = "equal FLOPs"
        if k == 2:
            kind = "equal tokens"
        by_flops[f"top-{k}"] = study.runs[f"top-{k}, {kind}"]
    header = [
        "experts a token",
        "loss, equal tokens",
        "against top-2",
        "loss, equal FLOPs",
        "against top-2",
        "FLOPs a token",
        "tokens/s",
    ]
    rows = [_routing_row(study, name, by_tokens, by_flops) for name in by_tokens]
    return f"{table(header, rows)}\n\n{_routing_summary(study, by_tokens, by_flops)}"


def _routing_row(study: Outcome, name: str, by_tokens: Groups, by_flops: Groups) -> list[str]:
    row = [name]
    for found in (by_tokens, by_flops):
        row.append(value(found[name]))
        if name == "top-2":
            row.append("")
        else:
            row.append(against(found[name], found["top-2"], study.resolution))
    times_top_2 = flops_per_token(by_tokens[name]) / flops_per_token(by_tokens["top-2"])
    row.append(f"{times_top_2:.2f}x")
    row.append(value(study.speeds[name], "tokens_per_second", 0))
    return row


def _routing_summary(study: Outcome, by_tokens: Groups, by_flops: Groups) -> str:
    tokens = format_count(by_tokens["top-2"][0]["tokens"])
    more_tokens = by_flops["top-1"][0]["tokens"] / by_tokens["top-1"][0]["tokens"]
    gain = mean(by_flops["top-1"]) - mean(by_tokens["top-1"])
    # FLOPs are equal but for a part of a step, because runs consist of whole steps.
    flops = by_flops["top-2"][0]["flops"]
    deviations = [abs(runs[0]["flops"] / flops - 1) for runs in by_flops.values()]
    rows = [
        (f"lowest at equal tokens ({tokens})", "; ".join(lowest(by_tokens, study.resolution))),
        ("lowest at equal FLOPs", "; ".join(lowest(by_flops, study.resolution))),
        ("tokens of top-1 at equal FLOPs, times those at equal tokens", f"{more_tokens:.2f}"),
        ("what these tokens alone change in its loss", f"{gain:+.3f} nats"),
        ("largest difference of the equal FLOPs, for whole steps", f"{max(deviations):.1%}"),
        ("smallest difference that is decided", smallest_difference(study.runs)),
    ]
    return summary(rows)
