"""The definitions, quadratic and literal: every other backend is right when it agrees with these in float64.

One weight matrix [B, H, T, T], one denominator, no blocks of computation, no features: a fast implementation can share
no mistake with it.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", Tensor, Tensor | None)


def weighted_average(weights: Tensor, v: Tensor, offset: float, log_gate: Tensor | None = None) -> Tensor:
    """Return o_t = Σ_{s ≤ t} w_ts e^{G_t − G_s} v_s / (offset + Σ_{s ≤ t} w_ts e^{G_t − G_s}), [B, T, H, Dv]; 0/0 is 0.

    weights [B, H, T, T], v [B, T, H, Dv], log_gate [B, T, H] with the running sum G. With more keys than queries, the
    queries are those of the last keys' tokens.
    """
    weights = weights.tril(weights.shape[3] - weights.shape[2])
    if log_gate is not None:
        tokens = torch.arange(log_gate.shape[1], device=v.device)
        weights = weights * log_decay(log_gate, tokens).exp().to(weights.dtype)
    denominator = (offset + weights.sum(-1)).transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
    numerator = torch.einsum("bhts,bshe->bthe", weights, v)
    return torch.where(denominator == 0, 0.0, numerator / denominator.where(denominator != 0, 1.0))


def log_decay(log_gate: Tensor, start: Tensor) -> Tensor:
    """Return G_t − G_s for the positions s in `start` [S], float64 [B, H, T, S], of log_gate [B, T, H]. It is 0 where s
    is not before t, and −∞ where a gate after s up to t is −∞."""
    log_gate = log_gate.transpose(1, 2)
    shut = log_gate == -torch.inf
    G, count = log_gate.masked_fill(shut, 0.0).double().cumsum(-1), shut.cumsum(-1)
    before = start < torch.arange(G.shape[2], device=G.device)[:, None]  # [T, S]
    decay = torch.where(before, G[..., :, None] - G[..., None, start], 0.0)
    return decay.masked_fill(before & (count[..., :, None] != count[..., None, start]), -torch.inf)


def scores(x: Tensor, y: Tensor) -> Tensor:
    """Return x_t · y_s for every pair, [B, H, T, T], of x and y [B, T, H, D]."""
    return torch.einsum("bthd,bshd->bhts", x, y)


def per_query_head(heads: int, *tensors: T) -> list[T]:
    """Repeat tensors of keys, [B, T, Hkv, ·], so that each of `heads` query heads has its own."""
    return [x if x is None else x.repeat_interleave(heads // x.shape[2], dim=2) for x in tensors]


def squared_attention(a, b, v, *, q, k, log_gate, degree, scale, shift, offset, coefficients, block_size, local_blocks):
    """Squared attention: exact weights in the last `local_blocks` blocks, c₀ + c₁ s + c₂ s² before them."""
    c0, c1, c2 = coefficients
    s = scores(a, b)
    weights = c0 + c1 * s + c2 * s.square()
    if q is not None:
        block = torch.arange(a.shape[1], device=a.device) // block_size
        local = block[None, :] > block[:, None] - local_blocks  # [T, T]: does t see s exactly?
        weights = torch.where(local, (scale * scores(q, k) + shift) ** degree, weights)
    return weighted_average(weights, v, offset, log_gate)


def feature_attention(phi_q, phi_k, v, log_gate, offset):
    """Linear attention (arXiv 2006.16236): w_ts = φ(q_t)·φ(k_s)."""
    return weighted_average(scores(phi_q, phi_k), v, offset, log_gate)


def flurka_attention(
    q, phi_q, k, v, *, log_gate, phi_summary, v_summary, mass_summary, local, scale, offset, block_size, local_blocks
):
    """FLuRKA attention: weights exp(scale q·k), or scale q·k, in the last `local_blocks` blocks; before them weights
    φ(q)·φ(k̃) of the summaries of whole blocks, which decay from the end of their block on."""
    tokens = q.shape[1]
    block = torch.arange(tokens, device=q.device) // block_size
    whole = tokens // block_size
    summary_block = torch.arange(whole, device=q.device).repeat_interleave(
        phi_summary.shape[1] // whole if whole else 0
    )
    local_mask = (block[None, :] > block[:, None] - local_blocks).tril()  # [T, T]
    state_mask = summary_block[None, :] <= block[:, None] - local_blocks  # [T, N·r]
    s = scale * scores(q, k)
    state_weights = torch.where(state_mask, scores(phi_q, phi_summary), 0.0)
    decay = None
    if log_gate is not None:
        decay = log_decay(log_gate, torch.arange(tokens, device=q.device))
        state_weights = state_weights * log_decay(log_gate, (summary_block + 1) * block_size - 1).exp().to(s.dtype)
    mass = state_weights if mass_summary is None else state_weights * mass_summary.transpose(1, 2)[..., None, :]
    if local == "softmax":
        local_weights, alpha = rescaled_exponentials(
            (s if decay is None else s + decay.to(s.dtype)).masked_fill(~local_mask, -torch.inf),
            abs(offset) + state_weights.abs().sum(-1, keepdim=True) + mass.abs().sum(-1, keepdim=True),
        )
    else:
        local_weights, alpha = torch.where(local_mask, s if decay is None else s * decay.exp().to(s.dtype), 0.0), 1.0
    mass, state_weights, offset = alpha * mass, alpha * state_weights, alpha * offset
    denominator = (local_weights.sum(-1, keepdim=True) + mass.sum(-1, keepdim=True) + offset).transpose(1, 2)
    numerator = torch.einsum("bhts,bshe->bthe", local_weights, v)
    numerator = numerator + torch.einsum("bhts,bshe->bthe", state_weights, v_summary)
    return torch.where(denominator == 0, 0.0, numerator / denominator.where(denominator != 0, 1.0))


def rescaled_exponentials(exponents: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^{x − m_i} of exponents x [.., n], and alpha = e^{−m_i} [.., 1], the factor of a row's other terms.

    m_i is the logarithm of the row's largest term, x or `others` [.., 1], the absolute sum of the other terms; it
    cancels. At least one exponent of a row is finite.
    """
    largest = 0.7 * math.log(torch.finfo(exponents.dtype).max)  # e^{−m_i} is then finite
    m_others = torch.where(others > 0, others.log().clamp(min=-largest), -torch.inf)
    m_i = torch.maximum(exponents.amax(-1, keepdim=True), m_others).detach()
    return (exponents - m_i).exp(), m_i.neg().clamp(max=largest).exp()


def lowrank_attention(q, k, v, q_far, k_summary, v_summary, *, summaries, scale, block_size, local_blocks):
    """Low-rank attention: one softmax over the tokens of the last `local_blocks` blocks and over the summaries of whole
    blocks before them, each of which counts as c/r tokens. The first keys may be those of tokens before the queries."""
    tokens, keys = q.shape[1], k.shape[1]
    before = k_summary.shape[1] // summaries - keys // block_size  # blocks before the first key
    block = torch.arange(keys, device=q.device) // block_size + before
    summary_block = torch.arange(k_summary.shape[1], device=q.device) // summaries
    query_block = block[keys - tokens :, None]
    local_mask = (block[None, :] > query_block - local_blocks).tril(keys - tokens)
    state_mask = summary_block[None, :] <= query_block - local_blocks
    exponents = torch.cat(
        (
            (scale * scores(q_far, k_summary) + math.log(block_size / summaries)).masked_fill(~state_mask, -torch.inf),
            (scale * scores(q, k)).masked_fill(~local_mask, -torch.inf),
        ),
        dim=-1,
    )
    return torch.einsum("bhts,bshe->bthe", exponents.softmax(-1), torch.cat((v_summary, v), dim=1))


def sparse_attention(q, k, v, *, q_keep, k_keep, q_bucket, k_bucket, scale, window):
    """Sparse attention: a softmax over the keys s ≤ t that are kept and in the query's bucket, or among the last
    `window`; 0 where the query is dropped or sees no key. Marks are [B, T, H]. With more keys than queries, the queries
    are those of the last keys' tokens."""
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


def polynomial_attention(q, k, v, degree, scale, shift, offset):
    """PolySketchFormer (arXiv 2310.01655), section 1.1 of its algorithm: w_ts = (scale · q_t·k_s + shift)^degree."""
    return weighted_average((scale * scores(q, k) + shift) ** degree, v, offset)
