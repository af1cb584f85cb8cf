"""Fixtures of the tests of studies."""

import pytest

from studies import figures
from tests.studies.untrained import performed  # noqa: F401


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Rendering a figure takes a second. Tests that look at one have "draw" in their name; for the
    others the figure is made and not rendered."""
    if "draw" not in request.node.name:
        monkeypatch.setattr(figures, "write_figure", lambda figure, path: path.write_text("figure"))
