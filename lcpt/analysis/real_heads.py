"""Analyse queries and keys of a trained model on a text."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt.analysis.ranks import ranks
from lcpt.analysis.sketch_error import errors_of_layer
from lcpt.attention import Attention
from lcpt.attention.base import Projected
from lcpt.attention.polysketch import Polysketch
from lcpt.model import GPT

RANK_ROWS = 256  # tokens of the passage, evenly apart, whose scores are ranked


def passage_length(model: GPT) -> int:
    """Return how many tokens of text show what a model does: several of its blocks."""
    return max(1024, 4 * model.config.attention.block_size)


@torch.no_grad()
def projections(model: GPT, tokens: Tensor) -> list[tuple[Attention, Projected]]:
    """Record the inputs of each layer's attention, tokens int64 [1, T]."""
    found: list[tuple[Attention, Projected]] = []

    def record(attention: Attention, arguments: tuple) -> None:
        x, rotary = arguments[:2]
        found.append((attention, attention.project(x, rotary)))

    hooks = [block.attention.register_forward_pre_hook(record) for block in model.blocks]
    try:
        model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def heads(model: GPT, tokens: Tensor) -> list[dict]:
    """List {"layer", "head", "kind", "ranks", "sketch_error"} of each layer and head, tokens int64 [1, T].

    sketch_error None: the layer has no sketch, or T tokens are all local.
    """
    rows = []
    for layer, (attention, p) in enumerate(projections(model, tokens)):
        errors = errors_of_layer(attention, p) if isinstance(attention, Polysketch) else [None] * attention.n_heads
        chosen = torch.linspace(0, tokens.shape[1] - 1, min(RANK_ROWS, tokens.shape[1])).long()
        group = p.q.shape[2] // p.k.shape[2]
        for head in range(attention.n_heads):
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "kind": model.config.kinds[layer],
                    "ranks": ranks(p.q[0, chosen, head], p.k[0, chosen, head // group]),
                    "sketch_error": errors[head],
                }
            )
    return rows
