"""What the commands share: option parser, checks of paths, lock on a run's folder, exit codes.

It parses and reports. It trains nothing, and writes nothing but the folder that it locks.
"""

import argparse
import contextlib
import fcntl
import functools
import os
import re
import signal
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from config import (
    PRESETS,
    ConfigError,
    ExperimentError,
    OutOfMemory,
    defaults,
    expanded,
    field_docs,
    field_types,
    missing_package_message,
    nearest,
    parse_value,
)
from engine import lifeline
from planner.layout import fitted, quoted, say
from planner.machine import is_out_of_memory
from record import console, stop
from record.small_files import run_files

# ---------------------------------------------------------------- options

# Options of other trainers, and ours that do the same, where the names have little in common.
OTHER_TRAINERS = dict(
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
    num_gpus="--gpus",
    nproc_per_node="--gpus",
    gradient_checkpointing="--activation_checkpointing",
)


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError and names the option that is nearest to an unknown one."""

    def error(self, message: str):
        raise ConfigError(message)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        written_alike = [_with_underscores(arg) for arg in argv]
        args, unknown = self.parse_known_args(written_alike)
        if unknown:
            raise ConfigError(self._unknown_message(unknown[0]))
        return args

    def _unknown_message(self, argument: str) -> str:
        known = list(self._option_string_actions)
        if argument in PRESETS and "--preset" in known:
            return f"unexpected argument {argument!r}: use --preset {argument}"
        if not argument.startswith("-"):
            return (
                f"unexpected argument {argument!r}: a command comes first, options are --NAME "
                "VALUE, and a value with spaces needs quotes"
            )
        option = argument.partition("=")[0]
        name = option.strip("-")
        ours = OTHER_TRAINERS.get(name)
        # The parser of this command may lack our option: `sample` has no --d_model, for example.
        if ours and _first_option(ours) in known:
            return f"unknown option {argument!r}. Here it is {ours}. --help lists them all."
        # Options that contain the name are better guesses than options that are spelled alike:
        # for --tokens, --max_new_tokens is better than --top_k.
        longer = [other for other in known if name in other]
        suggestion = nearest(option, longer or known)
        return f"unknown option {argument!r}.{suggestion} --help lists them all."


def _first_option(text: str) -> str:
    """The first option that the text names: --muon_lr in "--muon_lr and --adamw_lr"."""
    return re.findall(r"--\w+", text)[0]


def _with_underscores(arg: str) -> str:
    """Spells an option's name with underscores: --max-steps=5 becomes --max_steps=5.

    Other arguments stay as they are, such as a prompt that begins with -- and contains a space.
    """
    name, equals, value = arg.partition("=")
    is_option = re.fullmatch(r"--\w[\w-]*", name)
    if not is_option:
        return arg
    words = name.removeprefix("--")
    return "--" + words.replace("-", "_") + equals + value


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


# ---------------------------------------------------------------- paths, before the slow imports

# A wrong path is said at once: nothing here imports torch, which takes many seconds on a busy
# machine. What passes is checked again where it is used: a file may be there and yet be damaged.


def check_training_paths(options: dict, resume: str | None) -> None:
    """Checks the paths that a training command names: --data, --tokenizer, --save_dir, --resume.

    `options` are the fields of Config that were given, and `resume` is the value of --resume.
    Raises ExperimentError for a path that is not there or, of save_dir, cannot be written to.
    """
    given = dict(options)
    if resume is None:
        given = {**defaults(), **options}
    elif resume != "latest":
        # The checkpoint knows the other paths. It is read after torch is imported.
        check_checkpoint(resume, "--resume")
    if "data" in given:
        check_data(given["data"])
    if "tokenizer" in given:
        check_tokenizer(given["tokenizer"])
    check_writable(save_dir(given, resume), "--save_dir")


def save_dir(options: dict, resume: str | None) -> Path:
    """Where the run will write: beside the checkpoint that it resumes, if nothing else is said."""
    if "save_dir" in options:
        return Path(options["save_dir"])
    if resume not in (None, "latest"):
        return Path(resume).parent
    return Path(defaults()["save_dir"])


def check_data(data: str) -> None:
    """Raises ExperimentError when `data`, the value of --data, is a path of nothing."""
    # Here, because it imports numpy: --help and `plan` answer without it.
    from corpus.sources import check_path

    check_path(data)


def check_checkpoint(path: str, option: str) -> None:
    """Raises an error unless a file is at `path`, the value of `option`."""
    if Path(path).is_dir():
        raise ConfigError(_folder_message(path, option))
    try:
        _check_readable(path)
    except OSError as error:
        raise ExperimentError(
            f"checkpoint {path} cannot be read: {error.strerror}. {_other_checkpoints(path)}"
        ) from error


def _check_readable(path: str) -> None:
    """Raises OSError when there is nothing at `path`, or nothing that may be read."""
    Path(path).stat()
    if not os.access(path, os.R_OK):
        raise PermissionError(13, "Permission denied")


def _folder_message(path: str, option: str) -> str:
    if option == "--resume":
        return (
            f"--resume {path} is a folder. Its newest checkpoint: --save_dir {path} "
            "--resume latest; or name one of its checkpoint files"
        )
    return f"{option} {path} is a folder: name a file of it, such as checkpoint_latest.pt"


def _other_checkpoints(path: str) -> str:
    folder = Path(path).absolute().parent
    names = sorted(other.name for other in folder.glob("checkpoint_*.pt"))
    if not names:
        return f"There is no other checkpoint in {folder}."
    return f"In {folder} there are: {', '.join(map(quoted, names[:5]))}."


def check_tokenizer(name: str) -> None:
    """Raises ExperimentError when `name`, the value of --tokenizer, is a path of nothing.

    `train`, `train:VOCAB` and `hf:NAME` name no path.
    """
    if name.partition(":")[0] in ("train", "hf"):
        return
    path = expanded(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        _check_readable(str(path))
    except OSError as error:
        from corpus.tokenizer import cannot_use_message

        raise ExperimentError(cannot_use_message(name, f"{path}: {error.strerror}")) from error


def check_writable(folder: Path, option: str) -> None:
    """Raises ExperimentError unless files can be made in `folder`, the value of `option`.

    Permissions do not tell it all (read-only mounts, quotas), so that a file is made. Folders that
    are missing are made too, and removed again.
    """
    made: list[Path] = []
    try:
        for missing in _missing_folders(folder):
            missing.mkdir()
            made.append(missing)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise ExperimentError(
            f"the folder {folder} cannot be written to: {error.strerror}. Choose another {option}."
        ) from error
    finally:
        for new in reversed(made):
            with contextlib.suppress(OSError):  # another process has put a file there meanwhile
                new.rmdir()


def _missing_folders(folder: Path) -> list[Path]:
    """The folders on the way to `folder`, itself included, that are not there, outermost first."""
    missing = []
    for part in [folder, *folder.parents]:
        if part.exists():
            break
        missing.append(part)
    return missing[::-1]


def check_model_folder(folder: str) -> None:
    """Raises ExperimentError unless `folder`, the value of --model, holds a config.json."""
    path = Path(folder) / "config.json"
    try:
        _check_readable(str(path))
    except OSError as error:
        raise ExperimentError(
            f"cannot read {path}: {error.strerror}. --model must be the folder of a model that "
            "transformers can open"
        ) from error


def check_empty_or_new(out: str) -> None:
    """Raises ExperimentError unless the folder `out`, the value of --out, is empty or new."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExperimentError(
            f"--out {out} is there already and no empty folder. Nothing is written over: choose "
            "another, or delete it"
        )


# The options that name a path, and what raises ExperimentError when it cannot be the right one
PATH_CHECKS: dict[str, Callable[[str], None]] = {
    "--checkpoint": functools.partial(check_checkpoint, option="--checkpoint"),
    "--data": check_data,
    "--tokenizer": check_tokenizer,
    "--model": check_model_folder,
}


def exit_at_a_wrong_path(argv: list[str], out_is_new: bool = False) -> None:
    """Ends the program when an option names a path that is not there, or cannot be written to.

    A command calls it before its slow imports, and so before it has a parser. With `out_is_new`
    the folder of --out must be empty or new.
    """
    try:
        for option, check in PATH_CHECKS.items():
            value = _value_of(option, argv)
            if value is not None:
                check(value)
        out = _value_of("--out", argv)
        if out is not None:
            if out_is_new:
                check_empty_or_new(out)
            check_writable(Path(out), "--out")
    except ExperimentError as error:
        sys.exit(_failed(str(error), error.exit_code))
    except OSError as error:  # a path that no file system has: it is too long, for example
        sys.exit(_failed(str(error)))


def _value_of(option: str, argv: list[str]) -> str | None:
    """The last value in `--option VALUE` or `--option=VALUE`; None where the option is missing."""
    value = None
    for word, next_word in zip(argv, [*argv[1:], None]):
        if word == option:
            value = next_word
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


# ---------------------------------------------------------------- a folder that holds a run


def check_unused(folder: Path) -> None:
    """Raises an error where a new run cannot have the folder: FolderInUse, or ConfigError.

    It only looks: `locked` takes the lock, and then the folder is looked into again.
    """
    if not folder.is_dir():
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _take_lock(handle, folder, "--save_dir")
    finally:
        os.close(handle)  # which releases the lock
    refuse_used_folder(folder)


def refuse_used_folder(folder: Path) -> None:
    """Raises ConfigError where a run would write over another one."""
    found = run_files(folder)
    if found:
        raise ConfigError(_holds_a_run_message(folder, found))


def _holds_a_run_message(folder: Path, found: list[Path]) -> str:
    names = ", ".join(file.name for file in found[:4])
    if len(found) > 4:
        names += " ..."
    return (
        f"{folder} already holds a run ({names}). Continue it: --resume latest; keep it: another "
        "--save_dir; delete it: --overwrite."
    )


# ---------------------------------------------------------------- the lock on a folder


class FolderInUse(ExperimentError):
    """Another process has the lock. It is no ConfigError: the same command succeeds later."""


@contextlib.contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Keeps other processes from writing to a folder.

    A folder that is missing is made, and removed at the end if it is still empty. When a process
    is killed, the kernel releases its lock. On a file system without locks nothing is locked.

    Raises FolderInUse when another process has the lock, and CheckpointError when the folder cannot
    be written to; both name the `option` that chose the folder.
    """
    is_new = not folder.exists()
    handle = _lock(folder, option)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is no longer empty
                folder.rmdir()
        os.close(handle)


def _lock(folder: Path, option: str) -> int:
    """The file descriptor that holds the lock on the folder, which is made where it is missing."""
    from record import checkpoint  # it imports torch, which `plan` and --help do without

    while True:
        checkpoint.check_free_space(folder, 0, option)  # this also makes the folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            has_locks = _take_lock(handle, folder, option)
        except FolderInUse:
            os.close(handle)
            raise
        if not has_locks or _is_open_folder(handle, folder):
            return handle
        # The process that had the lock removed its folder between our open and our lock.
        os.close(handle)


def _take_lock(handle: int, folder: Path, option: str) -> bool:
    """Locks the open folder `handle`. False on a file system without locks.

    Raises FolderInUse when another process has the lock.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FolderInUse(
            f"another process is at work on {folder}: wait for it, or give another {option}"
        ) from error
    except OSError:
        return False
    return True


def _is_open_folder(handle: int, folder: Path) -> bool:
    """Whether the open file `handle` is still the folder that has this path."""
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- exit codes


def exit_code(command: Callable, argv: list[str], cleans_up: bool = True) -> int:
    """Calls `command(argv)` and returns the exit code of the program.

    An error that the user can fix becomes a line on stderr. Any other exception is a bug: it is
    raised, with its traceback. At a signal, a command that `cleans_up` gets an exception, so that
    it removes its temporary files. Another one ends at once: in the middle of an import, for
    example, the exception could turn into any other.

    Where this process is one of several ranks, an error ends all of them, and does not return.
    """
    console.prepare()
    signals = stop.exit_at_once()
    if cleans_up:
        signals = stop.raised()
    try:
        with signals:
            _run(command, argv)
    except ExperimentError as error:
        return _failed(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        return _failed(missing_package_message(error))
    except BrokenPipeError:
        return _lost_reader()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            _end_all_ranks()
            raise
        cause = str(error).partition("\n")[0] or type(error).__name__
        return _failed(
            f"out of memory ({cause}). Use --device cpu or a smaller model.",
            OutOfMemory.exit_code,
        )
    except OSError as error:
        console.forget_output()
        return _failed(f"{error}. Check the path, its permissions and the free disk space.")
    except stop.Interrupted as interruption:
        return _interrupted(interruption.number)
    except KeyboardInterrupt:
        return _interrupted(signal.SIGINT)
    except Exception:
        _end_all_ranks()
        raise
    return 0


def _run(command: Callable, argv: list[str]) -> None:
    """Calls the command, and writes what it printed: to fail at that is an error of the command."""
    try:
        command(argv)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _failed(message: str, code: int = 1) -> int:
    text = f"error: {message}"
    if lifeline.is_active():
        lifeline.fail(code, fitted(text, sys.stderr))
    say(text, sys.stderr)
    return code


def _end_all_ranks() -> None:
    """At a bug: with several ranks, ends this one and the others, and prints the traceback once."""
    if lifeline.is_active():
        lifeline.fail(1, traceback.format_exc().rstrip())


def _lost_reader() -> int:
    """For a program such as `head` that reads our output, and has closed the pipe: no error."""
    console.forget_output()
    return 1


def _interrupted(number: int) -> int:
    print("\ninterrupted", file=sys.stderr)
    return 128 + number  # what shells report for a program that a signal has ended


@contextlib.contextmanager
def training() -> Iterator[None]:
    """For commands that train: lost output is no error, and a signal needs no cleaning up.

    The loop that trains takes over the signals for its own time.
    """
    with console.output_may_be_lost(), stop.exit_at_once(stop.NOTHING_TRAINED):
        yield
