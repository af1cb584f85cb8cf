"""What a run says on the console."""

from config import PRESETS, Config
from record import messages


def test_the_time_that_is_left_has_a_unit_that_fits_it():
    config = Config(**PRESETS["tiny"])
    said = [messages.first_speed(config, seconds, steps_left=100) for seconds in (0.1, 3, 360)]
    assert "10 seconds to go for 100 steps" in said[0]
    assert "5.0 minutes to go for 100 steps" in said[1]
    assert "10 hours to go for 100 steps" in said[2]
