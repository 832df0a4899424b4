import pytest
import torch

from lcpt.model import loss as module
from lcpt.model.loss import cross_entropy, token_losses

V, D = 37, 12


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 5 tokens."""
    monkeypatch.setattr(module, "LOGITS", {"cpu": 5 * V})


def inputs(*shape, dtype=torch.float32, ignored=0.3):
    torch.manual_seed(0)
    hidden, weight = torch.randn(*shape, D), torch.randn(V, D)
    labels = torch.randint(V, shape).masked_fill(torch.rand(shape) < ignored, -1)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def by_torch(hidden, weight, labels):
    """In float64 on the same numbers."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.T).flatten(0, -2)
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten().clamp_min(-1), ignore_index=-1, reduction="sum")
    return hidden, weight, loss


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (3, 7), (23,)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_loss_and_both_gradients_equal_pytorchs(shape, dtype, tolerance, factor):
    """The loss is fp32 in every dtype. An incoming gradient other than 1 scales both gradients."""
    hidden, weight, labels = inputs(*shape, dtype=dtype, ignored=0.3 if len(shape) > 1 and shape[1] > 1 else 0)
    loss, count = cross_entropy(hidden, weight, labels)
    expected_hidden, expected_weight, expected = by_torch(hidden, weight, labels)
    (factor * loss).backward()
    (factor * expected).backward()
    assert loss.dtype == torch.float32 and count == (labels >= 0).sum() > 0
    assert abs(loss.item() / expected.item() - 1) < max(1e-6, tolerance / 10)
    for found, reference in ((hidden.grad, expected_hidden.grad), (weight.grad, expected_weight.grad)):
        assert found.dtype == dtype
        assert (found.double() - reference).norm() / reference.norm() < tolerance


def test_ignored_labels_get_no_gradient():
    """Any negative label."""
    hidden, weight, labels = inputs(4, 6)
    labels[0, 0], labels[1, 1] = -100, -7
    cross_entropy(hidden, weight, labels)[0].backward()
    ignored = labels < 0
    assert torch.equal(hidden.grad[ignored], torch.zeros_like(hidden.grad[ignored]))
    assert (hidden.grad[~ignored].norm(dim=-1) > 0).all()


def test_a_batch_without_labels_has_loss_0_and_no_gradient():
    hidden, weight, labels = inputs(2, 6, ignored=2)
    loss, count = cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss == 0 and count == 0 and not hidden.grad.any() and not weight.grad.any()


def test_large_logits_give_finite_gradients_and_the_exact_loss():
    hidden, weight, labels = inputs(2, 6)
    with torch.no_grad():
        hidden *= 100
    loss, _ = cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == pytest.approx(by_torch(hidden, weight, labels)[2].item(), rel=1e-5)
    assert hidden.grad.isfinite().all()


def test_a_frozen_operand_does_not_change_the_other_gradient():
    hidden, weight, labels = inputs(2, 6)
    cross_entropy(hidden, weight.detach(), labels)[0].backward()
    cross_entropy(hidden.detach(), weight, labels)[0].backward()
    _, _, expected = reference = by_torch(hidden, weight, labels)
    expected.backward()
    torch.testing.assert_close(hidden.grad, reference[0].grad.float())
    torch.testing.assert_close(weight.grad, reference[1].grad.float())


@pytest.mark.parametrize("with_gradient", [True, False])
def test_never_holds_all_logits(largest_tensor, with_gradient):
    hidden, weight, labels = inputs(1, 1000)
    with largest_tensor() as largest, torch.set_grad_enabled(with_gradient):
        loss, _ = cross_entropy(hidden, weight, labels)
        if with_gradient:
            loss.backward()
        token_losses(hidden, weight, labels)
    assert largest.n_bytes <= 4 * 1000 * D < 4 * 1000 * V  # the gradient of hidden is the largest


def test_token_losses_add_up():
    hidden, weight, labels = inputs(3, 7)
    losses = token_losses(hidden, weight, labels)
    assert losses.shape == labels.shape and losses.dtype == torch.float32 and not losses.requires_grad
    assert torch.equal(losses == 0, labels < 0)
    torch.testing.assert_close(losses.sum(), cross_entropy(hidden, weight, labels)[0].detach())
