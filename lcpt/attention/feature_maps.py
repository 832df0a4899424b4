"""Modules of feature maps φ: R^d -> R^m with φ ≥ 0, so that φ(q)·φ(k) is a weight.

lcpt_kernels.feature_maps has the formulas; a module here holds the matrices, those of each key-value head, learned or
drawn once. `MatrixMap` serves every map of the registry; a map has a class of its own where its matrices start
otherwise, or where a checkpoint names them otherwise.

Modules take x [B, T, H, d] with H query or key heads and return [B, T, H, m]. `size` is m, `flops` the FLOPs of one
vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lcpt_kernels.feature_maps import FEATURE_MAPS as REGISTRY
from lcpt_kernels.feature_maps import elu1, favor, feature_map, hedgehog, matrix_shapes, relu
from torch import Tensor, nn

from lcpt.attention.polynomial import power_scale
from lcpt.attention.sketch import LearnedSketch, LinearSketch


class MatrixMap(nn.Module):
    """The map `name` of lcpt_kernels with its matrices as parameters W, G, b, A, B, those of them that it takes.

    Matrices start Gaussian with variance 1 / rows, b starts at 0, a fixed W is drawn Gaussian with variance 1.
    m = `size`, else the registry's expansion · d; without W m = d. A low-rank gate has rank d / 4.
    """

    def __init__(self, name: str, n_kv_heads: int, head_dim: int, size: int | None):
        super().__init__()
        self.name, self.entry = name, REGISTRY[name]
        m = size or self.entry.expansion * head_dim
        self.size, self.flops = self.entry.width(head_dim, m), 0.0
        shapes = matrix_shapes(self.entry.matrices, n_kv_heads, head_dim, m, max(1, head_dim // 4))
        for letter, shape in shapes.items():
            if letter == "b":
                self.b = nn.Parameter(torch.zeros(shape))
                continue
            self.flops += 2.0 * shape[1] * shape[2]
            if self.entry.fixed:
                self.register_buffer(letter, torch.randn(shape))
            else:
                self.register_parameter(letter, nn.Parameter(torch.randn(shape) * shape[1] ** -0.5))

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        matrices = [getattr(self, letter) for letter in self.entry.matrices]
        options: dict[str, Any] = dict.fromkeys(self.entry.options, is_query)
        return feature_map(self.name, x, *matrices, **options)


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
    weights. Exponents are fp32. A query's largest exponent is subtracted: the denominator cancels it. A key's
    largest must not be: it would look into the future, and the LayerNorm before this map bounds the exponents of keys.
    m = `size`, else 2 d.
    """

    omega: Tensor

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


class LinearlySketched(nn.Module):
    """φ(x) = S(x) ⊗ S(x) of the linear sketch S(x) = [1, P x], so that φ(q)·φ(k) = (1 + Pq·Pk)².

    It begins with the slope of (q·k/(4 √d) + 1)⁴, which begins as e^(q·k/√d) does. m = `size`, a square, else 64.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, size: int | None):
        super().__init__()
        self.size = size or 64
        scale = power_scale(4, 1.0, head_dim)
        self.sketch = LinearSketch(n_kv_heads, head_dim, math.isqrt(self.size), scale, shift=1.0)
        self.flops = self.sketch.flops()

    def forward(self, x: Tensor, is_query: bool) -> Tensor:
        y = self.sketch(x)
        return (y[..., :, None] * y[..., None, :]).flatten(-2)


OF_FEEDFORWARD = ("softplus", "oglu", "aoglu")  # maps of the kind feedforward, which penalises W off orthogonal
FEATURE_MAPS: dict[str, Callable[[int, int, int | None], nn.Module]] = {
    "elu1": Elu1,
    "relu": Relu,
    "favor": Favor,
    "hedgehog": Hedgehog,
    "sketch": Sketched,
    "linear_sketch": LinearlySketched,
}
FEATURE_MAPS |= {
    name: partial(MatrixMap, name)
    for name, entry in REGISTRY.items()
    if entry.positive and name not in FEATURE_MAPS and name not in OF_FEEDFORWARD
}


def check_feature_map(kind: str, name: str, size: int | None) -> None:
    """Raise ValueError where model.attention.`kind` has no such feature map, or the map no such size."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"model.attention.{kind}.feature_map is {name!r}; it is one of {', '.join(FEATURE_MAPS)}")
    if size is not None and size < 1:
        raise ValueError(f"model.attention.{kind}.size is {size}; it must be ≥ 1")
    least = {"sketch": 1, "linear_sketch": 4}.get(name)  # of two features, one is the constant
    if least and size is not None and (math.isqrt(size) ** 2 != size or size < least):
        raise ValueError(f"model.attention.{kind}.size is {size}; for a {name} it must be a square ≥ {least}, as 64")


def orthogonal_rows(rows: int, dimension: int) -> Tensor:
    """Draw [rows, dimension], Gaussian in every row and orthogonal within each `dimension` rows."""
    blocks = []
    for _ in range(-(-rows // dimension)):
        Q, R = torch.linalg.qr(torch.randn(dimension, dimension))
        blocks.append((Q * R.diagonal().sign()).T)  # without the signs, some directions would be likelier than others
    return torch.cat(blocks)[:rows] * torch.randn(rows, dimension).norm(dim=1, keepdim=True)
