"""Checksums of the cache's token files."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

import data
from config import ExperimentError
from corpus import checksums
from tests.corpus.stories import config_for


def flip(path: Path, at: int) -> None:
    """Changes one bit of a file. Its size and its time of writing stay."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
@pytest.mark.parametrize("large_file", [2**28, 0])
def test_a_changed_bit_is_found_before_use(tmp_path, folder, capsys, monkeypatch, name, large_file):
    monkeypatch.setattr(checksums, "LARGE_FILE", large_file)
    tokens = np.array(data.prepare(config_for(tmp_path)).train)
    path = next((tmp_path / "cache").glob(f"*/{name}"))
    facts = json.loads((path.parent / "corpus.json").read_text())
    assert facts["crc32"][name] == f"{zlib.crc32(path.read_bytes()):08x}"
    flip(path, 1100)
    capsys.readouterr()
    assert np.array_equal(data.prepare(config_for(tmp_path)).train, tokens)
    assert f"{path} is damaged: its checksum" in capsys.readouterr().out


def test_a_large_file_is_read_again_only_when_it_may_have_changed(tmp_path, folder, monkeypatch):
    data.prepare(config_for(tmp_path))
    read = []
    checksum = checksums.checksum
    monkeypatch.setattr(checksums, "checksum", lambda path: read.append(path) or checksum(path))
    data.prepare(config_for(tmp_path))
    assert len(read) == 2  # small files are read each time
    read.clear()
    monkeypatch.setattr(checksums, "LARGE_FILE", 5000)  # train.bin is larger, validation.bin is not
    data.prepare(config_for(tmp_path))
    data.prepare(config_for(tmp_path))
    assert [path.name for path in read] == ["train.bin", "validation.bin", "validation.bin"]
    read[0].touch()
    data.prepare(config_for(tmp_path))
    (read[0].parent / checksums.COMPARED_FILE).write_text("{")
    data.prepare(config_for(tmp_path))
    assert [path.name for path in read[3:]] == ["train.bin", "validation.bin"] * 2


def test_a_cache_without_checksums_is_opened_as_before(tmp_path, folder, monkeypatch):
    data.prepare(config_for(tmp_path))
    place = next((tmp_path / "cache").iterdir())
    facts = json.loads((place / "corpus.json").read_text())
    facts.pop("crc32")
    (place / "corpus.json").write_text(json.dumps(facts))
    monkeypatch.setattr(checksums, "checksum", lambda path: pytest.fail("it was read"))
    assert len(data.prepare(config_for(tmp_path)).train) > 500


def test_compare_names_the_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"123456789")
    checksums.compare(tmp_path, {"a.bin": "cbf43926"})
    with pytest.raises(ExperimentError, match=r"a.bin is damaged.*Delete the folder"):
        checksums.compare(tmp_path, {"a.bin": "cbf43927"})
