"""Figures of parts of the program, for benchmarks.run: the optimizer, the MoE layer, four layers beside transformers, disks."""

import dataclasses
import gc
import os
import resource
import statistics
import subprocess
import time
from pathlib import Path

import torch

import data
from benchmarks.result_files import CACHE, write
from config import PRESETS, Config, resolve
from engine.offload import OptimizerState
from engine.triton_kernels import COMPILE_OPTIONS, attention_backends, compile_with_barriers
from model import MoETransformer
from moe import MoE, SwiGLU
from muon import build_optimizers
from planner.machine import GB
from planner.sizes import checkpoint_gb
from record import checkpoint
from record.results import environment
from trainer import Trainer

REPEATS = 20


def seconds(function, repeats: int = REPEATS, warmup: int = 3) -> list[float]:
    """Seconds of each call on the GPU, after some to warm up."""
    times = []
    for i in range(warmup + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in times[warmup:]]


class MadeOnTheCard(OptimizerState):
    """State that is made anew on the GPU for each group: what streaming would cost if copies took no time."""

    def buckets(self):
        for group in self._cut_into_buckets():
            yield [
                self._part(
                    name,
                    cut,
                    {
                        k: torch.zeros_like(self._view(t)[cut], device=self.device)
                        for k, t in self.tensors[name].items()
                    },
                )
                for name, cut in group
            ]


def muon_step_18b(_: Path) -> None:
    """Muon on gradients of every hidden matrix of `18b`, and AdamW on the rest, beside it."""
    device = torch.device("cuda")
    config = Config(**PRESETS["18b"] | dict(precision="bf16"))
    with torch.device("meta"):
        model = MoETransformer(config)
    model.materialize(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    start = time.perf_counter()
    optimizers = build_optimizers(config, dict(model.named_parameters()), offload=True, fused=True)
    muon = optimizers["muon"]
    adamw = optimizers["adamw"]
    reserving = time.perf_counter() - start
    streamed = seconds(lambda: muon.step(0.01, 1e-3), repeats=5, warmup=2)
    adamw_seconds = seconds(lambda: adamw.step(0.001, 1e-3), repeats=5, warmup=2)
    peak = torch.cuda.max_memory_allocated() / GB
    muon.state.__class__ = MadeOnTheCard
    on_the_card = seconds(lambda: muon.step(0.01, 1e-3), repeats=5, warmup=2)
    write(
        "muon_step_18b",
        statistics.median(streamed),
        "s",
        len(streamed),
        environment(device),
        dict(
            streamed_seconds=streamed,
            state_made_on_the_card_seconds=on_the_card,
            adamw_streamed_seconds=adamw_seconds,
            streaming_costs_seconds=statistics.median(streamed) - statistics.median(on_the_card),
            seconds_to_reserve_host_memory=reserving,
            host_gb=sum(t.nbytes for s in muon.state.tensors.values() for t in s.values()) / GB,
            peak_gb=peak,
        ),
    )


def moe_vs_dense(_: Path) -> None:
    """Router to combine against a dense SwiGLU of top_k times the width, forward and backward, 16,384 tokens of `18b`."""
    device, config = torch.device("cuda"), Config(**PRESETS["18b"] | dict(precision="bf16"))
    tokens = 4 * config.max_seq_len
    details = {}

    compile_with_barriers()

    def measure(layer, x, forget=lambda out: out) -> list[float]:
        layer.compile(fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)
        upstream = torch.randn_like(x)

        def step():
            layer.zero_grad(set_to_none=True)
            x.grad = None
            with torch.autocast("cuda", torch.bfloat16):
                out = layer(x)
            forget(out).backward(upstream)

        return seconds(step)

    with device:
        x = torch.randn(4, config.max_seq_len, config.d_model, dtype=torch.bfloat16)
        wide = SwiGLU(dataclasses.replace(config, d_ff=config.d_ff * config.top_k), torch.bfloat16)
        torch.nn.init.normal_(wide.gate_up, std=0.02), torch.nn.init.normal_(wide.down, std=0.02)
        details["dense_seconds"] = dense = measure(wide, x.requires_grad_())
        del wide
        layer = MoE(config, torch.bfloat16)
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.02)
        # the router reads its choice from the first features of a token
        torch.nn.init.zeros_(layer.router.weight)
        layer.router.weight.data[:, : config.num_experts] = torch.eye(config.num_experts)
        first = torch.arange(tokens) % config.num_experts
        choices = {
            "moe_vs_dense": (
                first,
                (first + 1 + torch.arange(tokens) // config.num_experts % (config.num_experts - 1))
                % config.num_experts,
            ),
            "moe_vs_dense_skewed": (
                torch.zeros(tokens, dtype=torch.long),
                1 + torch.arange(tokens) % (config.num_experts - 1),
            ),
        }
        for name, chosen in choices.items():
            routed = x.detach().clone().flatten(0, 1)
            routed[:, : config.num_experts] = 0
            for k, experts in enumerate(chosen):
                routed[torch.arange(tokens), experts] = 8.0 - k
            routed = routed.view_as(x).requires_grad_()
            times = measure(layer, routed, lambda out: out[0])
            share = [
                round(n, 4)
                for n in (layer(routed.detach())[1][2].double() / (tokens * config.top_k)).tolist()
            ]
            write(
                name,
                statistics.median(dense) / statistics.median(times),
                "of the dense layer's speed",
                REPEATS,
                environment(device),
                details | dict(moe_seconds=times, load=share),
            )


def vs_transformers(_: Path) -> None:
    """Four layers of `18b`, forward and backward of a micro-batch of 4, in bf16: transformers' Qwen3-MoE, compiled, with its
    checkpointing; and ours, at the fastest mode that needs no more memory."""
    import transformers

    device, config = (
        torch.device("cuda"),
        Config(**PRESETS["18b"] | dict(n_layers=4, precision="bf16")),
    )
    tokens = torch.randint(
        config.vocab_size, (config.batch_size, config.max_seq_len), device=device
    )

    def measure(step) -> tuple[float, float]:
        step()
        torch.cuda.reset_peak_memory_stats()
        times = seconds(step, repeats=10)
        return tokens.numel() / statistics.median(times), torch.cuda.max_memory_allocated() / GB

    torch.set_default_dtype(torch.bfloat16)
    with device:
        theirs = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.d_model,
                intermediate_size=config.d_ff,
                moe_intermediate_size=config.d_ff,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                num_key_value_heads=config.n_kv_heads,
                head_dim=config.head_dim,
                num_experts=config.num_experts,
                num_experts_per_tok=config.top_k,
                decoder_sparse_step=config.moe_every,
                norm_topk_prob=config.norm_topk_prob,
                max_position_embeddings=config.max_seq_len,
                tie_word_embeddings=False,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
    torch.set_default_dtype(torch.float32)
    theirs.set_experts_implementation("grouped_mm")
    theirs.train()
    theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    theirs.compile()
    their_speed, their_gb = measure(lambda: theirs(input_ids=tokens, labels=tokens).loss.backward())  # noqa: F821
    del theirs
    ours = {}
    for mode in ("none", "selective", "full"):
        gc.collect()
        torch.cuda.empty_cache()
        with torch.device("meta"):
            model = MoETransformer(dataclasses.replace(config, activation_checkpointing=mode))
        model.materialize(device)
        model.compile_blocks()
        with attention_backends(device):
            ours[mode] = measure(lambda: model(tokens, tokens)[0].backward())  # noqa: F821
        del model
    speed, mode = max((speed, mode) for mode, (speed, gb) in ours.items() if gb <= their_gb)
    write(
        "vs_transformers",
        speed / their_speed,
        "times the tokens/s of transformers",
        10,
        environment(device),
        dict(
            transformers=transformers.__version__,
            theirs=dict(tokens_per_second=their_speed, peak_gb=their_gb),
            compared=mode,
            ours={
                mode: dict(tokens_per_second=speed, peak_gb=gb)
                for mode, (speed, gb) in ours.items()
            },
        ),
    )


def checkpoint_io(folder: Path) -> None:
    """Saves and loads `5b` with checksums, `keep_checkpoints` 1; a file of that size written and read by dd, first."""
    gb = checkpoint_gb(Config(**PRESETS["5b"]))
    blocks, path = int(gb * GB / 2**24), folder / "dd"

    def timed(function) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def forget_file(file: Path) -> None:  # so that reading it asks the disk
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    disk_write = timed(
        lambda: subprocess.run(
            ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={blocks}", "conv=fsync"],
            check=True,
        )
    )
    forget_file(path)
    disk_read = timed(
        lambda: subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M"], check=True)
    )
    size = path.stat().st_size
    path.unlink()
    config, _, _ = resolve(
        dict(save_dir=str(folder / "run"), keep_checkpoints=1, cache_dir=str(CACHE)), "5b", None
    )
    trainer = Trainer(config, data.prepare(config))
    before, target = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        folder / "checkpoint_step_1.pt",
    )
    saving = timed(lambda: checkpoint.save(target, trainer.state_dict()))
    saved = target.stat().st_size
    overhead = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / GB
    forget_file(target)
    loading = timed(lambda: (trainer.load_state_dict(checkpoint.load(target)), torch.cuda.synchronize()))
    share = {
        "save": (saved / saving) / (size / disk_write),
        "load": (saved / loading) / (size / disk_read),
    }
    write(
        "checkpoint_io",
        100 * min(share.values()),
        "% of the disk's own speed, the slower of saving and loading",
        1,
        environment(trainer.device),
        dict(
            share=share,
            gb=saved / GB,
            save_gb_s=saved / saving / GB,
            load_gb_s=saved / loading / GB,
            disk_write_gb_s=size / disk_write / GB,
            disk_read_gb_s=size / disk_read / GB,
            host_memory_overhead_gb=overhead,
        ),
    )
