"""Compute ranks of f(Q Kᵀ / √d): which weights a linear-cost state could hold exactly.

Only polynomials keep the rank of a low-rank matrix low (Metric Transforms and Low-Rank Representations of Kernels,
NeurIPS 2024, theorem 2.5); the stable rank may be low for others.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # of the random matrix
HEAD_DIM = 8  # its rank: few enough for C(d + 4, 4) to be below ROWS


class Function(NamedTuple):
    f: Callable[[Tensor], Tensor]
    bound: Callable[[int], int] | None = None  # d -> the number of its monomials, where f is a polynomial


def homogeneous(p: int) -> Function:
    return Function(lambda x: x**p, lambda d: comb(d + p - 1, p))


FUNCTIONS = {
    "x": homogeneous(1),
    "x^2": homogeneous(2),
    "x^4": homogeneous(4),
    "x^8": homogeneous(8),
    "1+x+x^2/2": Function(lambda x: 1 + x + x.square() / 2, lambda d: comb(d + 2, 2)),
    "exp": Function(torch.exp),
    "relu": Function(F.relu),
    "elu+1": Function(lambda x: F.elu(x) + 1),
    "|x|^1.5": Function(lambda x: x.abs() ** 1.5),
    "cos": Function(torch.cos),
}


def random_ranks(seed: int = 0) -> dict:
    """Rank ROWS Gaussian q and k of dimension HEAD_DIM: {"rows", "head_dim", "functions": as `ranks` gives them}."""
    q, k = torch.randn(2, ROWS, HEAD_DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"rows": ROWS, "head_dim": HEAD_DIM, "functions": ranks(q, k)}


def ranks(q: Tensor, k: Tensor) -> list[dict]:
    """List {"function", "rank", "stable_rank", "bound"} for q and k [n, d], all n² pairs, no causal mask.

    bound: the most that the rank can be, None where f is no polynomial.
    """
    scores = q.double() @ k.double().T / q.shape[1] ** 0.5
    rows = []
    for name, function in FUNCTIONS.items():
        bound = function.bound and min(len(q), function.bound(q.shape[1]))
        rank, stable = rank_and_stable_rank(function.f(scores))
        rows.append({"function": name, "rank": rank, "stable_rank": stable, "bound": bound})
    return rows


def rank_and_stable_rank(M: Tensor) -> tuple[int, float]:
    """Count the singular values of M [n, n], float64, above rounding, n ε ‖M‖₂; and compute ‖M‖_F² / ‖M‖₂²."""
    s = torch.linalg.svdvals(M)
    rounding = max(M.shape) * torch.finfo(M.dtype).eps * s[0]
    return int((s > rounding).sum()), float(s.square().sum() / s[0].square())
