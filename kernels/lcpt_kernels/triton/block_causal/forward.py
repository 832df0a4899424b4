"""The output: keys of the local blocks exactly, everything earlier through the state, one normaliser.

    [N_t, Z_t] = [0, offset] + e^{g_t} φ(a_t)ᵀ S + Σ_{s local} e^{G_t − G_s} w(scale·q_t·k_s) [v_s, 1]      o = N / Z

A program holds BM rows of one block and one query head; g_t is the sum of the log gate from the block's start to t.
With w = exp all of a row is over e^{M_t}, M_t the logarithm of its greatest term, of those not local at most 0: nothing
overflows, and not all of a row underflows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.local_weights import (
    EXPONENTIAL,
    FAINTEST,
    exponents,
    load_gates,
    scores,
    weights_and_slopes,
)
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import (
    PAIR,
    load_block,
    load_columns,
    load_pair,
    load_rows,
    load_square,
    of_head,
    products,
    store_rows,
)


def block_forward(problem: Problem, values: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The states [N, Hkv, ·] that every block meets, scanned -> o [B, T, H, Dv], Z [B, T, H] fp32, ∞ for 0; and where
    w = exp, when Z is over e^M, M likewise."""
    p = problem
    o = torch.empty(*p.q.shape[:3], p.v.shape[3], dtype=p.q.dtype, device=p.q.device)
    z = torch.empty(p.q.shape[:3], dtype=torch.float32, device=p.q.device)
    peak = torch.empty_like(z) if p.degree == EXPONENTIAL.value else None
    tiles = launch_configs.tiles("block_forward" if p.since is None else "block_forward_gated", p.width, p.type)
    pieces = triton.cdiv(p.blocks.size, tiles["BM"])
    block_forward_kernel[(p.blocks.count * pieces, p.q.shape[2])](
        **p.arguments(block_forward_kernel), values=values, norms=norms, o=o, z=z, peak=peak, pieces=pieces, **tiles
    )
    return o, z, peak


@triton.jit(do_not_specialize=["tokens", "past", "group", "block_size", "pieces"])
def block_forward_kernel(
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
    o,  # [B, T, H, DV]
    z,
    peak,  # [B, T, H]
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
    batch, first, stop, begin, end = load_block(blocks, block)
    t = first + tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = (t < stop) & (t >= past)
    q, a = of_head(q, q_strides, batch, head), of_head(a, a_strides, batch, head)
    k, v = of_head(k, k_strides, batch, key_head), of_head(v, v_strides, batch, key_head)

    # Everything earlier. The first blocks of a document meet a state of zeros; to leave them out would make the number
    # of steps one of run time, and ptxas serialise wgmma (C7515).
    slot = block.to(tl.int64) * key_heads + key_head
    norms += slot * M
    state = values + slot * (F * DV)
    feature, column, coordinate = tl.arange(0, PAIR), tl.arange(0, DV_PAD), tl.arange(0, FT)
    sums = tl.zeros((BM, DV_PAD), tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    if PAIRS > 0:
        # Unrolled, so that the next pair's loads are issued before this pair's product, without the pipelined loop in
        # which ptxas overwrites computed features (`launch_configs.py`).
        for pair in tl.static_range(PAIRS):
            a_i, a_j, i, j = load_pair(a, t - past, a_strides[1], inside, pair_table, pair, PAIRS)
            S = load_rows(state, feature + pair * PAIR, DV, feature < PAIR, DV, DV_PAD)
            sums = tl.dot(products(a_i, a_j, TYPE), S, sums, input_precision="ieee")  # [BM, 64] @ [64, DV]
        a_rows = load_rows(a, t - past, a_strides[1], inside, R, R_PAD)  # [BM, R]
        gram = load_square(norms, R, R_PAD).to(TYPE)
        norm += tl.sum(tl.dot(a_rows.to(TYPE), gram, input_precision="ieee") * a_rows.to(tl.float32), axis=1)
    if LINEAR:
        for f in range(0, R, FT):
            a_tile = load_columns(a, t - past, a_strides[1], inside, f, R, FT)  # [BM, FT]
            S = load_rows(state, coordinate + PAIRS * PAIR + f, DV, f + coordinate < R, DV, DV_PAD)
            sums = tl.dot(a_tile.to(TYPE), S.to(TYPE), sums, input_precision="ieee")  # [BM, FT] @ [FT, DV]
            b_sum = tl.load(norms + (M - 1 - R) + f + coordinate, mask=f + coordinate < R, other=0.0)
            norm += tl.sum(a_tile.to(tl.float32) * b_sum[None, :], axis=1)
    if CONSTANT:
        sums += tl.load(state + (F - 1) * DV + column, mask=column < DV, other=0.0).to(tl.float32)[None, :]
        norm += tl.load(norms + M - 1)
    gates = batch * (tokens + past) * key_heads + key_head  # of the key head's first
    g, g_rest = load_gates(since, gates, t, key_heads, inside, GATED)
    if GATED:
        sums *= tl.exp(g + g_rest)[:, None]
        norm *= tl.exp(g + g_rest)
    norm += offset
    peaks = tl.zeros((BM,), tl.float32)
    if DEGREE == EXPONENTIAL:
        others = tl.maximum(tl.max(tl.abs(sums), axis=1), tl.abs(norm))
        damped = tl.minimum(tl.maximum(tl.log(tl.where(others == 0.0, 1.0, others)), FAINTEST), 0.0)
        norm *= tl.exp(-damped)
        sums *= tl.exp(-damped)[:, None]
        peaks = tl.where(others == 0.0, float("-inf"), damped)

    # The local blocks, exactly.
    q_rows = load_rows(q, t - past, q_strides[1], inside, D, D_PAD)  # [BM, D]
    start = tl.maximum(begin, first - (LOCAL_BLOCKS - 1) * block_size)
    last = tl.minimum(stop, first + (tl.program_id(0) % pieces + 1) * BM)
    g_before, before_rest = load_gates(since, gates, first - 1, key_heads, start < first, GATED and LOCAL_BLOCKS == 2)
    for n in range(start, last, BN):
        s = n + tl.arange(0, BN)
        k_rows = load_rows(k, s, k_strides[1], s < stop, D, D_PAD)  # [BN, D]
        v_rows = load_rows(v, s, v_strides[1], s < stop, DV, DV_PAD)  # [BN, DV]
        score = scores(q_rows, k_rows, scale)  # [BM, BN]
        g_s, s_rest = load_gates(since, gates, s, key_heads, s < stop, GATED)
        g_s -= tl.where(s < first, g_before, 0.0)
        s_rest -= tl.where(s < first, before_rest, 0.0)
        seen = s[None, :] <= t[:, None]
        log_decay = (g[:, None] - g_s[None, :]) + (g_rest[:, None] - s_rest[None, :])
        if DEGREE == EXPONENTIAL:
            higher = tl.maximum(peaks, tl.max(exponents(score, seen, log_decay, GATED), axis=1))
            norm *= tl.exp(peaks - higher)
            sums *= tl.exp(peaks - higher)[:, None]
            peaks = higher
        w, slope = weights_and_slopes(score, seen, log_decay, peaks[:, None], c0, c1, c2, DEGREE, GATED)
        norm += tl.sum(w, axis=1)
        sums = tl.dot(w.to(TYPE), v_rows.to(TYPE), sums, input_precision="ieee")  # [BM, BN] @ [BN, DV]

    norm = tl.where(norm == 0.0, float("inf"), norm)  # 0/0 is 0, and so are its gradients
    row = batch * tokens + t - past
    store_rows(o, row * heads + head, DV, inside, sums / norm[:, None], DV, DV_PAD)
    tl.store(z + row * heads + head, norm, mask=inside)
    if DEGREE == EXPONENTIAL:
        tl.store(peak + row * heads + head, peaks, mask=inside)
