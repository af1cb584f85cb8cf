"""Makes the figures that the README quotes, each from a whole run of the program with every feature on.

    python -m benchmarks.run                    list the names
    python -m benchmarks.run NAME [NAME ...] [--FIELD VALUE ...]        any option of run_experiment.py, for all its runs

    default_run             the default run on a CPU, from an empty cache
    small_precisions        `small` in fp16 and bf16, two seeds each, on one plot
    memory_5b               predicted against measured memory of `5b`
    train_18b_bf16, train_18b_fp16, train_25b_bf16
                            whole training steps, with the options that `plan --activation_checkpointing auto` advises
    curve_18b_fp16          `18b` on `installed` for as many steps as ten minutes hold, its schedule whole: its loss curve
    resume_18b              8 layers of `18b`: the same steps in one run, and resumed from its checkpoint
    start_18b               from launch, tokens cached, to the end of the first step (of train_18b_fp16, which it runs)
    memory_prediction_error the largest error of the runs above (reads their files)
    checkpointing           checkpointing_saved and checkpointing_slowdown: selective against none
    muon_step_18b           Muon over all of `18b`, state streamed from the host
    moe_vs_dense            an MoE layer against a dense one of equal FLOPs; and moe_vs_dense_skewed
    vs_transformers         four layers against transformers' Qwen3-MoE, compiled
    checkpoint_io           saving and loading `5b` against the disk's own speed

All but the first need a GPU. Each writes benchmarks/results/NAME_GPU.json: name, gpu, value, unit, repetitions, command,
commit, versions, details.
"""

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

import data
from benchmarks import parts
from benchmarks.result_files import (
    CACHE,
    FOR_ALL,
    RESULTS,
    ROOT,
    SHORT,
    train,
    train_side_by_side,
    write,
)
from cli import add_config_options, config_options, exit_code, new_parser
from config import ConfigError, ExperimentError, nearest, resolve
from planner.choice import choose
from planner.machine import find_machine
from plot import plot_comparison
from record.results import environment


def default_run(folder: Path) -> None:
    """The default run as a newcomer has it: no cache, no GPU."""
    r = train(folder / "run", "--device", "cpu", "--cache_dir", str(folder / "cache"))
    totals, entropy = r["totals"], r["data"]["unigram_entropy"]
    shutil.move(folder / "run" / "training_curves.png", ROOT / "benchmarks" / "default_run.png")
    write(
        "default_run",
        r["final_metrics"]["val_loss"],
        "nats per token (final validation loss)",
        1,
        r["environment"],
        dict(
            unigram_entropy=entropy,
            below_unigram_entropy=entropy - r["final_metrics"]["val_loss"],
            seconds_to_first_step=totals["seconds_to_first_step"],
            tokens_per_second=totals["tokens_per_second"],
            seconds_in_all=totals["elapsed_seconds"],
            steps=totals["steps"],
            tokens=totals["tokens"],
            train_loss=r["final_metrics"]["train_loss"],
            sample=r["sample"],
        ),
    )


def small_precisions(folder: Path) -> None:
    """`small` for 500 steps on `installed`: do fp16 and bf16 end within the spread of two seeds?"""
    common = [
        "--preset",
        "small",
        "--data",
        "installed",
        "--max_characters",
        "300_000_000",
        "--max_steps",
        "500",
        "--save_every",
        "0",
        "--save_minutes",
        "0",
        "--cache_dir",
        str(CACHE),
    ]
    data.prepare(
        resolve(
            dict(data="installed", max_characters=300_000_000, cache_dir=str(CACHE)), "small", None
        )[0]
    )
    runs = train_side_by_side(
        {
            f"{precision}, seed {seed}": [*common, "--precision", precision, "--seed", seed]
            for seed in ("1", "2")
            for precision in ("fp16", "bf16")
        },
        folder,
    )
    final = {label: r["final_metrics"]["val_loss"] for label, r in runs.items()}
    means = {
        p: statistics.mean(v for label, v in final.items() if label.startswith(p))
        for p in ("fp16", "bf16")
    }
    spread = max(abs(final[f"{p}, seed 1"] - final[f"{p}, seed 2"]) for p in means)
    plot_comparison(
        {label: r["history"] for label, r in runs.items()},
        ROOT / "benchmarks" / "small_precisions.png",
        title="small on the installed packages' text",
    )
    write(
        "small_precisions",
        means["fp16"] - means["bf16"],
        "nats per token (fp16 minus bf16, final validation loss)",
        2,
        next(iter(runs.values()))["environment"],
        dict(
            final_validation_loss=final,
            spread_of_seeds=spread,
            skipped_steps_after_warmup={
                label: _skipped_after_warmup(r) for label, r in runs.items()
            },
            unigram_entropy=next(iter(runs.values()))["data"]["unigram_entropy"],
        ),
    )


def _skipped_after_warmup(results: dict) -> int:
    warmup = results["config"]["warmup_fraction"] * results["config"]["max_steps"]
    counts = [
        row["skipped_steps"]
        for row in results["history"]
        if "skipped_steps" in row and row["step"] >= warmup
    ]
    return counts[-1] - counts[0]


def memory_5b(folder: Path) -> None:
    """20 steps of `5b`: the largest error of a predicted component of at least 1 GB, and of the total."""
    r = train(
        folder / "run",
        "--preset",
        "5b",
        "--data",
        "python",
        "--max_steps",
        "20",
        "--eval_steps",
        "2",
        "--log_every",
        "1",
        "--save_every",
        "0",
        "--save_minutes",
        "0",
        "--sample_tokens",
        "0",
        "--cache_dir",
        str(CACHE),
    )
    predicted, measured = r["memory_gb"]["predicted"], r["memory_gb"]["measured"]
    errors = {k: abs(predicted[k] - v) / v for k, v in measured.items() if v >= 1}
    write(
        "memory_5b",
        100 * max(errors.values()),
        "% (largest error of a component of at least 1 GB)",
        1,
        r["environment"],
        dict(
            predicted_gb=predicted,
            measured_gb=measured,
            errors=errors,
            tokens_per_second=[
                row["tokens_per_second"] for row in r["history"] if "train_loss" in row
            ],
        ),
    )


def _speeds(results: dict) -> list[float]:
    """tokens/s of each step from the third on: the first two compile and fill the allocator."""
    return [row["tokens_per_second"] for row in results["history"] if "train_loss" in row][2:]


def advised(preset: str, precision: str) -> list[str]:
    """The options that `plan` gives for a preset on this machine's GPU."""
    parser = new_parser("the options after the names are those of run_experiment.py", __doc__)
    add_config_options(parser)
    given = config_options(parser.parse(FOR_ALL))
    machine = find_machine(given.get("host_memory_gb", 0))
    config, _, _ = resolve(
        dict(precision=precision, activation_checkpointing="auto") | given,
        preset,
        machine.memory_gb,
    )
    return choose(config, machine, fixed_batch=False)[0].options(config).split()


def train_preset(folder: Path, preset: str, precision: str, steps: int = 7) -> dict:
    """A few whole steps of a preset; its tokens are cached first. Writes the speed, and returns the run's results."""
    options = ["--preset", preset, "--precision", precision, *advised(preset, precision), *SHORT]
    data.prepare(resolve(dict(cache_dir=str(CACHE)), preset, None)[0])
    r = train(folder / "run", *options, "--max_steps", str(steps))
    speeds = _speeds(r)
    write(
        f"train_{preset}_{precision}",
        statistics.median(speeds),
        "tokens/s",
        len(speeds),
        r["environment"],
        dict(
            mfu=statistics.median(
                row["mfu"] for row in r["history"][-len(speeds) :] if "mfu" in row
            ),
            tokens_per_second=speeds,
            options=" ".join(options),
            memory_gb=r["memory_gb"],
            seconds_to_first_step=r["totals"]["seconds_to_first_step"],
            skipped_steps=[row["skipped_steps"] for row in r["history"] if "train_loss" in row],
            train_loss=[row["train_loss"] for row in r["history"] if "train_loss" in row],
        ),
    )
    return r


def train_and_start_18b(folder: Path) -> None:
    r = train_preset(folder, "18b", "fp16")
    write(
        "start_18b",
        r["totals"]["seconds_to_first_step"],
        "s",
        1,
        r["environment"],
        dict(r["totals"]),
    )


def curve_18b_fp16(folder: Path, steps: int = 22) -> None:
    """The loss curve of the whole model. AdamW's rate is 0.0003: the brief's 0.001 is meant to be reached after 2,500 steps, and so
    soon it makes the loss rise first. Nothing is saved: a checkpoint of 110 GB is more than the disk of many a machine holds."""
    options = [
        "--preset",
        "18b",
        "--data",
        "installed",
        "--max_characters",
        "300_000_000",
        "--max_steps",
        str(steps),
        *advised("18b", "fp16"),
        "--adamw_lr",
        "0.0003",
        "--warmup_fraction",
        "0.1",
        "--eval_every",
        "11",
        "--eval_steps",
        "2",
        "--log_every",
        "1",
        "--save_every",
        "0",
        "--save_minutes",
        "0",
        "--cache_dir",
        str(CACHE),
    ]
    r = train(folder / "run", *options)
    rows = [row for row in r["history"] if "train_loss" in row]
    write(
        "curve_18b_fp16",
        r["final_metrics"]["val_loss"],
        "nats per token (final validation loss)",
        1,
        r["environment"],
        dict(
            options=" ".join(options),
            unigram_entropy=r["data"]["unigram_entropy"],
            seconds_in_all=r["totals"]["elapsed_seconds"],
            seconds_to_first_step=r["totals"]["seconds_to_first_step"],
            tokens=r["totals"]["tokens"],
            memory_gb=r["memory_gb"],
            sample=r["sample"],
            **{
                key: [row[key] for row in rows]
                for key in ("train_loss", "tokens_per_second", "skipped_steps")
            },
        ),
    )
    shutil.move(folder / "run" / "training_curves.png", ROOT / "benchmarks" / "curve_18b_fp16.png")


def resume_18b(folder: Path) -> None:
    """Six steps with a checkpoint after the third, and twice the last three again from it: where the GPU's kernels add in
    no fixed order, the two resumed runs differ too."""
    common = ["--precision", "fp16", "--max_steps", "6", *SHORT, "--save_every"]
    runs = [train(folder / "whole", "--preset", "18b", "--n_layers", "8", *common, "3")]
    for name in ("resumed", "again"):
        runs.append(
            train(
                folder / name,
                "--resume",
                str(folder / "whole" / "checkpoint_step_3.pt"),
                *common,
                "0",
            )
        )
    whole, resumed, again = (
        [row["train_loss"] for row in r["history"] if row["step"] > 3 and "train_loss" in row]
        for r in runs
    )
    write(
        "resume_18b",
        max(abs(a - b) for a, b in zip(whole, resumed)),
        "nats per token (largest difference after resuming)",
        3,
        runs[0]["environment"],
        dict(
            steps=[4, 5, 6],
            whole=whole,
            resumed=resumed,
            resumed_again=again,
            between_resumed=max(abs(a - b) for a, b in zip(resumed, again)),
            validation_loss=[r["final_metrics"]["val_loss"] for r in runs],
        ),
    )


def memory_prediction_error(_: Path) -> None:
    """Of the totals of every train_ result from this GPU."""
    errors = {}
    for path in sorted(RESULTS.glob(f"train_*_{find_machine().key}.json")):
        details = json.loads(path.read_text())["details"]
        predicted, measured = (
            details["memory_gb"]["predicted"]["total"],
            details["memory_gb"]["measured"]["total"],
        )
        errors[path.stem] = 100 * abs(predicted - measured) / measured
    write(
        "memory_prediction_error",
        max(errors.values()),
        "% of the measured peak",
        len(errors),
        environment(torch.device("cuda")),
        dict(errors=errors),
    )


def checkpointing(folder: Path) -> None:
    """12 layers of `18b`, micro-batch 4, state on the device: what each mode keeps and what it costs."""
    runs = {
        mode: train(
            folder / mode,
            "--preset",
            "18b",
            "--n_layers",
            "12",
            "--precision",
            "bf16",
            "--batch_size",
            "4",
            "--gradient_accumulation_steps",
            "2",
            "--offload_optimizer",
            "false",
            "--activation_checkpointing",
            mode,
            "--max_steps",
            "8",
            *SHORT,
        )
        for mode in ("none", "selective", "full")
    }
    activations = {mode: r["memory_gb"]["measured"]["activations"] for mode, r in runs.items()}
    speeds = {mode: statistics.median(_speeds(r)) for mode, r in runs.items()}
    details, machine = (
        dict(activations_gb=activations, tokens_per_second=speeds),
        runs["none"]["environment"],
    )
    write(
        "checkpointing_saved",
        100 * (1 - activations["selective"] / activations["none"]),
        "% of the activations' bytes",
        6,
        machine,
        details,
    )
    write(
        "checkpointing_slowdown",
        100 * (speeds["none"] / speeds["selective"] - 1),
        "% more time a step",
        6,
        machine,
        details,
    )


BENCHMARKS = dict(
    default_run=default_run,
    small_precisions=small_precisions,
    memory_5b=memory_5b,
    train_18b_bf16=lambda folder: train_preset(folder, "18b", "bf16"),
    train_18b_fp16=train_and_start_18b,
    start_18b=train_and_start_18b,
    train_25b_bf16=lambda folder: train_preset(folder, "25b", "bf16"),
    curve_18b_fp16=curve_18b_fp16,
    resume_18b=resume_18b,
    memory_prediction_error=memory_prediction_error,
    checkpointing=checkpointing,
    checkpointing_saved=checkpointing,
    checkpointing_slowdown=checkpointing,
    muon_step_18b=parts.muon_step_18b,
    moe_vs_dense=parts.moe_vs_dense,
    moe_vs_dense_skewed=parts.moe_vs_dense,
    vs_transformers=parts.vs_transformers,
    checkpoint_io=parts.checkpoint_io,
)


def main(argv: list[str]) -> None:
    first_option = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
    names, FOR_ALL[:] = argv[:first_option], argv[first_option:]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise ConfigError(
            f"unknown benchmark {unknown[0]!r}.{nearest(unknown[0], BENCHMARKS)} There are {', '.join(BENCHMARKS)}"
        )
    if not names:
        print(__doc__)
    if names not in ([], ["default_run"]) and not torch.cuda.is_available():
        raise ExperimentError("no GPU was found, which all benchmarks but default_run need")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
