"""The definitions, quadratic and literal: every other backend is right when it agrees with these in float64.

One weight matrix [B, H, T, T], one normaliser, no blocks of computation, no features: nothing that a fast
implementation could share a mistake with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normalised_sum(weights: Tensor, v: Tensor, offset: float, log_gate: Tensor | None = None) -> Tensor:
    """o_t = Σ_{s ≤ t} w_ts e^{G_t − G_s} v_s / (offset + Σ_{s ≤ t} w_ts e^{G_t − G_s}), and 0/0 is 0.

    weights [B, H, T, T], v [B, T, H, Dv], log_gate [B, T, H] with the running sum G -> o [B, T, H, Dv]. With more keys
    than queries, the last ones are of the same tokens.
    """
    weights = weights.tril(weights.shape[3] - weights.shape[2])
    if log_gate is not None:
        tokens = torch.arange(log_gate.shape[1], device=v.device)
        weights = weights * log_decay(log_gate, tokens).exp().to(weights.dtype)
    denominator = (offset + weights.sum(-1)).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
    numerator = torch.einsum("bhts,bshe->bthe", weights, v)
    return torch.where(denominator == 0, 0.0, numerator / denominator.where(denominator != 0, 1.0))


def log_decay(log_gate: Tensor, since: Tensor) -> Tensor:
    """G_t − G_s for s of `since`: log_gate [B, T, H], since [S] -> float64 [B, H, T, S]; 0 where s is not before t, −∞
    where a gate of −∞ is in between."""
    log_gate = log_gate.transpose(1, 2)
    shut = log_gate == -torch.inf
    G, count = log_gate.masked_fill(shut, 0.0).double().cumsum(-1), shut.cumsum(-1)
    before = since < torch.arange(G.shape[2], device=G.device)[:, None]  # [T, S]
    decay = torch.where(before, G[..., :, None] - G[..., None, since], 0.0)
    return decay.masked_fill(before & (count[..., :, None] != count[..., None, since]), -torch.inf)


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
    far_weights = torch.where(far, scores(phi_q, phi_summary), 0.0)
    faded = None
    if log_gate is not None:
        faded = log_decay(log_gate, torch.arange(tokens, device=q.device))
        far_weights = far_weights * log_decay(log_gate, (of_summary + 1) * block_size - 1).exp().to(s.dtype)
    mass = far_weights if mass_summary is None else far_weights * mass_summary.transpose(1, 2)[..., None, :]
    if local == "softmax":
        near_weights, damping = damped_exponentials(
            (s if faded is None else s + faded.to(s.dtype)).masked_fill(~near, -torch.inf),
            abs(offset) + far_weights.abs().sum(-1, keepdim=True) + mass.abs().sum(-1, keepdim=True),
        )
    else:
        near_weights, damping = torch.where(near, s if faded is None else s * faded.exp().to(s.dtype), 0.0), 1.0
    mass, far_weights, offset = damping * mass, damping * far_weights, damping * offset
    denominator = (near_weights.sum(-1, keepdim=True) + mass.sum(-1, keepdim=True) + offset).transpose(1, 2)
    numerator = torch.einsum("bhts,bshe->bthe", near_weights, v)
    numerator = numerator + torch.einsum("bhts,bshe->bthe", far_weights, v_summary)
    return torch.where(denominator == 0, 0.0, numerator / denominator.where(denominator != 0, 1.0))


def damped_exponentials(exponents: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """e^{x − M} of exponents x [.., n], and e^{−M} [.., 1] for the other terms of a row, which are `others` [.., 1] in
    size. M, which cancels, is the logarithm of the row's greatest term. At least one of x is finite."""
    largest = 0.7 * math.log(torch.finfo(exponents.dtype).max)  # that e^{−M} is finite
    log_others = torch.where(others > 0, others.log().clamp(min=-largest), -torch.inf)
    M = torch.maximum(exponents.amax(-1, keepdim=True), log_others).detach()
    return (exponents - M).exp(), M.neg().clamp(max=largest).exp()


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
    exponents = torch.cat(
        (
            (scale * scores(q_far, k_summary) + math.log(block_size / summaries)).masked_fill(~far, -torch.inf),
            (scale * scores(q, k)).masked_fill(~near, -torch.inf),
        ),
        dim=-1,
    )
    return torch.einsum("bhts,bshe->bthe", exponents.softmax(-1), torch.cat((v_summary, v), dim=1))


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
