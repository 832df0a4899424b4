"""The gradient of queries that all weights are linear in, from its two parts, local and through the state.

W_ts = φ_t·φ_s makes φ_t·dφ_t = Σ_s dW_ts W_ts, and that of a normalised row is −δ_t offset / Z_t. The two parts cancel
to it but for roundings, which where features have all one sign add up. What is wrong along φ_t is taken out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tile_io import load_rows, store_rows


def linear_gradient(x: Tensor, near: Tensor, far: Tensor, delta: Tensor, z: Tensor, offset: float) -> Tensor:
    """x [B, T, H, m], any strides but the last; near and far [B, T, H, m] fp32, the parts of its gradient; delta, z
    [B, T, H] fp32 -> the gradient [B, T, H, m] in x's dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width, rows, BM = x.shape[3], x.shape[1] * x.shape[2], 32
    pieces = triton.cdiv(rows, BM)
    linear_gradient_kernel[(pieces * x.shape[0],)](
        x,
        x.stride()[:3],
        near,
        far,
        delta,
        z,
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
    near,
    far,  # [B, T, H, WIDTH]
    delta,
    z,  # [B, T, H]
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
    dx_rows = load_rows(near, row, WIDTH, inside, WIDTH, PADDED) + load_rows(far, row, WIDTH, inside, WIDTH, PADDED)
    delta_rows = tl.load(delta + row, mask=inside, other=0.0)
    expected = -delta_rows * offset / tl.load(z + row, mask=inside, other=1.0)
    square = tl.sum(x_rows * x_rows, axis=1)
    wrong = (tl.sum(x_rows * dx_rows, axis=1) - expected) / tl.where(square == 0.0, 1.0, square)
    store_rows(dx, row, WIDTH, inside, dx_rows - wrong[:, None] * x_rows, WIDTH, PADDED)
