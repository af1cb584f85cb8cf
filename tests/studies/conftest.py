"""Fixtures of the tests of studies."""

from tests.studies.untrained import performed  # noqa: F401
