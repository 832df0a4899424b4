"""The softmax over several sets of keys, from the softmax over each."""

from __future__ import annotations

import torch
from torch import Tensor


def joined(outputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(o_n [..., Dv], lse_n [...]) of disjoint sets -> o = Σ_n e^{lse_n − lse} o_n and lse, those of all of them;
    differentiable. Where nothing is seen, lse is −∞ and o is 0."""
    each = torch.stack([lse for _, lse in outputs])
    highest = each.detach().amax(0)
    highest = highest.where(highest.isfinite(), 0.0)
    shares = (each - highest).exp()
    total = shares.sum(0)
    parts = shares / total.where(total > 0, 1.0)
    return sum(part[..., None] * o for part, (o, _) in zip(parts, outputs, strict=True)), highest + total.log()
