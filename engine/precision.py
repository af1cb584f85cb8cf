"""What keeps training in 16 bits exact: split fp32 masters, loss scaling, fp32 gradient norms.

An update is often smaller than half a unit in the last place of a 16-bit weight, where rounding
would lose it. So every 16-bit weight has an fp32 master. It is not stored beside the weight, as
its upper bits are in the weight already: the weight is the master rounded, and 16 low bits in the
optimizer's state (the key "residual") hold the rest. Weight and low bits take the 4 bytes of an
fp32 number, instead of 6.
"""

import torch
from torch import Tensor

# ---------------------------------------------------------------- split master weights


def encode_master(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits fp32 masters into a weight of `dtype` (bfloat16 or float16) and low bits (int16).

    bfloat16 is exact. float16 is exact for |weight| >= 2^-14, its smallest normal number; below,
    the master is kept to 2^-40 at worst.
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
    """The fp32 masters of a parameter or a part of it.

    A new tensor for a 16-bit weight; an fp32 weight is its own master.
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


# bfloat16 is the upper half of an fp32 number: sign, the 8 bits of the exponent, 7 bits of the
# mantissa. So both formats are handled as integers, which makes the split exact.


def _encode_bf16(master: Tensor) -> tuple[Tensor, Tensor]:
    bits = master.view(torch.int32)
    # Rounds to the nearest: 0x8000 is half of the upper half's unit. A tie is rounded away from
    # zero, as bits hold the magnitude. (With ties to even, a tie that is rounded down would leave
    # low bits of +0x8000, one more than int16 holds.)
    upper = (bits + 0x8000) >> 16
    # What the rounding has left or added: from -0x8000 to 0x7fff, which is the range of int16
    low_bits = (bits - (upper << 16)).to(torch.int16)
    return upper.to(torch.int16).view(torch.bfloat16), low_bits


def _decode_bf16(weight: Tensor, low_bits: Tensor) -> Tensor:
    upper = weight.view(torch.int16).to(torch.int32) << 16
    return (upper + low_bits.to(torch.int32)).view(torch.float32)


# float16 has 5 bits of exponent and 10 of mantissa, so its bits are not those of the fp32 number.
# The low bits count in units of 2^-16 ulp, the weight's unit in the last place. fp32 has 13 bits
# of mantissa more than float16, so a master is a whole number of 2^-13 ulp (of 2^-14 if the weight
# was rounded up to a power of two, where ulp doubles): nothing is lost. Below 2^-14 float16 is
# subnormal and its ulp is fixed at 2^-24, so the unit is 2^-40: finer bits of the master are lost.
#
# With the weight written as mantissa 2^(exponent - 25), ulp is 2^(exponent - 25), and the unit of
# the low bits is 2^(exponent - 41).


def _encode_fp16(master: Tensor) -> tuple[Tensor, Tensor]:
    weight = master.to(torch.float16)
    exponent, mantissa = _fp16_parts(weight)
    # What the rounding has left, in the unit of the low bits. Both factors are powers of two and
    # the difference is exact, so the only rounding is of bits finer than the unit.
    low_bits = (master - mantissa.float() * _power_of_two(exponent - 25)) * _power_of_two(
        41 - exponent
    )
    # Half an ulp either way is +-0x8000; +0x8000 is one more than int16 holds, so both are cut by
    # one. Decoding rounds the cut back in fp32, and encoding what was decoded changes nothing.
    return weight, low_bits.round().clamp(-0x7FFF, 0x7FFF).to(torch.int16)


def _decode_fp16(weight: Tensor, low_bits: Tensor) -> Tensor:
    exponent, mantissa = _fp16_parts(weight)
    # The master in units of the low bits: 11 + 16 bits, which `.float()` rounds to fp32's 24.
    # Only a tie that was cut has bits to round: any other master was an fp32 number.
    return ((mantissa << 16) + low_bits.to(torch.int32)).float() * _power_of_two(exponent - 41)


def _fp16_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(exponent, mantissa), int32, of float16 numbers mantissa 2^(exponent - 25).

    They are read from the bits. `weight.float()` would be simpler, but torch.compile takes a cast
    to float16 and back for nothing to be done: the low bits would be zero.
    """
    bits = weight.view(torch.int16).to(torch.int32)
    field = (bits >> 10) & 31
    # A normal number has an implicit leading 1. A subnormal one (field 0) has none, and the ulp of
    # field 1.
    mantissa = (bits & 0x3FF) + torch.where(field > 0, 0x400, 0)
    return field.clamp(min=1), torch.where(bits < 0, -mantissa, mantissa)


def _power_of_two(exponent: Tensor) -> Tensor:
    """fp32 2^exponent of int32 exponents in [-126, 127], exactly, made from its bits."""
    return ((exponent + 127) << 23).view(torch.float32)


# ---------------------------------------------------------------- loss scaling


class LossScaler:
    """Dynamic loss scale (Micikevicius et al. 2018, "Mixed Precision Training").

    fp16 rounds gradients under 3e-8 to zero. So the loss is multiplied by a scale, as large as the
    largest gradients allow, and the optimizer divides by it, in fp32, as it reads a gradient.
    (torch.amp.GradScaler refuses fp16 gradients. It also rewrites `.grad` to unscale it, which
    rounds small ones to zero.)

    Not `enabled`, outside fp16, the scale is 1 and stays 1.
    """

    MINIMUM = 1.0

    def __init__(self, initial: float, growth_interval: int, enabled: bool):
        self.scale = initial if enabled else self.MINIMUM
        self.growth_interval = growth_interval
        self.enabled = enabled
        self.good_steps = 0  # since the last overflow or growth
        # Overflows in a row at the minimum scale, where halving no longer helps
        self.stuck_steps = 0

    def update(self, overflow: bool) -> None:
        """Call once a step: halves the scale after an overflow, doubles it after `growth_interval`
        steps without one."""
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
        return dict(scale=self.scale, good_steps=self.good_steps, stuck_steps=self.stuck_steps)

    def load_state_dict(self, state: dict) -> None:
        self.scale = state["scale"]
        self.good_steps = state["good_steps"]
        self.stuck_steps = state["stuck_steps"]


# ---------------------------------------------------------------- gradient norms


@torch.no_grad()
def gradient_norms(parameters: list[Tensor], known: dict[Tensor, Tensor] | None = None) -> Tensor:
    """L2 norm of each parameter's gradient, [len(parameters)], fp32, on the parameters' device.

    Norms in `known`, by parameter, are taken from there; a parameter without a gradient has norm 0.

    Any inf or nan in a gradient shows in its norm, so the global norm is the overflow test too.
    There is no host synchronisation.
    """
    known = known or {}
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
    """L2 norm, summed in fp32: a sum of squares of fp16 numbers would overflow at 65,504."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)
