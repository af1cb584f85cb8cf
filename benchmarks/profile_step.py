"""Where the time of a training step goes: one step of a whole run under torch.profiler.

    python -m benchmarks.profile_step --preset 18b --precision bf16 [any option of
    run_experiment.py]

The time is shown by kind of work, beside a floor: the least time that this GPU needs for it. The
floor of matmuls and attention is their FLOPs over the rate of a large matmul. The floor of
elementwise work is the bytes that it must read and write over the bandwidth of a large copy. Both
rates are measured here.

Prints the kinds and the longest kernels, and writes
benchmarks/results/profile_PRESET_PRECISION_GPU.json.
"""

import argparse
import math
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

if __name__ == "__main__":  # before the imports below: slow, and they fail without their packages
    from cli import exit_at_a_wrong_path
    from config import explain_missing_packages

    explain_missing_packages()
    exit_at_a_wrong_path(sys.argv[1:])

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import data
from benchmarks.parts import seconds
from benchmarks.result_files import write
from cli import add_config_options, config_options, exit_code, new_parser
from config import Config, ExperimentError, optimizer_groups, parameter_table, resolve
from engine.triton_kernels import attention_backends
from muon import NEWTON_SCHULZ
from planner.machine import GB
from record.results import environment
from trainer import Trainer

# Kinds of work by the names of their kernels: the first pattern that matches. "products" are
# matmuls; result files have that name.
KINDS = {
    "attention": r"sdpa|fmha|flash|attention|softmax_warp",
    "products": r"gemm|nvjet|cutlass|xmma|grouped|splitK|cublas|_matmul",
    "routing": r"sort|topk|TopK|radix|scatter|cumsum|scan",
    "copies": r"[Mm]emcpy|[Mm]emset",
}
OPTIMIZER = "optimizer step"  # name of the range that the profiler records around it


def kind(kernel: str) -> str:
    for name, pattern in KINDS.items():
        if re.search(pattern, kernel):
            return name
    return "elementwise"


# ---------------------------------------------------------------- the profile


class Kernel(NamedTuple):
    """All calls of a kernel within a kind."""

    name: str
    kind: str
    seconds: float
    calls: int


class Profile(NamedTuple):
    kinds: dict[str, float]  # seconds; the optimizer's own kinds begin with "optimizer: "
    kernels: list[Kernel]  # the longest first
    wall: float  # seconds of the step


def profile_step(trainer: Trainer, batches: Iterator, warmup: int = 2) -> Profile:
    """Profiles one step after `warmup` others."""
    for optimizer in trainer.optimizers.values():
        optimizer.step = _annotated(optimizer.step)
    for _ in range(warmup):
        trainer.train_step(batches)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traced:
        start = time.perf_counter()
        trainer.train_step(batches)
        wall = time.perf_counter() - start
    on_gpu = [e for e in traced.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return _by_kind(on_gpu, wall)


def _annotated(step: Callable) -> Callable:
    """An optimizer's step, inside a range of the profiler."""

    def annotated_step(*arguments, **named_arguments):
        with record_function(OPTIMIZER):
            return step(*arguments, **named_arguments)

    return annotated_step


def _by_kind(events: list, wall: float) -> Profile:
    """Sums the kernels of the GPU, whose times are in microseconds."""
    optimizer_ranges = []
    spans = []
    kinds = defaultdict(float)
    kernel_seconds = defaultdict(float)
    calls = defaultdict(int)
    for event in events:
        if event.name == OPTIMIZER:
            optimizer_ranges.append((event.time_range.start, event.time_range.end))
    for event in events:
        if event.name == OPTIMIZER:
            continue
        start = event.time_range.start
        end = event.time_range.end
        spans.append((start, end))
        what = kind(event.name)
        if any(first <= start <= last for first, last in optimizer_ranges):
            what = f"optimizer: {what}"
        kinds[what] += (end - start) / 1e6
        kernel_seconds[event.name, what] += (end - start) / 1e6
        calls[event.name, what] += 1
    kinds["optimizer (wall)"] = covered(optimizer_ranges) / 1e6
    kinds["gaps"] = wall - covered(spans) / 1e6
    kernels = [
        Kernel(name, what, total, calls[name, what])
        for (name, what), total in kernel_seconds.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Profile(dict(kinds), kernels, wall)


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total = 0.0
    end_so_far = float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, end_so_far))
        end_so_far = max(end_so_far, end)
    return total


# ---------------------------------------------------------------- floors


def floors(c: Config, matmul_rate: float, bandwidth: float) -> dict[str, float]:
    """The least seconds that a step can spend on each kind of work.

    `matmul_rate` is in FLOP/s, `bandwidth` in bytes/s. The floors assume that nothing is recomputed
    and that every chain of elementwise operations is one pass over its operands.
    """
    tokens = c.tokens_per_step
    width = 2  # bytes of a weight, gradient or activation
    if c.precision == "fp32":
        width = 4
    # Causal attention's share of config.flops_per_token, for T = max_seq_len and d = d_model.
    # The forward pass has two matmuls, queries with keys and probabilities with values. Each takes
    # 2 T d FLOPs for a token, of which causality leaves half: T d each. The backward pass has four,
    # the gradients of queries, keys, probabilities and values: 4 T d. That is 6 T d in each layer.
    # Fused attention multiplies queries with keys again in the backward pass, which is not counted.
    attention_flops = 6 * c.n_layers * c.max_seq_len * c.d_model * tokens
    matmul_flops = c.flops_per_token * tokens - attention_flops
    elements_per_token = sum(_elementwise_per_token(c, layer) for layer in range(c.n_layers))
    # Logits are written, read for the loss, and overwritten by their gradient.
    elements_per_token += 3 * c.vocab_size
    # Each micro-batch but the first reads a gradient and the sum, and writes the sum.
    accumulation_bytes = 3 * width * c.total_params * (c.gradient_accumulation_steps - 1)
    elementwise_bytes = tokens * width * elements_per_token + accumulation_bytes
    return {
        "products": matmul_flops / matmul_rate,
        "attention": attention_flops / matmul_rate,
        "elementwise": elementwise_bytes / bandwidth,
        "optimizer: products": _newton_schulz_flops(c) / matmul_rate,
        "optimizer: elementwise": _muon_bytes(c, width) / bandwidth,
    }


def _elementwise_per_token(c: Config, layer: int) -> int:
    """Elements that a block's elementwise work reads and writes for a token, in both passes."""
    d = c.d_model
    queries_and_keys = d + c.n_kv_heads * c.head_dim
    networks = c.feed_forwards(layer)
    # The hidden elements of all networks that a token passes through.
    hidden = sum(ffn.top_k * ffn.d_ff for ffn in networks)
    # Forward:
    # - The norm before attention reads the residual stream and writes its norm: 2 d. It is a pass
    #   of its own, because blocks are compiled one by one: the sum before it is of another block.
    # - QK-norm and the rotation read and write queries and keys.
    # - The first residual sum and the norm after it are one pass. It reads the residual stream and
    #   attention's output, and writes the sum and its norm: 4 d. The second sum reads two rows and
    #   writes one: 3 d.
    # - SwiGLU reads gate and up, and writes the hidden row.
    forward = 2 * queries_and_keys + 9 * d + 3 * hidden
    # Backward:
    # - The rotation with its norm reads the gradient and the saved input, and writes a gradient.
    # - Each of the two norms reads its gradient, its saved input and the gradient of the residual
    #   stream, and writes the sum of the two gradients: 4 d.
    # - SwiGLU reads the gradient of the hidden row, gate and up, and writes the gradients of gate
    #   and up: 5 rows. The gradient of `down` also needs the hidden row, which the forward pass has
    #   kept, as nothing is recomputed.
    backward = 3 * queries_and_keys + 8 * d + 5 * hidden
    # The second residual sum reads one more row for each network after the first. So does the sum
    # of the gradients in the backward pass.
    forward += d * (len(networks) - 1)
    backward += d * (len(networks) - 1)
    routing = 0
    if c.is_moe(layer):
        # A token's row is copied to each of its experts and back, in both passes.
        routing = 6 * d * c.top_k
    return forward + backward + routing


def _muon_bytes(c: Config, width: int) -> int:
    """Bytes that Muon's elementwise work reads and writes in a step."""
    table = parameter_table(c)
    elements = sum(table[name].numel for name in optimizer_groups(c)["muon"].parameters)
    gradient = width  # read
    momentum_and_low_bits = 8  # 2 bytes each, read and written
    weight = 4  # 2 bytes, read and written
    direction = 4  # 2 bytes, written, and read when it is orthogonalized
    return elements * (gradient + momentum_and_low_bits + weight + direction)


def _newton_schulz_flops(c: Config) -> int:
    """FLOPs of the Gram form of Newton-Schulz for all matrices that Muon updates."""
    table = parameter_table(c)
    flops = 0
    for name in optimizer_groups(c)["muon"].parameters:
        # gate_up and the weights of experts are banks of matrices: more than two dimensions.
        *bank, rows, columns = table[name].shape
        num_matrices = math.prod(bank)
        short = min(rows, columns)
        long = max(rows, columns)
        flops += num_matrices * gram_newton_schulz_flops(short, long)
    return flops


def gram_newton_schulz_flops(m: int, k: int) -> int:
    """FLOPs of the Gram form of Newton-Schulz for one m x k matrix x with m <= k.

    A matmul of m x k by k x m takes 2 m m k FLOPs. A matmul whose result is symmetric counts half,
    because only one triangle is computed.
    """
    steps = len(NEWTON_SCHULZ)
    groups = 2  # the restart cuts the steps into two groups
    # Each group begins with the Gram matrix x x^T, which is symmetric.
    gram = groups * m * m * k
    # Each group ends with the product of its polynomials times x.
    application = groups * 2 * m * m * k
    # Each step computes a polynomial of the Gram matrix: a symmetric m x m matmul.
    polynomials = steps * m**3
    # Each step but the first of its group extends the product of polynomials (one matmul), and each
    # but the last of its group computes the next Gram matrix (two matmuls). All are symmetric. So
    # there are three for all steps but one of each group.
    updates = (steps - groups) * 3 * m**3
    return gram + application + polynomials + updates


class Ceilings(NamedTuple):
    """The rates that this GPU reaches in large operations."""

    matmul_rate: float  # FLOP/s that it sustains
    matmul_rate_at_first: float  # FLOP/s of the first moments
    bandwidth: float  # bytes/s, reads and writes together


def ceilings(dtype: torch.dtype) -> Ceilings:
    """Measures an 8192^3 matmul of random numbers and a copy of 4 GiB.

    The matmul is repeated for two seconds, and the second half of that time counts. At first it is
    faster, until the GPU reaches its power limit; the matmuls of a step run at that limit.
    """
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=dtype)
    b = torch.randn(n, n, device="cuda", dtype=dtype)
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    at_first = statistics.median(seconds(lambda: a @ b))
    times = seconds(lambda: a @ b, repeats=int(2 / at_first))
    sustained = statistics.median(times[len(times) // 2 :])
    copying = statistics.median(seconds(lambda: target.copy_(source)))
    matmul_flops = 2 * n**3
    copied_bytes = 2 * source.nbytes  # read and written
    return Ceilings(
        matmul_rate=matmul_flops / sustained,
        matmul_rate_at_first=matmul_flops / at_first,
        bandwidth=copied_bytes / copying,
    )


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
    parser = new_parser(
        "python -m benchmarks.profile_step [--preset NAME] [--FIELD VALUE ...]", __doc__
    )
    parser.add_argument("--preset")
    parser.add_argument("--rows", type=int, default=40, help=argparse.SUPPRESS)
    add_config_options(parser)
    args = parser.parse(argv)
    if not torch.cuda.is_available():
        raise ExperimentError("no GPU was found: this command profiles the kernels of a GPU")
    with tempfile.TemporaryDirectory() as folder:
        options = config_options(args) | dict(save_dir=folder, save_every=0, save_minutes=0)
        gpu_memory_gb = torch.cuda.get_device_properties(0).total_memory / GB
        config, _, _ = resolve(options, args.preset, gpu_memory_gb)
        trainer = Trainer(config, data.prepare(config))
        config = trainer.config
        batches = data.batches(trainer.corpus.train, config, 0, pin_memory=True)
        with attention_backends(trainer.device):
            found = profile_step(trainer, batches)
    ceiling = ceilings(trainer.model.compute_dtype)
    least = floors(config, ceiling.matmul_rate, ceiling.bandwidth)
    print_profile(found, config, ceiling, least, args.rows)
    write(
        f"profile_{args.preset or 'config'}_{config.precision}",
        found.wall,
        "s a step, under the profiler",
        1,
        environment(trainer.device),
        dict(
            seconds=found.kinds,
            share={name: spent / found.wall for name, spent in found.kinds.items()},
            floor_seconds=least,
            product_tflops=ceiling.matmul_rate / 1e12,
            product_tflops_at_first=ceiling.matmul_rate_at_first / 1e12,
            copy_tb_s=ceiling.bandwidth / 1e12,
            kernels=[
                dict(kernel=k.name, kind=k.kind, seconds=k.seconds, calls=k.calls)
                for k in found.kernels[: args.rows]
            ],
        ),
        command=" ".join(["python -m benchmarks.profile_step", *argv]),
    )


def print_profile(
    found: Profile, config: Config, ceiling: Ceilings, least: dict[str, float], rows: int
) -> None:
    speed = config.tokens_per_step / found.wall
    print(
        f"\n{found.wall:.3f} s a step, {speed:,.0f} tokens/s (under the profiler); ceilings "
        f"{ceiling.matmul_rate / 1e12:.0f} TFLOP/s "
        f"({ceiling.matmul_rate_at_first / 1e12:.0f} in the first moments), "
        f"{ceiling.bandwidth / 1e12:.2f} TB/s"
    )
    for name, spent in sorted(found.kinds.items(), key=lambda item: -item[1]):
        line = f"{name:28s} {spent:8.3f} s {100 * spent / found.wall:6.1f}%"
        if least.get(name):
            line += f"  {least[name]:8.3f} s floor, {spent / least[name]:5.2f} times"
        print(line)
    for kernel in found.kernels[:rows]:
        each = kernel.seconds / kernel.calls
        print(
            f"{kernel.seconds * 1e3:9.1f} ms {kernel.calls:6d} x {each * 1e6:9.1f} us  "
            f"{kernel.kind:22s} {kernel.name[:110]}"
        )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
