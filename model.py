"""The transformer: embedding, blocks of attention and feed-forward network, norm, head and loss.

The architecture is that of Qwen3-MoE: pre-norm blocks with RMSNorm, normalised queries and keys,
rotary embeddings, grouped-query attention, SwiGLU (dense or as experts, see moe.py), no biases.
The residual stream has the compute dtype. Norms, softmax, router and loss compute in fp32.

Shape suffixes: B sequences, S positions, N = B S tokens, D d_model, V vocabulary,
E experts, L MoE blocks, T positions in a key/value cache.
"""

import contextlib
import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from config import IGNORED_TARGET, LOSS_CHUNK, Config, ExperimentError, parameter_table
from engine.linear import fp32_matmul, linear
from engine.precision import at_least_fp32, embedding, sum_gradient_in_fp32
from engine.triton_kernels import COMPILE_OPTIONS, compile_with_barriers, qk_norm_rope
from moe import MoE, SwiGLU

# torchtune imports torchao, which warns of compiled extensions that nothing here uses.
logging.getLogger("torchao").setLevel(logging.ERROR)
# This one warns of in-place operations under checkpointing. No block has any.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
from torchtune.modules import RotaryPositionalEmbeddings  # noqa: E402

COMPUTE_DTYPE = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}

# Shapes of parameters by name
Shapes = dict[str, tuple[int, ...]]


# ---------------------------------------------------------------- embedding, norm, attention


class Embedding(nn.Embedding):
    """nn.Embedding with an fp32 gradient of its weight, also of a 16-bit weight."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019).

    Computes in fp32, as its weight is, and returns x's dtype.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        mean_square = wide.square().mean(dim=-1, keepdim=True)
        inverse_rms = torch.rsqrt(mean_square + self.eps)
        return (wide * inverse_rms * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries, normalised queries and keys, and RoPE.

    Training calls `forward`. Generation calls `project` and `attend`, and keeps keys and values in
    a cache between the two.
    """

    def __init__(
        self,
        config: Config,
        rope: nn.Module,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.head_dim = config.head_dim
        self.enable_gqa = config.n_kv_heads != config.n_heads
        q_width = config.n_heads * config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        projection = functools.partial(nn.Linear, bias=False, dtype=dtype)
        self.q = projection(config.d_model, q_width)
        self.k = projection(config.d_model, kv_width)
        self.v = projection(config.d_model, kv_width)
        self.o = projection(q_width, config.d_model)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.rope = rope

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = self.project(x_BSD)
        return self.attend(q, k, v)

    def project(
        self,
        x_BSD: Tensor,
        positions_S: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values, each [B, heads, S, head_dim].

        `positions_S` are the tokens' positions in the sequence, by default 0, 1, 2 ...
        """
        q = self._split_heads(linear(x_BSD, self.q.weight))
        k = self._split_heads(linear(x_BSD, self.k.weight))
        v = self._split_heads(linear(x_BSD, self.v.weight, recompute=True))
        angles = self.rope.cache
        if positions_S is not None:
            angles = angles[positions_S]
        q = qk_norm_rope(q, self.q_norm.weight, angles, self.q_norm.eps)
        k = qk_norm_rope(k, self.k_norm.weight, angles, self.k_norm.eps)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * head_dim] to [B, S, heads, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible_T: Tensor | None = None,
    ) -> Tensor:
        """Returns attention's output [B, S, D], for queries, keys and values from `project`.

        Without `visible_T`, attention is causal: the query at position i sees keys 0 to i. With it,
        each sequence has one query and T cached keys. The query sees those where `visible_T` is
        true.
        """
        if visible_T is None:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                is_causal=True,
                enable_gqa=self.enable_gqa,
            )
        else:
            out = self._attend_to_cache(q, k, v, visible_T)
        out_BSD = out.transpose(1, 2).flatten(2)
        return linear(out_BSD, self.o.weight, recompute=True)

    def _attend_to_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible_T: Tensor,
    ) -> Tensor:
        """Attention of one query in each sequence, [B, heads, 1, head_dim], to T keys.

        The result has q's shape.
        """
        # The query heads that share a key head become query positions of one head. All of them see
        # the same keys, and attention then reads these keys once.
        batch, n_kv_heads = k.shape[:2]
        grouped_q = q.view(batch, n_kv_heads, -1, self.head_dim)
        group_size = grouped_q.shape[2]
        mask = visible_T.expand(group_size, -1)
        out = F.scaled_dot_product_attention(grouped_q, k, v, attn_mask=mask)
        return out.reshape(q.shape)


# ---------------------------------------------------------------- activation checkpointing

# A block's checkpoint keeps the outputs of the operators listed here, and recomputes the others
# in the backward pass. The lists name operators alone, and do not count their calls: a block may
# gain or lose a matmul without a change here.
aten = torch.ops.aten

# "full" keeps the routing and nothing else.
# - topk: the choice of experts. Recomputed logits may be rounded otherwise. Where two experts
#   nearly tie, the backward pass could then choose another one than the forward pass.
# - on_host: the copy of `offs` in host memory. To copy again would be to wait for the GPU again.
KEEP_ROUTING = [aten.topk.default, torch.ops.engine.on_host.default]

# "selective" also keeps what matmuls and attention return: nearly all the FLOPs of a block, for
# about half of its bytes.
#
# Two matmuls are recomputed all the same: those of values and of attention's output. In a dense
# block of 18b their outputs are a sixth of the bytes that would be kept. To recompute them adds a
# twentieth to the FLOPs of its three passes (forward, and two gradients). Attention marks them with
# `recompute=True`, which makes them aten.addmm: an operator that is not in this list.
KEEP_MATMULS = [
    *KEEP_ROUTING,
    aten.mm.default,
    aten._grouped_mm.default,
    torch.ops.engine.expert_loop.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]

CHECKPOINT_CONTEXTS = {
    "full": functools.partial(create_selective_checkpoint_contexts, KEEP_ROUTING),
    "selective": functools.partial(create_selective_checkpoint_contexts, KEEP_MATMULS),
}


# ---------------------------------------------------------------- block and model


class Block(nn.Module):
    """A transformer block: x <- x + attention(norm(x)), then x <- x + ffn(norm(x)).

    Returns the residual stream [B, S, D], and the routing statistics of an MoE block (see
    MoE.forward) or None for a dense block.

    `forward` puts the activation checkpoint around `compute`. torch.compile goes around the whole
    block, so that it also compiles what the backward pass recomputes.
    """

    def __init__(
        self,
        config: Config,
        layer: int,
        rope: nn.Module,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.moe = config.is_moe(layer)
        self.checkpointing = config.checkpointing_of(layer)
        self.attention_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.attention = Attention(config, rope, dtype)
        self.ffn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        if self.moe:
            self.ffn = MoE(config, dtype)
        else:
            self.ffn = SwiGLU(config, dtype)

    def forward(self, x_BSD: Tensor):
        if not torch.is_grad_enabled() or self.checkpointing == "none":
            return self.compute(x_BSD)
        return checkpoint(
            self.compute,
            x_BSD,
            use_reentrant=False,
            preserve_rng_state=False,  # a block draws no random numbers
            context_fn=CHECKPOINT_CONTEXTS[self.checkpointing],
        )

    def compute(self, x_BSD: Tensor):
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        ffn_output = self.ffn(self.ffn_norm(x_BSD))
        if self.moe:
            y_BSD, routing = ffn_output
        else:
            y_BSD = ffn_output
            routing = None
        return x_BSD + y_BSD, routing


class MoETransformer(nn.Module):
    """The whole model.

    `model(tokens)` returns fp32 logits [B, S, V]. `model(tokens, targets)` returns (loss, metrics):
    see `forward`.

    A model that is built on the meta device takes no memory. `materialize` then gives it storage.
    `config.activation_checkpointing` must be none, selective or full: the planner resolves "auto".
    Raises ExperimentError if the parameters are not those of `config.parameter_table`.
    """

    def __init__(self, config: Config):
        super().__init__()
        assert config.activation_checkpointing != "auto"
        self.config = config
        self.compute_dtype = COMPUTE_DTYPE[config.precision]
        self.chunk_loss = chunk_loss
        # With split masters the optimizer keeps the low bits of the fp32 weights.
        dtype = torch.float32
        if config.split_masters:
            dtype = self.compute_dtype
        self.embedding = Embedding(config.vocab_size, config.d_model, dtype=dtype)
        self.rope = RotaryPositionalEmbeddings(
            config.head_dim,
            config.max_seq_len,
            config.rope_theta,
        )
        self.blocks = nn.ModuleList()
        for layer in range(config.n_layers):
            self.blocks.append(Block(config, layer, self.rope, dtype))
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(
                config.d_model,
                config.vocab_size,
                bias=False,
                dtype=dtype,
            )
        self._check_parameters()
        self._sum_gradients_in_fp32()
        if not self.norm.weight.is_meta:
            self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]: the embedding where the two are tied."""
        if self.head is None:
            return self.embedding.weight
        return self.head.weight

    def _check_parameters(self) -> None:
        """Compares the modules with the table from which counts, FLOPs and memory are derived."""
        table = parameter_table(self.config)
        expected = {name: spec.shape for name, spec in table.items()}
        found = {name: tuple(p.shape) for name, p in self.named_parameters()}
        if found != expected:
            raise ExperimentError(_other_parameters_message(found, expected))

    def _sum_gradients_in_fp32(self) -> None:
        """Makes the gradients of embedding and head fp32 sums over a step.

        `Embedding` and the loss compute them in fp32. Tied weights have one sum for both.
        """
        sum_gradient_in_fp32(self.embedding.weight)
        sum_gradient_in_fp32(self.head_weight)

    # ------------------------------------------------------------ storage and initial weights

    def materialize(self, device: torch.device | str) -> "MoETransformer":
        """Gives a model from the meta device storage on `device`, with initial weights."""
        self.to_empty(device=device)
        self.init_weights()
        return self

    def _apply(self, fn, recurse=True):
        """What `to`, `to_empty`, `half` ... call. The rotary tables are then computed again.

        `to_empty` would leave the tables unwritten, and `to(bfloat16)` would round them. They stay
        fp32 on every device.
        """
        super()._apply(fn, recurse)
        self._sum_gradients_in_fp32()  # there may be new parameters
        device = self.norm.weight.device
        if device.type != "meta":
            with torch.device(device):
                self.rope.rope_init()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Sets norms to ones, and matrices to normal numbers of standard deviation `init_std`.

        The matrices that write to the residual stream have init_std / sqrt(2 n_layers), as in
        GPT-2: each of n_layers blocks adds to the stream twice. Each parameter has a random
        generator of its own, seeded from `seed` and the parameter's index.
        """
        for index, (name, p) in enumerate(self.named_parameters()):
            if p.ndim == 1:
                p.fill_(1)
                continue
            std = self.config.init_std
            if name.endswith(("attention.o.weight", ".down")):
                std /= math.sqrt(2 * self.config.n_layers)
            # 1,000,003 is more than there are parameters. So no two pairs of seed and index have
            # the same sum.
            generator = torch.Generator(p.device)
            generator.manual_seed(self.config.seed * 1_000_003 + index)
            # one matrix at a time: the fp32 numbers of a whole bank of experts are large
            for matrix in p.view(-1, *p.shape[-2:]):
                numbers = torch.empty(matrix.shape, device=p.device)
                numbers.normal_(std=std, generator=generator)
                matrix.copy_(numbers)
        for bias in self.balancing_biases().values():
            bias.zero_()

    # ------------------------------------------------------------ load balancing without a loss

    def balancing_biases(self) -> dict[str, Tensor]:
        """The routers' biases [E], by name; empty unless load_balancing is "bias"."""
        biases = {}
        for name, buffer in self.named_buffers():
            if name.endswith(".router.bias"):
                biases[name] = buffer
        return biases

    @torch.no_grad()
    def balance(self, num_tokens_per_expert_LE: Tensor) -> None:
        """Moves each expert's bias by `load_balancing_bias_rate` towards an even load.

        `num_tokens_per_expert_LE` counts the routed tokens of a whole optimizer step. The bias of
        an expert with fewer than its layer's mean goes up, that of one with more goes down
        (DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2; Wang et al. 2024).
        """
        rate = self.config.load_balancing_bias_rate
        biases = self.balancing_biases().values()
        for bias, num_tokens_E in zip(biases, num_tokens_per_expert_LE.float()):
            missing_tokens_E = num_tokens_E.mean() - num_tokens_E
            bias += rate * torch.sign(missing_tokens_E)

    # ------------------------------------------------------------ forward pass

    def compile_blocks(self) -> None:
        """Puts torch.compile around each block, and around the loss of a chunk.

        All dense blocks share one graph, and all MoE blocks another. Where the last
        `lighter_blocks` blocks recompute less, there are two graphs of each kind. A validation,
        which keeps nothing for a backward pass, has one graph of each kind. That makes six, and
        torch._dynamo's limit is eight.
        """
        compile_with_barriers()
        options = dict(
            fullgraph=True,
            # One graph for each shape. Another shape must not make the graphs of training dynamic.
            dynamic=False,
            options=COMPILE_OPTIONS,
        )
        for block in self.blocks:
            block.compile(**options)
        self.chunk_loss = torch.compile(chunk_loss, **options)

    def autocast(self):
        """The context in which the model computes: autocast to the compute dtype, none for fp32."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        # Autocast would keep every cast weight until the pass ends, in case it is cast again. Here
        # no weight is cast twice, and all cast weights would be a second copy of the model.
        return torch.autocast(
            self.norm.weight.device.type,
            dtype=self.compute_dtype,
            cache_enabled=False,
        )

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None):
        """Without targets returns fp32 logits [B, S, V], with targets (loss, metrics).

        Everything stays on the device, without synchronisation. loss is the mean cross-entropy in
        nats plus the weighted auxiliary losses, summed over MoE blocks. Without gradients, targets
        may be IGNORED_TARGET: cross_entropy and correct leave them out, the routing's metrics count
        their tokens too. metrics holds

        - cross_entropy: 0-d, nats
        - correct: 0-d, how many targets have the largest logit

        and with MoE blocks also

        - load_balancing_loss, router_z_loss: 0-d, means over MoE blocks, without their weights
        - expert_counts: [L, E], routed tokens of each expert
        """
        x_BSD, routing = self.hidden(tokens_BS)
        if targets_BS is None:
            return self.logits(x_BSD)

        cross_entropy, correct = chunked_cross_entropy(
            x_BSD.flatten(0, 1),
            self.head_weight,
            targets_BS.flatten(),
            self.chunk_loss,
        )
        loss = cross_entropy
        metrics = dict(cross_entropy=cross_entropy.detach(), correct=correct)
        if routing:
            balancing_losses, z_losses, counts = zip(*routing)
            balancing_L = torch.stack(balancing_losses)
            z_L = torch.stack(z_losses)
            loss = loss + self._balancing_weight() * balancing_L.sum()
            loss = loss + self.config.router_z_loss_weight * z_L.sum()
            metrics["load_balancing_loss"] = balancing_L.detach().mean()
            metrics["router_z_loss"] = z_L.detach().mean()
            metrics["expert_counts"] = torch.stack(counts)
        return loss, metrics

    def _balancing_weight(self) -> float:
        if self.config.load_balancing == "loss":
            return self.config.load_balancing_weight
        return 0.0

    def logits(self, x: Tensor) -> Tensor:
        """The fp32 logits [..., V] of inputs of the head [..., D], for generation and evaluation.

        On a GPU 16-bit inputs get no gradient from here: the matmul with fp32 results has none.
        """
        # Autocast would cast the fp32 matmul of a CPU to 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            x_ND = x.flatten(0, -2)
            logits_NV = fp32_matmul(x_ND, self.head_weight.to(x.dtype).T)
        return logits_NV.unflatten(0, x.shape[:-1])

    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, list]:
        """The input of the head [B, S, D], and the routing statistics of each MoE block."""
        routing = []
        with self.autocast():
            x_BSD = self.embedding(tokens_BS).to(self.compute_dtype)
            for block in self.blocks:
                x_BSD, block_routing = block(x_BSD)
                if block_routing is not None:
                    routing.append(block_routing)
            # Autocast runs some operators in fp32. One that widens the residual stream would make
            # every later matmul an fp32 one, several times slower.
            assert x_BSD.dtype == self.compute_dtype
            return self.norm(x_BSD), routing


def _other_parameters_message(found: Shapes, expected: Shapes) -> str:
    lines = [
        f"the model has {_numel(found):,} parameters, and the table of parameters in "
        f"config.py {_numel(expected):,}. They differ in"
    ]
    for name in expected | found:
        in_model = found.get(name, "absent")
        in_table = expected.get(name, "absent")
        if in_model != in_table:
            lines.append(f"  {name}: {in_model} in the model, {in_table} in the table")
    lines.append("Describe in config.parameter_table what the modules of model.py and moe.py hold.")
    return "\n".join(lines)


def _numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# ---------------------------------------------------------------- loss


def chunk_loss(
    logits_NV: Tensor,
    targets_N1: Tensor,
    grad_scale: float | None,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of a chunk of tokens, from fp32 logits.

    Returns

    - the sum of the cross-entropies, in nats,
    - how many targets have the largest logit,
    - the gradient of the sum by the logits, times `grad_scale` and rounded to `grad_dtype`; None
      without grad_scale.

    Without grad_scale, in a validation, targets may be IGNORED_TARGET: they do not count.
    """
    if grad_scale is None:
        counted_N1 = targets_N1 != IGNORED_TARGET
        targets_N1 = targets_N1.clamp(min=0)  # `gather` needs the index of some logit
    log_z_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    target_logits_N1 = logits_NV.gather(1, targets_N1)
    cross_entropies_N1 = log_z_N1 - target_logits_N1
    predictions_N1 = logits_NV.argmax(dim=-1, keepdim=True)
    correct_N1 = predictions_N1 == targets_N1
    if grad_scale is None:
        loss = cross_entropies_N1.where(counted_N1, 0.0).sum()
        correct = (correct_N1 & counted_N1).sum()
        return loss, correct, None
    loss = cross_entropies_N1.sum()
    correct = correct_N1.sum()
    # The gradient is softmax(logits) = exp(logits - log z), minus 1 at the target. It does not
    # overwrite the logits: a compiled function would write them back to memory.
    grad_NV = (logits_NV - log_z_N1).exp_()
    grad_at_targets_N1 = grad_NV.gather(1, targets_N1) - 1
    grad_NV.scatter_(1, targets_N1, grad_at_targets_N1)
    grad_NV.mul_(grad_scale)
    return loss, correct, grad_NV.to(grad_dtype)


def chunked_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk_loss=chunk_loss,
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of the logits x weight^T, and the number of correct predictions.

    Both are 0-d. The mean is in nats and fp32. A prediction is correct if the target has the
    largest logit. Without gradients, targets that are IGNORED_TARGET are in neither. `chunk_loss`
    is the function of that name above, as it is or compiled.
    """
    # Autocast would cast the fp32 matmuls to 16 bits.
    with torch.autocast(x_ND.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(
            x_ND,
            weight_VD,
            targets_N,
            torch.is_grad_enabled(),
            chunk_loss,
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The head's matmul and the cross-entropy, LOSS_CHUNK tokens at a time.

    The forward pass computes the gradients too, while it has the logits of a chunk. So the logits
    [N, V] of all tokens never exist, and the backward pass does not repeat the head's matmul (as in
    Liger Kernel, Hsu et al. 2024).

    What is rounded to 16 bits, where x is: the gradient by the logits, which two matmuls read, and
    the gradient by x. The logits and the head's gradient are fp32 from the matmuls on.
    """

    @staticmethod
    def forward(
        ctx,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        need_gradients: bool,
        chunk_loss,
    ):
        weight = weight_VD.to(x_ND.dtype)
        wide_dtype = at_least_fp32(x_ND.dtype)
        total = torch.zeros((), device=x_ND.device, dtype=wide_dtype)
        correct = torch.zeros((), device=x_ND.device, dtype=torch.long)
        grad_scale = None
        if need_gradients:
            grad_scale = _logit_grad_scale(x_ND.dtype)
            grad_x = torch.empty_like(x_ND)
            # fp32, as it is a sum over many chunks: a sum of 128 chunks in bf16 is 1.4% off.
            grad_weight = torch.zeros(weight.shape, device=weight.device, dtype=wide_dtype)
        for start in range(0, len(x_ND), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            x = x_ND[chunk]
            targets_N1 = targets_N[chunk, None]
            # The logits have no name here, so that they are freed before those of the next chunk.
            chunk_total, chunk_correct, grad_logits = chunk_loss(
                fp32_matmul(x, weight.T),
                targets_N1,
                grad_scale,
                x.dtype,
            )
            total += chunk_total
            correct += chunk_correct
            if need_gradients:
                torch.mm(grad_logits, weight, out=grad_x[chunk])
                grad_weight += fp32_matmul(grad_logits.T, x)
        num_targets = len(x_ND)
        if need_gradients:
            ctx.save_for_backward(grad_x, grad_weight)
            # Undoes grad_scale, and turns the sum over tokens into a mean.
            ctx.unscale = 1 / (grad_scale * num_targets)
        else:
            num_targets = (targets_N != IGNORED_TARGET).sum()
        return total / num_targets, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_x, grad_weight = ctx.saved_tensors
        # In fp32: the scale holds the loss scale, which may exceed fp16's largest number.
        scale = grad_loss * ctx.unscale
        grad_x = (grad_x.to(grad_weight.dtype) * scale).to(grad_x.dtype)
        # In place: the head is large. Autograd takes this tensor as `.grad`, or adds it to the sum
        # of the micro-batches before, which is fp32 too (see `sum_gradient_in_fp32`).
        grad_weight.mul_(scale)
        return grad_x, grad_weight, None, None, None


def _logit_grad_scale(dtype: torch.dtype) -> float:
    """The factor by which gradients of logits are multiplied while they have this dtype."""
    if dtype != torch.float16:
        return 1.0
    # The gradient by a logit is in [-1, 1], and tiny for most logits. fp16 loses numbers under
    # 6e-8, its smallest one. Times 256 it loses fewer, and all stay far from its largest number,
    # 65,504.
    return 256.0
