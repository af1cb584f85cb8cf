"""Tokens a second of sampling, compared with transformers' `generate`.

    python -m benchmarks.sample_speed                   `small`
    python -m benchmarks.sample_speed --preset tiny     another preset

It runs on the GPU in bf16, or without one on the CPU in fp32. Both have the same weights, draw in
the same way, and run in one process. Writes benchmarks/results/sampling_GPU.json. transformers must
be installed.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which fail without their packages
    from config import explain_missing_packages

    explain_missing_packages()

import torch

from benchmarks.result_files import ROOT, write
from cli import exit_code, new_parser
from config import Config, preset_values
from corpus.tokenizer import train_tokenizer
from generate import generate
from model import MoETransformer
from record.results import environment
from tools.export_hf import export

PROMPT_TOKENS = 32
NEW_TOKENS = 128
TEXTS_AT_A_TIME = (1, 8)
REPETITIONS = 5
# Options of both `generate` functions
SAMPLING = dict(temperature=0.8, top_k=50)


# ---------------------------------------------------------------- the two models


def models(config: Config, device: torch.device):
    """Our model and transformers', with the same random weights."""
    fp32 = MoETransformer(dataclasses.replace(config, precision="fp32"))
    ours = MoETransformer(config)
    # This rounds them where our parameters have 16 bits, as the export does for theirs.
    ours.load_state_dict(fp32.state_dict())
    theirs = exported(fp32, config)
    return ours.to(device).eval(), theirs.to(device).eval()


def exported(model: MoETransformer, config: Config):
    """The model as transformers loads it from our export.

    The state of the optimizers, which would hold the low bits of 16-bit weights, is empty: the
    weights are fp32.
    """
    from transformers import AutoModelForCausalLM

    state = dict(
        config=dataclasses.asdict(config),
        model={name: p.detach() for name, p in model.named_parameters()},
        step=0,
        tokens_seen=0,
        optimizer=dict(muon=dict(state={}), adamw=dict(state={})),
        # Any tokenizer does: the prompt is made of token ids.
        tokenizer_json=train_tokenizer([(ROOT / "README.md").read_text()], 1000),
        train_seconds=0.0,
        data=dict(data_hash=None),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        export(state, {}, path, config.precision, shard_bytes=5 * 10**9)
        return AutoModelForCausalLM.from_pretrained(path)


# ---------------------------------------------------------------- their speeds


def measure(config: Config, device: torch.device) -> dict:
    """Median tokens/s of each model, by how many texts it writes at once."""
    ours, theirs = models(config, device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(config.vocab_size, (PROMPT_TOKENS,), generator=generator).tolist()
    writers = dict(
        ours=lambda texts: write_ours(ours, prompt, texts),
        transformers=lambda texts: write_theirs(theirs, prompt, texts),
    )
    found = {}
    for texts in TEXTS_AT_A_TIME:
        speeds = speeds_in_turn(writers, texts, device)
        medians = {}
        for name, values in speeds.items():
            medians[name] = statistics.median(values)
        found[f"{texts} at a time"] = dict(**medians, all=speeds)
        shown = []
        for name, speed in medians.items():
            shown.append(f"{name} {speed:,.1f} tokens/s")
        print(f"{texts} at a time: {', '.join(shown)}", flush=True)
    return found


def write_ours(model: MoETransformer, prompt: list[int], texts: int) -> int:
    """Samples `texts` continuations of the prompt. Returns the number of new tokens of all."""
    written = generate(model, prompt, NEW_TOKENS, n=texts, **SAMPLING)
    return sum(len(tokens) for tokens in written)


@torch.no_grad()
def write_theirs(model, prompt: list[int], texts: int) -> int:
    """Samples `texts` continuations of the prompt with the model of transformers.

    Returns the number of new tokens of all.
    """
    tokens = torch.tensor([prompt] * texts, device=model.device)
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=True,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,  # an end-of-text token must not stop a text early
        **SAMPLING,
    )
    return written[:, PROMPT_TOKENS:].numel()


def speeds_in_turn(
    writers: dict[str, Callable[[int], int]], texts: int, device: torch.device
) -> dict[str, list[float]]:
    """tokens/s of each writer and repetition.

    The writers take turns, so that a disturbance of the machine meets both. The first turn warms up
    and is left out.
    """
    speeds = {name: [] for name in writers}
    for _ in range(1 + REPETITIONS):
        for name, writer in writers.items():
            speed = tokens_per_second(writer, texts, device)
            speeds[name].append(speed)
    return {name: values[1:] for name, values in speeds.items()}


def tokens_per_second(writer: Callable[[int], int], texts: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    # Both look at each token on the host before they draw the next one, so that nothing is left to
    # wait for at the end.
    written = writer(texts)
    elapsed = time.perf_counter() - start
    assert written == texts * NEW_TOKENS
    return written / elapsed


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> None:
    usage = "python -m benchmarks.sample_speed [--preset NAME] [--device cpu|cuda]"
    found_device = "cpu"
    if torch.cuda.is_available():
        found_device = "cuda"
    parser = new_parser(usage, __doc__)
    parser.add_argument("--preset", default="small", help="a preset of config.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=found_device)
    args = parser.parse(argv)

    precision = "fp32"
    if args.device == "cuda":
        precision = "bf16"
    values = dict(preset_values(args.preset))
    values["precision"] = precision
    # The default, "auto", is for the planner to resolve. Nothing is trained here.
    values["activation_checkpointing"] = "none"
    config = Config(**values)
    import transformers  # only now: it takes seconds, and --help does not need it

    device = torch.device(args.device)
    speeds = measure(config, device)
    write(
        "sampling",
        speeds["1 at a time"]["ours"],
        "tokens/s (one text at a time)",
        REPETITIONS,
        environment(device),
        dict(
            preset=args.preset,
            precision=precision,
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            transformers=transformers.__version__,
            **speeds,
        ),
        command=f"python -m benchmarks.sample_speed --preset {args.preset} --device {args.device}",
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
