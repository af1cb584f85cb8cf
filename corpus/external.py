"""TODO external"""

import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from config import Config, ExperimentError
from corpus.shards import (
    HEADER_BYTES,
    MAGIC,
    Bar,
    count_tokens,
    entropy,
    map_tokens,
    read_header,
    replace_file,
)
from corpus.tokenizer import load_tokenizer, sha256, vocabulary

# Shards of llm.c (dev/data/data_common.py; modded-nanogpt's are the first kind) begin with 256 int32, of which magic,
# version and the number of tokens are the first three.
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: version, type of a token
LLM_C_EVALUATION = 20240522


def open_external_shard(path) -> np.ndarray:
    """Maps a .bin file of nanoGPT (uint16 without a header), modded-nanogpt or llm.c into memory, uint16 or uint32 [tokens].
    Raises ExperimentError when it is not whole."""
    try:
        header, size = read_header(path)
    except OSError as error:
        raise ExperimentError(
            f"cannot read {path}: {error.strerror}. Mend it or take it out of --data"
        ) from error
    magic, version, count = np.frombuffer(header[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic not in LLM_C and magic != LLM_C_EVALUATION and not header.startswith(MAGIC):
        if size % 2 or not size:
            raise ExperimentError(
                f"{path} is cut short: {size:,} bytes are no whole number of uint16 tokens. Make or download "
                "it again"
            )
        return map_tokens(path, "<u2", 0, size // 2)
    if header.startswith(MAGIC):
        raise ExperimentError(
            f"{path} belongs to this program's cache. Give --data and --tokenizer as they were when it was "
            "made, and it is used again"
        )
    if magic == LLM_C_EVALUATION:
        raise ExperimentError(
            f"{path} holds llm.c's multiple-choice questions, not text. Take it out of --data"
        )
    known, dtype = LLM_C[magic]
    if version != known:
        raise ExperimentError(
            f"{path} has llm.c's format version {version}, not {known}. Make it again with a current llm.c"
        )
    if len(header) < HEADER_BYTES or size != HEADER_BYTES + count * np.dtype(dtype).itemsize:
        raise ExperimentError(
            f"{path} is cut short: it holds {max(0, size - HEADER_BYTES):,} bytes of tokens, not "
            f"{count * np.dtype(dtype).itemsize:,}. Make or download it again"
        )
    return map_tokens(path, dtype, HEADER_BYTES, count)


def import_shards(config: Config, files: list[str], tokenizer_json: str, folder: Path) -> None:
    """Checks and counts foreign shards, which are used where they lie, and writes tokenizer.json and corpus.json into
    `folder`. Held out are the files named val or validation, else the last tokens. Raises ExperimentError."""
    held_out = [
        path
        for path in files
        if re.search(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", Path(path).stem.lower())
    ]
    files = [path for path in files if path not in held_out] + held_out
    shards = [open_external_shard(path) for path in files]
    tokens = [
        sum(len(s) for path, s in zip(files, shards) if (path in held_out) is side)
        for side in (False, True)
    ]
    if not all(tokens):  # none is held out by its name, or all are
        tokens = [sum(tokens) - (last := math.ceil(sum(tokens) * config.validation_fraction)), last]
    tokenizer, end_of_text = load_tokenizer(tokenizer_json)
    counts, digest, first = (
        np.zeros((2, vocabulary(tokenizer)), np.int64),
        hashlib.blake2b(digest_size=16),
        0,
    )
    with Bar("checking the tokens", sum(tokens), unit="token") as bar:
        for path, shard in zip(files, shards):
            cut = min(max(0, tokens[0] - first), len(shard))
            for side, part in enumerate((shard[:cut], shard[cut:])):
                try:
                    counts[side] += count_tokens(part, counts.shape[1], bar, digest)
                except ValueError as error:
                    raise ExperimentError(
                        f"{path}: {error} of its {'validation' if side else 'training'} part is out of range: the tokenizer "
                        f"{config.tokenizer} has {counts.shape[1]:,} tokens. Give the --tokenizer that made the shards; if it is "
                        "the one, the file is damaged or no token shard"
                    ) from error
            first += len(shard)
    lengths = np.array(
        [
            len(tokenizer.decode([token], skip_special_tokens=False))
            for token in range(counts.shape[1])
        ]
    )
    total = counts.sum(0)
    facts = dict(
        data=config.data,
        files=[os.path.abspath(path) for path in files],
        documents=int(total[end_of_text]),
        characters=int(total @ lengths),
        train_tokens=tokens[0],
        validation_tokens=tokens[1],
        vocabulary=counts.shape[1],
        data_hash=digest.hexdigest(),
        tokenizer_hash=sha256(tokenizer_json),
        unigram_entropy=entropy(counts[0]),
        left_out=0,
    )
    replace_file(folder / "tokenizer.json", tokenizer_json)
    replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
    print(
        f"data: {len(files):,} token shards, {tokens[0]:,} training and {tokens[1]:,} validation tokens"
        + (
            ""
            if held_out and len(held_out) < len(files)
            else ": the last ones, as no file is named val"
        )
    )


class Joined:
    """Token arrays one after the other as one, without a copy: its length, and slices [first:last] of it."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, place: slice) -> np.ndarray:
        first, last, _ = place.indices(len(self))
        taken = []
        for number in range(int(np.searchsorted(self.ends, first, side="right")), len(self.parts)):
            begin = int(self.ends[number]) - len(self.parts[number])
            if begin >= last:
                break
            taken.append(self.parts[number][max(0, first - begin) : last - begin])
        return taken[0] if len(taken) == 1 else np.concatenate(taken or [self.parts[0][:0]])


def cut_shards(
    shards: list[np.ndarray], first: int
) -> tuple[np.ndarray | Joined, np.ndarray | Joined]:
    """The first tokens of several shards, and the others."""
    sides = ([], [])
    for shard in shards:
        taken = min(first, len(shard))
        first -= taken
        for side, part in zip(sides, (shard[:taken], shard[taken:])):
            if len(part):
                side.append(part)
    return tuple(
        parts[0] if len(parts) == 1 else Joined(parts or [np.empty(0, np.uint16)])
        for parts in sides
    )
