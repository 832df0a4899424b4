"""LayerNorm of every head, then rotary positions: what queries and keys pass before they meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt_kernels import dispatch
from lcpt_kernels.arguments import check_backend, check_sizes, require


def norm_rotary(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-5,
    keep_plain: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """plain = LayerNorm(x) over the last dimension; turned: its pairs (i, i + D/2) by their position's angle.

    x [B, T, H, D], D even, floating point, strides free; weight, bias [D]; cos, sin [T, 1, D/2], tables without a
    gradient. backend: "torch", "triton" (for a GPU) or "auto".
    Returns (turned [B, T, H, D], with keep_plain plain [B, T, H, D], else None), in x's dtype; statistics are in fp32,
    in float64 for float64 inputs. ValueError names a shape that does not fit.
    Under autocast x alone decides on the dtype: angles and weights in 16 bits would be others.
    Source: RoFormer (arXiv 2104.09864), in the order of halves of GPT-NeoX; LayerNorm (arXiv 1607.06450).
    """
    check_backend(backend, ("auto", "torch", "triton"))
    _check(x, weight, bias, cos, sin)
    if dispatch.rows("norm_rotary", backend, x):
        from lcpt_kernels.triton.fused.norm_rotary import norm_rotary as in_triton

        return in_triton(x, weight, bias, cos, sin, eps, keep_plain)
    plain = F.layer_norm(x, weight.shape, weight, bias, eps)
    turned = rotate(plain, cos, sin)
    return turned.to(x.dtype), plain.to(x.dtype) if keep_plain else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of [B, T, H, D] by their position's angle, in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> None:
    """No number goes into a message that nobody needs, which would make a graph for each."""
    require(x.ndim == 4, f"x has {x.ndim} dimensions; [B, T, H, D] needs 4")
    check_sizes("x", x)
    tokens, width = x.shape[1], x.shape[3]
    require(width % 2 == 0, f"heads are {width} wide; rotary positions need an even number")
    for name, given in (("weight", weight), ("bias", bias)):
        require(given.shape == (width,), f"{name} is {list(given.shape)}; it must be [{width}]")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, 1, width // 2):
            raise ValueError(f"{name} is {list(table.shape)}; it must be {[tokens, 1, width // 2]}")
