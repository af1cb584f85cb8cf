"""The tables of the specialization study: which tokens each expert receives."""

import json
import math

import numpy as np

from benchmarks.tables import table
from planner.layout import format_count
from studies.analysis import Runs, groups, mean, sharpest_layer
from studies.reports.shared import listed, summary, value

SHOWN_TOKENS = 8  # top tokens that the table shows of an expert


def specialization(results: dict) -> str:
    """Mutual information between experts and token kinds and domains, over training.

    The detailed table is of the first seed, for the layer that distinguishes kinds most.
    """
    analyses = [run["experts"] for runs in groups(results).values() for run in runs]
    first = analyses[0]
    seed = next(iter(results["runs"].values()))["changes"]["seed"]
    layer = sharpest_layer(first, "kind")
    where = f"layer {first['layers'][layer] + 1}, seed {seed}"
    parts = [
        _information_table(analyses),
        _specialization_summary(analyses, where),
        _experts_table(first, layer, where),
    ]
    return "\n\n".join(parts)


def _mean_bits(analyses: list[dict], step: int, label: str, key: str) -> Runs:
    """Each seed's mutual information at a step, mean over layers, as runs with the value `bits`.

    `step` is an index of the analyses' steps, `label` is "kind" or "domain", and `key` is "bits" or
    a baseline with shuffled labels.
    """
    found = []
    for analysis in analyses:
        by_layer = analysis["steps"][step][label][key]
        found.append(dict(bits=float(np.mean(by_layer))))
    return found


def _information_table(analyses: list[dict]) -> str:
    """A row for each checkpoint: mutual information with the labels and with shuffled ones."""
    rows = []
    for number, step in enumerate(analyses[0]["steps"]):
        row = [format_count(step["tokens"])]
        if step["step"] == 0:
            row = ["before training"]
        for label in ("kind", "domain"):
            for key in ("bits", "shuffled_most"):
                row.append(value(_mean_bits(analyses, number, label, key), "bits"))
        rows.append(row)
    header = [
        "tokens of training",
        "bits of the kind",
        "shuffled",
        "bits of the domain",
        "shuffled",
    ]
    return table(header, rows)


def _specialization_summary(analyses: list[dict], where: str) -> str:
    first = analyses[0]
    last = len(first["steps"]) - 1
    bits_of_kind = mean(_mean_bits(analyses, last, "kind", "bits"), "bits")
    possible = most_bits(first)
    rows = [
        ("held-out tokens", format_count(first["tokens"])),
        ("entropy of the kinds", f"{first['kind_entropy']:.2f} bits"),
        ("entropy of the domains", f"{first['domain_entropy']:.2f} bits"),
        ("what one of a token's experts can say at most", f"{possible:.2f} bits"),
    ]
    if possible:
        rows.append(("what it says of the kind, of that", f"{bits_of_kind / possible:.0%}"))
    if "others" in first["domains"]:
        index = first["domains"].index("others")
        share = first["domain_tokens"][index] / sum(first["domain_tokens"])
        rows.append(("tokens of packages without a name of their own", f"{share:.0%}"))
    rows.append(("layer that says most of the kind", where))
    return summary(rows)


def _experts_table(analysis: dict, layer: int, where: str) -> str:
    """A row for each expert of a layer, with the kinds that choose it, and its tokens.

    `where` names the layer in the header.
    """
    routed = np.array(analysis["kind_table"][layer], float)  # [experts, kinds] of routed tokens
    routed_by_kind = routed.sum(0).clip(1)  # clip: a kind without tokens has shares of 0, not NaN

    def two_largest(shares: np.ndarray) -> str:
        """The kinds with the two largest of `shares` [kinds], as words."""
        words = []
        for kind in np.argsort(-shares)[:2]:
            words.append(f"{analysis['kinds'][kind]} ({shares[kind]:.0%})")
        return listed(words)

    rows = []
    for expert, counts in enumerate(routed):
        share_of_kind = counts / routed_by_kind  # p(expert | kind)
        share_of_expert = counts / counts.sum().clip(1)  # p(kind | expert)
        tokens = analysis["top_tokens"][layer][expert][:SHOWN_TOKENS]
        rows.append(
            [
                str(expert + 1),
                two_largest(share_of_kind),
                two_largest(share_of_expert),
                " ".join(code(token) for token, _ in tokens),
            ]
        )
    header = [
        f"expert ({where})",
        "is chosen, of all choices by a kind",
        "its tokens are",
        "tokens that set it apart",
    ]
    return table(header, rows)


def most_bits(analysis: dict) -> float:
    """An upper bound of the mutual information between expert and token kind, mean over the layers.

    The mutual information is at most the entropy of the kinds. It is also at most the entropy of
    the experts less log2(k). A token has k experts and counts once for each, so that even if its
    kind says which k experts they are, it does not say which of the k is meant.
    """
    routed_tokens = np.sum(analysis["kind_table"][0])
    k = routed_tokens / max(1, sum(analysis["kind_tokens"]))
    bounds = []
    for counts in analysis["kind_table"]:
        load = np.sum(counts, axis=1) / np.sum(counts)  # share of each expert
        entropy_of_experts = -sum(p * math.log2(p) for p in load if p > 0)
        bounds.append(min(analysis["kind_entropy"], entropy_of_experts - math.log2(k)))
    return max(0.0, float(np.mean(bounds)))


def code(token: str) -> str:
    """A token as Markdown code in a cell of a table, with visible spaces and line ends."""
    # JSON writes a line end as a backslash and n. The slice takes away its quotation marks.
    text = json.dumps(token, ensure_ascii=False)[1:-1]
    # JSON also escapes quotes and backslashes, which need no escape here.
    text = text.replace('\\"', '"')
    text = text.replace("\\\\", "\\")
    text = text.replace(" ", "␣")
    # A bar would end the cell. Last, so that its own backslash stays.
    text = text.replace("|", "\\|")
    if "`" in text:  # code that holds a backtick stands between two of them
        return f"`` {text} ``"
    return f"`{text}`"
