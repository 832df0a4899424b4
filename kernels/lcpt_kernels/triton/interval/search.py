"""Binary searches in sorted lists: the keys that each query sees, and the queries that see each key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tensors import on_device_of

ROWS = 128  # of a program, one a thread


@torch.library.custom_op("lcpt_kernels::interval_search", mutates_args=())
def visible_keys(
    queries: Tensor,
    keys: Tensor,
    q_keep: Tensor | None,
    k_keep: Tensor | None,
    q_bucket: Tensor | None,
    k_bucket: Tensor | None,
    window_start: Tensor,
    window_end: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return first and last [N, T] int32 of queries [N, T] and keys [N, S], int32 in the order kept before dropped,
    bucket, position. Marks are [N, ·], heads first and contiguous; windows [T] are of positions. N is 1 for a list of
    all heads. A dropped query has S and S."""
    (tokens, span), n = (queries.shape[1], keys.shape[1]), max(len(queries), len(keys))
    first, last = (torch.empty(n, tokens, dtype=torch.int32, device=queries.device) for _ in range(2))
    pieces = triton.cdiv(tokens, ROWS)
    with on_device_of(queries):
        visible_keys_kernel[(pieces * n,)](
            queries,
            tokens if len(queries) > 1 else 0,
            keys,
            span if len(keys) > 1 else 0,
            q_keep,
            k_keep,
            q_bucket,
            k_bucket,
            window_start,
            window_end,
            first,
            last,
            tokens,
            span,
            pieces,
            span.bit_length(),
            ROWS=ROWS,
        )
    return first, last


@visible_keys.register_fake
def _(queries, keys, q_keep, k_keep, q_bucket, k_bucket, window_start, window_end):
    n = len(queries) if len(keys) == 1 else len(keys)
    return tuple(queries.new_empty(n, queries.shape[1]) for _ in range(2))


def seeing_queries(first: Tensor, last: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """Return for each of `span` keys j the interval of queries with first ≤ j < last, [N, span] int32 twice."""
    n, tokens = first.shape
    lower, upper = (torch.empty(n, span, dtype=torch.int32, device=first.device) for _ in range(2))
    pieces = triton.cdiv(span, ROWS)
    with on_device_of(first):
        seeing_queries_kernel[(pieces * n,)](
            first, last, lower, upper, tokens, span, pieces, tokens.bit_length(), ROWS=ROWS
        )
    return lower, upper


@triton.jit(do_not_specialize=["queries_stride", "keys_stride", "tokens", "span", "pieces", "halvings"])
def visible_keys_kernel(
    queries,
    queries_stride,  # [N, T]
    keys,
    keys_stride,  # [N, S]
    q_keep,  # [N, T]
    k_keep,  # [N, S]
    q_bucket,  # [N, T]
    k_bucket,  # [N, S]
    window_start,
    window_end,  # [T]
    first,
    last,  # [N, T]
    tokens,
    span,
    pieces,
    halvings,
    ROWS: tl.constexpr,
):
    n = (tl.program_id(0) // pieces).to(tl.int64)
    i = tl.program_id(0) % pieces * ROWS + tl.arange(0, ROWS)
    inside = i < tokens
    t = tl.load(queries + n * queries_stride + i, mask=inside, other=0)
    begin = tl.load(window_start + t)
    end = tl.load(window_end + t) + 1
    keys += n * keys_stride
    bucket = begin
    if k_keep is not None:
        k_keep += n * span
    if q_bucket is not None:
        bucket = tl.load(q_bucket + n * tokens + t).to(tl.int64)
        k_bucket += n * span
    begin = keys_before(begin, bucket, keys, k_keep, k_bucket, span, halvings)
    end = keys_before(end, bucket, keys, k_keep, k_bucket, span, halvings)
    if q_keep is not None:
        keep = tl.load(q_keep + n * tokens + t)
        begin, end = tl.where(keep, begin, span), tl.where(keep, end, span)
    tl.store(first + n * tokens + i, begin, mask=inside)
    tl.store(last + n * tokens + i, end, mask=inside)


@triton.jit
def keys_before(position, bucket, keys, k_keep, k_bucket, span, halvings):
    """Count the kept keys of the list before each (bucket, position)."""
    low = tl.zeros(position.shape, tl.int32)
    high = low + span
    for _ in range(0, halvings):
        middle = (low + high) // 2
        open = low < high
        s = tl.load(keys + middle, mask=open, other=0)
        before = s < position
        if k_bucket is not None:
            of_key = tl.load(k_bucket + s).to(tl.int64)
            before = (of_key < bucket) | ((of_key == bucket) & before)
        if k_keep is not None:
            before = before & (tl.load(k_keep + s) != 0)
        low = tl.where(open & before, middle + 1, low)
        high = tl.where(open & before, high, middle)
    return low


@triton.jit(do_not_specialize=["tokens", "span", "pieces", "halvings"])
def seeing_queries_kernel(
    first,
    last,  # [N, T]
    lower,
    upper,  # [N, S]
    tokens,
    span,
    pieces,
    halvings,
    ROWS: tl.constexpr,
):
    n = (tl.program_id(0) // pieces).to(tl.int64)
    j = tl.program_id(0) % pieces * ROWS + tl.arange(0, ROWS)
    tl.store(lower + n * span + j, values_up_to(j, last + n * tokens, tokens, halvings), mask=j < span)
    tl.store(upper + n * span + j, values_up_to(j, first + n * tokens, tokens, halvings), mask=j < span)


@triton.jit
def values_up_to(x, ordered, count, halvings):
    """Count the values of an ordered list up to each x."""
    low = tl.zeros(x.shape, tl.int32)
    high = low + count
    for _ in range(0, halvings):
        middle = (low + high) // 2
        open = low < high
        before = tl.load(ordered + middle, mask=open, other=0) <= x
        low = tl.where(open & before, middle + 1, low)
        high = tl.where(open & before, high, middle)
    return low
