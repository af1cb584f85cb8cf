"""Which files --data names, and which of a folder's files are left out.

What is left out is said by suffix, with counts. Under version 1 of the rules of data (see
config.DATA_RULES) a folder or a glob gives the files that old runs found; old caches and runs
depend on that. Version 2 also leaves out hidden files and folders, and texts about a data set, such
as README.md beside data files. A file that is named by itself is always read.
"""

import collections
import functools
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from config import Config, ExperimentError
from corpus.formats import (
    COMPRESSIONS,
    JSON_SUFFIX,
    PLAIN_SUFFIXES,
    READ_SUFFIXES,
    cannot_read,
    format_of,
    is_compressed,
    open_text,
    suffix_of,
)
from corpus.json_lines import LONG_LINE

SHARD_SUFFIX = ".bin"
# What version 1 of the rules of data reads in a folder or a glob that has any of it.
RULES_1_SUFFIXES = (
    ".txt",
    ".md",
    ".py",
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".parquet",
    SHARD_SUFFIX,
)
# Names of files about a data set or a program. They may have any suffix, or none.
ABOUT_NAMES = re.compile(
    r"(readme|licen[cs]e|notice|copying|citation|changelog|contributing|code_of_conduct)"
    r"([._-].*)?"
)
NAMED_SUFFIXES = 12  # how many suffixes a message names; the others are summed up


@dataclass
class FoundFiles:
    """The files that --data names: those that are read, in reading order, and the others."""

    path: str
    read: list[str]
    # By the reason for which they are left out, a clause that a message has in brackets
    left_out: dict[str, list[str]] = field(default_factory=dict)
    hidden: int = 0  # hidden files and folders, which are left out too

    def leave_out(self, reason: str, files: Iterable[str]) -> None:
        """Moves files from those that are read to those that are left out."""
        unwanted = dict.fromkeys(files)
        if unwanted:
            self.read = [file for file in self.read if file not in unwanted]
            self.left_out.setdefault(reason, []).extend(unwanted)

    def left_out_message(self) -> str:
        """What is left out, by reason and suffix. Empty if that is nothing."""
        parts = []
        for reason, files in self.left_out.items():
            parts.append(f"{count_suffixes(files)} ({reason})")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden files and folders")
        return "; ".join(parts)


def count_suffixes(files: Iterable[str]) -> str:
    """How many files have which suffix: "12 .jsonl.gz, 1 .md". The most frequent come first."""
    counts = collections.Counter(suffix_of(file) or "without suffix" for file in files)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {suffix}" for suffix, count in ordered[:NAMED_SUFFIXES]]
    others = ordered[NAMED_SUFFIXES:]
    if others:
        parts.append(f"{sum(count for _, count in others):,} with {len(others):,} other suffixes")
    return ", ".join(parts)


def find_files(config: Config, path: str, rules: int) -> FoundFiles:
    """The files that a path or a glob names. All that are read are text, or all are token shards.

    Raises ExperimentError if there are none.
    """
    found = FoundFiles(path, [path])
    if os.path.isfile(path):
        found.leave_out("no format that is read", _of_no_format(found.read))
    else:
        _find_several(found, config, rules)
    if not found.read:
        raise ExperimentError(_nothing_to_read_message(found))
    shards = [file for file in found.read if _is_shard(file)]
    texts = [file for file in found.read if not _is_shard(file)]
    if shards and texts:
        raise ExperimentError(
            f"{path} holds both token shards ({shards[0]}) and text ({texts[0]}). "
            "Name one kind with a glob, such as --data 'folder/*.bin'"
        )
    return found


def _find_several(found: FoundFiles, config: Config, rules: int) -> None:
    """Fills in the files of a folder or a glob."""
    is_folder = os.path.isdir(found.path)
    if not is_folder:
        found.read = _glob(found.path)
    elif rules == 1:
        found.read = walk(found.path, ("",), onerror=_raise_cannot_read)
    else:
        hidden: list[str] = []
        found.read = walk(found.path, ("",), onerror=_raise_cannot_read, hidden=hidden)
        found.hidden = len(hidden)
    # A folder of text may also be where runs and the cache write. They are not worth a word.
    cache = os.path.realpath(config.cache_dir)
    found.read = [file for file in found.read if not _made_by_a_run(file, cache)]

    about: list[str] = []
    if is_folder and rules > 1:
        about = [file for file in found.read if _is_about(file)]
        found.leave_out("README, LICENSE and the like", about)
    found.leave_out("no format that is read", _of_no_format(found.read))
    if rules == 1:
        known = [file for file in found.read if file.lower().endswith(RULES_1_SUFFIXES)]
        if known:
            others = set(found.read).difference(known)
            found.leave_out("not read together with the others; name them with a glob", others)
    without_rows = [file for file in found.read if not _may_have_rows(file, config.text_field)]
    found.leave_out(f"no JSON lines with the field {config.text_field!r}", without_rows)
    if about and _about_is_text(found, about):
        readable = set(about).difference(_of_no_format(about))
        del found.left_out["README, LICENSE and the like"]
        unread = set(about).difference(readable)
        # The order is that of the walk.
        found.read = _in_order_of_walk(found, readable)
        if unread:
            found.left_out.setdefault("no format that is read", []).extend(sorted(unread))
