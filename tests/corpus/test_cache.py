"""The cache folder: opened, built once, found by content, repaired; unfinished builds."""

import contextlib
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import data
from config import DATA_RULES, ConfigError, ExperimentError
from corpus import cache, shards, sources, text_scan
from corpus.cache import _cache_key, _lock, _unfinished
from corpus.token_files import open_shard
from tests.corpus.stories import (
    STORIES,
    config_for,
    fails,
    forked,
    same,
    story,
    text_of,
)
from tests.corpus.test_sources import write_rows

# --- opened again, or built


def test_second_time_opens_the_cache(tmp_path, folder, monkeypatch):
    first = data.prepare(config_for(tmp_path))
    monkeypatch.setattr(sources.Files, "chunks", lambda *a: pytest.fail("the text was read again"))
    second = data.prepare(config_for(tmp_path, seed=8, batch_size=2, max_seq_len=8))
    assert np.array_equal(first.train, second.train) and np.array_equal(
        first.validation, second.validation
    )
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    for name in [
        "tokenizer_json",
        "end_of_text",
        "data_hash",
        "tokenizer_hash",
        "characters",
        "documents",
        "unigram_entropy",
        "unigram_cross_entropy",
    ]:
        assert getattr(first, name) == getattr(second, name)


def test_a_cache_of_before_the_unigram_cross_entropy_gets_it_when_it_is_opened(
    tmp_path, folder, monkeypatch
):
    built = data.prepare(config_for(tmp_path))
    [path] = (tmp_path / "cache").glob("*/corpus.json")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in facts.items() if k != "unigram_cross_entropy"}))
    assert same(data.prepare(config_for(tmp_path)), built)
    assert json.loads(path.read_text()) == facts
    assert len(list(path.parent.glob("corpus*"))) == 1
    monkeypatch.setattr(cache, "count_both", lambda *_: pytest.fail("counted twice"))
    assert same(data.prepare(config_for(tmp_path)), built)


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


# --- what cannot be used


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


def test_more_readers_than_cores_are_refused(tmp_path, folder):
    with pytest.raises(
        ConfigError, match=rf"num_workers={os.cpu_count() + 1}: .* {os.cpu_count()} cores"
    ):
        data.prepare(config_for(tmp_path, num_workers=os.cpu_count() + 1))
    data.prepare(config_for(tmp_path, num_workers=os.cpu_count()))


# --- the same text from another place


def test_the_same_text_from_another_place_is_not_tokenized_again(tmp_path, folder, encoded, capsys):
    first = data.prepare(config_for(tmp_path))
    encoded.clear()
    os.utime(folder / "03.txt", (1, 1))
    shutil.copytree(folder, tmp_path / "copy")
    for where in (folder, tmp_path / "copy", write_rows(tmp_path / "rows.parquet", STORIES)):
        corpus = data.prepare(config_for(tmp_path, data=str(where)))
        assert (
            same(corpus, first)
            and Path(corpus.train.paths[0]).samefile(first.train.paths[0])
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
        json.loads((Path(corpus.train.paths[0]).parent / "corpus.json").read_text())["left_out"]
        == 1
    )


def test_damaged_shards_are_not_taken_over(tmp_path, folder, encoded):
    first = data.prepare(config_for(tmp_path))
    tokens = np.array(first.train)
    encoded.clear()
    with open(first.train.paths[0], "r+b") as file:
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
        and not Path(first.train.paths[0]).samefile(second.train.paths[0])
    )
    assert same(data.prepare(config_for(tmp_path)), first)


# --- builds that end early


@pytest.mark.parametrize(
    "module, moment", [(text_scan, "train_tokenizer"), (shards, "write_shards")]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_end_in_the_middle_leaves_no_half_cache(
    tmp_path, folder, monkeypatch, module, moment, error
):
    def stop(folder_or_texts, *rest):
        if isinstance(folder_or_texts, Path):
            (folder_or_texts / "train.bin").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, stop)
        with pytest.raises(error):
            data.prepare(config_for(tmp_path))
    assert not list((tmp_path / "cache").iterdir())
    assert len(data.prepare(config_for(tmp_path)).train) > 100


@pytest.mark.slow
def test_a_killed_build_is_not_taken_for_a_cache(tmp_path, folder):
    def build():
        shards.write_shards = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        data.prepare(config_for(tmp_path))

    assert forked(build) == -signal.SIGKILL
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".unfinished"]
    assert len(data.prepare(config_for(tmp_path)).train) > 100


def test_the_loser_of_a_race_uses_the_winners_cache(tmp_path, folder, monkeypatch):
    write, winner = shards.write_shards, []

    def slow(*args):
        if not winner:  # another run starts and finishes while this one is writing
            winner.append(None)
            winner[0] = data.prepare(config_for(tmp_path))
        return write(*args)

    monkeypatch.setattr(shards, "write_shards", slow)
    loser = data.prepare(config_for(tmp_path))
    assert np.array_equal(loser.train, winner[0].train)
    assert Path(loser.train.paths[0]).samefile(winner[0].train.paths[0])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_build_of_another_process_is_not_taken_from_it(tmp_path, folder):
    config = config_for(tmp_path)
    key = _cache_key(config, sources.open_source(config), None, DATA_RULES)
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


def test_a_folder_that_is_finished_before_it_is_locked_is_not_taken(tmp_path, monkeypatch):
    unfinished = tmp_path / "key.1.unfinished"
    unfinished.mkdir()
    monkeypatch.setattr(
        "corpus.cache.fcntl.flock", lambda *arguments: unfinished.rename(tmp_path / "key")
    )
    assert _lock(unfinished) is None


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


# --- damage


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


@pytest.mark.parametrize(
    "changes",
    [
        dict(characters="many"),
        dict(documents=None),
        dict(unigram_cross_entropy="low"),
        dict(rules=[]),
        dict(files="here"),
        dict(crc32=1),
    ],
    ids=str,
)
def test_facts_of_other_types_are_damage(tmp_path, folder, capsys, changes):
    tokens = np.array(data.prepare(config_for(tmp_path)).train)
    path = next((tmp_path / "cache").glob("*/corpus.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    capsys.readouterr()
    assert np.array_equal(data.prepare(config_for(tmp_path)).train, tokens)
    assert f"{next(iter(changes))} in corpus.json is" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer.json", "corpus.json", "train.bin"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)])
def test_folders_pipes_and_links_in_a_cache_folder_are_damage(tmp_path, folder, name, make):
    tokens = np.array(data.prepare(config_for(tmp_path)).train)
    path = next((tmp_path / "cache").glob(f"*/{name}"))
    path.unlink()
    make(path)
    assert np.array_equal(data.prepare(config_for(tmp_path)).train, tokens)
