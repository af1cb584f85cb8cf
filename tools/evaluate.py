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

if __name__ == "__main__":  # before the imports below: slow, and they fail without their packages
    from cli import exit_at_a_wrong_path
    from config import explain_missing_packages

    explain_missing_packages()
    exit_at_a_wrong_path(sys.argv[1:])

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cli import exit_code, new_parser
from config import DATA_RULES, Config, ConfigError, ExperimentError, resumed_config
from corpus import sources, text_scan
from corpus.safe_cuts import SafeCuts
from corpus.tokenizer import ChunkEncoder, character_before_next, load_tokenizer
from engine.triton_kernels import attention_backends
from model import MoETransformer
from planner.layout import quoted
from record.checkpoint import data_rules, open_model

# The largest domains have a row of the table each. The others share one row.
SHOWN = 20

# Logits in memory at a time: 256 MiB in fp32.
LOGITS = 2**26


@dataclass
class Sums:
    """Sums over the predicted tokens of a text. Losses are in nats."""

    tokens: int = 0
    loss: float = 0.0
    text_loss: float = 0.0  # the loss of all tokens but end-of-text, which has no bytes
    correct: int = 0  # tokens that had the largest logit
    bytes: int = 0  # of the text, in UTF-8

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            tokens=self.tokens + other.tokens,
            loss=self.loss + other.loss,
            text_loss=self.text_loss + other.text_loss,
            correct=self.correct + other.correct,
            bytes=self.bytes + other.bytes,
        )

    def figures(self) -> dict:
        """The figures that are reported.

        `loss` is in nats per token, `accuracy` a share of the tokens, `bits_per_byte` the loss of
        the text (in bits, without end-of-text) over its bytes.
        """
        loss = self.loss / self.tokens
        perplexity = math.exp(min(loss, 700))  # exp(710) is more than a float holds
        text_bits = self.text_loss / math.log(2)
        return dict(
            tokens=self.tokens,
            bytes=self.bytes,
            loss=loss,
            perplexity=perplexity,
            bits_per_byte=text_bits / self.bytes,
            accuracy=self.correct / self.tokens,
        )


# ---------------------------------------------------------------- the text


class DomainChunk(NamedTuple):
    """A chunk of text, and what its tokens depend on."""

    domain: str
    text: str
    before: str  # the last character of the chunk before it in its document; empty at its beginning
    last: bool  # whether its document ends with it


def texts(source: sources.Source) -> Iterator[DomainChunk]:
    """The chunks of a source's text."""
    before = ""
    for text, last in source.chunks():
        yield DomainChunk(source.domain(), text, before, last)
        before = character_before_next(text, last)


def held_out_texts(
    config: Config, data_hash: str | None, rules: int = DATA_RULES
) -> Iterator[DomainChunk]:
    """The chunks that a run of this Config holds out for validation.

    `data_hash` is the hash of the text that the run was trained on, `rules` the version of the
    rules of data that the run follows. Raises ExperimentError when
    config.data is no longer that text, or when there was no training here (data_hash None).
    """
    if data_hash is None:
        raise ExperimentError(
            "the checkpoint was imported and has not been trained on any text here, so nothing was "
            "held out. Give the text to measure with --data"
        )
    remedy = "Give the text to measure with --data, all of which is read"
    source = sources.open_source(config, rules)
    chosen = held_out(source, config, data_hash, remedy, rules)
    next_is_chosen = [*chosen[1:], False]
    for chunk, is_chosen, next_too in zip(texts(source), chosen, next_is_chosen):
        if not is_chosen:
            continue
        # In version 1 of the rules, a document may be held out in part. Its held-out part then
        # ends with this chunk, and the next chunk that is yielded belongs to another document or
        # to another part.
        yield chunk._replace(last=chunk.last or not next_too)


def held_out(
    source: sources.Source, config: Config, data_hash: str, remedy: str, rules: int
) -> numpy.ndarray:
    """Which chunks of the source a run held out: bool [number of chunks].

    The source is that of `config` under this version of the `rules` of data.

    Raises ExperimentError, which ends with `remedy`, when the hash of the text is another one.
    """
    found = text_scan.read_text(source, to_end=True)
    if text_scan.data_hash(found.chunks) != data_hash:
        raise ExperimentError(
            f"{config.data} is not the text that the checkpoint was trained on, so what was held "
            f"out is not known. {remedy}"
        )
    return text_scan.held_out_chunks(source, found, config.validation_fraction, rules)


# ---------------------------------------------------------------- the measurement


def evaluate(
    model: MoETransformer,
    chunks: Iterable[DomainChunk],
    encode: ChunkEncoder,
    end_of_text: int,
    limit: int,
) -> dict[str, Sums]:
    """The sums of each domain, over all chunks.

    Once `limit` tokens of a domain have been read, its further chunks are skipped. 0 is no limit.
    """
    length = model.config.max_seq_len
    batch_tokens = model.config.batch_size * length
    sums: dict[str, Sums] = defaultdict(Sums)
    taken: dict[str, int] = defaultdict(int)  # tokens of each domain that came from its chunks
    # The tokens of each domain that wait to be predicted. One more token stands before them: the
    # last one that was predicted, from which the model predicts the next. Before the first token
    # of a domain stands an end-of-text, as between documents.
    waiting: dict[str, list[int]] = defaultdict(lambda: [end_of_text])

    def predict(domain: str, count: int) -> None:
        """Measures the next `count` tokens of a domain: whole windows, or less than one."""
        ids = torch.tensor(waiting[domain][: count + 1])
        waiting[domain] = waiting[domain][count:]
        window = min(count, length)
        sums[domain] += measure(model, ids, window, end_of_text)

    with tqdm(desc="evaluating", unit="token", unit_scale=True, leave=False, disable=None) as bar:
        for domain, text, before, last in SafeCuts(encode).recut(chunks):
            if limit and taken[domain] >= limit:
                continue
            ids = encode.ids(text, before, last)
            if last:
                ids = [*ids, end_of_text]
            taken[domain] += len(ids)
            sums[domain].bytes += len(text.encode())
            waiting[domain] += ids
            while len(waiting[domain]) > batch_tokens:
                predict(domain, batch_tokens)
            bar.update(len(ids))

        # At most a batch of each domain is left: whole windows, and then a shorter one.
        for domain in waiting:
            left = len(waiting[domain]) - 1
            shorter_window = left % length
            whole_windows = left - shorter_window
            for count in (whole_windows, shorter_window):
                if count:
                    predict(domain, count)
    return {domain: found for domain, found in sums.items() if found.tokens}


@torch.no_grad()
def measure(model: MoETransformer, ids: Tensor, length: int, end_of_text: int) -> Sums:
    """Sums over the predictions of ids[1:], each from the tokens before it in its window.

    The len(ids) - 1 tokens are whole windows of `length` tokens. The windows form one batch.
    """
    ids = ids.to(model.norm.weight.device)
    hidden, _ = model.hidden(ids[:-1].view(-1, length))
    hidden = hidden.flatten(0, 1)
    found = Sums(tokens=len(ids) - 1)
    # Each token has vocab_size logits, so only some tokens have theirs in memory at a time.
    tokens_at_a_time = max(1, LOGITS // model.config.vocab_size)
    hidden_parts = hidden.split(tokens_at_a_time)
    target_parts = ids[1:].split(tokens_at_a_time)
    for x, targets in zip(hidden_parts, target_parts):
        logits = model.logits(x)
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        is_text = targets != end_of_text
        is_correct = logits.argmax(dim=-1) == targets
        found.loss += losses.sum().item()
        found.text_loss += losses[is_text].sum().item()
        found.correct += is_correct.sum().item()
    return found


# ---------------------------------------------------------------- what is printed


def total_of(sums: Iterable[Sums]) -> Sums:
    return sum(sums, Sums())


def table(domains: dict[str, Sums]) -> str:
    """A row for each of the SHOWN largest domains, one for the other domains, one for all."""
    lines = [
        f"{'domain':24s} {'tokens':>12s} {'loss':>8s} {'perplexity':>11s} {'bits/byte':>10s} "
        f"{'accuracy':>9s}"
    ]
    largest_first = sorted(domains, key=lambda name: domains[name].tokens, reverse=True)
    for name in largest_first[:SHOWN]:
        lines.append(table_row(quoted(name), domains[name].figures()))
    others = [domains[name] for name in largest_first[SHOWN:]]
    if others:
        lines.append(table_row(f"({len(others)} others)", total_of(others).figures()))
    lines.append(table_row("all", total_of(domains.values()).figures()))
    return "\n".join(lines)


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
        "--data", help="text to measure, named as in training [the run's validation text]"
    )
    parser.add_argument(
        "--text_field",
        help="field of a .jsonl or .parquet row that holds the text [as in the run]",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        help="stop reading a domain after so many tokens; 0: read all [0]",
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
    """The checkpoint's Config, changed to read the text that the options name."""
    changes = {}
    if args.text_field is not None:
        changes["text_field"] = args.text_field
    if args.data is not None:
        changes["data"] = args.data
        # All of this text is read: max_characters limited how much the run read of its own text.
        changes["max_characters"] = 0
    config, _ = resumed_config(saved, changes)
    return config


def main(argv: list[str]) -> None:
    args = parse(argv)
    model, _, state = open_model(args.checkpoint, args.device, args.precision)
    config = measured_config(state["config"], args)
    held_out_only = args.data is None
    if held_out_only:
        chunks = held_out_texts(config, state["data"]["data_hash"], data_rules(state))
    else:
        chunks = texts(sources.open_source(config))
    tokenizer, end_of_text = load_tokenizer(state["tokenizer_json"], config.end_of_text)
    encode = ChunkEncoder(tokenizer, data_rules(state))
    with attention_backends(model.norm.weight.device):
        domains = evaluate(model, chunks, encode, end_of_text, args.limit)
    total = total_of(domains.values())
    if not total.bytes:
        raise ExperimentError(f"there is no text in {config.data}. Give --data a corpus with text")

    if not held_out_only and same_path(config.data, state["config"]["data"]):
        print(trained_on_message(config.data), file=sys.stderr)
    if args.json:
        result = dict(
            checkpoint=args.checkpoint,
            step=state["step"],
            data=config.data,
            held_out=held_out_only,
            **total.figures(),
            domains={name: sums.figures() for name, sums in domains.items()},
        )
        print(json.dumps(result, indent=1))
        return
    what = config.data
    if held_out_only:
        what = f"what its run held out of {config.data}"
    print(f"{args.checkpoint}, step {state['step']}, on {what}")
    print(table(domains))


def trained_on_message(data: str) -> str:
    return f"note: the run was trained on {data}; without --data only what it held out is measured"


def same_path(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
