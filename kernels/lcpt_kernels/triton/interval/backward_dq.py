"""The gradient of q. The weights p are computed again from scores and lse:

    dq_i = scale Σ_j ds_ij k_j        ds_ij = p_ij (do_i·v_j + δ_i),  first_i ≤ j < last_i

lse and δ = −do·o are those of the whole softmax; this interval may be a part of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import head_rows, load_rows, store_rows
from lcpt_kernels.triton.interval.intervals import (
    LOG2E,
    Part,
    gather_rows,
    load_ends,
    load_step,
    steps,
    unpacked,
    within,
)


def interval_backward_dq(part: Part, do: Tensor, statistics: Tensor) -> Tensor:
    """Return dq [B, T, H, D], 0 for a query that sees no key. do is [B, T, H, Dv], statistics are those of
    query_statistics."""
    batch, tokens, heads, width = part.q.shape
    dq = torch.empty(part.q.shape, dtype=part.q.dtype, device=part.q.device)
    tiles = launch_configs.tiles("interval_backward_dq", max(width, part.v.shape[3]), part.type)
    pieces = triton.cdiv(tokens, tiles["BM"])
    interval_backward_dq_kernel[(pieces * batch * heads,)](
        **part.arguments(interval_backward_dq_kernel),
        do=do,
        do_strides=do.stride()[:3],
        statistics=statistics,
        dq=dq,
        pieces=pieces,
        **tiles,
    )
    return dq


@triton.jit(do_not_specialize=["own_stride", "other_stride", "ends_stride", "tokens", "heads", "group", "pieces"])
def interval_backward_dq_kernel(
    q,
    q_strides,  # [B, T, H, D]
    k,
    k_strides,  # [B, S, Hkv, D]
    v,
    v_strides,  # [B, S, Hkv, DV]
    own,
    own_stride,  # [N, T]: the list of queries
    other,
    other_stride,  # [N, S]: that of keys
    first,
    last,
    ends_stride,  # [N, T]
    do,
    do_strides,  # [B, T, H, DV]
    statistics,  # [B·H, T], in the order of the list
    dq,  # [B, T, H, D]
    tokens,
    heads,
    group,
    pieces,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    TYPE: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16
    n = (tl.program_id(0) // pieces).to(tl.int64)
    batch, head = n // heads, n % heads
    i = tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = i < tokens
    t = tl.load(own + n * own_stride + i, mask=inside, other=0)
    begin, end = load_ends(first + n * ends_stride, last + n * ends_stride, i, inside)
    ends = steps(begin, end, BN)
    has_keys = begin < end
    q_rows = load_rows(head_rows(q, q_strides, batch, head), t, q_strides[1], has_keys, D, D_PAD)
    do_rows = load_rows(head_rows(do, do_strides, batch, head), t, do_strides[1], has_keys, DV, DV_PAD)
    row = (batch * tokens + t) * heads + head
    lse2, delta = unpacked(tl.load(statistics + n * tokens + i, mask=has_keys, other=0))
    k = head_rows(k, k_strides, batch, head // group)
    v = head_rows(v, v_strides, batch, head // group)
    other += n * other_stride

    base2 = scale * LOG2E
    dq_rows = tl.zeros((BM, D_PAD), tl.float32)
    for part in tl.static_range(3):  # until all rows have begun; where all see all; until the last row has ended
        for j in range(ends[part], ends[part + 1], BN):
            s = load_step(other, j, ends[3], BN, part != 1)
            k_rows = gather_rows(k, s, K_STRIDE, D, D_PAD)  # [BN, D]
            v_rows = gather_rows(v, s, V_STRIDE, DV, DV_PAD)  # [BN, DV]
            score = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
            p = tl.exp2(base2 * score - lse2[:, None])  # [BM, BN]
            dp = tl.dot(do_rows, tl.trans(v_rows), input_precision="ieee") + delta[:, None]
            if part != 1:
                seen = within(tl.arange(0, BN)[None, :], begin[:, None] - j, end[:, None] - j, part == 0)
                p = tl.where(seen, p, 0.0)
            ds = p * dp
            dq_rows = tl.dot(ds.to(TYPE), k_rows.to(TYPE), dq_rows, input_precision="ieee")  # [BM, BN] @ [BN, D]
    store_rows(dq, row, D, inside, scale * dq_rows, D, D_PAD)
