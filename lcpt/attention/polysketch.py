"""polysketch: exact (q·k/d)^4 in the local blocks, a sketch of it in a running state before them, at linear cost.

PolySketchFormer (arXiv 2310.01655): w_ts = (q·k/d)^4 locally, e^γ (S(q)·S(k))² earlier, one denominator for both.
γ, learned per head, balances the two parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lcpt_kernels import squared_attention
from lcpt_kernels.symmetric_features import QuadraticFeatures
from torch import nn

from lcpt.attention.base import LinearCost, Projected
from lcpt.attention.sketch import DRAW, LearnedSketch, RandomSketch

DEGREE = 4  # a sketch of degree two, squared


@dataclass
class PolysketchConfig:
    sketch: str = "learned"  # learned | gaussian | srht
    size: int = 32  # r: the state holds about r²/2 features
    expansion: int = 2  # hidden width of the learned sketch, in multiples of r
    levels: int = 1  # networks one after the other in each of its two branches
    local_blocks: int = 1  # blocks seen exactly: this one, and the local_blocks - 1 before it

    def __post_init__(self):
        if self.sketch not in ("learned", *DRAW):
            raise ValueError(f"model.attention.polysketch.sketch is {self.sketch!r}; it is learned, gaussian or srht")
        for name in ("size", "expansion", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.attention.polysketch.{name} is {getattr(self, name)}; it must be ≥ 1")
        if self.local_blocks not in (1, 2):
            raise ValueError(f"model.attention.polysketch.local_blocks is {self.local_blocks}; it is 1 or 2")


class Polysketch(LinearCost):
    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: PolysketchConfig = config.polysketch
        self.local_blocks, self.size = own.local_blocks, own.size
        self.gamma = nn.Parameter(torch.zeros(n_heads))
        if own.sketch == "learned":
            self.sketch = LearnedSketch(self.head_dim, own.size, own.expansion, own.levels)
        else:
            self.sketch = RandomSketch(self.head_dim, own.size, own.sketch)

    def attend_blocks(self, p: Projected, **stream):
        a = self.sketch(p.q) * torch.exp(self.gamma / 2)[:, None]
        b = self.sketch(p.k)
        return squared_attention(a, b, p.v, q=p.q, k=p.k, degree=DEGREE, scale=1 / self.head_dim, **stream)

    def features(self) -> int:
        return QuadraticFeatures(self.size, (0, 0, 1)).dimension

    def map_flops(self) -> float:
        return self.sketch.flops()

    def floats_per_token(self) -> int:
        return 2 * self.head_dim + self.size
