"""Softmax over packed documents as on a GPU, where the host reads no offset, against one document at a time."""

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
    """What FlashAttention says of its arguments: t sees t − left ≤ s ≤ t + right, None: without a bound."""
    assert ends_q.dtype == ends_k.dtype == torch.int32 and q.ndim == 3 and not dropout
    assert max_q >= max(LENGTHS) and max_k >= max(LENGTHS) and q.dtype == torch.bfloat16
    outputs = []
    for start, stop in zip(ends_q.tolist()[:-1], ends_q.tolist()[1:], strict=True):
        document = slice(start, stop)
        group = q.shape[1] // k.shape[1]
        k_rows, v_rows = (x[document].float().repeat_interleave(group, dim=1) for x in (k, v))
        s = torch.einsum("thd,shd->hts", q[document].float(), k_rows) * q.shape[2] ** -0.5
        t = torch.arange(stop - start)
        ahead = t - t[:, None]
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
