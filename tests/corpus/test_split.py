"""The rules of the split, version 2: whole documents or one tail, a share as wanted, honest warnings."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import Config, ExperimentError
from corpus import near_duplicates, sources, split, text_scan
from corpus.split import decide, document_keys
from corpus.text_scan import CHUNK
from tests.corpus.stories import STORIES, config_for, same, story, text_of
from tests.corpus.test_sources import hub, write_rows  # noqa: F401 (hub is a fixture)


def chunks_of(documents: list[list[tuple[int, int]]]) -> np.ndarray:
    """CHUNK records of documents, each a list of (hash, length) of its chunks."""
    rows = []
    for document in documents:
        for number, (digest, length) in enumerate(document, 1):
            rows.append((digest, length, number == len(document)))
    return np.array(rows, CHUNK)


def decided(chunks: np.ndarray, fraction: float, whole: bool = True) -> split.Split:
    return decide(chunks, document_keys(chunks), whole, fraction, rules=2)


def share_of(chunks: np.ndarray, held_out: np.ndarray) -> float:
    return chunks["length"][held_out].sum() / chunks["length"].sum()


hashes = st.integers(0, 2**64 - 1)
documents_of_chunks = st.lists(
    st.lists(st.tuples(hashes, st.integers(1, 100)), min_size=1, max_size=4),
    min_size=1,
    max_size=40,
)


@given(documents_of_chunks, st.floats(1e-4, 0.5))
@settings(max_examples=100, deadline=None)
def test_documents_stay_whole_or_a_tail_is_held_out(documents, fraction):
    chunks = chunks_of(documents)
    held_out = decided(chunks, fraction).held_out
    keys = document_keys(chunks)
    sides = [set(keys[held_out].tolist()), set(keys[~held_out].tolist())]
    assert sides[1], "nothing is left to train on"
    assert sides[0] or len(chunks) == 1
    is_tail = not np.any(np.diff(held_out.astype(int)) < 0) and held_out[-1]
    assert not sides[0] & sides[1] or is_tail
    if sides[0] and not is_tail:
        assert fraction / 2 <= share_of(chunks, held_out) <= 1.5 * fraction + 1e-9


def test_the_share_is_as_wanted_whatever_the_documents_are():
    rng = np.random.default_rng(0)
    many = [[(int(rng.integers(2**63)), int(rng.integers(10, 60)))] for _ in range(3000)]
    giant = [[(i, 4000) for i in range(20, 60)]]
    repeated = 1000 * [[(5, 50)]]
    equal = [[(int(rng.integers(2**63)), 100)] for _ in range(100)]
    for documents in (many, many + giant, giant + many, many + repeated, equal, giant):
        chunks = chunks_of(documents)
        for fraction in (0.01, 0.03, 0.3):
            held_out = decided(chunks, fraction).held_out
            share = share_of(chunks, held_out)
            assert fraction / 2 <= share <= 2.5 * fraction, (len(documents), fraction, share)


def test_what_would_take_more_than_its_share_is_trained_on():
    """The lowest keys are a giant document and one that is repeated."""
    others = [[(1000 + i, 10)] for i in range(200)]
    chunks = chunks_of([[(1, 800), (900, 800)], *[[(2, 10)] for _ in range(100)], *others])
    held_out = decided(chunks, 0.01).held_out
    assert not held_out[:102].any()
    assert chunks["hash"][held_out].tolist() == [1000, 1001, 1002, 1003, 1004]


def test_one_document_gives_one_contiguous_tail():
    chunks = chunks_of([[(7 * i % 100, 10) for i in range(100)]])
    assert np.flatnonzero(decided(chunks, 0.05).held_out).tolist() == [95, 96, 97, 98, 99]
    assert not decided(chunks_of([[(5, 10)]]), 0.05).held_out.any()


def test_a_group_stays_on_one_side():
    chunks = chunks_of([[(i, 10)] for i in range(100)])
    keys = np.repeat(np.arange(25, dtype=np.uint64), 4)
    held_out = decide(chunks, keys, True, 0.1, rules=2).held_out
    assert held_out.reshape(25, 4).all(1).sum() == held_out.reshape(25, 4).any(1).sum() == 2


# --- a text of which only the beginning was scanned


@given(documents_of_chunks, documents_of_chunks, st.floats(0.05, 0.5), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_what_follows_the_beginning_is_split_by_the_same_keys(before, after, fraction, at_once):
    chunks = chunks_of(before + after)
    beginning = chunks[: sum(map(len, before))]
    found = decided(beginning, fraction, whole=False)
    keys = document_keys(chunks)
    expected = [found.holds_out(int(key)) for key in keys]
    usual = split.CHUNKS_AT_ONCE
    split.CHUNKS_AT_ONCE = at_once
    try:
        blocks = list(found.blocks(chunks))
    finally:
        split.CHUNKS_AT_ONCE = usual
    assert np.concatenate([held_out for _, held_out in blocks]).tolist() == expected
    assert np.array_equal(np.concatenate([block for block, _ in blocks]), chunks)


def test_of_a_long_text_the_fraction_of_the_hashes_is_held_out():
    rng = np.random.default_rng(0)
    documents = [[(int(key), 50)] for key in rng.integers(0, 2**64, 10_000, dtype=np.uint64)]
    repeated = [[(1, 50)]] * 200  # 2% of the beginning
    chunks = chunks_of(documents[:9_000] + repeated)
    found = decided(chunks, 0.01, whole=False)
    assert found.passed_over == {1}
    later = chunks_of(repeated + documents)
    held_out = np.concatenate([part for _, part in found.blocks(np.concatenate([chunks, later]))])
    assert share_of(later, held_out[len(chunks) :]) == pytest.approx(0.01, rel=0.2)
    assert not held_out[9_000 : len(chunks) + 200].any()


# --- corpora


def sides_of(corpus: data.Corpus) -> list[list[str]]:
    """The documents of training and of validation. Each ends with end-of-text."""
    return [
        text_of(corpus, tokens[:]).split("<|endoftext|>")
        for tokens in (corpus.train, corpus.validation)
    ]


def long_documents(tmp_path, monkeypatch) -> tuple[str, list[str]]:
    """A file of 60 documents of about 10 chunks each."""
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (300, 300))
    documents = ["".join(story(10 * i + k) for k in range(5)) for i in range(60)]
    return str(write_rows(tmp_path / "rows.jsonl", documents)), documents


def test_chunks_of_a_document_stay_together_and_end_of_text_follows_the_last(tmp_path, monkeypatch):
    path, documents = long_documents(tmp_path, monkeypatch)
    config = config_for(tmp_path, data=path, validation_fraction=0.1)
    corpus = data.prepare(config, rules=2)
    assert corpus.rules == 2 and corpus.documents > 5 * len(documents)
    sides = sides_of(corpus)
    assert sides[0].pop() == sides[1].pop() == ""
    assert len(sides[1]) == 6
    expected = iter(documents)
    assert sides[0] == [text for text in documents if text in sides[0]]
    assert sorted(sides[0] + sides[1]) == sorted(expected)
    first = data.prepare(config, rules=1)
    assert len(sides_of(first)[1]) > 30, "version 1 splits chunk by chunk"


def test_one_file_is_cut_once_and_has_no_end_of_text_inside(tmp_path, capsys):
    text = "".join(story(i) for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    config = config_for(tmp_path, data=str(tmp_path / "a.txt"), validation_fraction=0.05)
    corpus = data.prepare(config, rules=2)
    training, validation = (text_of(corpus, side) for side in (corpus.train, corpus.validation))
    assert training + validation == text + "<|endoftext|>"
    assert 0.04 < len(validation) / len(text) < 0.06
    assert "warning" not in capsys.readouterr().err


def test_versions_have_caches_of_their_own(tmp_path, folder, capsys):
    config = config_for(tmp_path)
    first, second = (data.prepare(config, rules) for rules in (1, 2))
    assert first.rules == 1 and second.rules == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
    capsys.readouterr()
    assert same(data.prepare(config, 1), first) and same(data.prepare(config, 2), second)
    assert capsys.readouterr().out == "", "both are opened, not built"
    # The same text from another place is linked within a version.
    folder.rename(tmp_path / "moved")
    moved = config_for(tmp_path, data=str(tmp_path / "moved"))
    assert same(data.prepare(moved, 2), second)
    assert "was tokenized before" in capsys.readouterr().out


def test_a_cache_of_before_the_versions_is_opened_as_version_1(tmp_path, folder):
    config = config_for(tmp_path)
    first = data.prepare(config, 1)
    (facts_file,) = (tmp_path / "cache").glob("*/corpus.json")
    facts = json.loads(facts_file.read_text())
    for key in ("rules", "held_out_characters", "repeated_characters"):
        del facts[key]
    facts_file.write_text(json.dumps(facts))
    assert data.prepare(config, 1).rules == 1
    assert same(data.prepare(config, 1), first)


def test_a_version_that_this_program_does_not_know_is_refused(tmp_path, folder):
    with pytest.raises(ExperimentError, match="version 3 of the rules.*knows versions 1 and 2"):
        data.prepare(config_for(tmp_path), rules=3)


@pytest.mark.slow
def test_one_giant_line_or_a_repeated_document_does_not_take_the_held_out_side(tmp_path, capsys):
    for name, extra in (("giant", ["a" * 400_000]), ("repeated", 1000 * [story(99)])):
        rows = write_rows(tmp_path / f"{name}.jsonl", [story(i) for i in range(400)] + extra)
        config = config_for(tmp_path, data=str(rows), validation_fraction=0.02)
        corpus = data.prepare(config, rules=2)
        share = corpus.held_out_characters / corpus.characters
        assert 0.01 <= share <= 0.04, (name, share)
        assert corpus.repeated_characters == 0
        # The giant line has few tokens, so that the share of the tokens is another one.
        err = capsys.readouterr().err
        assert ("of the tokens are held out" in err) == (name == "giant")
        assert "% of the text" not in err
        validation = sum(len(text) for text in sides_of(corpus)[1])
        assert validation == corpus.held_out_characters, "what is counted is what is held out"


def test_held_out_text_that_is_trained_on_too_is_warned_of_at_every_start(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", 300 * [story(1)])
    config = config_for(tmp_path, data=str(rows))
    for _ in range(2):
        corpus = data.prepare(config, rules=2)
        assert corpus.repeated_characters == corpus.held_out_characters > 0
        assert "100.0% of the text that is held out" in capsys.readouterr().err


def test_a_share_far_from_the_fraction_is_warned_of_or_refused(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [story(i) for i in range(5)])
    config = config_for(tmp_path, data=str(rows), validation_fraction=0.01)
    data.prepare(config, rules=2)
    err = capsys.readouterr().err
    assert "% of the text is held out" in err and "not 1.00% (validation_fraction)" in err
    rows = write_rows(tmp_path / "two.jsonl", [story(1, 30), story(2, 300)])
    config = config_for(tmp_path, data=str(rows), validation_fraction=0.01)
    with pytest.raises(ExperimentError, match="held out.*validation_fraction.*Give more text"):
        data.prepare(config, rules=2)


def test_a_stream_is_split_by_document_beyond_its_beginning(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(text_scan, "TOKENIZER_SAMPLE", sum(map(len, STORIES[:20])))
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (100, 100))
    config = config_for(tmp_path, data=f"hf:{hub}:big", validation_fraction=0.3)
    corpus = data.prepare(config, rules=2)
    sides = sides_of(corpus)
    assert sides[0].pop() == sides[1].pop() == ""
    assert sorted(sides[0] + sides[1]) == sorted(STORIES)
    # What evaluation finds is what was held out.
    source = sources.open_source(config, 2)
    found = text_scan.read_text(source, to_end=True)
    held_out = text_scan.held_out_chunks(source, found, 0.3, 2)
    texts = [text for (text, _), held in zip(source.chunks(), held_out) if held]
    assert "".join(texts) == "".join(sides[1])


# --- built-in corpora


def write_packages(root: Path) -> None:
    """Packages of four modules each; `vendoring` holds copies of `p3`, one of them changed."""
    for number in range(30):
        for module in range(4):
            path = root / f"p{number}" / f"m{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(story(1000 * number + module, 200))
    for module in range(4):
        text = (root / "p3" / f"m{module}.py").read_text()
        copy = root / "vendoring" / "_vendor" / "p3" / f"m{module}.py"
        copy.parent.mkdir(parents=True, exist_ok=True)
        # One line of 20 differs in two files, half of the lines in the others.
        changed = text.splitlines(True)
        for line in range(1 if module < 2 else 10):
            changed[line] = f"changed {line}\n"
        copy.write_text("".join(changed))
    (root / "p4-1.0.dist-info").mkdir()
    (root / "p4-1.0.dist-info" / "METADATA.txt").write_text(story(9999))


def test_packages_stay_together_and_near_duplicates_are_dropped(tmp_path, monkeypatch, capsys):
    root = tmp_path / "site"
    write_packages(root)
    files = sources.walk(str(root), (".py", ".txt"))
    monkeypatch.setattr(sources, "_built_in_files", lambda name: files)
    monkeypatch.setattr(sources, "_package_folders", lambda: [str(root)])
    config = config_for(tmp_path, data="installed", validation_fraction=0.1)
    corpus = data.prepare(config, rules=2)
    assert "without 2 near duplicates (1.5% of the text)" in capsys.readouterr().out
    assert len(files) - 2 == corpus.documents

    source = sources.open_source(config, 2)
    found = text_scan.read_text(source, to_end=True)
    held_out = text_scan.held_out_chunks(source, found, 0.1, 2)
    sides: tuple[set, set] = (set(), set())
    for _, is_held_out in zip(source.chunks(), held_out):
        sides[int(is_held_out)].add(source.group())
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"p{number}" for number in range(30)}
    assert len(sides[1]) == 3

    # Without datasketch the near duplicates stay: another corpus, and a warning.
    with monkeypatch.context() as patch:
        patch.setattr(near_duplicates, "installed", lambda: False)
        with_all = data.prepare(config, rules=2)
    assert "near duplicates stay" in capsys.readouterr().err
    assert with_all.documents == len(files)
    assert with_all.data_hash != corpus.data_hash
    assert data.prepare(config, rules=2).documents == corpus.documents

    # As files of a user, the same text is split by document and keeps its near duplicates.
    given = data.prepare(config_for(tmp_path, data=str(root), validation_fraction=0.1), rules=2)
    assert given.documents == len(files)


def test_package_of_a_path():
    roots = ["/lib/python3.12/site-packages", "/lib/python3.12"]
    for path, package in (
        ("/lib/python3.12/heapq.py", "heapq"),
        ("/lib/python3.12/asyncio/events.py", "asyncio"),
        ("/lib/python3.12/site-packages/numpy/a/b.py", "numpy"),
        ("/lib/python3.12/site-packages/numpy-2.4.6.dist-info/licenses/LICENSE.txt", "numpy"),
        ("/lib/python3.12/site-packages/pip/_vendor/rich/box.py", "rich"),
        ("/lib/python3.12/site-packages/setuptools/_vendor/six.py", "six"),
    ):
        assert sources.package_of(path, roots) == package


@pytest.mark.slow
def test_the_python_corpus_is_split_by_package_without_near_duplicates():
    config = Config(data="python")
    source = sources.open_source(config, 2)
    found = text_scan.read_text(source, to_end=True)
    held_out = text_scan.held_out_chunks(source, found, 0.01, 2)
    assert found.grouped
    share = found.lengths[held_out].sum() / found.lengths.sum()
    assert 0.005 <= share <= 0.015
    assert "near duplicates" in source.description
