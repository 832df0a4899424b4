"""What backward needs of every query, in the order of the list, so that the loop over queries reads it side by side:
lse to the base 2, and δ = −do·o."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tile_io import head_rows, load_rows
from lcpt_kernels.triton.interval.intervals import LOG2E, Part, packed


def query_statistics(part: Part, do: Tensor, o: Tensor, lse: Tensor, log_mass: float) -> Tensor:
    """Return (lse − log_mass) / ln 2 and δ in fp32, packed as int64 [B·H, T], in the order of the part's queries.
    do [B, T, H, Dv] has a last stride of 1, o [B, T, H, Dv] and lse [B, T, H] fp32 are contiguous."""
    batch, tokens, heads, width = o.shape
    statistics = torch.empty(batch * heads, tokens, dtype=torch.int64, device=o.device)
    BM = 64
    pieces = triton.cdiv(tokens, BM)
    query_statistics_kernel[(pieces * batch * heads,)](
        **part.arguments(query_statistics_kernel),
        do=do,
        do_strides=do.stride()[:3],
        o=o,
        lse=lse,
        statistics=statistics,
        pieces=pieces,
        log_mass=float(log_mass),
        BM=BM,
        num_warps=4,
    )
    return statistics


@triton.jit(do_not_specialize=["own_stride", "tokens", "heads", "pieces"])
def query_statistics_kernel(
    own,
    own_stride,  # [N, T]: the list of queries
    do,
    do_strides,  # [B, T, H, DV]
    o,  # [B, T, H, DV]
    lse,  # [B, T, H]
    statistics,  # [B·H, T], in the order of the list
    tokens,
    heads,
    pieces,
    log_mass,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BM: tl.constexpr,
):
    n = (tl.program_id(0) // pieces).to(tl.int64)
    batch, head = n // heads, n % heads
    i = tl.program_id(0) % pieces * BM + tl.arange(0, BM)
    inside = i < tokens
    t = tl.load(own + n * own_stride + i, mask=inside, other=0)
    row = (batch * tokens + t) * heads + head
    do_rows = load_rows(head_rows(do, do_strides, batch, head), t, do_strides[1], inside, DV, DV_PAD).to(tl.float32)
    o_rows = load_rows(o, row, DV, inside, DV, DV_PAD).to(tl.float32)  # [BM, DV]
    lse_rows = tl.load(lse + row, mask=inside, other=0.0)
    delta = -tl.sum(do_rows * o_rows, axis=1)
    tl.store(statistics + n * tokens + i, packed((lse_rows - log_mass) * LOG2E, delta), mask=inside)
