"""The learned sketch: the product of the outputs of two small networks, which all heads share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt_kernels import dispatch
from lcpt_kernels.arguments import check_backend, check_sizes, require
from lcpt_kernels.autocast import under_autocast

WIDEST_FP32 = 64  # columns of x, of the hidden layer and of the sketch


def learned_sketch(x: Tensor, up: Sequence[Tensor], down: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Compute S(x) = tanh(f₁(x) ∘ f₂(x) / √r), the learned sketch of PolySketchFormer (arXiv 2310.01655, section 3).

    Each f applies the levels W₂ GELU(W₁ ·) one after the other, with the exact GELU. up and down hold the matrices of
    f₁ and f₂ side by side.

    Args:
        x: [B, T, H, d], any strides; fewer dimensions before d are allowed. Floating point.
        up: for each level the two W₁ [2, d, h]; after the first level d is the r of the level before.
        down: for each level the two W₂ [2, h, r].
        backend: "torch", "triton" (for a GPU, one level) or "auto".

    Returns:
        [B, T, H, r] in x's dtype, which up and down share.

    Raises:
        ValueError: names a shape or a dtype that does not fit.

    Example:
        >>> x, up, down = torch.zeros(1, 5, 2, 8), [torch.randn(2, 8, 6)], [torch.randn(2, 6, 4)]
        >>> learned_sketch(x, up, down).shape, learned_sketch(x, up, down).norm()
        (torch.Size([1, 5, 2, 4]), tensor(0.))
    """
    check_backend(backend, ("auto", "torch", "triton"))
    require(len(up) == len(down) > 0, f"{len(up)} levels up and {len(down)} down; they must be as many, and at least 1")
    return _sketch(x, *up, *down, backend=backend)


@under_autocast
def _sketch(x: Tensor, *matrices: Tensor, backend: str) -> Tensor:
    up, down = matrices[: len(matrices) // 2], matrices[len(matrices) // 2 :]
    _check(x, up, down)
    rows = x[(None,) * (4 - x.ndim)]
    if _on_gpu(backend, rows, up, down):
        from lcpt_kernels.triton.fused.learned_sketch import learned_sketch as in_triton

        return in_triton(rows, up[0], down[0]).view(*x.shape[:-1], down[0].shape[2])
    first = second = x
    for u, d in zip(up, down, strict=True):
        first, second = F.gelu(first @ u[0]) @ d[0], F.gelu(second @ u[1]) @ d[1]
    return torch.tanh(first * second * down[-1].shape[2] ** -0.5)


def _on_gpu(backend: str, rows: Tensor, up: tuple[Tensor, ...], down: tuple[Tensor, ...]) -> bool:
    """Tell whether the kernels run: they hold the matrices of one level and their gradients on the chip."""
    widest = max(rows.shape[3], *down[0].shape[1:])
    if len(up) > 1:
        reason = f"the sketch has {len(up)} levels, 1 is the most"
    elif rows.dtype == torch.float32 and widest > WIDEST_FP32:
        reason = f"rows of float32 are {widest} wide, {WIDEST_FP32} are the most"
    else:
        return dispatch.rows("learned_sketch", backend, rows, widest)
    return dispatch.use_triton("learned_sketch", backend, reason)


def _check(x: Tensor, up: tuple[Tensor, ...], down: tuple[Tensor, ...]) -> None:
    require(1 <= x.ndim <= 4, f"x has {x.ndim} dimensions; [B, T, H, d] has 4")
    check_sizes("x", x[(None,) * (4 - x.ndim)])
    width = x.shape[-1]
    for level, (u, d) in enumerate(zip(up, down, strict=True)):
        hidden, size = u.shape[-1], d.shape[-1]
        for name, matrix, shape in (("up", u, (2, width, hidden)), ("down", d, (2, hidden, size))):
            require(matrix.shape == shape, f"{name}[{level}] is {list(matrix.shape)}; it must be {list(shape)}")
            require(matrix.dtype == x.dtype, f"{name}[{level}] is {matrix.dtype}, x is {x.dtype}")
            check_sizes(f"{name}[{level}]", matrix)
        width = size
