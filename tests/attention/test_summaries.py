"""Summaries of blocks, and the two kinds that are made of them, against their definitions."""

import pytest
import torch

from lcpt.attention import ATTENTION, AttentionConfig
from lcpt.attention.base import Projected
from lcpt.attention.summaries import Summaries, SummariesConfig

C, R, HEADS, D, D_MODEL = 6, 3, 2, 4, 8


def projected(t, gated=False, b=1):
    torch.manual_seed(0)
    q, k, v, q_plain, k_plain = torch.randn(5, b, t, HEADS, D, dtype=torch.float64)
    log_gate = -0.2 * torch.rand(b, t, HEADS, dtype=torch.float64) if gated else None
    return Projected(q, k, v, log_gate, q_plain, k_plain, torch.randn(b, t, D_MODEL, dtype=torch.float64))


def build(projection) -> Summaries:
    torch.manual_seed(1)
    module = Summaries(D_MODEL, HEADS, D, C, SummariesConfig(R, projection)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("projection", ["dynamic", "table"])
@pytest.mark.parametrize("gated", [True, False])
def test_pooling_by_hand(projection, gated):
    """Head 1, block 1: every row of P is a softmax over the block's own positions."""
    module, p = build(projection), projected(2 * C + 1, gated)
    pooled = module(p, None, None)
    block, head = slice(C, 2 * C), 1
    if projection == "dynamic":
        logits = (p.x[0, block] @ module.W_P.weight.T).unflatten(-1, (HEADS, R))[:, head]
    else:
        logits = module.table[:, head]
    P = (logits + module.segments[:, 0]).softmax(0).T  # [r, c]
    k = P @ p.k_plain[0, block, head]
    expected = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.k_norm.weight
    torch.testing.assert_close(pooled.k[0, R : 2 * R, head], expected)
    gamma = torch.ones(C, dtype=torch.float64)
    if gated:
        G = p.log_gate[0, block, head].cumsum(0)
        gamma = (G[-1] - G).exp()
        torch.testing.assert_close(pooled.mass[0, R : 2 * R, head], P @ gamma)
    torch.testing.assert_close(pooled.v[0, R : 2 * R, head], P @ (gamma[:, None] * p.v[0, block, head]))
    assert pooled.k.shape == pooled.v.shape == (1, 2 * R, HEADS, D) and (pooled.mass is None) == (not gated)


def test_at_first_a_summary_is_the_mean_of_its_segment():
    module, p = Summaries(D_MODEL, HEADS, D, C, SummariesConfig(R, "table")).double(), projected(C)
    segments = p.v.unflatten(1, (R, C // R)).mean(2)
    pooled = module(p, None, None).v
    assert (pooled - segments).norm() < 0.1 * segments.norm() and not torch.allclose(pooled, segments)


@pytest.mark.parametrize("projection", ["dynamic", "table"])
@pytest.mark.parametrize("cut", [0, 1, C - 1, C, C + 2, 2 * C])
def test_pieces_complete_the_same_blocks(projection, cut):
    module, p = build(projection), projected(3 * C + 1, gated=True)
    whole, pending, pieces = module(p, None, None), None, []
    for rows in (slice(0, cut), slice(cut, 3 * C + 1)):
        piece = module(Projected(*(None if x is None else x[:, rows] for x in p)), pending, None)
        pending, pieces = piece.pending, [*pieces, piece]
    for name in ("k", "v", "mass"):
        joined = torch.cat([getattr(piece, name) for piece in pieces], dim=1)
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert pending["k"].shape[1] == 1


def test_more_summaries_than_tokens_are_refused():
    with pytest.raises(ValueError, match="number 7 is more than block_size 6"):
        Summaries(D_MODEL, HEADS, D, C, SummariesConfig(7))


@pytest.mark.parametrize("kind", ["flurka", "lowrank"])
@pytest.mark.parametrize("local", ["softmax", "linear"])
@pytest.mark.parametrize("gated", [True, False])
def test_kinds_weigh_as_defined(kind, local, gated):
    """Head by head: near tokens with their positions, summaries without, c/r times, one normaliser."""
    if kind == "lowrank" and (gated or local == "linear"):
        pytest.skip("lowrank has neither")
    torch.manual_seed(2)
    config = AttentionConfig(kind=kind, block_size=C)
    config.flurka.local, config.flurka.feature_map = local, "hedgehog"
    config.flurka.summaries = config.lowrank.summaries = SummariesConfig(R)
    module = ATTENTION[kind](HEADS * D, HEADS, HEADS, config).double()
    t, p = 4 * C + 2, projected(4 * C + 2, gated)._replace(x=torch.randn(1, 4 * C + 2, HEADS * D).double())
    pooled = module.summaries(p, None, None)
    if kind == "flurka":
        torch.nn.init.uniform_(module.gamma, -1, 1)
    o, _ = module.attend(p)
    block = torch.arange(t) // C
    near = (block[None, :] > block[:, None] - 2).tril()
    far = (torch.arange(4 * R) // R)[None, :] <= block[:, None] - 2

    def phi(x, head):
        return module.feature_map(x, False)[0, :, head]

    for head in range(HEADS):
        if local == "softmax":
            w_near = (p.q[0, :, head] @ p.k[0, :, head].T / D**0.5).exp() * near
        else:
            w_near = phi(p.q, head) @ phi(p.k, head).T * near
        if kind == "flurka":
            w_far = module.gamma[head].exp() * C / R * (phi(p.q_plain, head) @ phi(pooled.k, head).T) * far
        else:
            w_far = C / R * (p.q_plain[0, :, head] @ pooled.k[0, :, head].T / D**0.5).exp() * far
        mass = torch.ones(4 * R, dtype=torch.float64)
        if gated:
            G = p.log_gate[0, :, head].cumsum(0)
            G_end = G[(torch.arange(4 * R) // R + 1) * C - 1]
            w_near = w_near * (G[:, None] - G[None, :]).clamp(max=0).exp()
            w_far, mass = w_far * (G[:, None] - G_end[None, :]).clamp(max=0).exp(), pooled.mass[0, :, head]
        expected = w_near @ p.v[0, :, head] + w_far @ pooled.v[0, :, head]
        expected = expected / (w_near.sum(1) + w_far @ mass)[:, None]
        torch.testing.assert_close(o[0, :, head], expected, rtol=1e-6, atol=1e-8)


def test_a_gate_of_minus_infinity_forgets_the_tokens_before_it():
    module, p = build("dynamic"), projected(2 * C, gated=True)
    forgotten = p.log_gate.clone()
    forgotten[0, C + 2] = -torch.inf  # in the second block
    v = p.v.clone()
    v[0, C : C + 2] = 1e6  # what is forgotten has no weight
    pooled = module(p._replace(log_gate=forgotten), None, None)
    changed = module(p._replace(log_gate=forgotten, v=v), None, None)
    assert pooled.v.isfinite().all() and pooled.mass.isfinite().all()
    torch.testing.assert_close(changed.v, pooled.v, rtol=0, atol=0)
    expected = module(p, None, None)
    torch.testing.assert_close(pooled.v[:, :R], expected.v[:, :R], rtol=0, atol=0)  # the first block is as it was
    assert (pooled.mass[:, R:] < expected.mass[:, R:]).all()
