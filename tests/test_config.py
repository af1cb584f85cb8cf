import dataclasses
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import config
from config import (
    AT_MOST,
    AT_MOST_OTHERWISE,
    FLOAT_AT_MOST,
    PARAMETER_KINDS,
    PRESET_BY_GPU_MEMORY,
    PRESETS,
    Config,
    ConfigError,
    ExperimentError,
    defaults,
    edited_defaults,
    field_docs,
    field_types,
    nearest,
    optimizer_groups,
    parameter_table,
    parse_value,
    resolve,
)
from model import MoETransformer
from tests.helpers import tiny_config

BRIEF = dict(
    d_model=4096,
    n_layers=40,
    n_heads=32,
    d_ff=11008,
    num_experts=8,
    top_k=2,
    moe_every=4,
    max_seq_len=4096,
    vocab_size=49152,
    batch_size=4,
    gradient_accumulation_steps=8,
    max_steps=50_000,
    muon_lr=0.01,
    adamw_lr=0.001,
    warmup_fraction=0.05,
    grad_clip=1.0,
    eval_every=500,
    save_every=5000,
    precision="fp16",
    n_kv_heads=32,
    norm_topk_prob=True,
    tie_embeddings=False,
)


def built(c: Config) -> MoETransformer:
    if c.activation_checkpointing == "auto":
        c = dataclasses.replace(c, activation_checkpointing="none")
    with torch.device("meta"):
        return MoETransformer(c)


# ---------------------------------------------------------------- parameter arithmetic

CASES = {name: Config(**values) for name, values in PRESETS.items()} | {
    "grouped_queries": tiny_config(n_kv_heads=2),
    "tied": tiny_config(tie_embeddings=True),
    "dense": tiny_config(num_experts=0),
    "moe_every_3": tiny_config(moe_every=3, top_k=1),
    "all_experts": tiny_config(top_k=4),
    "one_expert": tiny_config(num_experts=1, top_k=1),
    "fp32_masters": tiny_config(precision="bf16", master_weights="fp32"),
}


def kind_by_name(name: str, parameter) -> str:
    """The kind of a parameter of the built model, from its name alone."""
    if parameter.ndim == 1:
        return "norms"
    words = dict(
        embedding="embedding.",
        head="head.",
        attention=".attention.",
        experts=".experts.",
        router=".router.",
        dense_ffn=".ffn.",
    )
    return next(kind for kind, word in words.items() if word in name)


@pytest.mark.parametrize("name", CASES)
def test_the_parameter_table_is_that_of_the_built_model(name):
    c = CASES[name]
    parameters = dict(built(c).named_parameters())
    table = parameter_table(c)
    assert list(table) == list(parameters), "names and their order"
    for key, spec in table.items():
        assert spec.shape == tuple(parameters[key].shape), key
        assert spec.numel == parameters[key].numel(), key
        assert spec.kind == kind_by_name(key, parameters[key]), key


@pytest.mark.parametrize("name", CASES)
def test_parameter_counts_are_those_of_the_built_model(name):
    c, model = CASES[name], built(CASES[name])
    active = 0
    found = dict.fromkeys(PARAMETER_KINDS, 0)
    for key, parameter in model.named_parameters():
        kind = kind_by_name(key, parameter)
        found[kind] += parameter.numel()
        if kind == "experts":
            active += parameter.numel() * c.top_k // c.num_experts
        else:
            active += parameter.numel()
    assert c.parameter_groups == found and list(c.parameter_groups) == list(PARAMETER_KINDS)
    assert c.total_params == sum(p.numel() for p in model.parameters())
    assert c.active_params == active
    assert c.n_moe_layers == sum(block.moe for block in model.blocks)
    for i, block in enumerate(model.blocks):
        assert c.matrices_of(i) == sum(
            p.numel() for n, p in block.named_parameters() if p.ndim > 1 and "router" not in n
        )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_one_optimizer(name, optimizer):
    c = dataclasses.replace(CASES[name], optimizer=optimizer)
    groups = optimizer_groups(c)
    hidden = []
    others = []
    for key, parameter in built(c).named_parameters():
        matrix_of_a_block = key.startswith("blocks.") and parameter.ndim >= 2
        if optimizer == "muon" and matrix_of_a_block and ".router." not in key:
            hidden.append(key)
        else:
            others.append(key)
    assert list(groups) == ["muon", "adamw"]
    assert groups["muon"].parameters == tuple(hidden)
    assert groups["adamw"].parameters == tuple(others)
    assert (groups["muon"].peak_lr, groups["adamw"].peak_lr) == (c.muon_lr, c.adamw_lr)
    assert groups["muon"].state_bytes_per_element == (2 if c.split_masters else 4)
    assert groups["adamw"].state_bytes_per_element == 8


def test_the_parameter_table_of_a_deep_model_is_quick():
    start = time.process_time()
    assert len(parameter_table(Config(n_layers=512))) > 5000
    assert time.process_time() - start < 0.5


def test_a_changed_copy_has_its_own_counts():
    c = Config()
    wider = dataclasses.replace(c, d_ff=2 * c.d_ff)
    assert c.total_params < wider.total_params == Config(d_ff=2 * c.d_ff).total_params


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("18b", 17.97e9, 9.85e9),
        ("5b", 5.61e9, 2.36e9),
        ("2b", 1.89e9, 0.98e9),
        ("25b", 24.65e9, 17.0e9),
        ("18b_every_block", 18.19e9, 6.86e9),
        ("small", 0.362e9, 0.150e9),
    ],
)
def test_presets_have_their_advertised_size(name, total, active):
    assert CASES[name].total_params == pytest.approx(total, rel=6e-3)
    assert CASES[name].active_params == pytest.approx(active, rel=6e-3)


@pytest.mark.parametrize(
    "n_layers, moe_every, expected",
    [(6, 1, [0, 1, 2, 3, 4, 5]), (6, 2, [1, 3, 5]), (7, 3, [2, 5]), (4, 4, [3])],
)
def test_every_nth_block_is_an_moe_block(n_layers, moe_every, expected):
    c = tiny_config(n_layers=n_layers, moe_every=moe_every)
    assert [i for i in range(n_layers) if c.is_moe(i)] == expected and c.n_moe_layers == len(
        expected
    )
    assert tiny_config(num_experts=0).n_moe_layers == 0


def test_18b_takes_62_gflop_per_token():
    assert Config().flops_per_token == pytest.approx(61.92e9, rel=1e-4)


# ---------------------------------------------------------------- defaults and presets


def test_the_shipped_defaults_are_the_18b_experiment():
    assert {name: getattr(Config(), name) for name in BRIEF} == BRIEF
    assert Config() == Config(**PRESETS["18b"])
    assert (Config().head_dim, Config().sequences_per_step, Config().tokens_per_step) == (
        128,
        32,
        131072,
    )


def test_preset_18b_names_each_field_that_a_preset_names_with_the_shipped_default():
    named = {field for values in PRESETS.values() for field in values}
    assert named == PRESETS["18b"].keys()
    assert edited_defaults() == []


def test_every_field_is_documented():
    docs = field_docs()
    assert list(docs) == [f.name for f in dataclasses.fields(Config)]
    assert all(len(text) > 15 and text.endswith((".", "off.", ")")) for text in docs.values())


def test_config_imports_no_torch():
    code = "import config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(config.__file__).parent, check=True)


def test_presets_name_known_fields_only():
    assert all(values.keys() <= defaults().keys() for values in PRESETS.values())


# ---------------------------------------------------------------- precedence


@pytest.mark.parametrize(
    "gpu, preset",
    [
        (None, "tiny"),
        (6.9, "tiny"),
        (7, "small"),
        (21.9, "small"),
        (22, "2b"),
        (69.9, "2b"),
        (70, "5b"),
        (129.9, "5b"),
        (130, "18b"),
        (288, "18b"),
    ],
)
def test_gpu_memory_chooses_the_preset(gpu, preset):
    c, name, why = resolve({}, None, gpu)
    expected = Config(**PRESETS[preset])
    sequences = expected.eval_steps * expected.batch_size
    assert name == preset and c == dataclasses.replace(expected, eval_sequences=sequences)
    assert ("no GPU" in why) if gpu is None else f"{gpu:.0f} GB" in why


def test_the_why_names_the_memory_that_the_preset_is_for():
    assert resolve({}, None, 25.3)[2] == "the GPU has 25 GB, and 2b is for 22 GB and more"
    assert resolve({}, None, 5)[2] == "the GPU has 5 GB"


def test_no_memory_chooses_25b():
    assert resolve({}, None, 1000)[1] == "18b"
    assert "25b" not in [name for _, name in PRESET_BY_GPU_MEMORY]


def test_options_win_over_a_preset_and_a_preset_over_gpu_memory():
    c, name, why = resolve(dict(n_layers=7, moe_every=1), "2b", 288)
    assert (c.n_layers, c.moe_every, c.d_model, name) == (
        7,
        1,
        PRESETS["2b"]["d_model"],
        "2b",
    ) and "--preset" in why
    assert resolve(dict(max_steps=3), None, 10)[0].max_steps == 3


@pytest.fixture
def edited(tmp_path):
    """config.py after an edit of its text, as a module."""

    def load(old: str, new: str):
        text = Path(config.__file__).read_text()
        assert text.count(old) == 1
        (tmp_path / "edited_config.py").write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location(
            "edited_config", tmp_path / "edited_config.py"
        )
        sys.modules["edited_config"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("edited_config", None)


def test_an_edited_default_switches_the_choice_by_gpu_memory_off(edited):
    module = edited("n_layers: int = 40", "n_layers: int = 36")
    c, name, why = module.resolve({}, None, 10)
    assert c == module.Config(eval_sequences=20 * 4) and c.n_layers == 36 and c.d_model == 4096
    assert name == "config.py" and "n_layers" in why and "--preset" in why
    assert module.resolve(dict(n_layers=8), None, 10)[0].n_layers == 8


@pytest.mark.parametrize(
    "options, sequences",
    [
        ({}, 20 * 4),
        (dict(batch_size=1, gradient_accumulation_steps=32), 20 * 4),
        (dict(batch_size=8, eval_steps=3), 3 * 4),
        (dict(batch_size=1, eval_sequences=50), 50),
        (dict(batch_size=1, eval_sequences=50, eval_steps=3), 50),
        (dict(batch_size=1, eval_sequences=0), 20 * 4),
    ],
)
def test_the_validated_sequences_do_not_depend_on_the_micro_batch(options, sequences):
    config, _, _ = resolve(options, "18b", None)
    assert config.eval_sequences == config.validation_sequences == sequences


def test_the_validated_sequences_of_an_edited_configuration(edited):
    module = edited("eval_sequences: int = 0", "eval_sequences: int = 100")
    assert module.resolve({}, "tiny", None)[0].eval_sequences == 100
    # an option wins over an edited default
    assert module.resolve(dict(eval_steps=3), "tiny", None)[0].eval_sequences == 3 * 8
    module = edited("batch_size: int = 4", "batch_size: int = 6")
    assert module.resolve(dict(batch_size=2), None, None)[0].eval_sequences == 20 * 6


def test_the_validated_sequences_of_a_configuration_that_was_not_resolved():
    config = Config(**PRESETS["tiny"])
    assert config.validation_sequences == 8 * 8
    assert dataclasses.replace(config, eval_steps=2).validation_sequences == 2 * 8
    with pytest.raises(ConfigError, match="eval_sequences=-1"):
        Config(eval_sequences=-1)


def test_a_preset_wins_over_an_edited_default_and_says_so(edited):
    module = edited("n_layers: int = 40", "n_layers: int = 36")
    c, _, why = module.resolve({}, "5b", 10)
    assert c.n_layers == 32 and "edited in config.py: n_layers is 32, not 36" in why
    assert "edited" not in module.resolve(dict(n_layers=8), "5b", 10)[2], "the option replaces both"
    assert "edited" not in resolve({}, "5b", 10)[2]


def test_a_preset_keeps_edited_defaults_that_it_does_not_name(edited):
    module = edited('data: str = "python"', 'data: str = "texts"')
    assert module.resolve({}, None, 10)[1] == "config.py"
    c, _, why = module.resolve({}, "tiny", 10)
    assert c.data == "texts" and "edited" not in why


def test_an_edit_of_a_field_that_no_preset_names_leaves_the_choice_on(edited):
    module = edited("seed: int = 1234", "seed: int = 99")
    for preset, gpu_gb, name in ((None, 10, "small"), (None, None, "tiny"), ("2b", 10, "2b")):
        c, found, why = module.resolve({}, preset, gpu_gb)
        assert (c.seed, found) == (99, name) and "edited" not in why


@pytest.mark.parametrize(
    "old, new, preset, words",
    [
        (
            "max_steps=250,",
            "max_stpes=250,",
            "tiny",
            "max_stpes: preset tiny in config.py.*Did you mean max_steps.*Correct",
        ),
        (
            "max_steps: int = 50_000",
            "max_stepss: int = 50_000",
            None,
            "max_steps: preset 18b in config.py.*Did you mean max_stepss",
        ),
        (
            "max_steps=250,",
            'max_steps="many",',
            "tiny",
            "max_steps='many': give a whole number\n.*preset tiny in config.py.*correct",
        ),
        (
            "max_steps: int = 50_000",
            'max_steps: int = "many"',
            None,
            "max_steps='many': give a whole number\n.*those of config.py",
        ),
    ],
)
def test_a_wrong_edit_is_named_with_its_remedy(edited, old, new, preset, words):
    module = edited(old, new)
    with pytest.raises(module.ConfigError, match=words):
        module.resolve({}, preset, None)


def test_edited_defaults_on_a_cpu_say_what_they_make_it_train(edited):
    module = edited("grad_clip: float = 1.0", "grad_clip: float = 0.5")
    assert (
        "No GPU was found" in (why := module.resolve({}, None, None)[2])
        and "18b" in why
        and "--preset tiny" in why
    )
    assert "No GPU" not in module.resolve({}, None, 150)[2]


def test_editing_a_comment_or_a_docstring_is_no_edit(edited):
    module = edited("Width of the residual stream.", "Width of it.")
    assert module.resolve({}, None, 10)[1] == "small"


# ---------------------------------------------------------------- problems


def test_all_problems_are_reported_at_once_with_their_remedies():
    with pytest.raises(ConfigError) as error:
        Config(
            n_heads=5,
            n_kv_heads=3,
            d_ff=1001,
            top_k=9,
            moe_every=50,
            grad_clip=-1.0,
            adamw_beta2=1.0,
            batch_size=0,
        )
    text = str(error.value)
    for part in (
        "n_heads=5",
        "change n_heads or d_model",
        "n_kv_heads=3",
        "0 means as many",
        "d_ff=1001",
        "multiples of 8",
        "top_k=9",
        "num_experts=8",
        "moe_every=50",
        "lower it, or set num_experts=0",
        "grad_clip=-1.0",
        "adamw_beta2=1.0",
        "batch_size=0",
    ):
        assert part in text
    assert len(text.splitlines()) == 9
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, ExperimentError)


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_layers=0),
        dict(max_steps=0),
        dict(vocab_size=259),
        dict(loss_scale=0.5),
        dict(rms_norm_eps=0.0),
        dict(seed=-1),
        dict(warmup_fraction=1.1),
        dict(min_lr_fraction=-0.1),
        dict(muon_momentum=1.0),
        dict(validation_fraction=0.0),
        dict(validation_fraction=0.6),
        dict(d_model=36, n_heads=12),
        dict(d_model=4100),
        dict(n_kv_heads=-1),
        dict(top_k=0),
        dict(keep_checkpoints=0),
        dict(muon_lr=-0.1),
        dict(rope_theta=0.0),
        dict(load_balancing_weight=-1.0),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Config(**changes)


WHOLE_NUMBERS = [name for name, kind in field_types().items() if kind is int]


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_a_whole_number_has_a_bound_that_the_message_names(name):
    most = AT_MOST.get(name, AT_MOST_OTHERWISE)
    for value in (most + 1, 10**4000):
        with pytest.raises(ConfigError) as error:
            Config(**{name: value})
        lines = str(error.value).splitlines()
        if name in ("lighter_blocks", "host_gradient_blocks"):
            continue
        assert len(lines) == 2 and lines[1].startswith(f"  {name}=")
        assert lines[1].endswith(f": must be at most {most:,}") and len(lines[1]) < 100


OTHER_NUMBERS = [name for name, kind in field_types().items() if kind is float]


@pytest.mark.parametrize("name", OTHER_NUMBERS)
def test_no_number_is_beyond_fp32(name):
    with pytest.raises(ConfigError, match=rf"  {name}=.*: must be at most 1e\+30$"):
        Config(**{name: 1.1e30})
    assert torch.finfo(torch.float32).max > FLOAT_AT_MOST


def test_presets_are_far_under_the_bounds():
    for values in PRESETS.values():
        for name, most in AT_MOST.items():
            assert getattr(Config(**values), name) < most


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_layers=4.0),
        dict(n_layers=True),
        dict(n_layers="4"),
        dict(muon_lr="fast"),
        dict(muon_lr=float("nan")),
        dict(grad_clip=float("inf")),
        dict(muon_lr=True),
        dict(tie_embeddings=1),
        dict(precision="fp8"),
        dict(data=""),
        dict(compile="maybe"),
    ],
    ids=str,
)
def test_wrong_types_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Config(**changes)


def test_norm_topk_prob_follows_top_k():
    assert Config(top_k=2).norm_topk_prob is True and Config(top_k=1).norm_topk_prob is False
    assert Config(top_k=2, norm_topk_prob=False).norm_topk_prob is False
    assert tiny_config(num_experts=1, top_k=1, norm_topk_prob=True).norm_topk_prob is True
    with pytest.raises(ConfigError, match="norm_topk_prob"):
        Config(top_k=1, norm_topk_prob=True)


def test_switches_may_be_written_as_booleans():
    c = Config(compile=True, offload_optimizer=False)
    assert (c.compile, c.offload_optimizer) == ("true", "false")


def test_masters_are_split_only_in_16_bits():
    assert [Config(precision=p).split_masters for p in ("fp16", "bf16", "fp32")] == [
        True,
        True,
        False,
    ]
    assert not Config(master_weights="fp32").split_masters


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("max_steps", "50_000", 50_000),
        ("muon_lr", "1e-3", 1e-3),
        ("tie_embeddings", "True", True),
        ("norm_topk_prob", "no", False),
        ("precision", "bf16", "bf16"),
        ("compile", "true", "true"),
        ("data", "a b", "a b"),
    ],
)
def test_option_text_is_read_as_the_field_s_type(name, text, value):
    assert parse_value(name, text) == value and type(parse_value(name, text)) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("max_steps", "1.5", "a whole number"),
        ("muon_lr", "x", "a number"),
        ("tie_embeddings", "maybe", "true or false"),
        ("precision", "bf61", "Did you mean bf16?"),
    ],
)
def test_option_text_of_another_type_is_refused(name, text, message):
    with pytest.raises(ConfigError) as error:
        parse_value(name, text)
    assert (
        name in str(error.value) and repr(text) in str(error.value) and message in str(error.value)
    )


def test_the_nearest_name_is_suggested():
    assert (
        nearest("n_layer", defaults()) == " Did you mean n_layers?"
        and nearest("zzz", defaults()) == ""
    )
    with pytest.raises(ConfigError, match=r"'gpu' is not one of auto, cuda, cpu\.$"):
        parse_value("device", "gpu")  # and not: did you mean cpu?
    assert nearest("a100", ["h100", "a100-80", "a100-40"]) == " Did you mean a100-80 or a100-40?", (
        "before what differs by a letter"
    )
    with pytest.raises(ConfigError, match="Did you mean small.*18b, 5b"):
        resolve({}, "smal", None)
