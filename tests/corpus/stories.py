"""Texts, configurations and checks that the tests of the corpus share."""

import contextlib
import ctypes
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import data
from config import PRESETS, Config, ExperimentError

PR_SET_CHILD_SUBREAPER = 36  # a constant of prctl(2)
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
]


def story(number: int, words: int = 60) -> str:
    """A document that no other number gives; its marker word occurs in every line."""
    rng = np.random.default_rng(number)
    return "".join(f"doc{number}x {' '.join(rng.choice(WORDS, 10))}\n" for _ in range(words // 10))


STORIES = [story(number) for number in range(40)]


def config_for(tmp_path, **changes) -> Config:
    return Config(
        **{
            **PRESETS["tiny"],
            "data": str(tmp_path / "text"),
            "cache_dir": str(tmp_path / "cache"),
            "vocab_size": 300,
            "max_seq_len": 16,
            "validation_fraction": 0.2,
            "seed": 7,
            **changes,
        }
    )


def fails(config: Config, *words: str):
    """prepare(config) raises one ExperimentError that holds all the words; nothing is left in the cache."""
    with pytest.raises(ExperimentError) as caught:
        data.prepare(config)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert not list(Path(config.cache_dir).glob("*.unfinished"))


def text_of(corpus: data.Corpus, tokens) -> str:
    return corpus.tokenizer.decode(tokens[:].tolist(), skip_special_tokens=False)


def save_tokenizer(path: Path, vocabulary: dict, special: list[str]) -> str:
    """A tokenizer of words, with everything on that a corpus must not get: truncation, padding, added tokens."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=100)
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A " + special[0], special_tokens=[(special[0], tokenizer.token_to_id(special[0]))]
    )
    tokenizer.save(str(path))
    return str(path)


def unigram(pre_tokenizer=None, normalizer=None) -> Tokenizer:
    """A tokenizer in the way of SentencePiece: letters, the word "be", and bytes for the rest."""
    letters = [(chr(c), -5.0) for c in range(32, 127)] + [("\u2581", -4.0), ("\u2581be", -3.0)]
    fallback = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *letters, *fallback], 0, True))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def same(one: data.Corpus, other: data.Corpus) -> bool:
    facts = [
        "tokenizer_json",
        "end_of_text",
        "data_hash",
        "tokenizer_hash",
        "characters",
        "documents",
        "unigram_entropy",
        "unigram_cross_entropy",
    ]
    return all(getattr(one, name) == getattr(other, name) for name in facts) and all(
        np.array_equal(a[:], b[:])
        for a, b in ((one.train, other.train), (one.validation, other.validation))
    )


def forked(action: Callable[[], object]) -> int:
    """Runs action() in a forked process; returns its exit code, or minus the signal that killed it.

    It returns when the workers of that process have ended too: this process inherits and reaps
    them. A fork starts in milliseconds; a new interpreter needs seconds to import.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the parent are not here
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ChildProcessError):  # nobody is left
        while True:
            os.waitpid(-pid, 0)
    return os.waitstatus_to_exitcode(status)
