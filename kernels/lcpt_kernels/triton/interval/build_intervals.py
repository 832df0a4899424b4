"""Sorted intervals of kept, hashed and packed tokens, made on the device: their sizes do not depend on the marks, so
the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.triton.interval.intervals import SortedIntervals
from lcpt_kernels.triton.interval.search import visible_keys
from lcpt_kernels.visibility import VisibleRange


def build_intervals(visible: VisibleRange, span: int) -> SortedIntervals:
    """Return the intervals of T queries, the last ones of `span` tokens, among the span keys."""
    q_keep, k_keep, q_bucket, k_bucket = (
        x if x is None else x.transpose(1, 2).flatten(0, 1).contiguous()
        for x in (visible.q_keep, visible.k_keep, visible.q_bucket, visible.k_bucket)
    )
    window_start, window_end = visible.window_start, visible.window_end
    queries = sort_rows(len(window_start), q_bucket, q_keep, window_start.device)
    keys = sort_rows(span, k_bucket, k_keep, window_start.device)
    first, last = visible_keys(queries, keys, q_keep, k_keep, q_bucket, k_bucket, window_start, window_end)
    return SortedIntervals(queries, keys, first, last)


def sort_rows(rows: int, bucket: Tensor | None, keep: Tensor | None, device: torch.device) -> Tensor:
    """Return the rows as int32 in the order kept before dropped, bucket, position; [1, T] without marks, else [N, T].

    Sorts are stable, so positions need no bits of the sort keys: a radix sort goes over 8 bits of marks that are kept
    and over 32 of an int32 bucket, in which any integers are.
    """
    if bucket is None:
        if keep is None:
            return torch.arange(rows, dtype=torch.int32, device=device)[None]
        return dropped_last(keep).int()
    order = bucket.sort(dim=1, stable=True).indices
    if keep is not None:
        order = order.gather(1, dropped_last(keep.gather(1, order)))
    return order.int()


def dropped_last(keep: Tensor) -> Tensor:
    return keep.logical_not().view(torch.uint8).sort(dim=1, stable=True).indices
