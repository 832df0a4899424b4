"""flurka: exact in the last two blocks, before them feature attention to a few summaries of every block.

FLuRKA (arXiv 2306.15799) puts a low-rank projection inside the feature map of linear attention: φ(q)·φ(P K) over P V.
Block-causal here, with one denominator; e^γ, learned per head, balances the state part, which has no positions:
a mean of rotated keys would cancel them. γ starts where a token weighs as much on average in both parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

import torch
from lcpt_kernels import flurka_attention
from torch import nn

from lcpt.attention.balance import MEAN_EXPONENTIAL, balance, mean_product
from lcpt.attention.base import LinearCost, Projected
from lcpt.attention.feature_maps import FEATURE_MAPS, check_feature_map
from lcpt.attention.summaries import Summaries, SummariesConfig


@dataclass
class FlurkaConfig:
    """Says which feature map and summaries flurka has. Raises ValueError that names a key out of its range."""

    feature_map: str = "hedgehog"  # a name in attention.feature_maps.FEATURE_MAPS
    size: Optional[int] = None  # noqa: UP045  features; None: the default of the map. elu1 and hedgehog ignore it
    local: str = "softmax"  # softmax: exp(q·k/√d) in the last two blocks; linear: the feature map's φ(q)·φ(k)
    summaries: SummariesConfig = field(default_factory=SummariesConfig)

    def __post_init__(self):
        check_feature_map("flurka", self.feature_map, self.size)
        if self.local not in ("softmax", "linear"):
            raise ValueError(f"model.attention.flurka.local is {self.local!r}; it is softmax or linear")


class Flurka(LinearCost):
    local_blocks = 2
    keep_plain = True

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: FlurkaConfig = config.flurka
        self.local = own.local
        self.feature_map = FEATURE_MAPS[own.feature_map](n_kv_heads, self.head_dim, own.size)
        self.summaries = Summaries(d_model, n_kv_heads, self.head_dim, config.block_size, own.summaries)
        self.summaries_per_block = self.summaries.number
        self.gamma = nn.Parameter(torch.zeros(n_heads))
        if own.local == "softmax":  # linear: both parts are of the same map, and balanced as they are
            far = mean_product(self.feature_map, n_kv_heads, self.head_dim)
            self.gamma.data += balance(MEAN_EXPONENTIAL, far, n_heads)

    def attend_blocks(self, p: Projected, *, initial_state=None, **stream):
        state, pending = initial_state or (None, None)
        exchange = stream.get("exchange")
        pooled = self.summaries(p, pending, stream["cu_seqlens"], None if exchange is None else exchange.part)
        # Both sides as keys: a factor taken out of a query's features would shift the balance of local and state part.
        phi_q, phi_summary = (self.feature_map(x, is_query=False) for x in (p.q_plain, pooled.k))
        q, k = p.q, p.k
        if self.local == "linear":
            q, k = (self.feature_map(x, is_query=False) for x in (q, k))
        o, state = flurka_attention(
            q,
            k,
            p.v,
            phi_q,
            phi_summary,
            pooled.v,
            mass_summary=pooled.mass,
            local=self.local,
            gain=self.gamma.exp(),
            summaries=self.summaries.number,
            initial_state=state,
            **stream,
        )
        return o, None if state is None else (state, pooled.pending)

    def features(self) -> int:
        return self.feature_map.size

    def score_size(self) -> int:
        return self.head_dim if self.local == "softmax" else self.features()

    def map_flops(self) -> float:
        return self.feature_map.flops * (1 if self.local == "softmax" else 2)

    def attend_flops(self, context: int) -> tuple[float, float]:
        """Keys of the state are r summaries a block instead of its c tokens."""
        forward, backward = super().attend_flops(context)
        keys = 2.0 * self.n_heads * self.head_dim * self.features() * (context > 2 * self.block_size)
        fewer = (1 - self.summaries.number / self.block_size) * keys
        pooling = self.n_kv_heads * self.summaries.flops()
        return forward - fewer + pooling, backward - 3 * fewer + 2 * pooling

    def state_bytes(self, context: int) -> int:
        pending = self.block_size * self.summaries.pending_floats_per_token()
        pooled = 2 * self.summaries.number * (self.features() + self.head_dim)
        return super().state_bytes(context) + 4 * self.n_kv_heads * (pending + pooled)
