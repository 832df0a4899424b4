import math

import pytest

from lcpt.training.config import TrainingConfig
from lcpt.training.schedule import learning_rate


def rates(**settings):
    training = TrainingConfig(**{"lr": 2.0, "max_steps": 20, "warmup_steps": 4, "final_lr_fraction": 0.1} | settings)
    return [learning_rate(step, training) for step in range(training.max_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_is_linear_and_ends_at_the_full_rate(schedule):
    assert rates(schedule=schedule)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_cosine_decay_is_half_a_cosine():
    found = rates()
    for step in range(4, 20):
        cosine = (1 + math.cos(math.pi * (step - 3) / 16)) / 2
        assert found[step] == pytest.approx(0.2 + 1.8 * cosine)
    assert found[-1] == pytest.approx(0.2)
    assert found[11] == pytest.approx(1.1)  # half way


def test_wsd_is_constant_then_linear():
    found = rates(schedule="wsd", decay_fraction=0.25)
    assert found[4:15] == [2.0] * 11
    assert found[15:] == pytest.approx([1.64, 1.28, 0.92, 0.56, 0.2])


def test_without_warm_up_the_rate_starts_at_its_peak():
    assert rates(warmup_steps=0)[0] == pytest.approx(2.0, rel=0.02)
    assert rates(warmup_steps=0, schedule="wsd")[:16] == [2.0] * 16


def test_the_decay_of_wsd_does_not_reach_into_warm_up():
    found = rates(schedule="wsd", warmup_steps=15, decay_fraction=0.5)
    assert found[14] == pytest.approx(2.0) and found[19] == pytest.approx(0.2) and found[15] < 2.0


def test_stopping_early_changes_no_rate():
    whole, stopped = (TrainingConfig(max_steps=200, stop_after_steps=stop) for stop in (None, 7))
    assert all(learning_rate(step, whole) == learning_rate(step, stopped) for step in range(7))
    assert (whole.last_step, stopped.last_step) == (200, 7)
    assert TrainingConfig(max_steps=200, stop_after_steps=900).last_step == 200
