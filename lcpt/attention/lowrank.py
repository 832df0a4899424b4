"""lowrank: one softmax over the last two blocks and the summaries of those before: FLuRKA's low-rank constituent.

Its cost still grows with the context, r/c as fast as softmax's, and so does what it keeps for decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from lcpt_kernels import lowrank_attention
from torch import Tensor

from lcpt.attention.base import Attention, Projected
from lcpt.attention.resplit import Resplit
from lcpt.attention.summaries import Summaries, SummariesConfig
from lcpt.parallel.sequence import SequenceSlice

LOCAL_BLOCKS = 2


@dataclass
class LowrankConfig:
    """Says how lowrank summarises blocks."""

    summaries: SummariesConfig = field(default_factory=SummariesConfig)


class Lowrank(Attention):
    keep_plain = True

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        self.block_size = config.block_size
        own: LowrankConfig = config.lowrank
        self.summaries = Summaries(d_model, n_kv_heads, self.head_dim, config.block_size, own.summaries)

    def attend(self, p: Projected, state=None, keep: bool = False, cu_seqlens: Tensor | None = None):
        pooled = self.summaries(p, None if state is None else state["pending"], cu_seqlens)
        kept = {"k": p.k, "v": p.v, "k_summary": pooled.k, "v_summary": pooled.v}
        if state is not None:
            kept = {name: torch.cat((state[name], x), dim=1) for name, x in kept.items()}
        o = self._attend_to(p.q, p.q_plain, **kept, cu_seqlens=cu_seqlens)
        if not keep:
            return o, None
        first = max(0, kept["k"].shape[1] // self.block_size - LOCAL_BLOCKS + 1) * self.block_size
        tail = {name: kept[name][:, first:].clone() for name in ("k", "v")}  # copies: views would keep everything
        return o, kept | tail | {"pending": pooled.pending}

    def attend_between_ranks(self, p: Projected, part: SequenceSlice) -> Tensor:
        assert p.q_plain is not None
        pooled = self.summaries(p, None, part.cu_seqlens, part)
        exchange = Resplit(part, pooled.k)
        c, r = self.block_size, self.summaries.number
        edges = range(0, (part.group.size + 1) * part.tokens, part.tokens)
        ended = [blocks_before(edge, c, part.borders) for edge in edges]  # in the row; their summaries lie in order
        rows = [r * (stop - start) for start, stop in pairwise(ended)]
        kept = exchange.keys({"k_summary": pooled.k, "v_summary": pooled.v}, rows)
        queries, queries_far = exchange.queries(p.q), exchange.queries(p.q_plain)
        kept |= exchange.keys({"k": p.k, "v": p.v})
        outputs = []
        for q, q_far, piece in zip(queries, queries_far, exchange.pieces, strict=True):
            block = (piece.start - piece.document) // c  # of the first query
            first_key = piece.document + max(0, block - LOCAL_BLOCKS + 1) * c
            summaries = slice(*(r * blocks_before(place, c, part.borders) for place in (piece.document, piece.stop)))
            seen = {name: kept[name][:, first_key : piece.stop] for name in ("k", "v")}
            seen |= {name: kept[name][:, summaries] for name in ("k_summary", "v_summary")}
            outputs.append(self._attend_to(q, q_far, **seen, cu_seqlens=piece.cu_seqlens(q.device)))
        return exchange.home(outputs)

    def _attend_to(self, q, q_far, k, v, k_summary, v_summary, cu_seqlens: Tensor | None) -> Tensor:
        return lowrank_attention(
            q,
            k,
            v,
            q_far,
            k_summary,
            v_summary,
            summaries=self.summaries.number,
            block_size=self.block_size,
            local_blocks=LOCAL_BLOCKS,
            cu_seqlens=cu_seqlens,
        )

    def attend_flops(self, context: int) -> tuple[float, float]:
        tokens = min(context, LOCAL_BLOCKS * self.block_size)
        summaries = context / 2 * self.summaries.number / self.block_size * (context > LOCAL_BLOCKS * self.block_size)
        product = 2.0 * self.n_heads * self.head_dim * (tokens + summaries)
        pooling = self.n_kv_heads * self.summaries.flops()
        return 2 * product + pooling, 5 * product + 2 * pooling  # backward makes the scores again

    def state_bytes(self, context: int) -> int:
        c = self.block_size
        tail = LOCAL_BLOCKS * c * 2 * self.head_dim + c * self.summaries.pending_floats_per_token()
        summaries = context // c * self.summaries.number * 2 * self.head_dim
        return 4 * self.n_kv_heads * (tail + summaries)


def blocks_before(place: int, block_size: int, borders: tuple[int, ...] | None) -> int:
    """Count the whole blocks that end before a place of a row; each document's begin with it."""
    if borders is None:
        return place // block_size
    return sum((min(stop, place) - start) // block_size for start, stop in pairwise(borders) if start < place)
