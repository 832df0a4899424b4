"""A block's addition to the state: Σ φ(x_t) [y_t, z_t]ᵀ over its tokens.

With keys it is added to S: x = b, y = v, z = 1. With queries it is added to the gradient of S: x = a and [y, z] = n̄ =
[do, δ] / l. The numerator's part φ(x) yᵀ is one tile of 64 rows for each pair of groups of coordinates. The
denominator's part is in x's Gram matrix, since (a·b)² = aᵀ (b bᵀ) a. Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.block_causal.block_table import Blocks
from lcpt_kernels.triton.block_causal.state_layout import Layout
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import (
    GROUP,
    PAIR,
    head_rows,
    load_block,
    load_columns,
    load_rows,
    multiply,
    store_rows,
)


def block_state(
    x: Tensor,
    y: Tensor,
    log_factor: Tensor | None,
    blocks: Blocks,
    layout: Layout,
    type: torch.dtype,
    *,
    heads: int,
    past: int = 0,
    delta: Tensor | None = None,
    reciprocal: Tensor | None = None,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return value_state [N, heads, F, Dv] in `type` and denom_state [N, heads, M] fp32, in the order of `layout`.

    Args:
        x: [B, T, H, R], y: [B, T, H, Dv], of the tokens after the first `past`. Groups of H / heads heads are summed.
        log_factor: [B, past + T, heads] fp32, the log of a factor of each token's y and z; None: 1.
        delta, reciprocal: [B, T, H] fp32, for queries: z is delta, and y and z are multiplied by reciprocal, 1 / l.
        mass: [B, T, heads] fp32, z of keys; None: 1.
    """
    tokens, width = x.shape[1], y.shape[3]
    value_state = torch.empty(blocks.count, heads, layout.features, width, dtype=type, device=x.device)
    denom_state = torch.empty(blocks.count, heads, layout.denom_elements, dtype=torch.float32, device=x.device)
    shared = dict(
        x=x,
        x_strides=x.stride()[:3],
        y=y,
        y_strides=y.stride()[:3],
        reciprocal=reciprocal,
        log_factor=log_factor,
        value_state=value_state,
        blocks=blocks.table,
        tokens=tokens,
        past=past,
        group=x.shape[2] // heads,
        R=layout.size,
        F=layout.features,
        DV=width,
        DV_PAD=max(16, triton.next_power_of_2(width)),
        GATED=log_factor is not None,
        QUERIES=reciprocal is not None,
    )
    if layout.pairs:
        tiles = launch_configs.tiles("block_state", width, y.dtype)
        pieces = triton.cdiv(layout.pairs, tiles["PAIRS"])
        block_state_kernel[(blocks.count * pieces, heads)](
            **shared, pair_table=layout.table(x.device), pieces=pieces, NUMBER=layout.pairs, **tiles
        )
    pieces = triton.cdiv(layout.size, layout.tile)
    block_state_rest_kernel[(blocks.count * pieces, heads)](
        **shared,
        delta=delta,
        mass=mass,
        denom_state=denom_state,
        pieces=pieces,
        FT=layout.tile,
        M=layout.denom_elements,
        SQUARED=layout.pairs > 0,
        LINEAR=layout.linear,
        CONSTANT=layout.constant,
        MASS=mass is not None,
        **launch_configs.tiles("block_state_rest", layout.tile, y.dtype),
    )
    return value_state, denom_state


@triton.jit(do_not_specialize=["tokens", "past", "group", "pieces"])
def block_state_kernel(
    x,
    x_strides,  # [B, T, H, R]
    y,
    y_strides,  # [B, T, H, DV]
    reciprocal,  # [B, T, H]
    log_factor,  # [B, past + T, heads]
    value_state,  # [N, heads, F, DV]
    blocks,  # [N, 5]
    pair_table,  # [2, NUMBER]
    tokens,
    past,
    group,
    pieces,
    R: tl.constexpr,
    F: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    GATED: tl.constexpr,
    QUERIES: tl.constexpr,
    NUMBER: tl.constexpr,
    PAIRS: tl.constexpr,
    BT: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    heads = tl.num_programs(1)
    TYPE: tl.constexpr = tl.float32 if y.dtype.element_ty == tl.float32 else tl.bfloat16
    batch, first, stop, begin, end = load_block(blocks, block)
    pair = tl.program_id(0) % pieces * PAIRS + tl.arange(0, PAIRS)
    coordinate = tl.arange(0, GROUP)[None, :]
    i = tl.load(pair_table + pair, mask=pair < NUMBER, other=0)[:, None] * GROUP + coordinate  # [PAIRS, 8]
    j = tl.load(pair_table + NUMBER + pair, mask=pair < NUMBER, other=0)[:, None] * GROUP + coordinate
    acc = tl.zeros((PAIRS * PAIR, DV_PAD), tl.float32)
    x, y = head_rows(x, x_strides, batch, head * group), head_rows(y, y_strides, batch, head * group)
    for h in range(0, group):
        for t in range(first, stop, BT):
            rows = t + tl.arange(0, BT)
            inside = (rows < stop) & (rows >= past)
            # Features as rows: the product needs no transposed operand.
            at = x + (rows - past).to(tl.int64)[None, None, :] * x_strides[1]
            x_i = tl.load(at + i[:, :, None], mask=inside[None, None, :], other=0.0)  # [PAIRS, 8, BT]
            x_j = tl.load(at + j[:, :, None], mask=inside[None, None, :], other=0.0)
            phi = tl.reshape(multiply(x_i[:, :, None, :], x_j[:, None, :, :], TYPE), (PAIRS * PAIR, BT))
            y_rows = load_rows(y, rows - past, y_strides[1], inside, DV, DV_PAD)  # [BT, DV]
            if QUERIES:
                at = (batch * tokens + rows - past) * (heads * group) + head * group + h
                y_rows = y_rows.to(tl.float32) * tl.load(reciprocal + at, mask=inside, other=0.0)[:, None]
            if GATED:
                at = (batch * (tokens + past) + rows) * heads + head
                factor = tl.exp(tl.load(log_factor + at, mask=inside, other=0.0))
                y_rows = y_rows.to(tl.float32) * factor[:, None]
            acc = tl.dot(phi, y_rows.to(TYPE), acc, input_precision="ieee")  # [64 PAIRS, BT] @ [BT, DV]
        x += x_strides[2]
        y += y_strides[2]
    features = tl.program_id(0) % pieces * (PAIRS * PAIR) + tl.arange(0, PAIRS * PAIR)
    out = value_state + (block.to(tl.int64) * heads + head) * (F * DV)
    store_rows(out, features, DV, features < NUMBER * PAIR, acc, DV, DV_PAD)


@triton.jit(do_not_specialize=["tokens", "past", "group", "pieces"])
def block_state_rest_kernel(
    x,
    x_strides,  # [B, T, H, R]
    y,
    y_strides,  # [B, T, H, DV]
    delta,
    reciprocal,  # [B, T, H]
    log_factor,  # [B, past + T, heads]
    mass,  # [B, past + T, heads]
    value_state,  # [N, heads, F, DV]: its last rows, Σ x yᵀ and Σ y
    denom_state,  # [N, heads, M]: Σ x xᵀ z, Σ x z, Σ z
    blocks,  # [N, 5]
    tokens,
    past,
    group,
    pieces,
    R: tl.constexpr,
    FT: tl.constexpr,
    F: tl.constexpr,
    M: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SQUARED: tl.constexpr,
    LINEAR: tl.constexpr,
    CONSTANT: tl.constexpr,
    MASS: tl.constexpr,
    GATED: tl.constexpr,
    QUERIES: tl.constexpr,
    BT: tl.constexpr,
):
    block, head = tl.program_id(0) // pieces, tl.program_id(1)
    start = tl.program_id(0) % pieces * FT  # of x's coordinates; where there are pairs, FT holds all of them
    heads = tl.num_programs(1)
    TYPE: tl.constexpr = tl.float32 if y.dtype.element_ty == tl.float32 else tl.bfloat16
    batch, first, stop, begin, end = load_block(blocks, block)
    gram = tl.zeros((FT, FT), tl.float32)
    x_sum = tl.zeros((FT,), tl.float32)
    z_sum = tl.zeros((BT,), tl.float32)
    if LINEAR:
        x_y = tl.zeros((FT, DV_PAD), tl.float32)
    if CONSTANT:
        y_sum = tl.zeros((DV_PAD,), tl.float32)
    x, y = head_rows(x, x_strides, batch, head * group), head_rows(y, y_strides, batch, head * group)
    for h in range(0, group):
        for t in range(first, stop, BT):
            rows = t + tl.arange(0, BT)
            inside = (rows < stop) & (rows >= past)
            x_rows = load_columns(x, rows - past, x_strides[1], inside, start, R, FT)  # [BT, FT]
            factor = tl.where(inside, 1.0, 0.0)
            if GATED:
                at = (batch * (tokens + past) + rows) * heads + head
                factor *= tl.exp(tl.load(log_factor + at, mask=inside, other=0.0))
            z_rows = factor
            if MASS:
                at = (batch * (tokens + past) + rows) * heads + head
                z_rows = factor * tl.load(mass + at, mask=inside, other=0.0)
            if QUERIES:
                at = (batch * tokens + rows - past) * (heads * group) + head * group + h
                factor *= tl.load(reciprocal + at, mask=inside, other=0.0)
                z_rows = factor * tl.load(delta + at, mask=inside, other=0.0)
            x_z = x_rows.to(tl.float32) * z_rows[:, None]
            if SQUARED:
                gram = tl.dot(tl.trans(x_rows.to(TYPE)), x_z.to(TYPE), gram, input_precision="ieee")
            x_sum += tl.sum(x_z, axis=0)
            z_sum += z_rows
            if LINEAR or CONSTANT:
                y_rows = load_rows(y, rows - past, y_strides[1], inside, DV, DV_PAD).to(tl.float32)
                y_rows *= factor[:, None]  # [BT, DV]
                if LINEAR:
                    x_y = tl.dot(tl.trans(x_rows.to(TYPE)), y_rows.to(TYPE), x_y, input_precision="ieee")
                if CONSTANT:
                    y_sum += tl.sum(y_rows, axis=0)
        x += x_strides[2]
        y += y_strides[2]
    slot = block.to(tl.int64) * heads + head
    coordinates, columns = start + tl.arange(0, FT), tl.arange(0, DV_PAD)
    if SQUARED:
        store_rows(denom_state + slot * M, coordinates, R, coordinates < R, gram, R, FT)
    tl.store(denom_state + slot * M + (M - 1 - R) + coordinates, x_sum, mask=coordinates < R)
    tl.store(denom_state + slot * M + (M - 1), tl.sum(z_sum, axis=0), mask=start == 0)
    out = value_state + slot * (F * DV)
    if CONSTANT:
        tl.store(
            out + (F - 1) * DV + columns, y_sum.to(value_state.dtype.element_ty), mask=(columns < DV) & (start == 0)
        )
    if LINEAR:
        out += (F - CONSTANT - R) * DV
        store_rows(out, coordinates, DV, coordinates < R, x_y, DV, DV_PAD)
