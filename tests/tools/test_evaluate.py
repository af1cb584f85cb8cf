"""The evaluation: every token once, losses that can be had another way, domains, held-out text, lm-evaluation-harness."""

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models

import run_experiment
from cli import exit_code
from config import PRESETS, Config
from corpus import sources, split, text_scan
from corpus.tokenizer import load_tokenizer
from record import checkpoint
from tests.helpers import TEXT, tiny_config, tokenizer_json, write_checkpoint
from tests.small_model import SMALL_MODEL
from tools import evaluate, export_hf


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two folders of text and two files beside them."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    draw = random.Random(0)
    words = TEXT.splitlines(True)[0].split()
    for name, n in (
        ("wiki/a.txt", 90),
        ("wiki/deep/b.md", 60),
        ("wiki/c.txt", 2),
        ("code/d.py", 50),
        ("e.md", 40),
        ("f.jsonl", 30),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [" ".join(draw.choices(words, k=8)) for _ in range(n)]
        (folder / name).write_text(
            "\n".join(
                json.dumps(dict(text=line, body="x" * 5)) if name.endswith("jsonl") else line
                for line in lines
            )
        )
    return folder


@pytest.fixture
def measure(tmp_path, capsys):
    """measure(*options) is (exit code, the JSON object or the text, stderr) for tmp_path/checkpoint.pt."""

    def call(*options):
        capsys.readouterr()
        code = exit_code(
            evaluate.main, ["--checkpoint", str(tmp_path / "checkpoint.pt"), *map(str, options)]
        )
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in options and code == 0 else out, err

    return call


def documents(folder) -> dict[str, list[str]]:
    """The texts of each domain, in reading order."""

    def lines(path):
        return [json.loads(line)["text"] for line in path.read_text().splitlines()]

    return {
        "code": [(folder / "code/d.py").read_text()],
        ".md": [(folder / "e.md").read_text()],
        ".jsonl": lines(folder / "f.jsonl"),
        "wiki": [
            (folder / name).read_text() for name in ("wiki/a.txt", "wiki/c.txt", "wiki/deep/b.md")
        ],
    }


# ---------------------------------------------------------------- figures


@pytest.mark.slow
def test_figures_are_those_of_plain_forward_passes(measure, corpus, tmp_path):
    """Each domain's tokens in a row after an end-of-text, in windows of max_seq_len; the last one is shorter."""
    write_checkpoint(
        tmp_path / "checkpoint.pt", tiny_config(init_std=0.2, precision="fp16", batch_size=3)
    )
    code, found, err = measure("--data", corpus, "--json")
    assert code == 0, err
    model, _ = checkpoint.load_model(tmp_path / "checkpoint.pt")
    tokenizer, end = load_tokenizer(tokenizer_json())
    assert found["domains"].keys() == {"wiki", "code", ".md", ".jsonl"}
    total = dict(tokens=0, bytes=0, loss=0.0)
    for domain, texts in documents(corpus).items():
        ids = [end]
        for text in texts:
            ids += [*tokenizer.encode(text).ids, end]
        losses, n_right = losses_in_windows(model, ids)
        targets = torch.tensor(ids[1:])
        n_bytes = sum(len(text.encode()) for text in texts)
        expected = dict(
            tokens=len(targets),
            bytes=n_bytes,
            loss=losses.mean().item(),
            perplexity=losses.mean().exp().item(),
            bits_per_byte=losses[targets != end].sum().item() / math.log(2) / n_bytes,
            accuracy=n_right / len(targets),
        )
        assert found["domains"][domain] == pytest.approx(expected, rel=1e-5), domain
        total["tokens"] += len(targets)
        total["bytes"] += n_bytes
        total["loss"] += losses.sum().item()
    assert found["tokens"] == total["tokens"]
    assert found["bytes"] == total["bytes"]
    assert found["loss"] == pytest.approx(total["loss"] / total["tokens"], rel=1e-5)
    assert found["step"] == 7 and found["held_out"] is False


@torch.no_grad()
def losses_in_windows(model, ids: list[int], length: int = 16) -> tuple[torch.Tensor, int]:
    """(the loss of each of ids[1:], how many of them the model finds likeliest)."""
    windows = [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
    whole = [window for window in windows if len(window) == length + 1]
    losses = []
    n_right = 0
    for some in (whole, windows[len(whole) :]):
        if some:
            tokens = torch.tensor(some)
            logits = model(tokens[:, :-1]).double().flatten(0, 1)
            targets = tokens[:, 1:].flatten()
            losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            n_right += (logits.argmax(-1) == targets).sum().item()
    return torch.cat(losses), n_right


@pytest.mark.slow
def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_each_token(
    measure, corpus, tmp_path
):
    state = write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(batch_size=40))
    checkpoint.save(
        tmp_path / "checkpoint.pt",
        state | dict(model=state["model"] | {"head.weight": torch.zeros(264, 32)}),
    )
    _, found, _ = measure("--data", corpus, "--json")
    texts = [text for texts in documents(corpus).values() for text in texts]
    assert found["loss"] == pytest.approx(math.log(264)) and found["perplexity"] == pytest.approx(
        264
    )
    assert found["bits_per_byte"] == pytest.approx(
        (found["tokens"] - len(texts)) * math.log2(264) / sum(len(t.encode()) for t in texts)
    )


@pytest.mark.slow
def test_the_table(measure, corpus, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(batch_size=40))
    code, out, _ = measure("--data", corpus)
    lines = out.splitlines()
    assert (
        code == 0
        and "step 7" in lines[0]
        and "held out" not in lines[0]
        and lines[1].split() == ["domain", "tokens", "loss", "perplexity", "bits/byte", "accuracy"]
    )
    assert [line.split()[0] for line in lines[2:]] == ["wiki", "code", ".md", ".jsonl", "all"], (
        "the largest first"
    )
    monkeypatch.setattr(evaluate, "SHOWN", 2)
    short = measure("--data", corpus)[1].splitlines()
    assert [line.split()[0] for line in short[2:]] == ["wiki", "code", "(2", "all"] and short[
        -1
    ] == lines[-1]
    _, found, _ = measure("--data", corpus, "--json")
    others = found["domains"][".md"]["tokens"] + found["domains"][".jsonl"]["tokens"]
    assert f"(2 others) {others:,}" in " ".join(short[4].split())


@pytest.mark.slow
def test_a_limit_ends_each_domain(measure, corpus, tmp_path):
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(batch_size=40))
    _, whole, _ = measure("--data", corpus, "--json")
    _, some, _ = measure("--data", corpus, "--json", "--limit", 200)
    assert some["domains"].keys() == whole["domains"].keys()
    assert 200 <= some["domains"][".jsonl"]["tokens"] < 300 < whole["domains"][".jsonl"]["tokens"]
    assert some["domains"][".jsonl"]["bytes"] < whole["domains"][".jsonl"]["bytes"]


def test_another_field_of_the_rows(measure, corpus, tmp_path):
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(batch_size=40))
    _, found, _ = measure("--data", corpus / "f.jsonl", "--text_field", "body", "--json")
    assert found["bytes"] == 5 * 30 and list(found["domains"]) == [".jsonl"]


def test_text_is_read_to_its_end_though_the_run_read_less_of_its_own(measure, corpus, tmp_path):
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(batch_size=40, max_characters=1))
    _, found, _ = measure("--data", corpus, "--json")
    assert found["bytes"] == sum(
        len(text.encode()) for texts in documents(corpus).values() for text in texts
    )


# ---------------------------------------------------------------- held-out text


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """The folder of a run of one step on a copy of the corpus, which lies beside it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, folder / "text")
    options = dict(
        SMALL_MODEL,
        preset="tiny",
        max_steps=1,
        eval_steps=10_000,
        sample_tokens=0,
        device="cpu",
        validation_fraction=0.3,
        data=folder / "text",
        cache_dir=folder / "cache",
        save_dir=folder / "run",
    )
    words = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)
        assert run_experiment.main(words) == 0
    return folder / "run"


@pytest.fixture
def checkpoint_of_run(run, tmp_path):
    shutil.copy(run / "checkpoint_latest.pt", tmp_path / "checkpoint.pt")


@pytest.mark.slow
def test_without_data_the_text_is_what_the_run_held_out(measure, run, checkpoint_of_run):
    code, found, err = measure("--json")
    assert code == 0, err
    assert found["held_out"]
    results = json.loads((run / "training_results.json").read_text())
    assert found["tokens"] == results["data"]["validation_tokens"], "each of the validation shard"
    # In other windows, so nearly the same.
    assert found["loss"] == pytest.approx(results["final_metrics"]["val_loss"], rel=0.03)
    assert "what its run held out of" in measure()[1]
    assert measure("--json", "--text_field", "text")[1] == found, "a field is no other text"

    text = run.parent / "text"
    _, whole, note = measure("--json", "--data", text)
    for name, domain in found["domains"].items():
        assert domain["bytes"] < whole["domains"][name]["bytes"]
    assert "the run was trained on" in note
    assert "trained" not in err
    assert "trained" not in measure("--data", text / "wiki")[2]


def test_of_a_long_data_set_the_beginning_decided_what_was_held_out(corpus, tmp_path, monkeypatch):
    config = Config(**PRESETS["tiny"] | dict(data=str(corpus), validation_fraction=0.3))
    source = sources.open_source(config)
    source.scan_to_end = False
    chunks = list(evaluate.texts(source))
    whole = text_scan.read_text(source, to_end=True)
    characters = int(whole.lengths.sum())
    monkeypatch.setattr(sources, "open_source", lambda config, rules=1: source)
    sizes = set()
    for sample in (characters // 3, 10**9):
        monkeypatch.setattr(text_scan, "TOKENIZER_SAMPLE", sample)
        data_hash = text_scan.data_hash(whole.chunks)
        found = [chunk.text for chunk in evaluate.held_out_texts(config, data_hash, rules=1)]
        beginning = text_scan.read_text(source, to_end=False)
        assert (len(beginning.chunks) < len(whole.chunks)) == (sample < 10**9)
        assert beginning.lengths.sum() >= min(sample, characters)
        chosen = split.split_chunks(beginning.chunks["hash"], beginning.lengths, 0.3)
        limit = beginning.chunks["hash"][chosen].max()
        assert found == [chunk.text for chunk in chunks if text_scan.text_hash(chunk.text) <= limit]
        sizes.add(len(found))
    assert len(sizes) == 2


def test_held_out_text_that_is_no_longer_known(measure, run, checkpoint_of_run):
    path = run.parent / "text" / "e.md"
    before = path.read_text()
    path.write_text("other text")
    try:
        code, _, err = measure()
    finally:
        path.write_text(before)
    assert code == 1 and "Traceback" not in err
    assert "not the text that the checkpoint was trained on" in err and "--data" in err


def test_of_an_imported_model_nothing_was_held_out(measure, tmp_path):
    write_checkpoint(
        tmp_path / "checkpoint.pt",
        tiny_config(batch_size=40),
        data=dict(data_hash=None, tokenizer_hash="t"),
    )
    code, _, err = measure()
    assert code == 1 and "imported" in err and "--data" in err


def test_a_tokenizer_that_cannot_encode_the_text(measure, corpus, tmp_path):
    words = Tokenizer(models.WordLevel({"The": 0, "<|endoftext|>": 1}))
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(), tokenizer_json=words.to_str())
    code, _, err = measure("--data", corpus)
    assert code == 1 and err.startswith("error: the tokenizer cannot encode this text")


@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--data", "/nowhere"], 1, "/nowhere"),
        (["--limit", "-1"], 2, "--limit"),
        (["--dat", "x"], 2, "--data"),
        (["--precision", "x"], 2, "'x'"),
        (["--data", "empty.txt"], 1, "no text"),
    ],
)
def test_wrong_usage(measure, tmp_path, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(batch_size=40))
    found, _, err = measure(*options)
    assert found == code and words in err and err.startswith("error: ") and "Traceback" not in err


# ---------------------------------------------------------------- lm-evaluation-harness


@pytest.mark.skipif(
    not (importlib.util.find_spec("lm_eval") and importlib.util.find_spec("accelerate")),
    reason="needs pip install 'lm_eval[hf]'",
)
def test_the_harness_finds_the_same_bits_per_byte(measure, tmp_path):
    """A real run of lm_eval on the exported folder, with a task that is a JSON file."""
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config(init_std=0.2, max_seq_len=256))
    assert (
        exit_code(
            export_hf.main,
            [
                "--checkpoint",
                str(tmp_path / "checkpoint.pt"),
                "--out",
                str(tmp_path / "hf"),
                "--dtype",
                "fp32",
            ],
        )
        == 0
    )
    (tmp_path / "one.jsonl").write_text(json.dumps(dict(text=TEXT[:150])))
    (tmp_path / "task.yaml").write_text(f"""task: one_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "one.jsonl"}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
""")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lm_eval",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={tmp_path / 'hf'},dtype=float32",
            "--tasks",
            "one_text",
            "--include_path",
            tmp_path,
            "--device",
            "cpu",
            "--output_path",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]["one_text"]["bits_per_byte,none"]
    _, ours, _ = measure("--data", tmp_path / "one.jsonl", "--json")
    assert theirs == pytest.approx(ours["bits_per_byte"], rel=1e-5)
