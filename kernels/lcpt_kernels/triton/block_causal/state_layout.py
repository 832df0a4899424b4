"""Where the features of a state stand in memory, and how they become those of `features.py`, which other backends use.

Here x⊗x is cut into pairs (I, J) of groups of 8 coordinates, I ≤ J, of 64 features each; behind them stand x itself and
1, where their coefficients are not 0. Features are sums over keys as they are; what a query weighs them by (c₂, twice
c₂ where I < J, c₁, c₀) is multiplied into the state while it is scanned.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lcpt_kernels.symmetric_features import GROUP, PAIR


class Layout(NamedTuple):
    """size: R, a multiple of GROUP; coefficients (c₀, c₁, c₂)."""

    size: int
    coefficients: tuple[float, float, float]

    @property
    def constant(self) -> bool:
        return self.coefficients[0] != 0

    @property
    def linear(self) -> bool:
        return self.coefficients[1] != 0

    @property
    def pairs(self) -> int:
        groups = self.size // GROUP
        return groups * (groups + 1) // 2 if self.coefficients[2] != 0 else 0

    @property
    def features(self) -> int:
        """Rows of the values: 64 a pair, R, 1."""
        return PAIR * self.pairs + self.size * self.linear + self.constant

    @property
    def tile(self) -> int:
        """Coordinates of x that a program works on at a time, a power of two: all of them where products need all."""
        padded = max(16, 1 << (self.size - 1).bit_length())
        return min(padded, PAIR) if self.linear and not self.pairs else padded

    @property
    def gram(self) -> int:
        """Numbers of the Gram matrix [R, R]."""
        return self.size * self.size if self.pairs else 0

    @property
    def norms(self) -> int:
        """Numbers of the normaliser: the Gram matrix, Σ x z [R], and Σ z."""
        return self.gram + self.size + 1

    def table(self, device: torch.device) -> Tensor:
        """[2, pairs] int32: I and J of every pair."""
        return _table(self, device)[0]

    def weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """fp32, what a query weighs the features by: [features], and of the norms [norms]."""
        return _table(self, device)[1:]


@lru_cache(maxsize=64)
def _table(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    c0, c1, c2 = layout.coefficients
    i, j = torch.triu_indices(layout.size // GROUP, layout.size // GROUP)
    of_pairs = torch.where(i == j, c2, 2 * c2).repeat_interleave(PAIR) if layout.pairs else torch.zeros(0)
    of_values = [of_pairs, torch.full((layout.size * layout.linear,), c1), torch.full((int(layout.constant),), c0)]
    of_norms = [torch.full((layout.gram,), c2), torch.full((layout.size,), c1), torch.full((1,), c0)]
    tables = torch.stack((i, j)).int(), torch.cat(of_values).float(), torch.cat(of_norms).float()
    return tuple(x.to(device) for x in tables)


@lru_cache(maxsize=64)
def _places(layout: Layout, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every feature of QuadraticFeatures(size): its row of the values, its place in the norms."""
    rows, places, pair = [], [], {}
    if layout.pairs:
        for number, (i, j) in enumerate(torch.triu_indices(layout.size // GROUP, layout.size // GROUP).T.tolist()):
            pair[i, j] = PAIR * number
        for start in range(0, size, GROUP):
            for i in range(start, min(start + GROUP, size)):
                for j in range(start, size):
                    rows.append(pair[i // GROUP, j // GROUP] + i % GROUP * GROUP + j % GROUP)
                    places.append(i * layout.size + j)
    if layout.linear:
        rows += range(PAIR * layout.pairs, PAIR * layout.pairs + size)
        places += range(layout.gram, layout.gram + size)
    if layout.constant:
        rows.append(layout.features - 1)
        places.append(layout.norms - 1)
    return torch.tensor(rows, device=device), torch.tensor(places, device=device)


def from_common(S: Tensor, layout: Layout, size: int) -> tuple[Tensor, Tensor]:
    """S [B, H, F, Dv + 1] of QuadraticFeatures(size) -> values [B, H, features, Dv], norms [B, H, norms]."""
    values, norms = _spread(S, layout, size)
    if not layout.pairs:
        return values, norms
    gram, rest = _gram(norms, layout)
    mirrored = torch.where(_below(layout, S.device), gram.mT, gram)  # only I ≤ J are features
    return values, torch.cat((mirrored.flatten(-2), rest), dim=-1)


def from_common_backward(d_values: Tensor, d_norms: Tensor, layout: Layout, size: int) -> Tensor:
    """The gradient of S, of what from_common made of it."""
    if not layout.pairs:
        return to_common(d_values, d_norms, layout, size)
    gram, rest = _gram(d_norms, layout)
    both = torch.where(_below(layout, d_norms.device).mT, gram + gram.mT, gram)
    return to_common(d_values, torch.cat((both.flatten(-2), rest), dim=-1), layout, size)


def to_common(values: Tensor, norms: Tensor, layout: Layout, size: int) -> Tensor:
    """The inverse of from_common."""
    rows, places = _places(layout, size, values.device)
    return torch.cat((values[:, :, rows], norms[:, :, places, None]), dim=-1)


def to_common_backward(dS: Tensor, layout: Layout, size: int) -> tuple[Tensor, Tensor]:
    """The gradients of values and norms. That of a Gram matrix, which is symmetric, as a symmetric one: kernels take
    2 dG b for (dG + dGᵀ) b."""
    d_values, d_norms = _spread(dS, layout, size)
    if not layout.pairs:
        return d_values, d_norms
    gram, rest = _gram(d_norms, layout)
    return d_values, torch.cat((((gram + gram.mT) / 2).flatten(-2), rest), dim=-1)


def _spread(S: Tensor, layout: Layout, size: int) -> tuple[Tensor, Tensor]:
    """The features of S in their places; 0 elsewhere."""
    rows, places = _places(layout, size, S.device)
    values = S.new_zeros(*S.shape[:2], layout.features, S.shape[3] - 1).index_copy(2, rows, S[..., :-1])
    return values, S.new_zeros(*S.shape[:2], layout.norms).index_copy(2, places, S[..., -1])


def _gram(norms: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """[.., norms] -> the matrix [.., R, R] and what stands behind it."""
    return norms[..., : layout.gram].unflatten(-1, (layout.size, layout.size)), norms[..., layout.gram :]


def _below(layout: Layout, device: torch.device) -> Tensor:
    """[R, R]: whether the row's group is after the column's."""
    group = torch.arange(layout.size, device=device) // GROUP
    return group[:, None] > group[None, :]
