"""Lines of JSON of any length: the same documents and the same faults as json.loads finds, in little memory."""

import gzip
import json
import random
import tracemalloc

import pyarrow  # noqa: F401 (before memory is traced)
import pytest

from config import ExperimentError
from corpus import formats, json_lines
from corpus.formats import RowCounter, file_chunks

PARTS_OF_STRINGS = [
    *("a", "é", "🙂", " ", "ud83d", "x" * 30, r"\n", r"\r\n", r"\"", r"\\", r"\/"),
    *(r"\u00e9", r"\ud83d\ude00", r"\uD83D", r"\ude00", r"\ud83d\u0041"),
]
VALID_PARTS = PARTS_OF_STRINGS[:-3]
SCALARS = ["1", "-2.5e3", "true", "null", "NaN", "-Infinity", "1E5"]
FAULTS = ['"', "\\", "}", "]", ",", ":", "{", "x", "\t", "1"]


def _string(rng: random.Random, parts: list[str]) -> str:
    return '"' + "".join(rng.choices(parts, k=rng.choice([0, 1, 4, 20]))) + '"'


def _value(rng: random.Random, depth: int = 0) -> str:
    kind = rng.random()
    if kind < 0.4 or depth > 3:
        return rng.choice([_string(rng, PARTS_OF_STRINGS), *SCALARS])
    values = [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.7:
        return "[ " + " , ".join(values) + "\t]"
    return "{" + ",".join(f"{_string(rng, PARTS_OF_STRINGS)} : {v}" for v in values) + " }"


def _line(rng: random.Random) -> str:
    """A line with the field "text" among others; some lines are blank, cut or have a fault."""
    fields = [f"{_string(rng, PARTS_OF_STRINGS)}: {_value(rng)}" for _ in range(rng.randrange(4))]
    text = rng.choice([_string(rng, VALID_PARTS)] * 3 + [_string(rng, PARTS_OF_STRINGS), "null"])
    fields.insert(
        rng.randrange(len(fields) + 1), rng.choice(['"text"', r'"te\u0078t"']) + ": " + text
    )
    if rng.random() < 0.1:
        fields.append('"text":' + _string(rng, VALID_PARTS))  # json.loads takes the last one
    line = "{" + ", ".join(fields) + "}"
    at = rng.randrange(len(line))
    return rng.choice(
        [line] * 7 + [line[:at] + rng.choice(FAULTS) + line[at:], line[:at] + line[at + 1 :], "  "]
    )


def _read(path, length: int):
    rows, chunks, error = RowCounter(), [], ""
    try:
        chunks.extend(file_chunks(str(path), "text", length, rows))
    except ExperimentError as caught:
        error = str(caught)[:60]
    return chunks, rows.read, rows.bad, error


def test_a_long_line_gives_the_chunks_and_the_faults_of_a_short_one(tmp_path, monkeypatch):
    rng = random.Random(1)
    path = tmp_path / "rows.jsonl"
    documents = bad = 0
    for _ in range(150):
        lines = [_line(rng) for _ in range(rng.randrange(1, 6))]
        content = rng.choice(["\n", "\n", "\r"]).join(lines).encode()
        if rng.random() < 0.2:
            at = rng.randrange(len(content) + 1)
            content = content[:at] + rng.choice([b"\xff", b"\xf0\x9f"]) + content[at:]
        path.write_bytes(content)
        length = rng.choice([1, 3, 7, 50])
        expected = _read(path, length)
        with monkeypatch.context() as patch:
            patch.setattr(formats, "LONG_LINE", rng.choice([1, 5, 20]))
            patch.setattr(json_lines, "PART", rng.choice([1, 2, 7, 30]))
            assert _read(path, length) == expected, content
        documents += sum(last for _, last in expected[0])
        bad += expected[2]
    assert documents > 150 and bad > 40  # the lines are good enough a test of both


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"text": "a" "b"}', "not valid JSON (expecting ',' or the end of the object or list"),
        ('{"text": "a', "not valid JSON (unterminated string"),
        ('{"text": "\\x"}', "not valid JSON (invalid escape: character 11)"),
        ('{"text": "a"} 5', "not valid JSON (expecting the end of the line: character 15)"),
        ('{"text": "a", "b": ' + "[" * 2000, "too many objects or lists inside each other"),
        ('{"text": "' + "ab" * 50 + '\\ud800"}', "after its first 100 characters"),
        ('{"text": 5}', "holds no text: 5"),
        ('{"text": {"a": "b"}}', "holds no text"),
        ("[1, 2]", "the line is not an object"),
        ('{"a": 1, "b": {"text": "c"}}', "the fields are a, b"),
    ],
)
def test_what_is_wrong_with_a_long_line_is_said(tmp_path, monkeypatch, line, problem):
    monkeypatch.setattr(formats, "LONG_LINE", 5)
    monkeypatch.setattr(json_lines, "PART", 10)
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{line}\n{{"text": "good"}}\n')
    rows = RowCounter()
    try:
        assert list(file_chunks(str(path), "text", 1000, rows)) == [("good", True)]
        message = rows.problems[0]
    except ExperimentError as error:
        message = str(error)
    assert problem in message and f"{path}:1: " in message


@pytest.mark.parametrize("name", ["one.jsonl", "one.txt", "one.jsonl.gz"])
def test_a_document_on_one_line_is_read_in_little_memory(tmp_path, name):
    """8 MB on one line, good or with a bad byte at its end, in a few MB of memory."""
    document = "alpha beta gamma " * 500_000
    content = document.encode()
    if "json" in name:
        content = json.dumps({"id": "x" * 1_500_000, "text": document}).encode()
    for ending in (b"", b"\xff"):
        raw = content + ending
        if name.endswith(".gz"):
            raw = gzip.compress(raw, 1)
        (tmp_path / name).write_bytes(raw)
        rows = RowCounter()
        tracemalloc.start()
        characters = 0
        for text, _ in file_chunks(str(tmp_path / name), "text", 65536, rows):
            characters += len(text)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 12_000_000, peak
        assert rows.bad == len(ending)
        if not ending:
            assert characters == len(document)
