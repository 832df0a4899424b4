"""Normalise the residual stream: LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

from torch import Tensor, nn

NORMS = ("layer_norm", "rms_norm")


def build_norm(kind: str, width: int, eps: float, bias: bool) -> nn.Module:
    """Build a norm of NORMS over the last dimension, with a gain; an RMSNorm has no bias."""
    return nn.LayerNorm(width, eps, bias=bias) if kind == "layer_norm" else nn.RMSNorm(width, eps)


def add_and_norm(x: Tensor, delta: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (x + delta, the norm of it), each [..., d]: the place of a kernel that does both in one pass."""
    x = x + delta
    return x, norm(x)
