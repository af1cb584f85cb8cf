"""Which rank owns which rows of each parameter, when several GPUs train one model.

Every rank holds all weights. Each row of a parameter has one owner: the rank that has the sum of
its gradient and its optimizer state, and that updates it. Muon needs whole matrices, so a matrix
has one owner.

The owners are a pure function of the parameters' shapes and of the number of ranks: every rank and
the planner compute the same. This file imports no torch.
"""

import itertools
from collections import defaultdict
from typing import NamedTuple

from config import Config, ParameterSpec, optimizer_groups, parameter_table

# These are small, and every rank gets the sums of their gradients (see engine/distributed.py). The
# first rank updates them. If each rank did, the weights would differ: kernels may round otherwise
# on each rank, as they depend on the shapes of the other tensors of a bucket.
SMALL_KINDS = ("norms", "router")


class Shard(NamedTuple):
    """Rows `start` to `stop` of a parameter's first dimension, and the rank that owns them."""

    owner: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


# By name of the parameter. The shards of a parameter cover its rows, in their order.
Ownership = dict[str, list[Shard]]


def ownership(config: Config, ranks: int) -> Ownership:
    """The shards of every parameter for `ranks` ranks, in the order of the parameter table.

    - Small parameters belong to the first rank.
    - Rows that are updated each by itself (of embedding and head, and all that AdamW updates) are
      cut into equal ranges, or nearly equal ones.
    - So are banks of experts where the number of ranks divides that of the experts.
    - All other matrices are given away one by one, the dearest first, each to the rank that has
      least to do so far.
    """
    table = parameter_table(config)
    whole_matrices = set()
    for group in optimizer_groups(config).values():
        if group.orthogonalizes:
            whole_matrices |= set(group.parameters)

    shards: Ownership = {}
    single: dict[str, ParameterSpec] = {}  # whose matrices are given away one by one
    for name, spec in table.items():
        rows = spec.shape[0]
        is_bank = spec.kind == "experts" and rows % ranks == 0
        if spec.kind in SMALL_KINDS:
            shards[name] = [Shard(0, 0, rows)]
        elif is_bank or name not in whole_matrices:
            shards[name] = _equal_ranges(rows, ranks)
        else:
            single[name] = spec
    shards |= _given_away(single, ranks)
    return {name: shards[name] for name in table}


def small_parameters(config: Config) -> list[str]:
    """The names of the parameters of SMALL_KINDS, in the order of the parameter table."""
    table = parameter_table(config)
    return [name for name, spec in table.items() if spec.kind in SMALL_KINDS]


def shard_key(name: str, shard: Shard) -> str:
    """The name of a shard: its parameter's, and its rows, such as "embedding.weight[0:512]"."""
    return f"{name}[{shard.start}:{shard.stop}]"


def parameter_of(key: str) -> tuple[str, slice]:
    """The parameter's name and the rows that a `shard_key` stands for; of a plain name all rows."""
    name, bracket, rows = key.partition("[")
    if not bracket:
        return name, slice(None)
    start, _, stop = rows.removesuffix("]").partition(":")
    return name, slice(int(start), int(stop))


def is_even(shards: list[Shard], ranks: int) -> bool:
    """Whether every rank owns one shard, all of them of one size: rank 0 the first, and so on.

    Such a parameter can be reduced and gathered by one collective for all owners.
    """
    sizes = {shard.stop - shard.start for shard in shards}
    owners = [shard.owner for shard in shards]
    return owners == list(range(ranks)) and len(sizes) == 1


def _equal_ranges(rows: int, ranks: int) -> list[Shard]:
    bounds = [rows * rank // ranks for rank in range(ranks + 1)]
    ranges = itertools.pairwise(bounds)
    return [Shard(rank, start, stop) for rank, (start, stop) in enumerate(ranges) if stop > start]


def _given_away(parameters: dict[str, ParameterSpec], ranks: int) -> Ownership:
    """The owners of these parameters' matrices, so that all ranks have about equal work."""
    units = []  # (cost, name, first row, last row + 1)
    for name, spec in parameters.items():
        for start, stop in _units(spec):
            cost = update_cost(spec, start, stop)
            units.append((cost, name, start, stop))
    # Equal costs stay in the order of names and rows: every rank must get the same result.
    units.sort(key=lambda unit: (-unit[0], *unit[1:]))
    load = [0] * ranks
    owned = defaultdict(list)
    for cost, name, start, stop in units:
        owner = min(range(ranks), key=lambda rank: load[rank])
        load[owner] += cost
        owned[name].append(Shard(owner, start, stop))
    return {name: _joined(sorted(owned[name], key=lambda shard: shard.start)) for name in owned}


def _units(spec: ParameterSpec) -> list[tuple[int, int]]:
    """The ranges of rows that stay together: a matrix, or the matrices of one expert."""
    rows = spec.shape[0]
    if len(spec.shape) == 2:
        return [(0, rows)]
    return [(row, row + 1) for row in range(rows)]


def update_cost(spec: ParameterSpec, start: int = 0, stop: int | None = None) -> int:
    """What the update of these rows takes, or of all, in multiplications.

    Newton-Schulz in Gram form (muon.py) on [short, long]: the Gram matrix is computed twice and
    multiplied with x twice, in all 3 long short^2 (a symmetric product is half a product), and
    about 10 symmetric products of the Gram matrix are 5 short^3.
    """
    short, long = sorted(spec.shape[-2:])
    if stop is None:
        stop = spec.shape[0]
    matrices = 1
    if len(spec.shape) > 2:
        matrices = stop - start
        for size in spec.shape[1:-2]:
            matrices *= size
    return matrices * short * short * (3 * long + 5 * short)


def _joined(shards: list[Shard]) -> list[Shard]:
    """The shards, with neighbours of one owner made into one."""
    joined: list[Shard] = []
    for shard in shards:
        if joined and joined[-1].owner == shard.owner:
            joined[-1] = Shard(shard.owner, joined[-1].start, shard.stop)
        else:
            joined.append(shard)
    return joined
