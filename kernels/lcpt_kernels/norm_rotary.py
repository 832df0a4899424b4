"""Key shift, LayerNorm of every head and rotary positions, for queries and keys."""

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
    key_shift: Tensor | None = None,
    before: Tensor | None = None,
    starts: Tensor | None = None,
    eps: float = 1e-5,
    keep_plain: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Add a share of the token before, apply LayerNorm to every head, then rotary positions.

    x'_t = x_t + key_shift ∘ x_{t−1}. plain = LayerNorm(x') over the last dimension. rotated: the pairs (i, i + D/2)
    of plain, rotated by the angle of their position. This is RoFormer (arXiv 2104.09864), with the pairs of GPT-NeoX,
    after LayerNorm (arXiv 1607.06450). Under autocast the dtype is that of x; tables and weights stay as they are.

    Args:
        x: [B, T, H, D], D even, floating point, any strides.
        weight, bias: [D].
        cos, sin: [T, 1, D/2], tables without a gradient.
        key_shift: [H, D], or None: x' = x.
        before: [B, 1, H, D], the row of x before the first, or None: there is none, or it is 0. Only with key_shift.
        starts: [T] bool, true at the first token of a packed document, which sees none before it; or None.
        eps: of LayerNorm.
        keep_plain: return plain too.
        backend: "torch", "triton" (for a GPU) or "auto".

    Returns:
        (rotated [B, T, H, D], plain [B, T, H, D] or None), both in x's dtype. Statistics are fp32, float64 for
        float64 inputs.

    Raises:
        ValueError: names a shape that does not fit.

    Example:
        >>> x, angle = torch.tensor([[[[1.0, 3.0]]]]), torch.zeros(1, 1, 1)
        >>> rotated, _ = norm_rotary(x, torch.ones(2), torch.zeros(2), angle.cos(), angle.sin())
        >>> rotated.flatten()
        tensor([-1.0000,  1.0000])
    """
    check_backend(backend, ("auto", "torch", "triton"))
    _check(x, weight, bias, cos, sin)
    _check_shift(x, key_shift, before, starts)
    if dispatch.rows("norm_rotary", backend, x):
        from lcpt_kernels.triton.fused.norm_rotary import norm_rotary as in_triton

        return in_triton(x, weight, bias, cos, sin, key_shift, before, starts, eps, keep_plain)
    shifted = x if key_shift is None else shift_keys(x, key_shift, before, starts)
    plain = F.layer_norm(shifted, weight.shape, weight, bias, eps)
    rotated = apply_rotary(plain, cos, sin)
    return rotated.to(x.dtype), plain.to(x.dtype) if keep_plain else None


def shift_keys(x: Tensor, key_shift: Tensor, before: Tensor | None, starts: Tensor | None) -> Tensor:
    """Compute x_t + key_shift ∘ x_{t−1}, [B, T, H, D]; the other arguments are those of norm_rotary.

    A key that knows the token before its own saves associative recall a layer.
    """
    first = torch.zeros_like(x[:, :1]) if before is None else before
    earlier = torch.cat((first, x[:, :-1]), dim=1)
    if starts is not None:
        earlier = earlier.masked_fill(starts[:, None, None], 0.0)
    return x + key_shift.to(x.dtype) * earlier


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_(i + D/2)) by the angle of their position (RoFormer, arXiv 2104.09864).

    Args:
        x: [B, T, H, D], D even.
        cos, sin: [T, 1, D/2].

    Returns:
        [B, T, H, D] in x's dtype.

    Example:
        >>> quarter = torch.tensor([0.0]).view(1, 1, 1), torch.tensor([1.0]).view(1, 1, 1)
        >>> apply_rotary(torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), *quarter).flatten()
        tensor([-2.,  1.])
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Format the number of tokens only in an error: torch.compile would compile a graph for each number."""
    require(x.ndim == 4, f"x has {x.ndim} dimensions; [B, T, H, D] needs 4")
    check_sizes("x", x)
    tokens, width = x.shape[1], x.shape[3]
    require(width % 2 == 0, f"heads are {width} wide; rotary positions need an even number")
    for name, given in (("weight", weight), ("bias", bias)):
        require(given.shape == (width,), f"{name} is {list(given.shape)}; it must be [{width}]")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, 1, width // 2):
            raise ValueError(f"{name} is {list(table.shape)}; it must be {[tokens, 1, width // 2]}")


def _check_shift(x: Tensor, key_shift: Tensor | None, before: Tensor | None, starts: Tensor | None) -> None:
    require(key_shift is not None or before is None, "before is given without key_shift")
    batch, tokens, heads, width = x.shape
    if key_shift is not None:
        require(key_shift.shape == (heads, width), f"key_shift is {list(key_shift.shape)}; it must be {[heads, width]}")
    if before is not None and before.shape != (batch, 1, heads, width):
        raise ValueError(f"before is {list(before.shape)}; it must be {[batch, 1, heads, width]}")
    if starts is not None and starts.shape != (tokens,):
        raise ValueError(f"starts is {list(starts.shape)}; it must be {[tokens]}")
