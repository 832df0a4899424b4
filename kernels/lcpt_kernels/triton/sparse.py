"""Sparse attention in Triton: who meets whom becomes intervals of sorted lists (`meeting`), which the interval kernels
take as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.triton.interval_attention import interval_attention
from lcpt_kernels.triton.meeting import meeting


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, marks: dict[str, Tensor | None], scale: float, cu_seqlens: Tensor | None
) -> Tensor:
    """The arguments of the public function; fp32, bf16 or fp16. -> o [B, T, H, Dv]."""
    tokens, span = q.shape[1], k.shape[1]
    until = torch.arange(span - tokens, span, device=q.device)
    since = torch.zeros_like(until) if cu_seqlens is None else starts(cu_seqlens.to(q.device), until)
    return interval_attention([(q, k, v, meeting(**marks, since=since, until=until, span=span))], scale)


def starts(cu_seqlens: Tensor, positions: Tensor) -> Tensor:
    """Where the document of each position begins, without a wait."""
    ends = cu_seqlens.long()
    return ends[torch.searchsorted(ends, positions, right=True) - 1]
