"""Measures the data pipeline on this machine's cores and disk; writes benchmarks/results/data_speed_cpu.json.

    python -m benchmarks.data_speed

Tokenizing: MB/s from a .jsonl file to token shards, all readings and writings counted, beside `datasets.map` with the same
tokenizer (transformers' class around it, batches, as many processes as cores or the tokenizer's own threads), from the table
that `datasets` made of the file before the clock starts. Loader: batches/s of `small` and `tiny` from token shards that are
in memory (warm), and that were dropped from memory (cold), in a new process each.
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
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network
if __name__ == "__main__" and len(sys.argv) == 1:
    os.environ["HF_HOME"] = (
        tempfile.mkdtemp()
    )  # before datasets is imported: it keeps its tables there

import numpy as np
import torch

import data
from benchmarks.result_files import ROOT, write
from config import PRESETS, Config
from corpus.sources import open_source
from corpus.tokenizer import train_tokenizer
from record import results

REPETITIONS = 3
TEXT_MB = 60  # the installed packages' text, as far as it goes
TOKENS = 2**29  # in the loader's shard, 1.07 GB
BATCHES = 300


def tokenizing(folder: Path) -> dict:
    """MB/s of each way, one value a repetition; the ways take turns."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    text, size = folder / "text.jsonl", 0
    with open(text, "w") as file:
        for piece, _ in open_source(Config(data="installed")).chunks():
            size += len(piece.encode())
            file.write(json.dumps({"text": piece}) + "\n")
            if size > TEXT_MB * 1e6:
                break
    config = Config(
        data=str(text),
        cache_dir=str(folder / "cache"),
        tokenizer=str(folder / "tokenizer.json"),
        max_seq_len=1024,
    )
    chunks = enumerate(open_source(config).chunks())
    sample = (piece for number, (piece, _) in chunks if number % 4 == 0)
    (folder / "tokenizer.json").write_text(train_tokenizer(sample, 32768))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=config.tokenizer)
    table = datasets.load_dataset("json", data_files=str(text), split="train")
    datasets.disable_progress_bars()

    def encode(batch):
        return {
            "ids": tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)[
                "input_ids"
            ]
        }

    def processes():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        table.map(
            encode,
            batched=True,
            num_proc=os.cpu_count(),
            remove_columns=["text"],
            load_from_cache_file=False,
        )

    def threads():
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        table.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)

    def ours():
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        shutil.rmtree(folder / "cache", ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            data.prepare(config)

    speeds = {}
    for _ in range(REPETITIONS):
        for way in (ours, processes, threads):
            start = time.perf_counter()
            way()
            speeds.setdefault(way.__name__, []).append(size / 1e6 / (time.perf_counter() - start))
    return dict(
        text_mb=size / 1e6,
        ours_mb_per_s=speeds["ours"],
        datasets_map_processes_mb_per_s=speeds["processes"],
        datasets_map_threads_mb_per_s=speeds["threads"],
    )


def load(shard: str, preset: str, workers: int, cold: bool) -> None:
    """Prints batches/s of the loader from a raw uint16 shard; call it in a process that has not mapped it yet."""
    torch.set_num_threads(1)
    config = Config(**{**PRESETS[preset], "num_workers": workers})
    mapped = np.memmap(shard, np.uint16, mode="r")
    for first in range(0, len(mapped), 2**24):
        mapped[first : first + 2**24].max()
    if cold:
        del mapped  # mapped pages stay in memory
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = np.memmap(shard, np.uint16, mode="r")
    batches = data.batches(mapped, config, 10**5)
    next(batches)
    start = time.perf_counter()
    for _ in itertools.islice(batches, BATCHES):
        pass
    print(BATCHES / (time.perf_counter() - start))


def loading(folder: Path) -> dict:
    """{preset, workers, warm or cold: batches/s and tokens/s, medians}"""
    shard = folder / "shard.bin"
    with open(shard, "wb") as file:
        for number in range(TOKENS // 2**26):
            file.write(np.random.default_rng(number).integers(0, 32768, 2**26, np.uint16).tobytes())
        file.flush()
        os.fsync(file.fileno())
    found = {}
    for preset, workers, state in itertools.product(("small", "tiny"), (0, 1), ("warm", "cold")):
        command = [
            sys.executable,
            "-m",
            "benchmarks.data_speed",
            str(shard),
            preset,
            str(workers),
            state,
        ]
        speed = statistics.median(
            float(
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            )
            for _ in range(REPETITIONS)
        )
        config = Config(**PRESETS[preset])
        found[f"{preset}, {workers} workers, {state}"] = dict(
            batches_per_s=speed, tokens_per_s=speed * config.batch_size * config.max_seq_len
        )
    return found


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir=ROOT))  # on the disk that training would read from
    try:
        tokenizer, loader = tokenizing(folder), loading(folder)
        median = {
            name: statistics.median(values)
            for name, values in tokenizer.items()
            if name.endswith("per_s")
        }
        ratio = median["ours_mb_per_s"] / max(
            median["datasets_map_processes_mb_per_s"], median["datasets_map_threads_mb_per_s"]
        )
        write(
            "data_speed",
            ratio,
            "times the MB/s of datasets.map, the faster of its two ways",
            REPETITIONS,
            results.environment(torch.device("cpu")),
            dict(tokenizing=tokenizer, loader=loader),
            "python -m benchmarks.data_speed",
        )
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        load(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "cold")
    else:
        main()
