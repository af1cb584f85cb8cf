"""Trains a Mixture-of-Experts language model on one GPU (or, small, on a CPU).

    python run_experiment.py                              train the preset that fits this machine's GPU (a CPU: tiny)
    python run_experiment.py --preset 5b --max_steps 2000 every field of config.py is an option
    python run_experiment.py --resume latest              go on where the last run stopped
    python run_experiment.py plan --preset 18b --gpu h200 what it takes, without a GPU
    python run_experiment.py sample --checkpoint checkpoints/checkpoint_latest.pt --prompt "def main(" --n 4
"""
import time

LAUNCHED = time.monotonic()     # before the slow imports

import argparse  # noqa: E402
import contextlib  # noqa: E402
import fcntl  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import typing  # noqa: E402
from pathlib import Path  # noqa: E402

# before torch is imported: an 18B run fills its GPU, and fixed segments lose gigabytes to fragmentation
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import memory  # noqa: E402
from config import (PRESETS, Config, ConfigError, ExperimentError, OutOfMemory, defaults, field_docs, nearest, parse_value, resolve,
                    resumed_config)  # noqa: E402


ELSEWHERE = dict(learning_rate="--muon_lr and --adamw_lr", lr="--muon_lr and --adamw_lr", max_lr="--muon_lr and --adamw_lr",
                 hidden_size="--d_model", n_embd="--d_model", intermediate_size="--d_ff", block_size="--max_seq_len",
                 context_length="--max_seq_len", epochs="--max_steps", num_train_epochs="--max_steps", output_dir="--save_dir", out_dir="--save_dir",
                 dtype="--precision", fp16="--precision fp16", bf16="--precision bf16", wandb="--tracker wandb", gpu="--device, or CUDA_VISIBLE_DEVICES",
                 gradient_checkpointing="--activation_checkpointing")
"""What other trainers call an option, where the names have little in common."""


class Parser(argparse.ArgumentParser):
    """argparse with errors as ConfigError, and the nearest option's name for one that does not exist."""

    def error(self, message):
        raise ConfigError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        # --max-steps is as good as --max_steps; a value that begins with -- is left alone when it holds a space
        argv = [re.sub(r"(?<=\w)-", "_", arg[:m.end()]) + arg[m.end():] if (m := re.match(r"--[\w-]+(?==|$)", arg)) else arg
                for arg in argv]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].partition("=")[0]
            bare = name.strip("-")
            if not name.startswith("-"):
                raise ConfigError(f"unexpected argument {unknown[0]!r}: a command comes first, options are --NAME VALUE, and a value with "
                                  "spaces needs quotes")
            same = ELSEWHERE.get(bare)
            if same and re.match(r"--\w+", same)[0] in known:
                raise ConfigError(f"unknown option {unknown[0]!r}. Here it is {same}. --help lists them all.")
            within = [option for option in known if bare in option]     # --tokens is --max_new_tokens rather than --top_k
            raise ConfigError(f"unknown option {unknown[0]!r}.{nearest(name, within or known)} --help lists them all.")
        return args


def new_parser(usage: str, description: str = __doc__) -> Parser:
    return Parser(usage=usage, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def add_config_options(parser: Parser) -> None:
    """An option for every field of Config, with its documentation and default."""
    group = parser.add_argument_group("configuration (the default is config.py's; a preset may set another)")
    docs, kinds = field_docs(), typing.get_type_hints(Config)
    for name, default in defaults().items():
        text = f"{docs.get(name, '')} [{'derived' if default is None else default}]".replace("%", "%%")
        choices = typing.get_args(kinds[name]) if typing.get_origin(kinds[name]) is typing.Literal else ("VALUE",)
        group.add_argument(f"--{name}", metavar="|".join(choices), help=text, default=argparse.SUPPRESS)


def config_options(args: argparse.Namespace) -> dict:
    """The Config fields given on the command line, each in its type. Raises ConfigError with all that are wrong."""
    values, problems = {}, []
    for name in defaults():
        if hasattr(args, name):
            try:
                values[name] = parse_value(name, getattr(args, name))
            except ConfigError as error:
                problems.append(f"--{error}")
    if problems:
        raise ConfigError("\n  ".join(problems))
    return values


# ---------------------------------------------------------------- commands

def train(argv: list[str]) -> None:
    parser = new_parser("run_experiment.py [train] [--preset NAME] [--resume latest|PATH] [--overwrite] [--FIELD VALUE ...]")
    parser.add_argument("--preset", help="a preset of config.py: " + " ".join(PRESETS))
    parser.add_argument("--resume", metavar="latest|PATH", help="go on from save_dir's latest checkpoint (a fresh start when "
                        "there is none), or from a checkpoint file")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that save_dir holds and start anew")
    add_config_options(parser)
    args = parser.parse(argv)
    options = config_options(args)
    if args.resume and args.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it: choose one")

    import torch        # only now: --help and plan answer without it
    gpu_gb = None
    if options.get("device", defaults()["device"]) != "cpu" and torch.cuda.is_available():
        gpu_gb = torch.cuda.get_device_properties(0).total_memory / memory.GB
        if torch.cuda.device_count() > 1:
            print(f"{torch.cuda.device_count()} GPUs are visible; a run uses one by design, the first of CUDA_VISIBLE_DEVICES.")
    config, name, why = resolve(options, args.preset, gpu_gb)

    import checkpoint
    import data
    import report
    import tracker
    import trainer
    named = args.resume not in (None, "latest")     # the folder may then be the one that the checkpoint names
    with contextlib.ExitStack() as lock:
        if not named:
            lock.enter_context(locked(Path(config.save_dir), "--save_dir"))
        path = resume_path(args.resume, config)
        state = None
        if path is not None:
            state = checkpoint.load(path)
            if args.resume == "latest":
                options["save_dir"] = config.save_dir       # the folder may have been moved since
            config, changes = resumed_config(state["config"], options)
            if config.max_steps < state["step"]:
                raise ConfigError(f"max_steps={config.max_steps}: the checkpoint is at step {state['step']} already; give more, or "
                                  "resume an earlier checkpoint")
            print(f"Resuming {path} at step {state['step']}" + (f", {args.preset} ignored: the checkpoint's configuration holds"
                  if args.preset else "") + (". Changed: " + "; ".join(changes) if changes else ""))
            factors = [trainer.learning_rate_factor(state["step"], c) for c in (resumed_config(state["config"], {})[0], config)]
            if factors[0] != factors[1]:
                print(f"The schedule is another: learning rates go on at {factors[1]:.3g} of their peaks, where they were at {factors[0]:.3g}.")
        else:
            print(f"Preset {name}: {why}." if name != "config.py" else f"Configuration of config.py: {why}.")
        folder = Path(config.save_dir)
        if named:
            lock.enter_context(locked(folder, "--save_dir"))
        if args.resume == "latest" and path is None:
            print(f"Nothing to resume: no checkpoint in {folder}. A new run starts.")
        found = report.run_files(folder)
        if found and not args.overwrite and (path is None or path.resolve().parent != folder.resolve()):
            if path is None and args.resume == "latest":        # a run that ended before its first checkpoint
                print("What a run left there is set aside as " + ", ".join(report.set_aside(file).name for file in found))
            else:
                raise ConfigError(f"{folder} already holds a run ({', '.join(f.name for f in found[:4])}"
                                  f"{' ...' if len(found) > 4 else ''}). Go on with it: --resume latest; keep it: another "
                                  "--save_dir; delete it: --overwrite.")
        print(f"{config.total_params:,} parameters, {config.active_params:,} active for a token; "
              f"{config.tokens_per_step:,} tokens a step", flush=True)
        tracker.require(config.tracker)
        # what cannot start is refused before minutes of tokenizing
        memory.refuse_what_cannot_fit(config, memory.machine_of(memory.find_device(config), config.host_memory_gb))
        corpus = data.prepare(config)
        run = trainer.Trainer(config, corpus, state, path, LAUNCHED)
        del state           # it is mapped from the checkpoint's file, whose disk space would stay taken
        if args.overwrite:      # only now that nothing can be wrong any more
            freed = sum(file.stat().st_size / file.stat().st_nlink for file in found)
            checkpoint.check_free_space(folder, int(run.checkpoint_bytes_to_come() - freed))
            for file in found:
                file.unlink(missing_ok=True)
        run.run()


@contextlib.contextmanager
def locked(folder: Path, option: str):
    """Keeps other processes from writing to a folder, which is made where it is missing and removed again when nothing came into it. The
    kernel takes the lock from a process that is killed; on a file system without locks there is none. Raises ConfigError or
    CheckpointError, which name the `option` that chose the folder."""
    import checkpoint
    made, ours = not folder.exists(), False
    while not ours:     # else it was removed by the process that had the lock
        checkpoint.check_free_space(folder, 0, option)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder))
        except BlockingIOError as error:
            os.close(handle)
            raise ConfigError(f"another process is at work on {folder}: wait for it, or give another {option}") from error
        except OSError:
            ours = True
        if not ours:
            os.close(handle)
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):      # it holds something
                folder.rmdir()
        os.close(handle)


def resume_path(resume: str | None, config: Config) -> Path | None:
    """The checkpoint that --resume names; None for a fresh start."""
    if resume is None:
        return None
    if resume != "latest":
        if Path(resume).is_dir():
            raise ConfigError(f"--resume {resume} is a folder. Its newest checkpoint: --save_dir {resume} --resume latest; or "
                              "name one of its checkpoint files")
        return Path(resume)
    import checkpoint
    latest = checkpoint.latest_path(config.save_dir)
    numbered = Path(config.save_dir).glob("checkpoint_step_*.pt")       # alone when the first save was cut off before its link
    return latest if latest.exists() else max(numbered, key=lambda path: path.stat().st_mtime_ns, default=None)


def plan(argv: list[str]) -> None:
    parser = new_parser("run_experiment.py plan [--preset NAME] [--gpu NAME] [--host_memory_gb N] [--json] [--FIELD VALUE ...]")
    parser.add_argument("--preset", help="a preset of config.py: " + " ".join(PRESETS))
    parser.add_argument("--gpu", help=f"plan for this GPU instead of the one found: {' '.join(memory.GPUS)}; "
                        "the program uses one GPU by design")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_options(parser)
    args = parser.parse(argv)
    options = config_options(args)
    machine = memory.find_machine(options.get("host_memory_gb", 0), args.gpu, options.get("device") == "cpu")
    config, name, why = resolve(options, args.preset, machine.memory_gb or None)
    facts = memory.plan(config, name, machine)
    facts["host_memory_assumed"] = bool(args.gpu and not options.get("host_memory_gb"))
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print_plan(config, name, why, facts, machine)
    if not facts["fits"]:
        raise SystemExit(1)


def print_plan(config: Config, name: str, why: str, facts: dict, machine: memory.Machine) -> None:
    where = f"{facts['gpu']} ({facts['gpu_memory_gb']} GB)" if facts["gpu"] else "this machine's CPU"
    batch_size = facts["choice"]["batch_size"]
    if facts["fits"]:
        verdict = "fits" + (", but not as configured" * (not facts["as_configured"]) or
                            f", in micro-batches of {batch_size} instead of {config.batch_size}" * (batch_size < config.batch_size)
                            ) + f"\n  {facts['options']}"
    else:
        verdict = (f"does not fit ({facts['shortage']}).\n{facts['advice']}"
                   + (", with this memory:" if facts["advised_memory_gb"] else f"\nThe smallest choice, whose memory follows:\n  {facts['options']}"))
    print(f"{name}: {why}.\n"
          f"parameters        {config.total_params:,} ({memory.count(config.total_params)}), {config.active_params:,} "
          f"({memory.count(config.active_params)}) active for a token\n"
          f"tokens            {facts['tokens_per_step']:,} a step, {memory.count(facts['tokens_per_run'])} a run\n"
          f"checkpoint        {facts['checkpoint_gb']:.2f} GB a file\n"
          f"hours             " + ("" if facts["measured_with"] == facts["options"] else "not measured for the setup below; " if facts["hours"] else
                                   "not measured; training prints them after its first steps")
          + (f"{facts['hours']:,.0f} at {facts['tokens_per_second']:,.0f} tokens/s, measured with\n                  {facts['measured_with']}"
             if facts["hours"] else "")
          + f"\nplan for {where}, host with {facts['host_memory_gb']:.0f} GB"
          + (" (assumed; --host_memory_gb N says what it has)" if facts["host_memory_assumed"] else "") + ": "
          + f"{verdict}\n")
    print(memory.table(facts["advised_memory_gb"] or facts["memory_gb"], capacity_gb=machine.memory_gb or machine.host_memory_gb))
    print("\nAll sizes are predicted, in GB of 1e9 bytes; training prints the measured ones beside them.")


def sample(argv: list[str]) -> None:
    parser = new_parser("run_experiment.py sample --checkpoint PATH --prompt TEXT [--n N] [--temperature T] [--top_k K] ...")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint file of a run")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--n", type=int, default=1, help="continuations to write, all at once [1]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token [0.8]")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest tokens; 0: from all [50]")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the fewest likeliest tokens that hold this "
                        "probability together [1.0]")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to add at most, before end-of-text; past the "
                        "model's max_seq_len it sees the last max_seq_len tokens, and is slower [200]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws; continuation i has seed + i [0]")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="[auto: the GPU when there is one]")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="[the run's own on a GPU, fp32 on a CPU]")
    args = parser.parse(argv)
    for name, least, most in (("temperature", 0, 1000), ("top_k", 0, 2 ** 63 - 1), ("max_new_tokens", 1, 2 ** 63 - 1),
                              ("seed", 0, 2 ** 62), ("n", 1, 4096), ("top_p", 1e-6, 1)):
        if not least <= getattr(args, name) <= most:
            raise ConfigError(f"--{name} must lie between {least} and {most}")

    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("--prompt holds bytes that are no text in UTF-8") from None

    import data
    from sampling import finished_texts, stream, text_pieces
    from tokenizer import encode
    model, _, state = load_model(args.checkpoint, args.device, args.precision)
    tokenizer, end_of_text = data.load_tokenizer(state["tokenizer_json"])
    prompt = encode(tokenizer, args.prompt) or [end_of_text]
    temperature = args.temperature if args.temperature > 1e-4 else 0        # below, logits / temperature overflows
    steps = stream(model, prompt, args.max_new_tokens, temperature, args.top_k, args.top_p, args.seed, end_of_text, args.n)
    if args.n == 1:
        print(args.prompt, end="", flush=True)
        for piece in text_pieces((token for [token] in steps), tokenizer):
            print(piece, end="", flush=True)
        print()
    else:
        for i, tokens in finished_texts(steps, end_of_text):
            print(f"--- {i + 1} of {args.n}\n{args.prompt}{tokenizer.decode(tokens)}", flush=True)


def load_model(path: str, device: str, precision: str | None):
    """(model, config, state) of a checkpoint file, on the device that an option names, in `precision`, by default in the
    run's own on a GPU and in fp32 on a CPU. Raises ConfigError or CheckpointError."""
    if Path(path).is_dir():
        raise ConfigError(f"--checkpoint {path} is a folder: name a file of it, such as checkpoint_latest.pt")
    import torch

    import checkpoint
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU; use --device cpu")
    device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    state = checkpoint.load(path)
    precision = precision or (state["config"]["precision"] if device == "cuda" else "fp32")
    return *checkpoint.model_from_state(state, device, precision), state


def main(argv: list[str]) -> int:
    commands = dict(train=train, plan=plan, sample=sample)
    name, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)

    def command(argv):
        if name not in commands:
            raise ConfigError(f"unknown command {name!r}.{nearest(name, commands)} Commands: {', '.join(commands)}")
        commands[name](argv)

    return exit_code(command, argv, training=name == "train")


def exit_code(command, argv: list[str], training: bool = False) -> int:
    """Calls a command; what the user can mend becomes a line on stderr, without a traceback, and the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # a terminal that has no é must not end a run that samples one
    try:
        command(argv)
        return 0
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name} is not installed: pip install -r requirements.txt", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if training:
            print("error: whoever read the output stopped reading, so training stopped; write it to a file instead",
                  file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        print(f"error: out of memory ({str(error).splitlines()[0]}). Use --device cpu or a smaller model.", file=sys.stderr)
        return OutOfMemory.exit_code
    except OSError as error:
        print(f"error: {error}. Check the path, its permissions and the free disk space.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted" + ("; nothing was being trained yet, or Ctrl-C came twice" if training else ""), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
