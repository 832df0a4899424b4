"""norm_rotary, forward: LayerNorm of every head, whose halves y₁ and y₂ are then rotated by the token's angle:

    y = w (x − mean) / √(var + ε) + b        rotated = [y₁ cos − y₂ sin, y₁ sin + y₂ cos]

A program loops over the heads of BT tokens and reads their cos, sin, w and b once. It computes the variance from
x − mean in registers, not as a difference of large sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import load_rows, store_rows


def norm_rotary_forward(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float, keep_plain: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel.

    x [B, T, H, D], last stride 1 -> rotated and, with keep_plain, y, each [B, T, H, D] in x's dtype.
    """
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plain = torch.empty_like(rotated) if keep_plain else None
    batch, tokens, heads, width = x.shape
    tiles = launch_configs.tiles("norm_rotary_forward", width, x.dtype)
    norm_rotary_forward_kernel[(triton.cdiv(batch * tokens, tiles["BT"]),)](
        x,
        x.stride()[:3],
        weight.contiguous(),
        bias.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        rotated,
        plain,
        batch,
        tokens,
        heads,
        float(eps),
        HALF=width // 2,
        HALF_PAD=triton.next_power_of_2(width // 2),
        **tiles,
    )
    return rotated, plain


@triton.jit(do_not_specialize=["batch", "tokens", "heads"])
def norm_rotary_forward_kernel(
    x,
    x_strides,  # [B, T, H, D]
    weight,
    bias,  # [D]
    cos,
    sin,  # [T, D/2]
    rotated,
    plain,  # [B, T, H, D]
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
    c, s = load_angles(cos, sin, token % tokens, inside, HALF, HALF_PAD)  # [BT, D/2]
    w1, w2 = load_affine(weight, HALF, HALF_PAD)
    b1, b2 = load_affine(bias, HALF, HALF_PAD)
    for head in range(0, heads):
        x1, x2 = load_halves(x, x_strides, token, head, tokens, inside, HALF, HALF_PAD)  # [BT, D/2]
        n1, n2, _ = standardize(x1, x2, eps, HALF, HALF_PAD)
        y1, y2 = n1 * w1 + b1, n2 * w2 + b2
        row = token.to(tl.int64) * heads + head
        store_halves(rotated, row, inside, y1 * c - y2 * s, y1 * s + y2 * c, HALF, HALF_PAD)
        if plain is not None:
            store_halves(plain, row, inside, y1, y2, HALF, HALF_PAD)


@triton.jit
def load_halves(x, strides, token, head, tokens, inside, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Load both halves of one head of x [B, T, H, D], `token` counted over B · T: fp32 [BT, HALF_PAD] each."""
    batch, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    x += tl.cast(head, tl.int64) * strides[2]
    place = batch * strides[0] + t * strides[1]
    first = load_rows(x, place, 1, inside, HALF, HALF_PAD)
    second = load_rows(x + HALF, place, 1, inside, HALF, HALF_PAD)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_halves(x, row, inside, first, second, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Store both halves as rows of x [B · T · H, D]."""
    store_rows(x, row, 2 * HALF, inside, first, HALF, HALF_PAD)
    store_rows(x + HALF, row, 2 * HALF, inside, second, HALF, HALF_PAD)


@triton.jit
def load_angles(cos, sin, t, inside, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Load cos and sin of positions t, fp32 [BT, HALF_PAD] each."""
    c, s = load_rows(cos, t, HALF, inside, HALF, HALF_PAD), load_rows(sin, t, HALF, inside, HALF, HALF_PAD)
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def load_affine(x, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Load both halves of a weight or bias, fp32 [1, HALF_PAD] each."""
    i = tl.arange(0, HALF_PAD)
    first = tl.load(x + i, mask=i < HALF, other=0.0)
    second = tl.load(x + HALF + i, mask=i < HALF, other=0.0)
    return first.to(tl.float32)[None, :], second.to(tl.float32)[None, :]


@triton.jit
def standardize(x1, x2, eps, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Compute both halves of (x − mean) / √(var + ε), 0 beyond HALF, and 1 / √(var + ε) [BT, 1]."""
    mean = row_mean(x1 + x2, HALF)
    x1, x2 = x1 - mean, x2 - mean
    if HALF_PAD != HALF:
        there = (tl.arange(0, HALF_PAD) < HALF)[None, :]
        x1, x2 = tl.where(there, x1, 0.0), tl.where(there, x2, 0.0)
    scale = tl.rsqrt(row_mean(x1 * x1 + x2 * x2, HALF) + eps)
    return x1 * scale, x2 * scale, scale


@triton.jit
def row_mean(half_sums, HALF: tl.constexpr):
    """Compute the mean of each row, [BT, 1], from half_sums [BT, HALF_PAD], first half + second half."""
    return (tl.sum(half_sums, axis=1) * (0.5 / HALF))[:, None]
