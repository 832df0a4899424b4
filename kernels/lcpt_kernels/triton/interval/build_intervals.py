"""Sorted intervals of kept, hashed and packed tokens, made on the device: their sizes do not depend on the marks, so
the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.triton.interval.intervals import SortedIntervals
from lcpt_kernels.visibility import VisibleRange

DROPPED = 2**63 - 1  # the sort key of dropped rows: after all others


def build_intervals(visible: VisibleRange, span: int) -> SortedIntervals:
    """Return the intervals of T queries, the last ones of `span` tokens, among the span keys."""
    q_keep, k_keep, q_bucket, k_bucket = (
        x if x is None else x.transpose(1, 2).flatten(0, 1).contiguous()
        for x in (visible.q_keep, visible.k_keep, visible.q_bucket, visible.k_bucket)
    )
    window_start, window_end = visible.window_start, visible.window_end
    if q_bucket is not None and k_bucket is not None:
        q_bucket, k_bucket = rank_buckets(q_bucket, k_bucket)
    key_positions = torch.arange(span, device=window_start.device)
    query_positions = key_positions[span - len(window_start) :]
    key_sort_keys, keys = sort_rows(key_positions, k_bucket, k_keep, span)
    query_sort_keys, queries = sort_rows(query_positions, q_bucket, q_keep, span)
    bucket_start = query_sort_keys - query_positions[queries]
    begin, end = bucket_start + window_start[queries], bucket_start + window_end[queries]
    if len(key_sort_keys) == 1:
        key_sort_keys = key_sort_keys[0]
    elif len(begin) < len(key_sort_keys):
        begin, end = (x.repeat(len(key_sort_keys), 1) for x in (begin, end))
    first = torch.searchsorted(key_sort_keys, begin, out_int32=True)
    last = torch.searchsorted(key_sort_keys, end, right=True, out_int32=True)
    if q_keep is not None:
        last = torch.where(query_sort_keys == DROPPED, first, last)
    return SortedIntervals(queries.int(), keys.int(), first, last)


def rank_buckets(q_bucket: Tensor, k_bucket: Tensor) -> tuple[Tensor, Tensor]:
    """Return buckets [N, T] and [N, S] of any integers as int64 ≥ 0, less than 2³² or T + S, in the same order."""
    if q_bucket.dtype != torch.int64 and k_bucket.dtype != torch.int64:
        lowest = torch.iinfo(torch.int32).min
        return q_bucket.long() - lowest, k_bucket.long() - lowest
    values, order = torch.cat((q_bucket, k_bucket), dim=1).long().sort(dim=1)  # ranks, since buckets may span 64 bits
    increments = torch.zeros_like(values)
    increments[:, 1:] = values[:, 1:] != values[:, :-1]
    ranks = torch.empty_like(values).scatter_(1, order, increments.cumsum(1))
    q_ranks, k_ranks = ranks.split((q_bucket.shape[1], k_bucket.shape[1]), dim=1)
    return q_ranks, k_ranks


def sort_rows(positions: Tensor, bucket: Tensor | None, keep: Tensor | None, span: int) -> tuple[Tensor, Tensor]:
    """Return sorted keys of (bucket, position), DROPPED for dropped rows, and the rows in this order, [N, T] each; N =
    1 without marks."""
    if bucket is None and keep is None:
        return positions[None], torch.arange(len(positions), device=positions.device)[None]
    sort_keys = positions if bucket is None else bucket * span + positions
    if keep is not None:
        sort_keys = torch.where(keep, sort_keys, DROPPED)
    ordered = sort_keys.sort(dim=1, stable=True)
    return ordered.values, ordered.indices
