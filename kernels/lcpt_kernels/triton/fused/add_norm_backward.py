"""Addition and norm, backward, with n made again from h, and dh the gradient that comes along the residual stream:

    g = w dy        LayerNorm: dx = (g − mean(g) − n mean(n g)) / √(var + ε) + dh        RMSNorm: without mean(g)
    dw = Σ n dy        db = Σ dy

A program goes through its share of the rows and sums its part of dw and db in registers; the parts are added in a
fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import load_rows, store_rows
from lcpt_kernels.triton.fused.add_norm_forward import load_vector, normalize


def add_norm_backward(
    d_normed: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, has_bias: bool, rms: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel.

    d_normed, d_total and total: [N, D], last strides 1 -> dx [N, D] in total's dtype; the gradients of weight and, with
    has_bias, of bias, fp32 [1 or 2, D].
    """
    rows, width = total.shape
    tiles = launch_configs.tiles("add_norm_backward", width, total.dtype)
    dx = torch.empty(rows, width, dtype=total.dtype, device=total.device)
    steps = max(1, triton.cdiv(rows, tiles["BT"] * tiles.pop("PROGRAMS")))
    programs = triton.cdiv(rows, tiles["BT"] * steps)
    shares = torch.empty(programs, 1 + has_bias, width, dtype=torch.float32, device=total.device)
    if rows:
        add_norm_backward_kernel[(programs,)](
            d_normed,
            d_normed.stride(0),
            d_total,
            None if d_total is None else d_total.stride(0),
            total,
            total.stride(0),
            weight.contiguous(),
            dx,
            shares,
            rows,
            steps,
            float(eps),
            BIAS=has_bias,
            RMS=rms,
            D=width,
            D_PAD=triton.next_power_of_2(width),
            **tiles,
        )
    return dx, shares.sum(0)


@triton.jit(do_not_specialize=["rows", "steps"])
def add_norm_backward_kernel(
    d_normed,
    d_normed_stride,  # [N, D]
    d_total,
    d_total_stride,  # [N, D]
    total,
    total_stride,  # [N, D]
    weight,  # [D]
    dx,  # [N, D]
    shares,  # [programs, 1 + BIAS, D]
    rows,
    steps,
    eps,
    BIAS: tl.constexpr,
    RMS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BT: tl.constexpr,
):
    w = load_vector(weight, D, D_PAD)
    dw = tl.zeros((BT, D_PAD), tl.float32)
    db = tl.zeros((BT, D_PAD), tl.float32)
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * BT + tl.arange(0, BT)
        inside = row < rows
        dy = load_rows(d_normed, row, d_normed_stride, inside, D, D_PAD).to(tl.float32)  # [BT, D]
        n, scale = normalize(load_rows(total, row, total_stride, inside, D, D_PAD).to(tl.float32), eps, RMS, D, D_PAD)
        dw += n * dy
        if BIAS:
            db += dy
        g = w * dy
        dh = g - n * (tl.sum(n * g, axis=1) * (1.0 / D))[:, None]
        if not RMS:
            dh -= (tl.sum(g, axis=1) * (1.0 / D))[:, None]
        dh *= scale
        if d_total is not None:
            dh += load_rows(d_total, row, d_total_stride, inside, D, D_PAD).to(tl.float32)
        store_rows(dx, row, D, inside, dh, D, D_PAD)
    share = shares + tl.program_id(0).to(tl.int64) * (D * (1 + BIAS)) + tl.arange(0, D_PAD)
    there = tl.arange(0, D_PAD) < D
    tl.store(share, tl.sum(dw, axis=0), mask=there)
    if BIAS:
        tl.store(share + D, tl.sum(db, axis=0), mask=there)
