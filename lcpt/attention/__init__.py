"""Kinds of attention by name, and the one configuration that chooses among them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lcpt.attention.base import Attention
from lcpt.attention.polynomial import Polynomial, PolynomialConfig
from lcpt.attention.polysketch import Polysketch, PolysketchConfig
from lcpt.attention.softmax import Softmax

ATTENTION: dict[str, type[Attention]] = {"softmax": Softmax, "polynomial": Polynomial, "polysketch": Polysketch}


@dataclass
class AttentionConfig:
    kind: str = "polysketch"
    pattern: list[str] = field(default_factory=list)  # kinds repeated over the layers; overrides kind
    block_size: int = 256  # tokens a block, for the kinds that have blocks
    polynomial: PolynomialConfig = field(default_factory=PolynomialConfig)
    polysketch: PolysketchConfig = field(default_factory=PolysketchConfig)

    def __post_init__(self):
        for kind in (self.kind, *self.pattern):
            if kind not in ATTENTION:
                raise ValueError(f"model.attention knows no kind {kind!r}; it knows {', '.join(sorted(ATTENTION))}")
        if self.block_size < 1:
            raise ValueError(f"model.attention.block_size is {self.block_size}; it must be ≥ 1")

    def kind_of_layer(self, layer: int) -> str:
        return self.pattern[layer % len(self.pattern)] if self.pattern else self.kind


__all__ = ["ATTENTION", "Attention", "AttentionConfig"]
