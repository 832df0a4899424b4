"""Normalise the residual stream: LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

from typing import cast

from lcpt_kernels import add_layer_norm, add_rms_norm
from torch import Tensor, nn

NORMS = ("layer_norm", "rms_norm")


def build_norm(kind: str, width: int, eps: float, bias: bool) -> nn.Module:
    """Build a norm of NORMS over the last dimension, with a gain; an RMSNorm has no bias."""
    return nn.LayerNorm(width, eps, bias=bias) if kind == "layer_norm" else nn.RMSNorm(width, eps)


def add_and_norm(x: Tensor, delta: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (the norm of x + delta, x + delta), each [..., d], on a GPU in one pass. delta None: 0."""
    if isinstance(norm, nn.LayerNorm):
        return add_layer_norm(x, delta, norm.weight, norm.bias, eps=norm.eps)
    norm = cast(nn.RMSNorm, norm)
    return add_rms_norm(x, delta, norm.weight, eps=cast(float, norm.eps))
