"""Continue sequences with a model, a token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lcpt.model.gpt import GPT, Cache

PIECE = 4096  # tokens of a prompt that are read at once: what their layers need does not grow with the prompt

COLDEST = 1e-30  # a temperature that fp32 can still divide by

LIMITS = {  # what an option of Sampling must be, and whether it is
    "temperature": ("≥ 0 and finite", lambda x: 0 <= x < math.inf),
    "top_k": ("≥ 1", lambda x: x >= 1),
    "top_p": ("> 0 and ≤ 1", lambda x: 0 < x <= 1),
}


@dataclass(frozen=True)
class Sampling:
    """Says how to draw a token: from softmax(logits / temperature), below COLDEST the likeliest.

    top_k leaves the k likeliest tokens, top_p then the fewest likeliest that have that share of what is left (nucleus
    sampling, arXiv 1904.09751). Raises ValueError naming what is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        for name, (allowed, holds) in LIMITS.items():
            if (value := getattr(self, name)) is not None and not holds(value):
                raise ValueError(f"{name} {value} must be {allowed}")


def generate(
    model: GPT, tokens: Tensor, sampling: Sampling, generators: Sequence[torch.Generator | None]
) -> Iterator[Tensor]:
    """Yield the next token of each of N continuations, int64 [N], without end.

    tokens int64 [B, T], T ≥ 1: one sequence that all N continue, or N sequences. generators: one for each
    continuation, whose draws then depend on no other; None is PyTorch's own. Raises ValueError where logits are not
    finite.
    """
    logits, cache = read(model, tokens)
    if len(tokens) == 1:
        logits, cache = logits.expand(len(generators), -1), cache.repeat(len(generators))
    while True:
        if not logits.isfinite().all():
            raise ValueError(f"the model's logits after {cache.position} tokens are not finite; use another checkpoint")
        token = torch.stack([choose(row, sampling, each) for row, each in zip(logits, generators, strict=True)])
        yield token
        logits, cache = model.decode(token, cache)


def read(model: GPT, tokens: Tensor) -> tuple[Tensor, Cache]:
    """Read tokens int64 [B, T], T ≥ 1, piece by piece -> (logits of the last [B, V], the cache after them)."""
    if tokens.shape[1] == 0:
        raise ValueError("there is no token to continue; begin with the tokenizer's BOS")
    *pieces, last = tokens.split(PIECE, dim=1)
    cache = None
    for piece in pieces:
        _, cache = model.extend(piece, cache)
    logits, cache = model.prefill(last, cache, last_only=True)
    return logits[:, 0], cache


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Choose a token, int64 [], by logits [V]."""
    if sampling.temperature < COLDEST:
        return logits.argmax()
    return torch.multinomial(weights(logits, sampling), 1, generator=generator)[0]


def weights(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return what the probability of each token is in proportion to, fp32 [V], from logits [V]."""
    logits = logits.float()
    # Without the largest, a low temperature makes no logit infinite on the positive side.
    probabilities = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_k is None and sampling.top_p is None:
        return probabilities
    ranked, order = probabilities.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ranked[min(sampling.top_k, len(ranked)) :] = 0
    if sampling.top_p is not None:
        sums = ranked.cumsum(-1)
        # A token stays if those before it have less than the share; the likeliest stays however small that is.
        ranked[1:][sums[:-1] >= sampling.top_p * sums[-1]] = 0
    return torch.zeros_like(probabilities).scatter(-1, order, ranked)
