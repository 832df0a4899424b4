"""The definitions, quadratic and literal: every other backend is right when it agrees with these in float64.

One weight matrix [B, H, T, T], one normaliser, no blocks of computation, no features: nothing that a fast
implementation could share a mistake with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalised_sum(weights: Tensor, v: Tensor, offset: float) -> Tensor:
    """o_t = Σ_{s ≤ t} w_ts v_s / (offset + Σ_{s ≤ t} w_ts), and 0/0 is 0.

    weights [B, H, T, T], v [B, T, H, Dv] -> o [B, T, H, Dv].
    """
    weights = weights.tril()
    denominator = (offset + weights.sum(-1)).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
    numerator = torch.einsum("bhts,bshe->bthe", weights, v)
    return torch.where(denominator == 0, 0.0, numerator / denominator.where(denominator != 0, 1.0))


def scores(x: Tensor, y: Tensor) -> Tensor:
    """x_t · y_s for every pair: [B, T, H, D] twice -> [B, H, T, T]."""
    return torch.einsum("bthd,bshd->bhts", x, y)


def squared_attention(a, b, v, q, k, degree, scale, offset, coefficients, block_size, local_blocks):
    """DESIGN.md, section 1: exact weights in the last `local_blocks` blocks, c₀ + c₁ s + c₂ s² before them."""
    c0, c1, c2 = coefficients
    s = scores(a, b)
    weights = c0 + c1 * s + c2 * s.square()
    if q is not None:
        block = torch.arange(a.shape[1], device=a.device) // block_size
        local = block[None, :] > block[:, None] - local_blocks  # [T, T]: does t see s exactly?
        weights = torch.where(local, (scale * scores(q, k)) ** degree, weights)
    return normalised_sum(weights, v, offset)


def polynomial_attention(q, k, v, degree, scale, offset):
    """PolySketchFormer (arXiv 2310.01655), section 1.1 of its algorithm: w_ts = (scale · q_t·k_s)^degree."""
    return normalised_sum((scale * scores(q, k)) ** degree, v, offset)
