"""Compute the norms of each layer's gradient and weights: where training breaks, they say which layer broke first."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from lcpt.parallel import groups
from lcpt.training.optimizer import is_frozen
from lcpt.training.zero_shards import owned_shards


def layer_norms(engine, scale: float) -> dict[str, dict[str, float]]:
    """Return {"gradient_norms": {layer: norm}, "weight_norms": {layer: norm}} after a step's last backward pass.

    Layers are blocks.0, blocks.1, … and the parts around them. Every rank calls it; gradients are gathered, and
    multiplied by `scale`; those of frozen parameters count as 0.
    """
    from deepspeed.utils import safe_get_full_grad

    gradients: defaultdict[str, list[Tensor]] = defaultdict(list)
    weights: defaultdict[str, list[Tensor]] = defaultdict(list)
    frozen = {name for group in engine.basic_optimizer.param_groups if is_frozen(group) for name in group["names"]}
    for name, parameter in engine.module.named_parameters():
        if name in frozen:
            gradients[_layer(name)].append(torch.zeros((), device=groups.device()))
            continue
        whole = parameter.grad if engine.zero_optimization_stage() == 0 else safe_get_full_grad(parameter)
        gradients[_layer(name)].append(whole.norm())
    for shard in owned_shards(engine):
        weights[_layer(shard.name)].append(shard.tensors["weights"].norm())
    layers = list(gradients)  # on all ranks the same; of some layers a rank has no weights
    squares = [sum((norm.double().square() for norm in weights[layer]), torch.zeros(())) for layer in layers]
    sums = groups.all_reduce_sum(*squares, device=groups.device())
    gradient_norms = (scale * torch.stack([torch.stack(gradients[layer]).norm() for layer in layers])).tolist()
    return {
        "gradient_norms": dict(zip(layers, gradient_norms, strict=True)),
        "weight_norms": {layer: total**0.5 for layer, total in zip(layers, sums, strict=True)},
    }


def _layer(parameter: str) -> str:
    parts = parameter.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
