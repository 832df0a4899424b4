"""Exact polynomial attention, quadratic in time and linear in memory: the baseline that a sketch approximates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcpt_kernels import reference
from lcpt_kernels.arguments import (
    LEAST_GATE,
    check_backend,
    check_packed,
    check_pair,
    check_power,
    is_on_device,
    require,
)
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.chunked import block_causal_attention
from lcpt_kernels.documents import each_document
from lcpt_kernels.local_weights import Power
from lcpt_kernels.plan import Plan
from lcpt_kernels.state_input import StateInput

ROWS = 256  # queries at a time: a tile of scores has ROWS × T elements


@under_autocast
def polynomial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    degree: int = 4,
    scale: float = 1.0,
    shift: float = 0.0,
    offset: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute o_t = Σ_{s ≤ t} w_ts v_s / (offset + Σ_{s ≤ t} w_ts) with w_ts = (scale · q_t·k_s + shift)^degree.

    Args:
        q: [B, T, H, D], k: [B, T, Hkv, D], v: [B, T, Hkv, Dv]. Floating point, any strides, one dtype; H is a multiple
            of Hkv. k and v may start with keys of earlier tokens, [B, P + T, Hkv, ·].
        degree: positive and even.
        scale: a factor of q·k.
        shift: a term inside the power. With it, weights grow with q·k from its sign on.
        offset: a term of the denominator; None: scale^degree, so that the result does not depend on how q and k share
            the scale. 0/0 is 0.
        cu_seqlens: [N + 1], int32 or int64, or None: the borders of packed documents; B = 1.
        backend: "reference", "torch" or "auto".

    Returns:
        o [B, T, H, Dv] in q's dtype.

    Raises:
        ValueError: a shape, dtype or option that does not fit; the message names it.

    Source: PolySketchFormer (arXiv 2310.01655).

    Example:
        >>> import torch
        >>> from lcpt_kernels import polynomial_attention
        >>> q, k, v = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 1, 4), torch.arange(3.0).view(1, 3, 1, 1)
        >>> polynomial_attention(q, k, v, degree=2, scale=0.5, offset=0.0)[0, :, 0, 0]
        tensor([0.0000, 0.5000, 1.0000])
    """
    check_backend(backend)
    check_pair(q, k[:, -q.shape[1] :], v[:, -q.shape[1] :], ("q", "k"))
    require(k.shape[1] == v.shape[1], f"k has {k.shape[1]} tokens, v has {v.shape[1]}")
    check_power(degree, shift)
    offset = scale**degree if offset is None else offset

    def one(q, k, v, log_gate=None):
        k, v = reference.per_query_head(q.shape[2], k, v)
        if backend == "reference":
            return reference.polynomial_attention(q, k, v, degree, scale, shift, offset)
        every_block = math.ceil(k.shape[1] / ROWS)  # all blocks are local: there is no state
        plan = Plan(
            local=Power(degree, shift),
            features=None,
            scale=scale,
            offset=offset,
            block_size=ROWS,
            local_blocks=every_block,
        )
        return block_causal_attention(q, k, v, None, StateInput(None, v, None), plan, log_gate)[0]

    if cu_seqlens is None or not is_on_device(q) or backend == "reference":
        return each_document(one, cu_seqlens, {"q": q, "k": k, "v": v})
    check_packed(cu_seqlens, *q.shape[:2])
    return one(q, k, v, _gate_of_documents(cu_seqlens, q))


def _gate_of_documents(cu_seqlens: Tensor, q: Tensor) -> Tensor:
    """Return log gates [1, T, H] that forget everything before each document's first token, and nothing else: the host
    does not wait for cu_seqlens."""
    gate = torch.zeros(q.shape[1] + 1, device=q.device)  # an empty last document begins at T
    gate = gate.index_fill(0, cu_seqlens.long(), LEAST_GATE)[:-1]
    return gate[None, :, None].expand(-1, -1, q.shape[2])
