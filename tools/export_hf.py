"""Writes a checkpoint as a Hugging Face folder, Qwen3MoeForCausalLM, that the tools people have open.

    python -m tools.export_hf --checkpoint checkpoints/checkpoint_latest.pt --out my_model
    python -m tools.export_hf --checkpoint checkpoints/checkpoint_latest.pt --out my_model --dtype fp32

fp32 is the exact masters; bf16 and fp16 are rounded from them. The weights are converted and written a few million
numbers at a time. The folder gets its name when it is whole: an export that was cut off is left as OUT.XXXXXXXX.unfinished.
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

import torch
from torch import Tensor

from cli import exit_code, new_parser
from config import Config, ConfigError, ExperimentError, resumed_config
from corpus.sources import BUILT_IN
from corpus.tokenizer import load_tokenizer
from engine.precision import decode_master
from model import COMPUTE_DTYPE, MoETransformer
from planner.machine import GB
from record import checkpoint
from record.results import Record
from tools.qwen3_moe import ARCHITECTURE, DTYPES, Place, places, their_rows, to_hugging_face

BLOCK = 2**20  # numbers converted at a time
NOT_IN_THE_CARD = {
    "data",
    "tokenizer",
    "cache_dir",
    "save_dir",
    "device",
    "host_memory_gb",
    "num_workers",
}  # of one machine


class Masters:
    """The fp32 masters of a checkpoint's `state`, read in blocks of rows under their names."""

    def __init__(self, state: dict, config: Config):
        self.weights, self.head_dim = state["model"], config.head_dim
        optimizer = {**state["optimizer"]["muon"]["state"], **state["optimizer"]["adamw"]["state"]}
        self.residuals = {
            name: tensors["residual"]
            for name, tensors in optimizer.items()
            if "residual" in tensors
        }

    def shape(self, place: Place) -> torch.Size:
        return self.weights[place.parameter].shape[len(place.index) :]

    def blocks(self, place: Place) -> Iterator[Tensor]:
        """The tensor in fp32, at most BLOCK numbers at a time, unless a row is longer."""
        weight = self.weights[place.parameter][place.index]
        residual = (
            self.residuals[place.parameter][place.index]
            if place.parameter in self.residuals
            else None
        )
        rows = their_rows(len(weight), self.head_dim) if place.rotary else torch.arange(len(weight))
        for some in rows.split(max(1, BLOCK * len(weight) // weight.numel())):
            part = slice(some[0], some[-1] + 1) if not place.rotary else some  # a slice is no copy
            yield (
                weight[part].float()
                if residual is None
                else decode_master(weight[part], residual[part])
            )


def export(state: dict, metrics: dict, out: Path, dtype: str, shard_bytes: int) -> None:
    """Makes the folder `out`, which must be empty or new, of a checkpoint's state; `metrics` are for the model card, `dtype`
    is named as in Config.

    Raises ExperimentError when the format cannot hold the model, the folder cannot be written or a weight does not fit the dtype.
    """
    config, _ = resumed_config(state["config"], {})
    if config.n_moe_layers and config.load_balancing == "bias":
        raise ExperimentError(
            "the model was trained with load_balancing=bias, and Qwen3-MoE's format has no place for the biases by "
            "which its experts are chosen. Train with load_balancing=loss to export"
        )
    tokenizer, end_of_text = load_tokenizer(state["tokenizer_json"])
    with torch.device("meta"):
        model = MoETransformer(dataclasses.replace(config, activation_checkpointing="none"))
    all_places = [place for name, p in model.named_parameters() for place in places(name, p.shape)]
    masters = Masters(state, config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExperimentError(
            f"--out {out} is there already and no empty folder. Nothing is written over: choose another, or "
            "delete it"
        )
    unfinished = out.with_name(f"{out.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        needed, free = (
            config.total_params * COMPUTE_DTYPE[dtype].itemsize,
            shutil.disk_usage(unfinished).free,
        )
        if free < needed:
            raise ExperimentError(
                f"not enough disk space: the folder takes {needed / GB:.2f} GB and "
                f"{free / GB:.2f} GB are free in {out.parent}. Free some, choose another --out, or a "
                "16-bit --dtype"
            )
        write_weights(unfinished, masters, all_places, dtype, shard_bytes)
        token = tokenizer.id_to_token(end_of_text)
        write(unfinished / "config.json", to_hugging_face(config, end_of_text, dtype))
        write(
            unfinished / "generation_config.json",
            dict(
                eos_token_id=end_of_text,
                pad_token_id=end_of_text,
                do_sample=True,
                temperature=0.8,
                top_k=50,
            ),
        )
        write(
            unfinished / "tokenizer_config.json",
            dict(
                tokenizer_class="PreTrainedTokenizerFast",
                eos_token=token,
                pad_token=token,
                model_max_length=config.max_seq_len,
                clean_up_tokenization_spaces=False,
            ),
        )
        write(unfinished / "tokenizer.json", state["tokenizer_json"])
        write(unfinished / "README.md", model_card(state, config, metrics, out.name, dtype))
        os.replace(unfinished, out)
    except OSError as error:
        raise ExperimentError(
            f"the folder {out} was not written: {error.strerror or error}. Free some space or choose another "
            "--out"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write(path: Path, content: str | dict) -> None:
    """A text, or a dict as JSON; on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(
            (content if isinstance(content, str) else json.dumps(content, indent=2) + "\n").encode()
        )
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- safetensors


def write_weights(
    folder: Path, masters: Masters, all_places: list[Place], dtype: str, shard_bytes: int
) -> None:
    """model.safetensors, or shards of at most shard_bytes (a single tensor may be larger) and their index."""
    shards, size = [], math.inf
    for place in all_places:
        n_bytes = masters.shape(place).numel() * COMPUTE_DTYPE[dtype].itemsize
        if size + n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += n_bytes
    where = {}
    for number, shard in enumerate(shards, 1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        print(f"{number} of {len(shards)}: {name}", flush=True)
        with open(folder / name, "xb") as file:
            write_shard(file, masters, shard, COMPUTE_DTYPE[dtype])
            file.flush()
            os.fsync(file.fileno())
        where |= {place.name: name for place in shard}
    if len(shards) > 1:
        total = sum(masters.shape(place).numel() for place in all_places)
        write(
            folder / "model.safetensors.index.json",
            dict(
                metadata=dict(
                    total_parameters=total, total_size=total * COMPUTE_DTYPE[dtype].itemsize
                ),
                weight_map=where,
            ),
        )


def write_shard(file: BinaryIO, masters: Masters, shard: list[Place], dtype: torch.dtype) -> None:
    """A file in the safetensors format: the header's length in 8 bytes, the header in JSON, the tensors' bytes. By hand,
    because the library takes whole shards in memory."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    for place in shard:
        shape = masters.shape(place)
        start, end = end, end + shape.numel() * dtype.itemsize
        header[place.name] = dict(dtype=code, shape=list(shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (
        -len(text) % 8
    )  # readers map the tensors, which must lie at multiples of their size
    file.write(struct.pack("<Q", len(text)) + text)
    for place in shard:
        for block in masters.blocks(place):
            block = block.to(dtype)
            if not block.isfinite().all():
                raise ExperimentError(
                    f"{place.name} would hold inf or nan in {code}. fp16 ends at 65,504: choose another --dtype, "
                    "or an earlier checkpoint if the run had diverged"
                )
            file.write(block.contiguous().view(torch.uint8).numpy())


# ---------------------------------------------------------------- the model card


def measured(state: dict, folder: Path) -> dict:
    """The run's metrics at the checkpoint: those that it holds and, when its run's metrics.jsonl is in the folder, those of
    the validation at its step, which came after it was saved."""
    record, metrics = Record(folder), state["metrics"]
    record.load(folder, state["step"])
    if any(
        row["elapsed_seconds"] == metrics.get("elapsed_seconds") for row in record.history
    ):  # it is this run's
        metrics = metrics | record.latest()
    return metrics


def model_card(state: dict, config: Config, metrics: dict, name: str, dtype: str) -> str:
    """README.md with the run's own figures, as far as they are known."""
    c, text = (
        config,
        state["data"]["data_hash"],
    )  # None: imported, and not trained on any text since
    figures = {
        "parameters": f"{c.total_params:,}, {c.active_params:,} active for a token",
        "trained for": f"{state['step']:,} of {c.max_steps:,} steps, {state['tokens_seen']:,} tokens",
        "training text": text
        and (f"`{c.data}`, hash {text}" if c.data in BUILT_IN else f"hash {text}"),
        "validation loss": f"{metrics['val_loss']:.4f} nats per token"
        if "val_loss" in metrics
        else None,
        "validation perplexity": f"{metrics['val_perplexity']:.2f}"
        if "val_perplexity" in metrics
        else None,
        "validation accuracy": f"{metrics['val_accuracy']:.4f}"
        if "val_accuracy" in metrics
        else None,
        "training loss": f"{metrics['train_loss']:.4f} nats per token"
        if "train_loss" in metrics
        else None,
        "tokens/s in training": f"{state['tokens_seen'] / state['train_seconds']:,.0f}"
        if state["train_seconds"]
        else None,
    }
    rows = "\n".join(f"| {what} | {value} |" for what, value in figures.items() if value)
    settings = "\n".join(
        f"{k}: {v}" for k, v in dataclasses.asdict(c).items() if k not in NOT_IN_THE_CARD
    )
    blocks = (
        f"{c.n_moe_layers} of {c.n_layers} blocks are Mixture-of-Experts blocks: each token is sent to {c.top_k} of "
        f"{c.num_experts} experts."
        if c.n_moe_layers
        else f"All {c.n_layers} blocks are dense."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A language model in the Qwen3-MoE format. {blocks} The weights are {
        "the training run's fp32 masters"
        if dtype == "fp32"
        else f"{DTYPES[dtype]}, rounded from the training run's fp32 masters"
    }.

| | |
|---|---|
{rows}

What the model writes may be false or offensive.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{
        name
    }")
```

It was trained on sequences of {c.max_seq_len:,} tokens. How:

```
{settings}
```
"""


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
        help="a file of weights is at most so large, in GB [5]",
    )
    args = parser.parse(argv)
    if not 0 < args.shard_gb < math.inf:
        raise ConfigError("--shard_gb must be greater than 0")
    if Path(args.checkpoint).is_dir():
        raise ConfigError(
            f"--checkpoint {args.checkpoint} is a folder: name a file of it, such as checkpoint_latest.pt"
        )
    state = checkpoint.load(args.checkpoint)
    dtype = args.dtype or state["config"]["precision"]
    export(
        state,
        measured(state, Path(args.checkpoint).parent),
        Path(args.out).resolve(),
        dtype,
        int(args.shard_gb * GB),
    )
    print(f"{args.out}: {ARCHITECTURE} in {dtype}")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
