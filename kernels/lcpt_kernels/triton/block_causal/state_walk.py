"""The kernel of `state.py`: one walk through the blocks of a document, with 64 features of one head.

A step is BT rows of one block: load them, decay the state where a block begins, add Σ φ(x) [y, z]ᵀ, and write the state
where the block ends. With two local blocks it is written before the block is added, so that it is without the block
before. Steps follow each other without a branch, so a step's rows are on their way while the one before is computed.
Notation: `block_causal/__init__.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lcpt_kernels.triton.common.tile_io import (
    GROUP,
    PAIR,
    head_rows,
    load_block,
    load_rows,
    load_tile,
    products,
    store_tile,
)

COLUMNS = tl.constexpr(16)  # of the product that sums z: the fewest that every target takes


@triton.jit(do_not_specialize=["tokens", "past", "group", "block_rows", "tiles", "kept"])
def block_state_kernel(
    x,
    x_strides,  # [B, T, H, R]
    y,
    y_strides,  # [B, T, H, DV]
    factor,
    z,  # [B, H, T]
    log_decay,  # [N, heads]
    value_start,
    denom_start,  # [docs, heads, ·]
    value_met,
    denom_met,  # [N, heads, ·]
    value_state,  # [N, heads, F, DV]
    denom_state,  # [N, heads, M]
    value_end,
    denom_end,  # [docs, heads, ·]
    value_part,
    denom_part,
    part_decay,  # [docs, pieces, heads, ·]
    through,  # [N, heads, tiles]
    blocks,  # [N, 5]
    documents,  # [docs, 2]
    pair_table,  # [2, PAIRS]
    tokens,
    past,
    group,
    block_rows,
    tiles,
    kept,
    c0,
    c1,
    c2,
    R: tl.constexpr,
    F: tl.constexpr,
    M: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    PAIRS: tl.constexpr,
    LINEAR: tl.constexpr,
    CONSTANT: tl.constexpr,
    SQUARES: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    Z: tl.constexpr,
    FACTOR: tl.constexpr,
    GATED: tl.constexpr,
    QUERIES: tl.constexpr,
    START: tl.constexpr,
    END: tl.constexpr,
    PARTS: tl.constexpr,
    AFTER_PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    BT: tl.constexpr,
):
    document, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    head, heads = tl.program_id(1), tl.num_programs(1)
    TYPE: tl.constexpr = tl.float32 if y.dtype.element_ty == tl.float32 else tl.bfloat16
    first, last = tl.load(documents + document * 2), tl.load(documents + document * 2 + 1) - 1
    batch, begin, _, _, end = load_block(blocks, first)
    piece, pieces = tl.program_id(2), tl.num_programs(2)
    walked = tl.maximum(last - first + QUERIES, 0)
    length = (walked + pieces - 1) // pieces
    skipped = piece * length
    walked = tl.minimum(walked - skipped, length)
    if PARTS:  # that of the last piece is not needed
        walked = tl.where(piece == pieces - 1, 0, walked)

    # The features of the tile: their rows of value_state, their places in denom_state, the queries' weights of both.
    feature = tile * PAIR + tl.arange(0, PAIR)
    if SQUARES:
        own = feature < PAIRS * PAIR
        i, j = tl.load(pair_table + tile) * GROUP, tl.load(pair_table + PAIRS + tile) * GROUP
        p, q = i + tl.arange(0, PAIR) // GROUP, j + tl.arange(0, PAIR) % GROUP
        row, place, mirrored = feature, p * R + q, q * R + p
        also_mirrored = own & (i != j)  # a pair I < J stands for J, I too
        denom_weight, times = c2, tl.where(i == j, 1.0, 2.0)
        weight = denom_weight * times
    else:
        own = feature < R * LINEAR + CONSTANT
        i, j = tile * PAIR, tile * PAIR
        row, place = feature + PAIRS * PAIR, tl.where(feature < R * LINEAR, M - 1 - R + feature, M - 1)
        mirrored, also_mirrored = place, feature < 0
        denom_weight = tl.where(own, tl.where(feature < R * LINEAR, c1, c0), 1.0)
        times, weight = 1.0, denom_weight[:, None]

    # Without weights: Σ φ yᵀ, and Σ φ z in every column of `sums`.
    state, sums = tl.zeros((PAIR, DV_PAD), tl.float32), tl.zeros((PAIR, COLUMNS), tl.float32)
    outer = document * heads + head  # the place of what is before the first block or behind the last
    if START:
        state = load_rows(value_start + outer * (F * DV), row, DV, own, DV, DV_PAD)
        start_sums = tl.load(denom_start + outer * M + place, mask=own, other=0.0)
        if QUERIES:
            state, start_sums = state / weight, start_sums / denom_weight
        sums = columns_of(start_sums)
    if AFTER_PARTS:
        for before in range(0, piece):
            of_part = (document * pieces + before) * heads + head
            decay_of_part = tl.load(part_decay + of_part)
            part_sums = tl.load(denom_part + of_part * M + place, mask=own, other=0.0)
            state = decay_of_part * state + load_rows(value_part + of_part * (F * DV), row, DV, own, DV, DV_PAD)
            sums = decay_of_part * sums + columns_of(part_sums)
    n = last - skipped if QUERIES else first + skipped
    at = n.to(tl.int64) * heads + head
    stored = own & (first <= last) & (piece == 0) & (kept != 0)
    known = 0.0 if QUERIES else 1.0  # the last block's keys reach no state
    store_tile(value_state + at * (F * DV), row, stored, known * weight * state, DV, DV_PAD)
    known_sums = known * denom_weight
    store_sums(denom_state + at * M, place, mirrored, stored, stored & also_mirrored, known_sums, sums)

    # One loop through blocks, heads of the group and BT rows, without branches, so that loads run ahead of products.
    x, y = head_rows(x, x_strides, batch, head * group), head_rows(y, y_strides, batch, head * group)
    if not QUERIES:  # no others reach a state
        end = begin + (last - first - (LOCAL_BLOCKS - 1)) * block_rows
    low, token = tl.maximum(begin, past), tl.arange(0, BT)
    tokens = tokens.to(tl.int64)
    of_heads = (batch * heads + head) * group * tokens - past  # the place of token 0 of the first query head
    step, steps, left = 0, group * STEPS, 1.0
    for _ in tl.range(0, walked * steps, num_stages=STAGES):
        # A step's rows.
        start, h = begin + (n - first) * block_rows, step // STEPS
        t = start + step % STEPS * BT
        inside = (token >= low - t) & (token < tl.minimum(start + block_rows, end) - t)
        x_t = x + h * x_strides[2] + (t - past).to(tl.int64) * x_strides[1]
        y_t = y + h * y_strides[2] + (t - past).to(tl.int64) * y_strides[1]
        y_rows = load_tile(y_t, y_strides[1], inside, 0, DV, DV_PAD, DV != DV_PAD)
        of_head = of_heads + h * tokens + t
        z_rows = tl.where(inside, 1.0, 0.0) if CONSTANT else tl.full((BT,), 1.0, tl.float32)
        if Z:
            z_rows = tl.load(z + of_head + token, mask=inside, other=0.0)
        if FACTOR:
            factors = tl.load(factor + of_head + token, mask=inside, other=0.0)[:, None]
            if x.dtype.element_ty == TYPE:  # 16 bits multiply two at a time
                factors = factors.to(TYPE)
        if SQUARES:
            x_i = load_tile(x_t, x_strides[1], inside, i, R, GROUP, False)
            x_j = load_tile(x_t, x_strides[1], inside, j, R, GROUP, False)
            if FACTOR:
                x_i *= factors
            phi = products(x_i, x_j, TYPE)  # [BT, 64]
        else:
            phi = load_tile(x_t, x_strides[1], inside, i, R * LINEAR, PAIR, True)
            if CONSTANT:
                phi = tl.where((feature == R * LINEAR)[None, :], 1.0, phi.to(tl.float32))
            if FACTOR:
                phi *= factors
            phi = phi.to(TYPE)

        # What goes through the block; what the next one meets, before or after what this one adds.
        at = n.to(tl.int64) * heads + head
        next_at = at - heads if QUERIES else at + heads
        if GATED:
            decay = tl.exp(tl.load(log_decay + at))
            if QUERIES:
                decay = tl.where(n == last, 1.0, decay)
            if QUERIES and not PARTS:
                met_at, passed = at, decay
                if LOCAL_BLOCKS == 2:
                    met_at, passed = tl.where(n == last, at, at + heads), 1.0
                met = load_rows(value_met + met_at * (F * DV), row, DV, own & (step == 0), DV, DV_PAD)
                met_sums = tl.load(denom_met + met_at * M + place, mask=own & (step == 0), other=0.0)
                met_sums *= times * tl.sum(sums, axis=1) / COLUMNS
                product = tl.sum(tl.sum(met.to(tl.float32) * state, axis=1) + met_sums)
                tl.store(through + at * tiles + tile, passed * product, mask=step == 0)
            decay = tl.where(step == 0, decay, 1.0)
            state *= decay
            sums *= decay
            left *= decay
        if LOCAL_BLOCKS == 1:
            state, sums = add(state, sums, phi, y_rows, z_rows, TYPE, Z and not SQUARES)
        # Without `kept` too, since a product that nothing in the loop waits for would be serialised.
        stored = own & (kept != 0) & (step == (steps - 1 if LOCAL_BLOCKS == 1 else 0))
        known = 1.0
        if QUERIES:
            stored = stored & (n > first)
            if LOCAL_BLOCKS == 2:  # the last but one's keys reach no state either
                known = tl.where(n == last, 0.0, 1.0)
        store_tile(value_state + next_at * (F * DV), row, stored, known * weight * state, DV, DV_PAD)
        known_sums = known * denom_weight
        store_sums(denom_state + next_at * M, place, mirrored, stored, stored & also_mirrored, known_sums, sums)
        if LOCAL_BLOCKS == 2:
            state, sums = add(state, sums, phi, y_rows, z_rows, TYPE, Z and not SQUARES)
        step += 1
        n += tl.where(step == steps, -1 if QUERIES else 1, 0)
        step = tl.where(step == steps, 0, step)

    if PARTS:
        of_part = (document * pieces + piece) * heads + head
        store_tile(value_part + of_part * (F * DV), row, own, state, DV, DV_PAD)
        store_sums(denom_part + of_part * M, place, mirrored, own, also_mirrored, 1.0, sums)
        tl.store(part_decay + of_part, left, mask=tile == 0)
    if END:
        own, also_mirrored = own & (piece == pieces - 1), also_mirrored & (piece == pieces - 1)
        if QUERIES:
            state *= weight
        store_tile(value_end + outer * (F * DV), row, own, state, DV, DV_PAD)
        store_sums(denom_end + outer * M, place, mirrored, own, also_mirrored, denom_weight if QUERIES else 1.0, sums)


@triton.jit
def add(state, sums, phi, y, z, TYPE: tl.constexpr, EXACT: tl.constexpr):
    """Add Σ φ yᵀ to state and Σ φ z to every column of sums; EXACT: to the first order in z's rounding to TYPE."""
    high = z.to(TYPE)
    sums = tl.dot(tl.trans(phi), columns_of(high), sums, input_precision="ieee")  # [64, BT] @ [BT, 16]
    if EXACT:
        sums = tl.dot(tl.trans(phi), columns_of((z - high.to(tl.float32)).to(TYPE)), sums, input_precision="ieee")
    return tl.dot(tl.trans(phi), y.to(TYPE), state, input_precision="ieee"), sums  # [64, BT] @ [BT, DV]


@triton.jit
def columns_of(x):
    return tl.broadcast_to(x[:, None], (x.shape[0], COLUMNS))


@triton.jit
def store_sums(denom, place, mirrored, stored, also_mirrored, weight, sums):
    """Store the sums, of a pair of groups I < J in both halves of the Gram matrix."""
    values = weight * (tl.sum(sums, axis=1) / COLUMNS)
    tl.store(denom + place, values, mask=stored)
    tl.store(denom + mirrored, values, mask=also_mirrored)
