"""Sends a run's rows of metrics to a tracker as well as to metrics.jsonl.

--tracker tensorboard, trackio or wandb. The package is imported only when it is named. A tracker
that fails while the run continues is switched off with a warning: metrics.jsonl has everything.

    tensorboard --logdir checkpoints        what it wrote, in SAVE_DIR/tensorboard
    trackio show                            what it wrote, where TRACKIO_DIR says
    WANDB_MODE=offline python run_experiment.py --tracker wandb    without a network; then
    wandb sync SAVE_DIR/wandb/*                                    sends what it wrote
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from config import Config, ExperimentError
from record.side_work import ON_PURPOSE, cause_of, warn

PROJECT = "run_experiment"
IN_ANY_CASE = "metrics.jsonl is written in any case"

# What a tracker's start returns: send(values, step), and finish().
Send = Callable[[dict[str, float], int], None]
Finish = Callable[[], None]


def require(tracker: str) -> None:
    """Raises ExperimentError when the tracker's package is not installed; imports nothing."""
    if tracker == "none":
        return
    spec = importlib.util.find_spec(tracker)
    # Without an origin it is no package but a folder of that name, such as a tracker writes.
    if spec is None or spec.origin is None:
        raise ExperimentError(
            f"tracker={tracker}: the package {tracker} is not installed. "
            f"Install it with pip install {tracker}, or use --tracker none: {IN_ANY_CASE}"
        )


@contextlib.contextmanager
def tracking(config: Config, run_id: str, step: int) -> Iterator[Callable[[dict], None]]:
    """Yields a function that sends a row of metrics to config.tracker.

    `step` is where this start of the run begins. A resumed run continues in the tracker's run.
    Raises ExperimentError when the tracker of a new run cannot be started. A run that is resumed
    continues without it: nobody may be there to start it again.
    """
    if config.tracker == "none":
        yield lambda row: None
        return
    try:
        send, finish = _started(config, run_id, step)
    except ExperimentError as error:
        if step == 0:
            raise
        warn(f"warning: {error}. The run continues without it")
        yield lambda row: None
        return
    tracker = _SafeTracker(config.tracker, send, finish)
    try:
        yield tracker.track
    finally:
        tracker.close()


def _started(config: Config, run_id: str, step: int) -> tuple[Send, Finish]:
    folder = Path(config.save_dir).resolve().name
    name = re.sub(r"[^\w.-]", "_", f"{folder}-{run_id[:8]}")
    # Looked up only now, so that a test can replace one.
    start = dict(tensorboard=_tensorboard, trackio=_trackio, wandb=_wandb)[config.tracker]
    try:
        return start(config, name, step)
    except Exception as error:  # a tracker's own kind, of its configuration or the network
        remedy = "Correct it"
        if config.tracker == "wandb":
            remedy += ", or set WANDB_MODE=offline"
        raise ExperimentError(
            f"the tracker {config.tracker} could not be started: {error}. "
            f"{remedy}, or use --tracker none: {IN_ANY_CASE}"
        ) from error


class _SafeTracker:
    """A tracker that is off after its first error: no tracker is worth a run."""

    def __init__(self, name: str, send: Send, finish: Finish):
        self.name = name
        self.send = send
        self.finish = finish
        self.working = True

    def track(self, row: dict) -> None:
        self._try(lambda: self.send(numbers(row), row["step"]))

    def close(self) -> None:
        self._try(self.finish)

    def _try(self, action: Callable[[], None]) -> None:
        if not self.working:
            return
        try:
            action()
        except ON_PURPOSE:
            raise
        except BaseException as error:
            self.working = False
            warn(
                f"warning: the tracker {self.name} failed and is off from here on: "
                f"{cause_of(error)}. metrics.jsonl is still written"
            )


def numbers(row: dict) -> dict[str, float]:
    """What a tracker gets of a row: its numbers.

    Of the expert load these are the largest and the smallest share of any expert.
    """
    values = {}
    for key, value in row.items():
        if isinstance(value, (int, float)) and key != "step":
            values[key] = value
    if "expert_load" in row:
        shares = [share for layer in row["expert_load"] for share in layer]
        values["expert_load_max"] = max(shares)
        values["expert_load_min"] = min(shares)
    return values


# ---------------------------------------------------------------- the trackers


def _tensorboard(config: Config, name: str, step: int) -> tuple[Send, Finish]:
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(config.save_dir) / "tensorboard" / name
    first_new_step = None
    if step:
        first_new_step = step + 1  # hides rows past the checkpoint that the run continues from
    writer = SummaryWriter(folder, purge_step=first_new_step)
    fields = json.dumps(dataclasses.asdict(config), indent=1)
    writer.add_text("config", f"```\n{fields}\n```", step)

    def send(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send, writer.close


def _trackio(config: Config, name: str, step: int) -> tuple[Send, Finish]:
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


def _wandb(config: Config, name: str, step: int) -> tuple[Send, Finish]:
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
