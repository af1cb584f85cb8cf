"""torchrun --max-restarts: what is not trained again."""

import pytest

import run_experiment
from config import ConfigError, Diverged, OutOfMemory
from record.restarts import RESTART_COUNT, VERDICT, not_in_vain


def run(folder, error=None, is_first=True) -> str:
    """Runs once; returns what was raised."""
    trained = False
    try:
        with not_in_vain(folder, is_first):
            trained = True
            if error is not None:
                raise error
    except Exception as raised:
        return f"{raised.exit_code}, {'trained' if trained else 'not trained'}: {raised}"
    return "done"


@pytest.mark.parametrize("error", [ConfigError("wrong"), Diverged("the loss is nan")])
def test_a_run_that_cannot_succeed_is_not_trained_again(tmp_path, monkeypatch, error):
    monkeypatch.setenv(RESTART_COUNT, "0")
    assert "trained: " in run(tmp_path, error)
    monkeypatch.setenv(RESTART_COUNT, "1")
    for is_first in (True, False):
        again = run(tmp_path, is_first=is_first)
        assert again == f"{error.exit_code}, not trained: not trained again by torchrun: {error}"
    monkeypatch.setenv(RESTART_COUNT, "0")  # somebody has started it anew
    assert run(tmp_path) == "done" and not (tmp_path / VERDICT).exists()


def test_the_program_refuses_before_it_imports_torch(tmp_path, monkeypatch, capsys):
    note = '{"exit_code": 3, "message": "the loss is nan"}'
    (tmp_path / VERDICT).write_text(note)
    monkeypatch.setenv(RESTART_COUNT, "2")
    argv = ["--device", "cpu", "--preset", "tiny", "--save_dir", str(tmp_path)]
    assert run_experiment.main([*argv, "--resume", "latest"]) == 3
    assert "not trained again by torchrun: the loss is nan" in capsys.readouterr().err
    assert run_experiment.main([*argv, "--overwrite"]) == 2
    assert "--overwrite would delete what it trained" in capsys.readouterr().err


def test_other_failures_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv(RESTART_COUNT, "0")
    run(tmp_path, OutOfMemory("beside another program"))
    run(tmp_path, Diverged("on a rank that is not the first"), is_first=False)
    monkeypatch.setenv(RESTART_COUNT, "1")
    assert run(tmp_path) == "done"
    (tmp_path / VERDICT).write_text("{")
    assert run(tmp_path) == "done"


def test_without_torchrun_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.delenv(RESTART_COUNT, raising=False)
    run(tmp_path, Diverged("the loss is nan"))
    assert not (tmp_path / VERDICT).exists()
