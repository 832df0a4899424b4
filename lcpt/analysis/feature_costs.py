"""Count what features cost a head: their dimension, their state in bytes, and the FLOPs of each kind of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import comb

import torch
from lcpt_kernels.symmetric_features import QuadraticFeatures

from lcpt.attention import ATTENTION, Attention, AttentionConfig
from lcpt.attention.polynomial import PolynomialConfig
from lcpt.attention.polysketch import DEGREE, PolysketchConfig

SQUARE = (0.0, 0.0, 1.0)
CONTEXTS = (8192, 16384, 32768)
FARTHEST = 2**26  # tokens up to which a crossover is looked for


def dimensions(head_dim: int, degree: int, sketch_size: int) -> list[dict]:
    """List {"features", "degree", "dimension", "state_bytes"} of the feature spaces of (q·k)^p, p = 2 … `degree`.

    Exact: the C(d + p − 1, p) monomials of degree p, and the C(d + p, p) up to degree p. Of a sketch of r features,
    squared: its r (r + 1)/2 products, and those that QuadraticFeatures makes in tiles. A state holds the features
    times [v, 1] with v as wide as q, in fp32.
    """
    spaces = []
    for p in range(2, degree + 1):
        spaces.append(("exact", p, comb(head_dim + p - 1, p)))
        spaces.append(("exact, cumulative", p, comb(head_dim + p, p)))
    spaces.append(("exact, tiled", 2, QuadraticFeatures(head_dim, SQUARE).dimension))
    spaces.append(("sketch, packed", DEGREE, sketch_size * (sketch_size + 1) // 2))
    spaces.append(("sketch, tiled", DEGREE, QuadraticFeatures(sketch_size, SQUARE).dimension))
    return [
        {"features": name, "degree": p, "dimension": size, "state_bytes": 4 * size * (head_dim + 1)}
        for name, p, size in spaces
    ]


def kinds(degree: int, sketch_size: int, block_size: int) -> dict[str, AttentionConfig]:
    """Configure every kind by default, polysketch with this sketch, polynomial at degree 2 and `degree`."""
    base = AttentionConfig(block_size=block_size, polysketch=PolysketchConfig(size=sketch_size))
    configs = {kind: replace(base, kind=kind) for kind in ATTENTION if kind != "polynomial"}
    for p in sorted({2, degree - degree % 2}):
        configs[f"polynomial {p}"] = replace(base, kind="polynomial", polynomial=PolynomialConfig(p))
    return configs


def costs(head_dim: int, configs: dict[str, AttentionConfig]) -> list[dict]:
    """List a row a kind, as the kind itself states it: FLOPs a token, bytes of state at CONTEXTS, and the crossovers.

    A layer of one head, without its matrices. "crossover": the least context at which the FLOPs are fewer than
    softmax's, None where they are nowhere.
    """
    heads = {name: one_head(head_dim, config) for name, config in configs.items()}
    softmax = one_head(head_dim, AttentionConfig("softmax"))
    return [
        {
            "kind": name,
            "at": [
                {
                    "context": n,
                    "forward": forward(head, n),
                    "forward_backward": forward_backward(head, n),
                    "state_bytes": head.state_bytes(n),
                }
                for n in CONTEXTS
            ],
            "crossover": {flops.__name__: crossover(flops, head, softmax) for flops in (forward, forward_backward)},
        }
        for name, head in heads.items()
    ]


def one_head(head_dim: int, config: AttentionConfig) -> Attention:
    """Build a layer of this kind with one head, on the meta device."""
    with torch.device("meta"):
        return config.attention_of_layer(0)(head_dim, 1, 1, config)


def forward(head: Attention, context: int) -> float:
    return head.attend_flops(context)[0]


def forward_backward(head: Attention, context: int) -> float:
    return sum(head.attend_flops(context))


def crossover(flops: Callable[[Attention, int], float], head: Attention, softmax: Attention) -> int | None:
    """Find by bisection the least context from which on `head` needs fewer FLOPs than softmax.

    Both grow linearly, apart from the ends of the local blocks, so that they cross once.
    """

    def cheaper(context: int) -> bool:
        return flops(head, context) < flops(softmax, context)

    high = 1
    while not cheaper(high):
        high *= 2
        if high > FARTHEST:
            return None
    low = high // 2  # not cheaper, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cheaper(middle) else (middle, high)
    return high
