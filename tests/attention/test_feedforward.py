"""The penalty that holds the path of a feed-forward kernel near orthogonal."""

import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.attention.feedforward import FeedforwardLayer, _OrthogonalityLoss
from lcpt.model import GPT, ModelConfig


def build(penalty, recompute=False):
    torch.manual_seed(0)
    attention = AttentionConfig(kind="feedforward", block_size=4)
    attention.feedforward.penalty, attention.feedforward.layers = penalty, 2
    return GPT(
        ModelConfig(
            n_layers=2, d_model=16, n_heads=2, vocab_size=50, activation_checkpointing=recompute, attention=attention
        )
    )


@pytest.mark.parametrize("map", ["ffn", "oglu", "aoglu"])
def test_it_begins_orthogonal(map):
    layer = FeedforwardLayer(2, 6, map, last=True)
    layer(torch.randn(1, 3, 2, 6))
    assert layer.orthogonality_loss < 1e-10


def test_strain_and_its_gradient():
    W = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(
        _OrthogonalityLoss.apply(W), torch.stack([(w @ w.T - eye).square().mean() for w in W]).mean()
    )
    assert torch.autograd.gradcheck(_OrthogonalityLoss.apply, [W])


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_stays_and_the_gradient_is_that_of_loss_and_penalty(recompute):
    """λ for the mean loss, so λ · count for the sum; only the path's matrices feel it."""
    x, labels = torch.randint(50, (2, 9)), torch.randint(50, (2, 9))
    labels[0, :4] = -1
    plain, pulled = build(0.0), build(0.3, recompute)
    with torch.no_grad():
        for model in (plain, pulled):
            for name, parameter in model.named_parameters():
                if name.endswith(".W"):
                    parameter.mul_(1.5)  # else there is nothing to hold
    found, count = pulled(x, labels=labels)
    expected, _ = plain(x, labels=labels)
    assert found.detach() == expected.detach()
    found.backward()
    penalty = 0.0
    for name, parameter in plain.named_parameters():
        if name.endswith(".W"):
            penalty = penalty + 0.3 * (parameter @ parameter.mT - torch.eye(8)).square().mean()
    (expected + count * penalty).backward()
    for (name, one), other in zip(plain.named_parameters(), pulled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_evaluation_computes_none():
    model = build(0.3)
    with torch.no_grad():
        model(torch.randint(50, (1, 9)), labels=torch.randint(50, (1, 9)))
    assert all(layer.orthogonality_loss is None for block in model.blocks for layer in block.attention.phi)
