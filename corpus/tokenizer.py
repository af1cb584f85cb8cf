"""Tokenizers: trained on the corpus, or read from a file, a folder or the Hugging Face hub.

Also how texts become ids, as fast as the tokenizer allows.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Tokenizing uses all cores. Unless this is set, tokenizers warns when DataLoader forks its workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from config import DATA_RULES, Config, ConfigError, ExperimentError, expanded
from corpus.sources import first_line

# The names by which an end-of-text token is known. The first one that a tokenizer has is used.
END_OF_TEXT = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "<|im_end|>",
    "[SEP]",
)
# GPT-2 cuts a text into words by this pattern, and byte pairs are merged within a word only.
# The ByteLevel pre-tokenizer of `tokenizers` has it built in.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Version 2 of the rules of data cuts words of more bytes for the training of a tokenizer, whose
# time grows with the square of their length: 1 MB of DNA in one line took 120 s. Text with spaces
# has no such words.
LONGEST_WORD = 256
# Of a text; when the tokenizer knows less of it than the rest, there is a warning.
UNKNOWN_SHARE = 0.1
UNKNOWN_SAMPLE = 100_000  # characters of the beginning that are looked at for unknown ones
TEXTS_AT_A_TIME = 64  # texts in each list that the trainer of `tokenizers` gets
SMALLEST_VOCABULARY = 257  # 256 bytes and end-of-text


def load_tokenizer(json_text: str, end_of_text: str = "") -> tuple[Tokenizer, int]:
    """The tokenizer with this tokenizer.json, and the id of its end-of-text token.

    `end_of_text` names this token; empty: it is the first one of END_OF_TEXT that is there.
    Raises ExperimentError when it is no tokenizer or has no such token.
    """
    try:
        with panic_as_error():
            tokenizer = Tokenizer.from_str(json_text)
    except Exception as error:  # tokenizers raises plain Exception
        raise ExperimentError(
            f"not a tokenizer.json: {error}; give one saved by the tokenizers library"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # "<|endoftext|>" written in a document is ordinary text, not the token.
    tokenizer.encode_special_tokens = True
    if end_of_text:
        token_id = tokenizer.token_to_id(end_of_text)
        if token_id is None:
            raise ExperimentError(
                f"the tokenizer has no token {end_of_text!r}; give --end_of_text one that it has"
            )
        return tokenizer, token_id
    for token in END_OF_TEXT:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return tokenizer, token_id
    raise ExperimentError(
        f"the tokenizer has no end-of-text token of the names {' '.join(END_OF_TEXT)}; name its "
        "own with --end_of_text, or add one of these to it"
    )


def vocabulary(tokenizer: Tokenizer) -> int:
    """How many embeddings the tokenizer needs: its largest id + 1, because ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    """Raises ExperimentError when the model has too few embeddings for the tokenizer."""
    size = vocabulary(tokenizer)
    if size > config.vocab_size:
        raise ExperimentError(
            f"the tokenizer {config.tokenizer} has {size} tokens and the model's vocab_size is "
            f"only {config.vocab_size}; set --vocab_size to at least {size}"
        )


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- training a tokenizer


def trained_size(config: Config) -> int | None:
    """The size of the tokenizer to train, if config.tokenizer is train or train:VOCAB, else None.

    Raises ConfigError for a VOCAB or an end-of-text token that cannot be trained.
    """
    if not re.match(r"train(:|$)", config.tokenizer):
        return None
    if config.end_of_text not in ("", END_OF_TEXT[0]):
        raise ConfigError(
            f"end_of_text={config.end_of_text}: a tokenizer that is trained has {END_OF_TEXT[0]}; "
            "leave --end_of_text out, or give a tokenizer with --tokenizer"
        )
    written = config.tokenizer.removeprefix("train").removeprefix(":").replace("_", "")
    if not written:
        return _checked_size(str(config.vocab_size), config)
    return _checked_size(written, config)


def _checked_size(written: str, config: Config) -> int:
    # isascii, because isdecimal and int() also accept the digits of other scripts.
    is_number = written.isascii() and written.isdecimal()
    if not is_number or not SMALLEST_VOCABULARY <= int(written) <= config.vocab_size:
        raise ConfigError(
            f"tokenizer={config.tokenizer}: VOCAB of train:VOCAB must be a whole number from "
            f"{SMALLEST_VOCABULARY} (256 bytes and end-of-text) to vocab_size={config.vocab_size}"
        )
    return int(written)


def train_tokenizer(texts: Iterable[str], vocab_size: int, rules: int = DATA_RULES) -> str:
    """Trains a byte-level BPE with GPT-2's pre-tokenization; returns its tokenizer.json.

    It has at most vocab_size tokens, <|endoftext|> among them. Every text survives encoding and
    decoding unchanged. `rules` is the version of the rules of data: from 2 on, words longer than
    LONGEST_WORD are cut for the training.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = words
    if rules > 1:
        short_words = pre_tokenizers.FixedLength(length=LONGEST_WORD)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, short_words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT[0]],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    with panic_as_error():
        tokenizer.train_from_iterator(_lists_of(texts), trainer)
    # Encoding a long word is fast: it needs no cut.
    tokenizer.pre_tokenizer = words
    return tokenizer.to_str()


def _lists_of(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of TEXTS_AT_A_TIME."""
    remaining = iter(texts)
    while some := list(itertools.islice(remaining, TEXTS_AT_A_TIME)):
        yield some


# --- reading a tokenizer


def read_tokenizer(config: Config) -> str:
    """The tokenizer.json that config.tokenizer names: a file, a folder with one, or hf:NAME.

    Raises ExperimentError when it cannot be used.
    """
    try:
        text = _read_tokenizer(config.tokenizer)
        tokenizer, _ = load_tokenizer(text, config.end_of_text)
    except (OSError, UnicodeDecodeError, ExperimentError) as error:
        raise ExperimentError(cannot_use_message(config.tokenizer, error)) from error
    check_vocabulary(tokenizer, config)
    return text


def cannot_use_message(name: str, reason: object) -> str:
    """`name` is the value of --tokenizer; `reason` is a text or an error."""
    return (
        f"cannot use the tokenizer {name}: {reason}. {_hub_suggestion(name)}Give --tokenizer the "
        "path of a tokenizer.json or of a folder that holds one, hf:NAME for one of the Hugging "
        "Face hub, or train to train one on the corpus"
    )


def _hub_suggestion(name: str) -> str:
    """The beginning of a remedy, for a name that is no path here and could be a model's on the hub.

    Such a name is MODEL or OWNER/MODEL.
    """
    could_be_a_model = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
    if not could_be_a_model or name.endswith(".json") or Path(name).exists():
        return ""
    return f"For the tokenizer of that name on the Hugging Face hub give --tokenizer hf:{name}. "


def _read_tokenizer(name: str) -> str:
    if name.startswith("hf:"):
        path = Path(_download_tokenizer(name.removeprefix("hf:")))
    else:
        path = expanded(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ExperimentError(f"{path} is no file")
    return path.read_bytes().decode()


def _download_tokenizer(name: str) -> str:
    """The path of the tokenizer.json of a model on the hub.

    Without a network it comes from the hub's local cache.
    """
    from huggingface_hub import errors, hf_hub_download  # slow to import, and only hf: needs it

    try:
        return hf_hub_download(name, "tokenizer.json")
    except errors.LocalEntryNotFoundError as error:
        raise ExperimentError(
            "the Hugging Face hub cannot be reached, and this tokenizer was not downloaded before. "
            "Go online (and unset HF_HUB_OFFLINE), or copy the model's tokenizer.json here and "
            "name its path"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ExperimentError(
            "it has no tokenizer.json on the Hugging Face hub. Make one with transformers: "
            f"AutoTokenizer.from_pretrained({name!r}).save_pretrained('FOLDER')"
        ) from error
    except Exception as error:  # no such model, no consent, a name that cannot be one
        raise ExperimentError(first_line(error)) from error


# --- panics


@contextlib.contextmanager
def panic_as_error() -> Iterator[None]:
    """Turns a panic of a Rust library into ExperimentError.

    A tokenizer panics when its regular expression needs too many steps, for example. A panic
    derives from BaseException, so that `except Exception` would let it through.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ExperimentError(first_line(error)) from None


@contextlib.contextmanager
def _without_rusts_report() -> Iterator[None]:
    """Holds back what is written to stderr, and drops it when the block raises ExperimentError.

    When a Rust library panics, each of its threads writes a report of several lines, which Python
    cannot switch off.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        dropped = False
        try:
            yield
        except ExperimentError:
            dropped = True
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held_back.seek(0)
            if not dropped:
                sys.stderr.write(held_back.read().decode(errors="replace"))


# --- texts to ids


def cannot_encode(error: Exception) -> ExperimentError:
    return ExperimentError(
        f"the tokenizer cannot encode this text: {error}. Choose another text or tokenizer"
    )


Encode = Callable[[list[str]], list[np.ndarray]]  # texts to the ids of each, uint32 arrays


def encoder(tokenizer: Tokenizer) -> Encode:
    """The fastest function from a list of texts to a list of their ids, without special tokens.

    Where tiktoken gives the same ids, it is used: measured 2.3 times as fast as the
    encode_batch_fast of tokenizers on one core.
    """
    facts = json.loads(tokenizer.to_str())
    if not _cuts_words_as_gpt2(facts):
        return TokenizersEncoder(tokenizer)
    # tiktoken needs the tokens in the order of their rank: first the bytes, then what each merge
    # gives.
    tokens = list(BYTE_LETTERS)
    for pair in facts["model"]["merges"]:
        tokens.append("".join(pair))
    some_are_equal = len(set(tokens)) < len(tokens)
    if some_are_equal or not _each_encodes_to_itself(tokenizer, tokens):
        return TokenizersEncoder(tokenizer)
    return TiktokenEncoder(tokenizer, tokens, facts["model"]["vocab"])


class TokenizersEncoder:
    """Encodes with `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        # encode_batch would compute the offsets of the tokens in the text too.
        with _without_rusts_report(), panic_as_error():
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


class TiktokenEncoder:
    """Encodes with tiktoken, to the same ids as `tokenizers`.

    `tokens` are written in BYTE_LETTERS and stand in the order of their rank; `vocab` has their
    ids.

    Why the ids are the same: both libraries cut a text into the same words (a test compares all
    characters), and both merge byte pairs in the order of their rank and from the left. There is
    one difference. tiktoken merges two neighbours whenever together they are a token; tokenizers
    merges only the pairs in the list of merges. This changes nothing if the bytes of each token,
    encoded alone, give that token (`_each_encodes_to_itself`).

    The proof: let two neighbours together be a token T. No merge has crossed the ends of T's bytes,
    so the merges inside them were those that T's bytes get alone. Alone they end in T, so their
    last merge, which is that of these two neighbours, is in the list.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: list[str], vocab: dict[str, int]):
        import tiktoken  # slow to import

        byte_of = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
        ranks = {}
        for rank, token in enumerate(tokens):
            ranks[bytes(byte_of[letter] for letter in token)] = rank
        self.ids = np.array([vocab[token] for token in tokens], np.uint32)  # by rank
        self.encoding = tiktoken.Encoding(
            name="", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={}
        )
        self.slower = TokenizersEncoder(tokenizer)

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> np.ndarray:
        try:
            with panic_as_error():
                ranks = self.encoding.encode_to_numpy(text, disallowed_special=())
        except (ValueError, ExperimentError):
            # The stack of its regular expressions is too small for a million spaces in a row.
            return self.slower([text])[0]
        return self.ids[ranks]


class ChunkEncoder:
    """Encodes chunks of documents, so that a document's tokens decode to its text.

    Tokenizers in the way of SentencePiece put a space before a text and strip spaces at its ends.
    Inside a document they would do the same to each chunk, and the document would gain or lose
    characters. Such a chunk is encoded by a copy of the tokenizer that does neither.

    Version 1 of the rules of data encodes each chunk as if it were a document.
    """

    def __init__(self, tokenizer: Tokenizer, rules: int):
        self.rules = rules
        self.tokenizer = tokenizer
        self.whole = encoder(tokenizer)
        facts = json.loads(tokenizer.to_str())
        self.drops_spaces = _drops_spaces(facts["pre_tokenizer"])
        # The tokenizer of a text that begins its document or not, and ends it or not, and its
        # encoder.
        self.tokenizers: dict[tuple[bool, bool], Tokenizer] = {}
        self.encoders: dict[tuple[bool, bool], Encode] = {}
        for begins, ends in itertools.product((True, False), repeat=2):
            inside = _inside(facts, begins, ends)
            if inside == facts:
                self.tokenizers[begins, ends] = tokenizer
                self.encoders[begins, ends] = self.whole
            else:
                changed = Tokenizer.from_str(json.dumps(inside))
                changed.encode_special_tokens = True
                self.tokenizers[begins, ends] = changed
                self.encoders[begins, ends] = encoder(changed)

    def __call__(self, texts: list[str], before: list[str], ends: list[bool]) -> list[np.ndarray]:
        """The ids of each chunk.

        `before` has the last character of the chunk before it in its document, and is empty for the
        first chunk; `ends` says whether the document ends with the chunk.
        """
        if self.rules == 1:
            return self.whole(texts)
        # Which parts of which texts each encoder gets: nearly always a text is one part.
        parts: dict[tuple[bool, bool], list[tuple[int, int, str]]] = {}
        ids_of: list[list[np.ndarray]] = []
        for number, (text, previous, is_last) in enumerate(zip(texts, before, ends)):
            parts_of_text = self._parts(text, previous)
            ids_of.append([np.empty(0, np.uint32)] * len(parts_of_text))
            for index, (part, begins) in enumerate(parts_of_text):
                parts.setdefault((begins, is_last), []).append((number, index, part))
        for kind, placed in parts.items():
            encoded = self.encoders[kind]([part for _, _, part in placed])
            for (number, index, _), ids in zip(placed, encoded):
                ids_of[number][index] = ids
        return [np.concatenate(ids) for ids in ids_of]

    def ids(self, text: str, before: str, ends: bool) -> list[int]:
        """The ids of one chunk. Raises ExperimentError when the tokenizer cannot encode it."""
        try:
            [ids] = self([text], [before], [ends])
        except Exception as error:  # tokenizers raises plain Exception
            raise cannot_encode(error) from error
        return ids.tolist()

    def ids_and_offsets(self, text: str, before: str, ends: bool) -> tuple[list[int], np.ndarray]:
        """The ids of one chunk, the same as those of `ids`, and their places in the text.

        The offsets, int64 [tokens, 2], are the index of a token's first character in the chunk and
        the index after its last one.
        """
        parts = [(text, True)]
        tokenizers = dict.fromkeys(self.tokenizers, self.tokenizer)
        if self.rules > 1:
            parts = self._parts(text, before)
            tokenizers = self.tokenizers
        ids: list[int] = []
        offsets = [np.empty((0, 2), np.int64)]
        first = 0  # the index of the part's first character in the chunk
        for part, begins in parts:
            encoding = tokenizers[begins, ends].encode(part, add_special_tokens=False)
            ids += encoding.ids
            # The reshape gives an empty list of offsets its second dimension.
            offsets.append(first + np.array(encoding.offsets, np.int64).reshape(-1, 2))
            first += len(part)
        return ids, np.concatenate(offsets)

    def _parts(self, text: str, previous: str) -> list[tuple[str, bool]]:
        """The parts of a chunk, and whether each is encoded as if a document began with it."""
        if not self.drops_spaces:
            return [(text, previous == "")]
        # The tokenizer drops spaces and marks the beginnings of words instead. A chunk that begins
        # inside a word has no mark there.
        begins_inside_a_word = previous != "" and not previous.isspace()
        if not begins_inside_a_word:
            return [(text, True)]
        space = re.search(r"\s", text)
        if space is None:
            return [(text, False)]
        return [(text[: space.start()], False), (text[space.start() :], True)]


def character_before_next(text: str, last: bool) -> str:
    """What ChunkEncoder calls `before` of the chunk that follows this one.

    `last` says whether the document ends with this chunk.
    """
    if last:
        return ""
    return text[-1]


def _inside(facts: dict[str, Any], begins: bool, ends: bool) -> dict[str, Any]:
    """A tokenizer.json for texts that begin their document or not, and end it or not."""
    return facts | dict(
        normalizer=_normalizer_inside(facts["normalizer"], begins, ends),
        pre_tokenizer=_words_inside(facts["pre_tokenizer"], begins),
    )


def _normalizer_inside(normalizer: dict | None, begins: bool, ends: bool) -> dict | None:
    """A normalizer of tokenizer.json, without what it does only at the ends of a document."""
    if normalizer is None:
        return None
    if normalizer["type"] == "Sequence":
        kept = []
        for step in normalizer["normalizers"]:
            step = _normalizer_inside(step, begins, ends)
            if step is not None:
                kept.append(step)
        return normalizer | dict(normalizers=kept)
    if normalizer["type"] == "Prepend" and not begins:
        return None
    if normalizer["type"] == "Strip":
        left = normalizer["strip_left"] and begins
        right = normalizer["strip_right"] and ends
        return normalizer | dict(strip_left=left, strip_right=right)
    return normalizer


def _words_inside(words: dict | None, begins: bool) -> dict | None:
    """A pre-tokenizer of tokenizer.json, without the space that it puts before a document."""
    if words is None or begins:
        return words
    if words["type"] == "Sequence":
        steps = [_words_inside(step, begins) for step in words["pretokenizers"]]
        return words | dict(pretokenizers=steps)
    if words["type"] == "Metaspace":
        return words | dict(prepend_scheme="never")
    if words["type"] == "ByteLevel":
        return words | dict(add_prefix_space=False)
    return words


def _drops_spaces(words: dict | None) -> bool:
    """Whether a pre-tokenizer of tokenizer.json cuts at spaces, drops them, and marks each word."""
    if words is None or words["type"] != "Sequence":
        return False
    kinds = [step["type"] for step in words["pretokenizers"]]
    marks = "Metaspace" in kinds or "ByteLevel" in kinds
    return marks and kinds[0] in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")


# --- what a tokenizer does not know


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The id of the token for what the tokenizer does not know; None if it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:  # of a Unigram model
        return model["unk_id"]
    if model.get("unk_token") is None:
        return None
    return tokenizer.token_to_id(model["unk_token"])


def unknown_share(tokenizer: Tokenizer, texts: list[str]) -> float:
    """The share of characters, spaces apart, that become the unknown token or no token at all.

    Looks at the first UNKNOWN_SAMPLE characters. Raises ExperimentError when the tokenizer fails.
    """
    unknown = unknown_token(tokenizer)
    wanted = UNKNOWN_SAMPLE
    characters = 0
    known_characters = 0
    for text in texts:
        text = text[:wanted]
        wanted -= len(text)
        known = np.zeros(len(text), bool)
        with _without_rusts_report(), panic_as_error():
            encoding = tokenizer.encode(text, add_special_tokens=False)
        for token, (first, last) in zip(encoding.ids, encoding.offsets):
            if token != unknown:
                known[first:last] = True
        is_space = np.array([character.isspace() for character in text], bool)
        characters += int((~is_space).sum())
        known_characters += int((known & ~is_space).sum())
        if not wanted:
            break
    return (characters - known_characters) / max(1, characters)


def _cuts_words_as_gpt2(facts: dict[str, Any]) -> bool:
    """Whether a tokenizer.json describes a BPE that cuts text by GPT2_WORDS and does nothing else.

    Every option that changes the text before, or the merges afterwards, must be off.
    """
    model = facts["model"]
    words = facts["pre_tokenizer"] or {}
    if model["type"] != "BPE" or words.get("type") != "ByteLevel":
        return False
    if words["add_prefix_space"] or not words["use_regex"]:
        return False
    if facts["normalizer"] or not all(token["special"] for token in facts["added_tokens"]):
        return False
    options = (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    return not any(model.get(name) for name in options)


def _each_encodes_to_itself(tokenizer: Tokenizer, tokens: list[str]) -> bool:
    """Whether the bytes of each token, encoded alone, give this one token.

    TiktokenEncoder says why it matters.
    """
    for token in tokens:
        found = tokenizer.model.tokenize(token)
        if [part.value for part in found] != [token]:
            return False
    return True


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte.

    It is the byte's own character if that can be printed, else one of the characters from 256 on.
    """
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = []
    others = 0
    for byte in range(256):
        if byte in printed:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + others))
            others += 1
    return letters


BYTE_LETTERS = _byte_letters()
