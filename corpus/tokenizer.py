"""Tokenizers: trained on the corpus, or read from a file, a folder or the Hugging Face hub; and how texts become ids."""

import hashlib
import itertools
import json
import os
import re
from pathlib import Path

# Tokenizing uses all cores; saying so keeps tokenizers from warning when DataLoader forks its workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from config import Config, ConfigError, ExperimentError
from corpus.sources import first_line

END_OF_TEXT = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "<|im_end|>",
    "[SEP]",
)  # first one wins
# How GPT-2 cuts a text into words, within which byte pairs are merged; tokenizers' ByteLevel has it built in.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def load_tokenizer(json_text: str) -> tuple[Tokenizer, int]:
    """The tokenizer whose tokenizer.json has this text, and the id of its end-of-text token. Raises ExperimentError."""
    try:
        tokenizer = Tokenizer.from_str(json_text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ExperimentError(
            f"not a tokenizer.json: {error}; give one saved by the tokenizers library"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = (
        True  # "<|endoftext|>" written in a document is ordinary text, not the token
    )
    for token in END_OF_TEXT:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return tokenizer, token_id
    raise ExperimentError(
        f"the tokenizer has no end-of-text token; add one of {' '.join(END_OF_TEXT)} to it"
    )


def train_tokenizer(texts, vocab_size: int) -> str:
    """Trains a byte-level BPE (GPT-2's pre-tokenization) of at most vocab_size tokens, <|endoftext|> among them, on an
    iterable of texts; returns its tokenizer.json. Every text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = iter(texts)
    tokenizer.train_from_iterator(
        iter(lambda: list(itertools.islice(texts, 64)), []),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT[0]],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    return tokenizer.to_str()


def vocabulary(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps


def trained_size(config: Config) -> int | None:
    """The size of the tokenizer to train on the corpus, of train or train:VOCAB; None when one is given."""
    if not re.match(r"train(:|$)", config.tokenizer):
        return None
    size = config.tokenizer.removeprefix("train").removeprefix(":").replace("_", "") or str(
        config.vocab_size
    )
    if not (size.isascii() and size.isdecimal() and 257 <= int(size) <= config.vocab_size):
        raise ConfigError(
            f"tokenizer={config.tokenizer}: VOCAB of train:VOCAB must be a whole number from 257 (256 bytes and "
            f"end-of-text) to vocab_size={config.vocab_size}"
        )
    return int(size)


def read_tokenizer(config: Config) -> str:
    """The text of the tokenizer.json that config.tokenizer names: a file, a folder with one, or hf:NAME."""
    name = config.tokenizer
    try:
        path = Path(
            _download_tokenizer(name.removeprefix("hf:")) if name.startswith("hf:") else name
        ).expanduser()
        if path.is_dir():
            path /= "tokenizer.json"
        text = path.read_bytes().decode()
        tokenizer, _ = load_tokenizer(text)
    except (OSError, UnicodeDecodeError, ExperimentError) as error:
        raise ExperimentError(
            f"cannot use the tokenizer {name}: {error}. Give --tokenizer the path of a tokenizer.json or of a "
            "folder that holds one, hf:NAME for one of the Hugging Face hub, or train to train one on the "
            "corpus"
        ) from error
    check_vocabulary(tokenizer, config)
    return text


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    if (size := vocabulary(tokenizer)) > config.vocab_size:
        raise ExperimentError(
            f"the tokenizer {config.tokenizer} has {size} tokens and the model's vocab_size is only "
            f"{config.vocab_size}; set --vocab_size to at least {size}"
        )


def _download_tokenizer(name: str) -> str:
    """Path of the tokenizer.json of a model on the hub, from the hub's local cache when there is no network."""
    from huggingface_hub import errors, hf_hub_download  # slow to import, and only hf: needs it

    try:
        return hf_hub_download(name, "tokenizer.json")
    except errors.LocalEntryNotFoundError as error:
        raise ExperimentError(
            "the Hugging Face hub cannot be reached and has not been asked for it before. Go online (and unset "
            "HF_HUB_OFFLINE), or copy the model's tokenizer.json here and name its path"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ExperimentError(
            "it has no tokenizer.json on the Hugging Face hub. Make one with transformers: "
            f"AutoTokenizer.from_pretrained({name!r}).save_pretrained('FOLDER')"
        ) from error
    except Exception as error:  # no such model, no consent, a name that cannot be one
        raise ExperimentError(first_line(error)) from error


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- texts to ids


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, without special tokens. Raises ExperimentError when the tokenizer has none for it."""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises plain Exception
        raise ExperimentError(
            f"the tokenizer cannot encode this text: {error}. It has no token for what it does not know"
        ) from error


def encoder(tokenizer: Tokenizer):
    """A function from a list of texts to a list of their ids, uint32 arrays, without special tokens. Where tiktoken gives the
    same ids it is used: measured 2.3 times as fast as tokenizers' encode_batch_fast on one core.

    The same ids: words are cut alike (a test compares all characters), and byte pairs are merged alike, in the order of their
    rank and from the left, with one difference: tiktoken merges two neighbours whenever together they are a token,
    tokenizers only those that the list of merges has. That never differs if each token's bytes, alone, merge to that token.
    For take two neighbours that are together a token T. No merge has crossed the ends of T's bytes, so inside them the
    merges were those that T's bytes see alone; these end in T, so its last step, that of these neighbours, is in the list.
    """

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = tokenizer.encode_batch_fast(
            texts, add_special_tokens=False
        )  # _fast leaves out the offsets
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    facts = json.loads(tokenizer.to_str())
    model, words = facts["model"], facts["pre_tokenizer"] or {}
    options = (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    if (
        model["type"] != "BPE"
        or facts["normalizer"]
        or any(model.get(name) for name in options)
        or not all(token["special"] for token in facts["added_tokens"])
        or words.get("type") != "ByteLevel"
        or words["add_prefix_space"]
        or not words["use_regex"]
    ):
        return encode

    letters = dict(zip(_byte_letters(), range(256)))
    tokens = [*letters, *("".join(pair) for pair in model["merges"])]  # in the order of their rank
    alone = (tokenizer.model.tokenize(token) for token in tokens)
    if len(set(tokens)) < len(tokens) or any(
        [found.value for found in merged] != [token] for token, merged in zip(tokens, alone)
    ):
        return encode
    import tiktoken  # slow to import

    ranks = {bytes(letters[letter] for letter in token): rank for rank, token in enumerate(tokens)}
    ids = np.array([model["vocab"][token] for token in tokens], np.uint32)
    fast = tiktoken.Encoding(name="", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [ids[fast.encode_to_numpy(text, disallowed_special=())] for text in texts]


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself if it can be printed, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
