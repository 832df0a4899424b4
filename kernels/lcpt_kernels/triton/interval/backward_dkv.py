"""The gradients of k and v. The queries that see a key are an interval of the list of queries:

    dv_j = Σ_i p_ij do_i        dk_j = scale Σ_i ds_ij q_i        ds_ij = p_ij (do_i·v_j + δ_i)

A program holds BN keys for one query head. The heads of a group are summed afterwards, since each has its own list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import head_rows, load_rows, store_rows
from lcpt_kernels.triton.interval.intervals import LOG2E, Part, load_ends, place_of_step, steps


def interval_backward_dkv(part: Part, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return dk [B, S, Hkv, D] and dv [B, S, Hkv, Dv], 0 for a key that no query sees. do is [B, T, H, Dv], lse and
    delta are [B, T, H] fp32. The intervals of the part are transposed."""
    batch, span, key_heads, width = part.v.shape
    heads, size = part.q.shape[2:]
    ungrouped = heads == key_heads
    dk, dv = (
        torch.empty(batch, span, heads, x.shape[3], dtype=x.dtype if ungrouped else torch.float32, device=x.device)
        for x in (part.k, part.v)
    )
    tiles = launch_configs.tiles("interval_backward_dkv", max(size, width), part.type)
    pieces = triton.cdiv(span, tiles["BN"])
    interval_backward_dkv_kernel[(pieces * batch * heads,)](
        **part.arguments(interval_backward_dkv_kernel),
        do=do,
        do_strides=do.stride()[:3],
        lse=lse,
        delta=delta,
        dk=dk,
        dv=dv,
        pieces=pieces,
        **tiles,
    )
    if ungrouped:
        return dk, dv
    dk, dv = (dx.unflatten(2, (key_heads, -1)).sum(3).to(part.k.dtype) for dx in (dk, dv))
    return dk, dv


@triton.jit(
    do_not_specialize=["own_stride", "other_stride", "ends_stride", "tokens", "span", "heads", "group", "pieces"]
)
def interval_backward_dkv_kernel(
    q,
    q_strides,  # [B, T, H, D]
    k,
    k_strides,  # [B, S, Hkv, D]
    v,
    v_strides,  # [B, S, Hkv, DV]
    own,
    own_stride,  # [N, S]: the list of keys
    other,
    other_stride,  # [N, T]: that of queries
    first,
    last,
    ends_stride,  # [N, S]
    do,
    do_strides,  # [B, T, H, DV]
    lse,
    delta,  # [B, T, H]
    dk,  # [B, S, H, D]
    dv,  # [B, S, H, DV]
    tokens,
    span,
    heads,
    group,
    pieces,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    n = (tl.program_id(0) // pieces).to(tl.int64)
    batch, head = n // heads, n % heads
    j = tl.program_id(0) % pieces * BN + tl.arange(0, BN)
    inside = j < span
    s = tl.load(own + n * own_stride + j, mask=inside, other=0)
    begin, end = load_ends(first + n * ends_stride, last + n * ends_stride, j, inside)
    start, stop, before, inner, edges = steps(begin, end, BM)
    seen = begin < end
    k_rows = load_rows(head_rows(k, k_strides, batch, head // group), s, k_strides[1], seen, D, D_PAD)
    v_rows = load_rows(head_rows(v, v_strides, batch, head // group), s, v_strides[1], seen, DV, DV_PAD)
    q = head_rows(q, q_strides, batch, head)
    do = head_rows(do, do_strides, batch, head)
    lse += batch * tokens * heads + head
    delta += batch * tokens * heads + head
    other += n * other_stride

    base2 = scale * LOG2E
    dk_rows = tl.zeros((BN, D_PAD), tl.float32)
    dv_rows = tl.zeros((BN, DV_PAD), tl.float32)
    dk_rows, dv_rows = over_queries(
        dk_rows,
        dv_rows,
        k_rows,
        v_rows,
        begin,
        end,
        q,
        q_strides[1],
        do,
        do_strides[1],
        lse,
        delta,
        heads,
        other,
        start,
        stop,
        before,
        inner,
        inner,
        base2,
        D,
        D_PAD,
        DV,
        DV_PAD,
        BM,
        EDGE=False,
    )
    dk_rows, dv_rows = over_queries(
        dk_rows,
        dv_rows,
        k_rows,
        v_rows,
        begin,
        end,
        q,
        q_strides[1],
        do,
        do_strides[1],
        lse,
        delta,
        heads,
        other,
        start,
        stop,
        before,
        inner,
        edges,
        base2,
        D,
        D_PAD,
        DV,
        DV_PAD,
        BM,
        EDGE=True,
    )
    row = (batch * span + s) * heads + head
    store_rows(dk, row, D, inside, tl.where(seen[:, None], scale * dk_rows, 0.0), D, D_PAD)
    store_rows(dv, row, DV, inside, tl.where(seen[:, None], dv_rows, 0.0), DV, DV_PAD)


@triton.jit
def over_queries(
    dk_rows,
    dv_rows,
    k_rows,
    v_rows,
    begin,
    end,
    q,
    q_stride,
    do,
    do_stride,
    lse,
    delta,
    heads,
    other,
    start,
    stop,
    before,
    inner,
    count,
    base2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BM: tl.constexpr,
    EDGE: tl.constexpr,
):
    TYPE: tl.constexpr = tl.float32 if v_rows.dtype == tl.float32 else tl.bfloat16
    for step in range(0, count):
        i = place_of_step(step, start, before, inner, BM, EDGE) + tl.arange(0, BM)
        t = tl.load(other + i, mask=i < stop, other=0).to(tl.int64)
        q_rows = load_rows(q, t, q_stride, i < stop, D, D_PAD)  # [BM, D]
        do_rows = load_rows(do, t, do_stride, i < stop, DV, DV_PAD)  # [BM, DV]
        lse2 = tl.load(lse + t * heads, mask=i < stop, other=0.0) * LOG2E  # [BM]
        delta_rows = tl.load(delta + t * heads, mask=i < stop, other=0.0)
        score = base2 * tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee")
        p = tl.exp2(score - lse2[None, :])  # [BN, BM]
        if EDGE:
            p = tl.where((begin[:, None] <= i[None, :]) & (i[None, :] < end[:, None]), p, 0.0)
        dv_rows = tl.dot(p.to(TYPE), do_rows.to(TYPE), dv_rows, input_precision="ieee")  # [BN, BM] @ [BM, DV]
        ds = p * (tl.dot(v_rows, tl.trans(do_rows), input_precision="ieee") + delta_rows[None, :])
        dk_rows = tl.dot(ds.to(TYPE), q_rows.to(TYPE), dk_rows, input_precision="ieee")  # [BN, BM] @ [BM, D]
    return dk_rows, dv_rows
