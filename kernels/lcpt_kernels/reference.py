"""The definitions, quadratic and literal: every other backend is right when it agrees with these in float64.

One weight matrix [B, H, T, T], one normaliser, no blocks of computation, no features: nothing that a fast
implementation could share a mistake with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalised_sum(weights: Tensor, v: Tensor, offset: float, log_gate: Tensor | None = None) -> Tensor:
    """o_t = Σ_{s ≤ t} w_ts e^{G_t − G_s} v_s / (offset + Σ_{s ≤ t} w_ts e^{G_t − G_s}), and 0/0 is 0.

    weights [B, H, T, T], v [B, T, H, Dv], log_gate [B, T, H] with the running sum G -> o [B, T, H, Dv]. With more keys
    than queries, the last ones are of the same tokens.
    """
    weights = weights.tril(weights.shape[3] - weights.shape[2])
    if log_gate is not None:
        G = log_gate.transpose(1, 2).cumsum(-1)
        weights = weights * (G[..., :, None] - G[..., None, :]).tril().exp()
    denominator = (offset + weights.sum(-1)).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
    numerator = torch.einsum("bhts,bshe->bthe", weights, v)
    return torch.where(denominator == 0, 0.0, numerator / denominator.where(denominator != 0, 1.0))


def scores(x: Tensor, y: Tensor) -> Tensor:
    """x_t · y_s for every pair: [B, T, H, D] twice -> [B, H, T, T]."""
    return torch.einsum("bthd,bshd->bhts", x, y)


def per_query_head(heads: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """What belongs to keys, [B, T, Hkv, ·], repeated so that each of `heads` query heads has its own."""
    return [x if x is None else x.repeat_interleave(heads // x.shape[2], dim=2) for x in tensors]


def squared_attention(a, b, v, q, k, log_gate, degree, scale, offset, coefficients, block_size, local_blocks):
    """DESIGN.md, section 1: exact weights in the last `local_blocks` blocks, c₀ + c₁ s + c₂ s² before them."""
    c0, c1, c2 = coefficients
    s = scores(a, b)
    weights = c0 + c1 * s + c2 * s.square()
    if q is not None:
        block = torch.arange(a.shape[1], device=a.device) // block_size
        local = block[None, :] > block[:, None] - local_blocks  # [T, T]: does t see s exactly?
        weights = torch.where(local, (scale * scores(q, k)) ** degree, weights)
    return normalised_sum(weights, v, offset, log_gate)


def feature_attention(phi_q, phi_k, v, log_gate, offset):
    """Linear attention (arXiv 2006.16236): w_ts = φ(q_t)·φ(k_s)."""
    return normalised_sum(scores(phi_q, phi_k), v, offset, log_gate)


def polynomial_attention(q, k, v, degree, scale, offset):
    """PolySketchFormer (arXiv 2310.01655), section 1.1 of its algorithm: w_ts = (scale · q_t·k_s)^degree."""
    return normalised_sum((scale * scores(q, k)) ** degree, v, offset)
