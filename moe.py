"""Mixture of Experts: router, SwiGLU experts, balancing losses. And the SwiGLU of dense blocks.

Dropless: every token reaches its top_k experts, whatever the load. Routed tokens are sorted by
expert, so that each matmul runs once over all experts. The results then go back to their tokens.

Shape suffixes: B sequences, S positions, N = B S tokens, E experts, K = top_k experts of a token,
R = N K routed tokens (a token counts once for each of its experts), D d_model, F d_ff, O = 2 F
outputs of the gate and up matmul.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from engine.linear import grouped_linear, linear, offs_for
from engine.triton_kernels import swiglu

# ---------------------------------------------------------------- tokens to experts and back


class _Dispatch(torch.autograd.Function):
    """Copies each token's row to K rows, one for each of its experts: [N, D] to [R, D].

    The rows of the result are sorted by expert.

    The gradient of a copy to K rows is the sum over these rows: `_Combine`, a gather and a sum.
    Autograd's gradient of indexing would be a scatter with atomics. It is slower, and it adds in no
    fixed order. Compiled (torch 2.11, on a GPU), it added to a buffer that was not always zero.
    """

    @staticmethod
    def forward(
        ctx,
        x_ND: Tensor,
        sort_indices_R: Tensor,
        inverse_permutation_R: Tensor,
        k: int,
    ) -> Tensor:
        ctx.save_for_backward(sort_indices_R, inverse_permutation_R)
        ctx.k = k
        # Before the sort, routed token r belongs to token r // k.
        token_indices_R = sort_indices_R // k
        return x_ND[token_indices_R]

    @staticmethod
    def backward(ctx, grad_RD):
        sort_indices_R, inverse_permutation_R = ctx.saved_tensors
        grad_ND = _Combine.apply(grad_RD, sort_indices_R, inverse_permutation_R, ctx.k)
        return grad_ND, None, None, None


class _Combine(torch.autograd.Function):
    """Sums the K rows of each token: [R, D], sorted by expert, to [N, D].

    The gradient of a sum is the same for each of its terms: a copy to K rows, so `_Dispatch`.
    """

    @staticmethod
    def forward(
        ctx,
        y_RD: Tensor,
        sort_indices_R: Tensor,
        inverse_permutation_R: Tensor,
        k: int,
    ) -> Tensor:
        ctx.save_for_backward(sort_indices_R, inverse_permutation_R)
        ctx.k = k
        # Indexing undoes the sort: the K rows of a token are neighbours again.
        unsorted_y_RD = y_RD[inverse_permutation_R]
        d_model = y_RD.shape[-1]
        y_NKD = unsorted_y_RD.view(-1, k, d_model)
        # The dtype is stated because autocast on GPUs would give an fp32 sum, and with it an fp32
        # residual stream.
        return y_NKD.sum(dim=1, dtype=y_RD.dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        sort_indices_R, inverse_permutation_R = ctx.saved_tensors
        grad_RD = _Dispatch.apply(grad_ND, sort_indices_R, inverse_permutation_R, ctx.k)
        return grad_RD, None, None, None


# ---------------------------------------------------------------- auxiliary losses


def load_balancing_loss(
    probs_BSE: Tensor,
    num_tokens_per_expert_BE: Tensor,
    scope: str,
) -> Tensor:
    """Switch Transformer's auxiliary loss (Fedus et al. 2021, eq. 4): E sum_e f_e P_e.

    f_e is expert e's share of the routed tokens: the shares add up to 1, whatever top_k. P_e is
    expert e's mean router probability. Only P has a gradient, as a count has none. At perfect
    balance f_e = P_e = 1 / E, and the loss is 1. Returns the loss as a 0-d tensor.

    Scope "batch" takes f and P over all tokens given, so the size of the micro-batch changes the
    objective. Scope "sequence" takes f and P within each sequence and averages the losses of the
    sequences: the size of the micro-batch then changes nothing.
    """
    mean_probs_BE = probs_BSE.mean(dim=1)
    counts_BE = num_tokens_per_expert_BE.float()
    if scope == "batch":
        # All sequences count as one: B is 1 from here.
        mean_probs_BE = mean_probs_BE.mean(dim=0, keepdim=True)
        counts_BE = counts_BE.sum(dim=0, keepdim=True)
    totals_B1 = counts_BE.sum(dim=1, keepdim=True)
    shares_BE = counts_BE / totals_B1
    products_BE = shares_BE * mean_probs_BE
    dot_products_B = products_BE.sum(dim=1)
    num_experts = probs_BSE.shape[-1]
    return dot_products_B.mean() * num_experts


def router_z_loss(logits_BSE: Tensor) -> Tensor:
    """Mean of log(sum_e exp(logit_e))^2 over the tokens, 0-d (Zoph et al. 2022, ST-MoE, eq. 5).

    It keeps the logits small.
    """
    log_z_BS = torch.logsumexp(logits_BSE, dim=-1)
    return log_z_BS.square().mean()


# ---------------------------------------------------------------- modules


class SwiGLU(nn.Module):
    """The feed-forward network down(silu(gate(x)) * up(x)) (Shazeer 2020).

    Gate and up are one parameter, gate_up [2, F, D], and one matmul. down is [D, F].
    """

    def __init__(self, config: Config, dtype: torch.dtype):
        super().__init__()
        gate_up_shape = (2, config.d_ff, config.d_model)
        down_shape = (config.d_model, config.d_ff)
        self.gate_up = nn.Parameter(torch.empty(gate_up_shape, dtype=dtype))
        self.down = nn.Parameter(torch.empty(down_shape, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to [..., D]."""
        gate_up_weight_OD = self.gate_up.flatten(0, 1)
        gate_up = linear(x, gate_up_weight_OD)
        # `swiglu` takes rows: [N, 2 F] to [N, F].
        hidden = swiglu(gate_up.flatten(0, -2))
        hidden = hidden.view(*x.shape[:-1], -1)
        return linear(hidden, self.down)


class RouterOutput(NamedTuple):
    """What the router says of each token."""

    # over all experts
    logits_BSE: Tensor
    probs_BSE: Tensor
    # The chosen experts. The output of each is multiplied by its weight.
    topk_weights_BSK: Tensor
    topk_expert_ids_BSK: Tensor
    # The chosen experts again, as booleans. Their sum is a count for each expert.
    one_hot_BSKE: Tensor


class Router(nn.Module):
    """Chooses top_k of num_experts for each token, in fp32 throughout. The weight is [E, D].

    With `load_balancing` "bias", `bias` [E] is added to the probabilities by which experts are
    chosen (DeepSeek-V3). It has no gradient, and the weights of the chosen experts do not use it.
    """

    def __init__(self, config: Config):
        super().__init__()
        weight_shape = (config.num_experts, config.d_model)
        self.weight = nn.Parameter(torch.empty(weight_shape, dtype=torch.float32))
        self.top_k = config.top_k
        self.norm_topk_prob = config.norm_topk_prob
        bias = None
        if config.load_balancing == "bias":
            bias = torch.zeros(config.num_experts)
        self.register_buffer("bias", bias)

    def forward(self, x_BSD: Tensor) -> RouterOutput:
        logits_BSE = self._logits(x_BSD)
        probs_BSE = logits_BSE.softmax(dim=-1)
        topk_expert_ids_BSK = self._choose(probs_BSE)
        num_experts = probs_BSE.shape[-1]
        expert_ids_E = torch.arange(num_experts, device=x_BSD.device)
        one_hot_BSKE = topk_expert_ids_BSK.unsqueeze(-1) == expert_ids_E

        # A masked sum picks the probabilities of the chosen experts: one term is not zero. The
        # gradient of indexing would be a scatter.
        chosen_probs_BSKE = probs_BSE.unsqueeze(-2) * one_hot_BSKE
        topk_weights_BSK = chosen_probs_BSKE.sum(dim=-1)
        if self.norm_topk_prob:
            sums_BS1 = topk_weights_BSK.sum(dim=-1, keepdim=True)
            topk_weights_BSK = topk_weights_BSK / sums_BS1
        return RouterOutput(
            logits_BSE,
            probs_BSE,
            topk_weights_BSK,
            topk_expert_ids_BSK,
            one_hot_BSKE,
        )

    def _logits(self, x_BSD: Tensor) -> Tensor:
        # Autocast would compute the logits in 16 bits.
        with torch.autocast(x_BSD.device.type, enabled=False):
            wide_x_BSD = x_BSD.to(self.weight.dtype)
            return F.linear(wide_x_BSD, self.weight)

    def _choose(self, probs_BSE: Tensor) -> Tensor:
        """The ids of the K experts with the largest probability plus bias, [B, S, K]."""
        scores_BSE = probs_BSE.detach()
        if self.bias is not None:
            scores_BSE = scores_BSE + self.bias
        return scores_BSE.topk(self.top_k, dim=-1).indices


class Experts(nn.Module):
    """num_experts SwiGLU networks. gate_up is [E, 2, F, D], down is [E, D, F]."""

    def __init__(self, config: Config, dtype: torch.dtype):
        super().__init__()
        gate_up_shape = (config.num_experts, 2, config.d_ff, config.d_model)
        down_shape = (config.num_experts, config.d_model, config.d_ff)
        self.gate_up = nn.Parameter(torch.empty(gate_up_shape, dtype=dtype))
        self.down = nn.Parameter(torch.empty(down_shape, dtype=dtype))

    def forward(
        self,
        x_RD: Tensor,
        weights_R: Tensor,
        offs_E: Tensor,
    ) -> Tensor:
        """Expert e computes on rows offs[e-1] : offs[e] of x, sorted by expert. Returns [R, D].

        Row r of the result is multiplied by weights[r], the router's weight. In fact the hidden row
        is multiplied, before `down`. `down` is linear, so the result is the same, and SwiGLU's
        kernel multiplies the hidden row while it writes it.
        """
        # Autocast does not reach grouped matmuls, so fp32 weights are cast here.
        gate_up_EOD = self.gate_up.flatten(1, 2).to(x_RD.dtype)
        down_EDF = self.down.to(x_RD.dtype)
        offs_E = offs_for(x_RD, offs_E)

        gate_up_RO = grouped_linear(x_RD, gate_up_EOD, offs_E)
        hidden_RF = swiglu(gate_up_RO, weights_R)
        return grouped_linear(hidden_RF, down_EDF, offs_E)


class MoE(nn.Module):
    """The feed-forward part of an MoE block: a router, and the experts that it chooses from."""

    def __init__(self, config: Config, dtype: torch.dtype):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, dtype)
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.scope = config.load_balancing_scope

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The output [B, S, D], and the routing statistics.

        1. The router gives each token K experts and their weights.
        2. `num_tokens_per_expert` counts the routed tokens of each expert. Its cumulative sum is
           `offs`: expert e has rows offs[e-1] : offs[e] of those sorted by expert.
        3. `sort_indices` sorts the R routed tokens by expert. Before the sort, routed token r
           belongs to token r // K. The sort moves it to row inverse_permutation[r].
        4. Dispatch copies the tokens' rows, and the router's weights, into the sorted order.
        5. Each expert computes on its rows, and multiplies them by the weights.
        6. Combine sums the K rows of each token.

        The routing statistics are the load-balancing loss, the router z-loss (both 0-d, not yet
        multiplied by their weights in the loss) and num_tokens_per_expert [E].
        """
        routed = self.router(x_BSD)
        num_tokens_per_expert_BE = routed.one_hot_BSKE.sum(dim=(1, 2))
        num_tokens_per_expert_E = num_tokens_per_expert_BE.sum(dim=0)
        # int32: the grouped GEMM takes no other dtype
        offs_E = num_tokens_per_expert_E.cumsum(dim=0).to(torch.int32)

        # stable: the rows of an expert stay in the order of their tokens
        expert_ids_R = routed.topk_expert_ids_BSK.flatten()
        sort_indices_R = expert_ids_R.argsort(stable=True)
        permutation = (sort_indices_R, _inverse_permutation(sort_indices_R))

        x_ND = x_BSD.flatten(0, 1)
        x_RD = _Dispatch.apply(x_ND, *permutation, self.top_k)
        # A routed token has a weight of its own already. So each weight is copied once: k = 1.
        unsorted_weights_R1 = routed.topk_weights_BSK.view(-1, 1)
        weights_R1 = _Dispatch.apply(unsorted_weights_R1, *permutation, 1)
        weights_R = weights_R1.squeeze(1)
        y_RD = self.experts(x_RD, weights_R, offs_E)
        y_ND = _Combine.apply(y_RD, *permutation, self.top_k)

        balancing_loss = load_balancing_loss(
            routed.probs_BSE,
            num_tokens_per_expert_BE,
            self.scope,
        )
        z_loss = router_z_loss(routed.logits_BSE)
        statistics = (balancing_loss, z_loss, num_tokens_per_expert_E)
        return y_ND.view_as(x_BSD), statistics


def _inverse_permutation(permutation_R: Tensor) -> Tensor:
    """The permutation that undoes this one: inverse[permutation[i]] = i."""
    positions_R = torch.arange(len(permutation_R), device=permutation_R.device)
    inverse_R = torch.empty_like(permutation_R)
    return inverse_R.scatter_(0, permutation_R, positions_R)
