"""Makes a checkpoint to go on training from a Hugging Face folder of a Qwen3-MoE model.

    python -m tools.import_hf --model my_model --out runs/continued --precision bf16
    python run_experiment.py --resume runs/continued/checkpoint_step_0.pt --data my_text/

The shape comes from the folder; everything else is an option, as in training, and some (precision, batch size, sequence
length, seed) cannot change later. The run starts at step 0 with optimizer state at zero and the folder's tokenizer.
"""

import dataclasses
import json
import sys
import uuid
from pathlib import Path

import numpy
import torch
from torch import Tensor

import data
from cli import add_config_options, config_options, exit_code, new_parser
from config import Config, ConfigError, ExperimentError, preset_values
from corpus.tokenizer import load_tokenizer, sha256, vocabulary
from engine.precision import LossScaler, encode_master
from model import MoETransformer
from muon import build_optimizers
from planner.machine import GB
from planner.sizes import checkpoint_gb
from record import checkpoint
from tools.qwen3_moe import from_hugging_face, fused_name, places, their_rows
from trainer import lr_schedule

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UNUSED = (
    "rotary_emb.inv_freq",
)  # tensors that old versions of transformers wrote and nothing reads


class Weights:
    """The tensors of a folder's safetensors files by name, each read when it is asked for."""

    def __init__(self, folder: Path):
        try:
            import safetensors
        except ModuleNotFoundError:
            raise ExperimentError(
                "reading a Hugging Face folder needs the package safetensors: pip install safetensors"
            ) from None
        self.error, self.folder = safetensors.SafetensorError, folder
        if (folder / INDEX).exists():
            names = sorted(
                set(map(str, dict(read_json(folder / INDEX).get("weight_map") or {}).values()))
            )
        elif (folder / WEIGHTS).exists():
            names = [WEIGHTS]
        else:
            raise ExperimentError(
                f"{folder} holds neither {WEIGHTS} nor {INDEX}. Save the model with transformers' save_pretrained"
            )
        self.where = {}
        for name in names:
            try:
                file = safetensors.safe_open(folder / name, "pt")
            except (OSError, self.error) as error:
                raise ExperimentError(
                    f"{folder / name} is missing, cut short or damaged ({error}): copy or download it again"
                ) from error
            self.where |= dict.fromkeys(file.keys(), file)
        self.unread = {name for name in self.where if not name.endswith(UNUSED)}

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor in fp32. Raises ExperimentError when it is missing, or of another shape or kind."""
        if name not in self.where:
            raise ExperimentError(
                f"{self.folder} has no tensor {name}, which its config.json asks for"
            )
        self.unread.discard(name)
        tensor = self.where[name].get_tensor(name)
        if tensor.shape != shape or tensor.dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            raise ExperimentError(
                f"{name} in {self.folder} is {tensor.dtype} {list(tensor.shape)}; expected is float32, bfloat16 or "
                f"float16 {list(shape)}"
            )
        return tensor.float()


def import_state(folder: Path, config: Config, tokenizer_json: str) -> dict:
    """What the trainer would have saved at step 0 of a run that starts from the folder's weights. Raises ExperimentError."""
    weights = Weights(folder)
    with torch.device("meta"):
        model = MoETransformer(dataclasses.replace(config, activation_checkpointing="none"))
    # the optimizers' own state, without storage: its names and types are theirs to decide
    optimizers = {
        name: optimizer.state_dict()
        for name, optimizer in build_optimizers(config, dict(model.named_parameters())).items()
    }
    optimizer = {
        name: {key: zeros(t) for key, t in tensors.items()}
        for group in optimizers.values()
        for name, tensors in group["state"].items()
    }
    parameters = {name: zeros(p) for name, p in model.named_parameters()}
    for name, p in parameters.items():
        fill(name, p, optimizer[name].get("residual"), weights, config)
    parameters |= {name: zeros(bias) for name, bias in model.balancing_biases().items()}
    if config.tie_embeddings:
        weights.unread.discard("lm_head.weight")  # the embedding again
    if weights.unread:
        raise ExperimentError(
            f"{folder} holds tensors that this program's model has no place for: "
            f"{', '.join(sorted(weights.unread)[:4])}{' ...' if len(weights.unread) > 4 else ''}"
        )
    for group in optimizers.values():
        group["state"] = {name: optimizer[name] for name in group["state"]}
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
        model=parameters,
        optimizer=optimizers,
        schedule=dict(step=0, max_steps=config.max_steps, factor=lr_schedule(0, config)),
        loss_scaler=scaler.state_dict(),
        random=checkpoint.random_states(torch.device("cpu")),
        data=dict(data_hash=None, tokenizer_hash=sha256(tokenizer_json)),
        tokenizer_json=tokenizer_json,
        metrics={},
        interval={},
    )


def fill(
    name: str, weight: Tensor, residual: Tensor | None, weights: Weights, config: Config
) -> None:
    """Reads a parameter and, where it has one, its residual from the tensors that hold them there, a matrix at a time."""

    def put(index, master: Tensor) -> None:
        if residual is None:
            weight[index] = master
        else:
            weight[index], residual[index] = encode_master(master, weight.dtype)
        if not weight[index].isfinite().all():
            raise ExperimentError(
                f"{name} of {weights.folder} would hold inf or nan in {config.precision}. fp16 ends at 65,504: "
                "choose --precision bf16 or fp32; if the folder's own numbers are not finite, another folder"
            )

    fused = fused_name(name)
    if fused in weights:
        shape = (
            weight.shape
            if weight.ndim == 3
            else torch.Size([weight.shape[0], 2 * config.d_ff, config.d_model])
        )
        for expert, master in enumerate(weights.read(fused, shape)):
            put(expert, master.view_as(weight[expert]))
        return
    for place in places(name, weight.shape):
        master = weights.read(place.name, weight[place.index].shape)
        if place.rotary:
            ours = torch.empty_like(master)
            ours[their_rows(len(master), config.head_dim)] = master
            master = ours
        put(place.index, master)


def zeros(like: Tensor) -> Tensor:
    """Zeros of a tensor's shape and dtype on the CPU, which take memory only once they are written to (calloc)."""
    n_bytes = like.numel() * like.element_size()
    return torch.from_numpy(numpy.zeros(n_bytes, numpy.uint8)).view(like.dtype).view(like.shape)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ExperimentError(
            f"there is no {path}: --model must be the folder of a model that transformers can open"
        ) from None
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"{path} cannot be read ({error}): copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise ExperimentError(f"{path} is no JSON object: copy or download it again")
    return value


def read_tokenizer(path: Path, config: Config) -> str:
    """The text of a tokenizer.json that fits the model. Raises ExperimentError."""
    try:
        text = path.read_bytes().decode()
        tokenizer, _ = load_tokenizer(text)
    except (OSError, UnicodeDecodeError, ExperimentError) as error:
        raise ExperimentError(
            f"cannot use the tokenizer {path}: {error}. Name the model's tokenizer.json with --tokenizer"
        ) from error
    if (size := vocabulary(tokenizer)) > config.vocab_size:
        raise ExperimentError(
            f"the tokenizer {path} has {size} tokens and the model's vocabulary only {config.vocab_size}: it is "
            "another model's. Name the right one with --tokenizer"
        )
    return text


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
    parser = new_parser(
        "python -m tools.import_hf --model FOLDER --out FOLDER [--preset NAME] [--tokenizer PATH] [--FIELD VALUE ...]",
        __doc__,
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder of a Qwen3-MoE model")
    parser.add_argument(
        "--out", required=True, help="the folder of the new run; it must be empty or new"
    )
    parser.add_argument("--preset", help="a preset of config.py, for what is not the model's shape")
    add_config_options(parser)
    args = parser.parse(argv)
    options, folder, out = config_options(args), Path(args.model), Path(args.out).resolve()
    if "save_dir" in options:
        raise ConfigError("--save_dir: the run's folder is --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExperimentError(
            f"--out {args.out} is there already and no empty folder. Nothing is written over: choose another, or "
            "delete it"
        )
    shape = from_hugging_face(read_json(folder / "config.json"))
    given = [
        f"{name}: the model has {shape[name]}, not {options[name]}"
        for name in shape.keys() & options.keys() - {"max_seq_len", "init_std"}
        if options[name] != shape[name]
    ]
    if given:
        raise ConfigError(
            "the shape is the model's:\n  "
            + "\n  ".join(sorted(given))
            + "\nLeave these options out."
        )
    values = (preset_values(args.preset) if args.preset else {}) | shape | options
    config = Config(**{**values, "save_dir": str(out), "tokenizer": str(out / "tokenizer.json")})
    tokenizer_json = read_tokenizer(
        Path(options.get("tokenizer", folder / "tokenizer.json")), config
    )
    checkpoint.check_free_space(out, int(checkpoint_gb(config) * GB))
    state = import_state(folder, config, tokenizer_json)
    path = checkpoint.step_path(out, 0)
    (out / "tokenizer.json").write_bytes(tokenizer_json.encode())
    try:
        checkpoint.save(path, state)
    except BaseException:
        (out / "tokenizer.json").unlink()  # so that the folder is empty again
        raise
    print(
        f"{config.total_params:,} parameters of {folder}, to be trained in {config.precision}, with {config.sequences_per_step} sequences of "
        f"{config.max_seq_len} tokens a step and seed {config.seed}, which stay so: for others import again with --precision, --batch_size, "
        f"--gradient_accumulation_steps, --max_seq_len, --seed.\nGo on: python run_experiment.py --resume {path} --data YOUR_TEXT"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
