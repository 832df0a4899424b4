"""Attention under torch.autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

KEPT = {"log_gate", "gain", "mass_summary", "logits", "segments", "gamma"}  # their sums need more than 16 bits


def under_autocast(attention: Callable) -> Callable:
    """Decorate an attention function: under autocast it takes its tensors in autocast's dtype, as PyTorch's attention
    does, and computes with autocast off. float64 tensors and KEPT arguments keep their dtype."""

    @wraps(attention)
    def run(*tensors, **options):
        device = next(x.device.type for x in (*tensors, *options.values()) if isinstance(x, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return attention(*tensors, **options)
        dtype = torch.get_autocast_dtype(device)

        def cast(x):
            lower = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
            return x.to(dtype) if lower else x

        options = {name: x if name in KEPT else cast(x) for name, x in options.items()}
        with torch.autocast(device, enabled=False):
            return attention(*map(cast, tensors), **options)

    return run
