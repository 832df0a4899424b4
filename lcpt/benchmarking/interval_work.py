"""What the kernels of sparse attention compute and move, counted from their loops; see `kernel_work.py`.

How many steps a program takes depends on the marks, so intervals are built for a head with random ones. A gathered row
is counted once, since its head's rows stay in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.interval.build_intervals import build_intervals
from lcpt_kernels.triton.interval.intervals import SortedIntervals
from lcpt_kernels.visibility import VisibleRange
from torch import Tensor

from lcpt.benchmarking.kernel_work import FP32_BYTES, Work, padded, product

INDEX_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalSize:
    """Gives the size of one sequence of one head and what its queries see."""

    intervals: SortedIntervals
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.intervals.queries.shape[1]

    def rows(self, wide: int, sums: int) -> float:
        """Count the bytes of `wide` tensors as q, k, v, o, of `sums` as lse and δ, and of the lists."""
        return self.tokens * (wide * self.head_dim * self.dtype.itemsize + sums * FP32_BYTES + 4 * INDEX_BYTES)


def random_marks(tokens: int, *, buckets: int = 0, kept: float = 0.0) -> dict[str, Tensor]:
    """Return marks of one head, [1, tokens, 1], by the names of sparse_attention's arguments: each token in one of
    `buckets` at random, or kept with the chance `kept`."""
    generator = torch.Generator().manual_seed(tokens)
    if buckets:
        return {
            name: torch.randint(buckets, (1, tokens, 1), generator=generator, dtype=torch.int32)
            for name in ("q_bucket", "k_bucket")
        }
    return {name: torch.rand(1, tokens, 1, generator=generator) < kept for name in ("q_keep", "k_keep")}


def intervals_of(tokens: int, marks: dict[str, Tensor]) -> SortedIntervals:
    """Return the intervals of a head with these marks."""
    t = torch.arange(tokens)
    of_none = dict.fromkeys(("q_keep", "k_keep", "q_bucket", "k_bucket"))
    visible = VisibleRange(**of_none | marks, window_start=torch.zeros_like(t), window_end=t)
    return build_intervals(visible, span=tokens)


def forward(size: IntervalSize) -> list[Work]:
    return [over_tiles("interval_forward", size, size.intervals, "BM", 2, size.rows(4, 1))]


def backward(size: IntervalSize) -> list[Work]:
    s, transposed = size, size.intervals.transposed()
    delta = s.tokens * (2 * s.head_dim * s.dtype.itemsize + FP32_BYTES)
    return [
        Work("backward_delta", delta, s.tokens / 64),
        over_tiles("interval_backward_dq", s, s.intervals, "BM", 3, s.rows(5, 2)),
        over_tiles("interval_backward_dkv", s, transposed, "BN", 4, s.rows(6, 2)),
    ]


def over_tiles(
    kernel: str, size: IntervalSize, intervals: SortedIntervals, own: str, products: int, n_bytes: float
) -> Work:
    """Count a kernel whose programs hold a tile of the rows that the intervals belong to; `own` names its size."""
    tiles = launch_configs.tiles(kernel, size.head_dim, size.dtype)
    other = tiles["BN" if own == "BM" else "BM"]
    flops_of_step = products * product(tiles[own], other, padded(size.head_dim))
    inner, edges = (number * flops_of_step for number in steps_of_tiles(intervals, tiles[own], other))
    return Work(kernel, n_bytes, -(-size.tokens // tiles[own]), inner + edges, (inner, edges))


def steps_of_tiles(intervals: SortedIntervals, own: int, other: int) -> tuple[float, float]:
    """Count the steps of all programs without a mask, and those with one: `steps` of the kernels."""
    first, last = (
        torch.nn.functional.pad(x[0].long(), (0, -x.shape[1] % own)).view(-1, own)
        for x in (intervals.first, intervals.last)
    )
    seen = first < last
    some = seen.any(1)
    first, last, seen = first[some], last[some], seen[some]
    most = intervals.keys.shape[1]
    start, stop = first.where(seen, most).amin(1), last.where(seen, 0).amax(1)
    before = (first.where(seen, 0).amax(1) - start + other - 1) // other
    inner = (last.where(seen, most).amin(1) - start - before * other).clamp(min=0) // other
    edges = (stop - start + other - 1) // other - inner
    return float(inner.sum()), float(edges.sum())
