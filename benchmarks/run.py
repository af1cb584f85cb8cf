"""Makes the figures of README.md and docs/ from whole runs of the program, with every feature on.

    python -m benchmarks.run                                          list the names
    python -m benchmarks.run NAME [NAME ...] [--FIELD VALUE ...]      make these figures
    python -m benchmarks.run train_18b_bf16 --gpus 2                  the same with two GPUs

The options are those of run_experiment.py, and they go to every run that a benchmark starts.
--gpus is for the benchmarks train_: they train with one GPU first, then with all.

    default_run              the default run on a CPU, from an empty cache
    small_precisions         `small` in fp16 and bf16, two seeds each, on one plot
    memory_5b                predicted against measured memory of `5b`
    first_command            whole training steps of the preset that the program chooses for this
                             GPU, as `python run_experiment.py` trains it, and with `full`
    train_18b_bf16           whole training steps, with the fastest options that fit
    train_18b_fp16           the same in fp16
    train_25b_bf16           the same for `25b`
    start_18b                train_18b_fp16: the time from launch, with cached tokens, to the end of
                             the first step
    curve_18b_fp16           the loss curve of `18b` on `installed`: a whole schedule, of as many
                             steps as ten minutes hold
    resume_18b               8 layers of `18b`: the same steps in one run, and resumed from its
                             checkpoint
    memory_prediction_error  the largest error of predicted memory in the train_ results of this GPU
    checkpointing            what selective checkpointing saves and costs, compared with none
    checkpointing_saved      the same
    checkpointing_slowdown   the same
    deterministic            the price of --deterministic on 8 layers of `18b`
    muon_step_18b            Muon over all of `18b`, with optimizer offload
    moe_vs_dense             an MoE layer against a dense one of equal FLOPs
    moe_vs_dense_skewed      the same where every token goes to one of the experts
    vs_transformers          four layers against transformers' Qwen3-MoE, compiled
    checkpoint_io            saving and loading `5b` against the disk's own speed

All but default_run need a GPU. A benchmark writes benchmarks/results/NAME_GPU.json for each of its
figures: name, gpu, value, unit, repetitions, command, commit, versions, details.
"""

import itertools
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # before the imports below: slow, and they fail without their packages
    from cli import exit_at_a_wrong_path
    from config import explain_missing_packages

    explain_missing_packages()
    exit_at_a_wrong_path(sys.argv[1:])

import torch

import data
from benchmarks import parts
from benchmarks.result_files import (
    CACHE,
    EXTRA_OPTIONS,
    GPUS_OPTION,
    RESULTS,
    ROOT,
    SHORT,
    option_words,
    train,
    train_side_by_side,
    write,
)
from cli import add_config_options, config_options, exit_code, new_parser
from config import ConfigError, ExperimentError, nearest, resolve
from planner.choice import choose, fastest
from planner.machine import find_machine
from plot import plot_comparison
from record.results import environment

PLOTS = ROOT / "benchmarks"
FINAL_LOSS = "nats per token (final validation loss)"


# ---------------------------------------------------------------- what the benchmarks share


def cache_tokens(preset: str, **options) -> None:
    """Tokenizes the text of a run, so that the run finds its tokens in the cache."""
    config, _, _ = resolve(dict(options, cache_dir=str(CACHE)), preset, None)
    data.prepare(config)


def advised_options(preset: str, precision: str) -> list[str]:
    """The options of the fastest choice that fits this machine's GPU, without checkpointing if that
    fits; or what the extra options leave of it.
    """
    options = {"precision": precision, **extra_options()}
    machine = find_machine(options.get("host_memory_gb", 0))
    config, _, _ = resolve(options, preset, machine.memory_gb)
    choice = None
    if config.activation_checkpointing == "auto":
        choice = fastest(config, machine)
    if choice is None:
        choice, _ = choose(config, machine, fixed_batch=False)
    return choice.options(config).split()


def extra_options() -> dict:
    """The options that benchmarks.run was given after the names."""
    parser = new_parser("the options after the names are those of run_experiment.py", __doc__)
    add_config_options(parser)
    return config_options(parser.parse(EXTRA_OPTIONS))


def training_rows(results: dict) -> list[dict]:
    """The rows of a run's history that tell of training steps, not of validations."""
    return [row for row in results["history"] if "train_loss" in row]


def column(rows: list[dict], key: str) -> list:
    return [row[key] for row in rows]


def steady(rows: list[dict]) -> list[dict]:
    """The steps from the third on: the first two compile, and fill the allocator."""
    return rows[2:]


def median_speed(results: dict) -> float:
    """tokens/s of a run of a few steps."""
    return statistics.median(column(steady(training_rows(results)), "tokens_per_second"))


def median_mfu(rows: list[dict]) -> float | None:
    """None on a GPU whose peak is unknown."""
    known = [row["mfu"] for row in rows if row["mfu"] is not None]
    if not known:
        return None
    return statistics.median(known)


# ---------------------------------------------------------------- small runs


def default_run(folder: Path) -> None:
    """The default run as a newcomer has it: no cache, no GPU."""
    run = folder / "run"
    results = train(run, option_words(device="cpu", cache_dir=folder / "cache"))
    shutil.move(run / "training_curves.png", PLOTS / "default_run.png")
    totals = results["totals"]
    loss = results["final_metrics"]["val_loss"]
    entropy = results["data"]["unigram_entropy"]
    write(
        "default_run",
        loss,
        FINAL_LOSS,
        1,
        results["environment"],
        dict(
            unigram_entropy=entropy,
            below_unigram_entropy=entropy - loss,
            seconds_to_first_step=totals["seconds_to_first_step"],
            tokens_per_second=totals["tokens_per_second"],
            seconds_in_all=totals["elapsed_seconds"],
            steps=totals["steps"],
            tokens=totals["tokens"],
            train_loss=results["final_metrics"]["train_loss"],
            sample=results["sample"],
        ),
    )


def small_precisions(folder: Path) -> None:
    """`small` for 500 steps: do fp16 and bf16 end within the spread of two seeds?"""
    cache_tokens("small", data="installed", max_characters=300_000_000)
    runs = train_side_by_side(_runs_of_small_precisions(), folder)
    histories = {label: results["history"] for label, results in runs.items()}
    plot_comparison(
        histories,
        PLOTS / "small_precisions.png",
        title="small on the installed packages' text",
    )

    losses = {}
    skipped = {}
    for label, results in runs.items():
        losses[label] = results["final_metrics"]["val_loss"]
        skipped[label] = _skipped_after_warmup(results)
    means = {}
    spreads = {}
    for precision in ("fp16", "bf16"):
        of_seeds = [losses[f"{precision}, seed 1"], losses[f"{precision}, seed 2"]]
        means[precision] = statistics.mean(of_seeds)
        spreads[precision] = max(of_seeds) - min(of_seeds)
    first = runs["fp16, seed 1"]
    write(
        "small_precisions",
        means["fp16"] - means["bf16"],
        "nats per token (fp16 minus bf16, final validation loss)",
        2,
        first["environment"],
        dict(
            final_validation_loss=losses,
            spread_of_seeds=max(spreads.values()),
            skipped_steps_after_warmup=skipped,
            unigram_entropy=first["data"]["unigram_entropy"],
        ),
    )


def _runs_of_small_precisions() -> dict[str, list[str]]:
    """The options of each run by its label."""
    runs = {}
    for seed in (1, 2):
        for precision in ("fp16", "bf16"):
            runs[f"{precision}, seed {seed}"] = option_words(
                preset="small",
                data="installed",
                max_characters=300_000_000,
                max_steps=500,
                save_every=0,
                save_minutes=0,
                cache_dir=CACHE,
                precision=precision,
                seed=seed,
            )
    return runs


def _skipped_after_warmup(results: dict) -> int:
    """Steps that overflowed after the warm-up, during which fp16 still looks for its loss scale."""
    warmup = results["config"]["warmup_fraction"] * results["config"]["max_steps"]
    # The rows count from the start of the run.
    counts = []
    for row in results["history"]:
        if "skipped_steps" in row and row["step"] >= warmup:
            counts.append(row["skipped_steps"])
    return counts[-1] - counts[0]


# ---------------------------------------------------------------- memory


def memory_5b(folder: Path) -> None:
    """20 steps of `5b`: the largest error of a predicted component of at least 1 GB, the total
    among them."""
    options = option_words(
        preset="5b",
        activation_checkpointing="full",
        data="python",
        max_steps=20,
        eval_steps=2,
        log_every=1,
        save_every=0,
        save_minutes=0,
        sample_tokens=0,
        cache_dir=CACHE,
    )
    results = train(folder / "run", options)
    predicted = results["memory_gb"]["predicted"]
    measured = results["memory_gb"]["measured"]
    errors = {}
    for component, gb in measured.items():
        if gb >= 1:
            errors[component] = abs(predicted[component] - gb) / gb
    write(
        "memory_5b",
        100 * max(errors.values()),
        "% (largest error of a component of at least 1 GB)",
        1,
        results["environment"],
        dict(
            predicted_gb=predicted,
            measured_gb=measured,
            errors=errors,
            tokens_per_second=column(training_rows(results), "tokens_per_second"),
        ),
    )


def memory_prediction_error(_: Path) -> None:
    """The largest error of a predicted total, over the result files train_* of this GPU."""
    gpu = find_machine().key
    errors = {}
    for path in sorted(RESULTS.glob(f"train_*_{gpu}.json")):
        memory = json.loads(path.read_text())["details"]["memory_gb"]
        measured = memory["measured"]["total"]
        difference = abs(memory["predicted"]["total"] - measured)
        errors[path.stem] = 100 * difference / measured
    if not errors:
        raise ExperimentError(f"{RESULTS} holds no train_*_{gpu}.json: run train_18b_bf16 first")
    write(
        "memory_prediction_error",
        max(errors.values()),
        "% of the measured peak",
        len(errors),
        environment(torch.device("cuda")),
        dict(errors=errors),
    )


def checkpointing(folder: Path) -> None:
    """12 layers of `18b` with optimizer state on the GPU: what each mode keeps, and its speed."""
    activations = {}
    speeds = {}
    for mode in ("none", "selective", "full"):
        size = option_words(
            preset="18b",
            n_layers=12,
            precision="bf16",
            batch_size=4,
            gradient_accumulation_steps=2,
            offload_optimizer="false",
            activation_checkpointing=mode,
            max_steps=8,
        )
        results = train(folder / mode, [*size, *SHORT])
        activations[mode] = results["memory_gb"]["measured"]["activations"]
        speeds[mode] = median_speed(results)
    machine = results["environment"]
    details = dict(activations_gb=activations, tokens_per_second=speeds)
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


# ---------------------------------------------------------------- deterministic kernels


def deterministic(folder: Path) -> None:
    """8 layers of `18b` with and without --deterministic, in turn.

    Details say whether the losses and the gradient norms of the two runs of each kind are equal to
    the bit. Each run compiles for itself: kernels from a cache would be the same in any case.
    """
    size = option_words(
        preset="18b",
        n_layers=8,
        precision="bf16",
        batch_size=4,
        gradient_accumulation_steps=2,
        offload_optimizer="false",
        activation_checkpointing="selective",
        max_steps=8,
    )
    speeds: dict[str, list[float]] = dict(false=[], true=[])
    losses: dict[str, list[list[float]]] = dict(false=[], true=[])
    norms: dict[str, list[list[float]]] = dict(false=[], true=[])
    for run, choice in enumerate(("false", "true", "true", "false")):
        options = [*size, *option_words(deterministic=choice), *SHORT]
        kernels = str(folder / f"kernels_{run}")
        results = train(folder / str(run), options, TORCHINDUCTOR_CACHE_DIR=kernels)
        rows = training_rows(results)
        speeds[choice] += column(steady(rows), "tokens_per_second")
        losses[choice].append(column(rows, "train_loss"))
        norms[choice].append(column(rows, "grad_norm"))
    medians = {choice: statistics.median(values) for choice, values in speeds.items()}
    equal = {}
    for choice in ("false", "true"):
        equal[choice] = _all_equal(losses[choice]) and _all_equal(norms[choice])
    write(
        "deterministic",
        100 * (medians["false"] / medians["true"] - 1),
        "% more time a step",
        len(speeds["true"]),
        results["environment"],
        dict(
            tokens_per_second=speeds,
            equal_losses_and_norms=equal,
            train_loss=losses,
            grad_norm=norms,
        ),
    )


def _all_equal(values: list) -> bool:
    return all(value == values[0] for value in values)


# ---------------------------------------------------------------- whole steps of a large model


def first_command(folder: Path) -> None:
    """Six whole steps as `python run_experiment.py` trains on this GPU, and six with `full`."""
    options = extra_options()
    machine = find_machine(options.get("host_memory_gb", 0))
    config, preset, _ = resolve(options, None, machine.memory_gb)
    cache_tokens(preset)
    speeds = {}
    memory_gb = {}
    for mode in ("auto", "full"):
        words = option_words(preset=preset, activation_checkpointing=mode, max_steps=6)
        results = train(folder / mode, [*words, *SHORT])
        speeds[mode] = column(steady(training_rows(results)), "tokens_per_second")
        memory_gb[mode] = results["memory_gb"]
    chosen, _ = choose(config, machine, fixed_batch=True)
    auto = statistics.median(speeds["auto"])
    full = statistics.median(speeds["full"])
    write(
        "first_command",
        auto,
        "tokens/s",
        len(speeds["auto"]),
        results["environment"],
        dict(
            preset=preset,
            precision=config.precision,
            options=chosen.options(config),
            full_tokens_per_second=full,
            times_full=auto / full,
            speeds=speeds,
            memory_gb=memory_gb["auto"],
            memory_gb_full=memory_gb["full"],
        ),
    )


def train_preset(folder: Path, preset: str, precision: str) -> dict:
    """Seven whole steps of a preset, with cached tokens; with --gpus N again on N GPUs.

    Writes the median speed, and returns the training_results.json of the run on one GPU.
    """
    cache_tokens(preset)
    chosen = option_words(preset=preset, precision=precision)
    options = [*chosen, *advised_options(preset, precision), *SHORT]
    results = train(folder / "run", [*options, *option_words(max_steps=7)])
    one_gpu = _speed_details(results, options)
    name = f"train_{preset}_{precision}"
    write(
        name,
        statistics.median(one_gpu["tokens_per_second"]),
        "tokens/s",
        len(one_gpu["tokens_per_second"]),
        results["environment"],
        one_gpu,
    )
    if GPUS_OPTION:
        _train_on_several_gpus(folder, name, chosen, one_gpu)
    return results


def _train_on_several_gpus(folder: Path, name: str, chosen: list[str], one_gpu: dict) -> None:
    """The same steps on several GPUs: what is placed where is chosen anew, the batch stays."""
    words = one_gpu["options"].split()
    batch = {}
    for field in ("batch_size", "gradient_accumulation_steps"):
        batch[field] = int(words[words.index(f"--{field}") + 1])
    gpus = int(GPUS_OPTION[1])
    options = [*chosen, *_options_on_several_gpus(chosen, batch, gpus), *SHORT, *GPUS_OPTION]
    results = train(folder / f"run_{gpus}", [*options, *option_words(max_steps=7)])
    details = _speed_details(results, options)
    speed = statistics.median(details["tokens_per_second"])
    times = speed / statistics.median(one_gpu["tokens_per_second"])
    details |= dict(
        times_one_gpu=times,
        # What is exchanged and not hidden, slows matmuls, or is done by each rank
        lost_share_of_a_step=1 - times / gpus,
        one_gpu=one_gpu,
    )
    repetitions = len(details["tokens_per_second"])
    write(name, speed, "tokens/s", repetitions, results["environment"], details, gpus=gpus)


def _options_on_several_gpus(chosen: list[str], batch: dict[str, int], gpus: int) -> list[str]:
    """The fastest choice that fits for this batch, without checkpointing if that fits."""
    named = dict(zip(chosen[::2], chosen[1::2]))
    preset = named["--preset"]
    options = {"precision": named["--precision"], **batch, **extra_options()}
    machine = find_machine(options.get("host_memory_gb", 0), gpus=gpus)
    config, _, _ = resolve(options, preset, machine.memory_gb)
    choice = fastest(config, machine, fixed_batch=True)
    if choice is None:
        raise ExperimentError(f"{preset} does not fit {gpus} GPUs like this one")
    return choice.options(config).split()


def _speed_details(results: dict, options: list[str]) -> dict:
    """What a result file says of a run of a few steps with these options."""
    rows = training_rows(results)
    return dict(
        mfu=median_mfu(steady(rows)),
        tokens_per_second=column(steady(rows), "tokens_per_second"),
        options=" ".join(options),
        memory_gb=results["memory_gb"],
        seconds_to_first_step=results["totals"]["seconds_to_first_step"],
        skipped_steps=column(rows, "skipped_steps"),
        train_loss=column(rows, "train_loss"),
        grad_norm=column(rows, "grad_norm"),
    )


def train_18b_bf16(folder: Path) -> None:
    train_preset(folder, "18b", "bf16")


def train_25b_bf16(folder: Path) -> None:
    train_preset(folder, "25b", "bf16")


def train_18b_fp16(folder: Path) -> None:
    """Writes the speed as train_18b_fp16, and the time to the first step as start_18b."""
    results = train_preset(folder, "18b", "fp16")
    totals = results["totals"]
    write(
        "start_18b",
        totals["seconds_to_first_step"],
        "s",
        1,
        results["environment"],
        dict(totals),
    )


def curve_18b_fp16(folder: Path) -> None:
    """The loss curve of the whole model.

    adamw_lr is 0.0003: the preset's 0.001 is meant to be reached after 2,500 steps, and after two
    it makes the loss rise first. Nothing is saved: a checkpoint takes 110 GB, more than the disk of
    many a machine holds.
    """
    run = folder / "run"
    schedule = option_words(
        preset="18b",
        data="installed",
        max_characters=300_000_000,
        max_steps=22,
        adamw_lr=0.0003,
        warmup_fraction=0.1,
    )
    records = option_words(
        eval_every=11,
        eval_steps=2,
        log_every=1,
        save_every=0,
        save_minutes=0,
        cache_dir=CACHE,
    )
    options = [*schedule, *advised_options("18b", "fp16"), *records]
    results = train(run, options)
    rows = training_rows(results)
    totals = results["totals"]
    write(
        "curve_18b_fp16",
        results["final_metrics"]["val_loss"],
        FINAL_LOSS,
        1,
        results["environment"],
        dict(
            options=" ".join(options),
            unigram_entropy=results["data"]["unigram_entropy"],
            seconds_in_all=totals["elapsed_seconds"],
            seconds_to_first_step=totals["seconds_to_first_step"],
            tokens=totals["tokens"],
            memory_gb=results["memory_gb"],
            sample=results["sample"],
            train_loss=column(rows, "train_loss"),
            tokens_per_second=column(rows, "tokens_per_second"),
            skipped_steps=column(rows, "skipped_steps"),
        ),
    )
    shutil.move(run / "training_curves.png", PLOTS / "curve_18b_fp16.png")


def resume_18b(folder: Path) -> None:
    """Compares the losses of a run of six steps with those of the run resumed after its third.

    Some kernels of the GPU add in no fixed order, so equal runs differ a little. To show by how
    much, steps 4 to 6 are resumed twice from the same checkpoint, and the two are compared too.
    """
    common = [*option_words(precision="fp16", max_steps=6), *SHORT]
    size = option_words(preset="18b", n_layers=8)
    # The last value of an option counts: save_every=3 replaces that of SHORT.
    runs = [train(folder / "whole", [*size, *common, *option_words(save_every=3)])]
    resume = option_words(resume=folder / "whole" / "checkpoint_step_3.pt")
    for name in ("resumed", "again"):
        runs.append(train(folder / name, [*resume, *common]))
    whole, resumed, again = [_losses_after(3, results) for results in runs]
    write(
        "resume_18b",
        _largest_difference(whole, resumed),
        "nats per token (largest difference after resuming)",
        3,
        runs[0]["environment"],
        dict(
            steps=[4, 5, 6],
            whole=whole,
            resumed=resumed,
            resumed_again=again,
            between_resumed=_largest_difference(resumed, again),
            validation_loss=[results["final_metrics"]["val_loss"] for results in runs],
        ),
    )


def _losses_after(step: int, results: dict) -> list[float]:
    return [row["train_loss"] for row in training_rows(results) if row["step"] > step]


def _largest_difference(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second))


# ---------------------------------------------------------------- the command


# A result file names the command that makes it again, so the name of each figure is a benchmark,
# and figures of the same runs have the same function.
BENCHMARKS = dict(
    default_run=default_run,
    small_precisions=small_precisions,
    memory_5b=memory_5b,
    first_command=first_command,
    train_18b_bf16=train_18b_bf16,
    train_18b_fp16=train_18b_fp16,
    train_25b_bf16=train_25b_bf16,
    start_18b=train_18b_fp16,
    curve_18b_fp16=curve_18b_fp16,
    resume_18b=resume_18b,
    memory_prediction_error=memory_prediction_error,
    checkpointing=checkpointing,
    checkpointing_saved=checkpointing,
    checkpointing_slowdown=checkpointing,
    deterministic=deterministic,
    muon_step_18b=parts.muon_step_18b,
    moe_vs_dense=parts.moe_vs_dense,
    moe_vs_dense_skewed=parts.moe_vs_dense,
    vs_transformers=parts.vs_transformers,
    checkpoint_io=parts.checkpoint_io,
)


def main(argv: list[str]) -> None:
    names = list(itertools.takewhile(lambda word: not word.startswith("--"), argv))
    EXTRA_OPTIONS[:] = argv[len(names) :]
    GPUS_OPTION[:] = _taken_out(EXTRA_OPTIONS, "--gpus")
    if GPUS_OPTION and not all(name.startswith("train_") for name in names):
        raise ConfigError("--gpus is for the benchmarks train_ alone")
    for name in names:
        if name not in BENCHMARKS:
            raise ConfigError(_unknown_name_message(name))
    if not names:
        print(__doc__)
    if set(names) - {"default_run"} and not torch.cuda.is_available():
        raise ExperimentError("no GPU was found; all benchmarks but default_run need one")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            BENCHMARKS[name](Path(folder))


def _taken_out(words: list[str], option: str) -> list[str]:
    """The option with its value, which is removed from the words; [] where it is not there."""
    if option not in words:
        return []
    place = words.index(option)
    found = words[place : place + 2]
    if len(found) < 2 or not found[1].isdecimal() or int(found[1]) < 2:
        raise ConfigError(f"{option} needs a number, 2 or more")
    del words[place : place + 2]
    return found


def _unknown_name_message(name: str) -> str:
    known = ", ".join(BENCHMARKS)
    return f"unknown benchmark {name!r}.{nearest(name, BENCHMARKS)} There are {known}"


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
