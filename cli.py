"""TODO cli"""

import argparse  # noqa: E402
import contextlib  # noqa: E402
import fcntl  # noqa: E402
import io  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import typing  # noqa: E402
from pathlib import Path  # noqa: E402

from config import (
    Config,
    ConfigError,
    ExperimentError,
    OutOfMemory,
    defaults,
    field_docs,
    nearest,
    parse_value,
)  # noqa: E402
from planner.machine import is_out_of_memory  # noqa: E402

ELSEWHERE = dict(
    learning_rate="--muon_lr and --adamw_lr",
    lr="--muon_lr and --adamw_lr",
    max_lr="--muon_lr and --adamw_lr",
    hidden_size="--d_model",
    n_embd="--d_model",
    intermediate_size="--d_ff",
    block_size="--max_seq_len",
    context_length="--max_seq_len",
    epochs="--max_steps",
    num_train_epochs="--max_steps",
    output_dir="--save_dir",
    out_dir="--save_dir",
    dtype="--precision",
    fp16="--precision fp16",
    bf16="--precision bf16",
    wandb="--tracker wandb",
    gpu="--device, or CUDA_VISIBLE_DEVICES",
    gradient_checkpointing="--activation_checkpointing",
)
"""What other trainers call an option, where the names have little in common."""


class Parser(argparse.ArgumentParser):
    """argparse with errors as ConfigError, and the nearest option's name for one that does not exist."""

    def error(self, message):
        raise ConfigError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        # --max-steps is as good as --max_steps; a value that begins with -- is left alone when it holds a space
        argv = [
            re.sub(r"(?<=\w)-", "_", arg[: m.end()]) + arg[m.end() :]
            if (m := re.match(r"--[\w-]+(?==|$)", arg))
            else arg
            for arg in argv
        ]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].partition("=")[0]
            bare = name.strip("-")
            if not name.startswith("-"):
                raise ConfigError(
                    f"unexpected argument {unknown[0]!r}: a command comes first, options are --NAME VALUE, and a value with "
                    "spaces needs quotes"
                )
            same = ELSEWHERE.get(bare)
            if same and re.match(r"--\w+", same)[0] in known:
                raise ConfigError(
                    f"unknown option {unknown[0]!r}. Here it is {same}. --help lists them all."
                )
            within = [
                option for option in known if bare in option
            ]  # --tokens is --max_new_tokens rather than --top_k
            raise ConfigError(
                f"unknown option {unknown[0]!r}.{nearest(name, within or known)} --help lists them all."
            )
        return args


def new_parser(usage: str, description: str) -> Parser:
    return Parser(
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config_options(parser: Parser) -> None:
    """An option for every field of Config, with its documentation and default."""
    group = parser.add_argument_group(
        "configuration (the default is config.py's; a preset may set another)"
    )
    docs, kinds = field_docs(), typing.get_type_hints(Config)
    for name, default in defaults().items():
        text = f"{docs.get(name, '')} [{'derived' if default is None else default}]".replace(
            "%", "%%"
        )
        choices = (
            typing.get_args(kinds[name])
            if typing.get_origin(kinds[name]) is typing.Literal
            else ("VALUE",)
        )
        group.add_argument(
            f"--{name}", metavar="|".join(choices), help=text, default=argparse.SUPPRESS
        )


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


@contextlib.contextmanager
def locked(folder: Path, option: str):
    """Keeps other processes from writing to a folder, which is made where it is missing and removed again when nothing came into it. The
    kernel takes the lock from a process that is killed; on a file system without locks there is none. Raises ConfigError or
    CheckpointError, which name the `option` that chose the folder."""
    from record import checkpoint

    made, ours = not folder.exists(), False
    while not ours:  # else it was removed by the process that had the lock
        checkpoint.check_free_space(folder, 0, option)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = folder.exists() and os.path.samestat(os.fstat(handle), os.stat(folder))
        except BlockingIOError as error:
            os.close(handle)
            raise ConfigError(
                f"another process is at work on {folder}: wait for it, or give another {option}"
            ) from error
        except OSError:
            ours = True
        if not ours:
            os.close(handle)
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        os.close(handle)


def exit_code(command, argv: list[str], training: bool = False) -> int:
    """Calls a command; what the user can mend becomes a line on stderr, without a traceback, and the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a terminal that has no é must not end a run that samples one
    try:
        command(argv)
        return 0
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name} is not installed: pip install -r requirements.txt",
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if training:
            print(
                "error: whoever read the output stopped reading, so training stopped; write it to a file instead",
                file=sys.stderr,
            )
        return 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({str(error).splitlines()[0]}). Use --device cpu or a smaller model.",
            file=sys.stderr,
        )
        return OutOfMemory.exit_code
    except OSError as error:
        print(
            f"error: {error}. Check the path, its permissions and the free disk space.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(
            "\ninterrupted"
            + ("; nothing was being trained yet, or Ctrl-C came twice" if training else ""),
            file=sys.stderr,
        )
        return 130
