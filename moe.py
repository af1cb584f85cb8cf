"""Mixture of Experts: a top-k router, SwiGLU experts as grouped products, the balancing losses, routing statistics.

Dropless: every token reaches its top_k experts, whatever the load. Token-expert pairs are sorted by expert, each product
runs once over all experts with their row ranges, and the results go back to their tokens.

Shape suffixes: B sequences, S positions, N = B S tokens, R = N K token-expert pairs sorted by expert, D d_model,
F d_ff, E experts, K experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from engine.linear import grouped_linear, linear, offs_for
from engine.triton_kernels import swiglu

# ---------------------------------------------------------------- tokens to experts and back


class _Dispatch(torch.autograd.Function):
    """Copies each token's row to its K places in expert order. The gradient is `_Combine`, a gather and a sum. The one that
    autograd makes of indexing scatters with atomics: slower, in no fixed order, and compiled (torch 2.11, on a GPU) into a
    buffer that was not always zero."""

    @staticmethod
    def forward(ctx, x_ND, order_R, place_R, k: int):
        ctx.save_for_backward(order_R, place_R)
        ctx.k = k
        return x_ND[order_R // k]

    @staticmethod
    def backward(ctx, grad_RD):
        order_R, place_R = ctx.saved_tensors
        return _Combine.apply(grad_RD, order_R, place_R, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """Sums the K rows of each token, wherever expert order has put them."""

    @staticmethod
    def forward(ctx, y_RD, order_R, place_R, k: int):
        ctx.save_for_backward(order_R, place_R)
        ctx.k = k
        # the dtype is stated because autocast on GPUs would give a sum in fp32, and with it an fp32 residual stream
        return y_RD[place_R].view(-1, k, y_RD.shape[-1]).sum(dim=1, dtype=y_RD.dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        order_R, place_R = ctx.saved_tensors
        return _Dispatch.apply(grad_ND, order_R, place_R, ctx.k), None, None, None


# ---------------------------------------------------------------- balance


def load_balancing_loss(probs_BSE: Tensor, counts_BE: Tensor, scope: str) -> Tensor:
    """Switch Transformer's auxiliary loss (Fedus et al. 2021, eq. 4): E sum_e f_e P_e, where f_e is expert e's share of
    the routed pairs and P_e its mean router probability; 1 at perfect balance whatever top_k.

    scope "batch" takes both shares over all tokens given, so the micro-batch is part of the objective; "sequence" takes
    them in each sequence and averages, and does not depend on it.
    """
    probs_BE, counts_BE = probs_BSE.mean(dim=1), counts_BE.float()
    if scope == "batch":
        probs_BE, counts_BE = probs_BE.mean(dim=0, keepdim=True), counts_BE.sum(dim=0, keepdim=True)
    share_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True)
    return (share_BE * probs_BE).sum(dim=1).mean() * probs_BSE.shape[-1]


def router_z_loss(logits_BSE: Tensor) -> Tensor:
    """Mean squared log-partition of the router's logits (Zoph et al. 2022, ST-MoE, eq. 5): keeps them small."""
    return torch.logsumexp(logits_BSE, dim=-1).square().mean()


# ---------------------------------------------------------------- modules


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are one product. gate_up [2, F, D], down [D, F]."""

    def __init__(self, config: Config, dtype: torch.dtype):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, config.d_ff, config.d_model, dtype=dtype))
        self.down = nn.Parameter(torch.empty(config.d_model, config.d_ff, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        gate_up = linear(x, self.gate_up.flatten(0, 1))
        return linear(swiglu(gate_up.flatten(0, -2)).view(*x.shape[:-1], -1), self.down)


class Router(nn.Module):
    """Chooses top_k of num_experts for each token; in fp32 throughout, its weight [E, D] too."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(config.num_experts, config.d_model, dtype=torch.float32)
        )
        self.top_k, self.norm_topk_prob = config.top_k, config.norm_topk_prob
        # added to the probabilities where experts are chosen, and only there
        self.register_buffer(
            "bias", torch.zeros(config.num_experts) if config.load_balancing == "bias" else None
        )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns logits [B, S, E], probabilities [B, S, E], chosen weights [B, S, K], chosen experts [B, S, K] and the same
        as one-hot booleans [B, S, K, E]."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BSE = F.linear(x_BSD.to(self.weight.dtype), self.weight)
        probs_BSE = logits_BSE.softmax(dim=-1)
        scores_BSE = probs_BSE.detach() if self.bias is None else probs_BSE.detach() + self.bias
        experts_BSK = scores_BSE.topk(self.top_k, dim=-1).indices
        chosen_BSKE = experts_BSK.unsqueeze(-1) == torch.arange(
            probs_BSE.shape[-1], device=x_BSD.device
        )
        # a masked sum instead of topk's values, whose gradient scatters
        weights_BSK = (probs_BSE.unsqueeze(-2) * chosen_BSKE).sum(dim=-1)
        if self.norm_topk_prob:
            weights_BSK = weights_BSK / weights_BSK.sum(dim=-1, keepdim=True)
        return logits_BSE, probs_BSE, weights_BSK, experts_BSK, chosen_BSKE


class Experts(nn.Module):
    """num_experts SwiGLU networks. gate_up [E, 2, F, D], down [E, D, F]."""

    def __init__(self, config: Config, dtype: torch.dtype):
        super().__init__()
        self.gate_up = nn.Parameter(
            torch.empty(config.num_experts, 2, config.d_ff, config.d_model, dtype=dtype)
        )
        self.down = nn.Parameter(
            torch.empty(config.num_experts, config.d_model, config.d_ff, dtype=dtype)
        )

    def forward(self, x_RD: Tensor, weights_R: Tensor, offs_E: Tensor) -> Tensor:
        """Each expert on its rows, times the router's weight (before the down product: the same, and fused)."""
        dtype, offs_E = (
            x_RD.dtype,
            offs_for(x_RD, offs_E),
        )  # grouped products are not autocast: fp32 masters are cast here
        hidden_RF = swiglu(
            grouped_linear(x_RD, self.gate_up.flatten(1, 2).to(dtype), offs_E), weights_R
        )
        return grouped_linear(hidden_RF, self.down.to(dtype), offs_E)


class MoE(nn.Module):
    """Router, experts, and what there is to know about the routing."""

    def __init__(self, config: Config, dtype: torch.dtype):
        super().__init__()
        self.router, self.experts = Router(config), Experts(config, dtype)
        self.num_experts, self.top_k, self.scope = (
            config.num_experts,
            config.top_k,
            config.load_balancing_scope,
        )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Returns the output [B, S, D] and (load-balancing loss, router z-loss, token-expert pairs per expert [E])."""
        logits_BSE, probs_BSE, weights_BSK, experts_BSK, chosen_BSKE = self.router(x_BSD)
        counts_BE = chosen_BSKE.sum(dim=(1, 2))
        counts_E = counts_BE.sum(dim=0)
        offs_E = counts_E.cumsum(dim=0).to(torch.int32)

        order_R = experts_BSK.flatten().argsort(
            stable=True
        )  # pairs by expert; pair r is token r // K
        place_R = torch.empty_like(order_R).scatter_(
            0, order_R, torch.arange(len(order_R), device=order_R.device)
        )
        x_RD = _Dispatch.apply(x_BSD.flatten(0, 1), order_R, place_R, self.top_k)
        weights_R = _Dispatch.apply(weights_BSK.view(-1, 1), order_R, place_R, 1).squeeze(1)
        y_RD = self.experts(x_RD, weights_R, offs_E)
        y_BSD = _Combine.apply(y_RD, order_R, place_R, self.top_k).view_as(x_BSD)
        return y_BSD, (
            load_balancing_loss(probs_BSE, counts_BE, self.scope),
            router_z_loss(logits_BSE),
            counts_E,
        )
