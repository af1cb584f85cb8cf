"""What the commands share: the option parser, exit codes, and the lock on a run's folder.

It parses and reports. It trains nothing, and writes nothing but the folder that it locks.
"""

import argparse
import contextlib
import fcntl
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from config import (
    PRESETS,
    ConfigError,
    ExperimentError,
    OutOfMemory,
    defaults,
    field_docs,
    field_types,
    missing_package_message,
    nearest,
    parse_value,
)
from planner.machine import is_out_of_memory

# ---------------------------------------------------------------- options

# What other trainers call an option, where the two names have little in common.
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


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError and names the option that is nearest to an unknown one."""

    def error(self, message: str):
        raise ConfigError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args([_with_underscores(arg) for arg in argv])
        if unknown:
            raise ConfigError(self._unknown_message(unknown[0]))
        return args

    def _unknown_message(self, argument: str) -> str:
        option = argument.partition("=")[0]
        if argument in PRESETS and "--preset" in self._option_string_actions:
            return f"unexpected argument {argument!r}: use --preset {argument}"
        if not option.startswith("-"):
            return (
                f"unexpected argument {argument!r}: a command comes first, options are --NAME "
                "VALUE, and a value with spaces needs quotes"
            )
        known = [name for action in self._actions for name in action.option_strings]
        name = option.strip("-")
        elsewhere = ELSEWHERE.get(name)
        if elsewhere and any(option in known for option in re.findall(r"--\w+", elsewhere)):
            return f"unknown option {argument!r}. Here it is {elsewhere}. --help lists them all."
        # A name within another one is a better guess than a similar name: for --tokens,
        # --max_new_tokens is better than --top_k.
        longer = [other for other in known if name in other]
        suggestion = nearest(option, longer or known)
        return f"unknown option {argument!r}.{suggestion} --help lists them all."


def _with_underscores(arg: str) -> str:
    """--max-steps as --max_steps, and --max-steps=5 as --max_steps=5; other arguments as they are.

    A value that begins with -- is left alone when it holds a space.
    """
    option = re.match(r"--[\w-]+(?==|$)", arg)
    if option is None:
        return arg
    return re.sub(r"(?<=\w)-", "_", option[0]) + arg[option.end() :]


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
    docs = field_docs()
    kinds = field_types()
    for name, default in defaults().items():
        shown = "derived" if default is None else default
        text = f"{docs.get(name, '')} [{shown}]"
        choices = ("VALUE",)
        if typing.get_origin(kinds[name]) is typing.Literal:
            choices = typing.get_args(kinds[name])
        group.add_argument(
            f"--{name}",
            metavar="|".join(choices),
            help=text.replace("%", "%%"),  # argparse formats help texts with %
            default=argparse.SUPPRESS,  # so that only options that were given are in the result
        )


def config_options(args: argparse.Namespace) -> dict:
    """The fields of Config that were given on the command line, each in its type.

    Raises ConfigError with all options that are wrong.
    """
    values = {}
    problems = []
    for name in defaults():
        if not hasattr(args, name):
            continue
        try:
            values[name] = parse_value(name, getattr(args, name))
        except ConfigError as error:
            problems.append(f"--{error}")
    if problems:
        raise ConfigError("\n  ".join(problems))
    return values


# ---------------------------------------------------------------- the lock on a folder


@contextlib.contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Keeps other processes from writing to a folder.

    A folder that is missing is made, and removed again when nothing came into it. The kernel takes
    the lock from a process that is killed. A file system without locks has none.

    Raises ConfigError when another process has the lock, and CheckpointError when the folder cannot
    be written to; both name the `option` that chose the folder.
    """
    is_new = not folder.exists()
    handle = _lock(folder, option)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # something came into it
                folder.rmdir()
        os.close(handle)


def _lock(folder: Path, option: str) -> int:
    """The file descriptor that holds the lock on the folder, which is made where it is missing."""
    from record import checkpoint  # it imports torch, which `plan` and --help do without

    while True:
        checkpoint.check_free_space(folder, 0, option)  # and makes the folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ConfigError(
                f"another process is at work on {folder}: wait for it, or give another {option}"
            ) from error
        except OSError:  # a file system without locks
            return handle
        if _is_open_folder(handle, folder):
            return handle
        # The process that had the lock removed its folder between our open and our lock.
        os.close(handle)


def _is_open_folder(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- exit codes


def exit_code(command: Callable, argv: list[str], training: bool = False) -> int:
    """Calls a command and returns the exit code of the program.

    What the user can fix becomes a line on stderr, without a traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal that cannot print é must not end a run that samples one
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command(argv)
    except ExperimentError as error:
        return _failed(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        return _failed(missing_package_message(error))
    except BrokenPipeError:
        return _lost_reader(training)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).partition("\n")[0] or type(error).__name__
        return _failed(
            f"out of memory ({cause}). Use --device cpu or a smaller model.",
            OutOfMemory.exit_code,
        )
    except OSError as error:
        return _failed(f"{error}. Check the path, its permissions and the free disk space.")
    except KeyboardInterrupt:
        return _interrupted(training)
    return 0


def _failed(message: str, code: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _lost_reader(training: bool) -> int:
    """`head` and its like read some lines and leave: no error, unless a training ends by it."""
    # Python flushes stdout at exit, and would fail there once more
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if training:
        return _failed(
            "whoever read the output stopped reading, so training stopped; write it to a file "
            "instead"
        )
    return 1


def _interrupted(training: bool) -> int:
    message = "\ninterrupted"
    if training:
        message += "; nothing was being trained yet, or Ctrl-C came twice"
    print(message, file=sys.stderr)
    return 130
