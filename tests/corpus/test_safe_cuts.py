"""safe_cuts.py: the parts of a long document have the tokens of the whole document."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from corpus.formats import cut
from corpus.safe_cuts import SafeCuts
from corpus.split import Split
from corpus.token_writer import _marked_chunks
from corpus.tokenizer import ChunkEncoder, character_before_next, load_tokenizer

CODE = Path(__file__).read_text()
ODD = (
    "  Äpfel e\u0301te\u0301 — “x”…  two  spaces ﬁne ①② 漢字仮名交じり文が続く。\r\n\tend\n \n\n x"
)
TEXTS = {
    "code": (CODE + ODD) * 2,
    "one line": (CODE + ODD).replace("\n", " "),
    "no spaces": "".join((CODE + ODD).split()),
    "ideograms": "漢字仮名交じり文が続く。" * 300,
    "accents": "e\u0301te\u0301" * 500,
    "syllables": "\u1112\u1161\u11ab" * 600,
    "two spaces": "a  b   c" * 400,
}
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["</s>", "<unk>"]


def bytes_bpe(words, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return trained(tokenizer, trainer, words, normalizer, decoders.ByteLevel())


def unigram(words, normalizer=None) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    decoder = decoders.Metaspace()
    return trained(Tokenizer(models.Unigram()), trainer, words, normalizer, decoder)


def wordpiece(words, normalizer=None) -> Tokenizer:
    model = models.WordPiece(unk_token="<unk>")
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False)
    return trained(Tokenizer(model), trainer, words, normalizer, decoders.WordPiece())


def trained(tokenizer, trainer, words, normalizer, decoder) -> Tokenizer:
    tokenizer.pre_tokenizer = words
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoder
    tokenizer.train_from_iterator((CODE + ODD).splitlines(True), trainer)
    return load_tokenizer(tokenizer.to_str())[0]


def gpt4_words():
    words = pre_tokenizers.Split(Regex(GPT4_WORDS), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, in_bytes])


def metaspace(**options):
    return pre_tokenizers.Metaspace(prepend_scheme="always", **options)


def collapsing():
    """As in T5: compatible characters are made one, and so are spaces."""
    one_space = normalizers.Replace(Regex(" {2,}"), " ")
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), one_space])


TOKENIZERS = {
    "gpt2": lambda: bytes_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt4, composed": lambda: bytes_bpe(gpt4_words(), normalizers.NFC()),
    "t5": lambda: unigram(metaspace(), collapsing()),
    "old t5": lambda: unigram(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace()])
    ),
    "whole lines": lambda: unigram(metaspace(split=False)),
    "bert": lambda: wordpiece(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
}


class Text:
    """A source of one document, in chunks of about `length` characters."""

    def __init__(self, text: str, length: int):
        self.parts = list(cut(io.StringIO(text, newline=""), length))

    def chunks(self, start=None):
        first = start["pieces"] if start else 0
        return iter(self.parts[first:])


def marked(source: Text, encode: ChunkEncoder, start=None) -> list:
    decided = Split(True, np.zeros(len(source.parts), bool), 0, frozenset())
    return list(_marked_chunks(source, start, decided, SafeCuts(encode)))


def ids_of(chunks: list, encode: ChunkEncoder) -> list[int]:
    texts, before, ends = zip(*((chunk.text, chunk.before, chunk.last) for chunk in chunks))
    return np.concatenate(encode(texts, before, ends)).tolist()


def unknown_once(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids with one unknown token for several in a row: a long unknown word is cut anywhere."""
    unknown = tokenizer.token_to_id("<unk>")
    kept = []
    for token in ids:
        if token != unknown or kept[-1:] != [unknown]:
            kept.append(token)
    return kept


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_parts_of_a_document_have_its_tokens(name):
    tokenizer = TOKENIZERS[name]()
    encode = ChunkEncoder(tokenizer, rules=2)
    for kind, text in TEXTS.items():
        source = Text(text, 500)
        assert len(source.parts) > 1
        chunks = marked(source, encode)
        assert sum(chunk.length for chunk in chunks) == len(text)
        assert "".join(chunk.text for chunk in chunks) == text
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        ids = ids_of(chunks, encode)
        assert unknown_once(tokenizer, ids) == unknown_once(tokenizer, whole), kind


class Part(NamedTuple):
    text: str
    before: str
    last: bool


def test_evaluation_cuts_a_document_as_training_does():
    encode = ChunkEncoder(TOKENIZERS["gpt2"](), rules=2)
    source = Text(TEXTS["code"], 500)
    parts = []
    before = ""
    for text, last in source.chunks():
        parts.append(Part(text, before, last))
        before = character_before_next(text, last)
    found = list(SafeCuts(encode).recut(parts))
    assert found == [(chunk.text, chunk.before, chunk.last) for chunk in marked(source, encode)]


def test_a_build_continues_with_the_rest_of_a_chunk():
    encode = ChunkEncoder(TOKENIZERS["gpt2"](), rules=2)
    source = Text(TEXTS["code"], 500)
    chunks = marked(source, encode)
    assert any(chunk.moved for chunk in chunks)
    for done, chunk in enumerate(chunks[:-1], 1):
        start = dict(pieces=done, before=chunk.text[-1], moved=chunk.moved)
        assert marked(source, encode, start) == chunks[done:]


def test_a_long_run_of_one_letter_is_cut_anywhere():
    encode = ChunkEncoder(TOKENIZERS["gpt2"](), rules=2)
    for text in ("a" * 5000, " " * 5000):
        chunks = marked(Text(text, 500), encode)
        assert "".join(chunk.text for chunk in chunks) == text
