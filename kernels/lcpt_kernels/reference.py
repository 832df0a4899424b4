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


def flurka_attention(
    q, phi_q, k, v, log_gate, phi_summary, v_summary, mass_summary, local, scale, offset, block_size, local_blocks
):
    """DESIGN.md, section 1: exp(scale q·k), or scale q·k, in the last `local_blocks` blocks; before them a token meets
    the summaries of whole blocks, each weighing φ(q)·φ(k̃) and fading from the end of its block on."""
    tokens = q.shape[1]
    block = torch.arange(tokens, device=q.device) // block_size
    whole = tokens // block_size
    of_summary = torch.arange(whole, device=q.device).repeat_interleave(phi_summary.shape[1] // whole if whole else 0)
    near = (block[None, :] > block[:, None] - local_blocks).tril()  # [T, T]
    far = of_summary[None, :] <= block[:, None] - local_blocks  # [T, N·r]
    s = scale * scores(q, k)
    near_weights = torch.where(near, s.exp() if local == "softmax" else s, 0.0)
    far_weights = torch.where(far, scores(phi_q, phi_summary), 0.0)
    if log_gate is not None:
        G = log_gate.transpose(1, 2).cumsum(-1)  # [B, H, T]
        G_end = G[..., (of_summary + 1) * block_size - 1]  # [B, H, N·r]
        near_weights = near_weights * torch.where(near, G[..., :, None] - G[..., None, :], 0.0).exp()
        far_weights = far_weights * torch.where(far, G[..., :, None] - G_end[..., None, :], 0.0).exp()
    mass = far_weights if mass_summary is None else far_weights * mass_summary.transpose(1, 2)[..., None, :]
    denominator = (offset + near_weights.sum(-1) + mass.sum(-1)).transpose(1, 2).unsqueeze(-1)
    numerator = torch.einsum("bhts,bshe->bthe", near_weights, v)
    numerator = numerator + torch.einsum("bhts,bshe->bthe", far_weights, v_summary)
    return torch.where(denominator == 0, 0.0, numerator / denominator.where(denominator != 0, 1.0))


def lowrank_attention(q, k, v, q_far, k_summary, v_summary, summaries, scale, block_size, local_blocks):
    """One softmax over the tokens of the last `local_blocks` blocks, and the summaries of whole blocks before them,
    each for the c/r tokens that it stands for. The first keys may be of earlier tokens, the last kept of many."""
    tokens, keys = q.shape[1], k.shape[1]
    before = k_summary.shape[1] // summaries - keys // block_size  # blocks before the first key
    block = torch.arange(keys, device=q.device) // block_size + before
    of_summary = torch.arange(k_summary.shape[1], device=q.device) // summaries
    asking = block[keys - tokens :, None]
    near = (block[None, :] > asking - local_blocks).tril(keys - tokens)
    far = of_summary[None, :] <= asking - local_blocks
    mass = block_size / summaries
    weights = torch.cat((
        torch.where(far, mass * (scale * scores(q_far, k_summary)).exp(), 0.0),
        torch.where(near, (scale * scores(q, k)).exp(), 0.0),
    ), dim=-1)
    return torch.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdim=True), torch.cat((v_summary, v), dim=1))


def sparse_attention(q, k, v, q_keep, k_keep, q_bucket, k_bucket, scale, window):
    """DESIGN.md, section 3: a softmax over the earlier keys, itself among them, that are kept and of the query's
    bucket, or among the last `window`; 0 where the query is dropped or sees none. Marks are [B, T, H]; with more keys
    than queries, the last ones are of the same tokens."""
    tokens, keys = q.shape[1], k.shape[1]
    seen = torch.ones(q.shape[0], q.shape[2], tokens, keys, dtype=torch.bool, device=q.device)
    if k_keep is not None:
        seen = seen & k_keep.transpose(1, 2)[..., None, :]
    if q_bucket is not None:
        seen = seen & (q_bucket.transpose(1, 2)[..., :, None] == k_bucket.transpose(1, 2)[..., None, :])
    seen = (seen | seen.new_ones(tokens, keys).triu(keys - tokens - window + 1)).tril(keys - tokens)
    if q_keep is not None:
        seen = seen & q_keep.transpose(1, 2)[..., :, None]
    blind = ~seen.any(-1, keepdim=True)
    s = (scale * scores(q, k)).masked_fill(~(seen | blind), -torch.inf)  # a row of -inf would give NaN
    return torch.einsum("bhts,bshe->bthe", s.softmax(-1) * seen, v)


def polynomial_attention(q, k, v, degree, scale, offset):
    """PolySketchFormer (arXiv 2310.01655), section 1.1 of its algorithm: w_ts = (scale · q_t·k_s)^degree."""
    return normalised_sum((scale * scores(q, k)) ** degree, v, offset)
