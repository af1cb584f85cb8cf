"""Proves in about two minutes, on this machine's GPU, that every fast path computes what the plain one does.

    python -m benchmarks.check_gpu              on a CPU it checks what a CPU has

One model of 6 blocks takes a few whole steps under each choice (compiled or not, checkpointing, streaming, precision), each
in a process of its own, several at a time. What only moves or recomputes must give the same bits; what rounds otherwise may
be no further from fp32 than the plain path of the same precision. Then the kernels alone, against float64. Prints a line a
check; exit code 1 when one fails. Take no figure on a machine where it does.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings

import torch
from torch._inductor.utils import run_and_get_code

from config import PRESETS, Config
from engine.linear import expert_loop, grouped_linear
from engine.offload import GradientOffload, OptimizerState
from engine.precision import decode_master, gradient_norms
from engine.triton_kernels import (
    attention_backends,
    qk_norm_rope,
    qk_norm_rope_reference,
    swiglu,
    swiglu_reference,
    symmetric_matmul,
)
from generate import generate
from model import MoETransformer
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
MICRO_BATCHES, STEPS, SCALE = 2, 4, {"fp16": 1024.0, "bf16": 1.0, "fp32": 1.0}
FULL_WIDTH = ("bf16", "none"), ("bf16", "selective"), ("bf16", "full"), ("fp16", "none")
PROCESSES = 8
failed, worst = 0, []


def check(name: str, value: float, bound: float) -> None:
    global failed, worst
    failed += not value <= bound
    print(
        f"{'ok  ' if value <= bound else 'FAIL'} {name:68s} {value:.2e} (at most {bound:.1e})",
        flush=True,
    )
    if not value <= bound and worst:
        print("     " + ", ".join(f"{where} {error:.1e}" for error, where in worst), flush=True)
    worst = []


def poison(device: torch.device) -> None:
    """Fills what the allocator will hand out next with NaN, so that a read of memory that nothing wrote shows."""
    blocks = [
        torch.full((size,), torch.nan, device=device)
        for size in (2**6, 2**10, 2**14, 2**18, 2**22)
        for _ in range(50)
    ]
    del blocks


def run(changes: dict) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of STEPS steps, the first step's gradients, and the fp32 masters after them all."""
    warnings.simplefilter("ignore")
    config = dataclasses.replace(BASE, **changes)
    device = find_device(config)
    OptimizerState.BUCKET = 2**19  # many groups, so that streaming has something to overlap
    with attention_backends(device):
        model = MoETransformer(config).to(device)
        compiling, offload = config.compile == "true", config.offload_optimizer == "true"
        if compiling:
            model.compile_blocks()
        sums = GradientOffload(model, config.host_gradient_blocks)
        fused = compiling and device.type == "cuda"
        optimizers = build_optimizers(config, dict(model.named_parameters()), offload, fused, sums)
        muon, adamw = optimizers["muon"], optimizers["adamw"]
        draw, losses, gradients = torch.Generator().manual_seed(0), [], {}
        for step in range(STEPS):
            for i in range(MICRO_BATCHES):
                tokens = torch.randint(
                    config.vocab_size, (config.batch_size, config.max_seq_len + 1), generator=draw
                ).to(device)
                poison(device)
                loss, _ = model(tokens[:, :-1], tokens[:, 1:])
                sums.micro_batch(i, MICRO_BATCHES)
                (loss * (SCALE[config.precision] / MICRO_BATCHES)).backward()
            sums.wait()
            if step == 0:
                gradients = {
                    name: (sums.tensors[name].to(device) if p.grad is None else p.grad)
                    .float()
                    .cpu()
                    / SCALE[config.precision]
                    for name, p in model.named_parameters()
                }
            norm = gradient_norms(list(model.parameters()), sums.norms).norm().item()
            for optimizer, lr in ((muon, 0.01), (adamw, 0.001)):
                optimizer.step(lr, 1 / norm)
            model.zero_grad(set_to_none=True)
            losses.append(loss.item())
    states = muon.state.state_dict() | adamw.state.state_dict()
    masters = {
        name: decode_master(p.detach().cpu(), states[name]["residual"].cpu())
        if "residual" in states[name]
        else p.detach().cpu()
        for name, p in model.named_parameters()
    }
    return losses, gradients, masters


def loss_distance(found, expected) -> float:
    return max(abs(a - b) for a, b in zip(found[0], expected[0]))


def distance(found: dict, expected: dict) -> float:
    """Largest relative difference of a tensor; inf when there is a NaN. `worst` then holds the three largest with names."""
    global worst
    differences = {
        name: ((found[name].float() - w.float()).norm() / w.float().norm())
        .nan_to_num(nan=torch.inf)
        .item()
        for name, w in expected.items()
    }
    worst = sorted(((value, name) for name, value in differences.items()), reverse=True)[:3]
    return worst[0][0]


def check_model() -> None:
    same = [
        ("streamed state", dict(offload_optimizer="true")),
        ("streamed state and gradients", dict(offload_optimizer="true", host_gradient_blocks=4)),
        ("selective", dict(activation_checkpointing="selective")),
        ("full", dict(activation_checkpointing="full")),
    ]
    compiled = {
        "compiled, full, streamed": dict(
            compile="true",
            activation_checkpointing="full",
            offload_optimizer="true",
            host_gradient_blocks=6,
            lighter_blocks=2,
        ),
        "compiled, selective": dict(compile="true", activation_checkpointing="selective"),
        "compiled": dict(compile="true"),
    }
    compiled = {
        "fp16": list(compiled.items())[:1],
        "bf16": list(compiled.items()),
    }  # compiling takes most of the time
    jobs = {}
    for precision in ("bf16", "fp16"):
        for what, changes in (
            compiled[precision]
            + [
                ("plain", {}),
                ("the same run twice", {}),
                ("fp32 masters", dict(master_weights="fp32")),
            ]
            + same
        ):
            jobs[precision, what] = changes | dict(precision=precision)
    jobs["fp32", "plain"] = dict(precision="fp32")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // 4))
    found, start = {}, time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(
        PROCESSES, multiprocessing.get_context("spawn")
    ) as pool:
        running = {
            pool.submit(run, changes): job
            for job, changes in sorted(jobs.items(), key=lambda item: "compile" not in item[1])
        }
        wide = (
            {pool.submit(run_full_width, *job): job for job in FULL_WIDTH}
            if find_device(BASE).type == "cuda"
            else {}
        )
        for done in concurrent.futures.as_completed(running):
            found[running[done]] = done.result()
            print(
                f"{time.monotonic() - start:4.0f} s: ran {', '.join(running[done])}",
                file=sys.stderr,
                flush=True,
            )
        for done, job in wide.items():
            differences, kernels = done.result()
            # a router's near ties fall otherwise when rounding does, which moves gradients by a tenth
            check(f"18b's width, {', '.join(job)}, compiled: gradients", max(differences), 0.2)
            check(
                f"18b's width, {', '.join(job)}: kernels that read what they wrote {kernels or ''}",
                len(kernels),
                0,
            )
    exact = found["fp32", "plain"]
    for precision in ("bf16", "fp16"):
        plain = found[precision, "plain"]
        rounding = distance(plain[1], exact[1])
        check(f"{precision} against fp32: loss", loss_distance(plain, exact), 2e-2)
        check(f"{precision} against fp32: gradients", rounding, 0.25)
        for what in ["the same run twice"] + [name for name, _ in same]:
            check(f"{precision}, {what}: loss", loss_distance(found[precision, what], plain), 0)
            check(f"{precision}, {what}: masters", distance(found[precision, what][2], plain[2]), 0)
        check(
            f"{precision}, fp32 masters: gradients",
            distance(found[precision, "fp32 masters"][1], plain[1]),
            rounding,
        )
        check(
            f"{precision}, fp32 masters: loss",
            loss_distance(found[precision, "fp32 masters"], plain),
            2e-2,
        )
        for what, _ in compiled[precision]:
            check(f"{precision}, {what}: loss", loss_distance(found[precision, what], exact), 2e-2)
            check(
                f"{precision}, {what}: gradients against fp32's",
                distance(found[precision, what][1], exact[1]),
                1.5 * rounding,
            )


def run_full_width(precision: str, mode: str) -> tuple[list[float], list[str]]:
    """A dense and an MoE block of `18b` and its loss, compiled, beside the plain ones, as kernels for large shapes are not those
    for small ones: the largest relative difference of a gradient, three times over, and the compiled kernels that read what they
    have written (their threads do not wait for each other)."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = Config(
        **dict(
            PRESETS["18b"],
            n_layers=2,
            moe_every=2,
            num_experts=4,
            batch_size=1,
            precision=precision,
            activation_checkpointing=mode,
        )
    )
    device = find_device(config)
    with attention_backends(device):
        model = MoETransformer(config).to(device)
        tokens = torch.randint(config.vocab_size, (1, config.max_seq_len + 1), device=device)

        def gradients():
            model.zero_grad(set_to_none=True)
            poison(device)
            loss, _ = model(tokens[:, :-1], tokens[:, 1:])
            (loss * SCALE[precision]).backward()
            return {name: p.grad for name, p in model.named_parameters()}

        plain = gradients()
        model.compile_blocks()
        found, codes = run_and_get_code(gradients)
        return [distance(g, plain) for g in (found, gradients(), gradients())], rereading_kernels(
            codes
        )


def rereading_kernels(codes: list[str]) -> list[str]:
    """Names of the Triton kernels in inductor's output that load from a pointer after they have stored to it, unless they wait
    in between."""
    found = []
    for name, body in (
        match
        for code in codes
        for match in re.findall(r"def (triton_\w+)\(.*?\):\n(.*?)\n'''", code, re.S)
    ):
        written = set()
        for access, pointer in re.findall(r"tl\.(store|load|debug_barrier)\((\w*)", body):
            if access == "debug_barrier":
                written.clear()
            elif access == "store":
                written.add(pointer)
            elif pointer in written:
                found.append(name)
    return found


def check_grouped_products(device: torch.device) -> None:
    """With an idle expert, values and gradients, against float64."""
    x, weight = torch.randn(512, 256, device=device), torch.randn(4, 128, 256, device=device) / 16
    ends, out = (
        torch.tensor([100, 100, 400, 512], dtype=torch.int32, device=device),
        torch.randn(512, 128, device=device),
    )

    def product(dtype):
        a, b = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y = grouped_linear(a, b, ends) if dtype != torch.float64 else expert_loop(a, b, ends)
        y.backward(out.to(dtype))
        return [t.double() for t in (y, a.grad, b.grad)]

    reference = product(torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for what, a, b in zip(
            ("output", "input gradient", "weight gradient"), product(dtype), reference
        ):
            check(f"grouped product {dtype}, {what}", ((a - b).norm() / b.norm()).item(), 1e-2)
            if what == "weight gradient":
                check(
                    f"grouped product {dtype}, an idle expert's gradient",
                    a[1].abs().max().item(),
                    0,
                )
        few, few_ends = (
            x[:7].to(dtype),
            torch.tensor([2, 2, 6, 7], dtype=torch.int32, device=device),
        )
        with torch.no_grad():
            found, exact = (
                grouped_linear(few, weight.to(dtype), few_ends).double(),
                expert_loop(few.double(), weight.double(), few_ends),
            )
        check(
            f"grouped product {dtype}, few rows",
            ((found - exact).norm() / exact.norm()).item(),
            1e-2,
        )


@torch.no_grad()
def check_sampling(device: torch.device) -> None:
    """Greedy texts, each token read with a cache (on a GPU by a graph): how far each token's logit is under the largest that one
    forward pass over the whole text gives, in standard deviations of the logits."""
    for precision, bound in (("fp32", 1e-4), ("bf16", 0.3), ("fp16", 0.05)):
        model = (
            MoETransformer(dataclasses.replace(BASE, precision=precision, init_std=0.1))
            .to(device)
            .eval()
        )
        prompt = torch.randint(
            BASE.vocab_size, (5,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        texts = torch.tensor(generate(model, prompt, 40, temperature=0, n=3), device=device)
        with attention_backends(device):
            logits = model(torch.cat([torch.tensor([prompt] * 3, device=device), texts], dim=1))[
                :, 4:-1
            ]
        under = (
            logits.max(dim=-1).values - logits.gather(2, texts[..., None]).squeeze(2)
        ) / logits.std(dim=-1)
        check(
            f"{precision}, greedy text with a cache: under the best logit",
            under.max().item(),
            bound,
        )
        check(
            f"{precision}, greedy text: different tokens, at least 10", 10 / len(texts.unique()), 1
        )


def check_symmetric_matmul(device: torch.device) -> None:
    """Wide and tall operands, sizes that no tile divides, every term of the sum; against float64."""
    for m, k, tall in (
        (512, 1024, False),
        (512, 1024, True),
        (200, 264, False),
        (72, 40, True),
        (1000, 1000, False),
    ):
        a = torch.randn(3, m, k, device=device).half() / k**0.5
        a = a.mT.contiguous().mT if tall else a
        add = torch.randn(3, m, m, device=device).half()
        add = add + add.mT
        found = symmetric_matmul(a, a, 0.7, add, -1.3, 0.4).double()
        exact = (
            0.7 * a.double() @ a.double().mT
            - 1.3 * add.double()
            + 0.4 * torch.eye(m, device=device, dtype=torch.float64)
        )
        check(
            f"symmetric product {m} x {k}{', tall' if tall else ''}",
            ((found - exact).norm() / exact.norm()).item(),
            1e-3,
        )
        check(
            f"symmetric product {m} x {k}{', tall' if tall else ''}: symmetric",
            ((found - found.mT).norm() / exact.norm()).item(),
            1e-3,
        )


def check_rows_kernels(device: torch.device) -> None:
    """Rotation and SwiGLU, values and gradients, in the layouts of the model; against the plain ones in float64."""

    def compare(what, fast, plain, inputs, layout=lambda grad: grad):
        """`inputs`: all that get a gradient."""
        results = []
        for function, dtype in ((fast, None), (plain, torch.float64)):
            leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
            out = function(*leaves)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(
                device, inputs[0].dtype
            )
            out.backward(layout(upstream).to(out.dtype))
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for name, a, b in zip(("output", *(f"gradient {i}" for i in range(len(inputs)))), *results):
            check(
                f"{what}, {name}",
                ((a.double() - b).norm() / b.norm()).nan_to_num(nan=torch.inf).item(),
                1e-2,
            )

    def as_attention_returns_it(grad):
        return grad.transpose(1, 2).contiguous().transpose(1, 2)

    for dtype in (torch.bfloat16, torch.float16):
        x, weight = (
            torch.randn(2, 100, 6, 128, device=device, dtype=dtype),
            torch.rand(128, device=device) + 0.5,
        )
        turns = torch.randn(128, 64, device=device)
        angles = torch.stack([turns.cos(), turns.sin()], dim=-1)
        for layout in (as_attention_returns_it, lambda grad: grad):
            compare(
                f"rotation {dtype}",
                lambda x, w: qk_norm_rope(x, w, angles, 1e-6),
                lambda x, w: qk_norm_rope_reference(x, w, angles.double(), 1e-6),
                (x, weight),
                layout,
            )
        gate_up = torch.randn(77, 2 * 11008, device=device, dtype=dtype)
        compare(f"SwiGLU {dtype}", swiglu, lambda x: swiglu_reference(x, None), (gate_up,))
        compare(
            f"SwiGLU {dtype}, weighted",
            swiglu,
            swiglu_reference,
            (gate_up, torch.rand(77, device=device)),
        )


def check_newton_schulz(device: torch.device) -> None:
    for shape in ((2, 512, 1024), (2, 1024, 512), (1, 768, 768)):
        g = torch.randn(shape, device=device, dtype=torch.float64)
        g /= g.norm(dim=(-2, -1), keepdim=True)
        x = g if shape[1] <= shape[2] else g.mT
        for a, b, c in NEWTON_SCHULZ:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x if shape[1] <= shape[2] else x.mT
        for form, fused in ((newton_schulz, False), (gram_newton_schulz, True)):
            dtype = newton_schulz_dtype(device, fused and device.type == "cuda")
            check(
                f"{form.__name__} in {dtype}, {shape[1]} x {shape[2]}",
                ((form(g.to(dtype)).double() - x).norm() / x.norm()).item(),
                5e-2,
            )


def check_fused_optimizers(device: torch.device) -> None:
    """The compiled elementwise work: state and masters as the plain functions give them, for either 16-bit format."""
    for dtype in (torch.bfloat16, torch.float16):
        for kind, arguments in ((Muon, (BASE, 0.1)), (AdamW, (BASE, 0.1))):
            results = []
            for fused in (False, True):
                torch.manual_seed(0)
                named = {
                    name: (
                        torch.randn(shape, device=device)
                        * 10 ** (torch.rand(shape, device=device) * -7)
                    )
                    .to(dtype)
                    .requires_grad_()
                    for name, shape in dict(
                        wide=(256, 512), tall=(512, 256), bank=(2, 2, 256, 128)
                    ).items()
                }
                optimizer = kind(named, *arguments, fused=fused)
                optimizer.orthogonalize, optimizer.dtype = (
                    newton_schulz,
                    torch.bfloat16,
                )  # the same products for both
                for step in range(3):
                    for p in named.values():
                        p.grad = torch.randn(p.shape, device=device).to(dtype)
                    optimizer.step(1e-3, 0.5)
                states = optimizer.state.state_dict()
                results.append(
                    (
                        {
                            n: decode_master(p.detach(), states[n]["residual"])
                            for n, p in named.items()
                        },
                        {
                            f"{n} {k}": t.float()
                            for n, s in states.items()
                            for k, t in s.items()
                            if k != "residual"
                        },
                    )
                )
            check(
                f"{kind.__name__}, {dtype}, fused: masters",
                distance(results[1][0], results[0][0]),
                1e-5,
            )
            check(
                f"{kind.__name__}, {dtype}, fused: moments",
                distance(results[1][1], results[0][1]),
                5e-3,
            )
            rounded = {n: m.to(dtype).float() for n, m in results[0][0].items()}
            check(
                f"{kind.__name__}, {dtype}, fused: far closer than a 16-bit master",
                distance(results[1][0], results[0][0]),
                0.05 * distance(rounded, results[0][0]),
            )


def check_checkpoint(device: torch.device) -> None:
    """What a checkpoint gives back of tensors on the GPU: the very bytes."""
    state = {
        str(dtype): torch.randn(5_000_011, device=device).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    state |= dict(
        view=state["torch.float32"][7:1000], turned=torch.randn(300, 200, device=device).mT
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(f"{folder}/c.pt", dict(model=state))
        loaded = checkpoint.load(f"{folder}/c.pt")["model"]
        check(
            "a checkpoint's tensors that differ",
            sum(not torch.equal(loaded[name], t.cpu()) for name, t in state.items()),
            0,
        )


def main() -> int:
    torch.manual_seed(0)
    device = find_device(BASE)
    if device.type == "cpu":
        print("no GPU was found: what a CPU has is checked, which takes minutes", flush=True)
    check_model()
    check_grouped_products(device)
    check_newton_schulz(device)
    check_symmetric_matmul(device)
    check_rows_kernels(device)
    check_checkpoint(device)
    check_sampling(device)
    if device.type == "cuda":
        check_fused_optimizers(device)
    print("all checks hold" if not failed else f"{failed} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
