"""The keys that a query of sparse attention sees: those of its bucket in a range of positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleRange:
    """A kept query at position t sees the kept keys of its bucket at window_start[t] ≤ s ≤ window_end[t]."""

    q_keep: Tensor | None  # as in sparse_attention
    k_keep: Tensor | None
    q_bucket: Tensor | None
    k_bucket: Tensor | None
    window_start: Tensor  # int64 [T], never decreasing
    window_end: Tensor  # int64 [T], never decreasing, at most t


def visible_ranges(
    q: Tensor, k: Tensor, marks: dict[str, Tensor | None], window: int, cu_seqlens: Tensor | None
) -> list[VisibleRange]:
    """Return the ranges of sparse_attention's arguments, which do not overlap: with a window one more, of all keys."""
    t = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
    start = torch.zeros_like(t)
    if cu_seqlens is not None:
        start = cu_seqlens.to(q.device).long()[torch.searchsorted(cu_seqlens.to(q.device), t, right=True) - 1]
    if window == 0:
        return [VisibleRange(**marks, window_start=start, window_end=t)]
    return [
        VisibleRange(**marks, window_start=start, window_end=t - window),
        VisibleRange(
            q_keep=marks["q_keep"],
            k_keep=None,
            q_bucket=None,
            k_bucket=None,
            window_start=torch.maximum(start, t - window + 1),
            window_end=t,
        ),
    ]
