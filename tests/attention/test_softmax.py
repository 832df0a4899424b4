"""Softmax over packed documents and continued sequences, on a CPU and as on a GPU, whose host reads no offset."""

from itertools import pairwise

import pytest
import torch

from lcpt.attention import AttentionConfig, softmax
from lcpt.attention.softmax import SoftmaxConfig

HEADS, KV_HEADS = 4, 2
LENGTHS = [5, 1, 0, 2, 17, 7, 0, 0]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()


def build(window):
    config = AttentionConfig("softmax", softmax=SoftmaxConfig(window))
    return config.attention_of_layer(0)(HEADS * 8, HEADS, KV_HEADS, config)


def inputs(width, dtype):
    torch.manual_seed(0)
    q = torch.randn(1, sum(LENGTHS), HEADS, width, dtype=dtype, requires_grad=True)
    return q, *(torch.randn(1, sum(LENGTHS), KV_HEADS, width, dtype=dtype, requires_grad=True) for _ in range(2))


def flash_attention(
    q, k, v, ends_q, ends_k, max_q, max_k, dropout, is_causal, return_debug_mask, window_size_left, window_size_right
):
    """What FlashAttention says of its arguments: t sees t − left ≤ s ≤ t + right, None: without a bound; a document's
    last query is of its last key."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and q.ndim == 3 and not dropout
    assert max_q >= ends_q.diff().max() and max_k >= ends_k.diff().max() and q.dtype == torch.bfloat16
    outputs = []
    for (start, stop), (first, last) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True):
        group = q.shape[1] // k.shape[1]
        k_rows, v_rows = (x[first:last].float().repeat_interleave(group, dim=1) for x in (k, v))
        s = torch.einsum("thd,shd->hts", q[start:stop].float(), k_rows) * q.shape[2] ** -0.5
        t, others = torch.arange(last - first - (stop - start), last - first), torch.arange(last - first)
        ahead = others - t[:, None]
        unseen = ahead > (0 if is_causal else torch.inf if window_size_right is None else window_size_right)
        if window_size_left is not None:
            unseen |= -ahead > window_size_left
        p = s.masked_fill(unseen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", p, v_rows).to(q.dtype))
    return torch.cat(outputs), None, None, None, None


@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("width, dtype", [(8, torch.float64), (8, torch.bfloat16), (6, torch.bfloat16)], ids=str)
def test_packed_documents_on_a_device(window, width, dtype, monkeypatch):
    """Under a mask, or by FlashAttention where it takes the heads; output and every gradient."""
    module, given, calls = build(window), inputs(width, dtype), []
    expected = module.attend_to(*given, ENDS)

    def counted(*arguments, **options):
        calls.append(arguments)
        return flash_attention(*arguments, **options)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", counted)
    monkeypatch.setattr(softmax, "is_on_device", lambda x: True)
    found = module.attend_to(*given, ENDS)
    assert len(calls) == (dtype == torch.bfloat16 and width == 8)
    do = torch.randn_like(expected)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    of_found, of_expected = ([o, *torch.autograd.grad(o, given, do)] for o in (found, expected))
    for one, other in zip(of_found, of_expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm().clamp(min=1)  # a window of 1 has gradients of 0


def literal(q, k, v, window):
    """One masked softmax, [T, P + T]."""
    tokens, seen = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[3] ** -0.5
    distance = torch.arange(seen - tokens, seen)[:, None] - torch.arange(seen)
    s = s.masked_fill((distance < 0) | (distance >= (window or seen)), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", s.softmax(-1), v)


def continued(past, tokens, dtype=torch.float64, batch=2):
    q = torch.randn(batch, tokens, HEADS, 8, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(batch, past + tokens, KV_HEADS, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v


def check(module, given, window, tolerance):
    found, expected = module.attend_to(*given, None), literal(*given, window)
    do = torch.randn_like(found)
    of_found, of_expected = ([o, *torch.autograd.grad(o, given, do)] for o in (found, expected))
    for one, other in zip(of_found, of_expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm().clamp(min=1)


@pytest.mark.parametrize("window", [None, 6, 12, 40])
@pytest.mark.parametrize("past, tokens", [(0, 9), (3, 1), (3, 4), (20, 9), (1, 12)])
def test_continued_sequences(past, tokens, window, monkeypatch):
    """In blocks of queries, the last of them not whole."""
    monkeypatch.setattr(softmax, "ROWS", 4)
    check(build(window), continued(past, tokens), window, 1e-12)


@pytest.mark.parametrize("window", [None, 6, 40])
@pytest.mark.parametrize("past, tokens", [(3, 4), (20, 5)])
def test_continued_sequences_on_a_device(past, tokens, window, monkeypatch):
    """By FlashAttention, without a mask."""
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return flash_attention(*arguments, **options)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", counted)
    monkeypatch.setattr(softmax, "is_on_device", lambda x: True)
    check(build(window), continued(past, tokens, torch.bfloat16), window, 1e-2)
    assert len(calls) == 1


def test_one_query_needs_no_mask(monkeypatch):
    """Decoding: one product over all keys."""
    masks = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, attn_mask, **options):
        masks.append(attn_mask)
        return sdpa(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    build(None).attend_to(*continued(30, 1), None)
    build(40).attend_to(*continued(30, 1), None)
    assert masks == [None, None]


@pytest.mark.parametrize("window", [None, 900])
def test_memory_of_continued_sequences_is_linear(window, largest_tensor):
    """Forwards and backwards, at a fixed number of queries a block."""
    sizes = []
    for tokens in (1024, 2048):
        given = continued(tokens, tokens, torch.float32, batch=1)
        with largest_tensor() as largest:
            build(window).attend_to(*given, None).sum().backward()
        sizes.append(largest.n_bytes)
    assert sizes[1] < 2.2 * sizes[0]
