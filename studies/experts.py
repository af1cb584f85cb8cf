"""Which experts the tokens of the held-out text are sent to, by kind of token and by package.

    python -m studies.experts RUN           of a run's numbered checkpoints; writes RUN/experts.json

It measures, in every layer and while a run learns, the mutual information between expert and token
kind, over the routed tokens: each token counts once for each expert that it is sent to. Two other
measurements stand beside it. In a finite text the mutual information is above zero even for
unrelated labels, and neighbours in a text are alike. So it is also measured for the same labels,
rotated by a random distance. And experts differ before anything was learned, as equal tokens look
alike to a router. So it is also measured for the untrained model.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pygments.lexers import CppLexer, CythonLexer, PythonLexer
from pygments.token import Comment, Error, Keyword, Name, Number, Operator, Punctuation, String
from tokenizers import Tokenizer

import data
from cli import exit_code, new_parser
from config import Config, ExperimentError, resumed_config
from corpus import sources
from corpus.tokenizer import load_tokenizer
from engine.triton_kernels import attention_backends
from model import MoETransformer
from planner.machine import cpu_cores
from record import checkpoint
from record.checkpoint import open_model
from tools.evaluate import held_out

KINDS = (
    "keyword",
    "identifier",
    "operator",
    "number",
    "string",
    "docstring",
    "comment",
    "C code",
    "C comment",
    "prose",
    "whitespace",
)
# The kind of each type of token that pygments finds. The first type that fits counts, so the
# special ones stand before the general ones.
PYTHON = (
    (String.Doc, "docstring"),
    (String, "string"),
    (Number, "number"),
    (Comment, "comment"),
    (Keyword, "keyword"),
    (Operator.Word, "keyword"),
    (Operator, "operator"),
    (Punctuation, "operator"),
    (Name, "identifier"),
)
C = (
    (Comment.PreprocFile, "C code"),
    (Comment.Preproc, "C code"),
    (Comment, "C comment"),
    (String, "C code"),
    (Number, "C code"),
    (Keyword, "C code"),
    (Operator, "C code"),
    (Punctuation, "C code"),
    (Name, "C code"),
)
# The lexer and the table of each suffix. Text with another suffix is prose.
LANGUAGES = {
    ".py": (PythonLexer(), PYTHON),
    ".pyi": (PythonLexer(), PYTHON),
    ".pyx": (CythonLexer(), PYTHON),
    ".pxd": (CythonLexer(), PYTHON),
    ".h": (CppLexer(), C),
    ".hpp": (CppLexer(), C),
    ".hh": (CppLexer(), C),
    ".cuh": (CppLexer(), C),
}
LABELS = 256  # labels are bytes
NONE = 255  # the label of end-of-text, and of characters for which the lexer finds no kind
MOST_TOKENS = 1_000_000  # of the held-out text that are routed
DOMAINS = 10  # that are named; the smaller ones together are one more
SHUFFLES = 10
TOP_TOKENS = 12  # of each expert
FEWEST = 20  # times that a top token occurs


# --- labels of the held-out text


@dataclass
class Labels:
    """The tokens of the held-out text, and the kind and the domain of each."""

    tokens: np.ndarray
    kinds: np.ndarray  # indices in KINDS, or NONE; uint8
    domains: np.ndarray  # indices in `names`, or NONE; uint8
    names: list[str]


def character_kinds(text: str, suffix: str) -> np.ndarray:
    """The kind of every character of a whole file, uint8. Its suffix says its language."""
    if suffix not in LANGUAGES:
        return np.full(len(text), KINDS.index("prose"), np.uint8)
    lexer, table = LANGUAGES[suffix]
    kinds = np.full(len(text), NONE, np.uint8)
    for start, token_type, value in lexer.get_tokens_unprocessed(text):
        if token_type is Error:
            continue
        for parent, name in table:
            if token_type in parent:
                kinds[start : start + len(value)] = KINDS.index(name)
                break
    return kinds


def token_kinds(offsets: np.ndarray, text: str, kinds: np.ndarray) -> np.ndarray:
    """The kind of each token, uint8, from the kinds of the text's characters.

    `offsets` [tokens, 2] are the first character of each token and the one after its last. A token
    has the kind of its first character that is no space; a token of spaces is whitespace.
    """
    length = len(text)
    indices = np.arange(length)
    solid = np.where([not character.isspace() for character in text], indices, length)
    # next_solid[i] is the first solid character from i on: a minimum over all that follow.
    next_solid = np.append(np.minimum.accumulate(solid[::-1])[::-1], length)
    first = next_solid[offsets[:, 0]]
    kind_of_first = np.append(kinds, NONE)[first]
    found = np.where(first < offsets[:, 1], kind_of_first, KINDS.index("whitespace"))
    return found.astype(np.uint8)


class Located(NamedTuple):
    """A chunk of the corpus, with the file and the domain that it comes from."""

    path: str | None
    domain: str
    text: str
    last: bool  # whether its document ends with it


class FileJob(NamedTuple):
    """A file of which some chunks are held out, for a worker process."""

    suffix: str
    domain: str
    chunks: list[str]  # all of them, as the kind of a character depends on what comes before it
    held_out: list[bool]
    ends: list[bool]  # whether end-of-text follows the chunk


class FileTokens(NamedTuple):
    """The tokens of a file's held-out chunks and their kinds; NONE is the kind of end-of-text."""

    tokens: np.ndarray
    kinds: np.ndarray
    domain: str


def domain(source: sources.Source, data_name: str) -> str:
    """The package that the latest chunk of `installed` belongs to; else the source's own domain."""
    if data_name != "installed" or source.path is None:
        return source.domain()
    path = Path(source.path)
    for packages in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if path.is_relative_to(packages):
            return path.relative_to(packages).parts[0]
    return "Python's library"


def _located_chunks(config: Config) -> Iterator[Located]:
    source = sources.open_source(config)
    for text, last in source.chunks():
        yield Located(source.path, domain(source, config.data), text, last)


def _file_jobs(config: Config, held: np.ndarray) -> Iterator[FileJob]:
    """The files of which a chunk is held out; `held` says it of each chunk of the corpus."""
    first = 0
    for (path, name), group in itertools.groupby(_located_chunks(config), lambda c: c[:2]):
        chunks = list(group)
        mine = held[first : first + len(chunks)].tolist()
        first += len(chunks)
        if not any(mine):
            continue
        # End-of-text also stands where a chunk on the other side follows.
        following = [*mine[1:], False]
        yield FileJob(
            suffix=Path(path or "").suffix.lower(),
            domain=name,
            chunks=[chunk.text for chunk in chunks],
            held_out=mine,
            ends=[chunk.last or not more for chunk, more in zip(chunks, following)],
        )


def _start_worker(tokenizer_json: str) -> None:
    global tokenizer, end_of_text
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has a core
    tokenizer, end_of_text = load_tokenizer(tokenizer_json)


def _label_file(job: FileJob) -> FileTokens:
    """Runs in a worker process: the tokens of a file's held-out chunks, and their kinds."""
    kinds = character_kinds("".join(job.chunks), job.suffix)
    tokens: list[int] = []
    labels = []
    first = 0
    for text, held, ends in zip(job.chunks, job.held_out, job.ends):
        characters = kinds[first : first + len(text)]
        first += len(text)
        if not held:
            continue
        encoding = tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        tokens += encoding.ids
        labels.append(token_kinds(offsets, text, characters))
        if ends:
            tokens.append(end_of_text)
            labels.append(np.array([NONE], np.uint8))
    return FileTokens(np.array(tokens, np.int64), np.concatenate(labels), job.domain)


def label(config: Config, corpus: data.Corpus) -> Labels:
    """Labels the corpus's held-out tokens.

    Raises ExperimentError when the text is no longer the one that was tokenized.
    """
    held = held_out(config, corpus.data_hash, "Train it again on this text")
    context = multiprocessing.get_context("fork")
    with context.Pool(cpu_cores(), _start_worker, (corpus.tokenizer_json,)) as pool:
        files = list(pool.imap(_label_file, _file_jobs(config, held), chunksize=4))
    tokens = np.concatenate([np.empty(0, int), *(file.tokens for file in files)])
    kinds = np.concatenate([np.empty(0, np.uint8), *(file.kinds for file in files)])
    if len(tokens) != len(corpus.validation) or (tokens != corpus.validation[:]).any():
        raise ExperimentError(
            f"{config.data} is not the text that the run was trained on, so what was held out is "
            "not known. Train it again on this text"
        )
    domains, names = _number_domains(files)
    domains = np.where(tokens == corpus.end_of_text, NONE, domains).astype(np.uint8)
    return Labels(tokens, kinds, domains, names)


def _number_domains(files: list[FileTokens]) -> tuple[np.ndarray, list[str]]:
    """For each token of the files the number of its domain, and the domains' names.

    The largest domains come first; the others together are one more, the last.
    """
    names, domain_of_file = np.unique([file.domain for file in files], return_inverse=True)
    domain_of_token = np.repeat(domain_of_file, [len(file.tokens) for file in files])
    sizes = np.bincount(domain_of_token, minlength=len(names))
    largest = np.argsort(-sizes)[:DOMAINS]
    shown = [str(names[i]) for i in largest]
    if len(names) > DOMAINS:
        shown.append("others")
    number = np.full(len(names), len(largest))
    number[largest] = np.arange(len(largest))
    return number[domain_of_token], shown


# --- routes


@torch.no_grad()
def routes(model: MoETransformer, windows: np.ndarray) -> np.ndarray:
    """The experts that the tokens [windows, positions] are sent to.

    Returns uint8 [MoE blocks, windows, positions, top_k].
    """
    chosen: list[np.ndarray] = []

    def keep_expert_ids(_module, _inputs, outputs) -> None:
        expert_ids = outputs[3]
        chosen.append(expert_ids.to(torch.uint8).cpu().numpy())

    routers = [block.ffn.router for block in model.blocks if block.moe]
    hooks = [router.register_forward_hook(keep_expert_ids) for router in routers]
    device = model.norm.weight.device
    batch = model.config.batch_size
    with attention_backends(device):
        for first in range(0, len(windows), batch):
            tokens = torch.from_numpy(windows[first : first + batch].astype(np.int64))
            model.hidden(tokens.to(device))
    for hook in hooks:
        hook.remove()
    # The blocks ran in turn for each batch.
    by_block = [np.concatenate(chosen[i :: len(routers)]) for i in range(len(routers))]
    return np.stack(by_block)


# --- statistics


def table(experts: np.ndarray, labels: np.ndarray, num_experts: int, number: int) -> np.ndarray:
    """How many routed tokens of each label every expert has, [num_experts, number].

    `experts` is [tokens, top_k], `labels` [tokens] in 0 ... number - 1. NONE is left out.
    """
    cells = experts.astype(np.uint16) * LABELS + labels[:, None]
    counts = np.bincount(cells.ravel(), minlength=num_experts * LABELS)
    return counts.reshape(num_experts, LABELS)[:, :number]


def mutual_information(counts: np.ndarray) -> float:
    """Between the rows and the columns of a table of counts, in bits."""
    p = counts / counts.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    occurs = p > 0
    return float((p[occurs] * np.log2(p[occurs] / independent[occurs])).sum())


def entropy_bits(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float((p * np.log2(1 / p)).sum())


def shuffled(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The labels rotated by a random distance, of a tenth of them at least.

    Neighbours stay neighbours, and no label stays near its token.
    """
    least = len(labels) // 10
    return np.roll(labels, int(random.integers(least, len(labels) - least)))


def information(
    experts: np.ndarray, labels: np.ndarray, num_experts: int, number: int
) -> dict[str, list]:
    """The mutual information between expert and label in each MoE block, in bits.

    `experts` is [MoE blocks, tokens, top_k]. "shuffled" and "shuffled_most" are the mean and the
    largest of what shuffled labels give.
    """

    random = np.random.default_rng(0)
    others = [shuffled(labels, random) for _ in range(SHUFFLES)]
    bits = []
    baseline = []
    for layer in experts:
        bits.append(mutual_information(table(layer, labels, num_experts, number)))
        tables = [table(layer, other, num_experts, number) for other in others]
        baseline.append([mutual_information(counts) for counts in tables])
    return dict(
        bits=bits,
        shuffled=np.mean(baseline, axis=1).tolist(),
        shuffled_most=np.max(baseline, axis=1).tolist(),
    )


def top_tokens(
    experts: np.ndarray, tokens: np.ndarray, num_experts: int, tokenizer: Tokenizer
) -> list[list]:
    """For each expert the tokens that distinguish it most, as [text, share of them sent there].

    These are tokens that are sent there more often than expected. They are ordered by how often
    they are, times the logarithm of how much more often.
    """
    size = int(tokens.max()) + 1
    top_k = experts.shape[1]
    cells = experts.astype(np.int64) * size + tokens[:, None]
    counts = np.bincount(cells.ravel(), minlength=num_experts * size).reshape(num_experts, size)
    occurrences = np.bincount(tokens, minlength=size)
    load = counts.sum(1)
    found = []
    for sent, share in zip(counts, load / load.sum()):
        expected = share * occurrences * top_k
        with np.errstate(divide="ignore", invalid="ignore"):
            score = sent * np.log(sent / expected)
        score = np.where((sent > expected) & (occurrences >= FEWEST), score, 0)
        best = []
        for token in np.argsort(-score, kind="stable")[:TOP_TOKENS]:
            if score[token] > 0:
                text = tokenizer.decode([int(token)], skip_special_tokens=False)
                best.append([text, round(float(sent[token] / occurrences[token]), 3)])
        found.append(best)
    return found


# --- the analysis of a run


def analyse(checkpoints: list[Path]) -> dict:
    """What results.json keeps of a run.

    The mutual information by layer and step, and the tables and top tokens of the last checkpoint.
    """
    config, _ = resumed_config(checkpoint.load(checkpoints[-1])["config"], {})
    corpus = data.prepare(config)
    labels = label(config, corpus)
    positions = _sampled_positions(len(labels.tokens), config.max_seq_len)
    windows = labels.tokens[positions]
    kinds = labels.kinds[positions].ravel()
    domains = labels.domains[positions].ravel()
    steps = []
    for path in [None, *checkpoints]:
        model, step = _model(path, config)
        experts = routes(model, windows)
        experts = experts.reshape(len(experts), -1, experts.shape[-1])
        del model
        kind = information(experts, kinds, config.num_experts, len(KINDS))
        by_domain = information(experts, domains, config.num_experts, len(labels.names))
        tokens_seen = step * config.tokens_per_step
        steps.append(dict(step=step, tokens=tokens_seen, kind=kind, domain=by_domain))
        print(
            f"step {step}: mutual information of expert and kind "
            f"{np.mean(kind['bits']):.4f} bits, of expert and domain "
            f"{np.mean(by_domain['bits']):.4f} bits (mean over layers)",
            flush=True,
        )
    return dict(
        experts=dict(
            layers=[layer for layer in range(config.n_layers) if config.is_moe(layer)],
            tokens=len(kinds),
            without_kind=int((kinds == NONE).sum()),
            kinds=list(KINDS),
            **_label_facts("kind", kinds, len(KINDS), experts, config),
            domains=labels.names,
            **_label_facts("domain", domains, len(labels.names), experts, config),
            steps=steps,
            top_tokens=[
                top_tokens(layer, windows.ravel(), config.num_experts, corpus.tokenizer)
                for layer in experts
            ],
        )
    )


def _sampled_positions(num_tokens: int, length: int) -> np.ndarray:
    """Positions [windows, length] of the tokens to route: windows spread over the whole text."""
    available = num_tokens // length
    taken = min(available, max(1, MOST_TOKENS // length))
    starts = np.arange(taken) * available // taken * length
    return starts[:, None] + np.arange(length)


def _label_facts(
    name: str, labels: np.ndarray, number: int, experts: np.ndarray, config: Config
) -> dict:
    """How often each label occurs, the entropy of that, and the table of each MoE block."""
    occurrences = np.bincount(labels[labels != NONE], minlength=number)
    tables = [table(layer, labels, config.num_experts, number).tolist() for layer in experts]
    return {
        f"{name}_tokens": occurrences.tolist(),
        f"{name}_entropy": entropy_bits(occurrences),
        f"{name}_table": tables,
    }


def _model(path: Path | None, config: Config) -> tuple[MoETransformer, int]:
    """The model of a checkpoint and its step; with no path, the model before the first step."""
    if path is not None:
        model, _, state = open_model(str(path), config.device, None)
        return model, state["step"]
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    config = dataclasses.replace(
        config,
        activation_checkpointing="none",
        precision=config.precision if on_gpu else "fp32",
    )
    with torch.device("meta"):
        model = MoETransformer(config)
    return model.materialize("cuda" if on_gpu else "cpu").eval(), 0


# --- the command


def main(argv: list[str]) -> None:
    parser = new_parser("python -m studies.experts RUN", __doc__)
    parser.add_argument(
        "run", type=Path, help="folder of a run with numbered checkpoints (--save_every)"
    )
    folder = parser.parse(argv).run
    checkpoints = sorted(folder.glob("checkpoint_step_*.pt"), key=_step_of)
    if not checkpoints:
        raise ExperimentError(
            f"there is no checkpoint_step_N.pt in {folder}: train with --save_every, and "
            "--keep_checkpoints for several"
        )
    found = analyse(checkpoints)
    temporary = folder / ".experts.json.tmp"
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(folder / "experts.json")
    print(folder / "experts.json")


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
