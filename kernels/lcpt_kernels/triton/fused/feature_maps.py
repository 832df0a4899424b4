"""Feature maps as a PyTorch operator, with one kernel forward and one backward. torch.compile calls it as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.feature_map_definitions import FEATURE_MAPS
from lcpt_kernels.triton.common.tensors import on_device_of
from lcpt_kernels.triton.fused.feature_map_backward import feature_map_backward
from lcpt_kernels.triton.fused.feature_map_forward import MapInputs, feature_map_forward

NAME = "the kernel of feature maps"  # in errors


def feature_map(
    name: str,
    x: Tensor,
    W: Tensor | None = None,
    G: Tensor | None = None,
    b: Tensor | None = None,
    subtract_peak: bool = False,
) -> Tensor:
    """Apply the map `name` of FEATURE_MAPS in Triton.

    x [B, T, H, D], fp32, bf16 or fp16; W and G [Hw, D, M], b [Hw, M], cast to x's dtype, a fixed W to fp32
    -> φ(x) [B, T, H, M] in x's dtype; with two halves [B, T, H, 2 M].
    """
    refuse_transforms(NAME, "torch")
    dtype = torch.float32 if FEATURE_MAPS[name].fixed else x.dtype
    W, G, b = (None if w is None else w.to(dtype) for w in (W, G, b))
    return torch.ops.lcpt_kernels.feature_map(x, W, G, b, name, subtract_peak)


def kernel_inputs(
    x: Tensor, W: Tensor | None, G: Tensor | None, b: Tensor | None, name: str, subtract_peak: bool
) -> MapInputs:
    """Give W and G the same strides, which the kernels need, and make b contiguous."""
    if W is not None and G is not None:
        W, G = W.contiguous(), G.contiguous()
    return MapInputs(x, W, G, None if b is None else b.contiguous(), name, subtract_peak)


ARGUMENTS = "Tensor x, Tensor? W, Tensor? G, Tensor? b, str name, bool subtract_peak"


@torch.library.custom_op("lcpt_kernels::feature_map", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def forward(*arguments):
    inputs = kernel_inputs(*arguments)
    with on_device_of(inputs.x):
        return feature_map_forward(inputs)


@forward.register_fake
def _(*arguments):
    inputs = MapInputs(*arguments)
    return inputs.x.new_empty(*inputs.x.shape[:3], inputs.output_width)


@torch.library.custom_op(
    "lcpt_kernels::feature_map_backward", mutates_args=(), schema=f"(Tensor dphi, {ARGUMENTS}) -> Tensor[]"
)
def backward(dphi, *arguments):
    """Return the gradients of x, W, G and b, an empty tensor where there is none."""
    inputs = kernel_inputs(*arguments)
    with on_device_of(inputs.x):
        gradients = feature_map_backward(inputs, dphi)
    return [inputs.x.new_empty(0) if dx is None else dx for dx in gradients]


@backward.register_fake
def _(dphi, *arguments):
    inputs = MapInputs(*arguments)
    return [inputs.x.new_empty(0) if w is None else w.new_empty(w.shape) for w in (inputs.x, *inputs.learned)]


def save(ctx, inputs, output):
    *tensors, ctx.name, ctx.subtract_peak = inputs
    ctx.save_for_backward(*tensors)


def differentiate(ctx, dphi):
    inputs = MapInputs(*ctx.saved_tensors, ctx.name, ctx.subtract_peak)
    dx, *gradients = torch.ops.lcpt_kernels.feature_map_backward(dphi, *inputs)
    return dx, *(None if w is None else dw for w, dw in zip(inputs.learned, gradients, strict=True)), None, None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
