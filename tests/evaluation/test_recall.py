"""Recall of models that know every answer, none, or those that are near."""

import math

import numpy as np
import pytest
import torch

from lcpt.data import SyntheticConfig, Task
from lcpt.evaluation import recall
from lcpt.model import GPT, ModelConfig

CPU, CONTEXT, V = torch.device("cpu"), 64, 32


@pytest.fixture
def task():
    return Task("synthetic:mqar", SyntheticConfig(), V, "test")


class Oracle:
    """Reads the answer from the inputs: the token after the key's first place; beyond `reach` it says 0."""

    def __init__(self, reach=10**9):
        self.reach, self.head_weight = reach, torch.eye(V)

    def hidden(self, inputs):
        said = torch.zeros_like(inputs)
        for row, tokens in enumerate(inputs.tolist()):
            for t, token in enumerate(tokens):
                place = tokens.index(token) + 1
                said[row, t] = tokens[place] if 0 < t - place < self.reach else 0
        return 10.0 * torch.nn.functional.one_hot(said, V)


def measure(model, task, samples=20, batch=8):
    parts = list(recall.answers(model, task, samples, CONTEXT, batch, CPU))
    return recall.report(parts, CONTEXT)


def test_an_oracle_is_right_at_every_distance(task):
    found = measure(Oracle(), task)
    assert found["answers"] == 20 * task.scored(CONTEXT) == sum(p["answers"] for p in found["recall_by_distance"])
    assert found["accuracy"] == 1.0 and {part["accuracy"] for part in found["recall_by_distance"]} == {1.0}
    assert found["loss"] == pytest.approx(math.log(1 + (V - 1) * math.exp(-10)), rel=1e-2)


def test_one_that_forgets_is_right_up_to_its_reach(task):
    """Its reach is the edge of a bin."""
    found = measure(Oracle(reach=24), task)
    for part in found["recall_by_distance"]:
        assert part["accuracy"] == (1.0 if part["end"] <= 24 else 0.0)
    assert 0 < found["accuracy"] < 1


def test_the_loss_is_that_of_the_logits(task):
    model = GPT(ModelConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=V))
    inputs, labels = (
        torch.from_numpy(np.stack(x)) for x in zip(*(task.sample(n, 0, CONTEXT)[:2] for n in range(5)), strict=True)
    )
    expected = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=-1)
    likeliest = model(inputs).argmax(-1)
    for batch in (1, 3, 100):
        found = measure(model, task, 5, batch)
        assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert found["accuracy"] == pytest.approx((likeliest == labels)[labels >= 0].float().mean().item())
