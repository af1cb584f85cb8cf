"""Optimizer state and gradients in host memory: results are those of everything on the device."""

import contextlib
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from config import ExperimentError
from engine import offload
from engine.offload import GradientOffload, OptimizerState
from engine.precision import gradient_norms
from model import MoETransformer
from muon import AdamW, build_optimizers
from tests.helpers import tiny_config

# ---------------------------------------------------------------- streams


class RecordedStream:
    """A stream of CUDA that does nothing, and writes down what it is told in a log of all streams."""

    def __init__(self, name: str, log: list[str]):
        self.name = name
        self.log = log

    def wait_stream(self, other) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def record_event(self):
        name = f"event {sum('records' in line for line in self.log)}"
        self.log.append(f"{self.name} records {name}")
        return SimpleNamespace(
            name=name, synchronize=lambda: self.log.append(f"the CPU waits for {name}")
        )


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What CUDA would be told, in order, on a machine without it."""
    lines: list[str] = []
    compute = RecordedStream("compute", lines)
    side_streams = iter([RecordedStream("inward", lines), RecordedStream("outward", lines)])
    current = [compute]

    @contextlib.contextmanager
    def stream(other):
        current.append(other)
        yield
        current.pop()

    def copy_(self, source, non_blocking=False):
        lines.append(f"copy on {current[-1].name}")
        return self

    monkeypatch.setattr(torch.cuda, "Stream", lambda: next(side_streams))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda _, stream: lines.append(f"kept for {stream.name}")
    )
    return lines


def test_buckets_wait_for_what_they_need_and_no_more(log, monkeypatch):
    """Three buckets of one vector each: i + 1 arrives and i - 1 leaves while i is worked on."""
    monkeypatch.setattr(OptimizerState, "BUCKET", 4)
    named = {name: torch.zeros(4, requires_grad=True) for name in "abc"}
    for p in named.values():
        p.grad = torch.zeros(4)
    monkeypatch.setattr(offload, "copier_for", lambda device: offload.StreamCopier())
    owner = OptimizerState(named, ("m",), lambda p: torch.float32, True, False)
    for _ in owner.buckets():
        log.append("work")

    def fetch(event: int) -> list[str]:
        return ["inward waits for compute", "copy on inward", f"inward records event {event}"]

    def work(event: int) -> list[str]:
        return [f"compute waits for event {event}", "work"]

    def send(event: int) -> list[str]:
        return [
            "outward waits for compute",
            "copy on outward",
            "kept for outward",
            f"outward records event {event}",
        ]

    assert log == [
        "inward waits for outward",
        *fetch(0),
        *fetch(1),
        *work(0),
        *send(2),
        *fetch(3),
        *work(1),
        *send(4),
        *work(3),
        *send(5),
        "compute waits for outward",
    ]


def test_the_cpu_fetches_a_bucket_when_the_one_before_the_last_has_left(log, monkeypatch):
    copier = offload.StreamCopier()
    for _ in range(3):
        copier.end_batch()
        copier.throttle()
    assert [line for line in log if "CPU" in line] == [
        "the CPU waits for event 0",
        "the CPU waits for event 1",
    ]


# ---------------------------------------------------------------- optimizer state


def parameters(dtype=torch.bfloat16):
    shapes = {"matrix": (6, 10), "bank": (3, 2, 4, 5), "vector": (7,), "idle": (2, 2)}
    named = {
        name: torch.zeros(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()
    }
    for name, p in named.items():
        p.grad = None if name == "idle" else torch.zeros_like(p)
    return named


def state_of(named, offload=False, matrices=False):
    return OptimizerState(named, ("m", "v"), lambda p: torch.float32, offload, matrices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_only_16_bit_parameters_have_a_residual(dtype):
    for tensors in state_of(parameters(dtype)).tensors.values():
        kinds = {"m": torch.float32, "v": torch.float32} | (
            {} if dtype == torch.float32 else {"residual": torch.int16}
        )
        assert {key: t.dtype for key, t in tensors.items()} == kinds


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("matrices", [False, True])
def test_buckets_cover_each_element_once_and_stay_small(monkeypatch, offload, matrices):
    monkeypatch.setattr(OptimizerState, "BUCKET", 45)
    named = parameters()
    if matrices:
        del named["vector"]
    owner = state_of(named, offload, matrices)
    for bucket in owner.buckets():
        assert sum(weight.numel() for weight, *_ in bucket) <= (
            60 if matrices else 45
        )  # a single matrix may be larger
        assert not matrices or len({weight.shape[1:] for weight, *_ in bucket}) == 1
        for weight, gradient, state in bucket:
            assert weight.shape == gradient.shape == state["m"].shape == state["residual"].shape
            assert not matrices or weight.ndim == 3
            for tensor in (weight, gradient, state["m"], state["residual"]):
                tensor += 1
    for name, p in named.items():
        expected = 0 if name == "idle" else 1
        assert all(
            (t == expected).all()
            for t in (p, owner.tensors[name]["m"], owner.tensors[name]["residual"])
        )
        assert (owner.tensors[name]["v"] == 0).all() and (p.grad is None or (p.grad == 1).all())


def test_state_survives_a_round_trip_in_dtype_value_and_place():
    saved, loaded = state_of(parameters()), state_of(parameters())
    saved.tensors["bank"]["residual"].fill_(12345)
    saved.tensors["bank"]["v"].fill_(1e-12)
    places = {key: t.data_ptr() for key, t in loaded.tensors["bank"].items()}
    loaded.load_state_dict(saved.state_dict())
    bank = loaded.tensors["bank"]
    assert (bank["residual"] == 12345).all() and (bank["v"] == torch.tensor(1e-12)).all()
    assert (bank["residual"].dtype, bank["v"].dtype) == (torch.int16, torch.float32)
    assert {key: t.data_ptr() for key, t in bank.items()} == places


@pytest.mark.parametrize(
    "spoil, found",
    [
        (lambda s: s.pop("vector"), "vector"),
        (lambda s: s.update(more=s["vector"]), "more"),
        (lambda s: s["bank"].pop("m"), "bank/m.*nothing"),
        (lambda s: s["bank"].update(m=torch.zeros(3)), r"bank/m.*\(3,\)"),
        (lambda s: s["bank"].update(m=s["bank"]["m"].half()), "bank/m.*float16"),
        (lambda s: s["bank"].update(w=torch.zeros(3)), "bank.*w"),
    ],
    ids=[
        "parameter missing",
        "parameter unknown",
        "tensor missing",
        "shape",
        "dtype",
        "tensor unknown",
    ],
)
def test_state_of_another_kind_is_refused(spoil, found):
    saved = state_of(parameters()).state_dict()
    spoil(saved)
    with pytest.raises(ValueError, match=found):
        state_of(parameters()).load_state_dict(saved)


def test_lack_of_host_memory_names_the_remedy(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("can't allocate memory")

    named = parameters()
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(
        ExperimentError, match=r"can't allocate memory(.|\n)*--offload_optimizer false"
    ):
        state_of(named, offload=True)


# ---------------------------------------------------------------- gradients

MICRO_BATCHES = 3


def trained(host_blocks: int, steps: int = 2, **changes):
    """Norms of each step's gradients, and weights and state after them."""
    config = tiny_config(moe_every=2, init_std=0.2, **changes)
    model = MoETransformer(config)
    sums = GradientOffload(model, host_blocks)
    parameters = dict(model.named_parameters())
    optimizers = build_optimizers(config, parameters, offload=True, gradient_offload=sums)
    norms = []
    tokens = torch.randint(
        264, (steps, MICRO_BATCHES, 2, 17), generator=torch.Generator().manual_seed(0)
    )
    for step in tokens:
        for i, batch in enumerate(step):
            loss, _ = model(batch[:, :-1], batch[:, 1:])
            sums.micro_batch(i, MICRO_BATCHES)
            loss.backward()
        on_host = {name for name, p in parameters.items() if p.grad is None}
        assert on_host == set(sums.tensors)
        norms.append(gradient_norms(list(parameters.values()), sums.norms))
        for optimizer in optimizers.values():
            optimizer.step(0.01, 0.5)
        for p in parameters.values():
            p.grad = None
    state = {
        f"{name} {key}": t
        for o in optimizers.values()
        for name, tensors in o.state.tensors.items()
        for key, t in tensors.items()
    }
    return torch.stack(norms), {name: p.detach() for name, p in parameters.items()} | state, sums


@functools.cache
def trained_on_the_device(precision: str, mode: str):
    norms, tensors, _ = trained(0, precision=precision, activation_checkpointing=mode)
    return norms, tensors


@pytest.mark.parametrize(
    "precision, mode",
    [
        ("fp32", "none"),
        pytest.param("bf16", "full", marks=pytest.mark.slow),
        pytest.param("fp16", "selective", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_gradients_summed_on_the_host_are_those_summed_on_the_device_to_the_bit(
    precision, mode, blocks
):
    changes = dict(precision=precision, activation_checkpointing=mode)
    norms, found, sums = trained(blocks, **changes)
    expected_norms, expected = trained_on_the_device(precision, mode)
    assert torch.equal(norms, expected_norms) and norms.min() > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name.split(".")[1] for name in sums.tensors} == {str(i) for i in range(blocks)}, (
        "those of the first blocks"
    )


def test_adamw_reads_gradients_from_the_host_too():
    config = tiny_config(init_std=0.2)
    results = []
    for blocks in (0, 4):
        model = MoETransformer(config)
        sums = GradientOffload(model, blocks)
        adamw = AdamW(
            dict(model.named_parameters()), config, 0.1, offload=True, gradient_offload=sums
        )
        tokens = torch.arange(34).view(2, 17)
        sums.micro_batch(0, 1)
        model(tokens[:, :-1], tokens[:, 1:])[0].backward()
        adamw.step(0.01, 1.0)
        results.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_no_more_than_two_blocks_sums_are_fetched_at_a_time(monkeypatch):
    """What a step takes on the device is bounded: the sums of a block and of the next."""
    largest, blocks, fetch = [], [], GradientOffload._fetch

    def watched(self, i):
        fetch(self, i)
        largest.append(len(self.fetched))
        if i >= 0:
            blocks.append(i)

    monkeypatch.setattr(GradientOffload, "_fetch", watched)
    trained(4)
    assert max(largest) == 2
    assert blocks == [3, 2, 1, 0] * (len(blocks) // 4), "each once in a pass, two ahead"


def test_the_sums_do_not_outlive_their_owner():
    model = MoETransformer(tiny_config())
    weak = weakref.ref(GradientOffload(model, 4))
    gc.collect()
    assert weak() is None
    tokens = torch.arange(34).view(2, 17)
    model(tokens[:, :-1], tokens[:, 1:])[0].backward()
    assert all(p.grad is not None for p in model.parameters()), (
        "without it gradients stay where they are"
    )


def test_lack_of_host_memory_for_gradients_is_said(monkeypatch):
    def zeros(*args, **kwargs):
        raise RuntimeError("not enough memory")

    model = MoETransformer(tiny_config())
    monkeypatch.setattr(offload.torch, "zeros", zeros)
    with pytest.raises(ExperimentError, match="no host memory for optimizer and gradient offload"):
        GradientOffload(model, 2)
