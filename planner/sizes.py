"""TODO sizes"""

from config import LOSS_CHUNK, OPTIMIZER_BUCKET, Config, block_modes
from planner.machine import GB

# Bytes of an element that the optimizer updates on a CPU, of temporary fp32 and integer tensors (measured; fp16's residual is arithmetic).
CPU_UPDATE_BYTES = {"fp32": 20, "bf16": 26, "fp16": 51}

# What the libraries for products keep on a CPU, and what its heap does, by bytes of the compute dtype: in 16 bits a kernel is made for
# each number of rows that an expert gets (measured; fp32 0.3, bf16 and fp16 0.5 to 0.7).
CPU_LIBRARY_GB = {4: 0.35, 2: 0.8}


# ---------------------------------------------------------------- bytes


def activation_bytes_per_token(c: Config, layer: int, checkpointing: str, cpu: bool = False) -> int:
    """Bytes that block `layer` keeps for its backward pass, per token: its input, and with "selective" the outputs of attention
    and of most products, with "none" of all of them and the normalised inputs, rotated queries and keys, and the gated product.
    On a CPU nothing is fused: every norm keeps two fp32 tensors, SwiGLU its factors, and "selective" the outputs that are read no more."""
    w, moe = _compute_bytes(c), c.is_moe(layer)
    d, kv, paths = c.d_model, c.n_kv_heads * c.head_dim, c.top_k if moe else 1
    routing = 8 * c.top_k if moe else 0  # the chosen experts
    if cpu and moe:
        routing += 4 * c.top_k  # and their probabilities
    if checkpointing == "full":
        return w * d + routing
    log_sum_exp = 4 * c.n_heads
    if checkpointing == "selective":
        unread = w * d * paths if cpu else 0
        return (
            w * (3 * d + kv + 2 * c.d_ff * paths)
            + unread
            + log_sum_exp
            + routing
            + (4 * c.num_experts if moe else 0)
        )
    statistics = 4 * (c.n_heads + c.n_kv_heads) + 8
    if cpu:
        norms, attention = 8 * (3 * d + kv), w * (3 * d + 2 * kv)
        ffn = 4 * d + w * paths * (d + 5 * c.d_ff) if moe else w * (d + 4 * c.d_ff)
        routing = 24 * c.top_k + (c.top_k + 8) * c.num_experts + 8 if moe else 0
        return norms + attention + ffn + log_sum_exp + statistics + routing
    routing += (4 * c.num_experts + 20 * c.top_k + 12) if moe else 0
    return (
        w * (7 * d + 3 * kv + 3 * c.d_ff * paths + (d * (c.top_k - 1) if moe else 0))
        + log_sum_exp
        + statistics
        + routing
    )


def predict_memory(
    c: Config,
    checkpointing: str,
    batch_size: int,
    offload: bool,
    lighter_blocks: int = 0,
    cpu: bool = False,
) -> dict[str, float]:
    """Predicted memory in GB of `c` with these values instead of its own: weights, gradients, master, momentum, adamw (0 when they live on the host), activations,
    workspace, their total, and host.

    activations: the peak of forward and backward beyond what stays. workspace: what the optimizer step needs beyond
    that, as the two do not meet. On a `cpu` nothing is compiled, so both are larger.
    """
    p = c.parameter_groups
    wide = p["norms"] + p["router"]  # always fp32
    hidden = (
        p["attention"] + p["dense_ffn"] + p["experts"] if c.optimizer == "muon" else 0
    )  # Muon's
    narrow = c.total_params - wide
    weight_bytes = 2 if c.split_masters else 4
    weights = narrow * weight_bytes + wide * 4
    state = dict(
        master=narrow * 2 if c.split_masters else 0,
        momentum=hidden * (2 if c.split_masters else 4),
        adamw=(c.total_params - hidden) * 8,
    )

    modes = block_modes(checkpointing, c.n_layers, lighter_blocks)
    tokens, w, head = batch_size * c.max_seq_len, _compute_bytes(c), c.vocab_size * c.d_model
    loss = (
        2 * tokens * c.d_model * w + head * (4 + w) + 3 * 4 * min(tokens, LOSS_CHUNK) * c.vocab_size
    )
    if cpu:  # the last norm's tensors, the head's gradient, and logits as they come, in fp32 and a copy, or what follows and a product
        logits = min(tokens, LOSS_CHUNK) * c.vocab_size
        loss = (
            tokens * c.d_model * (8 + 2 * w)
            + 4 * head
            + (4 if w == 4 else 6) * logits
            + 4 * max(logits, head)
        )
    matrices = [
        weight_bytes * c.matrices_of(i) for i in range(c.host_gradient_blocks if offload else 0)
    ]
    kept, peak = (
        0,
        0,
    )  # of the blocks so far; of the backward passes, each with what the blocks before it keep
    for i, mode in enumerate(modes):
        # fp32 weights are cast for 16-bit products, which keep the cast ones
        casts = w * c.matrices_of(i) if cpu and w < weight_bytes else 0
        kept += tokens * activation_bytes_per_token(c, i, mode, cpu) + (
            casts if mode == "none" else 0
        )
        # sums of gradients on their way from the host and back: of this block and the next, and of the two before
        streamed = sum(matrices[max(i - 1, 0) : i + 3]) if i < len(matrices) else 0
        peak = max(
            peak,
            kept
            + _backward_bytes(c, i, mode, tokens, weight_bytes, cpu)
            + streamed
            + (casts if mode != "none" else 0),
        )
    activations = max(peak, kept + loss)

    # a group of matrices, as they come and orthogonalised, and four Gram matrices each; in fp32, not fused, more copies
    # of each; streamed state of this group, of two on their way in and of one on its way out, or of three with their gradients
    matrix, gram = c.d_model * max(c.d_ff, c.d_model), min(c.d_model, c.d_ff) ** 2
    piece = min(max(OPTIMIZER_BUCKET // matrix, 1) * matrix, hidden)
    streamed = max(4 * 4, 3 * (4 + weight_bytes) if matrices else 0) if offload else 0
    optimizer = piece * (4 + 8 * gram / matrix if c.split_masters else 24)
    others = c.total_params - hidden  # AdamW's groups: the same of its larger state
    adamw = 0 if c.split_masters else 16 * min(OPTIMIZER_BUCKET, others)
    if cpu:  # in fp32; updates are made a parameter at a time, with every step of the arithmetic a tensor
        update = CPU_UPDATE_BYTES[c.precision if c.split_masters else "fp32"]
        banks = [c.num_experts if c.is_moe(i) else 1 for i in range(c.n_layers)]
        gate_up = 2 * c.d_ff * c.d_model
        group = min(
            piece, max(gate_up * sum(banks), p["attention"]) if c.d_ff != c.d_model else hidden
        )
        optimizer = max(
            group * (12 + 10 * gram / matrix), 8 * group + update * min(group, gate_up * max(banks))
        )
        adamw = update * min(OPTIMIZER_BUCKET, head if hidden else max(head, gate_up * max(banks)))
    optimizer = max(
        optimizer + piece * streamed,
        adamw + (10 * min(4 * OPTIMIZER_BUCKET, others) if offload else 0),
    )

    sizes = dict(
        weights=weights,
        gradients=weights - sum(matrices),
        **{k: 0 if offload else v for k, v in state.items()},
        activations=activations + (CPU_LIBRARY_GB[w] * GB if cpu else 0),
        workspace=max(0, optimizer - activations),
    )
    sizes["total"] = sum(sizes.values())
    sizes["host"] = sum(state.values()) + sum(matrices) if offload else 0
    return {k: v / GB for k, v in sizes.items()}


def _backward_bytes(
    c: Config, layer: int, checkpointing: str, tokens: int, weight_bytes: int, cpu: bool
) -> int:
    """What the backward pass of block `layer` needs, in its feed-forward part, beyond what was kept: what it recomputes, gradients
    of the residual stream, and either those of the products (the gated product is gone by then, where a kernel does SwiGLU's
    backward) and of one weight, or, when the products' are used up, of all three weights and the rows' own."""
    w, (paths, experts) = _compute_bytes(c), (c.top_k, c.num_experts) if c.is_moe(layer) else (1, 1)
    recomputed = activation_bytes_per_token(c, layer, "none", cpu) - activation_bytes_per_token(
        c, layer, checkpointing, cpu
    )
    gated, weight, row = (
        w * c.d_ff * paths * tokens,
        experts * c.d_ff * c.d_model * weight_bytes,
        w * c.d_model * tokens,
    )
    if cpu:  # the gated product's gradient, and by 16-bit ones two in fp32; then weights', when it is used up
        return tokens * recomputed + 3 * row + max((2 if w == 4 else 5) * gated, 2 * weight)
    return (
        tokens * recomputed
        + 3 * row
        + max((2 if w == 2 else 3) * gated + weight, 3 * weight - 3 * gated + 3 * row)
    )


def checkpoint_gb(c: Config) -> float:
    """Size of a checkpoint file: weights and optimizer state."""
    m = predict_memory(c, "full", 1, offload=False)
    return sum(m[k] for k in ("weights", "master", "momentum", "adamw"))


def _compute_bytes(c: Config) -> int:
    return 4 if c.precision == "fp32" else 2
