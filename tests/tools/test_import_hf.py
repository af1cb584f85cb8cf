"""The import from Hugging Face: folders that transformers made, the way back from an export, training that goes on."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import data
import run_experiment
from cli import exit_code
from config import Config, ExperimentError
from record import checkpoint, results
from tests.helpers import TEXT, tiny_config, tokenizer_json, write_checkpoint
from tools import export_hf, import_hf
from trainer import Trainer

THEIRS = dict(
    vocab_size=270,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    decoder_sparse_step=2,
    norm_topk_prob=True,
    max_position_embeddings=16,
    rope_parameters=dict(rope_type="default", rope_theta=20000.0),
    initializer_range=0.2,
)
RUN = ["--precision", "fp32", "--preset", "tiny", "--device", "cpu"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(results, "plot_training_curves", lambda *args, **kwargs: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder that transformers made."""
    return made_by_transformers(tmp_path / "theirs")


def made_by_transformers(
    folder: Path, fused=False, tokenizer=True, shards=False, **changes
) -> Path:
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**THEIRS, **changes}))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5)
    theirs.save_pretrained(
        folder, save_original_format=not fused, max_shard_size="40KB" if shards else "5GB"
    )
    if tokenizer:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_json()), eos_token="<|endoftext|>"
        )
        fast.save_pretrained(folder)
    return folder


@pytest.fixture
def load(tmp_path, capsys):
    """load(folder, *options) is (exit code, the checkpoint's path, stdout, stderr)."""

    def call(folder, *options):
        capsys.readouterr()
        code = exit_code(
            import_hf.main,
            ["--model", str(folder), "--out", str(tmp_path / "run"), *RUN, *map(str, options)],
        )
        return code, tmp_path / "run" / "checkpoint_step_0.pt", *capsys.readouterr()

    return call


def assert_refused(result, code, *words):
    assert result[0] == code, result
    assert result[3].startswith("error: ") and "Traceback" not in result[3]
    for word in words:
        assert word in result[3], (word, result[3])
    assert not result[1].parent.exists() or not list(result[1].parent.iterdir())


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize("form", [dict(), dict(fused=True), dict(shards=True)], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(
            decoder_sparse_step=1,
            tie_word_embeddings=True,
            norm_topk_prob=False,
            num_experts_per_tok=3,
        ),
        dict(mlp_only_layers=[0, 1, 3, 4], decoder_sparse_step=1, num_hidden_layers=5),
        dict(num_experts=0, intermediate_size=64),
        dict(decoder_sparse_step=1, intermediate_size=999, num_key_value_heads=4),
    ],
    ids=str,
)
def test_a_folder_that_transformers_made(load, tmp_path, changes, form):
    folder = made_by_transformers(tmp_path / "theirs", **form, **changes)
    code, path, out, err = load(folder)
    assert code == 0, err
    assert f"--resume {path}" in out and "import again with --precision" in out
    ours, config = checkpoint.load_model(path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(270, (2, 16))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.1 and (ours(tokens) - expected).abs().max() < 1e-4
    assert config.rope_theta == 20000 and config.max_seq_len == 16


def test_mlp_only_layers_may_leave_every_third_block(load, tmp_path):
    folder = made_by_transformers(
        tmp_path / "theirs",
        mlp_only_layers=[0, 1, 3, 4],
        decoder_sparse_step=1,
        num_hidden_layers=6,
    )
    _, path, _, _ = load(folder)
    config = Config(**checkpoint.load(path)["config"])
    assert [config.is_moe(i) for i in range(6)] == [False, False, True] * 2


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_out_and_in_again_is_the_same_to_the_bit(load, tmp_path, precision):
    config = tiny_config(precision=precision, n_kv_heads=2, init_std=0.2)
    before = write_checkpoint(tmp_path / "before.pt", config)
    assert (
        exit_code(
            export_hf.main,
            [
                "--checkpoint",
                str(tmp_path / "before.pt"),
                "--out",
                str(tmp_path / "hf"),
                "--dtype",
                "fp32",
                "--shard_gb",
                "0.00005",
            ],
        )
        == 0
    )
    code, path, _, err = load(tmp_path / "hf", "--precision", precision)
    assert code == 0, err
    after = checkpoint.load(path)
    shape = [
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "d_ff",
        "num_experts",
        "top_k",
        "norm_topk_prob",
        "moe_every",
        "max_seq_len",
        "vocab_size",
        "tie_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "init_std",
        "precision",
    ]
    assert all(after["config"][name] == before["config"][name] for name in shape)
    assert (
        after["model"].keys() == before["model"].keys()
        and after["tokenizer_json"] == before["tokenizer_json"]
    )
    assert (
        after["step"]
        == after["tokens_seen"]
        == after["data_position"]
        == after["optimizer"]["adamw"]["steps"]
        == 0
    )
    for name, p in before["model"].items():
        assert torch.equal(after["model"][name], p) and after["model"][name].dtype == p.dtype, name
    for group in ("muon", "adamw"):
        for name, tensors in before["optimizer"][group]["state"].items():
            found = after["optimizer"][group]["state"][name]
            assert {k: (t.dtype, t.shape) for k, t in found.items()} == {
                k: (t.dtype, t.shape) for k, t in tensors.items()
            }
            for key, tensor in found.items():
                assert (
                    torch.equal(tensor, tensors[key]) if key == "residual" else not tensor.any()
                ), (name, key)


# ---------------------------------------------------------------- training goes on


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(8):
        (folder / f"{i}.txt").write_text(
            "".join(draw.choice(TEXT.splitlines(True)[0].split()) + " " for _ in range(400))
        )
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_goes_on_from_the_folders_weights(load, folder, text, tmp_path, capsys, precision):
    code, path, out, err = load(
        folder,
        "--precision",
        precision,
        "--max_steps",
        20,
        "--batch_size",
        2,
        "--eval_every",
        10,
        "--save_every",
        10,
        "--eval_steps",
        2,
        "--log_every",
        5,
        "--sample_tokens",
        4,
        "--validation_fraction",
        0.2,
        "--cache_dir",
        tmp_path / "cache",
    )
    assert code == 0, err
    shutil.move(folder, tmp_path / "moved")  # it is no longer needed
    before = path.read_bytes()
    assert run_experiment.main(["--resume", str(path), "--data", str(text)]) == 0, (
        capsys.readouterr().err
    )
    out = capsys.readouterr().out
    assert "at step 0" in out and "Done: 20 steps" in out
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    state = checkpoint.load(path.parent / "checkpoint_step_20.pt")
    corpus = data.prepare(Config(**state["config"]))
    assert (
        corpus.tokenizer_json == (tmp_path / "moved" / "tokenizer.json").read_text()
        and state["data"]["data_hash"] == corpus.data_hash
    )
    inputs, targets = map(
        torch.cat, zip(*data.validation_batches(corpus.validation, Config(**state["config"])))
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            theirs(inputs).logits.flatten(0, 1), targets.flatten()
        ).item()
    assert losses[0] == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 0.02)
    assert losses[20] < losses[0] - 0.5 and path.read_bytes() == before
    assert (
        run_experiment.main(
            ["--resume", "latest", "--save_dir", str(path.parent), "--max_steps", "21"]
        )
        == 0
    )


@pytest.mark.parametrize(
    "options", [["--optimizer", "adamw"], ["--load_balancing", "bias"]], ids=str
)
def test_what_was_imported_with_other_options_can_be_trained(
    load, folder, text, tmp_path, capsys, options
):
    code, path, _, err = load(
        folder,
        *options,
        "--max_steps",
        2,
        "--batch_size",
        2,
        "--eval_steps",
        1,
        "--sample_tokens",
        0,
        "--validation_fraction",
        0.2,
        "--cache_dir",
        tmp_path / "cache",
    )
    assert code == 0, err
    assert run_experiment.main(["--resume", str(path), "--data", str(text)]) == 0, (
        capsys.readouterr().err
    )
    assert "Done: 2 steps" in capsys.readouterr().out


def test_a_checkpoint_of_a_run_still_refuses_other_text(tmp_path, text):
    state = write_checkpoint(tmp_path / "checkpoint.pt", tiny_config())
    config = tiny_config(data=str(text), cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    with pytest.raises(ExperimentError, match="other text"):
        Trainer(config, data.prepare(config), state, tmp_path / "checkpoint.pt")


def test_options_of_the_new_run(load, folder):
    code, path, _, err = load(
        folder, "--muon_lr", 0.005, "--max_seq_len", 8, "--batch_size", 3, "--seed", 5
    )
    config = Config(**checkpoint.load(path)["config"])
    assert code == 0 and (config.muon_lr, config.max_seq_len, config.batch_size, config.seed) == (
        0.005,
        8,
        3,
        5,
    ), err
    assert config.save_dir == str(path.parent)


# ---------------------------------------------------------------- what cannot be had


def rewrite(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in {**config, **changes}.items() if v != "gone"})
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="llama"), ["model_type is 'llama'"]),
        (dict(hidden_size="gone", rope_parameters={}), ["hidden_size", "rope_theta"]),
        (dict(head_dim=16), ["head_dim 16 x 4 heads is not hidden_size 32"]),
        (dict(attention_bias=True), ["attention_bias"]),
        (dict(hidden_act="gelu"), ["'gelu'"]),
        (dict(use_sliding_window=True), ["use_sliding_window"]),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), ["yarn"]),
        (
            dict(rope_parameters="gone", rope_theta=1e4, rope_scaling=dict(type="linear")),
            ["linear"],
        ),
        (dict(quantization_config=dict(bits=4)), ["quantised"]),
        (
            dict(mlp_only_layers=[1], decoder_sparse_step=1),
            ["MoE blocks are [0, 2, 3] of 4", "moe_every"],
        ),
        (
            dict(moe_intermediate_size=56),
            ["moe_intermediate_size 56 and intermediate_size 48 differ"],
        ),
    ],
    ids=str,
)
def test_a_shape_that_config_cannot_hold(load, folder, changes, words):
    rewrite(folder, **changes)
    assert_refused(load(folder), 1, "cannot hold the model", *words)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_hidden_layers", 4.0),
        ("num_attention_heads", 0),
        ("num_experts", None),
        ("num_experts", "8"),
        ("decoder_sparse_step", 0),
        ("decoder_sparse_step", None),
        ("head_dim", "8"),
        ("mlp_only_layers", 5),
        ("rope_parameters", [1]),
        ("rope_scaling", "x"),
        ("initializer_range", None),
    ],
)
def test_a_value_of_which_nothing_can_be_made(load, folder, name, value):
    rewrite(folder, **{"head_dim": None, name: value})
    assert_refused(load(folder), 1, f"nothing can be made of {name} {value!r}")


def test_all_that_is_wrong_is_said_at_once(load, folder):
    rewrite(folder, hidden_act="gelu", attention_bias=True)
    assert_refused(load(folder), 1, "gelu", "attention_bias")


@pytest.mark.parametrize(
    "how, words",
    [
        ("cut", ["model.safetensors", "cut short"]),
        ("gone", ["holds neither model.safetensors"]),
        ("no config", ["there is no", "config.json"]),
        ("bad config", ["config.json", "cannot be read"]),
        ("list config", ["no JSON object"]),
        ("no tokenizer", ["tokenizer.json", "--tokenizer"]),
        ("large tokenizer", ["has", "only 263"]),
        ("more layers", ["no tensor model.layers.4.input_layernorm.weight"]),
        ("fewer layers", ["no place for", "model.layers.3"]),
        ("other width", ["model.embed_tokens.weight", "[270, 32]", "[280, 32]"]),
    ],
)
def test_a_damaged_folder(load, folder, how, words):
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "gone":
        weights.rename(folder / "pytorch_model.bin")
    elif how.endswith("config"):
        (folder / "config.json").unlink()
        if how != "no config":
            (folder / "config.json").write_text("{" if how == "bad config" else "[]")
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        rewrite(
            folder,
            **{
                "large tokenizer": dict(vocab_size=263),
                "more layers": dict(num_hidden_layers=5),
                "fewer layers": dict(num_hidden_layers=3),
                "other width": dict(vocab_size=280),
            }[how],
        )
    assert_refused(load(folder), 1, *words)


def test_a_tokenizer_can_be_named(load, tmp_path):
    folder = made_by_transformers(tmp_path / "theirs", tokenizer=False)
    (tmp_path / "other.json").write_text(tokenizer_json())
    code, path, _, err = load(folder, "--tokenizer", tmp_path / "other.json")
    assert code == 0, err
    state = checkpoint.load(path)
    assert (
        state["tokenizer_json"]
        == tokenizer_json()
        == Path(state["config"]["tokenizer"]).read_text()
    )


def test_numbers_that_fp16_cannot_hold(load, tmp_path):
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**THEIRS))
    with torch.no_grad():
        theirs.model.layers[1].mlp.experts.down_proj[2, 0, 0] = 7e4
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(tokenizer_json())
    assert_refused(
        load(tmp_path / "theirs", "--precision", "fp16"),
        1,
        "blocks.1.ffn.experts.down",
        "65,504",
        "--precision bf16",
    )
    assert load(tmp_path / "theirs", "--precision", "bf16")[0] == 0


@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--d_model", "64"], 2, ["d_model: the model has 32, not 64"]),
        (["--save_dir", "x"], 2, ["--out"]),
        (["--mdel", "x"], 2, ["--model"]),
        (["--batch_size", "0"], 2, ["batch_size=0"]),
        (["--muon_lr", "fast"], 2, ["'fast' is not a number"]),
    ],
)
def test_wrong_usage(load, folder, options, code, words):
    assert_refused(load(folder, *options), code, *words)


def test_nothing_is_written_over(load, folder, tmp_path):
    assert load(folder)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    code, _, _, err = load(folder)
    assert (
        code == 1
        and "no empty folder" in err
        and {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    )


def test_a_save_that_fails_leaves_the_folder_empty(load, folder, monkeypatch):
    def full(*_):
        raise checkpoint.CheckpointError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", full)
    assert_refused(load(folder), 1, "the disk is full")
