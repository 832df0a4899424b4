"""Kept, hashed and packed tokens as intervals of sorted lists, made on the device: all sizes are known beforehand, and
the host waits for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.triton.interval.intervals import Intervals
from lcpt_kernels.visibility import Sight

DROPPED = 2**63 - 1  # the place of what is dropped: behind everything else


def meeting(sight: Sight, span: int) -> Intervals:
    """Of T queries, the last ones of `span` tokens."""
    *marks, since, until = sight
    q_keep, k_keep, q_bucket, k_bucket = (
        x if x is None else x.transpose(1, 2).flatten(0, 1).contiguous() for x in marks
    )
    if q_bucket is not None:
        q_bucket, k_bucket = numbered(q_bucket, k_bucket)
    positions = torch.arange(span, device=since.device)
    asking = positions[span - len(since) :]
    there, keys = placed(positions, k_bucket, k_keep, span)
    wanted, queries = placed(asking, q_bucket, q_keep, span)
    of_bucket = wanted - asking[queries]
    begin, end = of_bucket + since[queries], of_bucket + until[queries]
    if len(there) == 1:
        there = there[0]
    elif len(begin) < len(there):
        begin, end = (x.repeat(len(there), 1) for x in (begin, end))
    first = torch.searchsorted(there, begin, out_int32=True)
    last = torch.searchsorted(there, end, right=True, out_int32=True)
    if q_keep is not None:
        last = torch.where(wanted == DROPPED, first, last)
    return Intervals(queries.int(), keys.int(), first, last)


def numbered(q_bucket: Tensor, k_bucket: Tensor) -> tuple[Tensor, Tensor]:
    """Any integers [N, T] and [N, S] as int64 ≥ 0, below 2³² or T + S, in the same order."""
    if q_bucket.dtype != torch.int64 and k_bucket.dtype != torch.int64:
        return tuple(x.long() - torch.iinfo(torch.int32).min for x in (q_bucket, k_bucket))
    values, order = torch.cat((q_bucket, k_bucket), dim=1).long().sort(dim=1)  # their ranks: they may span 64 bits
    risen = torch.zeros_like(values)
    risen[:, 1:] = values[:, 1:] != values[:, :-1]
    ranks = torch.empty_like(values).scatter_(1, order, risen.cumsum(1))
    return ranks.split((q_bucket.shape[1], k_bucket.shape[1]), dim=1)


def placed(positions: Tensor, bucket: Tensor | None, keep: Tensor | None, span: int) -> tuple[Tensor, Tensor]:
    """-> [N, T] each: (bucket, position) in one number, DROPPED for what is, sorted; and its rows. N = 1: no marks."""
    if bucket is None and keep is None:
        return positions[None], torch.arange(len(positions), device=positions.device)[None]
    places = positions if bucket is None else bucket * span + positions
    if keep is not None:
        places = torch.where(keep, places, DROPPED)
    return places.sort(dim=1, stable=True)
