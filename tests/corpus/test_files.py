"""The files of a corpus: which are found, how they are read, what is refused."""

import json
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet
import pytest

import data
from config import PRESETS, Config
from corpus import sources
from tests.corpus.stories import config_for, fails, story

# --- finding files


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


# --- reading them


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
