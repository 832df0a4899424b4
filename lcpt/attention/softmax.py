"""softmax: exp(q·k/√d) over all earlier tokens, by PyTorch's SDPA. The baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt.attention.base import KeyValueCache


class Softmax(KeyValueCache):
    def attend_to(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, seen = q.shape[1], k.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # PyTorch's is_causal lets the first query see the first key alone: with keys before it, the mask is ours.
        mask = None
        if tokens < seen:
            mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.n_kv_heads != self.n_heads,
        ).transpose(1, 2)

    def attend_flops(self, context: int) -> tuple[float, float]:
        product = self.n_heads * self.head_dim * context  # one of T×T×D, its causal half
        return 2 * product, 5 * product  # flash attention computes the scores anew in backward
