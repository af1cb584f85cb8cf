"""Texts, configurations and checks that the tests of the corpus share."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import data
from config import PRESETS, Config, ExperimentError

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


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
    return corpus.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


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
