"""LayerNorm of rows of heads, whose two halves are then turned by their position:

    y = w (x − mean) / √(var + ε) + b        turned = [y₁ cos − y₂ sin, y₁ sin + y₂ cos]

A row is a token's head; a program holds BM of them, all heads of a token before the next token's, as two halves. Mean
and variance are those of the row in registers: no difference of large numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton import configurations
from lcpt_kernels.triton.tiles import load_rows, store_rows


def norm_rotary_output(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float, keep_plain: bool
) -> tuple[Tensor, Tensor | None]:
    """x [B, T, H, D], any strides but the last -> turned and, with keep_plain, y, each [B, T, H, D] in x's dtype."""
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plain = torch.empty_like(turned) if keep_plain else None
    batch, tokens, heads, width = x.shape
    rows, tiles = batch * tokens * heads, configurations.tiles("norm_rotary_output", width, x.dtype)
    norm_rotary_output_kernel[(triton.cdiv(rows, tiles["BM"]),)](
        x, x.stride()[:3], weight.contiguous(), bias.contiguous(), cos.contiguous(), sin.contiguous(), turned, plain,
        rows, tokens, heads, float(eps), HALF=width // 2, HALF_PAD=triton.next_power_of_2(width // 2), **tiles)
    return turned, plain


@triton.jit(do_not_specialize=["rows", "tokens", "heads"])
def norm_rotary_output_kernel(
    x, x_strides,  # [B, T, H, D]
    weight, bias,  # [D]
    cos, sin,  # [T, D/2]
    turned, plain,  # [B, T, H, D]
    rows, tokens, heads, eps, HALF: tl.constexpr, HALF_PAD: tl.constexpr, BM: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = row < rows
    x1, x2 = load_halves(x, of_row(x_strides, row, tokens, heads), inside, HALF, HALF_PAD)  # [BM, D/2]
    w1, w2 = load_affine(weight, HALF, HALF_PAD)
    b1, b2 = load_affine(bias, HALF, HALF_PAD)
    n1, n2, _ = standardised(x1, x2, eps, HALF, HALF_PAD)
    y1, y2 = n1 * w1 + b1, n2 * w2 + b2
    c, s = load_turn(cos, sin, row, tokens, heads, inside, HALF, HALF_PAD)
    store_halves(turned, row, inside, y1 * c - y2 * s, y1 * s + y2 * c, HALF, HALF_PAD)
    if plain is not None:
        store_halves(plain, row, inside, y1, y2, HALF, HALF_PAD)


@triton.jit
def of_row(strides, row, tokens, heads):
    """Where row [BM] of B · T · H stands in a tensor of these strides."""
    token, head = row // heads, row % heads
    batch, t = (token // tokens).to(tl.int64), (token % tokens).to(tl.int64)
    return batch * strides[0] + t * strides[1] + head.to(tl.int64) * strides[2]


@triton.jit
def load_halves(x, place, inside, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """The halves of the rows of x that stand at `place`, fp32 [BM, HALF_PAD] each."""
    first = load_rows(x, place, 1, inside, HALF, HALF_PAD)
    second = load_rows(x + HALF, place, 1, inside, HALF, HALF_PAD)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_halves(x, row, inside, first, second, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Into rows of x [B, T, H, D], contiguous."""
    store_rows(x, row, 2 * HALF, inside, first, HALF, HALF_PAD)
    store_rows(x + HALF, row, 2 * HALF, inside, second, HALF, HALF_PAD)


@triton.jit
def load_affine(x, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """The halves of a weight or bias, fp32 [1, HALF_PAD] each."""
    i = tl.arange(0, HALF_PAD)
    first = tl.load(x + i, mask=i < HALF, other=0.0)
    second = tl.load(x + HALF + i, mask=i < HALF, other=0.0)
    return first.to(tl.float32)[None, :], second.to(tl.float32)[None, :]


@triton.jit
def load_turn(cos, sin, row, tokens, heads, inside, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """cos and sin of each row's position, fp32 [BM, HALF_PAD]. Heads of one token read the same: once, in effect."""
    t = row // heads % tokens
    c, s = load_rows(cos, t, HALF, inside, HALF, HALF_PAD), load_rows(sin, t, HALF, inside, HALF, HALF_PAD)
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def standardised(x1, x2, eps, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """-> the halves of (x − mean) / √(var + ε), 0 beyond HALF, and 1 / √(var + ε) as [BM, 1]."""
    mean = row_mean(x1 + x2, HALF)
    x1, x2 = x1 - mean, x2 - mean
    if HALF_PAD != HALF:
        there = (tl.arange(0, HALF_PAD) < HALF)[None, :]
        x1, x2 = tl.where(there, x1, 0.0), tl.where(there, x2, 0.0)
    scale = tl.rsqrt(row_mean(x1 * x1 + x2 * x2, HALF) + eps)
    return x1 * scale, x2 * scale, scale


@triton.jit
def row_mean(of_both, HALF: tl.constexpr):
    """of_both [BM, HALF_PAD]: first half and second added -> the mean of the row, [BM, 1]."""
    return (tl.sum(of_both, axis=1) / (2 * HALF))[:, None]
