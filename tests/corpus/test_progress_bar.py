"""The progress bar of a terminal, and the lines that stand for it elsewhere."""

import io
import re
import sys

import pytest

from corpus.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch):
    """shown(stream) makes a stream stderr, and returns it."""

    def replace(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


def let_pass(bar, seconds):
    """Lets a bar believe that it began, and printed its latest line, so much earlier."""
    bar.start -= seconds
    bar.latest_line -= seconds


def test_a_terminal_has_a_bar_with_documents_a_second_and_the_time_left(shown):
    terminal = shown(Terminal())
    with ProgressBar("tokenizing", 4000, done=1000) as bar:
        let_pass(bar, 10)
        bar.bar.start_t -= 10
        bar.add(1000, 20)
        text = str(bar.bar)
    assert (
        "tokenizing:  50%" in text
        and "2.00k/4.00k" in text
        and re.search(r"00:10<00:(19|20)", text)
    )
    assert re.search(r"(100|99\.\d+)char/s, 2 documents/s", text), text
    assert "\r" in terminal.getvalue()


def test_elsewhere_there_is_a_line_a_minute(shown):
    file = shown(io.StringIO())
    with ProgressBar("tokenizing", 400_000, done=100_000) as bar:
        bar.add(100_000, 20)
        let_pass(bar, 59)
        bar.add(0)
        assert file.getvalue() == ""
        let_pass(bar, 1)
        bar.add(20_000, 10)
        bar.add(30_000)
        let_pass(bar, 60)
        bar.add(150_000)
        let_pass(bar, 60)
        bar.add(20_000)
    first, second, third = file.getvalue().splitlines()
    assert first == (
        "tokenizing: 55% of 400,000 characters, 2,000 characters/s, 0 documents/s, 1.5 minutes left"
    )
    assert second == (
        "tokenizing: 100% of 400,000 characters, 2,500 characters/s, 0 documents/s, "
        "0.0 seconds left"
    )
    # The total was an estimate.
    assert third == "tokenizing: 420,000 characters, 1,778 characters/s, 0 documents/s"
    assert "\r" not in file.getvalue()


def test_without_a_total_a_line_says_what_is_done(shown):
    file = shown(io.StringIO())
    with ProgressBar("checking", unit="B") as bar:
        let_pass(bar, 60)
        bar.add(6_000_000)
    assert file.getvalue() == "checking: 6.00M bytes, 100,000 bytes/s\n"


def test_a_process_without_stderr_goes_on(shown):
    shown(None)
    with ProgressBar("checking", 10) as bar:
        bar.add(10)
