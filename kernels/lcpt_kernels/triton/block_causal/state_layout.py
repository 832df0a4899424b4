"""The order of a state's features in memory, and its conversion to that of `symmetric_features.py`.

x⊗x is cut into pairs (I, J) of groups of 8 coordinates, I ≤ J, of 64 features each. x itself and 1 follow, where their
coefficients are not 0. A state sums features without weights; where it is written (`state_walk.py`) it is
multiplied by the weights of the queries' side: c₂, or 2 c₂ where I < J, c₁ and c₀.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lcpt_kernels.symmetric_features import GROUP, PAIR


class Layout(NamedTuple):
    """The features of c₀ + c₁ (a·b) + c₂ (a·b)² for a and b of `size` coordinates, a multiple of GROUP."""

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
        """Rows of value_state, F: 64 for each pair, R, 1."""
        return PAIR * self.pairs + self.size * self.linear + self.constant

    @property
    def tile(self) -> int:
        """Coordinates of x that a program works on at a time, a power of two: all of them where products need all."""
        padded = max(16, 1 << (self.size - 1).bit_length())
        return min(padded, PAIR) if self.linear and not self.pairs else padded

    @property
    def gram(self) -> int:
        """Elements of the Gram matrix [R, R]."""
        return self.size * self.size if self.pairs else 0

    @property
    def denom_elements(self) -> int:
        """Elements of denom_state, M: the Gram matrix, Σ x z [R], and Σ z."""
        return self.gram + self.size + 1

    def table(self, device: torch.device) -> Tensor:
        """Return I and J of every pair, [2, pairs] int32."""
        return _table(self, device)[0]

    def weights(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the queries' weights, fp32: of value_state's rows [F], of denom_state's elements [M]."""
        return _table(self, device)[1:]


@lru_cache(maxsize=64)
def _table(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    c0, c1, c2 = layout.coefficients
    i, j = torch.triu_indices(layout.size // GROUP, layout.size // GROUP)
    pair_weights = torch.where(i == j, c2, 2 * c2).repeat_interleave(PAIR) if layout.pairs else torch.zeros(0)
    value_weights = [
        pair_weights,
        torch.full((layout.size * layout.linear,), c1),
        torch.full((int(layout.constant),), c0),
    ]
    denom_weights = [torch.full((layout.gram,), c2), torch.full((layout.size,), c1), torch.full((1,), c0)]
    pairs = torch.stack((i, j)).int().to(device)
    return pairs, torch.cat(value_weights).float().to(device), torch.cat(denom_weights).float().to(device)


@lru_cache(maxsize=64)
def _places(layout: Layout, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for every feature of QuadraticFeatures(size) its row of value_state and its place in denom_state."""
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
        places.append(layout.denom_elements - 1)
    return torch.tensor(rows, device=device), torch.tensor(places, device=device)


def from_common(S: Tensor, layout: Layout, size: int) -> tuple[Tensor, Tensor]:
    """Return value_state [B, H, F, Dv] and denom_state [B, H, M] of S [B, H, ·, Dv + 1], whose features are those of
    QuadraticFeatures(size)."""
    value_state, denom_state = _spread(S, layout, size)
    if not layout.pairs:
        return value_state, denom_state
    gram, rest = _gram(denom_state, layout)
    mirrored = torch.where(_is_below_diagonal(layout, S.device), gram.mT, gram)  # only I ≤ J are features
    return value_state, torch.cat((mirrored.flatten(-2), rest), dim=-1)


def from_common_backward(d_value_state: Tensor, d_denom_state: Tensor, layout: Layout, size: int) -> Tensor:
    """Return the gradient of S from the gradients of what from_common returned."""
    if not layout.pairs:
        return to_common(d_value_state, d_denom_state, layout, size)
    gram, rest = _gram(d_denom_state, layout)
    both = torch.where(_is_below_diagonal(layout, d_denom_state.device).mT, gram + gram.mT, gram)
    return to_common(d_value_state, torch.cat((both.flatten(-2), rest), dim=-1), layout, size)


def with_symmetric_pairs(value_state: Tensor, layout: Layout) -> Tensor:
    """Return value_state [B, H, F, Dv] with the mean of x_p x_q and x_q x_p for both of them: what φ(a) weighs, and
    sums of features, are the same. A state that a user gives need not be symmetric within a group."""
    if not layout.pairs:
        return value_state
    i, j = torch.triu_indices(layout.size // GROUP, layout.size // GROUP, device=value_state.device)
    rows = torch.arange(layout.features, device=value_state.device)
    pairs = rows[: PAIR * layout.pairs].view(-1, GROUP, GROUP)
    pairs.copy_(torch.where((i == j)[:, None, None], pairs.mT, pairs).clone())
    return (value_state + value_state[:, :, rows]) / 2


def to_common(value_state: Tensor, denom_state: Tensor, layout: Layout, size: int) -> Tensor:
    """Return S [B, H, ·, Dv + 1] in the order of QuadraticFeatures(size): the inverse of from_common."""
    rows, places = _places(layout, size, value_state.device)
    return torch.cat((value_state[:, :, rows], denom_state[:, :, places, None]), dim=-1)


def to_common_backward(dS: Tensor, layout: Layout, size: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of value_state and denom_state from that of S. The gradient of the Gram matrix is symmetric,
    because kernels compute (dG + dGᵀ) b as 2 dG b."""
    d_value_state, d_denom_state = _spread(dS, layout, size)
    if not layout.pairs:
        return d_value_state, d_denom_state
    gram, rest = _gram(d_denom_state, layout)
    return d_value_state, torch.cat((((gram + gram.mT) / 2).flatten(-2), rest), dim=-1)


def _spread(S: Tensor, layout: Layout, size: int) -> tuple[Tensor, Tensor]:
    """Return value_state and denom_state with the features of S in their places, 0 elsewhere."""
    rows, places = _places(layout, size, S.device)
    value_state = S.new_zeros(*S.shape[:2], layout.features, S.shape[3] - 1).index_copy(2, rows, S[..., :-1])
    return value_state, S.new_zeros(*S.shape[:2], layout.denom_elements).index_copy(2, places, S[..., -1])


def _gram(denom_state: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Split denom_state [.., M] into the Gram matrix [.., R, R] and the rest."""
    return denom_state[..., : layout.gram].unflatten(-1, (layout.size, layout.size)), denom_state[..., layout.gram :]


def _is_below_diagonal(layout: Layout, device: torch.device) -> Tensor:
    """Return a mask [R, R]: whether the row's group is after the column's."""
    group = torch.arange(layout.size, device=device) // GROUP
    return group[:, None] > group[None, :]
