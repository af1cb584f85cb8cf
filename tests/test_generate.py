"""Sampling: the cache changes nothing, draws have their probabilities, transformers agrees.

And the texts come as they are made."""

import io
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import exit_code
from generate import choose, finished_texts, generate, stream, text_chunks
from model import MoETransformer
from record import checkpoint
from run_experiment import main
from tests.helpers import tiny_config, tokenizer_json, write_checkpoint
from tools import export_hf

SHAPES = [
    dict(),
    dict(n_kv_heads=2, moe_every=1),
    dict(n_kv_heads=1, tie_embeddings=True, top_k=1),
    dict(num_experts=0),
    dict(top_k=4, moe_every=1),
]


def build(**changes) -> MoETransformer:
    model = MoETransformer(tiny_config(init_std=0.2, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5)
    return model


@torch.no_grad()
def without_cache(model, prompt, n_tokens, seed=0, **choices) -> list[int]:
    """What `stream` promises, token by token from whole forward passes over the last max_seq_len tokens."""
    tokens, generator = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(n_tokens):
        logits = model(torch.tensor([tokens[-model.config.max_seq_len :]]))[:, -1]
        chosen = (
            choose(logits, torch.rand(1, generator=generator), **choices)
            if choices
            else logits.argmax(dim=-1)
        )
        tokens.append(chosen.item())
    return tokens[len(prompt) :]


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize(
    "length, n_tokens",
    # Each ends four tokens past max_seq_len = 16, where the window is read anew for every token.
    [pytest.param(1, 19, marks=pytest.mark.slow), (3, 17), (16, 4), (40, 4)],
)
def test_tokens_are_those_without_a_cache_also_past_max_seq_len(changes, length, n_tokens):
    model = build(**changes)
    prompt = torch.randint(264, (length,)).tolist()
    greedy = generate(model, prompt, n_tokens, temperature=0)
    assert greedy == [without_cache(model, prompt, n_tokens)]
    choices = dict(temperature=1.3, top_k=40, top_p=0.9)
    drawn = generate(model, prompt, n_tokens, seed=3, **choices)
    assert drawn == [without_cache(model, prompt, n_tokens, seed=3, **choices)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("masters", ["split", "fp32"])
def test_in_16_bits_the_cache_is_as_good_as_rounding(precision, masters):
    """Logits after each token of a text, read one by one, against one forward pass over all."""
    exact = build()
    model = MoETransformer(tiny_config(precision=precision, master_weights=masters)).eval()
    with torch.no_grad():
        for p, q in zip(model.parameters(), exact.parameters()):
            p.copy_(q)
    text = torch.randint(264, (16,)).tolist()
    seen = []

    def forced(logits, *_):
        seen.append(logits)
        return torch.tensor(text[3 + len(seen) : 4 + len(seen)] or [0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("generate.choose", forced)
        generate(model, text[:4], 13)
    with torch.no_grad():
        expected = model(torch.tensor([text]))[0, 3:]
    found = torch.cat(seen)
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < {"bf16": 0.03, "fp16": 0.004}[precision]


def test_each_token_is_read_once_and_the_prompt_once_for_all_texts():
    model, read = build(), []
    model.embedding.register_forward_hook(
        lambda module, args, out: read.append(tuple(args[0].shape))
    )
    generate(model, [1, 2, 3, 4], 12, n=5)
    assert read == [(1, 4)] + [(5, 1)] * 11
    read.clear()
    generate(model, [1, 2, 3, 4], 16, n=2)
    assert read[12:] == [(2, 1), (2, 16), (2, 16), (2, 16)], (
        "past max_seq_len the window is read anew"
    )


def test_text_i_of_n_is_the_text_of_seed_plus_i():
    model = build(n_kv_heads=2)
    texts = generate(model, [5, 6], 12, n=4, seed=10, top_k=50, top_p=0.95)
    assert texts == [
        generate(model, [5, 6], 12, seed=10 + i, top_k=50, top_p=0.95)[0] for i in range(4)
    ]
    assert len(set(map(tuple, texts))) == 4


def test_a_text_ends_with_end_of_text_and_the_others_go_on():
    model = build()
    whole = generate(model, [5, 6], 12, n=4)
    stop = whole[1][4]
    assert whole[1].index(stop) == 4
    ended = generate(model, [5, 6], 12, n=4, stop=stop)
    assert (
        ended == [text[: text.index(stop) + 1] if stop in text else text for text in whole]
        and ended[1] == whole[1][:5]
    )
    steps = list(stream(model, [5, 6], 12, n=4, stop=stop))
    assert [step[1] for step in steps] == whole[1][:5] + [None] * (len(steps) - 5)
    [[first]] = generate(model, [5, 6], 1, temperature=0)
    steps_of_equal_texts = list(stream(model, [5, 6], 12, temperature=0, n=3, stop=first))
    assert len(steps_of_equal_texts) == 1, "all have ended"
    found = list(finished_texts(iter(steps), stop))
    assert found[0] == (1, ended[1]) and sorted(found) == list(enumerate(ended)), (
        "each when it has ended"
    )


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, 0, 1.0),
        (0.7, 0, 1.0),
        (1.0, 5, 1.0),
        (2.0, 0, 0.6),
        (1.0, 6, 0.8),
        (1.0, 0, 1e-6),
        (1.0, 1000, 1.0),
    ],
)
def test_tokens_are_drawn_with_their_probability(temperature, top_k, top_p):
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, -0.2, 0.9, -3.0, 1.7])
    draws = (torch.arange(20_000) + 0.5) / 20_000
    chosen = choose(logits.expand(len(draws), -1), draws, temperature, top_k, top_p)
    probs = (logits.double() / temperature).softmax(0)
    if top_k:
        probs[probs < probs.sort(descending=True).values[:top_k][-1]] = 0
        probs /= probs.sum()
    order = probs.argsort(descending=True)
    kept, held = [], 0.0
    for token in order.tolist():  # the fewest likeliest that hold top_p
        if held >= top_p:
            break
        kept.append(token)
        held += probs[token].item()
    expected = torch.zeros(8, dtype=torch.double)
    expected[kept] = probs[kept] / probs[kept].sum()
    assert (torch.bincount(chosen, minlength=8) / len(draws) - expected).abs().max() < 2e-4


def test_the_ends_of_the_draws():
    logits = torch.tensor([[0.0, -200.0, 1.0, -200.0]])
    for draw, expected in ((0.0, 2), (1 - 2**-24, 0)):
        assert choose(logits, torch.tensor([draw]), 1.0, 0, 1.0).item() == expected, (
            "never one without probability"
        )
    assert choose(logits, torch.tensor([1 - 2**-24]), 1.0, 1, 1.0).item() == 2
    for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.5)):
        assert 0 <= choose(logits * torch.nan, torch.tensor([0.5]), 1.0, top_k, top_p).item() < 4, (
            "of a model that has diverged"
        )


# ---------------------------------------------------------------- transformers


@pytest.mark.slow
@pytest.mark.parametrize("changes", SHAPES[:4], ids=str)
def test_greedy_text_is_that_of_transformers_generate(tmp_path, changes):
    write_checkpoint(
        tmp_path / "checkpoint.pt", tiny_config(init_std=0.2, max_seq_len=64, **changes)
    )
    saved, exported = tmp_path / "checkpoint.pt", tmp_path / "hf"
    options = ["--checkpoint", str(saved), "--out", str(exported), "--dtype", "fp32"]
    assert exit_code(export_hf.main, options) == 0
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours, _ = checkpoint.load_model(saved)
    lengths = []
    for text in ("The tea", "In winter 漢字 are", "7"):
        prompt = tokenizer(text)["input_ids"]
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[
                0, len(prompt) :
            ].tolist()
        assert generate(ours, prompt, 40, temperature=0, stop=tokenizer.eos_token_id) == [expected]
        lengths.append(len(expected))
    assert max(lengths) == 40


# ---------------------------------------------------------------- text as it comes


def test_text_comes_as_soon_as_its_characters_are_whole():
    tokenizer = Tokenizer.from_str(tokenizer_json())
    ids = tokenizer.encode("a 漢字 naïve é").ids
    assert len(ids) > len("a 漢字 naïve é") + 4, "characters of several tokens"
    given = []

    def tokens():
        for token in ids:
            given.append(token)
            yield token

    pieces = []
    for piece in text_chunks(tokens(), tokenizer):
        pieces.append(piece)
        assert "".join(pieces) == tokenizer.decode(given) or piece == ""
    assert (
        "".join(pieces) == "a 漢字 naïve é"
        and len(pieces) > 8
        and not any("\ufffd" in piece for piece in pieces)
    )
    assert "".join(text_chunks(iter(ids[:4]), tokenizer)) == tokenizer.decode(ids[:4]), (
        "a character that is never completed is shown too"
    )
    assert "".join(text_chunks(iter([]), tokenizer)) == ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    # The seed that every test begins with is set after this, whatever ran before.
    torch.manual_seed(0)
    write_checkpoint(path, tiny_config(init_std=0.2, precision="bf16", max_seq_len=32))
    return path


def sample(checkpoint, prompt, *options) -> int:
    """Exit code of the command `sample`."""
    return main(["sample", "--checkpoint", str(checkpoint), "--prompt", prompt, *options])


@pytest.mark.slow
def test_the_command_writes_as_it_goes(saved, capsys, monkeypatch):
    shown = []

    def watched(*args, **kwargs):
        for step in stream(*args, **kwargs):
            shown.append(capsys.readouterr().out)
            yield step

    monkeypatch.setattr("generate.stream", watched)
    assert sample(saved, "The tea", "--max_new_tokens", "40", "--temperature", "0") == 0
    rest = capsys.readouterr().out
    assert shown[0] == "The tea" and sum(map(bool, shown)) > 10 and rest.endswith("\n")
    whole = "".join(shown) + rest
    monkeypatch.undo()
    assert sample(saved, "The tea", "--max_new_tokens", "40", "--temperature", "0") == 0
    assert capsys.readouterr().out == whole


@pytest.mark.slow
def test_the_command_writes_several_texts(saved, capsys):
    def text(*options):
        always = ["--max_new_tokens", "12", "--top_p", "0.9"]
        assert sample(saved, "The tea", *always, *options) == 0
        return capsys.readouterr().out

    three = text("--n", "3", "--seed", "4")
    for i in range(3):
        assert f"--- {i + 1} of 3\n{text('--seed', str(4 + i))}" in three
    assert three.count("The tea") == 3
    assert text("--top_p", "0.000001") == text("--temperature", "0") != text("--top_p", "1")
    assert text("--precision", "bf16").startswith("The tea")


def test_a_prompt_is_the_beginning_of_a_document(tmp_path, monkeypatch):
    """The tokenizer drops spaces at the end of a text, but a document does not end with a prompt."""
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.normalizer = normalizers.Strip()
    as_of_a_run = dict(data_hash="d" * 32, tokenizer_hash="t" * 64)
    prompts = {}
    for rules in (1, 2):
        write_checkpoint(
            tmp_path / "checkpoint.pt",
            tiny_config(),
            tokenizer_json=tokenizer.to_str(),
            data=as_of_a_run | dict(rules=rules),
        )
        monkeypatch.setattr(
            "generate.stream", lambda model, prompt, *_: prompts.update({rules: prompt}) or []
        )
        assert sample(tmp_path / "checkpoint.pt", "  The tea ") == 0
    decoded = {rules: tokenizer.decode(prompt) for rules, prompt in prompts.items()}
    assert decoded == {1: "The tea", 2: "The tea "}


def test_a_tokenizer_that_cannot_encode_the_prompt(tmp_path, capsys):
    words = Tokenizer(models.WordLevel({"The": 0, "<|endoftext|>": 1}))
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(), tokenizer_json=words.to_str())
    assert sample(tmp_path / "checkpoint.pt", "cat") == 1
    assert "error: the tokenizer cannot encode this text" in capsys.readouterr().err


def test_a_terminal_without_these_characters(saved, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert sample(saved, "é", "--max_new_tokens", "3") == 0
    assert shown.getvalue().startswith(b"\\xe9")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--n", "0"], "--n must lie"),
        (["--top_p", "0"], "--top_p must lie"),
        (["--top_p", "1.1"], "--top_p must lie"),
        (["--top_p", "nan"], "--top_p must lie"),
        (["--precision", "int8"], "int8"),
        (["--prompt", "caf\udce9"], "UTF-8"),
    ],
)
def test_wrong_usage(saved, capsys, options, words):
    assert sample(saved, "a", *options) == 2
    assert words in capsys.readouterr().err
