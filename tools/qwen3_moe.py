"""Qwen3-MoE, the Hugging Face format that this program's models fit: tensors and config.json.

The architecture is the same; what differs is how it is laid out. Qwen3-MoE keeps gate, up and down
of each expert in tensors of their own. The two numbers of a rotary pair lie half a head apart
there, and beside each other here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import Config, ExperimentError, parameter_table

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"

# Hugging Face's name of each precision of Config.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# ---------------------------------------------------------------- tensors

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# Parameters of a block that are one tensor in Qwen3-MoE too.
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
# Those whose rows are numbers of rotary pairs. The norms of q and k have one weight for each.
_ROTARY = (
    "attention.q.weight",
    "attention.k.weight",
    "attention.q_norm.weight",
    "attention.k_norm.weight",
)
# transformers may also keep all experts of a block in one tensor, [E, 2 F, D] or [E, D, F].
_FUSED = {
    "ffn.experts.gate_up": "mlp.experts.gate_up_proj",
    "ffn.experts.down": "mlp.experts.down_proj",
}


class QwenTensor(NamedTuple):
    """A tensor of Qwen3-MoE, and which part of which of our parameters it holds."""

    name: str
    parameter: str
    index: tuple[
        int, ...
    ]  # of the part in the parameter; () when the tensor is the whole parameter
    shape: tuple[int, ...]
    rotary: bool  # whether its rows are numbers of rotary pairs, which `qwen_rows` reorders


def qwen_tensors(config: Config) -> list[QwenTensor]:
    """All tensors of the Qwen3-MoE model of this Config, in the order of our parameters.

    Raises ExperimentError when Qwen3-MoE has no tensor for a parameter: a model that lacks it would
    compute something else.
    """
    tensors = []
    without = []
    for parameter, spec in parameter_table(config).items():
        parts = parts_of(parameter, spec.shape)
        if not parts:
            without.append(parameter)
        tensors += parts
    if without:
        raise ExperimentError(no_place_message(without))
    return tensors


def no_place_message(parameters: list[str]) -> str:
    names = ", ".join(parameters[:3])
    if len(parameters) > 3:
        names += f" and {len(parameters) - 3} more"
    return (
        f"Qwen3-MoE has no place for {names}: a model with these parameters can be neither "
        "exported to this format nor imported from it"
    )


def parts_of(parameter: str, shape: tuple[int, ...]) -> list[QwenTensor]:
    """The tensors that hold a parameter of ours of this shape; none when Qwen3-MoE has none."""

    def part(name: str, *index: int) -> QwenTensor:
        rotary = parameter.endswith(_ROTARY)
        return QwenTensor(name, parameter, index, tuple(shape[len(index) :]), rotary)

    if parameter in _TOP:
        return [part(_TOP[parameter])]
    prefix, name = _layer_prefix(parameter)
    if name in _BLOCK:
        return [part(prefix + _BLOCK[name])]
    # gate_up is [2, F, D], and of experts [E, 2, F, D]: the gates, then the ups.
    if name == "ffn.gate_up":
        return [part(f"{prefix}mlp.gate_proj.weight", 0), part(f"{prefix}mlp.up_proj.weight", 1)]
    tensors = []
    if name == "ffn.experts.gate_up":
        for expert in range(shape[0]):
            tensors.append(part(f"{prefix}mlp.experts.{expert}.gate_proj.weight", expert, 0))
            tensors.append(part(f"{prefix}mlp.experts.{expert}.up_proj.weight", expert, 1))
    elif name == "ffn.experts.down":
        for expert in range(shape[0]):
            tensors.append(part(f"{prefix}mlp.experts.{expert}.down_proj.weight", expert))
    return tensors


def fused_name(parameter: str) -> str | None:
    """The name under which transformers may keep all experts of a block in one tensor."""
    prefix, name = _layer_prefix(parameter)
    if name not in _FUSED:
        return None
    return prefix + _FUSED[name]


def _layer_prefix(parameter: str) -> tuple[str, str]:
    """("model.layers.3.", "ffn.down") of "blocks.3.ffn.down"; two empty strings without a block."""
    if not parameter.startswith("blocks."):
        return "", ""
    _, layer, name = parameter.split(".", 2)
    return f"model.layers.{layer}.", name


def qwen_rows(n_rows: int, head_dim: int) -> Tensor:
    """For each row of a rotary tensor of Qwen3-MoE, the number of that row in ours.

    Pair i of a head is rows 2i and 2i + 1 here, rows i and i + head_dim / 2 there.
    """
    ours = torch.arange(n_rows).view(-1, head_dim // 2, 2)  # [head, pair, number of the pair]
    return ours.transpose(1, 2).flatten()


# ---------------------------------------------------------------- config.json


def to_hugging_face(config: Config, end_of_text: int, dtype: str) -> dict:
    """config.json of a model of this Config. Both transformers 4 and 5 read these names."""
    return dict(
        architectures=[ARCHITECTURE],
        model_type=MODEL_TYPE,
        torch_dtype=DTYPES[dtype],
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.d_ff,
        moe_intermediate_size=config.d_ff,
        hidden_act="silu",
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=config.norm_topk_prob,
        decoder_sparse_step=config.moe_every,
        mlp_only_layers=[],
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.max_seq_len,
        rope_theta=config.rope_theta,
        rope_scaling=None,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=False,
        attention_dropout=0.0,
        use_sliding_window=False,
        initializer_range=config.init_std,
        use_cache=True,
        output_router_logits=False,
        bos_token_id=None,
        eos_token_id=end_of_text,
    )


def from_hugging_face(qwen: dict[str, Any]) -> dict:
    """The Config fields of the model that a config.json describes.

    Raises ExperimentError with everything in it that Config cannot hold.
    """
    problems = _missing_values(qwen)
    unusable = _unusable_values(qwen)
    if unusable:  # the checks below would fail on them
        raise ExperimentError(_refusal(problems + unusable))
    problems += _other_features(qwen)
    if problems:
        raise ExperimentError(_refusal(problems))
    problems = _other_shapes(qwen)
    if problems:
        raise ExperimentError(_refusal(problems))

    moe_layers = _moe_layers(qwen)
    is_moe = any(moe_layers)
    heads = qwen["num_attention_heads"]
    return dict(
        d_model=qwen["hidden_size"],
        n_layers=qwen["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=qwen.get("num_key_value_heads") or heads,
        d_ff=qwen["moe_intermediate_size"] if is_moe else qwen["intermediate_size"],
        num_experts=_num_experts(qwen) if is_moe else 0,
        top_k=qwen["num_experts_per_tok"],
        norm_topk_prob=bool(qwen.get("norm_topk_prob", False)),
        moe_every=_moe_every(moe_layers) or 1,
        max_seq_len=qwen["max_position_embeddings"],
        vocab_size=qwen["vocab_size"],
        tie_embeddings=bool(qwen.get("tie_word_embeddings", False)),
        rope_theta=float(_rope_theta(qwen)),
        rms_norm_eps=float(qwen["rms_norm_eps"]),
        init_std=float(qwen.get("initializer_range", 0.02)),
    )


def _refusal(problems: list[str]) -> str:
    lines = [f"  {problem}" for problem in problems]
    return "\n".join(["this program cannot hold the model:", *lines])


# Numbers without which there is no shape. What they may be beyond numbers, Config checks.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts_per_tok",
    "intermediate_size",
    "moe_intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
# What is computed with before Config checks it: its type, where it is given.
_TYPES = dict(
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
_DIVISORS = ("num_attention_heads", "decoder_sparse_step")


def _is_number(value) -> bool:
    return type(value) in (int, float)


def _missing_values(qwen: dict) -> list[str]:
    problems = []
    if qwen.get("model_type") != MODEL_TYPE:
        problems.append(f"model_type is {qwen.get('model_type')!r}, not {MODEL_TYPE!r}")
    missing = [name for name in _REQUIRED if not _is_number(qwen.get(name))]
    if missing:
        problems.append(f"it gives no number for {', '.join(missing)}")
    return problems


def _unusable_values(qwen: dict) -> list[str]:
    names = []
    for name, kind in _TYPES.items():
        missing = name in _REQUIRED and not _is_number(qwen.get(name))  # reported as such
        if name in qwen and not missing and not isinstance(qwen[name], kind):
            names.append(name)
    names += [name for name in _DIVISORS if qwen.get(name) == 0]
    if not names:
        return []
    values = ", ".join(f"{name} {qwen[name]!r:.40}" for name in names)
    return [f"nothing can be made of {values}"]


def _other_features(qwen: dict) -> list[str]:
    """What Qwen3-MoE can be and this program's model cannot."""
    problems = []
    if not _is_number(_rope_theta(qwen)):
        problems.append("it gives no number for rope_theta")
    rope_type = _rope_type(qwen)
    if rope_type != "default":
        problems.append(
            f"its rotary positions are scaled ({rope_type}); here only the plain form exists"
        )
    if qwen.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {qwen.get('hidden_act')!r}; here it is silu")
    if qwen.get("attention_bias"):
        problems.append("attention_bias is true; here no linear layer has a bias")
    if qwen.get("use_sliding_window"):
        problems.append("use_sliding_window is true; here attention is full")
    if qwen.get("quantization_config") is not None:
        problems.append("its weights are quantised; import the model in bf16, fp16 or fp32")
    return problems


def _other_shapes(qwen: dict) -> list[str]:
    problems = []
    d_model = qwen["hidden_size"]
    heads = qwen["num_attention_heads"]
    head_dim = qwen.get("head_dim") or d_model // heads
    if head_dim * heads != d_model:
        problems.append(
            f"head_dim {head_dim} x {heads} heads is not hidden_size {d_model}; here they are equal"
        )
    moe_layers = _moe_layers(qwen)
    if any(moe_layers) and _moe_every(moe_layers) is None:
        numbers = [layer for layer, is_moe in enumerate(moe_layers) if is_moe]
        problems.append(
            f"its MoE blocks are {numbers} of {len(moe_layers)}; here they are every n-th block "
            "(moe_every)"
        )
    of_experts = qwen["moe_intermediate_size"]
    of_dense = qwen["intermediate_size"]
    both_kinds = any(moe_layers) and not all(moe_layers)
    if both_kinds and of_experts != of_dense:
        problems.append(
            f"moe_intermediate_size {of_experts} and intermediate_size {of_dense} differ, and it "
            "has both kinds of blocks; here they have one width (d_ff)"
        )
    return problems


def _rope_theta(qwen: dict):
    # transformers 5 has rope_parameters; before, there were two fields.
    parameters = qwen.get("rope_parameters") or {}
    return parameters.get("rope_theta", qwen.get("rope_theta"))


def _rope_type(qwen: dict) -> str:
    parameters = qwen.get("rope_parameters") or {}
    scaling = qwen.get("rope_scaling") or {}
    for found in (parameters.get("rope_type"), scaling.get("rope_type"), scaling.get("type")):
        if found:
            return found
    return "default"


def _num_experts(qwen: dict) -> int:
    return qwen.get("num_experts", qwen.get("num_local_experts", 0))


def _moe_layers(qwen: dict) -> list[bool]:
    """Whether each layer is an MoE block, by the rule of transformers' Qwen3MoeDecoderLayer."""
    step = qwen.get("decoder_sparse_step", 1)
    dense = qwen.get("mlp_only_layers") or []
    return [
        layer not in dense and _num_experts(qwen) > 0 and (layer + 1) % step == 0
        for layer in range(qwen["num_hidden_layers"])
    ]


def _moe_every(moe_layers: list[bool]) -> int | None:
    """The moe_every that gives these MoE blocks; None when no value does."""
    numbers = range(1, len(moe_layers) + 1)
    for every in numbers:
        if moe_layers == [number % every == 0 for number in numbers]:
            return every
    return None
