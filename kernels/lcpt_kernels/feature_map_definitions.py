"""The registry of feature maps: of each map its formula in PyTorch, the matrices it takes, and its width.

A map needs one entry in FEATURE_MAPS and one in FORMULAS of `triton/fused/feature_map_formulas.py`. Tests, the kernel
report and the benchmarks iterate over FEATURE_MAPS. docs/adding-a-feature-map.md is the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt_kernels.constants import TINY

SHAPES = {"W": "Hdm", "G": "Hdm", "b": "Hm", "A": "Hdr", "B": "Hrm"}  # H: key-value heads


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """One feature map φ: R^d -> R^(halves · m), applied to rows."""

    formula: Callable[..., Tensor]  # in PyTorch: x [B, T, H, d], matrices and options -> φ(x) [B, T, H, halves · m]
    matrices: str = ""  # letters of SHAPES, in the order of the formula's arguments; without W, m is d
    options: tuple[str, ...] = ()  # "subtract_peak", the one option that the kernels know
    halves: int = 1  # 2: the kernel computes two tiles of m features, [first, second]
    expansion: int = 1  # m / d where nobody chooses m
    fixed: bool = False  # W is fp32 and a constant: it has no gradient
    positive: bool = True  # False: a product φ(q)·φ(k) may be negative and is no weight before it is squared

    def width(self, d: int, m: int) -> int:
        """Return the width of φ(x), for rows of width d and matrices with m columns."""
        return self.halves * (m if "W" in self.matrices else d)


FEATURE_MAPS: dict[str, FeatureMap] = {}  # by name


def matrix_shapes(matrices: str, heads: int, d: int, m: int, r: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of these matrices, for `heads` key-value heads; r is the rank of A B."""
    sizes = {"H": heads, "d": d, "m": m, "r": r}
    return {name: tuple(sizes[letter] for letter in SHAPES[name]) for name in matrices}


def per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply each head's rows by the matrix of its key-value head.

    Args:
        x: [B, T, H, d], floating point.
        matrices: [Hw, d, m], H a multiple of Hw; cast to x's dtype.

    Returns:
        [B, T, H, m] in x's dtype.

    Example:
        >>> per_head(torch.ones(1, 2, 4, 3), torch.ones(2, 3, 5)).shape
        torch.Size([1, 2, 4, 5])
    """
    grouped = x.unflatten(2, (matrices.shape[0], -1))
    return torch.einsum("bthgd,hdm->bthgm", grouped, matrices.to(x.dtype)).flatten(2, 3)


def elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


FEATURE_MAPS["elu1"] = FeatureMap(formula=elu1)


def affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    bias = b.repeat_interleave(x.shape[2] // len(b), dim=0)  # [H, m]
    return per_head(x, W) + bias.to(x.dtype)


FEATURE_MAPS["affine"] = FeatureMap(formula=affine, matrices="Wb", positive=False)


def relu(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return F.relu(affine(x, W, b)) + TINY


FEATURE_MAPS["relu"] = FeatureMap(formula=relu, matrices="Wb")


def favor(x: Tensor, W: Tensor, *, subtract_peak: bool = False) -> Tensor:
    scaled = (x if x.dtype == torch.float64 else x.float()) * x.shape[-1] ** -0.25
    exponents = per_head(scaled, W) - scaled.square().sum(-1, keepdim=True) / 2
    if subtract_peak:
        exponents = exponents - exponents.detach().amax(-1, keepdim=True)
    return ((exponents.exp() + TINY) * W.shape[2] ** -0.5).to(x.dtype)


FEATURE_MAPS["favor"] = FeatureMap(formula=favor, matrices="W", options=("subtract_peak",), expansion=2, fixed=True)


def hedgehog(x: Tensor, W: Tensor) -> Tensor:
    y = per_head(x, W)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1)


FEATURE_MAPS["hedgehog"] = FeatureMap(formula=hedgehog, matrices="W", halves=2)


def softplus(x: Tensor, W: Tensor) -> Tensor:
    return F.softplus(per_head(x, W))


FEATURE_MAPS["softplus"] = FeatureMap(formula=softplus, matrices="W")


def oglu(x: Tensor, W: Tensor, G: Tensor) -> Tensor:
    return F.softplus(per_head(x, W)) * torch.sigmoid(per_head(x, G))


FEATURE_MAPS["oglu"] = FeatureMap(formula=oglu, matrices="WG")


def aoglu(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.softplus(per_head(x, W)) * torch.sigmoid(per_head(per_head(x, A), B))


FEATURE_MAPS["aoglu"] = FeatureMap(formula=aoglu, matrices="WAB")
