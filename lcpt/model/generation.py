"""Generate text with a model, a token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lcpt.model.gpt import GPT


def generate(model: GPT, prompt: Tensor, temperature: float, generator: torch.Generator) -> Iterator[int]:
    """Yield tokens that continue prompt, int64 [T], drawn from softmax(logits / temperature), at 0 the likeliest."""
    logits, cache = model.prefill(prompt[None])
    logits = logits[:, -1]
    while True:
        token = choose(logits[0], temperature, generator)
        yield int(token)
        logits, cache = model.decode(token[None], cache)


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Choose a token, int64 [], by logits [V]."""
    if temperature == 0:
        return logits.argmax()
    probabilities = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[0]
