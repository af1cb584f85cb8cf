"""The training loop: accumulate, measure the gradient, step, log, save, evaluate.

`Trainer.train_step` is the step and `Trainer.run` is the run; the rest opens the run, looks after
it and ends it. A step is an optimizer step everywhere. What a run writes down is in record/.
"""

import contextlib
import dataclasses
import math
import shutil
import statistics
import sys
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
from config import (
    IGNORED_TARGET,
    Config,
    Diverged,
    ExperimentError,
    OutOfMemory,
    optimizer_groups,
)
from engine.distributed import GradientReducer, Ranks, WeightGatherer, different_replicas
from engine.gradients import OwnGradients
from engine.offload import GradientOffload
from engine.ownership import ownership, small_parameters
from engine.precision import LossScaler
from engine.triton_kernels import any_order, attention_backends, set_deterministic
from generate import stream
from model import MoETransformer
from muon import build_optimizers
from planner.choice import advise, check_fits, resolve_autos
from planner.layout import fitted, format_count, say
from planner.machine import (
    find_device,
    is_out_of_memory,
    machine_of_device,
    release_freed_memory,
)
from record import checkpoint, console, latest, lineage, messages, tracker
from record.meter import MemoryMeter
from record.metrics import Interval, mfu, perplexity
from record.results import (
    Record,
    data_facts,
    data_identity,
    earlier_starts,
    start_facts,
    write_run_file,
)
from record.run_folder import RunCheckpoints
from record.shared_save import rows_of_shards, rows_of_states
from record.side_work import PAUSES, NoSideWork, SideWork, cause_of, warn
from record.small_files import CURVES, METRICS, RESULTS, RUN, resume_points
from record.stop import AgreedStop, StopSignal

MEASURED_STEPS = 3  # steps after the first whose speed gives the first forecast
SPIKE = 4.0  # a gradient norm this many times its running mean is a spike
SPIKE_WARMUP = 10  # steps in which the norm is not yet compared: it falls fast at first
STUCK_STEPS = 10  # overflows in a row at the smallest loss scale that end the run
SAMPLE_PROMPT = 32  # tokens of held-out text that a sample continues
EVALUATION_SAMPLE = 32  # tokens of text that each evaluation keeps at most

# Fields of a trainer that checkpoints hold under the same names.
PROGRESS = (
    "run_id",
    "step",
    "data_position",
    "tokens_seen",
    "skipped_steps",
    "train_seconds",
    "mean_norm",
)


def lr_schedule(step: int, config: Config) -> float:
    """Share of the peak learning rate at update `step` (from 0).

    It rises linearly over warmup_fraction of the run, to 1, and falls on a cosine, to
    min_lr_fraction at the last step.
    """
    warmup = round(config.warmup_fraction * config.max_steps)
    if step < warmup:
        return (step + 1) / warmup
    falling_steps = max(1, config.max_steps - 1 - warmup)
    progress = min(1.0, (step - warmup) / falling_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_fraction + (1 - config.min_lr_fraction) * cosine


def learning_rates(step: int, config: Config) -> dict[str, float]:
    """The learning rate of each optimizer at update `step` (from 0), by its name."""
    share = lr_schedule(step, config)
    rates = {}
    for name, group in optimizer_groups(config).items():
        rates[name] = share * group.peak_lr
    return rates


def plot_training_curves(*arguments, **options) -> None:
    """plot.plot_training_curves, imported only now.

    A matplotlib that cannot be imported costs a run its curves and nothing else.
    """
    import plot

    plot.plot_training_curves(*arguments, **options)


class Trainer:
    """One run in one folder, config.save_dir. Nothing is written before `run`.

    `state` is what checkpoint.load returned for the file `resumed_from`; the run continues from
    it. `launched` is the time.monotonic() at which the program started. With several `ranks` all of
    them make a trainer of the same run and call its methods together; the first one writes files.

    Raises ExperimentError when the data are not the checkpoint's or memory does not hold the model.
    """

    def __init__(
        self,
        config: Config,
        corpus: data.Corpus,
        state: dict | None = None,
        resumed_from: Path | None = None,
        launched: float | None = None,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.launched = launched or time.monotonic()
        self.corpus = corpus
        self.folder = Path(config.save_dir)
        if state is not None:
            _check_same_rules(state, corpus)
            _check_same_data(state["data"], corpus)
        self.device = find_device(config)
        self.machine = machine_of_device(
            self.device, config.host_memory_gb, self.ranks.local_size, self.ranks.machines
        )
        # Checkpoints keep the autos as requested: another machine may resolve them otherwise.
        self.requested_config = config
        self.config = self._resolve(config)

        # Progress, which checkpoints hold
        self.run_id = uuid.uuid4().hex
        self.step = 0
        self.data_position = 0  # sequences drawn, those of skipped steps included
        self.skipped_data: list[dict] = []  # see skip_data
        self.tokens_seen = 0
        self.skipped_steps = 0
        self.train_seconds = 0.0  # inside train_step, over the whole run
        self.mean_norm: float | None = None  # running mean of the gradient norm
        self.interval = Interval()  # since the last row of metrics
        self.lineage = self._begin_branch(state, resumed_from)

        self.side_work = SideWork()
        if not self.ranks.is_first:
            self.side_work = NoSideWork()
        self.record = Record(self.folder, self.side_work)
        self.checkpoints = RunCheckpoints(self.config, resumed_from)
        with self._out_of_memory_advice():
            self._build(self.config)
            if state is not None:
                self.load_state_dict(state)
                self.record.load(resumed_from.parent, self.step)

        # This process alone
        self.elapsed_before = self.record.latest().get("elapsed_seconds", 0)
        self.step_seconds: list[float] = []
        self.seconds_to_first_step: float | None = None
        self.stop = StopSignal()
        if self.ranks.size > 1:
            self.stop = AgreedStop()
        self.save_now = False  # whether the first rank's clock requests a checkpoint
        self.data_error: ExperimentError | None = None  # why this rank cannot read its data
        self.bar = tqdm(disable=True)
        self.failed_saves = 0  # attempts since the last checkpoint that was saved
        self.skips_data_here = False  # whether this start skipped data
        self.retry_save_at: int | None = None  # the step after which the next attempt comes

    def skip_data(self, steps: int) -> None:
        """Leaves out the data of the next `steps` steps, and notes that in the checkpoints to come.

        A run that diverged on some data is so rolled back to an earlier checkpoint, from which it
        continues with other data.
        """
        sequences = steps * self.config.sequences_per_step
        self.skipped_data.append(dict(step=self.step, steps=steps, sequences=sequences))
        self.data_position += sequences
        self.skips_data_here = True
        say(messages.data_skipped(self.step, steps, sequences))

    def _begin_branch(self, state: dict | None, resumed_from: Path | None) -> list[dict]:
        """The branches that led here, with the new one of this start: see record/lineage.py."""
        if state is None:
            return lineage.begin([], 0, None)
        return lineage.begin(state.get("lineage", []), state["step"], resumed_from)

    def _resolve(self, config: Config) -> Config:
        """Resolves the fields that are auto, and prints the predicted memory."""
        check_fits(config, self.machine)
        # `fitting` is a choice that fits, when the requested one is not expected to; else None.
        # Free memory may differ from rank to rank: what the first one finds holds for all. And no
        # rank takes memory before all have measured what is free: they share the host's.
        resolved = resolve_autos(config, self.machine)
        config, self.predicted, fitting = self.ranks.all_values(resolved)[0]
        if fitting is not None:
            # The prediction may be wrong: the run starts as requested, with a warning.
            advice, _ = advise(fitting, config, self.machine)
            say(messages.not_expected_to_fit(self.machine, advice), sys.stderr)
        say(messages.memory_plan(config, self.predicted, self.machine))
        return config

    def _build(self, config: Config) -> None:
        """The model, compiled or not, its optimizers, and what watches them."""
        say("Building the model ...")
        set_deterministic(config.deterministic)
        with torch.device("meta"):
            self.model = MoETransformer(config)
        self.model.materialize(self.device)
        self.parameters = dict(self.model.named_parameters())

        on_gpu = self.device.type == "cuda"
        if not on_gpu and self.predicted["total"] > self.machine.host_gb_of_a_gpu / 2:
            # Returning freed memory at once costs speed, which is worth more where memory is ample.
            release_freed_memory()
        offload = config.offload_optimizer == "true"
        if offload:
            self._check_host_memory()
            say(messages.reserving_host_memory(self.predicted["host"]))
        compiling = config.compile == "true" or (config.compile == "auto" and on_gpu)
        fused = compiling and on_gpu
        gradient_offload = GradientOffload(self.model, config.host_gradient_blocks)
        self.optimizer_groups = optimizer_groups(config)
        self.gradients = OwnGradients(self.parameters, gradient_offload)
        if self.ranks.size > 1:
            self.gradients = self._build_reducer(config)
        self.optimizers = build_optimizers(
            config, self.gradients.owned, offload, fused, gradient_offload
        )
        # Several ranks send each other the new weights while the optimizers are at work.
        self.gathering: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.ranks.size > 1:
            for name, group in self.optimizer_groups.items():
                self.optimizers[name].state.names = set(group.parameters)
            self.gathering = WeightGatherer(self.gradients, self.optimizers)
        self.scaler = LossScaler(
            config.loss_scale, config.loss_scale_growth_interval, enabled=config.precision == "fp16"
        )
        self.meter = MemoryMeter(
            self.device,
            self.predicted,
            self.machine.memory_gb,
            self.parameters,
            self.optimizers,
            self.optimizer_groups,
            gradient_offload.tensors,
            self.gradients.on_device,
        )
        if compiling:
            self.model.compile_blocks()

    def _build_reducer(self, config: Config) -> GradientReducer:
        return GradientReducer(
            self.parameters,
            ownership(config, self.ranks.local_size),
            small_parameters(config),
            self.ranks,
            every_micro_batch=config.reduce_gradients == "micro_batch",
        )

    def _check_host_memory(self) -> None:
        needed_gb = self.predicted["host"]
        free_gb = self.machine.host_gb_of_a_gpu
        if needed_gb > free_gb:
            raise OutOfMemory(messages.no_host_memory(needed_gb, free_gb))

    # ------------------------------------------------------------ the step

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """One optimizer step: a pass over all micro-batches, one norm, one update.

        False when the gradients overflowed. Then only the loss scale and the position in the data
        have changed.
        """
        c = self.config
        micro_batches = c.gradient_accumulation_steps
        own_micro_batches = len(self.ranks.micro_batches(micro_batches))
        self.model.train()
        sums = Interval()  # over the micro-batches of this step
        with self.meter.phase("backward"):
            for i in range(own_micro_batches):
                tokens, targets = self._next_micro_batch(batches)
                tokens = tokens.to(self.device, non_blocking=True)
                targets = targets.to(self.device, non_blocking=True)
                loss, metrics = self.model(tokens, targets)
                # Gradients leave while the backward pass makes them: for host memory, or for the
                # ranks that own them.
                self.gradients.micro_batch(i, own_micro_batches)
                # A step's gradient is the mean over its micro-batches, times the loss scale.
                (loss * (self.scaler.scale / micro_batches)).backward()
                sums.add_loss(loss.detach())
                sums.add_micro_batch(metrics, c.batch_size)
            norms, votes = self._end_of_backward(sums)

        # The one wait for the GPU in a step: all arrive together.
        mean_loss = sums.pop_loss() / micro_batches
        loss, norm, *votes = torch.stack([mean_loss, norms.norm(), *votes]).tolist()
        norm /= self.scaler.scale
        self._follow(votes)
        self.data_position += c.sequences_per_step
        self._check_loss(loss)
        self.interval.add_step(sums)
        # An inf or a nan in any gradient makes the norm one too: this is the overflow test.
        overflow = not math.isfinite(norm)
        if not overflow:
            self._watch_norm(norm, norms)
            # Unscaling and clipping are one number. The optimizers multiply gradients by it in
            # fp32 as they read them, and `.grad` is never rewritten: in fp16 small values would
            # be lost.
            grad_scale = 1.0 / self.scaler.scale
            if c.grad_clip:
                grad_scale = min(1.0, c.grad_clip / (norm + 1e-6)) / self.scaler.scale
            lr_share = lr_schedule(self.step, c)
            with self.meter.phase("optimizer"), self.gathering:
                for name, optimizer in self.optimizers.items():
                    lr = lr_share * self.optimizer_groups[name].peak_lr
                    optimizer.step(lr, grad_scale)
                if c.load_balancing == "bias" and c.n_moe_layers:
                    self.model.balance(sums.sums["expert_counts"])
            self.step += 1
            self.tokens_seen += c.tokens_per_step
        self.gradients.free()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # so that the time of a step is this step's
        self.scaler.update(overflow)
        self._check_overflow(overflow)
        return not overflow

    def _next_micro_batch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Tokens and targets, [batch, sequence] both, pinned for a GPU.

        When one of several ranks cannot read its data, the others already wait for its gradients.
        So it takes part in this step with tokens that mean nothing, and with its vote the step ends
        in an error on all ranks.
        """
        if self.ranks.size == 1:
            return next(batches)
        try:
            if self.data_error is None:
                return next(batches)
        except ExperimentError as error:
            self.data_error = error
        nothing = torch.zeros(self.config.batch_size, self.config.max_seq_len, dtype=torch.int64)
        return nothing, nothing

    def _end_of_backward(self, sums: Interval) -> tuple[Tensor, list[Tensor]]:
        """The norms of the parameters' gradients [n], and what the ranks have voted for.

        With several ranks `sums` becomes that of all of them. One rank has nobody to vote with.
        """
        c = self.config
        totals = sums.sums
        own_votes = self._votes()
        totals |= own_votes
        most_passes = math.ceil(c.gradient_accumulation_steps / self.ranks.size)
        norms = self.gradients.finish(totals, most_passes)
        totals["sequences"] = c.sequences_per_step
        return norms, [totals.pop(name) for name in own_votes]

    def _votes(self) -> dict[str, Tensor]:
        """What this rank's signals and the first one's clock request of several ranks."""
        if self.ranks.size == 1:
            return {}
        assert isinstance(self.stop, AgreedStop)
        votes = dict(
            stop=self.stop.vote,
            save=self.ranks.is_first and self.checkpoints.latest_due(self.step + 1),
            error=self.data_error is not None,
        )
        return {name: torch.tensor(float(vote), device=self.device) for name, vote in votes.items()}

    def _follow(self, votes: list[float]) -> None:
        """Does what a rank has voted for: every rank at the same step."""
        if not votes:
            return
        stop, save, error = votes
        if error:
            self.ranks.raise_on_all(self.data_error)
        if stop and not self.stop.requested:
            self.stop.agree(self.ranks.all_values(self.stop.number))
        self.save_now = bool(save)

    def _check_loss(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        raise Diverged(
            messages.loss_not_finite(
                self.config,
                loss,
                self.step + 1,
                self.folder / METRICS,
                messages.way_back(self.checkpoints.latest),
            )
        )

    def _check_overflow(self, overflow: bool) -> None:
        if not overflow:
            return
        self.skipped_steps += 1
        _say_above_bar(messages.overflow(self.config, self.step + 1, self.scaler.scale))
        if self.scaler.stuck_steps >= STUCK_STEPS:
            raise Diverged(
                messages.gradients_not_finite(
                    self.config,
                    STUCK_STEPS,
                    self.scaler.scale,
                    self.step + 1,
                    messages.way_back(self.checkpoints.latest),
                )
            )

    def _watch_norm(self, norm: float, norms: Tensor) -> None:
        """Keeps the running mean of the gradient norm and remembers where a spike came from.

        `norms` are those of the parameters, in their order.
        """
        self.interval.note_gradient_norm(norm)
        usual = self.mean_norm
        if usual is None:
            self.mean_norm = norm
            return
        if self.step > SPIKE_WARMUP and norm > SPIKE * usual:
            step = self.step + 1
            largest = list(self.parameters)[norms.argmax().item()]
            self.interval.note_spike(grad_norm=norm, usual=usual, parameter=largest, at_step=step)
            _say_above_bar(messages.spike(step, norm, usual, largest))
        self.mean_norm = 0.95 * usual + 0.05 * norm

    # ------------------------------------------------------------ the run

    def run(self) -> None:
        """Trains to max_steps, or until a signal requests a stop.

        Raises ExperimentError with advice when the run cannot continue, and SystemExit with the
        signal's customary exit code after a signal.
        """
        self._open_folder()
        with self._watched():
            with self._results_of_an_error():
                self._begin()
                self._train()
            if self.stop.requested:
                self._leave_after_signal()
            self._finish()

    def _train(self) -> None:
        """Steps, and what comes between them, to max_steps or until a signal requests a stop."""
        c = self.config
        # Closed at an error too: the error's traceback would keep the readers of the data, and
        # Python would wait for them at its exit.
        with (
            contextlib.closing(self._batches()) as batches,
            self._progress_bar() as self.bar,
        ):
            while self.step < c.max_steps and not self.stop.requested:
                if not self._timed_step(batches):
                    continue  # the gradients overflowed: the next batch is tried
                self.bar.update()
                if self.step % c.log_every == 0 or self.step == c.max_steps:
                    self.log()
                # Saving comes first: a run that resumes from here evaluates this step if the
                # evaluation was cut short.
                self._save_if_due()
                if self._evaluation_due():
                    self.evaluate()
                elif self.record.results_are_old():
                    self._write_results()

    def _batches(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        return data.batches(
            self.corpus.train,
            self.config,
            self.data_position,
            pin_memory=self.device.type == "cuda",
            rules=self.corpus.rules,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
        )

    def _open_folder(self) -> None:
        """Prints what the run will do, and prepares its folder for writing."""
        say(messages.forecast(self.config, self.corpus))
        on_cpu = self.device.type == "cpu"
        resumed = self.checkpoints.resumed_from is not None
        for warning in messages.forecast_warnings(self.config, self.corpus, on_cpu, resumed):
            say(warning, sys.stderr)
        with self.ranks.together():
            if self.ranks.is_first:
                latest.remove_leftovers(self.folder)
                checkpoint.check_free_space(self.folder, self.checkpoint_bytes_to_come())
        self.side_work.run(METRICS, self.record.begin)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """What is in force during the run: signals, attention's kernels, errors, the tracker."""
        with (
            self.stop,
            attention_backends(self.device, self.config.deterministic),
            self._tracking() as self.record.track,
            self._out_of_memory_advice(),
        ):
            yield

    def _tracking(self) -> contextlib.AbstractContextManager:
        if not self.ranks.is_first:
            return contextlib.nullcontext(lambda row: None)
        return tracker.tracking(self.config, self.run_id, self.step)

    def _begin(self) -> None:
        """Writes run.json, and evaluates where this step's evaluation is due and was not made.

        That is so at step 0, and after resuming a checkpoint whose run ended before it evaluated.
        """
        resumed_from = None
        if self.checkpoints.resumed_from is not None:
            resumed_from = str(self.checkpoints.resumed_from)
        self.start = start_facts(
            self.device,
            self.side_work,
            run_id=self.run_id,
            step=self.step,
            config=dataclasses.asdict(self.config),
            requested=self._fields_left_auto(),
            resumed_from=resumed_from,
            lineage=self.lineage,
            ranks=self.ranks.size,
            skipped_data=self.skipped_data,
            data=data_facts(self.corpus),
        )
        self.earlier = self.side_work.value(RUN, lambda: earlier_starts(self.folder)) or []
        self.record.resume_points = resume_points([*self.earlier, self.start])
        self.side_work.run(RUN, self._write_run_file)
        # After run.json, which names the new branch: until the branch saves, nothing else does.
        if self.ranks.is_first:
            name = str(self.checkpoints.latest)
            self.side_work.run(name, lambda: self.checkpoints.take_over(self.step))
        last_saved_step = self.ranks.value_of_first(self.checkpoints.last_saved_step)
        self.checkpoints.last_saved_step = last_saved_step
        if self.skips_data_here and self.checkpoints.enabled:
            # At once: should the run be killed before its next checkpoint, --resume latest would
            # continue with the very data that was to be skipped.
            self._try_to_save(numbered=False)
        if self.step == self.config.max_steps:
            say(messages.nothing_left(self.step))
        evaluated = self.ranks.value_of_first(self.record.evaluated(self.step))
        if self._evaluation_due() and not evaluated:
            self.evaluate()

    def _write_run_file(self) -> None:
        write_run_file(self.folder, self.start, self.earlier)

    def _fields_left_auto(self) -> dict:
        """The fields of the configuration that were resolved, as they were requested."""
        resolved = dataclasses.asdict(self.config)
        requested = dataclasses.asdict(self.requested_config)
        return {name: value for name, value in requested.items() if value != resolved[name]}

    def _progress_bar(self) -> tqdm:
        """The bar of a terminal. Elsewhere `log` prints lines instead: a bar cannot be redrawn."""
        return tqdm(
            total=self.config.max_steps,
            initial=self.step,
            bar_format="{n_fmt}/{total_fmt}{postfix} |{bar}|",
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
        )

    def _timed_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """`train_step`, timed. After the first steps it prints memory and speed."""
        start = time.perf_counter()
        memory_was_measured = self.meter.measured_gb is not None
        stepped = self.train_step(batches)
        seconds = time.perf_counter() - start

        self.train_seconds += seconds
        self.interval.add_seconds(seconds)
        self.step_seconds.append(seconds)
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = time.monotonic() - self.launched
        if self.meter.measured_gb is not None and not memory_was_measured:
            _say_above_bar(self.meter.table())
        if len(self.step_seconds) == 1 + MEASURED_STEPS:
            usual = statistics.median(self.step_seconds[1:])
            steps_left = self.config.max_steps - self.step
            _say_above_bar(messages.first_speed(self.config, usual, steps_left, self.ranks.size))
        return stepped

    def _leave_after_signal(self) -> None:
        """Saves, unless this step is on disk already, and raises SystemExit."""
        not_saved = self._save_last()
        self._write_last_results()
        self._check_saved(not_saved)
        saving = self.checkpoints.enabled
        stopped = messages.stopped(
            self.step, self.folder, saving, self.ranks.size, self.ranks.machines
        )
        console.print_somewhere(fitted(stopped, sys.stdout))
        raise SystemExit(self.stop.exit_code)

    def _finish(self) -> None:
        not_saved = self._save_last()
        sample = None
        if self.config.sample_tokens:
            sample = self._sample_if_possible(self.config.sample_tokens)
        if sample is not None:
            print(messages.sample(**sample))
        self._write_last_results(sample)
        self._check_saved(not_saved)
        loss = self.record.latest().get("val_loss", math.nan)
        done = messages.done(
            self.step,
            self.tokens_seen,
            loss,
            self.corpus.unigram_cross_entropy,
            self.folder / RESULTS,
            self.folder / CURVES,
        )
        console.print_somewhere(fitted(done, sys.stdout))
        if self.stop.requested:  # everything is on the disk, but the sample may be missing
            raise SystemExit(self.stop.exit_code)

    def _check_saved(self, not_saved: checkpoint.CheckpointError | None) -> None:
        """Raises the error of the last save, when the results are written.

        All ranks have this error. The others wait for the first one: their end would be its end.
        """
        if not_saved is not None:
            self.ranks.wait_for_all()
            raise not_saved

    # ------------------------------------------------------------ what is written down

    def log(self) -> None:
        """Appends a row of training metrics.

        The metrics since the last row are summed on the GPU. Only here does the CPU wait for them.
        """
        c = self.config
        speed = self.interval.tokens_per_second(c)
        lr_share = lr_schedule(self.step - 1, c)  # of the latest update: `step` counts it already
        row = dict(step=self.step, **self.interval.training_row(c))
        row["grad_norm"] = self.interval.sums["grad_norm"]
        for name, group in self.optimizer_groups.items():
            row[f"{name}_lr"] = lr_share * group.peak_lr
        row |= dict(
            loss_scale=self.scaler.scale,
            skipped_steps=self.skipped_steps,
            tokens_seen=self.tokens_seen,
            tokens_per_second=speed,
            ranks=self.ranks.size,
            mfu=mfu(c, self.machine, speed / self.ranks.size),
            **self._memory_now(),
            elapsed_seconds=self._elapsed(),
        )
        if "spike" in self.interval.sums:
            row["grad_norm_spike"] = self.interval.sums["spike"]
        self.interval = Interval()
        self._check_replicas()
        self.record.append(row)
        if self.bar.disable:
            say(messages.progress_line(row, c))
        else:
            columns = shutil.get_terminal_size().columns
            self.bar.set_postfix_str(messages.progress_bar(row, c, columns))

    def _memory_now(self) -> dict[str, float | None]:
        """The memory columns of a row: those of the rank with the highest peak."""
        columns = self.ranks.all_values(self.meter.now())
        return max(columns, key=lambda column: column["memory_peak_gb"])

    def _check_replicas(self) -> None:
        """Raises ExperimentError when the ranks' weights differ in a bit, as they never should."""
        if self.ranks.size == 1:
            return
        different = different_replicas(self._saved_tensors(), self.ranks)
        if different:
            raise ExperimentError(
                messages.replicas_differ(self.step, different, self._last_checkpoint())
            )

    def _elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.launched

    def _evaluation_due(self) -> bool:
        return self.step % self.config.eval_every == 0 or self.step == self.config.max_steps

    def evaluate(self) -> None:
        """Appends a row with the mean loss over held-out text, and rewrites the results."""
        validation = self._validate()
        if validation is None:
            # A signal stopped it. `run` has saved before; the resumed run evaluates this step.
            return
        row = dict(step=self.step, **validation, elapsed_seconds=self._elapsed())
        if self.config.sample_tokens:
            n_tokens = min(EVALUATION_SAMPLE, self.config.sample_tokens)
            sample = self._sample_if_possible(n_tokens)
            if sample is not None:
                row["sample"] = sample["text"]
            elif self.stop.requested:  # the same
                return
        self.record.append(row)
        _say_above_bar(messages.evaluation(row))
        self._write_results()
        self.ranks.wait_for_all()  # for the first one's sample, results and curves

    @torch.no_grad()
    def _validate(self) -> dict | None:
        """Mean loss and accuracy over the same held-out sequences each time.

        They are spread over the held-out text, and are the same for every micro-batch. None when a
        signal requests a stop meanwhile.
        """
        self.model.eval()
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        tokens = 0
        for inputs, targets in self._validation_bar():
            _, metrics = self.model(inputs.to(self.device), targets.to(self.device))
            if self.stop.requested:
                break
            # On the host: the rows that fill up the last batch have no targets.
            num_targets = int((targets != IGNORED_TARGET).sum())
            loss_sum = loss_sum + metrics["cross_entropy"] * num_targets
            correct = correct + metrics["correct"]
            tokens += num_targets
        # Not in the loop: a rank may have no batch, and all ranks must leave at the same place.
        if self.stop.requested:
            return None
        # float64: the counts of all ranks stay exact.
        sums = torch.tensor([loss_sum.item(), correct.item(), tokens], dtype=torch.float64)
        loss, correct, tokens = self.ranks.sum(sums.to(self.device)).tolist()
        loss /= tokens
        return dict(
            val_loss=loss,
            val_perplexity=perplexity(loss),
            val_accuracy=correct / tokens,
            val_tokens=int(tokens),
        )

    def _validation_bar(self) -> tqdm:
        """The batches of an evaluation, behind a progress bar."""
        with self.ranks.together():  # one of them may be unable to read
            batches = list(data.validation_batches(self.corpus.validation, self.config))
        return tqdm(
            batches[self.ranks.rank :: self.ranks.size],
            desc=f"validation at step {self.step}",
            leave=False,
            file=sys.stdout,
            dynamic_ncols=True,
            disable=not sys.stdout.isatty(),
        )

    def _sample(self, n_tokens: int) -> dict[str, str] | None:
        """A continuation of the first validation tokens, with the same draws every time.

        None when a signal requests a stop meanwhile.
        """
        self.model.eval()
        prompt = self.corpus.validation[:SAMPLE_PROMPT].astype("int64").tolist()
        new = []
        with any_order():
            for [token] in stream(self.model, prompt, n_tokens, temperature=0.8, top_k=50, seed=0):
                if self.stop.requested:
                    return None
                new.append(token)
        decode = self.corpus.tokenizer.decode
        return dict(prompt=decode(prompt), text=decode(new))

    def _sample_if_possible(self, n_tokens: int) -> dict[str, str] | None:
        return self.side_work.value("the sample", lambda: self._sample(n_tokens))

    def _write_results(self) -> None:
        """Rewrites training_results.json with a part of the rows; the curves if they are old."""
        self.side_work.run(RESULTS, self._make_results)
        if self.record.curves_are_old():
            self.side_work.run(CURVES, self._draw_curves)
        if RUN in self.side_work.failing:
            self.side_work.run(RUN, self._write_run_file)

    def _write_last_results(self, sample: dict | None = None) -> None:
        """What a run leaves at a stop and at its end: all rows, results and curves.

        `sample` holds the texts `prompt` and `text` (see `_sample`) at the end of a run.
        """
        actions = {
            METRICS: self.record.write_rows,
            RESULTS: lambda: self._make_results(sample, all_rows=True),
            CURVES: self._draw_curves,
        }
        if RUN in self.side_work.failing:
            actions[RUN] = self._write_run_file
        self.side_work.finish(actions)

    def _make_results(self, sample: dict | None = None, all_rows: bool = False) -> None:
        speed = None
        if self.train_seconds:
            speed = self.tokens_seen / self.train_seconds
        totals = dict(
            steps=self.step,
            tokens=self.tokens_seen,
            skipped_steps=self.skipped_steps,
            train_seconds=self.train_seconds,
            elapsed_seconds=self._elapsed(),
            tokens_per_second=speed,
            ranks=self.ranks.size,
            seconds_to_first_step=self.seconds_to_first_step,
        )
        # Both hold GB by component of the memory table.
        memory_gb = dict(predicted=self.predicted, measured=self.meter.measured_gb)
        self.record.write_results(
            self.config, self.device, self.corpus, memory_gb, totals, sample, all_rows
        )

    def _draw_curves(self) -> None:
        """Draws training_curves.png anew; whole or not at all."""
        self.record.note_curves()
        total = format_count(self.config.total_params)
        active = format_count(self.config.active_params)
        plot_training_curves(
            self.record.history,
            self.folder / CURVES,
            title=f"{total} parameters, {active} active",
            unigram_cross_entropy=self.corpus.unigram_cross_entropy,
            resumed_at=self.record.resume_points,
        )

    # ------------------------------------------------------------ checkpoints

    def _save_if_due(self) -> None:
        """Saves when a checkpoint is due, or when one that failed is tried again.

        A failure costs the run nothing but this checkpoint. It is tried again after the next step.
        While it fails, the number of steps between the attempts doubles: a large checkpoint takes
        minutes to fill a disk up.
        """
        retrying = self.retry_save_at is not None and self.step >= self.retry_save_at
        numbered = self.checkpoints.numbered_due(self.step)
        by_time = self.save_now
        if self.ranks.size == 1:
            by_time = self.checkpoints.latest_due(self.step)
        if not (numbered or retrying or by_time):
            return
        if retrying and self.config.save_every:
            numbered = True
        self._try_to_save(numbered)

    def _try_to_save(self, numbered: bool) -> None:
        try:
            self.save(numbered)
        except Exception as error:
            steps_until_retry = 2**self.failed_saves
            self.retry_save_at = self.step + steps_until_retry
            self.failed_saves += 1
            warn(messages.save_failed(self.step, cause_of(error), self.retry_save_at))

    def _save_last(self) -> checkpoint.CheckpointError | None:
        """Saves the state in which the run ends, unless it is on disk already.

        Returns the error if that fails: the caller raises it when the results are written.
        """
        if not self.checkpoints.enabled or self.checkpoints.last_saved_step == self.step:
            return None
        cause = ""
        for pause in PAUSES:
            time.sleep(pause)
            try:
                self.save(numbered=self.checkpoints.numbered_due(self.step))
            except Exception as error:
                cause = cause_of(error)
            else:
                return None
        text = messages.last_save_failed(self.step, cause, self._last_checkpoint())
        return checkpoint.CheckpointError(text)

    def save(self, numbered: bool) -> None:
        """Writes a numbered checkpoint and links the latest to it, or writes the latest alone."""
        with self._shown("saving"), self.stop.saving():
            if numbered:
                self._save_numbered()
            else:
                self._save_latest()
            self.checkpoints.note_saved(self.step)
        if self.failed_saves:
            warn(messages.saved_after_all(self.step))
        self.failed_saves = 0
        self.retry_save_at = None
        # The new checkpoint is safe: old ones that cannot be deleted take space and nothing else.
        self.side_work.run("deleting old checkpoints", self.checkpoints.delete_oldest)

    def _save_latest(self) -> None:
        with self.ranks.together():
            if self.ranks.is_first:
                self.checkpoints.begin_latest()
            state = self.state_dict()
        checkpoint.save(self.checkpoints.latest, state, self.ranks)

    def _save_numbered(self) -> None:
        """All ranks write the file. The first one does all else in the folder."""
        with self.ranks.together():
            if self.ranks.is_first:
                self.checkpoints.begin_numbered(self.step)
            state = self.state_dict()
        path = checkpoint.step_path(self.folder, self.step)
        checkpoint.save(path, state, self.ranks)
        with self.ranks.together():
            if self.ranks.is_first:
                self.checkpoints.finish_numbered(path)

    @contextlib.contextmanager
    def _shown(self, work: str) -> Iterator[None]:
        """Names what the run is at work on, in the bar's place for metrics."""
        if self.bar.disable:
            yield
            return
        metrics = self.bar.postfix or ""
        self.bar.set_postfix_str(work)
        try:
            yield
        finally:
            self.bar.set_postfix_str(metrics)

    def checkpoint_bytes_to_come(self) -> int:
        """Bytes of disk that this run's checkpoints still take."""
        return self.checkpoints.bytes_to_come(self.step)

    def _last_checkpoint(self) -> str:
        return messages.last_checkpoint(self.checkpoints.latest)

    def _saved_tensors(self) -> dict[str, Tensor]:
        """The model's tensors that a checkpoint holds, by name."""
        return self.parameters | self.model.balancing_biases()

    def state_dict(self) -> dict:
        """Everything that a resumed run needs to end in the same bits; see record/checkpoint.py."""
        schedule = dict(
            step=self.step,
            max_steps=self.config.max_steps,
            factor=lr_schedule(self.step, self.config),
        )
        return dict(
            config=dataclasses.asdict(self.requested_config),
            **{name: getattr(self, name) for name in PROGRESS},
            skipped_data=self.skipped_data,
            saved_steps=self.checkpoints.saved_steps,
            lineage=self.lineage,
            model=self._model_state(),
            optimizer={name: self._optimizer_state(name) for name in self.optimizers},
            schedule=schedule,
            loss_scaler=self.scaler.state_dict(),
            random=checkpoint.random_states(self.device),
            data=data_identity(self.corpus),
            tokenizer_json=self.corpus.tokenizer_json,
            metrics=self.record.latest(),
            interval=self.interval.sums,
        )

    def _model_state(self) -> dict:
        state = {name: tensor.detach() for name, tensor in self._saved_tensors().items()}
        if self.ranks.size > 1:
            state |= rows_of_shards(self.gradients.owned, self.parameters, self.ranks)
        return state

    def _optimizer_state(self, name: str) -> dict:
        """An optimizer's state. With several ranks each tensor is the rows that this one owns."""
        state = self.optimizers[name].state_dict()
        if self.ranks.size > 1:
            names = self.optimizer_groups[name].parameters
            parameters = {parameter: self.parameters[parameter] for parameter in names}
            dtypes = self.optimizers[name].state.dtypes
            state["state"] = rows_of_states(state["state"], parameters, dtypes, self.ranks)
        return state

    def load_state_dict(self, state: dict) -> None:
        """Copies a checkpoint's state into this run. Raises CheckpointError if it does not fit."""
        try:
            self._load_tensors(state["model"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizer"][name])
            self.scaler.load_state_dict(state["loss_scaler"])
            for name in PROGRESS:
                setattr(self, name, state[name])
            self.skipped_data = state.get("skipped_data", [])  # older checkpoints have none
            self.checkpoints.count_own(state["saved_steps"], self.run_id)
            self.interval = Interval(self._copied(state["interval"]))
            checkpoint.restore_random_states(state["random"], self.device)
        except (KeyError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"the checkpoint does not match this program's model: {error}. Resume it with "
                "the version of the program that wrote it."
            ) from error

    @torch.no_grad()
    def _load_tensors(self, saved: dict[str, Tensor]) -> None:
        for name, tensor in self._saved_tensors().items():
            source = saved[name]
            if source.shape != tensor.shape or source.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} is {source.dtype} {tuple(source.shape)}, "
                    f"not {tensor.dtype} {tuple(tensor.shape)}"
                )
            tensor.copy_(source)

    def _copied(self, sums: dict) -> dict:
        """The sums, with their tensors copied.

        A loaded tensor is mapped from the checkpoint's file. While it lives, the disk space of that
        file stays taken, even if the file is deleted.
        """
        copied = {}
        for key, value in sums.items():
            if isinstance(value, Tensor):
                value = value.to(self.device, copy=True)
            copied[key] = value
        return copied

    # ------------------------------------------------------------ errors

    @contextlib.contextmanager
    def _results_of_an_error(self) -> Iterator[None]:
        """When a run ends in an error, writes results and curves that show its last steps.

        Where the error leaves the weights as they were, such as data that cannot be read any more,
        the last step is saved too.
        """
        try:
            yield
        except (Diverged, OutOfMemory):
            self._write_last_results()
            raise
        except ExperimentError as error:
            # Ranks can save only together. An error of this rank alone ends all of them.
            if self.ranks.size == 1 or error.of_all_ranks:
                self._save_before_error()
            self._write_last_results()
            if error.of_all_ranks:
                self.ranks.wait_for_all()  # the others' end would be the first one's
            raise
        except Exception:
            self._write_last_results()
            raise

    def _save_before_error(self) -> None:
        if not self.step_seconds:  # nothing was trained
            return
        not_saved = self._save_last()
        if not_saved is not None:
            warn(f"warning: {not_saved}")
        elif self.checkpoints.enabled:
            warn(messages.stopped(self.step, self.folder, saving=True))

    @contextlib.contextmanager
    def _out_of_memory_advice(self) -> Iterator[None]:
        """Turns an out-of-memory error of PyTorch or Python into one that says what would fit."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            message = messages.out_of_memory(
                self.config, self.machine, self.step + 1, self._last_checkpoint()
            )
            raise OutOfMemory(message) from error


def _say_above_bar(text: str) -> None:
    """Prints a text above the progress bars, if there are any, with lines that fit the terminal."""
    tqdm.write(fitted(text, sys.stdout), file=sys.stdout)
    sys.stdout.flush()


def _check_same_rules(state: dict, corpus: data.Corpus) -> None:
    """Raises ExperimentError when a checkpoint was trained under another version of the rules.

    Otherwise the run would train on text that it held out before, and nothing would show it.
    """
    rules = checkpoint.data_rules(state)
    if rules != corpus.rules:
        raise ExperimentError(messages.other_rules(rules, corpus.rules))


def _check_same_data(saved: dict, corpus: data.Corpus) -> None:
    """Raises ExperimentError when a checkpoint was trained on other text or tokens."""
    for key, trained, option in (
        ("data_hash", "on other text", "data"),
        ("tokenizer_hash", "with another tokenizer", "tokenizer"),
    ):
        found = getattr(corpus, key)
        # None: the model was imported, and not trained on any text since.
        if saved[key] not in (None, found):
            raise ExperimentError(messages.other_data(key, trained, option, saved[key], found))
