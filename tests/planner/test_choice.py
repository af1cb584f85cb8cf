"""The choice that follows from the predicted bytes."""

import dataclasses
import itertools

import pytest

from config import PRESET_BY_GPU_MEMORY, PRESETS, Config, ConfigError, OutOfMemory
from planner.choice import (
    Choice,
    advise,
    apply_choice,
    candidates,
    check_fits,
    check_weights,
    choose,
    could_fit,
    fastest,
    next_smaller,
    relative_time,
    resolve_autos,
)
from planner.machine import CONTEXT_GB, GPUS, USABLE, Machine, find_machine
from planner.sizes import MemoryPredictor, predict_memory

MACHINES = {name: find_machine(gpu=name) for name in GPUS}
MODES = ("none", "selective", "full")


def config_of(preset: str, **changes) -> Config:
    return Config(**{**PRESETS[preset], **changes})


@pytest.mark.parametrize("preset, gpu", itertools.product(PRESETS, GPUS))
def test_every_preset_has_a_sane_choice_on_every_gpu(preset, gpu):
    c, machine = config_of(preset), MACHINES[gpu]
    choice, kept = choose(c, machine, fixed_batch=False)
    applied = apply_choice(c, choice)
    assert applied.tokens_per_step == c.tokens_per_step and 1 <= choice.batch_size <= c.batch_size
    assert choice.memory_gb == predict_memory(
        applied,
        choice.activation_checkpointing,
        choice.batch_size,
        choice.offload_optimizer,
        choice.lighter_blocks,
    )
    fits = (
        choice.memory_gb["total"] <= (machine.memory_gb - CONTEXT_GB) * USABLE
        and choice.memory_gb["host"] <= 0.9 * machine.host_memory_gb
    )
    assert choice.fits(machine) == fits
    if not fits:
        assert not kept and not any(x.fits(machine) for x in candidates(c))
        assert choice.memory_gb["total"] == min(x.memory_gb["total"] for x in candidates(c))


@pytest.mark.parametrize(
    "preset, gpu, fits, expected",
    [
        ("18b", "b200", True, dict(batch_size=4, offload_optimizer=False)),
        ("18b", "h200", True, dict(batch_size=4, offload_optimizer=True)),
        ("18b", "h100", True, dict(batch_size=1, offload_optimizer=True, lighter_blocks=16)),
        (
            "18b",
            "rtx4090",
            False,
            # in micro-batches of 1 the optimizer's workspace would take as much
            dict(batch_size=2, offload_optimizer=True, activation_checkpointing="full"),
        ),
        ("25b", "h200", True, dict(offload_optimizer=True)),
        ("5b", "h100", True, dict(batch_size=4, offload_optimizer=False)),
        ("2b", "a100-40", True, dict(batch_size=4, offload_optimizer=False)),
        (
            "small",
            "rtx4090",
            True,
            dict(batch_size=16, offload_optimizer=False, activation_checkpointing="selective"),
        ),
        ("2b", "rtx4090", True, dict(batch_size=4, offload_optimizer=False)),
    ],
)
def test_known_answers(preset, gpu, fits, expected):
    host = 256 if preset == "25b" else 0
    machine = find_machine(host, gpu)
    choice, _ = choose(config_of(preset), machine, fixed_batch=False)
    assert choice.fits(machine) == fits and expected.items() <= dataclasses.asdict(choice).items()


def test_auto_is_full_with_as_many_selective_blocks_as_fit():
    """At the configured micro-batch, and never `none`: checkpointing stays on."""
    c = config_of("18b")
    assert c.activation_checkpointing == "auto"
    chosen = {}
    for memory_gb in (84, 90, 100, 120, 150, 165, 190, 230, 600):
        machine = Machine("a GPU", memory_gb, 1000)
        choice, kept = choose(c, machine, fixed_batch=False)
        assert kept and choice.fits(machine)
        mode = choice.activation_checkpointing
        chosen[memory_gb] = (mode, choice.batch_size, choice.offload_optimizer)
        if mode == "selective":
            assert choice.lighter_blocks == 0
        else:  # down to the last block
            more = predict_memory(
                c, mode, choice.batch_size, choice.offload_optimizer, choice.lighter_blocks + 1
            )
            assert choice.memory_gb["total"] <= machine.usable_gb < more["total"]
        if choice.batch_size == c.batch_size:
            assert choose(c, machine, fixed_batch=True)[0] == choice, "the run does what plan says"
    # the optimizer's state stays on the GPU as soon as `full` fits beside it
    assert chosen[150] == ("selective", 4, True) and chosen[165] == ("full", 4, False)
    assert chosen[230] == chosen[600] == ("selective", 4, False)
    # a smaller micro-batch only where the configured one does not fit
    assert chosen[84] == ("full", 1, True) and chosen[100][1] == 4


def test_auto_keeps_3_percent_of_the_gpu_free():
    for name, gpu in GPUS.items():
        for preset in ("18b", "5b", "2b", "small"):
            choice, _ = choose(config_of(preset), MACHINES[name], fixed_batch=False)
            if choice.fits(MACHINES[name]):
                assert choice.memory_gb["total"] <= 0.97 * gpu.memory_gb


def test_full_and_none_are_for_those_who_request_them():
    machine = MACHINES["h200"]
    for mode in MODES:
        c = config_of("2b", activation_checkpointing=mode)
        choice, kept = choose(c, machine, fixed_batch=True)
        assert kept and (choice.activation_checkpointing, choice.lighter_blocks) == (mode, 0)
    found = fastest(config_of("2b"), machine)
    assert found is not None and found.activation_checkpointing == "none"


def test_auto_on_a_cpu_is_selective_where_it_fits():
    choice, kept = choose(config_of("small"), Machine(None, 0, 200), fixed_batch=True)
    assert kept and choice.activation_checkpointing == "selective"
    assert not choice.offload_optimizer


@pytest.mark.parametrize("least_gb, preset", PRESET_BY_GPU_MEMORY)
def test_small_gpus_have_the_largest_preset_that_fits_without_offload(least_gb, preset):
    if preset not in ("2b", "small"):
        return

    def fits(memory_gb: float) -> bool:
        c = config_of(preset, offload_optimizer="false")
        return choose(c, Machine("a GPU", memory_gb, 64), fixed_batch=True)[1]

    assert fits(least_gb) and not fits(least_gb - 1.5)


def test_the_last_blocks_recompute_less_where_the_configuration_says_so():
    """And the plan is told: with all of them lighter it is the next mode; the backward pass of a full block needs no room beside
    the lighter ones' activations, which are gone by then."""
    c = config_of("18b", activation_checkpointing="full")
    full, selective = (
        predict_memory(c, mode, 2, offload=True)["total"] for mode in ("full", "selective")
    )
    totals = [
        predict_memory(c, "full", 2, True, lighter)["total"] for lighter in range(c.n_layers + 1)
    ]
    assert totals[0] == full and totals[-1] == selective and totals == sorted(totals)
    assert [c.checkpointing_of(i) for i in (0, 39)] == ["full", "full"]
    mixed = dataclasses.replace(c, lighter_blocks=1)
    assert [mixed.checkpointing_of(i) for i in (0, 38, 39)] == ["full", "full", "selective"]
    one, none = candidates(mixed, ["full"])[0], candidates(c, ["full"])[0]
    assert (one.lighter_blocks, none.lighter_blocks) == (1, 0) and {
        x.lighter_blocks for x in candidates(mixed)
    } == set(range(40))
    assert (
        "--lighter_blocks 1 " in one.options(c)
        and "lighter" not in none.options(c)
        and "--lighter_blocks 0 " in none.options(mixed)
    )
    assert apply_choice(c, one).lighter_blocks == 1


def test_advice_takes_back_lighter_blocks_that_do_not_fit():
    machine = find_machine(256, "h100")
    choice, kept = choose(
        config_of("18b", activation_checkpointing="auto"), machine, fixed_batch=False
    )
    assert kept and choice.lighter_blocks > 0
    less = next_smaller(apply_choice(config_of("18b"), choice), choice)
    assert less.memory_gb["total"] < 0.99 * choice.memory_gb["total"]
    choice, kept = choose(
        config_of("18b", activation_checkpointing="selective", lighter_blocks=38),
        machine,
        fixed_batch=False,
    )
    assert not kept and choice.fits(machine)


def test_what_the_configuration_fixes_is_kept_where_it_fits():
    big = Machine("a GPU", 1000, 1000)
    for mode, offload in itertools.product(MODES, ("true", "false")):
        choice, kept = choose(
            config_of("18b", activation_checkpointing=mode, offload_optimizer=offload),
            big,
            fixed_batch=True,
        )
        assert kept and (
            choice.activation_checkpointing,
            str(choice.offload_optimizer).lower(),
        ) == (mode, offload)
    choice, kept = choose(
        config_of("18b", offload_optimizer="false"), MACHINES["h200"], fixed_batch=False
    )
    assert not kept and choice.offload_optimizer and choice.fits(MACHINES["h200"]), (
        "fits, but not as configured"
    )
    choice, kept = choose(config_of("18b"), MACHINES["h100"], fixed_batch=True)
    assert not kept and choice.fits(MACHINES["h100"]) and choice.batch_size < 4


@pytest.mark.parametrize("preset, lighter", [("2b", 0), ("5b", 0), ("5b", 20), ("18b", 0)])
@pytest.mark.parametrize("gpu", ["rtx4090", "h100"])
def test_what_could_fit_is_what_a_search_of_all_candidates_finds(preset, lighter, gpu):
    c, machine = (
        Config(**PRESETS[preset] | dict(activation_checkpointing="full", lighter_blocks=lighter)),
        find_machine(0, gpu),
    )
    assert could_fit(c, machine) == choose(c, machine, fixed_batch=False)[0].fits(machine)


@pytest.mark.slow
def test_advice_is_never_refused_for_gradients_on_the_host():
    """They need a streamed optimizer state: advice without one takes them back, and what goes on as asked has one."""
    c = config_of("small", host_gradient_blocks=12)
    for machine in (Machine("a GPU", 8, 16), Machine("a GPU", 90, 16), Machine(None, 0, 16)):
        choice, _ = choose(c, machine, fixed_batch=True)
        assert choice.offload_optimizer or "--host_gradient_blocks 0 " in choice.options(c)
    less = [next_smaller(c, x) for x in candidates(c)]
    assert all(
        x is None or x.offload_optimizer or "--host_gradient_blocks 0 " in x.options(c)
        for x in less
    )


def test_the_gradients_of_all_blocks_may_be_advised_to_the_host():
    c = config_of("2b")
    on_host = dataclasses.replace(c, host_gradient_blocks=c.n_layers, offload_optimizer="true")
    least_gb = min(x.memory_gb["total"] for x in candidates(on_host))
    machine = Machine("a GPU", least_gb * 1.0001 / USABLE + CONTEXT_GB, 1000)
    advice, choice = advise(choose(c, machine, fixed_batch=False)[0], c, machine)
    assert f"--host_gradient_blocks {c.n_layers} " in advice and choice.fits(machine)


def test_streaming_needs_the_hosts_memory():
    c = config_of("18b")
    assert choose(c, Machine("a GPU", 150, 84), fixed_batch=False)[0].fits(
        Machine("a GPU", 150, 84)
    )
    assert not choose(c, Machine("a GPU", 150, 80), fixed_batch=False)[0].fits(
        Machine("a GPU", 150, 80)
    )
    small, cpu = config_of("small", precision="bf16"), Machine(None, 0, 200)
    assert choose(small, cpu, False)[0].memory_gb == predict_memory(
        small, "selective", 16, False, cpu=True
    ), "a CPU's figures"
    for machine in (cpu, Machine(None, 0, 20)):
        assert choose(c, machine, fixed_batch=False)[0].offload_optimizer is False, (
            "nothing to stream from on a CPU"
        )
    assert not Choice(1, 1, "full", False, dict(total=150, host=40)).fits(cpu)
    assert Choice(1, 1, "full", False, dict(total=140, host=30)).fits(cpu)


@pytest.mark.parametrize("preset", PRESETS)
def test_candidates_keep_the_tokens_of_a_step_and_smaller_needs_less(preset):
    c = config_of(preset)
    everything = candidates(c)
    assert {x.batch_size * x.gradient_accumulation_steps for x in everything} == {
        c.sequences_per_step
    }
    assert {x.batch_size for x in everything} == {
        b for b in range(1, c.batch_size + 1) if c.sequences_per_step % b == 0
    }
    smallest = min(x.memory_gb["total"] for x in everything)
    for used in everything[::17] + everything[-1:]:
        less = next_smaller(c, used)
        used_gb = used.memory_gb["total"]
        if less is None:
            assert smallest >= 0.99 * used_gb
        else:
            assert less.memory_gb["total"] < (0.95 if smallest < 0.95 * used_gb else 0.99) * used_gb
            assert less.batch_size * less.gradient_accumulation_steps == c.sequences_per_step


SHORT = dict(n_layers=6, moe_every=2)

CASES = [
    ("18b", dict(), "full", 60, 128),
    ("18b", dict(), "auto", 30, 128),
    ("5b", dict(), "selective", 8, 64),
    ("5b", dict(offload_optimizer="false"), "auto", 12, 64),
    ("18b", dict(host_gradient_blocks=2), "auto", 16, 500),
    ("18b", dict(), "none", 24, 16),
    ("18b", dict(), "full", 8, 500),
    ("2b", dict(lighter_blocks=3), "full", 6, 64),
]


@pytest.mark.parametrize("preset, changes, mode, gpu_gb, host_gb", CASES)
def test_the_search_finds_what_a_look_at_every_choice_finds(preset, changes, mode, gpu_gb, host_gb):
    c = config_of(preset, **SHORT | changes, activation_checkpointing=mode)
    machine = Machine("a GPU", gpu_gb, host_gb)
    choice, kept = choose(c, machine, fixed_batch=False)
    everything = candidates(c)
    fitting = [x for x in everything if x.fits(machine)]
    if not kept:
        expected = (
            fitting[0]
            if fitting
            else min(everything, key=lambda x: (x.memory_gb["total"], x.lighter_blocks))
        )
        assert choice == expected
    assert could_fit(c, machine) == bool(fitting)
    used_gb = choice.memory_gb["total"]
    less = [x for x in everything if x.memory_gb["total"] < 0.95 * used_gb]
    if less:
        assert next_smaller(c, choice) == less[0]


@pytest.mark.parametrize("gpu_gb", [6, 10, 14, 18, 22])
def test_as_few_gradients_go_to_the_host_as_a_look_at_every_number_finds(gpu_gb):
    c = config_of("18b", **SHORT)
    machine = Machine("a GPU", gpu_gb, 500)
    fitting = [
        blocks
        for blocks in range(c.n_layers + 1)
        if could_fit(
            dataclasses.replace(c, host_gradient_blocks=blocks, offload_optimizer="true"), machine
        )
    ]
    advice, _ = advise(choose(c, machine, fixed_batch=False)[0], c, machine)
    if not fitting:
        assert "smaller --preset" in advice
    elif fitting[0] > 0:
        assert f"--host_gradient_blocks {fitting[0]} " in advice
    else:
        assert "host_gradient_blocks" not in advice


@pytest.mark.parametrize("changes", [dict(), dict(batch_size=55_440, max_seq_len=16)])
@pytest.mark.slow
def test_a_plan_of_a_thousand_blocks_predicts_few_choices(monkeypatch, changes):
    """An answer within 3 seconds is held by the number of predictions, whatever the machine."""
    c = config_of("18b", n_layers=1000, activation_checkpointing="auto", **changes)
    predictions = []
    predict = MemoryPredictor.predict

    def counted(*arguments):
        predictions.append(1)
        return predict(*arguments)

    monkeypatch.setattr(MemoryPredictor, "predict", counted)
    machine = Machine("a GPU", 80, 10_000)
    choice, _ = choose(c, machine, fixed_batch=False)
    advise(choice, c, machine)
    possible = len([b for b in range(1, c.batch_size + 1) if c.sequences_per_step % b == 0])
    assert len(predictions) < 400 + 100 * possible


def test_advice_needs_no_preset_that_an_edited_default_makes_impossible(monkeypatch):
    """lighter_blocks=30 suits 18b's 40 blocks, and is refused for the 4 of tiny."""
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | dict(lighter_blocks=30))
    machine = MACHINES["rtx4090"]
    c = config_of("18b")
    advice, _ = advise(choose(c, machine, fixed_batch=False)[0], c, machine)
    assert advice.endswith("these fit: 2b small")


# ---------------------------------------------------------------- several GPUs


@pytest.mark.parametrize(
    "gpu, gpus, expected",
    [
        ("h200", 2, dict(reduce_gradients="step", activation_checkpointing="selective")),
        ("h200", 4, dict(reduce_gradients="micro_batch", offload_optimizer=False)),
        ("h200", 8, dict(reduce_gradients="step", offload_optimizer=False)),
        ("h100", 4, dict(reduce_gradients="micro_batch", activation_checkpointing="full")),
    ],
)
def test_known_answers_of_several_gpus(gpu, gpus, expected):
    c = config_of("18b")
    machine = find_machine(gpu=gpu, gpus=gpus)
    choice, kept = choose(c, machine, fixed_batch=False)
    assert kept and choice.fits(machine) and expected.items() <= dataclasses.asdict(choice).items()
    assert choice.batch_size == c.batch_size, "the number of GPUs chooses no training"
    assert choose(c, machine, fixed_batch=True)[0] == choice
    # nor where something else cannot be as configured
    fixed = dataclasses.replace(c, activation_checkpointing="none", offload_optimizer="false")
    choice_for_fixed, kept = choose(fixed, machine, fixed_batch=False)
    assert not kept and choice_for_fixed.batch_size == c.batch_size
    resolved, memory_gb, advised = resolve_autos(c, machine)
    assert advised is None and memory_gb == choice.memory_gb
    assert resolved.reduce_gradients == choice.reduce_gradients
    assert f"--reduce_gradients {choice.reduce_gradients} " in choice.options(c)


def test_more_gpus_recompute_and_offload_less():
    c = config_of("18b")
    times = []
    for gpus in (2, 4, 8):
        choice, _ = choose(c, find_machine(gpu="h100", gpus=gpus), fixed_batch=True)
        times.append(relative_time(c, choice, gpus))
    assert times == sorted(times, reverse=True) and times[0] > times[-1]
    # and none at all where that fits, though nobody requested it
    choice, _ = choose(config_of("5b"), find_machine(gpu="h200", gpus=2), fixed_batch=True)
    assert choice.activation_checkpointing == "none" and choice.reduce_gradients == "step"


@pytest.mark.parametrize(
    "gpu_gb, host_gb, gpus", [(20, 64, 2), (30, 10, 2), (16, 128, 4), (9, 64, 4)]
)
def test_several_gpus_take_the_fastest_of_every_choice(gpu_gb, host_gb, gpus):
    c = config_of("18b", **SHORT)
    machine = Machine("a GPU", gpu_gb, host_gb, gpus=gpus)
    choice, kept = choose(c, machine, fixed_batch=True)
    everything = candidates(c, batches=[c.batch_size], machine=machine)
    fitting = [x for x in everything if x.fits(machine)]
    assert kept == bool(fitting)
    if fitting:
        assert choice == fitting[0]
    assert could_fit(c, machine) == any(x.fits(machine) for x in candidates(c, machine=machine))


def test_the_configuration_fixes_how_gradients_are_reduced():
    machine = find_machine(gpu="b200", gpus=2)
    for reduction in ("step", "micro_batch"):
        c = config_of("5b", reduce_gradients=reduction)
        assert choose(c, machine, fixed_batch=True)[0].reduce_gradients == reduction
        assert choose(c, MACHINES["b200"], fixed_batch=True)[0].reduce_gradients is None
    assert resolve_autos(config_of("5b"), MACHINES["b200"])[0].reduce_gradients == "auto"


def test_several_gpus_resolve_all_fields_even_where_nothing_fits():
    c = config_of("18b", host_gradient_blocks=3, offload_optimizer="true")
    for memory_gb in (20, 150):
        machine = Machine("a GPU", memory_gb, 500, gpus=4)
        resolved, memory, advised = resolve_autos(c, machine)
        assert (advised is None) == (memory_gb == 150)
        assert resolved.reduce_gradients in ("step", "micro_batch")
        assert resolved.host_gradient_blocks == 0 and resolved.batch_size == c.batch_size
        # what a run reports when its memory runs out
        [used] = candidates(
            resolved,
            [resolved.activation_checkpointing],
            [resolved.offload_optimizer == "true"],
            [resolved.batch_size],
            machine,
        )
        assert used.memory_gb == memory
        less = next_smaller(resolved, used, machine)
        assert less is None or less.device_gb < used.device_gb


def test_gradients_in_host_memory_offload_nothing_on_several_gpus():
    c = config_of("5b", host_gradient_blocks=3)
    assert choose(c, MACHINES["b200"], fixed_batch=True)[0].offload_optimizer
    choice, _ = choose(c, find_machine(gpu="b200", gpus=2), fixed_batch=True)
    assert not choice.offload_optimizer and "--host_gradient_blocks 0 " in choice.options(c)


def test_every_candidate_has_a_micro_batch_for_each_gpu():
    machine = find_machine(gpu="b200", gpus=16)
    found = candidates(config_of("2b"), ["full"], [False], machine=machine)
    assert {x.gradient_accumulation_steps for x in found} == {16, 32}


def test_gpus_of_a_machine_share_its_host_memory():
    c = config_of("18b", activation_checkpointing="full", offload_optimizer="true")
    # 74.3 GB of state, whatever the number of GPUs
    assert choose(c, Machine("a GPU", 150, 84, gpus=4), fixed_batch=True)[1]
    short = Machine("a GPU", 70, 80, gpus=4)
    choice, kept = choose(c, short, fixed_batch=True)
    assert not kept and "the host, for each of 4 GPUs" in choice.shortage(short)
    advice, _ = advise(choice, c, short)
    assert "With 83 GB of host memory this would fit: " in advice

    nowhere = Machine("a GPU", 30, 500, gpus=4)
    advice, _ = advise(choose(c, nowhere, fixed_batch=True)[0], c, nowhere)
    assert advice.startswith("No choice for this model would fit: use more GPUs in a machine, or")


def test_processes_on_a_cpu_share_its_memory():
    c = config_of("small", activation_checkpointing="full")
    needed_gb = resolve_autos(c, Machine(None, 0, 20, gpus=2))[1]["total"]
    check_fits(c, Machine(None, 0, 2.5 * needed_gb, gpus=2))
    with pytest.raises(OutOfMemory, match="no memory for this run"):
        check_fits(c, Machine(None, 0, 1.5 * needed_gb, gpus=2))


def test_weights_that_leave_no_room_are_refused():
    check_weights(config_of("25b"), MACHINES["h100"])
    check_weights(config_of("18b"), find_machine(gpu="h100", gpus=8))
    with pytest.raises(ConfigError, match=r"weights take 49.3 GB, 58% of the memory of h100 "):
        check_weights(config_of("25b"), find_machine(gpu="h100", gpus=8))
