"""The learned sketch of one level as a PyTorch operator, which torch.compile calls as it is.

forward   learned_sketch_forward: both networks in registers
backward  learned_sketch_backward: recomputes both networks; reads x and da once for all gradients
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.triton.common.tensors import flat, on_device_of
from lcpt_kernels.triton.fused.learned_sketch_backward import learned_sketch_backward
from lcpt_kernels.triton.fused.learned_sketch_forward import learned_sketch_forward

NAME = "the kernel of learned_sketch"  # in errors


def learned_sketch(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Compute the sketch in Triton.

    x [B, T, H, d], up [2, d, h], down [2, h, r], all fp32, bf16 or fp16 -> [B, T, H, r] in the same dtype.
    """
    refuse_transforms(NAME, "torch")
    return torch.ops.lcpt_kernels.learned_sketch(x, up, down)


@torch.library.custom_op(
    "lcpt_kernels::learned_sketch", mutates_args=(), schema="(Tensor x, Tensor up, Tensor down) -> Tensor"
)
def forward(x, up, down):
    with on_device_of(x):
        out = learned_sketch_forward(flat(x), up.contiguous(), down.contiguous())
    return out.view(*x.shape[:3], down.shape[2])


@forward.register_fake
def _(x, up, down):
    return x.new_empty(*x.shape[:3], down.shape[2])


@torch.library.custom_op(
    "lcpt_kernels::learned_sketch_backward",
    mutates_args=(),
    schema="(Tensor da, Tensor x, Tensor up, Tensor down) -> (Tensor dx, Tensor d_up, Tensor d_down)",
)
def backward(da, x, up, down):
    with on_device_of(x):
        dx, d_up, d_down = learned_sketch_backward(flat(da), flat(x), up.contiguous(), down.contiguous())
    return dx.view(x.shape), d_up, d_down


@backward.register_fake
def _(da, x, up, down):
    return tuple(y.new_empty(y.shape) for y in (x, up, down))


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate(ctx, da):
    return torch.ops.lcpt_kernels.learned_sketch_backward(da, *ctx.saved_tensors)


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
