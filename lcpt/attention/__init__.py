"""Kinds of attention by name, and the one configuration that chooses among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lcpt.attention.base import GATES, Attention, LinearCost
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


__all__ = ["ATTENTION", "Attention", "AttentionConfig"]
