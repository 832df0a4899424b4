"""Sparse attention: a softmax over the kept keys of a query's own bucket, whose cost is that of the visible pairs.

Sorted by head, then bucket, then position, the keys that a query sees lie side by side: first ≤ j < last. For queries
in the same order, first and last never decrease. So kept, hashed and packed tokens all become one list of queries, one
of keys and an interval for every query (`SortedIntervals`). A tile of ROWS queries reads the keys from its first
query's `first` to its last query's `last`, with a mask at the two edges.

A window of the last tokens, which are seen without regard to marks, is a second list, of all keys. Marks then count
before the window only, so no key counts twice, and the outputs of both lists are merged by their lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lcpt_kernels import dispatch, reference
from lcpt_kernels.accumulation import accumulated
from lcpt_kernels.arguments import BACKENDS, check_backend, check_packed, check_pair, require
from lcpt_kernels.autocast import under_autocast
from lcpt_kernels.derivatives import refuse_transforms
from lcpt_kernels.documents import each_document
from lcpt_kernels.merge_softmax import merge_outputs
from lcpt_kernels.visibility import VisibleRange, visible_ranges

ROWS = 128  # queries at a time: bounds the memory of a tile of scores to ROWS × the keys that they see
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@under_autocast
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_keep: Tensor | None = None,
    k_keep: Tensor | None = None,
    q_bucket: Tensor | None = None,
    k_bucket: Tensor | None = None,
    window: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute a softmax of scale · q_t·k_s over the keys s ≤ t that are kept and in the bucket of q_t, t itself
    included.

    Args:
        q: [B, T, H, D], k: [B, T, Hkv, D], v: [B, T, Hkv, Dv]. Floating point, any strides, one dtype; H is a multiple
            of Hkv. k and v may start with keys of earlier tokens, [B, P + T, Hkv, ·].
        q_keep: bool [B, T, H], k_keep: bool [B, P + T, H], of query heads, or None: all are kept.
        q_bucket: [B, T, H], k_bucket: [B, P + T, H], any integers, of query heads; both or neither: one bucket.
        window: the number of last tokens, t included, that a kept query sees without regard to keep and bucket; 0:
            none.
        scale: a factor of q·k; None: D^−½.
        cu_seqlens: [N + 1], int32 or int64, or None: the borders of packed documents; B = 1.
        backend: "reference", "torch", "triton" (for a GPU), or "auto".

    Returns:
        o [B, T, H, Dv] in q's dtype, 0 for a query that is dropped or sees no key.

    Raises:
        ValueError: a shape, dtype or option that does not fit; the message names it.

    Source: SCFA (arXiv 2306.01160).

    Example:
        >>> import torch
        >>> from lcpt_kernels import sparse_attention
        >>> q, k = torch.ones(1, 4, 1, 8), torch.ones(1, 4, 1, 8)
        >>> v = torch.arange(4.0).view(1, 4, 1, 1)
        >>> bucket = torch.tensor([0, 1, 0, 1]).view(1, 4, 1)
        >>> sparse_attention(q, k, v, q_bucket=bucket, k_bucket=bucket)[0, :, 0, 0]
        tensor([0., 1., 1., 2.])
    """
    check_backend(backend, (*BACKENDS, "triton"))
    check_pair(q, k[:, -q.shape[1] :], v[:, -q.shape[1] :], ("q", "k"))
    if k.shape[1] != v.shape[1]:  # formatted only if it fails: `arguments.py`
        raise ValueError(f"k has {k.shape[1]} tokens, v has {v.shape[1]}")
    marks = {"q_keep": q_keep, "k_keep": k_keep, "q_bucket": q_bucket, "k_bucket": k_bucket}
    _check_marks(q, k, **marks)
    if cu_seqlens is not None:
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"packed documents have no earlier keys: q has {q.shape[1]} tokens, k {k.shape[1]}")
        check_packed(cu_seqlens, *q.shape[:2])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    require(window >= 0, f"window {window} is negative")
    if backend == "reference":
        k, v = reference.per_query_head(q.shape[2], k, v)
        return each_document(
            lambda **document: reference.sparse_attention(**document, scale=scale, window=window),
            cu_seqlens,
            {"q": q, "k": k, "v": v, **marks},
        )
    ranges = visible_ranges(q, k, marks, window, cu_seqlens)
    if dispatch.intervals(backend, "sparse_attention", v, q):
        from lcpt_kernels.triton.interval.sparse import sparse_attention as in_triton

        return in_triton(q, k, v, ranges, scale)
    refuse_transforms("sparse attention", "reference")
    k, v = reference.per_query_head(q.shape[2], k, v)
    outputs = [
        _in_pytorch(q, k, v, SortedIntervals.build(q, k, visible), scale, with_lse=window > 0) for visible in ranges
    ]
    o, lse = outputs[0]
    if lse is not None:
        o, _ = merge_outputs([(o_n, lse_n) for o_n, lse_n in outputs if lse_n is not None])
    return o.to(q.dtype)


def _in_pytorch(q, k, v, intervals: SortedIntervals, scale: float, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Return o [B, T, H, Dv] and, with_lse, lse [B, T, H], −∞ for a query that sees no key. k and v have q's heads."""
    q_rows, k_rows, v_rows = (x.flatten(0, 2) for x in (q, k, v))
    o_sorted, lse_sorted = _Intervals.apply(
        q_rows.index_select(0, intervals.queries),
        k_rows.index_select(0, intervals.keys),
        v_rows.index_select(0, intervals.keys),
        intervals.first,
        intervals.last,
        scale,
        with_lse,
    )
    o = o_sorted.new_zeros(len(q_rows), v.shape[3]).index_copy(0, intervals.queries, o_sorted)
    o = o.unflatten(0, q.shape[:3])
    if not with_lse:
        return o, None
    lse = lse_sorted.new_full((len(q_rows),), -torch.inf).index_copy(0, intervals.queries, lse_sorted)
    return o, lse.unflatten(0, q.shape[:3])


@dataclass(frozen=True, slots=True)
class SortedIntervals:
    """Query i of the sorted queries sees the sorted keys first[i] ≤ j < last[i], at least one."""

    queries: Tensor  # int64 [Nq], sorted rows of q [B·T·H, D], without the dropped ones and those that see no key
    keys: Tensor  # int64 [Nk], sorted rows of k [B·(P + T)·H, D], without the dropped ones
    first: Tensor  # int64 [Nq], never decreasing
    last: Tensor  # int64 [Nq], never decreasing

    @classmethod
    def build(cls, q: Tensor, k: Tensor, visible: VisibleRange) -> SortedIntervals:
        """Return the intervals of all heads in one list. k has q's heads."""
        q_bucket, k_bucket = visible.q_bucket, visible.k_bucket
        tokens, span = q.shape[1], k.shape[1]
        key_positions = torch.arange(span, device=q.device)
        query_positions = key_positions[span - tokens :]
        lowest, buckets = 0, 1
        if q_bucket is not None and k_bucket is not None and q_bucket.numel():
            ends = torch.stack([end for x in (q_bucket, k_bucket) for end in (x.min(), x.max())]).tolist()
            lowest, buckets = min(ends), max(ends) - min(ends) + 1
            require(
                q.shape[0] * q.shape[2] * buckets * span < 2**63,
                f"buckets from {lowest} to {max(ends)}, "
                f"for {q.shape[0] * q.shape[2]} heads of {span} tokens, are too many for 64 bits",
            )
        heads = torch.arange(q.shape[0] * q.shape[2], device=q.device).view(q.shape[0], 1, q.shape[2])

        def sort_rows(keep, bucket, positions):
            """Return the kept rows in order, and what they are sorted by: (head, bucket, position) in one integer."""
            sort_keys = heads * buckets if bucket is None else heads * buckets + (bucket.long() - lowest)
            sort_keys = (sort_keys * span + positions[:, None]).flatten()
            rows = torch.arange(len(sort_keys), device=q.device) if keep is None else keep.flatten().nonzero()[:, 0]
            sort_keys, order = sort_keys[rows].sort()
            return rows[order], sort_keys

        queries, query_sort_keys = sort_rows(visible.q_keep, q_bucket, query_positions)
        keys, key_sort_keys = sort_rows(visible.k_keep, k_bucket, key_positions)
        position = query_sort_keys % span
        start, end = (x[position - (span - tokens)] - position for x in (visible.window_start, visible.window_end))
        first = torch.searchsorted(key_sort_keys, query_sort_keys + start)
        last = torch.searchsorted(key_sort_keys, query_sort_keys + end, right=True)
        nonempty = last > first
        return cls(queries[nonempty], keys, first[nonempty], last[nonempty])


class _Intervals(torch.autograd.Function):
    """o_i = Σ_j p_ij v_j with p_i the softmax of scale · q_i·k_j over first[i] ≤ j < last[i]: [Nq, D] -> [Nq, Dv]; and,
    with_lse, the logarithm of its denominator, [Nq], and o in fp32.

    Backward computes p again, so it needs the arguments only: with dp = do·v, dq and dk follow from
    ds = p ∘ (dp − Σ_j p dp + dlse). All arithmetic is fp32 (float64 for float64 inputs), one tile at a time.
    """

    @staticmethod
    def forward(ctx, q, k, v, first, last, scale, with_lse):
        ctx.save_for_backward(q, k, v, first, last)
        ctx.scale = scale
        o = q.new_empty(len(q), v.shape[1], dtype=accumulated(q[:0]).dtype if with_lse else q.dtype)
        lse = o.new_empty(len(q)) if with_lse else None
        for rows, keys, s in _tiles(q, k, first, last, scale):
            if with_lse:
                lse[rows] = s.logsumexp(-1)
            o[rows] = s.softmax(-1) @ accumulated(v[keys])
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, first, last = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(accumulated(x)) for x in (k, v))  # a key's share comes in parts
        for rows, keys, s in _tiles(q, k, first, last, ctx.scale):
            p, do_rows = s.softmax(-1), accumulated(do[rows])
            dv[keys] += p.mT @ do_rows
            p_dp = (do_rows @ accumulated(v[keys]).mT).mul_(p)
            shift = p_dp.sum(-1, keepdim=True)
            if dlse is not None:
                shift -= dlse[rows, None]
            ds = p_dp.addcmul_(p, shift, value=-1)
            dq[rows] = ctx.scale * (ds @ accumulated(k[keys]))
            dk[keys] += ds.mT @ (ctx.scale * accumulated(q[rows]))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _tiles(q, k, first, last, scale) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield tiles that cover all visible pairs: (queries, sorted keys, scores [queries, keys])."""
    starts = torch.arange(0, len(q), ROWS, device=q.device)
    ends = (starts + ROWS - 1).clamp(max=len(q) - 1)
    first, last = first.int(), last.int()  # half the bytes to compare
    bounds = torch.stack((first[starts], first[ends], last[starts], last[ends]), dim=1).tolist()
    for start, (from_all, from_some, to_some, to_all) in zip(range(0, len(q), ROWS), bounds, strict=True):
        rows, keys = slice(start, min(start + ROWS, len(q))), slice(from_all, to_all)
        s = (scale * accumulated(q[rows])) @ accumulated(k[keys]).mT
        number = torch.arange(from_all, to_all, dtype=torch.int32, device=q.device)
        left, right = from_some - from_all, to_some - from_all  # no query's edge lies between these
        s[:, :left].masked_fill_(number[:left] < first[rows, None], -torch.inf)
        s[:, right:].masked_fill_(number[right:] >= last[rows, None], -torch.inf)
        yield rows, keys, s


def _check_marks(q, k, q_keep, k_keep, q_bucket, k_bucket) -> None:
    require(
        (q_bucket is None) == (k_bucket is None),
        f"{'k' if q_bucket is None else 'q'}_bucket is given alone; buckets need both",
    )
    of_queries, of_keys = list(q.shape[:3]), [*k.shape[:2], q.shape[2]]
    for name, keep, shape in (("q_keep", q_keep, of_queries), ("k_keep", k_keep, of_keys)):
        if keep is not None:
            require(list(keep.shape) == shape, f"{name} is {list(keep.shape)}; it must be {shape}")
            require(keep.dtype == torch.bool, f"{name} is {keep.dtype}; it must be bool")
    for name, bucket, shape in (("q_bucket", q_bucket, of_queries), ("k_bucket", k_bucket, of_keys)):
        if bucket is not None:
            require(list(bucket.shape) == shape, f"{name} is {list(bucket.shape)}; it must be {shape}")
            require(bucket.dtype in INTEGERS, f"{name} is {bucket.dtype}; it must be an int")
