"""The activation of a gated feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcpt_kernels import dispatch
from lcpt_kernels.arguments import check_backend, require

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # GEGLU and SwiGLU
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def gated_activation(packed: Tensor, *, activation: str = "gelu", backend: str = "auto") -> Tensor:
    """Compute activation(gate) ∘ value of packed = [gate, value], as GEGLU and SwiGLU do (arXiv 2002.05202).

    The kernel rounds once, at the end, and keeps nothing but packed for the backward pass.

    Args:
        packed: [..., 2F], floating point, any strides: the gate, then the value.
        activation: "gelu", the exact one, or "silu".
        backend: "torch", "triton" (for a GPU) or "auto".

    Returns:
        [..., F] in packed's dtype.

    Raises:
        ValueError: names a width, an activation or a backend that does not fit.

    Example:
        >>> gated_activation(torch.tensor([[0.0, 1.0, 5.0, 2.0]]), activation="silu")
        tensor([[0.0000, 1.4621]])
    """
    check_backend(backend, ("auto", "torch", "triton"))
    require(activation in ACTIVATIONS, f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    require(packed.ndim > 0, "packed has 0 dimensions; [..., 2F] needs at least 1")
    width = packed.shape[-1]
    require(width > 0 and width % 2 == 0, f"packed is {width} wide; it must be 2F, F ≥ 1")
    if dispatch.use_triton("gated_activation", backend, dispatch.device_obstacle(packed)):
        from lcpt_kernels.triton.fused.gated_activation import gated_activation as in_triton

        return in_triton(packed, activation)
    gate, value = packed.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * value
