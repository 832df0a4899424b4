"""Choose the dtype that sums are made in, and take parts of tensors in it."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulated(x: Tensor) -> Tensor:
    """Return x in the dtype that its sums are made in."""
    return x.to(accumulator(x))


def accumulator(x: Tensor) -> torch.dtype:
    """Return fp32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(x: Tensor, rows: slice) -> Tensor:
    """Return rows of x [B, H, T, ...] for sums: [B, H, rows, ...]."""
    return accumulated(x[:, :, rows])


def with_ones(v: Tensor, rows: slice) -> Tensor:
    """Return v̄ = [v, 1] of these rows, whose last column sums up a denominator: [B, H, rows, Dv + 1]."""
    return torch.nn.functional.pad(rows_of(v, rows), (0, 1), value=1.0)


def columns_of(x: Tensor, rows: slice) -> Tensor:
    """Return rows of x [B, H, T, r] as columns, [B, H, r, rows], as feature maps read them."""
    return rows_of(x, rows).mT.contiguous()
