"""Gradients of what queries bring: of q through the local keys, of a through the state that its block met.

n̄ = [do, δ] / Z is the gradient of [N, Z], so that of a weight is dW_ts = n̄_t·[v_s, 1], local or through S:
    dq_t = scale Σ_{s local} e^{G_t − G_s} w'(s_ts) dW_ts k_s          da_t = e^{g_t} φ'(a_t)ᵀ (S n̄_t)
A row's 1 / Z multiplies what comes out.
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
    store_rows,
)


def squared_backward_query(
    problem: Problem, values: Tensor, norms: Tensor, do: Tensor, delta: Tensor, z: Tensor
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """The states of every block; do [B, T, H, Dv], delta and z [B, T, H] fp32
    -> dq [B, T, H, D] (None without q and k: then da has it), da [B, T, H, R], and for the gate (None without) of every
    query Σ_s dW_ts W_ts of local keys and through the state, [B, T, H] fp32 each. With a gate delta is made again."""
    p = problem
    dq = torch.empty(p.q.shape, dtype=p.q.dtype, device=p.q.device) if p.exact else None
    da = torch.empty(p.a.shape, dtype=p.a.dtype, device=p.a.device)
    near, far = (None, None) if p.since is None else (torch.empty_like(z), torch.empty_like(z))
    tiles = configurations.tiles("backward_query", max(p.q.shape[3], p.v.shape[3], 2 * p.a.shape[3]), p.type)
    pieces = triton.cdiv(p.blocks.size, tiles["BM"])
    squared_backward_query_kernel[(p.blocks.count * pieces, p.q.shape[2])](
        **p.arguments(squared_backward_query_kernel), values=values, norms=norms, do=do, do_strides=do.stride()[:3],
        delta=delta, z=z, dq=dq, da=da, near=near, far=far, pieces=pieces, **tiles)
    return dq, da, near, far


@triton.jit(do_not_specialize=["tokens", "past", "group", "block_size", "pieces"])
def squared_backward_query_kernel(
    q, q_strides,  # [B, T, H, D]
    k, k_strides,  # [B, past + T, Hkv, D]
    v, v_strides,  # [B, past + T, Hkv, DV]
    a, a_strides,  # [B, T, H, R]
    since,  # [B, past + T, Hkv]: g
    values,  # [N, Hkv, F, DV]
    norms,  # [N, Hkv, M]
    do, do_strides,  # [B, T, H, DV]
    delta, z,  # [B, T, H]
    dq,  # [B, T, H, D]
    da,  # [B, T, H, R]
    near, far,  # [B, T, H]
    blocks,  # [N, 5]
    pair_table,  # [2, PAIRS]
    tokens, past, group, block_size, pieces, scale, offset, c0, c1, c2,
    R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    F: tl.constexpr, M: tl.constexpr, PAIRS: tl.constexpr, LINEAR: tl.constexpr, CONSTANT: tl.constexpr,
    DEGREE: tl.constexpr, LOCAL_BLOCKS: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    heads, key_head = tl.num_programs(1), head // group
    key_heads = heads // group
    TYPE: tl.constexpr = values.dtype.element_ty
    batch, first, stop, begin, end = load_block(blocks, block)
    t = first + tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = (t < stop) & (t >= past)
    q, a = of_head(q, q_strides, batch, head), of_head(a, a_strides, batch, head)
    k, v = of_head(k, k_strides, batch, key_head), of_head(v, v_strides, batch, key_head)
    row = (batch * tokens + t - past) * heads + head
    do_rows = load_rows(of_head(do, do_strides, batch, head), t - past, do_strides[1], inside, DV, DV_PAD)  # [BM, DV]
    delta_rows = tl.load(delta + row, mask=inside, other=0.0)  # [BM]
    factor = 1.0 / tl.load(z + row, mask=inside, other=1.0)

    # Through the state.
    slot = block.to(tl.int64) * key_heads + key_head
    norms += slot * M
    state = values + slot * (F * DV)
    feature, column, coordinate = tl.arange(0, PAIR), tl.arange(0, DV_PAD), tl.arange(0, R_PAD)
    da_rows = tl.zeros((BM, R_PAD), tl.float32)
    far_rows = tl.zeros((BM,), tl.float32)
    a_rows = load_rows(a, t - past, a_strides[1], inside, R, R_PAD).to(tl.float32)  # [BM, R]
    if PAIRS > 0:
        gradient = tl.zeros((BM, R_PAD // GROUP, GROUP), tl.float32)
        for pair in range(0, PAIRS):
            a_i, a_j, i, j = load_pair(a, t - past, a_strides[1], inside, pair_table, pair, PAIRS)
            S = load_rows(state, feature + pair * PAIR, DV, feature < PAIR, DV, DV_PAD)
            d_features = tl.dot(do_rows.to(TYPE), tl.trans(S), input_precision="ieee")  # [BM, DV] @ [DV, 64]
            gradient = contract(d_features, a_i, a_j, i, j, gradient)
        da_rows += tl.reshape(gradient, (BM, R_PAD))
        gram = load_square(norms, R, R_PAD).to(TYPE)
        da_rows += 2.0 * delta_rows[:, None] * tl.dot(a_rows.to(TYPE), gram, input_precision="ieee")
        far_rows += 0.5 * tl.sum(a_rows * da_rows, axis=1)
    if LINEAR:
        S = load_rows(state, coordinate + PAIRS * PAIR, DV, coordinate < R, DV, DV_PAD)
        b_sum = tl.load(norms + R * R + coordinate, mask=coordinate < R, other=0.0)
        d_linear = tl.dot(do_rows.to(TYPE), tl.trans(S), input_precision="ieee") + delta_rows[:, None] * b_sum[None, :]
        da_rows += d_linear
        far_rows += tl.sum(a_rows * d_linear, axis=1)
    if CONSTANT and GATED:
        S = tl.load(state + (F - 1) * DV + column, mask=column < DV, other=0.0).to(tl.float32)
        far_rows += tl.sum(do_rows.to(tl.float32) * S[None, :], axis=1) + delta_rows * tl.load(norms + M - 1)
    gates = batch * (tokens + past) * key_heads + key_head  # of the key head's first
    g = load_gates(since, gates, t, key_heads, inside, GATED)
    if GATED:
        da_rows *= tl.exp(g)[:, None]
        far_rows *= tl.exp(g)

    # Through the local blocks.
    q_rows = load_rows(q, t - past, q_strides[1], inside, D, D_PAD)  # [BM, D]
    dq_rows = tl.zeros((BM, D_PAD), tl.float32)
    near_rows = tl.zeros((BM,), tl.float32)
    near_norm = tl.zeros((BM,), tl.float32)
    start = tl.maximum(begin, first - (LOCAL_BLOCKS - 1) * block_size)
    last = tl.minimum(stop, first + (tl.program_id(0) % pieces + 1) * BM)
    g_before = load_gates(since, gates, first - 1, key_heads, start < first, GATED and LOCAL_BLOCKS == 2)
    for n in range(start, last, BN):
        s = n + tl.arange(0, BN)
        k_rows = load_rows(k, s, k_strides[1], s < stop, D, D_PAD)  # [BN, D]
        v_rows = load_rows(v, s, v_strides[1], s < stop, DV, DV_PAD)  # [BN, DV]
        w, slope = weight_and_slope(scores(q_rows, k_rows, scale), c0, c1, c2, DEGREE)
        g_s = load_gates(since, gates, s, key_heads, s < stop, GATED) - tl.where(s < first, g_before, 0.0)
        seen, log_decay = s[None, :] <= t[:, None], g[:, None] - g_s[None, :]
        dw = tl.dot(do_rows, tl.trans(v_rows), input_precision="ieee") + delta_rows[:, None]  # [BM, BN]
        if GATED:
            w = decayed(w, seen, log_decay, GATED)
            near_rows += tl.sum(w * dw, axis=1)
            near_norm += tl.sum(w, axis=1)
        dw = decayed(dw, seen, log_decay, GATED)
        dq_rows = tl.dot((slope * dw).to(TYPE), k_rows.to(TYPE), dq_rows, input_precision="ieee")  # [BM, BN] @ [BN, D]
    if DEGREE == 0:
        da_rows += scale * dq_rows
    else:
        store_rows(dq, row, D, inside, (scale * factor)[:, None] * dq_rows, D, D_PAD)
    store_rows(da, row, R, inside, factor[:, None] * da_rows, R, R_PAD)
    if GATED:
        # All of a row's weights are at hand: δ once more, now not from a rounded o.
        correction = -factor * (near_rows + far_rows + delta_rows * offset)
        delta_rows += correction
        near_rows += correction * near_norm
        far_rows = -delta_rows * offset - near_rows
        tl.store(delta + row, delta_rows, mask=inside)
        tl.store(near + row, factor * near_rows, mask=inside)
        tl.store(far + row, factor * far_rows, mask=inside)
