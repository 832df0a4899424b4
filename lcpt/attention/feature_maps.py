"""Feature maps φ: R^d -> R^m with φ ≥ 0, so that φ(q)·φ(k) is a weight; matrices are those of a key-value head.

The formulas are in lcpt_kernels.feature_maps; here is what of them is learned, or drawn once.

Arguments are [B, T, H, d] with H query or key heads, results [B, T, H, m]. `size` is m, `flops` those of one vector.
"""

from __future__ import annotations

import math

import torch
from lcpt_kernels.feature_maps import elu1, favor, hedgehog, relu
from torch import Tensor, nn

from lcpt.attention.sketch import LearnedSketch


class Elu1(nn.Module):
    """φ(x) = elu(x) + 1 (arXiv 2006.16236). m = d, nothing to learn."""

    def __init__(self, n_kv_heads: int, head_dim: int, size: int | None):
        super().__init__()
        self.size, self.flops = head_dim, 0.0

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        return elu1(x)


class Relu(nn.Module):
    """φ(x) = relu(W x + b): the learned map of T2R (arXiv 2103.13076). m = `size`, else d."""

    def __init__(self, n_kv_heads: int, head_dim: int, size: int | None):
        super().__init__()
        self.size = size or head_dim
        self.flops = 2.0 * head_dim * self.size
        self.W = nn.Parameter(torch.randn(n_kv_heads, head_dim, self.size) * head_dim**-0.5)
        self.b = nn.Parameter(torch.zeros(n_kv_heads, 1, self.size))

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        return relu(x, self.W, self.b[:, 0])


class Favor(nn.Module):
    """φ(x) = exp(ω·x' − |x'|²/2) / √m with x' = x / d^¼: FAVOR+ (arXiv 2009.14794), E[φ(q)·φ(k)] = exp(q·k/√d).

    The rows ω are orthogonal within blocks of d, with the norms of Gaussian vectors; drawn once, they travel with the
    weights. Exponents are taken in fp32. A query's greatest is subtracted, which cancels against the normaliser; that
    of the keys must not be, since it would look into the future, but the LayerNorm before this map bounds them.
    m = `size`, else 2 d.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, size: int | None):
        super().__init__()
        self.size = size or 2 * head_dim
        self.flops = 2.0 * head_dim * self.size
        self.register_buffer("omega", torch.stack([orthogonal_rows(self.size, head_dim) for _ in range(n_kv_heads)]))

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        return favor(x, self.omega.mT, subtract_peak=is_query)


class Hedgehog(nn.Module):
    """φ(x) = [softmax(W x), softmax(−W x)] (arXiv 2402.04347), W the identity at first. m = 2 d."""

    def __init__(self, n_kv_heads: int, head_dim: int, size: int | None):
        super().__init__()
        self.size, self.flops = 2 * head_dim, 2.0 * head_dim**2
        self.W = nn.Parameter(torch.eye(head_dim).repeat(n_kv_heads, 1, 1))

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        return hedgehog(x, self.W)


class Sketched(nn.Module):
    """φ(x) = S(x) ⊗ S(x) of a small learned sketch S, so that φ(q)·φ(k) = (S(q)·S(k))² (arXiv 2310.01655).

    m = `size`, a square, else 64.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, size: int | None):
        super().__init__()
        self.size = size or 64
        self.sketch = LearnedSketch(head_dim, math.isqrt(self.size), expansion=2, levels=1)
        self.flops = self.sketch.flops()

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        y = self.sketch(x)
        return (y[..., :, None] * y[..., None, :]).flatten(-2)


FEATURE_MAPS = {"elu1": Elu1, "relu": Relu, "favor": Favor, "hedgehog": Hedgehog, "sketch": Sketched}


def check_feature_map(kind: str, name: str, size: int | None) -> None:
    """ValueError for what model.attention.`kind` cannot be."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"model.attention.{kind}.feature_map is {name!r}; it is one of {', '.join(FEATURE_MAPS)}")
    if size is not None and size < 1:
        raise ValueError(f"model.attention.{kind}.size is {size}; it must be ≥ 1")
    if name == "sketch" and size is not None and math.isqrt(size) ** 2 != size:
        raise ValueError(f"model.attention.{kind}.size is {size}; for a sketch it must be a square, as 64")


def orthogonal_rows(rows: int, dimension: int) -> Tensor:
    """[rows, dimension]: Gaussian in every row, orthogonal within each `dimension` rows."""
    blocks = []
    for _ in range(-(-rows // dimension)):
        Q, R = torch.linalg.qr(torch.randn(dimension, dimension))
        blocks.append((Q * R.diagonal().sign()).T)  # without the signs, some directions would be likelier than others
    return torch.cat(blocks)[:rows] * torch.randn(rows, dimension).norm(dim=1, keepdim=True)
