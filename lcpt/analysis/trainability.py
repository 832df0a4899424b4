"""Predict from its weights at initialisation whether a kind of attention learns to recall.

A model learns to recall where a key's weight grows with q·k from the start, and where neither the local part nor the
state part drowns the other. An even power of q·k alone fails the first: its correlation with q·k is 0, and models with it
stay at chance. FLuRKA with elu1 features and γ = 0 fails the second: its state outweighs its local part 49 times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt.attention import Attention, AttentionConfig
from lcpt.attention.base import LinearCost, Projected
from lcpt.attention.lowrank import LOCAL_BLOCKS, Lowrank

QUERIES = 65_536  # over the context: so many sequences, of whose last tokens the weights are taken, 8 at least


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainability:
    """Holds averages over queries; each of its parts is None where a kind has no such part."""

    correlation: float  # of weight and q·k, over the keys of both parts, each part for itself; the lesser of the two
    effective_keys: float  # (Σ w)² / Σ w² over the number of keys: 1 where all weigh the same
    far_near: float | None  # the mean weight of a token in the state over that of a token in the local blocks


def trainability(
    kind: str, context: int, head_dim: int = 64, seed: int = 0, config: AttentionConfig | None = None
) -> Trainability:
    """Measure a kind's weights at initialisation, on unrelated LayerNormed queries and keys without positions.

    Weights are those of the last of `context` tokens: the derivative of its output by each value. For kinds that
    summarise blocks, the far keys are the summaries. A kind trains where correlation ≥ 0.7 and far_near lies in
    ½ … 2. polysketch's linear sketch of r features reaches √((r − 1)/d) at most; the Gaussian, SRHT and learned
    sketches reach 0.1 to 0.5, and learn to recall late or never.

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
        found = [last_weights(module, context, head_dim) for _ in range(max(8, QUERIES // context))]
    near = [part for parts in found if len((part := parts[0]).scores) > 1]
    far = [part for parts in found if (part := parts[1]) is not None]
    correlations = [torch.stack([correlation(p) for p in part]).mean().item() for part in (near, far) if part]
    shares = [torch.stack([effective_share(p.weights) for p in part]).mean().item() for part in (near, far) if part]
    far_near = None
    if far:
        of_far, of_near = (torch.stack([p.token_weight for p in part]).mean() for part in (far, near))
        far_near = (of_far / of_near).item()
    return Trainability(correlation=min(correlations), effective_keys=min(shares), far_near=far_near)


@dataclass(frozen=True, slots=True)
class Part:
    """The keys of one part, as one query sees them."""

    weights: Tensor  # [n]
    scores: Tensor  # q·k [n]
    token_weight: Tensor  # the mean weight of a token that these keys stand for


def last_weights(module: Attention, context: int, head_dim: int) -> tuple[Part, Part | None]:
    """Return the local part, and the state part if there is one, of the last of `context` random tokens."""
    q, k = (F.layer_norm(torch.randn(1, context, 1, head_dim), (head_dim,)) for _ in range(2))
    v = torch.zeros_like(k).requires_grad_()
    x = torch.randn(1, context, head_dim)
    summaries: list[tuple[Tensor, Tensor]] = []
    hook = None
    if pools := getattr(module, "summaries", None):

        def keep(_, __, pooled):
            pooled = pooled._replace(v=torch.zeros_like(pooled.v).requires_grad_())
            summaries.append((pooled.k, pooled.v))
            return pooled

        hook = pools.register_forward_hook(keep)
    o = module.attend(Projected(q, k, v, q_plain=q, k_plain=k, x=x))[0]
    if hook:
        hook.remove()
    far_v = [v for _, v in summaries]
    gradients = torch.autograd.grad(o[0, -1, 0, 0], [v, *far_v], allow_unused=True)
    of_token, of_summary = (None if g is None else g[0, :, 0, 0].double() for g in (*gradients, None)[:2])
    assert of_token is not None
    scores = (k[0, :, 0] @ q[0, -1, 0]).double().detach()
    far_count = tokens_in_state(module, context)
    near = Part(of_token[far_count:], scores[far_count:], of_token[far_count:].mean())
    if not far_count:
        return near, None
    if not summaries:
        return near, Part(of_token[:far_count], scores[:far_count], of_token[:far_count].mean())
    assert of_summary is not None
    seen = far_count * len(of_summary) // (context // module.block_size * module.block_size)
    scores = (summaries[0][0][0, :seen, 0] @ q[0, -1, 0]).double().detach()
    return near, Part(of_summary[:seen], scores, of_summary[:seen].sum() / far_count)


def tokens_in_state(module: Attention, context: int) -> int:
    """Count the tokens before the local blocks of the last token; 0 for kinds without blocks."""
    if not isinstance(module, LinearCost | Lowrank):
        return 0
    local_blocks = module.local_blocks if isinstance(module, LinearCost) else LOCAL_BLOCKS
    return max(0, (context - 1) // module.block_size - local_blocks + 1) * module.block_size


def correlation(part: Part) -> Tensor:
    """Correlate weights and scores of the keys that are seen: sparse kinds drop the others."""
    seen = part.weights != 0
    return torch.corrcoef(torch.stack((part.weights[seen], part.scores[seen])))[0, 1]


def effective_share(weights: Tensor) -> Tensor:
    return weights.sum().square() / weights.square().sum() / len(weights)
