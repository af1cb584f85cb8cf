"""The bytes of a checkpoint file: its tensors and plain values, their checksums, their writing.

A state is a nested dict with str keys. Its leaves are tensors and plain values: None, bool, int,
float, str, and lists and dicts of them. This module knows no run, no file name and no message for
users; checkpoint.py adds those.
"""

import contextlib
import json
import os
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Bytes that are checksummed or written at a time. For tensors on a GPU, each thread holds one
# chunk in host memory.
CHUNK = 16 * 2**20

# The checksum of everything that is not a tensor has this name.
PLAIN = "plain values"

# ---------------------------------------------------------------- what a state consists of


def compact(state: dict) -> dict:
    """A copy of the nested dicts in which each tensor's storage holds no bytes but the tensor's
    own.

    torch.save writes whole storages: of a small view it would write all of the tensor that is
    viewed. Tensors over the same bytes still share their storage, so these bytes are stored once.
    A contiguous view is not copied. Raises TypeError for a tensor without bytes of its own
    (sparse, or on the meta device).
    """
    storages: dict[tuple, torch.UntypedStorage] = {}
    dtypes: dict[int, torch.dtype] = {}

    def visit(node):
        if isinstance(node, dict):
            return {key: visit(value) for key, value in node.items()}
        if isinstance(node, Tensor):
            return _compact_tensor(node, storages, dtypes)
        return node

    return visit(state)


def _compact_tensor(tensor: Tensor, storages: dict, dtypes: dict[int, torch.dtype]) -> Tensor:
    """`storages` are those already made, by address and size; `dtypes` are those seen, by
    address."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise TypeError(
            f"checkpoint: cannot store a tensor of layout {tensor.layout} on device {tensor.device}"
        )
    tensor = tensor.detach()
    is_view = tensor.nbytes != tensor.untyped_storage().nbytes()
    if is_view and tensor.is_contiguous():
        tensor = _with_own_storage(tensor, storages)
    elif is_view:
        tensor = tensor.to("cpu", copy=True)

    # torch.save refuses the same bytes under two dtypes: the second dtype gets a copy.
    address = tensor.untyped_storage().data_ptr()
    if dtypes.setdefault(address, tensor.dtype) != tensor.dtype:
        tensor = tensor.to("cpu", copy=True)
    return tensor


def _with_own_storage(tensor: Tensor, storages: dict) -> Tensor:
    """A contiguous view on a storage that begins and ends where the view does."""
    storage = tensor.untyped_storage()
    start = tensor.storage_offset() * tensor.element_size()
    # A slice of a storage lies on the same memory and keeps it alive.
    part = storage[start : start + tensor.nbytes]
    # torch.save recognises shared bytes by the storage, so equal views must get the same one.
    key = (storage.data_ptr() + start, tensor.nbytes)
    part = storages.setdefault(key, part)
    return tensor.new_empty(0).set_(part, 0, tensor.shape, tensor.stride())


def split(state: dict) -> tuple[dict[str, Tensor], dict]:
    """(the tensors by key path, a copy of the nested dicts without them).

    A key path is such as "model/norm.weight". Raises TypeError for a key or a leaf of another
    type, and for two tensors of one key path.
    """
    tensors: dict[str, Tensor] = {}
    plain = _take_tensors(state, "", tensors)
    return tensors, plain


def _take_tensors(node: dict, path: str, tensors: dict[str, Tensor]) -> dict:
    """Puts the tensors into `tensors` and returns what is left."""
    plain: dict = {}
    for key, value in node.items():
        name = _key_path(path, key)
        if isinstance(value, Tensor):
            if name in tensors or name == PLAIN:
                raise TypeError(f"checkpoint: the key path {name!r} is ambiguous")
            tensors[name] = value
        elif isinstance(value, dict):
            plain[key] = _take_tensors(value, name, tensors)
        else:
            plain[key] = _plain_value(value, name)
    return plain


def _plain_value(value, path: str):
    """A copy of a plain value. A tensor in a list is refused: it would have no key path."""
    if type(value) is list:
        return [_plain_value(item, path) for item in value]
    if isinstance(value, dict):
        return {key: _plain_value(item, _key_path(path, key)) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"checkpoint: {path} is a {type(value).__name__}; allowed are tensors in dicts, and None, "
        "bool, int, float, str, list and dict"
    )


def _key_path(path: str, key) -> str:
    if type(key) is not str:
        raise TypeError(f"checkpoint: key {key!r} in {path or 'the state'} is not a str")
    if not path:
        return key
    return f"{path}/{key}"


# ---------------------------------------------------------------- checksums


def checksums(tensors: dict[str, Tensor], plain: dict) -> dict[str, int]:
    """CRC-32 of each compact tensor under its key path, and of the plain values under PLAIN."""
    found = dict(zip(tensors, _in_threads(_checksum, tensors.values())))
    # The names of the tensors belong to it. A pickle stores equal strings once, so that one damaged
    # string would rename a tensor and its checksum alike, and both would still agree.
    # JSON keeps floats exact.
    text = json.dumps([sorted(tensors), plain], sort_keys=True)
    found[PLAIN] = zlib.crc32(text.encode())
    return found


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of a compact tensor's description and of its bytes in the order of memory."""
    # The description guards what no byte of the tensor shows, such as the shape of an empty one.
    description = f"{tensor.dtype} {list(tensor.shape)} {tensor.stride()} {tensor.requires_grad}"
    crc = zlib.crc32(description.encode())
    if tensor.storage_offset() != 0 or tensor.untyped_storage().nbytes() != tensor.nbytes:
        raise ValueError("a tensor and its storage differ in size")
    for _, chunk in _chunks(tensor):
        crc = zlib.crc32(chunk, crc)
    return crc


# ---------------------------------------------------------------- to the disk


def write_tensors(tensors: dict[str, Tensor], handle: int, path: Path) -> None:
    """Writes the bytes of the tensors into the room that torch.save left for them under skip_data.

    `handle` is the open file at `path`. torch.save itself copies a tensor of the GPU into new
    memory, then writes it, then takes the next, and the disk has nothing to do until the page
    cache is full. Here several threads copy and write at once, through small pinned buffers.
    """
    offsets = _offsets_in_file(path)
    # Tensors on the same bytes have the same offset: their bytes are written once.
    tensor_at = {offsets[name]: tensor for name, tensor in tensors.items() if tensor.nbytes}

    def write(offset: int) -> None:
        for start, chunk in _chunks(tensor_at[offset]):
            _write_chunk(handle, chunk, offset + start)

    _in_threads(write, tensor_at)


def _offsets_in_file(path: Path) -> dict[str, int]:
    """Where in the file the bytes of each tensor begin, by key path."""
    # In this mode torch.load reads no tensor but notes where its bytes are.
    with FakeTensorMode():
        tensors, _ = split(torch.load(path, map_location="cpu", weights_only=True))
    return {
        name: typing.cast(int, tensor.untyped_storage()._checkpoint_offset)
        for name, tensor in tensors.items()
    }


def _write_chunk(handle: int, chunk: memoryview, offset: int) -> None:
    written = 0
    # The system may take only a part of what it is given.
    while written < len(chunk):
        written += os.pwrite(handle, chunk[written:], offset + written)
    # Has the disk begin now, instead of when the page cache is full. Not every system has it.
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(handle, offset, len(chunk), os.POSIX_FADV_DONTNEED)


def _chunks(tensor: Tensor) -> Iterator[tuple[int, memoryview]]:
    """(start, the bytes from there) of a compact tensor in the order of memory, CHUNK at a time."""
    data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    data.set_(tensor.untyped_storage())
    buffer = None
    if not data.is_cpu:
        size = min(CHUNK, len(data))
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=data.is_cuda)
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK]
        if buffer is not None:
            chunk = buffer[: len(chunk)].copy_(chunk)
        yield start, chunk.numpy().data


def _in_threads(function: Callable, items: Iterable) -> list:
    """[function(item), ...]. Copies, zlib and the disk release the interpreter's lock meanwhile."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            # A disk that is full for one tensor is full for the others too: do not try them.
            pool.shutdown(cancel_futures=True)
            raise
