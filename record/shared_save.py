"""A checkpoint that all ranks of a run write together, into one file.

The rows of each tensor lie spread over the ranks (archive.Rows). The first rank writes the file
without these rows. Then every rank writes its own rows at their offsets. So no rank ever holds
the bytes of other ranks' rows. The file equals, to the byte, the one that a single rank would
write, and any number of ranks reads it.

All ranks that have rows write into the same file, so they need a folder that all of them see.
Those of one machine are enough: see rows_of_shards.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.distributed import Ranks
from engine.ownership import parameter_of
from record import archive
from record.archive import Rows
from record.causes import interruption_behind, root_cause_of

# ---------------------------------------------------------------- all ranks or none


class RankFailed(RuntimeError):
    """One of the ranks could not do its share. The text is the same on all ranks and names it."""


def agree(ranks: Ranks, work: Callable[[], Any]) -> list:
    """Calls `work` on every rank and returns all ranks' results, in the order of the ranks.

    Raises RankFailed on all ranks when `work` raised on one of them. So no rank waits for one
    that gave up, and all ranks know that the result is whole or that it is not.
    """
    result = None
    reason = None
    failure = None
    try:
        result = work()
    except BaseException as error:  # Ctrl-C too: the others must learn of it
        failure = error
        reason = root_cause_of(error)
    reports = ranks.all_values((result, reason))

    if failure is not None and interruption_behind(failure) is not None:
        raise failure
    for rank, (_, reason) in enumerate(reports):
        if reason is not None:
            raise RankFailed(f"rank {rank}: {reason}") from failure
    return [result for result, _ in reports]


# ---------------------------------------------------------------- what a rank has


def rows_of_shards(
    shards: dict[str, Tensor], whole: dict[str, Tensor], ranks: Ranks
) -> dict[str, Rows]:
    """A rank's rows of each tensor in `whole`, from its `shards`, whose keys are shard_keys.

    Of several machines, which all have the same shards, the first one saves them.
    """
    rows = {name: Rows(tuple(tensor.shape), tensor.dtype, []) for name, tensor in whole.items()}
    if ranks.on_first_machine:
        for key, tensor in shards.items():
            name, place = parameter_of(key)
            rows[name].parts.append((place.start, tensor))
    return rows


def rows_of_states(
    shards: dict[str, dict[str, Tensor]],
    whole: dict[str, Tensor],
    dtypes: Callable[[Tensor], dict[str, torch.dtype]],
    ranks: Ranks,
) -> dict[str, dict[str, Rows]]:
    """`rows_of_shards` for an optimizer's state: several tensors for each parameter in `whole`.

    `dtypes` gives their keys and dtypes; their shape is the parameter's.
    """
    rows: dict[str, dict[str, Rows]] = {}
    for name, parameter in whole.items():
        rows[name] = {}
        for key, dtype in dtypes(parameter).items():
            rows[name][key] = Rows(tuple(parameter.shape), dtype, [])
    if ranks.on_first_machine:
        for shard, tensors in shards.items():
            name, place = parameter_of(shard)
            for key, tensor in tensors.items():
                rows[name][key].parts.append((place.start, tensor))
    return rows


class Part(NamedTuple):
    """Rows of one tensor that this rank has."""

    name: str  # the tensor's key path
    first_row: int
    rows: Tensor  # compact: see archive.compact


class Written(NamedTuple):
    """What the first rank must know of a part that some rank writes."""

    first_row: int
    num_rows: int
    nbytes: int
    crc: int  # CRC-32 of the part's bytes
    device: str


# What one rank has of each tensor: its shape, its dtype and the rank's parts
Shares = dict[str, tuple[tuple[int, ...], torch.dtype, list[Written]]]


def rows_by_name(state: dict, path: str = "") -> dict[str, Rows]:
    """The leaves of type Rows, by key path."""
    found: dict[str, Rows] = {}
    for key, value in state.items():
        name = _joined_path(path, key)
        if isinstance(value, Rows):
            found[name] = value
        elif isinstance(value, dict):
            found |= rows_by_name(value, name)
    return found


def _joined_path(path: str, key) -> str:
    if not path:
        return str(key)
    return f"{path}/{key}"


def size_of_rows(state: dict) -> int:
    """Bytes of all tensors that are spread over the ranks."""
    return sum(rows.nbytes for rows in rows_by_name(state).values())


def own_parts(state: dict) -> list[Part]:
    """This rank's parts, without a copy. Raises TypeError for one that does not fit its tensor."""
    parts = []
    for name, rows in rows_by_name(state).items():
        for first_row, tensor in rows.parts:
            right_dtype = tensor.dtype == rows.dtype
            right_shape = tensor.shape[1:] == torch.Size(rows.shape[1:])
            if not (right_dtype and right_shape and tensor.is_contiguous()):
                raise TypeError(f"checkpoint: the rows of {name} from {first_row} do not fit it")
            if tensor.nbytes:
                compacted = archive.compact(dict(rows=tensor))
                parts.append(Part(name, first_row, compacted["rows"]))
    return parts


def _own_shares(state: dict) -> Shares:
    """What this rank has of each tensor, with the checksums of its parts."""
    shares: Shares = {}
    for name, rows in rows_by_name(state).items():
        shares[name] = (tuple(rows.shape), rows.dtype, [])
    parts = own_parts(state)
    crcs = archive.in_threads(lambda part: archive.bytes_checksum(part.rows), parts)
    for part, crc in zip(parts, crcs):
        tensor = part.rows
        written = Written(part.first_row, len(tensor), tensor.nbytes, crc, str(tensor.device))
        shares[part.name][2].append(written)
    return shares


# ---------------------------------------------------------------- writing the file


def write(path: Path, state: dict, version: int, ranks: Ranks) -> None:
    """Writes the whole file at `path`; it is on the disk when this returns, on every rank.

    `state` is what checkpoint.save was given, and `version` that of the file's format. Raises
    RankFailed on all ranks when one of them failed. The file is then of no use.
    """

    def prepare() -> Shares:
        # Copies to host memory on other streams must have landed before their bytes are read.
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return _own_shares(state)

    def begin() -> dict[str, int]:
        if not ranks.is_first:
            return {}
        return _write_all_but_rows(path, state, version, shares_of_ranks)

    shares_of_ranks = agree(ranks, prepare)
    offsets = agree(ranks, begin)[0]
    agree(ranks, lambda: _write_parts(path, own_parts(state), offsets))


def _write_all_but_rows(
    path: Path,
    state: dict,
    version: int,
    shares_of_ranks: list[Shares],
) -> dict[str, int]:
    """Writes the file with gaps in it for the rows. Returns the offset (bytes) of each tensor."""
    rows = rows_by_name(state)
    parts = _parts_of_all_ranks(rows, shares_of_ranks)
    stand_ins = _stand_ins(rows, parts)
    state = _replace_rows(archive.compact(state), stand_ins)
    tensors, plain = archive.split(state)
    # The other tensors are small, and the first rank has all of them.
    whole = {name: tensor for name, tensor in tensors.items() if name not in rows}

    crcs = archive.tensor_checksums(whole)
    for name, stand_in in stand_ins.items():
        crcs[name] = _combined_checksum(stand_in, parts[name])
    # The order of one rank's file
    checksums = {name: crcs[name] for name in tensors}
    checksums[archive.PLAIN] = archive.plain_checksum(tensors, plain)

    # As in checkpoint.py: a file of this name may be a link to another checkpoint.
    path.unlink(missing_ok=True)
    with open(path, "xb") as file:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({**state, "format": version, "checksums": checksums}, file)
        file.flush()
        offsets = archive.offsets_in_file(path)
        archive.write_tensors(whole, file.fileno(), offsets)
        os.fsync(file.fileno())
    return offsets


def _parts_of_all_ranks(
    rows: dict[str, Rows],
    shares_of_ranks: list[Shares],
) -> dict[str, list[Written]]:
    """All parts of each tensor in the order of its rows, whichever rank has them.

    Raises ValueError unless the parts are each row once.
    """
    parts: dict[str, list[Written]] = {name: [] for name in rows}
    for rank, shares in enumerate(shares_of_ranks):
        for name, (shape, dtype, own) in shares.items():
            if name not in rows:
                raise ValueError(f"rank {rank} has rows of {name}, and the first rank does not")
            if (shape, dtype) != (tuple(rows[name].shape), rows[name].dtype):
                raise ValueError(f"{name} is {dtype} {shape} on rank {rank}, unlike on the first")
            parts[name] += own

    for name, found in parts.items():
        found.sort(key=lambda part: part.first_row)
        next_row = 0
        for part in found:
            if part.first_row != next_row:
                raise ValueError(f"row {next_row} of {name} is missing, or two ranks have it")
            next_row += part.num_rows
        if rows[name].nbytes and next_row != rows[name].shape[0]:
            raise ValueError(f"{name} has {next_row} rows of {rows[name].shape[0]}")
    return parts


def _stand_ins(rows: dict[str, Rows], parts: dict[str, list[Written]]) -> dict[str, Tensor]:
    """A tensor in the place of each Rows, on the device where its parts are."""
    stand_ins = {}
    for name in rows:
        device = "cpu"
        if parts[name]:
            device = parts[name][0].device
        stand_ins[name] = _stand_in(rows[name], device)
    return stand_ins


def _stand_in(rows: Rows, device: str) -> Tensor:
    """A tensor that torch.save describes as it would the whole one, and that takes no memory."""
    if device == "cpu":
        # Memory that is never touched: the system gives none for it. A fake tensor would be
        # stored in other bytes, because torch names its device by another string each time.
        untouched = torch.UntypedStorage(rows.nbytes)
        return torch.empty(0, dtype=rows.dtype).set_(untouched).view(rows.shape)
    with FakeTensorMode():
        return torch.empty(rows.shape, dtype=rows.dtype, device=device)


def _replace_rows(node: dict, stand_ins: dict[str, Tensor], path: str = "") -> dict:
    """A copy of the nested dicts, with each Rows replaced by its stand-in."""
    copy = {}
    for key, value in node.items():
        name = _joined_path(path, key)
        if isinstance(value, Rows):
            value = stand_ins[name]
        elif isinstance(value, dict):
            value = _replace_rows(value, stand_ins, name)
        copy[key] = value
    return copy


def _write_parts(path: Path, parts: list[Part], offsets: dict[str, int]) -> None:
    """Writes this rank's rows into the file; they are on the disk when this returns."""
    if not parts:
        return
    handle = os.open(path, os.O_WRONLY)

    def write_part(part: Part) -> None:
        bytes_of_a_row = part.rows.nbytes // len(part.rows)
        start = offsets[part.name] + part.first_row * bytes_of_a_row
        archive.write_bytes(part.rows, handle, start)

    try:
        archive.in_threads(write_part, parts)
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- checksums of parts


def _combined_checksum(stand_in: Tensor, parts: list[Written]) -> int:
    """The checksum of a whole tensor (archive.tensor_checksums) from those of its parts."""
    crc = archive.description_checksum(stand_in)
    for part in parts:
        crc = crc32_combine(crc, part.crc, part.nbytes)
    return crc


# zlib's CRC-32 computes with polynomials over the integers modulo 2, modulo a polynomial P of
# degree 32. A checksum holds the 32 coefficients of the remainder, that of x^0 in its highest bit
# and that of x^31 in its lowest. Adding and subtracting are both XOR.
X_TO_THE_0 = 0x80000000
X_TO_THE_1 = 0x40000000
# P without x^32, in the same order of bits. Modulo P it equals x^32.
P = 0xEDB88320


def crc32_combine(first: int, second: int, length: int) -> int:
    """zlib.crc32(a + b) from first = crc32(a), second = crc32(b) and length = len(b).

    Let ~ flip all bits, and n be the number of bits of b. zlib begins with the register ~0, and
    n bits later the register r has become r x^n + b x^32 (modulo P). The checksum is ~ of it:

        ~crc32(b)     = ~0 x^n + b x^32
        ~crc32(a + b) = ~crc32(a) x^n + b x^32

    The sum of these lines: crc32(a + b) + crc32(b) = (~crc32(a) + ~0) x^n = crc32(a) x^n. In the
    last step, adding ~0 flips the bits back.
    """
    return _multiply(first, _power_of_x(8 * length)) ^ second


# Most parts of a checkpoint have one of a few lengths.
@functools.lru_cache
def _power_of_x(exponent: int) -> int:
    """x^exponent modulo P, by squaring: one step for each binary digit of the exponent."""
    power = X_TO_THE_0
    square = X_TO_THE_1  # x^1, x^2, x^4, x^8, ...
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        exponent >>= 1
    return power


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo P."""
    product = 0
    for k in range(32):
        # b is now b x^k.
        if a & (X_TO_THE_0 >> k):
            product ^= b
        # Times x: each coefficient moves one bit down. That of x^31 becomes x^32, which is P.
        overflow = b & 1
        b >>= 1
        if overflow:
            b ^= P
    return product
