"""The output: exact weights for the keys of the local blocks, the state for everything earlier, one denominator.

    [acc_t, l_t] = [0, offset] + e^{g_t} φ(a_t)ᵀ S + Σ_{s local} e^{G_t − G_s} w(scale·q_t·k_s) [v_s, 1]     o = acc / l

A program holds BM rows of one block and one query head; g_t is gate_cumsum. Where w = exp, a row is over 2^{m_i} as in
FlashAttention-2 (arXiv 2307.08691), and m_i starts at the logarithm of the state's largest term, but at 0 at most:
nothing overflows, and not all of a row underflows. Notation: `block_causal/__init__.py`.
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
    LocalWeight,
    exponents,
    load_gate_cumsum,
    load_step_gate_cumsum,
    scores,
    weights_and_slopes,
)
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import (
    PAIR,
    head_rows,
    load_block,
    load_columns,
    load_pair,
    load_rows,
    load_square,
    products,
    store_rows,
)


def block_forward(problem: Problem, value_state: Tensor, denom_state: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return o [B, T, H, Dv], the denominator [B, H, T] fp32 (∞ where it is 0), and where w = exp row_max [B, H, T]
    fp32, else None. The denominator is over 2^{row_max}. value_state and denom_state are those at each block's
    start."""
    p = problem
    o = torch.empty(*p.q.shape[:3], p.v.shape[3], dtype=p.q.dtype, device=p.q.device)
    batch, tokens, heads, _ = p.q.shape
    denominator = torch.empty(batch, heads, tokens, dtype=torch.float32, device=p.q.device)
    row_max = torch.empty_like(denominator) if p.local_weight == LocalWeight.EXPONENTIAL else None
    tiles = launch_configs.tiles("block_forward" if p.gate_cumsum is None else "block_forward_gated", p.width, p.type)
    pieces = triton.cdiv(p.blocks.size, tiles["BM"])
    block_forward_kernel[(p.blocks.count * pieces, p.q.shape[2])](
        **p.arguments(block_forward_kernel),
        value_state=value_state,
        denom_state=denom_state,
        o=o,
        denominator=denominator,
        row_max=row_max,
        pieces=pieces,
        **tiles,
    )
    return o, denominator, row_max


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
    gate_cumsum,  # [B, Hkv, 2, past + T]: g
    value_state,  # [N, Hkv, F, DV]
    denom_state,  # [N, Hkv, M]
    o,  # [B, T, H, DV]
    denominator,
    row_max,  # [B, H, T]
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
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BM
    t = lowest + tl.arange(0, BM)
    if not GATED:  # noqa: SIM102  whose registers are all in use: it would spill
        if lowest >= stop:  # beyond a short block, or beyond the last document
            return
    inside = (t < stop) & (t >= past)
    q, a = head_rows(q, q_strides, batch, head), head_rows(a, a_strides, batch, head)
    k, v = head_rows(k, k_strides, batch, key_head), head_rows(v, v_strides, batch, key_head)

    # The state. The first blocks of a document multiply a state of zeros: to skip them would make the number of steps
    # known at run time only, and ptxas would serialise wgmma (C7515).
    slot = block.to(tl.int64) * key_heads + key_head
    denom_state += slot * M
    state = value_state + slot * (F * DV)
    feature, column, coordinate = tl.arange(0, PAIR), tl.arange(0, DV_PAD), tl.arange(0, FT)
    acc = tl.zeros((BM, DV_PAD), tl.float32)
    l_i = tl.zeros((BM,), tl.float32)
    if PAIRS > 0:
        # Unrolled, so that the next pair's loads are issued before this pair's product, without the pipelined loop in
        # which ptxas overwrites computed features (`launch_configs.py`).
        for pair in tl.static_range(PAIRS):
            a_i, a_j, i, j = load_pair(a, t - past, a_strides[1], inside, pair_table, pair, PAIRS)
            S = load_rows(state, feature + pair * PAIR, DV, feature < PAIR, DV, DV_PAD)
            acc = tl.dot(products(a_i, a_j, TYPE), S, acc, input_precision="ieee")  # [BM, 64] @ [64, DV]
        a_rows = load_rows(a, t - past, a_strides[1], inside, R, R_PAD)  # [BM, R]
        gram = load_square(denom_state, R, R_PAD).to(TYPE)
        l_i += tl.sum(tl.dot(a_rows.to(TYPE), gram, input_precision="ieee") * a_rows.to(tl.float32), axis=1)
    if LINEAR:
        for f in range(0, R, FT):
            a_tile = load_columns(a, t - past, a_strides[1], inside, f, R, FT)  # [BM, FT]
            S = load_rows(state, coordinate + PAIRS * PAIR + f, DV, f + coordinate < R, DV, DV_PAD)
            acc = tl.dot(a_tile.to(TYPE), S.to(TYPE), acc, input_precision="ieee")  # [BM, FT] @ [FT, DV]
            b_sum = tl.load(denom_state + (M - 1 - R) + f + coordinate, mask=f + coordinate < R, other=0.0)
            l_i += tl.sum(a_tile.to(tl.float32) * b_sum[None, :], axis=1)
    if CONSTANT:
        acc += tl.load(state + (F - 1) * DV + column, mask=column < DV, other=0.0).to(tl.float32)[None, :]
        l_i += tl.load(denom_state + M - 1)
    keys = tokens + past
    gates = (batch * key_heads + key_head) * 2 * keys  # the place of the key head's gate sums
    g, g_rest = load_gate_cumsum(gate_cumsum, gates, t, keys, inside, GATED)
    if GATED:
        acc *= tl.exp2((g + g_rest) * LOG2E)[:, None]
        l_i *= tl.exp2((g + g_rest) * LOG2E)
    l_i += offset
    m_i = tl.zeros((BM,), tl.float32)
    if WEIGHT == EXPONENTIAL:
        state_max = tl.maximum(tl.max(tl.abs(acc), axis=1), tl.abs(l_i))
        m_state = tl.minimum(tl.maximum(tl.log2(tl.where(state_max == 0.0, 1.0, state_max)), ROW_MAX_FLOOR), 0.0)
        alpha = tl.exp2(-m_state)
        l_i *= alpha
        acc *= alpha[:, None]
        m_i = tl.where(state_max == 0.0, float("-inf"), m_state)

    # The local blocks, exactly.
    q_rows = load_rows(q, t - past, q_strides[1], inside, D, D_PAD)  # [BM, D]
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
        seen = tl.arange(0, BN)[None, :] <= (t - n)[:, None]  # s <= t, as comparisons with constants
        # last - BM is at most the first query, and takes no register of its own; a gate leaves none for the branch.
        diagonal = True if GATED else n + BN > last - BM
        log_decay = (g[:, None] - g_s[None, :]) + (g_rest[:, None] - s_rest[None, :])
        if WEIGHT == EXPONENTIAL:
            # The scale is above 0, so without a gate the largest of a row is found before a score is multiplied, which
            # is then one instruction with the subtraction of m_i.
            score, base = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee"), scale * LOG2E  # [BM, BN]
            if GATED:
                score, base = exponents(score * base, log_decay, GATED), 1.0
            if diagonal:
                score = tl.where(seen, score, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(score, axis=1) * base)
            alpha = tl.exp2(m_i - m_new)
            l_i *= alpha
            acc *= alpha[:, None]
            m_i = m_new
            w = tl.exp2(score * base - m_i[:, None])
        else:
            score = scores(q_rows, k_rows, scale, WEIGHT)  # [BM, BN]
            w, slope = weights_and_slopes(
                score, seen, diagonal, log_decay, m_i[:, None], shift, c0, c1, c2, WEIGHT, DEGREE, GATED
            )
        l_i += tl.sum(w, axis=1)
        acc = tl.dot(w.to(TYPE), v_rows.to(TYPE), acc, input_precision="ieee")  # [BM, BN] @ [BN, DV]

    l_i = tl.where(l_i == 0.0, float("inf"), l_i)  # 0/0 is 0, and so are its gradients
    # Loaded again: places that are kept would take registers through the loop.
    batch, first, stop, begin, end = load_block(blocks, block)
    t = first + tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = (t < stop) & (t >= past)
    row, place = (batch * tokens + t - past) * heads + head, (batch * heads + head) * tokens + t - past
    store_rows(o, row, DV, inside, acc / l_i[:, None], DV, DV_PAD)
    tl.store(denominator + place, l_i, mask=inside)
    if WEIGHT == EXPONENTIAL:
        tl.store(row_max + place, m_i, mask=inside)
