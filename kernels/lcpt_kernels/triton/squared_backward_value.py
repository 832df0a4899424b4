"""Gradients of what keys leave: of v through the queries that see them exactly and through the state, and of b.

    [dv_s, ·] = Σ_{t local} W_ts n̄_t + e^{u_s} dSᵀ φ(b_s)          db_s = e^{u_s} φ'(b_s)ᵀ (dS [v_s, 1])
with u_s the sum of the log gate from s + 1 to the block's end.

A program holds BN keys of one block and one key-value head; the queries of its whole group come one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton import configurations
from lcpt_kernels.triton.local import decayed, load_gates, scores, weight_and_slope
from lcpt_kernels.triton.problem import Problem
from lcpt_kernels.triton.tiles import (
    GROUP,
    PAIR,
    contract,
    load_block,
    load_pair,
    load_rows,
    load_square,
    of_head,
    products,
    store_rows,
)


def squared_backward_value(
    problem: Problem, d_values: Tensor, d_norms: Tensor, do: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients [N, Hkv, ·] of what every block added to the state; do [B, T, H, Dv], z [B, T, H] fp32
    -> dv [B, K, Hkv, Dv], db [B, K, Hkv, R] through the state, and for the gate of every
    key Σ_t dW_ts W_ts through the state, [B, K, Hkv] fp32 (None: no gate), with K = past + T."""
    p = problem
    dv = torch.empty(p.v.shape, dtype=p.v.dtype, device=p.v.device)
    db = torch.empty(p.b.shape, dtype=p.b.dtype if p.exact else torch.float32, device=p.b.device)
    far = None if p.since is None else torch.empty_like(p.since)
    tiles = configurations.tiles("backward_value", max(p.q.shape[3], p.v.shape[3], 2 * p.b.shape[3]), p.type)
    pieces = triton.cdiv(p.blocks.size, tiles["BN"])
    squared_backward_value_kernel[(p.blocks.count * pieces, p.v.shape[2])](
        **p.arguments(squared_backward_value_kernel), values=d_values, norms=d_norms, do=do, do_strides=do.stride()[:3],
        z=z, dv=dv, db=db, far=far, pieces=pieces, **tiles)
    return dv, db, far


@triton.jit(do_not_specialize=["tokens", "past", "group", "block_size", "pieces"])
def squared_backward_value_kernel(
    q, q_strides,  # [B, T, H, D]
    k, k_strides,  # [B, past + T, Hkv, D]
    v, v_strides,  # [B, past + T, Hkv, DV]
    b, b_strides,  # [B, past + T, Hkv, R]
    since,  # [B, past + T, Hkv]: g
    until,  # [B, past + T, Hkv]: u
    values,  # [N, Hkv, F, DV]: dS
    norms,  # [N, Hkv, M]: dS of the normaliser
    do, do_strides,  # [B, T, H, DV]
    z,  # [B, T, H]
    dv,  # [B, past + T, Hkv, DV]
    db,  # [B, past + T, Hkv, R]
    far,  # [B, past + T, Hkv]
    blocks,  # [N, 5]
    pair_table,  # [2, PAIRS]
    tokens, past, group, block_size, pieces, scale, c0, c1, c2,
    R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    F: tl.constexpr, M: tl.constexpr, PAIRS: tl.constexpr, LINEAR: tl.constexpr, CONSTANT: tl.constexpr,
    DEGREE: tl.constexpr, LOCAL_BLOCKS: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    key_heads = tl.num_programs(1)
    heads = key_heads * group
    TYPE: tl.constexpr = values.dtype.element_ty
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BN
    s = lowest + tl.arange(0, BN)
    inside = s < stop
    b, v = of_head(b, b_strides, batch, head), of_head(v, v_strides, batch, head)
    row = (batch * (tokens + past) + s) * key_heads + head
    v_rows = load_rows(v, s, v_strides[1], inside, DV, DV_PAD).to(TYPE)  # [BN, DV]

    # Through the state.
    slot = block.to(tl.int64) * key_heads + head
    norms += slot * M
    state = values + slot * (F * DV)
    feature, column, coordinate = tl.arange(0, PAIR), tl.arange(0, DV_PAD), tl.arange(0, R_PAD)
    dv_rows = tl.zeros((BN, DV_PAD), tl.float32)
    db_rows = tl.zeros((BN, R_PAD), tl.float32)
    far_rows = tl.zeros((BN,), tl.float32)
    b_rows = load_rows(b, s, b_strides[1], inside, R, R_PAD).to(tl.float32)  # [BN, R]
    if PAIRS > 0:
        gradient = tl.zeros((BN, R_PAD // GROUP, GROUP), tl.float32)
        for pair in range(0, PAIRS):
            b_i, b_j, i, j = load_pair(b, s, b_strides[1], inside, pair_table, pair, PAIRS)
            dS = load_rows(state, feature + pair * PAIR, DV, feature < PAIR, DV, DV_PAD)
            dv_rows = tl.dot(products(b_i, b_j, TYPE), dS, dv_rows, input_precision="ieee")  # [BN, 64] @ [64, DV]
            d_features = tl.dot(v_rows, tl.trans(dS), input_precision="ieee")  # [BN, DV] @ [DV, 64]
            gradient = contract(d_features, b_i, b_j, i, j, gradient)
        db_rows += tl.reshape(gradient, (BN, R_PAD))
        gram = load_square(norms, R, R_PAD).to(TYPE)
        db_rows += 2.0 * tl.dot(b_rows.to(TYPE), gram, input_precision="ieee")
        far_rows += 0.5 * tl.sum(b_rows * db_rows, axis=1)
    if LINEAR:
        dS = load_rows(state, coordinate + PAIRS * PAIR, DV, coordinate < R, DV, DV_PAD)
        a_sum = tl.load(norms + R * R + coordinate, mask=coordinate < R, other=0.0)
        dv_rows = tl.dot(b_rows.to(TYPE), dS, dv_rows, input_precision="ieee")  # [BN, R] @ [R, DV]
        d_linear = tl.dot(v_rows, tl.trans(dS), input_precision="ieee") + a_sum[None, :]
        db_rows += d_linear
        far_rows += tl.sum(b_rows * d_linear, axis=1)
    if CONSTANT:
        dS = tl.load(state + (F - 1) * DV + column, mask=column < DV, other=0.0).to(tl.float32)
        dv_rows += dS[None, :]
        far_rows += tl.sum(v_rows.to(tl.float32) * dS[None, :], axis=1) + tl.load(norms + M - 1)
    if GATED:
        factor = tl.exp(tl.load(until + row, mask=inside, other=0.0))
        dv_rows *= factor[:, None]
        db_rows *= factor[:, None]
        tl.store(far + row, far_rows * factor, mask=inside)
    store_rows(db, row, R, inside, db_rows, R, R_PAD)

    # Through the queries of the local blocks.
    k_rows = load_rows(of_head(k, k_strides, batch, head), s, k_strides[1], inside, D, D_PAD)  # [BN, D]
    last = tl.minimum(end, first + LOCAL_BLOCKS * block_size)
    gates = batch * (tokens + past) * key_heads + head  # of the key head's first
    g = load_gates(since, gates, s, key_heads, inside, GATED)
    g_block = load_gates(since, gates, stop - 1, key_heads, first < stop, GATED and LOCAL_BLOCKS == 2)
    q, do = of_head(q, q_strides, batch, head * group), of_head(do, do_strides, batch, head * group)
    for h in range(0, group):
        for m in range(tl.maximum(lowest, past), last, BM):
            t = m + tl.arange(0, BM)
            q_rows = load_rows(q, t - past, q_strides[1], t < last, D, D_PAD)  # [BM, D]
            query = (batch * tokens + t - past) * heads + head * group + h
            do_rows = load_rows(do, t - past, do_strides[1], t < last, DV, DV_PAD)  # [BM, DV]
            w, slope = weight_and_slope(scores(k_rows, q_rows, scale), c0, c1, c2, DEGREE)  # [BN, BM]
            w /= tl.load(z + query, mask=t < last, other=1.0)[None, :]
            g_t = load_gates(since, gates, t, key_heads, t < last, GATED) + tl.where(t >= stop, g_block, 0.0)
            w = decayed(w, s[:, None] <= t[None, :], g_t[None, :] - g[:, None], GATED)
            dv_rows = tl.dot(w.to(TYPE), do_rows.to(TYPE), dv_rows, input_precision="ieee")  # [BN, BM] @ [BM, DV]
        q += q_strides[2]
        do += do_strides[2]
    store_rows(dv, row, DV, inside, dv_rows, DV, DV_PAD)
