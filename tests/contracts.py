"""What others rely on in the program: its commands, options, exit codes, files and their keys.

The functions here look at the program that is imported. test_contracts.py compares what they find
with what commit 4af493f had, which is in fixtures/contracts.json and was written by

    git worktree add --detach /tmp/old 4af493f
    PYTHONPATH=/tmp/old python tests/contracts.py
    git worktree remove /tmp/old

Everything runs in this process: a new one would spend seconds on importing torch.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import runpy
import shutil
import sys
import tempfile
import typing
import warnings
from pathlib import Path
from unittest import mock

FIXTURES = Path(__file__).resolve().parent / "fixtures"
OLD_RUNS = FIXTURES / "old_runs"

COMMANDS = [
    "run_experiment",
    "run_experiment plan",
    "run_experiment sample",
    "plot",
    "tools.export_hf",
    "tools.import_hf",
    "tools.evaluate",
    "benchmarks.run",
    "benchmarks.tables",
    "benchmarks.profile_step",
    "benchmarks.harness",
    "benchmarks.sample_speed",
    "studies.run",
    "studies.report",
    "studies.experts",
]
# They take no options, and with any argument they measure for minutes.
WITHOUT_HELP = ["benchmarks.check_gpu", "benchmarks.data_speed"]

PLANS = {
    "on a GPU, fits": "--preset 18b --gpu h200",
    "on a GPU, fits with lighter blocks": "--preset 18b --gpu h100 --activation_checkpointing none",
    "on a GPU, does not fit": "--preset 18b --gpu rtx4090",
    "on a GPU, fits with other options": "--preset 5b --gpu rtx4090 --host_memory_gb 900",
    "on a CPU, fits": "--preset tiny --device cpu --host_memory_gb 16",
    "on a CPU, does not fit": "--preset 18b --device cpu --host_memory_gb 16",
}

# {old}: the old runs; {run}: a copy of one of them; {tmp}: an empty folder.
ELSEWHERE = (
    " --data {old}/text.jsonl --tokenizer {old}/tokenizer.json"
    " --cache_dir {tmp}/cache --save_dir {run}"
)
NEW_RUN = "run_experiment --preset tiny --device cpu" + ELSEWHERE
RESUME = "run_experiment --resume {run}/checkpoint_step_6.pt" + ELSEWHERE

CALLS = {
    "an unknown option": "run_experiment --nonsense 1",
    "an unknown option after train": "run_experiment train --nonsense 1",
    "an unknown command": "run_experiment nonsense",
    "a word too many": "run_experiment --max_steps 5 nonsense",
    "a text for a number": "run_experiment --d_model many",
    "a value that is none of the choices": "run_experiment --precision fp64",
    "an impossible configuration": "run_experiment --preset tiny --d_model 33",
    "an unknown preset": "run_experiment --preset nonsense",
    "resume and overwrite": "run_experiment --resume latest --overwrite",
    "a checkpoint that is missing": "run_experiment --resume {tmp}/no.pt" + ELSEWHERE,
    "a checkpoint that is a folder": "run_experiment --resume {run}" + ELSEWHERE,
    "a checkpoint that is none": "run_experiment --resume {run}/run.json" + ELSEWHERE,
    "another width on resume": RESUME + " --d_model 32",
    "fewer steps than are done": RESUME + " --max_steps 3",
    "other data on resume": RESUME + " --data {run}/metrics.jsonl --text_field step",
    "other tokens on resume": RESUME + " --tokenizer train:270",
    "a folder that holds a run": NEW_RUN,
    "data that is missing": NEW_RUN + " --save_dir {tmp}/new --data {tmp}/no.txt",
    "a run that does not fit": "run_experiment --preset 18b --device cpu --host_memory_gb 8 --save_dir {tmp}/new",
    "a run that diverges": RESUME + " --muon_lr 1e30 --adamw_lr 1e30",
    "a plan that fits": "run_experiment plan --preset 18b --gpu h200",
    "a plan that does not fit": "run_experiment plan --preset 18b --gpu rtx4090",
    "a plan for an unknown GPU": "run_experiment plan --gpu nonsense",
    "a sample": "run_experiment sample --checkpoint {run}/checkpoint_step_6.pt --prompt The --max_new_tokens 4 --device cpu",
    "a sample of nothing": "run_experiment sample",
    "a sample of a missing checkpoint": "run_experiment sample --checkpoint {tmp}/no.pt --prompt The",
    "a sample of a folder": "run_experiment sample --checkpoint {run} --prompt The",
    "a sample at a wrong temperature": "run_experiment sample --checkpoint {run}/checkpoint_step_6.pt --prompt The --temperature -1",
    "a plot of a run": "plot {run} --out {tmp}/curves.png",
    "a plot of nothing": "plot",
    "a plot of a missing run": "plot {tmp}/no",
    "a plot with an unknown option": "plot {run} --nonsense",
    "an export": "tools.export_hf --checkpoint {run}/checkpoint_step_6.pt --out {tmp}/model",
    "an export into a full folder": "tools.export_hf --checkpoint {run}/checkpoint_step_6.pt --out {run}",
    "an export of nothing": "tools.export_hf",
    "an export of a missing checkpoint": "tools.export_hf --checkpoint {tmp}/no.pt --out {tmp}/model",
    "an export of a folder": "tools.export_hf --checkpoint {run} --out {tmp}/model",
    "an export of a model with biases": "tools.export_hf --checkpoint {old}/bias_balancing/checkpoint_step_6.pt --out {tmp}/model",
    "an import of the export": "tools.import_hf --model {tmp}/model --out {tmp}/imported --preset tiny",
    "an import of nothing": "tools.import_hf",
    "an import of a missing folder": "tools.import_hf --model {tmp}/no --out {tmp}/new",
    "an evaluation": "tools.evaluate --checkpoint {run}/checkpoint_step_6.pt --data {old}/text.jsonl --limit 100 --device cpu --json",
    "an evaluation of nothing": "tools.evaluate",
    "an evaluation of a missing checkpoint": "tools.evaluate --checkpoint {tmp}/no.pt",
    "the list of benchmarks": "benchmarks.run",
    "an unknown benchmark": "benchmarks.run nonsense",
    "a profile with an unknown option": "benchmarks.profile_step --nonsense 1",
    "a harness without a checkpoint": "benchmarks.harness",
    "a sampling speed with an unknown option": "benchmarks.sample_speed --nonsense 1",
    "the list of studies": "studies.run",
    "an unknown study": "studies.run nonsense",
    "a study with an unknown option": "studies.run optimizer --nonsense 1",
    "a report on a missing study": "studies.report {tmp}/no",
    "experts of nothing": "studies.experts",
    "experts of a missing run": "studies.experts {tmp}/no",
}

# Calls that need what another one makes.
BEFORE = {"an import of the export": "an export"}

# These say on stderr what can be named instead.
LISTS = (
    "an unknown benchmark",
    "an unknown study",
    "a plan for an unknown GPU",
    "an unknown preset",
)

# Their keys depend on the machine or are told elsewhere.
OPEN_ENDED = ("packages", "earlier", "checksums", "model", "optimizer")


# ---------------------------------------------------------------- calling a command


def call(words: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m MODULE ARGUMENTS`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", list(words)))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        # runpy warns of modules that another call has imported.
        stack.enter_context(warnings.catch_warnings(action="ignore", category=RuntimeWarning))
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def options_of(command: str) -> dict:
    """The options of a command's parser, with their choices and defaults, and its other arguments.
    A command without a parser has none."""
    parsers = []
    note = mock.patch.object(argparse.ArgumentParser, "print_help", lambda p: parsers.append(p))
    with note:
        code, _, _ = call([*command.split(), "--help"])
    options, arguments = {}, []
    for action in parsers[0]._actions if parsers else []:
        if not action.option_strings:
            arguments.append(action.dest)
        # Those of Config have theirs from its fields; a device's depends on the machine.
        told = action.default is not argparse.SUPPRESS and action.dest != "device"
        for name in action.option_strings:
            options[name] = dict(
                required=action.required,
                choices=list(action.choices) if action.choices else None,
                default=action.default if told else None,
            )
    return dict(exit_code=code, options=options, arguments=arguments)


# ---------------------------------------------------------------- keys


def keys_of(node, path: str = "") -> list[str]:
    """The paths of all keys in nested dicts and lists of dicts, such as "history[].step"."""
    found = set()
    if isinstance(node, list):
        for value in node:
            found |= set(keys_of(value, f"{path}[]"))
    elif isinstance(node, dict):
        for key, value in node.items():
            name = f"{path}.{key}" if path else key
            found.add(name)
            if key not in OPEN_ENDED:
                found |= set(keys_of(value, name))
    return sorted(found)


def plan_of(arguments: list[str]) -> dict:
    code, out, _ = call(["run_experiment", "plan", "--json", *arguments])
    return dict(arguments=arguments, exit_code=code, keys=keys_of(json.loads(out)))


def files_of_a_run(folder: Path) -> dict:
    """Names and keys of what a short run writes."""
    import torch

    words = [word.format(old=OLD_RUNS, run=folder / "run", tmp=folder) for word in NEW_RUN.split()]
    size = dict(
        d_model=16,
        n_layers=2,
        n_heads=2,
        d_ff=16,
        num_experts=2,
        max_seq_len=32,
        vocab_size=280,
        batch_size=2,
        max_steps=4,
        save_every=2,
        log_every=1,
        eval_every=1,
        eval_steps=1,
        sample_tokens=2,
        validation_fraction=0.1,
    )
    words += [word for name, value in size.items() for word in (f"--{name}", str(value))]
    code, _, err = call(words)
    assert code == 0, err
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(run / "checkpoint_latest.pt", weights_only=True)
    return dict(
        names=sorted(path.name for path in run.iterdir()),
        keys={
            "run.json": keys_of(json.loads((run / "run.json").read_text())),
            "training_results.json": keys_of(
                json.loads((run / "training_results.json").read_text())
            ),
            "metrics.jsonl, training": keys_of([row for row in rows if "train_loss" in row]),
            "metrics.jsonl, validation": keys_of([row for row in rows if "val_loss" in row]),
            "checkpoint": keys_of(state),
        },
        checkpoint_format=state["format"],
    )


def answer(words: list[str], folder: Path, before: list[str] | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one of CALLS, after the call `before`; `folder` is empty."""
    places = dict(old=OLD_RUNS, run=folder / "run", tmp=folder)
    shutil.copytree(OLD_RUNS / "fp32", places["run"])
    if before is not None:
        call([word.format(**places) for word in before])
    return call([word.format(**places) for word in words])


# ---------------------------------------------------------------- the configuration


def configuration() -> dict:
    import config

    kinds = typing.get_type_hints(config.Config)
    errors = (config.ExperimentError, config.ConfigError, config.Diverged, config.OutOfMemory)
    return dict(
        defaults=config.defaults(),
        choices={
            name: list(typing.get_args(kind))
            for name, kind in kinds.items()
            if typing.get_origin(kind) is typing.Literal
        },
        properties=sorted(
            name
            for name, value in vars(config.Config).items()
            if isinstance(value, (property, functools.cached_property))
        ),
        presets=config.PRESETS,
        preset_by_gpu_memory=[list(pair) for pair in config.PRESET_BY_GPU_MEMORY],
        frozen_on_resume=sorted(config.FROZEN),
        exit_codes={error.__name__: error.exit_code for error in errors},
    )


# ---------------------------------------------------------------- writing them down


def names_of_lists() -> dict[str, list[str]]:
    """What each of LISTS has to name. Where these tables are kept is no contract."""
    from memory import GPUS

    from benchmarks.run import BENCHMARKS
    from config import PRESETS
    from studies.run import STUDIES

    return dict(zip(LISTS, map(list, (BENCHMARKS, STUDIES, GPUS, PRESETS))))


def calls() -> dict[str, dict]:
    names, found = names_of_lists(), {}
    for name, line in CALLS.items():
        words = line.split()
        before = CALLS[BEFORE[name]].split() if name in BEFORE else None
        with tempfile.TemporaryDirectory() as folder:
            code, out, _ = answer(words, Path(folder), before)
        found[name] = dict(
            words=words,
            before=before,
            exit_code=code,
            names=names.get(name, []),
            keys=keys_of(json.loads(out)) if "--json" in words else [],
        )
    return found


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        files = files_of_a_run(Path(folder))
    found = dict(
        commands={command: options_of(command) for command in COMMANDS},
        commands_without_help=WITHOUT_HELP,
        plans={name: plan_of(line.split()) for name, line in PLANS.items()},
        calls=calls(),
        files=files,
        config=configuration(),
    )
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (FIXTURES / "contracts.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
