"""Which experts the held-out text's tokens go to: by kind of token and by package, in every layer, while a run learns.

    python -m studies.experts RUN           of a run's numbered checkpoints; writes RUN/experts.json

How much an expert says of a token's kind is their mutual information, over pairs of a token and an expert that it is sent to.
With finite text it is above zero even for unrelated labels, and neighbours in a text are alike; so it stands beside that of the
same labels, turned round by a random distance. And experts differ before anything was learned, as equal tokens look alike to a
router; so it stands beside that of the untrained model.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pygments.lexers import CppLexer, CythonLexer, PythonLexer
from pygments.token import Comment, Error, Keyword, Name, Number, Operator, Punctuation, String
from tokenizers import Tokenizer

import data
from cli import exit_code, new_parser
from config import Config, ExperimentError, resumed_config
from corpus.sources import Source, open_source
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
LANGUAGES = {
    ".py": (PythonLexer(), PYTHON),
    ".pyi": (PythonLexer(), PYTHON),
    ".pyx": (CythonLexer(), PYTHON),
    ".pxd": (CythonLexer(), PYTHON),
    **{suffix: (CppLexer(), C) for suffix in (".h", ".hpp", ".hh", ".cuh")},
}
NONE = 255  # the label of end-of-text and of what is no text of its language
MOST_TOKENS = 1_000_000  # that are routed
DOMAINS = 10  # the largest ones; the others together are one more
SHUFFLES = 10
TOP_TOKENS = 12  # of each expert
FEWEST = 20  # times that such a token occurs


# ---------------------------------------------------------------- labels of the held-out text


@dataclass
class Labels:
    """The tokens of the held-out text, each with its kind (a place in KINDS, or NONE) and domain (a place in `names`, or NONE)."""

    tokens: np.ndarray
    kinds: np.ndarray
    domains: np.ndarray
    names: list[str]


def character_kinds(text: str, suffix: str) -> np.ndarray:
    """The kind of every character of a whole file, uint8; its language is known by its suffix, and without one it is prose."""
    if suffix not in LANGUAGES:
        return np.full(len(text), KINDS.index("prose"), np.uint8)
    lexer, table = LANGUAGES[suffix]
    kinds = np.full(len(text), NONE, np.uint8)
    for start, token_type, value in lexer.get_tokens_unprocessed(text):
        kind = next((name for parent, name in table if token_type in parent), None)
        if kind and token_type is not Error:
            kinds[start : start + len(value)] = KINDS.index(kind)
    return kinds


def token_kinds(offsets: np.ndarray, text: str, kinds: np.ndarray) -> np.ndarray:
    """The kind of each token, of [first, last) in a text whose characters have `kinds`: that of its first character that is no
    space; of spaces alone it is whitespace."""
    n = len(text)
    solid = np.where([not c.isspace() for c in text], np.arange(n), n)
    following = np.append(np.minimum.accumulate(solid[::-1])[::-1], n)
    place = following[offsets[:, 0]]
    return np.where(
        place < offsets[:, 1], np.append(kinds, NONE)[place], KINDS.index("whitespace")
    ).astype(np.uint8)


def _start_worker(tokenizer_json: str) -> None:
    global tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each has a core
    tokenizer, _ = load_tokenizer(tokenizer_json)


def _file_tokens(job: tuple[str, list[str], list[int], list[bool]]) -> tuple[list[int], np.ndarray]:
    """Tokens and kinds of the chosen pieces of a file; -1 and NONE stand for an end-of-text that follows a piece."""
    suffix, pieces, chosen, ends = job
    kinds, starts = character_kinds("".join(pieces), suffix), np.cumsum([0, *map(len, pieces)])
    tokens, labels = [], []
    for i in chosen:
        encoding = tokenizer.encode(pieces[i], add_special_tokens=False)
        tokens += encoding.ids + [-1] * int(ends[i])
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        labels += [
            token_kinds(offsets, pieces[i], kinds[starts[i] : starts[i + 1]]),
            np.full(int(ends[i]), NONE, np.uint8),
        ]
    return tokens, np.concatenate(labels)


def domain(text: Source, data: str) -> str:
    """The package that the file being read belongs to; of text that is not `installed`, tools.evaluate's domain."""
    if data != "installed":
        return text.domain()
    for packages in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if Path(text.path).is_relative_to(packages):
            return Path(text.path).relative_to(packages).parts[0]
    return "Python's library"


def label(config: Config, corpus: data.Corpus) -> Labels:
    """Labels the corpus's held-out tokens. Raises ExperimentError when the text is no longer the one that was tokenized."""
    chosen = held_out(config, corpus.data_hash, "Train it again on this text")
    places: list[str] = []

    def jobs():
        text, first = open_source(config), 0
        pieces = ((text.path, domain(text, config.data), *piece) for piece in text.chunks())
        for (path, place), group in itertools.groupby(pieces, key=lambda piece: piece[:2]):
            _, _, texts, lasts = zip(*group)
            mine = [*chosen[first : first + len(texts)], False]
            first += len(texts)
            if any(mine):
                places.append(place)
                yield (
                    Path(path or "").suffix.lower(),
                    list(texts),
                    [i for i, take in enumerate(mine) if take],
                    [last or not following for last, following in zip(lasts, mine[1:])],
                )

    tokens, kinds, of_file = [], [], []
    with multiprocessing.get_context("fork").Pool(
        cpu_cores(), _start_worker, (corpus.tokenizer_json,)
    ) as pool:
        for number, (ids, labels) in enumerate(pool.imap(_file_tokens, jobs(), chunksize=4)):
            tokens.append(np.where(np.array(ids) < 0, corpus.end_of_text, ids))
            kinds.append(labels)
            of_file.append(np.full(len(ids), number))
    tokens, kinds, of_file = (
        np.concatenate(x) if x else np.empty(0, int) for x in (tokens, kinds, of_file)
    )
    if len(tokens) != len(corpus.validation) or (tokens != corpus.validation[:]).any():
        raise ExperimentError(
            f"{config.data} is not the text that the run was trained on, so what was held out is not known. Train it "
            "again on this text"
        )
    names, numbers = np.unique(places, return_inverse=True)
    sizes = np.bincount(numbers[of_file], minlength=len(names))
    largest = np.argsort(-sizes)[:DOMAINS]
    shown = [str(names[i]) for i in largest] + (["others"] if len(names) > DOMAINS else [])
    place = np.full(len(names), len(largest))
    place[largest] = np.arange(len(largest))
    return Labels(
        tokens,
        kinds,
        np.where(tokens == corpus.end_of_text, NONE, place[numbers[of_file]]).astype(np.uint8),
        shown,
    )


# ---------------------------------------------------------------- routes


@torch.no_grad()
def routes(model: MoETransformer, windows: np.ndarray) -> np.ndarray:
    """The experts [MoE blocks, windows, positions, top_k] that the tokens [windows, positions] are sent to."""
    chosen: list[np.ndarray] = []
    routers = [block.ffn.router for block in model.blocks if block.moe]
    hooks = [
        router.register_forward_hook(
            lambda _module, _inputs, out: chosen.append(out[3].to(torch.uint8).cpu().numpy())
        )
        for router in routers
    ]
    device, together = model.norm.weight.device, model.config.batch_size
    with attention_backends(device):
        for first in range(0, len(windows), together):
            model.hidden(
                torch.from_numpy(windows[first : first + together].astype(np.int64)).to(device)
            )
    for hook in hooks:
        hook.remove()
    return np.stack([np.concatenate(chosen[i :: len(routers)]) for i in range(len(routers))])


# ---------------------------------------------------------------- statistics


def table(experts: np.ndarray, labels: np.ndarray, num_experts: int, number: int) -> np.ndarray:
    """How many pairs each expert has of each label, [E, labels]: of experts [tokens, K] and labels [tokens]; NONE is left out."""
    pairs = (
        experts.astype(np.uint16) * 256 + labels[:, None]
    )  # labels are bytes, and the last of them is NONE
    return np.bincount(pairs.ravel(), minlength=num_experts * 256).reshape(num_experts, 256)[
        :, :number
    ]


def mutual_information(counts: np.ndarray) -> float:
    """Of the rows and columns of a table of counts, in bits."""
    p = counts / counts.sum()
    independent = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    there = p > 0
    return float((p[there] * np.log2(p[there] / independent[there])).sum())


def entropy_bits(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float((p * np.log2(1 / p)).sum())


def shuffled(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The labels in their order, begun elsewhere: neighbours stay neighbours, and none stays beside its token."""
    return np.roll(labels, int(random.integers(len(labels) // 10, len(labels) - len(labels) // 10)))


def information(
    experts: np.ndarray, labels: np.ndarray, num_experts: int, number: int
) -> dict[str, list]:
    """For each MoE block: the mutual information of experts [L, tokens, K] and labels in bits, and the mean and the largest of
    that of shuffled labels."""
    random = np.random.default_rng(0)
    bits = [mutual_information(table(layer, labels, num_experts, number)) for layer in experts]
    others = [shuffled(labels, random) for _ in range(SHUFFLES)]
    baseline = np.array(
        [
            [mutual_information(table(layer, other, num_experts, number)) for other in others]
            for layer in experts
        ]
    )
    return dict(
        bits=bits, shuffled=baseline.mean(1).tolist(), shuffled_most=baseline.max(1).tolist()
    )


def top_tokens(
    experts: np.ndarray, tokens: np.ndarray, num_experts: int, tokenizer: Tokenizer
) -> list[list]:
    """For each expert the tokens that set it apart most, [text, share of its occurrences that go there]: those that come there more
    often than expected, by their number times the logarithm of how much more often."""
    size = int(tokens.max()) + 1
    counts = np.bincount(
        (experts.astype(np.int64) * size + tokens[:, None]).ravel(), minlength=num_experts * size
    ).reshape(num_experts, size)
    occurs, load = np.bincount(tokens, minlength=size), counts.sum(1)
    found = []
    for mine, share in zip(counts, load / load.sum()):
        expected = share * occurs * experts.shape[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(
                (mine > expected) & (occurs >= FEWEST), mine * np.log(mine / expected), 0
            )
        best = [i for i in np.argsort(-score, kind="stable")[:TOP_TOKENS] if score[i] > 0]
        found.append(
            [
                [
                    tokenizer.decode([int(i)], skip_special_tokens=False),
                    round(float(mine[i] / occurs[i]), 3),
                ]
                for i in best
            ]
        )
    return found


def analyse(checkpoints: list[Path]) -> dict:
    """What `results.json` keeps of a run: information by layer and step, and the tables and top tokens of the last checkpoint."""
    config, _ = resumed_config(checkpoint.load(checkpoints[-1])["config"], {})
    corpus = data.prepare(config)
    labels = label(config, corpus)
    length = config.max_seq_len
    there = len(labels.tokens) // length
    taken = min(there, max(1, MOST_TOKENS // length))
    places = (np.arange(taken) * there // taken * length)[:, None] + np.arange(
        length
    )  # spread over the whole text
    tokens, kinds, domains = (
        x[places].ravel() for x in (labels.tokens, labels.kinds, labels.domains)
    )
    steps = []
    for path in [None, *checkpoints]:
        model, step = _model(path, config)
        experts = routes(model, labels.tokens[places])
        experts = experts.reshape(len(experts), -1, experts.shape[-1])
        del model
        steps.append(
            dict(
                step=step,
                tokens=step * config.tokens_per_step,
                kind=information(experts, kinds, config.num_experts, len(KINDS)),
                domain=information(experts, domains, config.num_experts, len(labels.names)),
            )
        )
        print(
            f"step {step}: mean over layers {np.mean(steps[-1]['kind']['bits']):.4f} bits of the kind, "
            f"{np.mean(steps[-1]['domain']['bits']):.4f} of the domain",
            flush=True,
        )

    def tables(labels, number):
        return [table(layer, labels, config.num_experts, number).tolist() for layer in experts]

    kind_tokens, domain_tokens = (
        np.bincount(x[x != NONE], minlength=n)
        for x, n in ((kinds, len(KINDS)), (domains, len(labels.names)))
    )
    return dict(
        experts=dict(
            layers=[i for i in range(config.n_layers) if config.is_moe(i)],
            tokens=len(tokens),
            without_kind=int((kinds == NONE).sum()),
            kinds=list(KINDS),
            kind_tokens=kind_tokens.tolist(),
            kind_entropy=entropy_bits(kind_tokens),
            kind_table=tables(kinds, len(KINDS)),
            domains=labels.names,
            domain_tokens=domain_tokens.tolist(),
            domain_entropy=entropy_bits(domain_tokens),
            domain_table=tables(domains, len(labels.names)),
            steps=steps,
            top_tokens=[
                top_tokens(layer, tokens, config.num_experts, corpus.tokenizer) for layer in experts
            ],
        )
    )


def _model(path: Path | None, config: Config) -> tuple[MoETransformer, int]:
    """The model of a checkpoint and its step; without one the model as it was before the first step."""
    if path is not None:
        model, _, state = open_model(str(path), config.device, None)
        return model, state["step"]
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = MoETransformer(
            dataclasses.replace(
                config,
                activation_checkpointing="none",
                precision=config.precision if device == "cuda" else "fp32",
            )
        )
    return model.materialize(device).eval(), 0


def main(argv: list[str]) -> None:
    parser = new_parser("python -m studies.experts RUN", __doc__)
    parser.add_argument(
        "run", type=Path, help="folder of a run with numbered checkpoints (--save_every)"
    )
    folder = parser.parse(argv).run
    checkpoints = sorted(
        folder.glob("checkpoint_step_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2])
    )
    if not checkpoints:
        raise ExperimentError(
            f"there is no checkpoint_step_N.pt in {folder}: train with --save_every, and --keep_checkpoints for several"
        )
    found = analyse(checkpoints)
    temporary = folder / ".experts.json.tmp"
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(folder / "experts.json")
    print(folder / "experts.json")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
