"""Key shift, LayerNorm of every head and rotary positions as a PyTorch operator, which torch.compile calls as it is.

The backward pass needs x, which the projection keeps in memory anyway, and small tensors. With a key shift it has a
kernel of its own: the gradient of a row then contains a share of the next row's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.triton.common.tensors import on_device_of, with_contiguous_rows
from lcpt_kernels.triton.fused.norm_rotary_backward import norm_rotary_backward
from lcpt_kernels.triton.fused.norm_rotary_forward import norm_rotary_forward
from lcpt_kernels.triton.fused.shifted_norm_rotary_backward import shifted_norm_rotary_backward

NAME = "the kernel of norm_rotary"  # in errors


def norm_rotary(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_shift: Tensor | None,
    before: Tensor | None,
    starts: Tensor | None,
    eps: float,
    keep_plain: bool,
) -> tuple[Tensor, Tensor | None]:
    """Apply `lcpt_kernels.norm_rotary` in Triton.

    x [B, T, H, D], fp32, bf16 or fp16; weight and bias [D]; cos and sin [T, 1, D/2]; key_shift [H, D] or None;
    before [B, 1, H, D] or None; starts [T] bool or None
    -> rotated and, with keep_plain, plain, each [B, T, H, D] in x's dtype.
    """
    refuse_transforms(NAME, "torch")
    rotated, plain = torch.ops.lcpt_kernels.norm_rotary(
        x, weight, bias, cos, sin, key_shift, before, starts, eps, keep_plain
    )
    return rotated, plain if keep_plain else None


INPUTS = "Tensor x, Tensor weight, Tensor bias, Tensor cos, Tensor sin"
SHIFT = "Tensor? key_shift, Tensor? before, Tensor? starts"


@torch.library.custom_op(
    "lcpt_kernels::norm_rotary",
    mutates_args=(),
    schema=f"({INPUTS}, {SHIFT}, float eps, bool keep_plain) -> (Tensor rotated, Tensor plain)",
)
def forward(x, weight, bias, cos, sin, key_shift, before, starts, eps, keep_plain):
    """Return rotated and plain, an empty tensor without keep_plain."""
    before = None if before is None else with_contiguous_rows(before)
    with on_device_of(x):
        rotated, plain = norm_rotary_forward(
            with_contiguous_rows(x), weight, bias, cos, sin, key_shift, before, starts, eps, keep_plain
        )
    return rotated, x.new_empty(0) if plain is None else plain


@forward.register_fake
def _(x, weight, bias, cos, sin, key_shift, before, starts, eps, keep_plain):
    return x.new_empty(x.shape), x.new_empty(x.shape if keep_plain else 0)


@torch.library.custom_op(
    "lcpt_kernels::norm_rotary_backward",
    mutates_args=(),
    schema="(Tensor? d_rotated, Tensor? d_plain, Tensor x, Tensor weight, Tensor cos, Tensor sin, "
    f"{SHIFT}, float eps) -> (Tensor dx, Tensor d_affine, Tensor d_shift, Tensor d_before)",
)
def backward(d_rotated, d_plain, x, weight, cos, sin, key_shift, before, starts, eps):
    """Return dx, the gradients of weight and bias, d_affine [2, D] fp32, d_shift [H, D] fp32 and d_before. The last two
    are empty tensors where key_shift or before is None."""
    d_rotated, d_plain, x, before = (
        None if y is None else with_contiguous_rows(y) for y in (d_rotated, d_plain, x, before)
    )
    with on_device_of(x):
        if key_shift is None:
            found = *norm_rotary_backward(d_rotated, d_plain, x, weight, cos, sin, eps), None, None
        else:
            found = shifted_norm_rotary_backward(
                d_rotated, d_plain, x, weight, cos, sin, key_shift, before, starts, eps
            )
    return tuple(x.new_empty(0) if y is None else y for y in found)


@backward.register_fake
def _(d_rotated, d_plain, x, weight, cos, sin, key_shift, before, starts, eps):
    d_affine = x.new_empty(2, x.shape[3], dtype=torch.float32)
    d_shift = x.new_empty(0) if key_shift is None else x.new_empty(key_shift.shape, dtype=torch.float32)
    d_before = x.new_empty(0) if before is None else before.new_empty(before.shape)
    return x.new_empty(x.shape), d_affine, d_shift, d_before


def save(ctx, inputs, output):
    x, weight, _, cos, sin, *shift, ctx.eps, ctx.keep_plain = inputs
    ctx.save_for_backward(x, weight, cos, sin, *shift)
    ctx.set_materialize_grads(False)  # else the kernel would read tensors of zeros


def differentiate(ctx, d_rotated, d_plain):
    x, weight, cos, sin, key_shift, before, starts = ctx.saved_tensors
    if not ctx.keep_plain:
        d_plain = None
    if d_rotated is None and d_plain is None:
        return (None,) * 10
    dx, d_affine, d_shift, d_before = torch.ops.lcpt_kernels.norm_rotary_backward(
        d_rotated, d_plain, x, weight, cos, sin, key_shift, before, starts, ctx.eps
    )
    d_shift = None if key_shift is None else d_shift.to(key_shift.dtype)
    d_before = None if before is None else d_before
    return dx, *d_affine.to(weight.dtype), None, None, d_shift, d_before, None, None, None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
