"""Sorted intervals: a list of queries, a list of keys, and for each query the interval of keys that it sees.

Since first and last never decrease, the queries that see a key are an interval as well: the lists can be read from both
sides by the same rules, and a tile finds its keys, or its queries, from the ends of its own rows' intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tensors import padded
from lcpt_kernels.triton.interval.search import seeing_queries

LOG2E = tl.constexpr(math.log2(math.e))  # the hardware computes exp2


@dataclass(frozen=True, slots=True)
class SortedIntervals:
    """The lists of N = B·H heads, or N = 1 list for all heads, int32. Query i of the list sees the keys
    first[i] ≤ j < last[i] of the list. first and last never decrease."""

    queries: Tensor  # [N, T] positions
    keys: Tensor  # [N, S] positions
    first: Tensor  # [N, T]
    last: Tensor  # [N, T]

    def tensors(self) -> list[Tensor]:
        """Return queries, keys, first and last, as the operator takes them."""
        return [self.queries, self.keys, self.first, self.last]

    def transposed(self) -> SortedIntervals:
        """Return the intervals of queries that see each key: keys and queries change places."""
        lower, upper = seeing_queries(self.first, self.last, self.keys.shape[1])
        return SortedIntervals(self.keys, self.queries, lower, upper)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One set of keys of a softmax. The last stride of every tensor is 1."""

    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, S, Hkv, D]
    v: Tensor  # [B, S, Hkv, Dv]
    intervals: SortedIntervals  # transposed for a kernel whose programs hold keys
    scale: float

    @property
    def type(self) -> torch.dtype:
        """Return the dtype of weights and their gradients as operands of a product: fp16 does not hold their range."""
        return torch.float32 if self.v.dtype == torch.float32 else torch.bfloat16

    def arguments(self, kernel) -> dict:
        """Return the arguments that `kernel` has a parameter for, by name."""
        D, DV = self.q.shape[3], self.v.shape[3]
        own, other, first, last = self.intervals.tensors()
        known = dict(
            q=self.q,
            q_strides=self.q.stride()[:3],
            k=self.k,
            k_strides=self.k.stride()[:3],
            v=self.v,
            v_strides=self.v.stride()[:3],
            own=own,
            own_stride=head_stride(own),
            other=other,
            other_stride=head_stride(other),
            first=first,
            last=last,
            ends_stride=head_stride(first),
            tokens=self.q.shape[1],
            span=self.k.shape[1],
            heads=self.q.shape[2],
            group=self.q.shape[2] // self.v.shape[2],
            scale=float(self.scale),
            D=D,
            D_PAD=padded(D),
            DV=DV,
            DV_PAD=padded(DV),
            Q_STRIDE=self.q.stride(1),
            K_STRIDE=self.k.stride(1),
            V_STRIDE=self.v.stride(1),
        )
        return {name: x for name, x in known.items() if name in kernel.arg_names}


def head_stride(rows: Tensor) -> int:
    """Return the stride from one head's list to the next; 0 where all heads have the same."""
    return rows.stride(0) if len(rows) > 1 else 0


@triton.jit
def load_ends(first, last, rows, inside):
    """Load the interval [begin, end) of each row; 0 and 0 for rows that are not inside."""
    return tl.load(first + rows, mask=inside, other=0), tl.load(last + rows, mask=inside, other=0)


@triton.jit
def load_again(x, rows, inside):
    """Load what was loaded before: kept in registers through the loops, it would spill. The policy differs from that of
    the first load, so that they are not merged."""
    return tl.load(x + rows, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def steps(begin, end, SIZE: tl.constexpr):
    """Divide the union of the rows' intervals into steps of SIZE.

    Return its start, where the inner steps start and stop, and its stop. Before inner_start some rows have not begun,
    after it all have; inner steps lie in the interval of every row; behind inner_stop some rows have ended. Rows with
    an empty interval are left out of this: inner steps compute weights for them too, and the kernels replace their
    results by 0.
    """
    nonempty = begin < end
    stop = tl.max(tl.where(nonempty, end, 0))
    start = tl.minimum(tl.min(tl.where(nonempty, begin, 2147483647)), stop)
    inner_start = start + tl.cdiv(tl.max(tl.where(nonempty, begin, start)) - start, SIZE) * SIZE
    inner = tl.maximum(tl.min(tl.where(nonempty, end, stop)) - inner_start, 0) // SIZE
    return start, inner_start, inner_start + inner * SIZE, stop


@triton.jit
def within(places, begin, end, BEGIN: tl.constexpr):
    """Return begin ≤ places < end; without BEGIN, places < end."""
    if BEGIN:
        # One comparison: below begin the unsigned difference is larger than any length. Two would spill at BM = 128.
        return (places - begin).to(tl.uint32, bitcast=True) < (end - begin).to(tl.uint32, bitcast=True)
    else:
        return places < end


@triton.jit
def load_step(x, place, stop, SIZE: tl.constexpr, CLAMP: tl.constexpr):
    """Load SIZE values of a list x from `place` on; with CLAMP the last one before `stop` again in place of those
    behind it, whose weights are 0: rows need no mask then."""
    if CLAMP:
        return tl.load(x + tl.minimum(place + tl.arange(0, SIZE), stop - 1))
    else:
        return tl.load(x + place + tl.arange(0, SIZE))  # the pointer first: a thread's places are constants then


@triton.jit
def gather_rows(x, rows, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Load x[rows] as [n, PADDED], with 0 beyond WIDTH. All rows are valid. As STRIDE is a constant, the 64-bit address
    of a row is one multiply-add."""
    columns = tl.arange(0, PADDED)
    at = (x + columns)[None, :] + (rows.to(tl.int64) * STRIDE)[:, None]
    if PADDED != WIDTH:
        return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def packed(x, y):
    """Return two fp32 values in an int64: they are loaded at once."""
    low, high = x.to(tl.uint32, bitcast=True), y.to(tl.uint32, bitcast=True)
    return low.to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def unpacked(pair):
    low, high = pair.to(tl.uint32), (pair >> 32).to(tl.uint32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
