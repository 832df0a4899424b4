"""The gradient of given query features from its two parts, local and through the state.

All weights W_ts = φ_t·φ_s are linear in φ_t, so φ_t·dφ_t = Σ_s dW_ts W_ts = −δ_t offset / l_t. The two parts cancel to
this but for rounding errors, which add up where features all have one sign. The error along φ_t is subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tile_io import head_rows, load_rows, store_rows


def query_feature_gradient(
    x: Tensor, d_local: Tensor, d_state: Tensor, delta: Tensor, denominator: Tensor, offset: float
) -> Tensor:
    """Return the gradient of x [B, T, H, m], whose last stride is 1, in x's dtype. Its parts d_local and d_state are
    [B, T, H, m] fp32; delta and denominator are [B, H, T] fp32."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, tokens, heads, width = x.shape
    BM = 32
    pieces = triton.cdiv(tokens, BM)
    linear_gradient_kernel[(pieces * batch, heads)](
        x,
        x.stride()[:3],
        d_local,
        d_state,
        delta,
        denominator,
        dx,
        tokens,
        pieces,
        float(offset),
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        BM=BM,
        num_warps=4,
    )
    return dx


@triton.jit(do_not_specialize=["tokens", "pieces"])
def linear_gradient_kernel(
    x,
    x_strides,  # [B, T, H, WIDTH]
    d_local,
    d_state,  # [B, T, H, WIDTH]
    delta,
    denominator,  # [B, H, T]
    dx,  # [B, T, H, WIDTH]
    tokens,
    pieces,
    offset,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BM: tl.constexpr,
):
    batch, head, heads = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    t = tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = t < tokens
    row, place = (batch * tokens + t) * heads + head, (batch * heads + head) * tokens + t
    x_rows = load_rows(head_rows(x, x_strides, batch, head), t, x_strides[1], inside, WIDTH, PADDED)  # [BM, WIDTH]
    x_rows = x_rows.to(tl.float32)
    dx_rows = load_rows(d_local, row, WIDTH, inside, WIDTH, PADDED) + load_rows(
        d_state, row, WIDTH, inside, WIDTH, PADDED
    )
    delta_rows = tl.load(delta + place, mask=inside, other=0.0)
    expected = -delta_rows * offset / tl.load(denominator + place, mask=inside, other=1.0)
    square = tl.sum(x_rows * x_rows, axis=1)
    error = (tl.sum(x_rows * dx_rows, axis=1) - expected) / tl.where(square == 0.0, 1.0, square)
    store_rows(dx, row, WIDTH, inside, dx_rows - error[:, None] * x_rows, WIDTH, PADDED)
