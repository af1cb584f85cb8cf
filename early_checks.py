"""Looks at the paths of a command line before the slow imports: a wrong one is said at once.

It imports no torch, which takes many seconds on a busy machine. What it lets pass is checked again
where it is used: a file may be there and yet be damaged.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from config import ConfigError, ExperimentError, defaults
from layout import say


def check_training_paths(options: dict, resume: str | None) -> None:
    """Checks the paths that a training command names: --data, --tokenizer, --save_dir, --resume.

    `options` are the fields of Config that were given, and `resume` is the value of --resume.
    Raises ExperimentError for a path that is not there or, of save_dir, cannot be written to.
    """
    resumes_file = resume not in (None, "latest")
    if resumes_file:
        check_checkpoint(resume, "--resume")
    if resumes_file or resume == "latest":
        # The checkpoint knows the other paths. It is read after torch is imported.
        given = dict(options)
    else:
        given = {**defaults(), **options}
    if "data" in given:
        check_data(given["data"])
    if "tokenizer" in given:
        check_tokenizer(given["tokenizer"])
    check_writable(_save_dir(given, resume), "--save_dir")


def _save_dir(given: dict, resume: str | None) -> Path:
    """Where the run will write: beside the checkpoint that it resumes, if nothing else is said."""
    if "save_dir" in given:
        return Path(given["save_dir"])
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
    return f"In {folder} there are: {', '.join(names[:5])}."


def check_tokenizer(name: str) -> None:
    """Raises ExperimentError when `name`, the value of --tokenizer, is a path of nothing.

    `train`, `train:VOCAB` and `hf:NAME` name no path.
    """
    if name.partition(":")[0] in ("train", "hf"):
        return
    path = Path(name).expanduser()
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


def exit_at_a_wrong_path(argv: list[str]) -> None:
    """For a command of tools: ends the program when --checkpoint or --data names nothing.

    It is called before the command's imports, and so before there is a parser.
    """
    try:
        checkpoint = _value_of("--checkpoint", argv)
        if checkpoint is not None:
            check_checkpoint(checkpoint, "--checkpoint")
        data = _value_of("--data", argv)
        if data is not None:
            check_data(data)
    except ExperimentError as error:
        say(f"error: {error}", sys.stderr)
        sys.exit(error.exit_code)


def _value_of(option: str, argv: list[str]) -> str | None:
    """The value in `--option VALUE` or `--option=VALUE`; None where the option is missing."""
    for word, next_word in zip(argv, [*argv[1:], None]):
        if word == option:
            return next_word
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
