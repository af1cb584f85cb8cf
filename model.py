"""The MoE transformer: embedding, pre-norm blocks (attention, then SwiGLU or MoE), norm, head with chunked loss.

The architecture is that of Qwen3-MoE: RMSNorm, QK-norm, rotary embeddings, grouped-query attention, SwiGLU, no biases.
The residual stream has the compute dtype; norms, softmax, router and loss compute in fp32.

Shape suffixes: B sequences, S positions, N = B S tokens, D d_model, H heads, V vocabulary, E experts, L MoE blocks.
"""

import contextlib
import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from config import LOSS_CHUNK, Config
from engine.linear import linear
from engine.triton_kernels import COMPILE_OPTIONS, compile_with_barriers, qk_norm_rope
from moe import MoE, SwiGLU

logging.getLogger("torchao").setLevel(
    logging.ERROR
)  # it warns of compiled extensions that nothing here uses
logging.getLogger("torch._higher_order_ops.wrap").setLevel(
    logging.ERROR
)  # of in-place operations, which no block has
from torchtune.modules import RotaryPositionalEmbeddings  # noqa: E402

COMPUTE_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019) in fp32, returned in x's dtype; the weight is fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype)
        return (
            wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight
        ).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries, normalised queries and keys, and rotary positions."""

    def __init__(self, config: Config, rope: nn.Module, dtype: torch.dtype):
        super().__init__()
        d, hd = config.d_model, config.head_dim
        self.head_dim, self.grouped = hd, config.n_kv_heads != config.n_heads
        projection = functools.partial(nn.Linear, bias=False, dtype=dtype)
        self.q = projection(d, config.n_heads * hd)
        self.k = projection(d, config.n_kv_heads * hd)
        self.v = projection(d, config.n_kv_heads * hd)
        self.o = projection(config.n_heads * hd, d)
        self.q_norm, self.k_norm = (
            RMSNorm(hd, config.rms_norm_eps),
            RMSNorm(hd, config.rms_norm_eps),
        )
        self.rope = rope

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.attend(*self.project(x_BSD))

    def project(
        self, x_BSD: Tensor, positions_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, S, hd] of tokens at these positions, by default 0, 1, 2 ..."""
        q = linear(x_BSD, self.q.weight).unflatten(-1, (-1, self.head_dim))
        k = linear(x_BSD, self.k.weight).unflatten(-1, (-1, self.head_dim))
        v = linear(x_BSD, self.v.weight, recompute=True).unflatten(-1, (-1, self.head_dim))
        angles = self.rope.cache if positions_S is None else self.rope.cache[positions_S]
        q, k = (
            qk_norm_rope(x, norm.weight, angles, norm.eps)
            for norm, x in ((self.q_norm, q), (self.k_norm, k))
        )
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen_L: Tensor | None = None) -> Tensor:
        """The output [B, S, D] of queries at the positions of the keys; or, of a single query over those of L keys that are seen."""
        if seen_L is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        else:  # the queries of a group are the rows of one head
            rows = q.view(len(q), k.shape[1], -1, self.head_dim)
            out = F.scaled_dot_product_attention(
                rows, k, v, attn_mask=seen_L.expand(rows.shape[2], -1)
            ).reshape(q.shape)
        return linear(out.transpose(1, 2).flatten(2), self.o.weight, recompute=True)


# ---------------------------------------------------------------- activation checkpointing

aten = torch.ops.aten
# The router's choice is kept even when all else is recomputed: rounding could flip a near tie between the two passes. And the row
# ranges that the host has asked for, so that it need not ask again.
KEEP_ROUTING = {aten.topk.default, torch.ops.engine.on_host.default}
KEEP_MATMULS = KEEP_ROUTING | {
    aten.mm.default,
    aten._grouped_mm.default,
    torch.ops.engine.expert_loop.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
KEEP = {"full": KEEP_ROUTING, "selective": KEEP_MATMULS}


def _checkpoint_contexts(kept_operators: set):
    def policy(context, operator, *args, **kwargs):
        if operator in kept_operators:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); returns the residual stream and an MoE block's routing statistics.

    The checkpoint stands inside forward, so that torch.compile, which goes around the block, sees its operators.
    """

    def __init__(self, config: Config, layer: int, rope: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.moe, self.checkpointing = config.is_moe(layer), config.checkpointing_of(layer)
        self.attention_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.attention = Attention(config, rope, dtype)
        self.ffn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ffn = MoE(config, dtype) if self.moe else SwiGLU(config, dtype)

    def forward(self, x_BSD: Tensor):
        if not torch.is_grad_enabled() or self.checkpointing == "none":
            return self.compute(x_BSD)
        return checkpoint(
            self.compute,
            x_BSD,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=functools.partial(_checkpoint_contexts, KEEP[self.checkpointing]),
        )

    def compute(self, x_BSD: Tensor):
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        out = self.ffn(self.ffn_norm(x_BSD))
        y_BSD, routing = out if self.moe else (out, None)
        return x_BSD + y_BSD, routing


class MoETransformer(nn.Module):
    """model(tokens) gives fp32 logits [B, S, V]; model(tokens, targets) gives (loss, metrics), see `forward`.

    Built on the meta device it takes no memory; `materialize` then gives it storage on a device.
    `config.activation_checkpointing` must be none, selective or full (the planner turns auto into one of them).
    """

    def __init__(self, config: Config):
        super().__init__()
        assert config.activation_checkpointing != "auto"
        self.config = config
        self.compute_dtype, self.chunk_loss = COMPUTE_DTYPE[config.precision], chunk_loss
        dtype = self.compute_dtype if config.split_masters else torch.float32
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, dtype=dtype)
        self.rope = RotaryPositionalEmbeddings(
            config.head_dim, config.max_seq_len, config.rope_theta
        )
        self.blocks = nn.ModuleList(
            Block(config, i, self.rope, dtype) for i in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.head = (
            None
            if config.tie_embeddings
            else nn.Linear(config.d_model, config.vocab_size, bias=False, dtype=dtype)
        )
        if not self.norm.weight.is_meta:
            self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _apply(self, fn, recurse=True):
        """After a move (`to`, `to_empty`, `half` ...) the rotary tables are made anew, in fp32: `to_empty` would leave
        them unwritten, `to(bfloat16)` rounded."""
        super()._apply(fn, recurse)
        device = self.norm.weight.device
        if device.type != "meta":
            with torch.device(device):
                self.rope.rope_init()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal with `init_std`, less for what writes to the residual stream (GPT-2), ones for norms. Each parameter has
        a random stream of its own, from `seed`."""
        residual_std = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for i, (name, p) in enumerate(self.named_parameters()):
            if p.ndim == 1:
                p.fill_(1)
                continue
            std = (
                residual_std
                if name.endswith(("attention.o.weight", ".down"))
                else self.config.init_std
            )
            generator = torch.Generator(p.device).manual_seed(self.config.seed * 1_000_003 + i)
            for matrix in p.view(
                -1, *p.shape[-2:]
            ):  # one at a time: the fp32 draw of an expert bank is large
                matrix.copy_(
                    torch.empty(matrix.shape, device=p.device).normal_(std=std, generator=generator)
                )
        for bias in self.balancing_biases().values():
            bias.zero_()

    def balancing_biases(self) -> dict[str, Tensor]:
        """The routers' biases [E] by name, with load_balancing=bias."""
        return {
            name: buffer for name, buffer in self.named_buffers() if name.endswith(".router.bias")
        }

    @torch.no_grad()
    def balance(self, counts_LE: Tensor) -> None:
        """Moves each expert's bias a step of `load_balancing_bias_rate` towards an even load, given a step's token-expert
        pairs (DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2; Wang et al. 2024)."""
        for bias, counts in zip(self.balancing_biases().values(), counts_LE.float()):
            bias += self.config.load_balancing_bias_rate * torch.sign(counts.mean() - counts)

    def materialize(self, device: torch.device | str) -> "MoETransformer":
        """Gives a model that was built on the meta device storage, initial weights and tables on `device`."""
        self.to_empty(device=device)
        self.init_weights()
        return self

    def compile_blocks(self) -> None:
        """torch.compile around each block: one graph for dense and one for MoE blocks (two where `lighter_blocks` recompute less),
        shared by all layers. And the loss."""
        compile_with_barriers()
        torch._dynamo.config.recompile_limit = (
            16  # those in training, and in validation of a whole and of a short batch
        )
        for (
            block
        ) in self.blocks:  # not dynamic: a short validation batch must not change training's graphs
            block.compile(fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)
        self.chunk_loss = torch.compile(
            chunk_loss, fullgraph=True, dynamic=False, options=COMPILE_OPTIONS
        )

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None):
        """Without targets: fp32 logits [B, S, V]. With targets: (loss, metrics), all on the device, no synchronisation.

        loss is the mean cross-entropy in nats plus the weighted auxiliary losses, summed over MoE blocks. metrics holds
        cross_entropy (0-d), correct (0-d count), load_balancing_loss and router_z_loss (means over MoE blocks) and
        expert_counts [L, E], token-expert pairs.
        """
        x_BSD, routing = self.hidden(tokens_BS)
        if targets_BS is None:
            with self.autocast():
                return F.linear(x_BSD, self.head_weight).float()

        cross_entropy, correct = chunked_cross_entropy(
            x_BSD.flatten(0, 1), self.head_weight, targets_BS.flatten(), self.chunk_loss
        )
        loss, metrics = cross_entropy, dict(cross_entropy=cross_entropy.detach(), correct=correct)
        if routing:
            balance, z, counts = (torch.stack(values) for values in zip(*routing))
            balance_weight = (
                self.config.load_balancing_weight if self.config.load_balancing == "loss" else 0.0
            )
            loss = (
                loss + balance_weight * balance.sum() + self.config.router_z_loss_weight * z.sum()
            )
            metrics |= dict(
                load_balancing_loss=balance.detach().mean(),
                router_z_loss=z.detach().mean(),
                expert_counts=counts,
            )
        return loss, metrics

    def hidden(self, tokens_BS: Tensor) -> tuple[Tensor, list]:
        """What the head reads, [B, S, D], and the routing statistics of each MoE block."""
        with self.autocast():
            x_BSD = self.embedding(tokens_BS).to(self.compute_dtype)
            routing = []
            for block in self.blocks:
                x_BSD, block_routing = block(x_BSD)
                if block_routing is not None:
                    routing.append(block_routing)
            # an operator that autocast widens would make every later product an fp32 one, several times slower
            assert x_BSD.dtype == self.compute_dtype
            return self.norm(x_BSD), routing

    def autocast(self):
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        # no weight is cast twice in a pass, and a cast that outlives it would hold a copy of the model
        return torch.autocast(
            self.norm.weight.device.type, dtype=self.compute_dtype, cache_enabled=False
        )


# ---------------------------------------------------------------- loss


def chunk_loss(
    logits: Tensor, targets_N1: Tensor, boost: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a chunk of logits [N, V]: the sum of the cross-entropies and the count of right arg-maxima, in fp32, and the sum's
    gradient by the logits times `boost`, in their dtype (None without a boost). Overwrites fp32 logits."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z = wide.logsumexp(dim=-1, keepdim=True)
    loss = (log_z - wide.gather(1, targets_N1)).sum()
    correct = (wide.argmax(dim=-1, keepdim=True) == targets_N1).sum()
    if boost is None:
        return loss, correct, None
    grad = wide.sub_(log_z).exp_()
    grad.scatter_(1, targets_N1, grad.gather(1, targets_N1) - 1)
    return loss, correct, grad.mul_(boost).to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Head product and cross-entropy a chunk of tokens at a time; the gradients are made in the forward pass, where the
    logits are, so that the [N, V] matrix never exists and the head product is not done twice (as in Liger Kernel, Hsu
    et al. 2024). The head's gradient is summed over chunks in fp32."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, need_gradients: bool, chunk_loss):
        weight = weight_VD.to(x_ND.dtype)
        # d loss / d logits lies in [-1, 1] and most of it is tiny: fp16 would lose what is under 6e-8
        boost = 256.0 if x_ND.dtype == torch.float16 else 1.0
        total = torch.zeros(
            (), device=x_ND.device, dtype=torch.promote_types(x_ND.dtype, torch.float32)
        )
        correct = torch.zeros((), device=x_ND.device, dtype=torch.long)
        if need_gradients:
            grad_x = torch.empty_like(x_ND)
            grad_weight = torch.zeros(weight.shape, device=weight.device, dtype=total.dtype)
        for start in range(0, len(x_ND), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            x, targets = x_ND[chunk], targets_N[chunk, None]
            chunk_total, chunk_correct, grad_logits = chunk_loss(
                x @ weight.T, targets, boost if need_gradients else None
            )
            total += chunk_total
            correct += chunk_correct
            if need_gradients:
                torch.mm(grad_logits, weight, out=grad_x[chunk])
                grad_weight += _wide_product(grad_logits.T, x)
        if need_gradients:
            ctx.save_for_backward(grad_x, grad_weight)
            ctx.mean, ctx.weight_dtype = 1 / (boost * len(x_ND)), weight_VD.dtype
        return total / len(x_ND), correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_x, grad_weight = ctx.saved_tensors
        factor = grad_loss * ctx.mean
        return (
            (grad_x.to(grad_weight.dtype) * factor).to(grad_x.dtype),
            (grad_weight * factor).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result, from 16-bit inputs too."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def chunked_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_loss=chunk_loss
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (nats, fp32) of softmax(x weight^T) against targets, and how many arg-maxima are right.
    `chunk_loss` may be the compiled one."""
    with torch.autocast(x_ND.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(
            x_ND, weight_VD, targets_N, torch.is_grad_enabled(), chunk_loss
        )
