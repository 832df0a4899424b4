"""What enters the state of block-causal attention, block by block, and its gradient. Notation: `chunked.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcpt_kernels.accumulation import columns_of, rows_of, with_ones
from lcpt_kernels.decay import Decay
from lcpt_kernels.plan import Block, Plan


@dataclass(frozen=True, slots=True)
class StateInput:
    """The rows that enter the state, those of tokens or of summaries."""

    b: Tensor | None  # [B, H, ·, r]; None: there is no state
    v: Tensor  # [B, H, ·, Dv]
    mass: Tensor | None  # [B, H, ·], the weight of a summary in the denominator; None: 1

    def values(self, rows: slice) -> Tensor:
        """Return v̄ = [v, mass] of these rows, [.., rows, Dv + 1]."""
        if self.mass is None:
            return with_ones(self.v, rows)
        return torch.cat((rows_of(self.v, rows), rows_of(self.mass, rows)[..., None]), dim=-1)

    def added(self, block: Block, plan: Plan, decay: Decay, out: Tensor | None = None) -> Tensor:
        """Return what the block that leaves adds to the state at the start of `block`, [.., F, Dv + 1], in `out`."""
        assert plan.features is not None and self.b is not None and block.leaving is not None
        features, values = plan.features.key(columns_of(self.b, block.leaving)), self.values(block.leaving)
        return torch.matmul(features, decay.scale_by_rev_cumsum(block, values), out=out)


@dataclass(frozen=True, slots=True)
class StateInputGradient:
    """The gradients of a StateInput."""

    b: Tensor
    v: Tensor
    mass: Tensor | None

    def add(self, block: Block, d_added: Tensor, given: StateInput, plan: Plan, decay: Decay) -> None:
        """Add those of the block that leaves at the start of `block`, from that of what it adds to the state."""
        features, leaving, fading = plan.features, block.leaving, block.fading
        assert features is not None and given.b is not None and leaving is not None and fading is not None
        b, v = columns_of(given.b, leaving), decay.scale_by_rev_cumsum(block, given.values(leaving))
        d_values = features.key(b).mT @ d_added
        self.b[:, :, leaving] = features.key_backward(b, d_added @ v.mT).mT
        decay.add_gradient(fading, lambda: -_per_token(fading, d_values * v))
        d_values = decay.scale_by_rev_cumsum(block, d_values)
        self.v[:, :, leaving] += d_values[..., :-1]
        if self.mass is not None:
            self.mass[:, :, leaving] = d_values[..., -1]


def _per_token(fading: slice, x: Tensor) -> Tensor:
    """Sum x [.., rows, ·] over the rows that decay from the same token: [.., fading]."""
    return x.sum(-1).unflatten(-1, (fading.stop - fading.start, -1)).sum(-1)
