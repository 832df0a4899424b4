"""Decide which calls run in Triton, and say why others do not. Kernels are imported at the first such call."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from lcpt_kernels.arguments import require
from lcpt_kernels.log import log_once
from lcpt_kernels.state import Compute

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAVE_TRITON = find_spec("triton") is not None
WIDEST = 256  # of q, k and v
WIDEST_SKETCH = 128  # of a and b where their products are features
WIDEST_ROW = 128  # of feature maps and other functions of rows
MOST_HEADS = 65535  # the limit of a grid's second axis


def squared(backend: str, a: Tensor, v: Tensor, q: Tensor | None) -> Compute | None:
    """Return the Triton computation of squared attention, or None if PyTorch is to compute it. Raise ValueError if
    backend "triton" does not take these tensors."""
    return _block_causal("squared_attention", backend, v, v if q is None else q, a, WIDEST_SKETCH)


def feature(backend: str, phi_q: Tensor, v: Tensor) -> Compute | None:
    """Return the Triton computation of feature attention, or None, as `squared` does."""
    return _block_causal("feature_attention", backend, v, v, phi_q, WIDEST)


def flurka(backend: str, q: Tensor, phi_q: Tensor, v: Tensor) -> Compute | None:
    """Return the Triton computation of FLuRKA attention, or None, as `squared` does."""
    return _block_causal("flurka_attention", backend, v, q, phi_q, WIDEST)


def _block_causal(name: str, backend: str, v: Tensor, q: Tensor, a: Tensor, widest: int) -> Compute | None:
    if not use_triton(name, backend, obstacle(v, q) or feature_obstacle(a, widest)):
        return None
    from lcpt_kernels.triton.block_causal import compute

    return compute


def intervals(backend: str, name: str, v: Tensor, *queries: Tensor) -> bool:
    """Return whether the function `name` runs in the interval kernels. Raise ValueError as `squared` does."""
    return use_triton(name, backend, obstacle(v, *queries))


def rows(name: str, backend: str, x: Tensor, *widths: int) -> bool:
    """Return whether the function `name` of rows of x, with other rows of `widths`, runs in Triton; errors as above."""
    widest = max((x.shape[3], *widths))
    too_wide = f"rows are {widest} wide, {WIDEST_ROW} are the most" if widest > WIDEST_ROW else None
    return use_triton(name, backend, obstacle(x) or too_wide)


def use_triton(name: str, backend: str, reason: str | None) -> bool:
    """Return whether to run `name` in Triton; `reason` says why its kernels do not take the arguments, None: they
    do."""
    if backend not in ("auto", "triton"):
        return False
    require(backend == "auto" or reason is None, f"backend triton: {reason}")
    if reason is not None and not torch.compiler.is_compiling():
        log_once(f"{name} runs in PyTorch: {reason}")
    return reason is None


def obstacle(v: Tensor, *queries: Tensor) -> str | None:
    """Return why no kernel takes these heads, or None."""
    width = max(x.shape[3] for x in (v, *queries))
    too_wide = f"heads are {width} wide, {WIDEST} are the most" if width > WIDEST else None
    return device_obstacle(v) or too_wide


def device_obstacle(x: Tensor) -> str | None:
    """Return why no kernel takes tensors like x, of whatever sizes, or None."""
    if not (x.is_cuda or x.is_meta or INTERPRETED):  # meta tensors count a GPU's work without computing
        return f"tensors are on {x.device.type}"
    if not HAVE_TRITON:
        return "Triton is not installed"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} is none of float32, bfloat16, float16"
    return None


def feature_obstacle(a: Tensor, widest: int) -> str | None:
    """Return why the block-causal kernels do not take features of a's shape, or None."""
    if a.shape[2] > MOST_HEADS:
        return f"{a.shape[2]} heads, {MOST_HEADS} are the most"
    if a.shape[3] > widest:
        return f"features are {a.shape[3]} wide, {widest} are the most"
    return None
