"""softmax: exp(q·k/√d) over all earlier tokens, or over a sliding window of them: the baseline.

By PyTorch's SDPA. Packed documents on a GPU: by the FlashAttention inside PyTorch, and in fp32, which it does not know,
by SDPA under a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from lcpt_kernels.arguments import check_packed, is_on_device
from lcpt_kernels.documents import each_document
from torch import Tensor

from lcpt.attention.base import Attention, KeyValueCache, Projected, positions_in_documents


@dataclass
class SoftmaxConfig:
    window: Optional[int] = None  # noqa: UP045  tokens that one sees, itself among them; None: all earlier ones

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"model.attention.softmax.window is {self.window}; it must be ≥ 1")


class Softmax(KeyValueCache):
    @classmethod
    def resolve_class(cls, config) -> type[Attention]:
        return cls if config.softmax.window is None else WindowSoftmax

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return _sdpa(q, k, v)
        return softmax_in_documents(q, k, v, cu_seqlens)

    def attend_flops(self, context: int) -> tuple[float, float]:
        product = self.n_heads * self.head_dim * context  # one of T×T×D, its causal half
        return 2 * product, 5 * product  # flash attention computes the scores anew in backward


class WindowSoftmax(KeyValueCache):
    """Over the last `window` tokens: cost and memory do not grow with the context."""

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        self.window = config.softmax.window

    def attend(self, p: Projected, state=None, keep: bool = False, cu_seqlens: Tensor | None = None):
        o, state = super().attend(p, state, keep, cu_seqlens)
        if not keep:
            return o, None
        gone = max(0, state[0].shape[1] - (self.window - 1))
        return o, tuple(x[:, gone:].clone() for x in state)  # copies: views would keep everything

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return _in_window(q, k, v, self.window)
        return softmax_in_documents(q, k, v, cu_seqlens, self.window)

    def attend_flops(self, context: int) -> tuple[float, float]:
        keys = context / 2 if context <= self.window else 2 * self.window  # masked ones are computed too
        product = 2.0 * self.n_heads * self.head_dim * keys
        return 2 * product, 5 * product

    def state_bytes(self, context: int) -> int:
        return super().state_bytes(min(context, self.window - 1))


def softmax_in_documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None = None) -> Tensor:
    """Return softmax attention of packed documents, B = 1, each for itself: q [1, T, H, D], k and v [1, T, Hkv, D].

    window: tokens that one sees, itself among them; None: all earlier ones. On a GPU the host does not wait for
    cu_seqlens.
    """
    if not is_on_device(q):
        one = _sdpa if window is None else partial(_in_window, window=window)
        return each_document(one, cu_seqlens, {"q": q, "k": k, "v": v})
    check_packed(cu_seqlens, *q.shape[:2])
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256:
        return _flash(q, k, v, cu_seqlens, window)
    return _sdpa(q, k, v, document_mask(cu_seqlens, q.shape[1], window))


def _flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """The operator under torch.nn.attention.varlen: its signature is that of PyTorch 2.7 still, its public function's
    is not, which had no window at first."""
    ends, longest = cu_seqlens.int(), q.shape[1]  # longest: a bound that the host knows
    o, *_ = torch.ops.aten._flash_attention_forward(
        q[0],
        k[0],
        v[0],
        ends,
        ends,
        longest,
        longest,
        0.0,
        is_causal=window is None,
        return_debug_mask=False,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return o[None]


def document_mask(cu_seqlens: Tensor, tokens: int, window: int | None) -> Tensor:
    """Who sees whom, bool [T, T]."""
    t = torch.arange(tokens, device=cu_seqlens.device)
    reach = positions_in_documents(cu_seqlens, tokens)  # how many tokens before itself a token sees
    if window is not None:
        reach = reach.clamp(max=window - 1)
    distance = t[:, None] - t
    return (distance >= 0) & (distance <= reach[:, None])


def _in_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [B, T, H, D], k and v [B, P + T, Hkv, D]: token t sees t − window < s ≤ t.

    Blocks of queries, folded into the batch, each against its own keys and the `window` before them.
    """
    tokens, seen = q.shape[1], k.shape[1]
    if seen <= window:
        return _sdpa(q, k, v)
    rows = min(window, tokens)
    blocks = math.ceil(tokens / rows)
    missing, lacking = window - (seen - tokens), blocks * rows - tokens  # keys before the first; tokens after the last
    q = F.pad(q, (0, 0, 0, 0, 0, lacking)).unflatten(1, (blocks, rows))
    k, v = (  # [B, blocks, window + rows, Hkv, D]; where `missing` is negative, pad cuts off
        F.pad(x, (0, 0, 0, 0, missing, lacking)).unfold(1, window + rows, rows).movedim(-1, 2) for x in (k, v)
    )
    band = torch.ones(rows, window + rows, dtype=torch.bool, device=q.device).tril(window).triu(1)
    padding = torch.arange(window + rows, device=q.device) < missing  # only the first block meets it
    outputs = [_sdpa(q[:, 0], k[:, 0], v[:, 0], band & ~padding)]
    if blocks > 1:
        q, k, v = (x[:, 1:].flatten(0, 1) for x in (q, k, v))
        others = _sdpa(q, k, v, band)
        outputs.append(others.unflatten(0, (-1, blocks - 1)).flatten(1, 2))
    return torch.cat(outputs, dim=1)[:, :tokens]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """mask bool [T, P + T]: who sees whom; None: causal."""
    tokens, seen = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask is None and tokens < seen:
        # PyTorch's is_causal lets the first query see the first key alone: with keys before it, the mask is ours.
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa).transpose(
        1, 2
    )
