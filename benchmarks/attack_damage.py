"""The files of the attack: whole ones of every format, and what damage makes of them.

Everything is drawn from a random.Random that the caller has seeded, and from nothing else.
"""

import gzip
import json
import os
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pyarrow
import pyarrow.parquet

from benchmarks.attack_commands import STEPS, STOPPED_AT, shown, train_words

# ---------------------------------------------------------------- whole files

WORDS = (
    "the",
    "model",
    "routes",
    "every",
    "token",
    "to",
    "two",
    "experts",
    "naïve",
    "漢字",
    "loss",
)


def write_text(folder: Path) -> None:
    """A corpus of some documents of words, always the same."""
    draw = Random(0)
    folder.mkdir()
    for number in range(8):
        lines = [" ".join(draw.choices(WORDS, k=10)) for _ in range(80)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")


def write_formats(folder: Path, tokenizer_json: str) -> None:
    """A whole file of each format that --data and --tokenizer read."""
    draw = Random(0)
    documents = [" ".join(draw.choices(WORDS, k=60)) + "\n" for _ in range(60)]
    lines = "".join(json.dumps(dict(text=text)) + "\n" for text in documents)
    # Any tokens that the vocabulary of the base's tokenizer has.
    tokens = np.array([draw.randrange(260) for _ in range(6000)], "<u2")
    llm_c_header = np.zeros(256, "<i4")
    llm_c_header[:3] = [20240520, 1, len(tokens)]  # magic number, version, number of tokens

    folder.mkdir()
    for suffix in (".txt", ".md", ".py"):
        (folder / f"data{suffix}").write_text("".join(documents))
    (folder / "data.jsonl").write_text(lines)
    (folder / "data.json").write_text(lines)
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "data.txt.gz").write_bytes(gzip.compress("".join(documents).encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.table(dict(text=documents)), folder / "data.parquet")
    (folder / "data.bin").write_bytes(llm_c_header.tobytes() + tokens.tobytes())
    (folder / "plain.bin").write_bytes(tokens.tobytes())  # without a header, as nanoGPT's
    (folder / "tokenizer.json").write_text(tokenizer_json)


# ---------------------------------------------------------------- damage to the bytes of a file


def _random_bytes(draw: Random) -> bytes:
    return draw.randbytes(draw.choice([1, 7, 300, 5000]))


def _cut_off(raw: bytes, draw: Random) -> bytes:
    return raw[: draw.randint(0, len(raw))]


def _flip_bytes(raw: bytes, draw: Random) -> bytes:
    """Other values for some of the bytes."""
    flipped = bytearray(raw)
    for _ in range(draw.choice([1, 3, 100])):
        if flipped:
            flipped[draw.randrange(len(flipped))] = draw.randrange(256)
    return bytes(flipped)


def _insert(raw: bytes, draw: Random) -> bytes:
    """Inserts bytes that do not belong there."""
    # Bytes that are no text, parts of JSON, rows that are wrong, and what is too long or too deep.
    odd = [
        *(b"\0" * 10, b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n\n\n", b"\xe2\x80\xa8", b"\x1a"),
        *(b"{", b"]", b'"', b"\\", b"\nnull\n", b"\n123\n", b'\n{"a": 1}\n', b"\n[]\n"),
        *(b'\n{"text": "\\ud800"}\n', b'\n{"text": 5}\n', b'\n{"text": "x", "text": null}\n'),
        *(b"NaN", b"1e999", b"9" * 5000, b"[" * 100_000, b'\n{"a":' * 3000, _random_bytes(draw)),
    ]
    place = draw.randint(0, len(raw))
    return raw[:place] + draw.choice(odd) + raw[place:]


def _drop_part(raw: bytes, draw: Random) -> bytes:
    first = draw.randint(0, len(raw))
    last = draw.randint(first, len(raw))
    return raw[:first] + raw[last:]


def _other_content(raw: bytes, draw: Random) -> bytes:
    contents = [
        *(b"", b"\n", b" ", b"\0", b"\0" * 100_000, b"[]", b"{}", b"null", b"123", b'"x"', b"{"),
        *(b"[" * 100_000, b"\xef\xbb\xbf", b"\xff" * 1000, b"PK\x03\x04", b"PAR1", b"\x1f\x8b"),
        *(b"x" * 300_000, "漢".encode() * 50_000, b"\n" * 50_000, b"a b " * 30_000),
        _random_bytes(draw),
    ]
    return draw.choice(contents)


def _encode_otherwise(raw: bytes, draw: Random) -> bytes:
    text = raw.decode(errors="replace")
    return text.encode(draw.choice(["utf-16", "utf-8-sig", "utf-32-le", "cp1252"]), "replace")


def _other_lines(raw: bytes, draw: Random) -> bytes:
    """Other ends for all lines, or none."""
    return raw.replace(b"\n", draw.choice([b"", b"\r", b"\r\n", b"\n\r\n", b"\0"]))


def _twice(raw: bytes, draw: Random) -> bytes:
    return raw + raw


def _change_digits(raw: bytes, draw: Random) -> bytes:
    """Other characters for up to five digits, which mostly keeps the form of a file."""
    digits = [place for place, byte in enumerate(raw) if byte in b"0123456789"]
    changed = bytearray(raw)
    for place in draw.sample(digits, min(len(digits), 5)):
        changed[place] = draw.choice(b"0123456789-e.")
    return bytes(changed)


DAMAGES: list[Callable[[bytes, Random], bytes]] = [
    _cut_off,
    _flip_bytes,
    _insert,
    _insert,
    _drop_part,
    _other_content,
    _encode_otherwise,
    _other_lines,
    _twice,
    _change_digits,
]


def damage(path: Path, draw: Random) -> str:
    """Changes the bytes of a file, or puts something else in its place. Returns how, in a word."""
    if draw.random() < 0.25:
        replace = draw.choice(REPLACEMENTS)
        _remove(path)
        replace(path)
        return replace.__name__.strip("_")
    change = draw.choice(DAMAGES)
    changed = change(path.read_bytes(), draw)
    # A new file: the old one may have a second name. checkpoint_latest.pt is such a link.
    _remove(path)
    path.write_bytes(changed)
    return change.__name__.strip("_")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _folder(path: Path) -> None:
    path.mkdir()


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("x")


def _pipe_without_writer(path: Path) -> None:
    os.mkfifo(path)


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("missing")


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _link_to_null(path: Path) -> None:
    path.symlink_to("/dev/null")


def _nothing(path: Path) -> None:
    """The file is missing."""


REPLACEMENTS: list[Callable[[Path], None]] = [
    _folder,
    _full_folder,
    _pipe_without_writer,
    _link_to_nothing,
    _link_to_itself,
    _link_to_null,
    _nothing,
]

# ---------------------------------------------------------------- data, and files beside a run


class Damaged(typing.NamedTuple):
    """A damaged file and a command line that meets it."""

    argv: list[str]
    file: str
    how: str
    must_finish: bool = False  # whether the command must finish the run all the same

    def shown(self) -> str:
        return f"{self.file}: {self.how}; {shown(self.argv)}"


def damaged_data(folder: Path, draw: Random) -> Damaged:
    """Damages a file of data or a tokenizer."""
    source = draw.choice(sorted((folder / "formats").iterdir()))
    data = folder / "data"
    data.mkdir()
    file = data / source.name
    shutil.copy(source, file)
    how = damage(file, draw)
    if file.is_file() and draw.random() < 0.3:
        how += ", " + damage(file, draw)
    return Damaged(_reads_data(file, folder, draw), file.name, how)


def _reads_data(file: Path, folder: Path, draw: Random) -> list[str]:
    """A command line that reads the file, by its name or as one of a folder."""
    if file.name == "tokenizer.json":
        return train_words("new", 2, tokenizer="data/tokenizer.json")
    name = f"data/{file.name}"
    beside = draw.choice(["named", "named", "in a folder", "beside good files"])
    if beside != "named":
        name = "data"
    if beside == "beside good files":
        shutil.copytree(folder / "text", folder / "data", dirs_exist_ok=True)
    if draw.random() < 0.15:
        evaluate = ["tools.evaluate", "--checkpoint", "run/checkpoint_latest.pt"]
        return [*evaluate, "--data", name, "--limit", "400"]
    changes: dict = dict(data=name, max_bad_share=draw.choice([0.001, 1]))
    if file.suffix == ".bin":
        changes["tokenizer"] = "tokenizer.json"
    return train_words("new", 2, **changes)


# Files of a run that hold no tensors.
SMALL_FILES = ("metrics.jsonl", "run.json", "training_results.json", "training_curves.png")
CHECKPOINTS = ("checkpoint_latest.pt", f"checkpoint_step_{STOPPED_AT - 1}.pt")
CACHE_FILES = ("corpus.json", "tokenizer.json", "train.bin", "validation.bin")
UNFINISHED_FILES = ("progress.json", "survey.npz", "pieces.bin", "tokenizer.json", "train.bin")
NO_PROGRESS = '{"tokens": [0, 0], "characters": 0, "position": null}'


def damaged_small_file(folder: Path, draw: Random) -> Damaged:
    """Damages a file of the run, or of its cache.

    Whatever happens to one of them, the run can be resumed: from its latest checkpoint, or from the
    one before where that one is damaged.
    """
    resume = [*train_words("run", STEPS), "--resume", "latest"]
    kind = draw.choice(["beside", "beside", "checkpoint", "cache", "unfinished", "reader"])
    argv = resume
    if kind == "cache":
        file = _cache_folder(folder) / draw.choice(CACHE_FILES)
    elif kind == "unfinished":
        file = _unfinished_cache(folder) / draw.choice(UNFINISHED_FILES)
    elif kind == "reader":
        file = folder / "run" / draw.choice(SMALL_FILES + CHECKPOINTS)
        argv = _reader(draw)
    elif kind == "checkpoint":
        file = folder / "run" / draw.choice(CHECKPOINTS)
    else:
        file = folder / "run" / draw.choice(SMALL_FILES)
    file.touch()  # not every file is there at this point of the run
    how = damage(file, draw)
    return Damaged(argv, str(file.relative_to(folder)), how, must_finish=kind != "reader")


def _reader(draw: Random) -> list[str]:
    """A command that reads a run, or makes another beside it."""
    checkpoint = ["--checkpoint", "run/checkpoint_latest.pt"]
    commands = [
        ["plot", "run"],
        ["plot", "run", "run", "--out", "comparison.png"],
        ["run_experiment", "sample", *checkpoint, "--prompt", "the", "--max_new_tokens", "3"],
        ["tools.evaluate", *checkpoint, "--limit", "400"],
        ["tools.export_hf", *checkpoint, "--out", "new"],
        train_words("run", 2),
        [*train_words("run", 2), "--overwrite"],
        [*train_words("new", STEPS), "--resume", "run/checkpoint_latest.pt"],
    ]
    return draw.choice(commands)


def _cache_folder(folder: Path) -> Path:
    [finished] = (folder / "cache").iterdir()
    return finished


def _unfinished_cache(folder: Path) -> Path:
    """Makes the cache one that a killed build left, before it wrote down any progress."""
    finished = _cache_folder(folder)
    unfinished = finished.rename(finished.with_name(f"{finished.name}.00000000.unfinished"))
    (unfinished / "corpus.json").unlink()
    (unfinished / "progress.json").write_text(NO_PROGRESS)
    return unfinished
