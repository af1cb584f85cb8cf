"""Writes the README's figures from benchmarks/results, between the marks <!-- NAME --> and <!-- end -->.

python -m benchmarks.tables
"""

import json
import re
import statistics
import sys
from pathlib import Path

from config import PRESETS, Config
from planner.machine import GPUS
from planner.plan import format_count

ROOT = Path(__file__).resolve().parent.parent


def default_run() -> str:
    r = json.loads((ROOT / "benchmarks/results/default_run_cpu.json").read_text())
    d = r["details"]
    text = d["sample"]["text"].rstrip()
    return (
        f"| on | first step after | in all | tokens/s | validation loss | below the unigram entropy |\n|---|---|---|---|---|---|\n"
        f"| {r['gpu'].removeprefix('none, ')} | {d['seconds_to_first_step']:.0f} s | {d['seconds_in_all']:.0f} s | "
        f"{d['tokens_per_second']:,.0f} | {r['value']:.2f} nats | by {d['below_unigram_entropy']:.2f} nats |\n\n"
        f"Its text after {d['tokens'] / 1e6:.2f} million tokens:\n\n```\n{text}\n```"
    )


def headline() -> str:
    """The figures that a reader asks for first."""

    def result(name: str, gpu: str) -> dict:
        return json.loads((ROOT / f"benchmarks/results/{name}_{gpu}.json").read_text())

    lines = [
        "| all parameters, every feature on | bf16, tokens/s | MFU | fp16, tokens/s | MFU | predicted peak memory is off by |",
        "|---|---|---|---|---|---|",
    ]
    for preset, gpu, where in (
        ("18b", "h200", "`18b`, one H200 (141 GB)"),
        ("18b", "h100", "`18b`, one H100 (80 GB)"),
        ("25b", "h200", "`25b`, one H200"),
    ):
        cells, errors = [], []
        for precision in ("bf16", "fp16"):
            if not (ROOT / f"benchmarks/results/train_{preset}_{precision}_{gpu}.json").exists():
                cells += ["", ""]
                continue
            r = result(f"train_{preset}_{precision}", gpu)
            cells += [f"{r['value']:,.0f}", f"{r['details']['mfu']:.2f}"]
            memory = {kind: sizes["total"] for kind, sizes in r["details"]["memory_gb"].items()}
            errors.append(100 * abs(memory["predicted"] - memory["measured"]) / memory["measured"])
        lines.append(f"| {where} | {' | '.join(cells)} | {max(errors):.2f}% |")
    theirs, io = result("vs_transformers", "h200"), result("checkpoint_io", "h200")["details"]
    return "\n".join(
        [
            *lines,
            "",
            f"Four layers train at {theirs['value']:.2f} times the speed of transformers' Qwen3-MoE, compiled, in no more memory; a "
            f"checkpoint of {io['gb']:.0f} GB is saved at {io['save_gb_s']:.1f} GB/s and loaded at {io['load_gb_s']:.1f}, checksums included, on a "
            f"disk that `dd` writes at {io['disk_write_gb_s']:.1f} and reads at {io['disk_read_gb_s']:.1f}.",
        ]
    )


def data_speed() -> str:
    r = json.loads((ROOT / "benchmarks/results/data_speed_cpu.json").read_text())
    t, loader = r["details"]["tokenizing"], r["details"]["loader"]
    ways = {
        "this program, from .jsonl to shards": "ours_mb_per_s",
        "`datasets.map`, a process for each core": "datasets_map_processes_mb_per_s",
        "`datasets.map`, the tokenizer's own threads": "datasets_map_threads_mb_per_s",
    }
    lines = [
        f"| tokenizing {t['text_mb']:.0f} MB on {r['gpu'].removeprefix('none, ')} | MB/s (median of {r['repetitions']}) |",
        "|---|---|",
    ]
    lines += [f"| {way} | {statistics.median(t[key]):.1f} |" for way, key in ways.items()]
    lines += [
        "",
        "| loader | batches/s, warm | tokens/s | batches/s, cold disk | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in loader):
        cells = (
            f"{loader[f'{name}, {state}']['batches_per_s']:,.0f} | {loader[f'{name}, {state}']['tokens_per_s'] / 1e6:.1f}M"
            for state in ("warm", "cold")
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_figures() -> str:
    lines = ["| figure | GPU | value | besides |", "|---|---|---|---|"]
    for path in sorted(
        path for gpu in GPUS for path in (ROOT / "benchmarks/results").glob(f"*_{gpu}.json")
    ):
        r = json.loads(path.read_text())
        if r["name"] == "sampling" or r["name"].startswith("profile_"):  # have tables of their own
            continue
        d, beside = r["details"], ""
        if r["name"].startswith("train_"):
            memory = {kind: sizes["total"] for kind, sizes in d["memory_gb"].items()}
            hours = (
                Config(**PRESETS[r["name"].split("_", 1)[1].rpartition("_")[0]]).tokens_per_step
                * 50_000
                / r["value"]
                / 3600
            )
            beside = (
                f"MFU {d['mfu']:.3f}; peak {memory['measured']:.1f} GB, predicted {memory['predicted']:.1f}; first step after "
                f"{d['seconds_to_first_step']:.0f} s; 50,000 steps would take {hours:,.0f} hours"
            )
        if r["name"] == "muon_step_18b":
            beside = f"{d['streaming_costs_seconds']:.3f} s of it for streaming {d['host_gb']:.0f} GB of state each way"
        if r["name"] == "memory_5b":
            largest = max(d["errors"], key=d["errors"].get)
            beside = f"{largest}: {d['predicted_gb'][largest]:.2f} GB predicted, {d['measured_gb'][largest]:.2f} measured; in all {d['measured_gb']['total']:.1f}"
        if r["name"] == "small_precisions":
            losses = ", ".join(
                f"{run}: {loss:.3f}" for run, loss in d["final_validation_loss"].items()
            )
            beside = (
                f"{losses} ({d['unigram_entropy']:.2f} is the unigram entropy); between seeds {d['spread_of_seeds']:.4f}; "
                f"steps skipped after warm-up: {sum(d['skipped_steps_after_warmup'].values())}"
            )
        if r["name"] == "curve_18b_fp16":
            losses = d["train_loss"]
            beside = (
                f"{len(losses)} steps in {d['seconds_in_all']:.0f} s; training loss {losses[0]:.2f} to {losses[-1]:.2f}; unigram entropy "
                f"{d['unigram_entropy']:.2f}; skipped, in search of the loss scale: {d['skipped_steps'][-1]} step"
            )
        if r["name"] == "resume_18b":
            beside = (
                f"steps {d['steps'][0]} to {d['steps'][-1]}; the first differs by {abs(d['whole'][0] - d['resumed'][0]):g}; two runs resumed from the same "
                f"checkpoint differ by {d['between_resumed']:.2g}: sums are not made in a fixed order on a GPU"
            )
        if r["name"].startswith("moe_vs_dense"):
            beside = f"largest share of the pairs on one expert: {max(d['load']):.3f}"
        if r["name"] == "vs_transformers":
            ours, theirs = d["ours"][d["compared"]], d["theirs"]
            full = d["ours"]["full"]["tokens_per_second"] / theirs["tokens_per_second"]
            beside = (
                f"`{d['compared']}`: {ours['tokens_per_second']:,.0f} tokens/s in {ours['peak_gb']:.1f} GB; transformers {d['transformers']}, "
                f"compiled, its checkpointing on, which recomputes all: {theirs['tokens_per_second']:,.0f} in {theirs['peak_gb']:.1f} GB; "
                f"ours at `full`: {full:.2f} times"
            )
        if r["name"].startswith("checkpointing_"):
            beside = "; ".join(
                f"{mode}: {d['activations_gb'][mode]:.1f} GB, {d['tokens_per_second'][mode]:,.0f} tokens/s"
                for mode in d["activations_gb"]
            )
        if r["name"] == "checkpoint_io":
            beside = (
                f"saved at {d['save_gb_s']:.2f}, loaded at {d['load_gb_s']:.2f} GB/s; the disk writes {d['disk_write_gb_s']:.2f}, reads "
                f"{d['disk_read_gb_s']:.2f}; {d['gb']:.1f} GB; {d['host_memory_overhead_gb']:.2f} GB more host memory"
            )
        lines.append(
            f"| `{r['name']}` | {r['gpu'].removeprefix('NVIDIA ')} | {r['value']:{',.0f' if r['value'] >= 1000 else '.4g'}} {r['unit']} | {beside} |"
        )
    return "\n".join(lines)


def profile() -> str:
    r = json.loads((ROOT / "benchmarks/results/profile_18b_bf16_h200.json").read_text())
    d = r["details"]
    lines = [
        f"| a step of `18b` in bf16 on {r['gpu'].removeprefix('NVIDIA ')}: {r['value']:.2f} s | seconds | share | floor | times the floor |",
        "|---|---|---|---|---|",
    ]
    for kind, spent in sorted(d["seconds"].items(), key=lambda item: -item[1]):
        floor = d["floor_seconds"].get(kind)
        name = {
            "optimizer: copies": "optimizer: copies, beside its products",
            "optimizer (wall)": "optimizer, from its start to its end",
        }.get(kind, kind)
        lines.append(
            f"| {name} | {spent:.2f} | {100 * d['share'][kind]:.1f}% | "
            + (f"{floor:.2f} | {spent / floor:.2f} |" if floor else "| |")
        )
    return "\n".join(
        [
            *lines,
            "",
            f"The floor: FLOPs at {d['product_tflops']:.0f} TFLOP/s, bytes at {d['copy_tb_s']:.2f} TB/s, as a large product and a "
            "large copy reach them on that GPU. The optimizer's rows are parts of its time from start to end, and its copies run "
            "beside its products, so the shares add up to more than all.",
        ]
    )


def sampling() -> str:
    lines = [
        "| sampling on | preset | texts at a time | this program, tokens/s | transformers' `generate`, tokens/s |",
        "|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "benchmarks/results").glob("sampling_*.json")):
        r = json.loads(path.read_text())
        d, machine = r["details"], r["gpu"].removeprefix("none, ")
        lines += [
            f"| {machine} | `{d['preset']}`, {d['precision']} | {key.split()[0]} | {speeds['ours']:,.1f} | {speeds['transformers']:,.1f} |"
            for key, speeds in d.items()
            if key.endswith(" at a time")
        ]
    return "\n".join(lines)


def lm_eval() -> str:
    r = json.loads((ROOT / "benchmarks/results/lm_eval_cpu.json").read_text())
    d = r["details"]
    [(task, found)] = d["results"].items()
    domains = sorted(d["evaluate"]["domains"].items(), key=lambda item: -item[1]["tokens"])
    lines = [
        "| `tools.evaluate` on the text held out of the default run | tokens | loss | perplexity | bits per byte | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {f['tokens']:,} | {f['loss']:.3f} | {f['perplexity']:.1f} | {f['bits_per_byte']:.3f} | {f['accuracy']:.3f} |"
        for name, f in [*domains, ("all", d["evaluate"])]
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"`lm_eval` {d['lm_eval']} on the same checkpoint, exported: `{task}`, {d['n_samples'][task]['effective']} questions "
            f"of 4 choices, accuracy {found['acc,none']:.3f} ± {found['acc_stderr,none']:.3f}.",
        ]
    )


def presets() -> str:
    lines = [
        "| preset | width x layers | `d_ff` | MoE every | parameters | active | tokens a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in PRESETS.items():
        c = Config(**values)
        lines.append(
            f"| `{name}` | {c.d_model} x {c.n_layers} | {c.d_ff:,} | {c.moe_every} | {format_count(c.total_params)} | "
            f"{format_count(c.active_params)} | {c.tokens_per_step:,} |"
        )
    return "\n".join(lines)


def fill(readme: str, blocks: dict) -> str:
    """The README with what stands between <!-- NAME --> and <!-- end --> replaced by blocks[NAME]()."""
    for name, block in blocks.items():
        readme = re.sub(
            rf"<!-- {name} -->\n.*?<!-- end -->",
            lambda _: f"<!-- {name} -->\n{block()}\n<!-- end -->",
            readme,
            flags=re.S,
        )
    return readme


def rewrite(filled) -> None:
    """Writes README.md as `filled` returns it."""
    path = ROOT / "README.md"
    before = path.read_text()
    path.write_text(filled(before))
    print(
        "README.md is up to date" if filled(before) == before else "README.md written",
        file=sys.stderr,
    )


def filled(readme: str) -> str:
    """The README with every block of this file written anew."""
    return fill(
        readme,
        dict(
            headline=headline,
            default_run=default_run,
            presets=presets,
            data_speed=data_speed,
            gpu_figures=gpu_figures,
            profile=profile,
            sampling=sampling,
            lm_eval=lm_eval,
        ),
    )


if __name__ == "__main__":
    print(__doc__) if sys.argv[1:] else rewrite(filled)
