"""Tokens a second of sampling beside transformers' `generate`: the same weights, draws of the same kind, in one process.

    python -m benchmarks.sample_speed                   `small` on the GPU in bf16, or on the CPU in fp32
    python -m benchmarks.sample_speed --preset tiny     another preset

Writes benchmarks/results/sampling_GPU.json as benchmarks/run.py does; transformers must be installed.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.result_files import ROOT, write
from cli import exit_code, new_parser
from config import Config, preset_values
from corpus.tokenizer import train_tokenizer
from generate import generate
from model import MoETransformer
from record.results import environment
from tools.export_hf import export

PROMPT, NEW, TEXTS, REPETITIONS = 32, 128, (1, 8), 5
DRAWS = dict(temperature=0.8, top_k=50)


def models(config: Config, device: torch.device):
    """Our model and transformers' with the same random weights."""
    from transformers import AutoModelForCausalLM

    fp32 = MoETransformer(dataclasses.replace(config, precision="fp32"))
    tokenizer_json = train_tokenizer([(ROOT / "README.md").read_text()], 1000)
    state = dict(
        config=dataclasses.asdict(config),
        model={name: p.detach() for name, p in fp32.named_parameters()},
        step=0,
        tokens_seen=0,
        optimizer=dict(muon=dict(state={}), adamw=dict(state={})),
        tokenizer_json=tokenizer_json,
        train_seconds=0.0,
        data=dict(data_hash=None),
    )
    with tempfile.TemporaryDirectory() as folder:
        export(state, {}, Path(folder) / "model", config.precision, 5 * 10**9)
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model").to(device).eval()
    ours = MoETransformer(config)
    ours.load_state_dict(fp32.state_dict())
    return ours.to(device).eval(), theirs


def tokens_per_second(write, n: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    assert write() == n * NEW
    return n * NEW / (time.perf_counter() - start)


def measure(config: Config, device: torch.device) -> dict:
    """Median tokens/s of each at each number of texts, measured in turn so that both meet the same machine."""
    ours, theirs = models(config, device)
    prompt = torch.randint(
        config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)
    ).tolist()

    def ours_writes(n):
        return sum(map(len, generate(ours, prompt, NEW, n=n, **DRAWS)))

    @torch.no_grad()
    def theirs_writes(n):
        tokens = torch.tensor([prompt] * n, device=device)
        written = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            **DRAWS,
        )
        return written[:, PROMPT:].numel()

    found = {}
    for n in TEXTS:
        speeds = {"ours": [], "transformers": []}
        for _ in range(REPETITIONS + 1):
            for name, write in (("ours", ours_writes), ("transformers", theirs_writes)):
                speeds[name].append(tokens_per_second(lambda: write(n), n, device))
        found[f"{n} at a time"] = {
            name: statistics.median(values[1:]) for name, values in speeds.items()
        } | dict(all={name: values[1:] for name, values in speeds.items()})
        print(
            f"{n} at a time: "
            + ", ".join(
                f"{name} {statistics.median(values[1:]):,.1f} tokens/s"
                for name, values in speeds.items()
            ),
            flush=True,
        )
    return found


def main(argv: list[str]) -> None:
    parser = new_parser(
        "python -m benchmarks.sample_speed [--preset NAME] [--device cpu|cuda]", __doc__
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    args = parser.parse(argv)
    device = torch.device(args.device)
    precision = "bf16" if args.device == "cuda" else "fp32"
    config = Config(
        **preset_values(args.preset) | dict(precision=precision, activation_checkpointing="none")
    )
    speeds, machine = measure(config, device), environment(device)
    import transformers

    write(
        "sampling",
        speeds["1 at a time"]["ours"],
        "tokens/s (one text at a time)",
        REPETITIONS,
        machine,
        dict(
            preset=args.preset,
            precision=precision,
            prompt_tokens=PROMPT,
            new_tokens=NEW,
            transformers=transformers.__version__,
            **speeds,
        ),
        f"python -m benchmarks.sample_speed --preset {args.preset} --device {args.device}",
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
