"""What an older version of the program wrote is read, gone on with, exported and plotted as it was.

fixtures/old_runs holds run folders of commit 4af493f, a cache of tokens, and in expected.json what
that commit made of them. make_old_runs.py made all of it.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import plot
import run_experiment
import trainer
from config import ExperimentError, resumed_config
from record import checkpoint
from record.small_files import starts
from tests.corpus.stories import config_for, story
from tools import export_hf

OLD = Path(__file__).parent / "fixtures" / "old_runs"
EXPECTED = json.loads((OLD / "expected.json").read_text())
CASES = list(EXPECTED["runs"])
SAVED_STEP = EXPECTED["saved_step"]
# Relative. In 16 bits another processor's products round differently.
TOLERANCE = dict(fp32=1e-5, bf16=1e-2, fp16=1e-2)

LONG_TRAINING_TEXT = "9ba0ffc24ee0b88b743ad0ce86f7aae298d70d46b65ce1e8b5a257548c623d41"
LONG_HELD_OUT_TEXT = "4766c0d7c7afbbc0c639e56068e22c6f260acb0a18c53145977577bb0a080244"


def describe(tensor: torch.Tensor) -> str:
    """Type, shape and the sha256 of the bytes, as make_old_runs.py wrote them."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def tensors_of(node: dict, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dicts under the path of its keys."""
    found = {}
    for key, value in node.items():
        name = f"{path}/{key}" if path else key
        if isinstance(value, dict):
            found |= tensors_of(value, name)
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return found


def described(node: dict) -> dict[str, str]:
    return {name: describe(tensor) for name, tensor in tensors_of(node).items()}


def hash_of(tokens) -> str:
    return hashlib.sha256(tokens[:].astype("int64").tobytes()).hexdigest()


def saved_checkpoint(folder: Path) -> Path:
    return folder / f"checkpoint_step_{SAVED_STEP}.pt"


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """The old text, tokenizer and cache in another place than where the runs were made."""
    folder = tmp_path_factory.mktemp("another place")
    for name in ("text.jsonl", "tokenizer.json"):
        shutil.copy(OLD / name, folder)
    shutil.copytree(OLD / "cache", folder / "cache")
    return dict(
        data=str(folder / "text.jsonl"),
        tokenizer=str(folder / "tokenizer.json"),
        cache_dir=str(folder / "cache"),
    )


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than the training here, and has a test of its own."""
    draw = plot.plot_training_curves
    for module in list(sys.modules.values()):  # wherever it was imported by name
        if getattr(module, "plot_training_curves", None) is draw:
            monkeypatch.setattr(module, "plot_training_curves", lambda *args, **kwargs: None)


# ---------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_read_as_it_was_written(case, places, tmp_path):
    expected = EXPECTED["runs"][case]
    path = saved_checkpoint(OLD / case)
    state = checkpoint.load(path)
    assert described(state) == expected["tensors"]
    assert {name: state[name] for name in expected["plain"]} == expected["plain"]

    # The same tensors arrive in the model and in the optimizers.
    config, _ = resumed_config(state["config"], places | dict(save_dir=str(tmp_path)))
    corpus = data.prepare(config, checkpoint.data_rules(state))
    run = trainer.Trainer(config, corpus, state, path)
    model = run.parameters | run.model.balancing_biases()
    found = described(
        dict(model=model, optimizer={k: o.state_dict() for k, o in run.optimizers.items()})
    )
    assert found == {
        name: text
        for name, text in expected["tensors"].items()
        if name.startswith(("model/", "optimizer/"))
    }
    assert run.run_id == expected["plain"]["run_id"]
    assert run.step == SAVED_STEP


# ---------------------------------------------------------------- going on


def resume(case: str, folder: Path, places: dict) -> list[dict]:
    """Goes on with a copy of an old run to its end; returns the rows of its metrics.jsonl."""
    shutil.copytree(OLD / case, folder)
    options = places | dict(save_dir=str(folder), log_every=1)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert run_experiment.main(["--resume", str(saved_checkpoint(folder)), *words]) == 0
    return rows_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_as_the_old_program_did(case, places, tmp_path, no_pictures):
    expected = EXPECTED["runs"][case]
    rows = resume(case, tmp_path / "first", places)
    old_rows = [row for row in rows_of(OLD / case) if row["step"] <= SAVED_STEP]
    assert rows[: len(old_rows)] == old_rows, "the rows before the checkpoint are kept"
    new_rows = rows[len(old_rows) :]
    losses = [row["train_loss"] for row in new_rows if "train_loss" in row]
    tolerance = TOLERANCE[run_precision(tmp_path / "first")]
    assert losses == pytest.approx(expected["train_losses"], rel=tolerance)
    assert new_rows[-1]["val_loss"] == pytest.approx(expected["validation_loss"], rel=tolerance)

    run = json.loads((tmp_path / "first" / "run.json").read_text())
    old_run = json.loads((OLD / case / "run.json").read_text())
    old_run.pop("earlier")
    assert starts(run)[:-1] == [old_run], "the old start is kept"
    assert run["run_id"] == old_run["run_id"]

    # A second time it ends in the same bits.
    again = resume(case, tmp_path / "second", places)
    assert [row.get("train_loss") for row in again] == [row.get("train_loss") for row in rows]
    last = SAVED_STEP + len(losses)
    first, second = (
        checkpoint.load(tmp_path / name / f"checkpoint_step_{last}.pt")
        for name in ("first", "second")
    )
    assert described(first) == described(second)


def run_precision(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["config"]["precision"]


# ---------------------------------------------------------------- the text


@pytest.fixture
def config_and_position(places):
    """The configuration of an old run, and how many training sequences it had read."""
    state = checkpoint.load(saved_checkpoint(OLD / "fp32"))
    config, _ = resumed_config(state["config"], places)
    assert checkpoint.data_rules(state) == 1
    return config, state["data_position"]


def test_the_next_sequences_and_the_held_out_text_are_the_same(config_and_position, tmp_path):
    config, position = config_and_position
    expected = EXPECTED["text"]
    # Tokenized anew, in an empty cache.
    corpus = data.prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "cache")), rules=1)
    for name in ("data_hash", "tokenizer_hash"):
        assert getattr(corpus, name) == expected[name], name
    assert corpus.unigram_entropy == pytest.approx(expected["unigram_entropy"], rel=1e-12)
    assert len(corpus.train) == expected["train_tokens"]
    assert len(corpus.validation) == expected["validation_tokens"]
    assert hash_of(corpus.train) == expected["train_sha256"]
    assert hash_of(corpus.validation) == expected["validation_sha256"]

    following = data.sequences(corpus.train, config.max_seq_len, config.seed, position, 4, rules=1)
    assert following[:, :16].tolist() == expected["next_sequences"]
    inputs, _ = next(iter(data.validation_batches(corpus.validation, config)))
    assert inputs[:2, :16].tolist() == expected["validation_windows"]


def test_long_documents_are_split_as_they_were(tmp_path):
    """Those of the old runs have one chunk each, which all versions split alike."""
    rows = [json.dumps(dict(text=story(number, 1500))) for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = config_for(
        tmp_path,
        data=str(tmp_path / "rows.jsonl"),
        tokenizer=str(OLD / "tokenizer.json"),
        validation_fraction=0.1,
    )
    corpus = data.prepare(config, rules=1)
    # What commit 4af493f made of this text.
    assert hash_of(corpus.train) == LONG_TRAINING_TEXT
    assert hash_of(corpus.validation) == LONG_HELD_OUT_TEXT


def test_an_old_cache_is_used(config_and_position, places):
    """The tokens that are opened are those of the old files, or a link to them, and no new ones."""
    config, _ = config_and_position
    [old] = (OLD / "cache").iterdir()
    corpus = data.prepare(config, rules=1)
    for name in ("train", "validation"):
        shard = Path(places["cache_dir"]) / old.name / f"{name}.bin"
        [used] = getattr(corpus, name).paths
        assert Path(used).samefile(shard), "it was tokenized again"
        assert hash_of(getattr(corpus, name)) == EXPECTED["text"][f"{name}_sha256"]


@pytest.mark.slow
def test_a_deleted_cache_is_made_again_under_the_old_rules(
    places, tmp_path, no_pictures, monkeypatch
):
    """Also by a program whose new runs follow other rules."""
    monkeypatch.setattr(run_experiment, "DATA_RULES", 2)
    empty = dict(places, cache_dir=str(tmp_path / "cache"))
    rows = resume("fp32", tmp_path / "run", empty)
    expected = EXPECTED["runs"]["fp32"]
    losses = [row["train_loss"] for row in rows if row["step"] > SAVED_STEP and "train_loss" in row]
    assert losses == pytest.approx(expected["train_losses"], rel=TOLERANCE["fp32"])
    assert rows[-1]["val_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
    [new] = (tmp_path / "cache").iterdir()
    [old] = (OLD / "cache").iterdir()
    for name in ("train.bin", "validation.bin"):
        assert (new / name).read_bytes() == (old / name).read_bytes()
    last = checkpoint.load(tmp_path / "run" / "checkpoint_latest.pt")
    assert last["data"]["rules"] == 1


# ---------------------------------------------------------------- export and curves


@pytest.mark.parametrize("case", CASES)
def test_it_exports_the_same_weights(case, tmp_path):
    expected = EXPECTED["runs"][case]["exported_weights"]
    argv = [
        "--checkpoint",
        str(saved_checkpoint(OLD / case)),
        "--out",
        str(tmp_path / "model"),
        "--dtype",
        "fp32",
    ]
    if expected is None:  # balanced by biases, for which the format has no place
        with pytest.raises(ExperimentError, match="load_balancing=bias"):
            export_hf.main(argv)
        return
    export_hf.main(argv)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    lines = [f"{name} {describe(weights[name])}" for name in sorted(weights)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected


@pytest.mark.slow
def test_the_curves_of_an_old_run_and_of_all_of_them_are_drawn(tmp_path):
    folders = [str(OLD / case) for case in CASES]
    assert plot.main([folders[0], "--out", str(tmp_path / "one.png")]) == 0
    assert plot.main([*folders, "--out", str(tmp_path / "all.png")]) == 0
    for name in ("one.png", "all.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
