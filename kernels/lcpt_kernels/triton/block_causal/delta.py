"""δ = −do·o of every row. The gradient of [numerator, denominator] is [do, δ] / l. Kernels multiply by 1 / l in fp32:
do / l in bf16 would not be exact. 1 / l is computed here, once for all kernels that loop over queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tile_io import head_rows, load_rows


def backward_delta(do: Tensor, o: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """Return δ and 1 / denominator, both [B, H, T] fp32 as denominator is. do is [B, T, H, Dv], its last stride 1; o is
    [B, T, H, Dv], contiguous."""
    batch, tokens, heads, width = o.shape
    delta, reciprocal = torch.empty_like(denominator), torch.empty_like(denominator)
    BM = 64
    pieces = triton.cdiv(tokens, BM)
    backward_delta_kernel[(pieces * batch, heads)](
        do,
        do.stride()[:3],
        o,
        denominator,
        delta,
        reciprocal,
        tokens,
        pieces,
        DV=width,
        DV_PAD=triton.next_power_of_2(width),
        BM=BM,
        num_warps=4,
    )
    return delta, reciprocal


@triton.jit(do_not_specialize=["tokens", "pieces"])
def backward_delta_kernel(
    do,
    do_strides,  # [B, T, H, DV]
    o,  # [B, T, H, DV]
    denominator,  # [B, H, T]
    delta,
    reciprocal,  # [B, H, T]
    tokens,
    pieces,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BM: tl.constexpr,
):
    batch, head, heads = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    t = tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = t < tokens
    row = (batch * tokens + t) * heads + head
    do_rows = load_rows(head_rows(do, do_strides, batch, head), t, do_strides[1], inside, DV, DV_PAD)  # [BM, DV]
    o_rows = load_rows(o, row, DV, inside, DV, DV_PAD)
    delta_rows = -tl.sum(do_rows.to(tl.float32) * o_rows.to(tl.float32), axis=1)
    place = (batch * heads + head) * tokens + t
    l_rows = tl.load(denominator + place, mask=inside, other=1.0)
    tl.store(delta + place, delta_rows, mask=inside)
    tl.store(reciprocal + place, 1.0 / l_rows, mask=inside)
