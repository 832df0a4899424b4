"""Count what ranks that share sequences (`parallel.sequence`) send each other in the layers of a model.

Layers of linear cost exchange states, which no context makes larger; others bring keys to every rank, and queries to
the ranks that work on them. Backward sends the transposed: as many bytes for all that has a gradient.
"""

from __future__ import annotations

import math
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
from lcpt.attention.sparse import LearnedKeep, Sparse, SparseHash, SparseQK
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangedBytes:
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
def exchange(layers: Layers, slices: Slices) -> ExchangedBytes:
    """Count what the busiest rank exchanges in all layers: one in the middle, which has neighbours on both sides.

    Of packed documents it is the most: where they begin decides what goes on from rank to rank.
    """
    if slices.ranks == 1:
        return ExchangedBytes()
    of_ranks = []
    for rank in range(slices.ranks):
        sent = [(sent_by_rank(kind.layer, slices, rank), kind.times) for kind in layers]
        of_ranks.append(Sent(*(sum(count * each[way] for each, count in sent) for way in (0, 1))))
    forward, backward = max(of_ranks, key=lambda sent: (sum(sent), sent.forward))
    kept = [kept_for_backward(kind.layer, slices) for kind in layers]
    return ExchangedBytes(
        forward=forward,
        backward=backward,
        kept=sum(one * kind.times for one, kind in zip(kept, layers, strict=True)),
        kept_at_once=max(kept),
        # Backward has the gradients for all ranks, and those from all ranks.
        passing=max(2 * slices.ranks * _gathered(kind.layer, slices) for kind in layers),
    )


def busiest(layer: Attention, slices: Slices) -> Sent:
    """Count what that rank sends for a layer which sends most."""
    return max((sent_by_rank(layer, slices, rank) for rank in range(slices.ranks)), key=lambda x: (sum(x), x.forward))


def sent_by_rank(layer: Attention, slices: Slices, rank: int) -> Sent:
    """Count what one rank sends to the others for a layer."""
    others = slices.ranks - 1
    gathered, forward, backward = _gathered(layer, slices), _without_gradient(layer, slices), _shares(layer)[1]
    given, worked_on = _queries_away(layer, slices, rank)
    to_next = _shifted(layer, slices, rank + 1) if rank < others else 0
    from_last = _shifted(layer, slices, rank) if rank else 0
    o = slices.rows * layer.n_heads * layer.head_dim * slices.width  # of a token
    q = 2 * o if isinstance(layer, Lowrank) else o  # with and without positions
    marks = slices.rows * layer.n_heads * layer.mark_bytes if isinstance(layer, Sparse) else 0
    return Sent(
        to_next + others * (gathered + forward) + given * (q + marks) + worked_on * o,
        from_last + others * (gathered + backward) + given * o + worked_on * q,
    )


def kept_for_backward(layer: Attention, slices: Slices) -> float:
    """Count the bytes that a rank keeps of a layer for backward, beside what it keeps without others.

    Of a layer of linear cost: the states before and after its own, and where they decay those of all ranks. Of others:
    the keys of all ranks, but of its own keys the copy that was sent; lowrank layers keep the blocks that they see
    alone, and all summaries, twice.
    """
    if isinstance(layer, LinearCost):
        decays = slices.packed or layer.gate_module is not None
        return _gathered(layer, slices) * (3 + decays * (slices.ranks + 1))
    if isinstance(layer, Lowrank):
        return 2 * slices.ranks * _gathered_summaries(layer, slices)
    if _window_before(layer, slices) is not None:
        return _shifted(layer, slices, 1)
    return (slices.ranks - 0.5) * _gathered(layer, slices) + slices.ranks * _without_gradient(layer, slices)


def _gathered(layer: Attention, slices: Slices) -> float:
    """Count the bytes that each rank gives to all others, who give their gradients back."""
    if isinstance(layer, LinearCost):
        decay = slices.packed or layer.gate_module is not None
        state = layer.features() * (layer.head_dim + 1) + decay
        return slices.rows * layer.n_kv_heads * state * FP32
    if _window_before(layer, slices) is not None:
        return 0
    keys = slices.tokens * _key_and_value(layer, slices)
    return keys + _gathered_summaries(layer, slices) if isinstance(layer, Lowrank) else keys


def _key_and_value(layer: Attention, slices: Slices) -> int:
    return slices.rows * layer.n_kv_heads * 2 * layer.head_dim * slices.width


def _gathered_summaries(layer: Lowrank, slices: Slices) -> float:
    """All ranks give as many as that one in whose slice most blocks end."""
    c = layer.block_size
    blocks = max((rank + 1) * slices.tokens // c - rank * slices.tokens // c for rank in range(slices.ranks))
    return blocks * layer.summaries.number * _key_and_value(layer, slices)


def _without_gradient(layer: Attention, slices: Slices) -> float:
    """Count the bytes of what else each rank gives to all others in a forward pass."""
    if not isinstance(layer, Sparse):
        return 0
    return slices.rows * layer.n_kv_heads * slices.tokens * layer.mark_bytes + _shares(layer)[0]


def _shares(layer: Attention) -> tuple[int, int]:
    """Count the bytes of the means over all tokens by which a layer learns what to drop or where to hash, in forward
    and in backward passes."""
    heads = (layer.n_heads + layer.n_kv_heads) * FP32
    if isinstance(layer, SparseQK) and isinstance(layer.chooser, LearnedKeep):
        return heads, heads
    if isinstance(layer, SparseHash) and layer.hash.learns:
        return heads * layer.buckets, heads
    return 0, 0


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
    tokens of a block that is not whole, of which documents may leave all but one."""
    width = slices.width
    n_bytes: int = 0 if layer.key_shift is None else layer.head_dim * width
    gate = FP32 if isinstance(layer, LinearCost) and layer.gate_module is not None else 0
    n_bytes += (_window_before(layer, slices) or 0) * 2 * layer.head_dim * width
    if not isinstance(layer, LinearCost | Lowrank):
        return slices.rows * layer.n_kv_heads * n_bytes
    held, c = rank * slices.tokens, layer.block_size
    held = held // c * c + c - 1 if slices.packed else held
    if isinstance(layer, Flurka | Lowrank):
        pending = layer.summaries.pending_floats_per_token() * width + gate
        n_bytes += held % c * pending
    if isinstance(layer, LinearCost):
        number = layer.summaries_per_block
        rows = tail_rows(("v", "b"), held, c, layer.local_blocks, number)
        n_bytes += rows["v"] * (layer.floats_per_token() * width + gate)
        if number:  # else b is a token's own, and among its floats
            n_bytes += rows["b"] * ((layer.features() + layer.head_dim) * width + gate)
    return slices.rows * layer.n_kv_heads * n_bytes


def sent_by_scheme(layer: LinearCost, slices: Slices) -> dict[str, float]:
    """Count the bytes that a rank sends for a layer in one forward pass, by the way in which ranks share sequences.

    Ulysses (arXiv 2309.14509) brings all tokens of some heads to each rank: q, k, v there and o back. A ring, or ranks
    that gather all keys, send k and v to every other rank.
    """
    of_heads = slices.rows * slices.tokens * 2 * (layer.n_heads + layer.n_kv_heads) * layer.head_dim * slices.width
    return {
        "state exchange": busiest(layer, slices).forward,
        "Ulysses": of_heads * (slices.ranks - 1) / slices.ranks,
        "ring, gathered keys": (slices.ranks - 1) * slices.tokens * _key_and_value(layer, slices),
    }


def break_even(layer: LinearCost, slices: Slices) -> dict[str, int]:
    """Return from how many tokens of a slice on a state exchange sends no more, by the other scheme."""
    ours, *others = sent_by_scheme(layer, slices).items()
    return {scheme: math.ceil(slices.tokens * ours[1] / n_bytes) for scheme, n_bytes in others}
