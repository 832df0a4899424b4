"""Kinds of attention by name, the one configuration that chooses among them, and layers for a model of one's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lcpt.attention.base import GATES, Attention, LinearCost, positions_in_documents, rotary_table
from lcpt.attention.fastmax import Fastmax, FastmaxConfig
from lcpt.attention.feedforward import Feedforward, FeedforwardConfig
from lcpt.attention.flurka import Flurka, FlurkaConfig
from lcpt.attention.kernel import Kernel, KernelConfig
from lcpt.attention.lowrank import Lowrank, LowrankConfig
from lcpt.attention.polynomial import Polynomial, PolynomialConfig
from lcpt.attention.polysketch import Polysketch, PolysketchConfig
from lcpt.attention.qk_norm import QK_NORMS
from lcpt.attention.softmax import Softmax, SoftmaxConfig
from lcpt.attention.sparse import SparseHash, SparseHashConfig, SparseQK, SparseQKConfig

ATTENTION: dict[str, type[Attention]] = {
    "softmax": Softmax,
    "polynomial": Polynomial,
    "polysketch": Polysketch,
    "kernel": Kernel,
    "fastmax": Fastmax,
    "feedforward": Feedforward,
    "lowrank": Lowrank,
    "flurka": Flurka,
    "sparse_qk": SparseQK,
    "sparse_hash": SparseHash,
}


@dataclass
class AttentionConfig:
    """Says which kind of attention each layer has, with the settings of all and a section for each kind."""

    kind: str = "polysketch"
    pattern: list[str] = field(default_factory=list)  # kinds repeated over the layers; overrides kind
    block_size: int = 256  # tokens a block, for the kinds that have blocks
    gate: str = "none"  # none | scalar | data: how much a token weighs less for each later one, in kinds with a state
    key_shift: bool = True  # a key is its own and, learned per channel, a share of the token before it
    head_dim: int | None = None  # None: model.d_model / model.n_heads
    bias: bool = False  # of the projections
    qk_norm: str = "layer_norm"  # layer_norm | rms_norm | none: of every head's queries and keys, before positions
    qk_norm_eps: float = 1e-5
    output_norm: bool = False  # RMSNorm of each head's output, before the heads are mixed
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    polynomial: PolynomialConfig = field(default_factory=PolynomialConfig)
    polysketch: PolysketchConfig = field(default_factory=PolysketchConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    fastmax: FastmaxConfig = field(default_factory=FastmaxConfig)
    lowrank: LowrankConfig = field(default_factory=LowrankConfig)
    flurka: FlurkaConfig = field(default_factory=FlurkaConfig)
    feedforward: FeedforwardConfig = field(default_factory=FeedforwardConfig)
    sparse_qk: SparseQKConfig = field(default_factory=SparseQKConfig)
    sparse_hash: SparseHashConfig = field(default_factory=SparseHashConfig)

    def __post_init__(self):
        for kind in (self.kind, *self.pattern):
            if kind not in ATTENTION:
                raise ValueError(f"model.attention knows no kind {kind!r}; it knows {', '.join(sorted(ATTENTION))}")
        if self.gate not in ("none", *GATES):
            raise ValueError(f"model.attention.gate is {self.gate!r}; it is none, {' or '.join(GATES)}")
        kinds = self.pattern or [self.kind]
        if self.gate != "none" and not any(
            issubclass(ATTENTION[kind].resolve_class(self), LinearCost) for kind in kinds
        ):
            raise ValueError(
                f"model.attention.gate is {self.gate}, and {', '.join(kinds)} have no state to gate; "
                "take none, or a kind of linear cost"
            )
        if self.block_size < 1:
            raise ValueError(f"model.attention.block_size is {self.block_size}; it must be ≥ 1")
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ValueError(f"model.attention.head_dim is {self.head_dim}; it must be even and ≥ 2")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"model.attention.qk_norm is {self.qk_norm!r}; it is {', '.join(QK_NORMS)}")
        if not 0 < self.qk_norm_eps < math.inf:
            raise ValueError(f"model.attention.qk_norm_eps is {self.qk_norm_eps}; it must be > 0 and finite")

    def attention_of_layer(self, layer: int) -> type[Attention]:
        return ATTENTION[self.kind_of_layer(layer)].resolve_class(self)

    def kind_of_layer(self, layer: int) -> str:
        return self.pattern[layer % len(self.pattern)] if self.pattern else self.kind


def build_attention(kind: str, d_model: int, n_heads: int, n_kv_heads: int | None = None, **options) -> Attention:
    """Build one layer of attention as a module for any model: x [B, T, d_model] -> the same shape.

    Args:
        kind: a name in ATTENTION.
        n_kv_heads: heads of keys and values, of which each serves as many of queries; None: n_heads.
        options: fields of AttentionConfig but kind and pattern, as block_size=128, key_shift=False,
            polysketch=PolysketchConfig(size=64).

    Returns:
        layer(x, rotary, cu_seqlens=None) -> o, and layer.extend(x, rotary, state) -> (o, state); rotary: what
        rotary_table gives for the positions of x, or None. docs/attention-modules.md has examples.

    Raises:
        ValueError: an option or a number of heads that does not fit; the message names it.
    """
    config, kv_heads = AttentionConfig(kind=kind, **options), n_heads if n_kv_heads is None else n_kv_heads
    if config.head_dim is None and d_model % (2 * n_heads):
        raise ValueError(f"d_model {d_model} is no multiple of 2 · n_heads = {2 * n_heads}; give another, or head_dim")
    if kv_heads < 1 or n_heads % kv_heads:
        raise ValueError(f"n_heads {n_heads} is no multiple of n_kv_heads {kv_heads}")
    return config.attention_of_layer(0)(d_model, n_heads, kv_heads, config)


__all__ = [
    "ATTENTION",
    "Attention",
    "AttentionConfig",
    "FastmaxConfig",
    "FeedforwardConfig",
    "FlurkaConfig",
    "KernelConfig",
    "LowrankConfig",
    "PolynomialConfig",
    "PolysketchConfig",
    "SoftmaxConfig",
    "SparseHashConfig",
    "SparseQKConfig",
    "build_attention",
    "positions_in_documents",
    "rotary_table",
]
