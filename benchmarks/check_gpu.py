"""Proves in about a minute, on this machine's GPU, that every fast path computes what the plain one does.

    python -m benchmarks.check_gpu              on a CPU it checks what a CPU has

One model of 6 blocks takes a few whole steps under each choice (compiled or not, checkpointing, streaming, precision);
losses and weights are compared with the plainest choice of the same precision, and that with fp32. Prints a line a check;
exit code 1 when one fails. Take no figure on a machine where it does.
"""
import dataclasses
import sys

import torch

import moe
from config import Config
from model import MoETransformer
from muon import NEWTON_SCHULZ, AdamW, Muon, newton_schulz, product_dtype, split_parameters
from precision import OptimizerState, gradient_norms
from trainer import attention_backends, find_device

BASE = Config(d_model=256, n_layers=6, n_heads=4, n_kv_heads=2, d_ff=512, moe_every=2, max_seq_len=256, vocab_size=1024,
              batch_size=4, activation_checkpointing="none", offload_optimizer="false", compile="false")
STEPS, SCALE = 4, {"fp16": 1024.0, "bf16": 1.0, "fp32": 1.0}


def run(config: Config, device: torch.device) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of STEPS steps, and the weights after them."""
    torch.compiler.reset()
    model = MoETransformer(config).to(device)
    if config.compile == "true":
        model.compile_blocks()
    hidden, others = split_parameters(model)
    offload = config.offload_optimizer == "true"
    muon = Muon(hidden, config.muon_momentum, config.weight_decay, offload)
    adamw = AdamW(others, config.adamw_beta1, config.adamw_beta2, config.adamw_eps, config.weight_decay, offload)
    draw, losses = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        tokens = torch.randint(config.vocab_size, (config.batch_size, config.max_seq_len + 1), generator=draw).to(device)
        loss, _ = model(tokens[:, :-1], tokens[:, 1:])
        (loss * SCALE[config.precision]).backward()
        norm = gradient_norms(list(model.parameters())).norm().item()
        for optimizer, lr in ((muon, 0.01), (adamw, 0.001)):
            optimizer.step(lr, 1 / norm)
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses, {name: p.detach().float().cpu() for name, p in model.named_parameters()}


def distance(found, expected) -> tuple[float, float]:
    """Largest difference of a loss, and largest relative difference of a parameter."""
    return (max(abs(a - b) for a, b in zip(found[0], expected[0])),
            max(((found[1][n] - w).norm() / w.norm()).item() for n, w in expected[1].items()))


def main() -> int:
    device, failed = find_device(BASE), 0
    OptimizerState.PIECE = 2 ** 18      # many pieces, so that streaming has something to overlap

    def check(name: str, value: float, bound: float) -> None:
        nonlocal failed
        failed += not value <= bound
        print(f"{'ok  ' if value <= bound else 'FAIL'} {name:58s} {value:.2e} (at most {bound:.0e})", flush=True)

    with attention_backends(device):
        exact = run(dataclasses.replace(BASE, precision="fp32"), device)
        for precision in ("bf16", "fp16"):
            plain = run(dataclasses.replace(BASE, precision=precision), device)
            check(f"{precision} against fp32: loss", distance(plain, exact)[0], 2e-2)
            again = run(dataclasses.replace(BASE, precision=precision), device)
            check(f"{precision}, the same run twice: weights", distance(again, plain)[1], 1e-6)
            for what, bound, changes in (
                    ("streamed state", 1e-6, dict(offload_optimizer="true")),
                    ("selective", 1e-6, dict(activation_checkpointing="selective")),
                    ("full", 1e-6, dict(activation_checkpointing="full")),
                    ("fp32 masters", 5e-2, dict(master_weights="fp32")),
                    ("compiled", 5e-2, dict(compile="true")),
                    ("compiled, selective", 5e-2, dict(compile="true", activation_checkpointing="selective")),
                    ("compiled, full, streamed", 5e-2, dict(compile="true", activation_checkpointing="full", offload_optimizer="true"))):
                found = distance(run(dataclasses.replace(BASE, precision=precision, **changes), device), plain)
                check(f"{precision}, {what}: loss", found[0], 2e-2 if bound > 1e-6 else 1e-6)
                check(f"{precision}, {what}: weights", found[1], bound)

    # the grouped product with an idle expert, values and gradients, against float64
    x, weight = torch.randn(512, 256, device=device), torch.randn(4, 128, 256, device=device) / 16
    ends, out = torch.tensor([100, 100, 400, 512], dtype=torch.int32, device=device), torch.randn(512, 128, device=device)

    def product(dtype):
        a, b = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y = moe.grouped_linear(a, b, ends) if dtype != torch.float64 else moe.expert_loop(a, b, ends)
        y.backward(out.to(dtype))
        return [t.double() for t in (y, a.grad, b.grad)]
    reference = product(torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for what, a, b in zip(("output", "input gradient", "weight gradient"), product(dtype), reference):
            check(f"grouped product {dtype}, {what}", ((a - b).norm() / b.norm()).item(), 1e-2)
            if what == "weight gradient":
                check(f"grouped product {dtype}, an idle expert's gradient", a[1].abs().max().item(), 0)

    # Newton-Schulz in the dtype used here, against the same polynomial in float64
    g = torch.randn(2, 512, 1024, device=device, dtype=torch.float64) * 1e-6
    x = g / g.norm(dim=(-2, -1), keepdim=True)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found = newton_schulz(g.float(), product_dtype(device)).double()
    check(f"Newton-Schulz in {product_dtype(device)}", ((found - x).norm() / x.norm()).item(), 5e-2)
    print("all checks hold" if not failed else f"{failed} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
