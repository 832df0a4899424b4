"""Low-rank attention in Triton: a query sees an interval of the tokens and an interval of the summaries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcpt_kernels.triton.interval.autograd import interval_attention
from lcpt_kernels.triton.interval.intervals import SortedIntervals


def lowrank_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_far: Tensor,
    k_summary: Tensor,
    v_summary: Tensor,
    *,
    summaries: int,
    scale: float,
    block_size: int,
    local_blocks: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return o [B, T, H, Dv] for the arguments of the public function, in fp32, bf16 or fp16."""
    span, device = k.shape[1], q.device
    t = torch.arange(span - q.shape[1], span, device=device)
    if cu_seqlens is None:
        start, summary_start = torch.zeros_like(t), torch.zeros_like(t)
        before = k_summary.shape[1] // summaries - span // block_size  # blocks before the first key
    else:
        ends, before = cu_seqlens.to(device).long(), 0
        document = torch.searchsorted(ends, t, right=True) - 1
        whole = ends.diff() // block_size
        start, summary_start = ends[document], ((whole.cumsum(0) - whole) * summaries)[document]
    block = (t - start) // block_size - local_blocks + 1  # the first local block
    local = unsorted_intervals(span, start + block.clamp(min=0) * block_size, t + 1)
    state = unsorted_intervals(
        k_summary.shape[1], summary_start, summary_start + (before + block).clamp(min=0) * summaries
    )
    mass = math.log(block_size / summaries)
    return interval_attention([(q, k, v, local), (q_far, k_summary, v_summary, state)], scale, [0.0, mass])


def unsorted_intervals(span: int, first: Tensor, last: Tensor) -> SortedIntervals:
    """Return intervals first ≤ j < last, [T] each, of `span` keys in their own order, the same for all heads."""
    queries, keys = (torch.arange(n, dtype=torch.int32, device=first.device)[None] for n in (len(first), span))
    return SortedIntervals(queries, keys, first.int()[None], last.int()[None])
