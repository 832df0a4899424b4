"""Measure the peak FLOP/s and bandwidth that a GPU reaches."""

from __future__ import annotations

import torch

from lcpt.benchmarking.timing import time_in_turn

SIDE = 8192  # of the matrices
COPIED = 2**32  # bytes


def measured_peaks(device: torch.device, side: int = SIDE, copied: int = COPIED, repeats: int = 20) -> dict[str, float]:
    """Measure flops_per_second of a product of two square random bf16 matrices, and bytes_per_second of a copy, bytes
    read and written: the median of `repeats` each."""
    x, y = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target, out = torch.empty_like(source), torch.empty_like(x)
    steps = {"product": lambda: torch.mm(x, y, out=out), "copy": lambda: target.copy_(source)}
    figures = time_in_turn(steps, repeats, device)
    seconds = {name: figure["milliseconds"]["p50"] / 1e3 for name, figure in figures.items()}
    return {"flops_per_second": 2 * side**3 / seconds["product"], "bytes_per_second": 2 * copied / seconds["copy"]}
