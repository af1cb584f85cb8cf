"""TODO plan"""

import dataclasses

from config import Config
from planner.choice import advise, choose
from planner.machine import Machine
from planner.sizes import checkpoint_gb

# ---------------------------------------------------------------- report

COMPONENTS = dict(
    weights="Model weights",
    gradients="Gradients",
    master="fp32 master (16-bit residual)",
    momentum="Muon momentum",
    adamw="AdamW moments",
    activations="Activations",
    workspace="Optimizer workspace",
)


def memory_table(
    predicted: dict, measured: dict | None = None, capacity_gb: float | None = None
) -> str:
    """The memory table in GB: predicted, and measured where known, with the total and the headroom."""
    rows = [("Component", "Predicted (GB)") + (("Measured (GB)",) if measured else ())]

    digits = 2 if predicted["total"] >= 10 else 3

    def row(label, key):
        rows.append(
            (label, f"{predicted[key]:.{digits}f}")
            + ((f"{measured[key]:.{digits}f}" if key in measured else "-",) if measured else ())
        )

    for key, label in COMPONENTS.items():
        row(label, key)
    row("Total", "total")
    if capacity_gb and "total" in (measured or predicted):
        rows.append(
            ("Headroom", f"{capacity_gb - predicted['total']:.{digits}f}")
            + ((f"{capacity_gb - measured['total']:.{digits}f}",) if measured else ())
        )
    if predicted["host"]:
        row("Host memory (streamed state)", "host")
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([r[0].ljust(widths[0])] + [x.rjust(n) for x, n in zip(r[1:], widths[1:])])
        for r in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def format_count(n: float) -> str:
    """A large number in words: 17.97B, 4.46M, 1,920."""
    return f"{n / 1e9:,.2f}B" if n >= 1e9 else f"{n / 1e6:,.2f}M" if n >= 1e6 else f"{n:,.0f}"


def build_plan(
    c: Config, preset: str, machine: Machine, measured: tuple[float, str] | None = None
) -> dict:
    """Everything `plan` prints, as plain types; see its keys.

    `measured` is a training speed in tokens/s and the options it was measured with.
    """
    choice, kept = choose(c, machine, fixed_batch=False)
    speed, measured_with = measured or (None, None)
    words, instead = (None, None) if choice.fits(machine) else advise(choice, c, machine)

    def rounded(memory_gb: dict) -> dict:
        return {k: round(v, 3) for k, v in memory_gb.items()}

    return dict(
        preset=preset,
        total_params=c.total_params,
        active_params=c.active_params,
        gpu=machine.name,
        gpu_memory_gb=round(machine.memory_gb, 1),
        host_memory_gb=round(machine.host_memory_gb, 1),
        fits=choice.fits(machine),
        as_configured=kept,
        tokens_per_step=c.tokens_per_step,
        tokens_per_run=c.tokens_per_step * c.max_steps,
        checkpoint_gb=round(checkpoint_gb(c), 3),
        tokens_per_second=speed,
        hours=c.tokens_per_step * c.max_steps / speed / 3600 if speed else None,
        measured_with=measured_with,
        memory_gb=rounded(choice.memory_gb),
        shortage=choice.shortage(machine),
        advice=words,
        advised_memory_gb=rounded(instead.memory_gb) if instead else None,
        choice={
            f.name: getattr(choice, f.name)
            for f in dataclasses.fields(choice)
            if f.name != "memory_gb" and (f.name != "lighter_blocks" or choice.lighter_blocks)
        },
        options=choice.options(c),
    )
