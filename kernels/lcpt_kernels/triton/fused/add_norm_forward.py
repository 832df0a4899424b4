"""Addition and norm, forward:

    h = x + δ, rounded        LayerNorm: n = (h − mean) / √(var + ε)        RMSNorm: n = h / √(mean(h²) + ε)
    normed = w n + b

A program holds whole rows, so that each tensor is read or written once. The variance is computed from h − mean in
registers, not as a difference of large sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tile_io import load_rows, store_rows


def add_norm_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, rms: bool, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Launch the forward kernel: x and delta [N, D], last strides 1 -> normed and, with delta, h, each [N, D]."""
    rows, width = x.shape
    normed = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = None if delta is None else torch.empty_like(normed)
    tiles = launch_configs.tiles("add_norm_forward", width, x.dtype)
    if rows:
        add_norm_forward_kernel[(triton.cdiv(rows, tiles["BT"]),)](
            x,
            x.stride(0),
            delta,
            None if delta is None else delta.stride(0),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            normed,
            total,
            rows,
            float(eps),
            RMS=rms,
            D=width,
            D_PAD=triton.next_power_of_2(width),
            **tiles,
        )
    return normed, total


@triton.jit(do_not_specialize=["rows"])
def add_norm_forward_kernel(
    x,
    x_stride,  # [N, D]
    delta,
    delta_stride,  # [N, D]
    weight,
    bias,  # [D]
    normed,
    total,  # [N, D]
    rows,
    eps,
    RMS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BT: tl.constexpr,
):
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = row < rows
    h = load_rows(x, row, x_stride, inside, D, D_PAD).to(tl.float32)  # [BT, D]
    if delta is not None:
        h += load_rows(delta, row, delta_stride, inside, D, D_PAD).to(tl.float32)
        h = h.to(total.dtype.element_ty)
        store_rows(total, row, D, inside, h, D, D_PAD)
        h = h.to(tl.float32)
    n, _ = normalize(h, eps, RMS, D, D_PAD)
    y = n * load_vector(weight, D, D_PAD)
    if bias is not None:
        y += load_vector(bias, D, D_PAD)
    store_rows(normed, row, D, inside, y, D, D_PAD)


@triton.jit
def normalize(h, eps, RMS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Return n, 0 beyond D as h is, and 1 / √(… + ε) [BT, 1]."""
    if not RMS:
        h -= (tl.sum(h, axis=1) * (1.0 / D))[:, None]
        if D_PAD != D:
            h = tl.where((tl.arange(0, D_PAD) < D)[None, :], h, 0.0)
    scale = tl.rsqrt(tl.sum(h * h, axis=1) * (1.0 / D) + eps)[:, None]
    return h * scale, scale


@triton.jit
def load_vector(x, D: tl.constexpr, D_PAD: tl.constexpr):
    """Load x [D] as fp32 [1, D_PAD]."""
    column = tl.arange(0, D_PAD)
    return tl.load(x + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
