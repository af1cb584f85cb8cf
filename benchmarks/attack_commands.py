"""The command lines of the attack: right ones, and what is drawn from them.

Everything is drawn from a random.Random that the caller has seeded, and from nothing else. Paths
are relative to the folder of a case, which holds a copy of the base (see attack_cases.build_base).
"""

import shlex
import typing
from collections.abc import Callable
from random import Random

from benchmarks.result_files import option_words
from config import defaults, field_types

# The length of the stopped run, and the step after which it was stopped.
STEPS = 8
STOPPED_AT = 5

SHAPE = dict(
    preset="tiny",
    d_model=32,
    n_layers=2,
    n_heads=2,
    d_ff=32,
    num_experts=4,
    moe_every=1,
    max_seq_len=16,
    vocab_size=300,
    batch_size=2,
    gradient_accumulation_steps=2,
    eval_steps=2,
    log_every=1,
    save_every=2,
    sample_tokens=8,
    device="cpu",
    validation_fraction=0.1,
    cache_dir="cache",
)


def shown(argv: list[str]) -> str:
    """A command line for people: `argv` is a module of the program and its arguments.

    SHAPE stands for the options of that name, which most command lines have.
    """
    printable = [word.encode(errors="backslashreplace").decode() for word in argv]
    return "python -m " + shlex.join(printable).replace(shlex.join(option_words(**SHAPE)), "SHAPE")


def train_words(save_dir: str, max_steps: int, **changes) -> list[str]:
    """A command line that trains the small model on `text/`."""
    options = dict(data="text", max_steps=max_steps, eval_every=4, save_dir=save_dir) | changes
    return ["run_experiment", *option_words(**SHAPE), *option_words(**options)]


# ---------------------------------------------------------------- right command lines

# The options of each command. train, plan and import_ have the fields of Config too.
OWN_OPTIONS = dict(
    train=["preset", "resume", "overwrite"],
    plan=["preset", "gpu", "gpu_memory_gb", "json"],
    sample=[
        *("checkpoint", "prompt", "n", "temperature", "top_k", "top_p", "max_new_tokens", "seed"),
        *("device", "precision"),
    ],
    evaluate=["checkpoint", "data", "text_field", "limit", "json", "device", "precision"],
    export=["checkpoint", "out", "dtype", "shard_gb"],
    import_=["model", "out", "preset"],
    plot=["out"],
)
# How many of 20 command lines each command gets.
SHARES = dict(train=10, plan=3, sample=2, evaluate=1, export=1, import_=1, plot=2)


def _right_words(command: str, draw: Random) -> list[str]:
    """A command line that the program carries out, in the folder of a case."""
    checkpoint = ["--checkpoint", "run/checkpoint_latest.pt"]
    if command == "train":
        return _right_training(draw)
    if command == "plan":
        return ["run_experiment", "plan", "--preset", "tiny"]
    if command == "sample":
        prompt = ["--prompt", "the model", "--max_new_tokens", "4"]
        return ["run_experiment", "sample", *checkpoint, *prompt]
    if command == "evaluate":
        return ["tools.evaluate", *checkpoint, "--limit", "400"]
    if command == "export":
        return ["tools.export_hf", *checkpoint, "--out", "new"]
    if command == "import_":
        return ["tools.import_hf", "--model", "exported", "--out", "new"]
    return ["plot", "run"]


def _right_training(draw: Random) -> list[str]:
    kind = draw.choice(["new", "new", "latest", "file", "overwrite"])
    if kind == "new":
        return train_words("new", 2)
    if kind == "overwrite":
        return [*train_words("run", 2), "--overwrite"]
    if kind == "latest":
        return [*train_words("run", STEPS), "--resume", "latest"]
    return [*train_words("run", STEPS), "--resume", "run/checkpoint_step_2.pt"]


# ---------------------------------------------------------------- odd values

# In the tuples below several values share a line; that they share it has no meaning.

# Small numbers, edges of what fields allow, and what no computer holds.
INTEGERS = (
    *("0", "1", "2", "3", "4", "5", "7", "8", "16", "33", "-1", "1000000000"),
    *("2147483648", "9223372036854775807", "9223372036854775808", "1" + "0" * 30),
)
NUMBERS = (
    *("0", "1", "2", "0.5", "0.1", "0.999", "1e-9", "1e-300", "-0.0", "-1", "100", "1e9", "1e30"),
    *("1e308", "1e999", "nan", "inf", "-inf"),
)
# Texts, paths that lead nowhere, and paths to what the option does not expect.
TEXTS = (
    *("", " ", "-", "--", "a b", "é", "漢字", "a\nb", "\x1b[2J", "%s %d {}", "$HOME", "'", '"'),
    *("\\", "\udcff\udcfe", "a" * 300, "a" * 5000, "a/" * 100, "None", "auto", "true", "false"),
    *("0", "-1", "1_0", "0x10", "٣", "1,5", "3k", "nan", ".", "text", "text/0.txt", "text/*", "["),
    *("text/0.txt/deeper", "missing", "missing/deeper", "**", "*.nothing", "~", "~nobody/x"),
    *("/dev/null", "/dev/full", "/dev/null/x", "/proc/x", "hf:", "hf:a:b:c:d", "hf:nobody/it"),
    *("train:", "train:0", "train:1", "train:300", "train:-5", "train:" + "9" * 30),
    *("run", "run/run.json", "run/checkpoint_latest.pt", "run/checkpoint_step_2.pt", "latest"),
    *("tokenizer.json", "formats", "formats/data.parquet", "formats/data.bin", "exported"),
    *("exported/config.json", "tiny", "18b"),
)
# The only values of these options. With others a right command line may work for minutes: it
# compiles, or writes a long text.
QUICK = dict(
    compile=("auto", "false"),
    max_new_tokens=("0", "1", "5", "33", "-1", "9223372036854775808"),
)
WRONG_FORM = 0.1  # share of the values that have the form of another option's
OWN_INTEGERS = ("n", "top_k", "max_new_tokens", "seed", "limit")
OWN_NUMBERS = ("temperature", "top_p", "shard_gb", "gpu_memory_gb")
SWITCHES = ("overwrite", "json")


def _add_option(words: list[str], command: str, draw: Random) -> None:
    """Adds an option with an odd value. It comes last, and so it wins."""
    names = list(OWN_OPTIONS[command])
    if command in ("train", "plan", "import_"):
        names += defaults()
    name = draw.choice(names)
    words.append(f"--{name}")
    if name not in SWITCHES:
        words.append(_odd_value(name, draw))


def _odd_value(name: str, draw: Random) -> str:
    """An odd value for an option, mostly of the form that the option takes.

    A value of another form is refused while options are read: it tests nothing that follows.
    """
    kind = field_types().get(name, str)
    if draw.random() < WRONG_FORM:
        return draw.choice(INTEGERS + NUMBERS + TEXTS)
    if name in QUICK:
        return draw.choice(QUICK[name])
    if typing.get_origin(kind) is typing.Literal:
        return draw.choice(typing.get_args(kind))
    if kind is int or name in OWN_INTEGERS:
        return draw.choice(INTEGERS)
    if kind is float or name in OWN_NUMBERS:
        return draw.choice(NUMBERS)
    if kind is bool:
        return draw.choice(["true", "false"])
    return draw.choice(TEXTS)


# ---------------------------------------------------------------- odd words

MISSPELLED = 0.25  # share of the command lines that have a word too much, too few or misspelled


def command_line(draw: Random) -> list[str]:
    """A module of the program and its arguments: a right command line with some changes."""
    command = draw.choices(list(SHARES), list(SHARES.values()))[0]
    words = _right_words(command, draw)
    for _ in range(draw.randint(1, 3)):
        _add_option(words, command, draw)
    if draw.random() < MISSPELLED:
        change = draw.choice(CHANGES)
        change(words, draw)
    return words


# Each change leaves word 0, the module, as it is.


def _drop_word(words: list[str], draw: Random) -> None:
    del words[draw.randrange(1, len(words))]


def _repeat_word(words: list[str], draw: Random) -> None:
    number = draw.randrange(1, len(words))
    words.insert(number, words[number])


def _stray_word(words: list[str], draw: Random) -> None:
    words.insert(draw.randint(1, len(words)), draw.choice(TEXTS + NUMBERS))


def _misspell(words: list[str], draw: Random) -> None:
    """Puts another character, or none, in the place of one character of a word, or at its end."""
    number = draw.randrange(1, len(words))
    word = words[number]
    place = draw.randint(0, len(word))
    other = draw.choice(["", "-", "_", "=", "x", "é"])
    words[number] = word[:place] + other + word[place + 1 :]


def _join_value(words: list[str], draw: Random) -> None:
    """--NAME VALUE becomes --NAME=VALUE, spelled with hyphens."""
    options = [number for number, word in enumerate(words[:-1]) if word.startswith("--")]
    if not options:
        return
    number = draw.choice(options)
    name = words[number].replace("_", "-")
    words[number : number + 2] = [f"{name}={words[number + 1]}"]


CHANGES: list[Callable] = [_drop_word, _repeat_word, _stray_word, _misspell, _join_value]
