"""The tables of the optimizer study: Muon with AdamW against AdamW alone."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.tables import table
from planner.layout import format_count
from studies.analysis import (
    Groups,
    Runs,
    base_config,
    best_runs,
    mean,
    shorter,
    swept,
    tukey_kramer,
)
from studies.grids import ADAMW_RATES, QUARTER, QUARTER_RATES
from studies.reports.shared import (
    Outcome,
    listed,
    outcome,
    smallest_difference,
    summary,
    undecided,
    value,
)


class Reached(NamedTuple):
    """The tokens after which a run would end with a certain loss."""

    tokens: float
    bound: str  # "at most " if `tokens` is an upper bound, else ""


def tokens_to(points: list[tuple[float, float]], loss: float) -> Reached | None:
    """How many tokens a whole run needs to end with `loss`.

    `points` are (tokens, loss) of runs of several lengths. Between them the loss is taken to be
    linear in the logarithm of the tokens. Where the shortest run ends lower already, its tokens are
    an upper bound. None when the longest run does not reach the loss.
    """
    points = sorted(points)
    shortest, its_loss = points[0]
    if loss >= its_loss:
        return Reached(shortest, "at most ")
    for (fewer, higher), (more, lower) in zip(points, points[1:]):
        if lower <= loss < higher:
            part_of_the_way = (higher - loss) / (higher - lower)
            return Reached(fewer * (more / fewer) ** part_of_the_way, "")
    return None


def optimizer(results: dict) -> str:
    """Muon with AdamW beside AdamW alone, each at the best rates that its sweep found."""
    study = outcome(results)
    muon = best_runs(study.runs, "muon")
    adamw = best_runs(study.runs, "adamw")
    tokens = adamw[0]["tokens"]
    lengths = []  # (tokens, loss) of Muon's runs of several lengths
    for runs in [*shorter(study.runs), muon]:
        lengths.append((runs[0]["tokens"], mean(runs)))
    reached = tokens_to(lengths, mean(adamw))
    rows = [
        _rates_row(study, muon, adamw),
        _warmup_row(study, adamw),
        [f"validation loss after {format_count(tokens)} tokens", value(muon), value(adamw)],
    ]
    quarter = _quarter_batch(study, muon, adamw)
    if quarter:
        rows.append(_quarter_row(study, quarter, muon, adamw))
    rows += _tokens_and_time_rows(study, reached, adamw)
    rows += _speed_and_memory_rows(study)
    header = ["", "Muon with AdamW", "AdamW alone"]
    return f"{table(header, rows)}\n\n{_optimizer_summary(study, muon, adamw, quarter, lengths)}"


def _within_noise(study: Outcome, a: Runs, b: Runs) -> bool:
    """Whether the losses of two learning rates do not differ significantly.

    Unlike `undecided` it also answers for groups of one seed, as the other rates of a sweep are.
    """
    difference = abs(mean(a) - mean(b))
    return difference <= tukey_kramer(a, b, study.resolution)


def _swept_changes(study: Outcome) -> list[dict]:
    """The changes of every run of the sweeps at the whole batch, diverged runs included."""
    found = []
    for run in study.results["runs"].values():
        group = run["group"]
        if "_lr" in group and not group.startswith(QUARTER):
            found.append(run["changes"])
    return found


def _rates_row(study: Outcome, muon: Runs, adamw: Runs) -> list[str]:
    muon_lr = _rate(study, muon, "muon_lr")
    lr_of_its_adamw = _rate(study, muon, "adamw_lr")
    return [
        "best peak rates of the sweeps",
        f"Muon {muon_lr}, its AdamW {lr_of_its_adamw}",
        _rate(study, adamw, "adamw_lr"),
    ]


def _rate(study: Outcome, best: Runs, field: str) -> str:
    """The best value of the learning rate `field`, and what its sweep leaves open.

    Other values may lie within the noise. Where the best value is the first or the last of its
    sweep, a better one may lie beyond it. `best` are the runs at the best values.
    """
    own = best[0]["changes"]
    in_sweep = _sweep_of(own, field)
    requested = []  # values of the sweep, those that diverged included
    for changes in _swept_changes(study):
        if in_sweep(changes):
            requested.append(changes[field])
    tried: dict[float, Runs] = {}  # values of the sweep whose runs finished
    for runs in swept(study.runs, "muon") + swept(study.runs, "adamw"):
        changes = runs[0]["changes"]
        if in_sweep(changes):
            tried[changes[field]] = runs
    chosen = tried.get(own[field])
    if chosen is None:
        return f"{own[field]:g} (swept beside another rate)"

    alike = []
    for other, runs in sorted(tried.items()):
        if runs is not chosen and _within_noise(study, runs, chosen):
            alike.append(f"{other:g}")
    notes = []
    if alike:
        notes.append(f"within the noise: {listed(alike)}")
    if not min(requested) < own[field] < max(requested):
        notes.append("the sweep's end")
    if not notes:
        return f"{own[field]:g}"
    return f"{own[field]:g} ({'; '.join(notes)})"


def _sweep_of(best: dict, field: str) -> Callable[[dict], bool]:
    """Whether changes belong to the sweep over `field` that the changes `best` come from.

    All runs of a sweep have the same optimizer and warm-up. With Muon, the learning rate that is
    not swept is the same too.
    """
    same = dict(optimizer=best["optimizer"], warmup_fraction=best.get("warmup_fraction"))
    if best["optimizer"] == "muon":
        if field == "muon_lr":
            same["adamw_lr"] = ADAMW_RATES[1]  # Muon's rate was swept at this rate of AdamW
        else:
            same["muon_lr"] = best["muon_lr"]

    def in_sweep(changes: dict) -> bool:
        return all(changes.get(name) == wanted for name, wanted in same.items())

    return in_sweep


def _warmup_row(study: Outcome, adamw: Runs) -> list[str]:
    """The warm-ups of both optimizers, as shares of the steps. Only that of AdamW alone varies."""
    usual = base_config(study.results).warmup_fraction
    tried = []
    for changes in _swept_changes(study):
        if changes["optimizer"] == "adamw":
            tried.append(changes.get("warmup_fraction", usual))
    chosen = adamw[0]["changes"].get("warmup_fraction", usual)
    note = ""
    if chosen > usual and chosen == max(tried):
        note = " (the longest tried)"
    return ["warm-up", f"{usual:.0%}", f"{chosen:.0%}{note}"]


def _quarter_batch(study: Outcome, muon: Runs, adamw: Runs) -> Groups:
    """The best runs with a quarter of the batch, by optimizer; empty until all rates were tried.

    `muon` and `adamw` are the best runs at the whole batch.
    """
    found = {}
    for name, whole in (("muon", muon), ("adamw", adamw)):
        whole_lr = whole[0]["changes"]["adamw_lr"]
        tried = set()
        for run in study.results["runs"].values():
            if run["group"].startswith(f"{QUARTER}{name}, "):
                tried.add(run["changes"]["adamw_lr"] / whole_lr)
        all_tried = set(QUARTER_RATES) <= tried
        if not all_tried or not swept(study.runs, QUARTER + name):
            return {}
        found[name] = best_runs(study.runs, QUARTER + name)
    return found


def _quarter_row(study: Outcome, quarter: Groups, muon: Runs, adamw: Runs) -> list[str]:
    row = ["with 4 times as many steps, of a quarter"]
    for name, whole in (("muon", muon), ("adamw", adamw)):
        runs = quarter[name]
        row.append(f"{value(runs)} ({_quarter_settings(study, name, runs, whole)})")
    return row


def _quarter_settings(study: Outcome, name: str, runs: Runs, whole: Runs) -> str:
    """The factor of the learning rates that is best for a quarter of the batch, and what is open.

    `runs` are the best runs with a quarter of the batch, `whole` those with the whole batch.
    """
    own = runs[0]["changes"]
    of_whole = whole[0]["changes"]
    own_warmup = own.get("warmup_fraction")

    def factor(changes: dict) -> float:
        return changes["adamw_lr"] / of_whole["adamw_lr"]

    notes = [f"rates x {factor(own):g}"]
    if factor(own) == min(QUARTER_RATES):
        notes.append("the lowest tried")
    if factor(own) == max(QUARTER_RATES):
        notes.append("the highest tried")
    alike = []
    for other in swept(study.runs, QUARTER + name):
        changes = other[0]["changes"]
        same_warmup = changes.get("warmup_fraction") == own_warmup
        if other is not runs and same_warmup and _within_noise(study, other, runs):
            alike.append(factor(changes))
    if alike:
        notes.append(f"within the noise: {listed([f'{other:g}' for other in sorted(alike)])}")
    if own_warmup != of_whole.get("warmup_fraction"):
        notes.append(f"warm-up {own_warmup:.0%}")
    return "; ".join(notes)


def _tokens_and_time_rows(study: Outcome, reached: Reached | None, adamw: Runs) -> list[list[str]]:
    """What it takes with each optimizer to reach the final loss of AdamW alone.

    `reached` are the tokens that Muon needs; None if it does not reach that loss.
    """
    tokens = adamw[0]["tokens"]
    tokens_per_step = tokens / adamw[0]["changes"]["max_steps"]
    muon_speed = mean(study.speeds["muon"], "tokens_per_second")
    adamw_speed = mean(study.speeds["adamw"], "tokens_per_second")
    # So many tokens of Muon take as long as one per cent of AdamW's run.
    muon_tokens_per_percent_of_time = tokens * muon_speed / adamw_speed / 100

    def muon_needs(tokens_per_unit: float, digits: int, unit: str = "") -> str:
        """The tokens that Muon needs, in a unit of `tokens_per_unit` tokens."""
        if reached is None:
            return "not reached"
        number = reached.tokens / tokens_per_unit
        return f"{reached.bound}{number:.{digits}f}{unit}"

    return [
        ["tokens to AdamW's loss", muon_needs(1e6, 1, "M"), format_count(tokens)],
        ["steps", muon_needs(tokens_per_step, 0), f"{tokens / tokens_per_step:.0f}"],
        [
            "seconds of training at that speed",
            muon_needs(muon_speed, 0),
            f"{tokens / adamw_speed:.0f}",
        ],
        ["share of AdamW's tokens", muon_needs(tokens / 100, 0, "%"), "100%"],
        ["share of AdamW's time", muon_needs(muon_tokens_per_percent_of_time, 0, "%"), "100%"],
    ]


def _speed_and_memory_rows(study: Outcome) -> list[list[str]]:
    """Speed and memory with each optimizer, from the runs that measured speeds."""
    gpu = study.speeds["muon"][0]["machine"]["gpu"] or "the CPU"
    speed = [f"tokens/s, alone on {gpu}"]
    state_bytes = ["bytes a parameter, measured"]
    peak = ["peak memory of a run, GB"]
    for name in ("muon", "adamw"):
        runs = study.speeds[name]
        speed.append(value(runs, "tokens_per_second", 0))
        state_bytes.append(f"{runs[0]['state_bytes_per_parameter']:.1f}")
        peak.append(f"{mean(runs, 'peak_gb'):.1f}")
    return [speed, state_bytes, peak]


def _optimizer_summary(
    study: Outcome,
    muon: Runs,
    adamw: Runs,
    quarter: Groups,
    lengths: list[tuple[float, float]],
) -> str:
    """How Muon compares with AdamW alone, and what is left open.

    `muon` and `adamw` are the best runs, `quarter` those with a quarter of the batch, and `lengths`
    the (tokens, loss) of Muon's runs of several lengths.
    """
    rows = [("Muon's loss minus AdamW's", _verdict(study, muon, adamw))]
    if quarter:
        verdict = _verdict(study, quarter["muon"], quarter["adamw"])
        rows.append(("the same with 4 times as many steps", verdict))
    adamw_lr = adamw[0]["changes"]["adamw_lr"]
    losses_at_this_lr = []
    for runs in swept(study.runs, "muon"):
        if runs[0]["changes"]["adamw_lr"] == adamw_lr:
            losses_at_this_lr.append(runs[0]["val_loss"])
    if losses_at_this_lr:
        difference = min(losses_at_this_lr) - adamw[0]["val_loss"]
        label = f"the same with AdamW's rate {adamw_lr:g} beside Muon too"
        rows.append((label, f"{difference:+.3f} nats (one seed)"))
    interpolated_between = listed([format_count(tokens) for tokens, _ in lengths])
    rows.append(
        ("tokens of the runs that Muon's loss is interpolated between", interpolated_between)
    )
    rows.append(("less memory with Muon: weights, gradients and state", _bytes_saved(study)))
    rows.append(("less memory with Muon: peak of these runs", _peak_saved(study)))
    rows.append(("smallest difference that is decided", smallest_difference(study.runs)))
    return summary(rows)


def _verdict(study: Outcome, a: Runs, b: Runs) -> str:
    """The mean loss of `a` minus that of `b`, and whether the difference is significant."""
    difference = f"{mean(a) - mean(b):+.3f} nats"
    if min(len(a), len(b)) < 2:
        return f"{difference} (one seed so far)"
    if undecided(a, b, study.resolution):
        return f"{difference} (undecided)"
    return f"{difference} (decided)"


def _bytes_saved(study: Outcome) -> str:
    muon = study.speeds["muon"][0]["state_bytes_per_parameter"]
    adamw = study.speeds["adamw"][0]["state_bytes_per_parameter"]
    return f"{1 - muon / adamw:.0%}"


def _peak_saved(study: Outcome) -> str:
    muon = mean(study.speeds["muon"], "peak_gb")
    adamw = mean(study.speeds["adamw"], "peak_gb")
    return f"{1 - muon / adamw:.0%}"
