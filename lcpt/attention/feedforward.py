"""feedforward: φ(q)·φ(k) of a trainable feed-forward kernel φ with positive output, at linear cost.

Linear Self-Attention with trainable feedforward kernels (arXiv 2211.04076): FFN, OGLU (an orthogonal path times a gate)
and AOGLU (its gate of low rank), with matrices of their own for every head, shared by queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lcpt_kernels import feature_attention
from torch import Tensor, nn

from lcpt.attention.base import LinearCost, Projected
from lcpt.attention.feature_maps import per_head

GATE_RANK = 4  # AOGLU's gate has rank d / 4


@dataclass
class FeedforwardConfig:
    map: str = "oglu"  # ffn | oglu | aoglu
    layers: int = 1

    def __post_init__(self):
        if self.map not in ("ffn", "oglu", "aoglu"):
            raise ValueError(f"model.attention.feedforward.map is {self.map!r}; it is ffn, oglu or aoglu")
        if self.layers < 1:
            raise ValueError(f"model.attention.feedforward.layers is {self.layers}; it must be ≥ 1")


class FeedforwardLayer(nn.Module):
    """act(x W) for ffn, act(x W) ∘ σ(x G) for oglu, act(x W) ∘ σ((x A) B) for aoglu; x [B, T, H, d] -> the same shape.

    W starts orthogonal; act is softplus where the result must be positive, in the last layer, and the identity before.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, kind: str, last: bool):
        super().__init__()
        self.last = last
        self.W = nn.Parameter(torch.empty(n_kv_heads, head_dim, head_dim))
        for matrix in self.W:
            nn.init.orthogonal_(matrix)
        rank = max(1, head_dim // GATE_RANK)
        shapes = {"ffn": [], "oglu": [(head_dim, head_dim)], "aoglu": [(head_dim, rank), (rank, head_dim)]}[kind]
        self.gate = nn.ParameterList(torch.randn(n_kv_heads, *shape) * shape[0] ** -0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        y = per_head(x, self.W)
        y = F.softplus(y) if self.last else y
        if len(self.gate):
            gate = x
            for matrices in self.gate:
                gate = per_head(gate, matrices)
            y = y * torch.sigmoid(gate)
        return y


class Feedforward(LinearCost):
    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: FeedforwardConfig = config.feedforward
        self.phi = nn.Sequential(*(
            FeedforwardLayer(n_kv_heads, self.head_dim, own.map, last=layer == own.layers - 1)
            for layer in range(own.layers)
        ))

    def attend_blocks(self, p: Projected, **stream):
        return feature_attention(self.phi(p.q), self.phi(p.k), p.v, **stream)

    def features(self) -> int:
        return self.head_dim

    def score_size(self) -> int:
        return self.head_dim

    def map_flops(self) -> float:
        return 2.0 * sum(p.numel() for p in self.phi.parameters()) / self.n_kv_heads

    def tail_numbers(self) -> int:
        return 2 * self.head_dim
