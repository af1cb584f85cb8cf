"""Building shards: on all cores, in bounded memory, after a kill, on a full disk; the cache by content; shards of others."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import ConfigError, ExperimentError
from corpus import cache, external, shards, sources, token_files, tokenizer
from corpus.cache import _cache_key, _lock, _unfinished
from corpus.external import Joined, cut_shards, open_external_shard
from corpus.token_files import open_shard
from corpus.tokenizer import load_tokenizer
from tests.corpus.stories import STORIES, config_for, fails, save_tokenizer
from tests.corpus.test_sources import hub, write_rows  # noqa: F401 (hub is a fixture)

ROOT = Path(data.__file__).parent


def same(one: data.Corpus, other: data.Corpus) -> bool:
    facts = "tokenizer_json end_of_text data_hash tokenizer_hash characters documents unigram_entropy".split()
    return all(getattr(one, name) == getattr(other, name) for name in facts) and all(
        np.array_equal(a[:], b[:])
        for a, b in ((one.train, other.train), (one.validation, other.validation))
    )


@pytest.fixture
def small_shards(monkeypatch):
    """Many batches and shards even of a small corpus, on worker processes."""
    monkeypatch.setattr(shards, "TOKENIZE_CHARACTERS", 700)
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 3000)


@pytest.fixture
def encoded(monkeypatch):
    """Every text that is tokenized from now on, in this process."""
    texts, make = [], shards.encoder
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [])  # no workers
    monkeypatch.setattr(
        shards, "encoder", lambda t: lambda some: texts.extend(some) or make(t)(some)
    )
    return texts


# --- a build that ends early


def killed_build(tmp_path, commits: int, **changes) -> subprocess.CompletedProcess:
    """A build in a process that kills itself, and no worker, at its `commits`-th shard."""
    code = f"""if True:
        import os, signal, sys
        sys.path[:0] = ['.', 'tests']
        import data
        from corpus import shards
        from pathlib import Path; from tests.corpus.stories import config_for
        shards.TOKENIZE_CHARACTERS, shards.SHARD_CHARACTERS, replace, count = 700, 3000, shards.replace_file, [0]
        def counted(path, content):
            replace(path, content)
            count[0] += path.name == "progress.json"
            if count[0] == {commits}:
                os.kill(os.getpid(), signal.SIGKILL)
        shards.replace_file = counted
        data.prepare(config_for(Path({str(tmp_path)!r}), **{changes!r}))"""
    # the workers hold the pipes too: it ends when all are gone
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def hub_data(tmp_path, hub, folder):
    return f"hf:{hub}:big"


def one_file(tmp_path, hub, folder):
    (tmp_path / "one.txt").write_text("".join(STORIES))
    return str(tmp_path / "one.txt")


def many_files(tmp_path, hub, folder):
    return str(folder)


@pytest.mark.parametrize("source", [many_files, one_file, hub_data])
def test_a_killed_build_goes_on_without_doing_finished_shards_again(
    tmp_path, hub, folder, encoded, source, capsys, monkeypatch
):
    changes = dict(data=source(tmp_path, hub, folder))
    whole = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other"), **changes))
    all_texts, commits = list(encoded), 3
    assert killed_build(tmp_path, commits, **changes).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    progress = json.loads((left / "progress.json").read_text())
    with open(left / "train.bin", "ab") as file:
        file.write(b"what was not finished")
    encoded.clear()
    monkeypatch.setattr(
        shards, "train_tokenizer", lambda *_: pytest.fail("the tokenizer was trained again")
    )
    corpus = data.prepare(config_for(tmp_path, **changes))
    assert same(corpus, whole)
    assert 3000 * commits <= progress["characters"] < 3700 * commits + 3000
    assert f"continuing after {progress['characters']:,} characters" in capsys.readouterr().out
    assert (
        encoded == all_texts[progress["position"]["pieces"] :]
        and sum(map(len, encoded)) + progress["characters"] == corpus.characters
    )
    assert sorted(path.name for path in next((tmp_path / "cache").iterdir()).iterdir()) == [
        "corpus.json",
        "tokenizer.json",
        "train.bin",
        "validation.bin",
    ]


def test_a_build_that_was_cut_shorter_than_it_says_begins_anew(tmp_path, folder, encoded):
    whole = data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other")))
    assert killed_build(tmp_path, 2).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    os.truncate(left / "train.bin", 1500)
    assert same(data.prepare(config_for(tmp_path)), whole)


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


def test_a_build_of_another_process_is_not_taken_from_it(tmp_path, folder):
    key = _cache_key(config_for(tmp_path), sources.open_source(config_for(tmp_path)), None)
    with _unfinished(tmp_path / "cache", key) as first:
        (first / "progress.json").write_text("{}")
        with _unfinished(tmp_path / "cache", key) as second:
            assert first != second
        assert not second.exists()
    with _unfinished(
        tmp_path / "cache", key
    ) as third:  # kept, as it holds finished work, and free now
        assert third == first
        (third / "progress.json").unlink()
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_is_found_by_others_only_once_it_is_locked(tmp_path, monkeypatch):
    """Another process begins just before this one locks the folder that it has made."""
    lock, others = _lock, []

    def late(folder):
        if not others:
            others.append(None)
            others[0] = stack.enter_context(_unfinished(tmp_path, "key"))
        return lock(folder)

    monkeypatch.setattr(cache, "_lock", late)
    with contextlib.ExitStack() as stack, _unfinished(tmp_path, "key") as mine:
        assert mine != others[0] and mine.is_dir() and others[0].is_dir()
    assert not list(tmp_path.iterdir())


def test_a_build_that_another_process_finishes_meanwhile_is_no_error(tmp_path, folder, monkeypatch):
    glob = Path.glob
    monkeypatch.setattr(
        Path,
        "glob",
        lambda path, pattern: (
            [*glob(path, pattern)] + [tmp_path / "gone.unfinished"] * (pattern == "*.unfinished")
        ),
    )
    assert len(data.prepare(config_for(tmp_path)).train) > 500


def test_only_old_leftovers_that_nobody_uses_are_deleted(tmp_path, folder):
    for name, days in (("old", 8), ("used", 8), ("young", 6)):
        path = tmp_path / "cache" / f"{name}.unfinished"
        path.mkdir(parents=True)
        os.utime(path, 2 * (time.time() - 86_400 * days,))
    lock = _lock(tmp_path / "cache" / "used.unfinished")
    data.prepare(config_for(tmp_path))
    assert {path.name for path in (tmp_path / "cache").glob("*.unfinished")} == {
        "used.unfinished",
        "young.unfinished",
    }
    os.close(lock)


# --- processes, memory


def test_worker_processes_give_the_same_shards(tmp_path, folder, small_shards, monkeypatch):
    few = data.prepare(config_for(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    assert same(data.prepare(config_for(tmp_path, cache_dir=str(tmp_path / "other"))), few)


def test_as_many_processes_as_cores_tokenize(tmp_path, folder, small_shards, monkeypatch):
    pids, make = tmp_path / "pids", shards.encoder

    def writing(some_tokenizer):
        def encode(texts):
            with open(pids, "a") as file:
                file.write(f"{os.getpid()} {os.environ['TOKENIZERS_PARALLELISM']}\n")
            time.sleep(0.02)
            return make(some_tokenizer)(texts)

        return encode

    monkeypatch.setattr(shards, "encoder", writing)
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
    make = shards.encoder
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    monkeypatch.setattr(
        shards,
        "encoder",
        lambda t: lambda texts: os._exit(9) if "doc30x" in "".join(texts) else make(t)(texts),
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


def test_tokenizing_stays_within_a_memory_limit_that_the_corpus_exceeds(tmp_path):
    base, rows = "".join(STORIES), tmp_path / "rows.jsonl"
    with open(rows, "w") as file:
        for number in range(8000):
            file.write(
                json.dumps({"text": f"{number} " + base[number * 37 % 5000 :][:4000]}) + "\n"
            )
    assert rows.stat().st_size > 30_000_000
    code = f"""if True:
        import os, re, resource, sys, threading
        sys.path[:0] = ['.', 'tests']
        import data
        from corpus import shards
        from pathlib import Path; from tests.corpus.stories import config_for
        shards.TOKENIZER_SAMPLE = shards.TOKENIZE_CHARACTERS = 200_000
        os.sched_getaffinity = lambda _: range(2)
        threading.stack_size(512 * 1024)
        used = int(re.search(r'VmData:\\s*(\\d+)', Path('/proc/self/status').read_text()).group(1))
        resource.setrlimit(resource.RLIMIT_DATA, 2 * ((used + 24_000) * 1024,))
        corpus = data.prepare(config_for(Path({str(tmp_path)!r}), data={str(rows)!r}))
        print(corpus.characters)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30_000_000


def test_the_progress_bar_has_documents_a_second_and_the_time_left():
    with token_files.ProgressBar("tokenizing", 4000, done=1000) as bar:
        bar.start -= 10
        bar.bar.start_t -= 10
        bar.add(1000, 20)
        shown = str(bar.bar)
    assert (
        "tokenizing:  50%" in shown
        and "2.00k/4.00k" in shown
        and re.search(r"00:10<00:(19|20)", shown)
    )
    assert re.search(r"(100|99\.\d+)char/s, 2 documents/s", shown), shown


# --- the cache


def test_the_same_text_from_another_place_is_not_tokenized_again(tmp_path, folder, encoded, capsys):
    first = data.prepare(config_for(tmp_path))
    encoded.clear()
    os.utime(folder / "03.txt", (1, 1))
    shutil.copytree(folder, tmp_path / "copy")
    for where in (folder, tmp_path / "copy", write_rows(tmp_path / "rows.parquet", STORIES)):
        corpus = data.prepare(config_for(tmp_path, data=str(where)))
        assert (
            same(corpus, first)
            and os.path.samefile(corpus.train.filename, first.train.filename)
            and not encoded
        )
        assert "was tokenized before" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 4
    for change in (
        dict(vocab_size=290),
        dict(validation_fraction=0.3),
        dict(tokenizer="train:280"),
    ):  # another recipe
        data.prepare(config_for(tmp_path, data=str(tmp_path / "copy"), **change))
        assert sum(map(len, encoded)) == first.characters
        encoded.clear()


def test_rows_left_out_are_counted_also_when_the_shards_are_there(tmp_path, folder, capsys):
    data.prepare(config_for(tmp_path))
    path = write_rows(tmp_path / "rows.jsonl", STORIES)
    path.write_text(path.read_text() + "{\n")
    corpus = data.prepare(config_for(tmp_path, data=str(path), max_bad_share=0.1))
    out = capsys.readouterr().out
    assert (
        "1 of 41 lines or rows cannot be read and are left out: " in out
        and "was tokenized before" in out
    )
    assert (
        json.loads((Path(corpus.train.filename).parent / "corpus.json").read_text())["left_out"]
        == 1
    )


def test_damaged_shards_are_not_taken_over(tmp_path, folder, encoded):
    first = data.prepare(config_for(tmp_path))
    tokens = np.array(first.train)
    encoded.clear()
    with open(first.train.filename, "r+b") as file:
        file.truncate(1500)
    shutil.copytree(folder, tmp_path / "copy")
    assert (
        np.array_equal(
            data.prepare(config_for(tmp_path, data=str(tmp_path / "copy"))).train, tokens
        )
        and encoded
    )


def test_a_file_system_without_links_builds_and_harms_no_other_cache(
    tmp_path, folder, encoded, monkeypatch
):
    first, link = data.prepare(config_for(tmp_path)), os.link
    shutil.copytree(folder, tmp_path / "copy")

    def half(source, target):
        if Path(target).name == "validation.bin":
            raise OSError(1, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", half)
    encoded.clear()
    second = data.prepare(config_for(tmp_path, data=str(tmp_path / "copy")))
    assert (
        encoded
        and same(second, first)
        and not os.path.samefile(first.train.filename, second.train.filename)
    )
    assert same(data.prepare(config_for(tmp_path)), first)


def test_more_readers_than_cores_are_refused(tmp_path, folder):
    with pytest.raises(
        ConfigError, match=rf"num_workers={os.cpu_count() + 1}: .* {os.cpu_count()} cores"
    ):
        data.prepare(config_for(tmp_path, num_workers=os.cpu_count() + 1))
    data.prepare(config_for(tmp_path, num_workers=os.cpu_count()))


# --- the shard format


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=50),
    wide=st.booleans(),
    cut=st.integers(1, 60),
    at=st.integers(0, 55),
)
@settings(max_examples=100, deadline=None)
def test_a_shard_is_read_as_it_was_written_and_not_when_a_byte_of_its_header_or_length_differs(
    tmp_path_factory, tokens, wide, cut, at
):
    path, width = tmp_path_factory.getbasetemp() / "shard.bin", 4 if wide else 2
    written = np.array(tokens, np.uint64).astype(f"<u{width}")
    header = token_files.HEADER.pack(
        token_files.MAGIC, token_files.FORMAT_VERSION, width, len(tokens), bytes(32)
    )
    whole = header.ljust(token_files.HEADER_BYTES, b"\0") + written.tobytes()
    path.write_bytes(whole)
    read = open_shard(path, "00" * 32)
    assert read.dtype == written.dtype and np.array_equal(read, written)
    for damaged in (
        whole[:-cut],
        whole + bytes(cut),
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ExperimentError, match="delete the folder"):
            open_shard(path, "00" * 32)


def foreign(
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
def test_foreign_shards_are_read_as_they_were_written_and_refused_when_cut_short(
    tmp_path_factory, tokens, cut, layout
):
    path = foreign(tmp_path_factory.getbasetemp() / "foreign.bin", tokens, **layout)
    read = open_external_shard(path)
    assert (
        read.dtype == (np.uint32 if layout.get("version") == 7 else np.uint16)
        and read.tolist() == tokens
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: -min(cut, len(whole) - 1)])
    if layout != LAYOUTS[0] or cut % 2:  # without a header, half a token is all that can be seen
        with pytest.raises(ExperimentError, match="cut short.*again"):
            open_external_shard(path)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(-3, 60), st.integers(-3, 60)
)
@settings(max_examples=200, deadline=None)
def test_joined_arrays_are_sliced_like_one(lengths, first, last):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    parts = np.split(whole, np.cumsum(lengths)[:-1])
    joined = Joined(parts)
    assert (
        len(joined) == len(whole)
        and joined[first:last].tolist() == whole[first:last].tolist()
        and joined[:last].dtype == np.uint16
    )
    for taken in range(len(whole) + 1):
        one, other = cut_shards(parts, taken)
        assert (one[:].tolist(), other[:].tolist()) == (
            whole[:taken].tolist(),
            whole[taken:].tolist(),
        )


# --- token shards of others as a corpus


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
    foreign(tmp_path / "bins" / names[0], ids[:3000], **layout)
    foreign(
        tmp_path / "bins" / names[0].replace("1.bin", "2.bin").replace("train.bin", "train2.bin"),
        ids[3000:5000],
        **layout,
    )
    foreign(tmp_path / "bins" / names[1], ids[5000:], **layout)
    corpus = data.prepare(config)
    assert corpus.train[:].tolist() == ids[:5000] and corpus.validation[:].tolist() == ids[5000:]
    p = np.bincount(ids[:5000])[np.bincount(ids[:5000]) > 0] / 5000
    assert corpus.unigram_entropy == pytest.approx(-np.sum(p * np.log(p)))
    assert corpus.documents == 40 and corpus.characters == len("<|endoftext|>") * 40 + sum(
        map(len, STORIES)
    )
    inputs, targets = next(data.batches(corpus.train, config, 0))
    assert np.array_equal(inputs, data.sequences(np.array(ids[:5000]), 16, 7, 0, 8)[:, :-1])


def test_shards_without_a_validation_file_hold_out_the_end(tmp_path, bins, capsys):
    config, ids = bins
    for number in range(3):
        foreign(tmp_path / "bins" / f"part{number}.bin", ids[2000 * number :][:2000])
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
    assert one.train[:].tolist() == ids[:1600] and isinstance(one.train, np.memmap)


def test_shards_are_counted_once_and_used_where_they_lie(tmp_path, bins, monkeypatch):
    config, ids = bins
    foreign(tmp_path / "bins" / "train.bin", ids)
    first = data.prepare(config)
    (place,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in place.iterdir()} == {"corpus.json", "tokenizer.json"}
    with monkeypatch.context() as patch:
        patch.setattr(external, "count_tokens", lambda *_: pytest.fail("counted again"))
        assert same(data.prepare(config), first)
    foreign(tmp_path / "bins" / "train.bin", ids[1:])
    os.utime(tmp_path / "bins" / "train.bin", (1, 1))
    assert data.prepare(config).data_hash != first.data_hash


def test_shards_that_cannot_be_used(tmp_path, bins):
    config, ids = bins
    path = foreign(tmp_path / "bins" / "train.bin", [*ids, 300, 4])
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
    foreign(path, ids, count=len(ids) + 1)
    fails(
        config,
        "train.bin",
        "cut short",
        f"{2 * len(ids):,} bytes",
        f"not {2 * len(ids) + 2:,}",
        "again",
    )
    foreign(path, ids, version=2)
    fails(config, "train.bin", "version 2, not 1")
    foreign(path, ids, magic=20240522)
    fails(config, "train.bin", "multiple-choice", "--data")
    path.write_bytes(b"abc")
    fails(config, "train.bin", "cut short: 3 bytes", "uint16")
    path.write_bytes(b"")
    fails(config, "train.bin", "cut short: 0 bytes")
    foreign(path, ids)
    foreign(tmp_path / "bins" / "val.bin", ids[:16])
    fails(config, "too small", "16 validation tokens", "17 (max_seq_len + 1)")
    foreign(tmp_path / "bins" / "val.bin", ids[:17])
    assert len(data.prepare(config).validation) == 17


def test_the_cache_s_own_shards_are_no_source(tmp_path, folder):
    corpus = data.prepare(config_for(tmp_path))
    (tmp_path / "tok.json").write_text(corpus.tokenizer_json)
    fails(
        config_for(tmp_path, data=str(corpus.train.filename), tokenizer=str(tmp_path / "tok.json")),
        "belongs to this program's cache",
    )


# --- the order of sequences


@given(
    windows=st.integers(1, 60),
    seed=st.integers(0, 2**43 - 1),
    world=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    epoch=st.integers(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_every_window_once_an_epoch_for_any_seed_and_world_size(
    windows, seed, world, batch_size, epoch
):
    """Ranks take micro-batches in turn from one order of positions; an epoch is what they read together."""
    tokens = np.arange(windows * 8 + 1, dtype=np.uint16)
    begin, end, read = epoch * windows, (epoch + 1) * windows, []
    for rank in range(world):
        for position in range(begin + rank * batch_size, end, world * batch_size):
            read += data.sequences(tokens, 8, seed, position, min(batch_size, end - position))[
                :, 0
            ].tolist()
    assert sorted(read) == list(range(0, windows * 8, 8))


def test_what_is_read_later_is_fetched_from_the_disk_now(tmp_path, folder, monkeypatch):
    config, announced = config_for(tmp_path, batch_size=4), []
    tokens = data.prepare(config).train
    monkeypatch.setattr(data, "_read_ahead", lambda window: announced.append(window.tolist()))
    batches = data.batches(tokens, config, 8)
    got = [next(batches) for _ in range(data.READ_AHEAD + 1)]
    assert announced[:4] == np.concatenate([got[-1][0], got[-1][1][:, -1:]], 1).tolist() and len(
        announced
    ) == 4 * len(got)
    monkeypatch.undo()
    for window in (tokens[:17], tokens[-17:], tokens[5:5], np.arange(9)):
        data._read_ahead(window)  # any array will do
