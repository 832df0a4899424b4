"""fastmax: 1 + s + s²/2 (or 1 + s) of the cosine s of query and key, the first terms of exp, at linear cost.

FAST (arXiv 2402.07901). Every token is normalised by itself: the published code divides by a maximum over all tokens,
or subtracts their mean, and so looks into the future.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from lcpt_kernels import squared_attention
from lcpt_kernels.symmetric_features import QuadraticFeatures

from lcpt.attention.base import LinearCost, Projected

COEFFICIENTS = {1: (1.0, 1.0, 0.0), 2: (1.0, 1.0, 0.5)}


@dataclass
class FastmaxConfig:
    """Says how many terms of exp fastmax has. Raises ValueError that names a key out of its range."""

    order: int = 2  # 1: 1 + s; 2: 1 + s + s²/2

    def __post_init__(self):
        if self.order not in COEFFICIENTS:
            raise ValueError(f"model.attention.fastmax.order is {self.order}; it is 1 or 2")


class Fastmax(LinearCost):
    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        self.coefficients = COEFFICIENTS[config.fastmax.order]

    def attend_blocks(self, p: Projected, **stream):
        q, k = F.normalize(p.q, dim=-1), F.normalize(p.k, dim=-1)
        return squared_attention(q, k, p.v, coefficients=self.coefficients, **stream)

    def features(self) -> int:
        return QuadraticFeatures(self.head_dim, self.coefficients).dimension
