"""The import from Hugging Face: folders that transformers made, the way back from an export, the training after it."""

import json
import os
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
from config import Config, ExperimentError, ParameterSpec, parameter_table
from record import checkpoint
from tests.helpers import TEXT, tiny_config, tokenizer_json, write_checkpoint
from tools import export_hf, import_hf, qwen3_moe
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
    monkeypatch.setattr("trainer.plot_training_curves", lambda *args, **kwargs: None)


def transformers_model(**changes) -> Qwen3MoeForCausalLM:
    """A random model of transformers, in which no norm is 1."""
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**THEIRS, **changes}))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 1:
                p.copy_(torch.rand_like(p) + 0.5)
    return theirs.eval()


def save_folder(
    theirs: Qwen3MoeForCausalLM, folder: Path, fused=False, shards=False, tokenizer=True
) -> Path:
    """A Hugging Face folder that transformers writes."""
    theirs.save_pretrained(
        folder, save_original_format=not fused, max_shard_size="40KB" if shards else "5GB"
    )
    if tokenizer:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer_json()), eos_token="<|endoftext|>"
        )
        fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written_once(tmp_path_factory) -> Path:
    return save_folder(transformers_model(), tmp_path_factory.mktemp("theirs") / "folder")


@pytest.fixture
def folder(written_once, tmp_path) -> Path:
    """A folder that transformers wrote, for a test to change."""
    return shutil.copytree(written_once, tmp_path / "theirs")


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


FORMS = dict(
    one_file=dict(),
    fused_experts=dict(fused=True),
    shards=dict(shards=True),
)


@pytest.mark.slow
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
def test_a_folder_that_transformers_made(load, tmp_path, changes):
    theirs = transformers_model(**changes)
    tokens = torch.randint(270, (2, 16))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert expected.std() > 0.1
    for name, form in FORMS.items():
        code, path, out, err = load(save_folder(theirs, tmp_path / name, **form))
        assert code == 0, (name, err)
        assert f"--resume {path}" in out and "import again with --precision" in out
        ours, config = checkpoint.load_model(path)
        with torch.no_grad():
            assert (ours(tokens) - expected).abs().max() < 1e-4, name
        assert config.rope_theta == 20000 and config.max_seq_len == 16
        shutil.rmtree(path.parent)


def test_mlp_only_layers_may_leave_every_third_block(load, tmp_path):
    theirs = transformers_model(
        mlp_only_layers=[0, 1, 3, 4], decoder_sparse_step=1, num_hidden_layers=6
    )
    _, path, _, _ = load(save_folder(theirs, tmp_path / "theirs"))
    config = Config(**checkpoint.load(path)["config"])
    assert [config.is_moe(i) for i in range(6)] == [False, False, True] * 2


# What the folder keeps of a Config.
SHAPE = (
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
)


def described(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "precision", ["fp16", "bf16", pytest.param("fp32", marks=pytest.mark.slow)]
)
def test_out_and_in_again_is_the_same_to_the_bit(load, tmp_path, precision):
    config = tiny_config(precision=precision, n_kv_heads=2, init_std=0.2)
    before = write_checkpoint(tmp_path / "before.pt", config)
    export_hf.export(before, {}, tmp_path / "hf", "fp32", shard_bytes=50_000)
    code, path, _, err = load(tmp_path / "hf", "--precision", precision)
    assert code == 0, err
    after = checkpoint.load(path)
    for name in (*SHAPE, "precision"):
        assert after["config"][name] == before["config"][name], name
    assert after["tokenizer_json"] == before["tokenizer_json"]
    for counter in ("step", "tokens_seen", "data_position"):
        assert after[counter] == 0, counter
    assert after["optimizer"]["adamw"]["steps"] == 0

    assert described(after["model"]) == described(before["model"])
    for name, parameter in before["model"].items():
        assert torch.equal(after["model"][name], parameter), name

    assert after["optimizer"].keys() == before["optimizer"].keys()
    expected = checkpoint.optimizer_tensors(before)
    found = checkpoint.optimizer_tensors(after)
    assert found.keys() == expected.keys()
    for name, tensors in found.items():
        assert described(tensors) == described(expected[name])
        for key, tensor in tensors.items():
            if key == "residual":
                assert torch.equal(tensor, expected[name][key]), name
            else:
                assert not tensor.any(), (name, key)


# ---------------------------------------------------------------- training continues


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(8):
        (folder / f"{i}.txt").write_text(
            "".join(draw.choice(TEXT.splitlines(True)[0].split()) + " " for _ in range(400))
        )
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> list[str]:
    """Options of an import whose run trains in a second. The text is tokenized once for all of them."""
    options = dict(
        batch_size=2,
        eval_steps=2,
        validation_fraction=0.2,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train(capsys, *options) -> str:
    """Resumes as the options say; returns what was printed."""
    code = run_experiment.main(["--resume", *map(str, options)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_continues_from_the_folders_weights(
    load, folder, text, training, tmp_path, capsys, precision
):
    every = ["--eval_every", 6, "--save_every", 6, "--log_every", 3, "--sample_tokens", 4]
    code, path, out, err = load(
        folder, "--precision", precision, "--max_steps", 12, *every, *training
    )
    assert code == 0, err
    moved = tmp_path / "moved"
    shutil.move(folder, moved)  # it is no longer needed
    before = path.read_bytes()
    out = train(capsys, path, "--data", text)
    assert "at step 0" in out and "Done: 12 steps" in out
    assert path.read_bytes() == before

    # The validation loss at step 0 is that of transformers on the same text.
    state = checkpoint.load(path.parent / "checkpoint_step_12.pt")
    config = Config(**state["config"])
    corpus = data.prepare(config)
    assert corpus.tokenizer_json == (moved / "tokenizer.json").read_text()
    assert state["data"]["data_hash"] == corpus.data_hash
    batches = data.validation_batches(corpus.validation, config)
    inputs, targets = map(torch.cat, zip(*batches))
    theirs = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(inputs).logits.flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, targets.flatten()).item()
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert losses[0] == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 0.02)
    assert losses[12] < losses[0] - 0.5

    # From now on it is a run as any other.
    train(capsys, "latest", "--save_dir", path.parent, "--max_steps", 13)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--optimizer", "adamw"], ["--load_balancing", "bias"]], ids=str
)
def test_what_was_imported_with_other_options_can_be_trained(
    load, folder, text, training, capsys, options
):
    few = ["--max_steps", 2, "--sample_tokens", 0]
    code, path, _, err = load(folder, *options, *few, *training)
    assert code == 0, err
    assert "Done: 2 steps" in train(capsys, path, "--data", text)


def test_a_checkpoint_of_a_run_still_refuses_other_text(tmp_path, text):
    state = write_checkpoint(tmp_path / "checkpoint.pt", tiny_config())
    config = tiny_config(data=str(text), cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)
    with pytest.raises(ExperimentError, match="other text"):
        Trainer(config, data.prepare(config, rules=1), state, tmp_path / "checkpoint.pt")


@pytest.mark.slow
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
        ("no config", ["config.json: No such file", "--model must be"]),
        ("bad config", ["config.json", "cannot be read"]),
        ("list config", ["no JSON object"]),
        ("no tokenizer", ["tokenizer.json", "--tokenizer"]),
        ("large tokenizer", ["has", "only 263"]),
        ("more layers", ["no tensor model.layers.4.input_layernorm.weight"]),
        ("fewer layers", ["no place for", "model.layers.3"]),
        ("pipe", ["config.json", "it is no file"]),
        ("other width", ["model.embed_tokens.weight", "[270, 32]", "[280, 32]"]),
    ],
)
def test_a_damaged_folder(load, folder, how, words):
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "gone":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "pipe":
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")
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


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "../x.safetensors", "{}", "..", "a\\b"])
def test_a_weight_map_names_files_of_its_folder_only(load, folder, tmp_path, weight_map):
    """Also a path to the right file is refused: it could be any file of this machine."""
    weights = folder / "model.safetensors"
    elsewhere = weights.rename(tmp_path / "x.safetensors")
    if isinstance(weight_map, str):
        weight_map = {"lm_head.weight": weight_map.format(elsewhere)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=weight_map)))
    assert_refused(load(folder), 1, "index.json", "weight_map")
    elsewhere.rename(folder / "part.safetensors")
    index.write_text(json.dumps(dict(weight_map={"lm_head.weight": "part.safetensors"})))
    assert load(folder)[0] == 0


def test_a_tokenizer_can_be_named(load, tmp_path):
    folder = save_folder(transformers_model(), tmp_path / "theirs", tokenizer=False)
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
    theirs = transformers_model()
    with torch.no_grad():
        theirs.model.layers[1].mlp.experts.down_proj[2, 0, 0] = 7e4
    save_folder(theirs, tmp_path / "theirs")
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


def test_a_parameter_that_the_format_has_no_place_for_is_refused(load, folder, monkeypatch):
    """Else it would stay at zero, and nobody would know."""

    def with_shared_expert(config):
        spec = ParameterSpec((2, 48, 32), "dense_ffn", 2 * 48 * 32)
        return parameter_table(config) | {"blocks.1.ffn.shared.gate_up": spec}

    monkeypatch.setattr(qwen3_moe, "parameter_table", with_shared_expert)
    result = load(folder)
    assert_refused(result, 1, "Qwen3-MoE has no place for blocks.1.ffn.shared.gate_up")
    assert result[3].count("\n") == 1


def test_a_save_that_fails_leaves_the_folder_empty(load, folder, monkeypatch):
    def full(*_):
        raise checkpoint.CheckpointError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", full)
    assert_refused(load(folder), 1, "the disk is full")
