"""data.py: sources, split, tokenizer, shards, cache, order."""

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import PRESETS, Config, ExperimentError
from corpus import shards, sources
from corpus.token_files import open_shard
from corpus.tokenizer import load_tokenizer, sha256, train_tokenizer
from tests.corpus.conftest import folder  # noqa: F401 (a fixture)
from tests.corpus.stories import config_for, fails, save_tokenizer, story, text_of

ROOT = Path(data.__file__).parent
# --- sources


def test_python_is_the_standard_library_without_odd_files(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    for name in (
        "a.py",
        "b/c.py",
        "b/__pycache__/c.py",
        "site-packages/p.py",
        "dist-packages/q.py",
        "d.txt",
    ):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\r\n" + story(len(name)), newline="")
    (library / "empty.py").write_text("")
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    paths = {
        "stdlib": library,
        "purelib": library / "site-packages",
        "platlib": library / "site-packages",
    }
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(paths[name]))
    config = config_for(tmp_path, data="python")
    assert [os.path.relpath(f, library) for f in sources.open_source(config).files] == [
        "a.py",
        "empty.py",
        "latin.py",
        "b/c.py",
    ]
    assert [t.split("\r\n")[0] for t, _ in sources.open_source(config).chunks()] == [
        "# a.py",
        "# b/c.py",
    ]
    assert data.prepare(config).documents == 2


def test_installed_adds_source_headers_and_text_of_packages_once(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    names = (
        "a.py",
        "site-packages/p.py",
        "site-packages/p/h.cuh",
        "site-packages/p/m.md",
        "site-packages/p/x.so",
        "site-packages/p/s.pyi",
        "site-packages/p/t.hpp",
        "site-packages/p/LICENSE.txt",
        "site-packages/p/u.rst",
    )
    for name in names:
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(name)
    paths = {
        "stdlib": library,
        "purelib": library / "site-packages",
        "platlib": library / "site-packages",
    }
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(paths[name]))
    found = [
        os.path.relpath(f, library)
        for f in sources.open_source(config_for(tmp_path, data="installed")).files
    ]
    assert found[0] == "a.py" and sorted(found) == sorted(n for n in names if not n.endswith(".so"))


def test_real_standard_library_is_found():
    files = sources.open_source(Config(**PRESETS["tiny"])).files
    assert len(files) > 300 and files == sources.open_source(Config(**PRESETS["tiny"])).files
    assert not any("site-packages" in f or "dist-packages" in f for f in files)


def test_user_files_folders_and_globs(tmp_path):
    text = tmp_path / "text"
    (text / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.MD", "c.py", "d.pdf", "sub/e.txt"):
        (text / name).write_text(name)
    (text / "f.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n{"text": null}\n')
    pyarrow.parquet.write_table(pa.table({"body": ["x"], "text": ["three"]}), text / "g.parquet")

    def documents(where):
        config = config_for(tmp_path, data=str(where))
        return [t for t, _ in sources.open_source(config).chunks()]

    assert documents(text) == ["a.txt", "b.MD", "c.py", "one", "two", "three", "sub/e.txt"]
    assert documents(text / "*.txt") == ["a.txt"]
    assert documents(text / "**" / "*.txt") == ["a.txt", "sub/e.txt"]
    assert documents(text / "f.jsonl") == ["one", "two"]
    config = config_for(tmp_path, data=str(text / "g.parquet"), text_field="body")
    assert [t for t, _ in sources.open_source(config).chunks()] == ["x"]


def test_line_ends_and_characters_arrive_unchanged(tmp_path):
    text = "a\r\nb\rc\n\n\ttab \u2028 é 🙂\x0b\x0c\x01 end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    for name in ("a.txt", "b.jsonl"):
        config = config_for(tmp_path, data=str(tmp_path / name))
        assert [t for t, _ in sources.open_source(config).chunks()] == [text]


def test_long_documents_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (50, 50))
    text = "".join(story(i) for i in range(3)) + "é" * 333 + "\nend"
    (tmp_path / "a.txt").write_text(text)
    config = config_for(tmp_path, data=str(tmp_path / "a.txt"))
    pieces = list(sources.open_source(config).chunks())
    assert "".join(t for t, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(t) for t, _ in pieces) <= 100  # also where the line is longer than that
    assert sum(t.endswith("\n") for t, _ in pieces) > len(pieces) / 2


# --- user errors: one message that names the place and the remedy


def test_bad_paths(tmp_path, folder):
    fails(config_for(tmp_path, data="pyhton"), "pyhton", "Did you mean python?", "--data")
    fails(
        config_for(tmp_path, data=str(tmp_path / "nothing.txt")), "nothing.txt", "no file or folder"
    )
    fails(config_for(tmp_path, data=str(tmp_path / "*.nothing")), "*.nothing", ".jsonl", "--data")
    (folder / "a.pdf").write_bytes(b"%PDF")
    fails(config_for(tmp_path, data=str(folder / "a.pdf")), "a.pdf", ".parquet", "Convert")
    fails(config_for(tmp_path, data=str(folder / "*.pdf")), "*.pdf", ".parquet", "Convert")
    (tmp_path / "hollow").mkdir()
    fails(config_for(tmp_path, data=str(tmp_path / "hollow")), "hollow", ".txt")


def test_empty_files(tmp_path, folder):
    (tmp_path / "empty.txt").write_text("")
    fails(config_for(tmp_path, data=str(tmp_path / "empty.txt")), "empty.txt", "is empty", "--data")
    (folder / "empty.txt").write_text("")  # among others: no text, no document
    assert data.prepare(config_for(tmp_path)).documents == 40


@pytest.mark.parametrize(
    "name, place",
    [
        ("bad.txt", "bad.txt: not text in UTF-8: invalid byte at offset 46513"),
        ("bad.jsonl", "bad.jsonl:501: field 'text' is not text in UTF-8: invalid byte at offset 3"),
    ],
)
def test_undecodable_text_is_named_with_the_byte(tmp_path, name, place, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (50, 50))
    good = "".join(
        json.dumps({"text": "x é" * 20}, ensure_ascii=False) + "\n" for _ in range(500)
    ).encode()
    (tmp_path / name).write_bytes(good + b'{"text": "caf\xe9"}\n')
    fails(config_for(tmp_path, data=str(tmp_path / name)), place)


def test_bad_rows(tmp_path):
    def jsonl(*lines):
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        return config_for(tmp_path, data=str(tmp_path / "rows.jsonl"))

    fails(jsonl('{"text": "a"}', '{"text": '), "rows.jsonl:2", "not valid JSON")
    fails(
        jsonl('{"text": "a"}', "", '{"body": "a", "id": 1}'),
        "rows.jsonl:3",
        "'text'",
        "body, id",
        "--text_field",
    )
    fails(jsonl('["text"]'), "rows.jsonl:1", "not an object")
    fails(jsonl('{"text": 5}'), "rows.jsonl:1", "5", "--text_field")
    fails(jsonl('{"text": "\\ud800"}'), "rows.jsonl:1", "no valid text")
    fails(jsonl('{"text": ""}'), "rows.jsonl", "is empty")


def test_bad_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    config = config_for(tmp_path, data=str(path))
    pyarrow.parquet.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    fails(config, "rows.parquet", "'text'", "body, id", "--text_field")
    fails(replace(config, text_field="id"), "rows.parquet, row 1", "--text_field")
    path.write_bytes(path.read_bytes()[:-20])
    fails(config, "rows.parquet", "not a valid parquet file", "again")
    path.write_bytes(b"")
    fails(config, "rows.parquet", "not a valid parquet file")


def test_too_small_a_corpus(tmp_path, folder):
    corpus = data.prepare(config_for(tmp_path))
    fails(
        config_for(tmp_path, max_seq_len=4096),
        f"{len(corpus.train):,}",
        f"{len(corpus.validation):,}",
        "4,097",
        "more text",
        "--max_seq_len",
        "--validation_fraction",
    )
    fails(config_for(tmp_path, data=str(folder / "00.txt")), " 0 validation tokens", "more text")
    for length, enough in (
        (len(corpus.validation) - 1, True),
        (len(corpus.validation), False),
    ):  # exactly one window
        if enough:
            data.prepare(config_for(tmp_path, max_seq_len=length))
        else:
            fails(config_for(tmp_path, max_seq_len=length), "too small")


def test_cache_folder_that_cannot_be_written(tmp_path, folder):
    (tmp_path / "file").write_text("")
    cache = str(tmp_path / "file" / "cache")
    fails(config_for(tmp_path, cache_dir=cache), cache, "--cache_dir")


def test_full_disk(tmp_path, folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the shards do not fit
    try:
        fails(config_for(tmp_path), str(tmp_path / "cache"), "space", "--cache_dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())


def test_files_that_change_while_they_are_read(tmp_path, folder, monkeypatch):
    train = train_tokenizer
    monkeypatch.setattr(
        shards,
        "train_tokenizer",
        lambda *a: train(*a) + (folder / "05.txt").write_text("other") * "",
    )
    fails(config_for(tmp_path), "changed while it was being read", "again")


# --- split


def test_split_takes_lowest_hashes_up_to_the_fraction():
    hashes, lengths = np.array([5, 1, 4, 2, 3], np.uint64), np.array([10, 10, 10, 10, 10])
    assert shards.split(hashes, lengths, 0.2).tolist() == [False, True, False, False, False]
    assert shards.split(hashes, lengths, 0.21).tolist() == [False, True, False, True, False]
    assert shards.split(hashes, np.array([10, 1000, 10, 10, 10]), 0.2).tolist() == [
        False,
        True,
        False,
        False,
        False,
    ]


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 100)), min_size=1, max_size=30),
    st.floats(1e-6, 0.5),
)
@settings(max_examples=200, deadline=None)
def test_split_keeps_equal_documents_together_and_fills_both_sides(documents, fraction):
    hashes, lengths = (
        np.array([h for h, _ in documents], np.uint64),
        np.array([n for _, n in documents]),
    )
    validation = shards.split(hashes, lengths, fraction)
    sides = [set(hashes[validation].tolist()), set(hashes[~validation].tolist())]
    assert not sides[0] & sides[1]
    assert sides[1] and (sides[0] or len(set(hashes.tolist())) == 1)
    if sides[0]:
        assert max(sides[0]) < min(sides[1])
        assert len(sides[1]) == 1 or lengths[validation].sum() >= fraction * lengths.sum() * (
            1 - 1e-9
        )


def test_documents_are_split_before_windows_are_cut(tmp_path, folder):
    corpus = data.prepare(config_for(tmp_path, max_seq_len=512))  # a window spans several documents
    sides = [
        {int(n) for n in re.findall(r"doc(\d+)x", text_of(corpus, t))}
        for t in (corpus.train, corpus.validation)
    ]
    assert sides[0] | sides[1] == set(range(40)) and not sides[0] & sides[1]
    held_out = sum(len(story(i)) for i in sides[1]) / corpus.characters
    assert 0.2 <= held_out < 0.25 and corpus.characters == sum(len(story(i)) for i in range(40))


def test_exact_duplicates_stay_on_one_side(tmp_path, folder):
    for i in range(40):
        (folder / f"copy{i:02}.txt").write_text(story(i))
    corpus = data.prepare(config_for(tmp_path))
    sides = [
        text_of(corpus, t).split("<|endoftext|>")[:-1] for t in (corpus.train, corpus.validation)
    ]
    assert sorted(sides[0] + sides[1]) == sorted(2 * [story(i) for i in range(40)])
    assert not set(sides[0]) & set(sides[1])


# --- tokens


def test_end_of_text_follows_every_document_and_only_those(tmp_path, folder):
    (folder / "special.txt").write_text("a <|endoftext|> that is written out")
    corpus = data.prepare(config_for(tmp_path))
    documents = [
        t
        for tokens in (corpus.train, corpus.validation)
        for t in np.split(tokens, np.flatnonzero(tokens == corpus.end_of_text) + 1)
    ]
    texts = [text_of(corpus, t[:-1]) for t in documents if len(t)]
    assert sorted(texts) == sorted(
        [story(i) for i in range(40)] + ["a <|endoftext|> that is written out"]
    )
    assert corpus.train[-1] == corpus.validation[-1] == corpus.end_of_text
    order = [int(t[3 : t.index("x")]) for t in texts if t.startswith("doc")]
    assert sum(b < a for a, b in zip(order, order[1:])) == 1  # within a split, the files' order


def test_pieces_of_a_long_file_are_joined_on_their_side(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (300, 300))
    text = "".join(story(i) for i in range(40))
    (tmp_path / "one.txt").write_text(text)
    config = config_for(tmp_path, data=str(tmp_path / "one.txt"))
    corpus = data.prepare(config)
    pieces = [t for t, _ in sources.open_source(config).chunks()]
    assert len(pieces) == corpus.documents > 10
    runs = [text_of(corpus, t).split("<|endoftext|>") for t in (corpus.train, corpus.validation)]
    assert runs[0].pop() == runs[1].pop() == ""
    order = sorted(runs[0] + runs[1], key=text.index)
    assert "".join(order) == text
    assert 2 < len(order) < len(pieces)  # joined within a side,
    sides = [r in runs[0] for r in order]
    assert all(a != b for a, b in zip(sides, sides[1:]))  # and only there


def test_tokenizing_in_small_batches_changes_nothing(tmp_path, folder, monkeypatch):
    whole = data.prepare(config_for(tmp_path))
    monkeypatch.setattr(shards, "TOKENIZE_CHARACTERS", 700)
    parts = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "cache2")))
    assert np.array_equal(whole.train, parts.train) and np.array_equal(
        whole.validation, parts.validation
    )
    assert whole.unigram_entropy == parts.unigram_entropy


def test_unigram_entropy_and_facts(tmp_path, folder):
    corpus = data.prepare(config_for(tmp_path))
    _, counts = np.unique(corpus.train, return_counts=True)
    p = counts / len(corpus.train)
    assert corpus.unigram_entropy == pytest.approx(-np.sum(p * np.log(p)), rel=1e-12)
    facts = json.loads(next((tmp_path / "cache").glob("*/corpus.json")).read_text())
    assert facts["train_tokens"] == len(corpus.train) and facts["validation_tokens"] == len(
        corpus.validation
    )
    assert corpus.train.dtype == np.uint16 and isinstance(corpus.train, np.memmap)


# --- tokenizer


@pytest.fixture(scope="module")
def trained() -> str:
    return train_tokenizer([story(i) for i in range(20)], 300)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_round_trip(trained, text):
    tokenizer, _ = load_tokenizer(trained)
    for text in (text, text + "\ttab\r\n  é 🙂👨‍👩‍👧 \u0000 <|endoftext|> नमस्ते   "):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
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


def test_tokenizer_is_trained_on_an_even_sample_of_training_documents(
    tmp_path, folder, monkeypatch
):
    corpus = data.prepare(config_for(tmp_path))
    in_order = [
        int(n) for n in dict.fromkeys(re.findall(r"doc(\d+)x", text_of(corpus, corpus.train)))
    ]
    seen = []
    train = train_tokenizer
    monkeypatch.setattr(
        shards,
        "train_tokenizer",
        lambda texts, size: train(seen.append(list(texts)) or seen[0], size),
    )
    monkeypatch.setattr(shards, "TOKENIZER_SAMPLE", corpus.characters // 4)
    data.prepare(config_for(tmp_path))  # the sample's size is part of the cache key
    chosen = [in_order.index(int(re.search(r"doc(\d+)x", t).group(1))) for t in seen[0]]
    gaps = np.diff([-1] + chosen + [len(in_order)])
    assert sum(map(len, seen[0])) <= corpus.characters / 3 and max(gaps) <= 5


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
    assert set(corpus.train.tolist()) == {0, corpus.end_of_text}


def test_bad_tokenizers(tmp_path, folder):
    fails(
        config_for(tmp_path, tokenizer=str(tmp_path / "none.json")),
        "none.json",
        "--tokenizer",
        "train",
    )
    fails(config_for(tmp_path, tokenizer=str(folder)), str(folder), "--tokenizer")
    for content in (b"{}", b"not json", b"\xff"):
        (tmp_path / "bad.json").write_bytes(content)
        fails(config_for(tmp_path, tokenizer=str(tmp_path / "bad.json")), "bad.json", "--tokenizer")
    path = save_tokenizer(tmp_path / "no_end.json", {"a": 0}, ["<other>"])
    fails(config_for(tmp_path, tokenizer=path), "no_end.json", "end-of-text", "<|endoftext|>")
    path = save_tokenizer(
        tmp_path / "gap.json", {"a": 0, "b": 5000}, ["</s>"]
    )  # few tokens, large ids
    fails(config_for(tmp_path, tokenizer=path), "gap.json", "5001", "300")


# --- cache


def test_second_time_opens_the_cache(tmp_path, folder, monkeypatch):
    first = data.prepare(config_for(tmp_path))
    monkeypatch.setattr(sources.Files, "chunks", lambda *a: pytest.fail("the text was read again"))
    second = data.prepare(config_for(tmp_path, seed=8, batch_size=2, max_seq_len=8))
    assert np.array_equal(first.train, second.train) and np.array_equal(
        first.validation, second.validation
    )
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    for name in "tokenizer_json end_of_text data_hash tokenizer_hash characters documents unigram_entropy".split():
        assert getattr(first, name) == getattr(second, name)


def test_a_change_builds_another_cache(tmp_path, folder):
    first = data.prepare(config_for(tmp_path))
    (folder / "03.txt").write_text(story(99))
    second = data.prepare(config_for(tmp_path))
    assert "doc99x" in text_of(second, second.train) + text_of(second, second.validation)
    assert first.data_hash != second.data_hash
    (folder / "03.txt").write_text(
        story(99).replace("alpha", "ALPHA")
    )  # the same size, another time
    os.utime(folder / "03.txt", (1, 1))
    third = data.prepare(config_for(tmp_path))
    assert "ALPHA" in text_of(third, third.train) + text_of(third, third.validation)
    for change in (dict(vocab_size=310), dict(validation_fraction=0.3), dict(text_field="body")):
        before = len(list((tmp_path / "cache").iterdir()))
        data.prepare(config_for(tmp_path, **change))
        assert len(list((tmp_path / "cache").iterdir())) == before + 1


def test_text_changed_in_place_is_read_again_though_its_size_and_time_are_as_before(
    tmp_path, folder
):
    path, first = folder / "03.txt", data.prepare(config_for(tmp_path))
    before = path.stat()
    path.write_text(path.read_text().upper())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (
        path.stat().st_size == before.st_size
        and data.prepare(config_for(tmp_path)).data_hash != first.data_hash
    )


def test_hashes_do_not_depend_on_place_or_time(tmp_path, folder):
    first = data.prepare(config_for(tmp_path))
    folder.rename(tmp_path / "elsewhere")  # keeps names, sizes and times: only the place differs
    second = data.prepare(config_for(tmp_path, data=str(tmp_path / "elsewhere")))
    assert len(list((tmp_path / "cache").iterdir())) == 2  # but the cache does
    assert (first.data_hash, first.tokenizer_hash) == (second.data_hash, second.tokenizer_hash)
    assert np.array_equal(first.train, second.train)


def test_tokenizer_training_is_deterministic_across_processes(trained):
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']; import hashlib; from corpus import tokenizer; from tests.corpus.stories import story; "
        "print(hashlib.sha256(tokenizer.train_tokenizer([story(i) for i in range(20)], 300).encode()).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == sha256(trained)


@pytest.mark.parametrize("moment", ["train_tokenizer", "_write_shards"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_end_in_the_middle_leaves_no_half_cache(tmp_path, folder, monkeypatch, moment, error):
    def stop(folder_or_texts, *rest):
        if isinstance(folder_or_texts, Path):
            (folder_or_texts / "train.bin").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(shards, moment, stop)
        with pytest.raises(error):
            data.prepare(config_for(tmp_path))
    assert not list((tmp_path / "cache").iterdir())
    assert len(data.prepare(config_for(tmp_path)).train) > 100


def test_a_killed_build_is_not_taken_for_a_cache(tmp_path, folder):
    code = f"""if True:
        import os, signal, sys
        sys.path[:0] = ['.', 'tests']
        import data
        from corpus import shards
        from pathlib import Path; from tests.corpus.stories import config_for
        shards._write_shards = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        data.prepare(config_for(Path({str(tmp_path)!r})))"""
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode
        == -signal.SIGKILL
    )
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".unfinished"]
    assert len(data.prepare(config_for(tmp_path)).train) > 100


def test_the_loser_of_a_race_uses_the_winners_cache(tmp_path, folder, monkeypatch):
    write, winner = shards._write_shards, []

    def slow(*args):
        if not winner:  # another run starts and finishes while this one is writing
            winner.append(None)
            winner[0] = data.prepare(config_for(tmp_path))
        return write(*args)

    monkeypatch.setattr(shards, "_write_shards", slow)
    loser = data.prepare(config_for(tmp_path))
    assert np.array_equal(loser.train, winner[0].train)
    assert os.path.samefile(loser.train.filename, winner[0].train.filename)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def damage(path: Path, at: int | None, content: bytes = b""):
    whole = path.read_bytes()
    path.write_bytes(
        whole[:-2] if at is None else whole[:at] + content + whole[at + len(content) :]
    )


SHARD_DAMAGE = {
    "is not a token shard": (0, b"X"),
    "format version 99": (8, b"\x63"),
    "tokens of 8 bytes": (12, b"\x08"),
    "holds": (None, b""),
    "another tokenizer": (24, b"\x00\x00\x00"),
}


@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
@pytest.mark.parametrize("message", SHARD_DAMAGE)
def test_damaged_shards_are_refused_and_rebuilt(tmp_path, folder, capsys, name, message):
    corpus = data.prepare(config_for(tmp_path))
    tokens, place = np.array(corpus.train), next((tmp_path / "cache").iterdir())
    damage(place / name, *SHARD_DAMAGE[message])
    with pytest.raises(ExperimentError) as caught:
        open_shard(place / name, corpus.tokenizer_hash)
    assert message in str(caught.value) and f"delete the folder {place}" in str(caught.value)
    capsys.readouterr()
    assert np.array_equal(data.prepare(config_for(tmp_path)).train, tokens)
    assert message in capsys.readouterr().out
    assert len(open_shard(place / name, corpus.tokenizer_hash))


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "corpus.json"])
@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{}"])
def test_a_damaged_cache_folder_is_rebuilt(tmp_path, folder, capsys, name, content):
    tokens = np.array(data.prepare(config_for(tmp_path)).train)
    path = next((tmp_path / "cache").glob(f"*/{name}"))
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    assert np.array_equal(data.prepare(config_for(tmp_path)).train, tokens)
    assert f"{path.parent}" in capsys.readouterr().out


# --- order


@given(
    windows=st.integers(1, 40),
    extra=st.integers(1, 8),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_every_window_once_an_epoch(windows, extra, seed, epoch):
    seq_len = 8
    tokens = np.arange(windows * seq_len + extra, dtype=np.uint16)
    rows = data.sequences(tokens, seq_len, seed, epoch * windows, windows)
    assert rows.dtype == np.int64 and rows.shape == (windows, seq_len + 1)
    assert sorted(rows[:, 0].tolist()) == [i * seq_len for i in range(windows)]
    assert (np.diff(rows) == 1).all()  # S inputs and the target of the last


def test_epochs_and_seeds_differ():
    tokens = np.arange(801, dtype=np.uint16)
    first, second = (
        data.sequences(tokens, 8, 1, 0, 100)[:, 0],
        data.sequences(tokens, 8, 1, 100, 100)[:, 0],
    )
    other = data.sequences(tokens, 8, 2, 0, 100)[:, 0]
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    assert not np.array_equal(first, np.sort(first))


def test_order_is_pinned():
    """A checkpoint stores only the position, so this order must never change."""
    tokens = np.arange(81, dtype=np.uint16)
    assert (data.sequences(tokens, 8, 1234, 8, 6)[:, 0] // 8).tolist() == [1, 3, 1, 4, 0, 5]


@given(
    position=st.integers(0, 10**6),
    count=st.integers(1, 20),
    cut=st.integers(0, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_sequences_depend_on_the_position_alone(position, count, cut, seed):
    tokens, cut = np.arange(100, dtype=np.uint16), min(cut, count)
    whole = data.sequences(tokens, 7, seed, position, count)
    parts = [
        data.sequences(tokens, 7, seed, position, cut),
        data.sequences(tokens, 7, seed, position + cut, count - cut),
    ]
    assert np.array_equal(whole, np.concatenate(parts))


def take(iterator, n: int):
    return [next(iterator) for _ in range(n)]


def test_cut_into_micro_batches_does_not_matter(tmp_path):
    tokens, config = np.arange(1000, dtype=np.uint16), config_for(tmp_path)
    seen = []
    for batch_size, n in ((1, 80), (8, 10), (16, 5)):
        got = take(data.batches(tokens, replace(config, batch_size=batch_size), 0), n)
        assert all(
            i.shape == t.shape == (batch_size, 16) and i.dtype == t.dtype == torch.int64
            for i, t in got
        )
        assert all(torch.equal(i[:, 1:], t[:, :-1]) and torch.equal(t, i + 1) for i, t in got)
        assert all(x.is_contiguous() for pair in got for x in pair)
        seen.append(torch.cat([i for i, _ in got]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(
        seen[0], seen[2]
    )  # 80 sequences, beyond the first epoch
    assert torch.equal(
        seen[0], torch.from_numpy(data.sequences(tokens, 16, config.seed, 0, 80)[:, :-1])
    )


def test_beginning_at_a_position_is_skipping_to_it(tmp_path):
    tokens, config = np.arange(1000, dtype=np.uint16), config_for(tmp_path, batch_size=4)
    from_start, from_there = (
        take(data.batches(tokens, config, 0), 20),
        take(data.batches(tokens, config, 60), 5),
    )
    for (a, _), (b, _) in zip(from_start[15:], from_there):
        assert torch.equal(a, b)


def test_workers_give_the_same_batches_and_end(tmp_path, folder, capfd):
    config = config_for(tmp_path, num_workers=2)
    tokens = data.prepare(config).train  # tokenizing first: forking afterwards must not warn
    state = torch.get_rng_state()
    for close in (True, False):
        parallel = data.batches(tokens, config, 3)
        in_process = data.batches(tokens, replace(config, num_workers=0), 3)
        for (a, b), (c, d) in zip(take(parallel, 30), take(in_process, 30)):
            assert torch.equal(a, c) and torch.equal(b, d)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            ignored = int(
                re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{worker.pid}/status").read_text()).group(
                    1
                ),
                16,
            )
            assert ignored >> (signal.SIGINT - 1) & 1
            os.kill(worker.pid, signal.SIGINT)
        take(parallel, 10)
        if close:
            parallel.close()
        del parallel
        deadline = time.monotonic() + 10
        while multiprocessing.active_children() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not multiprocessing.active_children()
    assert torch.equal(
        state, torch.get_rng_state()
    )  # reading data does not shift the model's random numbers
    assert "forked" not in capfd.readouterr().err


def test_workers_end_when_the_trainer_is_killed():
    code = """if True:
        import multiprocessing, os, signal, numpy
        import data
        from config import PRESETS, Config
        batches = data.batches(numpy.arange(10_000, dtype=numpy.uint16), Config(**PRESETS["tiny"] | dict(num_workers=1, max_seq_len=16)), 0)
        next(batches)
        print(multiprocessing.active_children()[0].pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(data.__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    status, deadline = (
        Path(f"/proc/{done.stdout.strip()}/status"),
        time.monotonic() + 4,
    )  # sooner than PyTorch looks
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_validation_batches_are_the_same_windows_each_time_spread_evenly(tmp_path):
    tokens = np.arange(16 * 10 + 5, dtype=np.uint16)
    config = config_for(tmp_path, batch_size=4, eval_steps=20)
    for _ in range(2):
        got = list(data.validation_batches(tokens, config))
        assert [len(i) for i, _ in got] == [4, 4, 2]  # all ten windows there are
        assert torch.equal(torch.cat([i for i, _ in got]), torch.arange(160).view(10, 16))
        assert torch.equal(torch.cat([t for _, t in got]), torch.arange(1, 161).view(10, 16))
    short = list(data.validation_batches(tokens, replace(config, eval_steps=2)))
    assert [len(i) for i, _ in short] == [4, 4]
    assert [i[r, 0].item() // 16 for i, _ in short for r in range(4)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all(x.dtype == torch.int64 and x.is_contiguous() for pair in short for x in pair)


def test_one_small_file_is_cut_finely_enough_to_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("".join(story(i) for i in range(400)))  # tens of kB
    corpus = data.prepare(
        config_for(tmp_path, data=str(tmp_path / "a.txt"), validation_fraction=0.01)
    )
    assert len(corpus.validation) > 100 and len(corpus.train) > 20 * len(corpus.validation)
