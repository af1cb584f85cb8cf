"""What a checkpoint of this program must hold, checked before memory is taken for it.

Checksums show that a file is as it was written. They do not show who wrote it: a file may come
from elsewhere. So types, ranges and shapes are checked before a command relies on them.
"""

import math
import random
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from config import Config, ConfigError, parameter_table, resumed_config
from record import lineage

LARGEST_WHOLE = 2**63 - 1
MT19937_WORDS = 624  # of numpy's and Python's random generator


class WrongContent(Exception):
    """The text says what in the content is wrong."""


# ---------------------------------------------------------------- one value


def _is_whole(value) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_WHOLE


def _is_number(value) -> bool:
    return type(value) in (int, float)


def _is_quantity(value) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0


def _is_text(value) -> bool:
    return type(value) is str


def _is_text_or_none(value) -> bool:
    return value is None or type(value) is str


def _is_quantity_or_none(value) -> bool:
    return value is None or _is_quantity(value)


def _is_list_of_steps(value) -> bool:
    return type(value) is list and all(_is_whole(step) for step in value)


def _are_metrics(value) -> bool:
    if not isinstance(value, dict):
        return False
    return all(metric is None or _is_number(metric) for metric in value.values())


Check = tuple[Callable, str]  # a test of a value, and what the value must be

WHOLE: Check = (_is_whole, "a whole number, not negative")
QUANTITY: Check = (_is_quantity, "a finite number, not negative")
QUANTITY_OR_NONE: Check = (_is_quantity_or_none, "a finite number, not negative, or nothing")
TEXT: Check = (_is_text, "a text")
TEXT_OR_NONE: Check = (_is_text_or_none, "a text or nothing")
STEPS: Check = (_is_list_of_steps, "a list of whole numbers")
METRICS: Check = (_are_metrics, "numbers by name")

# The plain values of every checkpoint.
FIELDS = dict(
    run_id=TEXT,
    step=WHOLE,
    data_position=WHOLE,
    tokens_seen=WHOLE,
    skipped_steps=WHOLE,
    train_seconds=QUANTITY,
    mean_norm=QUANTITY_OR_NONE,
    saved_steps=STEPS,
    tokenizer_json=TEXT,
    metrics=METRICS,
)
DATA_FIELDS = dict(data_hash=TEXT_OR_NONE, tokenizer_hash=TEXT_OR_NONE)
# At the step `step`, the data of the next `steps` steps were left out: so many `sequences`.
SKIPPED_FIELDS = dict(step=WHOLE, steps=WHOLE, sequences=WHOLE)
LOSS_SCALER_FIELDS = dict(scale=QUANTITY, good_steps=WHOLE, stuck_steps=WHOLE)


def _check_fields(values: dict, fields: dict[str, Check], path: str = "") -> None:
    for name, (is_right, words) in fields.items():
        if name not in values:
            raise WrongContent(f"{path}{name} is missing")
        if not is_right(values[name]):
            raise WrongContent(f"{path}{name} is {_shown(values[name])} and must be {words}")


def _shown(value) -> str:
    """A value as a message shows it: in full if it is short, else by its type."""
    text = repr(value)
    if isinstance(value, Tensor) or len(text) > 40:
        return f"a {type(value).__name__}"
    return text


def _part(values: dict, name: str) -> dict:
    """The dict under a key."""
    if not isinstance(values.get(name), dict):
        raise WrongContent(f"{name} is missing or has no names")
    return values[name]


# ---------------------------------------------------------------- what opening a model needs


def check_model(state: dict) -> None:
    """Checks what a command that opens the model reads. Raises WrongContent."""
    config = _checked_config(_part(state, "config"))
    _check_fields(state, FIELDS)
    data = _part(state, "data")
    _check_fields(data, DATA_FIELDS, "data/")
    if "rules" in data:  # older checkpoints have none
        _check_fields(data, dict(rules=WHOLE), "data/")
    _check_weights(_part(state, "model"), config)
    _check_optimizer(_part(state, "optimizer"), config)


def _checked_config(saved: dict) -> Config:
    try:
        config, _ = resumed_config(saved, {})
    except ConfigError as error:
        raise WrongContent("config: " + " ".join(str(error).split())) from error
    return config


def _check_weights(saved: dict, config: Config) -> None:
    shapes = {name: spec.shape for name, spec in parameter_table(config).items()}
    if config.load_balancing == "bias":
        for layer in range(config.n_layers):
            if config.is_moe(layer):
                shapes[f"blocks.{layer}.ffn.router.bias"] = (config.num_experts,)
    for name, shape in shapes.items():
        _check_tensor(saved.get(name), shape, f"model/{name}")


def _check_optimizer(saved: dict, config: Config) -> None:
    states: dict = {}
    for group, content in saved.items():
        if not isinstance(content, dict):
            raise WrongContent(f"optimizer/{group} has no names")
        states |= _part(content, "state")
        if "steps" in content:
            _check_fields(content, dict(steps=WHOLE), f"optimizer/{group}/")
    for name, spec in parameter_table(config).items():
        tensors = states.get(name)
        if not isinstance(tensors, dict):
            raise WrongContent(f"the optimizer's state of {name} is missing")
        for key, tensor in tensors.items():
            _check_tensor(tensor, spec.shape, f"the optimizer's state {name}/{key}")


def _check_tensor(found, shape: tuple[int, ...], name: str) -> None:
    if not isinstance(found, Tensor):
        raise WrongContent(f"{name} is missing")
    if tuple(found.shape) != shape:
        raise WrongContent(f"{name} has the shape {tuple(found.shape)} and must have {shape}")


# ---------------------------------------------------------------- what resuming a run needs


def check_run(state: dict) -> None:
    """Checks what a run that is resumed reads, the model included. Raises WrongContent."""
    check_model(state)
    _check_fields(_part(state, "loss_scaler"), LOSS_SCALER_FIELDS, "loss_scaler/")
    _check_skipped_data(state.get("skipped_data", []))  # older checkpoints have none
    problem = lineage.problem(state.get("lineage", []))
    if problem:
        raise WrongContent(f"lineage {problem}")
    _check_interval(_part(state, "interval"), _checked_config(state["config"]))
    _check_random_states(_part(state, "random"))


def _check_skipped_data(entries) -> None:
    """Checks a list as Trainer.skip_data writes it."""
    if type(entries) is not list:
        raise WrongContent("skipped_data is no list")
    for entry in entries:
        if not isinstance(entry, dict):
            raise WrongContent("skipped_data has an entry without names")
        _check_fields(entry, SKIPPED_FIELDS, "skipped_data/")


def _check_interval(sums: dict, config: Config) -> None:
    """Sums of the metrics since the last row: numbers, counts of experts, facts about a spike."""
    for name, value in sums.items():
        if name == "spike":
            is_right = isinstance(value, dict)
        elif name in ("sequences", "seconds"):  # the means of a row are divided by them
            is_right = _is_quantity(value)
        elif name == "expert_counts":
            is_right = _is_real_tensor(value, (config.n_moe_layers, config.num_experts))
        else:
            is_right = _is_number(value) or _is_real_tensor(value, ())
        if not is_right:
            raise WrongContent(f"interval/{name} is {_shown(value)}, which is no sum of a metric")


def _is_real_tensor(value, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, Tensor) or value.is_complex():
        return False
    return tuple(value.shape) == shape


def _check_random_states(states: dict) -> None:
    """Tries the states on generators of their own.

    That of a GPU, which this machine may lack, is checked by its type alone.
    """
    try:
        version, words, next_gauss = states["python"]
        random.Random().setstate((version, tuple(words), next_gauss))
        name, keys, position, has_gauss, cached_gauss = states["numpy"]
        # numpy takes any position, and would read outside of its words.
        if len(keys) != MT19937_WORDS or not 0 <= position <= MT19937_WORDS:
            raise ValueError("numpy's position is out of range")
        keys = numpy.array(keys, dtype=numpy.uint32)
        state = (name, keys, int(position), int(has_gauss), float(cached_gauss))
        numpy.random.RandomState(0).set_state(state)
        torch.Generator().set_state(states["torch"])
    except Exception as error:  # each library raises errors of its own kinds
        raise WrongContent(f"random is no state of the generators ({error})") from error
    if "cuda" in states:  # the run was on a GPU
        _check_gpu_state(states["cuda"])


def _check_gpu_state(state) -> None:
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
        raise WrongContent("random/cuda is no state of a generator")
