"""Fixtures that the tests of the corpus share."""

import os
from pathlib import Path

import pytest

from corpus import token_writer
from tests.corpus.stories import STORIES


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 short documents as .txt files."""
    text = tmp_path / "text"
    text.mkdir()
    for number, story in enumerate(STORIES):
        (text / f"{number:02}.txt").write_text(story)
    return text


@pytest.fixture
def encoded(monkeypatch):
    """Every text that is tokenized from now on, in this process."""
    texts = []
    item = token_writer.BatchEncoder.__getitem__

    def noting(self, batch):
        texts.extend(batch.texts)
        return item(self, batch)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [])  # no workers
    monkeypatch.setattr(token_writer.BatchEncoder, "__getitem__", noting)
    return texts
