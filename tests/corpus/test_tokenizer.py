"""tokenizer.py: tokenizers of folders and of the Hugging Face hub, and the ids that tiktoken gives, without a network."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import data
from config import ConfigError, ExperimentError
from corpus import token_writer
from corpus.tokenizer import (
    LONGEST_WORD,
    ChunkEncoder,
    TiktokenEncoder,
    encoder,
    load_tokenizer,
    train_tokenizer,
    trained_size,
    unknown_share,
)
from tests.corpus.stories import STORIES, config_for, fails, save_tokenizer, story, unigram
from tests.corpus.test_sources import write_rows


@pytest.fixture(scope="module")
def trained() -> str:
    return train_tokenizer(STORIES, 300)


def test_a_folder_with_a_tokenizer(tmp_path, trained):
    (tmp_path / "tok").mkdir()
    config = config_for(
        tmp_path,
        data=str(write_rows(tmp_path / "rows.jsonl", STORIES)),
        tokenizer=str(tmp_path / "tok"),
    )
    fails(config, "tok", "tokenizer.json", "--tokenizer")
    (tmp_path / "tok" / "tokenizer.json").write_text(trained)
    assert data.prepare(config).tokenizer_json == trained


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, trained):
    """The hub's local cache, with a model `org/model` that has a tokenizer."""
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text(trained)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_tokenizer_of_the_hub(tmp_path, hub_cache, trained):
    config = config_for(
        tmp_path, data=str(write_rows(tmp_path / "rows.jsonl", STORIES)), tokenizer="hf:org/model"
    )
    corpus = data.prepare(config)
    assert corpus.tokenizer_json == trained
    fails(
        config_for(tmp_path, data=config.data, tokenizer="hf:org/model", vocab_size=299),
        "hf:org/model",
        "300",
        "--vocab_size",
    )
    (
        hub_cache / "tokenizer.json"
    ).unlink()  # the corpus is there: nothing is asked of the hub any more
    assert np.array_equal(data.prepare(config).train, corpus.train)
    fails(
        config_for(
            tmp_path, data=config.data, tokenizer="hf:org/model", cache_dir=str(tmp_path / "new")
        ),
        "hf:org/model",
        "cannot be reached",
        "Go online",
    )
    fails(config_for(tmp_path, data=config.data, tokenizer="hf:a b/c"), "hf:a b/c", "--tokenizer")


@pytest.mark.parametrize(
    "written, size",
    [
        ("train", 300),
        ("train:280", 280),
        ("train:2_80", 280),
        ("train:257", 257),
        ("hf:a/b", None),
        ("trained.json", None),
    ],
)
def test_the_size_of_a_tokenizer_to_train(tmp_path, written, size):
    assert trained_size(config_for(tmp_path, tokenizer=written)) == size
    if size and size != 257:
        corpus = data.prepare(
            config_for(
                tmp_path, data=str(write_rows(tmp_path / "rows.jsonl", STORIES)), tokenizer=written
            )
        )
        assert corpus.tokenizer.get_vocab_size() == size


@pytest.mark.parametrize(
    "written", ["train:256", "train:301", "train:many", "train:-1", "train:3.5", "train:²"]
)
def test_a_size_that_cannot_be_trained(tmp_path, written):
    with pytest.raises(ConfigError, match=r"train:VOCAB.*257.*vocab_size=300"):
        data.prepare(
            config_for(
                tmp_path, data=str(write_rows(tmp_path / "rows.jsonl", STORIES)), tokenizer=written
            )
        )


def slow(tokenizer, texts):
    return [
        encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


@pytest.mark.slow
@given(st.lists(st.text(), max_size=3))
@example(
    [
        "a" * 70_000,
        " " * 70_000 + "x",
        "!?" * 30_000,
        "<|endoftext|>",
        "\r\n \u2028\u00a0\u3000 don't  I'LL 1²③Ⅷ",
    ]
)
@settings(max_examples=100, deadline=None)
def test_tiktoken_gives_the_ids_of_tokenizers(trained, texts):
    tokenizer, _ = load_tokenizer(trained)
    fast = encoder(tokenizer)
    assert isinstance(fast, TiktokenEncoder), "it is used for the tokenizers that are trained here"
    assert [ids.tolist() for ids in fast(texts)] == slow(tokenizer, texts)


@pytest.mark.slow
def test_every_character_is_cut_alike(trained):
    """Both engines must hold the same characters for letters, numbers and space; letters, digits and signs on both sides show it."""
    tokenizer, _ = load_tokenizer(trained)
    fast = encoder(tokenizer)
    known = [
        chr(c)
        for c in range(sys.maxunicode + 1)
        if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")
    ]
    known = [
        c for c in known if unicodedata.name(c, "?").split("-")[0] not in ("CJK UNIFIED IDEOGRAPH",)
    ] + list("一龥")
    for first in range(0, len(known), 5000):
        text = "".join(f"a{c}1{c}!{c}" for c in known[first : first + 5000])
        assert fast([text])[0].tolist() == slow(tokenizer, [text])[0]


def bpe(merges, pre_tokenizer=None, **options) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(a + b for a, b in merges), "<|endoftext|>"]
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, **options)
    )
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer, used",
    [
        (bpe([("a", "b"), ("ab", "c")]), True),
        (
            bpe([("a", "b"), ("b", "c"), ("a", "bc")]),
            False,
        ),  # abc, alone, is ab and c: tiktoken would join them
        (bpe([("a", "b")], pre_tokenizers.ByteLevel(add_prefix_space=True)), False),
        (
            bpe([("a", "b")], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
            False,
        ),
        (
            bpe(
                [("a", "b")],
                pre_tokenizers.Sequence(
                    [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                ),
            ),
            False,
        ),
        (bpe([("a", "b")], ignore_merges=True), False),
    ],
    ids=range(6),
)
def test_tiktoken_is_used_only_where_it_is_the_same(tokenizer, used):
    texts = ["abc abcabc 123 xabcx", "aab bc cab  "]
    encode = encoder(tokenizer)
    assert isinstance(encode, TiktokenEncoder) is used
    assert [ids.tolist() for ids in encode(texts)] == slow(tokenizer, texts)


# --- trained


@pytest.fixture(scope="module")
def loaded(trained) -> Tokenizer:
    return load_tokenizer(trained)[0]


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_round_trip(loaded, text):
    for some in (text, text + "\ttab\r\n  é 🙂👨‍👩‍👧 \u0000 <|endoftext|> नमस्ते   "):
        ids = loaded.encode(some).ids
        assert loaded.decode(ids) == some
        assert 0 not in ids  # the end-of-text token is never made from text


def test_trained_vocabulary(trained):
    tokenizer, end_of_text = load_tokenizer(trained)
    assert (
        tokenizer.get_vocab_size() == 300 and tokenizer.id_to_token(end_of_text) == "<|endoftext|>"
    )
    small, _ = load_tokenizer(
        train_tokenizer(["aa"], 5000)
    )  # too little text: a smaller vocabulary
    assert small.get_vocab_size() == 257 and small.decode(small.encode("any é").ids) == "any é"


@pytest.mark.slow
def test_training_is_deterministic_across_processes(trained):
    code = "import json, sys; from corpus.tokenizer import train_tokenizer as train; print(train(json.load(sys.stdin), 300))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(data.__file__).parent,
        input=json.dumps(STORIES),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == trained


# --- given


def test_given_tokenizer(tmp_path, folder, trained):
    (tmp_path / "given.json").write_text(trained)
    corpus = data.prepare(
        config_for(tmp_path, tokenizer=str(tmp_path / "given.json"), vocab_size=70_000)
    )
    assert corpus.tokenizer_json == trained and corpus.train.dtype == np.uint32
    with pytest.raises(ExperimentError, match="300.*299.*--vocab_size"):
        data.prepare(config_for(tmp_path, tokenizer=str(tmp_path / "given.json"), vocab_size=299))


def test_a_given_tokenizer_adds_and_drops_nothing(tmp_path, folder):
    path = save_tokenizer(tmp_path / "t.json", {"a": 0, "b": 1}, ["[SEP]", "</s>"])
    corpus = data.prepare(config_for(tmp_path, tokenizer=path))
    assert corpus.end_of_text == corpus.tokenizer.token_to_id("</s>")  # before [SEP] in the list
    assert len(corpus.train) + len(corpus.validation) == sum(
        len(story(i).split()) + 1 for i in range(40)
    )
    assert set(corpus.train[:].tolist()) == {0, corpus.end_of_text}


def test_bad_tokenizers(tmp_path, folder):
    fails(
        config_for(tmp_path, tokenizer=str(tmp_path / "none.json")),
        "none.json",
        "--tokenizer",
        "train",
    )
    fails(config_for(tmp_path, tokenizer=str(folder)), str(folder), "--tokenizer")
    os.mkfifo(tmp_path / "pipe")
    fails(config_for(tmp_path, tokenizer=str(tmp_path / "pipe")), "pipe is no file", "--tokenizer")
    fails(config_for(tmp_path, tokenizer="gpt2"), "--tokenizer hf:gpt2")
    fails(config_for(tmp_path, tokenizer="Qwen/Qwen3-0.6B"), "--tokenizer hf:Qwen/Qwen3-0.6B")
    for content in (b"{}", b"not json", b"\xff"):
        (tmp_path / "bad.json").write_bytes(content)
        fails(config_for(tmp_path, tokenizer=str(tmp_path / "bad.json")), "bad.json", "--tokenizer")
    path = save_tokenizer(tmp_path / "no_end.json", {"a": 0}, ["<other>"])
    fails(config_for(tmp_path, tokenizer=path), "no_end.json", "end-of-text", "<|endoftext|>")
    path = save_tokenizer(
        tmp_path / "gap.json", {"a": 0, "b": 5000}, ["</s>"]
    )  # few tokens, large ids
    fails(config_for(tmp_path, tokenizer=path), "gap.json", "5001", "300")


def test_the_end_of_text_can_be_named(tmp_path, folder):
    path = save_tokenizer(tmp_path / "t.json", {"a": 0}, ["<end>", "</s>"])
    by_name = data.prepare(config_for(tmp_path, tokenizer=path))
    given_name = data.prepare(config_for(tmp_path, tokenizer=path, end_of_text="<end>"))
    tokenizer = by_name.tokenizer
    assert by_name.end_of_text == tokenizer.token_to_id("</s>")
    assert given_name.end_of_text == tokenizer.token_to_id("<end>")
    assert given_name.train[:][len(story(0).split())] in (0, given_name.end_of_text)
    assert by_name.end_of_text not in given_name.train[:]
    # From the cache too, in which both are.
    assert data.prepare(config_for(tmp_path, tokenizer=path)).end_of_text == by_name.end_of_text
    fails(config_for(tmp_path, tokenizer=path, end_of_text="<no>"), "<no>", "--end_of_text")
    with pytest.raises(ConfigError, match="end_of_text=<no>"):
        data.prepare(config_for(tmp_path, end_of_text="<no>"))


# --- long words


def test_only_long_words_are_cut_for_the_training_of_version_2(trained):
    assert train_tokenizer(STORIES, 300, 2) == trained
    letters = np.random.default_rng(0).choice(list("ACGT"), 4 * LONGEST_WORD)
    # Twice the same long word, once two letters later: tokens of its whole length would be found.
    word = "".join(letters)
    texts = [word, word] * 5
    of_version = {}
    for rules in (1, 2):
        tokenizer, _ = load_tokenizer(train_tokenizer(texts, 5000, rules))
        of_version[rules] = tokenizer
        ids = ChunkEncoder(tokenizer, rules).ids(word, before="", ends=True)
        assert tokenizer.decode(ids) == word
    assert max(map(len, of_version[1].get_vocab())) == len(word)
    assert max(map(len, of_version[2].get_vocab())) == LONGEST_WORD


@pytest.mark.parametrize("text", [" " * 10**6, "\n" * 10**6 + "x", "x" * 10**6], ids=range(3))
@pytest.mark.slow
def test_a_million_equal_characters(trained, text):
    tokenizer, _ = load_tokenizer(trained)
    [ids] = encoder(tokenizer)([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert unknown_share(tokenizer, [text]) == 0


# --- a tokenizer that fails, or knows nothing


def backtracking(path: Path) -> str:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$|(a|a?)+$"), "isolated")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_a_tokenizer_that_panics_is_one_line(tmp_path, capfd, monkeypatch, workers):
    (tmp_path / "text.txt").write_text("a" * 60 + "b " + "words " * 50)
    monkeypatch.setattr(token_writer, "_worker_count", lambda _: workers)
    path = backtracking(tmp_path / "t.json")
    config = config_for(tmp_path, data=str(tmp_path / "text.txt"), tokenizer=path)
    fails(config, "cannot encode this corpus", "retry-limit", "--tokenizer")
    assert "panicked" not in capfd.readouterr().err
    tokenizer, _ = load_tokenizer(Path(path).read_text())
    with pytest.raises(ExperimentError, match="cannot encode this text"):
        ChunkEncoder(tokenizer, rules=2).ids("a" * 60 + "b", before="", ends=True)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_tokenizer_that_does_not_know_the_text(tmp_path, folder, capfd, unknown):
    """Without a token for what it does not know, a BPE drops it."""
    letters = {letter: number for number, letter in enumerate("etaoin shrdlu\n")}
    warned = {}
    for some in (letters, letters | {chr(c): 100 + c for c in range(33, 127)}):
        tokenizer = Tokenizer(models.BPE(vocab=some | {"<unk>": 99}, merges=[], unk_token=unknown))
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save(str(tmp_path / "t.json"))
        data.prepare(config_for(tmp_path, tokenizer=str(tmp_path / "t.json")))
        warned[len(some)] = [
            line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")
        ]
    few, all_letters = warned.values()
    assert len(few) == 1 and "t.json does not know" in few[0] and all_letters == []


# --- chunks of a document


def metaspace(scheme):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme)


@pytest.mark.parametrize(
    "tokenizer",
    [
        unigram(metaspace("always")),
        unigram(metaspace("first")),
        unigram(metaspace("never")),
        unigram(
            normalizer=normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        ),
        unigram(metaspace("always"), normalizers.Strip()),
        unigram(metaspace("always"), normalizers.Sequence([normalizers.NFKC()])),
        unigram(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace("always")])),
        bpe([("a", "b")], pre_tokenizers.ByteLevel(add_prefix_space=True)),
        bpe([("a", "b")]),
    ],
    ids=range(9),
)
def test_a_cut_inside_a_document_adds_and_drops_nothing(tokenizer):
    text = "To be  or not\nto be, é漢: \n\n  that is\n the question."
    tokenizer.decoder = tokenizer.decoder or decoders.ByteLevel()
    encode_chunks = ChunkEncoder(tokenizer, rules=2)
    whole = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
    for cut in range(1, len(text)):
        texts = [text[:cut], text[cut:]]
        ids = encode_chunks(texts, before=["", text[cut - 1]], ends=[False, True])
        assert tokenizer.decode(np.concatenate(ids).tolist()) == whole, cut
        places = [
            encode_chunks.ids_and_offsets(*chunk)
            for chunk in zip(texts, ["", text[cut - 1]], [False, True])
        ]
        for part, found, (same_ids, offsets) in zip(texts, ids, places):
            assert found.tolist() == same_ids
            covered = {i for first, last in offsets.tolist() for i in range(first, last)}
            assert {i for i in range(len(part)) if not part[i].isspace()} <= covered
            assert (np.diff(offsets[:, 0]) >= 0).all()
    # Version 1 encodes each chunk as a document.
    first, _ = ChunkEncoder(tokenizer, rules=1)(texts, before=["", "n"], ends=[False, True])
    assert first.tolist() == tokenizer.encode(texts[0], add_special_tokens=False).ids


def test_the_parts_of_a_chunk_stay_in_their_order():
    """The chunks of one batch are encoded together: the first ones decide nothing of the others."""
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace("always")])
    tokenizer = unigram(words)
    texts = ["To b", "e or n", "ot to be"]
    ids = ChunkEncoder(tokenizer, rules=2)(texts, ["", "b", "n"], [False, False, True])
    whole = tokenizer.encode("".join(texts), add_special_tokens=False).ids
    assert tokenizer.decode(np.concatenate(ids).tolist()) == tokenizer.decode(whole)
