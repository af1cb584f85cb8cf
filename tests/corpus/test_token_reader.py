"""Tokens that are read from files: few descriptors, errors of one line, forks."""

import contextlib
import os
import resource
from pathlib import Path

import numpy as np
import pytest

import data
from config import ExperimentError
from corpus import token_reader
from corpus.external import joined, open_external_shard
from corpus.token_reader import TokenFiles
from tests.corpus.stories import config_for, forked


def many_shards(folder, number: int, length: int) -> TokenFiles:
    """Shards that hold 0, 1, 2, ... one after the other."""
    shards = []
    for first in range(0, number * length, length):
        path = folder / f"{first}.bin"
        np.arange(first, first + length, dtype="<u2").tofile(path)
        shards.append(open_external_shard(str(path)))
    return joined(shards)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("workers", [0, 1])
def test_more_shards_than_a_process_may_open(tmp_path, workers):
    tokens = many_shards(tmp_path, 1100, 20)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        config = config_for(tmp_path, num_workers=workers)
        batches = data.batches(tokens, config, 0)
        for _ in range(40):
            inputs, targets = next(batches)
            assert (targets == inputs + 1).all()
        batches.close()
        assert tokens[:].tolist() == list(range(22_000))
        assert open_files() < token_reader.OPEN_FILES + 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_file_is_closed_when_others_are_used(tmp_path):
    tokens = many_shards(tmp_path, 300, 2)
    assert len(tokens[:]) == 600
    before = open_files()
    token_reader._open_file.cache_clear()
    assert open_files() == before - token_reader.OPEN_FILES


def error_of(batches) -> str:
    """The message of the error in which the batches end. Their workers end in any case."""
    with contextlib.closing(batches), pytest.raises(ExperimentError) as caught:
        for _ in range(100):
            next(batches)
    return str(caught.value)


def overwrite(path: str, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(3000)
        file.write(content)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_file_that_is_cut_while_it_is_in_use(tmp_path, folder, workers):
    config = config_for(tmp_path, num_workers=workers)
    corpus = data.prepare(config)
    batches = data.batches(corpus.train, config, 0)
    next(batches)
    [path] = corpus.train.paths
    size = Path(path).stat().st_size
    os.truncate(path, 2000)
    message = error_of(batches)
    assert message.startswith(f"{path} was cut while it was in use: it had {size:,} bytes")
    assert "has 2,000 now. Delete the folder" in message and "\n" not in message
    assert len(data.prepare(config).train) == len(corpus.train)  # built anew


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_file_that_is_written_to_while_it_is_in_use(tmp_path, folder, workers):
    config = config_for(tmp_path, num_workers=workers)
    corpus = data.prepare(config)
    tokens = np.array(corpus.train)
    batches = data.batches(corpus.train, config, 0)
    next(batches)
    [path] = corpus.train.paths
    overwrite(path, b"\x01\x00\x02\x00")  # tokens of the vocabulary
    message = error_of(batches)
    assert message.startswith(f"{path} was changed while it was in use. Run again")
    assert np.array_equal(data.prepare(config).train, tokens)  # built anew


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_outside_of_the_vocabulary_is_named(tmp_path, folder, workers):
    config = config_for(tmp_path, num_workers=workers)
    corpus = data.prepare(config)
    [path] = corpus.train.paths
    stat = Path(path).stat()
    overwrite(path, b"\xff\xff")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as when a disk loses bits
    message = error_of(data.batches(corpus.train, config, 0))
    assert message.startswith(f"{path} is damaged: token 65,535 at byte 3,000 is not in the")
    assert "vocabulary of 300 tokens. Delete the folder" in message and "\n" not in message


def test_the_first_id_behind_the_vocabulary_is_refused(tmp_path):
    parts = many_shards(tmp_path, 1, 20).parts
    largest = int(TokenFiles(parts, "")[:].max())
    assert len(TokenFiles(parts, "", vocabulary=largest + 1)[:]) == 20
    with pytest.raises(ExperimentError, match=f"token {largest} at byte"):
        TokenFiles(parts, "", vocabulary=largest)[:]


def test_a_file_that_is_gone_or_another_when_it_is_opened_again(tmp_path):
    tokens = many_shards(tmp_path, 2, 20)
    first, second = tokens.paths
    Path(first).unlink()
    with pytest.raises(ExperimentError, match=r"0.bin: No such file.*download it again"):
        tokens[:5]
    os.utime(second, (1, 1))
    with pytest.raises(ExperimentError, match=r"20.bin was changed while it was in use.*Run again"):
        tokens[25:30]


def test_a_fork_reads_the_same_files(tmp_path):
    tokens = many_shards(tmp_path, 3, 2000)
    before = tokens[:10]

    def read():
        for first in range(0, 6000, 7):
            assert tokens[first : first + 7].tolist() == list(range(first, min(6000, first + 7)))

    assert forked(read) == 0
    assert tokens[:10].tolist() == before.tolist()


def test_tokens_behave_as_an_array_does(tmp_path):
    tokens = many_shards(tmp_path, 3, 4)
    assert np.array_equal(tokens, np.arange(12)) and np.array(tokens).dtype == np.uint16
    assert tokens[5:5].dtype == np.uint16 and len(tokens[20:30]) == 0
    with pytest.raises(ValueError, match="without a step"):
        tokens[::2]
