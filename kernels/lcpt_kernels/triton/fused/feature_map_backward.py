"""The gradients of x, row by row, and of the matrices, as sums over the rows of a program:

    dx = dz Wᵀ + dg Gᵀ        dW = Σ_t x_tᵀ dz_t        dG = Σ_t x_tᵀ dg_t        db = Σ_t dz_t

with z made again. A program walks through STEPS tiles of one head and makes DT columns of dx and rows of dW, so that
its sums stay in registers; those of all programs of a key-value head's queries are added up afterwards, in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tensors import flat
from lcpt_kernels.triton.common.tile_io import load_columns, load_rows, store_columns, store_rows
from lcpt_kernels.triton.fused.feature_map_formulas import (
    elu1_backward,
    favor_backward,
    hedgehog_backward,
    oglu_backward,
    relu_backward,
    softplus_backward,
)
from lcpt_kernels.triton.fused.feature_map_forward import FeatureMap, load_bias, load_matrix, product


def feature_map_backward(map: FeatureMap, dphi: Tensor) -> list[Tensor | None]:
    """dphi [B, T, H, SIZE], any strides -> dx [B, T, H, D], and the gradients of what map has `learned`, or None."""
    dx = torch.empty(map.x.shape, dtype=map.x.dtype, device=map.x.device)
    arguments, tiles, dphi = map.arguments(), map.tiles("feature_map_backward"), flat(dphi)
    D_PAD, heads = arguments["D_PAD"], map.x.shape[2]
    tiles["DT"] = min(tiles["DT"], D_PAD)
    if map.learned[0] is None:  # no sums, which would want few long programs, and room
        tiles |= {"STEPS": min(tiles["STEPS"], 16), "DT": D_PAD}
    pieces = triton.cdiv(arguments["rows"], tiles["BT"] * tiles["STEPS"])
    sums = [
        None if w is None else torch.empty(pieces, heads, *w.shape[1:], dtype=torch.float32, device=dx.device)
        for w in map.learned
    ]
    dW, dG, db = sums
    feature_map_backward_kernel[pieces, heads, D_PAD // tiles["DT"]](
        **arguments, dphi=dphi, dphi_strides=dphi.stride()[:2], dx=dx, dW=dW, dG=dG, db=db, **tiles
    )
    return [
        dx,
        *(
            None if w is None else dw.unflatten(1, (len(w), -1)).sum((0, 2)).to(w.dtype)
            for w, dw in zip(map.learned, sums, strict=True)
        ),
    ]


@triton.jit(do_not_specialize=["rows", "group"])
def feature_map_backward_kernel(
    x,
    x_strides,  # [N, H, D]
    W,
    G,  # [Hw, D, M]
    b,  # [Hw, M]
    dphi,
    dphi_strides,  # [N, H, SIZE]
    dx,  # [N, H, D]
    dW,
    dG,  # [pieces, H, D, M]
    db,  # [pieces, H, M]
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
    DT: tl.constexpr,
):
    piece, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    part = tl.program_id(2) * DT
    PRECISION: tl.constexpr = "tf32" if MAP == "favor" and x.dtype.element_ty != tl.float32 else "ieee"
    LEARNED: tl.constexpr = MAP != "elu1" and MAP != "favor"
    x += head * x_strides[1]
    dphi += head * dphi_strides[1]
    matrix = head // group * W_stride
    if MAP != "elu1":
        w = load_matrix(W + matrix, 0, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)  # [D, M]
        w_part = w if DT == D_PAD else load_matrix(W + matrix, part, W_ROW, W_COLUMN, D, DT, M, M_PAD)  # [DT, M]
    if LEARNED:
        dw_sum = tl.zeros((DT, M_PAD), tl.float32)
    if MAP == "oglu":
        g_matrix = load_matrix(G + matrix, 0, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)
        g_part = g_matrix if DT == D_PAD else load_matrix(G + matrix, part, W_ROW, W_COLUMN, D, DT, M, M_PAD)
        dg_sum = tl.zeros((DT, M_PAD), tl.float32)
    if MAP == "relu":
        bias = load_bias(b + head // group * M, M, M_PAD)
        db_sum = tl.zeros((M_PAD,), tl.float32)
    first = piece * STEPS * BT
    for start in range(first, tl.minimum(first + STEPS * BT, rows), BT):
        t = start + tl.arange(0, BT)
        inside = t < rows
        x_rows = load_rows(x, t, x_strides[0], inside, D, D_PAD)  # [BT, D]
        x_part = x_rows if DT == D_PAD else load_columns(x, t, x_strides[0], inside, part, D, DT)  # [BT, DT]
        d = load_rows(dphi, t, dphi_strides[0], inside, M, M_PAD).to(tl.float32)  # [BT, M]
        if MAP == "elu1":
            dx_part = elu1_backward(x_rows.to(tl.float32), d)
        else:
            z = product(x_rows, w, PRECISION)  # [BT, M]
            if MAP == "relu":
                dz = relu_backward(z, bias, d)
                db_sum += tl.sum(dz, axis=0)
            elif MAP == "favor":
                dz, factor = favor_backward(z, x_rows.to(tl.float32), d, PEAK, D, M)
            elif MAP == "hedgehog":
                d_second = load_rows(dphi + M, t, dphi_strides[0], inside, M, M_PAD).to(tl.float32)
                dz = hedgehog_backward(z, d, d_second, M)
            elif MAP == "softplus":
                dz = softplus_backward(z, d)
            else:
                dz, dg = oglu_backward(z, product(x_rows, g_matrix, PRECISION), d)
            dx_part = product(dz, tl.trans(w_part), PRECISION)  # [BT, M] @ [M, DT]
            if MAP == "favor":
                dx_part += x_part.to(tl.float32) * factor
            if LEARNED:
                dw_sum = tl.dot(tl.trans(x_part), dz.to(x_part.dtype), dw_sum, input_precision="ieee")
            if MAP == "oglu":
                dx_part = tl.dot(dg.to(g_part.dtype), tl.trans(g_part), dx_part, input_precision="ieee")
                dg_sum = tl.dot(tl.trans(x_part), dg.to(x_part.dtype), dg_sum, input_precision="ieee")
        store_columns(dx, t.to(tl.int64) * heads + head, D, inside, dx_part, part, D, DT)
    place = piece.to(tl.int64) * heads + head
    i, j = part + tl.arange(0, DT), tl.arange(0, M_PAD)
    if LEARNED:
        store_rows(dW + place * (D * M), i, M, i < D, dw_sum, M, M_PAD)
    if MAP == "oglu":
        store_rows(dG + place * (D * M), i, M, i < D, dg_sum, M, M_PAD)
    if MAP == "relu":
        tl.store(db + place * M + j, db_sum, mask=(j < M) & (part == 0))
