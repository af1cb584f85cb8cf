"""Writes the tables of README.md and docs/ from the result files in benchmarks/results/.

    python -m benchmarks.tables

A table stands between the marks <!-- NAME --> and <!-- end -->, where NAME is a key of `blocks()`.
The sentences around it are written by hand.
"""

import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

from cli import exit_code
from config import PRESETS, Config, field_docs, optimizer_groups
from planner.choice import choose
from planner.layout import format_count
from planner.machine import GPUS, find_machine
from planner.plan import memory_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BRIEF_STEPS = 50_000  # the length of a whole run of a large preset


def pages() -> list[Path]:
    """The files that hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load_result(name: str, gpu: str) -> dict:
    return json.loads((RESULTS / f"{name}_{gpu}.json").read_text())


def has_result(name: str, gpu: str) -> bool:
    return (RESULTS / f"{name}_{gpu}.json").exists()


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine_name(result: dict) -> str:
    return result["gpu"].removeprefix("none, ").removeprefix("NVIDIA ")


# ---------------------------------------------------------------- README.md


def headline() -> str:
    """Speed, MFU and predicted memory of the large presets; below it, other figures of an H200."""
    header = ["all parameters, every feature on"]
    for precision in ("bf16", "fp16"):
        header += [f"{precision}, tokens/s", "MFU"]
    header.append("predicted peak memory is off by")
    rows = [
        _headline_row("`18b`, one H200 (141 GB)", "18b", "h200"),
        _headline_row("`18b`, one H100 (80 GB)", "18b", "h100"),
        _headline_row("`25b`, one H200", "25b", "h200"),
    ]
    return table(header, rows) + "\n\n" + _beside_headline()


def _headline_row(label: str, preset: str, gpu: str) -> list[str]:
    """The figures of a preset in both precisions, and the larger error of predicted memory."""
    cells = [label]
    errors = []
    for precision in ("bf16", "fp16"):
        name = f"train_{preset}_{precision}"
        if not has_result(name, gpu):
            cells += ["", ""]
            continue
        result = load_result(name, gpu)
        cells += [f"{result['value']:,.0f}", f"{result['details']['mfu']:.2f}"]
        errors.append(_memory_error_percent(result))
    return [*cells, f"{max(errors):.2f}%"]


def _memory_error_percent(result: dict) -> float:
    predicted, measured = _peak_gb(result)
    return 100 * abs(predicted - measured) / measured


def _peak_gb(result: dict) -> tuple[float, float]:
    """(predicted, measured) peak memory of a run in GB."""
    memory = result["details"]["memory_gb"]
    return memory["predicted"]["total"], memory["measured"]["total"]


def _beside_headline() -> str:
    ratio = load_result("vs_transformers", "h200")["value"]
    disk = load_result("checkpoint_io", "h200")["details"]
    rows = [
        [
            "speed of four layers, compared with transformers' compiled Qwen3-MoE",
            f"{ratio:.2f} times",
        ],
        [
            f"saving a checkpoint of {disk['gb']:.0f} GB, checksums included",
            f"{disk['save_gb_s']:.1f} GB/s",
        ],
        ["what `dd` writes on that disk", f"{disk['disk_write_gb_s']:.1f} GB/s"],
        ["loading it, checksums included", f"{disk['load_gb_s']:.1f} GB/s"],
        ["what `dd` reads from that disk", f"{disk['disk_read_gb_s']:.1f} GB/s"],
    ]
    return table(["on an H200", "measured"], rows)


def default_run() -> str:
    result = load_result("default_run", "cpu")
    details = result["details"]
    header = [
        "on",
        "first step after",
        "in all",
        "tokens/s",
        "validation loss",
        "below the unigram entropy",
    ]
    row = [
        machine_name(result),
        f"{details['seconds_to_first_step']:.0f} s",
        f"{details['seconds_in_all']:.0f} s",
        f"{details['tokens_per_second']:,.0f}",
        f"{result['value']:.2f} nats",
        f"by {details['below_unigram_entropy']:.2f} nats",
    ]
    sample = details["sample"]["text"].rstrip()
    trained = f"A sample after {details['tokens'] / 1e6:.2f} million tokens:"
    return f"{table(header, [row])}\n\n{trained}\n\n```\n{sample}\n```"


def presets() -> str:
    header = [
        "preset",
        "width x layers",
        "`d_ff`",
        "MoE every",
        "parameters",
        "active",
        "tokens a step",
    ]
    rows = []
    for name, values in PRESETS.items():
        c = Config(**values)
        rows.append(
            [
                f"`{name}`",
                f"{c.d_model} x {c.n_layers}",
                f"{c.d_ff:,}",
                str(c.moe_every),
                format_count(c.total_params),
                format_count(c.active_params),
                f"{c.tokens_per_step:,}",
            ]
        )
    return table(header, rows)


# ---------------------------------------------------------------- docs/options.md, docs/memory.md


def options() -> str:
    """Every field of Config with its default and its docstring."""
    docs = field_docs()
    rows = []
    for field in dataclasses.fields(Config):
        default = _option_value(field.default)
        rows.append([f"`{field.name}`", f"`{default}`", docs[field.name].replace("|", "\\|")])
    return table(["option", "default", "meaning"], rows)


def _option_value(value) -> str:
    if value is None:  # Config derives the value from other fields
        return "derived"
    if value == "":
        return '""'
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def memory_with_full() -> str:
    """The memory that the planner predicts for the brief's choice: `full` on a B200."""
    return _predicted_memory_18b("b200", "full")


def memory_with_auto() -> str:
    """The same for what a run chooses by itself, on a B200 and on an H200."""
    tables = [_predicted_memory_18b(gpu, "auto") for gpu in ("b200", "h200")]
    return "\n\n".join(tables)


def _predicted_memory_18b(gpu: str, checkpointing: str) -> str:
    """The options of `18b` on a GPU and its table of memory, as a block of text."""
    machine = find_machine(gpu=gpu)
    config = Config(**{**PRESETS["18b"], "activation_checkpointing": checkpointing})
    choice, _ = choose(config, machine, fixed_batch=True)
    groups = optimizer_groups(config)
    text = memory_table(choice.memory_gb, groups, capacity_gb=machine.memory_gb)
    return f"```\n{gpu}: {choice.options(config)}\n\n{text}\n```"


# ---------------------------------------------------------------- docs/troubleshooting.md


def busy_cpu() -> str:
    """The speeds of `tiny` on a CPU by how long its threads spin, alone and beside others."""
    result = load_result("busy_cpu", "cpu")
    measured = result["details"]
    names = {
        "0": "they sleep at once (`OMP_WAIT_POLICY=passive`)",
        "1000": "`GOMP_SPINCOUNT=1000`",
        "10000": "`GOMP_SPINCOUNT=10000`, set by this program",
        "300000": "libgomp's default, `GOMP_SPINCOUNT=300000`",
    }
    header = [
        "how threads wait",
        f"tokens/s alone on {measured['cores']} cores",
        f"beside {measured['cores']} busy processes",
        f"beside {measured['busy_processes']} busy processes",
    ]
    rows = []
    for spin_count, name in names.items():
        row = [name]
        for state in ("alone", "shared", "busy"):
            speeds = measured[f"tokens_per_second_{state}"][spin_count]
            row.append(f"{statistics.median(speeds):,.0f}")
        rows.append(row)
    return table(header, rows)


# ---------------------------------------------------------------- docs/development.md


def attack() -> str:
    """The faults that the attack on the program found, by kind of attack."""
    result = load_result("attack", "cpu")
    titles = dict(
        commands="odd command lines",
        data="damaged data files and tokenizers",
        files="damaged files beside a run and in its cache",
        signals="signals, lost outputs and terminals",
        kills="kills",
    )
    rows = []
    for kind, found in result["details"]["kinds"].items():
        numbers = [found[key] for key in ("cases", "traceback", "hang", "unsaved")]
        rows.append([titles[kind], *map(str, numbers)])
    return table(["attack", "cases", "tracebacks", "hangs", "unsaved"], rows)


# ---------------------------------------------------------------- docs/data.md, docs/models.md


def data_speed() -> str:
    result = load_result("data_speed", "cpu")
    return f"{_tokenizing_table(result)}\n\n{_loader_table(result)}"


def _tokenizing_table(result: dict) -> str:
    measured = result["details"]["tokenizing"]
    ways = {
        "this program, from .jsonl to shards": "ours_mb_per_s",
        "`datasets.map`, a process for each core": "datasets_map_processes_mb_per_s",
        "`datasets.map`, the tokenizer's own threads": "datasets_map_threads_mb_per_s",
    }
    header = [
        f"tokenizing {measured['text_mb']:.0f} MB on {machine_name(result)}",
        f"MB/s (median of {result['repetitions']})",
    ]
    rows = [[way, f"{statistics.median(measured[key]):.1f}"] for way, key in ways.items()]
    return table(header, rows)


def _loader_table(result: dict) -> str:
    """A row for each loader. The keys of the result are "LOADER, warm" and "LOADER, cold"."""
    measured = result["details"]["loader"]
    rows = []
    names = [key.removesuffix(", warm") for key in measured if key.endswith(", warm")]
    for name in names:
        row = [name]
        for state in ("warm", "cold"):
            speed = measured[f"{name}, {state}"]
            row.append(f"{speed['batches_per_s']:,.0f}")
            row.append(f"{speed['tokens_per_s'] / 1e6:.1f}M")
        rows.append(row)
    header = ["loader", "batches/s, warm", "tokens/s", "batches/s, cold disk", "tokens/s"]
    return table(header, rows)


def held_out() -> str:
    """How much of the held-out text of the built-in corpora is in the training text too."""
    result = load_result("held_out", "cpu")
    header = [
        "`--data`",
        "held out",
        "in documents that are trained on in part",
        "in lines that are trained on",
        "reading the text",
    ]
    rows = []
    for name, found in result["details"].items():
        rows.append(
            [
                name,
                f"{found['held_out_share']:.2%}",
                f"{found['split_documents_share']:.1%}",
                f"{found['repeated_lines_share']:.1%}",
                f"{found['reading_seconds']:.1f} s",
            ]
        )
    return table(header, rows)


def sampling() -> str:
    header = [
        "sampling on",
        "preset",
        "texts at a time",
        "this program, tokens/s",
        "transformers' `generate`, tokens/s",
    ]
    rows = []
    for path in sorted(RESULTS.glob("sampling_*.json")):
        result = json.loads(path.read_text())
        details = result["details"]
        preset = f"`{details['preset']}`, {details['precision']}"
        for key, speeds in details.items():
            if not key.endswith(" at a time"):
                continue
            ours = f"{speeds['ours']:,.1f}"
            theirs = f"{speeds['transformers']:,.1f}"
            rows.append([machine_name(result), preset, key.split()[0], ours, theirs])
    return table(header, rows)


def lm_eval() -> str:
    details = load_result("lm_eval", "cpu")["details"]
    return f"{_domains_table(details['evaluate'])}\n\n{_lm_eval_table(details)}"


def _domains_table(evaluated: dict) -> str:
    header = [
        "`tools.evaluate` on the text held out of the default run",
        "tokens",
        "loss",
        "perplexity",
        "bits per byte",
        "accuracy",
    ]
    domains = sorted(evaluated["domains"].items(), key=lambda item: -item[1]["tokens"])
    rows = [
        [
            name,
            f"{found['tokens']:,}",
            f"{found['loss']:.3f}",
            f"{found['perplexity']:.1f}",
            f"{found['bits_per_byte']:.3f}",
            f"{found['accuracy']:.3f}",
        ]
        for name, found in [*domains, ("all", evaluated)]
    ]
    return table(header, rows)


def _lm_eval_table(details: dict) -> str:
    """A row for each task of lm_eval: its number of questions, and accuracy with standard error."""
    version = details["lm_eval"]
    header = [f"task of `lm_eval` {version}", "questions", "accuracy"]
    rows = []
    for task, found in details["results"].items():
        # "effective" is how many questions were put, "original" how many the task has.
        num_questions = details["n_samples"][task]["effective"]
        # lm_eval's keys are a metric and a filter of answers. "none" is no filter.
        accuracy = found["acc,none"]
        standard_error = found["acc_stderr,none"]
        rows.append(
            [
                f"`{task}`",
                f"{num_questions} of 4 choices",
                f"{accuracy:.3f} ± {standard_error:.3f}",
            ]
        )
    return table(header, rows)


# ---------------------------------------------------------------- docs/figures.md


def gpu_figures() -> str:
    rows = []
    for result in _gpu_results():
        value = _significant(result["value"])
        rows.append(
            [
                f"`{result['name']}`",
                machine_name(result),
                f"{value} {result['unit']}",
                _remark(result["name"], result["details"], result),
            ]
        )
    return table(["figure", "GPU", "value", "remarks"], rows)


def _gpu_results() -> list[dict]:
    """The results of known GPUs, without those that have a table of their own."""
    paths = []
    for gpu in GPUS:
        paths += RESULTS.glob(f"*_{gpu}.json")
    results = []
    for path in sorted(paths):
        result = json.loads(path.read_text())
        if result["name"] != "sampling" and not result["name"].startswith("profile_"):
            results.append(result)
    return results


def _significant(value: float) -> str:
    """Four significant digits, and all digits before the point."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _remark(name: str, details: dict, result: dict) -> str:
    """The sentence beside a figure's value."""
    if name.startswith("train_"):
        return _training_remark(name, details, result)
    if name.startswith("moe_vs_dense"):
        return f"largest share of the routed tokens on one expert: {max(details['load']):.3f}"
    if name.startswith("checkpointing_"):
        return _checkpointing_remark(details)
    remarks = {
        "first_command": _first_command_remark,
        "deterministic": _deterministic_remark,
        "muon_step_18b": _muon_step_remark,
        "memory_5b": _memory_remark,
        "small_precisions": _precisions_remark,
        "curve_18b_fp16": _curve_remark,
        "resume_18b": _resume_remark,
        "vs_transformers": _transformers_remark,
        "checkpoint_io": _checkpoint_io_remark,
    }
    if name not in remarks:
        return ""
    return remarks[name](details)


def _training_remark(name: str, details: dict, result: dict) -> str:
    predicted, measured = _peak_gb(result)
    preset = name.removeprefix("train_").rpartition("_")[0]  # of train_PRESET_PRECISION
    tokens = Config(**PRESETS[preset]).tokens_per_step * BRIEF_STEPS
    hours = tokens / result["value"] / 3600
    return (
        f"MFU {details['mfu']:.3f}; peak {measured:.1f} GB, predicted {predicted:.1f}; "
        f"first step after {details['seconds_to_first_step']:.0f} s; "
        f"{BRIEF_STEPS:,} steps would take {hours:,.0f} hours"
    )


def _first_command_remark(details: dict) -> str:
    measured = details["memory_gb"]["measured"]["total"]
    return (
        f"`{details['preset']}` in {details['precision']} with {details['options']}; "
        f"peak {measured:.1f} GB; {details['times_full']:.2f} times the speed with `full`, "
        f"{details['full_tokens_per_second']:,.0f} tokens/s"
    )


def _deterministic_remark(details: dict) -> str:
    usual = statistics.median(details["tokens_per_second"]["false"])
    deterministic = statistics.median(details["tokens_per_second"]["true"])
    equal = "differ"
    if details["equal_losses_and_norms"]["true"]:
        equal = "are equal to the bit"
    return (
        f"{usual:,.0f} tokens/s without, {deterministic:,.0f} with; losses and gradient norms of "
        f"two such runs {equal}"
    )


def _checkpointing_remark(details: dict) -> str:
    modes = [
        f"{mode}: {gb:.1f} GB, {details['tokens_per_second'][mode]:,.0f} tokens/s"
        for mode, gb in details["activations_gb"].items()
    ]
    return "; ".join(modes)


def _muon_step_remark(details: dict) -> str:
    return (
        f"{details['streaming_costs_seconds']:.3f} s of it for the transfer of "
        f"{details['host_gb']:.0f} GB of state each way"
    )


def _memory_remark(details: dict) -> str:
    largest = max(details["errors"], key=details["errors"].get)
    return (
        f"{largest}: {details['predicted_gb'][largest]:.2f} GB predicted, "
        f"{details['measured_gb'][largest]:.2f} measured; "
        f"in all {details['measured_gb']['total']:.1f}"
    )


def _precisions_remark(details: dict) -> str:
    losses = [f"{run}: {loss:.3f}" for run, loss in details["final_validation_loss"].items()]
    skipped = sum(details["skipped_steps_after_warmup"].values())
    return (
        f"{', '.join(losses)}; unigram entropy {details['unigram_entropy']:.2f}; "
        f"between seeds {details['spread_of_seeds']:.4f}; steps skipped after warm-up: {skipped}"
    )


def _curve_remark(details: dict) -> str:
    """Losses are in nats per token. `skipped_steps` holds, for each step, the total so far."""
    losses = details["train_loss"]
    skipped_steps = details["skipped_steps"][-1]
    return (
        f"{len(losses)} steps in {details['seconds_in_all']:.0f} s; "
        f"training loss {losses[0]:.2f} to {losses[-1]:.2f}; "
        f"unigram entropy {details['unigram_entropy']:.2f}; "
        f"steps skipped in search of the loss scale: {skipped_steps}"
    )


def _resume_remark(details: dict) -> str:
    first_difference = abs(details["whole"][0] - details["resumed"][0])
    return (
        f"steps {details['steps'][0]} to {details['steps'][-1]}; "
        f"the first differs by {first_difference:g}; "
        f"two runs resumed from one checkpoint differ by {details['between_resumed']:.2g}, "
        "because a GPU does not sum in a fixed order"
    )


def _transformers_remark(details: dict) -> str:
    """This program in the compared mode of checkpointing, transformers, and the mode `full`."""
    mode = details["compared"]
    ours = details["ours"][mode]
    theirs = details["theirs"]
    ours_at_full = details["ours"]["full"]
    full_ratio = ours_at_full["tokens_per_second"] / theirs["tokens_per_second"]
    return (
        f"`{mode}`: {ours['tokens_per_second']:,.0f} tokens/s in "
        f"{ours['peak_gb']:.1f} GB; transformers {details['transformers']}, compiled, with its "
        f"checkpointing, which recomputes all: {theirs['tokens_per_second']:,.0f} in "
        f"{theirs['peak_gb']:.1f} GB; ours at `full`: {full_ratio:.2f} times"
    )


def _checkpoint_io_remark(details: dict) -> str:
    return (
        f"saved at {details['save_gb_s']:.2f} GB/s, loaded at {details['load_gb_s']:.2f}; "
        f"the disk writes {details['disk_write_gb_s']:.2f}, reads {details['disk_read_gb_s']:.2f}; "
        f"{details['gb']:.1f} GB; {details['host_memory_overhead_gb']:.2f} GB more host memory"
    )


# Rows of a profile whose keys in the result file need more words.
PROFILE_LABELS = {
    "products": "matmuls",
    "optimizer: products": "optimizer: matmuls",
    "optimizer: copies": "optimizer: copies, beside its matmuls",
    "optimizer (wall)": "optimizer, from its start to its end",
}


def profile() -> str:
    """The seconds of a training step by kind of work, and the rates that the floors assume.

    A floor is the least time that this GPU needs for a kind of work (see profile_step.floors).
    """
    result = load_result("profile_18b_bf16", "h200")
    details = result["details"]
    what = f"a step of `18b` in bf16 on {machine_name(result)}: {result['value']:.2f} s"
    header = [what, "seconds", "share", "floor", "times the floor"]
    longest_first = sorted(details["seconds"], key=details["seconds"].get, reverse=True)
    rows = [_profile_row(details, kind) for kind in longest_first]
    rates = table(
        ["rate that the floor assumes", "measured on that GPU"],
        [
            ["FLOPs, of a large matmul", f"{details['product_tflops']:.0f} TFLOP/s"],
            ["bytes, of a large copy", f"{details['copy_tb_s']:.2f} TB/s"],
        ],
    )
    return f"{table(header, rows)}\n\n{rates}"


def _profile_row(details: dict, kind: str) -> list[str]:
    spent = details["seconds"][kind]
    percent = 100 * details["share"][kind]
    row = [PROFILE_LABELS.get(kind, kind), f"{spent:.2f}", f"{percent:.1f}%"]
    floor = details["floor_seconds"].get(kind)
    if not floor:  # copies, routing and gaps have none
        return [*row, "", ""]
    return [*row, f"{floor:.2f}", f"{spent / floor:.2f}"]


# ---------------------------------------------------------------- between the marks


def blocks() -> dict[str, Callable[[], str]]:
    """The function that makes each table, by the name in its mark."""
    return dict(
        headline=headline,
        default_run=default_run,
        presets=presets,
        options=options,
        memory_with_full=memory_with_full,
        memory_with_auto=memory_with_auto,
        busy_cpu=busy_cpu,
        attack=attack,
        data_speed=data_speed,
        held_out=held_out,
        sampling=sampling,
        lm_eval=lm_eval,
        gpu_figures=gpu_figures,
        profile=profile,
    )


def fill(text: str, made_by: dict[str, Callable[[], str]]) -> str:
    """`text` with new tables between its marks <!-- NAME --> and <!-- end -->.

    `made_by` holds the function that makes each table. Marks of other names stay as they are.
    """

    def filled(match: re.Match) -> str:
        name = match["name"]
        if name not in made_by:
            return match[0]
        return f"<!-- {name} -->\n{made_by[name]()}\n<!-- end -->"

    return re.sub(r"<!-- (?P<name>[\w -]+) -->\n.*?<!-- end -->", filled, text, flags=re.S)


def rewrite(made_by: dict[str, Callable[[], str]]) -> None:
    """Writes every page whose tables have changed."""
    for page in pages():
        before = page.read_text()
        after = fill(before, made_by)
        if after != before:
            page.write_text(after)
            print(f"{page.relative_to(ROOT)} written", file=sys.stderr)


def main(argv: list[str]) -> None:
    if argv:
        print(__doc__)
        return
    rewrite(blocks())


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
