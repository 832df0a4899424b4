"""Local weights, a tile of queries and keys at a time: w(scale·q·k) e^{G_t − G_s} where the query sees the key.

Gates count from the start of the program's own block; of a tile, queries or keys may be the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores(x, y, scale):
    """scale · x·y of rows [n, D] and [m, D]: [n, m]."""
    return scale * tl.dot(x, tl.trans(y), input_precision="ieee")


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


@triton.jit
def decayed(x, seen, log_decay, GATED: tl.constexpr):
    """x e^{log_decay} where the query sees the key, else 0. Beyond that, log_decay may be above 0."""
    if GATED:
        x *= tl.exp(tl.minimum(log_decay, 0.0))
    return tl.where(seen, x, 0.0)


@triton.jit
def load_gates(since, start, rows, stride, inside, GATED: tl.constexpr):
    """since [T, heads] of one head, which begins at `start`: the log gate from the start of a row's own block to it, of
    one row or of several. 0 without a gate."""
    if GATED:
        return tl.load(since + start + rows.to(tl.int64) * stride, mask=inside, other=0.0)
    else:
        return (rows * 0).to(tl.float32)
