"""The analysis of what experts do: kinds of tokens, and their mutual information with the expert."""

import numpy as np
import pytest
from tokenizers import pre_tokenizers

import data
from cli import exit_code
from corpus import sources
from corpus.tokenizer import ChunkEncoder, load_tokenizer
from studies import experts as experts_of
from studies.experts import KINDS
from tests.corpus.stories import config_for, unigram
from tests.helpers import tiny_config, tokenizer_json, write_checkpoint
from tools import evaluate


def test_kinds_of_characters():
    def kinds(text, suffix):
        return [
            KINDS[k] if k != experts_of.NONE else ""
            for k in experts_of.character_kinds(text, suffix)
        ]

    assert kinds("if x1:  # so\n", ".py") == ["keyword"] * 2 + [""] + ["identifier"] * 2 + [
        "operator"
    ] + [""] * 2 + ["comment"] * 4 + [""]
    assert set(kinds("#include <math.h>\n", ".h")) <= {"C code", ""}
    assert set(kinds("/* if */", ".h")) <= {"C comment", ""} and set(kinds("if", "")) == {"prose"}


def test_a_token_has_the_kind_of_its_first_character_that_is_no_space():
    text = "  ab cd "
    kinds = np.array([0, 0, 1, 1, 2, 3, 3, 4], np.uint8)
    offsets = np.array([[0, 2], [0, 4], [4, 7], [5, 7], [7, 8]])
    space = KINDS.index("whitespace")
    found = experts_of.token_kinds(offsets, text, kinds)
    assert found.tolist() == [space, 1, 3, 3, space]


def test_the_largest_domains_are_named_and_the_others_are_one():
    """Two files of domain 0, and one of each other; domain n has n more tokens."""
    files = []
    for number in [0, *range(experts_of.DOMAINS + 2)]:
        tokens = np.zeros(number + 5, np.int64)
        files.append(experts_of.FileTokens(tokens, tokens.astype(np.uint8), f"d{number}"))
    numbers, names = experts_of._number_domains(files)
    assert len(names) == experts_of.DOMAINS + 1 and names[0] == "d11" and names[-1] == "others"
    sizes = dict(zip(names, np.bincount(numbers).tolist()))
    assert sizes["d11"] == 16 and sizes["d0"] == 10 and sizes["others"] == 6 + 7


def test_the_tokens_that_distinguish_an_expert():
    """Token 1 goes to expert 1, of ten other tokens half go to each; token 12 is too rare."""
    tokens = np.array([1] * 40 + [*range(2, 12)] * 40 + [12] * 4)
    experts = np.arange(len(tokens))[:, None] // 10 % 2
    experts[tokens == 1] = 1
    experts[tokens == 12] = 0
    tokenizer, _ = load_tokenizer(tokenizer_json())
    first, second = experts_of.top_tokens(experts, tokens, 2, tokenizer)
    text = tokenizer.decode([1], skip_special_tokens=False)
    assert second == [[text, 1.0]]
    assert all(share == 0.5 for _, share in first) and len(first) == 10


def test_information_of_experts_that_read_the_kind():
    """Experts that are the kind have all its bits; with the kinds moved by one token, and with shuffled ones, there are none."""
    kinds = np.random.default_rng(0).integers(0, 4, 20_000).astype(np.uint8)
    chosen = np.stack([kinds, kinds], 1)[None]
    there, moved = (
        experts_of.information(chosen, labels, 4, 4) for labels in (kinds, np.roll(kinds, 1))
    )
    assert (
        there["bits"][0] == pytest.approx(2, abs=0.01)
        and moved["bits"][0] < 0.01 > there["shuffled_most"][0]
    )
    labels = np.where(np.arange(20_000) % 5, kinds, experts_of.NONE).astype(np.uint8)
    counts = experts_of.table(chosen[0], labels, 4, 4)
    assert (counts == 2 * np.diag(np.bincount(kinds[labels != experts_of.NONE]))).all(), (
        "end-of-text is left out"
    )


@pytest.mark.parametrize("rules", [1, 2])
def test_what_was_held_out_is_encoded_as_it_was_for_training(tmp_path, monkeypatch, rules):
    """Also by a tokenizer that puts a space before each text, where a document is held out in part."""
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", (300, 300))
    (tmp_path / "a.py").write_text("".join(f"if x{i}:  # naïve\n" for i in range(400)))
    unigram(pre_tokenizers.Metaspace(prepend_scheme="always")).save(str(tmp_path / "t.json"))
    config = config_for(
        tmp_path,
        data=str(tmp_path / "a.py"),
        tokenizer=str(tmp_path / "t.json"),
        vocab_size=400,
    )
    corpus = data.prepare(config, rules)
    expected = corpus.validation[:].tolist()
    labels = experts_of.label(config, corpus)
    assert labels.tokens.tolist() == expected
    text = corpus.tokenizer.decode(
        labels.tokens[labels.kinds == KINDS.index("comment")].tolist()
    ).replace(" ", "")
    assert text.startswith("#naïve#naïve")

    encode = ChunkEncoder(corpus.tokenizer, rules)
    measured = []
    for _, text, before, last in evaluate.held_out_texts(config, corpus.data_hash, rules):
        measured += encode.ids(text, before, last)
        if last:
            measured.append(corpus.end_of_text)
    assert measured == expected


def test_a_dense_run_is_refused_in_one_line(tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint_step_1.pt", tiny_config(num_experts=0))
    assert exit_code(experts_of.main, [str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the model in ") and "is dense" in error
    assert "--num_experts" in error and error.count("\n") == 1
    assert not (tmp_path / "experts.json").exists()
