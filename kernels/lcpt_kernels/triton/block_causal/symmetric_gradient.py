"""The gradient of x through a state of pairs, da = Σ_p a_p (S_p n̄), without sums across threads.

S_p [R, DV] are the rows x_p x_q of all q. In the tile that is the gradient of features, columns lie side by side in
neighbouring threads and rows of p do not, so a sum over p stays in a thread; `contract` sums over both groups of a
pair, one of them with shuffles. Here a pair (I, J) is multiplied twice, for p in I and for p in J: 1.6 times the
products for r = 32, half the instructions. It pays while a product is short, up to DV = 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lcpt_kernels.triton.common.tile_io import GROUP, PAIR, load_columns, load_rows, load_tile


@triton.jit
def symmetric_gradient(
    n,
    state,
    a,
    stride,
    inside,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Return Σ_q a_q (S_pq + S_qp) n [BM, R_PAD] of rows n [BM, DV] and the rows from a on, [BM, R], for the state's
    rows of pairs. S must be symmetric within groups."""
    GROUPS: tl.constexpr = R_PAD // GROUP
    STEP: tl.constexpr = min(PAIR // R_PAD, GROUP) if R_PAD < PAIR else 1  # coordinates p at a time
    gradient = tl.zeros((n.shape[0], STEP, GROUPS, GROUP), tl.float32)
    if GROUPS <= 4:
        # Unrolled over i, which of a step's factors are doubled is part of the code, and places are computed once.
        for p in range(0, GROUP, STEP):
            for i in tl.static_range(R // GROUP):
                d = times_rows(n, state, i, p, STEP, R, R_PAD, DV, DV_PAD)
                a_p = load_tile(a, stride, inside, i * GROUP + p, R, STEP, False)
                gradient = add_product(gradient, a_p, d, i)
    else:  # so many tiles would fill shared memory
        row = tl.arange(0, n.shape[0])
        for i in range(0, R // GROUP):
            for p in range(0, GROUP, STEP):
                d = times_rows(n, state, i, p, STEP, R, R_PAD, DV, DV_PAD)
                a_p = load_columns(a, row, stride, inside, i * GROUP + p, R, STEP)
                gradient = add_product(gradient, a_p, d, i)
    return tl.reshape(tl.sum(gradient, axis=1), (n.shape[0], R_PAD))


@triton.jit
def times_rows(
    n,
    state,
    i,
    p,
    STEP: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Return the product of n and the state's rows of coordinates p … p + STEP of group i, [BM, STEP · R_PAD]."""
    first, distance = rows_of_coordinates(i, STEP, R, R_PAD)
    S = load_rows(state, first + p * distance, DV, first >= 0, DV, DV_PAD)
    return tl.dot(n, tl.trans(S), input_precision="ieee")  # [BM, DV] @ [DV, STEP · R]


@triton.jit
def add_product(gradient, a_p, d, i):
    """Add a_p [BM, STEP] of group i times d [BM, STEP · R_PAD] to gradient [BM, STEP, GROUPS, 8]."""
    # The rows of a pair I < J stand for two features and have their weight 2 c₂; those of (I, I) have c₂.
    times = tl.where(tl.arange(0, gradient.shape[2]) == i, 2.0, 1.0)
    factors = a_p.to(tl.float32)[:, :, None, None] * times[None, None, :, None]
    d = tl.reshape(d, (d.shape[0], gradient.shape[1], gradient.shape[2], GROUP))
    return gradient + factors * d


@triton.jit
def rows_of_coordinates(group, STEP: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr):
    """Return the rows x_p x_q of a state for the first STEP coordinates p of a group and all q, [STEP · R_PAD], below
    0 for q beyond R; and the distance of the rows of p and p + 1."""
    place = tl.arange(0, STEP * R_PAD)
    p, q = place // R_PAD, place % R_PAD
    i, j = tl.minimum(group, q // GROUP), tl.maximum(group, q // GROUP)
    pair = i * (2 * (R // GROUP) - i - 1) // 2 + j  # the order of `Layout.table`
    distance = tl.where(group == i, GROUP, 1)
    rows = pair * PAIR + p * distance + q % GROUP * tl.where(group == i, 1, GROUP)
    return tl.where(q < R, rows, -1), distance
