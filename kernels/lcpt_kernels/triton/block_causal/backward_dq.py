"""Gradients of what queries bring: of q through the local keys, of a through the state that its block met.

n̄ = [do, δ] / Z is the gradient of [N, Z], so that of a weight is dW_ts = n̄_t·[v_s, 1], local or through S:
    dq_t = scale Σ_{s local} e^{G_t − G_s} w'(s_ts) dW_ts k_s          da_t = e^{g_t} φ'(a_t)ᵀ (S n̄_t)
A row's 1 / Z multiplies what comes out. Where w = exp, W and Z are over e^{M_t}: what comes through the state, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.local_weights import (
    EXPONENTIAL,
    FAINTEST,
    load_gates,
    load_peaks,
    scores,
    weights_and_slopes,
)
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import (
    GROUP,
    PAIR,
    contract,
    load_block,
    load_columns,
    load_pair,
    load_rows,
    load_square,
    of_head,
    store_columns,
    store_rows,
)


def block_backward_dq(
    problem: Problem, values: Tensor, norms: Tensor, do: Tensor, delta: Tensor, z: Tensor, peak: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The states of every block; do [B, T, H, Dv]; delta, z and peak, as `block_forward` says, [B, T, H] fp32
    -> dq [B, T, H, D], da [B, T, H, R], fp32 where one tensor is both; and for the gate (None without) of every
    query Σ_s dW_ts W_ts of local keys and through the state, [B, T, H] fp32 each. With a gate delta is made again."""
    p = problem
    dq, da = (torch.empty(x.shape, dtype=p.of_gradient(x), device=x.device) for x in (p.q, p.a))
    near, far = (None, None) if p.since is None else (torch.empty_like(z), torch.empty_like(z))
    tiles = launch_configs.tiles("block_backward_dq", p.width, p.type)
    pieces = triton.cdiv(p.blocks.size, tiles["BM"])
    block_backward_dq_kernel[(p.blocks.count * pieces, p.q.shape[2])](
        **p.arguments(block_backward_dq_kernel),
        values=values,
        norms=norms,
        do=do,
        do_strides=do.stride()[:3],
        delta=delta,
        z=z,
        peak=peak,
        dq=dq,
        da=da,
        near=near,
        far=far,
        pieces=pieces,
        **tiles,
    )
    return dq, da, near, far


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
    since,  # [B, past + T, Hkv, 2]: g
    values,  # [N, Hkv, F, DV]
    norms,  # [N, Hkv, M]
    do,
    do_strides,  # [B, T, H, DV]
    delta,
    z,
    peak,  # [B, T, H]
    dq,  # [B, T, H, D]
    da,  # [B, T, H, R]
    near,
    far,  # [B, T, H]
    blocks,  # [N, 5]
    pair_table,  # [2, PAIRS]
    tokens,
    past,
    group,
    block_size,
    pieces,
    scale,
    offset,
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
    PRECISION: tl.constexpr = "ieee" if values.dtype.element_ty == TYPE else "tf32"
    batch, first, stop, begin, end = load_block(blocks, block)
    t = first + tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = (t < stop) & (t >= past)
    q, a = of_head(q, q_strides, batch, head), of_head(a, a_strides, batch, head)
    k, v = of_head(k, k_strides, batch, key_head), of_head(v, v_strides, batch, key_head)
    row = (batch * tokens + t - past) * heads + head
    do_rows = load_rows(of_head(do, do_strides, batch, head), t - past, do_strides[1], inside, DV, DV_PAD)  # [BM, DV]
    delta_rows = tl.load(delta + row, mask=inside, other=0.0)  # [BM]
    peaks = load_peaks(peak, row, inside, DEGREE)
    factor = 1.0 / tl.load(z + row, mask=inside, other=1.0)
    gates = batch * (tokens + past) * key_heads + key_head  # of the key head's first
    g, g_rest = load_gates(since, gates, t, key_heads, inside, GATED)
    damping = tl.exp(g + g_rest - tl.maximum(peaks, FAINTEST)) if GATED or DEGREE == EXPONENTIAL else factor * 0.0 + 1.0

    # Through the state.
    slot = block.to(tl.int64) * key_heads + key_head
    norms += slot * M
    state = values + slot * (F * DV)
    feature, column, coordinate = tl.arange(0, PAIR), tl.arange(0, DV_PAD), tl.arange(0, FT)
    da_rows = tl.zeros((BM, FT), tl.float32)
    far_rows = tl.zeros((BM,), tl.float32)
    if PAIRS > 0:
        a_rows = load_rows(a, t - past, a_strides[1], inside, R, R_PAD).to(tl.float32)  # [BM, R]
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
        for f in range(0, R, FT):
            S = load_rows(state, coordinate + PAIRS * PAIR + f, DV, f + coordinate < R, DV, DV_PAD)
            b_sum = tl.load(norms + (M - 1 - R) + f + coordinate, mask=f + coordinate < R, other=0.0)
            d_tile = tl.dot(do_rows.to(S.dtype), tl.trans(S), input_precision=PRECISION)  # [BM, DV] @ [DV, FT]
            d_tile += delta_rows[:, None] * b_sum[None, :]
            if GATED:
                a_tile = load_columns(a, t - past, a_strides[1], inside, f, R, FT).to(tl.float32)
                far_rows += tl.sum(a_tile * d_tile, axis=1)
            if PAIRS > 0:
                da_rows += d_tile  # FT is R_PAD
            else:
                store_columns(da, row, R, inside, (factor * damping)[:, None] * d_tile, f, R, FT)
    if CONSTANT and GATED:
        S = tl.load(state + (F - 1) * DV + column, mask=column < DV, other=0.0).to(tl.float32)
        far_rows += tl.sum(do_rows.to(tl.float32) * S[None, :], axis=1) + delta_rows * tl.load(norms + M - 1)
    if PAIRS > 0 or not LINEAR:
        store_rows(da, row, R, inside, (factor * damping)[:, None] * da_rows, R, R_PAD)
    far_rows *= damping

    # Through the local blocks.
    q_rows = load_rows(q, t - past, q_strides[1], inside, D, D_PAD)  # [BM, D]
    dq_rows = tl.zeros((BM, D_PAD), tl.float32)
    near_rows = tl.zeros((BM,), tl.float32)
    near_norm = tl.zeros((BM,), tl.float32)
    start = tl.maximum(begin, first - (LOCAL_BLOCKS - 1) * block_size)
    last = tl.minimum(stop, first + (tl.program_id(0) % pieces + 1) * BM)
    g_before, before_rest = load_gates(since, gates, first - 1, key_heads, start < first, GATED and LOCAL_BLOCKS == 2)
    for n in range(start, last, BN):
        s = n + tl.arange(0, BN)
        k_rows = load_rows(k, s, k_strides[1], s < stop, D, D_PAD)  # [BN, D]
        v_rows = load_rows(v, s, v_strides[1], s < stop, DV, DV_PAD)  # [BN, DV]
        g_s, s_rest = load_gates(since, gates, s, key_heads, s < stop, GATED)
        g_s -= tl.where(s < first, g_before, 0.0)
        s_rest -= tl.where(s < first, before_rest, 0.0)
        log_decay = (g[:, None] - g_s[None, :]) + (g_rest[:, None] - s_rest[None, :])
        w, slope = weights_and_slopes(
            scores(q_rows, k_rows, scale),
            s[None, :] <= t[:, None],
            log_decay,
            peaks[:, None],
            c0,
            c1,
            c2,
            DEGREE,
            GATED,
        )
        dw = tl.dot(do_rows, tl.trans(v_rows), input_precision="ieee") + delta_rows[:, None]  # [BM, BN]
        if GATED:
            near_rows += tl.sum(w * dw, axis=1)
            near_norm += tl.sum(w, axis=1)
        dq_rows = tl.dot((slope * dw).to(TYPE), k_rows.to(TYPE), dq_rows, input_precision="ieee")  # [BM, BN] @ [BN, D]
    store_rows(dq, row, D, inside, (scale * factor)[:, None] * dq_rows, D, D_PAD)
    if GATED:
        # All of a row's weights are at hand: δ once more, now not from a rounded o.
        offset_rows = offset * tl.exp(-tl.maximum(peaks, FAINTEST))
        correction = -factor * (near_rows + far_rows + delta_rows * offset_rows)
        delta_rows += correction
        near_rows += correction * near_norm
        far_rows = -delta_rows * offset_rows - near_rows
        tl.store(delta + row, delta_rows, mask=inside)
        tl.store(near + row, factor * near_rows, mask=inside)
        tl.store(far + row, factor * far_rows, mask=inside)
