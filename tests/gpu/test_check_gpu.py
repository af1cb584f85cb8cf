"""The checks of benchmarks/check_gpu.py as tests: `python -m pytest -m gpu` on a machine with a GPU.

Models that take whole steps run in processes of their own, once for all tests that look at them.
"""

import math

import pytest
import torch

from benchmarks import check_gpu
from cli import exit_code

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU was found")
FAST_ON_A_CPU = [
    check_gpu.check_grouped_linear,
    check_gpu.check_qk_norm_rope,
    check_gpu.check_swiglu,
    check_gpu.check_fp32_sums,
]


def by_name(function):
    return function.__name__


def assert_all_hold(function, device: str) -> None:
    checks = list(check_gpu.run(function, torch.device(device)))
    failed = [check for check in checks if not check.holds]
    assert checks, "a function without a check proves nothing"
    assert not failed, "\n" + "\n".join(map(str, failed))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("function", check_gpu.CHECKS, ids=by_name)
def test_fast_paths_agree_with_their_references(function):
    assert_all_hold(function, "cuda")


@pytest.mark.parametrize("function", FAST_ON_A_CPU, ids=by_name)
def test_checks_hold_on_a_cpu(function):
    assert_all_hold(function, "cpu")


def test_an_error_of_nan_fails_and_names_the_tensor():
    expected = {"good": torch.ones(3), "bad": torch.ones(3)}
    found = {"good": torch.ones(3), "bad": torch.tensor([1.0, math.nan, 1.0])}
    check = check_gpu.check_tensors("what", found, expected, 0.1)
    assert not check.holds and check.error == math.inf
    assert "FAIL what" in str(check) and "bad inf, good 0.0" in str(check)
    assert not check_gpu.Check("what", math.nan, 0.1).holds


def test_main_reports_failures_in_its_exit_code(monkeypatch, capsys):
    def check_one(device):
        yield check_gpu.Check("one", error, 1.0)

    monkeypatch.setattr(check_gpu, "CHECKS", (check_one,))
    error = 0.5
    assert exit_code(check_gpu.main, []) == 0
    assert capsys.readouterr().out.endswith("all checks hold\n")
    error = 2.0
    with pytest.raises(SystemExit, match="1"):
        exit_code(check_gpu.main, [])
    assert capsys.readouterr().out.endswith("1 checks failed\n")


def test_kernels_that_read_what_they_wrote_are_found():
    kernel = "def triton_{}(in_ptr, out_ptr):\n{}\n'''"
    store = "    tl.store(out_ptr + 0, x)"
    load = "    y = tl.load(out_ptr + 1)"
    barrier = "    tl.debug_barrier()"
    codes = [
        kernel.format("rereads", f"{store}\n{load}"),
        kernel.format("waits", f"{store}\n{barrier}\n{load}"),
        kernel.format("reads_first", f"{load}\n{store}"),
    ]
    assert check_gpu.rereading_kernels(codes) == ["triton_rereads"]
