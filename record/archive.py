"""The content of a checkpoint file: tensors and plain values, their checksums, writing tensors.

A state is a nested dict with str keys. Its leaves are tensors and plain values: None, bool, int,
float, str, and lists and dicts of them. This module knows no run, no file name and no message for
users; checkpoint.py adds those.
"""

import contextlib
import json
import math
import os
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Bytes that are checksummed or written at a time. For tensors on a GPU, each thread has a buffer of
# this size in host memory.
CHUNK = 16 * 2**20

# The key of the checksum of everything that is not a tensor
PLAIN = "plain values"

# ---------------------------------------------------------------- what a state consists of


# Storages by their address and their size in bytes
Storages = dict[tuple[int, int], torch.UntypedStorage]

# Tensors by key path: the keys of the nested dicts joined by /, such as "model/norm.weight"
NamedTensors = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """A leaf of the state of one of several ranks: its rows of a tensor that they store together.

    `shape` and `dtype` are the whole tensor's. `parts` are (first row, contiguous tensor of the
    rows from there), in any order; [] where other ranks have all rows. shared_save.py writes them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[tuple[int, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def compact(state: dict) -> dict:
    """A copy of the nested dicts, with tensors whose storage holds their own bytes only.

    torch.save writes whole storages: for a view of a few elements it would write the whole tensor
    that is viewed. A contiguous view gets a storage on the same memory, without a copy. Tensors on
    the same bytes still share a storage, so torch.save writes these bytes once.

    Raises TypeError for a tensor without bytes in memory (sparse, or on the meta device).
    """
    storages: Storages = {}
    dtypes: dict[int, torch.dtype] = {}

    def visit(node):
        if isinstance(node, Tensor):
            return _compact_tensor(node, storages, dtypes)
        if not isinstance(node, dict):
            return node
        copy = {}
        for key, value in node.items():
            copy[key] = visit(value)
        return copy

    return visit(state)


def _compact_tensor(
    tensor: Tensor,
    storages: Storages,
    dtypes: dict[int, torch.dtype],
) -> Tensor:
    """The tensor with a storage of its own bytes.

    `storages` are those made for earlier views. `dtypes` are those of earlier tensors, by the
    address of their storage.
    """
    is_sparse = tensor.layout is not torch.strided
    is_meta = tensor.device.type == "meta"
    if is_sparse or is_meta:
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
    stored_dtype = dtypes.setdefault(address, tensor.dtype)
    if stored_dtype != tensor.dtype:
        tensor = tensor.to("cpu", copy=True)
    return tensor


def _with_own_storage(tensor: Tensor, storages: Storages) -> Tensor:
    """The contiguous view `tensor`, on a storage that begins and ends where the view does."""
    storage = tensor.untyped_storage()
    first_element = int(tensor.storage_offset())
    start = first_element * tensor.element_size()  # in bytes
    end = start + tensor.nbytes
    # A slice of a storage lies on the same memory and keeps it alive.
    own_storage = storage[start:end]
    # torch.save recognises shared bytes by the storage, so views of the same bytes must get the
    # same storage.
    address = storage.data_ptr() + start
    own_storage = storages.setdefault((address, tensor.nbytes), own_storage)
    compacted = tensor.new_empty(0)
    return compacted.set_(own_storage, 0, tensor.shape, tensor.stride())


def split(state: dict) -> tuple[NamedTensors, dict]:
    """(the tensors by key path, a copy of the nested dicts without the tensors).

    Raises TypeError for a key or a leaf of a type that is not allowed, and for two tensors with
    the same key path.
    """
    tensors: NamedTensors = {}
    plain = _take_tensors(state, "", tensors)
    return tensors, plain


def _take_tensors(node: dict, path: str, tensors: NamedTensors) -> dict:
    """Adds the tensors of `node`, the dict at this key path, to `tensors`.

    Returns a copy of the other values. `node` itself is not changed.
    """
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
    """A copy of a plain value.

    Raises TypeError for any other value, such as a tensor in a list, which has no key path.
    """
    if type(value) is list:
        return [_plain_value(item, path) for item in value]
    if isinstance(value, dict):
        copy = {}
        for key, item in value.items():
            copy[key] = _plain_value(item, _key_path(path, key))
        return copy
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"checkpoint: {path} is a {type(value).__name__}; allowed are tensors in dicts, and None, "
        "bool, int, float, str, list and dict"
    )


def _key_path(path: str, key) -> str:
    if type(key) is not str:
        place = path or "the state"
        raise TypeError(f"checkpoint: key {key!r} in {place} is not a str")
    if not path:
        return key
    return f"{path}/{key}"


# ---------------------------------------------------------------- checksums


def checksums(tensors: NamedTensors, plain: dict) -> dict[str, int]:
    """CRC-32 of each compact tensor under its key path, and of the plain values under PLAIN."""
    found = tensor_checksums(tensors)
    found[PLAIN] = plain_checksum(tensors, plain)
    return found


def tensor_checksums(tensors: NamedTensors) -> dict[str, int]:
    """CRC-32 of each compact tensor under its key path."""
    crcs = in_threads(_checksum, tensors.values())
    return dict(zip(tensors, crcs))


def plain_checksum(tensors: NamedTensors, plain: dict) -> int:
    """CRC-32 of the plain values and of the names of the tensors."""
    # The checksum of the plain values covers the names of the tensors too. A pickle stores equal
    # strings once. So one damaged string would rename both a tensor and its checksum, and the two
    # would still agree.
    names = sorted(tensors)
    text = json.dumps([names, plain], sort_keys=True)  # JSON keeps floats exact
    return zlib.crc32(text.encode())


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of a compact tensor's description and of its bytes in the order of memory."""
    return bytes_checksum(tensor, description_checksum(tensor))


def description_checksum(tensor: Tensor) -> int:
    """CRC-32 of what a tensor's bytes do not show, such as the shape of an empty tensor."""
    shape = list(tensor.shape)
    description = f"{tensor.dtype} {shape} {tensor.stride()} {tensor.requires_grad}"
    return zlib.crc32(description.encode())


def bytes_checksum(tensor: Tensor, crc: int = 0) -> int:
    """CRC-32 of a compact tensor's bytes, which follow on bytes whose CRC-32 is `crc`."""
    storage_bytes = tensor.untyped_storage().nbytes()
    if tensor.storage_offset() != 0 or storage_bytes != tensor.nbytes:
        raise ValueError("a tensor and its storage differ in size")
    for _, chunk in _chunks(tensor):
        crc = zlib.crc32(chunk, crc)
    return crc


# ---------------------------------------------------------------- to the disk


def write_tensors(tensors: NamedTensors, handle: int, offsets: dict[str, int]) -> None:
    """Writes the bytes of the tensors into the gaps that torch.save left for them under skip_data.

    `handle` is the descriptor of the open file, `offsets` are those of `offsets_in_file`.

    torch.save itself handles one tensor after the other: it copies a tensor of the GPU into new
    host memory and then writes it. The disk stays idle until the page cache is full. Here several
    threads copy and write at the same time, through small pinned buffers.
    """
    # Tensors on the same bytes have the same offset, so their bytes are written once.
    tensor_at: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.nbytes:
            offset = offsets[name]
            tensor_at[offset] = tensor

    def write(offset: int) -> None:
        write_bytes(tensor_at[offset], handle, offset)

    in_threads(write, tensor_at)


def write_bytes(tensor: Tensor, handle: int, offset: int) -> None:
    """Writes the bytes of one compact tensor at an offset (bytes) of the open file."""
    for start, chunk in _chunks(tensor):
        _write_chunk(handle, chunk, offset + start)


def offsets_in_file(path: Path) -> dict[str, int]:
    """The offset in the file (bytes) at which each tensor begins, by key path."""
    # In this mode torch.load reads no tensor. It notes in each storage where its bytes are.
    with FakeTensorMode():
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors, _ = split(state)
    offsets = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        offsets[name] = typing.cast(int, storage._checkpoint_offset)
    return offsets


def _write_chunk(handle: int, chunk: memoryview, offset: int) -> None:
    """Writes the whole chunk at an offset (bytes) of the file."""
    written = 0  # bytes
    # pwrite may write only the beginning of what it is given.
    while written < len(chunk):
        rest = chunk[written:]
        written += os.pwrite(handle, rest, offset + written)
    # The disk begins to write now, and not only when the page cache is full. Not every system has
    # this call.
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(handle, offset, len(chunk), os.POSIX_FADV_DONTNEED)


def _chunks(tensor: Tensor) -> Iterator[tuple[int, memoryview]]:
    """Yields (first byte, bytes from there) of a compact tensor, at most CHUNK bytes at a time.

    The bytes are in the order of memory. A chunk is valid until the next one is taken, because
    chunks of a GPU tensor share one buffer.
    """
    # The tensor's storage as bytes
    data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    data.set_(tensor.untyped_storage())
    buffer = None
    if not data.is_cpu:
        size = min(CHUNK, len(data))
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=data.is_cuda)
    for start in range(0, len(data), CHUNK):
        end = start + CHUNK
        chunk = data[start:end]
        if buffer is not None:
            on_host = buffer[: len(chunk)]
            chunk = on_host.copy_(chunk)
        yield start, chunk.numpy().data


def in_threads(function: Callable, items: Iterable) -> list:
    """function(item) for each item, as a list in the order of the items.

    Threads are enough: copies, zlib and writing release the interpreter's lock while they work.
    """
    cpus = os.cpu_count() or 1
    with ThreadPoolExecutor(max_workers=min(8, cpus)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            # A disk that is full for one tensor is full for the others too: they are not tried.
            pool.shutdown(cancel_futures=True)
            raise
