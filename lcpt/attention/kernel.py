"""kernel: φ(q)·φ(k) of one feature map for all keys, at linear cost: linear attention, FLuRKA's kernel constituent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from lcpt_kernels import feature_attention

from lcpt.attention.base import LinearCost, Projected
from lcpt.attention.feature_maps import FEATURE_MAPS, check_feature_map


@dataclass
class KernelConfig:
    """Says which feature map the kernel kind has. Raises ValueError that names a key out of its range."""

    feature_map: str = "hedgehog"  # a name in attention.feature_maps.FEATURE_MAPS
    size: Optional[int] = None  # noqa: UP045  features; None: the default of the map. elu1 and hedgehog ignore it

    def __post_init__(self):
        check_feature_map("kernel", self.feature_map, self.size)


class Kernel(LinearCost):
    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: KernelConfig = config.kernel
        self.feature_map = FEATURE_MAPS[own.feature_map](n_kv_heads, self.head_dim, own.size)

    def attend_blocks(self, p: Projected, **stream):
        return feature_attention(
            self.feature_map(p.q, is_query=True), self.feature_map(p.k, is_query=False), p.v, **stream
        )

    def map_flops(self) -> float:
        return self.feature_map.flops

    def features(self) -> int:
        return self.feature_map.size

    def score_size(self) -> int:
        return self.feature_map.size
