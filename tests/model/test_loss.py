"""The loss of a model: what it moves at the size of GPT-2 small, and the z-loss of its config."""

import pytest
import torch

from lcpt.benchmarking.traffic import Traffic
from lcpt.model import GPT
from lcpt.model.loss import cross_entropy, token_losses
from tests.model.conftest import V, config

TOKENS, WIDTH, VOCABULARY = 8192, 768, 32000


def on_meta(tokens=TOKENS):
    with torch.device("meta"):
        hidden = torch.empty(tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        return hidden, weight, torch.empty(tokens, dtype=torch.int64)


def test_forward_and_backward_move_3_gb_at_most():
    """On meta tensors, so the host reads nothing of the device either: that would raise."""
    pytest.importorskip("triton")
    hidden, weight, labels = on_meta()
    with Traffic() as moved:
        loss, _ = cross_entropy(hidden, weight, labels)
        loss.backward(torch.empty_like(loss))
    assert moved.bytes <= 3e9 and moved.operators <= 12
    logits = 2 * TOKENS * VOCABULARY
    assert moved.bytes >= 5 * logits  # written, read, replaced, read by two products


def test_without_gradients_logits_are_written_and_read_once():
    pytest.importorskip("triton")
    hidden, weight, labels = on_meta()
    logits, operands = 2 * TOKENS * VOCABULARY, 2 * WIDTH * (TOKENS + VOCABULARY)
    for function in (cross_entropy, token_losses):
        with Traffic() as moved, torch.no_grad():
            function(hidden, weight, labels)
        assert moved.bytes == pytest.approx(2 * logits + operands, rel=1e-3)


def test_long_batches_hold_a_bounded_number_of_logits(largest_tensor):
    pytest.importorskip("triton")
    hidden, weight, labels = on_meta(8 * TOKENS)
    with largest_tensor() as largest:
        loss, _ = cross_entropy(hidden, weight, labels)
        loss.backward(torch.empty_like(loss))
    assert largest.n_bytes <= 2 * 2**28 < 2 * 8 * TOKENS * VOCABULARY


def test_z_loss_has_a_gradient_only():
    tokens, labels = torch.randint(V, (2, 1, 9))
    models = [GPT(config(z_loss=z)) for z in (0.0, 0.5)]
    models[1].load_state_dict(models[0].state_dict())
    losses = [model(tokens, labels)[0] for model in models]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    logits = models[0](tokens)
    z_loss = 0.5 * logits.logsumexp(-1).square().sum()
    expected = torch.autograd.grad(z_loss, models[0].norm.weight)[0]
    assert expected.norm() > 0
    torch.testing.assert_close(models[1].norm.weight.grad - models[0].norm.weight.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("z_loss", [-1e-4, float("inf"), float("nan")])
def test_a_wrong_coefficient_is_named(z_loss):
    with pytest.raises(ValueError, match=f"model.z_loss is {z_loss}; it must be ≥ 0 and finite"):
        config(z_loss=z_loss)
