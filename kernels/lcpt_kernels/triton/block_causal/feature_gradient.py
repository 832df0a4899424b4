"""The gradient of given query features from its two parts, local and through the state.

All weights W_ts = φ_t·φ_s are linear in φ_t, so φ_t·dφ_t = Σ_s dW_ts W_ts = −δ_t offset / l_t. The two parts cancel to
this but for rounding errors, which add up where features all have one sign. The error along φ_t is subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tile_io import load_rows, store_rows


def query_feature_gradient(
    x: Tensor, d_local: Tensor, d_state: Tensor, delta: Tensor, denominator: Tensor, offset: float
) -> Tensor:
    """Return the gradient of x [B, T, H, m], whose last stride is 1, in x's dtype. Its parts d_local and d_state are
    [B, T, H, m] fp32; delta and denominator are [B, T, H] fp32."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width, rows, BM = x.shape[3], x.shape[1] * x.shape[2], 32
    pieces = triton.cdiv(rows, BM)
    linear_gradient_kernel[(pieces * x.shape[0],)](
        x,
        x.stride()[:3],
        d_local,
        d_state,
        delta,
        denominator,
        dx,
        rows,
        x.shape[2],
        pieces,
        float(offset),
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        BM=BM,
        num_warps=4,
    )
    return dx


@triton.jit(do_not_specialize=["rows", "heads", "pieces"])
def linear_gradient_kernel(
    x,
    x_strides,  # [B, T, H, WIDTH]
    d_local,
    d_state,  # [B, T, H, WIDTH]
    delta,
    denominator,  # [B, T, H]
    dx,  # [B, T, H, WIDTH]
    rows,
    heads,
    pieces,
    offset,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BM: tl.constexpr,
):
    batch = (tl.program_id(0) // pieces).to(tl.int64)
    row = tl.program_id(0) % pieces * BM + tl.arange(0, BM)  # of T · H
    inside = row < rows
    place = (row // heads).to(tl.int64) * x_strides[1] + (row % heads).to(tl.int64) * x_strides[2]
    row = batch * rows + row
    x_rows = load_rows(x + batch * x_strides[0], place, 1, inside, WIDTH, PADDED).to(tl.float32)  # [BM, WIDTH]
    dx_rows = load_rows(d_local, row, WIDTH, inside, WIDTH, PADDED) + load_rows(
        d_state, row, WIDTH, inside, WIDTH, PADDED
    )
    delta_rows = tl.load(delta + row, mask=inside, other=0.0)
    expected = -delta_rows * offset / tl.load(denominator + row, mask=inside, other=1.0)
    square = tl.sum(x_rows * x_rows, axis=1)
    error = (tl.sum(x_rows * dx_rows, axis=1) - expected) / tl.where(square == 0.0, 1.0, square)
    store_rows(dx, row, WIDTH, inside, dx_rows - error[:, None] * x_rows, WIDTH, PADDED)
