"""Sparse attention in Triton: who meets whom becomes intervals of sorted lists (`meeting`), which the interval kernels
take as they are."""

from __future__ import annotations

from torch import Tensor

from lcpt_kernels.triton.interval.autograd import interval_attention
from lcpt_kernels.triton.interval.build_intervals import meeting
from lcpt_kernels.visibility import Sight


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, sights: list[Sight], scale: float) -> Tensor:
    """q [B, T, H, D], k [B, P + T, Hkv, D], v [B, P + T, Hkv, Dv], fp32, bf16 or fp16, in one softmax over what any of
    the sights shows -> o [B, T, H, Dv]."""
    return interval_attention([(q, k, v, meeting(sight, span=k.shape[1])) for sight in sights], scale)
