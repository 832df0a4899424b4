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
from lcpt_kernels.triton.interval.intervals import (
    LOG2E,
    Part,
    gather_rows,
    load_again,
    load_ends,
    load_step,
    steps,
    unpacked,
    within,
)


def interval_backward_dkv(part: Part, do: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Return dk [B, S, Hkv, D] and dv [B, S, Hkv, Dv], 0 for a key that no query sees. do is [B, T, H, Dv],
    statistics are those of query_statistics. The intervals of the part are transposed."""
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
        statistics=statistics,
        DO_STRIDE=do.stride(1),
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
    statistics,  # [B·H, T], in the order of the list
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
    Q_STRIDE: tl.constexpr,
    DO_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    TYPE: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16
    n = (tl.program_id(0) // pieces).to(tl.int64)
    batch, head = n // heads, n % heads
    j = tl.program_id(0) % pieces * BN + tl.arange(0, BN)
    inside = j < span
    s = tl.load(own + n * own_stride + j, mask=inside, other=0)
    begin, end = load_ends(first + n * ends_stride, last + n * ends_stride, j, inside)
    ends = steps(begin, end, BM)
    seen = begin < end
    k_rows = load_rows(head_rows(k, k_strides, batch, head // group), s, k_strides[1], seen, D, D_PAD)
    v_rows = load_rows(head_rows(v, v_strides, batch, head // group), s, v_strides[1], seen, DV, DV_PAD)
    q = head_rows(q, q_strides, batch, head)
    do = head_rows(do, do_strides, batch, head)
    statistics += n * tokens
    other += n * other_stride

    base2 = scale * LOG2E
    dk_rows = tl.zeros((BN, D_PAD), tl.float32)
    dv_rows = tl.zeros((BN, DV_PAD), tl.float32)
    for part in tl.static_range(3):  # until all rows have begun; where all see all; until the last row has ended
        for i in range(ends[part], ends[part + 1], BM):
            t = load_step(other, i, ends[3], BM, part != 1)
            q_rows = gather_rows(q, t, Q_STRIDE, D, D_PAD)  # [BM, D]
            do_rows = gather_rows(do, t, DO_STRIDE, DV, DV_PAD)  # [BM, DV]
            lse2_rows, delta_rows = unpacked(load_step(statistics, i, ends[3], BM, part != 1))
            score = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee")
            p = tl.exp2(base2 * score - lse2_rows[None, :])  # [BN, BM]
            if part != 1:
                sees = within(tl.arange(0, BM)[None, :], begin[:, None] - i, end[:, None] - i, part == 0)
                p = tl.where(sees, p, 0.0)
            dv_rows = tl.dot(p.to(TYPE), do_rows.to(TYPE), dv_rows, input_precision="ieee")  # [BN, BM] @ [BM, DV]
            ds = p * (tl.dot(v_rows, tl.trans(do_rows), input_precision="ieee") + delta_rows[None, :])
            dk_rows = tl.dot(ds.to(TYPE), q_rows.to(TYPE), dk_rows, input_precision="ieee")  # [BN, BM] @ [BM, D]
    if D_PAD > 64:
        s = load_again(own + n * own_stride, j, inside)
        seen = load_again(first + n * ends_stride, j, inside) < load_again(last + n * ends_stride, j, inside)
    row = (batch * span + s) * heads + head
    store_rows(dk, row, D, inside, tl.where(seen[:, None], scale * dk_rows, 0.0), D, D_PAD)
    store_rows(dv, row, DV, inside, tl.where(seen[:, None], dv_rows, 0.0), DV, DV_PAD)
