"""Decoding: one token of each sequence, from the state as it is carried and the keys of its local blocks.

    decode_parts    programs of the state: e^{g_t} φ(a)ᵀ S of some rows of S
                    programs of the local blocks: Σ_s e^{G_t − G_s} w(scale·q·k_s) [v_s, 1] of some keys
    decode_output   o = ([0, offset] + their sum), its first Dv over its last

One token is too little work to fill a GPU, so its sums are made in parts, as flash-decoding does; their number depends
on no length, so results do not either. All is fp32 without tensor cores: time is that of reading S and the keys. S has
the order of `symmetric_features.py`: for each coordinate i its products with the coordinates from i's group on, then
the coordinates themselves and 1, where they have a coefficient. Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lcpt_kernels.symmetric_features import Explicit, QuadraticFeatures
from lcpt_kernels.triton.block_causal.local_weights import (
    EXPONENTIAL,
    LOG2E,
    ROW_MAX_FLOOR,
    LocalWeight,
    exponents,
    weights_and_slopes,
)
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tensors import on_device_of, padded, with_contiguous_rows
from lcpt_kernels.triton.common.tile_io import GROUP, head_rows, load_rows


def decode_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    log_gate: Tensor | None,
    S: Tensor,
    features: QuadraticFeatures | Explicit,
    *,
    local_weight: LocalWeight,
    degree: int,
    scale: float,
    shift: float,
    offset: float,
    first: int,
) -> Tensor:
    """Return o [B, 1, H, Dv] in q's dtype.

    Args:
        q: [B, 1, H, D], a: [B, 1, H, r].
        k: [B, P, Hkv, D], v: [B, P, Hkv, Dv], of the local blocks up to the token itself, in order.
        log_gate: [B, P, Hkv], or None.
        S: [B, Hkv, F, Dv + 1] fp32, the state at the start of the token's block, whose first key is k[:, first].
        degree, shift: of LocalWeight.POWER.
    """
    batch, _, heads, D = q.shape
    R, DV = a.shape[3], v.shape[3]
    q, k, v, a, S = (with_contiguous_rows(x) for x in (q, k, v, a, S.float()))
    tiles = launch_configs.tiles("decode_parts", max(D, DV), v.dtype)
    number = tiles["STATE_PARTS"] + tiles["LOCAL_PARTS"]
    parts = torch.empty(batch * heads, number, DV + 2, dtype=torch.float32, device=q.device)
    o = torch.empty(batch, 1, heads, DV, dtype=q.dtype, device=q.device)
    with on_device_of(v):
        decode_parts_kernel[(batch * heads, number)](
            q,
            q.stride()[:3],
            k,
            k.stride()[:3],
            v,
            v.stride()[:3],
            a,
            a.stride()[:3],
            None if log_gate is None else log_decays(log_gate),
            S,
            S.stride()[:3],
            parts,
            heads,
            heads // v.shape[2],
            k.shape[1],
            first,
            float(scale),
            float(shift),
            float(features.c0),
            float(features.c1),
            float(features.c2),
            R=R,
            F=features.dimension,
            D=D,
            D_PAD=padded(D),
            DV=DV,
            DV_PAD=padded(DV),
            SQUARED=features.c2 != 0,
            LINEAR=features.c1 != 0,
            CONSTANT=features.c0 != 0,
            WEIGHT=local_weight.value,
            DEGREE=degree,
            GATED=log_gate is not None,
            **tiles,
        )
        decode_output_kernel[(batch * heads,)](
            parts,
            o,
            float(offset),
            DV=DV,
            DV_PAD=padded(DV),
            WEIGHT=local_weight.value,
            STATE_PARTS=tiles["STATE_PARTS"],
            LOCAL_PARTS=tiles["LOCAL_PARTS"],
            **launch_configs.tiles("decode_output"),
        )
    return o


def log_decays(log_gate: Tensor) -> Tensor:
    """Return the sums of log_gate [B, P, Hkv] from every token to the last, and 0 behind them: [B, P + 1, Hkv] fp32.
    That at s + 1 is the log of the decay of key s, that at the first of a block the one of the state before it."""
    return pad(log_gate.double().flip(1).cumsum(1).flip(1), (0, 0, 0, 1)).float()


@triton.jit(do_not_specialize=["heads", "group", "keys", "first"])
def decode_parts_kernel(
    q,
    q_strides,  # [B, 1, H, D]
    k,
    k_strides,  # [B, keys, Hkv, D]
    v,
    v_strides,  # [B, keys, Hkv, DV]
    a,
    a_strides,  # [B, 1, H, R]
    log_decay,  # [B, keys + 1, Hkv], as `log_decays` returns
    S,
    S_strides,  # [B, Hkv, F, DV + 1]
    parts,  # [B · H, STATE_PARTS + LOCAL_PARTS, DV + 2]: acc, l and m
    heads,
    group,
    keys,
    first,
    scale,
    shift,
    c0,
    c1,
    c2,
    R: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SQUARED: tl.constexpr,
    LINEAR: tl.constexpr,
    CONSTANT: tl.constexpr,
    WEIGHT: tl.constexpr,
    DEGREE: tl.constexpr,
    GATED: tl.constexpr,
    STATE_PARTS: tl.constexpr,
    LOCAL_PARTS: tl.constexpr,
    BF: tl.constexpr,
    BN: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = row // heads, row % heads
    key_head, key_heads = head // group, heads // group
    decays = batch * (keys + 1) * key_heads + key_head  # the place of the key head's first
    if part < STATE_PARTS:
        a = head_rows(a, a_strides, batch, head)
        S += batch * S_strides[0] + key_head * S_strides[1]
        acc, l_i = from_state(
            a, S, part, S_strides[2], c0, c1, c2, R, F, DV, DV_PAD, SQUARED, LINEAR, CONSTANT, STATE_PARTS, BF
        )
        m_i = 0.0
        if GATED:
            decay = tl.exp(tl.load(log_decay + decays + first * key_heads))
            acc *= decay
            l_i *= decay
    else:
        q = head_rows(q, q_strides, batch, head)
        k, v = head_rows(k, k_strides, batch, key_head), head_rows(v, v_strides, batch, key_head)
        acc, l_i, m_i = from_local_keys(
            q,
            k,
            k_strides[1],
            v,
            v_strides[1],
            log_decay,
            decays,
            key_heads,
            part - STATE_PARTS,
            keys,
            scale,
            shift,
            c0,
            c1,
            c2,
            D,
            D_PAD,
            DV,
            DV_PAD,
            WEIGHT,
            DEGREE,
            GATED,
            LOCAL_PARTS,
            BN,
        )
    out = parts + (row * (STATE_PARTS + LOCAL_PARTS) + part) * (DV + 2)
    column = tl.arange(0, DV_PAD)
    tl.store(out + column, acc, mask=column < DV)
    tl.store(out + DV, l_i)
    tl.store(out + DV + 1, m_i)


@triton.jit
def from_state(
    a,
    S,
    part,
    stride,
    c0,
    c1,
    c2,
    R: tl.constexpr,
    F: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SQUARED: tl.constexpr,
    LINEAR: tl.constexpr,
    CONSTANT: tl.constexpr,
    PARTS: tl.constexpr,
    BF: tl.constexpr,
):
    """Return the sum of every PARTS-th row of S [F, DV + 1] times its feature of a: [DV], and the last column's.

    Four steps are unrolled, and sums over rows made once, at the end, so that their loads are under way together.
    """
    tile = tl.arange(0, BF)
    acc = tl.zeros((BF, DV_PAD), tl.float32)
    l_i = tl.zeros((BF,), tl.float32)
    if SQUARED:
        for step in tl.range(0, (R + PARTS - 1) // PARTS, loop_unroll_factor=4):
            i = step * PARTS + part
            start = i // GROUP * GROUP  # of i's group; before it are start / 8 groups, of R, R − 8, … columns
            row = start * R - start * (start - GROUP) // 2 + (i - start) * (R - start) - start
            a_i = tl.load(a + i, mask=i < R, other=0.0).to(tl.float32)
            for f in tl.range(0, R, BF):
                j = f + tile
                inside = (i < R) & (j >= start) & (j < R)
                a_j = tl.load(a + j, mask=inside, other=0.0).to(tl.float32)
                factor = a_i * a_j * tl.where(j < start + GROUP, c2, 2.0 * c2)
                acc, l_i = add_rows(acc, l_i, S, row + j, stride, inside, factor, DV, DV_PAD)
    if LINEAR:
        for step in tl.static_range((R + PARTS * BF - 1) // (PARTS * BF)):
            j = (step * PARTS + part) * BF + tile
            factor = c1 * tl.load(a + j, mask=j < R, other=0.0).to(tl.float32)
            acc, l_i = add_rows(acc, l_i, S, F - CONSTANT - R + j, stride, j < R, factor, DV, DV_PAD)
    if CONSTANT:
        inside = (tile == 0) & (part == 0)
        acc, l_i = add_rows(acc, l_i, S, F - 1 + tile, stride, inside, tl.where(inside, c0, 0.0), DV, DV_PAD)
    return tl.sum(acc, axis=0), tl.sum(l_i, axis=0)


@triton.jit
def add_rows(acc, l_i, S, rows, stride, inside, factor, DV: tl.constexpr, DV_PAD: tl.constexpr):
    acc += factor[:, None] * load_rows(S, rows, stride, inside, DV, DV_PAD)
    l_i += factor * tl.load(S + rows.to(tl.int64) * stride + DV, mask=inside, other=0.0)
    return acc, l_i


@triton.jit
def from_local_keys(
    q,
    k,
    k_stride,
    v,
    v_stride,
    log_decay,
    decays,
    decay_stride,
    part,
    keys,
    scale,
    shift,
    c0,
    c1,
    c2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    DEGREE: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
):
    """Return the sum of w [v, 1] over every PARTS-th tile of keys, over 2^m: [DV], the last column's, and m."""
    coordinate = tl.arange(0, D_PAD)
    q_row = tl.load(q + coordinate, mask=coordinate < D, other=0.0).to(tl.float32)
    acc = tl.zeros((DV_PAD,), tl.float32)
    l_i = 0.0
    m_i = float("-inf") if WEIGHT == EXPONENTIAL else 0.0
    base = scale * LOG2E if WEIGHT == EXPONENTIAL else scale
    for n in range(part * BN, keys, PARTS * BN):
        s = n + tl.arange(0, BN)
        inside = s < keys
        k_rows = load_rows(k, s, k_stride, inside, D, D_PAD).to(tl.float32)  # [BN, D]
        v_rows = load_rows(v, s, v_stride, inside, DV, DV_PAD).to(tl.float32)  # [BN, DV]
        score = tl.sum(k_rows * q_row[None, :], axis=1) * base
        decay = tl.zeros((BN,), tl.float32)
        if GATED:
            decay = tl.load(log_decay + decays + (s + 1).to(tl.int64) * decay_stride, mask=inside, other=0.0)
        if WEIGHT == EXPONENTIAL:
            exponent = tl.where(inside, exponents(score, decay, GATED), float("-inf"))
            m_new = tl.maximum(m_i, tl.max(exponent, axis=0))
            acc *= tl.exp2(m_i - m_new)
            l_i *= tl.exp2(m_i - m_new)
            m_i = m_new
        w, slope = weights_and_slopes(score, inside, True, decay, m_i, shift, c0, c1, c2, WEIGHT, DEGREE, GATED)
        l_i += tl.sum(w, axis=0)
        acc += tl.sum(w[:, None] * v_rows, axis=0)
    return acc, l_i, m_i


@triton.jit
def decode_output_kernel(
    parts,  # [B · H, STATE_PARTS + LOCAL_PARTS, DV + 2]
    o,  # [B · H, DV]
    offset,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    STATE_PARTS: tl.constexpr,
    LOCAL_PARTS: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, DV_PAD)
    parts += row * (STATE_PARTS + LOCAL_PARTS) * (DV + 2)
    of_state, of_keys = tl.arange(0, STATE_PARTS), tl.arange(0, LOCAL_PARTS)
    acc = tl.sum(load_rows(parts, of_state, DV + 2, of_state >= 0, DV, DV_PAD), axis=0)
    l_i = tl.sum(tl.load(parts + of_state * (DV + 2) + DV), axis=0) + offset
    parts += STATE_PARTS * (DV + 2)
    local = load_rows(parts, of_keys, DV + 2, of_keys >= 0, DV, DV_PAD)  # [LOCAL_PARTS, DV]
    local_l = tl.load(parts + of_keys * (DV + 2) + DV)
    if WEIGHT == EXPONENTIAL:  # all over 2^m, m the largest exponent; that of the state as in `forward.py`
        local_m = tl.load(parts + of_keys * (DV + 2) + DV + 1)
        state_max = tl.maximum(tl.max(tl.abs(acc), axis=0), tl.abs(l_i))
        m_state = tl.minimum(tl.maximum(tl.log2(tl.where(state_max == 0.0, 1.0, state_max)), ROW_MAX_FLOOR), 0.0)
        m = tl.maximum(tl.max(local_m, axis=0), tl.where(state_max == 0.0, float("-inf"), m_state))
        acc *= tl.exp2(-tl.maximum(m, ROW_MAX_FLOOR))
        l_i *= tl.exp2(-tl.maximum(m, ROW_MAX_FLOOR))
        local *= tl.exp2(local_m - m)[:, None]
        local_l *= tl.exp2(local_m - m)
    acc += tl.sum(local, axis=0)
    l_i += tl.sum(local_l, axis=0)
    l_i = tl.where(l_i == 0.0, float("inf"), l_i)  # 0/0 is 0
    tl.store(o + row * DV + column, (acc / l_i).to(o.dtype.element_ty), mask=column < DV)
