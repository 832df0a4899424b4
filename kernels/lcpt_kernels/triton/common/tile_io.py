"""Helpers of the kernels: block tables, loads and stores of tiles, products of pairs of groups."""

from __future__ import annotations

import triton
import triton.language as tl

from lcpt_kernels import symmetric_features

GROUP = tl.constexpr(symmetric_features.GROUP)
PAIR = tl.constexpr(symmetric_features.PAIR)


@triton.jit
def load_block(blocks, block):
    """Load a row of the block table: batch, start and end of the block's tokens, start and end of its document's."""
    row = blocks + block * 5
    return tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def head_rows(x, strides, batch, head):
    """Return the pointer to the rows [T, ·] of one head of x [B, T, H, ·]."""
    return x + batch * strides[0] + head.to(tl.int64) * strides[2]


@triton.jit
def load_rows(x, rows, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Load x[rows] as [n, PADDED]: 0 for rows that are not inside, and beyond WIDTH."""
    columns = tl.arange(0, PADDED)
    mask = inside[:, None]
    if PADDED != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, rows, stride, inside, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = inside[:, None]
    if PADDED != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(x, rows, stride, inside, start, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Load columns start … start + SIZE of x[rows], [n, SIZE]: 0 beyond WIDTH."""
    columns = start + tl.arange(0, SIZE)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_columns(x, rows, stride, inside, values, start, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    columns = start + tl.arange(0, SIZE)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(x, stride, inside, start, WIDTH: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr):
    """Load columns start … start + SIZE of the rows from x on, of which PART may be beyond WIDTH: 0. Offsets have 32
    bits, unlike those of `load_rows`, which halves a step's integer arithmetic."""
    rows, columns = tl.arange(0, inside.shape[0]), tl.arange(0, SIZE) + start
    mask = inside[:, None]
    if PART:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(x + (rows[:, None] * stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(x, row, stored, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = stored[:, None] & (columns < WIDTH)[None, :]
    tl.store(x + (row[:, None] * WIDTH + columns[None, :]), values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_once(x, inside):
    """Load x[0 … n), n = 32, 64, …, as [n]: 0 where not inside.

    In a loop of 8 warps every thread would load each of so few numbers that it needs, with an address and a mask for
    each: Triton prefers this to an exchange between threads. Of a tile of 256 numbers it loads one a thread.
    """
    n: tl.constexpr = inside.shape[0]
    copies: tl.constexpr = 256 // n if n < 256 else 1
    copy = tl.arange(0, copies)
    mask = inside[:, None] & (copy == 0)[None, :]
    return tl.sum(tl.load(x + (tl.arange(0, n)[:, None] + 0 * copy[None, :]), mask=mask, other=0.0), axis=1)


@triton.jit
def load_group(x, rows, stride, inside, group):
    """Load the coordinates of one group of x[rows], [n, 8]."""
    columns = group * GROUP + tl.arange(0, GROUP)
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def load_pair(x, rows, stride, inside, pair_table, pair, PAIRS: tl.constexpr):
    """Load the groups I and J of a pair: their coordinates of x[rows], [n, 8] each, and their indices."""
    i, j = tl.load(pair_table + pair), tl.load(pair_table + PAIRS + pair)
    return load_group(x, rows, stride, inside, i), load_group(x, rows, stride, inside, j), i, j


@triton.jit
def load_square(x, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Load x [SIZE, SIZE], contiguous, as [PADDED, PADDED] with zeros around it."""
    i = tl.arange(0, PADDED)
    mask = (i < SIZE)[:, None] & (i < SIZE)[None, :]
    return tl.load(x + i[:, None] * SIZE + i[None, :], mask=mask, other=0.0)


@triton.jit
def multiply(x, y, TYPE: tl.constexpr):
    """Return x · y in TYPE, rounded once. TYPE, unlike fp16, holds the range of a product."""
    if x.dtype == TYPE:
        return x * y
    else:
        return (x.to(tl.float32) * y.to(tl.float32)).to(TYPE)


@triton.jit
def products(x_i, x_j, TYPE: tl.constexpr):
    """Return x_i ⊗ x_j of every row: [n, 64] features of [n, 8] twice."""
    return tl.reshape(multiply(x_i[:, :, None], x_j[:, None, :], TYPE), (x_i.shape[0], PAIR))


@triton.jit
def contract(d_features, x_i, x_j, i, j, dx):
    """Add the gradient d_features [n, 64] of x_i ⊗ x_j to the groups i and j of dx [n, groups, 8]."""
    d = tl.reshape(d_features, (x_i.shape[0], GROUP, GROUP))
    d_i = tl.sum(d * x_j.to(tl.float32)[:, None, :], axis=2)
    d_j = tl.sum(d * x_i.to(tl.float32)[:, :, None], axis=1)
    groups = tl.arange(0, dx.shape[1])[None, :, None]
    # A multiply-add by 0 or 1 is one instruction, a selection and an addition are two.
    dx += d_i[:, None, :] * tl.where(groups == i, 1.0, 0.0)
    return dx + d_j[:, None, :] * tl.where(groups == j, 1.0, 0.0)
