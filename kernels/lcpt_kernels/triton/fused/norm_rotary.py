"""LayerNorm of every head and rotary positions in one step. An operator of PyTorch, which torch.compile takes as it is,
and so is its backward. Kept for it are x, which the projection leaves anyway, and the small tables.
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
    """x [B, T, H, D], fp32, bf16 or fp16; weight and bias [D]; cos and sin [T, 1, D/2]
    -> turned and, with keep_plain, plain [B, T, H, D] in x's dtype."""
    refuse_transforms(NAME, "torch")
    turned, plain = torch.ops.lcpt_kernels.norm_rotary(x, weight, bias, cos, sin, eps, keep_plain)
    return turned, plain if keep_plain else None


@torch.library.custom_op(
    "lcpt_kernels::norm_rotary",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor cos, Tensor sin, float eps, bool keep_plain) -> "
    "(Tensor turned, Tensor plain)",
)
def forward(x, weight, bias, cos, sin, eps, keep_plain):
    """-> turned; plain, empty if it is not kept."""
    with on_device_of(x):
        turned, plain = norm_rotary_forward(with_contiguous_rows(x), weight, bias, cos, sin, eps, keep_plain)
    return turned, x.new_empty(0) if plain is None else plain


@forward.register_fake
def _(x, weight, bias, cos, sin, eps, keep_plain):
    return x.new_empty(x.shape), x.new_empty(x.shape if keep_plain else 0)


@torch.library.custom_op(
    "lcpt_kernels::norm_rotary_backward",
    mutates_args=(),
    schema="(Tensor? d_turned, Tensor? d_plain, Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> "
    "(Tensor dx, Tensor d_affine)",
)
def backward(d_turned, d_plain, x, weight, cos, sin, eps):
    """-> dx; d_affine [2, D] fp32, the gradients of weight and bias."""
    given = (None if dy is None else with_contiguous_rows(dy) for dy in (d_turned, d_plain))
    with on_device_of(x):
        return norm_rotary_backward(*given, with_contiguous_rows(x), weight, cos, sin, eps)


@backward.register_fake
def _(d_turned, d_plain, x, weight, cos, sin, eps):
    return x.new_empty(x.shape), x.new_empty(2, x.shape[3], dtype=torch.float32)


def save(ctx, inputs, output):
    x, weight, _, cos, sin, ctx.eps, ctx.keep_plain = inputs
    ctx.save_for_backward(x, weight, cos, sin)
    ctx.set_materialize_grads(False)  # zeros for what nobody used would be read like anything else


def differentiate(ctx, d_turned, d_plain):
    x, weight, cos, sin = ctx.saved_tensors
    if not ctx.keep_plain:
        d_plain = None
    if d_turned is None and d_plain is None:
        return (None,) * 7
    dx, d_affine = torch.ops.lcpt_kernels.norm_rotary_backward(d_turned, d_plain, x, weight, cos, sin, ctx.eps)
    return dx, *d_affine.to(weight.dtype), None, None, None, None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
