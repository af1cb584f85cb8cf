import errno
import gc
import itertools
import json
import math
import os
import random
import resource
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import ConfigError
from record import archive, checkpoint
from record import latest as latest_file
from record.checkpoint import CheckpointError
from tests.helpers import tiny_config, write_checkpoint

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a, b):
    """Equal in type, structure and every bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.stride() == b.stride()
            and not a.requires_grad
        )
        assert raw(a) == raw(b)
    else:
        assert json.dumps(a) == json.dumps(b)


def example(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "embed.weight": torch.randn(20, 8, generator=g),
            "w.low": torch.arange(50, dtype=torch.int16) - 9,
            "w.high": torch.randn(50, generator=g).bfloat16(),
        },
        "optimizer": {"muon": {"step": 7, "momentum": torch.randn(8, 20, generator=g).t()}},
        "rng": torch.get_rng_state()[:100].clone(),
        "step": 123,
        "best": math.inf,
        "losses": [1.5, None, True, "é"],
    }


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("mmap", [True, False])
def test_every_dtype_shape_and_stride(tmp_path, mmap):
    base = torch.randint(0, 2, (5, 6, 7))
    state = {
        str(d): {
            "full": base.to(d),
            "scalar": base[1, 2, 3].to(d),
            "empty": base.to(d)[:0],
            "transposed": base.to(d).transpose(0, 2),
            "slice": base.to(d)[2:4],
        }
        for d in DTYPES
    }
    checkpoint.save(tmp_path / "c.pt", state)
    assert_same(state, checkpoint.load(tmp_path / "c.pt", mmap=mmap))
    assert names(tmp_path) == ["c.pt"]


def test_extreme_bits(tmp_path):
    bits = torch.arange(
        -(2**15), 2**15, dtype=torch.int16
    )  # every bfloat16 and float16, all NaNs included
    state = {"bf16": bits.clone().view(torch.bfloat16), "fp16": bits.clone().view(torch.float16)}
    checkpoint.save(tmp_path / "c.pt", state)
    assert_same(state, checkpoint.load(tmp_path / "c.pt"))


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.text(max_size=5), plain_values, max_size=4))
def test_plain_values(tmp_path, state):
    checkpoint.save(tmp_path / "c.pt", state)
    assert_same(state, checkpoint.load(tmp_path / "c.pt"))


def test_torch_alone_opens_it(tmp_path):
    checkpoint.save(tmp_path / "c.pt", example())
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state.pop("format") == 1
    assert set(state.pop("checksums")) == {
        "model/embed.weight",
        "model/w.low",
        "model/w.high",
        "rng",
        "plain values",
        "optimizer/muon/momentum",
    }
    assert_same(state, example() | {"rng": state["rng"]})


def test_views_store_only_their_bytes(tmp_path):
    large = torch.randn(1000, 1000)
    state = {
        "rows": large[10:12],
        "column": large[:, 3],
        "one": large[5, 5],
        "last": large[-1],
        "wide": large[:1].expand(3, -1),
    }
    checkpoint.save(tmp_path / "c.pt", state)
    assert (tmp_path / "c.pt").stat().st_size < 4 * (2000 + 1000 + 1 + 1000 + 3000) + 5000
    loaded = checkpoint.load(tmp_path / "c.pt")
    for key in state:
        assert torch.equal(state[key], loaded[key])


def test_compacting_copies_nothing_and_keeps_memory_alive():
    large = torch.arange(1000.0)
    view = archive.compact({"v": large[100:200]})["v"]
    assert view.data_ptr() == large[100:].data_ptr() and view.untyped_storage().nbytes() == 400
    del large
    gc.collect()
    noise = [torch.zeros(1000) for _ in range(20)]
    assert torch.equal(view, torch.arange(100.0, 200.0)) and noise


def test_shared_tensors_are_stored_once(tmp_path):
    weight = torch.randn(100_000)
    flat = torch.randn(200_000)
    state = {
        "embed": weight,
        "head": weight,
        "a": flat[:100_000],
        "b": flat[:100_000].view(100, 1000),
        "bits": weight.view(torch.int32),
    }
    checkpoint.save(tmp_path / "c.pt", state)
    assert (tmp_path / "c.pt").stat().st_size < 3 * 400_000 + 10_000  # "bits" is a copy
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert_same(state, loaded)
    assert (
        loaded["embed"].data_ptr() == loaded["head"].data_ptr()
        and loaded["a"].data_ptr() == loaded["b"].data_ptr()
    )


def test_parameters_and_dict_subclasses_become_plain(tmp_path):
    model = torch.nn.Linear(3, 2)
    checkpoint.save(
        tmp_path / "c.pt", {"model": model.state_dict(), "p": model.weight, "o": OrderedDict(x=1)}
    )
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert (
        type(loaded["model"]) is dict
        and type(loaded["o"]) is dict
        and type(loaded["p"]) is torch.Tensor
    )
    assert torch.equal(loaded["p"], model.weight) and not loaded["p"].requires_grad


@pytest.mark.parametrize(
    "value",
    [
        (1, 2),
        {1: 2},
        {1, 2},
        b"x",
        1j,
        [torch.ones(1)],
        object(),
        torch.half,
        Path("x"),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
)
def test_other_types_are_refused(tmp_path, value):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "c.pt", {"a": {"b": value}})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "state",
    [
        {"format": 1},
        {"checksums": {}},
        {"plain values": torch.ones(1)},
        [1],
        {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}},
    ],
)
def test_reserved_and_ambiguous_keys_are_refused(tmp_path, state):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "c.pt", state)


# --- damage


def load_or_refuse(path, state, mmap=True):
    """Whether the file loads; if so it must hold `state`, if not it must be a CheckpointError naming the file."""
    try:
        loaded = checkpoint.load(path, mmap=mmap)
    except CheckpointError as error:
        assert str(path) in str(error)
        return False
    assert_same(state, loaded)
    return True


@pytest.mark.parametrize("mmap", [True, False])
def test_truncation(tmp_path, mmap):
    path = tmp_path / "c.pt"
    checkpoint.save(path, example())
    data = path.read_bytes()
    for length in [
        0,
        1,
        4,
        64,
        500,
        len(data) // 2,
        *range(len(data) - 1200, len(data), 37),
        len(data) - 1,
    ]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut short.*copy it again") as caught:
            checkpoint.load(path, mmap=mmap)
        assert str(path) in str(caught.value)


@pytest.mark.slow
def test_damaged_bytes_never_give_wrong_values(tmp_path):
    path = tmp_path / "c.pt"
    state = example()
    del state["model"]["embed.weight"], state["rng"]  # three tensors are enough, and load faster
    checkpoint.save(path, state)
    data = path.read_bytes()
    rng = random.Random(0)
    intact = 0
    for position in range(0, len(data), 3):
        flipped = data[position] ^ (1 << rng.randrange(8))
        other = (data[position] + rng.randrange(1, 256)) % 256
        value = rng.choice([flipped, other])
        path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
        intact += load_or_refuse(path, state, mmap=bool(rng.randrange(4)))
    assert intact > 0  # padding and the zip file's unused fields


def test_every_tensor_byte_and_every_plain_value_is_covered(tmp_path):
    path = tmp_path / "c.pt"
    state = {"t": torch.arange(64, dtype=torch.uint8) + 100, "text": "unmistakable", "x": 1234.5678}
    checkpoint.save(path, state)
    data = path.read_bytes()
    for needle in (bytes(range(100, 164)), b"unmistakable", b"\x40\x93\x4a\x45\x6d\x5c\xfa\xad"):
        start = data.index(needle)
        for position in range(start, start + len(needle)):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            with pytest.raises(CheckpointError, match="damaged"):
                checkpoint.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("step"),
        lambda s: s["model"].pop("w.low"),
        lambda s: s.update(extra=1),
        lambda s: s.update(step=123.0),
        lambda s: s.update(step=True),
        lambda s: s.update(best=-math.inf),
        lambda s: s["model"].update(new=torch.ones(1)),
        lambda s: s["losses"].reverse(),
        lambda s: s["model"].update({"w.low": s["model"]["w.low"].view(torch.float16)}),
        lambda s: s["model"].update({"w.low": s["model"]["w.low"].view(5, 10)}),
        lambda s: s["model"].update(
            {"embed.weight": s["model"]["embed.weight"].as_strided((20, 8), (1, 20))}
        ),
        lambda s: s["model"].update(
            {"w.low": torch.cat([s["model"]["w.low"], torch.ones(9, dtype=torch.int16)])[1:51]}
        ),
        lambda s: s["model"]["embed.weight"].requires_grad_(),
        lambda s: s["checksums"].pop("rng"),
        # A pickle stores equal strings once: one damaged byte renames both.
        lambda s: (
            s["model"].update({"w.lov": s["model"].pop("w.low")}),
            s["checksums"].update({"model/w.lov": s["checksums"].pop("model/w.low")}),
        ),
        lambda s: s.update(checksums=None),
        lambda s: s.update(checksums=[1]),
        lambda s: s.update(rng=(1,)),
        lambda s: s.update(format=torch.ones(2)),
        lambda s: s.update(format="1"),
        lambda s: s.update({5: 1}),
    ],
)
def test_tampered_contents(tmp_path, monkeypatch, change):
    monkeypatch.setattr(archive, "CHUNK", 100)
    path = tmp_path / "c.pt"
    checkpoint.save(path, example())
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="c.pt"):
        checkpoint.load(path)


Row = namedtuple("Row", "a")


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"hello\n",
        b"PK\x03\x04",
        b"\x80\x02.",
        b"\x00" * 5000,
        {"a": 1},
        [1],
        None,
        torch.ones(3),
        Row(1),
        OrderedDict(a=torch.ones(1)),
        random.Random,
    ],
)
def test_not_a_checkpoint(tmp_path, contents):
    path = tmp_path / "c.pt"
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    for mmap in (True, False):
        with pytest.raises(CheckpointError, match="c.pt"):
            checkpoint.load(path, mmap)


class Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["CHECKPOINT_TEST_FOLDER"],)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_TEST_FOLDER", str(tmp_path / "made"))
    torch.save({"format": 1, "checksums": {}, "a": Harmful()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        checkpoint.load(tmp_path / "c.pt")
    assert names(tmp_path) == ["c.pt"]


def test_newer_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(tmp_path / "c.pt", example())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2"):
        checkpoint.load(tmp_path / "c.pt")


def test_missing_file_names_other_checkpoints_newest_first(tmp_path):
    with pytest.raises(CheckpointError, match="no other checkpoint"):
        checkpoint.load(tmp_path / "checkpoint_step_5.pt")
    for time, step in enumerate((20, 100, 3)):
        checkpoint.step_path(tmp_path, step).touch()
        os.utime(checkpoint.step_path(tmp_path, step), (time, time))
    os.link(checkpoint.step_path(tmp_path, 3), checkpoint.latest_path(tmp_path))
    with pytest.raises(CheckpointError, match=r"step_3.pt, .*step_100.pt, checkpoint_step_20.pt"):
        checkpoint.load(tmp_path / "checkpoint_step_5.pt")
    with pytest.raises(CheckpointError) as caught:  # a link to the damaged file is no way out
        checkpoint.load(checkpoint.step_path(tmp_path, 3))
    assert "latest" not in str(caught.value)
    with pytest.raises(CheckpointError, match="directory"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.load(tmp_path / "missing" / "c.pt")


def test_shapes_of_no_bytes_are_covered():
    assert archive._checksum(torch.empty(3, 0)) != archive._checksum(torch.empty(4, 0))


# --- failures while writing


class StopsWriting:
    """A file that fails in the middle, like a full disk."""

    def __init__(self, file, after, error):
        self.file, self.left, self.error = file, after, error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.file.write(data)


@pytest.mark.parametrize("after", [0, 1, 5, 12])
@pytest.mark.parametrize(
    "error, expected, text",
    [
        (OSError(errno.ENOSPC, "x"), CheckpointError, "No space left on device"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("odd"), CheckpointError, None),
    ],
)
def test_failure_while_writing_keeps_the_old_file(
    tmp_path, monkeypatch, after, error, expected, text
):
    path = tmp_path / "checkpoint_latest.pt"
    checkpoint.save(path, example(1))

    def open_one_that_stops(*arguments):
        return StopsWriting(open(*arguments), after, error)  # noqa: SIM115

    monkeypatch.setattr(checkpoint, "open", open_one_that_stops, raising=False)
    with pytest.raises(expected, match=text) as caught:
        checkpoint.save(path, example(2))
    if expected is CheckpointError:
        for part in (str(path), "GB are free", "untouched", "--save_every 0"):
            assert part in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint_latest.pt"]
    assert_same(checkpoint.load(path)["model"], example(1)["model"])
    torch.save(
        torch.ones(3), tmp_path / "other.pt"
    )  # nothing that torch.save reads is left changed
    assert torch.load(tmp_path / "other.pt").sum() == 3


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize(
    "error, expected",
    [(OSError(errno.ENOSPC, "x"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failure_while_writing_tensors_keeps_the_old_file(
    tmp_path, monkeypatch, after, error, expected
):
    path, calls, pwrite = tmp_path / "checkpoint_latest.pt", [], os.pwrite
    checkpoint.save(path, example(1))

    def fails(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise error
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(expected):
        checkpoint.save(path, example(2))
    monkeypatch.undo()
    assert calls and names(tmp_path) == ["checkpoint_latest.pt"]
    assert_same(checkpoint.load(path)["model"], example(1)["model"])


def test_chunks_and_short_writes(tmp_path, monkeypatch):
    """Tensors of many chunks, and a system that takes only a part of what it is given."""
    pwrite = os.pwrite
    monkeypatch.setattr(archive, "CHUNK", 100)
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: pwrite(handle, data[:33], place))
    checkpoint.save(tmp_path / "c.pt", example(1))
    assert_same(checkpoint.load(tmp_path / "c.pt")["model"], example(1)["model"])


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failure_after_writing(tmp_path, monkeypatch, function):
    def fail(*_):
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.save(tmp_path / "c.pt", example())
    assert names(tmp_path) == []


def test_a_real_size_limit(tmp_path, capfd):
    """The system itself refuses bytes: those of torch.save's own writing, and those of the tensors."""
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": torch.ones(1000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # Python ignores SIGXFSZ
    try:
        for n in (130_000, 1_000_000):
            with pytest.raises(CheckpointError, match="File too large"):
                checkpoint.save(path, {"a": torch.zeros(n)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr().err == ""
    assert names(tmp_path) == ["c.pt"]
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(1000))


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file", Path("/proc")):
        with pytest.raises(CheckpointError, match="save_dir"):
            checkpoint.save(folder / "c.pt", example())


def test_the_file_and_then_the_folder_are_synced(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: done.append(Path(f"/proc/self/fd/{handle}").readlink().name)
    )
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    checkpoint.save(tmp_path / "c.pt", {"a": torch.ones(3)})
    assert done == [".c.pt.tmp", "replace", tmp_path.name]


def test_the_checksum_reads_in_chunks(tmp_path, monkeypatch):
    state = {"a": torch.randn(1000), "b": torch.randn(10, 10).t()}
    checkpoint.save(tmp_path / "c.pt", state)
    monkeypatch.setattr(archive, "CHUNK", 96)
    assert_same(state, checkpoint.load(tmp_path / "c.pt"))


# --- latest, pruning, space


def test_latest_is_a_hard_link(tmp_path):
    latest = checkpoint.latest_path(tmp_path)
    for step in (1, 1, 2):
        path = checkpoint.step_path(tmp_path, step)
        if not path.exists():
            checkpoint.save(path, {"step": step})
        latest_file.link_latest(path, latest)
        assert latest.stat().st_ino == path.stat().st_ino and not latest.is_symlink()
        assert not any(name.endswith(".tmp") for name in names(tmp_path))
    assert names(tmp_path) == [
        "checkpoint_latest.pt",
        "checkpoint_step_1.pt",
        "checkpoint_step_2.pt",
    ]
    checkpoint.save(latest, {"step": 3})  # must not write through the link
    assert checkpoint.load(path) == {"step": 2} and checkpoint.load(latest) == {"step": 3}


def test_latest_falls_back_to_a_symbolic_link(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EPERM, "x")

    monkeypatch.setattr(os, "link", fail)
    latest = checkpoint.latest_path(tmp_path / "run")
    (tmp_path / "run").mkdir()
    for step in (1, 2, 2):
        checkpoint.save(checkpoint.step_path(tmp_path / "run", step), {"step": step})
        latest_file.link_latest(checkpoint.step_path(tmp_path / "run", step), latest)
        assert latest.readlink() == Path(f"checkpoint_step_{step}.pt")
    assert names(latest.parent) == [
        "checkpoint_latest.pt",
        "checkpoint_step_1.pt",
        "checkpoint_step_2.pt",
    ]
    (tmp_path / "run").rename(tmp_path / "moved")
    assert checkpoint.load(checkpoint.latest_path(tmp_path / "moved")) == {"step": 2}
    checkpoint.save(checkpoint.latest_path(tmp_path / "moved"), {"step": 3})
    assert checkpoint.load(checkpoint.step_path(tmp_path / "moved", 2)) == {"step": 2}


def test_latest_replaces_a_dangling_link_and_refuses_a_missing_file(tmp_path):
    latest = checkpoint.latest_path(tmp_path)
    latest.symlink_to("gone.pt")
    path = checkpoint.step_path(tmp_path, 1)
    with pytest.raises(CheckpointError):
        latest_file.link_latest(path, latest)
    checkpoint.save(path, {"step": 1})
    latest_file.link_latest(path, latest)
    assert path.samefile(latest) and len(names(tmp_path)) == 2
    path.unlink()
    with pytest.raises(CheckpointError):
        latest_file.link_latest(path, latest)
    assert names(tmp_path) == ["checkpoint_latest.pt"]


def test_a_leftover_link_is_not_written_through(tmp_path):
    path = checkpoint.step_path(tmp_path, 1)
    checkpoint.save(path, {"step": 1})
    os.link(path, tmp_path / ".checkpoint_latest.pt.tmp")  # killed between link and replace
    checkpoint.save(checkpoint.latest_path(tmp_path), {"step": 2})
    assert checkpoint.load(path) == {"step": 1} and len(names(tmp_path)) == 2


def test_prune(tmp_path):
    for step in (5, 10, 20, 100, 1000):
        checkpoint.step_path(tmp_path, step).touch()
    assert latest_file.prune(tmp_path, [], 1) == []
    assert latest_file.prune(tmp_path, [100, 5, 10], 3) == [5, 10, 100]
    assert latest_file.prune(tmp_path, [100, 5, 10, 7], 2) == [
        10,
        100,
    ]  # 7 was deleted by someone else
    assert latest_file.prune(tmp_path, [10, 100], 1) == [100]
    assert names(tmp_path) == [
        "checkpoint_step_100.pt",
        "checkpoint_step_1000.pt",
        "checkpoint_step_20.pt",
    ]
    checkpoint.latest_path(tmp_path).symlink_to("checkpoint_step_20.pt")
    assert latest_file.prune(tmp_path, [20, 100, 1000], 1) == [20, 1000]


@pytest.mark.parametrize("save_every", [0, 1, 3, 10, 25])
@pytest.mark.parametrize("save_minutes", [0, 5])
def test_files_to_come_are_those_that_a_run_writes(save_every, save_minutes):
    """Against a run that is played step by step, and saves by time in each step that it can."""
    for max_steps, keep, step, there, own_latest in itertools.product(
        (10, 25), (1, 3), (0, 4, 10), (0, 1, 3), (False, True)
    ):
        config = tiny_config(
            max_steps=max_steps,
            save_every=save_every,
            save_minutes=save_minutes,
            keep_checkpoints=keep,
        )
        numbered, own, most = there, own_latest, there + own_latest
        for now in range(step + 1, max_steps + 1):
            if save_every and (now % save_every == 0 or now == max_steps):
                most = max(most, numbered + 1 + own)
                numbered, own = min(numbered + 1, keep), False
            elif save_minutes:
                most = max(most, numbered + own + 1)
                own = True
        needed = most - there - own_latest
        found = checkpoint.files_to_come(config, step, there, own_latest)
        # The file saved by time may never be written, or not while there are most of the others.
        by_time = bool(save_minutes and step < max_steps)
        assert needed <= found <= needed + by_time, (max_steps, keep, step, there, own_latest)


def test_free_space(tmp_path):
    folder = tmp_path / "a" / "b"
    checkpoint.check_free_space(folder, 1000)
    assert folder.is_dir() and names(folder) == []
    with pytest.raises(CheckpointError, match="1,000,000,000.00 GB are needed") as caught:
        checkpoint.check_free_space(folder, 10**18)
    for part in (
        str(folder),
        "are free",
        "--keep_checkpoints",
        "--save_every 0 --save_minutes 0",
        "--save_dir",
    ):
        assert part in str(caught.value)
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "x", "/proc/x", "/proc"):
        with pytest.raises(CheckpointError, match="--save_dir"):
            checkpoint.check_free_space(bad, 0)


def test_leftovers(tmp_path):
    keep = {".other.tmp", "checkpoint_step_1.pt", "metrics.jsonl"}
    for name in keep | {".checkpoint_step_2.pt.tmp", ".checkpoint_latest.pt.tmp"}:
        (tmp_path / name).touch()
    latest_file.remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == keep
    latest_file.remove_leftovers(tmp_path / "missing")


# --- opening a model


def test_a_third_optimizer_changes_nothing_here(tmp_path):
    """A model is opened from every group's masters, whatever the groups are called."""
    config = tiny_config(precision="bf16")
    state = write_checkpoint(tmp_path / "two.pt", config)
    head = state["optimizer"]["adamw"]["state"].pop("head.weight")
    state["optimizer"]["sgd"] = dict(state={"head.weight": head})
    checkpoint.save(tmp_path / "three.pt", state)
    two, _ = checkpoint.load_model(tmp_path / "two.pt")
    three, _ = checkpoint.load_model(tmp_path / "three.pt")
    assert_same(two.state_dict(), three.state_dict())
    assert not torch.equal(three.head.weight, state["model"]["head.weight"].float()), "the master"


def test_a_model_is_opened_in_the_precision_that_is_named(tmp_path):
    state = write_checkpoint(tmp_path / "c.pt", tiny_config(precision="bf16"))
    model, config, same = checkpoint.open_model(str(tmp_path / "c.pt"), "cpu", None)
    assert model.head.weight.dtype == torch.float32, "fp32 on a CPU"
    assert config.precision == "bf16" and same["step"] == state["step"]
    model, _, _ = checkpoint.open_model(str(tmp_path / "c.pt"), "cpu", "bf16")
    assert torch.equal(model.head.weight, state["model"]["head.weight"])
    with pytest.raises(ConfigError, match="is a folder"):
        checkpoint.open_model(str(tmp_path), "cpu", None)
