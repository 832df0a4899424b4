"""norm_rotary with a key shift m, backward: g_t is the gradient of x'_t = x_t + m ∘ x_{t−1}, and n, dy as in
norm_rotary_backward.py, but of x':

    g = (w dy − mean(w dy) − n mean(n w dy)) / √(var + ε)        dw = Σ n dy        db = Σ dy
    dx_t = g_t + m ∘ g_{t+1}        dm = Σ g_t ∘ x_{t−1}        dbefore = m ∘ g_0

x_{−1} is `before`, or 0. Where token t starts a document, x_{t−1} and m ∘ g_t are 0 in the second line.

A program computes BH heads of a run of tokens, from the last to the first, so that m ∘ g_{t+1} stays in registers, as
all sums do. It begins with the token after its run, whose g another program computes too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import load_rows
from lcpt_kernels.triton.fused.norm_rotary_backward import load_dy, store_share, through_norm
from lcpt_kernels.triton.fused.norm_rotary_forward import (
    load_affine,
    load_angles,
    load_earlier,
    load_halves,
    sees_earlier,
    shift_arguments,
    standardize,
    store_halves,
)

SHORTEST_RUN = 8  # tokens; a program computes one more


def shifted_norm_rotary_backward(
    d_rotated: Tensor | None,
    d_plain: Tensor | None,
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_shift: Tensor,
    before: Tensor | None,
    starts: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launch the backward kernel for a key shift.

    d_rotated and d_plain, at least one of them, x [B, T, H, D] and before [B, 1, H, D]: last stride 1
    -> dx [B, T, H, D] in x's dtype; fp32, the gradients of weight and bias [2, D] and of key_shift [H, D]; d_before.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_before = None if before is None else torch.empty(before.shape, dtype=before.dtype, device=x.device)
    batch, tokens, heads, width = x.shape
    tiles = launch_configs.tiles("shifted_norm_rotary_backward", width, x.dtype)
    groups = triton.cdiv(heads, tiles["BH"])
    # About as many programs as a GPU runs at once: long sequences need no more partial sums than short ones.
    run = max(SHORTEST_RUN, triton.cdiv(batch * tokens * groups, tiles.pop("PROGRAMS")))
    runs = max(1, triton.cdiv(tokens, run))  # of each sequence; one without a token writes zeros
    affine_shares = torch.empty(batch * runs, groups, 2, width, dtype=torch.float32, device=x.device)
    shift_shares = torch.empty(batch * runs, heads, width, dtype=torch.float32, device=x.device)
    rotated_strides, plain_strides = (None if dy is None else dy.stride()[:3] for dy in (d_rotated, d_plain))
    shifted_norm_rotary_backward_kernel[(batch * runs, groups)](
        d_rotated,
        rotated_strides,
        d_plain,
        plain_strides,
        x,
        x.stride()[:3],
        weight.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        **shift_arguments(key_shift, before, starts),
        dx=dx,
        d_before=d_before,
        affine_shares=affine_shares,
        shift_shares=shift_shares,
        tokens=tokens,
        heads=heads,
        run=run,
        runs=runs,
        eps=float(eps),
        HALF=width // 2,
        HALF_PAD=triton.next_power_of_2(width // 2),
        **tiles,
    )
    return dx, affine_shares.sum((0, 1)), shift_shares.sum(0), d_before


@triton.jit(do_not_specialize=["tokens", "heads", "run", "runs"])
def shifted_norm_rotary_backward_kernel(
    d_rotated,
    d_rotated_strides,  # [B, T, H, D]
    d_plain,
    d_plain_strides,  # [B, T, H, D]
    x,
    x_strides,  # [B, T, H, D]
    weight,  # [D]
    cos,
    sin,  # [T, D/2]
    key_shift,  # [H, D]
    before,
    before_strides,  # [B, 1, H, D]
    starts,  # [T]
    dx,  # [B, T, H, D]
    d_before,  # [B, 1, H, D]
    affine_shares,  # [B · runs, groups, 2, D]
    shift_shares,  # [B · runs, H, D]
    tokens,
    heads,
    run,
    runs,
    eps,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BH: tl.constexpr,
):
    piece, group = tl.program_id(0), tl.program_id(1)
    sequence = piece // runs
    start = piece % runs * run
    end = tl.minimum(start + run, tokens)
    head = group * BH + tl.arange(0, BH)
    there = head < heads
    w1, w2 = load_affine(weight, HALF, HALF_PAD)
    m1 = load_rows(key_shift, head, 2 * HALF, there, HALF, HALF_PAD).to(tl.float32)  # [BH, D/2]
    m2 = load_rows(key_shift + HALF, head, 2 * HALF, there, HALF, HALF_PAD).to(tl.float32)
    later1 = tl.zeros((BH, HALF_PAD), tl.float32)  # m ∘ g_{t+1}
    later2 = tl.zeros((BH, HALF_PAD), tl.float32)
    dm1 = tl.zeros((BH, HALF_PAD), tl.float32)
    dm2 = tl.zeros((BH, HALF_PAD), tl.float32)
    dw1 = tl.zeros((BH, HALF_PAD), tl.float32)
    dw2 = tl.zeros((BH, HALF_PAD), tl.float32)
    db1 = tl.zeros((BH, HALF_PAD), tl.float32)
    db2 = tl.zeros((BH, HALF_PAD), tl.float32)
    for step in range(0, end - start + 1):
        t = end - step
        inside = there & (t < tokens)
        looks_back = there & sees_earlier(starts, t, t < tokens)
        x1, x2 = load_halves(x, x_strides, sequence, t, head, inside, HALF, HALF_PAD)  # [BH, D/2]
        e1, e2 = load_earlier(x, x_strides, before, before_strides, sequence, t, head, looks_back, HALF, HALF_PAD)
        c, s = load_angles(cos, sin, t + 0 * head, inside, HALF, HALF_PAD)  # every row the same
        dy1, dy2 = load_dy(
            d_rotated, d_rotated_strides, d_plain, d_plain_strides, sequence, t, head, inside, c, s, HALF, HALF_PAD
        )
        n1, n2, scale = standardize(x1 + m1 * e1, x2 + m2 * e2, eps, HALF, HALF_PAD)
        g1, g2 = through_norm(w1 * dy1, w2 * dy2, n1, n2, scale, HALF)
        if step > 0:
            row = (sequence.to(tl.int64) * tokens + t) * heads + head
            store_halves(dx, row, there, g1 + later1, g2 + later2, HALF, HALF_PAD)
            dm1 += g1 * e1
            dm2 += g2 * e2
            dw1 += n1 * dy1
            dw2 += n2 * dy2
            db1 += dy1
            db2 += dy2
        later1 = tl.where(looks_back[:, None], m1 * g1, 0.0)
        later2 = tl.where(looks_back[:, None], m2 * g2, 0.0)
    if before is not None:
        row = sequence.to(tl.int64) * heads + head
        store_halves(d_before, row, there & (start == 0), later1, later2, HALF, HALF_PAD)
    store_halves(shift_shares, piece.to(tl.int64) * heads + head, there, dm1, dm2, HALF, HALF_PAD)
    share = affine_shares + (piece.to(tl.int64) * tl.num_programs(1) + group) * 4 * HALF
    store_share(share, dw1, dw2, HALF, HALF_PAD)
    store_share(share + 2 * HALF, db1, db2, HALF, HALF_PAD)
