"""The analysis of what experts do: kinds of tokens, and what the expert says of them."""

import numpy as np
import pytest

from studies import experts as experts_of
from studies.experts import KINDS


def test_kinds_of_characters():
    def kinds(text, suffix):
        return [
            KINDS[k] if k != experts_of.NONE else ""
            for k in experts_of.character_kinds(text, suffix)
        ]

    assert kinds("if x1:  # so\n", ".py") == ["keyword"] * 2 + [""] + ["identifier"] * 2 + [
        "operator"
    ] + [""] * 2 + ["comment"] * 4 + [""]
    assert set(kinds("#include <math.h>\n", ".h")) <= {"C code", ""}
    assert set(kinds("/* if */", ".h")) <= {"C comment", ""} and set(kinds("if", "")) == {"prose"}


def test_information_of_experts_that_read_the_kind():
    """Experts that are the kind say all of it; of the kinds moved by one token they say nothing, nor does the shuffled baseline."""
    kinds = np.random.default_rng(0).integers(0, 4, 20_000).astype(np.uint8)
    chosen = np.stack([kinds, kinds], 1)[None]
    there, moved = (
        experts_of.information(chosen, labels, 4, 4) for labels in (kinds, np.roll(kinds, 1))
    )
    assert (
        there["bits"][0] == pytest.approx(2, abs=0.01)
        and moved["bits"][0] < 0.01 > there["shuffled_most"][0]
    )
    labels = np.where(np.arange(20_000) % 5, kinds, experts_of.NONE).astype(np.uint8)
    counts = experts_of.table(chosen[0], labels, 4, 4)
    assert (counts == 2 * np.diag(np.bincount(kinds[labels != experts_of.NONE]))).all(), (
        "end-of-text is left out"
    )
