"""Predict from its weights at initialisation whether a kind of attention learns to recall.

A model learns to recall where a key's weight grows with q·k from the start, and where neither the local part nor the
state part drowns the other. An even power of q·k alone fails the first: its correlation with q·k is 0. FLuRKA with elu1
features and γ = 0 fails the second: its state outweighs its local part 49 times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt.attention import Attention, AttentionConfig
from lcpt.attention.base import LinearCost, Projected
from lcpt.attention.lowrank import LOCAL_BLOCKS, Lowrank
from lcpt.attention.summaries import Pooled

LEAST_QUERIES, TOKENS = 4, 2**14  # sequences to average over: as many as make so many tokens, 4 at least


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainability:
    """Holds averages over queries; of correlation and effective_keys the lesser of the local and the state part."""

    correlation: float  # of weight and q·k over keys
    effective_keys: float  # (Σ w)² / Σ w² over the number of keys: 1 where all weigh the same
    far_near: float | None  # mean weight of a token in the state over that of a local one; None: there is no state


def trainability(
    kind: str, context: int, head_dim: int = 64, seed: int = 0, config: AttentionConfig | None = None
) -> Trainability:
    """Measure a kind's weights at initialisation, on unrelated LayerNormed queries and keys without positions.

    Weights are those of the last of `context` tokens: the derivative of its output by each value. For kinds that
    summarise blocks, the keys of the state are the summaries. A kind trains well where correlation ≥ 0.7 and far_near
    lies in ½ … 2. Below that lie: polysketch's linear sketch of r features, at most √((r − 1)/d); the feature maps
    relu, oglu and aoglu (0.5); favor, and the learned, Gaussian and SRHT sketches (0.1 to 0.4).

    Args:
        kind: a name in lcpt.attention.ATTENTION.
        context: tokens of the sequence.
        head_dim: d.
        seed: of the vectors and of the kind's matrices.
        config: the kind's settings; None: the defaults.
    """
    config = replace(config or AttentionConfig(), kind=kind, pattern=[], gate="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = config.attention_of_layer(0)(head_dim, 1, 1, config)
        queries = max(LEAST_QUERIES, TOKENS // context)
        near, far = zip(*(last_weights(module, context) for _ in range(queries)), strict=True)
    parts = [near] if far[0] is None else [near, far]
    return Trainability(
        correlation=min(mean([correlation(one) for one in part]) for part in parts),
        effective_keys=min(mean([effective_share(one.weights) for one in part]) for part in parts),
        far_near=None if far[0] is None else mean([f.of_token for f in far]) / mean([n.of_token for n in near]),
    )


def mean(values: list[Tensor]) -> float:
    return torch.stack(values).mean().item()


@dataclass(frozen=True, slots=True)
class Part:
    """The keys of the local part or of the state, as one query sees them."""

    weights: Tensor  # [n]
    scores: Tensor  # q·k [n]
    of_token: Tensor  # the mean weight of a token that these keys stand for, a scalar


def last_weights(module: Attention, context: int) -> tuple[Part, Part | None]:
    """Return the local part, and the state's part if there is one, of the last of `context` random tokens."""
    d, keys_in_state = module.head_dim, tokens_in_state(module, context)
    q, k = (F.layer_norm(torch.randn(1, context, 1, d), (d,)) for _ in range(2))
    v = torch.zeros_like(k).requires_grad_()
    pooled: list[Pooled] = []

    def record(_, __, output: Pooled) -> Pooled:
        pooled.append(output._replace(v=torch.zeros_like(output.v).requires_grad_()))
        return pooled[0]

    hooks = [child.register_forward_hook(record) for name, child in module.named_children() if name == "summaries"]
    o = module.attend(Projected(q, k, v, q_plain=q, k_plain=k, x=torch.randn(1, context, d)))[0]
    for hook in hooks:
        hook.remove()
    of_token, *of_summary = torch.autograd.grad(o[0, -1, 0, 0], [v, *(output.v for output in pooled)])
    weights, scores = of_token[0, :, 0, 0].double(), (k[0, :, 0] @ q[0, -1, 0]).double()
    n = keys_in_state
    near = Part(weights[n:], scores[n:], weights[n:].mean())
    if not n:
        return near, None
    if not pooled:
        return near, Part(weights[:n], scores[:n], weights[:n].mean())
    seen = of_summary[0][0, :, 0, 0] != 0
    weights, scores = of_summary[0][0, seen, 0, 0].double(), (pooled[0].k[0, seen, 0] @ q[0, -1, 0]).double()
    return near, Part(weights, scores.detach(), weights.sum() / n)


def tokens_in_state(module: Attention, context: int) -> int:
    """Count the tokens before the local blocks of the last token; 0 for kinds without blocks."""
    if isinstance(module, LinearCost):
        block_size, local_blocks = module.block_size, module.local_blocks
    elif isinstance(module, Lowrank):
        block_size, local_blocks = module.block_size, LOCAL_BLOCKS
    else:
        return 0
    return max(0, (context - 1) // block_size - local_blocks + 1) * block_size


def correlation(part: Part) -> Tensor:
    """Correlate weights and scores of the keys that are seen: sparse kinds drop the others."""
    seen = part.weights != 0
    return torch.corrcoef(torch.stack((part.weights[seen], part.scores[seen])))[0, 1]


def effective_share(weights: Tensor) -> Tensor:
    return weights.sum().square() / weights.square().sum() / len(weights)
