"""Measurements of parts of the program, for benchmarks.run.

They are the optimizer step, the MoE layer, four layers beside transformers, and checkpoints
beside the disk. Each function measures on the first GPU and writes its result file.
"""

import dataclasses
import gc
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from benchmarks.result_files import CACHE, write
from config import PRESETS, Config, resolve
from engine.offload import OptimizerState, Part
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


def seconds(function: Callable, repeats: int = REPEATS, warmup: int = 3) -> list[float]:
    """Seconds that each of `repeats` calls takes on the GPU, after `warmup` calls."""
    times = []
    for _ in range(warmup + repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in times[warmup:]]


def timed(function: Callable) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def config_18b(**changes) -> Config:
    """`18b` in bf16 with full checkpointing, with these changes."""
    fixed = dict(precision="bf16", activation_checkpointing="full")
    return Config(**{**PRESETS["18b"], **fixed, **changes})


def build_model(config: Config, device: torch.device) -> MoETransformer:
    with torch.device("meta"):
        model = MoETransformer(config)
    model.materialize(device)
    return model


# ---------------------------------------------------------------- the optimizer


class StateMadeOnTheGPU(OptimizerState):
    """OptimizerState whose state is not copied from host memory: zeros on the GPU stand for it.

    The optimizer takes the same buckets as with offload, and no time for copies. The difference of
    the two times is what the copies cost.
    """

    def buckets(self) -> Iterator[list[Part]]:
        for bucket in self._cut_into_buckets():
            parts = []
            for name, rows in bucket:
                state_on_gpu = {}
                for key, tensor in self.tensors[name].items():
                    slice_on_host = self._view(tensor)[rows]
                    state_on_gpu[key] = torch.zeros_like(slice_on_host, device=self.device)
                parts.append(self._part(name, rows, state_on_gpu))
            yield parts


def muon_step_18b(_: Path) -> None:
    """Muon on gradients of every hidden matrix of `18b`, and AdamW on the rest, with offload."""
    device = torch.device("cuda")
    config = config_18b()
    model = build_model(config, device)
    for p in model.parameters():
        p.grad = torch.randn_like(p, dtype=p.grad_dtype)
    start = time.perf_counter()
    parameters = dict(model.named_parameters())
    optimizers = build_optimizers(config, parameters, offload=True, fused=True)
    muon = optimizers["muon"]
    adamw = optimizers["adamw"]
    reserving = time.perf_counter() - start

    def muon_seconds() -> list[float]:
        return seconds(lambda: muon.step(0.01, grad_scale=1e-3), repeats=5, warmup=2)

    offloaded = muon_seconds()
    adamw_seconds = seconds(lambda: adamw.step(0.001, grad_scale=1e-3), repeats=5, warmup=2)
    peak = torch.cuda.max_memory_allocated() / GB
    # The class changes in place: a second state would take as much host memory again.
    muon.state.__class__ = StateMadeOnTheGPU
    without_copies = muon_seconds()

    host_bytes = 0
    for state in muon.state.tensors.values():
        host_bytes += sum(tensor.nbytes for tensor in state.values())
    write(
        "muon_step_18b",
        statistics.median(offloaded),
        "s",
        len(offloaded),
        environment(device),
        dict(
            streamed_seconds=offloaded,
            state_made_on_the_card_seconds=without_copies,
            adamw_streamed_seconds=adamw_seconds,
            streaming_costs_seconds=statistics.median(offloaded)
            - statistics.median(without_copies),
            seconds_to_reserve_host_memory=reserving,
            host_gb=host_bytes / GB,
            peak_gb=peak,
        ),
    )


# ---------------------------------------------------------------- the MoE layer


def moe_vs_dense(_: Path) -> None:
    """An MoE layer beside a dense SwiGLU of top_k times the width, which takes equal FLOPs.

    Forward and backward of 16,384 tokens of `18b`, from router to combine: with every expert
    equally busy (moe_vs_dense), and with one expert that every token goes to
    (moe_vs_dense_skewed).
    """
    device = torch.device("cuda")
    config = config_18b()
    compile_with_barriers()
    with device:
        x = torch.randn(4, config.max_seq_len, config.d_model, dtype=torch.bfloat16)
        dense = _dense_seconds(config, x.requires_grad_())
        layer = _moe_layer(config)
        for name, chosen in _choices(config, tokens=x.shape[0] * x.shape[1]).items():
            routed = _send_tokens_to(chosen, x, config.num_experts)
            times = _forward_and_backward_seconds(layer, routed, lambda out: out[0])
            tokens_per_expert = layer(routed.detach())[1][2].double()
            load = tokens_per_expert / tokens_per_expert.sum()
            write(
                name,
                statistics.median(dense) / statistics.median(times),
                "of the dense layer's speed",
                REPEATS,
                environment(device),
                dict(
                    dense_seconds=dense,
                    moe_seconds=times,
                    load=[round(share, 4) for share in load.tolist()],
                ),
            )


def _dense_seconds(config: Config, x: Tensor) -> list[float]:
    wide = SwiGLU(dataclasses.replace(config, d_ff=config.d_ff * config.top_k), torch.bfloat16)
    for p in wide.parameters():
        nn.init.normal_(p, std=0.02)
    return _forward_and_backward_seconds(wide, x)


def _moe_layer(config: Config) -> MoE:
    """A layer whose router reads its choice from the first num_experts features of a token."""
    layer = MoE(config, torch.bfloat16)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.02)
    nn.init.zeros_(layer.router.weight)
    layer.router.weight.data[:, : config.num_experts] = torch.eye(config.num_experts)
    return layer


def _choices(config: Config, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The first and second expert of every token, [tokens] each, by the name of the result."""
    position = torch.arange(tokens)
    num_others = config.num_experts - 1

    # Balanced: the first experts are 0, 1, 2 ... and 0 again. The second expert is `distance`
    # experts further on. The distance is 1 for num_experts tokens in a row, then 2, and so on to
    # num_others. So the second is never the first one, and all experts are equally busy.
    first = position % config.num_experts
    distance = 1 + position // config.num_experts % num_others
    second = (first + distance) % config.num_experts

    # Skewed: expert 0 has every token, and the others share the second choices.
    always_0 = torch.zeros(tokens, dtype=torch.long)
    one_of_the_others = 1 + position % num_others
    return {
        "moe_vs_dense": (first, second),
        "moe_vs_dense_skewed": (always_0, one_of_the_others),
    }


def _send_tokens_to(chosen: tuple[Tensor, Tensor], x: Tensor, num_experts: int) -> Tensor:
    """A copy of x whose first `num_experts` features make the router choose these experts.

    The router of `_moe_layer` takes these features as its logits: 8 for a token's first expert, 7
    for its second, and 0 for the others.
    """
    routed = x.detach().clone().flatten(0, 1)
    routed[:, :num_experts] = 0
    position = torch.arange(len(routed))
    for k, experts in enumerate(chosen):
        routed[position, experts] = 8.0 - k
    return routed.view_as(x).requires_grad_()


def _forward_and_backward_seconds(
    layer: nn.Module, x: Tensor, output: Callable = lambda out: out
) -> list[float]:
    """Of the compiled layer; `output` takes the tensor to differentiate from what it returns."""
    layer.compile(fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)
    upstream = torch.randn_like(x)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(x)
        output(out).backward(upstream)

    return seconds(step)


# ---------------------------------------------------------------- transformers


def vs_transformers(_: Path) -> None:
    """Four layers of `18b` beside transformers' Qwen3-MoE: forward and backward of a micro-batch.

    In bf16, with 4 sequences. Theirs is compiled, with its own checkpointing; ours takes the
    fastest mode that needs no more memory.
    """
    import transformers

    device = torch.device("cuda")
    config = config_18b(n_layers=4)
    shape = (config.batch_size, config.max_seq_len)
    tokens = torch.randint(config.vocab_size, shape, device=device)

    def measure(step: Callable) -> dict:
        step()
        torch.cuda.reset_peak_memory_stats()
        times = seconds(step, repeats=10)
        return dict(
            tokens_per_second=tokens.numel() / statistics.median(times),
            peak_gb=torch.cuda.max_memory_allocated() / GB,
        )

    def measure_theirs() -> dict:
        model = _qwen3_moe(config, device)
        return measure(lambda: model(input_ids=tokens, labels=tokens).loss.backward())

    def measure_ours(mode: str) -> dict:
        model = build_model(dataclasses.replace(config, activation_checkpointing=mode), device)
        model.compile_blocks()
        with attention_backends(device):
            return measure(lambda: model(tokens, tokens)[0].backward())

    theirs = measure_theirs()
    ours = {}
    for mode in ("none", "selective", "full"):
        gc.collect()  # the model before is freed by now
        torch.cuda.empty_cache()
        ours[mode] = measure_ours(mode)

    fitting = [mode for mode in ours if ours[mode]["peak_gb"] <= theirs["peak_gb"]]
    compared = max(fitting, key=lambda mode: ours[mode]["tokens_per_second"])
    write(
        "vs_transformers",
        ours[compared]["tokens_per_second"] / theirs["tokens_per_second"],
        "times the tokens/s of transformers",
        10,
        environment(device),
        dict(
            transformers=transformers.__version__,
            theirs=theirs,
            compared=compared,
            ours=ours,
        ),
    )


def _qwen3_moe(config: Config, device: torch.device) -> nn.Module:
    """transformers' model of the same shapes, in bf16.

    It trains as fast as transformers can: fused attention, grouped matmuls for the experts, and
    torch.compile. Its own checkpointing recomputes whole blocks.
    """
    import transformers

    theirs = transformers.Qwen3MoeConfig(
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
    # The parameters are made in bf16: in fp32 they would first take twice the memory.
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = transformers.Qwen3MoeForCausalLM(theirs)
    torch.set_default_dtype(torch.float32)
    model.set_experts_implementation("grouped_mm")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    model.compile()
    return model


# ---------------------------------------------------------------- checkpoints


def checkpoint_io(folder: Path) -> None:
    """Saves and loads `5b` with checksums, beside dd writing and reading a file of that size."""
    gb = checkpoint_gb(Config(**PRESETS["5b"]))
    disk_bytes, disk_write_seconds, disk_read_seconds = _dd_seconds(folder / "dd", gb)

    # A run with whole training state, which has not trained: only sizes matter here.
    options = dict(save_dir=str(folder / "run"), keep_checkpoints=1, cache_dir=str(CACHE))
    config, _, _ = resolve(options, "5b", None)
    trainer = Trainer(config, data.prepare(config))
    path = folder / "checkpoint_step_1.pt"

    # By how much saving raises the peak of this process's memory
    host_bytes_before = _peak_host_bytes()
    save_seconds = timed(lambda: checkpoint.save(path, trainer.state_dict()))
    overhead_gb = (_peak_host_bytes() - host_bytes_before) / GB
    saved_bytes = path.stat().st_size

    def load() -> None:
        trainer.load_state_dict(checkpoint.load(path))
        torch.cuda.synchronize()

    # What was just written is still in the system's cache, and would be read from there.
    forget_file(path)
    load_seconds = timed(load)

    save_gb_s = saved_bytes / save_seconds / GB
    load_gb_s = saved_bytes / load_seconds / GB
    disk_write_gb_s = disk_bytes / disk_write_seconds / GB
    disk_read_gb_s = disk_bytes / disk_read_seconds / GB
    # The share of the disk's own speed that each reaches
    share = dict(
        save=save_gb_s / disk_write_gb_s,
        load=load_gb_s / disk_read_gb_s,
    )
    write(
        "checkpoint_io",
        100 * min(share.values()),
        "% of the disk's own speed, the slower of saving and loading",
        1,
        environment(trainer.device),
        dict(
            share=share,
            gb=saved_bytes / GB,
            save_gb_s=save_gb_s,
            load_gb_s=load_gb_s,
            disk_write_gb_s=disk_write_gb_s,
            disk_read_gb_s=disk_read_gb_s,
            host_memory_overhead_gb=overhead_gb,
        ),
    )


def _dd_seconds(path: Path, gb: float) -> tuple[int, float, float]:
    """(bytes, seconds to write, seconds to read) of a file of `gb` GB, by dd."""
    count = int(gb * GB / 2**24)  # blocks of 16 MiB
    write_command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={count}", "conv=fsync"]
    read_command = ["dd", f"if={path}", "of=/dev/null", "bs=16M"]
    writing = timed(lambda: subprocess.run(write_command, check=True))
    forget_file(path)
    reading = timed(lambda: subprocess.run(read_command, check=True))
    size = path.stat().st_size
    path.unlink()
    return size, writing, reading


def forget_file(path: Path) -> None:
    """Drops a file from the system's cache, so that reading it reads the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak_host_bytes() -> int:
    """The largest resident memory of this process so far; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
