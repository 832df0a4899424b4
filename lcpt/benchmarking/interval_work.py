"""What the kernels of sparse attention compute and move, counted from their loops; see `kernel_work.py`.

How many steps a program takes depends on the marks, so intervals are built for a head with random ones. A gathered row
is counted once, since its head's rows stay in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from lcpt_kernels.triton.common import launch_configs
from torch import Tensor

from lcpt.benchmarking.kernel_work import FP32_BYTES, Work, padded, product

INDEX_BYTES = 4


class Intervals(NamedTuple):
    """Row i of a list sees the others' places first[i] ≤ j < last[i], [T] int64 each."""

    first: Tensor
    last: Tensor

    def transposed(self) -> Intervals:
        """Return the intervals of queries that see each key."""
        keys = torch.arange(len(self.first))
        return Intervals(*(torch.searchsorted(x, keys, right=True) for x in (self.last, self.first)))


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalSize:
    """Gives the size of one sequence of one head and what its queries see."""

    intervals: Intervals
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return len(self.intervals.first)

    def rows(self, wide: int, sums: int) -> float:
        """Count the bytes of `wide` tensors as q, k, v, o, of `sums` in fp32, and of the lists."""
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


def intervals_of(tokens: int, marks: dict[str, Tensor]) -> Intervals:
    """Return first and last of the queries of a head with these marks, in the order kept before dropped, bucket,
    position; as the kernels build them, but without a GPU."""
    dropped = torch.iinfo(torch.int64).max

    def ordered(side: str) -> Tensor:
        place = torch.arange(tokens)
        if f"{side}_bucket" in marks:
            place = marks[f"{side}_bucket"][0, :, 0].long() * tokens + place
        if f"{side}_keep" in marks:
            place = place.where(marks[f"{side}_keep"][0, :, 0], dropped)
        return place.sort().values

    of_queries, of_keys = ordered("q"), ordered("k")
    bucket_start = of_queries // tokens * tokens
    first, last = torch.searchsorted(of_keys, bucket_start), torch.searchsorted(of_keys, of_queries, right=True)
    return Intervals(*(x.masked_fill(of_queries == dropped, tokens) for x in (first, last)))


def forward(size: IntervalSize) -> list[Work]:
    return [over_tiles("interval_forward", size, size.intervals, "BM", 2, size.rows(4, 1))]


def backward(size: IntervalSize) -> list[Work]:
    """lse and δ of a query are packed in one number."""
    s = size
    statistics = s.tokens * (2 * s.head_dim * s.dtype.itemsize + 3 * FP32_BYTES + INDEX_BYTES)
    return [
        Work("query_statistics", statistics, s.tokens / 64),
        over_tiles("interval_backward_dq", s, s.intervals, "BM", 3, s.rows(5, 2)),
        over_tiles("interval_backward_dkv", s, s.intervals.transposed(), "BN", 4, s.rows(6, 2)),
    ]


def over_tiles(kernel: str, size: IntervalSize, intervals: Intervals, own: str, products: int, n_bytes: float) -> Work:
    """Count a kernel whose programs hold a tile of the rows that the intervals belong to; `own` names its size."""
    tiles = launch_configs.tiles(kernel, size.head_dim, size.dtype)
    other = tiles["BN" if own == "BM" else "BM"]
    flops_of_step = products * product(tiles[own], other, padded(size.head_dim))
    loops = tuple(number * flops_of_step for number in steps_of_tiles(intervals, tiles[own], other))
    return Work(kernel, n_bytes, -(-size.tokens // tiles[own]), sum(loops), loops)


def steps_of_tiles(intervals: Intervals, own: int, other: int) -> list[float]:
    """Count the steps of all programs, as `steps` of the kernels does: until all rows have begun, where all see all,
    until the last row has ended."""
    first, last = (torch.nn.functional.pad(x, (0, -len(x) % own)).view(-1, own) for x in intervals)
    seen = first < last
    some = seen.any(1)
    first, last, seen = first[some], last[some], seen[some]
    most = len(intervals.first)
    start, stop = first.where(seen, most).amin(1), last.where(seen, 0).amax(1)
    before = (first.where(seen, 0).amax(1) - start + other - 1) // other
    inner_start = start + before * other
    inner = (last.where(seen, most).amin(1) - inner_start).clamp(min=0) // other
    after = (stop - inner_start - inner * other).clamp(min=0)
    return [float(x.sum()) for x in (before, inner, (after + other - 1) // other)]
