"""softmax: exp(q·k/√d) over all earlier tokens, by PyTorch's SDPA. The baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lcpt_kernels.streaming import each_document
from torch import Tensor

from lcpt.attention.base import KeyValueCache


class Softmax(KeyValueCache):
    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return each_document(_sdpa, cu_seqlens, {"q": q, "k": k, "v": v})

    def attend_flops(self, context: int) -> tuple[float, float]:
        product = self.n_heads * self.head_dim * context  # one of T×T×D, its causal half
        return 2 * product, 5 * product  # flash attention computes the scores anew in backward


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens, seen = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # PyTorch's is_causal lets the first query see the first key alone: with keys before it, the mask is ours.
    mask = None
    if tokens < seen:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa).transpose(1, 2)
