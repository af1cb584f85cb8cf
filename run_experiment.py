"""Trains a Mixture-of-Experts language model on one GPU or several (or, small, on a CPU).

python run_experiment.py                  train the preset that fits this GPU (on a CPU: tiny)
python run_experiment.py --gpus all       train it on all GPUs of this machine
python run_experiment.py --preset 5b      train this preset; every field of config.py is an option
python run_experiment.py --resume latest  continue where the last run stopped
python run_experiment.py plan --gpu h200  what it takes, without a GPU
python run_experiment.py sample --checkpoint checkpoints/checkpoint_latest.pt --prompt "def main("
"""

import time

LAUNCHED = time.monotonic()  # before the slow imports

from record import stop

if __name__ == "__main__":
    stop.by_default()  # until `main`: Ctrl-C during an import would be a traceback

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: an 18B run fills its GPU, and fixed segments lose gigabytes to
# fragmentation.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# Before torch is imported too: a thread of OpenMP that waits for the others spins for some turns,
# then sleeps. libgomp's 300,000 turns take milliseconds. Beside busy programs a spinning thread
# keeps a core from the very threads that it waits for, and training nearly stops. To sleep at once
# costs a third of the speed on an idle CPU. 10,000 turns cost little in both cases;
# benchmarks/busy_cpu.py measures it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from cli import (
    Parser,
    add_config_options,
    check_checkpoint,
    check_training_paths,
    check_unused,
    config_options,
    exit_code,
    locked,
    new_parser,
    refuse_used_folder,
    save_dir,
    training,
)
from config import (
    DATA_RULES,
    PRESETS,
    Config,
    ConfigError,
    ExperimentError,
    defaults,
    nearest,
    optimizer_groups,
    resolve,
    resumed_config,
)
from engine import launch, lifeline
from planner.choice import check_fits
from planner.layout import (
    COLUMNS,
    command_lines,
    format_count,
    format_duration,
    format_size,
    say,
    wrapped,
)
from planner.machine import (
    GB,
    GPUS,
    Machine,
    cpu_cores,
    find_device,
    find_machine,
    machine_of_device,
)
from planner.plan import build_plan, memory_table
from planner.sharing import check_ranks
from planner.sizes import checkpoint_gb
from planner.speed import MeasuredRun
from record import restarts
from record.run_file import MOST_SKIPPED_STEPS

if TYPE_CHECKING:
    from engine.distributed import Ranks

# torch takes seconds to import: --help and `plan` answer without it, so that what needs it is
# imported in the functions that use it.

# ---------------------------------------------------------------- train


def train(argv: list[str]) -> None:
    """Resolves the configuration, opens the run, and trains.

    With several GPUs every rank does so, each in a process of its own; the first one starts them.
    """
    if launch.is_rank():
        lifeline.begin(launch.rank(), launch.size())
    args = _train_parser().parse(argv)
    options = config_options(args)
    _check_run_options(args)
    is_first = launch.rank() == 0
    if is_first:
        check_training_paths(options, args.resume)
    folder = save_dir(options, args.resume)
    device = options.get("device", defaults()["device"])
    ranks = launch.requested_ranks(args.gpus, device)
    if not launch.is_rank() and args.resume is None:
        _check_new_run(options, args, ranks)
    _become_rank(ranks, device, argv)
    with restarts.not_in_vain(folder, is_first), training(), contextlib.ExitStack() as lock:
        config, name, why = resolve(options, args.preset, _gpu_memory_gb(options))
        run = open_run(config, _chosen_message(name, why), options, args, lock)
        with launch.ended_together():
            run.run()


def _check_run_options(args: argparse.Namespace) -> None:
    if args.resume and args.overwrite:
        raise ConfigError("--resume continues a run and --overwrite deletes it: choose one")
    if args.overwrite and restarts.is_restart():
        raise ConfigError(
            "torchrun has started the run again, and --overwrite would delete what it trained: "
            "give --resume latest instead"
        )
    _check_skip_steps(args)


def _check_new_run(options: dict, args: argparse.Namespace, ranks: int) -> None:
    """Refuses, before torch is imported, what would be refused after it.

    Raises ConfigError or FolderInUse. Without a preset, the GPU's memory decides the configuration.
    It is not known yet, so that the configuration is checked later.
    """
    if args.preset or options.get("device") == "cpu":
        config, _, _ = resolve(options, args.preset, None)
        check_ranks(config, ranks)
    if not args.overwrite:
        check_unused(save_dir(options, args.resume))


def _become_rank(ranks: int, device: str, argv: list[str]) -> None:
    """Starts the other ranks of all that --gpus requests, and gives this one its GPU.

    It does so before torch is imported. For a run of one process it does nothing.
    """
    if ranks == 1:
        return
    if not launch.is_rank():
        launch.launch(ranks, [sys.executable, __file__, *argv])
        lifeline.begin(0, ranks)
    launch.prepare_rank(device, cpu_cores())


def _train_parser() -> Parser:
    parser = new_parser(
        "run_experiment.py [train] [--preset NAME] [--gpus N|all] "
        "[--resume latest|PATH [--skip_steps N]] [--overwrite] [--FIELD VALUE ...]",
        __doc__,
    )
    _add_preset_option(parser)
    parser.add_argument(
        "--gpus",
        metavar="N|all",
        help="GPUs of this machine that train the run together; on a CPU, processes [1]",
    )
    parser.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="continue from save_dir's latest checkpoint (a fresh start when there is none), or "
        "from a checkpoint file",
    )
    parser.add_argument(
        "--skip_steps",
        type=int,
        metavar="N",
        help="with --resume PATH: leave out the data of the next N steps, for a run that diverged "
        "on them",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the run that save_dir holds and start anew",
    )
    add_config_options(parser)
    return parser


def _check_skip_steps(args: argparse.Namespace) -> None:
    if args.skip_steps is None:
        return
    if args.resume in (None, "latest"):
        # Repeated by a program that restarts the run, it would skip more each time.
        raise ConfigError(
            "--skip_steps is for --resume PATH, with the checkpoint from which the run goes back; "
            "--resume latest keeps what was skipped before"
        )
    if not 1 <= args.skip_steps <= MOST_SKIPPED_STEPS:
        raise ConfigError(f"--skip_steps must lie between 1 and {MOST_SKIPPED_STEPS:,}")


def _add_preset_option(parser: Parser) -> None:
    parser.add_argument("--preset", help="a preset of config.py: " + " ".join(PRESETS))


def _gpu_memory_gb(options: dict) -> float | None:
    """Memory of the GPU that the run would use; None for a run on the CPU."""
    import torch

    device = options.get("device", defaults()["device"])
    if device == "cpu" or not torch.cuda.is_available():
        return None
    visible = torch.cuda.device_count()
    if visible > 1:
        say(f"{visible} GPUs are visible; this run uses one. --gpus all trains on all of them.")
    return torch.cuda.get_device_properties(0).total_memory / GB


def _chosen_message(name: str, why: str) -> str:
    if name == "config.py":
        return f"Configuration of config.py: {why}."
    return f"Preset {name}: {why}."


def open_run(
    config: Config,
    chosen: str,
    options: dict,
    args: argparse.Namespace,
    lock: contextlib.ExitStack,
):
    """The Trainer of a new or a resumed run, with its folder locked in `lock`.

    `chosen` says how the configuration was chosen; a resumed run takes the checkpoint's instead,
    with the changes of `options`.
    """
    import trainer
    from engine.distributed import start_ranks
    from record import run_folder, tracker

    ranks = start_ranks(find_device(config))
    lifeline.join(ranks)
    start = _start_of_all(config, chosen, options, args, lock, ranks)
    config = start.config
    check_ranks(config, ranks.size)
    folder = Path(config.save_dir)
    run_folder.check_shared(folder, "--save_dir", ranks)
    run_folder.check_shared(Path(config.cache_dir), "--cache_dir", ranks)
    if ranks.is_first:
        if args.resume or args.overwrite:
            run_folder.set_odd_files_aside(folder)
        if not args.overwrite and not start.continues(folder):
            refuse_used_folder(folder)

    say(
        f"{config.total_params:,} parameters, {config.active_params:,} active for a token; "
        f"{config.tokens_per_step:,} tokens a step"
    )
    # What cannot start is refused before minutes of tokenizing.
    tracker.require(config.tracker)
    machine = machine_of_device(
        find_device(config), config.host_memory_gb, ranks.local_size, ranks.machines
    )
    check_fits(config, machine)
    corpus = _prepared_corpus(config, start.rules, ranks)
    # The state is mapped from the checkpoint's file. It must not outlive this function: the disk
    # space of a checkpoint that is deleted would stay taken.
    run = trainer.Trainer(config, corpus, start.state, start.path, LAUNCHED, ranks)
    skip_steps = args.skip_steps or start.skip_steps
    if skip_steps:
        run.skip_data(skip_steps)
    # Only now that nothing can be wrong any more
    with ranks.together():
        if ranks.is_first:
            if args.overwrite:
                run_folder.delete_run(folder, run.checkpoint_bytes_to_come())
            if start.again:
                _set_run_aside(folder)
    return run


def _start_of_all(
    config: Config,
    chosen: str,
    options: dict,
    args: argparse.Namespace,
    lock: contextlib.ExitStack,
    ranks: "Ranks",
) -> "Start":
    """Where the run starts. The first rank finds it, with the folder locked, and tells the others.

    Only the first one verifies the checkpoint: the others map the same file.
    """
    from record import checkpoint

    if ranks.is_first:
        start = _found_start(config, chosen, options, args, lock)
        ranks.value_of_first(dataclasses.replace(start, state=None))
        return start
    start = ranks.value_of_first()
    if start.path is not None:
        start.state = checkpoint.load(start.path, verify=False)
    return start


def _found_start(
    config: Config,
    chosen: str,
    options: dict,
    args: argparse.Namespace,
    lock: contextlib.ExitStack,
) -> "Start":
    resumes_file = args.resume not in (None, "latest")
    folder = Path(config.save_dir)
    if resumes_file:
        folder = Path(options.get("save_dir", Path(args.resume).parent))
    # Before it is looked into, and before a checkpoint is read that a run in it may write over.
    lock.enter_context(locked(folder, "--save_dir"))
    if resumes_file:
        return _start_from_file(Path(args.resume), config, options, args.preset)
    return find_start(config, chosen, options, args)


def _prepared_corpus(config: Config, rules: int, ranks: "Ranks"):
    """The tokenized corpus. The first rank makes it; the others then find it in the cache.

    Raises ExperimentError where a rank finds other data than the first one.
    """
    import data
    from record import messages
    from record.results import data_identity

    corpus = None
    if ranks.is_first:
        corpus = data.prepare(config, rules)
    ranks.wait_for_all()
    if corpus is None:
        corpus = data.prepare(config, rules)
    identities = ranks.all_values(data_identity(corpus))
    for rank, identity in enumerate(identities):
        if identity != identities[0]:
            raise ExperimentError(messages.data_of_ranks_differ(rank, config))
    return corpus


@dataclass
class Start:
    """Where a run starts: with which configuration, and from which checkpoint if any."""

    config: Config
    rules: int = DATA_RULES  # the version of the rules of data
    path: Path | None = None  # the checkpoint, and its content
    state: dict | None = None
    again: bool = False  # the run that the folder holds has no checkpoint, and starts anew
    skip_steps: int = 0  # steps whose data are left out, as the start before was to do

    def continues(self, folder: Path) -> bool:
        """Whether the run that the folder holds is the one that starts."""
        if self.again:
            return True
        from record import run_folder

        return self.path is not None and run_folder.is_in(self.path, folder)


def find_start(config: Config, chosen: str, options: dict, args: argparse.Namespace) -> Start:
    """A new run, or with --resume latest what the folder holds. The folder is locked already."""
    from record import latest, run_file, run_folder
    from record.small_files import RUN

    folder = Path(config.save_dir)
    if args.resume is None:
        say(chosen)
        return Start(config)
    has_run_file = os.path.lexists(folder / RUN)
    run_folder.set_odd_files_aside(folder)
    last_start = run_folder.last_start(folder)
    branches = []
    if last_start is not None:
        branches = run_file.branches(last_start)
    found = latest.newest_intact(folder, branches)
    options = {**options, "save_dir": config.save_dir}  # the folder may have been moved since
    if found is not None:
        path, state = found
        start = _start_from_state(path, state, options, args.preset)
        if last_start is not None:
            start.skip_steps = run_file.skipped_steps(last_start, state)
        return start
    nothing = f"Nothing to resume: no checkpoint in {folder}."
    if last_start is not None:
        return _start_again(nothing, last_start, options, args.preset)
    if has_run_file:
        nothing += (
            f" Its {RUN} could not be read and was set aside: its configuration is not known."
        )
    say(f"{nothing} A new run starts.\n{chosen}")
    return Start(config, again=True)


def _start_again(nothing: str, last_start: dict, options: dict, preset: str | None) -> Start:
    """The run that run.json describes, from its beginning: it ended before its first checkpoint."""
    from record import checkpoint, run_file

    config, changes = run_file.config_of(last_start, options)
    message = f"{nothing} The run of its run.json starts again with the same configuration"
    path = run_file.beginning(last_start)
    if path is not None:
        message += f", from {path}"
    say(message + _changes_message(preset, changes, "its configuration holds"))
    if path is None:
        return Start(config, run_file.data_rules(last_start), again=True)
    state = checkpoint.load_run(path)
    start = _start_from_state(path, state, dataclasses.asdict(config), None)
    start.skip_steps = run_file.skipped_steps(last_start, state)
    start.again = True
    return start


def _start_from_file(path: Path, config: Config, options: dict, preset: str | None) -> Start:
    """The run of a checkpoint file that --resume names.

    It writes beside the file, or where the command line says. The file's content has no part in
    that: who wrote it is not known.
    """
    from record import checkpoint

    places = dict(save_dir=str(path.parent), cache_dir=config.cache_dir)
    state = checkpoint.load_run(path)
    start = _start_from_state(path, state, {**places, **options}, preset)
    cache_before = state["config"].get("cache_dir")
    if cache_before != start.config.cache_dir:
        say(
            f"The cache of tokens is {start.config.cache_dir}. The checkpoint's run had "
            f"{cache_before}: --cache_dir names another."
        )
    return start


def _start_from_state(path: Path, state: dict, options: dict, preset: str | None) -> Start:
    from record import checkpoint

    config = _resume(state, options, path, preset)
    return Start(config, checkpoint.data_rules(state), path, state)


def _changes_message(preset: str | None, changes: list[str], why: str) -> str:
    """What of the command line changes the configuration of a run that is there already."""
    message = ""
    if preset:
        message += f", --preset {preset} is not used: {why}"
    if changes:
        message += ". Changed: " + "; ".join(changes)
    return message


def _resume(state: dict, options: dict, path: Path, preset: str | None) -> Config:
    """The configuration of a resumed run. Prints what changes in it."""
    import trainer
    from record import messages

    config, changes = resumed_config(state["config"], options)
    step = state["step"]
    if config.max_steps < step:
        raise ConfigError(
            f"max_steps={config.max_steps}: the checkpoint is at step {step} already; give more, "
            "or resume an earlier checkpoint"
        )
    words = _changes_message(preset, changes, "the checkpoint's configuration holds")
    say(f"Resuming {path} at step {step}{words}")

    saved, _ = resumed_config(state["config"], {})
    lrs_before = trainer.learning_rates(step, saved)
    lrs_now = trainer.learning_rates(step, config)
    if lrs_now != lrs_before:
        say(messages.schedule_changed(lrs_before, lrs_now))
    return config


def _set_run_aside(folder: Path) -> None:
    from record import run_folder

    names = [path.name for path in run_folder.set_run_aside(folder)]
    if names:
        say("What the run left there is set aside as " + ", ".join(names))


# ---------------------------------------------------------------- plan


def plan(argv: list[str]) -> None:
    """Prints what a configuration takes on a GPU. Exit code 1 when it does not fit."""
    args = _plan_parser().parse(argv)
    options = config_options(args)
    host_memory_gb = options.get("host_memory_gb", 0)
    on_cpu = options.get("device") == "cpu"
    gpus, machines = _gpus_and_machines(args)
    machine = find_machine(
        host_memory_gb, args.gpu, on_cpu, _checked_gpu_memory(args), gpus, machines
    )
    config, name, why = resolve(options, args.preset, machine.memory_gb or None)
    facts = build_plan(config, name, machine, measured_runs())
    other_machine = args.gpu or args.gpu_memory_gb
    facts["host_memory_assumed"] = bool(other_machine and not host_memory_gb)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print_plan(config, why, facts, machine)
    if not facts["fits"]:
        raise SystemExit(1)


def _plan_parser() -> Parser:
    parser = new_parser(
        "run_experiment.py plan [--preset NAME] [--gpu NAME] [--gpu_memory_gb N] "
        "[--gpus N [--gpus_per_node M]] [--host_memory_gb N] [--json] [--FIELD VALUE ...]",
        __doc__,
    )
    _add_preset_option(parser)
    parser.add_argument(
        "--gpu",
        help=f"plan for this GPU instead of the one found: {' '.join(GPUS)}",
    )
    parser.add_argument(
        "--gpu_memory_gb",
        type=float,
        metavar="N",
        help="plan for a GPU with this memory, in GB of 1e9 bytes; "
        "with this option --gpu may be any name",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="plan for so many of these GPUs, which train one model together [1]",
    )
    parser.add_argument(
        "--gpus_per_node",
        type=int,
        metavar="M",
        help=f"how many of them are in a machine [all, or {GPUS_OF_A_MACHINE} of more]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_options(parser)  # --host_memory_gb is one of them
    return parser


# As most machines have that are sold for training.
GPUS_OF_A_MACHINE = 8
# More than any machine has, and than any run has had.
MOST_GPUS_OF_A_MACHINE = 1024
MOST_GPUS = 2**17


def _gpus_and_machines(args: argparse.Namespace) -> tuple[int, int]:
    """GPUs of a machine, and machines."""
    if not 1 <= args.gpus <= MOST_GPUS:
        raise ConfigError(f"--gpus {args.gpus}: must lie between 1 and {MOST_GPUS:,}")
    per_machine = args.gpus_per_node
    if per_machine is None:
        per_machine = min(args.gpus, GPUS_OF_A_MACHINE)
    if not 1 <= per_machine <= MOST_GPUS_OF_A_MACHINE:
        raise ConfigError(
            f"--gpus_per_node {per_machine}: must lie between 1 and {MOST_GPUS_OF_A_MACHINE:,}"
        )
    if args.gpus % per_machine != 0:
        raise ConfigError(
            f"--gpus {args.gpus}: all machines have the same number of GPUs, so it must be a "
            f"multiple of --gpus_per_node ({per_machine})"
        )
    return per_machine, args.gpus // per_machine


# In GB. No GPU has as much.
MOST_GPU_MEMORY_GB = 100_000


def _checked_gpu_memory(args: argparse.Namespace) -> float | None:
    memory_gb = args.gpu_memory_gb
    if memory_gb is not None and not 0 < memory_gb <= MOST_GPU_MEMORY_GB:
        raise ConfigError(
            f"--gpu_memory_gb {memory_gb:g}: must be greater than 0 and at most "
            f"{MOST_GPU_MEMORY_GB:,}"
        )
    return memory_gb


def measured_runs() -> list[MeasuredRun]:
    """The training speeds in benchmarks/results."""
    results = Path(__file__).parent / "benchmarks" / "results"
    runs = []
    for path in sorted(results.glob("train_*.json")):
        # train_PRESET_PRECISION_GPU.json, or ..._GPUxN.json for N of them
        preset, precision, gpu = path.stem.removeprefix("train_").rsplit("_", 2)
        runs.append(_measured_run(path, preset, precision, gpu))
    for path in sorted(results.glob("first_command_*.json")):
        details = json.loads(path.read_text())["details"]
        gpu = path.stem.removeprefix("first_command_")
        runs.append(_measured_run(path, details["preset"], details["precision"], gpu))
    return [run for run in runs if run.preset in PRESETS]


def _measured_run(path: Path, preset: str, precision: str, gpu: str) -> MeasuredRun:
    result = json.loads(path.read_text())
    command = result.get("details", {}).get("options", "")
    options = re.search(r"--batch_size .*--offload_optimizer \w+", command)
    gpus = 1
    if gpu not in GPUS:  # the names of some GPUs end like a number of them
        several = re.fullmatch(r"(\w+)x(\d+)", gpu)
        if several:
            gpu = several[1]
            gpus = int(several[2])
    return MeasuredRun(preset, precision, gpu, result["value"], options and options[0], gpus)


def print_plan(config: Config, why: str, facts: dict, machine: Machine) -> None:
    memory_gb = facts["advised_memory_gb"] or facts["memory_gb"]
    capacity_gb = machine.memory_gb or machine.host_gb_of_a_gpu
    lines = [
        wrapped(f"{facts['preset']}: {why}."),
        _labelled(
            "parameters",
            f"{_count(config.total_params)}, {_count(config.active_params)} active for a token",
        ),
        _labelled(
            "tokens",
            f"{facts['tokens_per_step']:,} a step, {format_count(facts['tokens_per_run'])} a run",
        ),
        _labelled("checkpoint", f"{format_size(checkpoint_gb(config), 2)} a file"),
        _labelled("training time", _training_time(facts)),
        *_lines_of_several_gpus(facts),
        wrapped(f"plan for {_place(facts)}: {_verdict(config, facts)}"),
        "",
        memory_table(memory_gb, optimizer_groups(config), capacity_gb=capacity_gb),
        "",
        "All sizes are predicted; a GB is 1e9 bytes. Training prints the measured ones\n"
        "beside them.",
    ]
    if facts["gpus"] > 1:
        lines.append("They are those of the GPU that needs most.")
    print("\n".join(lines))


def _lines_of_several_gpus(facts: dict) -> list[str]:
    """What `plan` says of several GPUs alone: the batch that they need, and their traffic."""
    lines = []
    needed = facts["needed_batch"]
    if needed:
        lines.append(_labelled("batch", f"{needed['reason']}. {needed['difference']}"))
    traffic = facts["traffic"]
    if traffic:
        lines.append(_labelled("traffic", _traffic_text(traffic)))
    return lines


def _traffic_text(traffic: dict) -> str:
    parts = []
    if traffic["gradients_gb"]:
        parts.append(
            f"{format_size(traffic['gradients_gb'])} of gradients "
            f"({traffic['gradient_seconds']:.2f} s) and {format_size(traffic['weights_gb'])} of "
            f"weights ({traffic['weight_seconds']:.2f} s) to the others of its machine, while they "
            "compute"
        )
    if traffic["machines_gb"]:
        parts.append(
            f"{format_size(traffic['machines_gb'])} to other machines "
            f"({traffic['machine_seconds']:.2f} s)"
        )
    return "predicted: in a step each GPU sends " + "; and ".join(parts)


# Columns of a label and of the space behind it, in what `plan` prints.
LABEL_COLUMNS = 15


def _labelled(label: str, text: str) -> str:
    """A label, and the text beside it in a column of its own."""
    beside = wrapped(text, COLUMNS - LABEL_COLUMNS)
    indented = textwrap.indent(beside, " " * LABEL_COLUMNS)
    return label + indented[len(label) :]


def _count(parameters: int) -> str:
    return f"{parameters:,} ({format_count(parameters)})"


def _training_time(facts: dict) -> str:
    """The time of a whole run: measured, predicted from what was measured elsewhere, or both."""
    lines = []
    if facts["hours"]:
        lines.append(_time_at(facts["hours"], facts["tokens_per_second"]) + ", measured with")
        lines.append(_measured_options(facts["measured_with"]))
        if facts["measured_with"] == facts["options"]:
            return "\n".join(lines)
        lines[0] = "not measured for the setup below; " + lines[0]
    if facts["predicted_hours"]:
        time_needed = _time_at(facts["predicted_hours"], facts["predicted_tokens_per_second"])
        lines.append(f"predicted for the setup below: {time_needed},")
        lines.append(f"from the measured speed of {facts['predicted_from']}")
    if not lines:
        return "not measured; training prints it after its first steps"
    return "\n".join(lines)


def _measured_options(measured_with: str) -> str:
    """Options in the column beside the label "training time", or words that stand for them."""
    if not measured_with.startswith("--"):
        return measured_with
    return command_lines(measured_with, "", COLUMNS - LABEL_COLUMNS)


def _time_at(hours: float, tokens_per_second: float) -> str:
    return f"{format_duration(3600 * hours)} at {tokens_per_second:,.0f} tokens/s"


def _place(facts: dict) -> str:
    """The machine that the plan is for."""
    place = "this machine's CPU"
    if facts["gpu"]:
        untested = "" if facts["gpu_tested"] else ", untested"
        place = f"{facts['gpu']} ({facts['gpu_memory_gb']} GB{untested})"
    place = _several(facts) + place
    place += f", host with {facts['host_memory_gb']:.0f} GB"
    if facts["host_memory_assumed"]:
        place += " (assumed; --host_memory_gb N says what it has)"
    return place


def _several(facts: dict) -> str:
    """How many GPUs the plan is for, or processes on a CPU; empty for one."""
    if facts["gpus"] == 1:
        return ""
    machines = facts["gpus"] // facts["gpus_per_node"]
    if not facts["gpu"]:
        return f"{facts['gpus']} processes on "
    text = f"{facts['gpus_per_node']} x "
    if machines > 1:
        text = f"{machines:,} machines with {text}"
    return text


def _verdict(config: Config, facts: dict) -> str:
    """Whether the plan fits and how, or what would fit."""
    options = command_lines(facts["options"], "  ")
    if not facts["fits"]:
        verdict = f"does not fit ({facts['shortage']}).\n{facts['advice']}"
        if facts["advised_memory_gb"]:
            return verdict + ", with this memory:"
        return f"{verdict}\nThe smallest choice, whose memory follows:\n{options}"
    verdict = "fits"
    batch_size = facts["choice"]["batch_size"]
    if not facts["as_configured"]:
        verdict += ", but not as configured"
    elif batch_size < config.batch_size:
        verdict += f", in micro-batches of {batch_size} instead of {config.batch_size}"
    verdict += f"\n{options}"
    if facts["fastest_options"] != facts["options"]:
        fastest_options = command_lines(facts["fastest_options"], "  ")
        condition = "if every choice is free"
        if facts["gpus"] > 1:
            condition += ", the micro-batch too"
        verdict += f"\nthe fastest by prediction, {condition}:\n{fastest_options}"
    return verdict


# ---------------------------------------------------------------- sample

# The least and the greatest value of the options of `sample`.
SAMPLE_BOUNDS = dict(
    temperature=(0, 1000),
    top_k=(0, 2**63 - 1),
    max_new_tokens=(1, 2**63 - 1),
    seed=(0, 2**62),
    n=(1, 4096),
    top_p=(1e-6, 1),
)


def sample(argv: list[str]) -> None:
    """Prints texts that continue a prompt."""
    args = _sample_parser().parse(argv)
    _check_sample_options(args)
    check_checkpoint(args.checkpoint, "--checkpoint")

    from corpus.tokenizer import ChunkEncoder, load_tokenizer
    from generate import finished_texts, stream, text_chunks
    from record.checkpoint import data_rules, open_model

    model, _, state = open_model(args.checkpoint, args.device, args.precision)
    name = state["config"].get("end_of_text", "")  # older checkpoints have no such field
    tokenizer, end_of_text = load_tokenizer(state["tokenizer_json"], name)
    # A prompt begins a document and does not end it: the model writes on.
    encode = ChunkEncoder(tokenizer, data_rules(state))
    prompt = encode.ids(args.prompt, before="", ends=False)
    temperature = args.temperature
    if temperature <= 1e-4:  # logits / temperature would overflow
        temperature = 0
    steps = stream(
        model,
        prompt or [end_of_text],
        args.max_new_tokens,
        temperature,
        args.top_k,
        args.top_p,
        args.seed,
        end_of_text,
        args.n,
    )
    if args.n == 1:  # the text as it comes
        print(args.prompt, end="", flush=True)
        tokens = (token for [token] in steps)
        for text in text_chunks(tokens, tokenizer):
            print(text, end="", flush=True)
        print()
    else:  # each text when it is finished
        for i, tokens in finished_texts(steps, end_of_text):
            text = args.prompt + tokenizer.decode(tokens)
            print(f"--- {i + 1} of {args.n}\n{text}", flush=True)


def _sample_parser() -> Parser:
    parser = new_parser(
        "run_experiment.py sample --checkpoint PATH --prompt TEXT [--n N] [--temperature T] "
        "[--top_k K] ...",
        __doc__,
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint file of a run")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--n", type=int, default=1, help="continuations to write, all at once [1]")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0 takes the likeliest token [0.8]",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        default=50,
        help="draw from the k likeliest tokens; 0: from all [50]",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the fewest likeliest tokens that hold this probability together [1.0]",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=200,
        help="tokens to add at most, before end-of-text; past the model's max_seq_len it sees the "
        "last max_seq_len tokens, and is slower [200]",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the draws; continuation i has seed + i [0]",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="[auto: the GPU when there is one]",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        help="[the run's own on a GPU, fp32 on a CPU]",
    )
    return parser


def _check_sample_options(args: argparse.Namespace) -> None:
    for name, (least, most) in SAMPLE_BOUNDS.items():
        if not least <= getattr(args, name) <= most:
            raise ConfigError(f"--{name} must lie between {least} and {most}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt holds bytes that are no text in UTF-8") from None


# ---------------------------------------------------------------- the program


def main(argv: list[str]) -> int:
    """Calls a command, by default `train`, and returns the exit code."""
    commands = dict(train=train, plan=plan, sample=sample)
    name = "train"
    if argv and not argv[0].startswith("-"):
        name, *argv = argv

    # A function, so that exit_code handles its errors as it handles those of a command.
    def command(argv: list[str]) -> None:
        if name in PRESETS:
            raise ConfigError(f"{name} is a preset, not a command: use --preset {name}")
        if name not in commands:
            raise ConfigError(
                f"unknown command {name!r}.{nearest(name, commands)} "
                f"Commands: {', '.join(commands)}"
            )
        commands[name](argv)

    return exit_code(command, argv, cleans_up=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
