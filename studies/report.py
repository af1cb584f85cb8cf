"""Writes the README's section "What it found" from studies/NAME/results.json, between the marks <!-- study NAME --> and <!-- end -->.

    python -m studies.report
    python -m studies.report FOLDER     prints what a study in another folder, or one without such marks, found

Every number in it, those in the sentences too, is computed here from a results.json; a study without one is said not to be run.
A value of several runs is their mean ± half of their spread; a run's speed is the median of its steps.
"""

import collections
import functools
import json
import math
import re
import shlex
import sys
from pathlib import Path

import numpy as np

from benchmarks.tables import fill, rewrite
from cli import exit_code, new_parser
from config import ConfigError
from planner.plan import format_count
from studies.analysis import (
    SPEED,
    ScalingLaw,
    base_config,
    best_runs,
    equal_time,
    groups,
    honest_difference,
    limit,
    mean_and_spread,
    mean_difference,
    micro_batches,
    noise,
    of_kind,
    scaling_law,
    sharpest_layer,
    shorter,
    smallest_decided,
    speed_ratios,
    swept,
    timed,
)
from studies.figures import MODES
from studies.grids import ADAMW_RATES, EQUAL_TIME, QUARTER, QUARTER_RATES, STUDIES, WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
SHOWN_TOKENS = 8


# ---------------------------------------------------------------- words


def value(runs: list[dict], key: str = "val_loss", digits: int = 3) -> str:
    mean, spread = mean_and_spread(runs, key)
    return f"{mean:,.{digits}f}" + (
        f" ± {spread / 2:,.{digits}f}" if len(runs) > 1 else " (one run)"
    )


def undecided(
    a: list[dict], b: list[dict], honest: float, more: float = 0.0, key: str = "val_loss"
) -> bool:
    """Whether two groups have one seed only, or differ by no more than the spread of either's seeds or than the study's honest
    difference; than those and `more`, if there is another uncertainty."""
    (mean_a, spread_a), (mean_b, spread_b) = mean_and_spread(a, key), mean_and_spread(b, key)
    return (
        min(len(a), len(b)) < 2
        or abs(mean_a - mean_b) <= max(spread_a, spread_b, limit(a, b, honest)) + more
    )


def against(a: list[dict], b: list[dict], honest: float, more: float = 0.0) -> str:
    """How much lower or higher a ends than b, or that it is not decided."""
    difference = mean_and_spread(a)[0] - mean_and_spread(b)[0]
    return f"{difference:+.3f}" + (", undecided" if undecided(a, b, honest, more) else "")


def least(found: dict[str, list[dict]]) -> str:
    """A sentence on what a study cannot see."""
    smallest = smallest_decided(found)
    if smallest == math.inf:
        return "There are too few seeds to tell any difference."
    seeds = next(len(runs) for runs in found.values() if len(runs) > 1)
    return f"Means of {seeds} seeds that are less than {smallest:.3f} nats apart cannot be told from each other."


def rows(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def listed(names: list[str]) -> str:
    return " and ".join([*filter(None, [", ".join(names[:-1])]), *names[-1:]])


def level(runs: dict[str, list[dict]], honest: float) -> tuple[str, str]:
    """The group that ends lowest, and a sentence on those that cannot be told from it."""
    best = min(runs, key=lambda name: mean_and_spread(runs[name])[0])
    same = [name for name in runs if name != best and undecided(runs[name], runs[best], honest)]
    others = [name for name in runs if name != best and name not in same]
    if not same or not others:
        return best, f"{'undecided' if same else 'decided'} against each of the others"
    return best, f"undecided against {listed(same)}" if len(same) <= len(
        others
    ) else f"decided only against {listed(others)}"


def code(token: str) -> str:
    """A token as Markdown code in a table, with its spaces and line ends visible."""
    text = (
        json.dumps(token, ensure_ascii=False)[1:-1]
        .replace('\\"', '"')
        .replace("\\\\", "\\")
        .replace(" ", "␣")
        .replace("|", "\\|")
    )
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def machines(results: dict) -> str:
    names = {
        run["machine"]["gpu"] or f"{run['machine']['cpus']} CPU cores"
        for run in results["runs"].values()
        if "machine" in run
    }
    return listed(sorted(names))


def budget(results: dict) -> str:
    """What was trained on what, how much of it, and how long that took."""
    b, corpus, base = results["budget"], results["corpus"], base_config(results)
    every = [run for run in results["runs"].values() if "tokens" in run]
    runs = [
        run for run in every if not run["group"].startswith(SPEED)
    ] or every  # speeds are no training
    steps = sorted({round(run["tokens"] / run["changes"]["max_steps"]) for run in runs})
    per_step = " to ".join(f"{tokens:,}" for tokens in dict.fromkeys((steps[0], steps[-1])))
    seeds = collections.Counter(
        len({run["changes"]["seed"] for run in group}) for group in groups(results).values()
    )
    kinds = [
        f"{n} configuration{'s' * (n > 1)} with {k} seed{'s' * (k > 1)}"
        for k, n in sorted(seeds.items(), reverse=True)
    ]
    kinds += [
        f"{n} {words}"
        for words, n in (
            ("to measure speeds", sum(run["group"].startswith(SPEED) for run in every)),
            ("that diverged or did not fit", len(results["runs"]) - len(every)),
        )
        if n
    ]
    sizes = sorted({(run["active_params"], run["total_params"]) for run in runs})
    size = " to ".join(
        dict.fromkeys(
            f"{format_count(active)} of {format_count(total)}"
            for active, total in (sizes[0], sizes[-1])
        )
    )
    shapes = sorted(
        {
            tuple(
                run["changes"].get(field, getattr(base, field)) for field in ("n_layers", "d_model")
            )
            for run in runs
        }
    )
    shape = " to ".join(
        dict.fromkeys(f"{layers} x {width}" for layers, width in (shapes[0], shapes[-1]))
    )
    each = [run["tokens"] / run["active_params"] for run in runs]
    seen = " to ".join(dict.fromkeys(f"{tokens:.2g}" for tokens in (min(each), max(each))))
    rates = listed(
        [
            f"{name} {getattr(base, field):g}"
            for field, name in (("muon_lr", "Muon"), ("adamw_lr", "AdamW"))
            if not any(field in run["changes"] for run in runs)
        ]
    )
    minutes = listed(
        [
            f"{b[key]:.0f} {name} minutes"
            for key, name in (("gpu_minutes", "GPU"), ("cpu_minutes", "CPU"))
            if b[key]
        ]
    )
    return (
        f"The models ({shape}, layers x width) have {size} parameters active and see at most {format_count(max(run['tokens'] for run in runs))} "
        f"tokens ({seen} for an active parameter, {max(run['passes'] for run in runs):.2f} passes over `{corpus['data']}`, {format_count(corpus['train_tokens'])} tokens) in steps of {per_step}, in "
        f"{base.precision}"
        + (f"; peak rates: {rates}" if rates else "")
        + f". {len(results['runs'])} runs: {listed(kinds)}; {format_count(b['tokens'])} "
        f"tokens, {minutes} in all on {machines(results)}."
    )


# ---------------------------------------------------------------- one study each


def tokens_to(points: list[tuple[float, float]], loss: float) -> tuple[float, str] | None:
    """With how many tokens a whole run reaches a loss, by (tokens, loss) of runs of several lengths, between which it is taken to
    be linear in the logarithm of the tokens; "at most " stands before the shortest run, None after the longest."""
    points = sorted(points)
    if loss >= points[0][1]:
        return points[0][0], "at most "
    for (fewer, higher), (more, lower) in zip(points, points[1:]):
        if lower <= loss < higher:
            return fewer * (more / fewer) ** ((higher - loss) / (higher - lower)), ""
    return None


def optimizer(results: dict) -> str:
    found, speeds = groups(results), timed(results)
    muon, adamw = best_runs(found, "muon"), best_runs(found, "adamw")
    target, tokens = mean_and_spread(adamw)[0], adamw[0]["tokens"]
    lengths = [(runs[0]["tokens"], mean_and_spread(runs)[0]) for runs in [*shorter(found), muon]]
    reached = tokens_to(lengths, target)
    per_step = tokens / adamw[0]["changes"]["max_steps"]
    rates = {
        name: mean_and_spread(speeds[name], "tokens_per_second")[0] for name in ("muon", "adamw")
    }
    bytes_each = {name: speeds[name][0]["state_bytes_per_parameter"] for name in rates}
    peaks = {name: mean_and_spread(speeds[name], "peak_gb")[0] for name in rates}
    none, honest = "not reached", honest_difference(found)
    sweeps = swept(found, "muon") + swept(found, "adamw")
    asked = [
        run["changes"]
        for run in results["runs"].values()
        if "_lr" in run["group"] and not run["group"].startswith(QUARTER)
    ]  # those that diverged too

    def within_the_noise(a: list[dict], b: list[dict]) -> bool:
        """Whether two rates cannot be told from each other, with one seed too."""
        return abs(mean_and_spread(a)[0] - mean_and_spread(b)[0]) <= limit(a, b, honest)

    def rate(best: list[dict], field: str) -> str:
        """The best rate; which others of its sweep cannot be told from it, and whether the sweep ended there, so that a better one may lie beyond."""
        mine = best[0]["changes"]
        beside = dict(optimizer=mine["optimizer"])
        if mine["optimizer"] == "muon":  # its own rate was swept beside this one of AdamW
            beside |= (
                dict(adamw_lr=ADAMW_RATES[1])
                if field == "muon_lr"
                else dict(muon_lr=mine["muon_lr"])
            )
        beside |= dict(warmup_fraction=mine.get("warmup_fraction"))
        ends = [
            c[field] for c in asked if beside.items() <= (dict(warmup_fraction=None) | c).items()
        ]
        tried = {
            runs[0]["changes"][field]: runs
            for runs in sweeps
            if beside.items() <= (dict(warmup_fraction=None) | runs[0]["changes"]).items()
        }
        nearest = tried.get(mine[field])
        if nearest is None:
            return f"{mine[field]:g} (swept beside another rate)"
        alike = [
            f"{other:g}"
            for other, runs in sorted(tried.items())
            if runs is not nearest and within_the_noise(runs, nearest)
        ]
        notes = [f"within the noise: {listed(alike)}"] * bool(alike)
        notes += ["the sweep's end"] * (not min(ends) < mine[field] < max(ends))
        return f"{mine[field]:g}" + (f" ({'; '.join(notes)})" if notes else "")

    usual = base_config(results).warmup_fraction
    warmups = [c.get("warmup_fraction", usual) for c in asked if c["optimizer"] == "adamw"]
    warmup = adamw[0]["changes"].get("warmup_fraction", usual)
    longest = " (the longest tried)" if usual < warmup == max(warmups) else ""
    shares = {
        name: {
            run["changes"]["adamw_lr"] / best[0]["changes"]["adamw_lr"]
            for run in results["runs"].values()
            if run["group"].startswith(f"{QUARTER}{name}, ")
        }
        for name, best in (("muon", muon), ("adamw", adamw))
    }
    smaller = (
        {name: best_runs(found, QUARTER + name) for name in rates}
        if all(set(QUARTER_RATES) <= tried for tried in shares.values())
        and all(swept(found, QUARTER + name) for name in rates)
        else {}
    )

    def times(name: str) -> str:
        """At which share of the rates above, and with which warm-up, the smaller steps did best."""
        whole, mine = (muon if name == "muon" else adamw)[0]["changes"], smaller[name][0]["changes"]
        share = mine["adamw_lr"] / whole["adamw_lr"]
        end = {
            min(QUARTER_RATES): ", the lowest tried",
            max(QUARTER_RATES): ", the highest tried",
        }.get(share, "")
        level = [
            runs[0]["changes"]["adamw_lr"] / whole["adamw_lr"]
            for runs in swept(found, QUARTER + name)
            if runs is not smaller[name]
            and runs[0]["changes"].get("warmup_fraction") == mine.get("warmup_fraction")
            and within_the_noise(runs, smaller[name])
        ]
        alike = (
            f"; within the noise: {listed([f'{other:g}' for other in sorted(level)])}"
            if level
            else ""
        )
        other = (
            f"; warm-up {mine['warmup_fraction']:.0%}"
            if mine.get("warmup_fraction") != whole.get("warmup_fraction")
            else ""
        )
        return f" (rates x {share:g}{end}{alike}{other})"

    table = rows(
        ["", "Muon with AdamW", "AdamW alone"],
        [
            [
                "best peak rates of the sweeps",
                f"Muon {rate(muon, 'muon_lr')}, its AdamW {rate(muon, 'adamw_lr')}",
                rate(adamw, "adamw_lr"),
            ],
            ["warm-up", f"{usual:.0%}", f"{warmup:.0%}{longest}"],
            [f"validation loss after {format_count(tokens)} tokens", value(muon), value(adamw)],
            *(
                [
                    [
                        "with 4 times as many steps, of a quarter",
                        *(value(smaller[name]) + times(name) for name in rates),
                    ]
                ]
                if smaller
                else []
            ),
            [
                "tokens to AdamW's loss",
                f"{reached[1]}{reached[0] / 1e6:.1f}M" if reached else none,
                format_count(tokens),
            ],
            [
                "steps",
                f"{reached[1]}{reached[0] / per_step:.0f}" if reached else none,
                f"{tokens / per_step:.0f}",
            ],
            [
                "seconds of training at that speed",
                f"{reached[1]}{reached[0] / rates['muon']:.0f}" if reached else none,
                f"{tokens / rates['adamw']:.0f}",
            ],
            [
                f"tokens/s, alone on {speeds['muon'][0]['machine']['gpu'] or 'the CPU'}",
                *(value(speeds[name], "tokens_per_second", 0) for name in rates),
            ],
            ["bytes a parameter, measured", *(f"{bytes_each[name]:.1f}" for name in rates)],
            ["peak memory of a run, GB", *(f"{peaks[name]:.1f}" for name in rates)],
        ],
    )

    def lead(muon: list[dict], adamw: list[dict]) -> str:
        gap = mean_and_spread(adamw)[0] - mean_and_spread(muon)[0]
        sure = (
            "one seed so far"
            if min(len(muon), len(adamw)) < 2
            else "undecided"
            if undecided(muon, adamw, honest)
            else "decided"
        )
        return f"{abs(gap):.3f} nats {'lower' if gap > 0 else 'higher'} ({sure})"

    cost = (
        f"Muon reaches AdamW's loss with {reached[1]}about {reached[0] / tokens:.0%} of the tokens and "
        f"{reached[0] / rates['muon'] * rates['adamw'] / tokens:.0%} of the time"
        if reached
        else "Muon does not reach AdamW's loss"
    )
    answer = (
        f"{cost}. At the end of runs of {format_count(tokens)} tokens, with the best settings tried, it is {lead(muon, adamw)}"
        + (
            f"; with a quarter of the batch, and so 4 times the steps, {lead(*smaller.values())}"
            if smaller
            else ""
        )
        + "."
    )
    words = "AdamW alone has one rate for all parameters"
    same_rate = [
        runs[0]["val_loss"]
        for runs in sweeps
        if runs[0]["changes"]["optimizer"] == "muon"
        and runs[0]["changes"]["adamw_lr"] == adamw[0]["changes"]["adamw_lr"]
    ]
    if same_rate:
        words += (
            f"; with that rate, {adamw[0]['changes']['adamw_lr']:g}, for what AdamW trains beside Muon too, the difference is "
            f"{adamw[0]['val_loss'] - min(same_rate):.3f} (one seed)"
        )
    words += (
        f". Muon's loss is interpolated between runs of {listed([format_count(length) for length, _ in lengths])} tokens, each with a whole schedule. "
        f"Muon's own rate was swept with its AdamW at {ADAMW_RATES[1]:g}, and its warm-up not at all. Weights, gradients and state take {1 - bytes_each['muon'] / bytes_each['adamw']:.0%} less memory (the "
        f"brief: 30%, and 8 bytes against 12, which is 33%), as Muon keeps one momentum, in 16 bits, and AdamW two moments, in 32; the peak of these runs, most "
        f"of which is activations, falls by {1 - peaks['muon'] / peaks['adamw']:.0%}."
    )
    return f"{answer}\n\n{table}\n\n{words}"


def routing(results: dict) -> str:
    found, speeds = groups(results), timed(results)
    honest = honest_difference(found)
    fair = {
        f"top-{k}": found["top-2, equal tokens" if k == 2 else f"top-{k}, equal FLOPs"]
        for k in (1, 2, 3, 4)
    }
    same = {f"top-{k}": found[f"top-{k}, equal tokens"] for k in (1, 2, 3, 4)}
    flops = {name: runs[0]["flops"] / runs[0]["tokens"] for name, runs in same.items()}
    table = rows(
        [
            "experts a token",
            "loss, equal tokens",
            "against top-2",
            "loss, equal FLOPs",
            "against top-2",
            "FLOPs a token",
            "tokens/s",
        ],
        [
            [
                name,
                value(same[name]),
                against(same[name], same["top-2"], honest) if name != "top-2" else "",
                value(fair[name]),
                against(fair[name], fair["top-2"], honest) if name != "top-2" else "",
                f"{flops[name] / flops['top-2']:.2f}x",
                value(speeds[name], "tokens_per_second", 0),
            ]
            for name in same
        ],
    )
    (best, sure), (best_fair, sure_fair) = level(same, honest), level(fair, honest)
    off = max(abs(runs[0]["flops"] / fair["top-2"][0]["flops"] - 1) for runs in fair.values())
    more, gain = (
        fair["top-1"][0]["tokens"] / same["top-1"][0]["tokens"],
        mean_and_spread(same["top-1"])[0] - mean_and_spread(fair["top-1"])[0],
    )
    return (
        f"At equal tokens ({format_count(same['top-2'][0]['tokens'])}) {best} ends lowest, {sure}; at equal FLOPs {best_fair} does, {sure_fair}.\n\n{table}"
        f"\n\n{least(found)} At equal FLOPs fewer experts see more tokens: top-1 {more:.2f} times as many, which alone changes its loss by "
        f"{-gain:+.3f} nats, in runs so short. The weights of a token's experts sum to 1, but top-1's, from which its router must learn, is the probability of the expert, below 1."
        + (
            f" In whole steps the FLOPs are equal but for {off:.0%}: give more --tokens."
            if off > 0.02
            else ""
        )
    )


def balance(results: dict) -> str:
    names = {
        "none": "none",
        **{
            f"{scope}, weight {weight:g}": f"loss {weight:g}, {scope}"
            for scope in ("batch", "sequence")
            for weight in WEIGHTS
        },
        "bias": "bias alone",
    }
    found = {f"`{names[name]}`": runs for name, runs in groups(results).items() if name in names}
    honest = honest_difference(found)
    best, sure = level(found, honest)
    base = base_config(results)
    table = rows(
        [
            "balancing",
            "validation loss",
            f"against {best}",
            "1 - load entropy (0: even)",
            "largest share of an expert",
        ],
        [
            [
                name,
                value(runs),
                "" if name == best else against(runs, found[best], honest),
                f"{1 - mean_and_spread(runs, 'load_entropy')[0]:.2g}",
                value(runs, "worst_share"),
            ]
            for name, runs in found.items()
        ],
    )
    as_low = {
        name: runs
        for name, runs in found.items()
        if name == best or undecided(runs, found[best], honest)
    }
    low, high = (
        pick(as_low, key=lambda name: mean_and_spread(as_low[name], "worst_share")[0])
        for pick in (min, max)
    )
    shares = honest_difference(found, "worst_share")
    as_even = [
        name
        for name, runs in as_low.items()
        if name != low and undecided(runs, as_low[low], shares, key="worst_share")
    ]
    return (
        f"{best} ends lowest, {sure}; of what cannot be told from it, {low} keeps the busiest expert's share smallest"
        + (f", undecided against {listed(as_even)}" if as_even else "")
        + f".\n\n{table}"
        "\n\nOf it and those that cannot be told from it, the largest share of an expert goes "
        f"from {value(as_low[low], 'worst_share')} ({low}) to {value(as_low[high], 'worst_share')} ({high}). Entropy and share are "
        f"of the training batches of the last lines of a run's log, a tenth of them; the share is that of the busiest expert of all layers, "
        f"in all choices of an expert by a token: even is {1 / base.num_experts:g}, and no share exceeds {1 / base.top_k:g}, as a token chooses "
        f"{base.top_k}. The bias has one step, {base.load_balancing_bias_rate:g}. {least(found)}"
    )


def specialization(results: dict) -> str:
    experts = [run["experts"] for runs in groups(results).values() for run in runs]
    first = experts[0]

    def mean_bits(i: int, label: str, key: str) -> list[dict]:
        return [dict(bits=float(np.mean(e["steps"][i][label][key]))) for e in experts]

    body = [
        [
            "before training" if step["step"] == 0 else format_count(step["tokens"]),
            *(
                value(mean_bits(i, label, key), "bits")
                for label in ("kind", "domain")
                for key in ("bits", "shuffled_most")
            ),
        ]
        for i, step in enumerate(first["steps"])
    ]
    table = rows(
        ["tokens of training", "bits of the kind", "shuffled", "bits of the domain", "shuffled"],
        body,
    )
    layer = sharpest_layer(first, "kind")
    pairs = np.array(first["kind_table"][layer], float)

    def largest(shares: np.ndarray) -> str:
        return listed([f"{first['kinds'][k]} ({shares[k]:.0%})" for k in np.argsort(-shares)[:2]])

    tokens = rows(
        [
            "expert",
            "is chosen, of all choices by a kind",
            "its tokens are",
            "tokens that set it apart",
        ],
        [
            [
                str(e + 1),
                largest(pairs[e] / pairs.sum(0).clip(1)),
                largest(pairs[e] / pairs[e].sum().clip(1)),
                " ".join(code(token) for token, _ in first["top_tokens"][layer][e][:SHOWN_TOKENS]),
            ]
            for e in range(len(pairs))
        ],
    )
    most = most_bits(first)
    last = len(first["steps"]) - 1
    (kind, domain), (kind_before, domain_before) = (
        [mean_and_spread(mean_bits(i, label, "bits"), "bits")[0] for label in ("kind", "domain")]
        for i in (last, 0)
    )
    shuffled = mean_and_spread(mean_bits(last, "domain", "shuffled_most"), "bits")[0]
    others = (
        first["domain_tokens"][first["domains"].index("others")] / sum(first["domain_tokens"])
        if "others" in first["domains"]
        else 0
    )
    seed = next(iter(results["runs"].values()))["changes"]["seed"]
    return (
        f"What kind a token is of: the expert says {kind:.3f} bits{f', {kind / most:.0%} of the {most:.2f} that it could' if most else ''}, before training "
        f"{kind_before:.3f}, as equal tokens look alike to a router. What domain (package) its text is from: {domain:.3f} bits, of "
        f"which {shuffled:.3f} are found with shuffled domains too, and {domain_before:.3f} before training.\n\n{table}\n\nMeans over the MoE layers, "
        f'of {format_count(first["tokens"])} held-out tokens, each counted at each of its experts; "shuffled" is the largest of ten. The kinds have {first["kind_entropy"]:.2f} '
        f"bits and the domains {first['domain_entropy']:.2f}; one of a token's experts can say no more than {most:.2f}, as the token chooses others too."
        + (
            f" Of the tokens {others:.0%} are of packages too small to have a name of their own."
            if others
            else ""
        )
        + f" Layer {first['layers'][layer] + 1} says most of the kind; its experts (seed {seed}):\n\n{tokens}"
    )


def most_bits(experts: dict) -> float:
    """How many bits one of a token's k experts can say of its kind, mean over the layers: no more than the kinds have, and no more than
    the experts' entropy less log2(k), as it stays open which of the k it is."""
    tables = [np.array(table, float) for table in experts["kind_table"]]
    shares = [table.sum(1) / table.sum() for table in tables]
    k = tables[0].sum() / max(1, sum(experts["kind_tokens"]))
    return max(
        0.0,
        float(
            np.mean(
                [
                    min(
                        experts["kind_entropy"],
                        -sum(p * math.log2(p) for p in share if p > 0) - math.log2(k),
                    )
                    for share in shares
                ]
            )
        ),
    )


def equal_loss_flops(
    law: ScalingLaw, runs: list[dict], deviation: float, tried: list[float]
) -> str:
    """How many times the FLOPs a token of `runs` a model that follows the law needs for their loss, whose deviation over seeds is
    given, with a 95% interval; no farther than models were tried."""
    own, mean = runs[0]["flops"] / runs[0]["tokens"], mean_and_spread(runs)[0]
    needed = [law.inverse(mean), *law.inverse_between(mean, deviation / math.sqrt(len(runs)))]
    words = [
        f"> {max(tried) / own:.2f}"
        if x > max(tried)
        else f"< {min(tried) / own:.2f}"
        if x < min(tried)
        else f"{x / own:.2f}"
        for x in needed
    ]
    return (
        "beyond those tried"
        if words[1][0] == ">" or words[2][0] == "<"
        else f"{words[0]} ({words[1]} to {words[2]})"
    )


def scaling(results: dict) -> str:
    found, speeds = groups(results), timed(results)
    honest, deviation = (
        honest_difference(found),
        noise({group: runs for group, runs in found.items() if group.startswith("moe, ")}),
    )
    dense_runs, moe_runs = (of_kind(results, kind) for kind in ("dense", "moe"))
    names = [group.removeprefix("moe, ") for group in found if group.startswith("moe, ")]
    sizes = {
        name: (
            found[f"moe, {name}"],
            found[f"dense, {name}"],
            found.get(f"dense, {name}{EQUAL_TIME}"),
        )
        for name in names
    }
    together, interval = mean_difference([(moe, dense) for moe, dense, _ in sizes.values()])
    by_flops = [
        scaling_law([run["flops_per_token"] for run in runs], [run["val_loss"] for run in runs])
        for runs in (dense_runs, moe_runs)
    ]
    by_parameters = scaling_law(
        [run["total_params"] for run in dense_runs], [run["val_loss"] for run in dense_runs]
    )
    ratios = {
        name: speed_ratios(speeds[f"moe, {name}"], speeds[f"dense, {name}"]) for name in sizes
    }
    per_time, speed_error, nats_of_speeds = equal_time(results)
    body, differences = [], dict(tokens=[], time=[])
    for name, (moe, dense, timely) in sizes.items():
        differences["tokens"].append(against(moe, dense, honest))
        differences["time"].append(
            against(moe, timely, honest, nats_of_speeds) if timely else "not run yet"
        )
        worth = (
            equal_loss_flops(
                by_flops[0], moe, deviation, [run["flops_per_token"] for run in dense_runs]
            )
            if by_flops[0] and deviation < math.inf
            else "–"
        )
        body.append(
            [
                name,
                format_count(moe[0]["active_params"]),
                format_count(moe[0]["total_params"]),
                value(dense),
                value(moe),
                differences["tokens"][-1],
                worth,
                differences["time"][-1],
                value(ratios[name], "ratio"),
            ]
        )
    table = rows(
        [
            "layers x width",
            "parameters used",
            "of the MoE's",
            "dense loss",
            "MoE loss",
            "MoE - dense, equal tokens, FLOPs and parameters used",
            "FLOPs a token of a dense model with the MoE's loss, times",
            "MoE - dense, equal time",
            "MoE's speed, times the dense one's",
        ],
        body,
    )

    def counted(words: list[str]) -> str:
        verdicts = [
            {"-": "lower", "+": "higher"}.get(text[0], "unknown")
            if "undecided" not in text
            else "undecided"
            for text in words
        ]
        return listed(
            [
                f"{word} at {verdicts.count(word)} of {len(words)} sizes"
                for word in ("lower", "higher", "undecided", "unknown")
                if word in verdicts
            ]
        )

    laws = dict(zip(("the dense model", "the MoE"), by_flops))
    fits = (
        "By fits of floor + rise x (FLOPs a token)^-exponent (Hoffmann et al. 2022, with the tokens fixed), ± standard errors, "
        + listed(
            [
                f"{name} falls towards {law.floor:.2f} ± {law.errors[0]:.2f} with the exponent {law.exponent:.2f} ± {law.errors[2]:.2f}"
                if law
                else f"{name} has none that these losses determine"
                for name, law in laws.items()
            ]
        )
        + "; a floor is that of so few tokens, at these rates."
    )
    largest = max(run["total_params"] for run in dense_runs)
    beside = []
    for name, (moe, _, _) in sizes.items():
        total = moe[0]["total_params"]
        if by_parameters and total <= largest and deviation < math.inf:
            difference, error = (
                mean_and_spread(moe)[0] - by_parameters.at(total),
                math.hypot(by_parameters.error_at(total), deviation / math.sqrt(len(moe))),
            )
            beside.append(f"{difference:+.3f} ± {error:.3f} at {name}")
    limit_of_time = smallest_decided(found) + nats_of_speeds
    timely_limit = (
        f" With equal time the limit is {limit_of_time:.3f}, as the ratio of the speeds is known to {speed_error:.0%} "
        f"(95% interval) only, and by how the loss falls with tokens here 10% more time is worth up to {per_time * math.log(1.1):.2f} nats."
        if limit_of_time < math.inf
        else ""
    )
    extra = [runs[0]["total_params"] / runs[0]["active_params"] for runs, _, _ in sizes.values()]
    mean = f"; by the mean of all, {abs(together):.3f} ± {interval:.3f} nats (95% interval) {'lower' if together < 0 else 'higher'}"
    return (
        f"With equal tokens, FLOPs and parameters used the MoE ends {counted(differences['tokens'])}{mean if interval < math.inf else ''}. With "
        f"equal time it ends {counted(differences['time'])}.\n\n{table}\n\nEach dense model has feed-forward networks twice as wide, so that parameters "
        "used and FLOPs are those of the MoE; for equal time it was trained again, on as many tokens as take it the MoE's time, of at most 4 passes "
        f"over the text. {least(found)}{timely_limit} {fits} The MoE has {min(extra):.1f} to {max(extra):.1f} times as many parameters as it uses"
        + (
            "; what that is worth is in the table, with 95% intervals by the dense model's fit"
            if by_flops[0]
            else ""
        )
        + " (the brief: 4x capacity at the same compute)."
        + (
            f" Against a dense model of as many parameters in all, by its fit, the MoE ends, ± standard errors, {listed(beside)} nats"
            + ("; larger ones lie beyond the fit." if len(beside) < len(sizes) else ".")
            if beside
            else ""
        )
    )


def checkpointing(results: dict) -> str:
    body, saved, slower = [], [], []
    fitted, too_large = micro_batches(results)

    def slowdown(times: list[dict]) -> str:
        mean, spread = mean_and_spread(times, "ratio")
        return f"{round(100 * (mean - 1)):+d}%" + (
            f" ± {spread / 2:.0%}" if len(times) > 1 else " (one run)"
        )

    for depth in sorted({layers for layers, _ in fitted.keys() | too_large.keys()}):
        fits = {mode: fitted.get((depth, mode), {}) for mode in MODES}
        common = sorted(set.intersection(*map(set, fits.values())))
        largest = {
            mode: f"{max(fits[mode], default=0)}, not {too_large[depth, mode]}"
            if (depth, mode) in too_large
            else f"at least {max(fits[mode], default=0)}"
            for mode in MODES
        }
        body += [[str(depth), mode, *["–"] * 5, largest[mode]] for mode in MODES if not common]
        for batch, mode in ((batch, mode) for batch in common for mode in MODES):
            none, runs = fits["none"][batch], fits[mode][batch]
            activations = [r[0]["memory_gb"].get("activations") for r in (runs, none)]
            less = (
                None
                if None in activations or not activations[1]
                else 1 - activations[0] / activations[1]
            )
            times = speed_ratios(none, runs)
            if mode != "none" and batch == common[-1]:
                saved += [] if less is None else [(mode, less)]
                slower += [(mode, mean_and_spread(times, "ratio")[0] - 1)]
            body.append(
                [
                    str(depth),
                    mode,
                    str(batch),
                    f"{mean_and_spread(runs, 'peak_gb')[0]:.1f}",
                    "–" if less is None else f"{less:.0%}",
                    value(runs, "tokens_per_second", 0),
                    "" if mode == "none" else slowdown(times),
                    largest[mode],
                ]
            )
    table = rows(
        [
            "layers",
            "checkpointing",
            "micro-batch",
            "peak GB",
            "of the activations saved",
            "tokens/s",
            "time a token",
            "largest micro-batch that fits",
        ],
        body,
    )

    def span(found: list, mode: str) -> str:
        values = [v for m, v in found if m == mode]
        ends = sorted({round(100 * v) for v in values})
        return (
            " to ".join(f"{v}%" for v in dict.fromkeys((ends[0], ends[-1])))
            if ends
            else "an unknown share"
        )

    return (
        f"At the largest micro-batch that all three fit, `selective` saves {span(saved, 'selective')} of the activations' memory for "
        f"{span(slower, 'selective')} more time a token, `full` {span(saved, 'full')} for {span(slower, 'full')} (the brief: 40 to 50% saved, 10 to "
        f"15% slower).\n\n{table}\n\nWith a micro-batch larger than the base's step the step is larger too, so that the optimizer's part of a "
        "token's time is smaller."
    )


def losses(results: dict) -> str:
    """A study that has no words of its own."""
    found, speeds = groups(results), timed(results)
    honest = honest_difference(found)
    best, sure = level(found, honest) if len(found) > 1 else (next(iter(found), ""), "")
    body = [
        [
            name,
            value(found[name]) if name in found else "–",
            against(found[name], found[best], honest) if name in found and name != best else "",
            format_count(found[name][0]["tokens"]) if name in found else "–",
            value(speeds[name], "tokens_per_second", 0) if name in speeds else "–",
        ]
        for name in [*found, *(name for name in speeds if name not in found)]
    ]
    table = rows(
        [
            "configuration",
            "validation loss",
            f"against {best or 'others'}",
            "tokens",
            "tokens/s, alone",
        ],
        body,
    )
    return (
        (f"{best} ends lowest, {sure}.\n\n" if sure else "")
        + table
        + (f"\n\n{least(found)}" if found else "")
    )


BLOCKS = dict(
    optimizer=optimizer,
    routing=routing,
    balance=balance,
    specialization=specialization,
    scaling=scaling,
    checkpointing=checkpointing,
)


# ---------------------------------------------------------------- the README


def question(name: str) -> str:
    """The first sentence of a study's docstring."""
    words = " ".join((getattr(STUDIES.get(name), "__doc__", None) or name).split())
    return re.match(r".*?(?:[.?](?= |$)|$)", words)[0]


def block(name: str, folder: Path) -> str:
    """A study's part of the section."""
    head = f"### {question(name)}\n\n"
    if not (folder / "results.json").exists():
        return f"{head}Not run yet: `python -m studies.run {name}`."
    results = json.loads((folder / "results.json").read_text())
    if results["study"] != name:
        raise ValueError(f"{folder / 'results.json'} is of the study {results['study']}")
    figure = folder / "figure.png"
    if not (results["finished"] and figure.exists()):
        seeds = max((run["changes"]["seed"] for run in results["runs"].values()), default=1)
        own = [
            *(["--seeds", str(seeds)] if seeds > 2 else []),
            *(["--out", str(folder)] if folder != ROOT / "studies" / name else []),
        ]
        command = [
            "python",
            "-m",
            "studies.run",
            name,
            "--tokens",
            format(results["tokens"], ".15g"),
            *own,
            *results["options"],
        ]
        head += f"Not finished ({len(results['runs'])} runs so far): `{shlex.join(command)}` goes on.\n\n"
    if not figure.exists():
        return head.strip()
    shown = figure.relative_to(ROOT) if figure.is_relative_to(ROOT) else figure
    return f"{head}![{question(name)}]({shown})\n\n{BLOCKS.get(name, losses)(results)}\n\n{budget(results)}"


def filled(readme: str, folder: Path = ROOT / "studies") -> str:
    """The README with every study's block written anew from the results in `folder`."""
    return fill(
        readme, {f"study {name}": functools.partial(block, name, folder / name) for name in STUDIES}
    )


def main(argv: list[str]) -> None:
    parser = new_parser("python -m studies.report [FOLDER]", __doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse(argv).folder
    if folder is None:
        rewrite(filled)
    elif not (folder / "results.json").exists():
        beside = ROOT / "studies" / folder
        raise ConfigError(
            f"there is no results.json in {folder}: name the folder of a study, its --out"
            + (f", such as {beside}" if (beside / "results.json").exists() else "")
        )
    else:
        print(block(json.loads((folder / "results.json").read_text())["study"], folder))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
