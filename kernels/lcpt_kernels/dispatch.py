"""Which calls go to the Triton kernels, and why the others do not. Imports them only then."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from lcpt_kernels.arguments import require
from lcpt_kernels.log import log_once
from lcpt_kernels.streaming import Compute

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAVE_TRITON = find_spec("triton") is not None
WIDEST = 256  # of q, k and v
WIDEST_SKETCH = 128  # of a and b where their products are features
WIDEST_ROW = 128  # of what is mapped row by row
MOST_HEADS = 65535  # of a grid's second axis


def squared(backend: str, a: Tensor, v: Tensor, q: Tensor | None) -> Compute | None:
    """The kernels of squared attention, if `backend` and the tensors want them. ValueError: "triton" cannot be."""
    return _of_blocks("squared_attention", backend, v, v if q is None else q, a, WIDEST_SKETCH)


def feature(backend: str, phi_q: Tensor, v: Tensor) -> Compute | None:
    """The same of feature attention."""
    return _of_blocks("feature_attention", backend, v, v, phi_q, WIDEST)


def flurka(backend: str, q: Tensor, phi_q: Tensor, v: Tensor) -> Compute | None:
    """The same of FLuRKA attention."""
    return _of_blocks("flurka_attention", backend, v, q, phi_q, WIDEST)


def _of_blocks(name: str, backend: str, v: Tensor, q: Tensor, a: Tensor, widest: int) -> Compute | None:
    if not wanted(name, backend, obstacle(v, q) or obstacle_of_features(a, widest)):
        return None
    from lcpt_kernels.triton.block_causal.autograd import compute

    return compute


def intervals(backend: str, name: str, v: Tensor, *queries: Tensor) -> bool:
    """Whether `backend` and the tensors want the interval kernels for the function `name`. ValueError as above."""
    return wanted(name, backend, obstacle(v, *queries))


def rows(name: str, backend: str, x: Tensor, *widths: int) -> bool:
    """The same of the kernels that map rows of x, and of these other widths, one by one."""
    widest = max((x.shape[3], *widths))
    too_wide = f"rows are {widest} wide, {WIDEST_ROW} are the most" if widest > WIDEST_ROW else None
    return wanted(name, backend, obstacle(x) or too_wide)


def wanted(name: str, backend: str, reason: str | None) -> bool:
    """reason: why the kernels cannot be; None: they can."""
    if backend not in ("auto", "triton"):
        return False
    require(backend == "auto" or reason is None, f"backend triton: {reason}")
    if reason is not None and not torch.compiler.is_compiling():
        log_once(f"{name} runs in PyTorch: {reason}")
    return reason is None


def obstacle(v: Tensor, *queries: Tensor) -> str | None:
    """Why no kernel takes heads like these; None: they do."""
    width = max(x.shape[3] for x in (v, *queries))
    if not (v.is_cuda or v.is_meta or INTERPRETED):  # meta: shapes alone, so that one may count what a GPU would do
        return f"tensors are on {v.device.type}"
    if not HAVE_TRITON:
        return "Triton is not installed"
    if v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{v.dtype} is none of float32, bfloat16, float16"
    if width > WIDEST:
        return f"heads are {width} wide, {WIDEST} are the most"
    return None


def obstacle_of_features(a: Tensor, widest: int) -> str | None:
    """Why the kernels of blocks do not take a, or its like, up to so wide."""
    if a.shape[2] > MOST_HEADS:
        return f"{a.shape[2]} heads, {MOST_HEADS} are the most"
    if a.shape[3] > widest:
        return f"features are {a.shape[3]} wide, {widest} are the most"
    return None
