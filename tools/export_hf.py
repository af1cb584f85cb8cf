"""Writes a checkpoint as a Hugging Face folder, Qwen3MoeForCausalLM, that other tools open.

    python -m tools.export_hf --checkpoint runs/my/checkpoint_latest.pt --out my_model
    python -m tools.export_hf --checkpoint runs/my/checkpoint_latest.pt --out my_model --dtype fp32

With --dtype fp32 the weights are the exact fp32 masters; bf16 and fp16 are rounded from them. About
a million numbers are converted and written at a time. The folder gets its name when it is complete.
An export that was killed leaves a folder OUT.XXXXXXXX.unfinished.
"""

import dataclasses
import json
import math
import os
import shutil
import struct
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if __name__ == "__main__":  # before the imports below: slow, and they fail without their packages
    from cli import exit_at_a_wrong_path
    from config import explain_missing_packages

    explain_missing_packages()
    exit_at_a_wrong_path(sys.argv[1:], out_is_new=True)

import torch
from torch import Tensor

from cli import check_empty_or_new, exit_code, new_parser
from config import Config, ConfigError, ExperimentError, resumed_config
from corpus.sources import BUILT_IN
from corpus.tokenizer import load_tokenizer
from engine.precision import decode_master
from model import COMPUTE_DTYPE
from planner.machine import GB
from record import checkpoint
from record.results import Record
from tools.qwen3_moe import (
    ARCHITECTURE,
    DTYPES,
    QwenTensor,
    no_place_message,
    qwen_rows,
    qwen_tensors,
    to_hugging_face,
)

# Numbers of a tensor that are converted and written at a time.
BLOCK = 2**20

# Fields of Config that describe the machine of the run, and not the model.
NOT_IN_THE_CARD = {
    "data",
    "tokenizer",
    "cache_dir",
    "save_dir",
    "device",
    "host_memory_gb",
    "num_workers",
}


class Masters:
    """The fp32 masters of a checkpoint's `state`, read in blocks of rows.

    The master of a 16-bit weight is the weight together with its low bits, which the optimizer
    state holds under the key "residual". A weight without low bits is its own master.
    """

    def __init__(self, state: dict, config: Config):
        self.weights = state["model"]
        self.head_dim = config.head_dim
        self.low_bits: dict[str, Tensor] = {}
        for name, tensors in checkpoint.optimizer_tensors(state).items():
            if "residual" in tensors:
                self.low_bits[name] = tensors["residual"]

    def blocks(self, tensor: QwenTensor) -> Iterator[Tensor]:
        """Yields the tensor in fp32, block after block of its rows, in the order of Qwen3-MoE.

        A block has at most BLOCK numbers, unless one row has more.
        """
        weight = self.weights[tensor.parameter][tensor.index]
        low_bits = self.low_bits.get(tensor.parameter)
        if low_bits is not None:
            low_bits = low_bits[tensor.index]
        row_numel = weight.numel() // len(weight)
        rows_per_block = max(1, BLOCK // row_numel)
        for rows in self._rows(tensor, len(weight), rows_per_block):
            if low_bits is None:
                yield weight[rows].float()
            else:
                yield decode_master(weight[rows], low_bits[rows])

    def _rows(
        self, tensor: QwenTensor, num_rows: int, rows_per_block: int
    ) -> Iterator[Tensor | slice]:
        """Which rows of the checkpoint's weight each block has.

        Rotary tensors have their rows in another order in Qwen3-MoE. The rows of the others are
        slices, which copy nothing; indexing with a tensor would copy the rows.
        """
        if tensor.rotary:
            yield from qwen_rows(num_rows, self.head_dim).split(rows_per_block)
            return
        for start in range(0, num_rows, rows_per_block):
            yield slice(start, start + rows_per_block)


def export(state: dict, metrics: dict, out: Path, dtype: str, shard_bytes: int) -> None:
    """Writes a checkpoint's state as the Hugging Face folder `out`, which must be empty or new.

    `metrics` are figures for the model card. `dtype` is a precision of Config. Raises
    ExperimentError when the format cannot hold the model, the folder cannot be written, or a weight
    does not fit the dtype.
    """
    config, _ = resumed_config(state["config"], {})
    tensors = exported_tensors(state, config)
    check_empty_or_new(str(out))
    # The folder is written beside `out`, on the same disk, so that renaming it at the end is one
    # step of the file system.
    unfinished = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        check_free_space(unfinished, out, config.total_params * COMPUTE_DTYPE[dtype].itemsize)
        write_descriptions(unfinished, state, config, dtype)
        write(unfinished / "README.md", model_card(state, config, metrics, out.name, dtype))
        write_weights(unfinished, Masters(state, config), tensors, dtype, shard_bytes)
        unfinished.replace(out)
    except OSError as error:
        raise ExperimentError(
            f"the folder {out} was not written: {error.strerror or error}. Free some space or "
            "choose another --out"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def exported_tensors(state: dict, config: Config) -> list[QwenTensor]:
    """The tensors to write.

    Raises ExperimentError when the format has no tensor for a part of the model: the exported model
    would compute something else.
    """
    if config.n_moe_layers and config.load_balancing == "bias":
        raise ExperimentError(
            "the model was trained with load_balancing=bias, and Qwen3-MoE's format has no place "
            "for the biases by which its experts are chosen. Train with load_balancing=loss to "
            "export"
        )
    tensors = qwen_tensors(config)
    written = {tensor.parameter for tensor in tensors}
    lost = [name for name in state["model"] if name not in written]
    if lost:
        raise ExperimentError(no_place_message(lost))
    return tensors


def check_free_space(folder: Path, out: Path, needed: int) -> None:
    """Raises ExperimentError unless `needed` bytes are free on the disk of `folder`.

    `folder` is the unfinished folder. The message names the folder of `out`, which the user gave.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExperimentError(
            f"not enough disk space: the folder takes {needed / GB:.2f} GB and {free / GB:.2f} GB "
            f"are free in {out.parent}. Free some, choose another --out, or a 16-bit --dtype"
        )


def write_descriptions(folder: Path, state: dict, config: Config, dtype: str) -> None:
    """Writes the JSON files beside the weights: the model's shape, how to sample, the tokenizer."""
    tokenizer, end_of_text = load_tokenizer(state["tokenizer_json"], config.end_of_text)
    token = tokenizer.id_to_token(end_of_text)
    # transformers wants a token for padding. Our tokenizers have none, and any token does. Padding
    # after a text changes nothing, as attention is causal. Padding before a text is masked by the
    # attention mask that transformers' tokenizer returns. `generate` must be given that mask: it
    # cannot tell padding by itself when the padding token is also end-of-text.
    generation = dict(
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        do_sample=True,
        temperature=0.8,
        top_k=50,
    )
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token=token,
        pad_token=token,
        model_max_length=config.max_seq_len,
        clean_up_tokenization_spaces=False,
        # In training, "<|endoftext|>" written in a document was ordinary text.
        split_special_tokens=True,
    )
    write_json(folder / "config.json", to_hugging_face(config, end_of_text, dtype))
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write(folder / "tokenizer.json", as_in_training(state["tokenizer_json"]))


def as_in_training(tokenizer_json: str) -> str:
    """The tokenizer.json of a tokenizer that gives a text the ids that training gave it.

    Training adds no token to a text, cuts nothing off and does not pad. A post-processor adds
    tokens, such as one at the beginning, so it is left out. A tokenizer that does none of it stays
    as it is, byte for byte.
    """
    facts = json.loads(tokenizer_json)
    additions = ("post_processor", "truncation", "padding")
    if not any(facts.get(name) and not only_moves_offsets(facts[name]) for name in additions):
        return tokenizer_json
    for name in additions:
        facts[name] = None
    return json.dumps(facts, indent=2, ensure_ascii=False)


def only_moves_offsets(part: dict) -> bool:
    """Whether a post-processor changes where tokens lie in the text, and not the tokens."""
    return part.get("type") == "ByteLevel"


def write_json(path: Path, content: dict) -> None:
    write(path, json.dumps(content, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Writes a new file. Its bytes are on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- safetensors

SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_weights(
    folder: Path, masters: Masters, tensors: list[QwenTensor], dtype: str, shard_bytes: int
) -> None:
    """Writes model.safetensors, or several shards and an index that names the file of each tensor.

    A shard has at most `shard_bytes` bytes. A single tensor that is larger has a shard of its own.
    """
    torch_dtype = COMPUTE_DTYPE[dtype]
    shards = cut_into_shards(tensors, torch_dtype.itemsize, shard_bytes)
    file_of = {}
    for number, shard in enumerate(shards, 1):
        name = shard_name(number, len(shards))
        print(f"{number} of {len(shards)}: {name}", flush=True)
        with open(folder / name, "xb") as file:
            write_shard(file, masters, shard, torch_dtype)
            file.flush()
            os.fsync(file.fileno())
        for tensor in shard:
            file_of[tensor.name] = name
    if len(shards) > 1:
        numel = sum(math.prod(tensor.shape) for tensor in tensors)
        metadata = dict(total_parameters=numel, total_size=numel * torch_dtype.itemsize)
        index = dict(metadata=metadata, weight_map=file_of)
        write_json(folder / "model.safetensors.index.json", index)


def cut_into_shards(
    tensors: list[QwenTensor], itemsize: int, shard_bytes: int
) -> list[list[QwenTensor]]:
    """The tensors of each shard, in their order. `itemsize` is the bytes of one number."""
    shards: list[list[QwenTensor]] = [[]]
    size = 0  # bytes of the last shard
    for tensor in tensors:
        n_bytes = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += n_bytes
    return shards


def shard_name(number: int, of: int) -> str:
    if of == 1:
        return "model.safetensors"
    return f"model-{number:05}-of-{of:05}.safetensors"


def write_shard(
    file: BinaryIO, masters: Masters, shard: list[QwenTensor], dtype: torch.dtype
) -> None:
    """Writes a file in the safetensors format.

    The safetensors library would need the whole shard in memory. The format is: the length of the
    header (8 bytes, little-endian), the header in JSON, and the bytes of the tensors one after the
    other. Raises ExperimentError for a number that the dtype cannot hold.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start = end
        end += math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = dict(
            dtype=SAFETENSORS_DTYPE[dtype],
            shape=list(tensor.shape),
            data_offsets=[start, end],
        )
    text = json.dumps(header).encode()
    # Readers map the file into memory, where a tensor must start at a multiple of its itemsize. So
    # spaces bring the header to a multiple of 8 bytes.
    padding = -len(text) % 8
    text = text.ljust(len(text) + padding)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for tensor in shard:
        for block in masters.blocks(tensor):
            block = block.to(dtype)
            if not block.isfinite().all():
                raise ExperimentError(not_finite_message(tensor.name, SAFETENSORS_DTYPE[dtype]))
            file.write(block.contiguous().view(torch.uint8).numpy())


def not_finite_message(name: str, dtype: str) -> str:
    return (
        f"{name} would hold inf or nan in {dtype}. fp16 ends at 65,504: choose another --dtype, or "
        "an earlier checkpoint if the run had diverged"
    )


# ---------------------------------------------------------------- the model card


def measured(state: dict, folder: Path) -> dict:
    """The run's metrics at the checkpoint.

    A checkpoint is saved before the validation of its step, so it lacks the figures of that
    validation. They come from metrics.jsonl in the checkpoint's folder, if that file is of the same
    run.
    """
    metrics = state["metrics"]
    record = Record(folder)
    record.load(folder, state["step"])
    # A row with the same elapsed_seconds as the checkpoint shows that the file is of its run.
    saved_at = metrics.get("elapsed_seconds")
    is_of_this_run = any(row["elapsed_seconds"] == saved_at for row in record.history)
    if is_of_this_run:
        return metrics | record.latest()
    return metrics


def model_card(state: dict, config: Config, metrics: dict, name: str, dtype: str) -> str:
    """The text of README.md: the model, the run's known figures, and its Config."""
    figures = card_figures(state, config, metrics)
    rows = "\n".join(f"| {what} | {value} |" for what, value in figures.items())
    settings = "\n".join(card_settings(config))
    blocks = f"All {config.n_layers} blocks are dense."
    if config.n_moe_layers:
        blocks = (
            f"{config.n_moe_layers} of {config.n_layers} blocks are Mixture-of-Experts blocks: "
            f"each token is sent to {config.top_k} of {config.num_experts} experts."
        )
    weights = "the training run's fp32 masters"
    if dtype != "fp32":
        weights = f"{DTYPES[dtype]}, rounded from the training run's fp32 masters"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A language model in the Qwen3-MoE format. {blocks} The weights are {weights}.

| | |
|---|---|
{rows}

What the model writes may be false or offensive.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```

It was trained on sequences of {config.max_seq_len:,} tokens. How:

```
{settings}
```
"""  # noqa: E501


def card_settings(config: Config) -> list[str]:
    """A line for each field of Config that describes the model or its training."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if name not in NOT_IN_THE_CARD:
            lines.append(f"{name}: {value}")
    return lines


def card_figures(state: dict, config: Config, metrics: dict) -> dict[str, str]:
    """The rows of the card's table. A figure that is not known has no row."""
    figures = {
        "parameters": f"{config.total_params:,}, {config.active_params:,} active for a token",
        "trained for": (
            f"{state['step']:,} of {config.max_steps:,} steps, {state['tokens_seen']:,} tokens"
        ),
    }
    # There is no hash if the model was imported and has not been trained on any text here.
    text_hash = state["data"]["data_hash"]
    if text_hash:
        figures["training text"] = f"hash {text_hash}"
        # A text that is not built in has a path for a name, which means nothing elsewhere.
        if config.data in BUILT_IN:
            figures["training text"] = f"`{config.data}`, hash {text_hash}"
    if "val_loss" in metrics:
        figures["validation loss"] = f"{metrics['val_loss']:.4f} nats per token"
    if "val_perplexity" in metrics:
        figures["validation perplexity"] = f"{metrics['val_perplexity']:.2f}"
    if "val_accuracy" in metrics:
        figures["validation accuracy"] = f"{metrics['val_accuracy']:.4f}"
    if "train_loss" in metrics:
        figures["training loss"] = f"{metrics['train_loss']:.4f} nats per token"
    if state["train_seconds"]:
        speed = state["tokens_seen"] / state["train_seconds"]
        figures["tokens/s in training"] = f"{speed:,.0f}"
    return figures


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
    parser = new_parser(
        "python -m tools.export_hf --checkpoint PATH --out FOLDER [--dtype bf16|fp16|fp32]", __doc__
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint file of a run")
    parser.add_argument("--out", required=True, help="the folder to make; it must be empty or new")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of the weights [the precision of the run]"
    )
    parser.add_argument(
        "--shard_gb",
        type=float,
        default=5.0,
        help="largest size of a file of weights, in GB [5]",
    )
    args = parser.parse(argv)
    if not 0 < args.shard_gb < math.inf:
        raise ConfigError("--shard_gb must be greater than 0")
    state = checkpoint.load_option(args.checkpoint)
    metrics = measured(state, Path(args.checkpoint).parent)
    dtype = args.dtype or state["config"]["precision"]
    export(state, metrics, Path(args.out).resolve(), dtype, int(args.shard_gb * GB))
    print(f"{args.out}: {ARCHITECTURE} in {dtype}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
