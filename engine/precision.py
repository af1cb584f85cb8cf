"""What keeps training in 16 bits exact: fp32 masters, fp32 gradients, loss scaling.

An update is often smaller than half an ulp (unit in the last place) of a 16-bit weight, and
rounding would lose it. So every 16-bit weight has an fp32 master.

The master is stored in two parts. The weight is the master rounded to 16 bits. The rest of the
master is 16 low bits, in the optimizer's state under the key "residual". Together they take the 4
bytes of an fp32 number; a weight with a separate fp32 master would take 6.

Memory: these functions also run without torch.compile. A tensor that has a name then keeps its
memory until the name is reused or the function returns. So a step often reuses the name of the
tensor that it replaces.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- split master weights


def encode_master(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits fp32 masters into a weight of `dtype` (bfloat16 or float16) and low bits (int16).

    The split is exact in bfloat16, and in float16 for |weight| >= 2^-14, its smallest normal
    number. Below that, float16 keeps the master to within 2^-40.
    """
    if dtype == torch.bfloat16:
        return _encode_bf16(master)
    return _encode_fp16(master)


def decode_master(weight: Tensor, low_bits: Tensor) -> Tensor:
    """The fp32 masters of a 16-bit weight: the inverse of `encode_master`, as a new tensor."""
    if weight.dtype == torch.bfloat16:
        return _decode_bf16(weight, low_bits)
    return _decode_fp16(weight, low_bits)


def read_master(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The fp32 masters of a parameter, or of a slice of it.

    For a 16-bit weight this is a new tensor. An fp32 weight is its own master, and is returned.
    """
    if "residual" in state:
        return decode_master(weight, state["residual"])
    return weight


def write_master(master: Tensor, weight: Tensor, state: dict[str, Tensor]) -> None:
    """Stores updated fp32 masters in the weight and state that they were read from."""
    if "residual" in state:
        master, low_bits = encode_master(master, weight.dtype)
        state["residual"].copy_(low_bits)
    weight.copy_(master)


# A bfloat16 number is the upper 16 bits of an fp32 number: the sign, 8 bits of exponent, and the
# first 7 of 23 bits of mantissa. So integer arithmetic on the bits makes the split exact.

# The upper 16 bits change in steps of 0x10000. This is half a step.
HALF_STEP = 0x8000


def _encode_bf16(master: Tensor) -> tuple[Tensor, Tensor]:
    bits = master.view(torch.int32)
    # Rounds to the nearest bfloat16: adds half a step, then drops the lower bits. A tie is rounded
    # away from zero, as the bits below the sign hold the magnitude.
    #
    # (With ties to even, a tie that is rounded down would leave low bits of +0x8000. That is one
    # more than int16 holds.)
    upper = (bits + HALF_STEP) >> 16
    # The low bits are what rounding down dropped, or minus what rounding up added. They are between
    # -0x8000 and 0x7fff, which is the range of int16.
    low_bits = bits - (upper << 16)
    low_bits = low_bits.to(torch.int16)
    weight = upper.to(torch.int16)
    return weight.view(torch.bfloat16), low_bits


def _decode_bf16(weight: Tensor, low_bits: Tensor) -> Tensor:
    upper = weight.view(torch.int16)
    upper = upper.to(torch.int32) << 16
    bits = upper + low_bits.to(torch.int32)
    return bits.view(torch.float32)


# A float16 number has 5 bits of exponent and 10 of mantissa, so its bits are not those of the fp32
# number. Here the low bits are the difference between master and weight, in units of 2^-16 ulp of
# the weight.
#
# Normal weights lose nothing. fp32 has 13 bits of mantissa more than float16, so a master is a
# whole number of 2^-13 ulp. (It is one of 2^-14 ulp where the weight was rounded up to a power of
# two, at which ulp doubles.)
#
# Weights under 2^-14 are subnormal: their ulp is always 2^-24, and the unit of the low bits 2^-40.
# Finer bits of the master are lost.
#
# Below, a weight is mantissa * 2^(exponent - 25), with an integer mantissa of up to 11 bits. So one
# ulp is 2^(exponent - 25), and the unit of the low bits, 2^-16 ulp, is 2^(exponent - 41).


def _encode_fp16(master: Tensor) -> tuple[Tensor, Tensor]:
    weight = master.to(torch.float16)
    exponent, mantissa = _fp16_parts(weight)
    # What the rounding has left. The difference of two numbers so close is exact in fp32.
    low_bits = master - mantissa.float() * _power_of_two(exponent - 25)
    # In units of 2^(exponent - 41), which is exact too. So `round` drops nothing but bits that are
    # finer than the unit.
    low_bits = low_bits * _power_of_two(41 - exponent)
    # A tie leaves half an ulp, which is 0x8000 units, or -0x8000. int16 holds no +0x8000, so both
    # lose one unit. Decoding rounds to fp32 and thereby adds that unit again: encoding a master
    # that was decoded changes nothing.
    low_bits = low_bits.round().clamp(-0x7FFF, 0x7FFF)
    return weight, low_bits.to(torch.int16)


def _decode_fp16(weight: Tensor, low_bits: Tensor) -> Tensor:
    exponent, mantissa = _fp16_parts(weight)
    # The master in units of the low bits: an integer of up to 11 + 16 = 27 bits.
    master = (mantissa << 16) + low_bits.to(torch.int32)
    # fp32 holds 24 bits. Any master was an fp32 number, so it has no more, with one exception: a
    # tie that lost a unit. Rounding to 24 bits restores it.
    master = master.float()
    return master * _power_of_two(exponent - 41)


def _fp16_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(exponent, mantissa) of float16 numbers, which are mantissa * 2^(exponent - 25); int32 each.

    The bits of a float16 number are its sign, 5 bits of exponent e and 10 bits of mantissa m:

        e > 0 (normal)       (2^10 + m) * 2^(e - 25)    the leading 1 of the mantissa is not stored
        e = 0 (subnormal)             m * 2^(1 - 25)    there is no leading 1

    `weight.float()` would be a simpler way to the value. But torch.compile removes a cast from fp32
    to float16 and back, as if it changed nothing, and all low bits would be zero.
    """
    bits = weight.view(torch.int16).to(torch.int32)
    exponent = (bits >> 10) & 0b11111
    magnitude = bits & 0b11_1111_1111
    # the leading 1 of normal numbers
    magnitude = magnitude + torch.where(exponent > 0, 1 << 10, 0)
    exponent = exponent.clamp(min=1)
    # The sign is the first bit in int16 and in int32.
    mantissa = torch.where(bits < 0, -magnitude, magnitude)
    return exponent, mantissa


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exactly, for int32 exponents in [-126, 127].

    The bits of an fp32 number are its sign, 8 bits of exponent plus 127, and 23 bits of mantissa.
    """
    bits = (exponent + 127) << 23
    return bits.view(torch.float32)


# ---------------------------------------------------------------- gradients summed in fp32

# The gradient of a row of the embedding is a sum over all tokens of a step that have this id, and
# that of the head a sum over all tokens. A 16-bit sum stops growing once a term is less than half
# an ulp of it: 4,096 equal terms of 0.01 gave 4.26 in bfloat16 instead of 40.9.


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32 for fp16, bf16 and fp32; float64 stays."""
    return torch.promote_types(dtype, torch.float32)


def sum_gradient_in_fp32(weight: Tensor) -> None:
    """Gives a 16-bit parameter an fp32 `.grad`, to which autograd adds fp32 gradients unrounded.

    Without this call autograd rounds what it adds to the parameter's dtype. A parameter that is
    replaced, as `to_empty` does, needs the call again.
    """
    weight.grad_dtype = at_least_fp32(weight.dtype)


def embedding(token_ids: Tensor, weight_VD: Tensor) -> Tensor:
    """The rows of weight at `token_ids` [...], as [..., D]. The weight's gradient is fp32.

    Use it with a weight of `sum_gradient_in_fp32`. On a GPU the order in which the gradient is
    summed may differ from run to run, unless PyTorch's deterministic algorithms are on.
    """
    if weight_VD.dtype == at_least_fp32(weight_VD.dtype):
        return F.embedding(token_ids, weight_VD)
    return _Embedding.apply(token_ids, weight_VD)


class _Embedding(torch.autograd.Function):
    """F.embedding of a 16-bit weight, with an fp32 gradient.

    F.embedding's own gradient is 16-bit. A CPU rounds its sum after every token, a GPU once for
    each micro-batch.
    """

    @staticmethod
    def forward(ctx, token_ids: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(token_ids)
        ctx.num_rows = len(weight_VD)
        return F.embedding(token_ids, weight_VD)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (token_ids,) = ctx.saved_tensors
        # The operator sums in the dtype of its input. So the input is cast to fp32 first.
        grad_weight_VD = torch.ops.aten.embedding_dense_backward(
            grad.float(),
            token_ids,
            ctx.num_rows,
            padding_idx=-1,  # no row is left out
            scale_grad_by_freq=False,
        )
        return None, grad_weight_VD


# ---------------------------------------------------------------- loss scaling


class LossScaler:
    """Dynamic loss scale (Micikevicius et al. 2018, "Mixed Precision Training").

    fp16 rounds gradients under 3e-8 to zero. So the loss is multiplied by a scale, as large as it
    can be before the largest gradients overflow. The optimizers divide gradients by the scale in
    fp32, as they read them.

    (torch.amp.GradScaler would not do. It refuses fp16 gradients, and it divides `.grad` in place,
    which rounds small gradients to zero again.)

    `initial` is the first scale. Where not `enabled` (in other precisions), the scale is always 1.
    """

    MINIMUM = 1.0

    def __init__(
        self,
        initial: float,
        growth_interval: int,
        enabled: bool,
    ):
        self.scale = self.MINIMUM
        if enabled:
            self.scale = initial
        self.growth_interval = growth_interval
        self.enabled = enabled
        self.good_steps = 0  # since the last overflow or growth
        # Overflows in a row at the minimum scale, which cannot be halved
        self.stuck_steps = 0

    def update(self, overflow: bool) -> None:
        """Call once a step.

        An overflow halves the scale. `growth_interval` steps without one double it.
        """
        if overflow:
            self._shrink()
            return
        self.stuck_steps = 0
        self.good_steps += 1
        if self.enabled and self.good_steps >= self.growth_interval:
            self.scale *= 2
            self.good_steps = 0

    def _shrink(self) -> None:
        if self.scale <= self.MINIMUM:
            self.stuck_steps += 1
        else:
            self.stuck_steps = 0
        self.scale = max(self.scale / 2, self.MINIMUM)
        self.good_steps = 0

    def state_dict(self) -> dict:
        return dict(
            scale=self.scale,
            good_steps=self.good_steps,
            stuck_steps=self.stuck_steps,
        )

    def load_state_dict(self, state: dict) -> None:
        self.scale = state["scale"]
        self.good_steps = state["good_steps"]
        self.stuck_steps = state["stuck_steps"]


# ---------------------------------------------------------------- gradient norms


@torch.no_grad()
def gradient_norms(
    parameters: list[Tensor],
    known: dict[Tensor, Tensor] | None = None,
) -> Tensor:
    """L2 norm of each parameter's gradient: fp32 [len(parameters)], on the parameters' device.

    `known` holds norms that have been computed already, by parameter. A parameter without a
    gradient has norm 0. The host does not wait for the GPU.

    An inf or nan in a gradient makes its norm inf or nan, and with it the global norm of all
    gradients. So the global norm is the overflow test too.
    """
    if known is None:
        known = {}
    zero = torch.zeros((), device=parameters[0].device)
    norms = []
    for p in parameters:
        if p in known:
            norms.append(known[p])
        elif p.grad is None:
            norms.append(zero)
        else:
            norms.append(gradient_norm(p.grad))
    return torch.stack(norms)


def gradient_norm(gradient: Tensor) -> Tensor:
    """L2 norm, summed in fp32: in fp16 a sum of squares would overflow at 65,504."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)
