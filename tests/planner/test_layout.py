"""Numbers in short, and lines that fit a terminal."""

import io

import pytest

from planner import layout
from planner.layout import (
    command_lines,
    fitted,
    format_count,
    format_duration,
    format_rate,
    format_size,
    wrapped,
)


def test_large_numbers_in_words():
    assert [format_count(n) for n in (17_966_970_880, 4_460_000, 1_920)] == [
        "17.97B",
        "4.46M",
        "1,920",
    ]


def test_a_duration_has_a_unit_that_fits_it():
    assert [format_duration(seconds) for seconds in (0.04, 45, 150, 1800, 5400, 3600 * 1234)] == [
        "0.0 seconds",
        "45 seconds",
        "2.5 minutes",
        "30 minutes",
        "1.5 hours",
        "1,234 hours",
    ]


@pytest.mark.parametrize(
    "gb, text",
    [
        (134.81, "134.81 GB"),
        (0.1, "0.10 GB"),
        (0.0996, "100 MB"),
        (0.035, "35 MB"),
        (0.0012, "1.2 MB"),
        (0, "0"),
        (-57.03, "-57.03 GB"),
        (-0.05, "-50 MB"),
    ],
)
def test_sizes_under_a_tenth_of_a_gb_are_in_mb(gb, text):
    assert format_size(gb, 2) == text


def test_learning_rates():
    assert [format_rate(rate) for rate in (3e-4, 0.02, 0, 1.25)] == [
        "3.0e-4",
        "2.0e-2",
        "0.0e0",
        "1.2e0",
    ]


OPTIONS = "--batch_size 2 --gradient_accumulation_steps 16 --activation_checkpointing none"


def test_lines_break_between_words():
    path = "/a/path/without/a/space/" + 10 * "which-is-longer-than-a-line/"
    text = f"short\n  a line that is {'very ' * 20}long\n{path} is a path"
    lines = wrapped(text).split("\n")
    assert lines[0] == "short"
    assert lines[-2:] == [path, "is a path"]
    assert all(line.startswith("  ") and len(line) <= 80 for line in lines[1:-2])
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())


def test_an_option_stays_with_its_value():
    for columns in range(40, 80):
        for line in wrapped(OPTIONS, columns).split("\n"):
            assert line.startswith("--") and len(line) <= columns
            assert len(line.split()) % 2 == 0


def test_a_shell_reads_broken_options_as_one_line():
    text = command_lines(OPTIONS, "  ", columns=51)
    assert text == (
        "  --batch_size 2 --gradient_accumulation_steps 16 \\\n  --activation_checkpointing none"
    )


def test_only_a_terminal_breaks_lines(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    stream = io.StringIO()
    text = "a line of more columns than the terminal has"
    assert fitted(text, stream) == text
    stream.isatty = lambda: True
    layout.say(text, stream)
    assert stream.getvalue() == "a line of more columns than\nthe terminal has\n"
