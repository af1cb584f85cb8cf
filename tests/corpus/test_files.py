"""The files of a corpus: which are found, how they are read, what is refused."""

import gzip
import json
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet
import pytest

import data
from config import PRESETS, Config, ExperimentError
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
    fails(jsonl('{"text": ""}'), "rows.jsonl", "holds no text", "empty")


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


# --- what is read and what is not


def write(folder, contents: dict[str, str | bytes]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        if name.lower().endswith(".gz"):
            content = gzip.compress(content, mtime=0)
        if name.lower().endswith(".parquet"):
            table = pa.table({"text": content.decode().split()})
            pyarrow.parquet.write_table(table, path)
        else:
            path.write_bytes(content)


def read(tmp_path, pattern: str = "", rules: int = 2, **changes) -> list[str]:
    """The documents of a folder of files, or of a glob in it."""
    config = config_for(tmp_path, data=str(tmp_path / "text" / pattern), **changes)
    return [text for text, _ in sources.open_source(config, rules).chunks()]


ROWS = '{"text": "one"}\n{"text": "two"}\n'
ABOUT = {"README.md": "card", "LICENSE": "l", "license.txt": "l", "NOTICE.md": "n"}
ABOUT |= {"CITATION.cff": "c", ".gitattributes": "g", "dataset_infos.json": '{\n"a": 1}'}


@pytest.mark.parametrize(
    "name", ["en/a.jsonl", "en/A.JSON.GZ", "a.json", "data/A.Parquet", "a.txt.gz", "a.jsonl.gz"]
)
def test_what_is_about_a_data_set_is_no_text_beside_data(tmp_path, capsys, name):
    contents = {"a.txt.gz": "one two", "data/A.Parquet": "one two"}
    write(tmp_path / "text", {name: contents.get(name, ROWS), **ABOUT})
    assert " ".join(read(tmp_path)) == "one two"
    said = capsys.readouterr().err
    assert "2 .md, 1 .cff, 1 .txt, 1 without suffix (README, LICENSE and the like)" in said
    assert "1 .json (no JSON lines with the field 'text')" in said and "1 hidden" in said
    assert said.count("\n") == 1 and f": 1 {sources.count_suffixes([name])[2:]} read;" in said
    read(tmp_path)
    assert capsys.readouterr().err == ""  # it is said once


def test_readme_files_are_the_text_where_there_is_no_other(tmp_path):
    write(tmp_path / "text", {"README.md": "card", "LICENSE": "l", ".git/a.txt": "hidden"})
    assert read(tmp_path) == ["card"]
    write(tmp_path / "text", {"b/c.py": "code", "b/README.md": "note"})  # as in a program
    assert read(tmp_path) == ["card", "note", "code"]


def test_a_readme_is_not_read_for_data_of_another_format(tmp_path):
    write(tmp_path / "text", {"README.md": "card", "train.csv": "a,b", "b.csv": "a,b"})
    with pytest.raises(ExperimentError, match=r"2 \.csv \(no format.*1 \.md \(README"):
        read(tmp_path)
    assert read(tmp_path, "*.md") == ["card"]
    write(tmp_path / "text", {"a.json": '[{"text": "one"}]'})
    with pytest.raises(ExperimentError, match=r"1 \.json \(no JSON lines with the field 'text'\)"):
        read(tmp_path)


def test_hidden_files_and_folders_are_read_only_by_name(tmp_path):
    hidden = {".git/a.txt": "1", ".ipynb_checkpoints/b-checkpoint.txt": "2", "c/._d.txt": "3"}
    write(tmp_path / "text", {"b.txt": "good", "c/d.txt": "good too", **hidden})
    assert read(tmp_path) == ["good", "good too"]
    assert read(tmp_path, ".git") == ["1"]
    assert read(tmp_path, "c/._d.txt") == ["3"]
    assert read(tmp_path, ".git/*") == ["1"]
    (tmp_path / "text" / "a").symlink_to(tmp_path / "text" / ".git")  # a name that is not hidden
    assert read(tmp_path) == ["good", "1", "good too"]


def test_version_1_of_the_rules_reads_what_it_read_before(tmp_path, capsys):
    write(tmp_path / "text", {".a/b.txt": "1", "README.md": "2", "c.jsonl": ROWS, "z.txt": "3"})
    config = config_for(tmp_path)
    before = sources.open_source(config, 1).identity()
    expected = ["2", "one", "two", "3", "1"]
    assert read(tmp_path, rules=1) == expected
    write(tmp_path / "text", {"d.json.gz": ROWS, "e.txt.gz": "5", "f.csv": "", "g.json": ROWS})
    assert read(tmp_path, rules=1) == expected
    assert sources.open_source(config, 1).identity() == before
    assert sources.open_source(config, 2).identity() != before
    assert read(tmp_path, "*", rules=1) == expected[:-1]
    said = capsys.readouterr().err
    assert "1 .json, 1 .json.gz, 1 .txt.gz (not read beside the others)" in said
    # What old programs refused can be read: no old run has such a text.
    assert read(tmp_path, "*.json.gz", rules=1) == ["one", "two"]
    assert read(tmp_path, "g.json", rules=1) == ["one", "two"]


def test_what_has_no_known_format_is_counted_by_suffix(tmp_path, capsys):
    others = {f"{n}.{suffix}": "" for n in range(2) for suffix in ("csv", "C", "jsonl.xz")}
    many = {f"x.s{n}": "" for n in range(20)}
    write(tmp_path / "text", {"a.txt": "a", "b.TXT.GZ": "b", "c.html": "", **others, **many})
    assert read(tmp_path) == ["a", "b"]
    said = capsys.readouterr().err
    assert "1 .txt, 1 .txt.gz read; not read: 2 .c, 2 .csv, 2 .jsonl.xz, 1 .html, " in said
    assert "12 of 12 other suffixes" in said


def test_a_name_with_a_line_break_does_not_break_the_line_of_a_message(tmp_path, capsys):
    """Whether it is in the suffix, the name of a file or of a field, or in a folder's name."""
    rows = '{"text": "one"}\n{"text": \n{"te\\nxt": "two"}\n'
    write(tmp_path / "text", {"a.jsonl": ROWS, "b.x\ny\x1b[2J": "", "c.é": ""})
    assert read(tmp_path) == ["one", "two"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said
    assert "not read: 1 '.x\\ny\\x1b[2j', 1 .é (no format" in said

    write(tmp_path / "text", {"d\ne/f.jsonl": rows})
    with pytest.raises(ExperimentError) as error:
        read(tmp_path, "d\ne")
    assert "\n" not in str(error.value)
    assert "d\\ne/f.jsonl':3: no field 'text'; the fields are 'te\\nxt'." in str(error.value)
    write(tmp_path / "text", {"d\ne/f.jsonl": rows.rpartition("{")[0]})
    with pytest.raises(ExperimentError, match=r"d\\ne/f.jsonl':2: not valid JSON") as error:
        read(tmp_path, "d\ne")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["", "*"])
def test_a_link_whose_target_is_gone_is_counted(tmp_path, capsys, where):
    write(tmp_path / "text", {"a.jsonl": '{"text": "one"}'})
    for name in ("b.jsonl", "c.jsonl", "d.jsonl"):  # as in a cache of the hub without its blobs
        (tmp_path / "text" / name).symlink_to("../blobs/" + name)
    os.mkfifo(tmp_path / "text" / "e.txt")
    assert read(tmp_path, where) == ["one"]
    assert "not read: 3 .jsonl, 1 .txt (links to what is not there" in capsys.readouterr().err


def test_a_readme_is_not_read_where_the_data_is_gone(tmp_path):
    write(tmp_path / "text", {"README.md": "about"})
    (tmp_path / "text" / "a.parquet").symlink_to("../blobs/a")
    fails(config_for(tmp_path, data=str(tmp_path / "text")), "1 .parquet (links to what is not")


def test_json_lines_in_a_file_called_json(tmp_path):
    write(tmp_path / "text", {"a.json": "\n" + ROWS, "b.json": '{"text": \n"c"}', "c.json": "[1]"})
    assert read(tmp_path) == ["one", "two"]
    with pytest.raises(ExperimentError, match="not an object"):
        read(tmp_path, "c.json")
    with pytest.raises(ExperimentError, match="--text_field"):
        read(tmp_path, text_field="body")
    (tmp_path / "text" / "d.json.gz").write_bytes(b"no archive")
    with pytest.raises(ExperimentError, match="not a valid .gz file"):
        read(tmp_path)


def test_bad_bytes_of_a_compressed_text_are_named_by_their_offset(tmp_path):
    write(tmp_path / "text", {"a.txt.gz": b"x" * 100_000 + b"\xc3\xa9\n" + b"\xff\n"})
    with pytest.raises(ExperimentError, match="invalid byte at offset 100003"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid 1\n", "git lfs pull"),
        ("a.jsonl.gz", None, "git lfs pull"),
        ("a.txt", gzip.compress(b"text", mtime=0), "Let its name end with .gz"),
        ("a.jsonl", b"PAR1\x15\x04", "Name it .parquet"),
        ("a.json", b'[\n{"text": "a"}\n]', "one object a line, for example with jq -c '.[]'"),
        ("a.jsonl", b'[{"text": "a"}]', "one object a line, for example with jq -c '.[]'"),
        ("a.json", b'{\n"text": "a"\n}', "one object a line, for example with jq -c . FILE"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content or b"version https://git-lfs.github.com/spec/v1\n")
    config = config_for(tmp_path, data=str(path))
    with pytest.raises(ExperimentError) as caught:
        list(sources.open_source(config).chunks())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_clone_without_its_large_files_is_one_line(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    write(tmp_path / "text", {"README.md": "card", "data/a.json": pointer})
    with pytest.raises(ExperimentError, match="a.json is a pointer of Git LFS.*git lfs pull"):
        read(tmp_path)
