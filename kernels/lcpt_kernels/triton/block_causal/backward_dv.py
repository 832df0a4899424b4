"""Gradients of what keys leave: of v through the queries that see them exactly and through the state, and of b.

    [dv_s, ·] = Σ_{t local} W_ts n̄_t + e^{u_s} dSᵀ φ(b_s)          db_s = e^{u_s} φ'(b_s)ᵀ (dS [v_s, 1])
with u_s the sum of the log gate from s + 1 to the block's end.

A program holds BN keys of one block and one key-value head; the queries of its whole group come one after the other.
Where summaries stand for a block in the state, FAR are its summaries and NEAR its tokens; else both are its tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.local_weights import load_gates, load_peaks, scores, weights_and_slopes
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
    products,
    store_columns,
    store_rows,
)


class Gradients(NamedTuple):
    """K = past + T tokens; of b as many, or S summaries."""

    v: Tensor  # [B, K, Hkv, Dv]
    b: Tensor  # [B, K, Hkv, R], or of summaries [B, S, Hkv, R]; through the state; fp32 where b is k too
    far_v: Tensor | None  # [B, S, Hkv, Dv] of summaries
    mass: Tensor | None  # [B, S, Hkv] fp32, if they have one
    far: Tensor | None  # [B, K, Hkv] fp32: for the gate of every key Σ_t dW_ts W_ts through the state


def block_backward_dv(
    problem: Problem, d_values: Tensor, d_norms: Tensor, do: Tensor, z: Tensor, peak: Tensor | None
) -> Gradients:
    """The gradients [N, Hkv, ·] of what every block added to the state; do [B, T, H, Dv]; z and peak, as
    `block_forward` says, [B, T, H] fp32."""
    p = problem
    dv, far_dv = torch.empty(p.v.shape, dtype=p.v.dtype, device=p.v.device), None
    of_far = torch.zeros if p.summaries else torch.empty  # there may be summaries of no block
    db = of_far(p.b.shape, dtype=p.of_gradient(p.b), device=p.b.device)
    d_mass = None if p.mass is None else torch.zeros_like(p.mass)
    far = torch.empty_like(p.until) if p.until is not None else None
    given = dict(
        values=d_values, norms=d_norms, do=do, do_strides=do.stride()[:3], z=z, peak=peak, db=db, d_mass=d_mass, far=far
    )

    def launch(dv, rows, kernel="block_backward_dv", **which):
        tiles = launch_configs.tiles(kernel, p.width, p.type)
        pieces = triton.cdiv(rows, tiles["BN"])
        arguments = p.arguments(block_backward_dv_kernel) | given | which
        block_backward_dv_kernel[(p.blocks.count * pieces, p.v.shape[2])](**arguments, dv=dv, pieces=pieces, **tiles)

    if p.summaries:
        far_dv = of_far(p.far_v.shape, dtype=p.far_v.dtype, device=p.v.device)
        launch(dv, p.blocks.size, NEAR=True, FAR=False)
        launch(
            far_dv,
            p.summaries,
            "block_backward_dv_summaries",
            NEAR=False,
            FAR=True,
            v=p.far_v,
            v_strides=p.far_v.stride()[:3],
            GATED=False,
            blocks=p.far_blocks.table,
            tokens=p.b.shape[1],
            past=0,
        )
    else:
        launch(dv, p.blocks.size, NEAR=True, FAR=True)
    return Gradients(dv, db, far_dv, d_mass, far)


@triton.jit(do_not_specialize=["tokens", "past", "group", "block_size", "pieces"])
def block_backward_dv_kernel(
    q,
    q_strides,  # [B, T, H, D]
    k,
    k_strides,  # [B, past + T, Hkv, D]
    v,
    v_strides,  # [B, past + T, Hkv, DV]
    b,
    b_strides,  # [B, past + T, Hkv, R]
    since,  # [B, past + T, Hkv, 2]: g
    until,  # [B, past + T, Hkv]: u
    values,  # [N, Hkv, F, DV]: dS
    norms,  # [N, Hkv, M]: dS of the normaliser
    mass,  # [B, past + T, Hkv]
    do,
    do_strides,  # [B, T, H, DV]
    z,
    peak,  # [B, T, H]
    dv,  # [B, past + T, Hkv, DV]
    db,  # [B, past + T, Hkv, R]
    d_mass,
    far,  # [B, past + T, Hkv]
    blocks,  # [N, 5]
    pair_table,  # [2, PAIRS]
    tokens,
    past,
    group,
    block_size,
    pieces,
    scale,
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
    MASS: tl.constexpr,
    DEGREE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    key_heads = tl.num_programs(1)
    heads = key_heads * group
    TYPE: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16
    PRECISION: tl.constexpr = "ieee" if values.dtype.element_ty == TYPE else "tf32"
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BN
    s = lowest + tl.arange(0, BN)
    inside = s < stop
    row = (batch * (tokens + past) + s) * key_heads + head
    v_rows = load_rows(of_head(v, v_strides, batch, head), s, v_strides[1], inside, DV, DV_PAD)  # [BN, DV]
    dv_rows = tl.zeros((BN, DV_PAD), tl.float32)

    # Through the state.
    if FAR:
        b = of_head(b, b_strides, batch, head)
        slot = block.to(tl.int64) * key_heads + head
        norms += slot * M
        state = values + slot * (F * DV)
        feature, column, coordinate = tl.arange(0, PAIR), tl.arange(0, DV_PAD), tl.arange(0, FT)
        factor = tl.where(inside, 1.0, 0.0)
        if GATED:
            factor = tl.exp(tl.load(until + row, mask=inside, other=0.0))
        mass_rows = tl.where(inside, 1.0, 0.0)
        if MASS:
            mass_rows = tl.load(mass + row, mask=inside, other=0.0)
        db_rows = tl.zeros((BN, FT), tl.float32)
        far_rows = tl.zeros((BN,), tl.float32)
        of_mass = tl.zeros((BN,), tl.float32)
        if PAIRS > 0:
            b_rows = load_rows(b, s, b_strides[1], inside, R, R_PAD).to(tl.float32)  # [BN, R]
            gradient = tl.zeros((BN, R_PAD // GROUP, GROUP), tl.float32)
            for pair in range(0, PAIRS):
                b_i, b_j, i, j = load_pair(b, s, b_strides[1], inside, pair_table, pair, PAIRS)
                dS = load_rows(state, feature + pair * PAIR, DV, feature < PAIR, DV, DV_PAD)
                dv_rows = tl.dot(products(b_i, b_j, TYPE), dS, dv_rows, input_precision="ieee")  # [BN, 64] @ [64, DV]
                d_features = tl.dot(v_rows.to(TYPE), tl.trans(dS), input_precision="ieee")  # [BN, DV] @ [DV, 64]
                gradient = contract(d_features, b_i, b_j, i, j, gradient)
            db_rows += tl.reshape(gradient, (BN, R_PAD))
            gram = load_square(norms, R, R_PAD).to(TYPE)
            db_rows += 2.0 * tl.dot(b_rows.to(TYPE), gram, input_precision="ieee")
            far_rows += 0.5 * tl.sum(b_rows * db_rows, axis=1)
        if LINEAR:
            for f in range(0, R, FT):
                b_tile = load_columns(b, s, b_strides[1], inside, f, R, FT)  # [BN, FT]
                dS = load_rows(state, coordinate + PAIRS * PAIR + f, DV, f + coordinate < R, DV, DV_PAD)
                a_sum = tl.load(norms + (M - 1 - R) + f + coordinate, mask=f + coordinate < R, other=0.0)
                dv_rows = tl.dot(b_tile.to(TYPE), dS.to(TYPE), dv_rows, input_precision="ieee")  # [BN, FT] @ [FT, DV]
                d_tile = tl.dot(v_rows.to(dS.dtype), tl.trans(dS), input_precision=PRECISION)  # [BN, DV] @ [DV, FT]
                d_tile += mass_rows[:, None] * a_sum[None, :]
                far_rows += tl.sum(b_tile.to(tl.float32) * d_tile, axis=1)
                of_mass += tl.sum(b_tile.to(tl.float32) * a_sum[None, :], axis=1)
                if PAIRS > 0:
                    db_rows += d_tile  # FT is R_PAD
                else:
                    store_columns(db, row, R, inside, factor[:, None] * d_tile, f, R, FT)
        if CONSTANT:
            dS = tl.load(state + (F - 1) * DV + column, mask=column < DV, other=0.0).to(tl.float32)
            dv_rows += dS[None, :]
            far_rows += tl.sum(v_rows.to(tl.float32) * dS[None, :], axis=1) + tl.load(norms + M - 1)
        if PAIRS > 0 or not LINEAR:
            store_rows(db, row, R, inside, factor[:, None] * db_rows, R, R_PAD)
        if GATED:
            dv_rows *= factor[:, None]
            tl.store(far + row, factor * far_rows, mask=inside)
        if MASS:
            tl.store(d_mass + row, of_mass, mask=inside)

    # Through the queries of the local blocks.
    if NEAR:
        k_rows = load_rows(of_head(k, k_strides, batch, head), s, k_strides[1], inside, D, D_PAD)  # [BN, D]
        last = tl.minimum(end, first + LOCAL_BLOCKS * block_size)
        gates = batch * (tokens + past) * key_heads + head  # of the key head's first
        g, g_rest = load_gates(since, gates, s, key_heads, inside, GATED)
        g_block, block_rest = load_gates(since, gates, stop - 1, key_heads, first < stop, GATED and LOCAL_BLOCKS == 2)
        q, do = of_head(q, q_strides, batch, head * group), of_head(do, do_strides, batch, head * group)
        for h in range(0, group):
            for m in range(tl.maximum(lowest, past), last, BM):
                t = m + tl.arange(0, BM)
                q_rows = load_rows(q, t - past, q_strides[1], t < last, D, D_PAD)  # [BM, D]
                query = (batch * tokens + t - past) * heads + head * group + h
                do_rows = load_rows(do, t - past, do_strides[1], t < last, DV, DV_PAD)  # [BM, DV]
                peaks = load_peaks(peak, query, t < last, DEGREE)
                g_t, t_rest = load_gates(since, gates, t, key_heads, t < last, GATED)
                g_t += tl.where(t >= stop, g_block, 0.0)
                t_rest += tl.where(t >= stop, block_rest, 0.0)
                log_decay = (g_t[None, :] - g[:, None]) + (t_rest[None, :] - g_rest[:, None])
                w, slope = weights_and_slopes(  # [BN, BM]
                    scores(k_rows, q_rows, scale),
                    s[:, None] <= t[None, :],
                    log_decay,
                    peaks[None, :],
                    c0,
                    c1,
                    c2,
                    DEGREE,
                    GATED,
                )
                w /= tl.load(z + query, mask=t < last, other=1.0)[None, :]
                dv_rows = tl.dot(w.to(TYPE), do_rows.to(TYPE), dv_rows, input_precision="ieee")  # [BN, BM] @ [BM, DV]
            q += q_strides[2]
            do += do_strides[2]
    store_rows(dv, row, DV, inside, dv_rows, DV, DV_PAD)
