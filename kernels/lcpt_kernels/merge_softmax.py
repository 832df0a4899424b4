"""Merge the outputs of a softmax over several disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_outputs(outputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return o [..., Dv] and lse [...] over all sets, from those of each set. Differentiable.

    o = Σ_n e^{lse_n − lse} o_n. A row without keys has lse −∞ and o 0.
    """
    lses = torch.stack([lse for _, lse in outputs])
    m = lses.detach().amax(0)
    m = m.where(m.isfinite(), 0.0)
    shares = (lses - m).exp()
    total = shares.sum(0)
    parts = shares / total.where(total > 0, 1.0)
    return sum(part[..., None] * o for part, (o, _) in zip(parts, outputs, strict=True)), m + total.log()
