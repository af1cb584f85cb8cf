"""What a run says: on the console, and in the errors that end it.

Every function returns a text. The trainer prints it or raises it.
"""

from config import Config, optimizer_groups
from planner.choice import candidates, next_smaller
from planner.layout import format_count, format_duration, format_rate, format_size
from planner.machine import Machine
from planner.plan import memory_table

# Repeated data is worth much less than new data beyond this many passes (Muennighoff et al. 2023).
WORTHWHILE_PASSES = 4

# ---------------------------------------------------------------- before the first step


def _machine_memory(machine: Machine) -> str:
    if machine.name:
        return f"{machine.name}, {format_size(machine.memory_gb)}"
    return f"CPU, {format_size(machine.host_memory_gb)} free"


def memory_plan(config: Config, predicted: dict, machine: Machine) -> str:
    """The resolved choices that cost memory, and the table of what is predicted."""
    mode: str = config.activation_checkpointing
    last_mode = config.checkpointing_of(config.n_layers - 1)
    if last_mode != mode:  # the last blocks recompute less than the others
        mode = f"{mode} ({last_mode} in the last {config.lighter_blocks} blocks)"
    state = "on the device"
    if config.offload_optimizer == "true":
        state = "in host memory (optimizer offload)"
    capacity_gb = machine.memory_gb or machine.host_gb_of_a_gpu
    table = memory_table(predicted, optimizer_groups(config), capacity_gb=capacity_gb)
    return (
        f"Memory on {_machine_memory(machine)}: activation checkpointing {mode}, "
        f"optimizer state {state}\n{table}"
    )


def not_expected_to_fit(machine: Machine, advice: str) -> str:
    return (
        "warning: this configuration is not expected to fit "
        f"({_machine_memory(machine)}). {advice}."
    )


def reserving_host_memory(host_gb: float) -> str:
    return f"Reserving {format_size(host_gb)} of host memory for what is offloaded ..."


def no_host_memory(needed_gb: float, free_gb: float) -> str:
    return (
        f"no host memory for offload: what is offloaded takes {format_size(needed_gb)} and "
        f"{format_size(free_gb)} are free. Use a smaller preset or --offload_optimizer false; if "
        "the host has more than the operating system reports, say so with --host_memory_gb."
    )


def forecast(config: Config, corpus) -> str:
    """Two lines before the first step: the size of the corpus, and the length of the run.

    `corpus` is a data.Corpus. The length is in steps, in tokens and in passes over the corpus.
    """
    tokens = config.max_steps * config.tokens_per_step
    return (
        f"Corpus {config.data}: {len(corpus.train):,} training tokens, "
        f"{len(corpus.validation):,} validation tokens, "
        f"their unigram cross-entropy {corpus.unigram_cross_entropy:.3f} nats\n"
        f"The run: {config.max_steps:,} steps of {config.tokens_per_step:,} tokens, "
        f"{format_count(tokens)} tokens, {_passes(config, corpus):.2f} passes over the corpus"
    )


def forecast_warnings(config: Config, corpus, on_cpu: bool, resumed: bool) -> list[str]:
    """What a user might want to change before the first step."""
    warnings = []
    passes = _passes(config, corpus)
    if passes > WORTHWHILE_PASSES:
        warnings.append(
            f"warning: {passes:.1f} passes over the corpus; beyond about {WORTHWHILE_PASSES} "
            "repeated data is worth much less than new (Muennighoff et al. 2023). "
            "Use more --data or fewer --max_steps."
        )
    if on_cpu and config.precision != "fp32":
        note = f"note: {config.precision} is slow on a CPU"
        if not resumed:  # a resumed run keeps its precision
            note += "; --precision fp32 is faster there"
        warnings.append(note)
    return warnings


def _passes(config: Config, corpus) -> float:
    """How often the run sees each training token."""
    return config.max_steps * config.tokens_per_step / max(1, len(corpus.train))


# ---------------------------------------------------------------- while it runs


def schedule_changed(before: dict[str, float], now: dict[str, float]) -> str:
    """`before` and `now` are learning rates by optimizer."""
    changes = []
    for name, lr in now.items():
        was = format_rate(before[name])
        changes.append(f"{name}_lr continues at {format_rate(lr)}, where it was {was}")
    return f"The schedule is another: {'; '.join(changes)}."


def data_skipped(step: int, steps: int, sequences: int) -> str:
    return (
        f"The data of the {steps:,} steps after step {step:,} are skipped: {sequences:,} sequences."
    )


def first_speed(config: Config, seconds_per_step: float, steps_left: int, ranks: int = 1) -> str:
    tokens_per_second = config.tokens_per_step / seconds_per_step
    time_left = format_duration(seconds_per_step * steps_left)
    return (
        f"{_speed(tokens_per_second, ranks)} in the first steps: "
        f"{time_left} to go for {steps_left:,} steps"
    )


def _speed(tokens_per_second: float, ranks: int) -> str:
    """The speed of all ranks together."""
    speed = f"{tokens_per_second:,.0f} tokens/s"
    if ranks > 1:
        speed += f" on {ranks} ranks"
    return speed


def progress_fields(row: dict, config: Config) -> list[str]:
    """What a row of training metrics says of the run, the most wanted first.

    A progress bar shows as many as have room, a log line all of them.
    """
    steps_left = config.max_steps - row["step"]
    seconds_left = steps_left * config.tokens_per_step / row["tokens_per_second"]
    fields = [
        f"loss {row['train_loss']:.3f}",
        _speed(row["tokens_per_second"], row.get("ranks", 1)),
        f"{format_duration(seconds_left)} left",
    ]
    if "expert_load" in row:
        # The share of a block's routed tokens that one of its experts gets.
        shares = [share for layer in row["expert_load"] for share in layer]
        fields.append(f"busiest expert {max(shares):.2f}")
    fields.append(f"perplexity {row['train_perplexity']:.1f}")
    fields.append(f"accuracy {row['train_accuracy']:.3f}")
    fields.append(f"norm {row['grad_norm']:.2f}")
    for key, value in row.items():
        if key.endswith("_lr"):
            fields.append(f"{key} {format_rate(value)}")
    if "expert_load" in row:
        fields.append(f"balancing loss {row['load_balancing_loss']:.3f}")
    if row["mfu"]:
        fields.append(f"MFU {row['mfu']:.3f}")
    fields.append(format_size(row["memory_peak_gb"]))
    return fields


# Columns that a progress bar needs for itself: " |", a block, and "|".
BAR_COLUMNS = 4


def progress_bar(row: dict, config: Config, columns: int) -> str:
    """The fields that fit beside the counter of steps, for a terminal of so many columns."""
    counter = f"{row['step']}/{config.max_steps}"
    shown = ""
    for field in progress_fields(row, config):
        longer = f"{shown}, {field}"
        if len(counter) + len(longer) + BAR_COLUMNS > columns:
            break
        shown = longer
    return shown.removeprefix(", ")


def progress_line(row: dict, config: Config) -> str:
    """A row of training metrics as a line of a log."""
    return f"step {row['step']}/{config.max_steps}: {', '.join(progress_fields(row, config))}"


def evaluation(row: dict) -> str:
    return (
        f"step {row['step']}: validation loss {row['val_loss']:.4f}, "
        f"perplexity {row['val_perplexity']:.2f}, accuracy {row['val_accuracy']:.4f}"
    )


def spike(step: int, norm: float, usual: float, parameter: str) -> str:
    return f"step {step}: gradient norm {norm:.2f}, usually {usual:.2f}; largest in {parameter}"


def overflow(config: Config, step: int, loss_scale: float) -> str:
    """`loss_scale` is the one after the overflow. Only fp16 has one."""
    if config.precision == "fp16":
        return f"step {step}: the gradients overflowed; batch skipped, loss scale {loss_scale:g}"
    return f"step {step}: the gradients are inf or nan; batch skipped"


def save_failed(step: int, cause: str, retry_at: int) -> str:
    return (
        f"warning: step {step}: {cause}\n"
        f"  Training continues; saving is tried again after step {retry_at}."
    )


def saved_after_all(step: int) -> str:
    return f"note: step {step}: the checkpoint is saved; saving works again"


# ---------------------------------------------------------------- the end


def nothing_left(step: int) -> str:
    return f"Nothing is left to train: the run ended at step {step}. More: --max_steps N"


def stopped(step: int, save_dir, saving: bool, ranks: int = 1, machines: int = 1) -> str:
    """After a signal; `saving` says whether the run saves checkpoints at all.

    `ranks` are those of all `machines`. A checkpoint does not hold their number.
    """
    remedy = "Saving is off (save_every=0, save_minutes=0), so nothing was saved."
    options = f"--save_dir {save_dir} --resume latest"
    if saving and machines > 1:
        remedy = f"Go on with the command that started it on each machine, and {options}"
    elif saving:
        gpus = ""
        if ranks > 1:
            gpus = f"--gpus {ranks} "
        remedy = f"Go on with: python run_experiment.py {gpus}{options}"
    return f"\nStopped at step {step}. {remedy}"


def sample(prompt: str, text: str) -> str:
    return f"\nA sample (prompt | continuation):\n{prompt}|{text}\n"


def done(
    steps: int, tokens: int, loss: float, unigram_cross_entropy: float, results, curves
) -> str:
    """`loss` is the last validation loss. `results` and `curves` are the paths of two files.

    `unigram_cross_entropy` is the same text's loss under training's token frequencies.
    """
    return (
        f"Done: {steps} steps, {format_count(tokens)} tokens, "
        f"validation loss {loss:.4f} (unigram cross-entropy {unigram_cross_entropy:.4f}).\n"
        f"{results}, {curves}"
    )


# ---------------------------------------------------------------- errors


def replicas_differ(step: int, names: list[str], last_checkpoint: str) -> str:
    """For ExperimentError. `names` are the parameters that differ."""
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += f" and {len(names) - 3} more"
    return (
        f"the GPUs' copies of the model differ after step {step} (in {shown}): the training since "
        "the last check cannot be trusted. Hardware faults can do this: compare with --gpus 1, and "
        f"test each GPU. {last_checkpoint}"
    )


def loss_not_finite(
    config: Config, loss: float, step: int, metrics_file, last_checkpoint: str
) -> str:
    precision_remedy = ""
    if config.precision == "fp16":
        precision_remedy = (
            " With --precision bf16 nothing overflows at 65,504, fp16's largest number."
        )
    return (
        f"the loss is {loss} in the forward pass at step {step}: training has diverged."
        f"{precision_remedy}\n"
        f"  {_lower_learning_rates(config)}, "
        f"raise --warmup_fraction (now {config.warmup_fraction:g}), "
        f"look at grad_norm in {metrics_file}, check the data.\n  {last_checkpoint}"
    )


def gradients_not_finite(
    config: Config, batches: int, loss_scale: float, step: int, last_checkpoint: str
) -> str:
    other_precision = {
        "fp16": ", or try --precision bf16",
        "bf16": ", or try --precision fp32",
        "fp32": "",
    }
    at_smallest_scale = ""
    if config.precision == "fp16":  # the only precision with a loss scale
        at_smallest_scale = f" at the smallest loss scale, {loss_scale:g},"
    return (
        f"{batches} batches in a row gave inf or nan gradients{at_smallest_scale} "
        f"before step {step}: training has diverged.\n"
        f"  {_lower_learning_rates(config)}, "
        f"raise --warmup_fraction{other_precision[config.precision]}.\n  {last_checkpoint}"
    )


def _lower_learning_rates(config: Config) -> str:
    return f"Lower --muon_lr (now {config.muon_lr:g}) and --adamw_lr (now {config.adamw_lr:g})"


def last_checkpoint(latest) -> str:
    if latest.exists():
        return f"The last checkpoint is {latest}."
    return "No checkpoint was saved yet."


def way_back(latest) -> str:
    """For a run that diverged, perhaps because of the data after its last checkpoints."""
    text = last_checkpoint(latest)
    if latest.exists():
        text += " Go back further and leave out data: --resume FILE --skip_steps N."
    return text


def last_save_failed(step: int, cause: str, last_checkpoint: str) -> str:
    return f"the run ends at step {step} and is not saved: {cause}\n  {last_checkpoint}"


def out_of_memory(config: Config, machine: Machine, step: int, last_checkpoint: str) -> str:
    """What the machine has, what was predicted, and what to try.

    It names the options of the fastest choice that needs less memory than the run's own, at the
    same number of tokens per step. `config` is resolved: no field of it is auto.
    """
    device = machine.name or "the CPU"
    memory_gb = machine.memory_gb or machine.host_memory_gb
    # With one value for each field there is one candidate: the choice that the run uses.
    [used] = candidates(
        config,
        modes=[config.activation_checkpointing],
        offloads=[config.offload_optimizer == "true"],
        batches=[config.batch_size],
        machine=machine,
    )
    predicted_gb = used.memory_gb["total"]
    smaller = next_smaller(config, used, machine)
    if smaller is None:
        remedy = (
            "Nothing smaller is left for this model: lower --max_seq_len or use a smaller --preset."
        )
    else:
        remedy = (
            "Next smaller choice, at the same tokens per step "
            f"({format_size(smaller.memory_gb['total'])}): {smaller.options(config)}"
        )
    return (
        f"out of memory at step {step} on {device} ({format_size(memory_gb)}; "
        f"predicted {format_size(predicted_gb)}).\n  {remedy}\n  {last_checkpoint}"
    )


def other_rules(saved: int, found: int) -> str:
    return (
        f"the checkpoint was trained under version {saved} of the rules of data (split and "
        f"windows), and this corpus was made under version {found}: the run would train on text "
        f"that it held out. Prepare the corpus under version {saved}, as --resume does, or start a "
        "new run with another --save_dir."
    )


def data_of_ranks_differ(rank: int, config: Config) -> str:
    return (
        f"rank {rank} finds other text or another tokenizer than the first rank in {config.data}. "
        "All machines need the same: put it on a shared file system, or copy it anew"
    )


def other_data(key: str, trained: str, option: str, saved: str, found: str) -> str:
    """`trained` is "on other text" or "with another tokenizer"; `saved` and `found` are hashes."""
    return (
        f"the checkpoint was trained {trained} ({key} {saved[:12]}, here {found[:12]}). "
        f"Resume it with the same --{option} as before, unchanged, or start a new run with another "
        "--save_dir."
    )
