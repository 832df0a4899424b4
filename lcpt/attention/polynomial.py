"""polynomial: (q·k/(p √d) + shift)^p, p even, exact (PolySketchFormer, arXiv 2310.01655, section 1).

The shift lets a weight grow with q·k from its sign on, as e^(q·k/√d) does: an even power of q·k alone has correlation
0 with it at the start, and a model with such weights does not learn to recall.

p = 2 has d (d + 1) / 2 features, few enough to keep: linear cost (power attention, arXiv 2507.04239). For p = 4 and
more their number is out of reach, and the cost is quadratic in the context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcpt_kernels import polynomial_attention, squared_attention
from lcpt_kernels.symmetric_features import QuadraticFeatures
from torch import Tensor

from lcpt.attention.base import Attention, KeyValueCache, LinearCost, Projected


@dataclass
class PolynomialConfig:
    """Says which power the polynomial kind takes. Raises ValueError that names a key out of its range."""

    degree: int = 4  # even
    shift: float = 1.0  # of (q·k / (degree √d) + shift)^degree, which begins as e^(q·k/√d) does; 0: (q·k/d)^degree

    def __post_init__(self):
        if self.degree < 2 or self.degree % 2:
            raise ValueError(f"model.attention.polynomial.degree is {self.degree}; it must be even and ≥ 2")
        check_shift("polynomial", self.shift)


def check_shift(kind: str, shift: float) -> None:
    """Raise ValueError where model.attention.`kind`.shift is no shift."""
    if not 0 <= shift < math.inf:
        raise ValueError(f"model.attention.{kind}.shift is {shift}; it must be ≥ 0 and finite")


def power_scale(degree: int, shift: float, head_dim: int) -> float:
    """Return the factor of q·k in the power: with a shift 1 / (degree √d), so that (x/degree + 1)^degree begins as e^x
    does; without one 1 / d."""
    return 1 / (degree * head_dim**0.5) if shift else 1 / head_dim


class Polynomial(KeyValueCache):
    """Any even degree, at quadratic cost."""

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        own: PolynomialConfig = config.polynomial
        self.degree, self.shift = own.degree, own.shift
        self.scale = power_scale(own.degree, own.shift, self.head_dim)

    @classmethod
    def resolve_class(cls, config) -> type[Attention]:
        return SquaredPolynomial if config.polynomial.degree == 2 else cls

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return polynomial_attention(
            q, k, v, degree=self.degree, scale=self.scale, shift=self.shift, cu_seqlens=cu_seqlens
        )

    def attend_flops(self, context: int) -> tuple[float, float]:
        product = self.n_heads * self.head_dim * context  # tiles beyond the diagonal are skipped: the causal half
        return 2 * product, 5 * product


class SquaredPolynomial(LinearCost):
    """(q·k/(2 √d) + shift)², at linear cost."""

    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        shift = config.polynomial.shift
        self.scale = power_scale(2, shift, self.head_dim)
        self.coefficients = (shift**2, 2 * shift, 1.0)

    def attend_blocks(self, p: Projected, **stream):
        offset = self.scale**2  # as in polynomial_attention, scale^degree
        return squared_attention(self.scale * p.q, p.k, p.v, coefficients=self.coefficients, offset=offset, **stream)

    def features(self) -> int:
        return QuadraticFeatures(self.head_dim, self.coefficients).dimension
