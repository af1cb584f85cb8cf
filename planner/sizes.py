"""Predicted bytes of a training run: weights, gradients, optimizer state, activations, workspace.

The sizes follow from the Config alone, without torch. What stays in memory is exact arithmetic over
config.py's tables (`parameter_table`, `optimizer_groups`). What a block keeps for its backward pass
is a sum over its tensors, and loops over `Config.feed_forwards`. Peaks are the largest of the sums
of what is alive at the same time; tests hold them to measured ones.

Change this file together with model.py, moe.py, muon.py and engine/offload.py.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from config import (
    LIGHTER,
    LOSS_CHUNK,
    OPTIMIZER_BUCKET,
    Config,
    FeedForward,
    OptimizerGroup,
    optimizer_groups,
    parameter_table,
)
from engine.ownership import SMALL_KINDS
from planner.machine import GB
from planner.sharing import evenly_owned, gradient_groups, owned_elements, passes_of_a_rank

# Bytes of an element.
FP32 = 4
INT64 = 8

# Norms and routers are fp32 in every precision.
FP32_KINDS = ("norms", "router")

# Kinds whose gradients are fp32 in every precision.
FP32_GRADIENT_KINDS = (*FP32_KINDS, "embedding", "head")

# The low bits of an fp32 master weight, which are stored beside a 16-bit weight.
LOW_BITS_BYTES = 2

# Bytes of temporary fp32 and integer tensors for each element that the optimizer updates on a CPU,
# by the weights' precision (measured). In fp16 the low bits take arithmetic, in bf16 only shifts of
# bits.
CPU_UPDATE_BYTES = {"fp32": 20, "bf16": 26, "fp16": 51}

# What matmul libraries keep on a CPU and what the heap loses to fragments, by bytes of an element
# in matmuls. In 16 bits a kernel is made for each number of rows that an expert gets. Measured:
# 0.3 GB in fp32, 0.5 to 0.7 GB in bf16 and fp16.
CPU_LIBRARY_GB = {4: 0.35, 2: 0.8}


def predict_memory(
    config: Config,
    checkpointing: str,
    batch_size: int,
    offload: bool,
    lighter_blocks: int = 0,
    cpu: bool = False,
    gpus: int = 1,
    machines: int = 1,
    reduce_gradients: str = "step",
) -> dict[str, float]:
    """Predicted memory of `config` in GB, with these values in place of its own.

    With several GPUs on each of some machines it is the memory of one GPU, that which needs most.

    The keys are weights, gradients, master, one for each optimizer group (momentum, adamw),
    activations, workspace, their total, and host (memory of the host, when state is offloaded; the
    offloaded components are 0 then).

    activations: the peak of the forward and backward passes beyond what stays.
    workspace: by how much the optimizer step's own buffers exceed the activations, or 0. The step
    begins after the activations are freed. On a `cpu` nothing is compiled, and both are larger.
    """
    predictor = MemoryPredictor(config, cpu, gpus, machines)
    return predictor.predict(checkpointing, batch_size, offload, lighter_blocks, reduce_gradients)


def checkpoint_gb(config: Config) -> float:
    """Size of a checkpoint file in GB: weights and optimizer state, wherever a run keeps them."""
    state = optimizer_state(config, owned_elements(config, gpus=1))
    return (weights(config) + sum(state.values())) / GB


class Summing(NamedTuple):
    """How gradients are summed; their bytes depend on it."""

    offload: bool  # then those of `host_gradient_blocks` are summed in host memory
    over_gpus: str  # once a "step", or in every "micro_batch"
    several_passes: bool  # whether a GPU has more than one micro-batch in a step


class MemoryPredictor:
    """`predict_memory` for many choices of one configuration.

    A search predicts hundreds of choices. What they share is computed once, so that a prediction
    takes the same short time for any number of blocks.
    """

    def __init__(self, config: Config, cpu: bool = False, gpus: int = 1, machines: int = 1):
        if gpus * machines > 1:
            # Several GPUs sum gradients among each other, and none of them in host memory.
            config = dataclasses.replace(config, host_gradient_blocks=0)
        self.config = config
        self.cpu = cpu
        self.gpus = gpus
        self.ranks = gpus * machines
        self.weights = weights(config)
        # elements of each parameter that this GPU updates
        self.owned = owned_elements(config, gpus)
        # bytes of the low bits and of the optimizers' state, by key of the memory table
        self.state = optimizer_state(config, self.owned)
        # The kind of each block, as the number of the first block of that kind: blocks of a kind
        # have the same sizes.
        self.kinds = _first_blocks_of_a_kind(config)
        # by mode, then by block: bytes that all blocks before it keep for a token
        self.kept_before = {}
        for mode in ("none", "selective", "full"):
            kept = {}
            for layer in set(self.kinds):
                kept[layer] = activation_bytes_per_token(config, layer, mode, cpu)
            self.kept_before[mode] = _sums_before([kept[kind] for kind in self.kinds])
            if mode == "none":
                self.kept_by_none = kept  # by kind
        # bytes of the weights that matmuls cast, by block, and of all blocks before it
        self.casts = [self._cast_bytes(layer) for layer in range(config.n_layers)]
        self.casts_before = _sums_before(self.casts)
        # What was computed before: `backward_bytes` of each kind of block by the number of tokens,
        # `optimizer_bytes` by offload, `GradientBytes` by how gradients are summed, and the
        # `_possible_peaks` of these.
        self._backward: dict[int, dict[int, int]] = {}
        self._optimizer: dict[bool, float] = {}
        self._gradient_bytes: dict[Summing, GradientBytes] = {}
        self._peaks: dict[Summing, list[tuple[int, int]]] = {}

    def predict(
        self,
        checkpointing: str,
        batch_size: int,
        offload: bool,
        lighter_blocks: int = 0,
        reduce_gradients: str = "step",
    ) -> dict[str, float]:
        """The sizes of a choice in GB, as `predict_memory` returns them."""
        tokens = batch_size * self.config.max_seq_len
        host_gradients = sum(self._host_gradients(offload))
        passes = passes_of_a_rank(self.config.sequences_per_step // batch_size, self.ranks)
        summing = Summing(offload, reduce_gradients, several_passes=passes > 1)
        activations = self._activation_peak(checkpointing, lighter_blocks, tokens, summing)

        sizes: dict[str, float] = {}
        sizes["weights"] = self.weights
        sizes["gradients"] = self._gradients(summing).stay
        for key, size in self.state.items():
            sizes[key] = size
            if offload:
                sizes[key] = 0
        sizes["activations"] = activations
        if self.cpu:
            # The libraries keep this memory during the optimizer step too. So the workspace below
            # is compared with the activations alone, which are freed before that step.
            sizes["activations"] += CPU_LIBRARY_GB[compute_bytes(self.config)] * GB
        sizes["workspace"] = max(0, self._optimizer_peak(offload) - activations)
        sizes["total"] = sum(sizes.values())
        sizes["host"] = 0
        if offload:
            sizes["host"] = sum(self.state.values()) + host_gradients
        return {key: size / GB for key, size in sizes.items()}

    def _host_gradients(self, offload: bool) -> list[int]:
        """Bytes of the gradients in host memory, one number for each of the first blocks."""
        if not offload:
            return []
        in_host_memory = range(self.config.host_gradient_blocks)
        element = weight_bytes(self.config)
        return [element * self.config.matrices_of(layer) for layer in in_host_memory]

    def _gradients(self, summing: Summing) -> "GradientBytes":
        if summing not in self._gradient_bytes:
            self._gradient_bytes[summing] = self._computed_gradients(summing)
        return self._gradient_bytes[summing]

    def _computed_gradients(self, summing: Summing) -> "GradientBytes":
        if self.ranks == 1:
            return _gradients_of_one_gpu(self.config, self._host_gradients(summing.offload))
        in_every_pass = summing.over_gpus == "micro_batch"
        groups = travelling_groups(self.config, self.gpus, self.owned, in_every_pass)
        if not summing.several_passes:
            existing = _existing_in_one_pass(groups)
        elif in_every_pass:
            existing = _existing_in_every_pass(groups)
        else:
            existing = _existing_in_the_last_pass(groups)
        return _gradients_of_several_gpus(self.config, groups, existing)

    def _activation_peak(
        self, checkpointing: str, lighter_blocks: int, tokens: int, summing: Summing
    ) -> int:
        """The most bytes that forward and backward passes need at a time.

        The backward pass goes from the last block to the first. During that of a block, the blocks
        before it still have all that they kept, and the blocks after it have nothing any more. The
        block itself has what mode "none" would keep, whatever its own mode: what it did not keep
        it recomputes before its backward pass. The same holds for the weights that it casts.
        """
        n_layers = self.config.n_layers
        kept_before = self._kept_before(checkpointing, lighter_blocks, tokens)
        backward = self._backward_bytes(tokens)
        waiting = _waiting_head_gradient(self.config)
        # The loss comes between the two passes, when every block has all that it keeps. (The
        # embedding comes last. It needs less than the loss, and no block has anything any more.)
        peak = kept_before(n_layers) + loss_bytes(self.config, tokens, self.cpu)
        peak += self._gradients(summing).at_the_loss
        for layer, gradients_under_way in self._possible_peaks(summing):
            kind = self.kinds[layer]
            block = tokens * self.kept_by_none[kind] + self.casts[layer]
            needed = kept_before(layer) + block + backward[kind]
            needed += gradients_under_way + waiting
            peak = max(peak, needed)
        return peak

    def _kept_before(
        self, checkpointing: str, lighter_blocks: int, tokens: int
    ) -> Callable[[int], int]:
        """A function of a block's number: bytes that all blocks before this one keep."""
        lighter = LIGHTER.get(checkpointing, checkpointing)
        first_lighter = self.config.n_layers - lighter_blocks

        def in_mode(mode: str, start: int, stop: int) -> int:
            """Bytes that the blocks from `start` to before `stop` keep in this mode."""
            kept = self.kept_before[mode]
            total = tokens * (kept[stop] - kept[start])
            if mode == "none":  # autograd keeps the casts with the activations
                total += self.casts_before[stop] - self.casts_before[start]
            return total

        def kept_before(layer: int) -> int:
            boundary = min(layer, first_lighter)
            return in_mode(checkpointing, 0, boundary) + in_mode(lighter, boundary, layer)

        return kept_before

    def _possible_peaks(self, summing: Summing) -> list[tuple[int, int]]:
        """Blocks at which the backward pass can peak, with the bytes of gradients under way there.

        Of blocks that are alike only the last one can: the most is kept before it.
        """
        if summing not in self._peaks:
            last = {}
            for layer, under_way in enumerate(self._gradients(summing).under_way):
                last[self.kinds[layer], under_way] = (layer, under_way)
            self._peaks[summing] = list(last.values())
        return self._peaks[summing]

    def _cast_bytes(self, layer: int) -> int:
        """16-bit copies of a block's fp32 weights, which matmuls keep.

        On a GPU such a copy does not outlive the matmul that it is made for.
        """
        element = compute_bytes(self.config)
        if not self.cpu or element == weight_bytes(self.config):
            return 0
        return element * self.config.matrices_of(layer)

    def _backward_bytes(self, tokens: int) -> dict[int, int]:
        """`backward_bytes` of each kind of block, for a micro-batch of `tokens` tokens."""
        if tokens not in self._backward:
            self._backward[tokens] = {
                kind: backward_bytes(self.config, kind, tokens, self.cpu)
                for kind in set(self.kinds)
            }
        return self._backward[tokens]

    def _optimizer_peak(self, offload: bool) -> float:
        if offload not in self._optimizer:
            self._optimizer[offload] = optimizer_bytes(self.config, offload, self.cpu, self.owned)
        return self._optimizer[offload]


def _first_blocks_of_a_kind(config: Config) -> list[int]:
    """For each block the first one that has the same networks; it may be the block itself."""
    first: dict[tuple, int] = {}
    blocks = []
    for layer in range(config.n_layers):
        networks = (config.is_moe(layer), *config.feed_forwards(layer))
        blocks.append(first.setdefault(networks, layer))
    return blocks


def _sums_before(sizes: list[int]) -> list[int]:
    """The sum of all sizes before each one, and at the end the sum of all."""
    return list(itertools.accumulate(sizes, initial=0))


# ---------------------------------------------------------------- elements


def compute_bytes(config: Config) -> int:
    """Bytes of an element of activations, and of an element in matmuls."""
    if config.precision == "fp32":
        return 4
    return 2


def weight_bytes(config: Config) -> int:
    """Bytes of an element of a weight of all kinds but FP32_KINDS.

    A gradient has as many, for all kinds but FP32_GRADIENT_KINDS.
    """
    if config.split_masters:  # 16-bit weights, with the low bits of their fp32 masters beside them
        return 2
    return 4


# ---------------------------------------------------------------- what stays


def weights(config: Config) -> int:
    """Bytes of the model's weights."""
    total = 0
    for kind, numel in config.parameter_groups.items():
        element = weight_bytes(config)
        if kind in FP32_KINDS:
            element = FP32
        total += numel * element
    return total


def gradients(config: Config) -> int:
    """Bytes of the gradients of all weights, summed over a step's micro-batches."""
    total = 0
    for kind, numel in config.parameter_groups.items():
        total += numel * _gradient_element(config, kind)
    return total


def _gradient_element(config: Config, kind: str) -> int:
    """Bytes of an element of a gradient of this kind."""
    if kind in FP32_GRADIENT_KINDS:
        return FP32
    return weight_bytes(config)


def optimizer_state(config: Config, owned: dict[str, int]) -> dict[str, int]:
    """Bytes of the fp32 masters' low bits ("master") and of each optimizer group's state.

    `owned` are the elements of each parameter that have state here, as `owned_elements` returns
    them.
    """
    table = parameter_table(config)
    state = dict(master=0)
    if config.split_masters:
        for name, numel in owned.items():
            if table[name].kind not in FP32_KINDS:
                state["master"] += numel * LOW_BITS_BYTES
    for group in optimizer_groups(config).values():
        state.setdefault(group.memory_key, 0)
        state[group.memory_key] += _numel(group, owned) * group.state_bytes_per_element
    return state


def _numel(group: OptimizerGroup, owned: dict[str, int]) -> int:
    """Elements that are owned of all parameters of a group."""
    return sum(owned.get(name, 0) for name in group.parameters)


# ---------------------------------------------------------------- gradients and their sums


@dataclasses.dataclass(frozen=True)
class GradientBytes:
    """Bytes of the gradients on one GPU."""

    stay: int  # from the end of the backward passes to the end of the optimizer step
    # By how much it is more during the backward pass of each block; negative where it is less.
    under_way: list[int]
    at_the_loss: int = 0  # the same, between forward and backward pass


def _gradients_of_one_gpu(config: Config, host_gradients: list[int]) -> GradientBytes:
    """All gradients, but for those of the first blocks that are summed in host memory."""
    under_way = [_gradients_under_way(layer, host_gradients) for layer in range(config.n_layers)]
    return GradientBytes(gradients(config) - sum(host_gradients), under_way)


# Several GPUs: engine/distributed.py sends the gradients of a block to their owners as soon as all
# are made. That is a group; head and embedding are groups too.

# Groups that may be on their way while the gradients of the next one are made.
GROUPS_IN_FLIGHT = 2


class TravellingGroup(NamedTuple):
    """Bytes of a group's gradients on one GPU."""

    whole: int  # as the backward pass makes them
    kept: int  # of sums, after the group has arrived
    arriving: int  # of new tensors that the other GPUs' gradients arrive in
    beside: int  # of sums that are there beside the whole gradients, before those are freed


def travelling_groups(
    config: Config, gpus: int, owned: dict[str, int], in_every_pass: bool
) -> list[TravellingGroup]:
    """The groups in the order of the backward pass, on the GPU that owns `owned`.

    The sums of an evenly owned parameter arrive in a new tensor. Others are summed in place. Such a
    sum is a view of the gradient, which so stays in memory as a whole. Where gradients travel
    `in_every_pass`, a sum of some rows is copied, and the gradient is freed.
    """
    table = parameter_table(config)
    even = evenly_owned(config, gpus)
    groups = []
    for names in gradient_groups(config):
        whole = kept = arriving = beside = 0
        for name in names:
            element = _gradient_element(config, table[name].kind)
            gradient = element * table[name].numel
            own_rows = element * owned.get(name, 0)
            whole += gradient
            if name in even:
                kept += own_rows
                arriving += own_rows
                beside += own_rows
            elif in_every_pass:
                kept += own_rows
                if own_rows < gradient:
                    beside += own_rows
            elif own_rows:
                kept += gradient
        groups.append(TravellingGroup(whole, kept, arriving, beside))
    return groups


def _gradients_of_several_gpus(
    config: Config, groups: list[TravellingGroup], existing: list[int]
) -> GradientBytes:
    """`existing` are the bytes of the groups' gradients while each group is made."""
    kept = sum(group.kept for group in groups)
    small = FP32 * sum(config.parameter_groups[kind] for kind in SMALL_KINDS)
    # The head's group is number 0, that of the last block 1, and that of block 0 n_layers.
    under_way = [existing[config.n_layers - layer] - kept for layer in range(config.n_layers)]
    return GradientBytes(kept + small, under_way, at_the_loss=existing[0] - kept)


def _existing_in_one_pass(groups: list[TravellingGroup]) -> list[int]:
    """Bytes while each group is made, where a GPU has one micro-batch in a step."""
    return [_sent_before(groups, number) for number in range(len(groups))]


def _existing_in_the_last_pass(groups: list[TravellingGroup]) -> list[int]:
    """Bytes while each group is made, where gradients travel in the last of several passes.

    Before that pass, and at its beginning, there are the whole gradients of all groups.
    """
    all_whole = sum(group.whole for group in groups)
    existing = []
    for number in range(len(groups)):
        coming = sum(group.whole for group in groups[number:])
        existing.append(max(all_whole, coming + _sent_before(groups, number)))
    return existing


def _existing_in_every_pass(groups: list[TravellingGroup]) -> list[int]:
    """Bytes while each group is made, where gradients travel in every one of several passes.

    After the first pass all sums are there. What arrives is added to them.
    """
    kept = sum(group.kept for group in groups)
    existing = []
    for number in range(len(groups)):
        in_flight = 0
        for earlier in range(number - GROUPS_IN_FLIGHT, number):
            # A number below 0 counts from the end: the last groups of the pass before.
            in_flight += groups[earlier].whole + groups[earlier].arriving
        existing.append(kept + in_flight)
    return existing


def _sent_before(groups: list[TravellingGroup], number: int) -> int:
    """Bytes of the groups that were sent before this one in the same pass."""
    first_in_flight = max(number - GROUPS_IN_FLIGHT, 0)
    arrived = sum(group.kept for group in groups[:first_in_flight])
    in_flight = sum(group.whole + group.beside for group in groups[first_in_flight:number])
    return arrived + in_flight


# ---------------------------------------------------------------- what a block keeps


def activation_bytes_per_token(
    config: Config, layer: int, checkpointing: str, cpu: bool = False
) -> int:
    """Bytes that block `layer` keeps for its backward pass, for each token.

    On a GPU blocks are compiled: many small operations become one kernel, which keeps its inputs
    and outputs only. On a CPU they are not, and every operation keeps what its backward reads.
    """
    if checkpointing == "full":
        return _kept_by_full(config, layer, cpu)
    if checkpointing == "selective":
        return _kept_by_selective(config, layer, cpu)
    if cpu:
        return _kept_by_none_on_cpu(config, layer)
    return _kept_by_none(config, layer)


def _kept_by_full(config: Config, layer: int, cpu: bool) -> int:
    """The block's input, and which experts were chosen.

    The choice is kept because recomputed logits may be rounded otherwise: where two experts nearly
    tie, the backward pass could use another one than the forward pass.
    """
    block_input = compute_bytes(config) * config.d_model
    return block_input + _chosen_experts(config, layer, cpu)


def _kept_by_selective(config: Config, layer: int, cpu: bool) -> int:
    """Bytes for each token: outputs of attention and of most matmuls (model.py chooses them)."""
    element = compute_bytes(config)
    d_model = config.d_model
    # Three tensors of width d_model: the block's input, the projected queries and attention's
    # output. One of width kv_width: the projected keys. Values and the output projection are
    # recomputed.
    kept = element * (3 * d_model + _kv_width(config))
    kept += _log_sum_exp(config)
    kept += _chosen_experts(config, layer, cpu)
    if config.is_moe(layer):
        kept += FP32 * config.num_experts  # the router's logits, the output of an fp32 matmul
    for ffn in config.feed_forwards(layer):
        gate_up = 2 * ffn.d_ff  # the output of the gate and up matmul
        kept += element * ffn.top_k * gate_up
        if cpu:
            # The output of the down matmul, which nothing reads any more. The compiler drops it.
            kept += element * ffn.top_k * d_model
    return kept


def _kept_by_none(config: Config, layer: int) -> int:
    """Everything that the compiled backward pass reads."""
    element = compute_bytes(config)
    d_model = config.d_model
    # d_model wide, 6: the block's input, its normalised input, queries as projected and as rotated,
    # attention's output, and the output projection. (The residual stream before the ffn is not
    # kept: it is the block's input plus the output projection.)
    # kv_width wide, 3: keys as projected and as rotated, and values.
    kept = element * (6 * d_model + 3 * _kv_width(config))
    kept += _log_sum_exp(config)
    kept += _norm_statistics(config)
    for ffn in config.feed_forwards(layer):
        # Each expert that a token is sent to has its own copy of three rows: the normalised input
        # (the copies are what dispatch makes), the output of the gate and up matmul, and the hidden
        # row that the down matmul reads.
        gate_up = 2 * ffn.d_ff
        hidden = ffn.d_ff
        kept += element * ffn.top_k * (d_model + gate_up + hidden)
    if config.is_moe(layer):
        kept += _chosen_experts(config, layer, cpu=False)
        # The router's input. In fp32 it is one of the rows above, and in 16 bits an fp32 copy.
        if element < FP32:
            kept += FP32 * d_model
        # The router's logits; the maximum and the sum of their softmax, and the z-loss's
        # log-sum-exp.
        kept += FP32 * (config.num_experts + 3)
        # Of each chosen expert: its weight, its entry of the sort indices and of their inverse.
        kept += config.top_k * (FP32 + 2 * INT64)
    return kept


def _kept_by_none_on_cpu(config: Config, layer: int) -> int:
    """Everything that eager autograd keeps."""
    element = compute_bytes(config)
    d_model = config.d_model
    kv_width = _kv_width(config)
    # Each norm keeps two tensors in fp32, its input and its normalised input. There are two norms
    # of the residual stream and one of queries, d_model wide, and one of keys, kv_width wide.
    kept = 2 * FP32 * (3 * d_model + kv_width)
    # d_model wide, 3: the projections' normalised input, rotated queries, attention's output.
    # kv_width wide, 2: rotated keys, values.
    kept += element * (3 * d_model + 2 * kv_width)
    kept += _log_sum_exp(config)
    kept += _norm_statistics(config)
    for ffn in config.feed_forwards(layer):
        # d_ff wide: gate, up, silu(gate), and the hidden row that the down matmul reads.
        hidden_rows = 4
        if ffn.kind == "experts":
            hidden_rows += 1  # the hidden row before it is multiplied by the router's weight
        # The ffn's normalised input is d_model wide.
        kept += element * ffn.top_k * (d_model + hidden_rows * ffn.d_ff)
    if config.is_moe(layer):
        kept += _routing_on_cpu(config)
    return kept


def _routing_on_cpu(config: Config) -> int:
    """Bytes that eager autograd keeps of a token's routing."""
    router_input = FP32 * config.d_model
    # Logits and probabilities; for each chosen expert a mask of all experts, a byte (bool) each.
    all_experts = config.num_experts * (2 * FP32 + config.top_k)
    # Of each chosen expert: its weight twice, by token and sorted, and its entry of the sort
    # indices and of their inverse.
    chosen_experts = config.top_k * (2 * FP32 + 2 * INT64)
    # The sum of the chosen probabilities, and the z-loss's log-sum-exp.
    sums = 2 * FP32
    return router_input + all_experts + chosen_experts + sums


def _chosen_experts(config: Config, layer: int, cpu: bool) -> int:
    """Bytes of the router's top-k: its indices (int64), and on a CPU its values (fp32) too."""
    if not config.is_moe(layer):
        return 0
    each = INT64
    if cpu:
        each += FP32
    return each * config.top_k


def _kv_width(config: Config) -> int:
    """The width of a token's keys, and of its values."""
    return config.n_kv_heads * config.head_dim


def _log_sum_exp(config: Config) -> int:
    """The log-sum-exp of attention's softmax: one fp32 number for each head."""
    return FP32 * config.n_heads


def _norm_statistics(config: Config) -> int:
    """1 / rms in fp32: for each of the block's two norms, and each head of queries and keys."""
    return FP32 * (2 + config.n_heads + config.n_kv_heads)


# ---------------------------------------------------------------- what a backward pass needs


def backward_bytes(config: Config, layer: int, tokens: int, cpu: bool) -> int:
    """Bytes that the backward pass of a block needs beyond what is kept and recomputed.

    The peak lies in the feed-forward part, where the widest tensors and the largest weights are.
    Gradients of weights count here although they have room of their own: a micro-batch's gradient
    is a tensor by itself until it is added to the sum.
    """
    stream = compute_bytes(config) * config.d_model * tokens  # one tensor, d_model wide
    # Three gradients are as wide as the residual stream: that of the block's output, the one that
    # is on its way through the ffn, and that of the ffn's normalised input.
    residual_stream = 3 * stream
    if cpu:
        return residual_stream + _ffn_backward_on_cpu(config, layer, tokens)
    return residual_stream + _ffn_backward(config, layer, tokens)


def _ffn_backward(config: Config, layer: int, tokens: int) -> int:
    """The larger of two moments, in a compiled graph, which holds its results to the end.

    Early: the gradients of gate and up (2 hidden) of the network that the pass is in, and the
    gradient of its down weight. In 16 bits one kernel does SwiGLU's backward pass, and the hidden
    rows' gradient is freed by then. In fp32 it is there too (3 hidden).

    Late: the gradients of all three weights, and three tensors of the attention's backward pass,
    d_model wide. The kept gate, up and hidden rows have been freed by then, and count against
    these.
    """
    stream = compute_bytes(config) * config.d_model * tokens
    gradients_of_hidden = 3
    if compute_bytes(config) == 2:
        gradients_of_hidden = 2
    finished = 0
    peak = 0
    for ffn in reversed(config.feed_forwards(layer)):
        hidden = _hidden_bytes(config, ffn, tokens)
        weight = _ffn_weight_bytes(config, ffn)
        early = finished + gradients_of_hidden * hidden + weight
        peak = max(peak, early)
        finished += 3 * weight - 3 * hidden
    late = finished + 3 * stream
    return max(peak, late)


def _ffn_backward_on_cpu(config: Config, layer: int, tokens: int) -> int:
    """The larger of two moments. Eager autograd adds each weight's gradient to the sum at once.

    SwiGLU: the hidden rows' gradient and two that follow from it; in 16 bits two of them are also
    there in fp32. Measured: 2 hidden in fp32, 5 in 16 bits.

    Weights: the gradient of gate and up, which are one parameter (2 weights).
    """
    gradients_of_hidden = 5
    if compute_bytes(config) == 4:
        gradients_of_hidden = 2
    peak = 0
    for ffn in config.feed_forwards(layer):
        swiglu = gradients_of_hidden * _hidden_bytes(config, ffn, tokens)
        gate_and_up = 2 * _ffn_weight_bytes(config, ffn)
        peak = max(peak, swiglu, gate_and_up)
    return peak


def _hidden_bytes(config: Config, ffn: FeedForward, tokens: int) -> int:
    """Bytes of a network's hidden rows, d_ff wide: one for each expert that a token is sent to."""
    return compute_bytes(config) * ffn.d_ff * ffn.top_k * tokens


def _ffn_weight_bytes(config: Config, ffn: FeedForward) -> int:
    """Bytes of one of a network's three weights (gate, up, down), of all experts."""
    return ffn.num_experts * ffn.d_ff * config.d_model * weight_bytes(config)


def _gradients_under_way(layer: int, host_gradients: list[int]) -> int:
    """Bytes of gradients on their way between host and GPU, in the backward pass of `layer`.

    Gradients are summed over micro-batches, and the sums of the first blocks lie in host memory.
    The backward pass goes from the last block to the first. The sums of this block and of the next
    one (layer - 1) have been fetched, and those of the two blocks before (layer + 1, layer + 2) may
    still be leaving: four blocks at most.
    """
    if layer >= len(host_gradients):
        return 0
    return sum(host_gradients[max(layer - 1, 0) : layer + 3])


# ---------------------------------------------------------------- loss


def loss_bytes(config: Config, tokens: int, cpu: bool) -> int:
    """Bytes of head and cross-entropy with the gradients of both, a chunk of tokens at a time."""
    if cpu:
        return _loss_bytes_on_cpu(config, tokens)
    element = compute_bytes(config)
    head = _head_numel(config)
    chunk_logits = _chunk_logits(config, tokens)
    # The last norm's output and its gradient.
    norm_output = 2 * element * tokens * config.d_model
    # The head's gradient is summed over chunks in fp32. Where only the weights are fp32, matmuls
    # read a 16-bit copy of the head.
    whole_heads = FP32 * head
    if element < weight_bytes(config):
        whole_heads += element * head
    # Three tensors of a chunk at most: the fp32 logits, and two of the softmax.
    softmax = 3 * FP32 * chunk_logits
    # Afterwards: the gradient by the logits, and the part of the head's gradient made from it.
    chunk_gradients = element * chunk_logits + FP32 * head
    return norm_output + whole_heads + max(softmax, chunk_gradients)


def _loss_bytes_on_cpu(config: Config, tokens: int) -> int:
    element = compute_bytes(config)
    head = _head_numel(config)
    chunk_logits = _chunk_logits(config, tokens)
    # The last norm's input and normalised input in fp32; its output and the output's gradient.
    last_norm = (2 * FP32 + 2 * element) * tokens * config.d_model
    # The head's gradient, summed over chunks.
    head_gradient = FP32 * head
    # A chunk's logits in fp32, and in 16 bits also their gradient, which matmuls read.
    logits = FP32 * chunk_logits
    if element == 2:
        logits += element * chunk_logits
    # One of three: an fp32 copy of the head, which gives fp32 logits; then a temporary of the
    # softmax; then the chunk's part of the head's gradient.
    temporary = FP32 * max(chunk_logits, head)
    return last_norm + head_gradient + logits + temporary


def _chunk_logits(config: Config, tokens: int) -> int:
    """The number of logits that exist at a time."""
    return min(tokens, LOSS_CHUNK) * config.vocab_size


def _waiting_head_gradient(config: Config) -> int:
    """Bytes of a head's gradient that waits while the backward pass goes through the blocks.

    A head that is also the embedding has two gradients. Autograd adds them up before it adds them
    to the sum of the micro-batches: the head's waits until the embedding's is made, at the end.
    Another head's is added at once.
    """
    if config.tie_embeddings:
        return FP32 * _head_numel(config)
    return 0


def _head_numel(config: Config) -> int:
    """Elements of the head, and of the embedding."""
    return config.vocab_size * config.d_model


# ---------------------------------------------------------------- optimizer step


def optimizer_bytes(
    config: Config, offload: bool, cpu: bool, owned: dict[str, int] | None = None
) -> float:
    """Bytes that the optimizer step needs beyond what stays.

    The groups are updated one after the other, so it is the most that one of them needs. `owned`
    are the elements of each parameter that are updated here; None stands for all.
    """
    if owned is None:
        owned = owned_elements(config, gpus=1)
    peak: float = 0
    for group in optimizer_groups(config).values():
        if group.orthogonalizes:
            needed = _matrix_group_bytes(config, group, owned, offload, cpu)
        else:
            needed = _elementwise_group_bytes(config, group, owned, offload, cpu)
        peak = max(peak, needed)
    return peak


def _matrix_group_bytes(
    config: Config, group: OptimizerGroup, owned: dict[str, int], offload: bool, cpu: bool
) -> float:
    """Bytes of a bucket of whole matrices and of the Gram matrices of their shorter sides (Muon).

    The matrices of a bucket have one shape. Those of feed-forward networks are the largest, but
    attention's square ones have the largest Gram matrices for their size. So every shape is tried.
    """
    worked_on: float = 0
    largest_bucket = 0
    for shape, parameters in _parameters_by_matrix_shape(config, group, owned).items():
        bucket = _bucket_of_matrices(shape, parameters)
        worked_on = max(worked_on, _orthogonalization(config, shape, bucket, parameters, cpu))
        largest_bucket = max(largest_bucket, bucket)
    needed = worked_on
    if offload:
        needed += largest_bucket * _bytes_under_way(config, group)
    return needed


def _parameters_by_matrix_shape(
    config: Config, group: OptimizerGroup, owned: dict[str, int]
) -> dict[tuple[int, ...], list[int]]:
    """The owned elements of each parameter, by the shape (rows, columns) of its matrices."""
    table = parameter_table(config)
    elements_of: dict[tuple[int, ...], list[int]] = {}
    for name in group.parameters:
        if name in owned:
            elements_of.setdefault(table[name].shape[-2:], []).append(owned[name])
    return elements_of


def _bucket_of_matrices(shape: tuple[int, ...], parameters: list[int]) -> int:
    """Elements of the largest bucket of matrices of this shape (see engine/offload.py).

    `parameters` are the elements of each parameter that has such matrices.
    """
    matrix = math.prod(shape)
    matrices_at_once = max(OPTIMIZER_BUCKET // matrix, 1)
    return min(matrices_at_once * matrix, sum(parameters))


def _orthogonalization(
    config: Config, shape: tuple[int, ...], bucket: int, parameters: list[int], cpu: bool
) -> float:
    """Bytes to update a bucket of `bucket` elements, of matrices of this shape.

    `parameters` are the elements of each parameter that has such matrices.
    """
    # Elements of a Gram matrix for each element of its matrix.
    gram_share = min(shape) / max(shape)
    if cpu:
        return _orthogonalization_on_cpu(config, bucket, gram_share, max(parameters))
    if not config.split_masters:
        # In fp32, not fused: six copies of the matrices.
        return bucket * 6 * FP32
    # In fp16, 2 bytes. The larger of two moments in the second half of `gram_newton_schulz`; on an
    # H200 18b's step was measured to take 8.16 GB with offload, and this and the bytes under way
    # make 8.05.
    # - It computes the next Gram matrix: the matrices as they come and after the first half, and
    #   five Gram matrices (gram, p, product_of_p, gram P, and the next gram).
    # - It multiplies the matrices at the end: as they come, after the first half, and the result,
    #   with three Gram matrices (gram, p, product_of_p).
    next_gram = 2 + 5 * gram_share
    at_the_end = 3 + 3 * gram_share
    return bucket * 2 * max(next_gram, at_the_end)


def _orthogonalization_on_cpu(
    config: Config, bucket: int, gram_share: float, largest_parameter: int
) -> float:
    """Bytes at the larger of two moments of the step, all in fp32.

    `bucket` is in elements. `gram_share` is the elements of a Gram matrix for each element of its
    matrix.
    """
    # Three copies of the matrices, and two and a half Gram matrices of each (measured).
    orthogonalizing = bucket * FP32 * (3 + 2.5 * gram_share)
    # The matrices as they come and orthogonalised, while one parameter after the other is updated.
    updated = min(bucket, largest_parameter)
    updating = 2 * FP32 * bucket + _cpu_update_bytes(config) * updated
    return max(orthogonalizing, updating)


def _bytes_under_way(config: Config, group: OptimizerGroup) -> int:
    """Bytes of offloaded state on the GPU at the same time, for each element of a bucket."""
    state = _state_bytes(config, group)
    # The state of four buckets: the one that is updated, two on their way in, one on its way out.
    under_way = 4 * state
    if config.host_gradient_blocks:
        # Gradients come in with the state, and none leave. So they are there for three buckets: the
        # one that is updated, and two on their way in.
        under_way = max(under_way, 3 * (state + weight_bytes(config)))
    return under_way


def _state_bytes(config: Config, group: OptimizerGroup) -> int:
    """Bytes of an element's state: the optimizer's, and the low bits of its master if it has any.

    Norms and routers have none in any precision. They are too small to be told apart here.
    """
    if config.split_masters:
        return group.state_bytes_per_element + LOW_BITS_BYTES
    return group.state_bytes_per_element


def _elementwise_group_bytes(
    config: Config, group: OptimizerGroup, owned: dict[str, int], offload: bool, cpu: bool
) -> int:
    """Bytes of a bucket of elements that are updated one by one (AdamW)."""
    numel = _numel(group, owned)
    if cpu:
        largest = max((owned.get(name, 0) for name in group.parameters), default=0)
        updated = min(OPTIMIZER_BUCKET, largest)
        needed = _cpu_update_bytes(config) * updated
    elif config.split_masters:
        needed = 0  # one fused kernel, in place
    else:
        needed = 4 * FP32 * min(OPTIMIZER_BUCKET, numel)  # four temporaries
    if offload:
        # Four buckets, as in _bytes_under_way.
        under_way = min(4 * OPTIMIZER_BUCKET, numel)
        needed += _state_bytes(config, group) * under_way
    return needed


def _cpu_update_bytes(config: Config) -> int:
    """CPU_UPDATE_BYTES of this configuration.

    Every step of the update's arithmetic makes a tensor as large as the parameter.
    """
    if config.split_masters:
        return CPU_UPDATE_BYTES[config.precision]
    return CPU_UPDATE_BYTES["fp32"]
