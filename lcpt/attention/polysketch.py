"""polysketch: exact (scale·q·k + shift)^4 in the local blocks, a sketch of it in a running state before them.

PolySketchFormer (arXiv 2310.01655), at linear cost: w_ts = (scale·q·k + shift)^4 locally, e^γ (S(q)·S(k))² earlier, one
denominator for both. γ, learned per head, starts where a token weighs as much on average in both parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lcpt_kernels import squared_attention
from lcpt_kernels.symmetric_features import QuadraticFeatures
from torch import nn

from lcpt.attention.balance import balance, mean_power, mean_squared_product
from lcpt.attention.base import LinearCost, Projected
from lcpt.attention.polynomial import check_shift, power_scale
from lcpt.attention.sketch import DRAW, LearnedSketch, LinearProductsSketch, LinearSketch, RandomSketch

DEGREE = 4  # a sketch of degree two, squared
SKETCHES = ("linear", "linear_products", "learned", *DRAW)


@dataclass
class PolysketchConfig:
    """Says how polysketch sketches its power. Raises ValueError that names a key out of its range."""

    sketch: str = "linear"  # linear | linear_products | learned | gaussian | srht
    shift: float = 1.0  # of (q·k / (4 √d) + shift)^4, which begins as e^(q·k/√d) does; 0: (q·k/d)^4
    size: int = 32  # r: the state holds about r²/2 features
    expansion: int = 2  # hidden width of the learned sketch, in multiples of r
    levels: int = 1  # networks one after the other in each of its two branches
    local_blocks: int = 1  # blocks seen exactly: this one, and the local_blocks - 1 before it

    def __post_init__(self):
        if self.sketch not in SKETCHES:
            raise ValueError(
                f"model.attention.polysketch.sketch is {self.sketch!r}; it is one of {', '.join(SKETCHES)}"
            )
        for name in ("size", "expansion", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.attention.polysketch.{name} is {getattr(self, name)}; it must be ≥ 1")
        if self.local_blocks not in (1, 2):
            raise ValueError(f"model.attention.polysketch.local_blocks is {self.local_blocks}; it is 1 or 2")
        check_shift("polysketch", self.shift)
        if self.sketch.startswith("linear") and self.shift == 0:
            raise ValueError(
                f"model.attention.polysketch.shift is 0, and the sketch {self.sketch} needs a constant; "
                "take a shift > 0, or another sketch"
            )
        if self.shift > 0 and self.sketch not in DRAW and self.size < 2:
            raise ValueError(
                f"model.attention.polysketch.size is {self.size}, too small for a constant and a product; "
                "it must be ≥ 2, with polysketch.shift 0 ≥ 1"
            )


class Polysketch(LinearCost):
    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: PolysketchConfig = config.polysketch
        self.local_blocks, self.size = own.local_blocks, own.size
        self.shift, self.scale = own.shift, power_scale(DEGREE, own.shift, self.head_dim)
        self.sketch = build_sketch(own, n_kv_heads, self.head_dim)
        self.gamma = nn.Parameter(torch.zeros(n_heads))
        if own.shift > 0:
            near = mean_power(self.scale, self.shift, DEGREE, self.head_dim)
            far = mean_squared_product(self.sketch, n_kv_heads, self.head_dim)
            self.gamma.data += balance(near, far, n_heads)

    def attend_blocks(self, p: Projected, **stream):
        factor = torch.exp(self.gamma / 2)
        if isinstance(self.sketch, LinearSketch):  # it multiplies in its kernel
            a = self.sketch(p.q, factor)
        else:
            a = self.sketch(p.q) * factor[:, None]
        b = self.sketch(p.k)
        return squared_attention(a, b, p.v, q=p.q, k=p.k, degree=DEGREE, scale=self.scale, shift=self.shift, **stream)

    def features(self) -> int:
        return QuadraticFeatures(self.size, (0, 0, 1)).dimension

    def map_flops(self) -> float:
        return self.sketch.flops()

    def floats_per_token(self) -> int:
        return 2 * self.head_dim + self.size


def build_sketch(config: PolysketchConfig, n_kv_heads: int, head_dim: int):
    scale, shift, size = power_scale(DEGREE, config.shift, head_dim), config.shift, config.size
    if config.sketch == "linear":
        return LinearSketch(n_kv_heads, head_dim, size, scale, shift)
    if config.sketch == "linear_products":
        return LinearProductsSketch(n_kv_heads, head_dim, size, config.expansion, config.levels, scale, shift)
    if config.sketch == "learned":
        return LearnedSketch(head_dim, size, config.expansion, config.levels, shift)
    return RandomSketch(head_dim, size, config.sketch, scale, shift)
