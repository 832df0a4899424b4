"""Local weights, a tile of queries and keys at a time: w(scale·q·k) e^{G_t − G_s} where the query sees the key.

Gate sums count from the start of the program's own block. Queries or keys may be the rows of a tile.
"""

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl

from lcpt_kernels.constants import ROW_MAX_FLOOR as FLOOR


class LocalWeight(IntEnum):
    """The weight w(s) of a local key with the score s."""

    EXPONENTIAL = -1  # e^s
    QUADRATIC = 0  # c₀ + c₁ s + c₂ s², the weight of the state
    LINEAR = 1  # s
    POWER = 2  # (s + shift)^degree, degree even


EXPONENTIAL = tl.constexpr(LocalWeight.EXPONENTIAL.value)
QUADRATIC = tl.constexpr(LocalWeight.QUADRATIC.value)
LINEAR = tl.constexpr(LocalWeight.LINEAR.value)
ROW_MAX_FLOOR = tl.constexpr(FLOOR)


@triton.jit
def scores(x, y, scale):
    """Return scale · x·y of rows [n, D] and [m, D]: [n, m]."""
    return scale * tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def weights_and_slopes(
    s,
    seen,
    diagonal,
    log_decay,
    m_i,
    shift,
    c0,
    c1,
    c2,
    WEIGHT: tl.constexpr,
    DEGREE: tl.constexpr,
    GATED: tl.constexpr,
):
    """Return w(s) e^{log_decay − m_i} and its derivative by s, both 0 where the query does not see the key.

    In a tile that is not `diagonal` every query sees every key, and nothing is masked. WEIGHT is a LocalWeight. m_i
    counts for EXPONENTIAL, shift and DEGREE for POWER, and c0, c1, c2 for QUADRATIC.
    """
    # Where the query does not see the key, log_decay may be above 0.
    if WEIGHT == EXPONENTIAL:
        weight = tl.exp(exponents(s, seen, diagonal, log_decay, GATED) - m_i)
        return weight, weight
    if WEIGHT == QUADRATIC:
        weight = c0 + s * (c1 + c2 * s)
        slope = c1 + 2.0 * c2 * s
    elif WEIGHT == LINEAR:
        weight = s
        slope = s * 0.0 + 1.0
    else:
        s += shift
        square = s * s
        weight = square
        lower = s
        for _ in tl.static_range(DEGREE // 2 - 1):
            weight *= square
            lower *= square
        slope = DEGREE * lower
    if GATED:
        decay = tl.exp(tl.minimum(log_decay, 0.0))
        weight *= decay
        slope *= decay
    if diagonal:
        weight = tl.where(seen, weight, 0.0)
        slope = tl.where(seen, slope, 0.0)
    return weight, slope


@triton.jit
def exponents(s, seen, diagonal, log_decay, GATED: tl.constexpr):
    """Return s + log_decay where the query sees the key, else −∞."""
    if GATED:
        s += tl.minimum(log_decay, 0.0)
    if diagonal:
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def load_gate_cumsum(gate_cumsum, start, rows, stride, inside, GATED: tl.constexpr):
    """Load the gate sums of one or several rows, each as a whole number and the rest; 0 without a gate.

    gate_cumsum is [T, heads, 2]; the values of the head begin at `start`.
    """
    if GATED:
        place = gate_cumsum + 2 * (start + rows.to(tl.int64) * stride)
        return tl.load(place, mask=inside, other=0.0), tl.load(place + 1, mask=inside, other=0.0)
    else:
        return (rows * 0).to(tl.float32), (rows * 0).to(tl.float32)


@triton.jit
def load_row_max(row_max, place, inside, WEIGHT: tl.constexpr):
    """Load m_i [n] of queries; 0 unless WEIGHT is EXPONENTIAL. Below ROW_MAX_FLOOR a row has local keys alone."""
    if WEIGHT == EXPONENTIAL:
        return tl.load(row_max + place, mask=inside, other=0.0)
    else:
        return (place * 0).to(tl.float32)
