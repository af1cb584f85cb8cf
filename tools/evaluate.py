"""Measures a checkpoint on text: loss, perplexity, bits per byte and accuracy, in all and by domain.

    python -m tools.evaluate --checkpoint checkpoints/checkpoint_latest.pt                  the text that its run held out
    python -m tools.evaluate --checkpoint checkpoints/checkpoint_latest.pt --data my_text/  all of this text
    python -m tools.evaluate --checkpoint checkpoints/checkpoint_latest.pt --data my_text/ --json

A domain is a top-level folder of the text or, for files beside such folders, their suffix. Each domain is read in a row,
end-of-text between documents, in windows of max_seq_len tokens; every token is predicted once. Bits per byte leave out
end-of-text, which has no bytes, and so compare models whatever their tokenizers.
"""

import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

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

SHOWN = 20  # domains in the table
LOGITS = 2**26  # numbers that may exist at a time


@dataclass
class Sums:
    """What is added up over tokens; losses are in nats."""

    tokens: int = 0
    loss: float = 0.0
    text_loss: float = 0.0  # without end-of-text's share
    correct: int = 0
    bytes: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def figures(self) -> dict:
        loss = self.loss / self.tokens
        return dict(
            tokens=self.tokens,
            bytes=self.bytes,
            loss=loss,
            perplexity=math.exp(min(loss, 700)),
            bits_per_byte=self.text_loss / math.log(2) / self.bytes,
            accuracy=self.correct / self.tokens,
        )


# ---------------------------------------------------------------- the text


def texts(config: Config) -> Iterator[tuple[str, str, bool]]:
    """(domain, text, whether its document ends with it) of all that config.data names."""
    source = sources.open_source(config)
    for piece, last in source.chunks():
        yield source.domain(), piece, last


def held_out(config: Config, data_hash: str, remedy: str) -> numpy.ndarray:
    """Which of the `texts` of a run are held out, bool. Raises ExperimentError with the remedy when the text is no longer that run's."""
    pieces = numpy.array(
        [(shards.text_hash(text), len(text), last) for _, text, last in texts(config)], shards.CHUNK
    )
    if shards.data_hash(pieces) != data_hash:
        raise ExperimentError(
            f"{config.data} is not the text that the checkpoint was trained on, so what was held out is not known. {remedy}"
        )
    whole = sources.open_source(config).scan_to_end
    deciding = pieces if whole else shards.scanned(pieces)
    return pieces["hash"] <= shards.last_held_out(deciding, config.validation_fraction)


def held_out_texts(config: Config, data_hash: str | None) -> Iterator[tuple[str, str, bool]]:
    """As `texts`, of what a run of this Config holds out. Raises ExperimentError when the text is no longer that run's, or
    when the model has not been trained here (data_hash None)."""
    if data_hash is None:
        raise ExperimentError(
            "the checkpoint was imported and has not been trained on any text here, so nothing was held out. Give the "
            "text to measure with --data"
        )
    chosen = held_out(
        config, data_hash, "Give the text to measure with --data, all of which is read"
    )
    for mine, (domain, text, last), following in zip(chosen, texts(config), [*chosen[1:], False]):
        if mine:
            yield domain, text, last or not following


# ---------------------------------------------------------------- the measurement


def evaluate(
    model: MoETransformer,
    pieces: Iterator[tuple[str, str, bool]],
    tokenizer,
    end_of_text: int,
    limit: int,
) -> dict[str, Sums]:
    """Sums by domain over pieces of text; of a domain that has `limit` tokens (0: no limit) no further piece is read."""
    waiting: dict[str, list[int]] = defaultdict(
        lambda: [end_of_text]
    )  # the last token read, and those not read yet
    sums: dict[str, Sums] = defaultdict(Sums)
    taken: dict[str, int] = defaultdict(int)
    length, together = model.config.max_seq_len, model.config.batch_size * model.config.max_seq_len

    def read(domain: str, count: int) -> None:
        ids, waiting[domain] = waiting[domain][: count + 1], waiting[domain][count:]
        sums[domain] += measure(model, torch.tensor(ids), min(count, length), end_of_text)

    with tqdm(desc="evaluating", unit="token", unit_scale=True, leave=False, disable=None) as bar:
        for domain, text, last in pieces:
            if limit and taken[domain] >= limit:
                continue
            ids = encode(tokenizer, text) + [end_of_text] * last
            taken[domain] += len(ids)
            sums[domain].bytes += len(text.encode())
            waiting[domain] += ids
            while len(waiting[domain]) > together:
                read(domain, together)
            bar.update(len(ids))
        for domain in waiting:
            while (left := len(waiting[domain]) - 1) > 0:
                read(domain, left // length * length or left)
    return {domain: found for domain, found in sums.items() if found.tokens}


@torch.no_grad()
def measure(model: MoETransformer, ids: Tensor, length: int, end_of_text: int) -> Sums:
    """Sums over the predictions of ids[1:], in windows of `length` tokens side by side."""
    ids = ids.to(model.norm.weight.device)
    hidden, _ = model.hidden(ids[:-1].view(-1, length))
    found = Sums(tokens=len(ids) - 1)
    size = max(1, LOGITS // model.config.vocab_size)
    for x, targets in zip(hidden.flatten(0, 1).split(size), ids[1:].split(size)):
        with model.autocast():
            logits = F.linear(x, model.head_weight).float()
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        found.loss += losses.sum().item()
        found.text_loss += losses[targets != end_of_text].sum().item()
        found.correct += (logits.argmax(dim=-1) == targets).sum().item()
    return found


def table(domains: dict[str, Sums], total: Sums) -> str:
    """The largest domains, the others together, and all."""
    ordered = sorted(domains.items(), key=lambda item: -item[1].tokens)
    rows = ordered[:SHOWN]
    if len(ordered) > SHOWN:
        rows.append(
            (f"({len(ordered) - SHOWN} others)", sum((s for _, s in ordered[SHOWN:]), Sums()))
        )
    lines = [
        f"{'domain':24s} {'tokens':>12s} {'loss':>8s} {'perplexity':>11s} {'bits/byte':>10s} {'accuracy':>9s}"
    ]
    for name, sums in [*rows, ("all", total)]:
        f = sums.figures()
        lines.append(
            f"{name[:24]:24s} {f['tokens']:12,} {f['loss']:8.4f} {f['perplexity']:11.2f} {f['bits_per_byte']:10.4f} "
            f"{f['accuracy']:9.4f}"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
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
    model, config, state = open_model(args.checkpoint, args.device, args.precision)
    given = {
        name: value for name in ("data", "text_field") if (value := getattr(args, name)) is not None
    }
    its_own = args.data is None
    if not its_own:
        given["max_characters"] = 0  # where the run ended its own text says nothing about this one
    config, _ = resumed_config(state["config"], given)
    tokenizer, end_of_text = load_tokenizer(state["tokenizer_json"])
    pieces = held_out_texts(config, state["data"]["data_hash"]) if its_own else texts(config)
    with attention_backends(model.norm.weight.device):
        domains = evaluate(model, pieces, tokenizer, end_of_text, args.limit)
    total = sum(domains.values(), Sums())
    if not total.bytes:
        raise ExperimentError(f"there is no text in {config.data}. Give --data a corpus with text")
    if not its_own and os.path.abspath(config.data) == os.path.abspath(state["config"]["data"]):
        print(
            f"note: the run was trained on {config.data}; without --data only what it held out is measured",
            file=sys.stderr,
        )
    if args.json:
        print(
            json.dumps(
                dict(
                    checkpoint=args.checkpoint,
                    step=state["step"],
                    data=config.data,
                    held_out=its_own,
                    **total.figures(),
                    domains={name: sums.figures() for name, sums in domains.items()},
                ),
                indent=1,
            )
        )
        return
    print(
        f"{args.checkpoint}, step {state['step']}, on {'what its run held out of ' if its_own else ''}{config.data}"
    )
    print(table(domains, total))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
