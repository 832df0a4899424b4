"""Local weights, a tile of queries and keys at a time: w(scale·q·k) e^{G_t − G_s} where the query sees the key.

Exponents are to the base 2: `tl.exp2` is one instruction, `tl.exp` five, since it keeps numbers below 2⁻¹²⁶. Gate sums
are natural logarithms, and count from the start of the program's own block. Queries or keys may be the rows of a tile.
"""

from __future__ import annotations

from enum import IntEnum
from math import e, log2

import triton
import triton.language as tl

from lcpt_kernels.constants import ROW_MAX_FLOOR as FLOOR
from lcpt_kernels.triton.common.tile_io import load_once


class LocalWeight(IntEnum):
    """The weight w(s) of a local key with the score s."""

    EXPONENTIAL = -1  # e^s
    QUADRATIC = 0  # c₀ + c₁ s + c₂ s², the weight of the state
    LINEAR = 1  # s
    POWER = 2  # (s + shift)^degree, degree even


EXPONENTIAL = tl.constexpr(LocalWeight.EXPONENTIAL.value)
QUADRATIC = tl.constexpr(LocalWeight.QUADRATIC.value)
LINEAR = tl.constexpr(LocalWeight.LINEAR.value)
LOG2E = tl.constexpr(log2(e))
ROW_MAX_FLOOR = tl.constexpr(FLOOR * log2(e))  # to the base 2, as row_max


@triton.jit
def scores(x, y, scale, WEIGHT: tl.constexpr):
    """Return scale · x·y of rows [n, D] and [m, D]: [n, m]; for EXPONENTIAL to the base 2."""
    if WEIGHT == EXPONENTIAL:
        scale *= LOG2E
    return tl.dot(x, tl.trans(y), input_precision="ieee") * scale


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
    """Return w(s) e^{log_decay} and its derivative by s, both 0 where the query does not see the key.

    In a tile that is not `diagonal` every query sees every key, and nothing is masked. WEIGHT is a LocalWeight. For
    EXPONENTIAL s is to the base 2, as in `scores`, and both are over 2^{m_i}. shift and DEGREE count for POWER, and c0,
    c1, c2 for QUADRATIC.
    """
    # Where the query does not see the key, log_decay may be above 0.
    if WEIGHT == EXPONENTIAL:
        weight = tl.exp2(exponents(s, log_decay, GATED) - m_i)
        if diagonal:
            weight = tl.where(seen, weight, 0.0)
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
        decay = tl.exp2(tl.minimum(log_decay, 0.0) * LOG2E)
        weight *= decay
        slope *= decay
    if diagonal:
        weight = tl.where(seen, weight, 0.0)
        slope = tl.where(seen, slope, 0.0)
    return weight, slope


@triton.jit
def exponents(s, log_decay, GATED: tl.constexpr):
    """Return the logarithm of w(s) e^{log_decay} to the base 2, of s as in `scores`, for EXPONENTIAL."""
    if GATED:
        s += tl.minimum(log_decay, 0.0) * LOG2E
    return s


@triton.jit
def load_gate_cumsum(gate_cumsum, start, rows, keys, inside, GATED: tl.constexpr):
    """Load the gate sums of one or several rows, each as a whole number and the rest; 0 without a gate.

    The values of the head are [2, keys] and begin at `start`.
    """
    if GATED:
        place = gate_cumsum + start + rows
        return tl.load(place, mask=inside, other=0.0), tl.load(place + keys, mask=inside, other=0.0)
    else:
        return (rows * 0).to(tl.float32), (rows * 0).to(tl.float32)


@triton.jit
def load_step_gate_cumsum(gate_cumsum, start, keys, inside, GATED: tl.constexpr):
    """Load the gate sums of the rows of a step, which follow each other from `start` on, like `load_gate_cumsum`."""
    if GATED:
        return load_once(gate_cumsum + start, inside), load_once(gate_cumsum + start + keys, inside)
    else:
        return tl.zeros(inside.shape, tl.float32), tl.zeros(inside.shape, tl.float32)


@triton.jit
def load_row_max(row_max, place, inside, WEIGHT: tl.constexpr):
    """Load m_i [n] of queries, to the base 2; 0 unless WEIGHT is EXPONENTIAL. Below ROW_MAX_FLOOR a row has local keys
    alone."""
    if WEIGHT == EXPONENTIAL:
        return tl.load(row_max + place, mask=inside, other=0.0)
    else:
        return (place * 0).to(tl.float32)


@triton.jit
def load_step_row_max(row_max, start, inside, WEIGHT: tl.constexpr):
    """Load m_i of the queries of a step, which follow each other from `start` on, like `load_row_max`."""
    if WEIGHT == EXPONENTIAL:
        return load_once(row_max + start, inside)
    else:
        return tl.zeros(inside.shape, tl.float32)
