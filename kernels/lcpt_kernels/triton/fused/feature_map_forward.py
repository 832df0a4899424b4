"""Feature maps, forward: a program computes φ(x) of rows of one head, with z = x W + b and g = x G in registers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.feature_map_definitions import FEATURE_MAPS
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.common.tensors import flat, padded
from lcpt_kernels.triton.common.tile_io import load_rows, store_rows
from lcpt_kernels.triton.fused.feature_map_formulas import FORMULAS


class MapInputs(NamedTuple):
    """The inputs of one call: a map of the registry by name, x, and the matrices in the form that kernels take."""

    x: Tensor  # [B, T, H, D]
    W: Tensor | None  # [Hw, D, M], any strides
    G: Tensor | None  # [Hw, D, M], the strides of W
    b: Tensor | None  # [Hw, M], contiguous
    name: str  # in FEATURE_MAPS and FORMULAS
    subtract_peak: bool

    @property
    def matrix_width(self) -> int:
        """M, the number of columns of x W; without W that of x."""
        return self.x.shape[3] if self.W is None else self.W.shape[2]

    @property
    def learned(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """W, G and b, None where there is no gradient."""
        return None if FEATURE_MAPS[self.name].fixed else self.W, self.G, self.b

    @property
    def output_width(self) -> int:
        """The number of columns of φ(x)."""
        return FEATURE_MAPS[self.name].halves * self.matrix_width

    def tiles(self, kernel: str) -> dict[str, int]:
        """Return the tile sizes of `kernel`, chosen by the columns of W and G together."""
        columns = self.matrix_width if self.G is None else 2 * self.matrix_width
        return launch_configs.tiles(kernel, max(self.x.shape[3], columns), self.x.dtype)

    def arguments(self) -> dict:
        """Return the arguments that the forward and the backward kernel share."""
        x = flat(self.x)
        W_strides = (0, 0, 0) if self.W is None else self.W.stride()
        D, M = x.shape[2], self.matrix_width
        # A fixed W is fp32 also where x has 16 bits: TF32 represents 16-bit values exactly.
        same_dtype = self.W is None or self.W.dtype == x.dtype
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
            PRECISION="ieee" if same_dtype else "tf32",
            PEAK=self.subtract_peak,
            D=D,
            D_PAD=padded(D),
            M=M,
            M_PAD=padded(M),
            SIZE=self.output_width,
        )


def feature_map_forward(inputs: MapInputs) -> Tensor:
    """Launch the forward kernel -> φ(x) [B, T, H, SIZE] in x's dtype."""
    x = inputs.x
    phi = torch.empty(*x.shape[:3], inputs.output_width, dtype=x.dtype, device=x.device)
    arguments, tiles = inputs.arguments(), inputs.tiles("feature_map_forward")
    grid = triton.cdiv(arguments["rows"], tiles["BT"] * tiles["STEPS"]), x.shape[2]
    feature_map_forward_kernel[grid](**arguments, FORMULA=FORMULAS[inputs.name].forward, phi=phi, **tiles)
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
    FORMULA: tl.constexpr,  # of FORMULAS
    PRECISION: tl.constexpr,
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
    x += head * x_strides[1]
    matrix = head // group * W_stride
    if W is not None:
        w = load_matrix(W + matrix, 0, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)
    if G is not None:
        g_matrix = load_matrix(G + matrix, 0, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)
    if b is not None:
        bias = load_bias(b + head // group * M, M, M_PAD)
    first = piece * STEPS * BT
    for start in range(first, tl.minimum(first + STEPS * BT, rows), BT):
        t = start + tl.arange(0, BT)
        inside = t < rows
        at = t.to(tl.int64) * heads + head
        x_rows = load_rows(x, t, x_strides[0], inside, D, D_PAD)  # [BT, D]
        x_wide = x_rows.to(tl.float32)
        z, g = x_wide, None
        if W is not None:
            z = product(x_rows, w, PRECISION)  # [BT, M]
        if b is not None:
            z += bias
        if G is not None:
            g = product(x_rows, g_matrix, PRECISION)
        if SIZE == 2 * M:
            features, second = FORMULA(z, g, x_wide, PEAK, D, M)
            store_rows(phi + M, at, SIZE, inside, second, M, M_PAD)
        else:
            features = FORMULA(z, g, x_wide, PEAK, D, M)
        store_rows(phi, at, SIZE, inside, features, M, M_PAD)


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
    """Load rows start … start + SIZE of w [HEIGHT, WIDTH], any strides, as [SIZE, PADDED] with zeros around them."""
    i, j = start + tl.arange(0, SIZE)[:, None], tl.arange(0, PADDED)[None, :]
    return tl.load(w + i * ROW + j * COLUMN, mask=(i < HEIGHT) & (j < WIDTH), other=0.0)


@triton.jit
def load_bias(b, M: tl.constexpr, M_PAD: tl.constexpr):
    """Load b [M] as [1, M_PAD] fp32."""
    j = tl.arange(0, M_PAD)[None, :]
    return tl.load(b + j, mask=j < M, other=0.0).to(tl.float32)


@triton.jit
def product(x, w, PRECISION: tl.constexpr):
    return tl.dot(x.to(w.dtype), w, input_precision=PRECISION)
