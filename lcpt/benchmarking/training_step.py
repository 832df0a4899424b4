"""Build a training step to time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lcpt.model import GPT, ModelConfig


def training_step(config: ModelConfig, sequences: int, context: int, precision: str, device: torch.device) -> Callable:
    """Build a function that makes one step on random tokens (forward, backward, clipping, AdamW) -> its loss."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = GPT(config).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(config.vocab_size, (sequences, context + 1), device=device)

    def step() -> torch.Tensor:
        nats, count = model(tokens[:, :-1], labels=tokens[:, 1:])
        loss = nats / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
