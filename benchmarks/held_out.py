"""Measures how much of the held-out text of the built-in corpora stands in the training text too.

    python -m benchmarks.held_out

For `python` and `installed`, and for each version of the rules of data: the share of the held-out
characters that belong to a document of which other chunks are trained on, and the share that stand
in lines of LEAST_LINE characters or more which are a line of the training text, word for word.
Shorter lines, such as `import os`, are alike in all programs.

Writes benchmarks/results/held_out_cpu.json. It reads `installed` eight times, which takes minutes.
"""

import sys
import time
from array import array
from collections.abc import Iterator
from typing import NamedTuple

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

import numpy as np
import torch

from benchmarks.result_files import write
from cli import exit_code
from config import KNOWN_DATA_RULES, Config
from corpus import text_scan
from corpus.sources import BUILT_IN, Source, open_source
from corpus.split import document_keys
from record.results import environment

LEAST_LINE = 40  # characters, without the white space around them


class Line(NamedTuple):
    number: int  # the hash of the line without the white space around it
    characters: int  # with this white space
    held_out: bool


def measure(data: str, rules: int) -> dict:
    """What is held out of a built-in corpus by one version of the rules: the result's details."""
    config = Config(data=data)
    source = open_source(config, rules)
    start = time.perf_counter()
    found = text_scan.read_text(source, to_end=True)
    seconds = time.perf_counter() - start
    held_out = text_scan.held_out_chunks(source, found, config.validation_fraction, rules)
    lengths = found.lengths
    documents = document_keys(found.chunks)
    # Held-out chunks of a document of which other chunks are trained on.
    is_split = np.isin(documents, documents[~held_out]) & held_out
    repeated = repeated_characters(source, held_out)
    characters = int(lengths[held_out].sum())
    return dict(
        description=source.description,
        characters=int(lengths.sum()),
        held_out_share=characters / int(lengths.sum()),
        split_documents_share=int(lengths[is_split].sum()) / characters,
        repeated_lines_share=repeated / characters,
        reading_seconds=seconds,
    )


def repeated_characters(source: Source, held_out: np.ndarray) -> int:
    """How many held-out characters stand in long lines that are lines of the training text too."""
    trained = array("q")
    held_out_lines = []
    for line in long_lines(source, held_out):
        if line.held_out:
            held_out_lines.append(line)
        else:
            trained.append(line.number)
    numbers = np.array([line.number for line in held_out_lines])
    characters = np.array([line.characters for line in held_out_lines])
    is_trained_on = np.isin(numbers, np.frombuffer(trained, np.int64))
    return int(characters[is_trained_on].sum())


def long_lines(source: Source, held_out: np.ndarray) -> Iterator[Line]:
    """Yields the lines of LEAST_LINE characters or more. `held_out` is bool [chunks]."""
    for (text, _), is_held_out in zip(source.chunks(), held_out.tolist()):
        for line in text.splitlines(keepends=True):
            words = line.strip()
            if len(words) >= LEAST_LINE:
                yield Line(hash(words), len(line), is_held_out)


def main(_argv: list[str]) -> None:
    """Writes the measurements of each corpus and version. The figure is of `installed`.

    It compares the share of repeated lines in version 2 with that in version 1.
    """
    details = {}
    for data in BUILT_IN:
        for rules in KNOWN_DATA_RULES:
            found = measure(data, rules)
            details[f"{data}, version {rules}"] = found
            print(f"{data}, version {rules}: {found}", file=sys.stderr, flush=True)
    before = details["installed, version 1"]["repeated_lines_share"]
    after = details["installed, version 2"]["repeated_lines_share"]
    write(
        "held_out",
        value=after / before,
        unit="times the repeated lines of version 1 in the held-out text of `installed`",
        repetitions=1,
        machine=environment(torch.device("cpu")),
        details=details,
        command="python -m benchmarks.held_out",
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
