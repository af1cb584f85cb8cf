"""Qwen3-MoE, the Hugging Face format that this program's models fit: its names, its layout, its config.json.

The architecture is the same; what differs is how it is laid out. There each expert's gate, up and down is a tensor of its
own, and the two numbers of a rotary pair lie half a head apart; here they are neighbours.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config, ExperimentError

MODEL_TYPE, ARCHITECTURE = "qwen3_moe", "Qwen3MoeForCausalLM"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # theirs for ours

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.down": "mlp.down_proj.weight",
}


class Place(NamedTuple):
    """A tensor of theirs: its name, and which part of which of our parameters it holds."""

    name: str
    parameter: str
    index: tuple[int, ...]  # of the part in the parameter
    rotary: bool  # whether its rows are numbers of rotary pairs


def places(parameter: str, shape: torch.Size) -> Iterator[Place]:
    """Where a parameter of ours, of this shape, goes."""
    if parameter in _TOP:
        yield Place(_TOP[parameter], parameter, (), False)
        return
    _, layer, rest = parameter.split(".", 2)
    prefix = f"model.layers.{layer}."
    if rest == "ffn.gate_up":
        yield Place(prefix + "mlp.gate_proj.weight", parameter, (0,), False)
        yield Place(prefix + "mlp.up_proj.weight", parameter, (1,), False)
    elif rest == "ffn.experts.gate_up":
        for expert in range(shape[0]):
            yield Place(
                f"{prefix}mlp.experts.{expert}.gate_proj.weight", parameter, (expert, 0), False
            )
            yield Place(
                f"{prefix}mlp.experts.{expert}.up_proj.weight", parameter, (expert, 1), False
            )
    elif rest == "ffn.experts.down":
        for expert in range(shape[0]):
            yield Place(
                f"{prefix}mlp.experts.{expert}.down_proj.weight", parameter, (expert,), False
            )
    else:
        yield Place(
            prefix + _BLOCK[rest], parameter, (), rest.startswith(("attention.q", "attention.k"))
        )


def fused_name(parameter: str) -> str | None:
    """The name under which transformers may also keep all experts of a block in one tensor, [E, 2 F, D] or [E, D, F]."""
    _, layer, rest = parameter.split(".", 2) if parameter.startswith("blocks.") else ("", "", "")
    name = {"ffn.experts.gate_up": "gate_up_proj", "ffn.experts.down": "down_proj"}.get(rest)
    return name and f"model.layers.{layer}.mlp.experts.{name}"


def their_rows(n_rows: int, head_dim: int) -> Tensor:
    """Which of our rows each row of a rotary tensor of theirs is: pair i of a head is rows 2i, 2i + 1 here, i, i + hd/2 there."""
    return torch.arange(n_rows).view(-1, head_dim // 2, 2).transpose(1, 2).flatten()


# ---------------------------------------------------------------- config.json

# What is computed with before Config checks it, where it is given.
KINDS = dict(
    num_hidden_layers=int,
    num_attention_heads=int,
    num_experts=int,
    num_local_experts=int,
    decoder_sparse_step=int,
    head_dim=int | None,
    initializer_range=int | float,
    mlp_only_layers=list | None,
    rope_parameters=dict | None,
    rope_scaling=dict | None,
)


def to_hugging_face(c: Config, end_of_text: int, dtype: str) -> dict:
    """config.json for a model of this Config; both the names of transformers 4 and those of 5, which are read alike."""
    return dict(
        architectures=[ARCHITECTURE],
        model_type=MODEL_TYPE,
        torch_dtype=DTYPES[dtype],
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.d_ff,
        moe_intermediate_size=c.d_ff,
        hidden_act="silu",
        num_experts=c.num_experts,
        num_experts_per_tok=c.top_k,
        norm_topk_prob=c.norm_topk_prob,
        decoder_sparse_step=c.moe_every,
        mlp_only_layers=[],
        tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=c.max_seq_len,
        rope_theta=c.rope_theta,
        rope_scaling=None,
        rms_norm_eps=c.rms_norm_eps,
        attention_bias=False,
        attention_dropout=0.0,
        use_sliding_window=False,
        initializer_range=c.init_std,
        use_cache=True,
        output_router_logits=False,
        bos_token_id=None,
        eos_token_id=end_of_text,
    )


def from_hugging_face(theirs: dict) -> dict:
    """The Config fields of the model that a config.json describes. Raises ExperimentError with everything about it that
    Config cannot hold."""
    problems = []

    def check(ok: bool, message: str):
        if not ok:
            problems.append(message)

    check(
        theirs.get("model_type") == MODEL_TYPE,
        f"model_type is {theirs.get('model_type')!r}, not {MODEL_TYPE!r}",
    )
    required = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_experts_per_tok intermediate_size "
        "moe_intermediate_size max_position_embeddings rms_norm_eps"
    ).split()
    missing = [name for name in required if type(theirs.get(name)) not in (int, float)]
    check(not missing, f"it gives no number for {', '.join(missing)}")
    odd = [
        name
        for name, kind in KINDS.items()
        if name in theirs and name not in missing and not isinstance(theirs[name], kind)
    ]
    odd += [
        name for name in ("num_attention_heads", "decoder_sparse_step") if theirs.get(name) == 0
    ]
    if odd:
        check(
            False,
            "nothing can be made of " + ", ".join(f"{name} {theirs[name]!r:.40}" for name in odd),
        )
        raise ExperimentError(_refusal(problems))
    rope = theirs.get("rope_parameters") or {}  # transformers 5; before, two fields
    scaling = theirs.get("rope_scaling") or {}
    rope_type = (
        rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    )
    theta = rope.get("rope_theta", theirs.get("rope_theta"))
    check(type(theta) in (int, float), "it gives no number for rope_theta")
    check(
        rope_type == "default",
        f"its rotary positions are scaled ({rope_type}); here only the plain form exists",
    )
    check(
        theirs.get("hidden_act", "silu") == "silu",
        f"hidden_act is {theirs.get('hidden_act')!r}; here it is silu",
    )
    check(not theirs.get("attention_bias"), "attention_bias is true; here no product has a bias")
    check(
        not theirs.get("use_sliding_window"), "use_sliding_window is true; here attention is full"
    )
    check(
        theirs.get("quantization_config") is None,
        "its weights are quantised; import the model in bf16, fp16 or fp32",
    )
    if problems:
        raise ExperimentError(_refusal(problems))

    d, heads, layers = (
        theirs["hidden_size"],
        theirs["num_attention_heads"],
        theirs["num_hidden_layers"],
    )
    head_dim = theirs.get("head_dim") or d // heads
    check(
        head_dim * heads == d,
        f"head_dim {head_dim} x {heads} heads is not hidden_size {d}; here they are equal",
    )
    experts = theirs.get("num_experts", theirs.get("num_local_experts", 0))
    step, dense = theirs.get("decoder_sparse_step", 1), theirs.get("mlp_only_layers") or []
    moe = [
        layer not in dense and experts > 0 and (layer + 1) % step == 0 for layer in range(layers)
    ]
    every = next(
        (
            n
            for n in range(1, layers + 1)
            if moe == [(layer + 1) % n == 0 for layer in range(layers)]
        ),
        None,
    )
    check(
        every is not None or not any(moe),
        f"its MoE blocks are {[i for i in range(layers) if moe[i]]} of {layers}; here they "
        "are every n-th block (moe_every)",
    )
    inner, outer = theirs["moe_intermediate_size"], theirs["intermediate_size"]
    check(
        all(moe) or not any(moe) or inner == outer,
        f"moe_intermediate_size {inner} and intermediate_size {outer} differ, and "
        "it has both kinds of blocks; here they have one width (d_ff)",
    )
    if problems:
        raise ExperimentError(_refusal(problems))
    return dict(
        d_model=d,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=theirs.get("num_key_value_heads") or heads,
        d_ff=inner if any(moe) else outer,
        num_experts=experts if any(moe) else 0,
        top_k=theirs["num_experts_per_tok"],
        norm_topk_prob=bool(theirs.get("norm_topk_prob", False)),
        moe_every=every or 1,
        max_seq_len=theirs["max_position_embeddings"],
        vocab_size=theirs["vocab_size"],
        tie_embeddings=bool(theirs.get("tie_word_embeddings", False)),
        rope_theta=float(theta),
        rms_norm_eps=float(theirs["rms_norm_eps"]),
        init_std=float(theirs.get("initializer_range", 0.02)),
    )


def _refusal(problems: list[str]) -> str:
    return "this program cannot hold the model:\n" + "\n".join(
        f"  {problem}" for problem in problems
    )
