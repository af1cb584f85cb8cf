"""Checkpoints: one file each, written so that a crash or a full disk never costs the previous one, read only if intact.

A checkpoint is a nested dict of tensors and plain values in torch.save's format; torch.load(path, weights_only=True)
opens it without this file. Two keys are added: `format`, and `checksums` with a CRC-32 for each tensor and one for all
plain values together. A GB is 1e9 bytes.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from config import Config, ConfigError, ExperimentError, resumed_config

FORMAT = 1
PIECE = (
    16 * 2**20
)  # bytes checksummed or written at a time; what a thread takes of host memory for tensors on a GPU
PLAIN = "plain values"  # the checksum of everything that is not a tensor goes by this name
SPACE_REMEDY = (
    "Free some space, keep fewer checkpoints (--keep_checkpoints 1), choose another --save_dir, or switch "
    "saving off (--save_every 0 --save_minutes 0)."
)


class CheckpointError(ExperimentError):
    """A checkpoint that cannot be written or read; the text names the file, the cause and the remedy."""


def step_path(folder, step: int) -> Path:
    return Path(folder) / f"checkpoint_step_{step}.pt"


def latest_path(folder) -> Path:
    return Path(folder) / "checkpoint_latest.pt"


def save(path, state: dict):
    """Writes `state` to `path`: all of it, or nothing and the file that was there stays.

    `state` is a nested dict with str keys; its leaves are tensors of any dtype and device, and plain values (None,
    bool, int, float, str and lists and dicts of them). Of a view only its own bytes are stored; strides are kept where
    the elements lie densely in memory. Tensors on the same bytes are stored once.

    Raises CheckpointError when the file cannot be written, TypeError for a leaf or key of another type.
    """
    path = Path(path)
    temporary = _temporary(path)
    state = _compact(state, {}, {})
    tensors = {}
    plain = _split(state, "", tensors)
    if "format" in state or "checksums" in state:
        raise TypeError("checkpoint: the keys 'format' and 'checksums' are reserved")
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # copies on other streams must have landed
    try:
        temporary.unlink(
            missing_ok=True
        )  # never write into it: it may be a link to another checkpoint
        with open(temporary, "xb") as file:
            with torch.serialization.skip_data():  # leaves room for the tensors' bytes
                torch.save(
                    {**state, "format": FORMAT, "checksums": _checksums(tensors, plain)}, file
                )
            file.flush()
            _write_tensors(tensors, file.fileno(), temporary)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch's zip writer raises a RuntimeError of its own on top of the error that stopped it
        causes = [error]
        while causes[-1].__context__ is not None:
            causes.append(causes[-1].__context__)
        for cause in causes:
            if not isinstance(cause, Exception):
                raise cause  # KeyboardInterrupt, SystemExit
        if not isinstance(error, (OSError, RuntimeError, MemoryError)):
            raise
        cause = next((c for c in causes if isinstance(c, OSError)), error)
        needed = sum({t.data_ptr(): t.nbytes for t in tensors.values()}.values())
        raise CheckpointError(
            f"checkpoint {path} was not saved: {_reason(cause)}. It needs {needed / 1e9:.2f} GB, {_free(path.parent)}. "
            + ("The previous file of that name is untouched. " if os.path.exists(path) else "")
            + SPACE_REMEDY
        ) from error
    _sync_folder(path.parent)


def load(path, mmap: bool = True) -> dict:
    """Reads the checkpoint at `path` onto the CPU and verifies every checksum; returns what `save` was given.

    With `mmap` the tensors are backed by the file and take host memory only as it is free (writing to them changes a
    private copy, not the file). Raises CheckpointError when the file is missing, damaged, or no checkpoint.
    """
    path = Path(path)
    with contextlib.suppress(OSError):
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(2) != b"PK":
                    raise CheckpointError(
                        f"{path} is damaged or no checkpoint: torch.save's archives begin otherwise.{_others(path)}"
                    )
    try:
        state = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {_reason(error)}.{_others(path)}"
        ) from error
    except Exception as error:  # a damaged pickle or zip file can raise anything
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({_reason(error)}).{_others(path)}"
        ) from error
    if not isinstance(state, dict) or "format" not in state or "checksums" not in state:
        raise CheckpointError(f"{path} is not a checkpoint of this program.{_others(path)}")
    version, stored = state.pop("format"), state.pop("checksums")
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {version} and this program reads format {FORMAT}: read it "
            f"with the version of the program that wrote it.{_others(path)}"
        )
    try:
        tensors = {}
        found = _checksums(tensors, _split(state, "", tensors))
        bad = [name for name in sorted({*found, *stored}) if found.get(name) != stored.get(name)]
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({_reason(error)}).{_others(path)}"
        ) from error
    if bad:
        raise CheckpointError(
            f"checkpoint {path} is damaged: wrong checksum for {', '.join(bad[:3])}"
            f"{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}.{_others(path)}"
        )
    return state


def link_latest(path, latest):
    """Makes `latest` the same file as `path`: a hard link, or a relative symbolic link where the file system has no
    hard links. There is no moment without a `latest`. Raises CheckpointError."""
    path, latest = Path(path), Path(latest)
    temporary = _temporary(latest)
    try:
        if latest.exists() and os.path.samefile(path, latest):
            return  # os.replace does nothing for two links to one file and would leave the temporary name behind
        path.stat()  # a symbolic link would not notice that the file is missing
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            os.symlink(os.path.relpath(path.resolve(), latest.parent.resolve()), temporary)
        os.replace(temporary, latest)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"{latest} could not be made a link to {path}: {_reason(error)}. Choose another "
            "--save_dir."
        ) from error
    _sync_folder(latest.parent)


def files_to_come(c: Config, step: int, there: int, own_latest: bool) -> int:
    """How many more checkpoint files a run of `c` has on its disk at the most, from `step` on. `there` are its numbered ones, and
    `own_latest` says that checkpoint_latest.pt is a file of its own. A new file is whole before an old one goes."""
    if step >= c.max_steps or not (c.save_every or c.save_minutes):
        return 0
    numbered = (
        c.max_steps // c.save_every - step // c.save_every + (c.max_steps % c.save_every > 0)
        if c.save_every
        else 0
    )
    most = min(there + numbered, max(there, c.keep_checkpoints) + 1)
    # the latest, saved by time, is one more beside the numbered ones; where none come, it is written beside the one before
    by_time = (1 if c.save_every else 2) if c.save_minutes else 0
    return max(1, most + by_time - there - own_latest)


def prune(folder, steps, keep: int) -> list[int]:
    """Deletes the oldest checkpoints of `steps`, the steps that this run saved in `folder`, so that `keep` remain.

    Checkpoints of other steps are not touched, nor one that checkpoint_latest.pt is a symbolic link to. Returns the
    steps that remain, ascending; those whose file is missing are left out. Raises CheckpointError.
    """
    assert keep >= 1
    steps = [s for s in sorted(set(steps)) if step_path(folder, s).exists()]
    latest = latest_path(folder)
    pinned = latest.resolve() if latest.is_symlink() else None
    for step in steps[:-keep]:
        path = step_path(folder, step)
        if path.resolve() == pinned:
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the old checkpoint {path} could not be deleted: {_reason(error)}. Delete it, or "
                "raise --keep_checkpoints."
            ) from error
    return [s for s in steps if step_path(folder, s).exists()]


def check_free_space(folder, bytes_needed: int, option: str = "--save_dir"):
    """Creates `folder`, which `option` chose, if needed, and proves that it can be written to and has `bytes_needed` bytes free.

    Raises CheckpointError.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free >= bytes_needed:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
    except OSError as error:
        raise CheckpointError(
            f"the folder {folder} cannot be written to: {_reason(error)}. Choose another {option}."
        ) from error
    if free < bytes_needed:
        raise CheckpointError(
            f"not enough disk space for checkpoints: {bytes_needed / 1e9:.2f} GB are needed, "
            f"{_free(folder)}. {SPACE_REMEDY}"
        )


def random_states(device: torch.device) -> dict:
    """Every generator's state as tensors and plain types, which torch.load opens with weights_only."""
    version, words, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    return dict(
        python=[version, list(words), gauss],
        numpy=[name, keys.tolist(), *map(float, rest)],
        torch=torch.get_rng_state(),
        **(dict(cuda=torch.cuda.get_rng_state()) if device.type == "cuda" else {}),
    )


def restore_random_states(state: dict, device: torch.device) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state(
        (name, numpy.array(keys, dtype=numpy.uint32), int(position), int(has_gauss), cached)
    )
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def model_from_state(state: dict, device="cpu", precision: str = "fp32"):
    """(model, config) of a state that `load` returned; see `load_model`."""
    from engine.precision import decode_master
    from model import (
        MoETransformer,
    )  # only here: training writes checkpoints without building a second model

    config, _ = resumed_config(state["config"], {})
    with torch.device("meta"):
        model = MoETransformer(
            dataclasses.replace(config, precision=precision, activation_checkpointing="none")
        )
    model.to_empty(device=device)
    optimizer = {**state["optimizer"]["muon"]["state"], **state["optimizer"]["adamw"]["state"]}
    with torch.no_grad():
        for name, p in model.named_parameters():
            weight, residual = state["model"][name], optimizer[name].get("residual")
            p.copy_(
                weight
                if residual is None or weight.dtype == p.dtype
                else decode_master(weight, residual)
            )
        for name, bias in model.balancing_biases().items():
            bias.copy_(state["model"][name])
    return model.eval(), config


def load_model(path, device="cpu", precision: str = "fp32"):
    """(model, config) of the checkpoint at `path`: the model in evaluation mode, in fp32 from the exact masters, or in
    another precision (as Config names them), in the run's own from the 16-bit weights that it computed with.

    Raises CheckpointError when the file is missing, damaged or no checkpoint.
    """
    return model_from_state(load(path), device, precision)


def open_model(path: str, device: str, precision: str | None):
    """(model, config, state) of a checkpoint file, on the device that an option names, in `precision`, by default in the
    run's own on a GPU and in fp32 on a CPU. Raises ConfigError or CheckpointError."""
    if Path(path).is_dir():
        raise ConfigError(
            f"--checkpoint {path} is a folder: name a file of it, such as checkpoint_latest.pt"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu")
    device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    state = load(path)
    precision = precision or (state["config"]["precision"] if device == "cuda" else "fp32")
    return *model_from_state(state, device, precision), state


def remove_leftovers(folder):
    """Deletes the temporary files of saves in `folder` that were killed. Raises CheckpointError."""
    for path in Path(folder).glob(".checkpoint*.tmp"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{path}, left by a save that was killed, cannot be deleted: {_reason(error)}. "
                "Delete it, or choose another --save_dir."
            ) from error


def _compact(node, storages: dict, dtypes: dict):
    """A copy of the nested dicts in which each tensor has a storage of its own bytes alone.

    Tensors on the same bytes share their storage; tensors that are dense in memory are not copied. `storages` and
    `dtypes` start empty.
    """
    if isinstance(node, dict):
        return {key: _compact(value, storages, dtypes) for key, value in node.items()}
    if not isinstance(node, torch.Tensor):
        return node
    if node.layout is not torch.strided or node.device.type == "meta":
        raise TypeError(
            f"checkpoint: cannot store a tensor of layout {node.layout} on device {node.device}"
        )
    tensor = node.detach()
    storage = tensor.untyped_storage()
    if tensor.nbytes != storage.nbytes():
        if tensor.is_contiguous():
            start = tensor.storage_offset() * tensor.element_size()
            place = storage.data_ptr() + start, tensor.nbytes
            storage = storages.setdefault(
                place, storage[start : start + tensor.nbytes]
            )  # on the same memory
            tensor = tensor.new_empty(0).set_(storage, 0, tensor.shape, tensor.stride())
        else:
            tensor = tensor.to("cpu", copy=True)
    if dtypes.setdefault(tensor.untyped_storage().data_ptr(), tensor.dtype) != tensor.dtype:
        tensor = tensor.to("cpu", copy=True)  # torch.save refuses the same bytes as two dtypes
    return tensor


def _split(node, path: str, tensors: dict):
    """A copy of the plain values without the tensors, which are put into `tensors` by key path."""
    if isinstance(node, dict):
        plain = {}
        for key, value in node.items():
            if type(key) is not str:
                raise TypeError(f"checkpoint: key {key!r} in {path or 'the state'} is not a str")
            name = f"{path}/{key}" if path else key
            if isinstance(value, torch.Tensor) and tensors is not None:
                if name in tensors or name == PLAIN:
                    raise TypeError(f"checkpoint: the key path {name!r} is ambiguous")
                tensors[name] = value
            else:
                plain[key] = _split(value, name, tensors)
        return plain
    if type(node) is list:
        return [
            _split(value, path, None) for value in node
        ]  # no tensors in lists: they would have no key path
    if node is None or type(node) in (bool, int, float, str):
        return node
    raise TypeError(
        f"checkpoint: {path} is a {type(node).__name__}; allowed are tensors in dicts, and None, bool, "
        "int, float, str, list and dict"
    )


def _checksums(tensors: dict, plain) -> dict[str, int]:
    """CRC-32 of each tensor and of the plain values."""
    found = dict(zip(tensors, _in_threads(_checksum, tensors.values())))
    # The tensors' names too: a pickle stores equal strings once, so one damaged string can be a key in two places.
    found[PLAIN] = zlib.crc32(
        json.dumps([sorted(tensors), plain], sort_keys=True).encode()
    )  # json keeps floats exact
    return found


def _checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a compact tensor's description and of its bytes in the order of memory."""
    crc = zlib.crc32(
        f"{tensor.dtype} {list(tensor.shape)} {tensor.stride()} {tensor.requires_grad}".encode()
    )
    if tensor.storage_offset() != 0 or tensor.untyped_storage().nbytes() != tensor.nbytes:
        raise ValueError("a tensor and its storage differ in size")
    for _, piece in _pieces(tensor):
        crc = zlib.crc32(piece, crc)
    return crc


def _write_tensors(tensors: dict, handle: int, path: Path) -> None:
    """Writes the tensors' bytes into the room that torch.save left for them in the file.

    torch.save itself copies a tensor of the GPU into new memory, then writes it, then takes the next, and the disk has nothing
    to do until the page cache is full.
    """
    with FakeTensorMode():  # which has torch.load tell the places instead of reading them
        places = {}
        _split(torch.load(path, map_location="cpu", weights_only=True), "", places)

    def write(name: str) -> None:
        place = places[name].untyped_storage()._checkpoint_offset
        for start, piece in _pieces(tensors[name]):
            written = 0
            while written < len(piece):
                written += os.pwrite(handle, piece[written:], place + start + written)
            with contextlib.suppress(AttributeError, OSError):
                os.posix_fadvise(
                    handle, place + start, len(piece), os.POSIX_FADV_DONTNEED
                )  # has the disk begin

    once = {
        places[name].untyped_storage()._checkpoint_offset: name
        for name in tensors
        if tensors[name].nbytes
    }
    _in_threads(write, once.values())


def _pieces(tensor: torch.Tensor):
    """(start, bytes from there) of a compact tensor in the order of memory, PIECE bytes at a time."""
    data = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    buffer = (
        torch.empty(min(PIECE, len(data)), dtype=torch.uint8, pin_memory=data.is_cuda)
        if not data.is_cpu
        else None
    )
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        if buffer is not None:
            piece = buffer[: len(piece)].copy_(piece)
        yield start, memoryview(piece.numpy())


def _in_threads(function, items) -> list:
    """[function(item), ...]; threads help because copies, zlib and the disk release the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a full disk is full for the others too
            raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync_folder(folder: Path):
    """Makes renames in the folder survive a power cut, where the file system can do that for a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join((str(error) or type(error).__name__).split("\n")[0].split())[:200]


def _free(folder) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free in {folder}"
    except OSError as error:
        return f"and {folder} cannot be examined ({_reason(error)})"


def _others(path: Path) -> str:
    """' Use an older checkpoint: ...', naming the other checkpoints in the folder of `path`, newest first."""

    def step(other):
        number = re.fullmatch(r"checkpoint_step_(\d+)\.pt", other.name)
        return int(number[1]) if number else -1

    with contextlib.suppress(OSError):
        others = [
            p
            for p in path.parent.glob("checkpoint_*.pt")
            if p.exists() and not (path.exists() and p.samefile(path))
        ]
        if others:
            names = [
                p.name
                for p in sorted(others, key=lambda p: (p.stat().st_mtime_ns, step(p)), reverse=True)
            ]
            return f" Use another checkpoint of {path.parent}: {', '.join(names[:5])}."
    return f" There is no other checkpoint in {path.parent.absolute()}."
