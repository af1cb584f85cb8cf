"""Sends a run's rows of metrics to a tracker besides metrics.jsonl: --tracker tensorboard, trackio or wandb.

The package is imported only when it is asked for. A tracker that fails while the run goes on is switched off with a warning:
metrics.jsonl has everything.

    tensorboard --logdir checkpoints        what it wrote, in SAVE_DIR/tensorboard
    trackio show                            what it wrote, where TRACKIO_DIR says
    WANDB_MODE=offline python run_experiment.py --tracker wandb ; wandb sync SAVE_DIR/wandb/*      without a network
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

from config import Config, ExperimentError

PROJECT = "run_experiment"


def require(tracker: str) -> None:
    """Raises ExperimentError when the tracker's package is not installed; imports nothing."""
    spec = importlib.util.find_spec(tracker) if tracker != "none" else None
    if tracker != "none" and (
        spec is None or spec.origin is None
    ):  # without an origin: a folder of that name
        raise ExperimentError(
            f"tracker={tracker}: the package {tracker} is not installed. Install it with pip install {tracker}, "
            "or use --tracker none: metrics.jsonl is written in any case"
        )


@contextlib.contextmanager
def tracking(config: Config, run_id: str, step: int):
    """Yields a function that sends a row of metrics to config.tracker; `step` is where the run begins or goes on.

    A resumed run goes on in the tracker's run. Raises ExperimentError when the tracker cannot be started.
    """
    if config.tracker == "none":
        yield lambda row: None
        return
    name = re.sub(r"[^\w.-]", "_", f"{Path(config.save_dir).resolve().name}-{run_id[:8]}")
    try:
        send, finish = dict(tensorboard=_tensorboard, trackio=_trackio, wandb=_wandb)[
            config.tracker
        ](config, name, step)
    except Exception as error:  # a tracker's own, of its configuration or the network
        offline = ", or set WANDB_MODE=offline" if config.tracker == "wandb" else ""
        raise ExperimentError(
            f"the tracker {config.tracker} could not be started: {error}. Mend it{offline}, or use --tracker "
            "none: metrics.jsonl is written in any case"
        ) from error
    working = True

    def safely(action, *arguments) -> None:
        nonlocal working
        try:
            if working:
                action(*arguments)
        except Exception as error:  # no tracker is worth a run
            working = False
            print(
                f"warning: the tracker {config.tracker} failed and is off from here on: {error}. metrics.jsonl goes on",
                file=sys.stderr,
            )

    try:
        yield lambda row: safely(send, numbers(row), row["step"])
    finally:
        safely(finish)


def numbers(row: dict) -> dict[str, float]:
    """What a tracker gets of a row: its numbers, and of the expert load the largest and smallest share of any expert."""
    values = {
        key: value
        for key, value in row.items()
        if isinstance(value, (int, float)) and key != "step"
    }
    if "expert_load" in row:
        shares = [share for layer in row["expert_load"] for share in layer]
        values |= dict(expert_load_max=max(shares), expert_load_min=min(shares))
    return values


def _tensorboard(config: Config, name: str, step: int):
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(config.save_dir) / "tensorboard" / name
    writer = SummaryWriter(
        folder, purge_step=step + 1 if step else None
    )  # hides rows past the checkpoint
    writer.add_text("config", f"```\n{json.dumps(dataclasses.asdict(config), indent=1)}\n```", step)

    def send(values: dict, step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send, writer.close


def _trackio(config: Config, name: str, step: int):
    import trackio

    run = trackio.init(
        project=PROJECT,
        name=name,
        config=dataclasses.asdict(config),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return run.log, trackio.finish


def _wandb(config: Config, name: str, step: int):
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=name,
        name=name,
        dir=config.save_dir,
        config=dataclasses.asdict(config),
        resume="allow",
    )
    return run.log, run.finish
