"""The gated activation as a PyTorch operator, which torch.compile calls as it is. Backward needs its input alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.triton.common.tensors import as_rows, on_device_of
from lcpt_kernels.triton.fused.gated_activation_backward import gated_activation_backward
from lcpt_kernels.triton.fused.gated_activation_forward import gated_activation_forward

NAME = "the kernel of gated_activation"  # in errors


def gated_activation(packed: Tensor, activation: str) -> Tensor:
    """Apply `lcpt_kernels.gated_activation` in Triton: packed [..., 2F], fp32, bf16 or fp16 -> [..., F]."""
    refuse_transforms(NAME, "torch")
    return torch.ops.lcpt_kernels.gated_activation(packed, activation)


@torch.library.custom_op(
    "lcpt_kernels::gated_activation", mutates_args=(), schema="(Tensor packed, str activation) -> Tensor"
)
def forward(packed, activation):
    with on_device_of(packed):
        out = gated_activation_forward(as_rows(packed), activation)
    return out.view(*packed.shape[:-1], packed.shape[-1] // 2)


@forward.register_fake
def _(packed, activation):
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


@torch.library.custom_op(
    "lcpt_kernels::gated_activation_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor packed, str activation) -> Tensor",
)
def backward(d_out, packed, activation):
    with on_device_of(packed):
        return gated_activation_backward(as_rows(d_out), as_rows(packed), activation).view(packed.shape)


@backward.register_fake
def _(d_out, packed, activation):
    return packed.new_empty(packed.shape)


def save(ctx, inputs, output):
    packed, ctx.activation = inputs
    ctx.save_for_backward(packed)


def differentiate(ctx, d_out):
    (packed,) = ctx.saved_tensors
    return torch.ops.lcpt_kernels.gated_activation_backward(d_out, packed, ctx.activation), None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
