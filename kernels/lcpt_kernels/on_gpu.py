"""Which calls go to the Triton kernels, and why the others do not. Imports them only then."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lcpt_kernels.arguments import require
from lcpt_kernels.streaming import Compute

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAVE_TRITON = find_spec("triton") is not None
WIDEST = 256  # of q, k and v
WIDEST_SKETCH = 128  # of a and b
MOST_HEADS = 65535  # of a grid's second axis


def squared(backend: str, a: Tensor, v: Tensor, q: Tensor | None) -> Compute | None:
    """The kernels of squared attention, if `backend` and the tensors want them. ValueError: "triton" cannot be."""
    if backend not in ("auto", "triton"):
        return None
    reason = obstacle(a, v, q)
    if reason is None:
        from lcpt_kernels.triton.squared import compute

        return compute
    require(backend == "auto", f"backend triton: {reason}")
    if not torch.compiler.is_compiling():
        log_once(f"squared_attention runs in PyTorch: {reason}")
    return None


def intervals(backend: str, name: str, v: Tensor, *queries: Tensor) -> bool:
    """Whether `backend` and the tensors want the interval kernels for the function `name`. ValueError: "triton" cannot
    be."""
    if backend not in ("auto", "triton"):
        return False
    reason = obstacle_of_heads(v, max(x.shape[3] for x in (v, *queries)))
    if reason is None:
        return True
    require(backend == "auto", f"backend triton: {reason}")
    if not torch.compiler.is_compiling():
        log_once(f"{name} runs in PyTorch: {reason}")
    return False


def obstacle(a: Tensor, v: Tensor, q: Tensor | None) -> str | None:
    """Why the kernels of squared attention do not take these; None: they do."""
    reason = obstacle_of_heads(v, max(v.shape[3], 0 if q is None else q.shape[3]))
    if reason is None and a.shape[2] > MOST_HEADS:
        return f"{a.shape[2]} heads, {MOST_HEADS} are the most"
    if reason is None and a.shape[3] > WIDEST_SKETCH:
        return f"a and b are {a.shape[3]} wide, {WIDEST_SKETCH} are the most"
    return reason


def obstacle_of_heads(v: Tensor, width: int) -> str | None:
    """Why no kernel takes heads like these, of which the widest has this width; None: they do."""
    if not (v.is_cuda or INTERPRETED):
        return f"tensors are on {v.device.type}"
    if not HAVE_TRITON:
        return "Triton is not installed"
    if v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{v.dtype} is none of float32, bfloat16, float16"
    if width > WIDEST:
        return f"heads are {width} wide, {WIDEST} are the most"
    return None


@cache
def log_once(message: str) -> None:
    logging.getLogger("lcpt_kernels").info(message)
