"""norm_rotary, backward: the gradient of LayerNorm and rotary positions, with the normalised n recomputed:

    n = (x − mean) / √(var + ε)        dy = [dt₁ cos + dt₂ sin, dt₂ cos − dt₁ sin] + dplain        g = w dy
    dx = (g − mean(g) − n mean(n g)) / √(var + ε)        dw = Σ n dy        db = Σ dy

A program loops over the heads of BT tokens and sums its share of dw and db, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.fused.norm_rotary_forward import (
    load_affine,
    load_angles,
    load_halves,
    row_mean,
    standardize,
    store_halves,
)


def norm_rotary_backward(
    d_rotated: Tensor | None, d_plain: Tensor | None, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel.

    d_rotated and d_plain, at least one of them, and x: [B, T, H, D], last stride 1
    -> dx [B, T, H, D] in x's dtype; the gradients of weight and bias, fp32 [2, D].
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, tokens, heads, width = x.shape
    tiles = launch_configs.tiles("norm_rotary_backward", width, x.dtype)
    pieces = triton.cdiv(batch * tokens, tiles["BT"])
    shares = torch.empty(pieces, 2, width, dtype=torch.float32, device=x.device)
    rotated_strides, plain_strides = (None if dy is None else dy.stride()[:3] for dy in (d_rotated, d_plain))
    norm_rotary_backward_kernel[(pieces,)](
        d_rotated,
        rotated_strides,
        d_plain,
        plain_strides,
        x,
        x.stride()[:3],
        weight.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        dx,
        shares,
        batch,
        tokens,
        heads,
        float(eps),
        HALF=width // 2,
        HALF_PAD=triton.next_power_of_2(width // 2),
        **tiles,
    )
    return dx, shares.sum(0)


@triton.jit(do_not_specialize=["batch", "tokens", "heads"])
def norm_rotary_backward_kernel(
    d_rotated,
    d_rotated_strides,  # [B, T, H, D]
    d_plain,
    d_plain_strides,  # [B, T, H, D]
    x,
    x_strides,  # [B, T, H, D]
    weight,  # [D]
    cos,
    sin,  # [T, D/2]
    dx,  # [B, T, H, D]
    shares,  # [pieces, 2, D]
    batch,
    tokens,
    heads,
    eps,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BT: tl.constexpr,
):
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < batch * tokens
    sequence, t = token // tokens, token % tokens
    c, s = load_angles(cos, sin, t, inside, HALF, HALF_PAD)  # [BT, D/2]
    w1, w2 = load_affine(weight, HALF, HALF_PAD)
    dw1 = tl.zeros((BT, HALF_PAD), tl.float32)
    dw2 = tl.zeros((BT, HALF_PAD), tl.float32)
    db1 = tl.zeros((BT, HALF_PAD), tl.float32)
    db2 = tl.zeros((BT, HALF_PAD), tl.float32)
    for head in range(0, heads):
        x1, x2 = load_halves(x, x_strides, sequence, t, head, inside, HALF, HALF_PAD)  # [BT, D/2]
        dy1, dy2 = load_dy(
            d_rotated, d_rotated_strides, d_plain, d_plain_strides, sequence, t, head, inside, c, s, HALF, HALF_PAD
        )
        n1, n2, scale = standardize(x1, x2, eps, HALF, HALF_PAD)
        dw1 += n1 * dy1
        dw2 += n2 * dy2
        db1 += dy1
        db2 += dy2
        dx1, dx2 = through_norm(w1 * dy1, w2 * dy2, n1, n2, scale, HALF)
        store_halves(dx, token.to(tl.int64) * heads + head, inside, dx1, dx2, HALF, HALF_PAD)
    share = shares + tl.program_id(0).to(tl.int64) * 4 * HALF
    store_share(share, dw1, dw2, HALF, HALF_PAD)
    store_share(share + 2 * HALF, db1, db2, HALF, HALF_PAD)


@triton.jit
def load_dy(
    d_rotated,
    d_rotated_strides,
    d_plain,
    d_plain_strides,
    sequence,
    t,
    head,
    inside,
    c,
    s,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Load the gradient of plain that comes through both outputs, fp32 [rows, HALF_PAD] each half."""
    dy1 = tl.zeros((inside.shape[0], HALF_PAD), tl.float32)
    dy2 = tl.zeros((inside.shape[0], HALF_PAD), tl.float32)
    if d_rotated is not None:
        dt1, dt2 = load_halves(d_rotated, d_rotated_strides, sequence, t, head, inside, HALF, HALF_PAD)
        dy1, dy2 = dt1 * c + dt2 * s, dt2 * c - dt1 * s
    if d_plain is not None:
        dp1, dp2 = load_halves(d_plain, d_plain_strides, sequence, t, head, inside, HALF, HALF_PAD)
        dy1, dy2 = dy1 + dp1, dy2 + dp2
    return dy1, dy2


@triton.jit
def through_norm(g1, g2, n1, n2, scale, HALF: tl.constexpr):
    """Return the gradient of rows from g, that of their n = scale · (row − mean)."""
    along, level = scale * row_mean(n1 * g1 + n2 * g2, HALF), scale * row_mean(g1 + g2, HALF)
    return scale * g1 - level - along * n1, scale * g2 - level - along * n2


@triton.jit
def store_share(x, first, second, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Store the sums over rows of both halves into x [D]."""
    i = tl.arange(0, HALF_PAD)
    tl.store(x + i, tl.sum(first, axis=0), mask=i < HALF)
    tl.store(x + HALF + i, tl.sum(second, axis=0), mask=i < HALF)
