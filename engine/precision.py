"""What keeps 16-bit training exact: split fp32 master weights, loss scaling, fp32 gradient norms.

A parameter that is stored in 16 bits has an fp32 master all the same: the 16-bit weight is the master rounded, and a
16-bit integer residual in the optimizer's state says how far. Nothing is held twice.
"""

import torch
from torch import Tensor

# ---------------------------------------------------------------- split master weights


def encode_master(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits fp32 masters into a weight of `dtype` (bfloat16 or float16) and an int16 residual.

    bfloat16 is exact: its bits are the upper half of the master's, rounded half up, and the residual is the lower half
    as a signed number. (Ties to even would need a residual of +0x8000, which int16 does not have.)
    float16 counts the residual in 1/2^16 of the weight's unit in the last place: exact for |weight| >= 2^-14, and to
    2^-40 below, where float16 is subnormal.
    """
    if dtype == torch.bfloat16:
        bits = master.view(torch.int32)
        upper = (bits + 0x8000) >> 16
        return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)
    weight = master.to(torch.float16)
    exponent, mantissa = _fp16_parts(weight)
    # +-0x8000 (a tie) is cut to 0x7fff: decoding rounds it back in fp32, and encoding what was decoded changes nothing
    residual = (master - mantissa.float() * _power_of_two(exponent - 25)) * _power_of_two(
        41 - exponent
    )
    return weight, residual.round().clamp(-0x7FFF, 0x7FFF).to(torch.int16)


def decode_master(weight: Tensor, residual: Tensor) -> Tensor:
    """The fp32 masters behind a 16-bit weight and its residual, as a new tensor: the inverse of `encode_master`."""
    if weight.dtype == torch.bfloat16:
        return ((weight.view(torch.int16).to(torch.int32) << 16) + residual.to(torch.int32)).view(
            torch.float32
        )
    exponent, mantissa = _fp16_parts(weight)
    return ((mantissa << 16) + residual.to(torch.int32)).float() * _power_of_two(exponent - 41)


def read_master(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """fp32 master of a piece: a new tensor for a 16-bit weight, the weight itself for an fp32 one."""
    return decode_master(weight, state["residual"]) if "residual" in state else weight


def write_master(master: Tensor, weight: Tensor, state: dict[str, Tensor]) -> None:
    """Stores an updated fp32 master in the piece that it was read from."""
    if "residual" in state:
        master, residual = encode_master(master, weight.dtype)
        state["residual"].copy_(residual)
    weight.copy_(master)


def _fp16_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e, m) of float16 numbers m 2^(e - 25), int32; e is at least 1 (subnormals). From the bits, because torch.compile
    takes a cast to float16 and back for nothing to be done, and the residual would be lost."""
    bits = weight.view(torch.int16).to(torch.int32)
    field = (bits >> 10) & 31
    mantissa = (bits & 0x3FF) + torch.where(field > 0, 0x400, 0)
    return field.clamp(min=1), torch.where(bits < 0, -mantissa, mantissa)


def _power_of_two(exponent: Tensor) -> Tensor:
    """fp32 2^exponent of int32 exponents in [-126, 127], exactly."""
    return ((exponent + 127) << 23).view(torch.float32)


# ---------------------------------------------------------------- loss scaling


class LossScaler:
    """Dynamic loss scale (Micikevicius et al. 2018, "Mixed Precision Training").

    torch.amp.GradScaler refuses fp16 gradients and rewrites `.grad` to unscale it, which rounds small ones to zero; here
    the optimizer divides by the scale in fp32 as it reads a gradient. Outside fp16 the scale is 1 and stays 1.
    """

    MINIMUM = 1.0

    def __init__(self, initial: float, growth_interval: int, enabled: bool):
        self.scale = initial if enabled else self.MINIMUM
        self.growth_interval, self.enabled = growth_interval, enabled
        self.good_steps = 0  # since the last overflow or growth
        self.stuck_steps = (
            0  # overflows in a row at the minimum scale, where halving no longer helps
        )

    def update(self, overflow: bool) -> None:
        """Call once a step: halves the scale after an overflow, doubles it after `growth_interval` good steps."""
        if overflow:
            self.stuck_steps = self.stuck_steps + 1 if self.scale <= self.MINIMUM else 0
            self.scale = max(self.scale / 2, self.MINIMUM)
            self.good_steps = 0
            return
        self.stuck_steps = 0
        self.good_steps += 1
        if self.enabled and self.good_steps >= self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict:
        return dict(scale=self.scale, good_steps=self.good_steps, stuck_steps=self.stuck_steps)

    def load_state_dict(self, state: dict) -> None:
        self.scale, self.good_steps, self.stuck_steps = (
            state["scale"],
            state["good_steps"],
            state["stuck_steps"],
        )


@torch.no_grad()
def gradient_norms(parameters: list[Tensor], known: dict[Tensor, Tensor] = {}) -> Tensor:
    """L2 norm of each parameter's gradient, summed in fp32 (fp16 sums overflow), [len(parameters)] on their device; those in
    `known` are taken from there.

    Any inf or nan in a gradient shows in its norm, so the global norm is the overflow test too. No host synchronisation.
    """
    zero = torch.zeros((), device=parameters[0].device)
    return torch.stack(
        [
            known[p] if p in known else zero if p.grad is None else gradient_norm(p.grad)
            for p in parameters
        ]
    )


def gradient_norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)
