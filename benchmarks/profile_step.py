"""Where the time of a training step goes: one step of a whole run under torch.profiler, by kind of work, beside its floor.

    python -m benchmarks.profile_step --preset 18b --precision bf16 [any option of run_experiment.py]

The floor of products and attention is their FLOPs over the rate of a large matrix product, and that of elementwise work the
bytes that it must read and write over the bandwidth of a large copy, both measured here. Prints the kinds and the longest
kernels, and writes benchmarks/results/profile_PRESET_PRECISION_GPU.json.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import data
from benchmarks.parts import seconds
from benchmarks.result_files import write
from cli import add_config_options, config_options, exit_code, new_parser
from config import Config, ExperimentError, resolve
from engine.triton_kernels import attention_backends
from muon import NEWTON_SCHULZ
from record.results import environment
from trainer import Trainer

KINDS = {  # the first pattern that a kernel's name matches
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


def profile_step(
    trainer: Trainer, batches, warmup: int = 2
) -> tuple[dict[str, float], list[tuple], float]:
    """({kind: seconds}, [(kernel, kind, seconds, calls)], seconds of the step) of one step after `warmup` others."""
    for optimizer in trainer.optimizers.values():
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
    rows = sorted(
        ((name, what, s, n) for (name, what), (s, n) in kernels.items()), key=lambda row: -row[2]
    )
    return dict(kinds), rows, wall


def floors(c: Config, product_rate: float, bandwidth: float) -> dict[str, float]:
    """Least seconds of each kind in a step: FLOPs over `product_rate` (FLOP/s), bytes over `bandwidth` (bytes/s).

    Nothing recomputed, every elementwise chain one pass over its operands. Of Newton-Schulz, the Gram form's products,
    symmetric ones by half.
    """
    tokens, w, d, kv, p = (
        c.tokens_per_step,
        2 if c.precision != "fp32" else 4,
        c.d_model,
        c.n_kv_heads * c.head_dim,
        c.parameter_groups,
    )
    attention = 6 * c.n_layers * c.max_seq_len * d * tokens
    passes = 0
    for i in range(c.n_layers):
        paths = c.top_k if c.is_moe(i) else 1
        forward = (
            2 * (d + kv) + 7 * d + 3 * c.d_ff * paths
        )  # rotation; two residual sums with their norms; SwiGLU
        backward = 3 * (d + kv) + 8 * d + 6 * c.d_ff * paths
        routing = (
            6 * d * c.top_k if c.is_moe(i) else 0
        )  # rows to experts and back, forward and backward
        passes += forward + backward + routing
    hidden = p["attention"] + p["dense_ffn"] + p["experts"]
    accumulated = 3 * w * c.total_params * (c.gradient_accumulation_steps - 1)
    d_kv, f = max(kv, 1), c.d_ff
    ffn = 3 * (c.n_layers - c.n_moe_layers + c.n_moe_layers * c.num_experts)
    gram_flops = sum(
        number * gram_newton_schulz_flops(min(shape), max(shape))
        for number, shape in ((2 * c.n_layers, (d, d)), (2 * c.n_layers, (d_kv, d)), (ffn, (f, d)))
    )
    return {
        "products": (c.flops_per_token * tokens - attention) / product_rate,
        "attention": attention / product_rate,
        "elementwise": (tokens * w * (passes + 3 * c.vocab_size) + accumulated) / bandwidth,
        "optimizer: products": gram_flops / product_rate,
        "optimizer: elementwise": hidden * (w + 8 + 4 + 4) / bandwidth,
    }  # gradient; state and weight, to and fro; direction


def gram_newton_schulz_flops(m: int, k: int) -> int:
    """Of one m x k matrix, m <= k, symmetric products by half."""
    steps, groups = len(NEWTON_SCHULZ), 2  # cut by the restart
    return groups * m * m * k + groups * 2 * m * m * k + (steps + (steps - groups) * 3) * m**3


def ceilings(dtype: torch.dtype) -> tuple[float, float, float]:
    """(FLOP/s of an 8192^3 product of random numbers, held for two seconds, as a step's are: the first moments are faster, before the
    GPU reaches its power limit; the same in the first moments; bytes/s of a large copy, read and written) on this GPU."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    large = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(large)
    at_first = statistics.median(seconds(lambda: a @ b))
    times = seconds(lambda: a @ b, repeats=int(2 / at_first))
    held, copy = (
        statistics.median(times[len(times) // 2 :]),
        statistics.median(seconds(lambda: other.copy_(large))),
    )
    return 2 * 8192**3 / held, 2 * 8192**3 / at_first, 2 * large.nbytes / copy


def main(argv: list[str]) -> None:
    parser = new_parser(
        "python -m benchmarks.profile_step [--preset NAME] [--FIELD VALUE ...]", __doc__
    )
    parser.add_argument("--preset")
    parser.add_argument("--rows", type=int, default=40, help=argparse.SUPPRESS)
    add_config_options(parser)
    args = parser.parse(argv)
    if not torch.cuda.is_available():
        raise ExperimentError("no GPU was found, whose kernels this is about")
    with tempfile.TemporaryDirectory() as folder:
        options = config_options(args) | dict(save_dir=folder, save_every=0, save_minutes=0)
        config, _, _ = resolve(
            options, args.preset, torch.cuda.get_device_properties(0).total_memory / 1e9
        )
        trainer = Trainer(config, data.prepare(config))
        with attention_backends(trainer.device):
            kinds, rows, wall = profile_step(
                trainer, data.batches(trainer.corpus.train, trainer.config, 0, pin_memory=True)
            )
    config = trainer.config
    product_rate, at_first, bandwidth = ceilings(trainer.model.compute_dtype)
    least = floors(config, product_rate, bandwidth)
    print(
        f"\n{wall:.3f} s a step, {config.tokens_per_step / wall:,.0f} tokens/s (under the profiler); ceilings "
        f"{product_rate / 1e12:.0f} TFLOP/s ({at_first / 1e12:.0f} in the first moments), {bandwidth / 1e12:.2f} TB/s"
    )
    for name, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        floor = (
            f"{least[name]:8.3f} s floor, {spent / least[name]:5.2f} times" if name in least else ""
        )
        print(f"{name:28s} {spent:8.3f} s {100 * spent / wall:6.1f}%  {floor}")
    for name, what, spent, calls in rows[: args.rows]:
        print(
            f"{spent * 1e3:9.1f} ms {calls:6d} x {spent / calls * 1e6:9.1f} us  {what:22s} {name[:110]}"
        )
    write(
        f"profile_{args.preset or 'config'}_{config.precision}",
        wall,
        "s a step, under the profiler",
        1,
        environment(trainer.device),
        dict(
            seconds=kinds,
            share={name: spent / wall for name, spent in kinds.items()},
            floor_seconds=least,
            product_tflops=product_rate / 1e12,
            product_tflops_at_first=at_first / 1e12,
            copy_tb_s=bandwidth / 1e12,
            kernels=[
                dict(kernel=name, kind=what, seconds=spent, calls=calls)
                for name, what, spent, calls in rows[: args.rows]
            ],
        ),
        command=" ".join(["python -m benchmarks.profile_step", *argv]),
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
