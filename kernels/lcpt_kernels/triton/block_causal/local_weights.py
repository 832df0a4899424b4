"""Local weights, a tile of queries and keys at a time: w(scale·q·k) e^{G_t − G_s} where the query sees the key.

Gates count from the start of the program's own block; of a tile, queries or keys may be the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lcpt_kernels import chunked

EXPONENTIAL = tl.constexpr(-1)  # as a DEGREE
FAINTEST = tl.constexpr(chunked.FAINTEST)


@triton.jit
def scores(x, y, scale):
    """scale · x·y of rows [n, D] and [m, D]: [n, m]."""
    return scale * tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def weights_and_slopes(s, seen, log_decay, peak, c0, c1, c2, DEGREE: tl.constexpr, GATED: tl.constexpr):
    """w(s) e^{log_decay} and its derivative by s where the query sees the key, else 0; all of them over e^peak. w(s) is
    s^DEGREE, for DEGREE 0 the quadratic c0 + c1·s + c2·s²; peak is then 0. For EXPONENTIAL it is e^s."""
    # Where the query does not see the key, log_decay may be above 0.
    if DEGREE == EXPONENTIAL:
        weight = tl.exp(exponents(s, seen, log_decay, GATED) - peak)
        return weight, weight
    if DEGREE == 0:
        weight = c0 + s * (c1 + c2 * s)
        slope = c1 + 2.0 * c2 * s
    elif DEGREE == 1:
        weight = s
        slope = s * 0.0 + 1.0
    else:
        square = s * s
        lower = s
        for _ in tl.static_range(DEGREE // 2 - 1):
            lower *= square
        weight = lower * s
        slope = DEGREE * lower
    if GATED:
        decay = tl.exp(tl.minimum(log_decay, 0.0))
        weight *= decay
        slope *= decay
    return tl.where(seen, weight, 0.0), tl.where(seen, slope, 0.0)


@triton.jit
def exponents(s, seen, log_decay, GATED: tl.constexpr):
    """s + log_decay where the query sees the key, else −∞."""
    if GATED:
        s += tl.minimum(log_decay, 0.0)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def load_gates(since, start, rows, stride, inside, GATED: tl.constexpr):
    """since [T, heads, 2] of one head, which begins at `start`: the log gate from the start of a row's own block to it,
    of one row or of several, as a whole number and the rest. 0 without a gate."""
    if GATED:
        place = since + 2 * (start + rows.to(tl.int64) * stride)
        return tl.load(place, mask=inside, other=0.0), tl.load(place + 1, mask=inside, other=0.0)
    else:
        return (rows * 0).to(tl.float32), (rows * 0).to(tl.float32)


@triton.jit
def load_peaks(peak, place, inside, DEGREE: tl.constexpr):
    """The log of what a query's weights were divided by, [n]; 0 where nothing is exponential. Below FAINTEST there are
    local keys alone."""
    if DEGREE == EXPONENTIAL:
        return tl.load(peak + place, mask=inside, other=0.0)
    else:
        return (place * 0).to(tl.float32)
