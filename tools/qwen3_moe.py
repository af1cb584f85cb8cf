"""The Qwen3-MoE format of Hugging Face, which this program's models fit: tensors and config.json.

The architecture is the same. Two things differ in the layout of the tensors:

  - Qwen3-MoE keeps gate, up and down of each expert in tensors of their own. Here all experts of a
    block are in two tensors, gate_up and down.
  - The two rows of a rotary pair are half a head apart in Qwen3-MoE, and adjacent here.

In comments "here" means this program, and "there" means Qwen3-MoE.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import Config, ExperimentError, parameter_table

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"

# The name that Hugging Face gives to each precision of Config.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# ---------------------------------------------------------------- tensors

# Parameters outside of the blocks.
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
# Parameters whose rows belong to rotary pairs. The norms of q and k have one weight for each row of
# a head, so they are reordered with the rows.
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
    """A tensor of Qwen3-MoE, and the part of a parameter of this program that it holds."""

    name: str  # in Qwen3-MoE
    parameter: str  # in this program
    # The tensor holds parameter[index]. With () it holds the whole parameter.
    index: tuple[int, ...]
    shape: tuple[int, ...]
    rotary: bool  # whether its rows belong to rotary pairs, which `qwen_rows` reorders


def qwen_tensors(config: Config) -> list[QwenTensor]:
    """All tensors of a model of this Config in Qwen3-MoE, in the order of our parameters.

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
    """The tensors of Qwen3-MoE that hold this parameter; an empty list when there are none.

    `parameter` is the name of a parameter of this program, and `shape` its shape.
    """

    def tensor(name: str, *index: int) -> QwenTensor:
        """The tensor `name`, which holds parameter[index]."""
        rotary = parameter.endswith(_ROTARY)
        return QwenTensor(name, parameter, index, tuple(shape[len(index) :]), rotary)

    if parameter in _TOP:
        return [tensor(_TOP[parameter])]
    prefix, name = _layer_prefix(parameter)
    if name in _BLOCK:
        return [tensor(prefix + _BLOCK[name])]
    found = []
    # gate_up of a dense block is [2, F, D]: the gate, then the up.
    if name == "ffn.gate_up":
        found.append(tensor(f"{prefix}mlp.gate_proj.weight", 0))
        found.append(tensor(f"{prefix}mlp.up_proj.weight", 1))
    # gate_up of experts is [E, 2, F, D].
    elif name == "ffn.experts.gate_up":
        for expert in range(shape[0]):
            found.append(tensor(f"{prefix}mlp.experts.{expert}.gate_proj.weight", expert, 0))
            found.append(tensor(f"{prefix}mlp.experts.{expert}.up_proj.weight", expert, 1))
    # down of experts is [E, D, F].
    elif name == "ffn.experts.down":
        for expert in range(shape[0]):
            found.append(tensor(f"{prefix}mlp.experts.{expert}.down_proj.weight", expert))
    return found


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
    """For each row of a rotary tensor of Qwen3-MoE, the index of that row in our tensor.

    Pair i of a head is rows 2i and 2i + 1 here, and rows i and i + head_dim / 2 there.
    """
    # [head, pair, first or second row of the pair]: the order of rows here.
    rows = torch.arange(n_rows).view(-1, head_dim // 2, 2)
    # [head, first or second row of the pair, pair]: the order of rows there.
    return rows.transpose(1, 2).flatten()


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

    `qwen` is the content of that file. Raises ExperimentError, which names everything that Config
    cannot hold.
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
    d_ff = qwen["intermediate_size"]
    num_experts = 0
    if is_moe:
        d_ff = qwen["moe_intermediate_size"]
        num_experts = _num_experts(qwen)
    heads = qwen["num_attention_heads"]
    return dict(
        d_model=qwen["hidden_size"],
        n_layers=qwen["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=qwen.get("num_key_value_heads") or heads,
        d_ff=d_ff,
        num_experts=num_experts,
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


# Fields that must be numbers, because the shape needs them. Config checks their values.
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
# The type of each field that is computed with before Config checks it, if the field is there.
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
# Fields that something is divided by.
_DIVISORS = ("num_attention_heads", "decoder_sparse_step")


def _is_number(value) -> bool:
    return type(value) in (int, float)


def _missing_values(qwen: dict) -> list[str]:
    """A problem for another type of model, and one for required numbers that are missing."""
    problems = []
    if qwen.get("model_type") != MODEL_TYPE:
        problems.append(f"model_type is {qwen.get('model_type')!r}, not {MODEL_TYPE!r}")
    missing = [name for name in _REQUIRED if not _is_number(qwen.get(name))]
    if missing:
        problems.append(f"it gives no number for {', '.join(missing)}")
    return problems


def _unusable_values(qwen: dict) -> list[str]:
    """A problem that names the fields of a wrong type, and the divisors that are zero."""
    names = []
    for name, kind in _TYPES.items():
        if name not in qwen:
            continue
        if name in _REQUIRED and not _is_number(qwen[name]):
            continue  # _missing_values reports it
        if not isinstance(qwen[name], kind):
            names.append(name)
    names += [name for name in _DIVISORS if qwen.get(name) == 0]
    if not names:
        return []
    values = ", ".join(f"{name} {qwen[name]!r:.40}" for name in names)
    return [f"nothing can be made of {values}"]


def _other_features(qwen: dict) -> list[str]:
    """A problem for each feature of the model that this program's models do not have."""
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
    """A problem for each shape of the model that Config cannot describe."""
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
    expert_width = qwen["moe_intermediate_size"]
    dense_width = qwen["intermediate_size"]
    has_both_kinds = any(moe_layers) and not all(moe_layers)
    if has_both_kinds and expert_width != dense_width:
        problems.append(
            f"moe_intermediate_size {expert_width} and intermediate_size {dense_width} differ, and "
            "it has both kinds of blocks; here they have one width (d_ff)"
        )
    return problems


def _rope_theta(qwen: dict):
    # transformers 5 writes rope_parameters. Earlier versions write rope_theta and rope_scaling.
    parameters = qwen.get("rope_parameters") or {}
    return parameters.get("rope_theta", qwen.get("rope_theta"))


def _rope_type(qwen: dict) -> str:
    parameters = qwen.get("rope_parameters") or {}
    scaling = qwen.get("rope_scaling") or {}
    found = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type")
    return found or "default"


def _num_experts(qwen: dict) -> int:
    # Both names occur.
    return qwen.get("num_experts", qwen.get("num_local_experts", 0))


def _moe_layers(qwen: dict) -> list[bool]:
    """Whether each layer is an MoE block, by the rule of transformers' Qwen3MoeDecoderLayer."""
    num_layers = qwen["num_hidden_layers"]
    if _num_experts(qwen) <= 0:
        return [False] * num_layers
    step = qwen.get("decoder_sparse_step", 1)
    dense = qwen.get("mlp_only_layers") or []
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]


def _moe_every(moe_layers: list[bool]) -> int | None:
    """The moe_every that gives these MoE blocks; None when no value does."""
    numbers = range(1, len(moe_layers) + 1)
    for every in numbers:
        if moe_layers == [number % every == 0 for number in numbers]:
            return every
    return None
