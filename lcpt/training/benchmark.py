"""Time and memory of a training step, of several models in turn, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from lcpt.evaluation.memory import peak_memory_bytes, reset_peak_memory
from lcpt.model import GPT, ModelConfig


def training_step(config: ModelConfig, sequences: int, context: int, precision: str, device: torch.device) -> Callable:
    """A function that makes one step: forward, backward, clipping and AdamW on random tokens."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = GPT(config).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(config.vocab_size, (sequences, context + 1), device=device)

    def step() -> None:
        nats, count = model(tokens[:, :-1], labels=tokens[:, 1:])
        (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_in_turn(steps: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, dict]:
    """name -> {"milliseconds": {p10, p50, p90}, "peak_memory_bytes"}, the steps taken in turn after one warm-up each.

    On a CPU it is the time that one thread works: the wall clock of a shared machine says more about the neighbours.
    On a GPU it is the time between two synchronisations.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory = {}
    for name, step in steps.items():
        reset_peak_memory(device)
        step()
        memory[name] = peak_memory_bytes(device)
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(_seconds(step, device))
    figures = {}
    for name, taken in seconds.items():
        p10, p50, p90 = (1e3 * np.percentile(taken, [10, 50, 90])).tolist()
        figures[name] = {"milliseconds": {"p10": p10, "p50": p50, "p90": p90}, "peak_memory_bytes": memory[name]}
    return figures


def _seconds(step: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    step()
    return time.process_time() - began
