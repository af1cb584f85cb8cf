"""Measurements of parts need a GPU: here they get as far as their model."""

from pathlib import Path

import pytest

from benchmarks import parts
from config import PRESETS


class ReachedItsModel(Exception):
    pass


def stop(*_arguments) -> None:
    raise ReachedItsModel


@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("measure", [parts.muon_step_18b, parts.moe_vs_dense])
def test_a_measurement_has_its_configuration(measure, precision, monkeypatch):
    if precision:  # also if the preset comes to name what the measurement sets
        monkeypatch.setitem(PRESETS["18b"], "precision", precision)
    monkeypatch.setattr(parts, "build_model", stop)
    monkeypatch.setattr(parts, "compile_with_barriers", stop)
    with pytest.raises(ReachedItsModel):
        measure(Path("nowhere"))


def test_the_configuration_of_the_measurements_is_18b_in_bf16():
    config = parts.config_18b(n_layers=4)
    assert (config.d_model, config.n_layers, config.precision) == (4096, 4, "bf16")
