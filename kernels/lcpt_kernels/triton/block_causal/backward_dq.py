"""Gradients of the queries' side: of q through the local keys, of a through the state at its block's start.

n̄ = [do, δ] / l is the gradient of [numerator, denominator], so that of a weight is dW_ts = n̄_t·[v_s, 1]:
    dq_t = scale Σ_{s local} e^{G_t − G_s} w'(s_ts) dW_ts k_s          da_t = e^{g_t} φ'(a_t)ᵀ (S n̄_t)
1 / l multiplies the sums of a row at the end. Where w = exp, local weights, state and denominator are over 2^{m_i}.
Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.local_weights import (
    EXPONENTIAL,
    LOG2E,
    ROW_MAX_FLOOR,
    load_gate_cumsum,
    load_row_max,
    load_step_gate_cumsum,
    scores,
    weights_and_slopes,
)
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.block_causal.symmetric_gradient import symmetric_gradient
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import (
    GROUP,
    PAIR,
    contract,
    head_rows,
    load_block,
    load_columns,
    load_pair,
    load_rows,
    load_square,
    store_columns,
    store_rows,
)


def block_backward_dq(
    problem: Problem,
    value_state: Tensor,
    denom_state: Tensor,
    do: Tensor,
    delta: Tensor,
    reciprocal: Tensor,
    row_max: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return dq [B, T, H, D] and da [B, T, H, R], fp32 where q is a, and under a gate Σ_s dW_ts W_ts of each query,
    over local keys and through the state, [B, H, T] fp32 each, else None. do is [B, T, H, Dv]; delta, reciprocal and
    row_max are [B, H, T] fp32, the first two from `backward_delta`, the last from `block_forward`. Under a gate delta
    is overwritten with a more exact one."""
    p = problem
    dq, da = (torch.empty(x.shape, dtype=p.gradient_type(x), device=x.device) for x in (p.q, p.a))
    dgate_local, dgate_state = (
        (None, None) if p.gate_cumsum is None else (torch.empty_like(reciprocal), torch.empty_like(reciprocal))
    )
    name = "block_backward_dq" if p.gate_cumsum is None else "block_backward_dq_gated"
    tiles = launch_configs.tiles(name, p.width, p.type)
    pieces = triton.cdiv(p.blocks.size, tiles["BM"])
    block_backward_dq_kernel[(p.blocks.count * pieces, p.q.shape[2])](
        **p.arguments(block_backward_dq_kernel),
        value_state=value_state,
        denom_state=denom_state,
        do=do,
        do_strides=do.stride()[:3],
        delta=delta,
        reciprocal=reciprocal,
        row_max=row_max,
        dq=dq,
        da=da,
        dgate_local=dgate_local,
        dgate_state=dgate_state,
        pieces=pieces,
        **tiles,
    )
    return dq, da, dgate_local, dgate_state


@triton.jit(do_not_specialize=["tokens", "past", "group", "block_size", "pieces"])
def block_backward_dq_kernel(
    q,
    q_strides,  # [B, T, H, D]
    k,
    k_strides,  # [B, past + T, Hkv, D]
    v,
    v_strides,  # [B, past + T, Hkv, DV]
    a,
    a_strides,  # [B, T, H, R]
    gate_cumsum,  # [B, Hkv, 2, past + T]: g
    value_state,  # [N, Hkv, F, DV]
    denom_state,  # [N, Hkv, M]
    do,
    do_strides,  # [B, T, H, DV]
    delta,
    reciprocal,
    row_max,  # [B, H, T]
    dq,  # [B, T, H, D]
    da,  # [B, T, H, R]
    dgate_local,
    dgate_state,  # [B, H, T]
    blocks,  # [N, 5]
    pair_table,  # [2, PAIRS]
    tokens,
    past,
    group,
    block_size,
    pieces,
    scale,
    offset,
    shift,
    c0,
    c1,
    c2,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    FT: tl.constexpr,
    F: tl.constexpr,
    M: tl.constexpr,
    PAIRS: tl.constexpr,
    LINEAR: tl.constexpr,
    CONSTANT: tl.constexpr,
    WEIGHT: tl.constexpr,
    DEGREE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    heads, key_head = tl.num_programs(1), head // group
    key_heads = heads // group
    TYPE: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16
    PRECISION: tl.constexpr = "ieee" if value_state.dtype.element_ty == TYPE else "tf32"
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BM
    if lowest >= stop:  # beyond a short block, or beyond the last document
        return
    t = lowest + tl.arange(0, BM)
    inside = (t < stop) & (t >= past)
    q, a = head_rows(q, q_strides, batch, head), head_rows(a, a_strides, batch, head)
    k, v = head_rows(k, k_strides, batch, key_head), head_rows(v, v_strides, batch, key_head)
    do_rows = load_rows(head_rows(do, do_strides, batch, head), t - past, do_strides[1], inside, DV, DV_PAD)  # [BM, DV]

    # Through the state.
    slot = block.to(tl.int64) * key_heads + key_head
    denom_state += slot * M
    state = value_state + slot * (F * DV)
    feature, column, coordinate = tl.arange(0, PAIR), tl.arange(0, DV_PAD), tl.arange(0, FT)
    da_rows = tl.zeros((BM, FT), tl.float32)
    dgate_state_rows = tl.zeros((BM,), tl.float32)
    if PAIRS > 0:
        if DV_PAD <= PAIR:
            a_first = a + (lowest - past).to(tl.int64) * a_strides[1]
            da_rows += symmetric_gradient(do_rows.to(TYPE), state, a_first, a_strides[1], inside, R, R_PAD, DV, DV_PAD)
        else:
            gradient = tl.zeros((BM, R_PAD // GROUP, GROUP), tl.float32)
            for pair in range(0, PAIRS):
                a_i, a_j, i, j = load_pair(a, t - past, a_strides[1], inside, pair_table, pair, PAIRS)
                S = load_rows(state, feature + pair * PAIR, DV, feature < PAIR, DV, DV_PAD)
                d_features = tl.dot(do_rows.to(TYPE), tl.trans(S), input_precision="ieee")  # [BM, DV] @ [DV, 64]
                gradient = contract(d_features, a_i, a_j, i, j, gradient)
            da_rows += tl.reshape(gradient, (BM, R_PAD))
    # Loaded again, here and at the end: places that are kept would take registers through the loops.
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BM
    t = lowest + tl.arange(0, BM)
    inside = (t < stop) & (t >= past)
    row, place = (batch * tokens + t - past) * heads + head, (batch * heads + head) * tokens + t - past
    delta_rows = tl.load(delta + place, mask=inside, other=0.0)  # [BM]
    m_i = load_row_max(row_max, place, inside, WEIGHT)
    factor = tl.load(reciprocal + place, mask=inside, other=0.0)
    keys = tokens + past
    gates = (batch * key_heads + key_head) * 2 * keys  # the place of the key head's gate sums
    g, g_rest = load_gate_cumsum(gate_cumsum, gates, t, keys, inside, GATED)
    state_alpha = (
        tl.exp2((g + g_rest) * LOG2E - tl.maximum(m_i, ROW_MAX_FLOOR))
        if GATED or WEIGHT == EXPONENTIAL
        else factor * 0.0 + 1.0
    )
    if PAIRS > 0:
        a_rows = load_rows(a, t - past, a_strides[1], inside, R, R_PAD).to(tl.float32)  # [BM, R]
        gram = load_square(denom_state, R, R_PAD).to(TYPE)
        da_rows += 2.0 * delta_rows[:, None] * tl.dot(a_rows.to(TYPE), gram, input_precision="ieee")
        dgate_state_rows += 0.5 * tl.sum(a_rows * da_rows, axis=1)
    if LINEAR:
        for f in range(0, R, FT):
            S = load_rows(state, coordinate + PAIRS * PAIR + f, DV, f + coordinate < R, DV, DV_PAD)
            b_sum = tl.load(denom_state + (M - 1 - R) + f + coordinate, mask=f + coordinate < R, other=0.0)
            d_tile = tl.dot(do_rows.to(S.dtype), tl.trans(S), input_precision=PRECISION)  # [BM, DV] @ [DV, FT]
            d_tile += delta_rows[:, None] * b_sum[None, :]
            if GATED:
                a_tile = load_columns(a, t - past, a_strides[1], inside, f, R, FT).to(tl.float32)
                dgate_state_rows += tl.sum(a_tile * d_tile, axis=1)
            if PAIRS > 0:
                da_rows += d_tile  # FT is R_PAD
            else:
                store_columns(da, row, R, inside, (factor * state_alpha)[:, None] * d_tile, f, R, FT)
    if CONSTANT and GATED:
        S = tl.load(state + (F - 1) * DV + column, mask=column < DV, other=0.0).to(tl.float32)
        dgate_state_rows += tl.sum(do_rows.to(tl.float32) * S[None, :], axis=1) + delta_rows * tl.load(
            denom_state + M - 1
        )
    if PAIRS > 0 or not LINEAR:
        store_rows(da, row, R, inside, (factor * state_alpha)[:, None] * da_rows, R, R_PAD)
    dgate_state_rows *= state_alpha

    # Through the local blocks.
    q_rows = load_rows(q, t - past, q_strides[1], inside, D, D_PAD)  # [BM, D]
    dq_rows = tl.zeros((BM, D_PAD), tl.float32)
    dgate_local_rows = tl.zeros((BM,), tl.float32)
    l_local = tl.zeros((BM,), tl.float32)
    start = tl.maximum(begin, first - (LOCAL_BLOCKS - 1) * block_size)
    last = tl.minimum(stop, lowest + BM)
    g_before, before_rest = load_gate_cumsum(
        gate_cumsum, gates, first - 1, keys, start < first, GATED and LOCAL_BLOCKS == 2
    )
    for n in range(start, last, BN):
        s = n + tl.arange(0, BN)
        k_rows = load_rows(k, s, k_strides[1], s < stop, D, D_PAD)  # [BN, D]
        v_rows = load_rows(v, s, v_strides[1], s < stop, DV, DV_PAD)  # [BN, DV]
        g_s, s_rest = load_step_gate_cumsum(gate_cumsum, gates + n, keys, s < stop, GATED)
        g_s -= tl.where(s < first, g_before, 0.0)
        s_rest -= tl.where(s < first, before_rest, 0.0)
        log_decay = (g[:, None] - g_s[None, :]) + (g_rest[:, None] - s_rest[None, :])
        w, slope = weights_and_slopes(
            scores(q_rows, k_rows, scale, WEIGHT),
            tl.arange(0, BN)[None, :] <= (t - n)[:, None],  # s <= t, as comparisons with constants
            n + BN > lowest,
            log_decay,
            m_i[:, None],
            shift,
            c0,
            c1,
            c2,
            WEIGHT,
            DEGREE,
            GATED,
        )
        dw = tl.dot(do_rows, tl.trans(v_rows), input_precision="ieee") + delta_rows[:, None]  # [BM, BN]
        if GATED:
            dgate_local_rows += tl.sum(w * dw, axis=1)
            l_local += tl.sum(w, axis=1)
        dq_rows = tl.dot((slope * dw).to(TYPE), k_rows.to(TYPE), dq_rows, input_precision="ieee")  # [BM, BN] @ [BN, D]
    batch, first, stop, begin, end = load_block(blocks, block)
    t = first + tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = (t < stop) & (t >= past)
    row, place = (batch * tokens + t - past) * heads + head, (batch * heads + head) * tokens + t - past
    store_rows(dq, row, D, inside, (scale * factor)[:, None] * dq_rows, D, D_PAD)
    if GATED:
        # The sums over all of a row's weights are known here: they give δ again, without the rounding of o.
        offset_rows = offset * tl.exp2(-tl.maximum(m_i, ROW_MAX_FLOOR))
        correction = -factor * (dgate_local_rows + dgate_state_rows + delta_rows * offset_rows)
        delta_rows += correction
        dgate_local_rows += correction * l_local
        dgate_state_rows = -delta_rows * offset_rows - dgate_local_rows
        tl.store(delta + place, delta_rows, mask=inside)
        tl.store(dgate_local + place, factor * dgate_local_rows, mask=inside)
        tl.store(dgate_state + place, factor * dgate_state_rows, mask=inside)
