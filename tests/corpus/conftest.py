"""Fixtures that the tests of the corpus share."""

from pathlib import Path

import pytest

from tests.corpus.stories import STORIES


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 short documents as .txt files."""
    text = tmp_path / "text"
    text.mkdir()
    for number, story in enumerate(STORIES):
        (text / f"{number:02}.txt").write_text(story)
    return text
