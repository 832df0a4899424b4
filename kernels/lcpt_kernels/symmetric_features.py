"""Features of a polynomial of degree two: c₀ + c₁ (a·b) + c₂ (a·b)² = query(a) · key(b).

a⊗a is symmetric, so with the coordinates in groups I of GROUP it is enough to keep, for every I, the products of I
with itself and with what follows it:  (a·b)² = Σ_I (a_I ⊗ a_I)·(b_I ⊗ b_I) + 2 Σ_{J > I} (a_I ⊗ a_J)·(b_I ⊗ b_J).
The factor 2 and the coefficients are on the query's side. Vectors are columns, [..., r, c] for c tokens, because a CPU
is fast at products along tokens. Features are computed for one block of tokens at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8  # r = 32 gives 640 features instead of 1,024; finer groups save little more and need many small products
PAIR = GROUP * GROUP  # features of a pair of groups


class Explicit:
    """Given features: query(x) = key(x) = x, columns [..., m, c]."""

    c0, c1, c2 = 0, 1, 0

    def __init__(self, size: int):
        self.dimension = size

    def query(self, x: Tensor) -> Tensor:
        return x

    key = query

    def query_backward(self, x: Tensor, dphi: Tensor) -> Tensor:
        return dphi

    key_backward = query_backward


class QuadraticFeatures:
    """The maps a -> query(a) and b -> key(b), [..., r, c] -> [..., F, c], and the transposes of their derivatives."""

    def __init__(self, size: int, coefficients: tuple[float, float, float]):
        self.c0, self.c1, self.c2 = coefficients
        self.size = size
        self.groups = [slice(i, min(i + GROUP, size)) for i in range(0, size, GROUP)] if self.c2 else []
        products = sum((i.stop - i.start) * (size - i.start) for i in self.groups)
        self.dimension = products + size * bool(self.c1) + bool(self.c0)

    def query(self, a: Tensor) -> Tensor:
        return self._expand(a, self.c0, self.c1, self.c2, 2 * self.c2)

    def key(self, b: Tensor) -> Tensor:
        return self._expand(b, 1, 1, 1, 1)

    def query_backward(self, a: Tensor, dphi: Tensor) -> Tensor:
        return self._contract(a, dphi, self.c1, self.c2, 2 * self.c2)

    def key_backward(self, b: Tensor, dphi: Tensor) -> Tensor:
        return self._contract(b, dphi, 1, 1, 1)

    def _expand(self, x, constant, linear, within, across) -> Tensor:
        """Return the features: `within` is the factor of products inside a group, `across` of a group with later
        ones."""
        phi = x.new_empty(*x.shape[:-2], self.dimension, x.shape[-1])
        row = 0
        for i in self.groups:
            right = self._weighted(x, i, within, across)
            rows = (i.stop - i.start) * right.shape[-2]
            out = phi[..., row : row + rows, :].unflatten(-2, (-1, right.shape[-2]))
            torch.mul(x[..., i, None, :], right[..., None, :, :], out=out)
            row += rows
        if self.c1:
            phi[..., row : row + self.size, :] = linear * x
        if self.c0:
            phi[..., -1, :] = constant
        return phi

    def _contract(self, x, dphi, linear, within, across) -> Tensor:
        dx, row = torch.zeros_like(x), 0
        for i in self.groups:
            right = self._weighted(x, i, within, across)
            rows = (i.stop - i.start) * right.shape[-2]
            d = dphi[..., row : row + rows, :].unflatten(-2, (-1, right.shape[-2]))
            dx[..., i, :] += (d * right[..., None, :, :]).sum(-2)
            d_right = (d * x[..., i, None, :]).sum(-3)
            dx[..., i.start :, :] += self._weighted(d_right, slice(0, i.stop - i.start), within, across)
            row += rows
        if self.c1:
            dx += linear * dphi[..., row : row + self.size, :]
        return dx

    @staticmethod
    def _weighted(x, group, within, across) -> Tensor:
        """x from `group` on, times `within` in the group and `across` after it."""
        if within == across == 1:
            return x[..., group.start :, :]
        return torch.cat((within * x[..., group, :], across * x[..., group.stop :, :]), dim=-2)
