"""Text to shards: the split, the tokens, a build on all cores, in bounded memory, after a kill."""

import collections
import dataclasses
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import ExperimentError
from corpus import shards, sources, split, text_scan, token_writer
from corpus.token_files import unigram_cross_entropy
from corpus.tokenizer import train_tokenizer
from tests.corpus.stories import (
    STORIES,
    config_for,
    fails,
    forked,
    same,
    save_tokenizer,
    story,
    text_of,
)
from tests.corpus.test_sources import hub, write_rows  # noqa: F401 (hub is a fixture)

ROOT = Path(data.__file__).parent


@pytest.fixture
def small_shards(monkeypatch):
    """Many batches and shards even of a small corpus, on worker processes."""
    monkeypatch.setattr(token_writer, "TOKENIZE_CHARACTERS", 700)
    monkeypatch.setattr(token_writer, "SHARD_CHARACTERS", 3000)


# --- split


def test_split_takes_lowest_hashes_up_to_the_fraction():
    hashes, lengths = np.array([5, 1, 4, 2, 3], np.uint64), np.array([10, 10, 10, 10, 10])
    assert split.split_chunks(hashes, lengths, 0.2).tolist() == [False, True, False, False, False]
    assert split.split_chunks(hashes, lengths, 0.21).tolist() == [False, True, False, True, False]
    assert split.split_chunks(hashes, np.array([10, 1000, 10, 10, 10]), 0.2).tolist() == [
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
    validation = split.split_chunks(hashes, lengths, fraction)
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


def test_one_small_file_is_cut_finely_enough_to_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("".join(story(i) for i in range(400)))  # tens of kB
    corpus = data.prepare(
        config_for(tmp_path, data=str(tmp_path / "a.txt"), validation_fraction=0.01)
    )
    assert len(corpus.validation) > 100 and len(corpus.train) > 20 * len(corpus.validation)


# --- tokens


def test_end_of_text_follows_every_document_and_only_those(tmp_path, folder):
    (folder / "special.txt").write_text("a <|endoftext|> that is written out")
    corpus = data.prepare(config_for(tmp_path))
    documents = [
        t
        for tokens in (corpus.train[:], corpus.validation[:])
        for t in np.split(tokens, np.flatnonzero(tokens == corpus.end_of_text) + 1)
    ]
    texts = [text_of(corpus, t[:-1]) for t in documents if len(t)]
    assert sorted(texts) == sorted(
        [story(i) for i in range(40)] + ["a <|endoftext|> that is written out"]
    )
    assert corpus.train[-1:] == corpus.validation[-1:] == corpus.end_of_text
    order = [int(t[3 : t.index("x")]) for t in texts if t.startswith("doc")]
    assert sum(b < a for a, b in zip(order, order[1:])) == 1  # within a split, the files' order


def test_pieces_of_a_long_file_are_joined_on_their_side(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (300, 300))
    text = "".join(story(i) for i in range(40))
    (tmp_path / "one.txt").write_text(text)
    config = config_for(tmp_path, data=str(tmp_path / "one.txt"))
    corpus = data.prepare(config, rules=1)
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
    monkeypatch.setattr(token_writer, "TOKENIZE_CHARACTERS", 700)
    parts = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "cache2")))
    assert np.array_equal(whole.train, parts.train) and np.array_equal(
        whole.validation, parts.validation
    )
    assert whole.unigram_entropy == parts.unigram_entropy
    assert whole.unigram_cross_entropy == parts.unigram_cross_entropy


def smoothed_cross_entropy(train: list[int], validation: list[int], size: int) -> float:
    counts = collections.Counter(train)
    total = len(train) + size
    losses = [-math.log((counts[token] + 1) / total) for token in validation]
    return sum(losses) / len(losses)


def test_unigram_cross_entropy_of_the_held_out_text(tmp_path, folder):
    corpus = data.prepare(config_for(tmp_path))
    train, validation = corpus.train[:].tolist(), corpus.validation[:].tolist()
    expected = smoothed_cross_entropy(train, validation, corpus.tokenizer.get_vocab_size())
    assert corpus.unigram_cross_entropy == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(corpus.unigram_entropy, rel=1e-3)


def test_unigram_cross_entropy_has_a_probability_for_what_training_lacks():
    found = unigram_cross_entropy(np.array([8, 0, 0]), np.array([0, 3, 0]))
    assert found == pytest.approx(math.log(11))
    assert math.isnan(unigram_cross_entropy(np.array([8, 0]), np.array([0, 0])))


def test_unigram_entropy_and_facts(tmp_path, folder):
    corpus = data.prepare(config_for(tmp_path))
    _, counts = np.unique(corpus.train, return_counts=True)
    p = counts / len(corpus.train)
    assert corpus.unigram_entropy == pytest.approx(-np.sum(p * np.log(p)), rel=1e-12)
    facts = json.loads(next((tmp_path / "cache").glob("*/corpus.json")).read_text())
    assert facts["train_tokens"] == len(corpus.train) and facts["validation_tokens"] == len(
        corpus.validation
    )
    assert corpus.train.dtype == np.uint16


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
        text_scan,
        "train_tokenizer",
        lambda texts, *options: train(seen.append(list(texts)) or seen[0], *options),
    )
    monkeypatch.setattr(text_scan, "TOKENIZER_SAMPLE", corpus.characters // 4)
    data.prepare(config_for(tmp_path))  # the sample's size is part of the cache key
    chosen = [in_order.index(int(re.search(r"doc(\d+)x", t).group(1))) for t in seen[0]]
    gaps = np.diff([-1] + chosen + [len(in_order)])
    assert sum(map(len, seen[0])) <= corpus.characters / 3 and max(gaps) <= 5


def test_files_that_change_while_they_are_read(tmp_path, folder, monkeypatch):
    train = train_tokenizer
    monkeypatch.setattr(
        text_scan,
        "train_tokenizer",
        lambda *a: train(*a) + (folder / "05.txt").write_text("other") * "",
    )
    fails(config_for(tmp_path), "changed while it was being read", "again")


# --- a build that ends early


def killed_build(tmp_path, commits: int, **changes) -> None:
    """A build in a process that kills itself, and no worker, at its `commits`-th shard."""

    def build():
        # A forked process has these to itself.
        token_writer.TOKENIZE_CHARACTERS = 700
        token_writer.SHARD_CHARACTERS = 3000
        os.sched_getaffinity = lambda _: range(2)
        replace_file = token_writer.replace_file
        written = []

        def counted(path, content):
            replace_file(path, content)
            written.append(path.name)
            if written.count("progress.json") == commits:
                os.kill(os.getpid(), signal.SIGKILL)

        token_writer.replace_file = counted
        data.prepare(config_for(tmp_path, **changes))

    assert forked(build) == -signal.SIGKILL


def hub_data(tmp_path, hub, folder):
    return f"hf:{hub}:big"


def one_file(tmp_path, hub, folder):
    (tmp_path / "one.txt").write_text("".join(STORIES))
    return str(tmp_path / "one.txt")


def many_files(tmp_path, hub, folder):
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("source", [many_files, one_file, hub_data])
def test_a_killed_build_continues_without_doing_finished_shards_again(
    tmp_path, hub, folder, encoded, source, capsys, monkeypatch
):
    changes = dict(data=source(tmp_path, hub, folder))
    whole = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other"), **changes))
    all_texts, commits = list(encoded), 3
    killed_build(tmp_path, commits, **changes)
    (left,) = (tmp_path / "cache").iterdir()
    progress = json.loads((left / "progress.json").read_text())
    with open(left / "train.bin", "ab") as file:
        file.write(b"what was not finished")
    encoded.clear()
    monkeypatch.setattr(
        text_scan, "train_tokenizer", lambda *_: pytest.fail("the tokenizer was trained again")
    )
    corpus = data.prepare(config_for(tmp_path, **changes))
    assert same(corpus, whole)
    assert 3000 * commits <= progress["characters"] < 3700 * commits + 3000
    assert f"continuing after {progress['characters']:,} characters" in capsys.readouterr().out
    position = progress["position"]
    assert encoded == all_texts[position["pieces"] :]
    # The beginning of the first chunk may have been encoded with the chunk before it.
    done = progress["characters"] + position.get("moved", 0)
    assert sum(map(len, encoded)) + done == corpus.characters
    assert sorted(path.name for path in next((tmp_path / "cache").iterdir()).iterdir()) == [
        "corpus.json",
        "tokenizer.json",
        "train.bin",
        "validation.bin",
    ]


@pytest.mark.slow
def test_a_killed_build_of_a_long_data_set_continues(tmp_path, hub, monkeypatch):
    """Only its beginning was scanned; the data set must say again how long it is."""
    monkeypatch.setattr(text_scan, "TOKENIZER_SAMPLE", sum(map(len, STORIES[:20])))
    changes = dict(data=f"hf:{hub}:big")
    whole = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other"), **changes))
    killed_build(tmp_path, 2, **changes)
    assert same(data.prepare(config_for(tmp_path, **changes)), whole)


@pytest.mark.slow
def test_a_build_that_was_cut_shorter_than_it_says_begins_anew(tmp_path, folder, encoded):
    whole = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other")))
    killed_build(tmp_path, 2)
    (left,) = (tmp_path / "cache").iterdir()
    os.truncate(left / "train.bin", 1500)
    assert same(data.prepare(config_for(tmp_path)), whole)


def test_what_progress_promises_is_on_the_disk_before_it(
    tmp_path, folder, small_shards, monkeypatch
):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
    )
    data.prepare(config_for(tmp_path))
    assert {"progress.json.tmp", "tokenizer.json.tmp", "corpus.json.tmp"} <= set(synced)
    for i, name in enumerate(synced):
        if name == "progress.json.tmp":
            assert synced[i - 3 : i] == [*token_writer.TOKEN_FILES, token_writer.CHUNK_FILE]


def test_a_full_disk_keeps_the_finished_shards(tmp_path, folder, small_shards, encoded):
    config = config_for(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # the tokenizer fits, and some shards
    try:
        with pytest.raises(
            ExperimentError, match="Free some space.*--cache_dir.*what is finished is kept"
        ):
            data.prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (left,) = (tmp_path / "cache").iterdir()
    done = json.loads((left / "progress.json").read_text())["characters"]
    encoded.clear()
    assert (
        data.prepare(config).characters == sum(map(len, STORIES)) == done + sum(map(len, encoded))
        and done > 5000
    )


# --- processes and memory


def test_worker_processes_give_the_same_shards(tmp_path, folder, small_shards, monkeypatch):
    few = data.prepare(config_for(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    assert same(data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other"))), few)


def test_as_many_processes_as_cores_tokenize(tmp_path, folder, small_shards, monkeypatch):
    pids, make = tmp_path / "pids", shards.ChunkEncoder

    def writing(some_tokenizer, rules):
        def encode(*texts):
            with open(pids, "a") as file:
                file.write(f"{os.getpid()} {os.environ['TOKENIZERS_PARALLELISM']}\n")
            time.sleep(0.02)
            return make(some_tokenizer, rules)(*texts)

        return encode

    monkeypatch.setattr(shards, "ChunkEncoder", writing)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    data.prepare(config_for(tmp_path))
    lines = set(pids.read_text().splitlines())
    assert (
        len(lines) == 3
        and all(line.endswith(" false") for line in lines)
        and not any(line.startswith(f"{os.getpid()} ") for line in lines)
    )


def test_a_process_that_dies_is_one_clear_error_and_finished_shards_are_kept(
    tmp_path, folder, small_shards, monkeypatch
):
    make = shards.ChunkEncoder
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(
        shards,
        "ChunkEncoder",
        lambda *t: (
            lambda texts, *ends: (
                os._exit(9) if "doc30x" in "".join(texts) else make(*t)(texts, *ends)
            )
        ),
    )
    with pytest.raises(
        ExperimentError, match="tokenizing process ended.*lack of memory.*Run again"
    ):
        data.prepare(config_for(tmp_path))
    monkeypatch.undo()
    assert list((tmp_path / "cache").glob("*/progress.json"))
    assert data.prepare(config_for(tmp_path)).characters == sum(map(len, STORIES))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tokenizer_that_cannot_encode_the_corpus(
    tmp_path, folder, small_shards, monkeypatch, workers
):
    path = save_tokenizer(tmp_path / "t.json", {"a": 0}, ["</s>"])
    broken = json.loads(Path(path).read_text())
    broken["model"]["unk_token"] = "missing"
    Path(path).write_text(json.dumps(broken))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(workers))
    with pytest.raises(ExperimentError) as caught:
        data.prepare(config_for(tmp_path, tokenizer=path))
    assert (
        "cannot encode this corpus" in str(caught.value)
        and "--tokenizer" in str(caught.value)
        and "Traceback" not in str(caught.value)
    )


@pytest.mark.slow
def test_tokenizing_stays_within_a_memory_limit_that_the_corpus_exceeds(tmp_path):
    base = "".join(STORIES)
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w") as file:
        for number in range(4000):
            text = f"{number} " + base[number * 37 % 5000 :][:4000]
            file.write(json.dumps({"text": text}) + "\n")
    assert rows.stat().st_size > 16_000_000
    code = f"""if True:
        import os, re, resource, threading
        from pathlib import Path
        import data
        from corpus import text_scan, token_files, token_writer
        from tests.corpus.stories import config_for
        text_scan.TOKENIZER_SAMPLE = token_writer.TOKENIZE_CHARACTERS = 50_000
        token_files.TOKENS_AT_ONCE = 50_000
        os.sched_getaffinity = lambda _: range(2)
        threading.stack_size(512 * 1024)
        used = int(re.search(r'VmData:\\s*(\\d+)', Path('/proc/self/status').read_text()).group(1))
        limit = (used + 12_000) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        corpus = data.prepare(config_for(Path({str(tmp_path)!r}), data={str(rows)!r}))
        print(corpus.characters)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 16_000_000


def test_a_scan_without_keys_is_one_of_version_1(tmp_path, folder):
    """Older programs saved scans that have neither keys nor groups."""
    found = text_scan.read_text(sources.open_source(config_for(tmp_path), 1), to_end=True)
    np.savez(
        tmp_path / "survey.npz",
        pieces=found.chunks,
        whole=found.whole,
        rows=found.rows,
        bad=found.bad,
        bad_rows=found.bad_rows,
    )
    loaded = text_scan._load_scan(tmp_path / "survey.npz")
    assert not loaded.grouped and loaded.empty == 0
    assert np.array_equal(loaded.keys, loaded.chunks["hash"])
    expected = text_scan.split_of(found, 0.2, 1).held_out
    assert np.array_equal(text_scan.split_of(loaded, 0.2, 1).held_out, expected)


# --- small files that a killed build left


def change_digit(path: Path) -> None:
    """A damage that leaves JSON and the types of its values as they are."""
    content = json.loads(path.read_text())
    content["tokens"][0] -= 1
    path.write_text(json.dumps(content))


def spoil(path: Path, how: str) -> None:
    if how == "a digit":
        change_digit(path)
        return
    path.unlink()
    if how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        (path / "inside").mkdir(parents=True)
    else:
        path.write_text(how)


@pytest.fixture
def left(tmp_path, folder) -> Path:
    """The folder that a killed build left."""
    killed_build(tmp_path, 2)
    (found,) = (tmp_path / "cache").iterdir()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["", "{", "[]", '{"tokens": [1, "2"], "characters": 1, "position": null}', "a digit"]
)
def test_a_progress_that_cannot_be_read_costs_only_time(tmp_path, left, how, capsys):
    whole = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other")))
    spoil(left / "progress.json", how)
    assert same(data.prepare(config_for(tmp_path)), whole)
    assert "progress.json cannot be read" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["survey.npz", "progress.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["", "{}", "a pipe", "a folder"])
def test_what_a_killed_build_left_may_be_anything(tmp_path, left, name, how, capsys):
    whole = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other")))
    spoil(left / name, how)
    assert same(data.prepare(config_for(tmp_path)), whole)
    assert f"{name} cannot be read" in capsys.readouterr().out


def test_a_scan_of_other_arrays_is_refused(tmp_path, folder):
    found = text_scan.read_text(sources.open_source(config_for(tmp_path), 1), to_end=True)
    for changes in (
        dict(chunks=np.zeros(3)),
        dict(keys=found.keys[1:]),
        dict(rows="3"),
        dict(whole=1),
    ):
        text_scan._save_scan(dataclasses.replace(found, **changes), tmp_path / "survey.npz")
        with pytest.raises((ValueError, IndexError)):
            text_scan._load_scan(tmp_path / "survey.npz")
