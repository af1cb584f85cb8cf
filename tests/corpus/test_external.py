"""Token shards of nanoGPT, modded-nanogpt and llm.c as a corpus."""

import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import ExperimentError
from corpus import external, tokenizer
from corpus.external import joined, open_checked_shard, open_external_shard
from corpus.token_reader import file_version
from corpus.tokenizer import load_tokenizer
from tests.corpus.stories import STORIES, config_for, fails, same

# --- one shard


def external_shard(
    path: Path, tokens, magic: int | None = 20240520, version: int = 1, count: int | None = None
) -> Path:
    """A shard of llm.c, of modded-nanogpt or, without a magic number, of nanoGPT."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = (
        b""
        if magic is None
        else struct.pack(
            "<256i", magic, version, len(tokens) if count is None else count, *[0] * 253
        )
    )
    path.write_bytes(
        header + np.array(tokens, np.uint32).astype("<u4" if magic == 20240801 else "<u2").tobytes()
    )
    return path


LAYOUTS = [dict(magic=None), dict(), dict(magic=20240801, version=7)]


@given(
    tokens=st.lists(st.integers(0, 50_000), min_size=1, max_size=700),
    cut=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=100, deadline=None)
def test_external_shards_are_read_as_they_were_written_and_refused_when_cut_short(
    tmp_path_factory, tokens, cut, layout
):
    path = external_shard(tmp_path_factory.getbasetemp() / "external.bin", tokens, **layout)
    read = open_external_shard(path)
    assert (
        read.dtype == (np.uint32 if layout.get("version") == 7 else np.uint16)
        and read[:].tolist() == tokens
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: -min(cut, len(whole) - 1)])
    if layout != LAYOUTS[0] or cut % 2:  # without a header, half a token is all that can be seen
        with pytest.raises(ExperimentError, match="cut short.*again"):
            open_external_shard(path)


# --- several shards as one


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(-3, 60), st.integers(-3, 60)
)
@settings(max_examples=100, deadline=None)
def test_several_shards_are_sliced_like_one_array(tmp_path_factory, lengths, first, last):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    shards = []
    for number, tokens in enumerate(np.split(whole, np.cumsum(lengths)[:-1])):
        path = external_shard(tmp_path_factory.getbasetemp() / f"{number}.bin", tokens)
        shards.append(open_external_shard(str(path)))
    tokens = joined(shards)
    assert len(tokens) == len(whole) and tokens.dtype == np.uint16
    assert tokens[first:last].tolist() == whole[first:last].tolist()
    for taken in range(len(whole) + 1):
        assert tokens.between(0, taken)[:].tolist() == whole[:taken].tolist()
        assert tokens.between(taken, len(whole))[:].tolist() == whole[taken:].tolist()


# --- as a corpus


@pytest.fixture
def bins(tmp_path, folder):
    """(configuration for a folder of shards, the tokens of the stories)"""
    (tmp_path / "tok.json").write_text(tokenizer.train_tokenizer(STORIES, 300))
    tok, end = load_tokenizer((tmp_path / "tok.json").read_text())
    ids = [i for text in STORIES for i in [*tok.encode(text).ids, end]]
    return config_for(
        tmp_path, data=str(tmp_path / "bins"), tokenizer=str(tmp_path / "tok.json")
    ), ids


NAMES = [
    ("train.bin", "val.bin"),
    ("fineweb_train_000001.bin", "fineweb_val_000000.bin"),
    ("stories_train.bin", "stories_validation.bin"),
]


@pytest.mark.parametrize("names, layout", zip(NAMES, LAYOUTS))
def test_shards_with_a_validation_file(tmp_path, bins, names, layout):
    config, ids = bins
    external_shard(tmp_path / "bins" / names[0], ids[:3000], **layout)
    external_shard(
        tmp_path / "bins" / names[0].replace("1.bin", "2.bin").replace("train.bin", "train2.bin"),
        ids[3000:5000],
        **layout,
    )
    external_shard(tmp_path / "bins" / names[1], ids[5000:], **layout)
    corpus = data.prepare(config)
    assert corpus.train[:].tolist() == ids[:5000] and corpus.validation[:].tolist() == ids[5000:]
    p = np.bincount(ids[:5000])[np.bincount(ids[:5000]) > 0] / 5000
    assert corpus.unigram_entropy == pytest.approx(-np.sum(p * np.log(p)))
    size = corpus.tokenizer.get_vocab_size()
    smoothed = (np.bincount(ids[:5000], minlength=size) + 1) / (5000 + size)
    assert corpus.unigram_cross_entropy == pytest.approx(-np.log(smoothed[ids[5000:]]).mean())
    assert corpus.documents == 40 and corpus.characters == len("<|endoftext|>") * 40 + sum(
        map(len, STORIES)
    )
    inputs, targets = next(data.batches(corpus.train, config, 0))
    assert np.array_equal(inputs, data.sequences(np.array(ids[:5000]), 16, 7, 0, 8)[:, :-1])


def test_shards_without_a_validation_file_hold_out_the_end(tmp_path, bins, capsys):
    config, ids = bins
    for number in range(3):
        external_shard(tmp_path / "bins" / f"part{number}.bin", ids[2000 * number :][:2000])
    corpus = data.prepare(config)
    total = min(6000, len(ids))
    assert corpus.validation[:].tolist() == ids[:total][-len(corpus.validation) :] and len(
        corpus.validation
    ) == -(-total // 5)
    assert (
        corpus.train[:].tolist() == ids[: total - len(corpus.validation)]
        and "no file is named val" in capsys.readouterr().out
    )
    one = data.prepare(replace(config, data=str(tmp_path / "bins" / "part0.bin")))
    assert one.train[:].tolist() == ids[:1600]


def test_shards_are_counted_once_and_used_where_they_lie(tmp_path, bins, monkeypatch):
    config, ids = bins
    external_shard(tmp_path / "bins" / "train.bin", ids)
    first = data.prepare(config)
    (place,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in place.iterdir()} == {"corpus.json", "tokenizer.json"}
    with monkeypatch.context() as patch:
        patch.setattr(external, "count_tokens", lambda *_: pytest.fail("counted again"))
        assert same(data.prepare(config), first)
    external_shard(tmp_path / "bins" / "train.bin", ids[1:])
    os.utime(tmp_path / "bins" / "train.bin", (1, 1))
    assert data.prepare(config).data_hash != first.data_hash


def test_shards_that_cannot_be_used(tmp_path, bins):
    config, ids = bins
    path = external_shard(tmp_path / "bins" / "train.bin", [*ids, 300, 4])
    fails(
        config,
        "train.bin",
        "token 300 at position",
        "out of range",
        "tok.json has 300 tokens",
        "--tokenizer",
    )
    fails(
        replace(config, tokenizer="train"), "do not say which tokenizer", "--tokenizer", "hf:gpt2"
    )
    external_shard(path, ids, count=len(ids) + 1)
    fails(
        config,
        "train.bin",
        "cut short",
        f"{2 * len(ids):,} bytes",
        f"not {2 * len(ids) + 2:,}",
        "again",
    )
    external_shard(path, ids, version=2)
    fails(config, "train.bin", "version 2, not 1")
    external_shard(path, ids, magic=20240522)
    fails(config, "train.bin", "multiple-choice", "--data")
    path.write_bytes(b"abc")
    fails(config, "train.bin", "cut short: 3 bytes", "uint16")
    path.write_bytes(b"")
    fails(config, "train.bin", "is empty", "--data")
    with open(path, "wb") as file:
        np.save(file, np.array(ids, "<u2"))
    fails(config, "train.bin", "numpy.save", "tofile")
    external_shard(path, ids)
    external_shard(tmp_path / "bins" / "val.bin", ids[:16])
    fails(config, "too small", "16 validation tokens", "17 (max_seq_len + 1)")
    external_shard(tmp_path / "bins" / "val.bin", ids[:17])
    assert len(data.prepare(config).validation) == 17


def test_shards_that_change_while_they_are_counted_or_afterwards(tmp_path, bins, monkeypatch):
    config, ids = bins
    path = external_shard(tmp_path / "bins" / "train.bin", ids)
    corpus = data.prepare(config)
    (facts_file,) = (tmp_path / "cache").glob("*/corpus.json")
    facts = json.loads(facts_file.read_text())
    assert facts["versions"] == [list(file_version(path))] and facts["dtypes"] == ["<u2"]
    facts["versions"][0][2] += 1
    facts_file.write_text(json.dumps(facts))
    with pytest.raises(ExperimentError, match=r"train.bin was changed since its tokens were coun"):
        external.open_counted(facts, 300)
    assert same(data.prepare(config), corpus)  # counted again
    for key in ("versions", "dtypes"):  # as older versions of the program wrote it
        facts.pop(key)
    facts_file.write_text(json.dumps(facts))
    assert same(data.prepare(config), corpus)

    count = external._count_and_hash

    def change(*arguments):
        counted = count(*arguments)
        os.utime(path, (1, 1))
        return counted

    os.utime(path, (2, 2))
    monkeypatch.setattr(external, "_count_and_hash", change)
    fails(config, "train.bin", "changed since", "run again")


# --- the width of the tokens


def raw(path: Path, tokens, dtype: str) -> str:
    """A file that holds nothing but tokens."""
    np.array(tokens).astype(dtype).tofile(path)
    return str(path)


def test_the_width_of_tokens_without_a_header_is_seen(tmp_path, bins, capsys):
    config, ids = bins
    (tmp_path / "bins").mkdir()
    raw(tmp_path / "bins" / "train.bin", ids[:3000], "<u4")
    raw(tmp_path / "bins" / "val.bin", ids[3000:], "<u4")
    for _ in range(2):  # built, and opened again
        corpus = data.prepare(config)
        assert corpus.train[:].tolist() == ids[:3000]
        assert corpus.validation[:].tolist() == ids[3000:]
        assert corpus.train.dtype == np.uint32
    assert "2 of the shards hold 32-bit tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tokens, dtype, vocabulary, expected",
    [
        (range(100), "<u2", 300, "uint16"),
        (range(100), "<u4", 300, "uint32"),
        (range(100), "<u8", 300, "tokens of 64 bits"),
        ([7, 5], "<u4", 300, "two ways: 4 tokens of 16 bits.*or 2 tokens of 32 bits"),
        ([0] * 100, "<u2", 300, "two ways"),
        ([1, 2, 3, 0] * 50, "<u2", 4, "uint16"),
        (range(65_000, 70_000), "<u4", 100_000, "uint32"),
        (range(65_000, 70_000), "<u4", 65_536, "uint32"),  # of another tokenizer: counting sees it
        (range(40_000, 50_000), "<u2", 100_000, "16-bit tokens.*100,000, more than 16 bits"),
        ([7, 5], "<u4", 100_000, "uint32"),
    ],
)
def test_widths(tmp_path, tokens, dtype, vocabulary, expected):
    path = raw(tmp_path / "tokens.bin", tokens, dtype)
    try:
        shard = open_checked_shard(path, config_for(tmp_path), vocabulary)
    except ExperimentError as error:
        assert path in str(error) and re.search(expected, str(error)), error
    else:
        assert shard.dtype.name == expected and shard[:].tolist() == list(tokens)


def test_a_header_that_names_another_width_is_refused(tmp_path):
    path = external_shard(tmp_path / "tokens.bin", [token for i in range(100) for token in (i, 0)])
    with pytest.raises(ExperimentError, match=r"tokens of 32 bits: read with 16 bits"):
        open_checked_shard(str(path), config_for(tmp_path), 300)
    external_shard(path, [7, 0])
    assert open_checked_shard(str(path), config_for(tmp_path), 300)[:].tolist() == [7, 0]
    with pytest.raises(ExperimentError, match=r"more than 16 bits"):
        open_checked_shard(str(path), config_for(tmp_path), 70_000)


def test_the_cache_s_own_shards_are_no_source(tmp_path, folder):
    corpus = data.prepare(config_for(tmp_path))
    (tmp_path / "tok.json").write_text(corpus.tokenizer_json)
    fails(
        config_for(tmp_path, data=corpus.train.paths[0], tokenizer=str(tmp_path / "tok.json")),
        "belongs to this program's cache",
    )
