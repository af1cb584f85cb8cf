"""A run's checkpoints: written whole or not at all, and read only if intact.

A crash or a full disk while one is written never costs the one before. A checkpoint is one file
in torch.save's format, a nested dict of tensors and plain values (archive.py says which).
torch.load(path, weights_only=True) opens it without this program. Two keys are added to what the
run saves: `format`, and `checksums` with a CRC-32 for each tensor and one for all plain values
together. A GB is 1e9 bytes.

From top to bottom: names; save; load; opening a model; disk space; random states. latest.py has
`checkpoint_latest.pt` and which checkpoint it gives way to, schema.py what a file must hold.
"""

import contextlib
import dataclasses
import os
import random
import re
import shutil
import tempfile
import typing
from pathlib import Path
from typing import NoReturn

import numpy
import torch
from torch import Tensor

from config import DATA_RULES, Config, ConfigError, ExperimentError, resumed_config
from engine.distributed import Ranks
from planner.layout import format_size
from record import archive, schema, shared_save
from record.causes import cause_of, interruption_behind, root_cause_of

FORMAT = 1
ONE_RANK = Ranks()
# torch.save's zip archives end with a record that begins so and has this length.
ZIP_END = b"PK\x05\x06"
ZIP_END_BYTES = 22
SPACE_REMEDY = (
    "Free some space, keep fewer checkpoints (--keep_checkpoints 1), choose another --save_dir, or "
    "switch saving off (--save_every 0 --save_minutes 0)."
)


class CheckpointError(ExperimentError):
    """A checkpoint that cannot be written or read. The text names file, cause and remedy."""


class UnusableFile(CheckpointError):
    """A file that is missing, damaged or no checkpoint. `what` says so without the remedy."""

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}. {remedy}.")
        self.what = what


def step_path(folder, step: int) -> Path:
    return Path(folder) / f"checkpoint_step_{step}.pt"


def latest_path(folder) -> Path:
    return Path(folder) / "checkpoint_latest.pt"


# Where a file system has no links, checkpoint_latest.pt is a text of one line: this, and the name
# of the checkpoint in the same folder.
POINTER = "The latest checkpoint is "
MOST_POINTER_BYTES = 300


def followed(path: Path) -> Path:
    """The file that `path` stands for: the checkpoint that a pointer file names, else `path`."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if not path.is_file() or path.stat().st_size > MOST_POINTER_BYTES:
            return path
        line = path.read_text()
        name = line.removeprefix(POINTER).strip()
        is_bare = name == Path(name).name and name not in ("", ".", "..")
        if line.startswith(POINTER) and is_bare:
            return path.resolve().with_name(name)
    return path


def is_same(path: Path, other: Path) -> bool:
    """Whether two names stand for one checkpoint. False where a link or a pointer leads nowhere."""
    try:
        return followed(path).samefile(followed(other))
    except OSError:
        return False


def temporary_path(path: Path) -> Path:
    """A file is written under this name, in the same folder, and renamed when it is whole."""
    return path.with_name(f".{path.name}.tmp")


# ---------------------------------------------------------------- save


def save(path, state: dict, ranks: Ranks = ONE_RANK) -> None:
    """Writes `state` to `path`: all of it, or nothing and the file that was there stays.

    `state` is a nested dict with str keys; its leaves are tensors of any dtype and device, and
    plain values (None, bool, int, float, str and lists and dicts of them). Of a view only its own
    bytes are stored; strides are kept where the elements lie densely in memory. Tensors on the
    same bytes are stored once.

    With several ranks, all of them call this together, and leaves of type archive.Rows are
    tensors whose rows are spread over the ranks. The other leaves are taken from the first rank.
    The file is the one that a single rank would write that had all rows. If one rank fails, the
    error is raised on all of them.

    Raises CheckpointError when the file cannot be written, TypeError for a leaf or key of another
    type (with several ranks CheckpointError).
    """
    path = Path(path)
    if not isinstance(state, dict):
        raise TypeError(f"checkpoint: the state is a {type(state).__name__} and must be a dict")
    if "format" in state or "checksums" in state:
        raise TypeError("checkpoint: the keys 'format' and 'checksums' are reserved")
    if ranks.size > 1:
        _save_together(path, state, ranks)
    else:
        _save_alone(path, state)


def _save_alone(path: Path, state: dict) -> None:
    """`save` by the only rank."""
    temporary = temporary_path(path)
    # Copies to host memory on other streams must have landed before their bytes are read.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    state = archive.compact(state)
    tensors, plain = archive.split(state)
    try:
        _write(temporary, state, tensors, plain)
        # The name changes hands at once: a crash leaves the old file or the new one, both whole.
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # Tensors on the same bytes are stored once.
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}
        _raise_not_saved(path, sum(sizes.values()), error)
    sync_folder(path.parent)


def _save_together(path: Path, state: dict, ranks: Ranks) -> None:
    """`save` by one of several ranks."""
    temporary = temporary_path(path)

    def rename() -> None:
        if ranks.is_first:
            temporary.replace(path)

    try:
        shared_save.write(temporary, state, FORMAT, ranks)
        shared_save.agree(ranks, rename)
    except BaseException as error:
        # The first rank alone deletes it: a slower rank would delete the file of the next attempt.
        if ranks.is_first:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _raise_not_saved(path, shared_save.size_of_rows(state), error)
    if ranks.is_first:
        sync_folder(path.parent)


def _write(path: Path, state: dict, tensors: dict[str, Tensor], plain: dict) -> None:
    """Writes the whole file at `path`; it is on the disk when this returns."""
    # A file of this name is left from a process that was killed. It may be a hard link to another
    # checkpoint, as link_latest makes it: writing into it would destroy that checkpoint.
    path.unlink(missing_ok=True)
    checksums = archive.checksums(tensors, plain)
    with open(path, "xb") as file:
        # torch.save leaves room for the bytes of the tensors, which follow from several threads.
        with torch.serialization.skip_data():
            torch.save({**state, "format": FORMAT, "checksums": checksums}, file)
        file.flush()
        offsets = archive.offsets_in_file(path)
        archive.write_tensors(tensors, file.fileno(), offsets)
        # Before the rename: else a power cut could leave the new name on bytes never written.
        os.fsync(file.fileno())


def _raise_not_saved(path: Path, bytes_needed: int, error: BaseException) -> NoReturn:
    """Raises the CheckpointError of an error that ended a save, or Ctrl-C if that ended it."""
    interruption = interruption_behind(error)
    if interruption is not None:
        raise interruption from None
    if not isinstance(error, (OSError, RuntimeError, MemoryError)):
        raise error
    message = _not_saved_message(path, bytes_needed, root_cause_of(error))
    raise CheckpointError(message) from error


def _not_saved_message(path: Path, bytes_needed: int, reason: str) -> str:
    kept = ""
    if path.exists():
        kept = "The previous file of that name is untouched. "
    return (
        f"checkpoint {path} was not saved: {reason}. It needs {bytes_needed / 1e9:.2f} GB, "
        f"{_free_space(path.parent)}. {kept}{SPACE_REMEDY}"
    )


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder survive a power cut, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------- load


def load(path, mmap: bool = True, verify: bool = True) -> dict:
    """Reads the checkpoint at `path` onto the CPU and verifies every checksum.

    Returns what `save` was given. A pointer file is followed.

    With `mmap` the tensors are backed by the file and take host memory only as it is free
    (writing to them changes a private copy, not the file). Raises CheckpointError when the file
    is missing, damaged, or no checkpoint.

    Without `verify` no checksum is computed. That is for ranks other than the first, once the
    first has verified the file: only the rows that a rank copies are then read from the disk.
    """
    path = followed(Path(path))
    state, stored = _read_content(path, mmap)
    if not verify:
        return state
    try:
        tensors, plain = archive.split(state)
        found = archive.checksums(tensors, plain)
    except Exception as error:  # damage may put any type in any place
        raise _load_error(path, f"checkpoint {path} is damaged ({cause_of(error)})") from error
    _compare(path, found, stored)
    return state


def load_plain(path) -> dict:
    """`load` of the plain values alone: the tensors are neither returned nor read.

    It takes milliseconds for a file of any size. Whether the tensors are intact is not known then.
    """
    path = followed(Path(path))
    state, stored = _read_content(path, mmap=True)
    try:
        tensors, plain = archive.split(state)
        found = {archive.PLAIN: archive.plain_checksum(tensors, plain)}
        stored = {archive.PLAIN: stored[archive.PLAIN]}
    except Exception as error:
        raise _load_error(path, f"checkpoint {path} is damaged ({cause_of(error)})") from error
    _compare(path, found, stored)
    return plain


def _read_content(path: Path, mmap: bool) -> tuple[dict, dict]:
    """(the state, the checksums that are stored with it), of which nothing is verified yet."""
    _check_archive(path)
    state = _read(path, mmap)
    if not isinstance(state, dict) or "format" not in state or "checksums" not in state:
        raise _load_error(path, f"{path} is not a checkpoint of this program")
    version = state.pop("format")
    stored = state.pop("checksums")
    if type(version) is not int or version < FORMAT:
        raise _load_error(path, f"{path} is damaged or no checkpoint of this program")
    if version > FORMAT:
        # No UnusableFile: the file is intact, and no other one may take its place unnoticed.
        raise CheckpointError(
            f"checkpoint {path} has format {version} and this program reads format {FORMAT}: read "
            "it with the version of the program that wrote it"
        )
    if not isinstance(stored, dict):
        raise _load_error(path, f"checkpoint {path} is damaged: it has no checksums")
    return state, stored


def _check_archive(path: Path) -> None:
    """Refuses a file that is no zip archive, or one that is cut short.

    torch.load would take the first for a pickle of old versions. For the second it raises one of
    several errors, such as "Invalid argument", none of which names the cause.
    """
    # A path that cannot be opened is left to torch.load, whose error says why.
    with contextlib.suppress(OSError):
        if path.is_dir():
            raise _load_error(path, f"{path} is a directory and no checkpoint")
        if path.exists() and not path.is_file():
            # Whoever reads from a pipe waits without end.
            raise _load_error(path, f"{path} is a pipe or a device and no checkpoint")
        if not path.is_file():
            return
        size = path.stat().st_size
        with open(path, "rb") as file:
            first_bytes = file.read(2)
            file.seek(max(0, size - ZIP_END_BYTES))
            last_bytes = file.read()
        if not b"PK".startswith(first_bytes):
            raise _load_error(
                path,
                f"{path} is damaged or no checkpoint: torch.save's archives begin otherwise",
            )
        if not last_bytes.startswith(ZIP_END):
            raise _load_error(
                path,
                f"checkpoint {path} is damaged: the file is cut short, or its end is overwritten "
                f"({size:,} bytes are there). If it was copied, copy it again",
            )


def _read(path: Path, mmap: bool):
    try:
        return torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        text = f"checkpoint {path} cannot be read: {cause_of(error)}"
        raise _load_error(path, text) from error
    except Exception as error:  # a damaged pickle or zip file can raise anything
        text = f"{path} is damaged or no checkpoint ({cause_of(error)})"
        raise _load_error(path, text) from error


def _compare(path: Path, found: dict, stored: dict) -> None:
    """Raises CheckpointError unless the checksums are those that are stored."""
    names = [*found, *(name for name in stored if name not in found)]
    wrong = [str(name) for name in names if found.get(name) != stored.get(name)]
    if wrong:
        text = ", ".join(sorted(wrong)[:3])
        if len(wrong) > 3:
            text += f" and {len(wrong) - 3} more"
        raise _load_error(path, f"checkpoint {path} is damaged: wrong checksum for {text}")


def _load_error(path: Path, text: str) -> UnusableFile:
    """An error about the file at `path`, whose remedy is another checkpoint of the same folder."""
    others: list[Path] = []
    with contextlib.suppress(OSError):
        others = _other_checkpoints(path)
    remedy = f"There is no other checkpoint in {path.parent.absolute()}"
    if others:
        names = ", ".join(other.name for other in others[:5])
        remedy = f"Use another checkpoint of {path.parent}: {names}"
    return UnusableFile(text, remedy)


def _other_checkpoints(path: Path) -> list[Path]:
    """The checkpoints in the folder of `path` that are other files than `path`, newest first."""
    found = []
    for other in path.parent.glob("checkpoint_*.pt"):
        # checkpoint_latest.pt may be a link to nothing, or to the very file that is damaged.
        if not other.is_file():
            continue
        if is_same(path, other):
            continue
        found.append(other)
    return sorted(found, key=time_and_step, reverse=True)


def time_and_step(path: Path) -> tuple[int, int]:
    """Sort key: when the file was written (ns), and its step where two were written at once."""
    return path.stat().st_mtime_ns, step_of(path)


def step_of(path: Path) -> int:
    """The step in the name of a numbered checkpoint; -1 for checkpoint_latest.pt."""
    numbered = re.fullmatch(r"checkpoint_step_(\d+)\.pt", path.name)
    if not numbered:
        return -1
    return int(numbered[1])


def check_content(path, state: dict, resuming: bool) -> None:
    """Raises CheckpointError unless `load`'s state has what opening its model needs.

    With `resuming` it also has what a run needs that continues from it.
    """
    try:
        if resuming:
            schema.check_run(state)
        else:
            schema.check_model(state)
    except schema.WrongContent as error:
        raise _load_error(
            Path(path), f"checkpoint {path} is not what this program writes: {error}"
        ) from error


def load_run(path) -> dict:
    """`load` of a checkpoint that a run is resumed from: its content is checked too."""
    state = load(path)
    check_content(path, state, resuming=True)
    return state


# ---------------------------------------------------------------- opening a model


def load_model(path, device="cpu", precision: str = "fp32"):
    """(model, config) of the checkpoint at `path`, for programs that import this one.

    The model is in evaluation mode. In fp32 its weights are the exact masters. In the run's own
    precision they are the 16-bit weights that the run computed with. `precision` is named as in
    Config.

    Raises CheckpointError when the file is missing, damaged or no checkpoint.
    """
    return model_from_state(load_option(path), device, precision)


def open_model(path: str, device: str, precision: str | None):
    """(model, config, state) for commands, from the options --checkpoint, --device, --precision.

    `device` auto means the GPU when there is one. `precision` None means the run's own on a GPU,
    fp32 on a CPU. The state is what `load` returned: a command reads tokenizer and step from it.

    Raises ConfigError for options that cannot be met, CheckpointError for the file.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu")
    if device == "auto" and torch.cuda.is_available():
        device = "cuda"
    elif device == "auto":
        device = "cpu"
    state = load_option(path)
    if precision is None:
        precision = "fp32"
        if device == "cuda":
            precision = state["config"]["precision"]
    model, config = model_from_state(state, device, precision)
    return model, config, state


def data_rules(state: dict) -> int:
    """The version of the rules of data by which a run of this state continues.

    Older checkpoints hold none: they are of version 1. An imported model that was not trained on
    any text here has none to keep.
    """
    facts = state["data"]
    if facts["data_hash"] is None:
        return DATA_RULES
    return facts.get("rules", 1)


def load_option(path: str) -> dict:
    """`load` of the file that the option --checkpoint names, with what opening its model needs.

    Raises ConfigError for a folder.
    """
    if Path(path).is_dir():
        raise ConfigError(
            f"--checkpoint {path} is a folder: name a file of it, such as checkpoint_latest.pt"
        )
    state = load(path)
    check_content(path, state, resuming=False)
    return state


def model_from_state(state: dict, device="cpu", precision: str = "fp32"):
    """(model, config) of a state that `load` returned. `load_model` says which weights it has."""
    # Imported only here: training writes checkpoints without building a second model.
    from engine.precision import decode_master
    from model import MoETransformer

    config, _ = resumed_config(state["config"], {})
    changes: dict = dict(precision=precision, activation_checkpointing="none")
    with torch.device("meta"):
        model = MoETransformer(dataclasses.replace(config, **changes))
    model.to_empty(device=device)
    optimizer_state = optimizer_tensors(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = state["model"][name]
            # The low bits of the fp32 master, which a 16-bit run keeps beside the weight.
            low_bits = optimizer_state[name].get("residual")
            if low_bits is not None and weight.dtype != parameter.dtype:
                weight = decode_master(weight, low_bits)
            parameter.copy_(weight)
        for name, bias in model.balancing_biases().items():
            bias.copy_(state["model"][name])
    return model.eval(), config


def optimizer_tensors(state: dict) -> dict[str, dict[str, Tensor]]:
    """Each parameter's optimizer state (momentum, residual, ...), whichever optimizer has it."""
    found: dict[str, dict[str, Tensor]] = {}
    for group in state["optimizer"].values():
        found |= group["state"]
    return found


# ---------------------------------------------------------------- disk space


def files_to_come(config: Config, step: int, numbered_files: int, own_latest: bool) -> int:
    """By how many checkpoint files a run's folder grows at the most, from `step` to the run's end.

    `numbered_files` are there already. `own_latest` says that checkpoint_latest.pt is a file of
    its own and no link.
    """
    saves_by_step = config.save_every > 0
    saves_by_time = config.save_minutes > 0
    if step >= config.max_steps or not (saves_by_step or saves_by_time):
        return 0

    new_files = 0
    if saves_by_step:
        saves_in_all = config.max_steps // config.save_every
        saves_so_far = step // config.save_every
        new_files = saves_in_all - saves_so_far
        # The last step is saved even where save_every does not divide it.
        if config.max_steps % config.save_every > 0:
            new_files += 1
    # A new file is whole before an old one is deleted, hence one more than are kept.
    kept = max(numbered_files, config.keep_checkpoints)
    most = min(numbered_files + new_files, kept + 1)

    # A file saved by time is checkpoint_latest.pt itself, one more than the numbered ones. Without
    # numbered ones, each is written while the one before it still exists.
    if saves_by_time:
        most += 1
    if saves_by_time and not saves_by_step:
        most += 1
    return max(1, most - numbered_files - own_latest)


def check_free_space(folder, bytes_needed: int, option: str = "--save_dir") -> None:
    """Creates `folder` if needed. Proves that it can be written to and has bytes_needed bytes free.

    `option` is the one that chose the folder. Raises CheckpointError, which names it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free >= bytes_needed:
            # Permissions do not tell it all (read-only mounts, quotas): write one byte.
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
    except OSError as error:
        raise CheckpointError(
            f"the folder {folder} cannot be written to: {cause_of(error)}. Choose another {option}."
        ) from error
    if free < bytes_needed:
        needed = format_size(bytes_needed / 1e9, 2)
        raise CheckpointError(
            f"not enough disk space for checkpoints: {needed} are needed, "
            f"{_free_space(folder)}. {_set_aside_message(Path(folder))}{SPACE_REMEDY}"
        )


def set_aside_files(folder: Path) -> list[Path]:
    """The checkpoints of other branches, and damaged ones, that were renamed to NAME.1, NAME.2."""
    found = [path for path in folder.glob("checkpoint_*.pt.*") if path.suffix[1:].isdecimal()]
    return sorted(path for path in found if path.is_file())


def _set_aside_message(folder: Path) -> str:
    files = set_aside_files(folder)
    if not files:
        return ""
    size = sum(path.stat().st_size for path in files) / 1e9
    names = ", ".join(path.name for path in files[:5])
    return f"Checkpoints that were set aside take {format_size(size, 2)} there ({names}). "


def _free_space(folder) -> str:
    try:
        free_gb = shutil.disk_usage(folder).free / 1e9
        return f"{format_size(free_gb, 2)} are free in {folder}"
    except OSError as error:
        return f"and {folder} cannot be examined ({cause_of(error)})"


# ---------------------------------------------------------------- random states


def random_states(device: torch.device) -> dict:
    """Every generator's state in tensors and plain types, as torch.load needs for weights_only."""
    version, words, next_gauss = random.getstate()
    numpy_state = typing.cast(tuple, numpy.random.get_state())
    name, keys, position, has_gauss, cached_gauss = numpy_state
    # Checkpoints have always held numpy's position and has_gauss as floats.
    states = dict(
        python=[version, list(words), next_gauss],
        numpy=[name, keys.tolist(), float(position), float(has_gauss), float(cached_gauss)],
        torch=torch.get_rng_state(),
    )
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(state: dict, device: torch.device) -> None:
    """Sets every generator to a state that `random_states` returned.

    A run that continues on another kind of device leaves the GPU's generator as it is.
    """
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))

    name, keys, position, has_gauss, cached_gauss = state["numpy"]
    keys = numpy.array(keys, dtype=numpy.uint32)
    numpy.random.set_state((name, keys, int(position), int(has_gauss), cached_gauss))

    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
