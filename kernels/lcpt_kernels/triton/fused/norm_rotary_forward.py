"""norm_rotary, forward: the key shift m, LayerNorm of every head, whose halves y₁ and y₂ are then rotated:

    x'_t = x_t + m ∘ x_{t−1}        y = w (x' − mean) / √(var + ε) + b
    rotated = [y₁ cos − y₂ sin, y₁ sin + y₂ cos]

x' = x without m; x_{−1} is `before`, or 0; and where a document starts, 0 is in the place of x_{t−1}. A program loops
over the heads of BT tokens and reads their cos, sin, w and b once. Row t − 1 comes from the cache: it is another row of
the same tile, but for the first. The variance is computed from x' − mean in registers, not as a difference of large
sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import load_rows, store_rows


def norm_rotary_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_shift: Tensor | None,
    before: Tensor | None,
    starts: Tensor | None,
    eps: float,
    keep_plain: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel.

    x [B, T, H, D] and before [B, 1, H, D], last strides 1
    -> rotated and, with keep_plain, y, each [B, T, H, D] in x's dtype.
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
        **shift_arguments(key_shift, before, starts),
        rotated=rotated,
        plain=plain,
        batch=batch,
        tokens=tokens,
        heads=heads,
        eps=float(eps),
        HALF=width // 2,
        HALF_PAD=triton.next_power_of_2(width // 2),
        **tiles,
    )
    return rotated, plain


def shift_arguments(key_shift: Tensor | None, before: Tensor | None, starts: Tensor | None) -> dict:
    """Return what a kernel takes for the key shift."""
    return dict(
        key_shift=None if key_shift is None else key_shift.contiguous(),
        before=before,
        before_strides=None if before is None else before.stride()[:3],
        starts=None if starts is None else starts.contiguous(),
    )


@triton.jit(do_not_specialize=["batch", "tokens", "heads"])
def norm_rotary_forward_kernel(
    x,
    x_strides,  # [B, T, H, D]
    weight,
    bias,  # [D]
    cos,
    sin,  # [T, D/2]
    key_shift,  # [H, D]
    before,
    before_strides,  # [B, 1, H, D]
    starts,  # [T]
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
    sequence, t = token // tokens, token % tokens
    c, s = load_angles(cos, sin, t, inside, HALF, HALF_PAD)  # [BT, D/2]
    w1, w2 = load_affine(weight, HALF, HALF_PAD)
    b1, b2 = load_affine(bias, HALF, HALF_PAD)
    if key_shift is not None:
        looks_back = sees_earlier(starts, t, inside)
    for head in range(0, heads):
        x1, x2 = load_halves(x, x_strides, sequence, t, head, inside, HALF, HALF_PAD)  # [BT, D/2]
        if key_shift is not None:
            m1, m2 = load_affine(key_shift + head * 2 * HALF, HALF, HALF_PAD)
            e1, e2 = load_earlier(x, x_strides, before, before_strides, sequence, t, head, looks_back, HALF, HALF_PAD)
            x1, x2 = x1 + m1 * e1, x2 + m2 * e2
        n1, n2, _ = standardize(x1, x2, eps, HALF, HALF_PAD)
        y1, y2 = n1 * w1 + b1, n2 * w2 + b2
        row = token.to(tl.int64) * heads + head
        store_halves(rotated, row, inside, y1 * c - y2 * s, y1 * s + y2 * c, HALF, HALF_PAD)
        if plain is not None:
            store_halves(plain, row, inside, y1, y2, HALF, HALF_PAD)


@triton.jit
def load_halves(x, strides, sequence, t, head, inside, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Load both halves of rows of x [B, T, H, D], fp32 [rows, HALF_PAD] each: one head of several tokens, or several
    heads of one token."""
    place = sequence.to(tl.int64) * strides[0] + t.to(tl.int64) * strides[1] + tl.cast(head, tl.int64) * strides[2]
    first = load_rows(x, place, 1, inside, HALF, HALF_PAD)
    second = load_rows(x + HALF, place, 1, inside, HALF, HALF_PAD)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def sees_earlier(starts, t, inside):
    """Return which tokens are inside and do not start a document."""
    if starts is None:
        return inside
    else:
        return inside & (tl.load(starts + t, mask=inside, other=1) == 0)


@triton.jit
def load_earlier(
    x, x_strides, before, before_strides, sequence, t, head, looks_back, HALF: tl.constexpr, HALF_PAD: tl.constexpr
):
    """Load the row before each row of `load_halves`: `before` at position 0, and 0 where a token does not look back."""
    first, second = load_halves(x, x_strides, sequence, t - 1, head, looks_back & (t > 0), HALF, HALF_PAD)
    if before is not None:
        b1, b2 = load_halves(before, before_strides, sequence, t, head, looks_back & (t == 0), HALF, HALF_PAD)
        first, second = first + b1, second + b2
    return first, second


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
    """Load both halves of a weight or bias, or of the key shift of one head, fp32 [1, HALF_PAD] each."""
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
