"""Feature maps, backward: the gradients of x, row by row, and of the matrices, as sums over rows:

    dx = dz Wᵀ + dg Gᵀ        dW = Σ_t x_tᵀ dz_t        dG = Σ_t x_tᵀ dg_t        db = Σ_t dz_t

A program recomputes z for STEPS tiles of one head. It computes DT columns of dx and DT rows of dW, so that its sums
stay in registers. PyTorch then adds the sums of all programs of a key-value head, in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tensors import flat
from lcpt_kernels.triton.common.tile_io import load_columns, load_rows, store_columns, store_rows
from lcpt_kernels.triton.fused.feature_map_formulas import FORMULAS
from lcpt_kernels.triton.fused.feature_map_forward import MapInputs, load_bias, load_matrix, product


def feature_map_backward(inputs: MapInputs, dphi: Tensor) -> list[Tensor | None]:
    """Launch the backward kernel.

    dphi [B, T, H, SIZE], any strides -> [dx, dW, dG, db], each like its input; None where there is no gradient.
    """
    x, formulas = inputs.x, FORMULAS[inputs.name]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = inputs.tiles("feature_map_backward_linear" if formulas.linear else "feature_map_backward")
    arguments, dphi = inputs.arguments(), flat(dphi)
    D_PAD, heads = arguments["D_PAD"], x.shape[2]
    tiles["DT"] = min(tiles["DT"], D_PAD)
    if inputs.learned[0] is None:  # no sum of dW occupies registers: all of x's columns fit, and programs can be short
        tiles |= {"STEPS": min(tiles["STEPS"], 16), "DT": D_PAD}
    pieces = triton.cdiv(arguments["rows"], tiles["BT"] * tiles["STEPS"])
    sums = [
        None if w is None else torch.empty(pieces, heads, *w.shape[1:], dtype=torch.float32, device=dx.device)
        for w in inputs.learned
    ]
    dW, dG, db = sums
    feature_map_backward_kernel[pieces, heads, D_PAD // tiles["DT"]](
        **arguments,
        FORMULA=formulas.backward,
        READS_X=formulas.reads_x,
        dphi=dphi,
        dphi_strides=dphi.stride()[:2],
        dx=dx,
        dW=dW,
        dG=dG,
        db=db,
        **tiles,
    )
    return [
        dx,
        *(
            None if w is None or dw is None else dw.unflatten(1, (len(w), -1)).sum((0, 2)).to(w.dtype)
            for w, dw in zip(inputs.learned, sums, strict=True)
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
    FORMULA: tl.constexpr,  # of FORMULAS
    READS_X: tl.constexpr,
    PRECISION: tl.constexpr,
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
    x += head * x_strides[1]
    dphi += head * dphi_strides[1]
    matrix = head // group * W_stride
    if W is not None:
        w = load_matrix(W + matrix, 0, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)  # [D, M]
        w_part = w if DT == D_PAD else load_matrix(W + matrix, part, W_ROW, W_COLUMN, D, DT, M, M_PAD)  # [DT, M]
    if dW is not None:
        dw_sum = tl.zeros((DT, M_PAD), tl.float32)
    if G is not None:
        g_matrix = load_matrix(G + matrix, 0, W_ROW, W_COLUMN, D, D_PAD, M, M_PAD)
        g_part = g_matrix if DT == D_PAD else load_matrix(G + matrix, part, W_ROW, W_COLUMN, D, DT, M, M_PAD)
        dg_sum = tl.zeros((DT, M_PAD), tl.float32)
    if b is not None:
        bias = load_bias(b + head // group * M, M, M_PAD)
        db_sum = tl.zeros((M_PAD,), tl.float32)
    first = piece * STEPS * BT
    for start in range(first, tl.minimum(first + STEPS * BT, rows), BT):
        t = start + tl.arange(0, BT)
        inside = t < rows
        x_rows = load_rows(x, t, x_strides[0], inside, D, D_PAD)  # [BT, D]
        x_part = x_rows if DT == D_PAD else load_columns(x, t, x_strides[0], inside, part, D, DT)  # [BT, DT]
        d = load_rows(dphi, t, dphi_strides[0], inside, M, M_PAD).to(tl.float32)  # [BT, M]
        x_wide = x_rows.to(tl.float32)
        z, g, d_second = x_wide, None, None
        if W is not None:
            z = product(x_rows, w, PRECISION)  # [BT, M]
        if b is not None:
            z += bias
        if G is not None:
            g = product(x_rows, g_matrix, PRECISION)
        if SIZE == 2 * M:
            d_second = load_rows(dphi + M, t, dphi_strides[0], inside, M, M_PAD).to(tl.float32)
        if G is not None:
            dz, dg = FORMULA(d, d_second, z, g, x_wide, PEAK, D, M)
        elif READS_X:
            dz, x_factor = FORMULA(d, d_second, z, g, x_wide, PEAK, D, M)
        else:
            dz = FORMULA(d, d_second, z, g, x_wide, PEAK, D, M)
        if b is not None:
            db_sum += tl.sum(dz, axis=0)
        dx_part = dz
        if W is not None:
            dx_part = product(dz, tl.trans(w_part), PRECISION)  # [BT, M] @ [M, DT]
        if READS_X:
            dx_part += x_part.to(tl.float32) * x_factor
        if dW is not None:
            dw_sum = tl.dot(tl.trans(x_part), dz.to(x_part.dtype), dw_sum, input_precision="ieee")
        if G is not None:
            dx_part = tl.dot(dg.to(g_part.dtype), tl.trans(g_part), dx_part, input_precision="ieee")
            dg_sum = tl.dot(tl.trans(x_part), dg.to(x_part.dtype), dg_sum, input_precision="ieee")
        store_columns(dx, t.to(tl.int64) * heads + head, D, inside, dx_part, part, D, DT)
    place = piece.to(tl.int64) * heads + head
    i, j = part + tl.arange(0, DT), tl.arange(0, M_PAD)
    if dW is not None:
        store_rows(dW + place * (D * M), i, M, i < D, dw_sum, M, M_PAD)
    if G is not None:
        store_rows(dG + place * (D * M), i, M, i < D, dg_sum, M, M_PAD)
    if b is not None:
        tl.store(db + place * M + j, db_sum, mask=(j < M) & (part == 0))
