"""Which experts the tokens of the held-out text are sent to, by kind of token and by package.

    python -m studies.experts RUN           of a run's numbered checkpoints; writes RUN/experts.json

It measures the mutual information between expert and label of a token, in every MoE block and at
every checkpoint. A label is the kind of a token (keyword, comment, ...) or its domain (the package
that it comes from). The mutual information is taken over routed tokens: each token counts once for
each expert that it is sent to.

Two baselines stand beside it:
- shuffled labels. In a finite text the mutual information is above zero even for unrelated labels,
  and more so because neighbours in a text are alike. So it is also measured for the same labels,
  rotated by a random distance.
- the untrained model. A router sends equal tokens to equal experts before it has learned anything.
  So the first row of the measurements is of the model before the first step.
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

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

import numpy as np
import torch
from pygments.lexers import CppLexer, CythonLexer, PythonLexer
from pygments.token import Comment, Error, Keyword, Name, Number, Operator, Punctuation, String
from tokenizers import Tokenizer

import data
from cli import exit_code, new_parser
from config import Config, ExperimentError, resumed_config
from corpus import sources
from corpus.safe_cuts import SafeCuts
from corpus.tokenizer import ChunkEncoder, character_before_next, load_tokenizer
from engine.triton_kernels import attention_backends
from model import MoETransformer
from planner.machine import cpu_cores
from record import checkpoint
from record.checkpoint import open_model
from record.results import write_whole
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
MOST_TOKENS = 1_000_000  # tokens of the held-out text that are routed, at most
DOMAINS = 10  # domains with a name; all smaller ones together are one more
SHUFFLES = 10  # shuffled labels that the baseline is measured with
TOP_TOKENS = 12  # tokens that are listed for each expert, at most
FEWEST = 20  # a token is listed only if it occurs as often as this


# --- labels of the held-out text


@dataclass
class Labels:
    """The tokens of the held-out text, and the kind and the domain of each: arrays [tokens]."""

    tokens: np.ndarray
    kinds: np.ndarray  # indices in KINDS, or NONE; uint8
    domains: np.ndarray  # indices in `names`, or NONE; uint8
    names: list[str]  # of the domains


def character_kinds(text: str, suffix: str) -> np.ndarray:
    """The kind of every character of a whole file, uint8 [characters].

    The suffix of the file says its language.
    """
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
    """The kind of each token, uint8 [tokens], from the kinds of the text's characters.

    `offsets` [tokens, 2] are the index of a token's first character and the index after its last
    one. A token has the kind of its first character that is not whitespace. A token without such a
    character is whitespace.
    """
    length = len(text)
    # "Solid" characters are those that are not whitespace.
    is_solid = [not character.isspace() for character in text]
    # The index of each solid character, and `length` in place of whitespace.
    solid = np.where(is_solid, np.arange(length), length)
    # next_solid[i] is the first solid index from i on: the minimum of all that follow. numpy
    # accumulates from the left, so the array is reversed before and after.
    next_solid = np.minimum.accumulate(solid[::-1])[::-1]
    next_solid = np.append(next_solid, length)  # for an empty token at the end of the text
    starts = offsets[:, 0]
    ends = offsets[:, 1]
    first_solid = next_solid[starts]
    # Where no solid character follows, the index is `length`: one more kind is read there.
    kinds_and_none = np.append(kinds, NONE)
    kind_of_first = kinds_and_none[first_solid]
    has_solid = first_solid < ends
    found = np.where(has_solid, kind_of_first, KINDS.index("whitespace"))
    return found.astype(np.uint8)


class Located(NamedTuple):
    """A chunk of the corpus, with the file and the domain that it comes from."""

    path: str | None
    domain: str
    text: str
    last: bool  # whether its document ends with it


class FileJob(NamedTuple):
    """What a worker process gets of a file that is held out as a whole or in part."""

    suffix: str
    domain: str
    # All of the file's chunks, as the kind of a character depends on what comes before it. The
    # lists below are by chunk.
    chunks: list[str]
    last: list[bool]  # whether its document ends with it
    held_out: list[bool]
    separated: list[bool]  # whether end-of-text follows it


class FileTokens(NamedTuple):
    """What a worker process returns: the tokens of a file's held-out chunks, and their kinds.

    End-of-text has the kind NONE.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    domain: str


class HeldChunk(NamedTuple):
    """A held-out chunk of a file. The fields are those of ChunkEncoder and of FileJob."""

    text: str
    before: str
    last: bool
    separated: bool


def domain(source: sources.Source, data_name: str) -> str:
    """The domain of the source's latest chunk.

    For the corpus `installed` it is the package that the chunk belongs to. For other corpora it is
    the source's own domain.
    """
    if data_name != "installed" or source.path is None:
        return source.domain()
    path = Path(source.path)
    for packages in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if path.is_relative_to(packages):
            inside = path.relative_to(packages)
            return inside.parts[0]
    return "Python's library"


def _located_chunks(source: sources.Source, config: Config) -> Iterator[Located]:
    for text, last in source.chunks():
        yield Located(source.path, domain(source, config.data), text, last)


def _file_jobs(source: sources.Source, config: Config, held: np.ndarray) -> Iterator[FileJob]:
    """The files of which at least one chunk is held out.

    `held` [chunks of the corpus] says which chunks are held out.
    """
    first = 0  # the number of the file's first chunk
    by_file = itertools.groupby(_located_chunks(source, config), _path_and_domain)
    for (path, name), group in by_file:
        chunks = list(group)
        held_of_file = held[first : first + len(chunks)].tolist()
        first += len(chunks)
        if not any(held_of_file):
            continue
        # In version 1 of the rules of data, end-of-text also follows a held-out chunk whose next
        # chunk is not held out. In version 2 there is no such chunk within a document.
        next_is_held = [*held_of_file[1:], False]
        separated = []
        for chunk, next_held in zip(chunks, next_is_held):
            separated.append(chunk.last or not next_held)
        yield FileJob(
            suffix=Path(path or "").suffix.lower(),
            domain=name,
            chunks=[chunk.text for chunk in chunks],
            last=[chunk.last for chunk in chunks],
            held_out=held_of_file,
            separated=separated,
        )


def _path_and_domain(chunk: Located) -> tuple[str | None, str]:
    return chunk.path, chunk.domain


def _start_worker(tokenizer_json: str, end_of_text_name: str, rules: int) -> None:
    """Keeps the encoder in the worker process, so that it is made once and not for each file."""
    global encode, end_of_text
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has a core
    tokenizer, end_of_text = load_tokenizer(tokenizer_json, end_of_text_name)
    encode = ChunkEncoder(tokenizer, rules)


def _label_file(job: FileJob) -> FileTokens:
    """Runs in a worker process: the tokens of a file's held-out chunks, and their kinds."""
    kinds = character_kinds("".join(job.chunks), job.suffix)
    held_chunks = []
    held_kinds = []
    first = 0  # the index of the chunk's first character in the file
    before = ""
    by_chunk = zip(job.chunks, job.last, job.held_out, job.separated)
    for text, last, held, separated in by_chunk:
        if held:
            held_chunks.append(HeldChunk(text, before, last, separated))
            held_kinds.append(kinds[first : first + len(text)])
        first += len(text)
        before = character_before_next(text, last)
    kinds = np.concatenate(held_kinds)

    tokens: list[int] = []
    labels = []
    first = 0  # from here on, of the held-out characters
    for chunk in SafeCuts(encode).recut(held_chunks):
        kinds_of_chunk = kinds[first : first + len(chunk.text)]
        first += len(chunk.text)
        ids, offsets = encode.ids_and_offsets(chunk.text, chunk.before, chunk.last)
        tokens += ids
        labels.append(token_kinds(offsets, chunk.text, kinds_of_chunk))
        if chunk.separated:
            tokens.append(end_of_text)
            labels.append(np.array([NONE], np.uint8))
    return FileTokens(np.array(tokens, np.int64), np.concatenate(labels), job.domain)


def label(config: Config, corpus: data.Corpus) -> Labels:
    """Labels the held-out tokens of the corpus.

    The text is tokenized again, because the cache has no offsets of tokens in the text. Raises
    ExperimentError when the text is no longer the one that was tokenized.
    """
    source = sources.open_source(config, corpus.rules)
    remedy = "Train it again on this text"
    held = held_out(source, config, corpus.data_hash, remedy, corpus.rules)
    jobs = _file_jobs(source, config, held)
    context = multiprocessing.get_context("fork")
    for_worker = (corpus.tokenizer_json, config.end_of_text, corpus.rules)
    with context.Pool(cpu_cores(), _start_worker, for_worker) as pool:
        files = list(pool.imap(_label_file, jobs, chunksize=4))
    # An empty array first: concatenate needs at least one.
    tokens_of_files = [np.empty(0, int)]
    kinds_of_files = [np.empty(0, np.uint8)]
    for file in files:
        tokens_of_files.append(file.tokens)
        kinds_of_files.append(file.kinds)
    tokens = np.concatenate(tokens_of_files)
    kinds = np.concatenate(kinds_of_files)
    if not np.array_equal(tokens, corpus.validation[:]):
        raise ExperimentError(
            f"{config.data} is not the text that the run was trained on, so what was held out is "
            "not known. Train it again on this text"
        )
    domains, names = _number_domains(files)
    domains = np.where(tokens == corpus.end_of_text, NONE, domains).astype(np.uint8)
    return Labels(tokens, kinds, domains, names)


def _number_domains(files: list[FileTokens]) -> tuple[np.ndarray, list[str]]:
    """(the number of each token's domain [tokens], the names of the domains by number).

    The DOMAINS largest domains have the first numbers, the largest first. All other domains share
    the last number and the name "others".
    """
    names, index_of_file = np.unique([file.domain for file in files], return_inverse=True)
    # The domain of each token, as an index in the alphabetical `names`
    index_of_token = np.repeat(index_of_file, [len(file.tokens) for file in files])
    sizes = np.bincount(index_of_token, minlength=len(names))
    largest = np.argsort(-sizes)[:DOMAINS]
    shown = [str(names[index]) for index in largest]
    if len(names) > DOMAINS:
        shown.append("others")
    number_of_index = np.full(len(names), len(largest))  # the number of "others"
    number_of_index[largest] = np.arange(len(largest))
    return number_of_index[index_of_token], shown


# --- routes


@torch.no_grad()
def routes(model: MoETransformer, windows: np.ndarray) -> np.ndarray:
    """The experts that the tokens [windows, positions] are sent to.

    Returns uint8 [MoE blocks, windows, positions, top_k].
    """
    chosen: list[np.ndarray] = []

    def keep_expert_ids(_router, _inputs, outputs) -> None:
        _logits, _probs, _weights, topk_expert_ids, _one_hot = outputs
        chosen.append(topk_expert_ids.to(torch.uint8).cpu().numpy())

    routers = [block.ffn.router for block in model.blocks if block.moe]
    hooks = [router.register_forward_hook(keep_expert_ids) for router in routers]
    device = model.norm.weight.device
    batch_size = model.config.batch_size
    with attention_backends(device):
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size].astype(np.int64)
            tokens = torch.from_numpy(batch)
            model.hidden(tokens.to(device))
    for hook in hooks:
        hook.remove()
    # Each batch passed through all blocks in turn: the results of a block are len(routers) apart.
    num_blocks = len(routers)
    by_block = []
    for block in range(num_blocks):
        of_block = chosen[block::num_blocks]
        by_block.append(np.concatenate(of_block))
    return np.stack(by_block)


# --- statistics


def table(experts: np.ndarray, labels: np.ndarray, num_experts: int, number: int) -> np.ndarray:
    """The number of routed tokens for each expert and label, [num_experts, number].

    `experts` is [tokens, top_k]. `labels` [tokens] are 0 to number - 1, or NONE, which is left out.
    """
    # One number for each pair of expert and label, so that one bincount counts all of them. uint16
    # holds it: experts and labels are bytes.
    pair = experts.astype(np.uint16) * LABELS + labels[:, None]
    counts = np.bincount(pair.ravel(), minlength=num_experts * LABELS)
    return counts.reshape(num_experts, LABELS)[:, :number]


def mutual_information(counts: np.ndarray) -> float:
    """The mutual information between row and column of a table of counts, in bits.

    It is the sum of p(row, column) log2(p(row, column) / (p(row) p(column))).
    """
    joint = counts / counts.sum()
    of_row = joint.sum(1, keepdims=True)
    of_column = joint.sum(0, keepdims=True)
    if_independent = of_row * of_column
    occurs = joint > 0  # the limit of p log p at 0 is 0
    p = joint[occurs]
    ratio = p / if_independent[occurs]
    return float((p * np.log2(ratio)).sum())


def entropy_bits(counts: np.ndarray) -> float:
    """The entropy of the distribution with these counts, in bits."""
    p = counts[counts > 0] / counts.sum()
    return float((p * np.log2(1 / p)).sum())


def shuffled(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The labels [tokens] rotated by a random distance, a tenth of the text at least.

    A rotation keeps the statistics of a text, in which neighbours have equal labels more often than
    chance. The distance takes every label far away from its token.
    """
    least = len(labels) // 10
    distance = random.integers(least, len(labels) - least)
    return np.roll(labels, int(distance))


def information(
    experts: np.ndarray, labels: np.ndarray, num_experts: int, number: int
) -> dict[str, list]:
    """The mutual information between expert and label in each MoE block, in bits.

    `experts` is [MoE blocks, tokens, top_k], `labels` [tokens] has values below `number`. "bits" is
    by block. "shuffled" and "shuffled_most" are the mean and the largest mutual information with
    SHUFFLES shuffled labels, by block.
    """
    random = np.random.default_rng(0)
    shuffles = [shuffled(labels, random) for _ in range(SHUFFLES)]
    bits = []
    baseline = []  # [MoE blocks, SHUFFLES]
    for layer in experts:
        counts = table(layer, labels, num_experts, number)
        bits.append(mutual_information(counts))
        shuffled_bits = []
        for other in shuffles:
            counts = table(layer, other, num_experts, number)
            shuffled_bits.append(mutual_information(counts))
        baseline.append(shuffled_bits)
    return dict(
        bits=bits,
        shuffled=np.mean(baseline, axis=1).tolist(),
        shuffled_most=np.max(baseline, axis=1).tolist(),
    )


def top_tokens(
    experts: np.ndarray, tokens: np.ndarray, num_experts: int, tokenizer: Tokenizer
) -> list[list]:
    """For each expert the tokens that distinguish it most, as [text, share of them sent there].

    These are tokens that an expert receives more often than its share of all routed tokens says.
    They are sorted by their term of the mutual information between expert and token: n log(n / e),
    for n times that the expert receives the token and e times that would be expected.

    `experts` is [tokens, top_k], `tokens` [tokens].
    """
    counts = _count_tokens(experts, tokens, num_experts)
    occurrences = np.bincount(tokens)  # of each token in the text
    top_k = experts.shape[1]
    routed_by_expert = counts.sum(1)
    share_by_expert = routed_by_expert / routed_by_expert.sum()
    found = []
    for received, share in zip(counts, share_by_expert):
        # Each occurrence of a token is sent to top_k experts.
        expected = share * occurrences * top_k
        with np.errstate(divide="ignore", invalid="ignore"):
            score = received * np.log(received / expected)
        distinguishes = (received > expected) & (occurrences >= FEWEST)
        score = np.where(distinguishes, score, 0)
        highest_first = np.argsort(-score, kind="stable")
        top = []
        for token in highest_first[:TOP_TOKENS]:
            if score[token] <= 0:
                break
            text = tokenizer.decode([int(token)], skip_special_tokens=False)
            share_sent_here = float(received[token] / occurrences[token])
            top.append([text, round(share_sent_here, 3)])
        found.append(top)
    return found


def _count_tokens(experts: np.ndarray, tokens: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert receives each token, [num_experts, largest token + 1]."""
    size = int(tokens.max()) + 1
    pair = experts.astype(np.int64) * size + tokens[:, None]
    counts = np.bincount(pair.ravel(), minlength=num_experts * size)
    return counts.reshape(num_experts, size)


# --- the analysis of a run


def analyse(checkpoints: list[Path]) -> dict:
    """The analysis of a run, as the key "experts" of its result in a study's results.json.

    It holds the mutual information by layer and step, and the tables and top tokens of the last
    checkpoint. `checkpoints` are those of the run, the oldest first. Raises
    ExperimentError when the model is dense, or the text is no longer the one that was tokenized.
    """
    last = checkpoints[-1]
    state = checkpoint.load(last)
    config, _ = resumed_config(state["config"], {})
    _check_has_experts(config, last)
    corpus = data.prepare(config, checkpoint.data_rules(state))
    labels = label(config, corpus)
    positions = _sampled_positions(len(labels.tokens), config.max_seq_len)
    windows = labels.tokens[positions]
    kinds = labels.kinds[positions].ravel()
    domains = labels.domains[positions].ravel()

    steps = []
    for path in [None, *checkpoints]:  # None is the untrained model
        model, step = _model(path, config)
        experts = _routes_of_tokens(model, windows)
        del model
        by_kind = information(experts, kinds, config.num_experts, len(KINDS))
        by_domain = information(experts, domains, config.num_experts, len(labels.names))
        tokens_seen = step * config.tokens_per_step
        steps.append(
            dict(
                step=step,
                tokens=tokens_seen,
                kind=by_kind,
                domain=by_domain,
            )
        )
        print(_information_message(step, by_kind, by_domain), flush=True)

    # The routes are now those of the last checkpoint.
    top = []
    for layer in experts:
        of_layer = top_tokens(
            layer,
            windows.ravel(),
            config.num_experts,
            corpus.tokenizer,
        )
        top.append(of_layer)
    moe_layers = [layer for layer in range(config.n_layers) if config.is_moe(layer)]
    return dict(
        experts=dict(
            layers=moe_layers,
            tokens=len(kinds),
            without_kind=int((kinds == NONE).sum()),
            kinds=list(KINDS),
            **_label_facts("kind", kinds, len(KINDS), experts, config),
            domains=labels.names,
            **_label_facts("domain", domains, len(labels.names), experts, config),
            steps=steps,
            top_tokens=top,
        )
    )


def _check_has_experts(config: Config, path: Path) -> None:
    """Raises ExperimentError if the model of the checkpoint at `path` is dense."""
    if not config.num_experts:
        raise ExperimentError(
            f"the model in {path} is dense, so it has no experts to analyse. Name a run that was "
            "trained with --num_experts"
        )


def _routes_of_tokens(model: MoETransformer, windows: np.ndarray) -> np.ndarray:
    """`routes` with the tokens of all windows in a row, uint8 [MoE blocks, tokens, top_k]."""
    experts = routes(model, windows)
    num_blocks = experts.shape[0]
    top_k = experts.shape[-1]
    return experts.reshape(num_blocks, -1, top_k)


def _information_message(step: int, by_kind: dict, by_domain: dict) -> str:
    bits_of_kind = np.mean(by_kind["bits"])
    bits_of_domain = np.mean(by_domain["bits"])
    return (
        f"step {step}: mutual information of expert and kind {bits_of_kind:.4f} bits, "
        f"of expert and domain {bits_of_domain:.4f} bits (mean over layers)"
    )


def _sampled_positions(num_tokens: int, length: int) -> np.ndarray:
    """Positions of the tokens to route, [windows, length]: windows spread over the whole text."""
    available = num_tokens // length
    wanted = max(1, MOST_TOKENS // length)
    taken = min(available, wanted)
    # The numbers of the windows that are taken, of 0 to available - 1: as far apart as they can be.
    numbers = np.arange(taken) * available // taken
    starts = numbers * length
    return starts[:, None] + np.arange(length)


def _label_facts(
    name: str, labels: np.ndarray, number: int, experts: np.ndarray, config: Config
) -> dict:
    """How often each label occurs, the entropy of the labels, and the table of each MoE block."""
    labelled = labels[labels != NONE]
    occurrences = np.bincount(labelled, minlength=number)
    tables = []
    for layer in experts:
        counts = table(layer, labels, config.num_experts, number)
        tables.append(counts.tolist())
    return {
        f"{name}_tokens": occurrences.tolist(),
        f"{name}_entropy": entropy_bits(occurrences),
        f"{name}_table": tables,
    }


def _model(path: Path | None, config: Config) -> tuple[MoETransformer, int]:
    """The model of a checkpoint and its step; with no path, the model before the first step."""
    if path is None:
        return _untrained_model(config), 0
    # precision=None: the run's own on a GPU, fp32 on a CPU.
    model, _, state = open_model(str(path), config.device, precision=None)
    return model, state["step"]


def _untrained_model(config: Config) -> MoETransformer:
    """The model before the first step, on the device and in the precision of `open_model`."""
    device = "cpu"
    precision = "fp32"
    if config.device != "cpu" and torch.cuda.is_available():
        device = "cuda"
        precision = config.precision
    changed = dataclasses.replace(
        config,
        precision=precision,
        activation_checkpointing="none",
    )
    with torch.device("meta"):
        model = MoETransformer(changed)
    return model.materialize(device).eval()


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
    write_whole(folder / "experts.json", json.dumps(found, indent=1))
    print(folder / "experts.json")


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
