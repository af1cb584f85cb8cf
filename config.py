"""The configuration: every field with its default and unit, presets, and what follows from them.

Edit the defaults of `Config` for your GPU, or leave them and choose a preset. Each field is also a
command-line option of run_experiment.py, and the sentence under a field is that option's help.

The parts, from top to bottom: errors, Config, the table of parameters, the optimizers' groups,
presets, reading options, resolving a configuration, resuming one, and the checks of its values.

This file imports no torch, so that `--help` and `plan` answer at once, and nothing of the program:
every other module may import it.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import sys
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

DATA_RULES = 2
"""The version of the rules of data that new runs use: what is held out, where windows begin.

Version 1 splits chunk by chunk, and every epoch has the same windows. Version 2 splits by document,
and windows begin at another offset in each epoch. Caches and checkpoints hold the version, and a
resumed run keeps that of its checkpoint.
"""

KNOWN_DATA_RULES = (1, 2)

# ---------------------------------------------------------------- errors


class ExperimentError(Exception):
    """Something the user can fix: its text names the cause and the remedy; no traceback follows."""

    exit_code = 1
    # Of several ranks: whether all of them raise it at the same place, so that they can still save
    # together. Ranks.raise_on_all sets it.
    of_all_ranks = False


class ConfigError(ExperimentError, ValueError):
    """Wrong options or values: the same command fails again, however often it is started."""

    exit_code = 2


class Diverged(ExperimentError):
    """Losses or gradients that are no longer finite: the same run from here diverges again."""

    exit_code = 3


class OutOfMemory(ExperimentError):
    """The memory of a GPU or of the host does not suffice."""

    exit_code = 4


def missing_package_message(error: ModuleNotFoundError) -> str:
    return f"the package {error.name} is not installed: pip install -r requirements.txt"


def explain_missing_packages() -> None:
    """Makes this program report a missing package in one line, without a traceback.

    A command calls it before it imports packages, so that it also covers these imports. Ctrl-C
    during the imports is one line too.
    """
    sys.excepthook = _report_uncaught


def _report_uncaught(kind, error, traceback) -> None:
    if isinstance(error, ModuleNotFoundError):
        print(f"error: {missing_package_message(error)}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):  # Ctrl-C while the imports are under way
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# ---------------------------------------------------------------- the configuration

# The mode of activation checkpointing that recomputes less than this one.
LIGHTER = {"full": "selective", "selective": "none"}


def block_modes(checkpointing: str, n_layers: int, lighter_blocks: int) -> list[str]:
    """The mode of each block: none, selective or full; the last `lighter_blocks` recompute less."""
    less = LIGHTER.get(checkpointing, checkpointing)
    return [checkpointing] * (n_layers - lighter_blocks) + [less] * lighter_blocks


@dataclass(frozen=True)
class Config:
    # --- model
    d_model: int = 4096
    """Width of the residual stream."""
    n_layers: int = 40
    """Transformer blocks."""
    n_heads: int = 32
    """Attention heads; the head dimension is d_model / n_heads and must be even."""
    n_kv_heads: int = 0
    """Key and value heads (grouped-query attention); 0 means as many as n_heads."""
    d_ff: int = 11008
    """Hidden width of the SwiGLU feed-forward network, in each expert and in the dense blocks."""
    num_experts: int = 8
    """Experts in an MoE block; 0 makes a dense model."""
    top_k: int = 2
    """Experts that each token is sent to."""
    norm_topk_prob: bool | None = None
    """Make the chosen experts' weights sum to 1. Default: true for top_k >= 2,
    false for top_k = 1."""
    moe_every: int = 4
    """Every n-th block is an MoE block, the others are dense; 1 makes every block an MoE block."""
    max_seq_len: int = 4096
    """Tokens in a training sequence."""
    vocab_size: int = 49152
    """Tokens in the vocabulary, also what the tokenizer is trained to."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head too."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding's wavelengths."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; matrices that write to the residual stream get
    1/sqrt(2 n_layers) times this."""

    # --- batch and length of the run; a step is an optimizer step everywhere
    batch_size: int = 4
    """Sequences in a micro-batch (one forward and backward pass)."""
    gradient_accumulation_steps: int = 8
    """Micro-batches in an optimizer step."""
    max_steps: int = 50_000
    """Optimizer steps in the run; the schedule ends here."""

    # --- optimization
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for hidden matrices, AdamW for the rest; adamw: AdamW for everything."""
    muon_lr: float = 0.01
    """Muon's peak learning rate, for hidden matrices; updates are scaled by
    sqrt(max(1, rows/columns))."""
    adamw_lr: float = 0.001
    """AdamW's peak learning rate, for embedding, head, norms and router."""
    muon_momentum: float = 0.95
    """Muon's (Nesterov) momentum."""
    adamw_beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    adamw_beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    adamw_eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate, on everything but norms."""
    warmup_fraction: float = 0.05
    """Share of max_steps over which the learning rates rise linearly from 0."""
    min_lr_fraction: float = 0.1
    """Learning rates fall along a cosine to this share of their peak."""
    grad_clip: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 switches clipping
    off."""
    load_balancing: Literal["loss", "bias"] = "loss"
    """What keeps experts equally busy: a loss, or a bias on each expert's score that only the
    choice of experts sees."""
    load_balancing_weight: float = 0.01
    """Weight of each MoE block's load-balancing loss (Switch Transformer); 0 switches it off. Not
    used with bias."""
    load_balancing_scope: Literal["batch", "sequence"] = "batch"
    """Balance over a micro-batch's tokens, or within each sequence (then the micro-batch size does
    not matter)."""
    load_balancing_bias_rate: float = 0.001
    """What a step adds to an idle expert's bias and takes from a busy one's (DeepSeek-V3)."""
    router_z_loss_weight: float = 0.0
    """Weight of each MoE block's router z-loss (ST-MoE); 0 switches it off."""

    # --- precision, memory, speed
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto takes the GPU when there is one."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Autocast type of forward and backward; fp16 comes with loss scaling."""
    master_weights: Literal["split", "fp32"] = "split"
    """Keep fp32 master weights as a 16-bit weight and its 16 low bits (split), or as fp32
    parameters; with precision fp32 always the latter."""
    loss_scale: float = 65536.0
    """First loss scale in fp16; halved on overflow, doubled after loss_scale_growth_interval good
    steps."""
    loss_scale_growth_interval: int = 500
    """Steps without overflow after which the loss scale is doubled."""
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = "auto"
    """What a block keeps for the backward pass: everything (none), the outputs of matmuls
    (selective) or only its input (full); auto: full, and selective in as many of the last blocks
    as fit; on several GPUs also none."""
    lighter_blocks: int = 0
    """Number of last blocks that recompute less: selective instead of full, none instead of
    selective. Chosen with activation_checkpointing=auto."""
    offload_optimizer: Literal["auto", "true", "false"] = "auto"
    """Keep optimizer state in host memory and copy it through the GPU in each step; auto: only
    when it does not fit."""
    host_gradient_blocks: int = 0
    """Number of first blocks whose gradients are summed in host memory during the backward pass;
    needs offload_optimizer."""
    reduce_gradients: Literal["auto", "step", "micro_batch"] = "auto"
    """With several GPUs: sum the gradients over them once a step, or in every micro-batch, which
    is slower and takes less memory; auto: once a step where that fits."""
    host_memory_gb: float = 0.0
    """Host memory that the plan may count on, in GB; 0 reads it from the operating system."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Compile each block with torch.compile; auto: on a GPU."""
    deterministic: bool = False
    """Only kernels that add in a fixed order: the same run gives the same bits again. Slower on a
    GPU."""

    # --- data
    data: str = "python"
    """Corpus: python (its library), installed (adds the packages), a file, folder or glob, or
    hf:DATASET[:CONFIG[:SPLIT]]."""
    text_field: str = "text"
    """Field of a .jsonl, .parquet or hf: row that holds the text."""
    max_characters: int = 0
    """Characters of the corpus after which no further document is read; 0 reads them all."""
    max_bad_share: float = 0.001
    """Largest share of lines and rows that may be unreadable (not UTF-8, not JSON, damaged); they
    are left out."""
    tokenizer: str = "train"
    """train or train:VOCAB (a byte-level BPE, trained on the corpus once), a tokenizer.json or its
    folder, or hf:NAME."""
    end_of_text: str = ""
    """The tokenizer's token that ends a document, such as [EOS]; empty: the one of the usual names
    that it has."""
    validation_fraction: float = 0.01
    """Share of the corpus's characters, in whole documents, that is held out."""
    cache_dir: str = "cache"
    """Where trained tokenizers and token shards are kept between runs."""
    num_workers: int = 0
    """Background processes that read batches; 0 reads in the main process."""
    seed: int = 1234
    """Seed of initial weights and data order."""

    # --- evaluation, logging, checkpoints
    eval_every: int = 500
    """Steps between validations; there is always one at step 0 and one at the end."""
    eval_sequences: int = 0
    """Held-out sequences in a validation, whatever the micro-batch; 0: eval_steps times the
    batch_size of the preset."""
    eval_steps: int = 20
    """Validation batches in a validation, of the preset's batch_size; eval_sequences replaces
    it."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 5000
    """Steps between checkpoints; 0 switches them off."""
    save_minutes: float = 60.0
    """Minutes between saves of checkpoint_latest.pt alone; 0 switches them off."""
    keep_checkpoints: int = 3
    """Newest numbered checkpoints of this run that are kept."""
    sample_tokens: int = 200
    """Tokens of text to generate at the end of the run, and at most 32 of them at each validation;
    0 for none."""
    tracker: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Where metrics go in addition to metrics.jsonl; each but none is a package to install."""
    save_dir: str = "checkpoints"
    """Folder of everything the run writes."""

    def __post_init__(self):
        if not self.n_kv_heads:
            self._resolve("n_kv_heads", self.n_heads)
        if self.norm_topk_prob is None:
            self._resolve("norm_topk_prob", self.top_k != 1)
        for name in ("offload_optimizer", "compile"):
            if isinstance(getattr(self, name), bool):
                self._resolve(name, str(getattr(self, name)).lower())
        problems = _problems(self)
        if problems:
            raise ConfigError("impossible configuration:\n  " + "\n  ".join(problems))

    def _resolve(self, name: str, value) -> None:
        """Sets a field whose given value stands for another one; afterwards no field changes."""
        object.__setattr__(self, name, value)

    # --- derived
    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.max_seq_len

    @property
    def validation_sequences(self) -> int:
        """Sequences of a validation, or all of the held-out text where it has fewer.

        `resolve` and `resumed_config` set eval_sequences, so that a change of the micro-batch does
        not change what is validated. Only a Config that neither has made may have 0 there.
        """
        return self.eval_sequences or self.eval_steps * self.batch_size

    @property
    def split_masters(self) -> bool:
        """Whether matrices are stored as a 16-bit weight and the 16 low bits of its fp32 master."""
        return self.precision != "fp32" and self.master_weights == "split"

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer`, from 0, is an MoE block: every moe_every-th is (as in GShard)."""
        return self.num_experts > 0 and (layer + 1) % self.moe_every == 0

    def checkpointing_of(self, layer: int) -> str:
        """The mode of block `layer`: none, selective or full."""
        modes = block_modes(self.activation_checkpointing, self.n_layers, self.lighter_blocks)
        return modes[layer]

    def feed_forwards(self, layer: int) -> list["FeedForward"]:
        """The feed-forward networks of block `layer`, in the order of their parameters.

        The parameter table, the FLOPs and the planner's bytes loop over this list.
        """
        if not self.is_moe(layer):
            return [FeedForward("ffn", "dense_ffn", self.d_ff)]
        return [FeedForward("ffn.experts", "experts", self.d_ff, self.num_experts, self.top_k)]

    def matrices_of(self, layer: int) -> int:
        """Number of elements in the matrices of block `layer`, without its norms and router."""
        return self._matrices_by_kind_of_block[self.is_moe(layer)]

    @functools.cached_property
    def _matrices_by_kind_of_block(self) -> dict[bool, int]:
        """`matrices_of` dense blocks (False) and MoE blocks (True): the planner reads it often."""
        matrices = {}
        for layer in range(self.n_layers):
            if self.is_moe(layer) not in matrices:
                specs = block_parameters(self, layer).values()
                matrices[self.is_moe(layer)] = sum(
                    spec.numel for spec in specs if spec.kind not in ("norms", "router")
                )
        return matrices

    @property
    def n_moe_layers(self) -> int:
        return sum(self.is_moe(i) for i in range(self.n_layers))

    @functools.cached_property
    def parameter_groups(self) -> dict[str, int]:
        """Number of parameters of each kind in PARAMETER_KINDS."""
        counts = dict.fromkeys(PARAMETER_KINDS, 0)
        for spec in parameter_table(self).values():
            counts[spec.kind] += spec.numel
        return counts

    @property
    def total_params(self) -> int:
        return sum(self.parameter_groups.values())

    @functools.cached_property
    def active_params(self) -> int:
        """Parameters that one token uses: all, but of the num_experts experts only top_k."""
        return sum(spec.active_numel for spec in parameter_table(self).values())

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs of one token, without recomputation (PaLM, appendix B).

        A matmul takes 2 FLOPs for each weight in the forward pass and 4 in the backward pass (the
        gradients of input and weight): 6 for each active parameter. The head is a matmul, and the
        look-up of the embedding is none. With tied embeddings one matrix serves for both: it counts
        once, as the head. Norms count as if they were matmuls: at most 0.1% of the sum.

        Attention multiplies queries with keys, and probabilities with values. Each takes
        2 max_seq_len d_model FLOPs of a token in the forward pass, so the two take
        12 max_seq_len d_model with the backward pass; the causal mask leaves half.
        """
        matmul_params = self.active_params
        if not self.tie_embeddings:
            matmul_params -= self.parameter_groups["embedding"]
        attention = 6 * self.n_layers * self.max_seq_len * self.d_model
        return 6 * matmul_params + attention


# ---------------------------------------------------------------- table of parameters

PARAMETER_KINDS = ("embedding", "head", "attention", "dense_ffn", "experts", "router", "norms")


class FeedForward(NamedTuple):
    """A feed-forward network of a block: SwiGLU, or a bank of `num_experts` of them."""

    name: str  # of its module in the block: "ffn", "ffn.experts"
    kind: str  # of its parameters: "dense_ffn", "experts"
    d_ff: int
    num_experts: int = 1
    top_k: int = 1  # of the num_experts networks, how many a token passes through


class ParameterSpec(NamedTuple):
    """A parameter of the model: its shape, its kind (one of PARAMETER_KINDS) and its use."""

    shape: tuple[int, ...]
    kind: str
    active_numel: int  # elements that one token uses: all, but for experts that it is not sent to

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@functools.lru_cache(maxsize=32)
def parameter_table(config: Config) -> dict[str, ParameterSpec]:
    """Every parameter of the model, by name, in the order of `model.named_parameters()`.

    This is the one place that knows shapes without building the model: parameter counts, FLOPs,
    the planner's bytes, the optimizers' groups and the names of an export derive from it. The
    result is cached: do not change it.
    """
    embedding = _parameter("embedding", config.vocab_size, config.d_model)
    table = {"embedding.weight": embedding}
    blocks = {}  # the blocks of a kind have the same parameters: they are listed once
    for layer in range(config.n_layers):
        moe = config.is_moe(layer)
        if moe not in blocks:
            blocks[moe] = block_parameters(config, layer)
        for name, spec in blocks[moe].items():
            table[f"blocks.{layer}.{name}"] = spec
    table["norm.weight"] = _parameter("norms", config.d_model)
    if not config.tie_embeddings:
        table["head.weight"] = _parameter("head", config.vocab_size, config.d_model)
    return table


def block_parameters(config: Config, layer: int) -> dict[str, ParameterSpec]:
    """The parameters of block `layer`, by their names in the block."""
    d_model = config.d_model
    q_width = config.n_heads * config.head_dim
    kv_width = config.n_kv_heads * config.head_dim
    table = {
        "attention_norm.weight": _parameter("norms", d_model),
        "attention.q.weight": _parameter("attention", q_width, d_model),
        "attention.k.weight": _parameter("attention", kv_width, d_model),
        "attention.v.weight": _parameter("attention", kv_width, d_model),
        "attention.o.weight": _parameter("attention", d_model, q_width),
        "attention.q_norm.weight": _parameter("norms", config.head_dim),
        "attention.k_norm.weight": _parameter("norms", config.head_dim),
        "ffn_norm.weight": _parameter("norms", d_model),
    }
    if config.is_moe(layer):
        table["ffn.router.weight"] = _parameter("router", config.num_experts, d_model)
    for ffn in config.feed_forwards(layer):
        table[f"{ffn.name}.gate_up"] = _feed_forward_parameter(ffn, 2, ffn.d_ff, d_model)
        table[f"{ffn.name}.down"] = _feed_forward_parameter(ffn, d_model, ffn.d_ff)
    return table


def _parameter(kind: str, *shape: int) -> ParameterSpec:
    """A parameter that every token uses."""
    return ParameterSpec(shape, kind, active_numel=math.prod(shape))


def _feed_forward_parameter(ffn: FeedForward, *shape: int) -> ParameterSpec:
    """A parameter of `shape` in each network of `ffn`; those of experts are stacked."""
    if ffn.kind == "experts":
        shape_of_bank = (ffn.num_experts, *shape)
    else:
        shape_of_bank = shape
    return ParameterSpec(shape_of_bank, ffn.kind, active_numel=ffn.top_k * math.prod(shape))


# ---------------------------------------------------------------- optimizers

# Muon's matrices are hidden ones. The head is none: it does not write to the hidden state.
MUON_KINDS = ("attention", "dense_ffn", "experts")


@dataclass(frozen=True)
class OptimizerGroup:
    """The parameters of one optimizer, how it treats them, and what its state takes."""

    parameters: tuple[str, ...]  # names, in the order of the parameter table
    peak_lr: float
    weight_decay: float
    state_bytes: dict[str, int]  # bytes of an element in each state tensor
    memory_key: str  # of its state in memory tables and in the JSON of `plan`
    label: str  # of its state in tables that people read
    orthogonalizes: bool  # updates whole matrices, and needs workspace for their Gram matrices

    @property
    def state_bytes_per_element(self) -> int:
        return sum(self.state_bytes.values())


def optimizer_groups(config: Config) -> dict[str, OptimizerGroup]:
    """The optimizers by name, with every parameter in exactly one of them; Muon's may be empty."""
    hidden = []
    others = []
    for name, spec in parameter_table(config).items():
        if config.optimizer == "muon" and spec.kind in MUON_KINDS:
            hidden.append(name)
        else:
            others.append(name)
    return dict(
        muon=OptimizerGroup(
            parameters=tuple(hidden),
            peak_lr=config.muon_lr,
            weight_decay=config.weight_decay,
            # bf16 beside 16-bit weights (fp16 would under- and overflow), fp32 beside fp32 weights
            state_bytes=dict(momentum=2 if config.split_masters else 4),
            memory_key="momentum",
            label="Muon momentum",
            orthogonalizes=True,
        ),
        adamw=OptimizerGroup(
            parameters=tuple(others),
            peak_lr=config.adamw_lr,
            weight_decay=config.weight_decay,  # of matrices; AdamW does not decay vectors (norms)
            state_bytes=dict(exp_avg=4, exp_avg_sq=4),
            memory_key="adamw",
            label="AdamW moments",
            orthogonalizes=False,
        ),
    )


# ---------------------------------------------------------------- presets

# What all presets have in common.
_COMMON = dict(
    batch_size=4,
    gradient_accumulation_steps=8,
    max_steps=50_000,
    muon_lr=0.01,
    adamw_lr=0.001,
    warmup_fraction=0.05,
    grad_clip=1.0,
    eval_every=500,
    save_every=5000,
    num_experts=8,
    top_k=2,
    max_seq_len=4096,
    vocab_size=49152,
    n_kv_heads=0,
)

# What a preset names wins over a default edited in Config; what it does not name keeps the default.
#
# "18b" is the shipped configuration. It names every field that any preset names, with its shipped
# value: a default that differs from it was edited (see `edited_defaults`).
PRESETS: dict[str, dict] = {
    "18b": dict(
        _COMMON,
        d_model=4096,
        n_layers=40,
        n_heads=32,
        d_ff=11008,
        moe_every=4,
        eval_steps=20,
        log_every=10,
        activation_checkpointing="auto",
        precision="fp16",
        data="python",
        sample_tokens=200,
    ),
    "5b": dict(_COMMON, d_model=2048, n_layers=32, n_heads=16, d_ff=5504, moe_every=2),
    "2b": dict(_COMMON, d_model=1536, n_layers=24, n_heads=12, d_ff=4096, moe_every=3),
    "25b": dict(
        _COMMON,
        d_model=5120,
        n_layers=48,
        n_heads=40,
        d_ff=13824,
        moe_every=8,
        batch_size=2,
    ),
    "18b_every_block": dict(
        _COMMON,
        d_model=4096,
        n_layers=40,
        n_heads=32,
        d_ff=3840,
        moe_every=1,
    ),
    "small": dict(
        _COMMON,
        d_model=768,
        n_layers=12,
        n_heads=12,
        d_ff=1280,
        moe_every=1,
        max_seq_len=1024,
        vocab_size=32768,
        batch_size=16,
        gradient_accumulation_steps=4,
        max_steps=500,
        eval_every=100,
        save_every=250,
        activation_checkpointing="auto",
        data="installed",
    ),
    "tiny": dict(
        _COMMON,
        d_model=128,
        n_layers=4,
        n_heads=4,
        d_ff=256,
        moe_every=1,
        max_seq_len=256,
        vocab_size=4096,
        batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=250,
        muon_lr=0.02,
        adamw_lr=0.003,
        eval_every=50,
        eval_steps=8,
        log_every=5,
        save_every=100,
        activation_checkpointing="none",
        precision="fp32",
        sample_tokens=100,
    ),
}

# Without --preset: the smallest GPU memory (GB, 1e9 bytes) for each preset, largest first.
#
# 18b is for B200 and H200, with offload where needed; 5b is for cards of 80 GB, and 2b for those of
# 40 GB. Smaller cards have the largest of 2b, small and tiny that fits without offload: 22 and 7 GB
# are what these presets take with `full` checkpointing. `25b` is never chosen: it is for those who
# request it.
PRESET_BY_GPU_MEMORY = [(130, "18b"), (70, "5b"), (22, "2b"), (7, "small"), (0, "tiny")]


def preset_values(name: str) -> dict:
    """The fields that a preset sets. Raises ConfigError for an unknown preset or field."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}.{nearest(name, PRESETS)} Presets: {', '.join(PRESETS)}"
        )
    for field in PRESETS[name]:
        if field not in defaults():
            raise ConfigError(
                f"{field}: preset {name} in config.py sets it, and Config has no such field."
                f"{nearest(field, defaults())} Correct its name in config.py."
            )
    return PRESETS[name]


# ---------------------------------------------------------------- bounds of temporary memory

# They are shared by what computes and by what predicts memory.
LOSS_CHUNK = 2048  # tokens whose logits exist at a time
OPTIMIZER_BUCKET = 2**28  # elements that an optimizer updates at a time; one matrix may be larger

# ---------------------------------------------------------------- targets

# The target of a token that fills up the last batch of a validation. No loss counts it. The number
# is that of PyTorch's cross_entropy.
IGNORED_TARGET = -100


# ---------------------------------------------------------------- fields as options


def defaults() -> dict:
    """The defaults of Config as they stand in this file, edited or not."""
    return {f.name: f.default for f in dataclasses.fields(Config)}


# Cached: each new Config is checked, and looking the types up takes longer than all its checks.
@functools.cache
def field_types() -> dict[str, typing.Any]:
    """The type of each field of Config."""
    return typing.get_type_hints(Config)


def field_docs() -> dict[str, str]:
    """Each field's documentation: the string literal that follows it in the class body."""
    [definition] = ast.parse(inspect.getsource(Config)).body
    assert isinstance(definition, ast.ClassDef)
    body = definition.body
    docs = {}
    for statement, following in zip(body, body[1:]):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr)):
            continue
        assert isinstance(statement.target, ast.Name)
        text = ast.literal_eval(following.value)
        docs[statement.target.id] = " ".join(text.split())
    return docs


def parse_value(name: str, text: str):
    """The value of field `name`, written as text on a command line.

    Raises ConfigError when the text does not fit the field's type.
    """
    kind = field_types()[name]
    if typing.get_origin(kind) is Literal:
        return _parse_choice(name, text, typing.get_args(kind))
    try:
        if kind in (bool, bool | None):
            return _BOOLEANS[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        return kind(text)
    except (KeyError, ValueError):
        expected = {int: "a whole number", float: "a number"}.get(kind, "true or false")
        raise ConfigError(f"{name}: {text!r} is not {expected}") from None


_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _parse_choice(name: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        # Two of three letters in common are too few for a guess: the device gpu is not cpu.
        guess = nearest(text, choices, cutoff=0.7)
        raise ConfigError(f"{name}: {text!r} is not one of {', '.join(choices)}.{guess}")
    return text


def expanded(path: str) -> Path:
    """The path with ~ and ~USER replaced by home folders; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user
        return Path(path)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """' Did you mean X?', or an empty string when no known name is like this one.

    Known names that begin with this one come first, when they are at most three; else the name that
    is most similar, if its similarity is at least `cutoff`, a share of the letters.
    """
    known = list(known)
    close = [other for other in known if name and other.startswith(name)]
    if not 1 <= len(close) <= 3:
        close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    if not close:
        return ""
    return f" Did you mean {' or '.join(close)}?"


# ---------------------------------------------------------------- resolving a configuration


def resolve(
    options: dict, preset: str | None, gpu_memory_gb: float | None
) -> tuple[Config, str, str]:
    """Builds the configuration by precedence: options, preset, edited defaults, GPU memory.

    `options` are the command line's. A `preset` wins over defaults edited in this file, and these
    over the preset for a GPU of `gpu_memory_gb` (1e9 bytes; None without one).

    Returns (config, the preset's name or "config.py", why it was chosen). Raises ConfigError.
    """
    name, why = _choose_preset(preset, gpu_memory_gb)
    if name == "config.py":
        values = {}
        source = name
    else:
        values = preset_values(name)
        source = f"preset {name} in config.py"
    # Only --preset replaces edited defaults: with them, no preset is chosen by GPU memory.
    replaced = [field for field in edited_defaults() if field in values and field not in options]
    if replaced:
        why += _replaced_defaults_message(replaced, values)
    try:
        config = Config(**{**values, **options})
    except ConfigError as error:
        raise ConfigError(
            f"{error}\n"
            f"The values are those of {source} and of the command line: correct them there."
        ) from None
    eval_sequences = _eval_sequences(config, values, options)
    return dataclasses.replace(config, eval_sequences=eval_sequences), name, why


def _eval_sequences(config: Config, preset: dict, options: dict) -> int:
    """How many sequences are validated: by eval_sequences, or else by eval_steps.

    The batch_size that eval_steps multiplies is that of the preset, or of the defaults without a
    preset. It is not the command line's: a smaller micro-batch, chosen to save memory, validates
    the same text.
    """
    given = config.eval_sequences
    if "eval_steps" in options and "eval_sequences" not in options:
        given = 0  # the option wins over eval_sequences in a preset or in an edited default
    batch_size = preset.get("batch_size", defaults()["batch_size"])
    return given or config.eval_steps * batch_size


def edited_defaults() -> list[str]:
    """The fields whose default in Config was edited, of those that presets name.

    A field that no preset names has no part in the choice of a preset, edited or not.
    """
    shipped = preset_values("18b")  # the shipped value of every field that any preset names
    edited = []
    for name, value in defaults().items():
        if name in shipped and value != shipped[name]:
            edited.append(name)
    return edited


def _choose_preset(preset: str | None, gpu_memory_gb: float | None) -> tuple[str, str]:
    """(name of a preset or "config.py", why)."""
    if preset:
        return preset, "chosen with --preset"
    edited = edited_defaults()
    if edited:
        return "config.py", _edited_defaults_message(edited, gpu_memory_gb)
    memory_gb = gpu_memory_gb or 0
    least_gb, name = next(row for row in PRESET_BY_GPU_MEMORY if memory_gb >= row[0])
    if not gpu_memory_gb:
        return name, "no GPU was found"
    why = f"the GPU has {gpu_memory_gb:.0f} GB"
    if least_gb:
        why += f", and {name} is for {least_gb} GB and more"
    return name, why


def _edited_defaults_message(edited: list[str], gpu_memory_gb: float | None) -> str:
    message = (
        f"its defaults were edited ({', '.join(edited)}), so no preset was chosen by GPU memory; "
        "--preset NAME chooses one"
    )
    if not gpu_memory_gb:
        message += (
            ". No GPU was found, and the defaults that were not edited are the 18b model's: "
            "--preset tiny trains on a CPU and keeps edits that it does not name"
        )
    return message


def _replaced_defaults_message(fields: list[str], values: dict) -> str:
    words = [f"{field} is {values[field]}, not {defaults()[field]}" for field in fields]
    return "; it replaces defaults that were edited in config.py: " + ", ".join(words)


# ---------------------------------------------------------------- resuming a configuration

# What a resumed run may not change: the shape of the model, the form of its state, and which
# sequences come when.
FROZEN = {
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "d_ff",
    "num_experts",
    "top_k",
    "norm_topk_prob",
    "moe_every",
    "max_seq_len",
    "vocab_size",
    "tie_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "init_std",
    "optimizer",
    "load_balancing",
    "precision",
    "master_weights",
    "loss_scale",
    "end_of_text",
    "validation_fraction",
    "seed",
}


def resumed_config(saved: dict, options: dict) -> tuple[Config, list[str]]:
    """The checkpoint's configuration with the command line's changes, and those changes in words.

    A field that is newer than the checkpoint has its default, but eval_sequences is what the
    checkpoint's run validated. Raises ConfigError for changes to the shape of the model, to its
    state or to the data order.
    """
    before, config = _before_and_after(saved, options)
    changed = _changed(before, config, options)
    refused = [
        f"{name}: the checkpoint has {getattr(before, name)}, not {getattr(config, name)}"
        for name in changed
        if name in FROZEN
    ]
    if config.sequences_per_step != before.sequences_per_step:
        refused.append(
            "batch_size x gradient_accumulation_steps: the checkpoint has "
            f"{before.sequences_per_step} sequences a step, not {config.sequences_per_step}"
        )
    if refused:
        raise ConfigError(
            "a resumed run keeps its model and its data order:\n  "
            + "\n  ".join(refused)
            + "\nLeave these options out, or start a new run with another --save_dir. An imported "
            "model is imported again with them."
        )
    return config, _changes_in_words(before, config, changed)


def restarted_config(saved: dict, options: dict) -> tuple[Config, list[str]]:
    """`resumed_config` of a run that starts again at its first step: any field may change."""
    before, config = _before_and_after(saved, options)
    return config, _changes_in_words(before, config, _changed(before, config, options))


def _before_and_after(saved: dict, options: dict) -> tuple[Config, Config]:
    known = {name: saved[name] for name in defaults() if name in saved}
    before = Config(**known)
    before = dataclasses.replace(before, eval_sequences=before.validation_sequences)
    options = _with_eval_sequences(before, options)
    known["eval_sequences"] = before.eval_sequences
    return before, Config(**{**known, **options})


def _changed(before: Config, config: Config, options: dict) -> list[str]:
    """The names of the fields that differ, of those that `options` set."""
    options = _with_eval_sequences(before, options)
    return [name for name in sorted(options) if getattr(config, name) != getattr(before, name)]


def _changes_in_words(before: Config, config: Config, changed: list[str]) -> list[str]:
    return [f"{name}: {getattr(before, name)} -> {getattr(config, name)}" for name in changed]


def _with_eval_sequences(before: Config, options: dict) -> dict:
    """The options of a resumed run, with eval_sequences where eval_steps implies another number.

    A checkpoint does not name its preset. Its number of sequences per evaluation step stands for
    the preset's batch_size: with half the eval_steps, half of the sequences are validated.
    """
    options = dict(options)
    if not options.get("eval_sequences"):
        options.pop("eval_sequences", None)
        if "eval_steps" in options:
            share = options["eval_steps"] / before.eval_steps
            options["eval_sequences"] = max(1, round(share * before.eval_sequences))
    return options


# ---------------------------------------------------------------- checks of the values

AT_LEAST_1 = (
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "d_ff",
    "moe_every",
    "top_k",
    "max_seq_len",
    "batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "eval_every",
    "eval_steps",
    "log_every",
    "keep_checkpoints",
    "loss_scale",
    "loss_scale_growth_interval",
)
NOT_NEGATIVE = (
    "num_experts",
    "load_balancing_weight",
    "router_z_loss_weight",
    "weight_decay",
    "grad_clip",
    "save_every",
    "save_minutes",
    "num_workers",
    "host_memory_gb",
    "eval_sequences",
    "sample_tokens",
    "muon_lr",
    "adamw_lr",
    "seed",
    "max_characters",
)
POSITIVE = ("rope_theta", "rms_norm_eps", "adamw_eps", "init_std", "load_balancing_bias_rate")
# The largest values of whole numbers: far more than anyone trains on one GPU. Larger ones are slips
# of the keyboard, and a run or a plan with them would never end.
AT_MOST = dict(
    d_model=2**17,
    n_layers=1024,
    n_heads=2**14,
    n_kv_heads=2**14,
    d_ff=2**20,
    num_experts=2**14,
    top_k=2**14,
    moe_every=1024,
    max_seq_len=2**24,
    vocab_size=2**24,
    batch_size=2**16,
    gradient_accumulation_steps=2**20,
    max_steps=10**10,
    num_workers=1024,
    max_characters=10**15,
    seed=2**43 - 1,
)
AT_MOST_OTHERWISE = 10**10
# The same for all other numbers. fp32 holds numbers up to 3.4e38.
FLOAT_AT_MOST = 1e30
DECAYS = ("muon_momentum", "adamw_beta1", "adamw_beta2")
SHARES = ("warmup_fraction", "min_lr_fraction", "max_bad_share")


def _problems(c: Config) -> list[str]:
    """Everything that makes the configuration impossible, each with its remedy."""
    wrong_types = _wrong_types(c)
    if wrong_types:  # the other checks need the right types
        return wrong_types
    too_large = _too_large(c)
    if too_large:  # the other checks would show these numbers again
        return too_large
    return [*_out_of_range(c), *_impossible_memory(c), *_impossible_shapes(c), *_impossible_moe(c)]


def _wrong_types(c: Config) -> list[str]:
    kinds = field_types()
    found = []
    for field in dataclasses.fields(Config):
        value = getattr(c, field.name)
        remedy = _type_remedy(kinds[field.name], value, may_be_empty=field.default == "")
        if remedy:
            found.append(f"{field.name}={value!r}: {remedy}")
    return found


def _type_remedy(kind, value, may_be_empty: bool) -> str:
    """What to give instead of a value that is not of this kind; empty for one that is."""
    is_bool = isinstance(value, bool)  # which Python counts as a number
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        right = value in choices
        remedy = f"choose one of {', '.join(choices)}"
    elif kind is float:
        right = isinstance(value, (int, float)) and not is_bool and math.isfinite(value)
        remedy = "give a finite number"
    elif kind is int:
        right = isinstance(value, int) and not is_bool
        remedy = "give a whole number"
    elif kind in (bool, bool | None):
        right = is_bool
        remedy = "give true or false"
    else:
        right = isinstance(value, str) and (value != "" or may_be_empty)
        remedy = "give a text that is not empty"
    return "" if right else remedy


def _out_of_range(c: Config) -> list[str]:
    rules = [
        (AT_LEAST_1, lambda x: x >= 1, "must be at least 1"),
        (NOT_NEGATIVE, lambda x: x >= 0, "must not be negative"),
        (POSITIVE, lambda x: x > 0, "must be greater than 0"),
        (DECAYS, lambda x: 0 <= x < 1, "must lie in [0, 1)"),
        (SHARES, lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
        (["validation_fraction"], lambda x: 0 < x <= 0.5, "must lie in (0, 0.5]"),
        (
            ["vocab_size"],
            lambda x: x >= 260,
            "must be at least 260 (256 bytes and the special tokens)",
        ),
    ]
    found = []
    for names, is_right, words in rules:
        for name in names:
            value = getattr(c, name)
            if not is_right(value):
                found.append(f"{name}={value}: {words}")
    return found


def _too_large(c: Config) -> list[str]:
    """Numbers that exceed their bound."""
    found = []
    for name, kind in field_types().items():
        value = getattr(c, name)
        if kind is float and value > FLOAT_AT_MOST:
            found.append(f"{name}={_shown(value)}: must be at most {FLOAT_AT_MOST:g}")
        if kind is not int:
            continue
        most = AT_MOST.get(name, AT_MOST_OTHERWISE)
        follows = name == "n_kv_heads" and value == c.n_heads  # then n_heads is the one to name
        if value > most and not follows:
            found.append(f"{name}={_shown(value)}: must be at most {most:,}")
    return found


def _shown(value: float) -> str:
    """The value as a message shows it: a number of very many digits by its first ones."""
    text = str(value)
    if len(text) <= 24:
        return text
    return f"{text[:20]}... ({len(text)} digits)"


def _impossible_memory(c: Config) -> list[str]:
    found = []
    for name in ("lighter_blocks", "host_gradient_blocks"):
        if not 0 <= getattr(c, name) <= c.n_layers:
            found.append(f"{name}={getattr(c, name)}: must lie in [0, n_layers]")
    if c.host_gradient_blocks and c.offload_optimizer == "false":
        found.append(
            f"host_gradient_blocks={c.host_gradient_blocks}: needs --offload_optimizer true, as "
            "the optimizer reads these gradients together with its state"
        )
    return found


def _impossible_shapes(c: Config) -> list[str]:
    found = []
    if c.n_heads >= 1:
        # rotary positions turn pairs of a head's dimensions
        if c.d_model % c.n_heads != 0 or c.d_model // c.n_heads % 2 != 0:
            found.append(
                f"d_model={c.d_model}, n_heads={c.n_heads}: d_model / n_heads must be an even "
                "whole number; change n_heads or d_model"
            )
        if c.n_kv_heads >= 1 and c.n_heads % c.n_kv_heads != 0:
            found.append(
                f"n_kv_heads={c.n_kv_heads}: must divide n_heads={c.n_heads}; "
                "0 means as many as n_heads"
            )
    if c.d_model % 8 != 0 or c.d_ff % 8 != 0:
        found.append(
            f"d_model={c.d_model}, d_ff={c.d_ff}: must be multiples of 8 "
            "(grouped matmuls need rows of 16 bytes)"
        )
    return found


def _impossible_moe(c: Config) -> list[str]:
    if c.num_experts <= 0:
        return []
    found = []
    if c.top_k > c.num_experts:
        found.append(f"top_k={c.top_k}: must not exceed num_experts={c.num_experts}")
    if c.moe_every > c.n_layers:
        found.append(
            f"moe_every={c.moe_every}: larger than n_layers={c.n_layers}, so no block would be "
            "an MoE block; lower it, or set num_experts=0 for a dense model"
        )
    # A model with one expert may have norm_topk_prob: its router has nothing to choose or learn.
    if c.top_k == 1 and c.norm_topk_prob and c.num_experts > 1:
        found.append(
            "norm_topk_prob=true with top_k=1: the weight of the one chosen expert would always be "
            "1, so the router would never learn; set it to false"
        )
    return found
