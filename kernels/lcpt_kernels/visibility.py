"""Which keys a query of sparse attention sees: those of its bucket, in a range of positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sight(NamedTuple):
    """Who sees whom: the query at position t, if it is kept, the kept keys of its bucket at since ≤ s ≤ until."""

    q_keep: Tensor | None  # as in sparse_attention
    k_keep: Tensor | None
    q_bucket: Tensor | None
    k_bucket: Tensor | None
    since: Tensor  # int64 [T], never falling
    until: Tensor  # int64 [T], never falling, not beyond t


def sights_of(q: Tensor, k: Tensor, marks: dict, window: int, cu_seqlens: Tensor | None) -> list[Sight]:
    t = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
    start = torch.zeros_like(t)
    if cu_seqlens is not None:
        start = cu_seqlens.to(q.device).long()[torch.searchsorted(cu_seqlens.to(q.device), t, right=True) - 1]
    if window == 0:
        return [Sight(**marks, since=start, until=t)]
    near = torch.maximum(start, t - window + 1)
    return [Sight(**marks, since=start, until=t - window), Sight(marks["q_keep"], None, None, None, near, t)]
