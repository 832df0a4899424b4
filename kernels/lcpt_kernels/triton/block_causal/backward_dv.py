"""Gradients of the keys' side: of v through its local queries and through the state, of b through the state.

    [dv_s, ·] = Σ_{t local} W_ts n̄_t + e^{u_s} dSᵀ φ(b_s)          db_s = e^{u_s} φ'(b_s)ᵀ (dS [v_s, 1])
with u_s gate_rev_cumsum and n̄_t = [do_t, δ_t] / l_t.

A program holds BN keys of one block and one key-value head, and goes through the query heads of its group one after
the other. LOCAL and STATE say which of the two terms it computes: both for tokens; where summaries are added to the
state, LOCAL for tokens and STATE for summaries. Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.local_weights import (
    load_gate_cumsum,
    load_step_row_max,
    scores,
    weights_and_slopes,
)
from lcpt_kernels.triton.block_causal.problem import Problem
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import (
    GROUP,
    PAIR,
    contract,
    head_rows,
    load_block,
    load_columns,
    load_once,
    load_pair,
    load_rows,
    load_square,
    load_tile,
    products,
    store_columns,
    store_rows,
    store_tile,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Gradients of K = past + T tokens, or of S summaries."""

    v: Tensor | None  # [B, K, Hkv, Dv]; None with summaries where it is that through the state alone
    b: Tensor  # [B, K, Hkv, R], of summaries [B, S, Hkv, R]; through the state; fp32 where b is k too
    state_v: Tensor | None  # [B, S, Hkv, Dv]; None without summaries
    mass: Tensor | None  # [B, Hkv, S] fp32; None without mass
    dgate_state: Tensor | None  # [B, Hkv, K] fp32: Σ_t dW_ts W_ts of each key through the state; None without a gate


def block_backward_dv(
    problem: Problem,
    d_value_state: Tensor,
    d_denom_state: Tensor,
    do: Tensor,
    reciprocal: Tensor,
    row_max: Tensor | None,
) -> Gradients:
    """Return the gradients. d_value_state and d_denom_state [N, Hkv, ·] are those of each block's addition to the
    state; do is [B, T, H, Dv]; reciprocal from `backward_delta` and row_max from `block_forward` are [B, H, T] fp32."""
    if problem.summaries:
        through_state = block_backward_dv_state(problem, d_value_state, d_denom_state)
        return replace(through_state, v=block_backward_dv_local(problem, do, reciprocal, row_max))
    queries: dict = dict(do=do, do_strides=do.stride()[:3], reciprocal=reciprocal, row_max=row_max)
    return _through_state(problem, d_value_state, d_denom_state, LOCAL=True, **queries)


def block_backward_dv_local(problem: Problem, do: Tensor, reciprocal: Tensor, row_max: Tensor | None) -> Tensor:
    """Return the gradient of v through the queries of its local blocks alone."""
    p = problem
    dv = torch.empty(p.v.shape, dtype=p.v.dtype, device=p.v.device)
    _launch(
        p,
        p.blocks.size,
        dv=dv,
        do=do,
        do_strides=do.stride()[:3],
        reciprocal=reciprocal,
        row_max=row_max,
        value_state=do,  # not read
        LOCAL=True,
        STATE=False,
    )
    return dv


def block_backward_dv_state(problem: Problem, d_value_state: Tensor, d_denom_state: Tensor) -> Gradients:
    """Return the gradients through the state alone; with summaries, v has none."""
    # Given features alone would spill in the tiles of both terms.
    tiles_of = "block_backward_dv" if problem.layout.pairs else "block_backward_dv_summaries"
    return _through_state(problem, d_value_state, d_denom_state, tiles_of, LOCAL=False)


def _through_state(
    problem: Problem, d_value_state: Tensor, d_denom_state: Tensor, tiles_of: str = "block_backward_dv", **queries
) -> Gradients:
    p = problem
    new = torch.zeros if p.summaries else torch.empty  # summaries beyond those of whole blocks get 0
    dv = new(p.state_v.shape, dtype=p.state_v.dtype, device=p.v.device)
    db = new(p.b.shape, dtype=p.gradient_type(p.b), device=p.b.device)
    d_mass = None if p.mass is None else torch.zeros_like(p.mass)
    dgate_state = torch.empty_like(p.gate_rev_cumsum) if p.gate_rev_cumsum is not None else None
    of_state: dict = dict(
        dv=dv,
        value_state=d_value_state,
        denom_state=d_denom_state,
        db=db,
        d_mass=d_mass,
        dgate_state=dgate_state,
        STATE=True,
    )
    if p.summaries:
        of_summaries = dict(
            v=p.state_v,
            v_strides=p.state_v.stride()[:3],
            GATED=False,
            blocks=p.state_blocks.table,
            tokens=p.b.shape[1],
            past=0,
        )
        _launch(p, p.summaries, tiles_of, **of_state, **queries, **of_summaries)
        return Gradients(v=None, b=db, state_v=dv, mass=d_mass, dgate_state=dgate_state)
    _launch(p, p.blocks.size, tiles_of, **of_state, **queries)
    return Gradients(v=dv, b=db, state_v=None, mass=d_mass, dgate_state=dgate_state)


def _launch(problem: Problem, rows: int, tiles_of: str = "block_backward_dv", **given) -> None:
    p = problem
    if p.gate_cumsum is not None and tiles_of == "block_backward_dv":
        tiles_of = "block_backward_dv_gated"
    tiles = launch_configs.tiles(tiles_of, p.width, p.type)
    pieces = triton.cdiv(rows, tiles["BN"])
    absent = dict(
        do=None,
        do_strides=p.v.stride()[:3],
        reciprocal=None,
        row_max=None,
        denom_state=None,
        db=None,
        d_mass=None,
        dgate_state=None,
    )
    arguments = p.arguments(block_backward_dv_kernel) | absent | given
    block_backward_dv_kernel[(p.blocks.count * pieces, p.v.shape[2])](**arguments, pieces=pieces, **tiles)


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
    gate_cumsum,  # [B, Hkv, 2, past + T]: g
    gate_rev_cumsum,  # [B, Hkv, past + T]: u
    value_state,  # [N, Hkv, F, DV]: dS
    denom_state,  # [N, Hkv, M]: dS of the denominator
    mass,  # [B, Hkv, past + T]
    do,
    do_strides,  # [B, T, H, DV]
    reciprocal,
    row_max,  # [B, H, T]
    dv,  # [B, past + T, Hkv, DV]
    db,  # [B, past + T, Hkv, R]
    d_mass,
    dgate_state,  # [B, Hkv, past + T]
    blocks,  # [N, 5]
    pair_table,  # [2, PAIRS]
    tokens,
    past,
    group,
    block_size,
    pieces,
    scale,
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
    MASS: tl.constexpr,
    WEIGHT: tl.constexpr,
    DEGREE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    LOCAL: tl.constexpr,
    STATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    key_heads = tl.num_programs(1)
    TYPE: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16
    PRECISION: tl.constexpr = "ieee" if value_state.dtype.element_ty == TYPE else "tf32"
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BN
    if not GATED:  # noqa: SIM102  whose registers are all in use: it would spill
        if lowest >= stop:  # beyond a short block, or beyond the last document
            return
    s = lowest + tl.arange(0, BN)
    inside = s < stop
    row = (batch * (tokens + past) + s) * key_heads + head
    place = (batch * key_heads + head) * (tokens + past) + s
    v_rows = load_rows(head_rows(v, v_strides, batch, head), s, v_strides[1], inside, DV, DV_PAD)  # [BN, DV]
    dv_rows = tl.zeros((BN, DV_PAD), tl.float32)

    # Through the state.
    if STATE:
        b = head_rows(b, b_strides, batch, head)
        slot = block.to(tl.int64) * key_heads + head
        denom_state += slot * M
        state = value_state + slot * (F * DV)
        feature, column, coordinate = tl.arange(0, PAIR), tl.arange(0, DV_PAD), tl.arange(0, FT)
        factor = tl.where(inside, 1.0, 0.0)
        if GATED:
            factor = tl.exp(tl.load(gate_rev_cumsum + place, mask=inside, other=0.0))
        mass_rows = tl.where(inside, 1.0, 0.0)
        if MASS:
            mass_rows = tl.load(mass + place, mask=inside, other=0.0)
        db_rows = tl.zeros((BN, FT), tl.float32)
        dgate_state_rows = tl.zeros((BN,), tl.float32)
        d_mass_rows = tl.zeros((BN,), tl.float32)
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
            gram = load_square(denom_state, R, R_PAD).to(TYPE)
            db_rows += 2.0 * tl.dot(b_rows.to(TYPE), gram, input_precision="ieee")
            dgate_state_rows += 0.5 * tl.sum(b_rows * db_rows, axis=1)
        if LINEAR:
            for f in range(0, R, FT):
                b_tile = load_columns(b, s, b_strides[1], inside, f, R, FT)  # [BN, FT]
                dS = load_rows(state, coordinate + PAIRS * PAIR + f, DV, f + coordinate < R, DV, DV_PAD)
                a_sum = tl.load(denom_state + (M - 1 - R) + f + coordinate, mask=f + coordinate < R, other=0.0)
                dv_rows = tl.dot(b_tile.to(TYPE), dS.to(TYPE), dv_rows, input_precision="ieee")  # [BN, FT] @ [FT, DV]
                d_tile = tl.dot(v_rows.to(dS.dtype), tl.trans(dS), input_precision=PRECISION)  # [BN, DV] @ [DV, FT]
                d_tile += mass_rows[:, None] * a_sum[None, :]
                dgate_state_rows += tl.sum(b_tile.to(tl.float32) * d_tile, axis=1)
                d_mass_rows += tl.sum(b_tile.to(tl.float32) * a_sum[None, :], axis=1)
                if PAIRS > 0:
                    db_rows += d_tile  # FT is R_PAD
                else:
                    store_columns(db, row, R, inside, factor[:, None] * d_tile, f, R, FT)
        if CONSTANT:
            dS = tl.load(state + (F - 1) * DV + column, mask=column < DV, other=0.0).to(tl.float32)
            dv_rows += dS[None, :]
            dgate_state_rows += tl.sum(v_rows.to(tl.float32) * dS[None, :], axis=1) + tl.load(denom_state + M - 1)
        if PAIRS > 0 or not LINEAR:
            store_rows(db, row, R, inside, factor[:, None] * db_rows, R, R_PAD)
        if GATED:
            dv_rows *= factor[:, None]
            tl.store(dgate_state + place, factor * dgate_state_rows, mask=inside)
        if MASS:
            tl.store(d_mass + place, d_mass_rows, mask=inside)

    # Through the queries of the local blocks.
    if LOCAL:
        batch, first, stop, begin, end = load_block(blocks, block)
        lowest = first + tl.program_id(0) % pieces * BN
        s = lowest + tl.arange(0, BN)
        inside = s < stop
        k_rows = load_rows(head_rows(k, k_strides, batch, head), s, k_strides[1], inside, D, D_PAD)  # [BN, D]
        last = tl.minimum(end, first + LOCAL_BLOCKS * block_size)
        keys = tokens + past
        gates = (batch * key_heads + head) * 2 * keys  # the place of the key head's gate sums
        g, g_rest = load_gate_cumsum(gate_cumsum, gates, s, keys, inside, GATED)
        g_block, block_rest = load_gate_cumsum(
            gate_cumsum, gates, stop - 1, keys, first < stop, GATED and LOCAL_BLOCKS == 2
        )
        q, do = head_rows(q, q_strides, batch, head * group), head_rows(do, do_strides, batch, head * group)
        for h in range(0, group):
            # The place of the head's token 0.
            queries = (batch * (key_heads * group) + head * group + h) * tokens - past
            for m in range(tl.maximum(lowest, past), last, BM):
                local = tl.arange(0, BM) < last - m
                q_m = q + (m - past).to(tl.int64) * q_strides[1]
                do_m = do + (m - past).to(tl.int64) * do_strides[1]
                q_rows = load_tile(q_m, q_strides[1], local, 0, D, D_PAD, D != D_PAD)  # [BM, D]
                do_rows = load_tile(do_m, do_strides[1], local, 0, DV, DV_PAD, DV != DV_PAD)  # [BM, DV]
                m_i = load_step_row_max(row_max, queries + m, local, WEIGHT)
                # With `load_step_gate_cumsum` this loop would spill.
                g_t, t_rest = load_gate_cumsum(gate_cumsum, gates + m, tl.arange(0, BM), keys, local, GATED)
                if LOCAL_BLOCKS == 2:
                    later = tl.arange(0, BM) >= stop - m
                    g_t += tl.where(later, g_block, 0.0)
                    t_rest += tl.where(later, block_rest, 0.0)
                log_decay = (g_t[None, :] - g[:, None]) + (t_rest[None, :] - g_rest[:, None])
                w, slope = weights_and_slopes(  # [BN, BM]
                    scores(k_rows, q_rows, scale, WEIGHT),
                    (s - m)[:, None] <= tl.arange(0, BM)[None, :],  # s <= t, as comparisons with constants
                    m < lowest + BN,
                    log_decay,
                    m_i[None, :],
                    shift,
                    c0,
                    c1,
                    c2,
                    WEIGHT,
                    DEGREE,
                    GATED,
                )
                w *= load_once(reciprocal + queries + m, local)[None, :]
                dv_rows = tl.dot(w.to(TYPE), do_rows.to(TYPE), dv_rows, input_precision="ieee")  # [BN, BM] @ [BM, DV]
            q += q_strides[2]
            do += do_strides[2]
    # Loaded again: places that are kept would take registers through the loops.
    batch, first, stop, begin, end = load_block(blocks, block)
    lowest = first + tl.program_id(0) % pieces * BN
    n = tl.arange(0, BN)
    dv += ((batch * (tokens + past) + lowest) * key_heads + head) * DV
    store_tile(dv, n * key_heads, n < stop - lowest, dv_rows, DV, DV_PAD)
