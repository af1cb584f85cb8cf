"""The training loop: accumulate, measure the gradient, step, log, save, evaluate. A step is an optimizer step everywhere.

The step itself is `Trainer.train_step`; everything else watches it, writes down what it saw, or keeps it from being lost.
"""

import contextlib
import dataclasses
import math
import os
import signal
import statistics
import sys
import time
import uuid
from pathlib import Path

import torch
from tqdm import tqdm

import data
from config import Config, Diverged, ExperimentError, OutOfMemory, optimizer_groups
from engine.offload import GradientOffload
from engine.precision import LossScaler, gradient_norms
from engine.triton_kernels import attention_backends
from generate import generate
from model import MoETransformer
from muon import build_optimizers
from planner.choice import advise, candidates, check_fits, next_smaller, resolve_autos
from planner.machine import (
    GB,
    GPUS,
    find_device,
    is_out_of_memory,
    machine_of_device,
    release_freed_memory,
)
from planner.plan import format_count, memory_table
from planner.sizes import checkpoint_gb
from record import checkpoint, tracker
from record.results import (
    CURVES,
    METRICS,
    RESULTS,
    MemoryMeter,
    Record,
    environment,
    set_aside,
    write_run_file,
)

RESULTS_MINUTES = 5  # results and curves are rewritten at least this often
CURVES_SECONDS = (
    60  # curves take a second or two, in which the GPU waits: they are drawn at most this often
)
MEASURED_STEPS = 3  # steps after the first whose speed gives the first forecast
SPIKE = 4.0  # a gradient norm this many times its running mean is a spike
STUCK_STEPS = 10  # overflows in a row at the smallest loss scale that end the run
EVALUATION_SAMPLE = 32  # tokens of text that each evaluation keeps


def lr_schedule(step: int, config: Config) -> float:
    """Share of the peak learning rate at update `step` (from 0): a linear rise, then a cosine to min_lr_fraction."""
    warmup = round(config.warmup_fraction * config.max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.max_steps - 1 - warmup))
    return config.min_lr_fraction + (1 - config.min_lr_fraction) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


class Trainer:
    """One run in one folder. `state` is what checkpoint.load returned for the file `resumed_from`, to go on from there;
    `launched` is the time.monotonic() at which the program started. Nothing is written before `run`."""

    def __init__(
        self,
        config: Config,
        corpus: data.Corpus,
        state: dict | None = None,
        resumed_from: Path | None = None,
        launched: float | None = None,
    ):
        self.launched, self.seconds_to_first_step = launched or time.monotonic(), None
        self.corpus, self.folder = corpus, Path(config.save_dir)
        if state is not None:
            _same_data(state["data"], corpus)
        self.device = find_device(config)
        self.machine = machine_of_device(self.device, config.host_memory_gb)
        self.asked = config  # with its autos, which another machine may settle otherwise
        self.config = config = self._decide(config)

        self.step = self.data_position = self.tokens_seen = self.skipped_steps = 0
        with self._out_of_memory_advice():
            self._build(config)
        self.run_id = uuid.uuid4().hex
        self.train_seconds = 0.0  # inside train_step, over the whole run
        self.mean_norm = None  # running mean of the gradient norm
        self.saved_steps: list[int] = []
        self.interval: dict = {}  # sums since the last line of metrics
        self.record = Record(self.folder)
        self.last_saved_step, self.resumed_from = -1, resumed_from
        if state is not None:
            with self._out_of_memory_advice():
                self._load(state)
            self.record.load(resumed_from.parent, self.step)

        self.bar = tqdm(disable=True)
        self.stop_signal: int | None = None  # the signal that asked to stop
        self.last_save = self.last_results = self.last_curves = time.monotonic()
        self.elapsed_before = self.record.latest().get("elapsed_seconds", 0)
        self.speeds: list[float] = []  # seconds of each step in this process
        self.meter = MemoryMeter(self.device, self.predicted, self.machine.memory_gb)

    def _build(self, config: Config) -> None:
        """The model, compiled or not, and its optimizers."""
        print("Building the model ...", flush=True)
        with torch.device("meta"):
            self.model = MoETransformer(config)
        self.model.materialize(self.device)
        self.parameters = dict(self.model.named_parameters())
        offload = config.offload_optimizer == "true"
        if (
            self.device.type == "cpu" and self.predicted["total"] > self.machine.host_memory_gb / 2
        ):  # else speed is worth more
            release_freed_memory()
        if offload:
            self._check_host_memory()
            print(
                f"Reserving {self.predicted['host']:.1f} GB of host memory for what is streamed ...",
                flush=True,
            )
        compiling = config.compile == "true" or (
            config.compile == "auto" and self.device.type == "cuda"
        )
        fused = compiling and self.device.type == "cuda"
        self.gradient_offload = GradientOffload(self.model, config.host_gradient_blocks)
        self.optimizers = build_optimizers(
            config, self.parameters, offload, fused, self.gradient_offload
        )
        self.scaler = LossScaler(
            config.loss_scale, config.loss_scale_growth_interval, enabled=config.precision == "fp16"
        )
        if compiling:
            self.model.compile_blocks()

    # ------------------------------------------------------------ the step

    def train_step(self, batches) -> bool:
        """One optimizer step; False when the gradients overflowed and nothing but the loss scale was changed."""
        c = self.config
        self.model.train()
        loss_sum, counts = torch.zeros((), device=self.device), 0
        for i in range(c.gradient_accumulation_steps):
            tokens, targets = (t.to(self.device, non_blocking=True) for t in next(batches))
            loss, metrics = self.model(tokens, targets)
            self.gradient_offload.micro_batch(i, c.gradient_accumulation_steps)
            (loss * (self.scaler.scale / c.gradient_accumulation_steps)).backward()
            loss_sum += loss.detach()
            counts += metrics.get("expert_counts", 0)
            self._accumulate(metrics)
        self.data_position += c.sequences_per_step

        norms = gradient_norms(list(self.parameters.values()), self.gradient_offload.norms)
        loss, norm = torch.stack(
            [loss_sum / c.gradient_accumulation_steps, norms.norm()]
        ).tolist()  # the one wait
        norm /= self.scaler.scale
        self._check_loss(loss)
        overflow = not math.isfinite(norm)
        if not overflow:
            self._watch_norm(norm, norms)
            factor = (
                min(1.0, c.grad_clip / (norm + 1e-6)) if c.grad_clip else 1.0
            ) / self.scaler.scale
            rate = lr_schedule(self.step, c)
            self.meter.note("backward")
            for name, group in optimizer_groups(c).items():
                self.optimizers[name].step(rate * group.peak_lr, factor)
            if c.load_balancing == "bias" and c.n_moe_layers:
                self.model.balance(counts)
            if self.meter.note("optimizer"):
                self.bar.write(
                    self.meter.table(
                        list(self.parameters.values()),
                        self.optimizers["muon"].state,
                        self.optimizers["adamw"].state,
                        self.gradient_offload.tensors,
                    )
                )
            self.step += 1
            self.tokens_seen += c.tokens_per_step
        for p in self.parameters.values():
            p.grad = None
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # so that the time of a step is this step's
        self.scaler.update(overflow)
        self._check_overflow(overflow)
        return not overflow

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Trains to max_steps, or until a signal asks to stop; raises ExperimentError with advice when it cannot go on."""
        c = self.config
        self._print_forecast()
        checkpoint.check_free_space(self.folder, self.checkpoint_bytes_to_come())
        checkpoint.remove_leftovers(self.folder)
        self._take_over_folder()
        with (
            self._signals(),
            attention_backends(self.device),
            self._last_results(),
            self._out_of_memory_advice(),
            tracker.tracking(c, self.run_id, self.step) as self.record.track,
        ):
            write_run_file(
                self.folder,
                self.device,
                run_id=self.run_id,
                step=self.step,
                config=dataclasses.asdict(c),
                resumed_from=self.resumed_from and str(self.resumed_from),
                data=self._data_facts(),
            )
            if self.step == c.max_steps:
                print(
                    f"Nothing is left to train: the run ended at step {self.step}. More: --max_steps N",
                    flush=True,
                )
            if self._evaluation_due() and not self.record.evaluated(self.step):
                self._evaluate()
            batches = data.batches(
                self.corpus.train, c, self.data_position, pin_memory=self.device.type == "cuda"
            )
            with tqdm(
                total=c.max_steps,
                initial=self.step,
                unit="step",
                dynamic_ncols=True,
                file=sys.stdout,
                mininterval=0.1 if sys.stdout.isatty() else 10,
            ) as self.bar:
                while self.step < c.max_steps and self.stop_signal is None:
                    start = time.perf_counter()
                    stepped = self.train_step(batches)
                    self._count_time(time.perf_counter() - start)
                    if not stepped:
                        continue
                    self.bar.update()
                    if self.step % c.log_every == 0 or self.step == c.max_steps:
                        self._log()
                    self._save_if_due()
                    if self._evaluation_due():
                        self._evaluate()
                    elif time.monotonic() - self.last_results > 60 * RESULTS_MINUTES:
                        self._write_results()
            if self.stop_signal is not None:
                self._stop()
            self._finish()

    @contextlib.contextmanager
    def _last_results(self):
        """Results and curves of a run that ends in an error show how it came to it."""
        try:
            yield
        except (Diverged, OutOfMemory):
            with contextlib.suppress(
                OSError, ExperimentError
            ):  # a full disk must not hide what went wrong
                self._write_results(last=True)
            raise

    def _evaluation_due(self) -> bool:
        return self.step % self.config.eval_every == 0 or self.step == self.config.max_steps

    def _stop(self) -> None:
        """After a signal: save, unless this step is on disk already, and leave with the signal's customary exit code."""
        if self._saving() and self.last_saved_step != self.step:
            self._save(latest_only=True)
        self._write_results(last=True)
        print(
            f"\nStopped at step {self.step}. "
            + (
                f"Go on with: python run_experiment.py --save_dir {self.folder} --resume latest"
                if self._saving()
                else "Saving is off (save_every=0, save_minutes=0), so nothing was saved."
            ),
            flush=True,
        )
        raise SystemExit(128 + self.stop_signal)

    def _finish(self) -> None:
        sample = None
        if self.config.sample_tokens:
            sample = self._sample(self.config.sample_tokens)
            print(f"\nA sample (prompt | continuation):\n{sample['prompt']}|{sample['text']}\n")
        self._write_results(sample, last=True)
        final = self.record.latest()
        print(
            f"Done: {self.step} steps, {format_count(self.tokens_seen)} tokens, validation loss "
            f"{final.get('val_loss', float('nan')):.4f} (unigram entropy {self.corpus.unigram_entropy:.4f}).\n"
            f"{self.folder / RESULTS}, {self.folder / CURVES}",
            flush=True,
        )

    def _sample(self, n_tokens: int) -> dict:
        """A continuation of the first validation tokens, with the same draws every time."""
        self.model.eval()
        prompt = self.corpus.validation[:32].astype("int64").tolist()
        [new] = generate(self.model, prompt, n_tokens, temperature=0.8, top_k=50, seed=0)
        decode = self.corpus.tokenizer.decode
        return dict(prompt=decode(prompt), text=decode(new))

    # ------------------------------------------------------------ watching a step

    def _accumulate(self, metrics: dict) -> None:
        """Adds a micro-batch's metrics to the interval's sums, on the device: nobody waits for them here. Means are
        weighted by their sequences, as a resumed run may cut its steps otherwise."""
        for key, value in metrics.items():
            if key not in ("correct", "expert_counts"):
                value = value * self.config.batch_size
            self.interval[key] = self.interval[key] + value if key in self.interval else value
        self.interval["sequences"] = self.interval.get("sequences", 0) + self.config.batch_size

    def _watch_norm(self, norm: float, norms: torch.Tensor) -> None:
        """Keeps the running mean of the gradient norm and remembers where a spike came from."""
        if self.mean_norm is not None and self.step > 10 and norm > SPIKE * self.mean_norm:
            largest = list(self.parameters)[norms.argmax().item()]
            self.interval["spike"] = dict(
                grad_norm=norm, usual=self.mean_norm, parameter=largest, at_step=self.step + 1
            )
            self.bar.write(
                f"step {self.step + 1}: gradient norm {norm:.2f}, usually {self.mean_norm:.2f}; largest in {largest}"
            )
        self.mean_norm = norm if self.mean_norm is None else 0.95 * self.mean_norm + 0.05 * norm
        self.interval["grad_norm"] = norm

    def _check_loss(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        fp16 = (
            " With --precision bf16 nothing overflows at 65,504, fp16's largest number."
            if self.config.precision == "fp16"
            else ""
        )
        raise Diverged(
            f"the loss is {loss} in the forward pass at step {self.step + 1}: training has diverged.{fp16}\n"
            f"  Lower --muon_lr (now {self.config.muon_lr:g}) and --adamw_lr (now {self.config.adamw_lr:g}), raise "
            f"--warmup_fraction (now {self.config.warmup_fraction:g}), look at grad_norm in {self.folder / METRICS}, check the "
            f"data.\n  {self._last_checkpoint_words()}"
        )

    def _check_overflow(self, overflow: bool) -> None:
        if not overflow:
            return
        self.skipped_steps += 1
        self.bar.write(
            f"step {self.step + 1}: the gradients overflowed; batch skipped, loss scale {self.scaler.scale:g}"
        )
        if self.scaler.stuck_steps >= STUCK_STEPS:
            other = dict(
                fp16=", or try --precision bf16", bf16=", or try --precision fp32", fp32=""
            )[self.config.precision]
            raise Diverged(
                f"{STUCK_STEPS} batches in a row gave inf or nan gradients at the smallest loss scale, {self.scaler.scale:g}, before "
                f"step {self.step + 1}: training has diverged.\n  Lower --muon_lr (now {self.config.muon_lr:g}) and --adamw_lr (now "
                f"{self.config.adamw_lr:g}), raise --warmup_fraction{other}.\n  {self._last_checkpoint_words()}"
            )

    def _last_checkpoint_words(self) -> str:
        latest = checkpoint.latest_path(self.folder)
        return (
            f"The last checkpoint is {latest}."
            if latest.exists()
            else "No checkpoint was saved yet."
        )

    def _count_time(self, seconds: float) -> None:
        self.train_seconds += seconds
        self.interval["seconds"] = self.interval.get("seconds", 0.0) + seconds
        self.speeds.append(seconds)
        if len(self.speeds) == 1:
            self.seconds_to_first_step = time.monotonic() - self.launched
        if len(self.speeds) == MEASURED_STEPS + 1:
            per_step = statistics.median(self.speeds[1:])
            hours = per_step * (self.config.max_steps - self.step) / 3600
            self.bar.write(
                f"{self.config.tokens_per_step / per_step:,.0f} tokens/s in the first steps: "
                f"{hours:,.2f} hours to go for {self.config.max_steps - self.step:,} steps"
            )

    # ------------------------------------------------------------ what is written down

    def _log(self) -> None:
        """Reads the interval's sums, the only time metrics are waited for, and appends a line."""
        c, sums = self.config, self.interval
        sequences = sums["sequences"]
        tokens = sequences * c.max_seq_len
        loss = float(sums["cross_entropy"]) / sequences
        speed = tokens / sums["seconds"]
        row = dict(
            step=self.step,
            train_loss=loss,
            train_perplexity=_exp(loss),
            train_accuracy=float(sums["correct"]) / tokens,
        )
        if c.n_moe_layers:
            counts = sums["expert_counts"].double()
            row |= dict(
                load_balancing_loss=float(sums["load_balancing_loss"]) / sequences,
                router_z_loss=float(sums["router_z_loss"]) / sequences,
                expert_load=[
                    [round(x, 5) for x in layer]
                    for layer in (counts / counts.sum(1, keepdim=True)).tolist()
                ],
            )
        rate = lr_schedule(self.step - 1, c)
        row |= dict(
            grad_norm=sums["grad_norm"],
            muon_lr=rate * c.muon_lr,
            adamw_lr=rate * c.adamw_lr,
            loss_scale=self.scaler.scale,
            skipped_steps=self.skipped_steps,
            tokens_seen=self.tokens_seen,
            tokens_per_second=speed,
            mfu=self._mfu(speed),
            **self.meter.now(),
            elapsed_seconds=self._elapsed(),
        )
        if "spike" in sums:
            row["grad_norm_spike"] = sums["spike"]
        self.interval = {}
        self.record.append(row)
        shown = dict(
            loss=f"{loss:.3f}",
            ppl=f"{row['train_perplexity']:.1f}",
            acc=f"{row['train_accuracy']:.3f}",
            norm=f"{row['grad_norm']:.2f}",
            lr=f"{row['muon_lr']:.1e}",
            tok_s=f"{speed:,.0f}",
        )
        if c.n_moe_layers:
            shown |= dict(
                aux=f"{row['load_balancing_loss']:.3f}",
                top_load=f"{max(max(x) for x in row['expert_load']):.2f}",
            )
        if row["mfu"]:
            shown["mfu"] = f"{row['mfu']:.3f}"
        shown["gb"] = f"{row['memory_peak_gb']:.1f}"
        self.bar.set_postfix(shown)

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Model-FLOP utilisation; None on a GPU whose peak is not known, rather than a wrong one."""
        gpu = GPUS.get(self.machine.key)
        if gpu is None or self.config.precision == "fp32":
            return None
        return self.config.flops_per_token * tokens_per_second / (gpu.peak_tflops * 1e12)

    def _elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.launched

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss over eval_steps batches spread over the held-out text, always the same; a last one that is not full is left out."""
        self.model.eval()
        loss = correct = torch.zeros((), device=self.device)
        tokens = 0
        batches = list(data.validation_batches(self.corpus.validation, self.config))
        full = [
            b for b in batches if len(b[0]) == self.config.batch_size
        ] or batches  # one shape, compiled once
        for inputs, targets in tqdm(
            full,
            desc=f"validation at step {self.step}",
            leave=False,
            file=sys.stdout,
            dynamic_ncols=True,
            disable=not sys.stdout.isatty(),
        ):
            _, metrics = self.model(inputs.to(self.device), targets.to(self.device))
            if self.stop_signal is not None:
                return  # made up for when the run is resumed: it was saved before this evaluation
            loss = loss + metrics["cross_entropy"] * targets.numel()
            correct = correct + metrics["correct"]
            tokens += targets.numel()
        loss = (loss / tokens).item()
        row = dict(
            step=self.step,
            val_loss=loss,
            val_perplexity=_exp(loss),
            val_accuracy=correct.item() / tokens,
            val_tokens=tokens,
            elapsed_seconds=self._elapsed(),
        )
        if self.config.sample_tokens:
            row["sample"] = self._sample(min(EVALUATION_SAMPLE, self.config.sample_tokens))["text"]
        self.record.append(row)
        tqdm.write(
            f"step {self.step}: validation loss {loss:.4f}, perplexity {_exp(loss):.2f}, "
            f"accuracy {correct.item() / tokens:.4f}",
            file=sys.stdout,
        )
        self._write_results()

    def _write_results(self, sample: dict | None = None, last: bool = False) -> None:
        """Rewrites training_results.json and, at the end or when they are CURVES_SECONDS old, training_curves.png."""
        c = self.config
        facts = dict(
            config=dataclasses.asdict(c),
            environment=environment(self.device),
            parameters=dict(total=c.total_params, active=c.active_params, **c.parameter_groups),
            data=self._data_facts(),
            memory_gb=dict(predicted=self.predicted, measured=self.meter.measured_gb),
            totals=dict(
                steps=self.step,
                tokens=self.tokens_seen,
                skipped_steps=self.skipped_steps,
                train_seconds=self.train_seconds,
                elapsed_seconds=self._elapsed(),
                tokens_per_second=self.tokens_seen / self.train_seconds
                if self.train_seconds
                else None,
                seconds_to_first_step=self.seconds_to_first_step,
            ),
            sample=sample,
        )
        self.record.write_results(facts)
        if last or time.monotonic() - self.last_curves > CURVES_SECONDS:
            title = (
                f"{format_count(c.total_params)} parameters, {format_count(c.active_params)} active"
            )
            self.record.draw_curves(title, self.corpus.unigram_entropy)
            self.last_curves = time.monotonic()
        self.last_results = time.monotonic()

    # ------------------------------------------------------------ checkpoints

    def _saving(self) -> bool:
        return bool(self.config.save_every or self.config.save_minutes)

    def _save_if_due(self) -> None:
        c = self.config
        last = self.step == c.max_steps
        if c.save_every and (self.step % c.save_every == 0 or last):
            self._save(latest_only=False)
        elif c.save_minutes and (last or time.monotonic() - self.last_save > 60 * c.save_minutes):
            self._save(latest_only=True)

    def _save(self, latest_only: bool) -> None:
        latest = checkpoint.latest_path(self.folder)
        self.bar.set_description("saving")
        if latest_only:
            checkpoint.save(latest, self._state())
        else:
            path = checkpoint.step_path(self.folder, self.step)
            set_aside(path)  # a branch of this run that a resume from further back left
            self.saved_steps.append(self.step)
            checkpoint.save(path, self._state())
            checkpoint.link_latest(path, latest)
            self.saved_steps = checkpoint.prune(
                self.folder, self.saved_steps, self.config.keep_checkpoints
            )
        self.bar.set_description("")
        self.last_save, self.last_saved_step = time.monotonic(), self.step

    def _state(self) -> dict:
        c = self.config
        return dict(
            config=dataclasses.asdict(self.asked),
            run_id=self.run_id,
            step=self.step,
            data_position=self.data_position,
            tokens_seen=self.tokens_seen,
            skipped_steps=self.skipped_steps,
            saved_steps=self.saved_steps,
            train_seconds=self.train_seconds,
            mean_norm=self.mean_norm,
            model={
                name: p.detach()
                for name, p in (self.parameters | self.model.balancing_biases()).items()
            },
            optimizer={name: o.state_dict() for name, o in self.optimizers.items()},
            schedule=dict(step=self.step, max_steps=c.max_steps, factor=lr_schedule(self.step, c)),
            loss_scaler=self.scaler.state_dict(),
            random=checkpoint.random_states(self.device),
            data=self._data_identity(),
            tokenizer_json=self.corpus.tokenizer_json,
            metrics=self.record.latest(),
            interval=self.interval,
        )

    def _data_facts(self) -> dict:
        return dict(
            self._data_identity(),
            train_tokens=len(self.corpus.train),
            validation_tokens=len(self.corpus.validation),
            unigram_entropy=self.corpus.unigram_entropy,
        )

    def _data_identity(self) -> dict:
        return dict(data_hash=self.corpus.data_hash, tokenizer_hash=self.corpus.tokenizer_hash)

    @torch.no_grad()
    def _load(self, state: dict) -> None:
        try:
            for name, p in (self.parameters | self.model.balancing_biases()).items():
                saved = state["model"][name]
                if saved.shape != p.shape or saved.dtype != p.dtype:
                    raise ValueError(
                        f"{name} is {saved.dtype} {tuple(saved.shape)}, not {p.dtype} {tuple(p.shape)}"
                    )
                p.copy_(saved)
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizer"][name])
            self.scaler.load_state_dict(state["loss_scaler"])
            for name in (
                "run_id",
                "step",
                "data_position",
                "tokens_seen",
                "skipped_steps",
                "saved_steps",
                "train_seconds",
                "mean_norm",
            ):
                setattr(self, name, state[name])
            # copies: what was loaded is mapped from the checkpoint's file, which could not be deleted while it is in use
            self.interval = {
                k: v.to(self.device, copy=True) if isinstance(v, torch.Tensor) else v
                for k, v in state["interval"].items()
            }
            checkpoint.restore_random_states(state["random"], self.device)
        except (KeyError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"the checkpoint does not match this program's model: {error}. Resume it with "
                "the version of the program that wrote it."
            ) from error

    def checkpoint_bytes_to_come(self) -> int:
        c = self.config
        there = [
            path
            for step in self.saved_steps
            if (path := checkpoint.step_path(self.folder, step)).exists()
        ]
        latest = checkpoint.latest_path(self.folder)
        own = bool(
            self.resumed_from
            and latest.exists()
            and latest.samefile(self.resumed_from)  # another run's or branch's is no room
            and not any(latest.samefile(path) for path in self.folder.glob("checkpoint_step_*.pt"))
        )
        return int(checkpoint.files_to_come(c, self.step, len(there), own) * checkpoint_gb(c) * GB)

    def _take_over_folder(self) -> None:
        """Drops the rows past the checkpoint that the run goes on from, and makes that checkpoint the latest: otherwise a
        run that branches off from an older one would be resumed from the other branch."""
        self.record.begin()
        if self.resumed_from is None or self.resumed_from.resolve().parent != self.folder.resolve():
            return
        latest = checkpoint.latest_path(self.folder)
        if not (latest.exists() and latest.samefile(self.resumed_from)):
            if latest.exists() and not any(
                latest.samefile(path) for path in self.folder.glob("checkpoint_step_*.pt")
            ):
                set_aside(latest)  # the other branch's only copy
            checkpoint.link_latest(self.resumed_from, latest)
        self.last_saved_step = self.step

    # ------------------------------------------------------------ before the first step

    def _decide(self, config: Config) -> Config:
        """Settles the fields that are auto and prints the predicted memory."""
        check_fits(config, self.machine)
        where = (
            f"{self.machine.name}, {self.machine.memory_gb:.1f} GB"
            if self.machine.name
            else f"CPU, {self.machine.host_memory_gb:.1f} GB free"
        )
        config, self.predicted, choice = resolve_autos(config, self.machine)
        if choice:  # the prediction is not law: go on as asked, and say what would fit
            print(
                f"warning: this configuration is not expected to fit ({where}). {advise(choice, config, self.machine)[0]}.",
                file=sys.stderr,
            )
        mode, last = config.activation_checkpointing, config.checkpointing_of(config.n_layers - 1)
        lighter = f" ({last} in the last {config.lighter_blocks} blocks)" if last != mode else ""
        print(
            f"Memory on {where}: activation checkpointing {mode}{lighter}, optimizer state "
            f"{'streamed from the host' if config.offload_optimizer == 'true' else 'on the device'}\n"
            + memory_table(
                self.predicted, capacity_gb=self.machine.memory_gb or self.machine.host_memory_gb
            )
        )
        return config

    def _check_host_memory(self) -> None:
        needed, there = self.predicted["host"], self.machine.host_memory_gb
        if needed > there:
            raise OutOfMemory(
                f"no host memory for streaming: what is streamed takes {needed:.1f} GB and {there:.1f} GB "
                "are free. Use a smaller preset or --offload_optimizer false; if the host has more than the "
                "operating system reports, say so with --host_memory_gb."
            )

    def _print_forecast(self) -> None:
        c, corpus = self.config, self.corpus
        passes = c.max_steps * c.tokens_per_step / max(1, len(corpus.train))
        print(
            f"Corpus {c.data}: {len(corpus.train):,} training tokens, {len(corpus.validation):,} validation tokens, unigram "
            f"entropy {corpus.unigram_entropy:.3f} nats\n"
            f"The run: {c.max_steps:,} steps of {c.tokens_per_step:,} tokens, {format_count(c.max_steps * c.tokens_per_step)} "
            f"tokens, {passes:.2f} passes over the corpus",
            flush=True,
        )
        if passes > 4:
            print(
                f"warning: {passes:.1f} passes over the corpus; beyond about 4 repeated data is worth much less than new "
                "(Muennighoff et al. 2023). Use more --data or fewer --max_steps.",
                file=sys.stderr,
            )
        if self.device.type == "cpu" and c.precision != "fp32":
            print(
                f"note: {c.precision} is slow on a CPU"
                + "; --precision fp32 is faster there" * (self.resumed_from is None),
                file=sys.stderr,
            )

    # ------------------------------------------------------------ signals and memory errors

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and the first Ctrl-C let the step finish, save and stop; the second Ctrl-C exits at once."""

        def handle(number, _frame):
            if self.stop_signal is not None and number == signal.SIGINT:
                os._exit(130)
            self.stop_signal = number
            os.write(
                2, b"\nstopping after this step; Ctrl-C again to stop at once without saving\n"
            )

        before = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _out_of_memory_advice(self):
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            cpu = self.device.type == "cpu"
            used = next(
                x
                for x in candidates(
                    self.config,
                    [self.config.activation_checkpointing],
                    [self.config.offload_optimizer == "true"],
                    [self.config.batch_size],
                    cpu,
                )
            )
            less = next_smaller(self.config, used, cpu)
            raise OutOfMemory(
                f"out of memory at step {self.step + 1} on {self.machine.name or 'the CPU'} ({self.machine.memory_gb or self.machine.host_memory_gb:.1f} "
                f"GB; predicted {used.memory_gb['total']:.1f} GB).\n  "
                + (
                    f"Next smaller choice, at the same tokens per step ({less.memory_gb['total']:.1f} GB): {less.options(self.config)}"
                    if less
                    else "Nothing smaller is left for this model: lower --max_seq_len or use a smaller --preset."
                )
                + f"\n  {self._last_checkpoint_words()}"
            ) from error


def _same_data(saved: dict, corpus: data.Corpus) -> None:
    for key, what, option in (
        ("data_hash", "text", "data"),
        ("tokenizer_hash", "tokenizer", "tokenizer"),
    ):
        if saved[key] not in (None, getattr(corpus, key)):  # None: the model comes from elsewhere
            raise ExperimentError(
                f"the checkpoint was trained on other {what} ({key} {saved[key][:12]}, here "
                f"{getattr(corpus, key)[:12]}). Give the --{option} of the first run, unchanged, or start a "
                "new run with another --save_dir."
            )


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
