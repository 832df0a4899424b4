"""Sketches S: R^d -> R^r such that (S(q)·S(k))² stands for (scale·q·k + shift)^4, non-negative by construction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lcpt_kernels.feature_maps import affine
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
    """S(x) = √(1/r) (G₁ x') ∘ (G₂ x') with x' = [√scale·x, √shift], so that q'·k' = scale·q·k + shift.

    This is PolySketchWithNegativity(x', r, 2) of arXiv 2310.01655, with the paper's √(1/r) over the product, not the
    1/r of its published code: E[S(q)·S(k)] = (scale·q·k + shift)². Without a shift, x' has no constant coordinate. The
    matrices are drawn once and travel with the weights. Shared by queries, keys and heads.
    """

    G: Tensor  # [2, D, r], with a shift [2, D + 1, r]

    def __init__(self, head_dim: int, size: int, kind: str, scale: float, shift: float = 0.0):
        super().__init__()
        rows = head_dim + (shift > 0)
        self.register_buffer("G", torch.stack([DRAW[kind](rows, size) for _ in range(2)]))
        self.head_dim = head_dim
        self.factor = size**-0.25 * scale**0.5  # √(1/r) is spread evenly over the two factors
        self.constant = size**-0.25 * shift**0.5

    def forward(self, x: Tensor) -> Tensor:
        matrices = (self.factor * self.G[:, : self.head_dim]).to(x.dtype)
        first, second = (x @ matrix for matrix in matrices)
        if self.constant:
            first, second = (
                y + (self.constant * g[-1]).to(x.dtype) for y, g in zip((first, second), self.G, strict=True)
            )
        return first * second

    def flops(self) -> int:
        return 2 * self.G[:, : self.head_dim].numel()


class LinearSketch(nn.Module):
    """S(x) = [shift, P x] with P learned, so that S(q)·S(k) = shift² + Pq·Pk.

    P starts such that Pq·Pk has the slope of the linear term of (scale·q·k + shift)². From the start the weight then
    grows with q·k from its sign on, without which a model does not learn to recall. P is a key-value head's own. It
    starts by picking the pairs that RoPE turns least: what a mixture of pairs makes of q·k would depend on where both
    tokens stand, not only on how far they are apart. r − 1 of d coordinates hold a correlation of at most √((r − 1)/d)
    with q·k until P and the projections before it have learned.
    """

    constant: Tensor  # [1, r], [shift, 0, …]

    def __init__(self, n_kv_heads: int, head_dim: int, size: int, scale: float, shift: float):
        super().__init__()
        self.shift = shift
        self.register_buffer("constant", torch.empty(1, size), persistent=False)
        self.reset_buffers()
        slowest_first = torch.arange(head_dim).view(2, -1).flip(1).T.flatten()  # of the pairs (i, i + d/2)
        kept = min(size - 1, head_dim)
        P = F.pad(torch.eye(head_dim)[:, slowest_first[:kept]], (0, size - 1 - kept))  # [d, r - 1]
        slope = 2 * shift * scale * head_dim / kept
        self.P = nn.Parameter((slope**0.5 * P).repeat(n_kv_heads, 1, 1))

    def reset_buffers(self) -> None:
        """Fill what no checkpoint holds, which a module that was built on the meta device does not have."""
        self.constant.zero_()[0, 0] = self.shift

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """factor [H]: of S(x) of each head of x; it is multiplied into matrices, which are smaller than S(x)."""
        W = F.pad(self.P, (1, 0))  # [Hkv, d, r]
        if factor is None:
            return affine(x, W, self.constant.expand(len(W), -1))
        W = W.repeat_interleave(len(factor) // len(W), dim=0)
        return affine(x, factor[:, None, None] * W, factor[:, None] * self.constant)

    def flops(self) -> int:
        return 2 * self.P[0].numel()


class LearnedSketch(nn.Module):
    """S(x) = tanh(f₁(x) ∘ f₂(x) / √r), each f `levels` networks W₂ GELU(W₁ ·) one after the other, all e·r wide.

    The learned sketch of arXiv 2310.01655 (section 3; its code has two levels and e = 8), divided by its own bound √r
    so that |S(q)·S(k)| ≤ r, and without its inner LayerNorms: queries and keys come normed. Shared by queries, keys
    and heads. With a shift, the first of the r coordinates is that constant. At the start its weights do not grow with
    q·k (correlation 0.1): models learn to recall late or not at all.
    """

    def __init__(self, head_dim: int, size: int, expansion: int, levels: int, shift: float = 0.0):
        super().__init__()
        self.shift = shift
        made = size - (shift > 0)
        hidden = expansion * made
        inputs = [head_dim] + [made] * (levels - 1)
        self.up = nn.ParameterList(torch.randn(2, d, hidden) * d**-0.5 for d in inputs)
        self.down = nn.ParameterList(torch.randn(2, hidden, made) * hidden**-0.5 for _ in inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = learned_sketch(x, tuple(self.up), tuple(self.down))
        return F.pad(y, (1, 0), value=self.shift) if self.shift else y

    def flops(self) -> int:
        return 2 * sum(p.numel() for p in self.parameters())


class LinearProductsSketch(nn.Module):
    """S(x) = [shift, P x + g ∘ T(x)] with a learned sketch T of products and g = 0 at the start: linear at first, then
    as selective as T makes it."""

    def __init__(
        self, n_kv_heads: int, head_dim: int, size: int, expansion: int, levels: int, scale: float, shift: float
    ):
        super().__init__()
        self.linear = LinearSketch(n_kv_heads, head_dim, size, scale, shift)
        self.products = LearnedSketch(head_dim, size - 1, expansion, levels)
        self.gain = nn.Parameter(torch.zeros(size - 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.pad(self.gain.to(x.dtype) * self.products(x), (1, 0))

    def flops(self) -> int:
        return self.linear.flops() + self.products.flops()
