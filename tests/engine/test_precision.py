import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.precision import (
    LossScaler,
    decode_master,
    embedding,
    encode_master,
    gradient_norms,
    read_master,
    sum_gradient_in_fp32,
    write_master,
)

FP16_NORMAL = 2.0**-14  # smallest normal float16


def bits(tensor):
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def round_trip(master, dtype):
    weight, low_bits = encode_master(master, dtype)
    assert weight.dtype == dtype and low_bits.dtype == torch.int16
    return decode_master(weight, low_bits)


# ---------------------------------------------------------------- bfloat16 masters


def every_low_half(upper: torch.Tensor) -> torch.Tensor:
    """fp32 numbers of the given upper 16 bits, with each of the 65536 lower halves."""
    return ((upper.to(torch.int32)[:, None] << 16) | torch.arange(65536, dtype=torch.int32)).view(
        torch.float32
    )


def uppers():
    positive = torch.cat(
        [
            torch.tensor([0, 1, 0x7F, 0x80, 0x3F7F, 0x3F80, 0x7F7E, 0x7F7F]),
            torch.randint(0x7F80, (24,)),
        ]
    )
    return torch.cat([positive, positive - 0x8000]).to(torch.int16)


def test_bf16_masters_are_exact_to_the_bit():
    master = every_low_half(uppers())
    assert bits(round_trip(master, torch.bfloat16)).equal(bits(master))
    random = torch.randn(200_000) * torch.exp2(torch.randint(-120, 120, (200_000,)))
    assert bits(round_trip(random, torch.bfloat16)).equal(bits(random))


def test_bf16_weight_is_the_nearest_to_its_master():
    master = every_low_half(uppers())
    weight, low_bits = encode_master(master, torch.bfloat16)
    tie = low_bits == -0x8000  # half a unit either way: rounded away from zero
    nearest = torch.where(tie, weight, master.to(torch.bfloat16))
    assert bits(weight).equal(bits(nearest))
    assert (weight.float() - master).abs()[tie & weight.isfinite()].max() > 0 and tie.sum() == len(
        master
    )
    assert (weight.abs() >= master.abs())[tie].all()


# ---------------------------------------------------------------- float16 masters


def fp16_range(low: int, high: int, count=20_000):
    """fp32 numbers of every exponent in [low, high), both signs, random mantissas, ties of float16 and their neighbours."""
    mantissa = torch.cat(
        [
            torch.randint(2**23, (count,)),
            torch.arange(1024).repeat(3) * 8192
            + 4096
            + torch.tensor([-1, 0, 1]).repeat_interleave(1024),
            torch.tensor([0, 1, 2**23 - 1]),
        ]
    )
    exponent = torch.arange(low, high)[:, None] + 127
    return torch.cat(
        [
            (sign << 31 | exponent << 23 | mantissa).to(torch.int32).view(torch.float32).flatten()
            for sign in (0, 1)
        ]
    )


def test_fp16_masters_are_exact_where_float16_is_normal():
    master = fp16_range(-14, 15)
    assert bits(round_trip(master, torch.float16)).equal(bits(master))
    assert encode_master(master, torch.float16)[0].equal(master.half())


@settings(max_examples=300, deadline=None)
@given(st.floats(FP16_NORMAL, 65504, width=32), st.sampled_from([-1, 1]))
def test_fp16_master_is_exact(value, sign):
    master = torch.tensor([sign * value])
    assert bits(round_trip(master, torch.float16)).equal(bits(master))


def test_fp16_masters_below_the_normal_range_are_off_by_a_fixed_step_at_most():
    master = torch.cat([fp16_range(-40, -14), torch.zeros(1)])
    error = (round_trip(master, torch.float16).double() - master.double()).abs()
    tie = (
        (master.double() / 2.0**-24).remainder(1) - 0.5
    ).abs() < 2.0**-17  # to within half a step of the low bits
    assert error[~tie].max() <= 2.0**-41 and error.max() <= 2.0**-40
    assert error[master.abs() >= 2.0**-16].max() == 0  # fp32 itself is no finer there


@pytest.mark.parametrize(
    "low_bits", [0, 1, -1, 8, 4095, -4096, 12345, 0x7FF8, -0x7FF8, 0x7FFF, -0x7FFF]
)
def test_fp16_encoding_what_was_decoded_changes_nothing(low_bits):
    weight = torch.arange(-0x8000, 0x8000).to(torch.int16).view(torch.float16)
    weight = weight[weight.abs() < 65504]  # all finite ones but the last, whose tie is infinite
    low_bits = torch.full_like(weight, low_bits).to(torch.int16)
    master = decode_master(weight, low_bits)
    stored = encode_master(master, torch.float16)
    again = encode_master(decode_master(*stored), torch.float16)
    assert again[0].equal(stored[0]) and again[1].equal(stored[1])
    normal = weight.abs() >= 2 * FP16_NORMAL
    assert decode_master(*stored)[normal].equal(master[normal])


# ---------------------------------------------------------------- masters over many updates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_updates_of_split_masters_follow_fp32_masters(dtype):
    truth = (torch.randn(20_000) * 0.02).to(dtype).float()
    weight = truth.to(dtype)
    state = (
        {} if dtype == torch.float32 else {"residual": torch.zeros(weight.shape, dtype=torch.int16)}
    )
    for _ in range(200):
        update = torch.randn_like(truth) * 1e-5  # under half a unit of a typical weight
        master = read_master(weight, state)
        write_master(master.mul_(1 - 1e-6).sub_(update), weight, state)
        truth.mul_(1 - 1e-6).sub_(update)
    master = read_master(weight, state)
    if dtype == torch.float16:
        assert (
            (master - truth).abs() <= (truth.abs() * 2.0**-23).clamp(min=2.0**-28)
        ).all() and truth.abs().max() < 0.25
        assert (master == truth).float().mean() >= 0.999
    else:
        assert master.equal(truth)
    assert weight.equal(truth.to(dtype)) or dtype == torch.bfloat16


# ---------------------------------------------------------------- loss scale


def test_loss_scale_halves_on_overflow_and_doubles_after_an_interval_without_one():
    scaler, seen = LossScaler(1024.0, growth_interval=3, enabled=True), []
    for overflow in (True, False, False, True, False, False, False, False, False, False):
        scaler.update(overflow)
        seen.append(scaler.scale)
    assert seen == [512, 512, 512, 256, 256, 256, 512, 512, 512, 1024]


def test_loss_scale_stops_at_one_and_counts_overflows_there():
    scaler, seen = LossScaler(4.0, growth_interval=10, enabled=True), []
    for overflow in (True, True, True, True, False, True):
        scaler.update(overflow)
        seen.append((scaler.scale, scaler.stuck_steps))
    assert seen == [(2, 0), (1, 0), (1, 1), (1, 2), (1, 0), (1, 1)]


def test_a_disabled_loss_scale_is_one():
    scaler = LossScaler(65536.0, growth_interval=1, enabled=False)
    assert scaler.scale == 1
    for overflow in (False, False, True, False):
        scaler.update(overflow)
        assert scaler.scale == 1


def test_loss_scale_resumes_where_it_was():
    scaler, resumed = (LossScaler(scale, growth_interval=3, enabled=True) for scale in (1.0, 77.0))
    for overflow in (True, False, False):
        scaler.update(overflow)
    scaler.stuck_steps = 5
    resumed.load_state_dict(scaler.state_dict())
    assert vars(resumed) == vars(scaler)
    resumed.update(False)
    assert resumed.scale == 2


# ---------------------------------------------------------------- gradients summed in fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_embeddings_gradient_is_a_sum_in_fp32(dtype):
    """A 16-bit sum of these equal terms stops at 4.26 in bfloat16."""
    weight = torch.randn(3, 8).to(dtype).requires_grad_()
    sum_gradient_in_fp32(weight)
    token_ids = torch.ones(2, 1024, dtype=torch.long)
    for _ in range(2):  # two micro-batches
        rows = embedding(token_ids, weight)
        assert torch.equal(rows, weight[token_ids]) and rows.dtype == dtype
        rows.backward(torch.full_like(rows, 0.01))
    term = torch.tensor(0.01).to(dtype).item()
    expected = torch.zeros(3, 8)
    expected[1] = 4096 * term
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_embedding_of_wide_weights_is_pytorchs_own(dtype):
    weight = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    sum_gradient_in_fp32(weight)
    token_ids = torch.tensor([[3, 1], [1, 1]])
    embedding(token_ids, weight).square().sum().backward()
    found, weight.grad = weight.grad, None
    torch.nn.functional.embedding(token_ids, weight).square().sum().backward()
    assert found.dtype == dtype and torch.equal(found, weight.grad)


# ---------------------------------------------------------------- gradient norms


def with_gradient(gradient):
    p = torch.zeros_like(gradient, requires_grad=True)
    p.grad = gradient
    return p


@pytest.mark.parametrize(
    "gradient, norm",
    [
        (torch.full((2, 2), 40960.0).half(), 81920.0),
        (torch.full((10_000,), 1e-7).half(), 100 * 2.0**-23),
        (torch.tensor([3.0, 4.0]).bfloat16(), 5.0),
        (torch.tensor([[3e-20, 4e-20]]), 5e-20),
    ],
)
def test_gradient_norms_neither_overflow_nor_vanish(gradient, norm):
    norms = gradient_norms([with_gradient(gradient), torch.zeros(3, requires_grad=True)])
    assert norms.dtype == torch.float32 and norms.tolist() == [pytest.approx(norm, rel=1e-6), 0]
    assert not norms.requires_grad


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_in_its_norm(bad):
    gradients = [torch.ones(50).half(), torch.ones(5, 5).half()]
    gradients[1][3, 2] = bad
    norms = gradient_norms([with_gradient(g) for g in gradients])
    assert norms.isfinite().tolist() == [True, False] and not norms.norm().isfinite()
