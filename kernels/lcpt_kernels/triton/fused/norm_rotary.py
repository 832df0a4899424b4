"""LayerNorm of every head and rotary positions as a PyTorch operator, which torch.compile calls as it is.

The backward pass needs x, which the projection keeps in memory anyway, and the small tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.triton.common.tensors import on_device_of, with_contiguous_rows
from lcpt_kernels.triton.fused.norm_rotary_backward import norm_rotary_backward
from lcpt_kernels.triton.fused.norm_rotary_forward import norm_rotary_forward

NAME = "the kernel of norm_rotary"  # in errors


def norm_rotary(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float, keep_plain: bool
) -> tuple[Tensor, Tensor | None]:
    """Apply `lcpt_kernels.norm_rotary` in Triton.

    x [B, T, H, D], fp32, bf16 or fp16; weight and bias [D]; cos and sin [T, 1, D/2]
    -> rotated and, with keep_plain, plain, each [B, T, H, D] in x's dtype.
    """
    refuse_transforms(NAME, "torch")
    rotated, plain = torch.ops.lcpt_kernels.norm_rotary(x, weight, bias, cos, sin, eps, keep_plain)
    return rotated, plain if keep_plain else None


@torch.library.custom_op(
    "lcpt_kernels::norm_rotary",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor cos, Tensor sin, float eps, bool keep_plain) -> "
    "(Tensor rotated, Tensor plain)",
)
def forward(x, weight, bias, cos, sin, eps, keep_plain):
    """Return rotated and plain, an empty tensor without keep_plain."""
    with on_device_of(x):
        rotated, plain = norm_rotary_forward(with_contiguous_rows(x), weight, bias, cos, sin, eps, keep_plain)
    return rotated, x.new_empty(0) if plain is None else plain


@forward.register_fake
def _(x, weight, bias, cos, sin, eps, keep_plain):
    return x.new_empty(x.shape), x.new_empty(x.shape if keep_plain else 0)


@torch.library.custom_op(
    "lcpt_kernels::norm_rotary_backward",
    mutates_args=(),
    schema="(Tensor? d_rotated, Tensor? d_plain, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> "
    "(Tensor dx, Tensor d_affine)",
)
def backward(d_rotated, d_plain, x, weight, cos, sin, eps):
    """Return dx and d_affine [2, D] fp32, the gradients of weight and bias."""
    given = (None if dy is None else with_contiguous_rows(dy) for dy in (d_rotated, d_plain))
    with on_device_of(x):
        return norm_rotary_backward(*given, with_contiguous_rows(x), weight, cos, sin, eps)


@backward.register_fake
def _(d_rotated, d_plain, x, weight, cos, sin, eps):
    return x.new_empty(x.shape), x.new_empty(2, x.shape[3], dtype=torch.float32)


def save(ctx, inputs, output):
    x, weight, _, cos, sin, ctx.eps, ctx.keep_plain = inputs
    ctx.save_for_backward(x, weight, cos, sin)
    ctx.set_materialize_grads(False)  # else the kernel would read tensors of zeros


def differentiate(ctx, d_rotated, d_plain):
    x, weight, cos, sin = ctx.saved_tensors
    if not ctx.keep_plain:
        d_plain = None
    if d_rotated is None and d_plain is None:
        return (None,) * 7
    dx, d_affine = torch.ops.lcpt_kernels.norm_rotary_backward(d_rotated, d_plain, x, weight, cos, sin, ctx.eps)
    return dx, *d_affine.to(weight.dtype), None, None, None, None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
