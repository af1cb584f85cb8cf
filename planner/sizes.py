"""Predicted bytes of a training run: weights, gradients, optimizer state, activations, workspace.

The sizes follow from the Config alone, without torch. What stays in memory is exact arithmetic over
config.py's tables (`parameter_table`, `optimizer_groups`). What a block keeps for its backward pass
is a sum over its tensors, and loops over `Config.feed_forwards`. Peaks are the largest of the sums
of what is alive at the same time; tests hold them to measured ones.

Change this file together with model.py, moe.py, muon.py and engine/offload.py.
"""

from config import (
    LOSS_CHUNK,
    OPTIMIZER_BUCKET,
    Config,
    FeedForward,
    OptimizerGroup,
    block_modes,
    optimizer_groups,
    parameter_table,
)
from planner.machine import GB

# Norms and routers are fp32 in every precision.
FP32_KINDS = ("norms", "router")

# The low bits of an fp32 master weight, which are stored beside a 16-bit weight.
LOW_BITS_BYTES = 2

# Bytes of temporary fp32 and integer tensors for each element that the optimizer updates on a CPU,
# by the weights' precision (measured). In fp16 the low bits take arithmetic, in bf16 only shifts.
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
) -> dict[str, float]:
    """Predicted memory of `config` in GB, with these values in place of its own.

    The keys are weights, gradients, master, one for each optimizer group (momentum, adamw),
    activations, workspace, their total, and host (memory of the host, when state is offloaded; the
    offloaded components are 0 then).

    activations: the peak of the forward and backward passes beyond what stays.
    workspace: what the optimizer step needs beyond that. The two phases do not meet, so it is 0
    when the activations' room is enough. On a `cpu` nothing is compiled, and both are larger.
    """
    predictor = MemoryPredictor(config, cpu)
    return predictor.predict(checkpointing, batch_size, offload, lighter_blocks)


def checkpoint_gb(config: Config) -> float:
    """Size of a checkpoint file: weights and optimizer state."""
    sizes = predict_memory(config, "full", 1, offload=False)
    return sum(sizes[key] for key in ("weights", *optimizer_state(config)))


class MemoryPredictor:
    """`predict_memory` for many choices of one configuration.

    A search predicts hundreds of choices. What they share is computed once: bytes of each block by
    checkpointing mode, and peaks of the backward pass and of the optimizer.
    """

    def __init__(self, config: Config, cpu: bool = False):
        self.config = config
        self.cpu = cpu
        self.weights = weights(config)
        self.state = optimizer_state(config)
        layers = range(config.n_layers)
        self.matrices = [config.matrices_of(layer) for layer in layers]
        self.kept = {}  # by mode, the activation bytes of a token in each block
        for mode in ("none", "selective", "full"):
            self.kept[mode] = [
                activation_bytes_per_token(config, layer, mode, cpu) for layer in layers
            ]
        self._backward: dict[int, list[int]] = {}  # by tokens, of each block
        self._optimizer: dict[bool, float] = {}  # by offload

    def predict(
        self, checkpointing: str, batch_size: int, offload: bool, lighter_blocks: int = 0
    ) -> dict[str, float]:
        """The sizes of a choice in GB, as `predict_memory` returns them."""
        modes = block_modes(checkpointing, self.config.n_layers, lighter_blocks)
        tokens = batch_size * self.config.max_seq_len
        host_gradients = self._host_gradients(offload)
        activations = self._activation_peak(modes, tokens, host_gradients)

        sizes: dict[str, float] = dict(
            weights=self.weights, gradients=self.weights - sum(host_gradients)
        )
        for key, size in self.state.items():
            sizes[key] = 0 if offload else size
        sizes["activations"] = activations
        if self.cpu:
            sizes["activations"] += CPU_LIBRARY_GB[compute_bytes(self.config)] * GB
        sizes["workspace"] = max(0, self._optimizer_peak(offload) - activations)
        sizes["total"] = sum(sizes.values())
        sizes["host"] = 0
        if offload:
            sizes["host"] = sum(self.state.values()) + sum(host_gradients)
        return {key: size / GB for key, size in sizes.items()}

    def _host_gradients(self, offload: bool) -> list[int]:
        """Bytes of the gradients in host memory, of each of the first blocks."""
        if not offload:
            return []
        in_host_memory = self.matrices[: self.config.host_gradient_blocks]
        return [weight_bytes(self.config) * numel for numel in in_host_memory]

    def _activation_peak(self, modes: list[str], tokens: int, host_gradients: list[int]) -> int:
        """The most that forward and backward passes need at a time.

        During the backward pass of a block, the blocks before it still have all that they kept, and
        the blocks after it nothing any more.
        """
        backward = self._backward_bytes(tokens)
        kept_so_far = 0
        peak = 0
        for layer, mode in enumerate(modes):
            casts = self._cast_bytes(layer)
            kept_so_far += tokens * self.kept[mode][layer]
            if mode == "none":
                kept_so_far += casts  # autograd keeps them with the activations
            needed = kept_so_far + backward[layer]
            needed += tokens * (self.kept["none"][layer] - self.kept[mode][layer])  # recomputed
            needed += _gradients_under_way(layer, host_gradients)
            if mode != "none":
                needed += casts  # made again with the recomputed activations
            peak = max(peak, needed)
        return max(peak, kept_so_far + loss_bytes(self.config, tokens, self.cpu))

    def _cast_bytes(self, layer: int) -> int:
        """16-bit copies of a block's fp32 weights, which matmuls keep.

        On a GPU such a copy does not outlive the matmul that it is made for.
        """
        element = compute_bytes(self.config)
        if not self.cpu or element == weight_bytes(self.config):
            return 0
        return element * self.matrices[layer]

    def _backward_bytes(self, tokens: int) -> list[int]:
        if tokens not in self._backward:
            self._backward[tokens] = [
                backward_bytes(self.config, layer, tokens, self.cpu)
                for layer in range(self.config.n_layers)
            ]
        return self._backward[tokens]

    def _optimizer_peak(self, offload: bool) -> float:
        if offload not in self._optimizer:
            self._optimizer[offload] = optimizer_bytes(self.config, offload, self.cpu)
        return self._optimizer[offload]


# ---------------------------------------------------------------- elements


def compute_bytes(config: Config) -> int:
    """Of an element of activations and in matmuls."""
    return 4 if config.precision == "fp32" else 2


def weight_bytes(config: Config) -> int:
    """Of an element of a weight or its gradient, FP32_KINDS apart."""
    return 2 if config.split_masters else 4


# ---------------------------------------------------------------- what stays


def weights(config: Config) -> int:
    """Bytes of the model's weights, and of their gradients, which have the weights' dtypes."""
    total = 0
    for kind, numel in config.parameter_groups.items():
        element = 4 if kind in FP32_KINDS else weight_bytes(config)
        total += numel * element
    return total


def optimizer_state(config: Config) -> dict[str, int]:
    """Bytes of the fp32 masters' low bits ("master") and of each optimizer group's state."""
    state = dict(master=0)
    if config.split_masters:
        for kind, numel in config.parameter_groups.items():
            if kind not in FP32_KINDS:
                state["master"] += numel * LOW_BITS_BYTES
    for group in optimizer_groups(config).values():
        state.setdefault(group.memory_key, 0)
        state[group.memory_key] += _numel(config, group) * group.state_bytes_per_element
    return state


def _numel(config: Config, group: OptimizerGroup) -> int:
    table = parameter_table(config)
    return sum(table[name].numel for name in group.parameters)


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
    """The block's input, and which experts were chosen: a near tie could tip when recomputed."""
    block_input = compute_bytes(config) * config.d_model
    return block_input + _chosen_experts(config, layer, cpu)


def _kept_by_selective(config: Config, layer: int, cpu: bool) -> int:
    """The outputs of attention and of most matmuls (see model.py for the choice)."""
    element = compute_bytes(config)
    d_model = config.d_model
    # the block's input, queries and keys as projected, attention's output; values and the output
    # projection are recomputed
    kept = element * (3 * d_model + _kv_width(config))
    kept += _log_sum_exp(config)
    kept += _chosen_experts(config, layer, cpu)
    if config.is_moe(layer):
        kept += 4 * config.num_experts  # the router's logits, the output of an fp32 matmul
    for ffn in config.feed_forwards(layer):
        kept += element * ffn.top_k * 2 * ffn.d_ff  # output of the gate and up matmul
        if cpu:
            # The output of the down matmul, which nothing reads any more. The compiler drops it.
            kept += element * ffn.top_k * d_model
    return kept


def _kept_by_none(config: Config, layer: int) -> int:
    """Everything that the compiled backward pass reads."""
    element = compute_bytes(config)
    d_model = config.d_model
    # d_model wide: the block's input, normalised input, queries as projected and rotated,
    # attention's output, output projection (with the input it gives the ffn's residual again)
    kept = element * 6 * d_model
    # keys as projected and rotated, values
    kept += element * 3 * _kv_width(config)
    kept += _log_sum_exp(config) + _norm_statistics(config)
    for ffn in config.feed_forwards(layer):
        # Each expert that a token is sent to has its own copy of: the input (normalised; routed
        # rows are the copies), the gate and up matmul's output, the hidden row that down reads.
        kept += element * ffn.top_k * (d_model + 2 * ffn.d_ff + ffn.d_ff)
    if config.is_moe(layer):
        kept += _chosen_experts(config, layer, cpu=False)
        # fp32 logits; their softmax's maximum and sum and the z-loss's log-sum-exp
        kept += 4 * config.num_experts + 3 * 4
        # of each chosen expert the weight (fp32), and the sort indices and their inverse (int64)
        kept += config.top_k * (4 + 8 + 8)
    return kept


def _kept_by_none_on_cpu(config: Config, layer: int) -> int:
    """Everything that eager autograd keeps."""
    element = compute_bytes(config)
    d_model = config.d_model
    kv_width = _kv_width(config)
    # Each norm keeps its input and its normalised input in fp32: two of the residual stream, one
    # of queries, one of keys.
    kept = (4 + 4) * (3 * d_model + kv_width)
    # d_model wide: normalised input of the projections, rotated queries, attention's output;
    # kv_width wide: rotated keys, values
    kept += element * (3 * d_model + 2 * kv_width)
    kept += _log_sum_exp(config) + _norm_statistics(config)
    for ffn in config.feed_forwards(layer):
        # d_ff wide: gate, up, silu(gate), and the hidden row that down reads
        hidden_rows = 4
        if ffn.kind == "experts":
            hidden_rows += 1  # before it is multiplied by the router's weight
        kept += element * ffn.top_k * (d_model + hidden_rows * ffn.d_ff)
    if config.is_moe(layer):
        kept += _routing_on_cpu(config)
    return kept


def _routing_on_cpu(config: Config) -> int:
    # the router's input in fp32
    kept = 4 * config.d_model
    # fp32 logits and probabilities; a mask (bool) of all experts for each chosen one
    kept += (4 + 4 + config.top_k) * config.num_experts
    # of each chosen expert the weight twice, by token and sorted (fp32), and the sort indices and
    # their inverse (int64)
    kept += (2 * 4 + 2 * 8) * config.top_k
    # the sum of the chosen probabilities and the z-loss's log-sum-exp, fp32
    return kept + 2 * 4


def _chosen_experts(config: Config, layer: int, cpu: bool) -> int:
    """The router's top-k: indices (int64). On a CPU its values (fp32) are kept with them."""
    if not config.is_moe(layer):
        return 0
    each = 8 + 4 if cpu else 8
    return each * config.top_k


def _kv_width(config: Config) -> int:
    return config.n_kv_heads * config.head_dim


def _log_sum_exp(config: Config) -> int:
    """Of attention's softmax, one fp32 number a head."""
    return 4 * config.n_heads


def _norm_statistics(config: Config) -> int:
    """1 / rms in fp32: of the two norms, and of each head of queries and keys."""
    return 4 * (2 + config.n_heads + config.n_kv_heads)


# ---------------------------------------------------------------- what a backward pass needs


def backward_bytes(config: Config, layer: int, tokens: int, cpu: bool) -> int:
    """What the backward pass of a block needs beyond what is kept and recomputed.

    The peak lies in the feed-forward part, where the widest tensors and the largest weights are.
    Gradients of weights count here although they have room of their own: a micro-batch's gradient
    is a tensor by itself until it is added to the sum.
    """
    row = compute_bytes(config) * config.d_model * tokens
    # gradients of the residual stream: of the block's output, on its way through the ffn, and of
    # the ffn's normalised input
    residual_stream = 3 * row
    if cpu:
        return residual_stream + _ffn_backward_on_cpu(config, layer, tokens)
    return residual_stream + _ffn_backward(config, layer, tokens)


def _ffn_backward(config: Config, layer: int, tokens: int) -> int:
    """The larger of two moments, in a compiled graph, which holds its results to the end.

    Early: gradients of a network's gate and up outputs (2 hidden), and down's weight gradient. In
    16 bits a kernel does SwiGLU's backward pass, and the hidden rows' gradient is gone by then; in
    fp32 it is there too (3 hidden).

    Late: all three weight gradients, and three rows of the attention's backward pass. The kept
    outputs (gate, up, hidden) are used up by then, and their room counts against it.
    """
    row = compute_bytes(config) * config.d_model * tokens
    gradients_of_hidden = 2 if compute_bytes(config) == 2 else 3
    finished = 0
    peak = 0
    for ffn in reversed(config.feed_forwards(layer)):
        hidden = _hidden_bytes(config, ffn, tokens)
        weight = _ffn_weight_bytes(config, ffn)
        peak = max(peak, finished + gradients_of_hidden * hidden + weight)
        finished += 3 * weight - 3 * hidden
    return max(peak, finished + 3 * row)


def _ffn_backward_on_cpu(config: Config, layer: int, tokens: int) -> int:
    """The larger of two moments. Eager autograd adds each weight's gradient to the sum at once.

    SwiGLU: the hidden rows' gradient and two that follow from it; in 16 bits two of them are also
    there in fp32 (2 hidden in fp32, 5 in 16 bits, both measured).
    Weights: the gradient of gate and up, which are one parameter.
    """
    gradients_of_hidden = 2 if compute_bytes(config) == 4 else 5
    peak = 0
    for ffn in config.feed_forwards(layer):
        hidden = _hidden_bytes(config, ffn, tokens)
        weight = _ffn_weight_bytes(config, ffn)
        peak = max(peak, gradients_of_hidden * hidden, 2 * weight)
    return peak


def _hidden_bytes(config: Config, ffn: FeedForward, tokens: int) -> int:
    """The hidden rows of a network, d_ff wide, of every expert that a token is sent to."""
    return compute_bytes(config) * ffn.d_ff * ffn.top_k * tokens


def _ffn_weight_bytes(config: Config, ffn: FeedForward) -> int:
    """One of a network's three weights (gate, up, down), of all experts."""
    return ffn.num_experts * ffn.d_ff * config.d_model * weight_bytes(config)


def _gradients_under_way(layer: int, host_gradients: list[int]) -> int:
    """Sums of gradients on their way between host and GPU, in the backward pass of `layer`.

    The backward pass goes from the last block to the first. The sums of this block and of the next
    one (layer - 1) have been fetched, and those of the two blocks before (layer + 1, layer + 2) may
    still be leaving.
    """
    if layer >= len(host_gradients):
        return 0
    return sum(host_gradients[max(layer - 1, 0) : layer + 3])


# ---------------------------------------------------------------- loss


def loss_bytes(config: Config, tokens: int, cpu: bool) -> int:
    """Head and cross-entropy, a chunk of tokens at a time, with the gradients of both."""
    if cpu:
        return _loss_bytes_on_cpu(config, tokens)
    element = compute_bytes(config)
    head = config.vocab_size * config.d_model
    # the last norm's output and its gradient
    needed = 2 * element * tokens * config.d_model
    # the head's gradient, summed over chunks in fp32, and a copy of the head in the compute dtype:
    # the gradient that is handed on, or with fp32 weights the one that matmuls read
    needed += (4 + element) * head
    # Of a chunk's logits at most three tensors in fp32: the logits, and two of the softmax.
    return needed + 3 * 4 * _chunk_logits(config, tokens)


def _loss_bytes_on_cpu(config: Config, tokens: int) -> int:
    element = compute_bytes(config)
    head = config.vocab_size * config.d_model
    logits = _chunk_logits(config, tokens)
    # the last norm's input and normalised input in fp32, its output and the output's gradient
    needed = (4 + 4 + 2 * element) * tokens * config.d_model
    # the head's gradient, summed over chunks in fp32
    needed += 4 * head
    # logits in fp32; in 16 bits also as the matmul gives them
    needed += 4 * logits
    if element == 2:
        needed += 2 * logits
    # an fp32 temporary of the softmax, or afterwards the chunk's part of the head's gradient
    return needed + 4 * max(logits, head)


def _chunk_logits(config: Config, tokens: int) -> int:
    return min(tokens, LOSS_CHUNK) * config.vocab_size


# ---------------------------------------------------------------- optimizer step


def optimizer_bytes(config: Config, offload: bool, cpu: bool) -> float:
    """What the optimizer step needs beyond what stays: the most that one of the groups needs.

    The groups are updated one after the other.
    """
    peak: float = 0
    for group in optimizer_groups(config).values():
        if group.orthogonalizes:
            needed = _matrix_group_bytes(config, group, offload, cpu)
        else:
            needed = _elementwise_group_bytes(config, group, offload, cpu)
        peak = max(peak, needed)
    return peak


def _matrix_group_bytes(config: Config, group: OptimizerGroup, offload: bool, cpu: bool) -> float:
    """A bucket of whole matrices and the Gram matrices of their shorter sides (Muon).

    Sizes are those of a feed-forward network's matrices. Of networks of several widths the widest
    need not take the most: a bucket may hold one matrix of it, or several of a narrower one, each
    with Gram matrices of its own.
    """
    needed: float = 0
    for d_ff in _ffn_widths(config):
        needed = max(needed, _matrix_bucket_bytes(config, group, d_ff, offload, cpu))
    return needed


def _matrix_bucket_bytes(
    config: Config, group: OptimizerGroup, d_ff: int, offload: bool, cpu: bool
) -> float:
    """What a bucket of the matrices of a network of this width takes."""
    d_model = config.d_model
    matrix = d_model * max(d_ff, d_model)
    gram = min(d_model, d_ff) ** 2
    bucket = min(max(OPTIMIZER_BUCKET // matrix, 1) * matrix, _numel(config, group))
    if cpu:
        needed = _orthogonalization_on_cpu(config, group, bucket, matrix, gram)
    elif config.split_masters:
        # 16-bit: the matrices as they come and orthogonalised, and four Gram matrices of each
        needed = bucket * (2 + 2 + 4 * 2 * gram / matrix)
    else:
        # fp32, not fused: six copies of the matrices
        needed = bucket * 6 * 4
    if offload:
        needed += bucket * _bytes_under_way(config, group)
    return needed


def _orthogonalization_on_cpu(
    config: Config, group: OptimizerGroup, bucket: int, matrix: int, gram: int
) -> float:
    """The larger of two moments of the step; matrices of one shape are worked on together."""
    together = min(bucket, _most_of_a_shape(config, group))
    # fp32: three copies of the matrices, and two and a half Gram matrices of each (measured)
    orthogonalizing = together * (3 * 4 + 10 * gram / matrix)
    # fp32: the matrices as they come and orthogonalised, while a parameter is updated
    updated = min(together, _largest_parameter(config, group))
    updating = 2 * 4 * together + _cpu_update_bytes(config) * updated
    return max(orthogonalizing, updating)


def _bytes_under_way(config: Config, group: OptimizerGroup) -> int:
    """For each element of a bucket, the offloaded state that is on the GPU at the same time."""
    state = group.state_bytes_per_element
    if config.split_masters:
        state += LOW_BITS_BYTES
    # this bucket's, those of two buckets on their way in, and of one on its way out
    under_way = 4 * state
    if config.host_gradient_blocks:
        # Gradients come with the state of this bucket and of two on their way in, and none leave.
        under_way = max(under_way, 3 * (state + weight_bytes(config)))
    return under_way


def _elementwise_group_bytes(
    config: Config, group: OptimizerGroup, offload: bool, cpu: bool
) -> int:
    """A bucket of elements that are updated one by one (AdamW)."""
    numel = _numel(config, group)
    if cpu:
        updated = min(OPTIMIZER_BUCKET, _largest_parameter(config, group))
        needed = _cpu_update_bytes(config) * updated
    elif config.split_masters:
        needed = 0  # one fused kernel, in place
    else:
        needed = 4 * 4 * min(OPTIMIZER_BUCKET, numel)  # four temporaries in fp32
    if offload:
        # Four buckets under way, as of matrices. The low bits are counted in fp32 too, where there
        # are none: a little too much.
        under_way = min(4 * OPTIMIZER_BUCKET, numel)
        needed += (group.state_bytes_per_element + LOW_BITS_BYTES) * under_way
    return needed


def _cpu_update_bytes(config: Config) -> int:
    """Every step of the update's arithmetic is a tensor, a parameter at a time."""
    return CPU_UPDATE_BYTES[config.precision if config.split_masters else "fp32"]


def _ffn_widths(config: Config) -> set[int]:
    """The widths (d_ff) of the model's feed-forward networks."""
    widths = set()
    for layer in range(config.n_layers):
        for ffn in config.feed_forwards(layer):
            widths.add(ffn.d_ff)
    return widths


def _largest_parameter(config: Config, group: OptimizerGroup) -> int:
    table = parameter_table(config)
    return max((table[name].numel for name in group.parameters), default=0)


def _most_of_a_shape(config: Config, group: OptimizerGroup) -> int:
    """Elements of the matrices of one shape (rows, columns): of the shape that has the most."""
    table = parameter_table(config)
    elements: dict[tuple[int, ...], int] = {}
    for name in group.parameters:
        rows_columns = table[name].shape[-2:]
        elements[rows_columns] = elements.get(rows_columns, 0) + table[name].numel
    return max(elements.values(), default=0)
