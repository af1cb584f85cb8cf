import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import muon
from config import optimizer_groups
from engine.offload import OptimizerState
from engine.precision import decode_master
from model import MoETransformer
from muon import (
    AdamW,
    Muon,
    build_optimizers,
    gram_newton_schulz,
    nesterov_direction,
    newton_schulz,
    newton_schulz_dtype,
)
from tests.helpers import tiny_config

FORMATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"wide": (6, 10), "tall": (12, 4), "bank": (3, 2, 6, 10)}
SMALL_BUCKET = 130  # two matrices of the bank; a matrix of 12 x 20 is larger


def parameters(dtype=torch.float32, **shapes):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for name, shape in (shapes or SHAPES).items()
    }


def set_gradients(named, step=0, scale=1.0, rounding=None):
    """Gaussian gradients, the same in the same step, times `scale`; rounded to the dtype `rounding` if it is given."""
    for i, p in enumerate(named.values()):
        generator = torch.Generator().manual_seed(100 * step + i)
        gradient = torch.randn(p.shape, generator=generator) * scale
        p.grad = gradient.to(rounding or p.dtype).to(p.dtype)


def make(kind, named, weight_decay=0.1, offload=False, fused=False, **settings):
    """An optimizer of these parameters; `settings` are fields of the configuration."""
    settings = dict(muon_momentum=0.9, adamw_beta2=0.95, adamw_eps=1e-8) | settings
    return kind(named, tiny_config(**settings), weight_decay, offload, fused)


def train(optimizer, named, steps=3, first=0, rounding=None):
    for step in range(first, first + steps):
        set_gradients(named, step, rounding=rounding)
        optimizer.step(0.01 * (1 + step), 1.0)


def snapshot(optimizer, named):
    """Copies of all weights and state tensors, by name."""
    tensors = {name: p.detach() for name, p in named.items()}
    tensors |= {
        f"{name}/{key}": t
        for name, state in optimizer.state.tensors.items()
        for key, t in state.items()
    }
    return {name: t.clone() for name, t in tensors.items()}


def assert_same_bits(found: dict, expected: dict):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---------------------------------------------------------------- Newton-Schulz

SPECTRA = {
    "flat": torch.ones(24),
    "over 1e3": torch.logspace(0, -3, 24),
    "rank 12": torch.ones(24) * (torch.arange(24) < 12),
}
# largest error of a singular direction, for each spectrum
BOUNDS = {
    (newton_schulz, torch.float32): (1e-5, 5e-5, 5e-5),
    (newton_schulz, torch.bfloat16): (0.08, 0.5, 0.6),
    (newton_schulz, torch.float16): (0.01, 0.06, 0.08),
    (gram_newton_schulz, torch.float32): (1e-5, 1e-4, 1e-4),
    (gram_newton_schulz, torch.float16): (0.01, 0.2, 0.2),
}


def orthogonalized(g, dtype, form=newton_schulz):
    """Without momentum: g [..., rows, columns] normalised, rounded to dtype, orthogonalised."""
    x = torch.empty(g.shape, dtype=dtype)
    nesterov_direction(g, torch.zeros_like(g), torch.tensor(1.0), 0.0, x)
    return form(x.view(-1, *g.shape[-2:])).reshape(g.shape)


def factors(shape):
    """U and V of a random matrix of a shape with 24 singular values: U diag(s) V^T."""
    return (torch.linalg.qr(torch.randn(n, 24, dtype=torch.float64))[0] for n in shape)


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("spectrum", range(3), ids=list(SPECTRA))
@pytest.mark.parametrize("form, dtype", BOUNDS)
def test_newton_schulz_maps_singular_values_by_its_polynomial(form, dtype, spectrum, shape):
    s, (u, v) = list(SPECTRA.values())[spectrum].double(), factors(shape)
    mapped = s / s.norm()
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        mapped = a * mapped + b * mapped**3 + c * mapped**5
    found = orthogonalized((u * s @ v.T).float(), dtype, form)
    assert found.dtype == dtype and found.shape == shape
    assert (
        torch.linalg.matrix_norm(found.double() - u * mapped @ v.T, 2)
        < BOUNDS[form, dtype][spectrum]
    )


@pytest.mark.parametrize("largest", [1, 3])
def test_the_gram_form_stays_stable_when_few_singular_values_are_large(largest):
    u, v = factors((24, 40))
    s = torch.where(torch.arange(24) < largest, 1.0, 1e-3).double()
    found = orthogonalized((u * s @ v.T).float(), torch.float16, gram_newton_schulz)
    assert torch.linalg.matrix_norm(found.double(), 2) < 1.25  # without the restart 2.4


@pytest.mark.parametrize("condition", [1, 3, 10])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_newton_schulz_leaves_singular_values_near_one(dtype, condition):
    u, v = factors((24, 40))
    s = torch.linspace(1, 1 / condition, 24, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalized((u * s @ v.T).float(), dtype).float())
    assert values.min() > 0.65 and values.max() < 1.2


@pytest.mark.parametrize("norm", [1e-5, 1e-12, 1e8])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_newton_schulz_takes_small_and_large_gradients_alike(dtype, norm):
    g = torch.randn(12, 20)
    found, expected = (orthogonalized(g / g.norm() * n, dtype).float() for n in (norm, 1))
    torch.testing.assert_close(
        found, expected, rtol=0, atol={torch.float32: 1e-5, torch.bfloat16: 0.05}.get(dtype, 0.01)
    )


def test_newton_schulz_multiplies_along_the_shorter_side():
    tall, wide = FlopCounterMode(display=False), FlopCounterMode(display=False)
    for counter, shape in ((tall, (3, 40, 8)), (wide, (3, 8, 40))):
        with counter:
            newton_schulz(torch.randn(shape))
    assert tall.get_total_flops() == wide.get_total_flops() > 0


# ---------------------------------------------------------------- Muon


def test_products_are_bf16_on_a_gpu_and_momentum_is_never_fp16():
    assert [newton_schulz_dtype(torch.device(d), False) for d in ("cuda", "cpu")] == [
        torch.bfloat16,
        torch.float32,
    ]
    assert (
        newton_schulz_dtype(torch.device("cuda"), True) == torch.float16
    )  # the Gram form goes wrong in bf16
    momenta = [
        make(Muon, parameters(dtype)).state.tensors["bank"]["momentum"].dtype for dtype in FORMATS
    ]
    assert momenta == [torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("shape", [(32, 32), (16, 40), (40, 16)], ids=str)
def test_muon_follows_torchs(shape):
    named = parameters(w=shape)
    start = named["w"].data.mul_(0.1).clone()
    other = {"w": start.clone().requires_grad_()}
    ours = make(Muon, named, weight_decay=0.5, muon_momentum=0.95)
    theirs = torch.optim.Muon(
        other.values(),
        lr=0.02,
        momentum=0.95,
        nesterov=True,
        weight_decay=0.5,
        adjust_lr_fn="original",
    )
    for step in range(8):
        set_gradients(named, step)
        set_gradients(other, step)
        ours.step(0.02, 1.0)
        theirs.step()
    assert (named["w"] - other["w"]).norm() < 0.02 * (
        other["w"] - start
    ).norm()  # theirs computes in bf16
    torch.testing.assert_close(
        ours.state.tensors["w"]["momentum"], theirs.state[other["w"]]["momentum_buffer"] / 0.05
    )


def test_muon_updates_a_bank_as_its_matrices():
    whole = parameters(bank=(3, 2, 12, 5))
    parts = {
        str(i): m.clone().requires_grad_()
        for i, m in enumerate(whole["bank"].detach().flatten(0, 1))
    }
    optimizers = make(Muon, whole), make(Muon, parts)
    for step in range(3):
        set_gradients(whole, step)
        for part, gradient in zip(parts.values(), whole["bank"].grad.flatten(0, 1)):
            part.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step(0.05, 1.0)
    torch.testing.assert_close(
        whole["bank"].detach().flatten(0, 1),
        torch.stack([*parts.values()]).detach(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("steps_before", [3, 0])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_matrix_with_no_gradient_keeps_weight_and_momentum(dtype, steps_before):
    named = parameters(dtype, bank=(3, 2, 6, 10))
    optimizer = make(Muon, named)
    train(optimizer, named, steps=steps_before)
    before = snapshot(optimizer, named)
    assert steps_before == 0 or all((t[1] != 0).any() for t in before.values())
    assert ("bank/residual" in before) == (dtype != torch.float32)
    for step in (3, 4):
        set_gradients(named, step)
        named["bank"].grad[1] = 0
        optimizer.step(0.02, 1.0)
    after = snapshot(optimizer, named)
    assert_same_bits({k: t[1] for k, t in after.items()}, {k: t[1] for k, t in before.items()})
    assert all((after[k][[0, 2]] != before[k][[0, 2]]).flatten(2).any(dim=2).all() for k in after)
    train(optimizer, named, steps=1, first=5)
    assert (named["bank"][1] != after["bank"][1]).any()


def test_muon_works_on_a_few_matrices_at_a_time(monkeypatch):
    shapes = SHAPES | {"large": (12, 20)}
    named, limited = parameters(**shapes), parameters(**shapes)
    whole, bucketed, sizes = make(Muon, named), make(Muon, limited), []
    train(whole, named)
    monkeypatch.setattr(OptimizerState, "BUCKET", SMALL_BUCKET)
    bucketed.orthogonalize = lambda x: sizes.append(x.shape) or newton_schulz(x)
    train(bucketed, limited)
    assert max(s.numel() for s in sizes if s[0] > 1) <= SMALL_BUCKET
    assert sizes.count((2, 6, 10)) == 9 and sizes.count((1, 12, 20)) == 3
    torch.testing.assert_close(
        snapshot(bucketed, limited), snapshot(whole, named), rtol=1e-5, atol=1e-6
    )


# ---------------------------------------------------------------- AdamW


def test_adamw_equals_torchs():
    shapes = SHAPES | {"vector": (9,)}
    named, other = parameters(**shapes), parameters(**shapes)
    ours = make(AdamW, named, weight_decay=0.3)
    theirs = torch.optim.AdamW(
        [dict(params=[p], weight_decay=0.3 if p.ndim >= 2 else 0) for p in other.values()],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(10):
        for p in (named, other):
            set_gradients(p, step, scale=1e-8 if step < 3 else 1)  # small ones for eps to count
        ours.step(0.01, 1.0)
        theirs.step()
    torch.testing.assert_close(named, other, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- both

BOTH = pytest.mark.parametrize("kind", [Muon, AdamW])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_scale", [2.0**-16, 2.0**3])
def test_grad_scale_scales_gradients_and_state_is_unscaled(kind, dtype, grad_scale):
    named, scaled = parameters(dtype), parameters(dtype)
    optimizer, other = make(kind, named), make(kind, scaled)
    for step in range(3):
        set_gradients(named, step, scale=grad_scale)
        optimizer.step(0.02, 1.0)
        set_gradients(scaled, step)
        other.step(0.02, grad_scale)
    assert_same_bits(snapshot(other, scaled), snapshot(optimizer, named))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_fp32_gradient_of_a_16_bit_weight_is_read_unrounded(dtype, offload):
    named = parameters(dtype)
    for p in named.values():
        p.grad_dtype = torch.float32
        p.grad = torch.full(p.shape, 1 + 2.0**-20)  # 1 in 16 bits
    optimizer = make(AdamW, named, offload=offload, adamw_beta1=0.5)
    optimizer.step(0.01, 2.0)
    for state in optimizer.state.tensors.values():
        assert (state["exp_avg"] == 1 + 2.0**-20).all()


@BOTH
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_gradients_are_left_as_they_are(kind, dtype):
    named = parameters(dtype)
    set_gradients(named)
    before = {name: p.grad.clone() for name, p in named.items()}
    for grad_scale in (1.0, 0.3):
        make(kind, named).step(0.02, grad_scale)
    assert_same_bits({name: p.grad for name, p in named.items()}, before)


@BOTH
def test_split_bf16_masters_are_fp32_masters_to_the_bit(kind, monkeypatch):
    monkeypatch.setattr(muon, "muon_momentum_dtype", lambda p: torch.bfloat16)
    split = parameters(torch.bfloat16)
    truth = {name: p.detach().float().requires_grad_() for name, p in split.items()}
    optimizer, reference = make(kind, split), make(kind, truth)
    train(optimizer, split, steps=8)
    train(reference, truth, steps=8, rounding=torch.bfloat16)
    for name, p in split.items():
        master = decode_master(p.detach(), optimizer.state.tensors[name]["residual"])
        assert master.equal(truth[name]) and not master.equal(p.float())


@pytest.mark.slow
def test_fused_muon_compiles_once_for_any_number_of_matrices_and_once_for_one(monkeypatch):
    """The GPU's path, with its graphs run as they are, beside the plain one."""
    graphs, compile_function = [], torch.compile
    monkeypatch.setattr(
        OptimizerState, "BUCKET", 5 * 60
    )  # five matrices: a bank of seven and the next one are cut

    def backend(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, options, **kwargs: compile_function(function, backend=backend, **kwargs),
    )
    torch._dynamo.reset()
    shapes = dict(bank=(7, 6, 10), pair=(2, 6, 10), large=(4, 2, 6, 10), one=(6, 10))
    results = []
    for fused in (False, True):
        named = parameters(torch.bfloat16, **shapes)
        optimizer = make(Muon, named, fused=fused)
        optimizer.orthogonalize, optimizer.dtype = newton_schulz, torch.float32
        train(optimizer, named, steps=2)
        results.append(snapshot(optimizer, named))
    assert_same_bits(*results)
    assert len(graphs) == 4  # two functions, for several and for one


@BOTH
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_offloaded_state_gives_the_same_bits(kind, dtype, monkeypatch):
    monkeypatch.setattr(OptimizerState, "BUCKET", SMALL_BUCKET)
    offloaded, resident = parameters(dtype), parameters(dtype)
    optimizers = make(kind, offloaded, offload=True), make(kind, resident)
    for optimizer, named in zip(optimizers, (offloaded, resident)):
        train(optimizer, named, steps=4)
    assert len(list(optimizers[1].state.buckets())) >= 4
    assert_same_bits(snapshot(optimizers[0], offloaded), snapshot(optimizers[1], resident))


@pytest.mark.parametrize("tied", [False, True])
def test_muon_gets_the_hidden_matrices_and_adamw_the_rest(tied):
    config = tiny_config(tie_embeddings=tied, moe_every=2)
    model = MoETransformer(config)
    parameters = dict(model.named_parameters())
    optimizers = build_optimizers(config, parameters)
    hidden = optimizers["muon"].state.tensors
    others = optimizers["adamw"].state.tensors
    assert hidden.keys() | others.keys() == parameters.keys()
    assert not hidden.keys() & others.keys()
    assert {name.split(".", 2)[2] for name in hidden} == {
        *(f"attention.{m}.weight" for m in "qkvo"),
        "ffn.gate_up",
        "ffn.down",
        "ffn.experts.gate_up",
        "ffn.experts.down",
    }
    norms = {name for name, p in model.named_parameters() if p.ndim == 1}
    routers = {f"blocks.{i}.ffn.router.weight" for i in (1, 3)}
    assert others.keys() == norms | routers | {"embedding.weight"} | (
        set() if tied else {"head.weight"}
    )


def test_a_third_optimizer_is_a_class_and_a_group(monkeypatch):
    """What else it takes to add one: nothing."""

    class SGD:
        def __init__(
            self,
            parameters,
            config,
            weight_decay,
            offload=False,
            fused=False,
            gradient_offload=None,
        ):
            self.parameters = parameters
            self.weight_decay = weight_decay

    def groups_with_sgd(config):
        groups = optimizer_groups(config)
        adamw = groups["adamw"]
        norms = tuple(name for name in adamw.parameters if "norm" in name)
        others = tuple(name for name in adamw.parameters if "norm" not in name)
        groups["adamw"] = dataclasses.replace(adamw, parameters=others)
        groups["sgd"] = dataclasses.replace(adamw, parameters=norms, weight_decay=0.5)
        return groups

    monkeypatch.setattr(muon, "optimizer_groups", groups_with_sgd)
    monkeypatch.setitem(muon.OPTIMIZERS, "sgd", SGD)
    config = tiny_config()
    parameters = dict(MoETransformer(config).named_parameters())
    optimizers = build_optimizers(config, parameters)
    assert list(optimizers) == ["muon", "adamw", "sgd"]
    norms = {name for name in parameters if "norm" in name}
    assert optimizers["sgd"].parameters.keys() == norms
    assert optimizers["sgd"].weight_decay == 0.5
    assert not optimizers["adamw"].state.tensors.keys() & norms


def test_a_scalar_beyond_fp32_is_the_largest_number():
    largest = torch.finfo(torch.float32).max
    assert muon.scalar(1e60, torch.device("cpu")).item() == largest
    assert muon.scalar(0.5, torch.device("cpu")).item() == 0.5
