"""What a run says on the console."""

import pytest

from config import PRESETS, Config
from record import messages


def test_the_time_that_is_left_has_a_unit_that_fits_it():
    config = Config(**PRESETS["tiny"])
    said = [messages.first_speed(config, seconds, steps_left=100) for seconds in (0.1, 3, 360)]
    assert "10 seconds to go for 100 steps" in said[0]
    assert "5.0 minutes to go for 100 steps" in said[1]
    assert "10 hours to go for 100 steps" in said[2]


def row(**more) -> dict:
    """A row of training metrics at step 12,340."""
    figures = dict(
        step=12_340,
        train_loss=2.0,
        train_perplexity=7.4,
        train_accuracy=0.5,
        grad_norm=1.0,
        tokens_per_second=31_234.0,
        muon_lr=3e-4,
        adamw_lr=1e-4,
        mfu=None,
        memory_peak_gb=0.05,
    )
    return figures | more


CONFIG = Config(**{**PRESETS["small"], "max_steps": 50_000})
MOE = dict(expert_load=[[0.25, 0.75], [0.5, 0.5]], load_balancing_loss=1.01)


def test_80_columns_show_loss_speed_time_left_and_the_busiest_expert():
    shown = messages.progress_bar(row(**MOE), CONFIG, columns=80)
    hours = 37_660 * CONFIG.tokens_per_step / 31_234 / 3600
    assert shown == f"loss 2.000, 31,234 tokens/s, {hours:.0f} hours left, busiest expert 0.75"


@pytest.mark.parametrize("columns", range(20, 200, 7))
def test_a_bar_shows_whole_fields_that_fit(columns):
    shown = messages.progress_bar(row(**MOE), CONFIG, columns)
    assert len(f"12340/50000, {shown} |x|") <= columns or not shown
    fields = messages.progress_fields(row(**MOE), CONFIG)
    assert shown.split(", ") == fields[: len(shown.split(", "))] or not shown


def test_a_log_line_has_it_all():
    line = messages.progress_line(row(**MOE, mfu=0.4), CONFIG)
    assert line.startswith("step 12340/50000: loss 2.000, 31,234 tokens/s, ")
    for field in ("muon_lr 3.0e-4", "adamw_lr 1.0e-4", "balancing loss 1.010", "MFU 0.400"):
        assert field in line
    assert line.endswith("50 MB")


def test_a_dense_model_has_no_busiest_expert():
    assert "expert" not in messages.progress_line(row(), CONFIG)


def test_another_schedule_is_told_in_learning_rates():
    text = messages.schedule_changed(dict(muon=0.02, adamw=3e-4), dict(muon=0.01, adamw=1.5e-4))
    assert "muon_lr continues at 1.0e-2, where it was 2.0e-2" in text
    assert "adamw_lr continues at 1.5e-4, where it was 3.0e-4" in text


def test_a_stopped_run_of_several_gpus_continues_on_as_many():
    """The checkpoint does not hold their number."""
    one = messages.stopped(5, "runs/a", saving=True)
    assert one.endswith("Go on with: python run_experiment.py --save_dir runs/a --resume latest")
    assert "run_experiment.py --gpus 8 --save_dir" in messages.stopped(5, "runs/a", True, ranks=8)
    machines = messages.stopped(5, "runs/a", True, ranks=16, machines=2)
    assert "on each machine" in machines and "--gpus" not in machines


def test_a_run_that_diverged_names_the_way_back_if_there_is_a_checkpoint(tmp_path):
    latest = tmp_path / "checkpoint_latest.pt"
    assert messages.way_back(latest) == "No checkpoint was saved yet."
    latest.touch()
    assert "--resume FILE --skip_steps N" in messages.way_back(latest)
