"""Which files --data names, and which of a folder's files are left out.

What is left out is said by suffix, with counts. Under version 1 of the rules of data (see
config.DATA_RULES) a folder or a glob gives the files that old runs found; old caches and runs
depend on that. Version 2 also leaves out hidden files and folders, and texts about a data set, such
as README.md beside data files. A file that is named by itself is always read.
"""

import collections
import functools
import glob
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from config import Config, ExperimentError
from corpus.formats import (
    COMPRESSIONS,
    JSON_SUFFIX,
    PLAIN_SUFFIXES,
    READ_SUFFIXES,
    cannot_read,
    format_of,
    has_json_lines,
    is_compressed,
    suffix_of,
)
from planner.layout import quoted

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


NO_FORMAT = "no format that is read here"
ABOUT = "README, LICENSE and the like"
OLD_RULES = "not read beside the others"
NO_FILE = "links to what is not there, pipes and the like"


@dataclass(frozen=True)
class FoundFiles:
    """The files that a path names: those that are read, in reading order, and the others."""

    path: str
    read: list[str]
    left_out: dict[str, str]  # why each of the other files is not read
    hidden: int  # hidden files and folders; not even their names are looked at

    def left_out_message(self) -> str:
        """What is left out, by reason and by suffix. Empty if that is nothing."""
        files_of_reason = collections.defaultdict(list)
        for file, reason in self.left_out.items():
            files_of_reason[reason].append(file)
        parts = []
        for reason, files in files_of_reason.items():
            parts.append(f"{count_suffixes(files)} ({reason})")
        if self.hidden:
            parts.append(f"{self.hidden:,} hidden")
        return ", ".join(parts)


def count_suffixes(files: Iterable[str]) -> str:
    """How many files have which suffix: "12 .jsonl.gz, 1 .md". The most frequent come first."""
    counts = collections.Counter(quoted(suffix_of(file)) or "without suffix" for file in files)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {suffix}" for suffix, count in ordered[:NAMED_SUFFIXES]]
    others = ordered[NAMED_SUFFIXES:]
    if others:
        num_others = sum(count for _, count in others)
        parts.append(f"{num_others:,} of {len(others):,} other suffixes")
    return ", ".join(parts)


def find_files(config: Config, path: str, rules: int) -> FoundFiles:
    """The files that a path or a glob names. All that are read are text, or all are token shards.

    `rules` is the version of the rules of data. Raises ExperimentError if there is nothing to read.
    """
    is_file = os.path.isfile(path)
    is_folder = os.path.isdir(path)
    hidden: list[str] = []
    no_files: list[str] = []
    if is_file:
        files = [path]
    elif not is_folder:
        files = _glob(path, no_files)
    elif rules == 1:
        files = walk(path, ("",), onerror=_raise_cannot_read)
    else:
        files = walk(path, ("",), onerror=_raise_cannot_read, hidden=hidden, no_files=no_files)
    # A folder of text may also be where runs and the cache write. A file named by itself is meant.
    if not is_file:
        cache = os.path.realpath(config.cache_dir)
        files = [file for file in files if not _made_by_a_run(file, cache)]

    left_out = dict.fromkeys(no_files, NO_FILE)
    for file in files:
        if not _has_known_format(file):
            left_out[file] = NO_FORMAT
    if rules == 1:
        left_out |= _unknown_to_rules_1(files, left_out)
    if not is_file:
        left_out |= _without_rows(files, left_out, config.text_field)
    if is_folder and rules > 1:
        left_out |= _about_the_others(files, left_out)
    read = [file for file in files if file not in left_out]
    found = FoundFiles(path, read, left_out, len(hidden))
    if not read:
        raise ExperimentError(nothing_to_read_message(found))
    _check_one_kind(found)
    return found


def _has_known_format(path: str) -> bool:
    return format_of(path) is not None or is_shard(path)


def is_shard(path: str) -> bool:
    return path.lower().endswith(SHARD_SUFFIX)


def _unknown_to_rules_1(files: list[str], left_out: dict[str, str]) -> dict[str, str]:
    """The files that version 1 of the rules does not read, because there are others that it reads.

    Old runs read those others alone, and a run that is resumed must find the same text.
    """
    known = {file for file in files if file.lower().endswith(RULES_1_SUFFIXES)}
    if not known:
        return {}
    return {file: OLD_RULES for file in files if file not in known and file not in left_out}


def _without_rows(files: list[str], left_out: dict[str, str], text_field: str) -> dict[str, str]:
    """The .json files that do not have JSON lines: settings, lists and the like."""
    reason = f"no JSON lines with the field {text_field!r}"
    found = {}
    for file in files:
        is_json = format_of(file) == JSON_SUFFIX and file not in left_out
        if is_json and not has_json_lines(file, text_field):
            found[file] = reason
    return found


def _about_the_others(files: list[str], left_out: dict[str, str]) -> dict[str, str]:
    """README, LICENSE and the like, where they are not the text themselves.

    Beside data they only say what it is. In a folder of source code or of notes, a README is a text
    like the others. Where nothing but them is left, they are the text, unless there are other files
    that cannot be read: then the data may be in these.
    """
    about = [file for file in files if _is_about(file)]
    texts = [file for file in files if file not in left_out and not _is_about(file)]
    unread = [file for file in left_out if not _is_about(file)]
    has_data = any(_is_data(file) for file in texts)
    if has_data or (unread and not texts):
        return dict.fromkeys(about, ABOUT)
    return {}


def _is_about(path: str) -> bool:
    """Whether the file is about a data set or a program, by its name. Rows are always data."""
    name = os.path.basename(path).lower()
    kind = format_of(path)
    is_text = kind is None or kind in PLAIN_SUFFIXES
    return is_text and not is_shard(path) and ABOUT_NAMES.fullmatch(name) is not None


def _is_data(path: str) -> bool:
    """Whether the file is more likely data than source code or a note."""
    return is_compressed(path) or format_of(path) not in (".md", ".py")


def _check_one_kind(found: FoundFiles) -> None:
    shards = [file for file in found.read if is_shard(file)]
    texts = [file for file in found.read if not is_shard(file)]
    if shards and texts:
        raise ExperimentError(
            f"{quoted(found.path)} holds both token shards ({quoted(shards[0])}) and text "
            f"({quoted(texts[0])}). "
            "Name one kind with a glob, such as --data 'folder/*.bin'"
        )


def nothing_to_read_message(found: FoundFiles) -> str:
    left_out = ""
    if found.left_out or found.hidden:
        left_out = f" It has {found.left_out_message()}."
    return (
        f"no text to read in {quoted(found.path)}.{left_out} It must be or hold "
        f"{' '.join(READ_SUFFIXES)} files (all but .parquet also with {' or '.join(COMPRESSIONS)}) "
        f"or {SHARD_SUFFIX} files. Convert it, name the files themselves with a glob, or correct "
        "--data or --text_field"
    )


# --- folders and globs


def walk(
    root: str,
    suffixes: tuple[str, ...],
    skip: tuple[str, ...] = (),
    onerror: Callable[[OSError], None] | None = None,
    hidden: list[str] | None = None,
    no_files: list[str] | None = None,
) -> list[str]:
    """Files under `root` with one of the suffixes, in an order that only their paths decide.

    Links to folders are followed; a folder that several paths lead to is read once. A folder that
    cannot be read is left out, or `onerror` is called with the error. If `hidden` is a list, files
    and folders whose name begins with a dot are added to it instead, and such folders not entered.
    A name that is no file, such as a link whose target is gone, is left out, or added to `no_files`
    if that is a list.
    """
    found = []
    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=onerror, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name not in skip)
        if hidden is not None:
            hidden += [name for name in (*subfolders, *names) if name.startswith(".")]
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".")]
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not name.lower().endswith(suffixes):
                continue
            if os.path.isfile(path):
                found.append(path)
            elif no_files is not None:
                no_files.append(path)
    return found


def _raise_cannot_read(error: OSError) -> None:
    raise cannot_read(error.filename, error) from error


def _glob(pattern: str, no_files: list[str]) -> list[str]:
    """The sorted files of a glob, each once. What is neither file nor folder goes to `no_files`.

    `**` follows links to folders even in a circle, so a file may be found by several paths; the
    shortest one stays. Files are the same if they have one name in one real folder.
    """
    found = []
    for path in glob.glob(pattern, recursive=True):
        if os.path.isfile(path):
            found.append(path)
        elif not os.path.isdir(path):
            no_files.append(path)
    # The longest first, so that a shorter path of the same file replaces it.
    found.sort(key=lambda path: (-len(path), path))
    shortest = {}
    for path in found:
        real_folder = os.path.realpath(os.path.dirname(path))
        shortest[real_folder, os.path.basename(path)] = path
    return sorted(shortest.values())


def _made_by_a_run(path: str, cache: str) -> bool:
    """Whether this program wrote the file: metrics of a run, or a file of the corpus cache.

    `cache` is the real path of the cache's folder.
    """
    folder, name = os.path.split(path)
    if name == "metrics.jsonl" and os.path.exists(os.path.join(folder, "run.json")):
        return True
    real_path = os.path.join(_real_folder(folder), name)
    if os.path.islink(real_path):
        real_path = os.path.realpath(real_path)
    return os.path.commonpath([cache, real_path]) == cache


@functools.lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    """The folder without links. Resolving them for each of its files would take much longer."""
    return os.path.realpath(folder)
