"""Who meets whom, as two sorted lists and an interval for every query, and what the kernels are given of it.

Where first and last never fall, the queries that see a key are an interval as well: the lists are read from both sides
by the same rules, and what a tile meets is found by looking at its own rows' ends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common.tensors import padded

LOG2E = tl.constexpr(math.log2(math.e))  # exp2 is what the hardware has


class Intervals(NamedTuple):
    """N = B·H heads, or 1: the same for all. Of every head all T queries and all S keys stand in a list, as int32
    positions; query i sees the keys first[i] ≤ j < last[i] of the list, or none. Neither end ever falls."""

    queries: Tensor  # [N, T]
    keys: Tensor  # [N, S]
    first: Tensor  # [N, T]
    last: Tensor  # [N, T]

    def seen_from_keys(self) -> Intervals:
        """Key j is seen by the queries lower[j] ≤ i < upper[j]: (keys, queries, lower, upper)."""
        j = torch.arange(self.keys.shape[1], dtype=torch.int32, device=self.keys.device).repeat(len(self.first), 1)
        lower, upper = (
            torch.searchsorted(x.contiguous(), j, right=True, out_int32=True) for x in (self.last, self.first)
        )
        return Intervals(self.keys, self.queries, lower, upper)


class Part(NamedTuple):
    """Queries [B, T, H, D], keys [B, S, Hkv, D] and values [B, S, Hkv, Dv] that meet as `intervals` say, whose lists
    are those of a program's rows and of what it goes through: queries and keys, or keys and queries. Last strides 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    intervals: Intervals
    scale: float

    @property
    def type(self) -> torch.dtype:
        """Of weights and their gradients where they meet in a product: fp16 does not hold the range of gradients."""
        return torch.float32 if self.v.dtype == torch.float32 else torch.bfloat16

    def arguments(self, kernel) -> dict:
        """Those that `kernel` has, by their names."""
        D, DV = self.q.shape[3], self.v.shape[3]
        own, other, first, last = self.intervals
        known = dict(
            q=self.q,
            q_strides=self.q.stride()[:3],
            k=self.k,
            k_strides=self.k.stride()[:3],
            v=self.v,
            v_strides=self.v.stride()[:3],
            own=own,
            own_stride=of_heads(own),
            other=other,
            other_stride=of_heads(other),
            first=first,
            last=last,
            ends_stride=of_heads(first),
            tokens=self.q.shape[1],
            span=self.k.shape[1],
            heads=self.q.shape[2],
            group=self.q.shape[2] // self.v.shape[2],
            scale=float(self.scale),
            D=D,
            D_PAD=padded(D),
            DV=DV,
            DV_PAD=padded(DV),
        )
        return {name: x for name, x in known.items() if name in kernel.arg_names}


def of_heads(rows: Tensor) -> int:
    """From one head's row of a list to the next's."""
    return rows.stride(0) if len(rows) > 1 else 0


@triton.jit
def load_ends(first, last, rows, inside):
    """-> where each row's interval begins and ends; 0 and 0 for rows that are not inside."""
    return tl.load(first + rows, mask=inside, other=0), tl.load(last + rows, mask=inside, other=0)


@triton.jit
def steps(begin, end, SIZE: tl.constexpr):
    """The steps of SIZE from the first place that any row sees to the last: where they start and stop, the number of
    those before all rows see all of a step, of those where all do, and of the others. Rows that see nothing have no
    say: they see what they should not in the inner steps, and the kernels give them zeros."""
    sees = begin < end
    stop = tl.max(tl.where(sees, end, 0))
    start = tl.minimum(tl.min(tl.where(sees, begin, 2147483647)), stop)
    before = tl.cdiv(tl.max(tl.where(sees, begin, start)) - start, SIZE)
    inner = tl.maximum(tl.min(tl.where(sees, end, stop)) - start - before * SIZE, 0) // SIZE
    return start, stop, before, inner, tl.cdiv(stop - start, SIZE) - inner


@triton.jit
def place_of_step(step, start, before, inner, SIZE: tl.constexpr, EDGE: tl.constexpr):
    """Where the inner or the edge step of this number begins."""
    if EDGE:
        return start + (step + tl.where(step < before, 0, inner)) * SIZE
    else:
        return start + (step + before) * SIZE
