"""Measures a checkpoint on text: loss, perplexity, bits per byte, accuracy; in all and by domain.

    python -m tools.evaluate --checkpoint PATH                   what its run held out of its text
    python -m tools.evaluate --checkpoint PATH --data my_text/   all of this text
    python -m tools.evaluate --checkpoint PATH --data my_text/ --json

A domain is a top-level folder of the text or, for files beside such folders, their suffix. Each
domain is read in a row, end-of-text between documents, in windows of max_seq_len tokens; every
token is predicted once. Bits per byte leave out end-of-text, which has no bytes, and so compare
models whatever their tokenizers.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cli import exit_code, new_parser
from config import Config, ConfigError, ExperimentError, resumed_config
from corpus import shards, sources
from corpus.tokenizer import encode, load_tokenizer
from engine.triton_kernels import attention_backends
from model import MoETransformer
from record.checkpoint import open_model

# Domains in the table; the smaller ones are one row.
SHOWN = 20

# Numbers of logits that may exist at a time.
LOGITS = 2**26


@dataclass
class Sums:
    """What is added up over tokens; losses are in nats."""

    tokens: int = 0
    loss: float = 0.0
    text_loss: float = 0.0  # without end-of-text's share
    correct: int = 0
    bytes: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            tokens=self.tokens + other.tokens,
            loss=self.loss + other.loss,
            text_loss=self.text_loss + other.text_loss,
            correct=self.correct + other.correct,
            bytes=self.bytes + other.bytes,
        )

    def figures(self) -> dict:
        loss = self.loss / self.tokens
        return dict(
            tokens=self.tokens,
            bytes=self.bytes,
            loss=loss,
            perplexity=math.exp(min(loss, 700)),  # exp(710) is more than a float holds
            bits_per_byte=self.text_loss / math.log(2) / self.bytes,
            accuracy=self.correct / self.tokens,
        )


# ---------------------------------------------------------------- the text


class DomainChunk(NamedTuple):
    """A chunk of text, the domain it belongs to, and whether its document ends with it."""

    domain: str
    text: str
    last: bool


def texts(config: Config) -> Iterator[DomainChunk]:
    """All that config.data names."""
    source = sources.open_source(config)
    for text, last in source.chunks():
        yield DomainChunk(source.domain(), text, last)


def held_out_texts(config: Config, data_hash: str | None) -> Iterator[DomainChunk]:
    """What a run of this Config holds out of its text, which has this hash.

    Raises ExperimentError when the text is no longer that run's, or when the model has not been
    trained here (data_hash None).
    """
    if data_hash is None:
        raise ExperimentError(
            "the checkpoint was imported and has not been trained on any text here, so nothing was "
            "held out. Give the text to measure with --data"
        )
    remedy = "Give the text to measure with --data, all of which is read"
    chosen = held_out(config, data_hash, remedy)
    following = [*chosen[1:], False]
    for chunk, is_held_out, next_too in zip(texts(config), chosen, following):
        if is_held_out:
            # A document may be held out in part. What is read next is then another one.
            yield chunk._replace(last=chunk.last or not next_too)


def held_out(config: Config, data_hash: str, remedy: str) -> numpy.ndarray:
    """Which chunks of a run's `texts` are held out, bool [chunks].

    Raises ExperimentError, with the remedy, when the text is no longer that run's.
    """
    rows = [(shards.text_hash(text), len(text), last) for _, text, last in texts(config)]
    chunks = numpy.array(rows, shards.CHUNK)
    if shards.data_hash(chunks) != data_hash:
        raise ExperimentError(
            f"{config.data} is not the text that the checkpoint was trained on, so what was held "
            f"out is not known. {remedy}"
        )
    # Of a source that is downloaded, its beginning decided what was held out.
    deciding = chunks
    if not sources.open_source(config).scan_to_end:
        deciding = shards.scanned(chunks)
    return chunks["hash"] <= shards.last_held_out(deciding, config.validation_fraction)


# ---------------------------------------------------------------- the measurement


def evaluate(
    model: MoETransformer,
    chunks: Iterable[DomainChunk],
    tokenizer,
    end_of_text: int,
    limit: int,
) -> dict[str, Sums]:
    """Sums by domain over chunks of text.

    Of a domain that has `limit` tokens no further chunk is read; 0 is no limit.
    """
    length = model.config.max_seq_len
    batch_tokens = model.config.batch_size * length
    sums: dict[str, Sums] = defaultdict(Sums)
    taken: dict[str, int] = defaultdict(int)
    # The last token read of each domain, which the next one is predicted from, and those not read
    # yet. Before the first token stands an end-of-text, as between documents.
    waiting: dict[str, list[int]] = defaultdict(lambda: [end_of_text])

    def read(domain: str, count: int) -> None:
        ids = torch.tensor(waiting[domain][: count + 1])
        waiting[domain] = waiting[domain][count:]
        sums[domain] += measure(model, ids, min(count, length), end_of_text)

    with tqdm(desc="evaluating", unit="token", unit_scale=True, leave=False, disable=None) as bar:
        for domain, text, last in chunks:
            if limit and taken[domain] >= limit:
                continue
            ids = encode(tokenizer, text)
            if last:
                ids = [*ids, end_of_text]
            taken[domain] += len(ids)
            sums[domain].bytes += len(text.encode())
            waiting[domain] += ids
            while len(waiting[domain]) > batch_tokens:
                read(domain, batch_tokens)
            bar.update(len(ids))

        # What is left is less than a batch: whole windows first, then a shorter one.
        for domain in waiting:
            left = len(waiting[domain]) - 1
            whole_windows = left // length * length
            for count in (whole_windows, left - whole_windows):
                if count:
                    read(domain, count)
    return {domain: found for domain, found in sums.items() if found.tokens}


@torch.no_grad()
def measure(model: MoETransformer, ids: Tensor, length: int, end_of_text: int) -> Sums:
    """Sums over the predictions of ids[1:], in windows of `length` tokens side by side."""
    ids = ids.to(model.norm.weight.device)
    hidden, _ = model.hidden(ids[:-1].view(-1, length))
    hidden = hidden.flatten(0, 1)
    found = Sums(tokens=len(ids) - 1)
    # Logits are vocab_size numbers for each token: a part of the tokens at a time.
    size = max(1, LOGITS // model.config.vocab_size)
    for x, targets in zip(hidden.split(size), ids[1:].split(size)):
        with model.autocast():
            logits = F.linear(x, model.head_weight).float()
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        found.loss += losses.sum().item()
        found.text_loss += losses[targets != end_of_text].sum().item()
        found.correct += (logits.argmax(dim=-1) == targets).sum().item()
    return found


# ---------------------------------------------------------------- what is printed


def total_of(sums: Iterable[Sums]) -> Sums:
    return sum(sums, Sums())


def table(domains: dict[str, Sums]) -> str:
    """The largest domains, the others together, and all."""
    ordered = sorted(domains.items(), key=lambda item: item[1].tokens, reverse=True)
    rows = ordered[:SHOWN]
    others = [sums for _, sums in ordered[SHOWN:]]
    if others:
        rows.append((f"({len(others)} others)", total_of(others)))
    rows.append(("all", total_of(domains.values())))
    header = (
        f"{'domain':24s} {'tokens':>12s} {'loss':>8s} {'perplexity':>11s} {'bits/byte':>10s} "
        f"{'accuracy':>9s}"
    )
    return "\n".join([header, *[table_row(name, sums.figures()) for name, sums in rows]])


def table_row(name: str, figures: dict) -> str:
    return (
        f"{name[:24]:24s} {figures['tokens']:12,} {figures['loss']:8.4f} "
        f"{figures['perplexity']:11.2f} {figures['bits_per_byte']:10.4f} {figures['accuracy']:9.4f}"
    )


# ---------------------------------------------------------------- the command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = new_parser(
        "python -m tools.evaluate --checkpoint PATH [--data PATH] [--limit N] [--json]", __doc__
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint file of a run")
    parser.add_argument(
        "--data", help="text to measure, as in training [what the run held out of its own]"
    )
    parser.add_argument(
        "--text_field", help="field of a .jsonl or .parquet row that holds the text [the run's]"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="tokens of each domain that are enough; 0: all [0]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="[auto: the GPU when there is one]",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        help="[the run's own on a GPU, fp32 on a CPU]",
    )
    args = parser.parse(argv)
    if args.limit < 0:
        raise ConfigError("--limit must not be negative")
    return args


def measured_config(saved: dict, args: argparse.Namespace) -> Config:
    """The checkpoint's Config with the text that the options name."""
    changes = {}
    if args.text_field is not None:
        changes["text_field"] = args.text_field
    if args.data is not None:
        changes["data"] = args.data
        changes["max_characters"] = (
            0  # where the run stopped reading its own text says nothing here
        )
    config, _ = resumed_config(saved, changes)
    return config


def main(argv: list[str]) -> None:
    args = parse(argv)
    model, _, state = open_model(args.checkpoint, args.device, args.precision)
    config = measured_config(state["config"], args)
    of_its_run = args.data is None
    if of_its_run:
        chunks = held_out_texts(config, state["data"]["data_hash"])
    else:
        chunks = texts(config)
    tokenizer, end_of_text = load_tokenizer(state["tokenizer_json"])
    with attention_backends(model.norm.weight.device):
        domains = evaluate(model, chunks, tokenizer, end_of_text, args.limit)
    total = total_of(domains.values())
    if not total.bytes:
        raise ExperimentError(f"there is no text in {config.data}. Give --data a corpus with text")

    if not of_its_run and same_path(config.data, state["config"]["data"]):
        print(
            f"note: the run was trained on {config.data}; without --data only what it held out is "
            "measured",
            file=sys.stderr,
        )
    if args.json:
        result = dict(
            checkpoint=args.checkpoint,
            step=state["step"],
            data=config.data,
            held_out=of_its_run,
            **total.figures(),
            domains={name: sums.figures() for name, sums in domains.items()},
        )
        print(json.dumps(result, indent=1))
        return
    what = f"what its run held out of {config.data}" if of_its_run else config.data
    print(f"{args.checkpoint}, step {state['step']}, on {what}")
    print(table(domains))


def same_path(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
