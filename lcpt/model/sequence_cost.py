"""Count what ranks that share sequences (`parallel.sequence`) send each other in the layers of a model.

Layers of linear cost exchange states, which no context makes larger; others bring keys to every rank, and queries to
the ranks that work on them. Backward sends the transposed: as many bytes for all that has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from lcpt_kernels.state import tail_rows

from lcpt.attention import Attention
from lcpt.attention.base import LinearCost
from lcpt.attention.flurka import Flurka
from lcpt.attention.lowrank import Lowrank
from lcpt.attention.softmax import WindowSoftmax
from lcpt.attention.sparse import Sparse
from lcpt.model.gpt import ModelConfig

FP32 = 4  # bytes of a number in states, gates and decays


class Kind(NamedTuple):
    """Stands for the layers of one kind that a model has."""

    name: str
    layer: Attention  # one of them, without memory
    times: int  # it is there


Layers = tuple[Kind, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slices:
    """Describes how a micro-batch lies on the ranks that share it."""

    ranks: int
    tokens: int  # of a rank's slice of a row
    rows: int = 1  # sequences; packed documents make one row of a micro-batch
    packed: bool = False
    width: int = 2  # bytes of a number in the model's precision


class Exchange(NamedTuple):
    """Counts bytes of one rank, for a micro-batch."""

    forward: float = 0.0  # that it sends to others in a forward pass; one in backward, to compute again, repeats them
    backward: float = 0.0
    kept: float = 0.0  # that stay for backward, beside what a rank keeps of its own tokens, of all layers
    kept_at_once: float = 0.0  # the same of that layer which keeps most
    passing: float = 0.0  # that are there while a layer exchanges, and go

    def per_step(self, micro_batches: int, recomputed: bool) -> float:
        """Count the bytes that a rank sends in a step; recomputed: blocks are computed again in backward."""
        return micro_batches * ((1 + recomputed) * self.forward + self.backward)


def layers_by_kind(model: ModelConfig) -> Layers:
    """Build one layer of each kind that a model has, without memory."""
    config, kinds = model.attention, model.kinds
    sizes = model.d_model, model.n_heads, model.kv_heads
    with torch.device("meta"):
        return tuple(
            Kind(name, config.attention_of_layer(kinds.index(name))(*sizes, config), kinds.count(name))
            for name in sorted(set(kinds))
        )


class Sent(NamedTuple):
    """Counts the bytes that a rank sends to others for one layer and micro-batch."""

    forward: float
    backward: float


@lru_cache(maxsize=4096)
def exchange(layers: Layers, slices: Slices) -> Exchange:
    """Count what the busiest rank exchanges in all layers: one in the middle, which has neighbours on both sides.

    Documents may end a tail or a window early; what one sequence sends is the most.
    """
    if slices.ranks == 1:
        return Exchange()
    of_ranks = []
    for rank in range(slices.ranks):
        sent = [(sent_by_rank(kind.layer, slices, rank), kind.times) for kind in layers]
        of_ranks.append(Sent(*(sum(count * each[way] for each, count in sent) for way in (0, 1))))
    forward, backward = max(of_ranks, key=lambda sent: (sum(sent), sent.forward))
    kept = [kept_for_backward(kind.layer, slices) for kind in layers]
    return Exchange(
        forward=forward,
        backward=backward,
        kept=sum(one * kind.times for one, kind in zip(kept, layers, strict=True)),
        kept_at_once=max(kept),
        # Backward has the gradients for all ranks, and those from all ranks.
        passing=max(2 * slices.ranks * sum(_gathered(kind.layer, slices)) for kind in layers),
    )


def sent_by_rank(layer: Attention, slices: Slices, rank: int) -> Sent:
    """Count what one rank sends to the others for a layer."""
    others = slices.ranks - 1
    gathered, marks = _gathered(layer, slices)
    given, worked_on = _queries_away(layer, slices, rank)
    to_next = _shifted(layer, slices, rank + 1) if rank < others else 0
    from_last = _shifted(layer, slices, rank) if rank else 0
    per_query = slices.rows * layer.n_heads * layer.head_dim * slices.width
    q = 2 * per_query if isinstance(layer, Lowrank) else per_query  # with and without positions
    q_marks = slices.rows * layer.n_heads * layer.mark_bytes if isinstance(layer, Sparse) else 0
    return Sent(
        to_next + others * (gathered + marks) + given * (q + q_marks) + worked_on * per_query,
        from_last + others * gathered + worked_on * q + given * per_query,
    )


def kept_for_backward(layer: Attention, slices: Slices) -> float:
    """Count the bytes that a rank keeps of a layer for backward, beside those of its own tokens: others' keys; of a
    layer of linear cost the states before and after its own, and where they decay those of all ranks."""
    gathered, marks = _gathered(layer, slices)
    if isinstance(layer, LinearCost):
        decays = slices.packed or layer.gate_module is not None
        return gathered * (3 + decays * (slices.ranks + 1))
    return (slices.ranks - 1) * (gathered + marks) + _shifted(layer, slices, 1)


def _gathered(layer: Attention, slices: Slices) -> tuple[float, float]:
    """Count the bytes that each rank gives to all others: (with a gradient, without)."""
    key = slices.rows * layer.n_kv_heads * slices.width
    if isinstance(layer, LinearCost):
        decay = slices.packed or layer.gate_module is not None
        state = layer.features() * (layer.head_dim + 1) + decay
        return slices.rows * layer.n_kv_heads * state * FP32, 0
    if _window_before(layer, slices) is not None:
        return 0, 0
    rows = slices.tokens
    if isinstance(layer, Lowrank):
        rows += slices.tokens // layer.block_size * layer.summaries.number
    marks = slices.rows * layer.n_kv_heads * layer.mark_bytes * slices.tokens if isinstance(layer, Sparse) else 0
    return rows * 2 * layer.head_dim * key, marks


def _queries_away(layer: Attention, slices: Slices, rank: int) -> tuple[int, int]:
    """Count the tokens of a row whose queries this rank gives away, and those that it works on for others.

    Causal work is alike on all ranks where rank i works on half slices i and 2N − 1 − i of 2N.
    """
    if isinstance(layer, LinearCost) or _window_before(layer, slices) is not None:
        return 0, 0
    last = 2 * slices.ranks - 1
    halves = slices.tokens // 2, slices.tokens - slices.tokens // 2
    held, worked_on = {2 * rank, 2 * rank + 1}, {rank, last - rank}
    given, taken = (sum(halves[half % 2] for half in away) for away in (held - worked_on, worked_on - held))
    return given, taken


def _window_before(layer: Attention, slices: Slices) -> int | None:
    """Count the tokens of the rank before whose keys a layer sees; None where it sees those of other ranks too."""
    if isinstance(layer, WindowSoftmax) and (before := int(layer.window) - 1) <= slices.tokens:
        return before
    return None


def _shifted(layer: Attention, slices: Slices, rank: int) -> float:
    """Count the bytes that a rank gets from the one before: the key of a key shift, a window, the last blocks, the
    tokens of a block that is not whole."""
    held, width = rank * slices.tokens, slices.width
    n_bytes: int = 0 if layer.key_shift is None else layer.head_dim * width
    gate = FP32 if isinstance(layer, LinearCost) and layer.gate_module is not None else 0
    n_bytes += (_window_before(layer, slices) or 0) * 2 * layer.head_dim * width
    if isinstance(layer, Flurka | Lowrank):
        pending = layer.summaries.pending_floats_per_token() * width + gate
        n_bytes += held % layer.block_size * pending
    if isinstance(layer, LinearCost):
        number = layer.summaries_per_block
        rows = tail_rows(("v", "b"), held, layer.block_size, layer.local_blocks, number)
        n_bytes += rows["v"] * (layer.floats_per_token() * width + gate)
        if number:  # else b is a token's own, and among its floats
            n_bytes += rows["b"] * ((layer.features() + layer.head_dim) * width + gate)
    return slices.rows * layer.n_kv_heads * n_bytes
