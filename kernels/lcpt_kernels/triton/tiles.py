"""What the kernels of squared attention share: tiles of rows, products of pairs of groups, weights."""

from __future__ import annotations

import triton
import triton.language as tl

from lcpt_kernels.triton import layout

GROUP = tl.constexpr(layout.GROUP)
PAIR = tl.constexpr(layout.PAIR)


@triton.jit
def load_rows(x, rows, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """x[rows] as [n, PADDED]: 0 for rows that are not inside, and beyond WIDTH."""
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
def load_group(x, rows, stride, inside, group):
    """Coordinates `group` of x[rows], [n, 8]."""
    columns = group * GROUP + tl.arange(0, GROUP)
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def load_square(x, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """x [SIZE, SIZE], contiguous, as [PADDED, PADDED] with zeros around it."""
    i = tl.arange(0, PADDED)
    mask = (i < SIZE)[:, None] & (i < SIZE)[None, :]
    return tl.load(x + i[:, None] * SIZE + i[None, :], mask=mask, other=0.0)


@triton.jit
def multiply(x, y, TYPE: tl.constexpr):
    """x · y in TYPE, rounded once. fp16 does not hold the range of a product, TYPE does."""
    if x.dtype == TYPE:
        return x * y
    else:
        return (x.to(tl.float32) * y.to(tl.float32)).to(TYPE)


@triton.jit
def products(x_i, x_j, TYPE: tl.constexpr):
    """x_i ⊗ x_j of every row: [n, 8] twice -> [n, 64] features."""
    return tl.reshape(multiply(x_i[:, :, None], x_j[:, None, :], TYPE), (x_i.shape[0], PAIR))


@triton.jit
def contract(d_features, x_i, x_j, i, j, dx):
    """Adds the gradient d_features [n, 64] of x_i ⊗ x_j to the groups i and j of dx [n, groups, 8]."""
    d = tl.reshape(d_features, (x_i.shape[0], GROUP, GROUP))
    d_i = tl.sum(d * x_j.to(tl.float32)[:, None, :], axis=2)
    d_j = tl.sum(d * x_i.to(tl.float32)[:, :, None], axis=1)
    groups = tl.arange(0, dx.shape[1])[None, :, None]
    return dx + tl.where(groups == i, d_i[:, None, :], 0.0) + tl.where(groups == j, d_j[:, None, :], 0.0)


@triton.jit
def weight_and_slope(s, c0, c1, c2, DEGREE: tl.constexpr):
    """w(s) and its derivative: s^DEGREE, or for DEGREE 0 the quadratic c0 + c1·s + c2·s²."""
    if DEGREE == 0:
        weight = c0 + s * (c1 + c2 * s)
        slope = c1 + 2.0 * c2 * s
    else:
        square = s * s
        lower = s
        for _ in tl.static_range(DEGREE // 2 - 1):
            lower *= square
        weight = lower * s
        slope = DEGREE * lower
    return weight, slope
