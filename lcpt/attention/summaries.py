"""Summaries of whole blocks, K̃ = P K and Ṽ = P V with row-stochastic P [r, c]: the low-rank half of FLuRKA.

Linformer (arXiv 2006.04768) projects the whole sequence and cannot be causal; here every block of c tokens has its own
projection, as in Transformer-LS (arXiv 2107.02192), and only a block that is complete has summaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from lcpt_kernels.arguments import LEAST_GATE
from lcpt_kernels.pooling import pool_blocks
from torch import Tensor, nn

from lcpt.attention.base import Projected
from lcpt.parallel.sequence import SequenceSlice, shift

OWN_SEGMENT = 4.0  # at first a summary looks e⁴ times as much at a token of its own segment of the block


@dataclass
class SummariesConfig:
    number: Optional[int] = None  # noqa: UP045  r, summaries of a block; None: an eighth of its tokens
    projection: str = "dynamic"  # dynamic: P is of the tokens' own making; table: learned, the same for every block

    def __post_init__(self):
        if self.projection not in ("dynamic", "table"):
            raise ValueError(f"model.attention: summaries.projection is {self.projection!r}; it is dynamic or table")
        if self.number is not None and self.number < 1:
            raise ValueError(f"model.attention: summaries.number is {self.number}; it must be ≥ 1")


class Pooled(NamedTuple):
    k: Tensor  # K̃ [B, N·r, Hkv, D] of the N blocks that were completed; of documents, N = T // c, the last are no one's
    v: Tensor  # Ṽ, the same
    mass: Tensor | None  # P γ [B, N·r, Hkv] under a gate
    pending: dict[str, Tensor]  # what the tokens of the unfinished block leave for the summaries to come


class Summaries(nn.Module):
    """P = softmax over the c positions of X W_P + segments (dynamic), or of a learned table + segments."""

    segments: Tensor  # [c, 1, r]

    def __init__(self, d_model: int, n_kv_heads: int, head_dim: int, block_size: int, config: SummariesConfig):
        super().__init__()
        c, r = block_size, config.number or max(1, block_size // 8)
        if r > c:
            raise ValueError(f"model.attention: summaries.number {r} is more than block_size {c}")
        self.block_size, self.number = c, r
        self.register_buffer("segments", torch.empty(c, 1, r), persistent=False)
        self.reset_buffers()
        self.W_P = self.table = None
        if config.projection == "dynamic":
            self.W_P = nn.Linear(d_model, n_kv_heads * r, bias=False)
            nn.init.normal_(self.W_P.weight, std=0.02)
        else:
            self.table = nn.Parameter(torch.zeros(c, n_kv_heads, r))
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)  # pooling shrinks keys that are unlike by √(c/r)

    def reset_buffers(self) -> None:
        """Fill what no checkpoint holds, which a module that was built on the meta device does not have."""
        places, number = torch.arange(self.block_size)[:, None, None], torch.arange(self.number)
        self.segments.copy_(OWN_SEGMENT * (places * self.number // self.block_size == number))

    def forward(
        self,
        p: Projected,
        pending: dict[str, Tensor] | None,
        cu_seqlens: Tensor | None,
        part: SequenceSlice | None = None,
    ) -> Pooled:
        """Under a gate, Ṽ = P (γ ∘ V) with γ_s = exp(G_end − G_s): what a token has faded to by the block's end.

        part: the tokens are that slice of longer sequences; its summaries are of the blocks that end in it.
        """
        assert p.k_plain is not None
        rows = {"k": p.k_plain, "v": p.v}
        if p.log_gate is not None:
            rows["log_gate"] = p.log_gate
        if self.W_P is not None:
            rows["logits"] = self.W_P(p.x).unflatten(-1, (-1, self.number))  # [B, T, Hkv, r]
        if part is not None:
            unfinished = [held % self.block_size for held in part.held]
            pending = shift(part, rows, [dict.fromkeys(rows, count) for count in unfinished])
            if cu_seqlens is not None:
                cu_seqlens = torch.cat((cu_seqlens[:1], cu_seqlens[1:] + unfinished[part.group.rank]))
        if pending is not None:
            rows = {name: torch.cat((pending[name], x), dim=1) for name, x in rows.items()}
        whole, rest = self._split(rows["k"].shape[1], cu_seqlens)
        blocks = {name: x[:, whole].unflatten(1, (-1, self.block_size)) for name, x in rows.items()}  # [B, N, c, ...]

        gamma = None
        if "log_gate" in blocks:
            log_gate = blocks["log_gate"].clamp(min=LEAST_GATE)  # a difference of infinite sums would be NaN
            G = log_gate.double().cumsum(2)  # differences of sums that may be large
            gamma = (G[:, :, -1:] - G).exp().to(log_gate.dtype)  # [B, N, c, Hkv]
        k, v, mass = pool_blocks(
            blocks["k"],
            blocks["v"],
            logits=self.table if self.W_P is None else blocks["logits"],
            segments=self.segments,
            gamma=gamma,
        )
        return Pooled(self.k_norm(k), v, mass, {name: x[:, rest] for name, x in rows.items()})

    def _split(self, tokens: int, cu_seqlens: Tensor | None) -> tuple[Tensor | slice, slice]:
        """The tokens of whole blocks, of each document its own; and those of the last, unfinished one.

        Packed documents have as many whole blocks as there can be: the host does not read cu_seqlens, so that it need
        not wait for the device. What is too much, at the end, is of tokens that are there.
        """
        c = self.block_size
        if cu_seqlens is None:
            return slice(0, tokens // c * c), slice(tokens // c * c, tokens)
        ends = cu_seqlens.long()
        count = ends.diff() // c
        after = count.cumsum(0)  # [docs]: the whole block after a document's last
        block = torch.arange(tokens // c, device=ends.device)
        document = torch.searchsorted(after, block, right=True).clamp_(max=len(count) - 1)
        first = ends[document] + (block - (after - count)[document]) * c
        whole = first.clamp_(max=tokens - c)[:, None] + torch.arange(c, device=ends.device)
        return whole.flatten().to(self.k_norm.weight.device, non_blocking=True), slice(tokens, tokens)

    def flops(self) -> float:
        """A token, for one key-value head, without W_P, which is a matrix of the layer: P K and P V."""
        return 4.0 * self.number * self.k_norm.normalized_shape[0]

    def pending_floats_per_token(self) -> int:
        """Count the floats that a key-value head keeps of a token of the unfinished block."""
        return 2 * self.k_norm.normalized_shape[0] + (self.number if self.table is None else 0)
