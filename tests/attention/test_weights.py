"""What each kind weighs a key with, against its definition written out."""

import pytest
import torch

from lcpt.attention.base import Projected
from tests.attention.variants import BLOCK, HEAD_DIM, HEADS, LINEAR, VARIANTS, build


@pytest.mark.parametrize("variant, scale, shift", [("polynomial", 1 / 8, 1.0), ("polynomial-no-shift", 1 / 4, 0.0)])
def test_polynomial_weighs_by_the_fourth_power(variant, scale, shift):
    """One head of 4 coordinates, by hand: w = (q·k/(4 √4) + 1)⁴, or (q·k/4)⁴; the offset is scale⁴."""
    q, k, v = torch.randn(3, 1, 5, HEADS, HEAD_DIM, dtype=torch.float64)
    o = build(variant).attend(Projected(q, k, v))[0]
    weights = (scale * (q[0, :, 1] @ k[0, :, 1].T) + shift).pow(4).tril()
    expected = weights @ v[0, :, 1] / (weights.sum(1, keepdim=True) + scale**4)
    torch.testing.assert_close(o[0, :, 1], expected, rtol=1e-12, atol=1e-12)


POLYSKETCH = [name for name in VARIANTS if name.startswith("polysketch")]


@pytest.mark.parametrize("variant", POLYSKETCH)
def test_polysketch_weighs_as_defined(variant):
    """Near: (q·k/(4 √d) + 1)⁴, without a shift (q·k/d)⁴. Far: e^γ (S(q)·S(k))², one sketch for both."""
    module = build(variant).double()
    torch.nn.init.uniform_(module.gamma, -1, 1)
    q, k, v = torch.randn(3, 1, 11, HEADS, HEAD_DIM, dtype=torch.float64)
    o = module.attend(Projected(q, k, v))[0]
    block = torch.arange(11) // BLOCK
    near = block[None, :] > block[:, None] - VARIANTS[variant][1].get("local_blocks", 1)
    for head in range(HEADS):
        a, b = module.sketch(q)[0, :, head], module.sketch(k)[0, :, head]
        scale, shift = (1 / HEAD_DIM, 0) if variant == "polysketch-no-shift" else (1 / (4 * HEAD_DIM**0.5), 1)
        exact = (scale * (q[0, :, head] @ k[0, :, head].T) + shift).pow(4)
        weights = torch.where(near, exact, module.gamma[head].exp() * (a @ b.T).square()).tril()
        expected = weights @ v[0, :, head] / (weights.sum(1, keepdim=True) + scale**4)
        torch.testing.assert_close(o[0, :, head], expected, rtol=1e-10, atol=1e-10)


def polynomial_weights(module, q, k):  # degree 2 alone has a linear cost
    shift = module.coefficients[1] / 2
    scale = 1 / (2 * HEAD_DIM**0.5) if shift else 1 / HEAD_DIM
    return (scale * (q @ k.mT) + shift).square()


def fastmax_weights(module, q, k):
    s = torch.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    return sum(c * s**power for power, c in enumerate(module.coefficients))


def feedforward_weights(module, q, k):
    return module.phi(q.transpose(1, 2)).transpose(1, 2) @ module.phi(k.transpose(1, 2)).permute(0, 2, 3, 1)


def kernel_weights(module, q, k):
    phi_q, phi_k = (module.feature_map(x.transpose(1, 2), is_query) for x, is_query in ((q, True), (k, False)))
    return phi_q.transpose(1, 2) @ phi_k.permute(0, 2, 3, 1)


WEIGHTS = {  # by kind: the weights of q on k [B, H, T, D], [B, H, T, T], near and far alike
    "polynomial": polynomial_weights,
    "fastmax": fastmax_weights,
    "feedforward": feedforward_weights,
    "kernel": kernel_weights,
}


@pytest.mark.parametrize("variant", [name for name in LINEAR if VARIANTS[name][0] in WEIGHTS])
def test_kernels_weigh_as_defined(variant):
    """Weights made from the map alone and one normaliser; blocks change nothing. Kinds that weigh near and far tokens
    otherwise have tests of their own."""
    module = build(variant).double()
    q, k, v = torch.randn(3, 1, 11, HEADS, HEAD_DIM, dtype=torch.float64)
    o = module.attend(Projected(q, k, v))[0]
    weights = WEIGHTS[VARIANTS[variant][0]](module, q.transpose(1, 2), k.transpose(1, 2)).tril()
    assert (weights >= 0).all()
    offset = {"polynomial-2": 1 / (4 * HEAD_DIM), "polynomial-2-no-shift": HEAD_DIM**-2}.get(variant, 0.0)
    expected = weights @ v.transpose(1, 2) / (offset + weights.sum(-1, keepdim=True))
    torch.testing.assert_close(o, expected.transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_normalisation_over_the_sequence_would_leak():
    """What the published fastmax does, and this one does not: a later, longer key changes earlier weights."""
    q, k, v = torch.randn(3, 1, 9, HEADS, HEAD_DIM)
    longer = torch.cat((k[:, :-1], 100 * k[:, -1:]), dim=1)
    module = build("fastmax-2")
    assert torch.equal(module.attend(Projected(q, k, v))[0][:, :-1], module.attend(Projected(q, longer, v))[0][:, :-1])

    def published(k):
        k = k / k.norm(dim=-1).amax(dim=1, keepdim=True)[..., None]
        s = torch.einsum("bthd,bshd->bhts", q, k)
        weights = (1 + s + s.square() / 2).tril()
        return (weights @ v.transpose(1, 2) / weights.sum(-1, keepdim=True)).transpose(1, 2)

    assert not torch.allclose(published(k)[:, :-1], published(longer)[:, :-1], atol=1e-2)
