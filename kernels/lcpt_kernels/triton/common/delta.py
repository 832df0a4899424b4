"""δ = −do·o of every row. The gradient of [numerator, denominator] is [do, δ] / l. Kernels multiply by 1 / l in fp32:
do / l in bf16 would not be exact. 1 / l is computed here, once for all kernels that loop over queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tile_io import load_rows


def backward_delta(do: Tensor, o: Tensor, denominator: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return δ [B, T, H] fp32 of do [B, T, H, Dv], whose last stride is 1, and o [B, T, H, Dv], contiguous; and
    1 / denominator [B, T, H] fp32, None without one."""
    delta = torch.empty(o.shape[:3], dtype=torch.float32, device=o.device)
    reciprocal = None if denominator is None else torch.empty_like(denominator)
    width, rows, BM = o.shape[3], o.shape[1] * o.shape[2], 64
    pieces = triton.cdiv(rows, BM)
    backward_delta_kernel[(pieces * o.shape[0],)](
        do,
        do.stride()[:3],
        o,
        denominator,
        delta,
        reciprocal,
        rows,
        o.shape[2],
        pieces,
        DV=width,
        DV_PAD=triton.next_power_of_2(width),
        RECIPROCAL=denominator is not None,
        BM=BM,
        num_warps=4,
    )
    return delta, reciprocal


@triton.jit(do_not_specialize=["rows", "heads", "pieces"])
def backward_delta_kernel(
    do,
    do_strides,  # [B, T, H, DV]
    o,  # [B, T, H, DV]
    denominator,
    delta,
    reciprocal,  # [B, T, H]
    rows,
    heads,
    pieces,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    BM: tl.constexpr,
):
    batch = (tl.program_id(0) // pieces).to(tl.int64)
    row = tl.program_id(0) % pieces * BM + tl.arange(0, BM)  # of T · H
    inside = row < rows
    place = (row // heads).to(tl.int64) * do_strides[1] + (row % heads).to(tl.int64) * do_strides[2]
    do_rows = load_rows(do + batch * do_strides[0], place, 1, inside, DV, DV_PAD).to(tl.float32)  # [BM, DV]
    o_rows = load_rows(o, batch * rows + row, DV, inside, DV, DV_PAD).to(tl.float32)
    tl.store(delta + batch * rows + row, -tl.sum(do_rows * o_rows, axis=1), mask=inside)
    if RECIPROCAL:
        l_rows = tl.load(denominator + batch * rows + row, mask=inside, other=1.0)
        tl.store(reciprocal + batch * rows + row, 1.0 / l_rows, mask=inside)
