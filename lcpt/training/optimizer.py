"""AdamW over the fp32 shards that ZeRO gives a rank, whose gradients are clipped, or whose step is skipped, by what all
ranks have found out together."""

from __future__ import annotations

import torch
from torch import nn

from lcpt.training.config import TrainingConfig


class ShardedAdamW(torch.optim.AdamW):
    """AdamW, but `step` first multiplies every gradient by `clip_factor`; None: it does nothing.

    ZeRO calls `step` once for each of its groups, and clears the gradients afterwards either way.
    """

    clip_factor: float | None = 1.0

    def step(self, closure=None):
        if self.clip_factor is None:
            return
        if self.clip_factor != 1.0:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, self.clip_factor)
        super().step(closure)


def build_optimizer(model: nn.Module, training: TrainingConfig) -> ShardedAdamW:
    """Build the optimizer of a model's parameters. `fused`: one kernel over all tensors, also on a CPU."""
    return ShardedAdamW(
        parameter_groups(model, training.weight_decay),
        lr=training.lr,
        betas=(training.betas[0], training.betas[1]),
        eps=1e-8,
        fused=True,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group parameters for weight decay: matrices decay; gains, biases and scalars do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def clip_factor(norm: float, max_norm: float) -> float:
    """Compute what to multiply gradients of this global norm by, so that it becomes ≤ max_norm; 0: no clipping."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
