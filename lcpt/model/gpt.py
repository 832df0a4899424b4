"""Define the GPT: pre-norm blocks of attention and a feed-forward network, between an embedding and a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple, cast

import torch
from lcpt_kernels.arguments import is_on_device
from lcpt_kernels.documents import outside_graphs
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lcpt.attention import AttentionConfig
from lcpt.attention.base import positions_in_documents
from lcpt.model.config_version import VERSION, check_version
from lcpt.model.feed_forward import ACTIVATIONS, FeedForward, default_width
from lcpt.model.generation import Sampling, generate
from lcpt.model.loss import cross_entropy, token_losses
from lcpt.model.norms import NORMS, add_and_norm, build_norm
from lcpt.model.rope_scaling import RopeScalingConfig, scaled_rotary_table
from lcpt.parallel.sequence import SequenceSlice
from lcpt.utils.host_offload import keep_on_host


@dataclass
class ModelConfig:
    """Describes a GPT. Raises ValueError that names the key which is out of its range."""

    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int | None = None  # None: n_heads
    vocab_size: int = 32000
    norm: str = "layer_norm"  # layer_norm | rms_norm
    norm_eps: float = 1e-5
    feed_forward: str = "geglu"  # geglu | swiglu | gelu_tanh
    d_ff: int | None = None  # its width; None: 8/3 d_model in multiples of 8, 4 d_model without a gate
    bias: bool = False  # of LayerNorms and of the feed-forward network's projections; model.attention has its own
    tie_embeddings: bool = True  # one matrix for embedding and head
    positions: str = "rotary"  # rotary | learned, a vector for each that is added to the token's
    max_positions: int | None = None  # the longest sequence, where positions are learned
    rope_base: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    z_loss: float = 0.0  # of Σ logsumexp(logits)², which keeps logits small; the reported loss does not have it
    # true: keep a block's input only, compute the block again in backward; selective: norms and activations alone;
    # offload: as true, the inputs on the host and the feed-forward network in pieces
    activation_checkpointing: bool | str = False
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    version: int = VERSION  # whose defaults a missing key has; saved with weights, so that they stay what they are

    def __post_init__(self):
        check_version(self.version)
        if not isinstance(self.attention, AttentionConfig):
            raise ValueError(
                f"model.attention is a {type(self.attention).__name__}; give an AttentionConfig, as "
                "AttentionConfig(kind='softmax')"
            )
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "vocab_size", "d_ff", "max_positions"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"model.{name} is {value!r}; it must be a whole number ≥ 1")
        for name in ("rope_base", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be > 0 and finite")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"model.z_loss is {self.z_loss}; it must be ≥ 0 and finite")
        for name, known in (
            ("norm", NORMS),
            ("feed_forward", ACTIVATIONS),
            ("positions", ("rotary", "learned")),
            ("activation_checkpointing", (False, "selective", True, "offload")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; it is {', '.join(map(str, known)).lower()}")
        if (self.positions == "learned") != (self.max_positions is not None):
            raise ValueError(
                f"model.positions is {self.positions} and model.max_positions {self.max_positions}; "
                "learned positions need a number of them, rotary ones have none"
            )
        if self.attention.head_dim is None and self.d_model % (2 * self.n_heads):
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
    def head_dim(self) -> int:
        return self.attention.head_dim or self.d_model // self.n_heads

    @property
    def kinds(self) -> list[str]:
        """The kind of attention of each layer."""
        return [self.attention.kind_of_layer(layer) for layer in range(self.n_layers)]

    @property
    def recomputes_blocks(self) -> bool:
        """Whether backward computes whole blocks again."""
        return self.activation_checkpointing in (True, "offload")

    @property
    def ff_width(self) -> int:
        return default_width(self.feed_forward, self.d_model) if self.d_ff is None else self.d_ff

    def build_norm(self) -> nn.Module:
        """Build a norm of the residual stream."""
        return build_norm(self.norm, self.d_model, self.norm_eps, self.bias)


RotaryTable = tuple[Tensor, Tensor] | None  # cos and sin of every position, each fp32 [T, 1, D/2]


class Cache(NamedTuple):
    """Holds what decoding needs of the tokens so far: their number, and the state of each layer."""

    position: int
    states: tuple

    def repeat(self, times: int) -> Cache:
        """Return the cache of `times` copies of each sequence, side by side."""
        copies = tree_map_only(Tensor, lambda x: x.repeat_interleave(times, dim=0), self.states)
        return Cache(self.position, copies)

    def select(self, rows: Tensor) -> Cache:
        """Return the cache of these sequences, int64 [N], which may leave some out and name others again."""
        return Cache(self.position, tree_map_only(Tensor, lambda x: x.index_select(0, rows), self.states))


class GPT(nn.Module):
    """Maps tokens int32 or int64 [B, T], any T ≥ 1, to logits [B, T, V], or with labels to (summed loss, count)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # mypy does not know what a ModuleList holds.
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config, layer) for layer in range(config.n_layers)))
        self.norm = config.build_norm()
        if config.positions == "learned":
            self.positions = nn.Embedding(cast(int, config.max_positions), config.d_model)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialise()

    @property
    def head_weight(self) -> Tensor:
        """The matrix that makes logits, [V, d_model]."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        part: SequenceSlice | None = None,
    ):
        """Return logits, or with labels like them, shifted, < 0 where none, (loss sum in nats, count of labels ≥ 0).

        cu_seqlens int [N + 1]: documents packed in one sequence, B = 1, each as if alone. Its last entry may be
        repeated to a fixed length: documents may be empty. On a GPU the host does not read it.
        part: the tokens are that slice of longer sequences, whose ranks all call this; cu_seqlens has the borders in
        it, and the sums over ranks of loss and count are those of the whole.
        """
        hidden = self.hidden(tokens, cu_seqlens, part)
        if labels is None:
            return hidden @ self.head_weight.mT
        loss, count = cross_entropy(hidden, self.head_weight, labels, self.config.z_loss)
        if torch.is_grad_enabled():
            loss = loss + count * self.aux_loss()
        return loss, count

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return -log p(label) of every position in nats, fp32 [B, T], 0 where the label is negative."""
        return token_losses(self.hidden(tokens), self.head_weight, labels)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: Cache | None = None, last_only: bool = False) -> tuple[Tensor, Cache]:
        """Read tokens int64 [B, T], the beginning of sequences or the continuation of those that left `cache`.

        -> (logits [B, T, V], or with last_only those of the last token alone, [B, 1, V]; the cache after them). In
        layers of linear cost a cache does not grow with the sequence.
        """
        hidden, cache = self.extend(tokens, cache)
        return (hidden[:, -1:] if last_only else hidden) @ self.head_weight.mT, cache

    @torch.no_grad()
    def extend(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Read tokens as prefill does: (normed output of the last block [B, T, d_model], the cache after them)."""
        _check_tokens(tokens)
        position, states = cache or Cache(0, (None,) * len(self.blocks))
        positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)
        (x, rotary), after = self._embed(tokens, positions, position + tokens.shape[1]), []
        delta: Tensor | None = None
        for block, state in zip(self.blocks, states, strict=True):
            x, delta, state = block.extend(x, delta, rotary, state)
            after.append(state)
        return add_and_norm(x, delta, self.norm)[0], Cache(position + tokens.shape[1], tuple(after))

    def decode(self, token: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read token int64 [B] or [B, 1], the next of each sequence -> (logits [B, V], the cache after it)."""
        logits, cache = self.prefill(token.reshape(-1, 1), cache)
        return logits[:, 0], cache

    def generate(
        self,
        tokens: Tensor,
        max_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue tokens int64 [B, T], T ≥ 1, by max_tokens ≥ 1 of their own each -> the new ones, int64 [B, new].

        temperature, top_k, top_p: see Sampling. A BOS among them begins another document, as the one at the start of
        `tokens` should; it does not end the row. Raises ValueError for what is out of its range.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens} must be ≥ 1")
        drawn = generate(self, tokens, Sampling(temperature, top_k, top_p), [generator] * len(tokens))
        return torch.stack(list(islice(drawn, max_tokens)), dim=1)

    def hidden(self, tokens: Tensor, cu_seqlens: Tensor | None = None, part: SequenceSlice | None = None) -> Tensor:
        """Return the normed output of the last block, [B, T, d_model]."""
        if part is None:  # a rank's slice may be empty
            _check_tokens(tokens)
        length: int | None = tokens.shape[1] if part is None else part.longest
        held = 0 if part is None else part.start
        if cu_seqlens is None:
            positions = torch.arange(held, held + tokens.shape[1], device=tokens.device)
        else:
            positions = positions_in_documents(cu_seqlens, tokens.shape[1], held)
            if part is None:
                length = None if is_on_device(cu_seqlens) else int(cu_seqlens.diff().max())
        x, rotary = self._embed(tokens, positions, length)
        delta: Tensor | None = None
        offload = self.config.activation_checkpointing == "offload"
        kept: AbstractContextManager = keep_on_host() if offload else nullcontext()
        for block in self.blocks:
            if self.config.recomputes_blocks and torch.is_grad_enabled():
                x = x if delta is None else x + delta  # so that one tensor is kept, not two
                # What blocks share is bound: `kept` would copy a tensor that checkpoint is given for each.
                function = partial(block, delta=None, rotary=rotary, cu_seqlens=cu_seqlens, part=part)
                with kept:
                    x, delta = checkpoint(function, x, use_reentrant=False)
            else:
                x, delta = block(x, delta, rotary, cu_seqlens, part)
        return add_and_norm(x, delta, self.norm)[0]

    def aux_loss(self) -> Tensor | float:
        """Return 0 with the gradient of the layers' auxiliary losses: the reported loss stays the cross-entropy."""
        losses = [loss for block in self.blocks if (loss := block.attention.aux_loss()) is not None]
        return sum(loss - loss.detach() for loss in losses)

    def _embed(self, tokens: Tensor, positions: Tensor, length: int | None) -> tuple[Tensor, RotaryTable]:
        """Return the first block's input [B, T, d_model], and the table that turns queries and keys, or None.

        `length` is that of the longest sequence or document; None: only the device knows it. There the lookup of a
        learned position beyond the last fails on its own.
        """
        config, x = self.config, self.embedding(tokens)
        if config.max_positions is None:
            return x, scaled_rotary_table(positions, config.head_dim, config.rope_base, config.rope_scaling)
        if length is not None and length > config.max_positions:
            raise ValueError(f"a sequence of {length} tokens exceeds model.max_positions {config.max_positions}")
        return x + self.positions(positions), None

    def _initialise(self) -> None:
        """Draw N(0, (0.55/√d_model)²), GPT-2's 0.02 at its width; 1/√(2 layers) of it on the residual projections."""
        std = 0.55 * self.config.d_model**-0.5
        for name, parameter in self.named_parameters():
            if name.endswith((".out.weight", ".down.weight")):
                nn.init.normal_(parameter, std=std * (2 * self.config.n_layers) ** -0.5)
            elif name.endswith(("embedding.weight", "positions.weight", "head.weight", ".qkv.weight", ".up.weight")):
                nn.init.normal_(parameter, std=std)
            elif name.endswith((".qkv.bias", ".out.bias", ".up.bias", ".down.bias")):
                nn.init.zeros_(parameter)


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2 or not tokens.shape[1] or tokens.is_floating_point():
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}; they must be whole numbers [B, T], T ≥ 1")


class Block(nn.Module):
    """Adds attention, then the feed-forward network, to the residual stream, each after a norm.

    What a block adds last, `delta`, it hands on: the next norm adds it in the same pass. The first block has none.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        kind = config.attention.attention_of_layer(layer)
        self.selective = config.activation_checkpointing == "selective"
        self.in_pieces = config.activation_checkpointing == "offload"
        self.attention_norm = config.build_norm()
        self.attention = kind(config.d_model, config.n_heads, config.kv_heads, config.attention)
        self.feed_forward_norm = config.build_norm()
        self.feed_forward = FeedForward(config.feed_forward, config.d_model, config.ff_width, config.bias)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rotary: RotaryTable,
        cu_seqlens: Tensor | None = None,
        part: SequenceSlice | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (x, delta) after this block, each [B, T, d_model]."""
        # Of documents on several ranks the host reads the borders: a graph would be that of one batch.
        attention = self.attention if part is None or part.borders is None else outside_graphs(self.attention)
        if self.selective and torch.is_grad_enabled():
            x = x if delta is None else x + delta
            x = x + attention(x, rotary, cu_seqlens, norm=self.attention_norm, part=part)
            return x, self.feed_forward(x, norm=self.feed_forward_norm)
        normed, x = add_and_norm(x, delta, self.attention_norm)
        normed, x = add_and_norm(x, attention(normed, rotary, cu_seqlens, part=part), self.feed_forward_norm)
        return x, self.feed_forward.in_pieces(normed) if self.in_pieces else self.feed_forward(normed)

    def extend(self, x: Tensor, delta: Tensor | None, rotary: RotaryTable, state) -> tuple[Tensor, Tensor, object]:
        """Do the same for the continuation of a sequence whose layer left `state` -> (x, delta, the state after it)."""
        normed, x = add_and_norm(x, delta, self.attention_norm)
        attended, state = self.attention.extend(normed, rotary, state)
        normed, x = add_and_norm(x, attended, self.feed_forward_norm)
        return x, self.feed_forward(normed), state
