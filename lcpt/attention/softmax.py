"""softmax: exp(q·k/√d) over all earlier tokens, by PyTorch's SDPA. The baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lcpt.attention.base import Attention


class Softmax(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = self.n_kv_heads != self.n_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    def attend_flops(self, context: int) -> tuple[float, float]:
        product = self.n_heads * self.head_dim * context  # one of T×T×D, its causal half
        return 2 * product, 5 * product  # flash attention computes the scores anew in backward

    def state_bytes(self, context: int) -> int:
        return 4 * 2 * self.n_kv_heads * self.head_dim * context
