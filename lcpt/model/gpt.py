"""Define the GPT: pre-norm blocks of attention and GEGLU, rotary positions, one matrix for embedding and head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lcpt.attention import AttentionConfig
from lcpt.attention.base import rotary_table
from lcpt.model.config_version import VERSION, check_version
from lcpt.model.loss import cross_entropy, token_losses


@dataclass
class ModelConfig:
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None  # None: n_heads
    vocab_size: int = 32000
    d_ff: int | None = None  # width of the GEGLU; None: 8/3 d_model, in multiples of 8
    rope_base: float = 10000.0
    z_loss: float = 0.0  # of Σ logsumexp(logits)², which keeps logits small; the reported loss does not have it
    activation_checkpointing: bool = False  # keep a block's input only, compute the block again in backward
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    version: int = VERSION  # whose defaults a missing key has; saved with weights, so that they stay what they are

    def __post_init__(self):
        check_version(self.version)
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "vocab_size", "d_ff"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"model.{name} is {value}; it must be ≥ 1")
        if not 0 < self.rope_base < math.inf:
            raise ValueError(f"model.rope_base is {self.rope_base}; it must be > 0 and finite")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"model.z_loss is {self.z_loss}; it must be ≥ 0 and finite")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"model.d_model {self.d_model} is no multiple of 2 · model.n_heads = {2 * self.n_heads}; "
                "a head needs an even dimension"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"model.n_heads {self.n_heads} is no multiple of model.n_kv_heads {self.kv_heads}")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def kinds(self) -> list[str]:
        """The kind of attention of each layer."""
        return [self.attention.kind_of_layer(layer) for layer in range(self.n_layers)]

    @property
    def ff_width(self) -> int:
        return self.d_model * 8 // 3 // 8 * 8 if self.d_ff is None else self.d_ff


class Cache(NamedTuple):
    """Holds what decoding needs of the tokens so far: their number, and the state of each layer."""

    position: int
    states: tuple


class GPT(nn.Module):
    """Maps tokens int64 [B, T], any T ≥ 1, to logits [B, T, V], or with labels to the summed loss and its count."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # mypy does not know what a ModuleList holds.
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config, layer) for layer in range(config.n_layers)))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        self._initialise()

    def forward(self, tokens: Tensor, labels: Tensor | None = None, cu_seqlens: Tensor | None = None):
        """Return logits, or with labels int64 [B, T], shifted, < 0 where none, (loss sum in nats, count of labels ≥ 0).

        cu_seqlens int [N + 1]: documents packed in one sequence, B = 1, each as if alone.
        """
        hidden = self.hidden(tokens, cu_seqlens)
        if labels is None:
            return hidden @ self.embedding.weight.mT
        loss, count = cross_entropy(hidden, self.embedding.weight, labels, self.config.z_loss)
        if torch.is_grad_enabled():
            loss = loss + count * self._aux_loss()
        return loss, count

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return -log p(label) of every position in nats, fp32 [B, T], 0 where the label is negative."""
        return token_losses(self.hidden(tokens), self.embedding.weight, labels)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Read tokens int64 [B, T], the beginning of sequences or the continuation of those that left `cache`.

        -> (logits [B, T, V], the cache after them). In layers of linear cost a cache does not grow with the sequence.
        """
        hidden, cache = self.extend(tokens, cache)
        return hidden @ self.embedding.weight.mT, cache

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Read tokens as prefill does: (normed output of the last block [B, T, d_model], the cache after them)."""
        position, states = cache or Cache(0, (None,) * len(self.blocks))
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)
        rotary, x, after = self._rotary(positions), self.embedding(tokens), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.extend(x, rotary, state)
            after.append(state)
        return self.norm(x), Cache(position + tokens.shape[1], tuple(after))

    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read token int64 [B] or [B, 1], the next of each sequence -> (logits [B, V], the cache after it)."""
        logits, cache = self.prefill(token.reshape(-1, 1), cache)
        return logits[:, 0], cache

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the normed output of the last block, [B, T, d_model]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if cu_seqlens is not None:
            # With output_size the host need not wait for the device.
            starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(positions))
            positions = positions - starts
        rotary, x = self._rotary(positions), self.embedding(tokens)
        for block in self.blocks:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, cu_seqlens, use_reentrant=False)
            else:
                x = block(x, rotary, cu_seqlens)
        return self.norm(x)

    def _aux_loss(self) -> Tensor | float:
        """Return 0 with the gradient of the layers' auxiliary losses: the reported loss stays the cross-entropy."""
        losses = [loss for block in self.blocks if (loss := block.attention.aux_loss()) is not None]
        return sum(loss - loss.detach() for loss in losses)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(positions, self.config.d_model // self.config.n_heads, self.config.rope_base)

    def _initialise(self) -> None:
        """Draw N(0, (0.55/√d_model)²), GPT-2's 0.02 at its width; 1/√(2 layers) of it on the residual projections."""
        std = 0.55 * self.config.d_model**-0.5
        for name, parameter in self.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                nn.init.normal_(parameter, std=std * (2 * self.config.n_layers) ** -0.5)
            elif name.endswith(("embedding.weight", ".qkv.weight", ".up.weight")):
                nn.init.normal_(parameter, std=std)


class Block(nn.Module):
    """Adds attention, then the feed-forward network, to the residual stream, each after a LayerNorm."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        kind = config.attention.attention_of_layer(layer)
        self.attention_norm = nn.LayerNorm(config.d_model, bias=False)
        self.attention = kind(config.d_model, config.n_heads, config.kv_heads, config.attention)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, bias=False)
        self.feed_forward = GEGLU(config.d_model, config.ff_width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, cu_seqlens)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def extend(self, x: Tensor, rotary: tuple[Tensor, Tensor], state) -> tuple[Tensor, object]:
        attended, state = self.attention.extend(self.attention_norm(x), rotary, state)
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x)), state


class GEGLU(nn.Module):
    """Computes W_down (GELU(W_gate x) ∘ W_value x) (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)
