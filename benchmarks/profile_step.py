"""Where the time of a training step goes: one step of a whole run under torch.profiler, by kind of work.

    python -m benchmarks.profile_step --preset 18b --precision bf16 [any option of run_experiment.py]

Prints the share of each kind (products, attention, elementwise, routing, copies, optimizer, gaps) and the longest kernels.
"""
import argparse
import re
import sys
import tempfile
import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import data
from config import resolve
from run_experiment import add_config_options, config_options, new_parser
from trainer import Trainer, attention_backends

KINDS = {       # the first pattern that a kernel's name matches
    "attention": r"sdpa|fmha|flash|attention|softmax_warp",
    "products": r"gemm|nvjet|cutlass|xmma|grouped|splitK|cublas|_product",
    "routing": r"sort|topk|TopK|radix|scatter|cumsum|scan",
    "copies": r"[Mm]emcpy|[Mm]emset",
}
OPTIMIZER = "optimizer step"


def kind(name: str) -> str:
    return next((k for k, pattern in KINDS.items() if re.search(pattern, name)), "elementwise")


def annotated(function):
    def wrapper(*args):
        with record_function(OPTIMIZER):
            return function(*args)
    return wrapper


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def profile_step(trainer: Trainer, batches, warmup: int = 2) -> tuple[dict[str, float], list[tuple], float]:
    """({kind: seconds}, [(kernel, kind, seconds, calls)], seconds of the step) of one step after `warmup` others."""
    for optimizer in (trainer.muon, trainer.adamw):
        optimizer.step = annotated(optimizer.step)
    for _ in range(warmup):
        trainer.train_step(batches)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
        start = time.perf_counter()
        trainer.train_step(batches)
        wall = time.perf_counter() - start
    on_gpu = [e for e in traced.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ranges = [(e.time_range.start, e.time_range.end) for e in on_gpu if e.name == OPTIMIZER]
    kinds, kernels, spans = defaultdict(float), defaultdict(lambda: [0.0, 0]), []
    for event in on_gpu:
        if event.name == OPTIMIZER:
            continue
        start, end = event.time_range.start, event.time_range.end
        inside = any(a <= start <= b for a, b in ranges)
        what = ("optimizer: " if inside else "") + kind(event.name)
        kinds[what] += (end - start) / 1e6
        entry = kernels[event.name, what]
        entry[0] += (end - start) / 1e6
        entry[1] += 1
        spans.append((start, end))
    kinds["optimizer (wall)"] = covered(ranges) / 1e6
    kinds["gaps"] = wall - covered(spans) / 1e6
    rows = sorted(((name, what, s, n) for (name, what), (s, n) in kernels.items()), key=lambda row: -row[2])
    return dict(kinds), rows, wall


def main(argv: list[str]) -> int:
    parser = new_parser("python -m benchmarks.profile_step [--preset NAME] [--FIELD VALUE ...]")
    parser.add_argument("--preset")
    parser.add_argument("--rows", type=int, default=40, help=argparse.SUPPRESS)
    add_config_options(parser)
    args = parser.parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        options = config_options(args) | dict(save_dir=folder, save_every=0, save_minutes=0)
        config, _, _ = resolve(options, args.preset, torch.cuda.get_device_properties(0).total_memory / 1e9)
        trainer = Trainer(config, data.prepare(config))
        with attention_backends(trainer.device):
            kinds, rows, wall = profile_step(trainer, data.batches(trainer.corpus.train, trainer.config, 0, pin_memory=True))
    print(f"\n{wall:.3f} s a step, {config.tokens_per_step / wall:,.0f} tokens/s (under the profiler)")
    for name, seconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{name:28s} {seconds:8.3f} s {100 * seconds / wall:6.1f}%")
    for name, what, seconds, calls in rows[:args.rows]:
        print(f"{seconds * 1e3:9.1f} ms {calls:6d} x {seconds / calls * 1e6:9.1f} us  {what:22s} {name[:110]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
