"""feedforward: φ(q)·φ(k) of a trainable feed-forward kernel φ with positive output, at linear cost.

Linear Self-Attention with trainable feedforward kernels (arXiv 2211.04076): FFN, OGLU (an orthogonal path times a gate)
and AOGLU (its gate of low rank), with matrices of their own for every head, shared by queries and keys. A penalty holds
the path near orthogonal: without it some runs collapse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lcpt_kernels import feature_attention
from lcpt_kernels.feature_maps import aoglu, oglu, per_head, softplus
from torch import Tensor, nn

from lcpt.attention.base import LinearCost, Projected, in_fp32

GATE_RANK = 4  # AOGLU's gate has rank d / 4
POSITIVE: dict[str, Callable[..., Tensor]] = {"ffn": softplus, "oglu": oglu, "aoglu": aoglu}


@dataclass
class FeedforwardConfig:
    """Says which trained feature map the feedforward kind has. Raises ValueError that names a key out of its range."""

    map: str = "oglu"  # ffn | oglu | aoglu
    layers: int = 1
    penalty: float = 0.01  # λ of λ · mean (W Wᵀ − I)², added to the mean loss for each layer

    def __post_init__(self):
        if self.map not in ("ffn", "oglu", "aoglu"):
            raise ValueError(f"model.attention.feedforward.map is {self.map!r}; it is ffn, oglu or aoglu")
        if self.layers < 1:
            raise ValueError(f"model.attention.feedforward.layers is {self.layers}; it must be ≥ 1")
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"model.attention.feedforward.penalty is {self.penalty}; it must be ≥ 0 and finite")


class FeedforwardLayer(nn.Module):
    """act(x W) for ffn, act(x W) ∘ σ(x G) for oglu, act(x W) ∘ σ((x A) B) for aoglu; x [B, T, H, d] -> the same shape.

    W starts orthogonal; act is softplus where the result must be positive, in the last layer, and the identity before.
    """

    def __init__(self, n_kv_heads: int, head_dim: int, kind: str, last: bool):
        super().__init__()
        self.positive = POSITIVE[kind] if last else None
        self.orthogonality_loss: Tensor | None = (
            None  # mean (W Wᵀ − I)², a scalar, of the last forward pass that has a backward
        )
        self.W = nn.Parameter(torch.empty(n_kv_heads, head_dim, head_dim))
        for matrix in self.W:
            nn.init.orthogonal_(matrix)
        rank = max(1, head_dim // GATE_RANK)
        shapes = {"ffn": [], "oglu": [(head_dim, head_dim)], "aoglu": [(head_dim, rank), (rank, head_dim)]}[kind]
        self.gate = nn.ParameterList(torch.randn(n_kv_heads, *shape) * shape[0] ** -0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.orthogonality_loss = _OrthogonalityLoss.apply(self.W)
        if self.positive is not None:
            return self.positive(x, self.W, *self.gate)
        y = per_head(x, self.W)
        if len(self.gate):
            gate = x
            for matrices in self.gate:
                gate = per_head(gate, matrices)
            y = y * torch.sigmoid(gate)
        return y


class _OrthogonalityLoss(torch.autograd.Function):
    """mean (W Wᵀ − I)² of W [Hkv, d, d], in fp32.

    Its gradient is made in forward and kept outside autograd's saved tensors: when backward begins with the loss, W may
    have gone back to the other ranks (ZeRO-3), and a saved tensor would have its block computed again (activation
    checkpointing) before its turn.
    """

    @staticmethod
    def forward(ctx, W):
        wide = in_fp32(W)
        excess = wide @ wide.mT - torch.eye(W.shape[-1], device=W.device)
        ctx.gradient = (4 / W.numel() * excess @ wide).to(W.dtype)
        return excess.square().mean()

    @staticmethod
    def backward(ctx, d):
        return d.to(ctx.gradient.dtype) * ctx.gradient


class Feedforward(LinearCost):
    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: FeedforwardConfig = config.feedforward
        self.lam = own.penalty
        self.phi = nn.Sequential(
            *(
                FeedforwardLayer(n_kv_heads, self.head_dim, own.map, last=layer == own.layers - 1)
                for layer in range(own.layers)
            )
        )

    def attend_blocks(self, p: Projected, **stream):
        return feature_attention(self.phi(p.q), self.phi(p.k), p.v, **stream)

    def aux_loss(self) -> Tensor | None:
        return self.lam * sum(layer.orthogonality_loss for layer in self.phi) if self.lam else None

    def features(self) -> int:
        return self.head_dim

    def map_flops(self) -> float:
        return 2.0 * sum(p.numel() for p in self.phi.parameters()) / self.n_kv_heads
