import math

import pytest
import torch

import muon
from conftest import tiny_config
from model import MoETransformer
from muon import NEWTON_SCHULZ, AdamW, Muon, newton_schulz, split_parameters
from precision import OptimizerState, decode_master

FORMATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"wide": (6, 10), "tall": (12, 4), "bank": (3, 2, 6, 10)}


def parameters(dtype=torch.float32, **shapes):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in (shapes or SHAPES).items()}


def set_gradients(named, step=0, factor=1.0, dtype=None):
    """Gaussian gradients, the same for the same step, rounded to `dtype` before they take the parameter's own."""
    for i, p in enumerate(named.values()):
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        p.grad = (gradient * factor).to(dtype or p.dtype).to(p.dtype)


def make(kind, named, offload=False):
    return Muon(named, 0.9, 0.1, offload) if kind is Muon else AdamW(named, 0.9, 0.95, 1e-8, 0.1, offload)


def train(optimizer, named, steps, lr=0.02, dtype=None):
    for step in range(steps):
        set_gradients(named, step, dtype=dtype)
        optimizer.step(lr * (1 + step), 1.0)


def snapshot(optimizer, named):
    """Copies of all weights and state tensors by name."""
    tensors = {name: p.detach() for name, p in named.items()}
    tensors |= {f"{name}/{key}": t for name, state in optimizer.state.tensors.items() for key, t in state.items()}
    return {name: t.clone() for name, t in tensors.items()}


def same(a: dict, b: dict) -> bool:
    """Equal to the bit, except that NaN, which no test expects, equals nothing."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def masters(optimizer, named):
    return {name: decode_master(p.detach(), optimizer.state.tensors[name]["residual"]) for name, p in named.items()}


# ---------------------------------------------------------------- Newton-Schulz

def with_spectrum(singular_values, rows, columns):
    """U, V of a random matrix: U diag(s) V^T is [rows, columns]."""
    u, v = (torch.linalg.qr(torch.randn(n, len(singular_values), dtype=torch.float64))[0] for n in (rows, columns))
    return u, v


SPECTRA = {"flat": torch.ones(24), "over 1e3": torch.logspace(0, -3, 24), "rank 12": torch.cat([torch.ones(12), torch.zeros(12)])}
BOUNDS = {torch.float64: {"flat": 1e-6, "over 1e3": 1e-5, "rank 12": 1e-6}, torch.float32: {"flat": 1e-5, "over 1e3": 1e-4, "rank 12": 1e-4},
          torch.float16: {"flat": 1e-9, "over 1e3": 1e-9, "rank 12": 1e-9}, torch.bfloat16: {"flat": 1e-9, "over 1e3": 1e-9, "rank 12": 1e-9}}


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_newton_schulz_maps_singular_values_by_its_polynomial(dtype, spectrum, shape):
    s = SPECTRA[spectrum].double()
    u, v = with_spectrum(s, *shape)
    mapped = s / s.norm()
    for a, b, c in NEWTON_SCHULZ:
        mapped = a * mapped + b * mapped ** 3 + c * mapped ** 5
    found = newton_schulz((u * s @ v.T).float() if dtype != torch.float64 else u * s @ v.T, dtype)
    assert found.dtype == dtype and found.shape == shape
    error = torch.linalg.matrix_norm(found.double() - u * mapped @ v.T, 2)
    assert error < BOUNDS[dtype][spectrum], error.item()
