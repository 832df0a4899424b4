"""Sketches S: R^d -> R^r such that (S(q)·S(k))² stands for (q·k/d)^4, non-negative by construction."""

from __future__ import annotations

import torch
from lcpt_kernels.learned_sketch import learned_sketch
from torch import Tensor, nn


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns)


def srht(rows: int, columns: int) -> Tensor:
    """Columns of a Hadamard matrix, drawn with replacement, each row with a random sign: entries ±1."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < rows:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    signs = 2.0 * torch.randint(2, (rows, 1)) - 1
    return signs * hadamard[:rows, torch.randint(len(hadamard), (columns,))]


DRAW = {"gaussian": gaussian, "srht": srht}


class RandomSketch(nn.Module):
    """S(x) = √(1/r) (G₁ x') ∘ (G₂ x') with x' = x/√d: PolySketchWithNegativity(x', r, 2) of arXiv 2310.01655.

    The paper's √(1/r) over the product, not the 1/r of its published code, so that E[S(q)·S(k)] = (q·k/d)².
    The matrices are drawn once and travel with the weights. Shared by queries, keys and heads.
    """

    G: Tensor  # [2, D, r]

    def __init__(self, head_dim: int, size: int, kind: str):
        super().__init__()
        self.register_buffer("G", torch.stack([DRAW[kind](head_dim, size) for _ in range(2)]))
        self.scale = size**-0.25 * head_dim**-0.5  # √(1/r) and 1/d, spread evenly over the two factors

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.scale * self.G).to(x.dtype)
        return (x @ first) * (x @ second)

    def flops(self) -> int:
        return 2 * self.G.numel()


class LearnedSketch(nn.Module):
    """S(x) = tanh(f₁(x) ∘ f₂(x) / √r), each f `levels` networks W₂ GELU(W₁ ·) one after the other, all e·r wide.

    The learned sketch of arXiv 2310.01655 (section 3; its code has two levels and e = 8), divided by its own bound √r
    so that |S(q)·S(k)| ≤ r, and without its inner LayerNorms: queries and keys come normed. Shared by queries, keys
    and heads.
    """

    def __init__(self, head_dim: int, size: int, expansion: int, levels: int):
        super().__init__()
        hidden = expansion * size
        inputs = [head_dim] + [size] * (levels - 1)
        self.up = nn.ParameterList(torch.randn(2, d, hidden) * d**-0.5 for d in inputs)
        self.down = nn.ParameterList(torch.randn(2, hidden, size) * hidden**-0.5 for _ in inputs)

    def forward(self, x: Tensor) -> Tensor:
        return learned_sketch(x, tuple(self.up), tuple(self.down))

    def flops(self) -> int:
        return 2 * sum(p.numel() for p in self.parameters())
