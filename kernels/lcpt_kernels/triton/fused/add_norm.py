"""Addition to the residual stream and its norm as a PyTorch operator, which torch.compile calls as it is.

The backward pass needs the sum, which the residual stream keeps in any case, and makes the statistics again. The sum's
own gradient is added in it, so that x and delta get one gradient that is written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.triton.common.tensors import as_rows, on_device_of
from lcpt_kernels.triton.fused.add_norm_backward import add_norm_backward
from lcpt_kernels.triton.fused.add_norm_forward import add_norm_forward

NAME = "the kernel of add_layer_norm and add_rms_norm"  # in errors


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, rms: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Apply `lcpt_kernels.add_layer_norm`, or with rms `add_rms_norm`, in Triton.

    x and delta [..., D], fp32, bf16 or fp16; weight and bias [D] -> (normed, total), each [..., D] in x's dtype.
    """
    refuse_transforms(NAME, "torch")
    normed, total = torch.ops.lcpt_kernels.add_norm(x, delta, weight, bias, rms, eps)
    return normed, x if delta is None else total


@torch.library.custom_op(
    "lcpt_kernels::add_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? delta, Tensor weight, Tensor? bias, bool rms, float eps)"
    " -> (Tensor normed, Tensor total)",
)
def forward(x, delta, weight, bias, rms, eps):
    """Return normed and total, an empty tensor without delta."""
    with on_device_of(x):
        normed, total = add_norm_forward(as_rows(x), None if delta is None else as_rows(delta), weight, bias, rms, eps)
    return normed.view(x.shape), x.new_empty(0) if total is None else total.view(x.shape)


@forward.register_fake
def _(x, delta, weight, bias, rms, eps):
    return x.new_empty(x.shape), x.new_empty(0 if delta is None else x.shape)


@torch.library.custom_op(
    "lcpt_kernels::add_norm_backward",
    mutates_args=(),
    schema="(Tensor d_normed, Tensor? d_total, Tensor total, Tensor weight, bool has_bias, bool rms, float eps)"
    " -> (Tensor dx, Tensor d_affine)",
)
def backward(d_normed, d_total, total, weight, has_bias, rms, eps):
    """Return the gradient of total, and those of weight and, with has_bias, of bias: fp32 [1 or 2, D]."""
    with on_device_of(total):
        dx, d_affine = add_norm_backward(
            as_rows(d_normed),
            None if d_total is None else as_rows(d_total),
            as_rows(total),
            weight,
            has_bias,
            rms,
            eps,
        )
    return dx.view(total.shape), d_affine


@backward.register_fake
def _(d_normed, d_total, total, weight, has_bias, rms, eps):
    return total.new_empty(total.shape), total.new_empty(1 + has_bias, total.shape[-1], dtype=torch.float32)


def save(ctx, inputs, output):
    x, delta, weight, bias, ctx.rms, ctx.eps = inputs
    ctx.save_for_backward(x if delta is None else output[1], weight)
    ctx.added, ctx.bias_dtype = delta is not None, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # else the kernel would read tensors of zeros


def differentiate(ctx, d_normed, d_total):
    total, weight = ctx.saved_tensors
    if not ctx.added:
        d_total = None  # of an empty tensor
    if d_normed is None:
        return d_total, d_total, None, None, None, None
    has_bias = ctx.bias_dtype is not None
    dx, d_affine = torch.ops.lcpt_kernels.add_norm_backward(
        d_normed, d_total, total, weight, has_bias, ctx.rms, ctx.eps
    )
    d_bias = d_affine[1].to(ctx.bias_dtype) if has_bias else None
    return dx, dx if ctx.added else None, d_affine[0].to(weight.dtype), d_bias, None, None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
