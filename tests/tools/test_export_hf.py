"""The export to Hugging Face: transformers computes the same, whatever the shape; whole or not at all; in little memory."""

import ctypes
import json
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3MoeForCausalLM

from cli import exit_code
from config import PRESETS, Config, ParameterSpec, parameter_table
from corpus.tokenizer import ChunkEncoder, load_tokenizer
from engine.precision import decode_master
from model import COMPUTE_DTYPE
from record import checkpoint
from tests.helpers import TEXT, tiny_config, tokenizer_json, write_checkpoint
from tools import export_hf, qwen3_moe


@pytest.fixture
def export(tmp_path, capsys):
    """export(config, *options, **changes of the state) is (exit code, output folder, state, stderr)."""

    def call(config, *options, **changes):
        state = write_checkpoint(tmp_path / "checkpoint.pt", config, **changes)
        code = exit_code(
            export_hf.main,
            [
                "--checkpoint",
                str(tmp_path / "checkpoint.pt"),
                "--out",
                str(tmp_path / "model"),
                *options,
            ],
        )
        return code, tmp_path / "model", state, capsys.readouterr().err

    return call


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "tensors are aligned"
            names = file.keys()
            for name in names:
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def masters(state: dict) -> dict[str, torch.Tensor]:
    kept = checkpoint.optimizer_tensors(state)
    return {
        name: decode_master(p, kept[name]["residual"]) if "residual" in kept[name] else p
        for name, p in state["model"].items()
    }


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(moe_every=1), marks=pytest.mark.slow),
        dict(moe_every=2, n_kv_heads=2),
        pytest.param(dict(moe_every=3, n_layers=7, top_k=4), marks=pytest.mark.slow),
        pytest.param(dict(moe_every=4, n_kv_heads=1), marks=pytest.mark.slow),
        dict(moe_every=1, tie_embeddings=True, top_k=3, norm_topk_prob=False),
        pytest.param(
            dict(moe_every=2, top_k=1, n_kv_heads=2, tie_embeddings=True), marks=pytest.mark.slow
        ),
        pytest.param(dict(num_experts=1, top_k=1), marks=pytest.mark.slow),
        dict(num_experts=0, n_kv_heads=2),
        pytest.param(dict(num_experts=0, tie_embeddings=True, moe_every=9), marks=pytest.mark.slow),
        pytest.param(dict(n_heads=16, n_kv_heads=4, rope_theta=1e6), marks=pytest.mark.slow),
        dict(rms_norm_eps=1e-3, d_ff=8, n_layers=1, moe_every=1),
        dict(num_experts=12, top_k=5, vocab_size=300, max_seq_len=100),
    ],
    ids=str,
)
def test_transformers_gives_the_same_logits(export, tmp_path, changes):
    config = tiny_config(init_std=0.2, **changes)
    code, folder, _, err = export(config, "--dtype", "fp32")
    assert code == 0, err
    ours, _ = checkpoint.load_model(tmp_path / "checkpoint.pt")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs) is Qwen3MoeForCausalLM and theirs.dtype == torch.float32
    tokens = torch.randint(config.vocab_size, (3, config.max_seq_len))
    with torch.no_grad():
        expected, found = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-4
    assert set(tensors(folder)) == set(per_expert_names(config))


def per_expert_names(c: Config) -> list[str]:
    """The tensors of a published Qwen3-MoE model of this shape."""
    names = ["model.embed_tokens.weight", "model.norm.weight"] + ["lm_head.weight"] * (
        not c.tie_embeddings
    )
    for i in range(c.n_layers):
        mlp = (
            [
                f"experts.{e}.{part}"
                for e in range(c.num_experts)
                for part in ("gate_proj", "up_proj", "down_proj")
            ]
            + ["gate"]
            if c.is_moe(i)
            else ["gate_proj", "up_proj", "down_proj"]
        )
        names += [
            f"model.layers.{i}.{name}.weight"
            for name in (
                "input_layernorm",
                "post_attention_layernorm",
                *(f"mlp.{part}" for part in mlp),
                *(
                    f"self_attn.{part}"
                    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
                ),
            )
        ]
    return names


@pytest.mark.parametrize(
    "precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow), "fp32"]
)
def test_weights_are_the_exact_masters_or_rounded_from_them(export, tmp_path, precision):
    config = tiny_config(precision=precision, num_experts=2)
    state = write_checkpoint(tmp_path / "checkpoint.pt", config)
    expected = masters(state)
    names = {
        "lm_head.weight": "head.weight",
        "model.norm.weight": "norm.weight",
        "model.layers.0.mlp.down_proj.weight": "blocks.0.ffn.down",
        "model.layers.1.mlp.gate.weight": "blocks.1.ffn.router.weight",
    }
    for dtype in ("fp32", "bf16", "fp16"):
        export_hf.export(state, {}, tmp_path / dtype, dtype, 10**9)
        found = tensors(tmp_path / dtype)
        kind = COMPUTE_DTYPE[dtype]
        assert all(t.dtype == kind for t in found.values())
        for theirs, ours in names.items():
            assert torch.equal(found[theirs], expected[ours].to(kind)), (theirs, dtype)
    if precision != "fp32":
        rounded = state["model"]["head.weight"].float()
        assert not torch.equal(expected["head.weight"], rounded), "the residual counts"

    # Without --dtype the folder has the precision of the run.
    _, folder, _, _ = export(config)
    assert {t.dtype for t in tensors(folder).values()} == {COMPUTE_DTYPE[precision]}


def test_the_config_is_that_of_the_architecture(export):
    config = tiny_config(n_kv_heads=2, moe_every=2, d_model=64, rope_theta=5e5)
    _, folder, _, _ = export(config, "--dtype", "bf16")
    found = json.loads((folder / "config.json").read_text())
    expected = dict(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        head_dim=16,
        hidden_size=64,
        num_key_value_heads=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[],
        intermediate_size=48,
        moe_intermediate_size=48,
        tie_word_embeddings=False,
        rope_theta=5e5,
        rms_norm_eps=1e-6,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        torch_dtype="bfloat16",
    )
    assert {name: found[name] for name in expected} == expected
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_the_tokenizer_and_the_end_of_text_go_along(export):
    _, folder, state, _ = export(tiny_config())
    assert (folder / "tokenizer.json").read_text() == state["tokenizer_json"]
    theirs, (ours, end_of_text) = (
        AutoTokenizer.from_pretrained(folder),
        load_tokenizer(state["tokenizer_json"]),
    )
    text = TEXT[:300] + "  \n\t x"
    assert (
        theirs(text)["input_ids"] == ours.encode(text).ids
        and theirs.decode(theirs(text)["input_ids"]) == text
    )
    assert (
        theirs.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id == end_of_text
    )
    assert theirs.model_max_length == 16


@pytest.mark.parametrize("kind", ["adds a begin token", "pads and cuts", "like SentencePiece"])
def test_the_exported_tokenizer_gives_the_ids_of_training(export, kind):
    given = Tokenizer.from_str(tokenizer_json())
    given.add_special_tokens(["<s>", "<end>"])
    if kind == "like SentencePiece":
        letters = [(letter, -1.0) for letter in sorted(set(TEXT) | {"\u2581"})]
        given = Tokenizer(models.Unigram([("<unk>", 0.0), *letters], 0, False))
        given.normalizer = normalizers.NFKC()
        given.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        given.decoder = decoders.Metaspace()
        given.add_special_tokens(["<s>", "</s>", "<end>"])
    begin = ("<s>", given.token_to_id("<s>"))
    template = processors.TemplateProcessing("<s> $A", special_tokens=[begin])
    given.post_processor = processors.Sequence([processors.ByteLevel(), template])
    if kind == "pads and cuts":
        given.enable_truncation(3)
        given.enable_padding(length=100)
    # A word of TEXT, no special token: so it was in training.
    text = TEXT[:300] + "  \n x <end> <s>"
    config = tiny_config(end_of_text="<end>", vocab_size=300)
    code, folder, _, err = export(config, tokenizer_json=given.to_str())
    assert code == 0, err
    ours, end_of_text = load_tokenizer(given.to_str(), "<end>")
    theirs = AutoTokenizer.from_pretrained(folder)
    of_training = ChunkEncoder(ours, rules=2).ids(text, before="", ends=True)
    assert theirs(text)["input_ids"] == of_training
    assert end_of_text == given.token_to_id("<end>") == theirs.eos_token_id
    assert GenerationConfig.from_pretrained(folder).eos_token_id == end_of_text


def test_weights_are_cut_into_files_of_the_size_asked_for(export, tmp_path, monkeypatch):
    config = tiny_config(init_std=0.2)
    synced = set()
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.add(Path(f"/proc/self/fd/{handle}").readlink().name)
    )
    code, folder, _, err = export(config, "--dtype", "fp32", "--shard_gb", "0.00004")
    assert code == 0, err
    assert {path.name for path in folder.iterdir()} <= synced, "on the disk before the rename"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and [f.name for f in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    assert (
        index["metadata"]["total_size"]
        == 4 * config.total_params
        == sum(t.nbytes for t in tensors(folder).values())
    )
    file_of = {}
    for file in files:
        file_of |= dict.fromkeys(safe_open(file, "pt").keys(), file.name)
    assert file_of == index["weight_map"]
    with_headers = [
        f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in files
    ]
    assert max(with_headers) <= 40_000 and all(
        a + b > 30_000 for a, b in zip(with_headers, with_headers[1:])
    ), "full, not one each"
    ours, _ = checkpoint.load_model(tmp_path / "checkpoint.pt")
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits - ours(tokens)
        ).abs().max() < 1e-4


# ---------------------------------------------------------------- the model card


METRICS = dict(
    step=7,
    train_loss=3.25,
    elapsed_seconds=12.5,
    val_loss=5.5,
    val_perplexity=244.7,
    val_accuracy=0.125,
)


def test_the_model_card_has_the_runs_figures(export):
    config = tiny_config(data="/home/someone/secret", save_dir="/home/someone/run")
    _, folder, _, _ = export(config, metrics=METRICS)
    card = (folder / "README.md").read_text()
    for words in (
        f"{config.total_params:,}, {config.active_params:,} active",
        "7 of 250 steps, 700 tokens",
        "350",
        "5.5000",
        "0.1250",
        "3.2500",
        "d" * 32,
        "2 of 4 blocks",
        "2 of 4 experts",
        "muon_lr: 0.02",
    ):
        assert words in card, words
    assert "someone" not in card, "what is on that machine stays there"


def test_the_model_card_has_the_validation_that_came_after_the_checkpoint(tmp_path):
    config = tiny_config()
    state = write_checkpoint(tmp_path / "checkpoint.pt", config, metrics=METRICS)
    rows = [
        METRICS,
        dict(step=7, val_loss=4.5, val_perplexity=90.0, val_accuracy=0.25, elapsed_seconds=13.0),
        dict(step=9, val_loss=1.0, elapsed_seconds=14.0),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def card(**changes):
        changed = state | changes
        metrics = export_hf.measured(changed, tmp_path)
        return export_hf.model_card(changed, config, metrics, "model", "fp32")

    assert "4.5000" in card() and "5.5000" not in card()
    other_run = METRICS | dict(elapsed_seconds=99.0)
    assert "5.5000" in card(metrics=other_run), "the rows in the folder are another run's"
    imported = dict(data_hash=None, tokenizer_hash="t")
    assert "| training text |" in card()
    assert "training text" not in card(data=imported), "an imported model's is not known"


# ---------------------------------------------------------------- whole or not at all


def test_nothing_is_written_over(export, tmp_path):
    (tmp_path / "model").mkdir()
    assert export(tiny_config())[0] == 0, "an empty folder is fine"
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    code, folder, _, err = export(tiny_config())
    assert code == 1 and "no empty folder" in err and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    assert (
        exit_code(
            export_hf.main,
            ["--checkpoint", str(tmp_path / "checkpoint.pt"), "--out", str(tmp_path / "file")],
        )
        == 1
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_that_is_cut_off_has_no_name_of_its_own(export, tmp_path, monkeypatch):
    blocks = export_hf.Masters.blocks
    calls = []

    def interrupted(self, place):
        assert not (tmp_path / "model").exists()
        calls.append(place)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return blocks(self, place)

    monkeypatch.setattr(export_hf.Masters, "blocks", interrupted)
    code, folder, _, err = export(tiny_config(), "--shard_gb", "0.00001")
    assert code == 130 and "interrupted" in err and "trained" not in err
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt"}


def test_a_disk_that_fills_up(export, tmp_path):
    write_checkpoint(tmp_path / "checkpoint.pt", tiny_config())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, checkpoint.save = checkpoint.save, lambda *_: None
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code, _, _, err = export(tiny_config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoint.save = save
    assert code == 1 and "was not written" in err and "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt"}


def test_too_little_space_is_said_before_anything_is_written(export, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export_hf.shutil, "disk_usage", lambda _: type("Usage", (), dict(free=1000))
    )
    code, _, _, err = export(tiny_config(), "--dtype", "fp32")
    assert (
        code == 1
        and "not enough disk space" in err
        and "--dtype" in err
        and not (tmp_path / "model").exists()
    )


@pytest.mark.slow
def test_a_weight_that_fp16_cannot_hold(export, tmp_path):
    config = tiny_config()
    state = write_checkpoint(tmp_path / "checkpoint.pt", config)
    state["model"]["blocks.1.ffn.experts.down"][2, 3, 4] = 1e5
    large = dict(model=state["model"])
    code, _, _, err = export(config, "--dtype", "fp16", **large)
    assert (
        code == 1
        and "model.layers.1.mlp.experts.2.down_proj.weight" in err
        and "65,504" in err
        and "--dtype" in err
    )
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt"}
    assert export(config, "--dtype", "bf16", **large)[0] == 0


@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--dtype", "int8"], 2, ["int8"]),
        (["--shard_gb", "0"], 2, ["--shard_gb"]),
        (["--shard_gb", "nan"], 2, ["--shard_gb"]),
        (["--outt", "x"], 2, ["--outt", "--out"]),
        (["--checkpoint", "missing.pt"], 1, ["missing.pt"]),
        (["--checkpoint", "."], 2, ["is a folder"]),
    ],
)
def test_wrong_usage(tmp_path, capsys, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    arguments = dict(
        zip(["--checkpoint", "--out", *options[::2]], ["checkpoint.pt", "model", *options[1::2]])
    )
    assert exit_code(export_hf.main, [text for pair in arguments.items() for text in pair]) == code
    err = capsys.readouterr().err
    assert (
        err.startswith("error: ") and "Traceback" not in err and all(word in err for word in words)
    )
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- memory


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    [line] = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    ]
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_host_never_holds_a_second_copy(tmp_path, monkeypatch):
    # A model of 28 million parameters is small: so are the blocks, whose copies are not looked for.
    monkeypatch.setattr(export_hf, "BLOCK", 2**16)
    config = Config(
        **{
            **PRESETS["tiny"],
            "precision": "bf16",
            "d_model": 256,
            "d_ff": 1536,
            "n_layers": 2,
            "vocab_size": 16384,
        }
    )
    path, peak, done = tmp_path / "checkpoint.pt", 0, threading.Event()
    write_checkpoint(path, config)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is taken anew, and seen

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    before = anonymous_bytes()
    thread.start()
    try:
        code = exit_code(
            export_hf.main,
            ["--checkpoint", str(path), "--out", str(tmp_path / "model"), "--dtype", "fp32"],
        )
    finally:
        done.set()
        thread.join()
    written = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert code == 0 and written > 4 * 23e6
    assert peak - before < 0.4 * written, ((peak - before) / 1e6, written / 1e6)


# ---------------------------------------------------------------- what the format cannot hold


def test_a_parameter_that_the_format_has_no_place_for_is_refused(export, monkeypatch):
    """As those of a shared expert would be, which the model may get one day."""

    def with_shared_experts(config):
        shared = ParameterSpec((2, 48, 32), "dense_ffn", 2 * 48 * 32)
        return parameter_table(config) | {
            f"blocks.{layer}.ffn.shared.gate_up": shared for layer in range(4)
        }

    monkeypatch.setattr(qwen3_moe, "parameter_table", with_shared_experts)
    code, folder, _, error = export(tiny_config())
    assert code == 1 and not folder.exists()
    assert error.startswith("error: Qwen3-MoE has no place for blocks.0.ffn.shared.gate_up, ")
    assert "and 1 more" in error
    assert error.count("\n") == 1, "one line, no traceback"


def test_no_tensor_of_the_checkpoint_is_left_behind(export, tmp_path):
    config = tiny_config()
    state = write_checkpoint(tmp_path / "checkpoint.pt", config)
    model = state["model"] | {"blocks.1.ffn.shared.down": torch.zeros(32, 48)}
    code, folder, _, error = export(config, model=model)
    assert code == 1 and not folder.exists()
    assert error.startswith("error: Qwen3-MoE has no place for blocks.1.ffn.shared.down: ")
    assert error.count("\n") == 1


def test_balancing_biases_are_refused(export):
    code, folder, _, error = export(tiny_config(load_balancing="bias"))
    assert code == 1 and "load_balancing=bias" in error and not folder.exists()
