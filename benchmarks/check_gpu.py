"""Proves on this machine's GPU, in about two minutes, that fast paths compute what references do.

    python -m benchmarks.check_gpu              on a CPU it checks what a CPU has
    python -m pytest -m gpu                     the same checks as tests

A model of 6 blocks takes a few whole steps in each configuration: compiled or not, with each way
of checkpointing, offloaded or not, in each precision. What only moves or recomputes must give the
same bits. What rounds differently may be no further from fp32 than the plain model of the same
precision. Then the kernels are compared, one by one, with references in float64.

A line is printed for each check, and the exit code is 1 when one fails. Take no measurement on a
machine where one does.

A check is an error and its bound. Each function in CHECKS takes the device and yields its checks.
The functions do not need pytest, which a GPU machine may not have; tests/gpu calls the same
functions.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from cli import exit_code
from config import LOSS_CHUNK, PRESETS, Config
from engine.linear import expert_loop, grouped_linear
from engine.offload import GradientOffload, OptimizerState
from engine.precision import (
    decode_master,
    embedding,
    gradient_norms,
    read_master,
    sum_gradient_in_fp32,
)
from engine.processes import STOP_SIGNALS
from engine.triton_kernels import (
    attention_backends,
    qk_norm_rope,
    qk_norm_rope_reference,
    set_deterministic,
    swiglu,
    swiglu_reference,
    symmetric_matmul,
)
from generate import generate
from model import MoETransformer, chunked_cross_entropy
from muon import (
    NEWTON_SCHULZ,
    AdamW,
    Muon,
    build_optimizers,
    gram_newton_schulz,
    newton_schulz,
    newton_schulz_dtype,
)
from planner.machine import find_device
from record import checkpoint

# The model that takes whole steps, in the plainest configuration
BASE = Config(
    d_model=256,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    d_ff=512,
    moe_every=2,
    max_seq_len=256,
    vocab_size=1024,
    batch_size=4,
    activation_checkpointing="none",
    offload_optimizer="false",
    compile="false",
)
STEPS = 4
MICRO_BATCHES = 2
LEARNING_RATES = {"muon": 0.01, "adamw": 0.001}
LOSS_SCALES = {"fp16": 1024.0, "bf16": 1.0, "fp32": 1.0}
SMALL_BUCKET = 2**19  # elements: many buckets, so that copies and computation overlap
PROCESSES = 8  # that run models at the same time


class Check(NamedTuple):
    """An error and the bound that it must not exceed. An error of NaN never holds."""

    name: str
    error: float
    bound: float
    largest: tuple[tuple[str, float], ...] = ()  # tensors with the largest errors, if many

    @property
    def holds(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        verdict = "ok  " if self.holds else "FAIL"
        line = f"{verdict} {self.name:68s} {self.error:.2e} (at most {self.bound:.1e})"
        if not self.holds and self.largest:
            tensors = [f"{name} {error:.1e}" for name, error in self.largest]
            line += "\n     " + ", ".join(tensors)
        return line


Checks = Iterator[Check]


# ---------------------------------------------------------------- errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in its dtype; inf for NaN."""
    difference = found.to(expected.dtype) - expected
    error = difference.norm() / expected.norm()
    return error.nan_to_num(nan=torch.inf).item()


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Each tensor's relative error, in fp32: the banks of `18b` are too large for more."""
    relative_errors = {}
    for name, tensor in expected.items():
        relative_errors[name] = relative_error(found[name], tensor.float())
    return relative_errors


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor."""
    return max(errors(found, expected).values())


def check_tensors(
    name: str,
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    bound: float,
) -> Check:
    """Bounds the relative error of every tensor.

    A check that fails also names the three tensors with the largest errors.
    """
    relative_errors = errors(found, expected)
    worst_first = sorted(relative_errors, key=relative_errors.get, reverse=True)
    largest = tuple((tensor, relative_errors[tensor]) for tensor in worst_first[:3])
    _, largest_error = largest[0]
    return Check(name, largest_error, bound, largest)


# ---------------------------------------------------------------- whole steps


class Steps(NamedTuple):
    """What a model computes in STEPS steps, on the CPU."""

    losses: list[float]  # of each step's last micro-batch
    gradients: dict[str, Tensor]  # of the first step, fp32, unscaled
    masters: dict[str, Tensor]  # fp32, after the last step


def poison(device: torch.device) -> None:
    """Fills the memory that the allocator will hand out next with NaN.

    A kernel that reads memory which nothing has written then computes NaN, and its check fails.
    """
    blocks = []
    for numel in (2**6, 2**10, 2**14, 2**18, 2**22):
        for _ in range(50):
            block = torch.full((numel,), torch.nan, device=device)
            blocks.append(block)
    # All blocks are freed together, so that they are different memory.
    del blocks


def take_steps(changes: dict) -> Steps:
    """Trains BASE with `changes` for STEPS steps.

    It runs in a process of its own: it changes the size of buckets, and whether kernels are
    deterministic, for the whole process.
    """
    warnings.simplefilter("ignore")
    OptimizerState.BUCKET = SMALL_BUCKET
    config = dataclasses.replace(BASE, **changes)
    device = find_device(config)
    set_deterministic(config.deterministic)
    with attention_backends(device, config.deterministic):
        model = MoETransformer(config).to(device)
        parameters = dict(model.named_parameters())
        compiling = config.compile == "true"
        if compiling:
            model.compile_blocks()
        gradient_offload = GradientOffload(model, config.host_gradient_blocks)
        optimizers = build_optimizers(
            config,
            parameters,
            offload=config.offload_optimizer == "true",
            fused=compiling and device.type == "cuda",
            gradient_offload=gradient_offload,
        )
        generator = torch.Generator().manual_seed(0)
        losses = []
        gradients = {}
        for step in range(STEPS):
            loss = _accumulate_gradients(model, gradient_offload, generator)
            losses.append(loss)
            if step == 0:
                gradients = _unscaled_gradients(parameters, gradient_offload, config)
            norms = gradient_norms(list(parameters.values()), gradient_offload.norms)
            norm = norms.norm().item()
            # Gradients of norm 1, as after clipping. It also undoes the loss scale.
            grad_scale = 1 / norm
            for name, optimizer in optimizers.items():
                optimizer.step(LEARNING_RATES[name], grad_scale=grad_scale)
            model.zero_grad(set_to_none=True)
    return Steps(losses, gradients, _masters(parameters, optimizers))


def _accumulate_gradients(
    model: MoETransformer,
    gradient_offload: GradientOffload,
    generator: torch.Generator,
) -> float:
    """Forward and backward of a step's micro-batches of random tokens; the last one's loss."""
    config = model.config
    device = model.norm.weight.device
    shape = (config.batch_size, config.max_seq_len + 1)
    # The gradients of the micro-batches add up to those of the scaled mean loss.
    loss_scale = LOSS_SCALES[config.precision] / MICRO_BATCHES
    for i in range(MICRO_BATCHES):
        tokens = torch.randint(config.vocab_size, shape, generator=generator)
        tokens = tokens.to(device)
        inputs = tokens[:, :-1]
        targets = tokens[:, 1:]
        poison(device)
        loss, _ = model(inputs, targets)
        gradient_offload.micro_batch(i, MICRO_BATCHES)
        scaled_loss = loss * loss_scale
        scaled_loss.backward()
    gradient_offload.wait()
    return loss.item()


def _unscaled_gradients(
    parameters: dict[str, Tensor],
    gradient_offload: GradientOffload,
    config: Config,
) -> dict[str, Tensor]:
    """Each parameter's gradient without the loss scale: fp32, on the CPU."""
    loss_scale = LOSS_SCALES[config.precision]
    gradients = {}
    for name, p in parameters.items():
        gradient = p.grad
        if gradient is None:
            # This gradient is in host memory. The copies that write it may still run on the GPU. A
            # copy back to the GPU comes after them.
            gradient = gradient_offload.tensors[name].to(p.device)
        gradients[name] = gradient.float().cpu() / loss_scale
    return gradients


def _masters(
    parameters: dict[str, Tensor],
    optimizers: dict[str, Muon | AdamW],
) -> dict[str, Tensor]:
    """Each parameter's fp32 master, on the CPU."""
    masters = {}
    for optimizer in optimizers.values():
        for name, state in optimizer.state.state_dict().items():
            weight = parameters[name].detach().cpu()
            state_on_cpu = {key: tensor.cpu() for key, tensor in state.items()}
            masters[name] = read_master(weight, state_on_cpu)
    return masters


# What only moves data or recomputes it: the same bits as the plain model
SAME_BITS = {
    "the same run twice": {},
    "optimizer offload": dict(offload_optimizer="true"),
    "optimizer and gradient offload": dict(offload_optimizer="true", host_gradient_blocks=4),
    "selective": dict(activation_checkpointing="selective"),
    "full": dict(activation_checkpointing="full"),
}
COMPILED = {
    "compiled, full, offload": dict(
        compile="true",
        activation_checkpointing="full",
        offload_optimizer="true",
        host_gradient_blocks=6,
        lighter_blocks=2,
    ),
    "compiled, selective": dict(compile="true", activation_checkpointing="selective"),
    "compiled": dict(compile="true"),
}
# Two runs with the same bits, each in a process that compiles for itself
DETERMINISTIC = dict(compile="true", deterministic=True)
REPEATED = ("deterministic, compiled", "deterministic, compiled, again")
# Compiling takes most of the time, so fp16 has one compiled configuration only.
COMPILED_IN = {"bf16": list(COMPILED), "fp16": ["compiled, full, offload"]}
FULL_WIDTH = [("bf16", "none"), ("bf16", "selective"), ("bf16", "full"), ("fp16", "none")]

Job = tuple[str, str]  # precision and what is special; precision and checkpointing for FULL_WIDTH


def step_jobs() -> dict[Job, dict]:
    """The changes to BASE of every model that takes steps."""
    jobs = {("fp32", "plain"): dict(precision="fp32")}
    for what in REPEATED:
        jobs["bf16", what] = dict(DETERMINISTIC, precision="bf16")
    for precision in ("bf16", "fp16"):
        configurations = {
            "plain": {},
            "fp32 masters": dict(master_weights="fp32"),
            **SAME_BITS,
        }
        for what in COMPILED_IN[precision]:
            configurations[what] = COMPILED[what]
        for what, changes in configurations.items():
            jobs[precision, what] = dict(changes, precision=precision)
    return jobs


@functools.cache
def model_runs() -> tuple[dict[Job, Steps], dict[Job, "FullWidth"]]:
    """The results of all models, each from a process of its own, several at a time."""
    threads = max(1, (os.cpu_count() or 1) // 4)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    start = time.monotonic()
    jobs = step_jobs()
    # Compiled models take the longest: they start first.
    in_order = sorted(jobs, key=lambda job: "compile" not in jobs[job])
    on_gpu = find_device(BASE).type == "cuda"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, context) as pool, _killed_at_an_error():
        running = {}
        wide = {}
        with _signals_blocked():  # a new worker inherits that they are
            for job in in_order:
                future = pool.submit(take_steps, jobs[job])
                running[future] = job
            if on_gpu:
                for job in FULL_WIDTH:
                    future = pool.submit(run_full_width, *job)
                    wide[future] = job
        steps = {}
        for done in concurrent.futures.as_completed(running):
            job = running[done]
            steps[job] = done.result()
            seconds = time.monotonic() - start
            print(f"{seconds:4.0f} s: ran {', '.join(job)}", file=sys.stderr, flush=True)
        full_width = {job: future.result() for future, job in wide.items()}
        return steps, full_width


@contextlib.contextmanager
def _killed_at_an_error() -> Iterator[None]:
    """Kills the worker processes at an exception: the pool would wait until they have finished."""
    try:
        yield
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """In the block no signal comes that stops the program; it comes afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_whole_steps(device: torch.device) -> Checks:
    steps, _ = model_runs()
    exact = steps["fp32", "plain"]
    for precision in ("bf16", "fp16"):
        plain = steps[precision, "plain"]
        rounding = distance(plain.gradients, exact.gradients)
        yield check_losses(f"{precision} against fp32: loss", plain, exact, 2e-2)
        yield check_tensors(
            f"{precision} against fp32: gradients",
            plain.gradients,
            exact.gradients,
            0.25,
        )
        for what in SAME_BITS:
            name = f"{precision}, {what}"
            found = steps[precision, what]
            yield check_losses(f"{name}: loss", found, plain, 0)
            yield check_tensors(f"{name}: masters", found.masters, plain.masters, 0)

        name = f"{precision}, fp32 masters"
        found = steps[precision, "fp32 masters"]
        yield check_tensors(f"{name}: gradients", found.gradients, plain.gradients, rounding)
        yield check_losses(f"{name}: loss", found, plain, 2e-2)

        for what in COMPILED_IN[precision]:
            name = f"{precision}, {what}"
            found = steps[precision, what]
            yield check_losses(f"{name}: loss", found, exact, 2e-2)
            yield check_tensors(
                f"{name}: gradients against fp32's",
                found.gradients,
                exact.gradients,
                1.5 * rounding,
            )

    first, again = (steps["bf16", what] for what in REPEATED)
    name = f"bf16, {REPEATED[1]}"
    yield check_losses(f"{name}: loss", again, first, 0)
    yield check_tensors(f"{name}: masters", again.masters, first.masters, 0)


def check_losses(name: str, found: Steps, expected: Steps, bound: float) -> Check:
    """Bounds the difference of the losses of every step, in nats."""
    differences = []
    for found_loss, expected_loss in zip(found.losses, expected.losses):
        differences.append(abs(found_loss - expected_loss))
    return Check(name, max(differences), bound)


# ---------------------------------------------------------------- blocks of 18b's width


class FullWidth(NamedTuple):
    error: float  # largest relative error of a gradient, compiled against plain
    rereading_kernels: list[str]


def run_full_width(precision: str, checkpointing: str) -> FullWidth:
    """Compares compiled gradients with those of the same model without torch.compile.

    The model is a dense and an MoE block of `18b`: torch.compile makes other kernels for large
    shapes than for small ones. The compiled gradients are computed three times, because a race
    shows only sometimes, and the largest error counts. It runs in a process of its own.
    """
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    changes = dict(
        n_layers=2,
        moe_every=2,
        num_experts=4,
        batch_size=1,
        precision=precision,
        activation_checkpointing=checkpointing,
    )
    config = Config(**{**PRESETS["18b"], **changes})
    device = find_device(config)
    with attention_backends(device):
        model = MoETransformer(config).to(device)
        tokens = torch.randint(config.vocab_size, (1, config.max_seq_len + 1), device=device)

        def gradients() -> dict[str, Tensor]:
            model.zero_grad(set_to_none=True)
            poison(device)
            loss, _ = model(tokens[:, :-1], tokens[:, 1:])
            scaled_loss = loss * LOSS_SCALES[precision]
            scaled_loss.backward()
            return {name: p.grad for name, p in model.named_parameters()}

        plain = gradients()
        model.compile_blocks()
        first, codes = run_and_get_code(gradients)
        compiled = [first, gradients(), gradients()]
        error = max(distance(found, plain) for found in compiled)
    return FullWidth(error, rereading_kernels(codes))


# A kernel in the Python code that inductor writes: its name, and its body. The kernel's source is a
# string in triple quotes, which end the body.
TRITON_KERNEL = re.compile(
    r"def (?P<name>triton_\w+)\(.*?\):\n"
    r"(?P<body>.*?)\n'''",
    re.DOTALL,
)
# A read, a write or a barrier in a kernel. The pointer is the first name between the parentheses:
# out_ptr0 in `tl.store(out_ptr0 + (x0), tmp1, xmask)`. A barrier has none.
MEMORY_ACCESS = re.compile(r"tl\.(?P<operation>store|load|debug_barrier)\((?P<pointer>\w*)")


def rereading_kernels(codes: list[str]) -> list[str]:
    """Names of the Triton kernels that read what they have written; `codes` is inductor's output.

    Such a kernel loads from a pointer after a store to it, without a barrier in between. Its
    threads do not wait for each other, so what a thread loads may not be written yet. A name is
    listed once for each such load.
    """
    found = []
    for code in codes:
        for kernel in TRITON_KERNEL.finditer(code):
            written_since_barrier = set()
            for access in MEMORY_ACCESS.finditer(kernel["body"]):
                operation = access["operation"]
                pointer = access["pointer"]
                if operation == "debug_barrier":
                    written_since_barrier.clear()
                elif operation == "store":
                    written_since_barrier.add(pointer)
                elif pointer in written_since_barrier:
                    found.append(kernel["name"])
    return found


def check_full_width(device: torch.device) -> Checks:
    _, wide = model_runs()
    for (precision, checkpointing), found in wide.items():
        name = f"18b's width, {precision}, {checkpointing}"
        # When rounding differs, a router's near ties fall the other way, which moves gradients by a
        # tenth.
        yield Check(f"{name}, compiled: gradients", found.error, 0.2)
        kernels = found.rereading_kernels
        name = f"{name}: kernels that read what they wrote {kernels or ''}"
        yield Check(name, len(kernels), 0)


# ---------------------------------------------------------------- kernels


def check_grouped_linear(device: torch.device) -> Checks:
    """Values and gradients with an idle expert, and few rows (GEMV); against float64."""
    x_RI = torch.randn(512, 256, device=device)
    weight_EOI = torch.randn(4, 128, 256, device=device) / 16
    offs_E = torch.tensor([100, 100, 400, 512], dtype=torch.int32, device=device)
    grad_RO = torch.randn(512, 128, device=device)
    few_offs_E = torch.tensor([2, 2, 6, 7], dtype=torch.int32, device=device)

    def outputs(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        x = x_RI.to(dtype).requires_grad_()
        weight = weight_EOI.to(dtype).requires_grad_()
        y = function(x, weight, offs_E)
        y.backward(grad_RO.to(dtype))
        return [y, x.grad, weight.grad]

    exact = outputs(expert_loop, torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = f"grouped linear {dtype}"
        found = outputs(grouped_linear, dtype)
        names = ("output", "input gradient", "weight gradient")
        for what, found_tensor, exact_tensor in zip(names, found, exact):
            error = relative_error(found_tensor, exact_tensor)
            yield Check(f"{name}, {what}", error, 1e-2)
        _, _, weight_gradient_EOI = found
        # Expert 1 has no rows: offs_E[0] is offs_E[1].
        idle = weight_gradient_EOI[1].abs().max().item()
        yield Check(f"{name}, an idle expert's gradient", idle, 0)

        few = x_RI[:7].to(dtype)
        weight = weight_EOI.to(dtype)
        with torch.no_grad():
            found_few = grouped_linear(few, weight, few_offs_E)
            exact_few = expert_loop(few.double(), weight.double(), few_offs_E)
        yield Check(f"{name}, few rows", relative_error(found_few, exact_few), 1e-2)


def check_newton_schulz(device: torch.device) -> Checks:
    """The standard and the Gram form, each in the dtype in which Muon computes it on this device.

    Wide, tall and square matrices, against the standard form in float64.
    """
    on_gpu = device.type == "cuda"
    # `fused` optimizers use the Gram form in fp16, and they need a GPU.
    dtypes = {
        newton_schulz: newton_schulz_dtype(device, fused=False),
        gram_newton_schulz: newton_schulz_dtype(device, fused=on_gpu),
    }
    for shape in ((2, 512, 1024), (2, 1024, 512), (1, 768, 768)):
        _, rows, columns = shape
        x = torch.randn(shape, device=device, dtype=torch.float64)
        # With a Frobenius norm of 1 no singular value exceeds 1: the iteration converges.
        x /= x.norm(dim=(-2, -1), keepdim=True)
        exact = _newton_schulz_in_float64(x)
        for orthogonalize, dtype in dtypes.items():
            found = orthogonalize(x.to(dtype))
            name = f"{orthogonalize.__name__} in {dtype}, {rows} x {columns}"
            yield Check(name, relative_error(found, exact), 5e-2)


def _newton_schulz_in_float64(x: Tensor) -> Tensor:
    """x [n, rows, columns] in float64, orthogonalized by the steps of the standard form."""
    # The shorter side comes first, which makes the Gram matrix small.
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        polynomial = b * gram + c * gram @ gram
        x = a * x + polynomial @ x
    if tall:
        x = x.mT
    return x


def check_symmetric_matmul(device: torch.device) -> Checks:
    """alpha a a^T + beta add + diagonal I, against float64.

    a is wide or tall, and of sizes that no tile of the kernel divides.
    """
    # Any numbers: an error in one term is then not hidden by another.
    alpha = 0.7
    beta = -1.3
    diagonal = 0.4
    for m, k, tall in (
        (512, 1024, False),
        (512, 1024, True),
        (200, 264, False),
        (72, 40, True),
        (1000, 1000, False),
    ):
        # Over sqrt(k), so that the entries of a a^T do not grow with k
        a = torch.randn(3, m, k, device=device).half() / k**0.5
        name = f"symmetric matmul {m} x {k}"
        if tall:
            # The same numbers in the memory of a tall matrix, [k, m]: a is its transpose.
            a = a.mT.contiguous().mT
            name += ", tall"
        add = torch.randn(3, m, m, device=device).half()
        add = add + add.mT
        found = symmetric_matmul(a, a, alpha, add, beta, diagonal).double()
        wide_a = a.double()
        identity = torch.eye(m, device=device, dtype=torch.float64)
        exact = alpha * wide_a @ wide_a.mT + beta * add.double() + diagonal * identity
        yield Check(name, relative_error(found, exact), 1e-3)
        asymmetry = ((found - found.mT).norm() / exact.norm()).item()
        yield Check(f"{name}: symmetric", asymmetry, 1e-3)


def as_attention_returns_it(gradient: Tensor) -> Tensor:
    """The layout of attention's gradients: heads before positions in memory."""
    return gradient.transpose(1, 2).contiguous().transpose(1, 2)


def contiguous(gradient: Tensor) -> Tensor:
    return gradient


def compare_gradients(
    name: str,
    fast: Callable,
    reference: Callable,
    inputs: tuple[Tensor, ...],
    layout: Callable[[Tensor], Tensor] = contiguous,
) -> Checks:
    """The output and the gradient of each input; the reference computes in float64.

    `layout` arranges the gradient that comes in from above.
    """
    found = _output_and_gradients(fast, inputs, layout)
    in_float64 = tuple(t.double() for t in inputs)
    exact = _output_and_gradients(reference, in_float64, layout, inputs[0].dtype)
    names = ["output"] + [f"gradient {i}" for i in range(len(inputs))]
    for what, found_tensor, exact_tensor in zip(names, found, exact):
        error = relative_error(found_tensor, exact_tensor)
        yield Check(f"{name}, {what}", error, 1e-2)


def _output_and_gradients(
    function: Callable,
    inputs: tuple[Tensor, ...],
    layout: Callable[[Tensor], Tensor],
    upstream_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The output of `function`, and the gradient of each input.

    The gradient that comes in from above is random. It is rounded to `upstream_dtype`, which is the
    inputs' dtype unless given.
    """
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    output = function(*leaves)
    # The same numbers each time, so that two calls can be compared
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator)
    upstream = upstream.to(output.device, upstream_dtype or inputs[0].dtype)
    upstream = layout(upstream)
    output.backward(upstream.to(output.dtype))
    gradients = [leaf.grad for leaf in leaves]
    return [output.detach(), *gradients]


def check_qk_norm_rope(device: torch.device) -> Checks:
    """Output and gradients against float64, for both layouts of the gradient from above."""
    sequences = 2
    positions = 100
    heads = 6
    head_dim = 128
    eps = 1e-6
    # More positions than x has: the table is made for the longest sequence. Any angles do.
    table_positions = 128
    angles = torch.randn(table_positions, head_dim // 2, device=device)
    cos_sin = torch.stack([angles.cos(), angles.sin()], dim=-1)

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        return qk_norm_rope(x, weight, cos_sin, eps)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return qk_norm_rope_reference(x, weight, cos_sin.double(), eps)

    shape = (sequences, positions, heads, head_dim)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(shape, device=device, dtype=dtype)
        weight = torch.rand(head_dim, device=device) + 0.5
        for layout in (as_attention_returns_it, contiguous):
            name = f"QK-norm and RoPE {dtype}"
            yield from compare_gradients(name, fast, reference, (x, weight), layout)


def check_swiglu(device: torch.device) -> Checks:
    """Output and gradients against float64, without and with the router's weights."""

    rows = 77
    d_ff = 11008

    def reference(gate_up: Tensor) -> Tensor:
        return swiglu_reference(gate_up, None)

    for dtype in (torch.bfloat16, torch.float16):
        gate_up = torch.randn(rows, 2 * d_ff, device=device, dtype=dtype)
        name = f"SwiGLU {dtype}"
        yield from compare_gradients(name, swiglu, reference, (gate_up,))
        name = f"SwiGLU {dtype}, weighted"
        weights = torch.rand(rows, device=device)
        inputs = (gate_up, weights)
        yield from compare_gradients(name, swiglu, swiglu_reference, inputs)


# ---------------------------------------------------------------- fp32 sums


def check_fp32_sums(device: torch.device) -> Checks:
    """Gradients of embedding and head, summed over two micro-batches; against float64."""
    for dtype in (torch.bfloat16, torch.float16):
        # A GPU has one kernel for few tokens, and another one for many.
        for num_tokens in (1024, 16384):
            name = f"embedding's gradient {dtype}, {num_tokens} tokens"
            found, exact = _embedding_gradients(dtype, num_tokens, device)
            yield Check(name, relative_error(found, exact), 3e-5)
            yield _check_embedding_repeats(name, dtype, num_tokens, device)
        yield from _check_head(dtype, device)


def _check_embedding_repeats(
    name: str, dtype: torch.dtype, num_tokens: int, device: torch.device
) -> Check:
    """With deterministic algorithms the gradient has the same bits every time."""
    torch.use_deterministic_algorithms(True)
    first, _ = _embedding_gradients(dtype, num_tokens, device)
    second, _ = _embedding_gradients(dtype, num_tokens, device)
    torch.use_deterministic_algorithms(False)
    return Check(f"{name}, deterministic, twice", (second - first).abs().max().item(), 0)


def _embedding_gradients(
    dtype: torch.dtype, num_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(found, exact) of a table of 7 rows: each row's gradient is a sum over many tokens."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.zeros(7, 64, dtype=dtype, device=device, requires_grad=True)
    sum_gradient_in_fp32(weight)
    exact = torch.zeros(7, 64, dtype=torch.float64, device=device)
    for _ in range(MICRO_BATCHES):
        token_ids = torch.randint(7, (num_tokens,), generator=generator, device=device)
        # Of one sign: such a sum in 16 bits stops growing.
        upstream = torch.rand(num_tokens, 64, generator=generator, device=device).to(dtype)
        embedding(token_ids, weight).backward(upstream)
        for row in range(7):
            exact[row] += upstream[token_ids == row].double().sum(dim=0)
    return weight.grad, exact


def _check_head(dtype: torch.dtype, device: torch.device) -> Checks:
    """A chunk and a part of one: the loss from fp32 logits, and the head's gradient."""
    x = torch.randn(LOSS_CHUNK + 100, 64, device=device).to(dtype)
    weight = (torch.randn(256, 64, device=device) / 8).to(dtype).requires_grad_()
    sum_gradient_in_fp32(weight)
    targets = torch.randint(256, (len(x),), device=device)
    exact_weight = weight.detach().double().requires_grad_()
    exact_loss = F.cross_entropy(x.double() @ exact_weight.T, targets)
    exact_loss.backward()

    loss, _ = chunked_cross_entropy(x, weight, targets)
    loss.backward()
    name = f"head {dtype}"
    yield Check(f"{name}: loss", abs(loss.item() / exact_loss.item() - 1), 1e-6)
    # The gradients by the logits are 16-bit.
    yield Check(f"{name}: gradient", relative_error(weight.grad, exact_weight.grad), 5e-3)
    first = weight.grad.clone()
    loss, _ = chunked_cross_entropy(x, weight, targets)
    (loss / 64).backward()
    error = relative_error(weight.grad, first.double() * (1 + 1 / 64))
    yield Check(f"{name}: a small second micro-batch's gradient is added", error, 1e-6)


# ---------------------------------------------------------------- optimizers, checkpoints, sampling


def check_fused_optimizers(device: torch.device) -> Checks:
    """Compiled elementwise work: state and masters as the plain functions give them."""
    for dtype in (torch.bfloat16, torch.float16):
        for kind in (Muon, AdamW):
            masters, moments = _optimizer_steps(kind, dtype, fused=False, device=device)
            fused_masters, fused_moments = _optimizer_steps(kind, dtype, fused=True, device=device)
            name = f"{kind.__name__}, {dtype}, fused"
            yield check_tensors(f"{name}: masters", fused_masters, masters, 1e-5)
            yield check_tensors(f"{name}: moments", fused_moments, moments, 5e-3)
            # Without its low bits a master would be rounded to 16 bits.
            rounded = {}
            for tensor_name, master in masters.items():
                rounded[tensor_name] = master.to(dtype).float()
            yield check_tensors(
                f"{name}: far closer than a 16-bit master",
                fused_masters,
                masters,
                0.05 * distance(rounded, masters),
            )


def _optimizer_steps(
    kind: type[Muon | AdamW],
    dtype: torch.dtype,
    fused: bool,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The fp32 masters and the moments after three steps of an optimizer.

    The weights are of very different sizes, from 1 down to 1e-7.
    """
    torch.manual_seed(0)
    shapes = dict(
        wide=(256, 512),
        tall=(512, 256),
        bank=(2, 2, 256, 128),
    )
    parameters = {}
    for name, shape in shapes.items():
        exponents = torch.rand(shape, device=device) * -7
        weight = torch.randn(shape, device=device) * 10**exponents
        parameters[name] = weight.to(dtype).requires_grad_()
    optimizer = kind(parameters, BASE, BASE.weight_decay, fused=fused)
    # The same matmuls in both, so that only the elementwise work differs
    optimizer.orthogonalize = newton_schulz
    optimizer.dtype = torch.bfloat16
    for _ in range(3):
        for p in parameters.values():
            gradient = torch.randn(p.shape, device=device)
            p.grad = gradient.to(dtype)
        optimizer.step(1e-3, grad_scale=0.5)
    masters = {}
    moments = {}
    for name, state in optimizer.state.state_dict().items():
        weight = parameters[name].detach()
        masters[name] = decode_master(weight, state["residual"])
        for key, tensor in state.items():
            if key != "residual":
                moments[f"{name} {key}"] = tensor.float()
    return masters, moments


def check_checkpoint(device: torch.device) -> Checks:
    """A checkpoint of tensors on this device holds their very bytes."""
    state = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # A prime number of elements, which no size of a buffer divides
        state[str(dtype)] = torch.randn(5_000_011, device=device).to(dtype)
    # A tensor in the memory of another one, and one that is not contiguous
    state["view"] = state["torch.float32"][7:1000]
    state["turned"] = torch.randn(300, 200, device=device).mT
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/c.pt"
        checkpoint.save(path, dict(model=state))
        loaded = checkpoint.load(path)["model"]
        different = 0
        for name, tensor in state.items():
            if not torch.equal(loaded[name], tensor.cpu()):
                different += 1
    yield Check("a checkpoint's tensors that differ", different, 0)


def check_sampling(device: torch.device) -> Checks:
    """Texts that `generate` writes, against the logits of one forward pass over the whole text.

    `generate` reads keys and values from a cache (on a GPU in a CUDA graph), and the pass does not.
    Texts are greedy, so each token should have the largest logit of its position. The error is how
    far its logit is below the largest, in standard deviations of the logits.
    """
    num_texts = 3
    for precision, bound in (("fp32", 1e-4), ("bf16", 0.3), ("fp16", 0.05)):
        config = dataclasses.replace(BASE, precision=precision, init_std=0.1)
        model = MoETransformer(config).to(device).eval()
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(config.vocab_size, (5,), generator=generator).tolist()
        with torch.no_grad():
            written = generate(model, prompt, 40, temperature=0, n=num_texts)
            texts = torch.tensor(written, device=device)
            prompts = torch.tensor([prompt] * num_texts, device=device)
            whole_texts = torch.cat([prompts, texts], dim=1)
            with attention_backends(device):
                logits = model(whole_texts)
        # The logits at a position choose the next token. So those of the prompt's last token chose
        # the first token of `texts`, and those of the last token of `texts` chose none.
        logits = logits[:, len(prompt) - 1 : -1]
        largest = logits.max(dim=-1).values
        chosen = logits.gather(2, texts[..., None]).squeeze(2)
        below = (largest - chosen) / logits.std(dim=-1)
        error = below.max().item()
        name = f"{precision}, greedy text"
        yield Check(f"{name} with a cache: below the best logit", error, bound)
        # A text of few different tokens would prove little. With 10 or more the error is at most 1.
        different = len(texts.unique())
        yield Check(f"{name}: different tokens, at least 10", 10 / different, 1)


# ---------------------------------------------------------------- all of them

CHECKS = (
    check_whole_steps,
    check_full_width,
    check_grouped_linear,
    check_newton_schulz,
    check_symmetric_matmul,
    check_qk_norm_rope,
    check_swiglu,
    check_fp32_sums,
    check_checkpoint,
    check_sampling,
    check_fused_optimizers,
)
GPU_ONLY = (check_full_width, check_fused_optimizers)


def run(function: Callable[[torch.device], Checks], device: torch.device) -> Checks:
    """A function's checks, with the same random numbers whatever ran before it."""
    torch.manual_seed(0)
    yield from function(device)


def main(_argv: list[str]) -> None:
    device = find_device(BASE)
    functions = list(CHECKS)
    if device.type == "cpu":
        print("no GPU was found: what a CPU has is checked, which takes minutes", flush=True)
        functions = [function for function in CHECKS if function not in GPU_ONLY]
    failed = 0
    for function in functions:
        for check in run(function, device):
            print(check, flush=True)
            failed += not check.holds
    if failed:
        print(f"{failed} checks failed")
        raise SystemExit(1)
    print("all checks hold")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
