"""Weigh local keys by their scores s = scale·q·k: (s + shift)^p, c₀ + c₁ s + c₂ s², s or e^s."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Power:
    """The local weight w(s) = (s + shift)^degree. `plan.Plan` describes the methods."""

    degree: int
    shift: float = 0.0

    def weights(self, s: Tensor, diagonal: int, decay: Tensor | None) -> tuple[Tensor, None]:
        return _decayed(_power(self._base(s, diagonal), self.degree), decay), None

    def weights_and_slopes(
        self, s: Tensor, diagonal: int, decay: Tensor | None, m_i: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        s = self._base(s, diagonal)
        lower = _decayed(_power(s, self.degree - 1), decay)
        return lower * s, lower.mul_(self.degree)  # in this order: the second may overwrite s

    def _base(self, s: Tensor, diagonal: int) -> Tensor:
        """Return s + shift, 0 for future keys, in the memory of s."""
        return (s.add_(self.shift) if self.shift else s).tril_(diagonal)


@dataclass(frozen=True, slots=True)
class Quadratic:
    """The local weight w(s) = c₀ + c₁ s + c₂ s², where it is that of the state."""

    c0: float
    c1: float
    c2: float

    def weights(self, s: Tensor, diagonal: int, decay: Tensor | None) -> tuple[Tensor, None]:
        return _decayed((self.c0 + s * (self.c1 + self.c2 * s)).tril_(diagonal), decay), None

    def weights_and_slopes(
        self, s: Tensor, diagonal: int, decay: Tensor | None, m_i: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.weights(s, diagonal, decay)[0], _decayed((self.c1 + 2 * self.c2 * s).tril_(diagonal), decay)


@dataclass(frozen=True, slots=True)
class Linear:
    """The local weight w(s) = s, for given features."""

    def weights(self, s: Tensor, diagonal: int, decay: Tensor | None) -> tuple[Tensor, None]:
        return _decayed(s.tril_(diagonal), decay), None

    def weights_and_slopes(
        self, s: Tensor, diagonal: int, decay: Tensor | None, m_i: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _decayed(s.tril_(diagonal), decay), _decayed(torch.ones_like(s).tril_(diagonal), decay)


@dataclass(frozen=True, slots=True)
class Exponential:
    """The local weight w(s) = e^s. A row is over e^{m_i}, its largest term, so nothing overflows and not all of a row
    underflows; see `chunked.py`."""

    def weights(self, s: Tensor, diagonal: int, decay: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the weights over e^{m_i}, and m_i [.., rows, 1], the largest exponent of each row."""
        exponent = self._exponents(s, diagonal, decay)
        m_i = exponent.amax(-1, keepdim=True)
        return exponent.sub_(m_i).exp_(), m_i

    def weights_and_slopes(
        self, s: Tensor, diagonal: int, decay: Tensor | None, m_i: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert m_i is not None
        w = self._exponents(s, diagonal, decay).sub_(m_i).exp_()
        return w, w

    @staticmethod
    def _exponents(s: Tensor, diagonal: int, decay: Tensor | None) -> Tensor:
        exponent = s if decay is None else s + decay
        future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu_(diagonal + 1)
        return exponent.masked_fill_(future, -torch.inf)


def _decayed(w: Tensor, decay: Tensor | None) -> Tensor:
    return w if decay is None else w * decay.exp()


def _power(x: Tensor, n: int) -> Tensor:
    """Return x^n by squaring: torch.pow is a transcendental function for n > 3."""
    if n == 1:
        return x
    half = _power(x, n // 2)
    return half.square() if n % 2 == 0 else half.square().mul_(x)
