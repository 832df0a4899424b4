"""softmax: exp(q·k/√d) over all earlier tokens, or over a sliding window of them: the baseline.

By PyTorch's SDPA. Packed documents and continued sequences on a GPU: by the FlashAttention inside PyTorch, and in fp32,
which it does not know, by SDPA under a mask.
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
from lcpt.attention.key_blocks import Blocks, add_keys, attend_to_blocks, joined
from lcpt.attention.resplit import cut_into_pieces
from lcpt.parallel.sequence import SequenceSlice, shift
from lcpt.utils.recomputation import recompute

ROWS = 512  # queries at a time, where there is a mask: it has ROWS × the keys that they see


@dataclass
class SoftmaxConfig:
    """Says how far softmax sees. Raises ValueError that names a key out of its range."""

    window: Optional[int] = None  # noqa: UP045  tokens that one sees, itself among them; None: all earlier ones

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"model.attention.softmax.window is {self.window}; it must be ≥ 1")


class Softmax(KeyValueCache):
    @classmethod
    def resolve_class(cls, config) -> type[Attention]:
        return cls if config.softmax.window is None else WindowSoftmax

    def attend(self, p: Projected, state=None, keep: bool = False, cu_seqlens: Tensor | None = None):
        past: Blocks = state or ()
        if past and not is_on_device(p.q) and not torch.is_grad_enabled():
            o = attend_to_blocks(p.q, past, p.k, p.v)
        else:
            k, v = joined((*past, (p.k, p.v))) if past else (p.k, p.v)
            o = self.attend_to(p.q, k, v, cu_seqlens)
        return o, add_keys(past, p.k, p.v) if keep else None

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return _causal(q, k, v)
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

    def attend_between_ranks(self, p: Projected, part: SequenceSlice) -> Tensor:
        if self.window - 1 > part.tokens:
            return super().attend_between_ranks(p, part)
        # Slices are equal work already, and all keys before them are on one rank.
        rows = [dict.fromkeys(("k", "v"), min(self.window - 1, held)) for held in part.held]
        before = shift(part, {"k": p.k, "v": p.v}, rows)
        k, v = (torch.cat((before[name], x), dim=1) for name, x in (("k", p.k), ("v", p.v)))
        first_key = part.first - before["k"].shape[1]
        outputs = []
        for piece in cut_into_pieces(part.first, part.first + part.tokens, part.borders):
            keys = slice(max(piece.document, first_key) - first_key, piece.stop - first_key)
            q = p.q[:, piece.start - part.first : piece.stop - part.first]
            outputs.append(self.attend_to(q, k[:, keys], v[:, keys], piece.cu_seqlens(q.device)))
        return torch.cat(outputs, dim=1)

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
        one = _causal if window is None else partial(_in_window, window=window)
        return each_document(one, cu_seqlens, {"q": q, "k": k, "v": v})
    check_packed(cu_seqlens, *q.shape[:2])
    if _fits_flash(q):
        ends = cu_seqlens.int()
        return _flash(q, k, v, ends, ends, window)
    return _sdpa(q, k, v, document_mask(cu_seqlens, q.shape[1], window))


def _fits_flash(q: Tensor) -> bool:
    return is_on_device(q) and q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256


def _flash(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, window: int | None) -> Tensor:
    """The operator under torch.nn.attention.varlen: its signature is that of PyTorch 2.7 still, its public function's
    is not, which had no window at first. A document's last query sees its last key."""
    o, *_ = torch.ops.aten._flash_attention_forward(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        ends_q,
        ends_k,
        q.shape[1],  # bounds that the host knows
        k.shape[1],
        0.0,
        is_causal=window is None,
        return_debug_mask=False,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return o.view(q.shape)


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
    if tokens <= window:
        return _causal(q, k, v, window)
    rows, blocks = window, math.ceil(tokens / window)
    missing, lacking = window - (seen - tokens), blocks * rows - tokens  # keys before the first; tokens after the last
    q = F.pad(q, (0, 0, 0, 0, 0, lacking)).unflatten(1, (blocks, rows))
    k, v = (  # [B, blocks, window + rows, Hkv, D]; where `missing` is negative, pad cuts off
        F.pad(x, (0, 0, 0, 0, missing, lacking)).unfold(1, window + rows, rows).movedim(-1, 2) for x in (k, v)
    )
    band = torch.ones(rows, window + rows, dtype=torch.bool, device=q.device).tril(window).triu(1)
    padding = torch.arange(window + rows, device=q.device) < missing  # only the first block meets it
    first = _sdpa(q[:, 0], k[:, 0], v[:, 0], band & ~padding)
    q, k, v = (x[:, 1:].flatten(0, 1) for x in (q, k, v))
    others = _sdpa(q, k, v, band).unflatten(0, (-1, blocks - 1)).flatten(1, 2)
    return torch.cat((first, others), dim=1)[:, :tokens]


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """q [B, T, H, D], k and v [B, P + T, Hkv, D]: a token sees all up to itself, or the last `window` of them."""
    (batch, tokens), seen = q.shape[:2], k.shape[1]
    if window is None or seen <= window:
        window = None
        if tokens == seen:
            return _sdpa(q, k, v, causal=True)
        if tokens == 1:
            return _sdpa(q, k, v)
    if _fits_flash(q):
        ends_q, ends_k = (n * torch.arange(batch + 1, dtype=torch.int32, device=q.device) for n in (tokens, seen))
        return _flash(q, k, v, ends_q, ends_k, window)
    # PyTorch's is_causal lets the first query see the first key alone: with keys before it, the mask is ours, and only
    # as large as a block of queries makes it.
    outputs = []
    for start in range(0, tokens, ROWS):
        stop = min(start + ROWS, tokens)
        last = seen - tokens + stop
        keys = slice(0 if window is None else max(0, last - (stop - start) + 1 - window), last)
        outputs.append(recompute(_last_rows, q[:, start:stop], k[:, keys], v[:, keys], window))
    return torch.cat(outputs, dim=1)


def _last_rows(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The queries are of the last keys."""
    tokens, seen = q.shape[1], k.shape[1]
    mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
    if window is not None:
        mask = mask.triu(seen - tokens + 1 - window)
    return _sdpa(q, k, v, mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """mask bool: who sees whom; None: all see all, or with `causal` [T, T] those up to themselves."""
    gqa = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
    return o.transpose(1, 2)
