"""polynomial: (q·k/d)^p, p even, exact (PolySketchFormer, arXiv 2310.01655, section 1).

p = 2 has d (d + 1) / 2 features, few enough to keep: linear cost (power attention, arXiv 2507.04239). For p = 4 and
more their number is out of reach, and the cost is quadratic in the context.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcpt_kernels import polynomial_attention, squared_attention
from lcpt_kernels.symmetric_features import QuadraticFeatures
from torch import Tensor

from lcpt.attention.base import Attention, KeyValueCache, LinearCost, Projected

SQUARE = (0.0, 0.0, 1.0)


@dataclass
class PolynomialConfig:
    degree: int = 4  # even

    def __post_init__(self):
        if self.degree < 2 or self.degree % 2:
            raise ValueError(f"model.attention.polynomial.degree is {self.degree}; it must be even and ≥ 2")


class Polynomial(KeyValueCache):
    """Any even degree, at quadratic cost."""

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        self.degree = config.polynomial.degree

    @classmethod
    def resolve_class(cls, config) -> type[Attention]:
        return SquaredPolynomial if config.polynomial.degree == 2 else cls

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return polynomial_attention(q, k, v, degree=self.degree, scale=1 / self.head_dim, cu_seqlens=cu_seqlens)

    def attend_flops(self, context: int) -> tuple[float, float]:
        product = self.n_heads * self.head_dim * context  # tiles beyond the diagonal are skipped: the causal half
        return 2 * product, 5 * product


class SquaredPolynomial(LinearCost):
    """(q·k/d)², at linear cost."""

    def attend_blocks(self, p: Projected, **stream):
        offset = self.head_dim**-2.0  # as in polynomial_attention, scale^degree
        return squared_attention(p.q / self.head_dim, p.k, p.v, coefficients=SQUARE, offset=offset, **stream)

    def features(self) -> int:
        return QuadraticFeatures(self.head_dim, SQUARE).dimension
