"""lowrank: one softmax over the last two blocks and the summaries of those before: FLuRKA's low-rank constituent.

Its cost still grows with the context, r/c as fast as softmax's, and so does what it keeps for decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from lcpt_kernels import lowrank_attention
from torch import Tensor

from lcpt.attention.base import Attention, Projected
from lcpt.attention.summaries import Summaries, SummariesConfig

LOCAL_BLOCKS = 2


@dataclass
class LowrankConfig:
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
        o = lowrank_attention(
            p.q,
            kept["k"],
            kept["v"],
            p.q_plain,
            kept["k_summary"],
            kept["v_summary"],
            summaries=self.summaries.number,
            block_size=self.block_size,
            local_blocks=LOCAL_BLOCKS,
            cu_seqlens=cu_seqlens,
        )
        if not keep:
            return o, None
        first = max(0, kept["k"].shape[1] // self.block_size - LOCAL_BLOCKS + 1) * self.block_size
        tail = {name: kept[name][:, first:].clone() for name in ("k", "v")}  # copies: views would keep everything
        return o, kept | tail | {"pending": pooled.pending}

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
