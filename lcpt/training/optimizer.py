"""AdamW over the fp32 shards that ZeRO gives a rank, whose gradients are clipped, or whose step is skipped, by what all
ranks have found out together. Its groups may have a share of the learning rate each, and are frozen where that is 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lcpt.model import GPT
from lcpt.training.config import TrainingConfig
from lcpt.training.parameter_groups import OTHERS, ParameterGroup, group_of_each


class ShardedAdamW(torch.optim.AdamW):
    """AdamW, but `step` first multiplies every gradient by `clip_factor`; None: it does nothing. Frozen groups stay as
    they are.

    ZeRO calls `step` once for each of its groups, and clears the gradients afterwards either way.
    """

    clip_factor: float | None = 1.0

    def step(self, closure=None):
        if self.clip_factor is None:
            return
        every, trained = self.param_groups, [group for group in self.param_groups if not is_frozen(group)]
        gradients = [p.grad for group in trained for p in group["params"] if p.grad is not None]
        if gradients and self.clip_factor != 1.0:
            torch._foreach_mul_(gradients, self.clip_factor)
        self.param_groups = trained
        try:
            super().step(closure)
        finally:
            self.param_groups = every


def is_frozen(group: dict) -> bool:
    """Whether a parameter group stays as it is in this step."""
    return group.get("share") == 0


def enter_step(optimizer: torch.optim.Optimizer, step: int, warmup_steps: int) -> None:
    """Set what part of the learning rate each group has at a step of the run, 1, 2, …"""
    for group in optimizer.param_groups:
        group["share"] = group["rule"].share(step, warmup_steps)


def build_optimizer(model: GPT, training: TrainingConfig) -> ShardedAdamW:
    """Build the optimizer of a model's parameters. `fused`: one kernel over all tensors, also on a CPU."""
    return ShardedAdamW(
        parameter_groups(model, training.weight_decay, training.parameter_groups),
        lr=training.lr,
        betas=(training.betas[0], training.betas[1]),
        eps=1e-8,
        fused=True,
    )


def parameter_groups(model: GPT, weight_decay: float, rules: Sequence[ParameterGroup] = ()) -> list[dict]:
    """Group parameters by rule, and for weight decay: matrices decay; gains, biases and scalars do not.

    A group has the `names` of its parameters, its `rule`, and its `share` of the learning rate.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    used = group_of_each(rules, [name for name, _ in named], model.config.kinds)
    groups = []
    for rule in (OTHERS, *rules):
        of_rule = [pair for pair, each in zip(named, used, strict=True) if each is rule]
        for matrices in (True, False):
            pairs = [(name, p) for name, p in of_rule if (p.ndim >= 2) == matrices]
            if pairs:
                names, parameters = map(list, zip(*pairs, strict=True))
                groups.append(
                    {
                        "params": parameters,
                        "weight_decay": weight_decay if matrices else 0.0,
                        "names": names,
                        "rule": rule,
                        "share": rule.lr_factor,
                    }
                )
    return groups


def clip_factor(norm: float, max_norm: float) -> float:
    """Compute what to multiply gradients of this global norm by, so that it becomes ≤ max_norm; 0: no clipping."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
