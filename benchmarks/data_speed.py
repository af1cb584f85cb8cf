"""Measures the data pipeline on this machine's CPU cores and disk.

    python -m benchmarks.data_speed

Tokenizing: MB/s from a .jsonl file to token shards, with all reading and writing. It is compared
with `datasets.map` and the same tokenizer in transformers' class, in batches, with a process for
each core or with the tokenizer's own threads. `datasets.map` starts from the table that `datasets`
made of the file before the clock starts.

Loader: batches/s of `small` and `tiny` from token shards that are in memory (warm), or that were
dropped from memory (cold). Each measurement is a new process.

Writes benchmarks/results/data_speed_cpu.json. datasets and transformers must be installed.
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

import numpy as np
import torch

import data
from benchmarks.result_files import ROOT, write
from cli import exit_code
from config import PRESETS, Config
from corpus.external import joined, open_external_shard
from corpus.sources import open_source
from corpus.token_reader import TokenFiles
from corpus.tokenizer import train_tokenizer
from record.results import environment

REPETITIONS = 3
TEXT_MB = 60  # of the installed packages' text, if there is as much
VOCAB_SIZE = 32768
SHARD_TOKENS = 2**29  # 1.07 GB
WRITTEN_AT_ONCE = 2**26  # tokens
READ_AT_ONCE = 2**24  # tokens
BATCHES = 300


# ---------------------------------------------------------------- tokenizing


def tokenizing(folder: Path) -> dict:
    """MB/s of each way, one value a repetition. The ways take turns."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    text = folder / "text.jsonl"
    text_mb = write_text(text) / 1e6
    config = Config(
        data=str(text),
        cache_dir=str(folder / "cache"),
        tokenizer=str(folder / "tokenizer.json"),
        max_seq_len=1024,
    )
    Path(config.tokenizer).write_text(tokenizer_of(config))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=config.tokenizer)
    table = datasets.load_dataset("json", data_files=str(text), split="train")
    datasets.disable_progress_bars()

    ways = dict(
        ours_mb_per_s=lambda: prepare(config),
        datasets_map_processes_mb_per_s=lambda: map_table(table, tokenizer, os.cpu_count()),
        datasets_map_threads_mb_per_s=lambda: map_table(table, tokenizer, None),
    )
    found = dict(text_mb=text_mb)
    for name in ways:
        found[name] = []
    for _ in range(REPETITIONS):
        for name, way in ways.items():
            found[name].append(text_mb / seconds(way))
    return found


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def write_text(path: Path) -> int:
    """Writes the installed packages' text as .jsonl; returns the bytes of the text itself."""
    size = 0
    with open(path, "w") as file:
        for text, _ in open_source(Config(data="installed")).chunks():
            size += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
            if size > TEXT_MB * 1e6:
                break
    return size


def tokenizer_of(config: Config) -> str:
    """A tokenizer.json that was trained on every fourth chunk of the text."""
    chunks = itertools.islice(open_source(config).chunks(), 0, None, 4)
    return train_tokenizer((text for text, _ in chunks), VOCAB_SIZE)


def prepare(config: Config) -> None:
    """Our way: from the text to token shards, with nothing in the cache and nothing printed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    shutil.rmtree(config.cache_dir, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        data.prepare(config)


def map_table(table, tokenizer, processes: int | None) -> None:
    """The way of `datasets`. With None there is one process, and the tokenizer has threads."""

    def encode(batch):
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
        return {"ids": encoded["input_ids"]}

    os.environ["TOKENIZERS_PARALLELISM"] = "true" if processes is None else "false"
    table.map(
        encode,
        batched=True,
        num_proc=processes,
        remove_columns=["text"],
        load_from_cache_file=False,
    )


# ---------------------------------------------------------------- the loader


def loading(folder: Path) -> dict:
    """Median batches/s and tokens/s by "PRESET, WORKERS workers, warm or cold".

    Warm: the system's cache holds the whole file of tokens. Cold: it holds none, and the loader
    reads the disk.
    """
    shard = folder / "shard.bin"
    write_shard(shard)
    found = {}
    presets = ("small", "tiny")
    worker_counts = (0, 1)
    states = ("warm", "cold")
    for preset, workers, state in itertools.product(presets, worker_counts, states):
        speeds = []
        for _ in range(REPETITIONS):
            speed = batches_per_second_of_new_process(shard, preset, workers, state)
            speeds.append(speed)
        speed = statistics.median(speeds)
        config = Config(**PRESETS[preset])
        tokens_per_batch = config.batch_size * config.max_seq_len
        found[f"{preset}, {workers} workers, {state}"] = dict(
            batches_per_s=speed,
            tokens_per_s=speed * tokens_per_batch,
        )
    return found


def write_shard(path: Path) -> None:
    """A raw uint16 shard of random tokens."""
    with open(path, "wb") as file:
        for seed in range(SHARD_TOKENS // WRITTEN_AT_ONCE):
            generator = np.random.default_rng(seed)
            tokens = generator.integers(0, VOCAB_SIZE, WRITTEN_AT_ONCE, np.uint16)
            file.write(tokens.tobytes())
        # The kernel drops only pages that are on the disk.
        file.flush()
        os.fsync(file.fileno())


def loader_command(shard: Path, preset: str, workers: int, state: str) -> list[str]:
    module = [sys.executable, "-m", "benchmarks.data_speed"]
    return [*module, str(shard), preset, str(workers), state]


def batches_per_second_of_new_process(shard: Path, preset: str, workers: int, state: str) -> float:
    """Batches/s of the loader in a process that has not opened the file yet."""
    command = loader_command(shard, preset, workers, state)
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout)


def batches_per_second(shard: str, preset: str, workers: int, cold: bool) -> float:
    """Speed of the loader from a raw uint16 shard, in a process that has not opened it yet."""
    torch.set_num_threads(1)
    config = Config(**{**PRESETS[preset], "num_workers": workers})
    tokens = joined([open_external_shard(shard)], VOCAB_SIZE)
    read_into_memory(tokens)
    if cold:
        drop_from_memory(shard)
    batches = data.batches(tokens, config, position=10**5)
    next(batches)  # starts the workers
    start = time.perf_counter()
    for _ in itertools.islice(batches, BATCHES):
        pass
    return BATCHES / (time.perf_counter() - start)


def read_into_memory(tokens: TokenFiles) -> None:
    for first in range(0, len(tokens), READ_AT_ONCE):
        tokens[first : first + READ_AT_ONCE]  # a slice is read when it is taken


def drop_from_memory(path: str) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
    if argv:  # in a process of batches_per_second_of_new_process
        shard, preset, workers, state = argv
        print(batches_per_second(shard, preset, int(workers), cold=state == "cold"))
        return
    with contextlib.ExitStack() as stack:
        # On the disk that training would read from.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=ROOT)))
        # Before datasets is imported: it keeps its tables there, and nothing needs the network.
        os.environ["HF_HOME"] = stack.enter_context(
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        tokenizer = tokenizing(folder)
        loader = loading(folder)
    ours = statistics.median(tokenizer["ours_mb_per_s"])
    processes = statistics.median(tokenizer["datasets_map_processes_mb_per_s"])
    threads = statistics.median(tokenizer["datasets_map_threads_mb_per_s"])
    write(
        "data_speed",
        ours / max(processes, threads),
        "times the MB/s of datasets.map, the faster of its two ways",
        REPETITIONS,
        environment(torch.device("cpu")),
        dict(tokenizing=tokenizer, loader=loader),
        command="python -m benchmarks.data_speed",
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
