"""S(x) = tanh(z₁ ∘ z₂ / √r), z = GELU(x U) D for each of two networks, on rows: the heads of all tokens.

A program walks BT rows at a time, with the matrices in shared memory; hidden layers exist in registers only.
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
    """x [N, H, D], up [2, D, E], down [2, E, R], last strides 1 -> [N, H, R]."""
    tokens, heads, _ = x.shape
    out = torch.empty(tokens, heads, down.shape[2], dtype=x.dtype, device=x.device)
    sizes, tiles = sizes_and_tiles("learned_sketch_forward", up, down)
    programs, steps = shares(tokens * heads, tiles)
    learned_sketch_forward_kernel[(programs,)](**of_rows(x=x), up=up, down=down, out=out, steps=steps, **sizes, **tiles)
    return out


def sizes_and_tiles(kernel: str, up: Tensor, down: Tensor) -> tuple[dict, dict[str, int]]:
    """What `kernel` is given of the matrices' shapes; and its tiles, which the numbers of one network decide on: a
    hidden layer below 64 saves no registers."""
    sizes = dict(zip("DER", (*up.shape[1:], down.shape[2]), strict=True))
    D, E, R = map(padded, sizes.values())
    tiles = launch_configs.tiles(kernel, max(E, 64) * (D + R), up.dtype)
    return sizes | {"D_PAD": D, "E_PAD": E, "R_PAD": R, "scale": sizes["R"] ** -0.5}, tiles


def shares(rows: int, tiles: dict[str, int]) -> tuple[int, int]:
    """Programs, at most tiles["PROGRAMS"], which is taken out, and the steps of each: what all SMs hold at once takes
    long rows through as few sums as short ones. By the number of rows alone: the same bits each time."""
    all_steps = triton.cdiv(rows, tiles["BT"])
    steps = max(1, triton.cdiv(all_steps, tiles.pop("PROGRAMS")))
    return triton.cdiv(all_steps, steps), steps


def of_rows(**tensors: Tensor) -> dict:
    """Tensors [N, H, ·] with their strides, and how many rows there are of how many heads. Where heads stand as evenly
    as tokens do, all rows are of one: no division finds them."""
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
        x_rows = load_rows(x, place_of(row, heads, x_strides), 1, row < rows, D, D_PAD)  # [BT, D]
        z_1 = through(x_rows, up_1, down_1)
        z_2 = through(x_rows, up_2, down_2)
        store_rows(out, row, R, row < rows, 2.0 * sigmoid_of_twice(scale * z_1 * z_2) - 1.0, R, R_PAD)


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
    """-> its matrices [D_PAD, E_PAD] and [E_PAD, R_PAD], 0 beyond D, E and R."""
    i, j = tl.arange(0, D_PAD), tl.arange(0, E_PAD)
    up_rows = load_rows(up + network * (D * E), i, E, i < D, E, E_PAD)
    return up_rows, load_rows(down + network * (E * R), j, R, j < E, R, R_PAD)


@triton.jit
def through(x_rows, up, down):
    """z [BT, R] of one network."""
    g = gelu(tl.dot(x_rows, up, input_precision="ieee"))  # [BT, E]
    return tl.dot(g.to(x_rows.dtype), down, input_precision="ieee")


@triton.jit
def place_of(row, heads, strides):
    """Where row [BT] of N · H stands in a tensor of these strides."""
    return (row // heads).to(tl.int64) * strides[0] + (row % heads).to(tl.int64) * strides[1]


@triton.jit
def sigmoid_of_twice(y):
    """σ(2y) = (1 + tanh(y)) / 2, which needs no library; 1 / √ squared is cheaper than 1 /."""
    root = tl.rsqrt(1.0 + tl.exp2(y * MINUS_TWO_LOG2E))
    return root * root
