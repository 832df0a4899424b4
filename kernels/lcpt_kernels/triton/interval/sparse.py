"""Sparse attention in Triton: visible ranges become intervals of sorted lists, which the interval kernels take."""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels.triton.interval.autograd import interval_attention
from lcpt_kernels.triton.interval.build_intervals import build_intervals
from lcpt_kernels.visibility import VisibleRange


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, ranges: list[VisibleRange], scale: float) -> Tensor:
    """Return o [B, T, H, Dv] of one softmax over the keys of all ranges, which do not overlap. q [B, T, H, D],
    k [B, P + T, Hkv, D] and v [B, P + T, Hkv, Dv] are fp32, bf16 or fp16."""
    return interval_attention([(q, k, v, build_intervals(visible, span=k.shape[1])) for visible in ranges], scale)
