"""Exact polynomial attention, quadratic in time and linear in memory: the baseline that a sketch approximates."""

from __future__ import annotations

import math

from torch import Tensor

from lcpt_kernels import reference
from lcpt_kernels.arguments import check_backend, check_degree, check_pair, require
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.chunked import Plan, Power, StateInput, block_causal_attention
from lcpt_kernels.streaming import each_document

ROWS = 256  # queries at a time: bounds the memory of a tile of scores to ROWS × T


@under_autocast
def polynomial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    degree: int = 4,
    scale: float = 1.0,
    offset: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """o_t = Σ_{s ≤ t} w_ts v_s / (offset + Σ_{s ≤ t} w_ts),  w_ts = (scale · q_t·k_s)^degree, degree even.

    q [B, T, H, D]; k [B, T, Hkv, D]; v [B, T, Hkv, Dv]; H a multiple of Hkv; floating point, strides free. k and v may
    begin with keys of earlier tokens, [B, P + T, Hkv, ·].
    offset None: scale^degree, which makes the result independent of how q and k share the scale. 0/0 is 0.
    cu_seqlens [N + 1]: packed documents, B = 1. backend: "reference", "torch" or "auto".
    Returns o [B, T, H, Dv] in q's dtype. ValueError names a shape or a number that does not fit.
    Source: PolySketchFormer (arXiv 2310.01655).
    """
    check_backend(backend)
    check_pair(q, k[:, -q.shape[1] :], v[:, -q.shape[1] :], "qk")
    require(k.shape[1] == v.shape[1], f"k has {k.shape[1]} tokens, v has {v.shape[1]}")
    check_degree(degree)
    offset = scale**degree if offset is None else offset

    def one(q, k, v):
        k, v = reference.per_query_head(q.shape[2], k, v)
        if backend == "reference":
            return reference.polynomial_attention(q, k, v, degree, scale, offset)
        every_block = math.ceil(k.shape[1] / ROWS)  # all blocks are local: nothing is left for a state
        plan = Plan(
            local=Power(degree),
            features=None,
            scale=scale,
            offset=offset,
            block_size=ROWS,
            local_blocks=every_block,
        )
        return block_causal_attention(q, k, v, None, StateInput(None, v, None), plan)[0]

    return each_document(one, cu_seqlens, {"q": q, "k": k, "v": v})
