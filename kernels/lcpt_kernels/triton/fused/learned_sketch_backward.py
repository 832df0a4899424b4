"""learned_sketch, backward: S(x) = tanh(u), u = z₁ ∘ z₂ / √r, z = g D, g = GELU(y), y = x U for each network:

    du = da (1 − S²)        dz₁ = du ∘ z₂ / √r        dyᵀ = (D dzᵀ) ∘ GELU'(yᵀ)
    dxᵀ = Σ U dyᵀ           dUᵀ = dyᵀ x               dD = gᵀ dz

z is recomputed as in the forward pass. Each hidden layer is then recomputed once more, transposed: the sums over rows
need its transpose, and a product cannot transpose an operand in registers. A program processes its share of the rows
and keeps the gradients of U and D in registers, of both networks where they fit, else of one with its part of dx.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tile_io import load_rows, store_rows
from lcpt_kernels.triton.fused.gelu import gelu_and_slope
from lcpt_kernels.triton.fused.learned_sketch_forward import (
    apply_network,
    load_network,
    program_grid,
    row_arguments,
    row_offsets,
    sigmoid_2x,
    sizes_and_tiles,
)


def learned_sketch_backward(da: Tensor, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel.

    da [N, H, R], x [N, H, D], up [2, D, E], down [2, E, R], last strides 1 -> the gradients of x, up and down.
    """
    sizes, tiles = sizes_and_tiles("learned_sketch_backward", up, down)
    splits = 2 // tiles["NETWORKS"]
    programs, steps = program_grid(x.shape[0] * x.shape[1], tiles)
    dx = torch.empty(splits, *x.shape, dtype=x.dtype, device=x.device)
    d_up, d_down = (torch.empty(programs, *y.shape, dtype=torch.float32, device=x.device) for y in (up, down))
    learned_sketch_backward_kernel[(programs, splits)](
        **row_arguments(da=da, x=x), up=up, down=down, dx=dx, d_up=d_up, d_down=d_down, steps=steps, **sizes, **tiles
    )
    return dx[0] if splits == 1 else dx[0] + dx[1], d_up.sum(0).to(up.dtype), d_down.sum(0).to(down.dtype)


@triton.jit(do_not_specialize=["rows", "steps"], do_not_specialize_on_alignment=["heads"])
def learned_sketch_backward_kernel(
    da,
    da_strides,  # [N, H, R]
    x,
    x_strides,  # [N, H, D]
    up,  # [2, D, E]
    down,  # [2, E, R]
    dx,  # [splits, N, H, D]
    d_up,  # [programs, 2, D, E]
    d_down,  # [programs, 2, E, R]
    rows,
    heads,
    steps,
    scale,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    NETWORKS: tl.constexpr,
    BT: tl.constexpr,
):
    own = 0 if NETWORKS == 2 else tl.program_id(1)
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
        x_rows = load_rows(x, row_offsets(row, heads, x_strides), 1, row < rows, D, D_PAD)  # [BT, D]
        da_rows = load_rows(da, row_offsets(row, heads, da_strides), 1, row < rows, R, R_PAD)  # [BT, R]
        z_own, z_other = apply_network(x_rows, up_own, down_own), apply_network(x_rows, up_other, down_other)
        half = sigmoid_2x(scale * z_own * z_other)
        du = 4.0 * scale * da_rows.to(tl.float32) * (half - half * half)
        # Both dz first and dx last: in this order fewer values are live in registers.
        dz_own, dz_other = (du * z_other).to(x_rows.dtype), (du * z_own).to(x_rows.dtype)
        d_up_own, d_down_own, dy_own = network_backward(d_up_own, d_down_own, x_rows, dz_own, up_own, down_own)
        if NETWORKS == 2:
            d_up_other, d_down_other, dy_other = network_backward(
                d_up_other, d_down_other, x_rows, dz_other, up_other, down_other
            )
        dx_columns = tl.dot(up_own, dy_own, input_precision="ieee")  # [D, BT]
        if NETWORKS == 2:
            dx_columns = tl.dot(up_other, dy_other, dx_columns, input_precision="ieee")
        store_rows(dx + own * rows.to(tl.int64) * D, row, D, row < rows, tl.trans(dx_columns), D, D_PAD)
    store_network(d_up, d_down, own, d_up_own, d_down_own, D, D_PAD, E, E_PAD, R, R_PAD)
    if NETWORKS == 2:
        store_network(d_up, d_down, other, d_up_other, d_down_other, D, D_PAD, E, E_PAD, R, R_PAD)


@triton.jit
def network_backward(d_up, d_down, x_rows, dz, up, down):
    """Add the share of these rows, whose dz is [BT, R], to d_up [E, D] and d_down [E, R]; also return dy [E, BT].

    Operands have x's dtype, also fp16: all of them have the magnitude of da.
    """
    g, slope = gelu_and_slope(tl.dot(tl.trans(up), tl.trans(x_rows), input_precision="ieee"))  # [E, BT]
    d_down = tl.dot(g.to(dz.dtype), dz, d_down, input_precision="ieee")  # [E, BT] @ [BT, R]
    dy = (tl.dot(down, tl.trans(dz), input_precision="ieee") * slope).to(dz.dtype)  # [E, R] @ [R, BT]
    d_up = tl.dot(dy, x_rows, d_up, input_precision="ieee")  # [E, BT] @ [BT, D]
    return d_up, d_down, dy


@triton.jit
def store_network(
    d_up,
    d_down,
    network,
    up_columns,
    down_rows,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
):
    """Store up_columns [E, D] and down_rows [E, R] as the share of this program."""
    share = tl.program_id(0).to(tl.int64) * 2 + network
    i, j = tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    store_rows(d_up + share * (D * E), i, E, i < D, tl.trans(up_columns), E, E_PAD)
    store_rows(d_down + share * (E * R), j, R, j < E, down_rows, R, R_PAD)
