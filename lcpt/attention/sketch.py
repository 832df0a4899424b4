"""Sketches S: R^d -> R^r such that (S(q)·S(k))² stands for (q·k/d)^4, non-negative by construction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GaussianSketch(nn.Module):
    """S(x) = √(1/r) (G₁ x') ∘ (G₂ x') with x' = x/√d: PolySketchWithNegativity(x', r, 2) of arXiv 2310.01655.

    The paper's √(1/r) over the product, not the 1/r of its published code, so that E[S(q)·S(k)] = (q·k/d)².
    The matrices are drawn once and travel with the weights. Shared by queries, keys and heads.
    """

    def __init__(self, head_dim: int, size: int):
        super().__init__()
        self.register_buffer("G", torch.randn(2, head_dim, size))
        self.scale = size**-0.25 * head_dim**-0.5  # √(1/r) and 1/d, spread evenly over the two factors

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.scale * self.G).to(x.dtype)
        return (x @ first) * (x @ second)

    def flops(self) -> int:
        return 2 * self.G.numel()


class LearnedSketch(nn.Module):
    """S(x) = tanh(f₁(x) ∘ f₂(x) / √r) with f(x) = W₂ GELU(W₁ x), W₁: d -> e·r, W₂: e·r -> r.

    The learned sketch of arXiv 2310.01655 (section 3), divided by its own bound √r so that |S(q)·S(k)| ≤ r, and
    without its inner LayerNorms: queries and keys come normed. Shared by queries, keys and heads.
    """

    def __init__(self, head_dim: int, size: int, expansion: int):
        super().__init__()
        hidden = expansion * size
        self.size = size
        self.up = nn.Parameter(torch.randn(2, head_dim, hidden) * head_dim**-0.5)
        self.down = nn.Parameter(torch.randn(2, hidden, size) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (F.gelu(x @ up) @ down for up, down in zip(self.up, self.down, strict=True))
        return torch.tanh(first * second * self.size**-0.5)

    def flops(self) -> int:
        return 2 * (self.up.numel() + self.down.numel())
