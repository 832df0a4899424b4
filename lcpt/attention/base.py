"""What every kind of attention shares: projections, norms of queries and keys, rotary positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lcpt.attention import AttentionConfig


class Attention(nn.Module, ABC):
    """Multi-head causal self-attention, [B, T, d_model] -> [B, T, d_model]; a kind adds `attend`.

    Queries and keys pass a LayerNorm over the head dimension before RoPE: softmax gains most from it at a high
    learning rate, and the polynomial kinds need bounded scores.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, config: AttentionConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, d_model // n_heads
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.head_dim, bias=False)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 Hkv, D]
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        return self.out(self.attend(q, k, v).flatten(2))

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D]; k, v [B, T, Hkv, D]; normed and rotated -> o [B, T, H, D]."""

    @abstractmethod
    def attend_flops(self, context: int) -> tuple[float, float]:
        """FLOPs a token of `attend` at this context, forward and backward, of the algorithm that really runs."""

    @abstractmethod
    def state_bytes(self, context: int) -> int:
        """Bytes that a sequence of `context` tokens leaves behind for decoding the next one, fp32."""


def rotary_table(tokens: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (arXiv 2104.09864), each fp32 [T, 1, D/2]."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of [B, T, H, D] by their position's angle, in x's dtype."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
