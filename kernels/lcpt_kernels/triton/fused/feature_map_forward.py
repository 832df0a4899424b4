"""φ(x) of rows of one head: z = x W, and g = x G, in registers; φ written once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tensors import flat, padded
from lcpt_kernels.triton.common.tile_io import load_rows, store_rows
from lcpt_kernels.triton.fused.feature_map_formulas import elu1, favor, hedgehog, oglu, relu, softplus


class FeatureMap(NamedTuple):
    """One of the maps of `feature_map_formulas.py` and what it is of."""

    x: Tensor  # [B, T, H, D]
    W: Tensor | None  # [Hw, D, M], any strides; all but elu1
    G: Tensor | None  # like W; oglu
    b: Tensor | None  # [Hw, M], contiguous; relu
    name: str
    subtract_peak: bool  # favor

    @property
    def width(self) -> int:
        """M, of x W."""
        return self.x.shape[3] if self.W is None else self.W.shape[2]

    @property
    def learned(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """W, G and b, where they have gradients."""
        return None if self.name == "favor" else self.W, self.G, self.b

    @property
    def size(self) -> int:
        """Of φ(x)."""
        return 2 * self.width if self.name == "hedgehog" else self.width

    def tiles(self, kernel: str) -> dict[str, int]:
        """By the columns of both matrices."""
        columns = self.width if self.G is None else 2 * self.width
        return launch_configs.tiles(kernel, max(self.x.shape[3], columns), self.x.dtype)

    def arguments(self) -> dict:
        """Of both kernels."""
        x = flat(self.x)
        W_strides = (0, 0, 0) if self.W is None else self.W.stride()
        D, M = x.shape[2], self.width
        return dict(
            x=x,
            x_strides=x.stride()[:2],
            W=self.W,
            G=self.G,
            b=self.b,
            rows=len(x),
            group=1 if self.W is None else x.shape[1] // len(self.W),
            W_stride=W_strides[0],
            W_ROW=W_strides[1],
            W_COLUMN=W_strides[2],
            MAP=self.name,
            PEAK=self.subtract_peak,
            D=D,
            D_PAD=padded(D),
            M=M,
            M_PAD=padded(M),
            SIZE=self.size,
        )


def feature_map_forward(map: FeatureMap) -> Tensor:
    """-> φ(x) [B, T, H, SIZE] in x's dtype."""
    phi = torch.empty(*map.x.shape[:3], map.size, dtype=map.x.dtype, device=map.x.device)
    arguments, tiles = map.arguments(), map.tiles("feature_map_forward")
    grid = triton.cdiv(arguments["rows"], tiles["BT"] * tiles["STEPS"]), map.x.shape[2]
    feature_map_forward_kernel[grid](**arguments, phi=phi, **tiles)
    return phi


@triton.jit(do_not_specialize=["rows", "group"])
def feature_map_forward_kernel(
    x,
    x_strides,  # [N, H, D]
    W,
    G,  # [Hw, D, M]
    b,  # [Hw, M]
    phi,  # [N, H, SIZE]
    rows,
    group,
    W_stride,
    W_ROW: tl.constexpr,
    W_COLUMN: tl.constexpr,
    MAP: tl.constexpr,
    PEAK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
    M_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    BT: tl.constexpr,
    STEPS: tl.constexpr,
):
    piece, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    # Favor's W is fp32 also where x is of 16 bits, which are exact in TF32.
    PRECISION: tl.constexpr = "tf32" if MAP == "favor" and x.dtype.element_ty != tl.float32 else "ieee"
    x += head * x_strides[1]
    matrix = head // group * W_stride
    if MAP != "elu1":
        w = load_matrix(W + matrix, 0, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)
    if MAP == "oglu":
        g_matrix = load_matrix(G + matrix, 0, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)
    if MAP == "relu":
        bias = load_bias(b + head // group * M, M, M_PAD)
    first = piece * STEPS * BT
    for start in range(first, tl.minimum(first + STEPS * BT, rows), BT):
        t = start + tl.arange(0, BT)
        inside = t < rows
        at = t.to(tl.int64) * heads + head
        x_rows = load_rows(x, t, x_strides[0], inside, D, D_PAD)  # [BT, D]
        if MAP == "elu1":
            values = elu1(x_rows.to(tl.float32))
        else:
            z = product(x_rows, w, PRECISION)  # [BT, M]
            if MAP == "relu":
                values = relu(z, bias)
            elif MAP == "favor":
                values = favor(z, x_rows.to(tl.float32), PEAK, D, M)
            elif MAP == "hedgehog":
                values, second = hedgehog(z, M)
                store_rows(phi + M, at, SIZE, inside, second, M, M_PAD)
            elif MAP == "softplus":
                values = softplus(z)
            else:
                values = oglu(z, product(x_rows, g_matrix, PRECISION))
        store_rows(phi, at, SIZE, inside, values, M, M_PAD)


@triton.jit
def load_matrix(
    w,
    start,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rows start … start + SIZE of w [HEIGHT, WIDTH], of any strides, as [SIZE, PADDED] with zeros around them."""
    i, j = start + tl.arange(0, SIZE)[:, None], tl.arange(0, PADDED)[None, :]
    return tl.load(w + i * ROW + j * COLUMN, mask=(i < HEIGHT) & (j < WIDTH), other=0.0)


@triton.jit
def load_bias(b, M: tl.constexpr, M_PAD: tl.constexpr):
    """[1, M] fp32."""
    j = tl.arange(0, M_PAD)[None, :]
    return tl.load(b + j, mask=j < M, other=0.0).to(tl.float32)


@triton.jit
def product(x, w, PRECISION: tl.constexpr):
    return tl.dot(x.to(w.dtype), w, input_precision=PRECISION)
