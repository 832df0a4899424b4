"""The flagship kinds learn to recall, within steps; what cannot see far does not."""

from pathlib import Path

import pytest

from lcpt.config import load_config
from lcpt.training.learn_recall import learn

RECALL = Path(__file__).parents[2] / "configs/compare/recall.yaml"


def config(*changes):
    return load_config(RECALL, ["training.valid_tokens=2048", *changes])


@pytest.mark.parametrize("kind", ["softmax", "polysketch", "flurka"])
def test_flagship_kinds_recall_four_pairs(kind):
    """After 100 steps on this seed; at chance, a quarter of the answers are right."""
    found = learn(config(f"model.attention.kind={kind}", "run.seed=1", "training.stop_after_steps=200"))
    assert found["steps_to_90"] is not None and found["steps_to_90"] <= 150
    assert found["best_accuracy"] >= 0.97 and found["curve"][-1]["accuracy"] == found["best_accuracy"]


def test_a_window_of_one_token_learns_nothing():
    window = ("model.attention.kind=softmax", "model.attention.softmax.window=1")
    found = learn(config(*window, "model.attention.key_shift=false", "training.stop_after_steps=30"))
    assert found["steps_to_90"] is None and found["best_accuracy"] < 0.2
    assert [point["step"] for point in found["curve"]] == [25, 30] and found["cpu_seconds"] > 0


def test_a_run_repeats_itself():
    changes = ("training.stop_after_steps=3", "training.valid_every_steps=1", "training.global_batch_tokens=256")
    curves = [learn(config(*changes, "training.micro_batch=8", f"run.seed={seed}"))["curve"] for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]
