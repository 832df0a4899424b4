"""Softmax over a sliding window, against its literal mask."""

import pytest
import torch

from lcpt.attention import AttentionConfig
from lcpt.attention.base import Projected
from lcpt.attention.softmax import Softmax, SoftmaxConfig, WindowSoftmax

HEADS, KV_HEADS, D = 4, 2, 6


def build(window) -> WindowSoftmax:
    config = AttentionConfig(kind="softmax", softmax=SoftmaxConfig(window))
    return config.attention_of_layer(0)(HEADS * D, HEADS, KV_HEADS, config)


def literal(q, k, v, window):
    """One masked softmax, [T, P + T]."""
    tokens, seen = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    t, others = torch.arange(seen - tokens, seen)[:, None], torch.arange(seen)
    s = s.masked_fill((others > t) | (others <= t - window), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", s.softmax(-1), v)


@pytest.mark.parametrize("window", [1, 2, 4, 5, 40])
@pytest.mark.parametrize("past", [0, 1, 3, 4, 13])
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 9, 18])
@pytest.mark.parametrize("batch", [1, 3])
def test_values_and_gradients(batch, tokens, past, window):
    q = torch.randn(batch, tokens, HEADS, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(batch, past + tokens, KV_HEADS, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, expected = build(window).attend_to(q, k, v, None), literal(q, k, v, window)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    do = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(o, (q, k, v), do) for o in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cuts", [[1] * 18, [7, 11], [2, 3, 13], [17, 1]], ids=str)
@pytest.mark.parametrize("window", [1, 4])
def test_pieces_keep_the_window_alone(window, cuts):
    """The state is what the next token sees of earlier ones, and a copy: a view would keep everything."""
    module, state, outputs = build(window), None, []
    q = torch.randn(2, 18, HEADS, D, dtype=torch.float64)
    k, v = torch.randn(2, 2, 18, KV_HEADS, D, dtype=torch.float64)
    for piece in zip(*(x.split(cuts, dim=1) for x in (q, k, v)), strict=True):
        o, state = module.attend(Projected(*piece), state, keep=True)
        outputs.append(o)
        assert all(x.shape[1] <= window - 1 for x in state)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in state)
    torch.testing.assert_close(torch.cat(outputs, dim=1), literal(q, k, v, window), rtol=1e-12, atol=1e-12)


def test_packed_documents():
    q = torch.randn(1, 18, HEADS, D, dtype=torch.float64)
    k, v = torch.randn(2, 1, 18, KV_HEADS, D, dtype=torch.float64)
    o = build(4).attend_to(q, k, v, torch.tensor([0, 6, 7, 18]))
    alone = [literal(q[:, a:b], k[:, a:b], v[:, a:b], 4) for a, b in ((0, 6), (6, 7), (7, 18))]
    torch.testing.assert_close(o, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)


def test_cost_is_linear(largest_tensor):
    """FLOPs a token and state stay the same beyond the window; the largest tensor grows with T, not with its square."""
    module, window, dense = build(16), 16, build(None)
    assert type(dense) is Softmax
    assert module.attend_flops(1_000) == module.attend_flops(100_000)
    assert module.attend_flops(16) == dense.attend_flops(16)
    assert module.state_bytes(1_000) == module.state_bytes(100_000) == dense.state_bytes(window - 1)
    assert module.state_bytes(5) == dense.state_bytes(5)
    sizes = []
    for tokens in (512, 1024):
        q = torch.randn(1, tokens, HEADS, D, requires_grad=True)
        k, v = torch.randn(2, 1, tokens, KV_HEADS, D)
        with largest_tensor() as largest:
            module.attend_to(q, k, v, None).sum().backward()
        sizes.append(largest.n_bytes)
    assert sizes[1] < 2.2 * sizes[0]


def test_stated_flops_are_those_of_the_products():
    """The counter knows no SDPA on a CPU, but it does know SDPA written out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    module, tokens = build(32), 2048
    q = torch.randn(1, tokens, HEADS, D)
    k, v = torch.randn(2, 1, tokens, KV_HEADS, D)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module.attend_to(q, k, v, None)
    assert counter.get_total_flops() / tokens == pytest.approx(module.attend_flops(tokens)[0], rel=0.02)


def test_wrong_windows_are_named():
    with pytest.raises(ValueError, match="window is 0"):
        SoftmaxConfig(0)
