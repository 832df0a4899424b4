"""The gradients of S(x) = tanh(u), u = z₁ ∘ z₂ / √r, z = gᵀ D, g = GELU(y), y = Uᵀ xᵀ, in x, U and D of both networks:

    du = da (1 − S²)        dz₁ = du ∘ z₂ / √r        dy = (D dz) ∘ GELU'(y)
    dx = Σ dyᵀ Uᵀ           dUᵀ = dy x                 dD = g dzᵀ

Hidden layers are made again, as columns: their products over rows then take them as they are. A program walks its share
of the rows and holds the gradients of U and D in registers; of both networks, or, where that is too much, of one, with
a share of dx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton import configurations
from lcpt_kernels.triton.gelu import gelu_and_slope
from lcpt_kernels.triton.learned_sketch_output import (
    load_network,
    numbers,
    of_rows,
    place_of,
    shares,
    sigmoid_of_twice,
    width,
)
from lcpt_kernels.triton.tiles import load_rows, store_rows


def learned_sketch_backward(da: Tensor, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """da [N, H, R], x [N, H, D], up [2, D, E], down [2, E, R], last strides 1 -> their gradients but da's, alike."""
    tiles = configurations.tiles("learned_sketch_backward", width(up), x.dtype)
    splits = 2 // tiles["NETWORKS"]
    programs, steps = shares(x.shape[0] * x.shape[1], tiles)
    dx = torch.empty(splits, *x.shape, dtype=x.dtype, device=x.device)
    d_up, d_down = (torch.empty(programs, *y.shape, dtype=torch.float32, device=x.device) for y in (up, down))
    learned_sketch_backward_kernel[(programs, splits)](
        **of_rows(x=x, da=da), up=up, down=down, dx=dx, d_up=d_up, d_down=d_down, steps=steps, **numbers(up, down),
        **tiles)
    return dx[0] if splits == 1 else dx[0] + dx[1], d_up.sum(0).to(up.dtype), d_down.sum(0).to(down.dtype)


@triton.jit(do_not_specialize=["rows", "steps"], do_not_specialize_on_alignment=["heads"])
def learned_sketch_backward_kernel(
    da, da_strides,  # [N, H, R]
    x, x_strides,  # [N, H, D]
    up,  # [2, D, E]
    down,  # [2, E, R]
    dx,  # [splits, N, H, D]
    d_up,  # [programs, 2, D, E]
    d_down,  # [programs, 2, E, R]
    rows, heads, steps, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
    NETWORKS: tl.constexpr, BT: tl.constexpr,
):
    own = tl.program_id(1)
    other = 1 - own
    up_own, down_own = load_network(up, down, own, D, D_PAD, E, E_PAD, R, R_PAD)
    up_other, down_other = load_network(up, down, other, D, D_PAD, E, E_PAD, R, R_PAD)
    d_up_own = tl.zeros((E_PAD, D_PAD), tl.float32)
    d_down_own = tl.zeros((E_PAD, R_PAD), tl.float32)
    if NETWORKS == 2:
        d_up_other = tl.zeros((E_PAD, D_PAD), tl.float32)
        d_down_other = tl.zeros((E_PAD, R_PAD), tl.float32)
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * BT + tl.arange(0, BT)
        x_rows = load_rows(x, place_of(row, heads, x_strides), 1, row < rows, D, D_PAD)  # [BT, D]
        da_rows = load_rows(da, place_of(row, heads, da_strides), 1, row < rows, R, R_PAD)  # [BT, R]
        g_own, slope_own, z_own = network(x_rows, up_own, down_own)
        g_other, slope_other, z_other = network(x_rows, up_other, down_other)
        half = sigmoid_of_twice(scale * z_own * z_other)
        du = scale * tl.trans(da_rows).to(tl.float32) * (4.0 * half * (1.0 - half))  # [R, BT]
        d_up_own, d_down_own, dx_columns = through_network(
            d_up_own, d_down_own, x_rows, g_own, slope_own, du * z_other, up_own, down_own)
        if NETWORKS == 2:
            d_up_other, d_down_other, more = through_network(
                d_up_other, d_down_other, x_rows, g_other, slope_other, du * z_own, up_other, down_other)
            dx_columns += more
        store_rows(dx, own.to(tl.int64) * rows + row, D, row < rows, tl.trans(dx_columns), D, D_PAD)
    store_network(d_up, d_down, own, d_up_own, d_down_own, D, D_PAD, E, E_PAD, R, R_PAD)
    if NETWORKS == 2:
        store_network(d_up, d_down, other, d_up_other, d_down_other, D, D_PAD, E, E_PAD, R, R_PAD)


@triton.jit
def network(x_rows, up, down):
    """-> GELU of the hidden layer and its derivative [E, BT], and z [R, BT]."""
    g, slope = gelu_and_slope(tl.dot(tl.trans(up), tl.trans(x_rows), input_precision="ieee"))
    g = g.to(x_rows.dtype)
    return g, slope, tl.dot(tl.trans(down), g, input_precision="ieee")


@triton.jit
def through_network(d_up, d_down, x_rows, g, slope, dz, up, down):
    """-> the sums d_up [E, D] and d_down [E, R] with these rows, and their dx [D, BT]."""
    TYPE: tl.constexpr = tl.float32 if x_rows.dtype == tl.float32 else tl.bfloat16  # fp16 has not gradients' range
    dz = dz.to(TYPE)  # [R, BT]
    d_down = tl.dot(g.to(TYPE), tl.trans(dz), d_down, input_precision="ieee")  # [E, BT] @ [BT, R]
    dy = (tl.dot(down.to(TYPE), dz, input_precision="ieee") * slope).to(TYPE)  # [E, BT]
    d_up = tl.dot(dy, x_rows.to(TYPE), d_up, input_precision="ieee")  # [E, BT] @ [BT, D]
    return d_up, d_down, tl.dot(up.to(TYPE), dy, input_precision="ieee")


@triton.jit
def store_network(
    d_up, d_down, network, up_rows, down_rows,
    D: tl.constexpr, D_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr,
):
    """up_rows [E, D] and down_rows [E, R] as this program's share."""
    share = tl.program_id(0).to(tl.int64) * 2 + network
    i, j = tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    store_rows(d_up + share * (D * E), i, E, i < D, tl.trans(up_rows), E, E_PAD)
    store_rows(d_down + share * (E * R), j, R, j < E, down_rows, R, R_PAD)
