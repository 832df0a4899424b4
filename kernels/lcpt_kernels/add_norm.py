"""LayerNorm and RMSNorm of a residual stream, with the addition before them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcpt_kernels import dispatch
from lcpt_kernels.arguments import check_backend, require

WIDEST = 8192  # rows that a program of the kernel holds in registers


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add delta to the residual stream x and apply LayerNorm (arXiv 1607.06450) to the sum, in one pass.

    total = x + delta, rounded to x's dtype; normed = LayerNorm(total). A block hands on its last delta, and the next
    norm adds it: see kernels/README.md. Under autocast the dtype is that of x; the weight stays as it is.

    Args:
        x: [..., D], floating point, any strides.
        delta: [..., D] in x's dtype, or None: nothing is added, total is x.
        weight, bias: [D]; bias may be None.
        eps: of the variance, > 0.
        backend: "torch", "triton" (for a GPU; D ≤ 8192) or "auto".

    Returns:
        (normed, total), both [..., D] in x's dtype. Statistics are fp32, float64 for float64 inputs.

    Raises:
        ValueError: names a size, dtype or number that does not fit.

    Example:
        >>> normed, total = add_layer_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(2))
        >>> normed, total
        (tensor([[-1.0000,  1.0000]]), tensor([[1., 3.]]))
    """
    if _in_triton("add_layer_norm", x, delta, weight, bias, eps, backend):
        from lcpt_kernels.triton.fused.add_norm import add_norm

        return add_norm(x, delta, weight, bias, False, eps)
    total = x if delta is None else x + delta
    return torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps).to(x.dtype), total


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add delta to the residual stream x and apply RMSNorm (arXiv 1910.07467) to the sum, in one pass.

    normed = weight ∘ total / √(mean(total²) + eps). All else is as in `add_layer_norm`.

    Example:
        >>> normed, total = add_rms_norm(torch.tensor([[3.0, 4.0]]), None, torch.ones(2), eps=1e-6)
        >>> normed
        tensor([[0.8485, 1.1314]])
    """
    if _in_triton("add_rms_norm", x, delta, weight, None, eps, backend):
        from lcpt_kernels.triton.fused.add_norm import add_norm

        return add_norm(x, delta, weight, None, True, eps)
    total = x if delta is None else x + delta
    return torch.nn.functional.rms_norm(total, weight.shape, weight.to(x.dtype), eps).to(x.dtype), total


def _in_triton(
    name: str, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, backend: str
) -> bool:
    """Raise ValueError if the arguments do not fit. Return whether the function runs in Triton."""
    check_backend(backend, ("auto", "torch", "triton"))
    require(0 < eps < math.inf, f"eps is {eps}; it must be > 0 and finite")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x is {list(x.shape)}; [..., D] needs D ≥ 1")
    width = x.shape[-1]
    for vector, of in (("weight", weight), ("bias", bias)):
        if of is not None and of.shape != (width,):
            raise ValueError(f"{vector} is {list(of.shape)}, not [{width}]")
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta is {list(delta.shape)}; it must be {list(x.shape)}")
    if delta is not None and delta.dtype != x.dtype:
        raise ValueError(f"x and delta differ in dtype: {x.dtype}, {delta.dtype}")
    too_wide = f"rows are {width} wide, {WIDEST} are the most" if width > WIDEST else None
    return dispatch.use_triton(name, backend, dispatch.device_obstacle(x) or too_wide)
