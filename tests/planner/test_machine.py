"""The machine that the plan is for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import ConfigError
from planner.machine import (
    GPUS,
    NCCL_GB,
    USABLE,
    Machine,
    available_host_memory_gb,
    find_machine,
    is_out_of_memory,
    known_gpu,
    process_memory_gb,
)


@pytest.mark.parametrize(
    "driver_name, expected",
    [
        ("NVIDIA B200", "b200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("AMD Instinct MI300X", "mi300x"),
        # other peaks or another memory than their namesakes
        ("NVIDIA L40", None),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 144G HBM3e", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_known_by_the_drivers_name(driver_name, expected):
    assert known_gpu(driver_name) == expected


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """driver(line) puts an nvidia-smi that answers `line`, and notes how it was called, first on PATH."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def install(line, code=0):
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\necho "$@" > "{tmp_path}/called"\necho "{line}"\nexit {code}\n'
        )
        script.chmod(0o755)
        return tmp_path / "called"

    return install


def test_the_first_visible_gpu_is_found(driver, monkeypatch):
    called = driver("NVIDIA H200, 143771")
    machine = find_machine()
    assert (machine.name, machine.key) == ("NVIDIA H200", "h200") and "--id=0" in called.read_text()
    assert machine.memory_gb == pytest.approx(GPUS["h200"].memory_gb, rel=0.005)
    assert machine.host_memory_gb == pytest.approx(available_host_memory_gb(), rel=0.1)
    assert find_machine(77).host_memory_gb == 77
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert find_machine().name == "NVIDIA H200" and "--id=3" in called.read_text()


def test_no_visible_gpu_is_a_cpu(driver, monkeypatch):
    driver("NVIDIA H200, 143771")
    assert find_machine(cpu=True).name is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_machine().name is None and find_machine().memory_gb == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for line, code in (
        ("NVIDIA-SMI has failed", 9),
        ("No devices were found", 6),
        ("", 0),
        ("NVIDIA H200, 143771", 9),
        ("NVIDIA GB10, [N/A]", 0),
    ):
        driver(line, code)
        assert find_machine().name is None, line
    monkeypatch.setenv("PATH", "")
    assert find_machine().name is None


def test_a_gpu_by_name():
    assert (
        find_machine(gpu="h100") == Machine("h100", 84.9, 128, "h100")
        and find_machine(64, "h100").host_memory_gb == 64
    )
    with pytest.raises(ConfigError, match="unknown GPU 'h10'.*Did you mean h100.*b200"):
        find_machine(gpu="h10")


def test_a_gpu_that_is_not_known_is_described_by_its_memory():
    assert find_machine(gpu_memory_gb=24) == Machine("a GPU", 24, 64)
    assert find_machine(gpu="rtx3090", gpu_memory_gb=25) == Machine("rtx3090", 25, 64)
    assert find_machine(32, "RTX3090", gpu_memory_gb=48) == Machine("RTX3090", 48, 32)
    # a known card with another memory keeps its peak and its usual host
    assert find_machine(gpu="H100", gpu_memory_gb=93) == Machine("h100", 93, 128, "h100")


def test_several_gpus_share_a_host_and_leave_room_for_nccl():
    one = find_machine(gpu="h200")
    four = find_machine(100, gpu="h200", gpus=4, machines=2)
    assert (four.ranks, four.host_gb_of_a_gpu, four.usable_host_gb) == (8, 25, 22.5)
    assert four.usable_gb == pytest.approx(one.usable_gb - USABLE * NCCL_GB)
    assert find_machine(gpu="h200", gpus=4).usable_host_gb == one.usable_host_gb


def test_cards_that_nobody_has_run_on_are_marked():
    assert [name for name, gpu in GPUS.items() if gpu.tested] == ["h200", "h100"]


def test_an_allocation_that_fails_is_known_by_its_words():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(
        RuntimeError("shapes cannot be multiplied")
    ) and not is_out_of_memory(OSError("out of memory"))


def test_this_machines_memory():
    assert 0 < available_host_memory_gb() < 100_000
    now, peak = process_memory_gb()
    assert 0.05 < now <= peak * 1.01 and peak < 100


def test_a_containers_limit_counts_without_its_cached_files(monkeypatch, tmp_path):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    monkeypatch.setattr("planner.machine.Path", lambda path: tmp_path / path.removeprefix("/"))
    (group / "memory.max").write_text("10000000\n")
    (group / "memory.current").write_text("7000000\n")
    (group / "memory.stat").write_text("anon 5000000\ninactive_file 300000\nactive_file 200000\n")
    assert available_host_memory_gb() == pytest.approx(0.0035)  # 10 - (7 - 0.5) MB
    (group / "memory.max").write_text("max\n")
    assert available_host_memory_gb() > 0.0035, "no limit: that of the system"


def test_freed_memory_goes_back_to_the_system():
    code = (
        "from planner.machine import process_memory_gb, release_freed_memory\nrelease_freed_memory()\nlarge = bytearray(30_000_000)\ndel large\n"
        "blocks = [bytearray(b'1') * 8_000_000 for _ in range(40)]\ndel blocks[:-1]\nprint(*process_memory_gb())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    now, peak = map(float, done.stdout.split())
    assert peak > 0.3 and now < 0.1
