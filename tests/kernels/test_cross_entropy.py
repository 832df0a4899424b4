"""linear_cross_entropy in PyTorch, against PyTorch's own on all logits in float64: loss and both gradients."""

import pytest
import torch
from lcpt_kernels import cross_entropy as module
from lcpt_kernels import linear_cross_entropy, linear_token_losses

V, D = 37, 12


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of at most 5 tokens."""
    monkeypatch.setattr(module, "LOGITS", {"cpu": 5 * V})


def inputs(*shape, dtype=torch.float32, ignored=0.3):
    hidden, weight = torch.randn(*shape, D), torch.randn(V, D)
    labels = torch.randint(V, shape).masked_fill(torch.rand(shape) < ignored, -1)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def in_float64(hidden, weight, labels, z_loss=0.0):
    """Return leaves, the loss, and what its gradients are of: the loss and the z-loss."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits, labels = (hidden @ weight.T).flatten(0, -2), labels.flatten().long().clamp_min(-1)
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return hidden, weight, loss, loss + z_loss * logits.logsumexp(-1).square()[labels >= 0].sum()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (3, 7), (23,)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("factor, z_loss", [(1.0, 0.0), (7.0, 0.0), (1.0, 0.1)])
def test_loss_and_both_gradients_equal_pytorchs(shape, dtype, tolerance, factor, z_loss):
    """The loss is fp32 in every dtype. An incoming gradient other than 1 scales both gradients."""
    hidden, weight, labels = inputs(*shape, dtype=dtype, ignored=0.3 if len(shape) > 1 and shape[1] > 1 else 0)
    loss, count = linear_cross_entropy(hidden, weight, labels, z_loss=z_loss)
    expected_hidden, expected_weight, expected, of_gradients = in_float64(hidden, weight, labels, z_loss)
    (factor * loss).backward()
    (factor * of_gradients).backward()
    assert loss.dtype == torch.float32 and count == (labels >= 0).sum() > 0
    assert abs(loss.item() / expected.item() - 1) < max(1e-6, tolerance / 5)
    for found, reference in ((hidden.grad, expected_hidden.grad), (weight.grad, expected_weight.grad)):
        assert found.dtype == dtype
        assert (found.double() - reference).norm() / reference.norm() < tolerance


def test_labels_of_32_bits():
    hidden, weight, labels = inputs(3, 7)
    results = []
    for of_one_dtype in (labels, labels.int()):
        loss, count = linear_cross_entropy(hidden, weight, of_one_dtype)
        results.append((loss, count, *torch.autograd.grad(loss, [hidden, weight])))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_ignored_labels_get_no_gradient():
    """Any negative label."""
    hidden, weight, labels = inputs(4, 6)
    labels[0, 0], labels[1, 1] = -100, -7
    linear_cross_entropy(hidden, weight, labels, z_loss=0.1)[0].backward()
    ignored = labels < 0
    assert torch.equal(hidden.grad[ignored], torch.zeros_like(hidden.grad[ignored]))
    assert (hidden.grad[~ignored].norm(dim=-1) > 0).all()


def test_a_batch_without_labels_has_loss_0_and_no_gradient():
    hidden, weight, labels = inputs(2, 6, ignored=2)
    loss, count = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss == 0 and count == 0 and not hidden.grad.any() and not weight.grad.any()


def test_no_tokens():
    hidden, weight, labels = inputs(0)
    loss, count = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss == 0 and count == 0 and hidden.grad.shape == (0, D) and not weight.grad.any()
    assert linear_token_losses(hidden, weight, labels).shape == (0,)


def test_large_logits_give_finite_gradients_and_the_exact_loss():
    hidden, weight, labels = inputs(2, 6)
    with torch.no_grad():
        hidden *= 100
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == pytest.approx(in_float64(hidden, weight, labels)[2].item(), rel=1e-5)
    assert hidden.grad.isfinite().all()


def test_strides_are_free():
    hidden, weight, labels = inputs(3, 7)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], [hidden, weight])
    hidden, weight = (x.detach().mT.contiguous().mT.requires_grad_() for x in (hidden, weight))
    loss, _ = linear_cross_entropy(hidden, weight, labels.T.contiguous().T)
    for found, reference in zip(torch.autograd.grad(loss, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(found, reference)


def test_a_frozen_operand_costs_no_product_and_does_not_change_the_other_gradient(monkeypatch):
    hidden, weight, labels = inputs(4)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: products.append(args) or mm(*args, **options))
    linear_cross_entropy(hidden, weight.detach(), labels)[0].backward()
    linear_cross_entropy(hidden.detach(), weight, labels)[0].backward()
    assert len(products) == 4
    *reference, _, expected = in_float64(hidden, weight, labels)
    expected.backward()
    torch.testing.assert_close(hidden.grad, reference[0].grad.float())
    torch.testing.assert_close(weight.grad, reference[1].grad.float())


def test_without_gradients_there_is_one_product(monkeypatch):
    hidden, weight, labels = inputs(4)
    expected = linear_cross_entropy(hidden, weight, labels)[0]
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: products.append(args) or mm(*args, **options))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels)[0], expected.detach())
    assert len(products) == 1


@pytest.mark.parametrize("with_gradient", [True, False])
def test_never_holds_all_logits(largest_tensor, with_gradient):
    hidden, weight, labels = inputs(1, 1000)
    with largest_tensor() as largest, torch.set_grad_enabled(with_gradient):
        loss, _ = linear_cross_entropy(hidden, weight, labels)
        if with_gradient:
            loss.backward()
        linear_token_losses(hidden, weight, labels)
    assert largest.n_bytes <= 4 * 1000 * D < 4 * 1000 * V  # the gradient of hidden is the largest


def test_sums_over_chunks_are_fp32(monkeypatch):
    """In bf16 a sum over 1,000 chunks would no longer change."""
    monkeypatch.setattr(module, "LOGITS", {"cpu": 1})
    hidden, weight, labels = inputs(1, dtype=torch.bfloat16, ignored=0)
    one, many = (
        torch.autograd.grad(linear_cross_entropy(hidden.expand(n, -1), weight, labels.expand(n))[0], weight)[0]
        for n in (1, 1000)
    )
    torch.testing.assert_close(many.float() / 1000, one.float(), rtol=5e-3, atol=1e-5)


def test_token_losses_add_up():
    hidden, weight, labels = inputs(3, 7)
    losses = linear_token_losses(hidden, weight, labels)
    assert losses.shape == labels.shape and losses.dtype == torch.float32 and not losses.requires_grad
    assert torch.equal(losses == 0, labels < 0)
    torch.testing.assert_close(losses.sum(), linear_cross_entropy(hidden, weight, labels)[0].detach())


def test_autocast_computes_in_its_dtype():
    hidden, weight, labels = inputs(3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, labels)
    found = torch.autograd.grad(loss, [hidden, weight])
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected, _ = linear_cross_entropy(*rounded, labels)
    assert torch.equal(loss, expected)
    for x, y in zip(found, torch.autograd.grad(expected, rounded), strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y.float())


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden": torch.zeros(3, D + 1)}, "rows of hidden are 13 wide, of weight 12"),
        ({"hidden": torch.zeros(D)}, "hidden has 1 dimensions"),
        ({"weight": torch.zeros(2, V, D)}, "weight has 3 dimensions"),
        ({"weight": torch.zeros(0, D)}, r"weight is \[0, 12\]"),
        ({"weight": torch.zeros(V, D).double()}, "torch.float32, torch.float64"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels are \[4\]; they must be \[3\]"),
        ({"labels": torch.zeros(3)}, "labels are torch.float32"),
        ({"z_loss": -0.1}, "z_loss is -0.1"),
        ({"z_loss": float("nan")}, "z_loss is nan"),
        ({"backend": "reference"}, "backend 'reference' is none of auto, torch, triton"),
        ({"backend": "triton"}, "backend triton: tensors are on cpu"),
    ],
)
def test_errors_name_the_number(change, named):
    hidden, weight, labels = inputs(3)
    given = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(ValueError, match=named):
        linear_cross_entropy(**given)
