"""learned_sketch, forward: S(x) = tanh(z₁ ∘ z₂ / √r) with z = GELU(x U) D for each of two networks.

A row is one head of one token. A program loads the matrices once and then processes BT rows in each step. Hidden layers
stay in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tensors import padded
from lcpt_kernels.triton.common.tile_io import load_rows, store_rows
from lcpt_kernels.triton.fused.gelu import gelu

MINUS_TWO_LOG2E = tl.constexpr(-2 * math.log2(math.e))


def learned_sketch_forward(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Launch the forward kernel: x [N, H, D], up [2, D, E], down [2, E, R], last strides 1 -> [N, H, R]."""
    tokens, heads, _ = x.shape
    out = torch.empty(tokens, heads, down.shape[2], dtype=x.dtype, device=x.device)
    sizes, tiles = sizes_and_tiles("learned_sketch_forward", up, down)
    programs, steps = program_grid(tokens * heads, tiles)
    learned_sketch_forward_kernel[(programs,)](
        **row_arguments(x=x), up=up, down=down, out=out, steps=steps, **sizes, **tiles
    )
    return out


def sizes_and_tiles(kernel: str, up: Tensor, down: Tensor) -> tuple[dict, dict[str, int]]:
    """Return the size arguments of `kernel` and its tiles.

    The number of parameters of one network chooses the tiles; a hidden layer below 64 saves no registers.
    """
    sizes = dict(zip("DER", (*up.shape[1:], down.shape[2]), strict=True))
    D, E, R = map(padded, sizes.values())
    tiles = launch_configs.tiles(kernel, max(E, 64) * (D + R), up.dtype)
    return sizes | {"D_PAD": D, "E_PAD": E, "R_PAD": R, "scale": sizes["R"] ** -0.5}, tiles


def program_grid(rows: int, tiles: dict[str, int]) -> tuple[int, int]:
    """Return the number of programs, at most tiles["PROGRAMS"], which is removed, and the steps of each.

    PROGRAMS is what all SMs hold at once, so long sequences need no more partial sums than short ones. Both numbers
    depend on the number of rows alone: the results have the same bits each time.
    """
    all_steps = triton.cdiv(rows, tiles["BT"])
    steps = max(1, triton.cdiv(all_steps, tiles.pop("PROGRAMS")))
    return triton.cdiv(all_steps, steps), steps


def row_arguments(**tensors: Tensor) -> dict:
    """Return the kernel arguments for tensors [N, H, ·]: themselves, their strides, and the numbers of rows and heads.

    Where one stride leads from every row to the next, all rows count as rows of one head, which needs no division.
    """
    tokens, heads = next(iter(tensors.values())).shape[:2]
    even = all(x.stride(0) == heads * x.stride(1) for x in tensors.values())
    strides = {f"{name}_strides": (x.stride(1), 0) if even else x.stride()[:2] for name, x in tensors.items()}
    return tensors | strides | {"rows": tokens * heads, "heads": 1 if even else heads}


@triton.jit(do_not_specialize=["rows", "steps"], do_not_specialize_on_alignment=["heads"])
def learned_sketch_forward_kernel(
    x,
    x_strides,  # [N, H, D]
    up,  # [2, D, E]
    down,  # [2, E, R]
    out,  # [N, H, R]
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
    BT: tl.constexpr,
):
    up_1, down_1 = load_network(up, down, 0, D, D_PAD, E, E_PAD, R, R_PAD)
    up_2, down_2 = load_network(up, down, 1, D, D_PAD, E, E_PAD, R, R_PAD)
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * BT + tl.arange(0, BT)
        x_rows = load_rows(x, row_offsets(row, heads, x_strides), 1, row < rows, D, D_PAD)  # [BT, D]
        z_1 = apply_network(x_rows, up_1, down_1)
        z_2 = apply_network(x_rows, up_2, down_2)
        store_rows(out, row, R, row < rows, 2.0 * sigmoid_2x(scale * z_1 * z_2) - 1.0, R, R_PAD)


@triton.jit
def load_network(
    up,
    down,
    network,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
):
    """Load the matrices of one network, [D_PAD, E_PAD] and [E_PAD, R_PAD], 0 beyond D, E and R."""
    i, j = tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    up_rows = load_rows(up + network * (D * E), i, E, i < D, E, E_PAD)
    return up_rows, load_rows(down + network * (E * R), j, R, j < E, R, R_PAD)


@triton.jit
def apply_network(x_rows, up, down):
    """Compute z [BT, R] of one network."""
    g = gelu(tl.dot(x_rows, up, input_precision="ieee"))  # [BT, E]
    return tl.dot(g.to(x_rows.dtype), down, input_precision="ieee")


@triton.jit
def row_offsets(row, heads, strides):
    """Compute the offsets of rows [BT], counted over N · H, in a tensor with these strides."""
    return (row // heads).to(tl.int64) * strides[0] + (row % heads).to(tl.int64) * strides[1]


@triton.jit
def sigmoid_2x(y):
    """Compute σ(2y) = (1 + tanh(y)) / 2. The square of rsqrt is cheaper than a division."""
    root = tl.rsqrt(1.0 + tl.exp2(y * MINUS_TWO_LOG2E))
    return root * root
