"""What `plan` reports."""

import pytest

from config import PRESETS, Config, optimizer_groups
from planner.machine import find_machine
from planner.plan import build_plan, memory_table
from planner.speed import MeasuredRun

COMPONENTS = ("weights", "gradients", "master", "momentum", "adamw", "activations", "workspace")
GROUPS = optimizer_groups(Config())


def test_table():
    sizes = dict.fromkeys((*COMPONENTS, "host"), 0.0) | dict(
        weights=10.0, gradients=10.0, activations=2.25, total=22.25
    )
    lines = memory_table(sizes, GROUPS, capacity_gb=25).splitlines()
    assert lines[0].split() == ["Component", "Predicted"] and set(lines[1]) == {"-"}
    assert len({len(line) for line in lines}) == 1 and "Host" not in "".join(lines)
    cells = {line[:30].strip(): line[30:].strip() for line in lines[2:]}
    assert cells["Model weights"] == "10.00 GB"
    assert cells["Activations"] == "2.25 GB"
    assert cells["Total"] == "22.25 GB"
    assert cells["Headroom"] == "2.75 GB" and len(cells) == len(COMPONENTS) + 2

    measured = dict(weights=10.0, activations=3.0, total=24.0)
    lines = memory_table(sizes | dict(host=70.0), GROUPS, measured, 25).splitlines()
    cells = {line[:30].strip(): line[30:].split() for line in lines[2:]}
    assert cells["Activations"] == ["2.25", "GB", "3.00", "GB"]
    assert cells["Headroom"] == ["2.75", "GB", "1.00", "GB"]
    assert cells["Gradients"][-1] == "-"
    assert cells["Host memory (offloaded state)"] == ["70.00", "GB", "-"]
    assert "4.0 MB" in memory_table(dict.fromkeys((*COMPONENTS, "host", "total"), 0.004), GROUPS)


def test_the_measured_speed_is_what_the_caller_gives():
    config = Config(**PRESETS["18b"])
    machine = find_machine(gpu="h200")
    without = build_plan(config, "18b", machine)
    assert without["tokens_per_second"] is None and without["hours"] is None
    assert without["predicted_tokens_per_second"] is without["predicted_hours"] is None

    of_other_options = MeasuredRun("18b", "fp16", "h200", 10_000.0, None)
    plan = build_plan(config, "18b", machine, [of_other_options])
    tokens = config.tokens_per_step * config.max_steps
    assert plan["hours"] == tokens / 10_000 / 3600
    assert plan["measured_with"] == "options that its file does not name"

    # of several runs the one with the planned options counts
    same = MeasuredRun("18b", "fp16", "h200", 9_000.0, plan["options"])
    plan = build_plan(config, "18b", machine, [of_other_options, same])
    assert (plan["tokens_per_second"], plan["measured_with"]) == (9_000.0, plan["options"])


def test_a_plan_names_the_fastest_options_too():
    plan = build_plan(Config(**PRESETS["18b"]), "18b", find_machine(gpu="h200"))
    assert "--activation_checkpointing selective" in plan["options"]
    assert "--activation_checkpointing none" in plan["fastest_options"]
    assert plan["gpu_tested"]
    nowhere = build_plan(Config(**PRESETS["18b"]), "18b", find_machine(gpu="l4"))
    assert nowhere["fastest_options"] is None and not nowhere["gpu_tested"]


def test_a_plan_of_several_gpus():
    config = Config(**PRESETS["18b"])
    one = build_plan(config, "18b", find_machine(gpu="h200"))
    assert (one["gpus"], one["gpus_per_node"]) == (1, 1)
    assert one["reduce_gradients"] is one["traffic"] is one["needed_batch"] is None
    assert "reduce_gradients" not in one["choice"] and "reduce" not in one["options"]

    run = MeasuredRun("18b", "fp16", "h200", 9_000.0, one["options"])
    four = build_plan(config, "18b", find_machine(gpu="h200", gpus=4), [run])
    assert four["fits"] and (four["gpus"], four["gpus_per_node"]) == (4, 4)
    assert four["needed_batch"] is None and four["reduce_gradients"] == "micro_batch"
    assert four["tokens_per_second"] is None, "one GPU's speed is none of four"
    of_four = MeasuredRun("18b", "fp16", "h200", 30_000.0, four["options"], gpus=4)
    machine = find_machine(gpu="h200", gpus=4)
    assert build_plan(config, "18b", machine, [run, of_four])["tokens_per_second"] == 30_000
    assert 3.5 < four["predicted_tokens_per_second"] / 9_000 < 4.5
    # two micro-batches, of whose gradients a GPU sends all but its own quarter
    sent = 2 * 0.75 * one["memory_gb"]["gradients"]
    assert four["traffic"]["gradients_gb"] == pytest.approx(sent, abs=0.01)
    assert four["traffic"]["machines_gb"] == 0
    # host memory that nobody stated grows with the GPUs
    assert (one["host_memory_gb"], four["host_memory_gb"]) == (128, 512)


def test_a_plan_of_several_machines_names_the_batch_that_they_need():
    config = Config(**PRESETS["18b"])
    machine = find_machine(gpu="h200", gpus=8, machines=8)
    plan = build_plan(config, "18b", machine)
    assert (plan["gpus"], plan["gpus_per_node"]) == (64, 8)
    needed = plan["needed_batch"]
    assert (needed["batch_size"], needed["gradient_accumulation_steps"]) == (1, 64)
    assert needed["reason"] == "64 GPUs need as many micro-batches a step"
    assert needed["another_training"] and plan["tokens_per_step"] == 2 * config.tokens_per_step
    assert plan["options"].startswith("--batch_size 1 --gradient_accumulation_steps 64 ")
    # owners are within a machine: each has an eighth of the state, and sums it with 7 others
    eight = build_plan(config, "18b", find_machine(gpu="h200", gpus=8))
    assert plan["memory_gb"]["momentum"] == eight["memory_gb"]["momentum"]
    gradients_gb = build_plan(config, "18b", find_machine(gpu="h200"))["memory_gb"]["gradients"]
    assert plan["traffic"]["machines_gb"] == pytest.approx(2 * 7 / 8 * gradients_gb / 8, abs=0.01)


def test_a_plan_of_several_gpus_says_where_the_micro_batch_does_not_fit():
    config = Config(**PRESETS["18b"] | dict(batch_size=16, gradient_accumulation_steps=2))
    plan = build_plan(config, "18b", find_machine(gpu="h100", gpus=2))
    needed = plan["needed_batch"]
    assert plan["fits"] and not plan["as_configured"] and needed["another_training"]
    assert needed["reason"] == "the requested micro-batch does not fit"
    assert needed["batch_size"] < 16 and "keeps the tokens of a step" in needed["difference"]
