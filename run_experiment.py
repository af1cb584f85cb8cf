"""Trains a Mixture-of-Experts language model on one GPU (or, small, on a CPU).

python run_experiment.py                              train the preset that fits this machine's GPU (a CPU: tiny)
python run_experiment.py --preset 5b --max_steps 2000 every field of config.py is an option
python run_experiment.py --resume latest              go on where the last run stopped
python run_experiment.py plan --preset 18b --gpu h200 what it takes, without a GPU
python run_experiment.py sample --checkpoint checkpoints/checkpoint_latest.pt --prompt "def main(" --n 4
"""

import time

LAUNCHED = time.monotonic()  # before the slow imports

import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

# before torch is imported: an 18B run fills its GPU, and fixed segments lose gigabytes to fragmentation
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from cli import add_config_options, config_options, exit_code, locked, new_parser
from config import PRESETS, Config, ConfigError, defaults, nearest, resolve, resumed_config  # noqa: E402
from planner.choice import check_fits
from planner.machine import GB, GPUS, Machine, find_device, find_machine, machine_of_device
from planner.plan import build_plan, format_count, memory_table  # noqa: E402

# ---------------------------------------------------------------- commands


def train(argv: list[str]) -> None:
    parser = new_parser(
        "run_experiment.py [train] [--preset NAME] [--resume latest|PATH] [--overwrite] [--FIELD VALUE ...]",
        __doc__,
    )
    parser.add_argument("--preset", help="a preset of config.py: " + " ".join(PRESETS))
    parser.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="go on from save_dir's latest checkpoint (a fresh start when "
        "there is none), or from a checkpoint file",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the run that save_dir holds and start anew"
    )
    add_config_options(parser)
    args = parser.parse(argv)
    options = config_options(args)
    if args.resume and args.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it: choose one")

    import torch  # only now: --help and plan answer without it

    gpu_gb = None
    if options.get("device", defaults()["device"]) != "cpu" and torch.cuda.is_available():
        gpu_gb = torch.cuda.get_device_properties(0).total_memory / GB
        if torch.cuda.device_count() > 1:
            print(
                f"{torch.cuda.device_count()} GPUs are visible; a run uses one by design, the first of CUDA_VISIBLE_DEVICES."
            )
    config, name, why = resolve(options, args.preset, gpu_gb)

    import data
    import trainer
    from record import checkpoint, results, tracker

    named = args.resume not in (
        None,
        "latest",
    )  # the folder may then be the one that the checkpoint names
    with contextlib.ExitStack() as lock:
        if not named:
            lock.enter_context(locked(Path(config.save_dir), "--save_dir"))
        path = resume_path(args.resume, config)
        state = None
        if path is not None:
            state = checkpoint.load(path)
            if args.resume == "latest":
                options["save_dir"] = config.save_dir  # the folder may have been moved since
            config, changes = resumed_config(state["config"], options)
            if config.max_steps < state["step"]:
                raise ConfigError(
                    f"max_steps={config.max_steps}: the checkpoint is at step {state['step']} already; give more, or "
                    "resume an earlier checkpoint"
                )
            print(
                f"Resuming {path} at step {state['step']}"
                + (
                    f", {args.preset} ignored: the checkpoint's configuration holds"
                    if args.preset
                    else ""
                )
                + (". Changed: " + "; ".join(changes) if changes else "")
            )
            factors = [
                trainer.lr_schedule(state["step"], c)
                for c in (resumed_config(state["config"], {})[0], config)
            ]
            if factors[0] != factors[1]:
                print(
                    f"The schedule is another: learning rates go on at {factors[1]:.3g} of their peaks, where they were at {factors[0]:.3g}."
                )
        else:
            print(
                f"Preset {name}: {why}."
                if name != "config.py"
                else f"Configuration of config.py: {why}."
            )
        folder = Path(config.save_dir)
        if named:
            lock.enter_context(locked(folder, "--save_dir"))
        if args.resume == "latest" and path is None:
            print(f"Nothing to resume: no checkpoint in {folder}. A new run starts.")
        found = results.run_files(folder)
        if (
            found
            and not args.overwrite
            and (path is None or path.resolve().parent != folder.resolve())
        ):
            if (
                path is None and args.resume == "latest"
            ):  # a run that ended before its first checkpoint
                print(
                    "What a run left there is set aside as "
                    + ", ".join(results.set_aside(file).name for file in found)
                )
            else:
                raise ConfigError(
                    f"{folder} already holds a run ({', '.join(f.name for f in found[:4])}"
                    f"{' ...' if len(found) > 4 else ''}). Go on with it: --resume latest; keep it: another "
                    "--save_dir; delete it: --overwrite."
                )
        print(
            f"{config.total_params:,} parameters, {config.active_params:,} active for a token; "
            f"{config.tokens_per_step:,} tokens a step",
            flush=True,
        )
        tracker.require(config.tracker)
        # what cannot start is refused before minutes of tokenizing
        check_fits(config, machine_of_device(find_device(config), config.host_memory_gb))
        corpus = data.prepare(config)
        run = trainer.Trainer(config, corpus, state, path, LAUNCHED)
        del state  # it is mapped from the checkpoint's file, whose disk space would stay taken
        if args.overwrite:  # only now that nothing can be wrong any more
            freed = sum(file.stat().st_size / file.stat().st_nlink for file in found)
            checkpoint.check_free_space(folder, int(run.checkpoint_bytes_to_come() - freed))
            for file in found:
                file.unlink(missing_ok=True)
        run.run()


def resume_path(resume: str | None, config: Config) -> Path | None:
    """The checkpoint that --resume names; None for a fresh start."""
    if resume is None:
        return None
    if resume != "latest":
        if Path(resume).is_dir():
            raise ConfigError(
                f"--resume {resume} is a folder. Its newest checkpoint: --save_dir {resume} --resume latest; or "
                "name one of its checkpoint files"
            )
        return Path(resume)
    from record import checkpoint

    latest = checkpoint.latest_path(config.save_dir)
    numbered = Path(config.save_dir).glob(
        "checkpoint_step_*.pt"
    )  # alone when the first save was cut off before its link
    return (
        latest
        if latest.exists()
        else max(numbered, key=lambda path: path.stat().st_mtime_ns, default=None)
    )


def plan(argv: list[str]) -> None:
    parser = new_parser(
        "run_experiment.py plan [--preset NAME] [--gpu NAME] [--host_memory_gb N] [--json] [--FIELD VALUE ...]",
        __doc__,
    )
    parser.add_argument("--preset", help="a preset of config.py: " + " ".join(PRESETS))
    parser.add_argument(
        "--gpu",
        help=f"plan for this GPU instead of the one found: {' '.join(GPUS)}; "
        "the program uses one GPU by design",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_options(parser)
    args = parser.parse(argv)
    options = config_options(args)
    machine = find_machine(
        options.get("host_memory_gb", 0), args.gpu, options.get("device") == "cpu"
    )
    config, name, why = resolve(options, args.preset, machine.memory_gb or None)
    facts = build_plan(config, name, machine, measured_speed(config, name, machine.key))
    facts["host_memory_assumed"] = bool(args.gpu and not options.get("host_memory_gb"))
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print_plan(config, name, why, facts, machine)
    if not facts["fits"]:
        raise SystemExit(1)


SHAPE = """d_model n_layers n_heads n_kv_heads d_ff num_experts top_k moe_every max_seq_len vocab_size tie_embeddings optimizer
master_weights""".split()


def measured_speed(c: Config, preset: str, gpu: str | None) -> tuple[float, str] | None:
    """(median training speed in tokens/s, the options it was measured with) from benchmarks/results, where there is one for this
    preset, unchanged in shape, this precision and this GPU."""
    path = (
        Path(__file__).parent
        / "benchmarks"
        / "results"
        / f"train_{preset}_{c.precision}_{gpu}.json"
    )
    if (
        gpu is None
        or not path.exists()
        or any(getattr(c, name) != getattr(Config(**PRESETS[preset]), name) for name in SHAPE)
    ):
        return None
    result = json.loads(path.read_text())
    options = re.search(
        r"--batch_size .*--offload_optimizer \w+", result.get("details", {}).get("options", "")
    )
    return result["value"], options[0] if options else "options that its file does not name"


def print_plan(config: Config, name: str, why: str, facts: dict, machine: Machine) -> None:
    where = (
        f"{facts['gpu']} ({facts['gpu_memory_gb']} GB)" if facts["gpu"] else "this machine's CPU"
    )
    batch_size = facts["choice"]["batch_size"]
    if facts["fits"]:
        verdict = (
            "fits"
            + (
                ", but not as configured" * (not facts["as_configured"])
                or f", in micro-batches of {batch_size} instead of {config.batch_size}"
                * (batch_size < config.batch_size)
            )
            + f"\n  {facts['options']}"
        )
    else:
        verdict = f"does not fit ({facts['shortage']}).\n{facts['advice']}" + (
            ", with this memory:"
            if facts["advised_memory_gb"]
            else f"\nThe smallest choice, whose memory follows:\n  {facts['options']}"
        )
    print(
        f"{name}: {why}.\n"
        f"parameters        {config.total_params:,} ({format_count(config.total_params)}), {config.active_params:,} "
        f"({format_count(config.active_params)}) active for a token\n"
        f"tokens            {facts['tokens_per_step']:,} a step, {format_count(facts['tokens_per_run'])} a run\n"
        f"checkpoint        {facts['checkpoint_gb']:.2f} GB a file\n"
        f"hours             "
        + (
            ""
            if facts["measured_with"] == facts["options"]
            else "not measured for the setup below; "
            if facts["hours"]
            else "not measured; training prints them after its first steps"
        )
        + (
            f"{facts['hours']:,.0f} at {facts['tokens_per_second']:,.0f} tokens/s, measured with\n                  {facts['measured_with']}"
            if facts["hours"]
            else ""
        )
        + f"\nplan for {where}, host with {facts['host_memory_gb']:.0f} GB"
        + (
            " (assumed; --host_memory_gb N says what it has)"
            if facts["host_memory_assumed"]
            else ""
        )
        + ": "
        + f"{verdict}\n"
    )
    print(
        memory_table(
            facts["advised_memory_gb"] or facts["memory_gb"],
            capacity_gb=machine.memory_gb or machine.host_memory_gb,
        )
    )
    print(
        "\nAll sizes are predicted, in GB of 1e9 bytes; training prints the measured ones beside them."
    )


def sample(argv: list[str]) -> None:
    parser = new_parser(
        "run_experiment.py sample --checkpoint PATH --prompt TEXT [--n N] [--temperature T] [--top_k K] ...",
        __doc__,
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint file of a run")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--n", type=int, default=1, help="continuations to write, all at once [1]")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token [0.8]"
    )
    parser.add_argument(
        "--top_k", type=int, default=50, help="draw from the k likeliest tokens; 0: from all [50]"
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
        help="tokens to add at most, before end-of-text; past the "
        "model's max_seq_len it sees the last max_seq_len tokens, and is slower [200]",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the draws; continuation i has seed + i [0]"
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
    args = parser.parse(argv)
    for name, least, most in (
        ("temperature", 0, 1000),
        ("top_k", 0, 2**63 - 1),
        ("max_new_tokens", 1, 2**63 - 1),
        ("seed", 0, 2**62),
        ("n", 1, 4096),
        ("top_p", 1e-6, 1),
    ):
        if not least <= getattr(args, name) <= most:
            raise ConfigError(f"--{name} must lie between {least} and {most}")

    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt holds bytes that are no text in UTF-8") from None

    from corpus.tokenizer import encode, load_tokenizer
    from generate import finished_texts, stream, text_pieces
    from record.checkpoint import open_model

    model, _, state = open_model(args.checkpoint, args.device, args.precision)
    tokenizer, end_of_text = load_tokenizer(state["tokenizer_json"])
    prompt = encode(tokenizer, args.prompt) or [end_of_text]
    temperature = (
        args.temperature if args.temperature > 1e-4 else 0
    )  # below, logits / temperature overflows
    steps = stream(
        model,
        prompt,
        args.max_new_tokens,
        temperature,
        args.top_k,
        args.top_p,
        args.seed,
        end_of_text,
        args.n,
    )
    if args.n == 1:
        print(args.prompt, end="", flush=True)
        for piece in text_pieces((token for [token] in steps), tokenizer):
            print(piece, end="", flush=True)
        print()
    else:
        for i, tokens in finished_texts(steps, end_of_text):
            print(f"--- {i + 1} of {args.n}\n{args.prompt}{tokenizer.decode(tokens)}", flush=True)


def main(argv: list[str]) -> int:
    commands = dict(train=train, plan=plan, sample=sample)
    name, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)

    def command(argv):
        if name not in commands:
            raise ConfigError(
                f"unknown command {name!r}.{nearest(name, commands)} Commands: {', '.join(commands)}"
            )
        commands[name](argv)

    return exit_code(command, argv, training=name == "train")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
