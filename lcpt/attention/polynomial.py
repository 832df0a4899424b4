"""polynomial: (q·k/d)^p, p even, exact and quadratic in time (PolySketchFormer, arXiv 2310.01655, section 1)."""

from __future__ import annotations

from dataclasses import dataclass

from lcpt_kernels import polynomial_attention
from torch import Tensor

from lcpt.attention.base import KeyValueCache


@dataclass
class PolynomialConfig:
    degree: int = 4  # even

    def __post_init__(self):
        if self.degree < 2 or self.degree % 2:
            raise ValueError(f"model.attention.polynomial.degree is {self.degree}; it must be even and ≥ 2")


class Polynomial(KeyValueCache):
    def __init__(self, d_model, n_heads, n_kv_heads, config):
        super().__init__(d_model, n_heads, n_kv_heads, config)
        self.degree = config.polynomial.degree

    def attend_to(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return polynomial_attention(q, k, v, degree=self.degree, scale=1 / self.head_dim)

    def attend_flops(self, context: int) -> tuple[float, float]:
        product = self.n_heads * self.head_dim * context  # tiles beyond the diagonal are skipped: the causal half
        return 2 * product, 5 * product
