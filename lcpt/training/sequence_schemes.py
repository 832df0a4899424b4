"""Compare what ranks that share sequences send for a layer: state exchange, Ulysses, rings, over tokens of a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcpt.attention.base import LinearCost
from lcpt.model.sequence_cost import Slices, break_even, busiest, layers_by_kind, sent_by_scheme
from lcpt.training.slices import shortest_slice
from lcpt.training.step_time import Hardware

if TYPE_CHECKING:
    from lcpt.config import Config

CONTEXTS = (2**13, 2**15, 2**17)  # for which it counts what each kind exchanges
RANKS = (2, 4, 8, 16)
TOKENS = tuple(2**n for n in range(8, 18))  # of a rank
SHOWN = 8  # ranks, where one number of them stands for all


def compare_schemes(config: Config, peaks: Hardware) -> dict:
    """Count bytes that the busiest rank sends in one forward pass of a sequence without borders.

    layers: rows of kind, context, ranks, bytes (None: slices are too short). Of kinds of linear cost, by kind:
    break_even, by ranks and scheme the tokens of a rank from which on a state exchange sends no more; schemes, rows of
    ranks, scheme, tokens of a rank, bytes and modelled seconds.
    """
    width = 2 if config.training.precision == "bf16" else 4
    layers = layers_by_kind(config.model)
    linear = {kind.name: kind.layer for kind in layers if isinstance(kind.layer, LinearCost)}
    counted = []
    for kind in layers:
        for context in CONTEXTS:
            slices = Slices(ranks=SHOWN, tokens=context // SHOWN, width=width)
            fits = slices.tokens >= shortest_slice((kind,))[0]
            n_bytes = busiest(kind.layer, slices).forward if fits else None
            counted.append({"kind": kind.name, "context": context, "ranks": SHOWN, "bytes": n_bytes})
    long = {ranks: Slices(ranks=ranks, tokens=TOKENS[-1], width=width) for ranks in RANKS}
    return {
        "layers": counted,
        "break_even": {
            name: {ranks: break_even(layer, slices) for ranks, slices in long.items()} for name, layer in linear.items()
        },
        "schemes": {name: _over_tokens(layer, width, peaks) for name, layer in linear.items()},
    }


def _over_tokens(layer: LinearCost, width: int, peaks: Hardware) -> list[dict]:
    return [
        {
            "ranks": ranks,
            "scheme": scheme,
            "tokens": tokens,
            "bytes": n_bytes,
            "seconds": peaks.exchange_seconds(n_bytes, ranks),
        }
        for ranks in RANKS
        for tokens in TOKENS
        if tokens >= layer.block_size * layer.local_blocks
        for scheme, n_bytes in sent_by_scheme(layer, Slices(ranks=ranks, tokens=tokens, width=width)).items()
    ]
