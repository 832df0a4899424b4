"""The gradients of x, row by row, and of the matrices, as sums over the rows of a program:

    dx = dz Wᵀ + dg Gᵀ        dW = Σ_t x_tᵀ dz_t        dG = Σ_t x_tᵀ dg_t        db = Σ_t dz_t

with z made again. A program walks through STEPS tiles of one head; the sums of all programs of a key-value head's
queries are added up afterwards, in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.feature_map_formulas import (
    elu1_backward,
    favor_backward,
    hedgehog_backward,
    oglu_backward,
    relu_backward,
    softplus_backward,
)
from lcpt_kernels.triton.feature_map_forward import FeatureMap, load_bias, load_matrix, product
from lcpt_kernels.triton.tensors import flat
from lcpt_kernels.triton.tiles import load_rows, store_rows


def feature_map_backward(map: FeatureMap, dphi: Tensor) -> list[Tensor | None]:
    """dphi [B, T, H, SIZE], any strides -> dx [B, T, H, D], and dW, dG, db where there are W to learn, G, b."""
    dx = torch.empty(map.x.shape, dtype=map.x.dtype, device=map.x.device)
    arguments, tiles, dphi = map.arguments(), map.tiles("feature_map_backward"), flat(dphi)
    pieces, heads = triton.cdiv(arguments["rows"], tiles["BT"] * tiles["STEPS"]), map.x.shape[2]
    sums = [
        None if w is None else torch.empty(pieces, heads, *w.shape[1:], dtype=torch.float32, device=dx.device)
        for w in map.learned]
    dW, dG, db = sums
    feature_map_backward_kernel[(pieces, heads)](
        **arguments, dphi=dphi, dphi_strides=dphi.stride()[:2], dx=dx, dW=dW, dG=dG, db=db, **tiles)
    return [dx, *(
        None if w is None else dw.unflatten(1, (len(w), -1)).sum((0, 2)).to(w.dtype)
        for w, dw in zip(map.learned, sums, strict=True))]


@triton.jit(do_not_specialize=["rows", "group"])
def feature_map_backward_kernel(
    x, x_strides,  # [N, H, D]
    W, G,  # [Hw, D, M]
    b,  # [Hw, M]
    dphi, dphi_strides,  # [N, H, SIZE]
    dx,  # [N, H, D]
    dW, dG,  # [pieces, H, D, M]
    db,  # [pieces, H, M]
    rows, group, W_stride, W_ROW: tl.constexpr, W_COLUMN: tl.constexpr, MAP: tl.constexpr, PEAK: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr,
    STEPS: tl.constexpr,
):
    PRECISION: tl.constexpr = "tf32" if MAP == "favor" and x.dtype.element_ty != tl.float32 else "ieee"
    LEARNED: tl.constexpr = MAP != "elu1" and MAP != "favor"
    piece, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    x += head * x_strides[1]
    dphi += head * dphi_strides[1]
    if MAP != "elu1":
        matrix = head // group * W_stride
        w = load_matrix(W + matrix, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)
        w_columns = tl.trans(w)
    if LEARNED:
        dw_sum = tl.zeros((D_PAD, M_PAD), tl.float32)
    if MAP == "oglu":
        g_matrix = load_matrix(G + matrix, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)
        g_columns = tl.trans(g_matrix)
        dg_sum = tl.zeros((D_PAD, M_PAD), tl.float32)
    if MAP == "relu":
        bias = load_bias(b + head // group * M, M, M_PAD)
        db_sum = tl.zeros((M_PAD,), tl.float32)
    first = piece * STEPS * BT
    for start in range(first, tl.minimum(first + STEPS * BT, rows), BT):
        t = start + tl.arange(0, BT)
        inside = t < rows
        x_rows = load_rows(x, t, x_strides[0], inside, D, D_PAD)  # [BT, D]
        d = load_rows(dphi, t, dphi_strides[0], inside, M, M_PAD).to(tl.float32)  # [BT, M]
        if MAP == "elu1":
            dx_rows = elu1_backward(x_rows.to(tl.float32), d)
        else:
            z = product(x_rows, w, PRECISION)  # [BT, M]
            if MAP == "relu":
                dz = relu_backward(z, bias, d)
                db_sum += tl.sum(dz, axis=0)
            elif MAP == "favor":
                dz, dx_beside = favor_backward(z, x_rows.to(tl.float32), d, PEAK, D, M)
            elif MAP == "hedgehog":
                d_second = load_rows(dphi + M, t, dphi_strides[0], inside, M, M_PAD).to(tl.float32)
                dz = hedgehog_backward(z, d, d_second, M)
            elif MAP == "softplus":
                dz = softplus_backward(z, d)
            else:
                dz, dg = oglu_backward(z, product(x_rows, g_matrix, PRECISION), d)
            dx_rows = product(dz, w_columns, PRECISION)  # [BT, M] @ [M, D]
            if MAP == "favor":
                dx_rows += dx_beside
            if LEARNED:
                x_columns = tl.trans(x_rows)  # [D, BT]
                dw_sum = tl.dot(x_columns, dz.to(x_columns.dtype), dw_sum, input_precision="ieee")
            if MAP == "oglu":
                dx_rows = tl.dot(dg.to(g_columns.dtype), g_columns, dx_rows, input_precision="ieee")
                dg_sum = tl.dot(x_columns, dg.to(x_columns.dtype), dg_sum, input_precision="ieee")
        store_rows(dx, t.to(tl.int64) * heads + head, D, inside, dx_rows, D, D_PAD)
    place = piece.to(tl.int64) * heads + head
    i, j = tl.arange(0, D_PAD), tl.arange(0, M_PAD)
    if LEARNED:
        store_rows(dW + place * (D * M), i, M, i < D, dw_sum, M, M_PAD)
    if MAP == "oglu":
        store_rows(dG + place * (D * M), i, M, i < D, dg_sum, M, M_PAD)
    if MAP == "relu":
        tl.store(db + place * M + j, db_sum, mask=j < M)


@triton.jit
def load_columns_of(x, rows, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """x[rows] transposed, [PADDED, n]: by its pointers, so that no product needs a transposed operand."""
    columns = tl.arange(0, PADDED)
    mask = inside[None, :]
    if PADDED != WIDTH:
        mask = mask & (columns < WIDTH)[:, None]
    return tl.load(x + rows.to(tl.int64)[None, :] * stride + columns[:, None], mask=mask, other=0.0)
