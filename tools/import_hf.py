"""Makes a checkpoint to continue training from a Hugging Face folder of a Qwen3-MoE model.

    python -m tools.import_hf --model my_model --out runs/continued --precision bf16
    python run_experiment.py --resume runs/continued/checkpoint_step_0.pt --data my_text/

The model's shape comes from the folder. Everything else is an option, as in training. Some of these
options (precision, batch size, sequence length, seed) cannot change later. The run starts at step 0
with an optimizer state of zeros and the folder's tokenizer.
"""

import dataclasses
import json
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # before the imports below: slow, and they fail without their packages
    from cli import exit_at_a_wrong_path
    from config import explain_missing_packages

    explain_missing_packages()
    exit_at_a_wrong_path(sys.argv[1:], out_is_new=True)

import numpy
import torch
from torch import Tensor

from cli import (
    add_config_options,
    check_empty_or_new,
    check_model_folder,
    config_options,
    exit_code,
    new_parser,
)
from config import Config, ConfigError, ExperimentError, preset_values
from corpus.tokenizer import load_tokenizer, sha256, vocabulary
from engine.precision import LossScaler, encode_master
from model import MoETransformer
from muon import build_optimizers
from planner.machine import GB
from planner.sizes import checkpoint_gb
from record import checkpoint
from record.results import write_whole
from tools.qwen3_moe import QwenTensor, from_hugging_face, fused_name, qwen_rows, qwen_tensors
from trainer import lr_schedule

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Tensors that old versions of transformers wrote and nothing reads.
UNUSED = ("rotary_emb.inv_freq",)

# The types of a stored tensor that can be imported: fp32 holds their numbers exactly.
READABLE = (torch.float32, torch.bfloat16, torch.float16)

# ---------------------------------------------------------------- the folder's weights


class Weights:
    """The tensors of a folder's safetensors files by name, each read when it is needed.

    `unread` are the names that have not been read yet. The import ends when none is left.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict = {}  # the open file that holds each tensor
        self.unread: set[str] = set()
        for file_name in weight_files(folder):
            file = open_weights(folder / file_name)
            for name in list(file.keys()):
                self.files[name] = file
                if not name.endswith(UNUSED):
                    self.unread.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in fp32.

        Raises ExperimentError when it is missing, or has another shape or an unreadable type.
        """
        if name not in self.files:
            raise ExperimentError(
                f"{self.folder} has no tensor {name}, which its config.json calls for"
            )
        self.unread.discard(name)
        tensor = self.files[name].get_tensor(name)
        if tensor.shape != shape or tensor.dtype not in READABLE:
            raise ExperimentError(
                f"{name} in {self.folder} is {tensor.dtype} {list(tensor.shape)}; expected is "
                f"float32, bfloat16 or float16 {list(shape)}"
            )
        return tensor.float()


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights: those of the index, or the only one."""
    if (folder / INDEX).exists():
        file_of_tensor = read_json(folder / INDEX).get("weight_map")
        if not isinstance(file_of_tensor, dict) or not file_of_tensor:
            raise ExperimentError(f"{folder / INDEX} has no weight_map: copy or download it again")
        for name in file_of_tensor.values():
            check_bare_name(name, folder / INDEX)
        return sorted(set(file_of_tensor.values()))
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    raise ExperimentError(
        f"{folder} holds neither {WEIGHTS} nor {INDEX}. Save the model with transformers' "
        "save_pretrained"
    )


def check_bare_name(name, index: Path) -> None:
    """Raises ExperimentError unless `name` is that of a file in the folder, and no path.

    The index may come from anywhere, and would else have any file of this machine read.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or not set(name).isdisjoint("/\\\0"):
        raise ExperimentError(
            f"{index}: its weight_map names {name!r}, which is no file name. It must name files of "
            "its own folder: copy or download it again"
        )


def open_weights(path: Path):
    try:
        import safetensors
    except ModuleNotFoundError:
        raise ExperimentError(
            "reading a Hugging Face folder needs the package safetensors: pip install safetensors"
        ) from None
    if path.exists() and not path.is_file():
        raise ExperimentError(f"{path} is no file: copy or download it again")
    try:
        return safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ExperimentError(
            f"{path} is missing, cut short or damaged ({error}): copy or download it again"
        ) from error


def read_masters(
    parameter: str, parts: list[QwenTensor], shape: torch.Size, weights: Weights, head_dim: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Reads a parameter: yields (index of a part of it, that part in fp32).

    A part is a matrix or an expert. `parts` are the tensors of Qwen3-MoE that hold the parameter,
    and `shape` is the parameter's shape.
    """
    fused = fused_name(parameter)
    if fused in weights:
        # gate_up is [E, 2, F, D] here and [E, 2 F, D] in the folder; down is [E, D, F] in both.
        num_experts = shape[0]
        columns = shape[-1]
        rows = shape.numel() // (num_experts * columns)
        experts = weights.read(fused, (num_experts, rows, columns))
        for expert, master in enumerate(experts):
            yield (expert,), master.view(shape[1:])
        return
    for part in parts:
        master = weights.read(part.name, part.shape)
        if part.rotary:
            reordered = torch.empty_like(master)
            reordered[qwen_rows(len(master), head_dim)] = master
            master = reordered
        yield part.index, master


# ---------------------------------------------------------------- the checkpoint


def import_state(folder: Path, config: Config, tokenizer_json: str) -> dict:
    """The state of a checkpoint at step 0, with the folder's weights.

    Raises ExperimentError when the folder's weights do not fit the Config.
    """
    # The meta device takes no memory. This model and its optimizers only say which tensors a
    # checkpoint has, of which shapes and types.
    with torch.device("meta"):
        model = MoETransformer(dataclasses.replace(config, activation_checkpointing="none"))
    parameters = dict(model.named_parameters())
    optimizer_states = {}
    for group, optimizer in build_optimizers(config, parameters).items():
        saved = optimizer.state_dict()
        states = {}
        for name, tensors in saved["state"].items():
            states[name] = {key: zeros(tensor) for key, tensor in tensors.items()}
        optimizer_states[group] = dict(saved, state=states)
    weights = {name: zeros(parameter) for name, parameter in parameters.items()}
    biases = {name: zeros(bias) for name, bias in model.balancing_biases().items()}
    fill(weights, checkpoint.optimizer_tensors(dict(optimizer=optimizer_states)), folder, config)

    scaler = LossScaler(
        config.loss_scale, config.loss_scale_growth_interval, enabled=config.precision == "fp16"
    )
    return dict(
        config=dataclasses.asdict(config),
        run_id=uuid.uuid4().hex,
        step=0,
        data_position=0,
        tokens_seen=0,
        skipped_steps=0,
        saved_steps=[],
        train_seconds=0.0,
        mean_norm=None,
        model=weights | biases,
        optimizer=optimizer_states,
        schedule=dict(step=0, max_steps=config.max_steps, factor=lr_schedule(0, config)),
        loss_scaler=scaler.state_dict(),
        random=checkpoint.random_states(torch.device("cpu")),
        data=dict(data_hash=None, tokenizer_hash=sha256(tokenizer_json)),
        tokenizer_json=tokenizer_json,
        metrics={},
        interval={},
    )


def zeros(like: Tensor) -> Tensor:
    """Zeros on the CPU, with the shape and dtype of `like`.

    They take no memory until they are written to, because numpy allocates zeros with calloc.
    torch.zeros would write them. numpy has no bfloat16, so it makes the bytes.
    """
    n_bytes = like.numel() * like.element_size()
    data = torch.from_numpy(numpy.zeros(n_bytes, numpy.uint8))
    return data.view(like.dtype).view(like.shape)


def fill(
    parameters: dict[str, Tensor],
    optimizer_state: dict[str, dict[str, Tensor]],
    folder: Path,
    config: Config,
) -> None:
    """Reads the folder's weights into the parameters and the optimizer state.

    An fp32 master is kept in two tensors: the parameter in 16 bits, and the low bits in the
    optimizer state under the key "residual". A parameter in fp32 has no low bits.
    """
    weights = Weights(folder)
    parts = defaultdict(list)
    for tensor in qwen_tensors(config):
        parts[tensor.parameter].append(tensor)
    for name, parameter in parameters.items():
        low_bits = optimizer_state[name].get("residual")
        masters = read_masters(name, parts[name], parameter.shape, weights, config.head_dim)
        for index, master in masters:
            if low_bits is None:
                parameter[index] = master
            else:
                parameter[index], low_bits[index] = encode_master(master, parameter.dtype)
            if not parameter[index].isfinite().all():
                raise ExperimentError(not_finite_message(name, folder, config.precision))
    if config.tie_embeddings:
        # Some folders also hold the head, which is then a copy of the embedding.
        weights.unread.discard("lm_head.weight")
    if weights.unread:
        raise ExperimentError(unread_message(folder, sorted(weights.unread)))


def not_finite_message(parameter: str, folder: Path, precision: str) -> str:
    return (
        f"{parameter} of {folder} would hold inf or nan in {precision}. fp16 ends at 65,504: "
        "choose --precision bf16 or fp32; if the folder itself has such numbers, another folder"
    )


def unread_message(folder: Path, names: list[str]) -> str:
    some = ", ".join(names[:4])
    if len(names) > 4:
        some += " ..."
    return f"{folder} holds tensors that this program's model has no place for: {some}"


# ---------------------------------------------------------------- the other files


def read_json(path: Path) -> dict:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")  # whoever reads from a pipe waits without end
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExperimentError(
            f"{path} cannot be read ({error}): copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise ExperimentError(f"{path} is no JSON object: copy or download it again")
    return value


def read_tokenizer(path: Path, config: Config) -> str:
    """The text of a tokenizer.json.

    Raises ExperimentError when it cannot be read, or has more tokens than the model's vocabulary.
    """
    try:
        text = path.read_bytes().decode()
        tokenizer, _ = load_tokenizer(text, config.end_of_text)
    except (OSError, UnicodeDecodeError, ExperimentError) as error:
        raise ExperimentError(
            f"cannot use the tokenizer {path}: {error}. Name the model's tokenizer.json with "
            "--tokenizer"
        ) from error
    size = vocabulary(tokenizer)
    if size > config.vocab_size:
        raise ExperimentError(
            f"the tokenizer {path} has {size} tokens and the model's vocabulary only "
            f"{config.vocab_size}: it is another model's. Name the right one with --tokenizer"
        )
    return text


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
    parser = new_parser(
        "python -m tools.import_hf --model FOLDER --out FOLDER [--preset NAME] [--tokenizer PATH] "
        "[--FIELD VALUE ...]",
        __doc__,
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder of a Qwen3-MoE model")
    parser.add_argument(
        "--out", required=True, help="the folder of the new run; it must be empty or new"
    )
    parser.add_argument("--preset", help="a preset of config.py, for what is not the model's shape")
    add_config_options(parser)
    args = parser.parse(argv)
    options = config_options(args)
    folder = Path(args.model)
    out = Path(args.out).resolve()
    if "save_dir" in options:
        raise ConfigError("--save_dir: the run's folder is --out")
    check_model_folder(args.model)
    check_empty_or_new(str(out))
    config = imported_config(folder, out, args.preset, options)
    tokenizer_path = Path(options.get("tokenizer", folder / "tokenizer.json"))
    tokenizer_json = read_tokenizer(tokenizer_path, config)
    checkpoint.check_free_space(out, int(checkpoint_gb(config) * GB))
    state = import_state(folder, config, tokenizer_json)
    path = write_run(out, state)
    print(done_message(folder, path, config))


def imported_config(folder: Path, out: Path, preset: str | None, options: dict) -> Config:
    """The Config of the new run: the preset, changed by the folder's shape, then by the options.

    The tokenizer is that of the new run's folder, where a copy of it will be.
    """
    shape = from_hugging_face(read_json(folder / "config.json"))
    refuse_other_shape(options, shape)
    fields = {}
    if preset:
        fields.update(preset_values(preset))
    fields.update(shape)
    fields.update(options)
    fields["save_dir"] = str(out)
    fields["tokenizer"] = str(out / "tokenizer.json")
    return Config(**fields)


def refuse_other_shape(options: dict, shape: dict) -> None:
    """Raises ConfigError for options that contradict the folder's shape.

    Two fields may differ. The run may train on shorter sequences (max_seq_len), and init_std has
    no effect on weights that are not drawn anew.
    """
    fixed = shape.keys() - {"max_seq_len", "init_std"}
    problems = []
    for name in sorted(fixed & options.keys()):
        if options[name] != shape[name]:
            problems.append(f"  {name}: the model has {shape[name]}, not {options[name]}")
    if problems:
        lines = ["the shape is the model's:", *problems, "Leave these options out."]
        raise ConfigError("\n".join(lines))


def write_run(out: Path, state: dict) -> Path:
    """Writes tokenizer and checkpoint into the new run's folder. Returns the checkpoint's path."""
    tokenizer_path = out / "tokenizer.json"
    write_whole(tokenizer_path, state["tokenizer_json"])
    path = checkpoint.step_path(out, 0)
    try:
        checkpoint.save(path, state)
    except BaseException:
        tokenizer_path.unlink()  # so that the folder is empty again
        raise
    return path


def done_message(folder: Path, path: Path, config: Config) -> str:
    return (
        f"{config.total_params:,} parameters of {folder}, to be trained in {config.precision}, "
        f"with {config.sequences_per_step} sequences of {config.max_seq_len} tokens a step and "
        f"seed {config.seed}. Training cannot change these: to change them, import again with "
        "--precision, --batch_size, --gradient_accumulation_steps, --max_seq_len, --seed.\n"
        f"Continue with: python run_experiment.py --resume {path} --data YOUR_TEXT"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
