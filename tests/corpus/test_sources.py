"""sources.py and formats.py: files of all formats, bad rows, data sets of the Hugging Face hub, all without a network."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import data
from config import Config, ConfigError, ExperimentError
from corpus import sources, text_scan, token_writer
from corpus.formats import RowCounter
from corpus.sources import open_source
from corpus.tokenizer import train_tokenizer
from tests.corpus.stories import STORIES, config_for, fails
from tools import evaluate
from trainer import Trainer


def documents(config: Config) -> list[str]:
    return [text for text, _ in open_source(config).chunks()]


def write_rows(path: Path, rows, field: str = "text") -> Path:
    """A .jsonl, .jsonl.gz, .jsonl.zst or .parquet file of the rows."""
    lines = "".join(
        json.dumps({field: row, "id": number}) + "\n" for number, row in enumerate(rows)
    ).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(
            pa.table({"id": list(range(len(rows))), field: rows}), path, row_group_size=10
        )
    elif path.suffix == ".jsonl":
        path.write_bytes(lines)
    elif path.suffix == ".gz":
        path.write_bytes(
            gzip.compress(lines[:1000]) + gzip.compress(lines[1000:])
        )  # as cat joins two
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    return path


FORMATS = ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet")


# --- files


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    texts = [*STORIES, "é 🙂\r\nend", "", None]
    config = config_for(
        tmp_path, data=str(write_rows(tmp_path / name, texts, "body")), text_field="body"
    )
    source = open_source(config)
    assert [text for text, _ in source.chunks()] == [*STORIES, "é 🙂\r\nend"]
    assert (source.rows.read, source.rows.empty, source.rows.bad) == (len(texts), 2, 0)
    shutil.copy(tmp_path / name, tmp_path / name.replace("rows", "ROWS").upper())
    assert documents(
        config_for(tmp_path, data=str(tmp_path / "*.[!x]*"), text_field="body")
    ) == 2 * documents(config)


@pytest.mark.parametrize("name", FORMATS[1:3])
@pytest.mark.parametrize("how", ["cut", "flipped", "other", "empty"])
def test_a_damaged_compressed_file_is_refused(tmp_path, name, how):
    raw = bytearray(write_rows(tmp_path / name, STORIES).read_bytes())
    raw[len(raw) // 2] ^= 255
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(
        dict(cut=whole[:-20], flipped=bytes(raw), other=b"no archive", empty=b"")[how]
    )
    fails(config_for(tmp_path, data=str(tmp_path / name)), name, "not a valid", "again")


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt"])
def test_linked_folders_are_read_once(tmp_path, pattern):
    for name in ("text/a/one.txt", "elsewhere/two.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for link, folder in {"text/b": "elsewhere", "text/a/loop": "text/a"}.items():
        (tmp_path / link).symlink_to(tmp_path / folder)
    assert documents(config_for(tmp_path, data=str(tmp_path / "text" / pattern))) == [
        "text/a/one.txt",
        "elsewhere/two.txt",
    ]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "text" / "secret").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("text")
    scandir = os.scandir

    def denied(path):  # what permissions do, except to root
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    fails(config_for(tmp_path), "cannot read", "secret: Permission denied")


def test_what_the_program_itself_wrote_among_the_text_is_not_read(tmp_path):
    """A run's rows in a folder of text, and the cache of its tokens."""
    for name in (
        "text/a.txt",
        "text/run/run.json",
        "text/run/metrics.jsonl",
        "text/cache/0.bin",
        "text/other/metrics.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(
            '{"text": "b"}\n'
            if name == "text/other/metrics.jsonl"
            else "a"
            if name == "text/a.txt"
            else "{}\n"
        )
    for pattern in ("text", "text/**"):
        assert documents(
            config_for(
                tmp_path, data=str(tmp_path / pattern), cache_dir=str(tmp_path / "text" / "cache")
            )
        ) == ["a", "b"]
    fails(config_for(tmp_path, data=str(tmp_path / "text/run/metrics.jsonl")), "no field 'text'")


def test_a_folder_of_text_and_token_shards_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"ab")
    fails(config_for(tmp_path, data=str(tmp_path)), "b.bin", "a.txt", "*.bin")


@pytest.mark.parametrize(
    "limit, expected",
    [(0, 40), (1, 1), (len(STORIES[0]), 1), (len(STORIES[0]) + 1, 2), (10**9, 40)],
)
def test_max_characters_ends_the_corpus(tmp_path, limit, expected):
    config = config_for(
        tmp_path, data=str(write_rows(tmp_path / "rows.jsonl", STORIES)), max_characters=limit
    )
    assert documents(config) == STORIES[:expected]


def test_max_characters_ends_a_long_document(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (50, 50))
    (tmp_path / "a.txt").write_text("".join(STORIES[:3]))
    pieces = list(
        open_source(config_for(tmp_path, data=str(tmp_path / "a.txt"), max_characters=120)).chunks()
    )
    assert 120 <= sum(len(text) for text, _ in pieces) < 220 and [last for _, last in pieces] == [
        False
    ] * (len(pieces) - 1) + [True]


# --- bad rows


def spoiled(tmp_path, name: str, good: int) -> tuple[Path, list[str]]:
    """A file of good + 2 rows of which two cannot be read, and the texts of the others."""
    texts, path = [f"row {number} é" for number in range(good)], tmp_path / name
    if name == "rows.txt":
        lines = [text.encode() for text in texts]
        lines[3:3] = [b"caf\xe9", b"\xff\xfe"]
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif name == "rows.jsonl":
        lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
        lines[3:3] = [b'{"text": "caf\xe9"}', b'{"text": ']
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        raw = [text.encode() for text in texts]
        raw[3:3] = [b"caf\xe9", b"\xff\xfe"]
        offsets = np.cumsum([0, *map(len, raw)]).astype(np.int32)
        column = pa.StringArray.from_buffers(
            len(raw), pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(raw))
        )
        pyarrow.parquet.write_table(pa.table({"text": column}), path)
    return path, texts


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl", "rows.parquet"])
def test_bad_rows_are_counted_and_left_out_up_to_the_stated_share(tmp_path, name, capsys):
    path, texts = spoiled(tmp_path, name, 998)
    for share, enough in ((0.002, True), (0.0019, False)):  # 2 of 1000
        config = config_for(tmp_path, data=str(path), max_bad_share=share)
        if enough:
            text = open_source(config)
            assert "".join(t for t, _ in text.chunks()).replace("\n", "") == "".join(texts)
            assert (text.rows.read, text.rows.bad) == (1000, 2)
            corpus = data.prepare(config)
            assert (
                "2 of 1,000 lines or rows cannot be read and are left out: "
                in capsys.readouterr().out
            )
            assert len(corpus.train) > 500
        else:
            fails(config, "2 of 1,000", "0.19%", "--max_bad_share", name, "UTF-8")


def test_rows_without_text_are_left_out_and_said(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.parquet", [None, *STORIES, ""])
    config = config_for(tmp_path, data=str(path), max_bad_share=0.0)
    assert data.prepare(config).documents == len(STORIES)
    said = capsys.readouterr().out
    assert "data: 2 of 42 rows have no text in the field 'text' (null or empty)" in said
    write_rows(path, [None, None, None])
    fails(config, "rows.parquet holds no text: in 3 of 3 rows it is null", "--text_field")


def test_no_more_lines_are_bad_than_there_are(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\r\xff\r\xff\n" * 50)
    fails(config_for(tmp_path, data=str(tmp_path / "x.txt")), "150 of 150 lines")


def test_the_default_share_is_one_in_a_thousand(tmp_path):
    assert (
        len(documents(config_for(tmp_path, data=str(spoiled(tmp_path, "rows.jsonl", 1998)[0]))))
        == 1998
    )
    fails(
        config_for(tmp_path, data=str(spoiled(tmp_path, "rows.jsonl", 1997)[0])),
        "2 of 1,999",
        "rows.jsonl:4",
        "rows.jsonl:5",
        "offset",
        "not valid JSON",
    )


def test_each_bad_row_is_named_with_its_own_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "caf\xe9"}\n{"text": "ab\xff"}\n{"text": "a" "b"}\n{"text": "\\ud800"}\n'
    )
    config = config_for(tmp_path, data=str(path))
    fails(
        config,
        "rows.jsonl:1: field 'text' is not text in UTF-8: invalid byte at offset 3;",
        "rows.jsonl:2: field 'text' is not text in UTF-8: invalid byte at offset 2;",
        "rows.jsonl:3: not valid JSON (Expecting ',' delimiter: character 14)",
        "; ...",
    )
    text = open_source(replace(config, max_bad_share=1.0))
    assert list(text.chunks()) == [] and text.rows.bad == 4


@pytest.mark.parametrize(
    "encoding, place",
    [
        ("utf-16", "invalid byte at offset 0"),
        ("utf-16-le", "a byte 0 at offset 1, as in UTF-16"),
        ("utf-32-be", "a byte 0 at offset 0, as in UTF-16"),
    ],
)
def test_text_in_utf_16_is_not_read_as_text_full_of_nul(tmp_path, encoding, place):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes("".join(STORIES).encode(encoding))
    fails(
        config_for(tmp_path, data=str(tmp_path / "*.txt"), max_bad_share=0.5),
        f"a.txt: not text in UTF-8: {place}",
        "b.txt: not text",
        "--max_bad_share",
        "iconv",
    )


def test_a_damaged_row_group_is_left_out_or_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(
        pa.table({"text": [f"row {i} " + "x" * 30 for i in range(1000)]}),
        path,
        row_group_size=100,
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(3).column(0)
    raw = bytearray(path.read_bytes())
    raw[group.data_page_offset + group.total_compressed_size // 2] ^= 1
    path.write_bytes(raw)
    config = config_for(tmp_path, data=str(path))
    fails(
        config,
        "rows.parquet",
        "row group 4 of 10: rows 301 to 400",
        "100 of 1,000",
        "--max_bad_share",
    )
    found = documents(config_for(tmp_path, data=str(path), max_bad_share=0.1))
    assert [int(text.split()[1]) for text in found] == [
        i for i in range(1000) if not 300 <= i < 400
    ]


def test_a_missing_field_is_refused_at_once_wherever_it_is_missing(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 5000 + '{"body": "b"}\n')
    fails(
        config_for(tmp_path, data=str(tmp_path / "rows.jsonl")),
        "rows.jsonl:5001",
        "'text'",
        "body",
        "--text_field",
    )


# --- data sets of the hub


@pytest.fixture
def hub(tmp_path) -> Path:
    """A data set as `datasets` reads it, in two configurations, and two files of the training split."""
    folder = tmp_path / "stories"
    for name, texts in {
        "big/train-0": STORIES[:25],
        "big/train-1": STORIES[25:],
        "big/test-0": ["held"],
        "small/train-0": ["one", "two"],
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows((folder / name).with_suffix(".parquet"), texts)
    configs = [
        dict(
            config_name=name,
            data_files=[dict(split=split, path=f"{name}/{split}-*") for split in splits],
        )
        for name, splits in (("big", ("train", "test")), ("small", ("train",)))
    ]
    (folder / "README.md").write_text("---\nconfigs: " + json.dumps(configs) + "\n---\n")
    return folder


def test_the_form_of_a_hub_name():
    assert sources.parse_hub_name("hf:a/b") == ("a/b", None, "train")
    assert sources.parse_hub_name("hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2") == (
        "HuggingFaceTB/smollm-corpus",
        "cosmopedia-v2",
        "train",
    )
    assert sources.parse_hub_name("hf:a/b::test") == ("a/b", None, "test")
    for name in ("hf:", "hf::c", "hf:a:b:c:d"):
        with pytest.raises(ConfigError, match="hf:DATASET"):
            sources.parse_hub_name(name)


def test_a_data_set_is_streamed(tmp_path, hub):
    assert documents(config_for(tmp_path, data=f"hf:{hub}:big")) == STORIES
    assert documents(config_for(tmp_path, data=f"hf:{hub}:big:test")) == ["held"]
    assert documents(config_for(tmp_path, data=f"hf:{hub}:small:train")) == ["one", "two"]
    assert (
        documents(config_for(tmp_path, data=f"hf:{hub}:big", max_characters=len(STORIES[0]) + 1))
        == STORIES[:2]
    )


def test_a_data_set_becomes_the_corpus_that_its_files_are(tmp_path, hub, monkeypatch):
    files = data.prepare(
        config_for(
            tmp_path,
            data=str(write_rows(tmp_path / "rows.jsonl", STORIES)),
            cache_dir=str(tmp_path / "other"),
        )
    )
    config = config_for(tmp_path, data=f"hf:{hub}:big")
    corpus = data.prepare(config)
    assert corpus.data_hash == files.data_hash and corpus.tokenizer_json == files.tokenizer_json
    assert np.array_equal(corpus.train, files.train) and np.array_equal(
        corpus.validation, files.validation
    )
    monkeypatch.setattr(
        sources, "_open_hub", lambda source: pytest.fail("the data set was opened again")
    )
    assert np.array_equal(data.prepare(config).train, corpus.train)


def test_of_a_long_data_set_the_beginning_decides_split_and_tokenizer(tmp_path, hub, monkeypatch):
    whole = data.prepare(
        config_for(tmp_path, data=f"hf:{hub}:big", cache_dir=str(tmp_path / "other")), rules=1
    )
    monkeypatch.setattr(text_scan, "TOKENIZER_SAMPLE", sum(map(len, STORIES[:20])))
    corpus = data.prepare(config_for(tmp_path, data=f"hf:{hub}:big"), rules=1)
    assert (
        corpus.data_hash == whole.data_hash
        and corpus.documents == 40
        and corpus.characters == whole.characters
    )
    decode = corpus.tokenizer.decode
    sides = [
        decode(t[:].tolist(), skip_special_tokens=False).split("<|endoftext|>")[:-1]
        for t in (corpus.train, corpus.validation)
    ]
    assert sorted(sides[0] + sides[1]) == sorted(STORIES)
    limit = max(text_scan.text_hash(text) for text in sides[1])
    assert all(text_scan.text_hash(text) > limit for text in sides[0])
    held = [
        text for text in STORIES[:20] if text_scan.text_hash(text) <= limit
    ]  # a fifth of the beginning, not of all
    assert 0.2 <= sum(map(len, held)) / sum(map(len, STORIES[:20])) < 0.3
    assert corpus.tokenizer_json == train_tokenizer(
        [text for text in STORIES[:20] if text not in held], 300
    )


def test_the_same_text_from_a_file_does_not_take_over_a_split_that_the_beginning_decided(
    tmp_path, hub, monkeypatch
):
    rows = str(write_rows(tmp_path / "rows.jsonl", STORIES))
    own = data.prepare(config_for(tmp_path, data=rows, cache_dir=str(tmp_path / "other")))
    monkeypatch.setattr(text_scan, "TOKENIZER_SAMPLE", sum(map(len, STORIES[:20])))
    changes = dict(tokenizer=str(tmp_path / "tokenizer.json"))
    Path(changes["tokenizer"]).write_text(own.tokenizer_json)
    beginning = data.prepare(config_for(tmp_path, data=f"hf:{hub}:big", **changes))
    corpus = data.prepare(config_for(tmp_path, data=rows, **changes))
    assert np.array_equal(corpus.validation, own.validation) and not np.array_equal(
        corpus.validation, beginning.validation
    )


def test_a_data_set_that_save_to_disk_left(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(dict(id=range(40), text=STORIES)).save_to_disk(tmp_path / "saved")
    text = open_source(config_for(tmp_path, data=f"hf:{tmp_path / 'saved'}"))
    reading = text.chunks()
    assert [next(reading)[0] for _ in range(25)] == STORIES[:25]
    again = open_source(config_for(tmp_path, data=f"hf:{tmp_path / 'saved'}"))
    assert [
        piece for piece, _ in again.chunks(json.loads(json.dumps(text.position(25))))
    ] == STORIES[25:]


@pytest.mark.parametrize("cut", [1, 24, 25, 26, 39])
def test_a_data_set_goes_on_from_a_position(tmp_path, hub, cut):
    first, second = (open_source(config_for(tmp_path, data=f"hf:{hub}:big")) for _ in range(2))
    reading = first.chunks()
    assert [next(reading)[0] for _ in range(cut)] == STORIES[:cut]
    position = json.loads(json.dumps(first.position(cut)))
    reads = []
    values = second._values

    def counted_values():
        for value in values():
            reads.append(value)
            yield value

    second._values = counted_values
    assert [text for text, _ in second.chunks(position)] == STORIES[cut:]
    assert (
        len(reads) == 40 - cut
        and second.chunks_read == 40
        and second.characters_read == sum(map(len, STORIES))
    )


def test_time_left_is_known_when_the_data_set_says_how_long_it_is(tmp_path, hub):
    text = open_source(config_for(tmp_path, data=f"hf:{hub}:big"))
    next(text.chunks())
    assert text.expected_characters(1000, 10) is None
    text.stream.info.splits = {"train": type("Split", (), dict(num_examples=40))}
    assert text.expected_characters(1000, 10) == 4000
    for limit, expected in ((500, 500), (5000, 4000)):
        text.config = config_for(tmp_path, data=f"hf:{hub}:big", max_characters=limit)
        assert text.expected_characters(1000, 10) == expected
    text.stream.info.splits = None
    assert text.expected_characters(1000, 10) == 5000


def test_data_sets_that_cannot_be_used(tmp_path, hub):
    fails(
        config_for(tmp_path, data="hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2"),
        "needs the network",
        "Go online",
        "to_parquet",
        "'cosmopedia-v2'",
        "--data FILE.parquet",
        "python and installed",
    )
    fails(
        config_for(tmp_path, data=f"hf:{tmp_path / 'none'}"), "none", "hf:DATASET[:CONFIG[:SPLIT]]"
    )
    fails(config_for(tmp_path, data=f"hf:{hub}:huge"), "huge", "hf:DATASET")
    fails(config_for(tmp_path, data=f"hf:{hub}:big:dev"), "dev", "hf:DATASET")
    fails(
        config_for(tmp_path, data=f"hf:{hub}:big", text_field="body"),
        "'body'",
        "id, text",
        "--text_field",
    )
    fails(
        config_for(tmp_path, data=f"hf:{hub}:big", text_field="id"),
        "row 1",
        "holds no text",
        "--text_field",
    )
    (hub / "big" / "train-1.parquet").write_bytes(b"PAR1")
    fails(config_for(tmp_path, data=f"hf:{hub}:big"), "could not be read to its end", "Run again")


@pytest.mark.slow
def test_nothing_of_the_hub_is_imported_without_being_asked_for(tmp_path):
    code = f"""if True:
        import sys
        sys.path.insert(0, '.')
        import data
        from record import tracker
        from config import PRESETS, Config
        data.prepare(Config(**{{**PRESETS['tiny'], 'data': {str(write_rows(tmp_path / "rows.jsonl", STORIES))!r}, 'vocab_size': 300,
                               'max_seq_len': 16, 'validation_fraction': 0.2, 'cache_dir': {str(tmp_path / "cache")!r}}}))
        assert not sys.modules.keys() & {{'datasets', 'huggingface_hub', 'pyarrow', 'tensorboard', 'trackio', 'wandb'}}"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(data.__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("data_set", [True, False])
def test_after_max_characters_there_is_nothing_to_continue_with(tmp_path, hub, data_set):
    rows = str(write_rows(tmp_path / "rows.jsonl", STORIES))
    source = open_source(
        config_for(
            tmp_path,
            data=f"hf:{hub}:big" if data_set else rows,
            max_characters=len(STORIES[0]) + 1,
        )
    )
    assert [text for text, _ in source.chunks()] == STORIES[:2]
    assert list(source.chunks(source.position(2))) == []


def test_a_position_inside_a_document_of_a_data_set_is_none(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (50, 50))
    source = open_source(config_for(tmp_path, data=f"hf:{hub}:big"))
    for count, (_, last) in enumerate(source.chunks(), 1):
        assert (source.position(count) is None) is not last
        assert source.position(count - 1) is None


# --- a source of one's own


class Strings:
    """The smallest source: documents that lie in a list. Nothing else in the program knows of it."""

    name = description = "strings"
    scan_to_end = True
    path = None

    def __init__(self, texts: list[str]):
        self.texts = texts
        self.token_shards: list[str] = []
        self.rows = RowCounter()
        self.begun_at: list[int] = []

    def identity(self) -> list:
        return ["strings", len(self.texts)]

    def chunks(self, start: dict | None = None):
        first = start["pieces"] if start else 0
        self.begun_at.append(first)
        for text in self.texts[first:]:
            yield text, True

    def position(self, count: int) -> dict:
        return dict(pieces=count)

    def expected_characters(self, scanned_characters: int, scanned_documents: int) -> int:
        return scanned_characters

    def domain(self) -> str:
        return "strings"


@pytest.fixture
def strings(monkeypatch) -> Strings:
    """A corpus of the stories that open_source gives, whatever --data says."""
    source = Strings(STORIES)
    monkeypatch.setattr(sources, "open_source", lambda config, rules=1: source)
    return source


def test_a_source_of_ones_own_becomes_the_corpus_that_its_files_are(tmp_path, monkeypatch):
    rows = str(write_rows(tmp_path / "rows.jsonl", STORIES))
    files = data.prepare(config_for(tmp_path, data=rows, cache_dir=str(tmp_path / "other")))
    strings = Strings(STORIES)
    monkeypatch.setattr(sources, "open_source", lambda config, rules=1: strings)
    config = config_for(tmp_path, data="anything")
    corpus = data.prepare(config)
    assert corpus.data_hash == files.data_hash and corpus.tokenizer_json == files.tokenizer_json
    assert np.array_equal(corpus.train, files.train)
    assert np.array_equal(corpus.validation, files.validation)

    # The second time the cache is opened by the source's identity, and it is not read.
    strings.begun_at.clear()
    assert np.array_equal(data.prepare(config).train, corpus.train)
    assert strings.begun_at == []
    strings.texts = STORIES[:30]
    assert data.prepare(config).documents == 30


def test_a_build_from_a_source_of_ones_own_continues_at_its_position(
    tmp_path, strings, monkeypatch
):
    monkeypatch.setattr(token_writer, "TOKENIZE_CHARACTERS", 700)
    monkeypatch.setattr(token_writer, "SHARD_CHARACTERS", 3000)
    config = config_for(tmp_path, data="anything")
    write = token_writer.replace_file

    def fail_after_some_work(path, content):
        write(path, content)
        if path.name == "progress.json":
            raise ExperimentError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(token_writer, "replace_file", fail_after_some_work)
        with pytest.raises(ExperimentError, match="stopped"):
            data.prepare(config)
    strings.begun_at.clear()
    corpus = data.prepare(config)
    (begun_at,) = strings.begun_at  # the scan and the tokenizer were kept
    assert begun_at > 0 and corpus.documents == len(STORIES)
    assert corpus.characters == sum(map(len, STORIES))


def test_a_run_trains_on_a_source_of_ones_own_and_is_evaluated_on_it(
    tmp_path, strings, monkeypatch
):
    monkeypatch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)  # slow
    config = config_for(
        tmp_path,
        data="anything",
        max_steps=2,
        eval_steps=1,
        d_model=32,
        n_layers=2,
        n_heads=4,
        d_ff=48,
        num_experts=4,
        sample_tokens=0,
        device="cpu",
        save_dir=str(tmp_path / "run"),
    )
    corpus = data.prepare(config)
    Path(config.save_dir).mkdir()
    trainer = Trainer(config, corpus)
    trainer.run()
    assert trainer.step == 2 and (tmp_path / "run" / "checkpoint_latest.pt").exists()
    held_out = list(evaluate.held_out_texts(config, corpus.data_hash))
    assert {chunk.domain for chunk in held_out} == {"strings"}
    assert 0 < len(held_out) < len(STORIES)
