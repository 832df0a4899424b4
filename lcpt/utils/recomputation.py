"""Compute something again in backward instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recompute(function: Callable, *inputs: Any) -> Any:
    """Return function(*inputs); for backward keep its inputs alone, and make the rest again.

    Backward calls the function as far as the last tensor that it has to have. Of an nn.Linear at the end that is its
    input, so its product is not computed twice. The function draws no random numbers.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def compute_once(function: Callable, *inputs: Any) -> Any:
    """Return function(*inputs), and keep for backward what autograd keeps."""
    return function(*inputs)
