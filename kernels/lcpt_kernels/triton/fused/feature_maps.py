"""Feature maps of rows, one kernel forward and one backward. An operator of PyTorch, which torch.compile takes as it
is, and so is its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from lcpt_kernels.derivatives import no_second_derivative, refuse_transforms
from lcpt_kernels.triton.common.tensors import on_device_of
from lcpt_kernels.triton.fused.feature_map_backward import feature_map_backward
from lcpt_kernels.triton.fused.feature_map_forward import FeatureMap, feature_map_forward

NAME = "the kernel of feature maps"  # in errors


def feature_map(
    map: str,
    x: Tensor,
    W: Tensor | None = None,
    G: Tensor | None = None,
    b: Tensor | None = None,
    subtract_peak: bool = False,
) -> Tensor:
    """x [B, T, H, D], fp32, bf16 or fp16; W and G [Hw, D, M], b [Hw, M], cast to x's dtype, but for favor's W: fp32.
    -> φ(x) [B, T, H, M] in x's dtype, hedgehog's [B, T, H, 2 M]."""
    refuse_transforms(NAME, "torch")
    own = torch.float32 if map == "favor" else x.dtype
    W, G, b = (None if w is None else w.to(own) for w in (W, G, b))
    return torch.ops.lcpt_kernels.feature_map(x, W, G, b, map, subtract_peak)


def of(x, W, G, b, map: str, subtract_peak: bool) -> FeatureMap:
    """W and G are read by the same strides."""
    W, G = (W, None) if G is None else (W.contiguous(), G.contiguous())
    return FeatureMap(x, W, G, None if b is None else b.contiguous(), map, subtract_peak)


ARGUMENTS = "Tensor x, Tensor? W, Tensor? G, Tensor? b, str map, bool subtract_peak"


@torch.library.custom_op("lcpt_kernels::feature_map", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def forward(*arguments):
    map = of(*arguments)
    with on_device_of(map.x):
        return feature_map_forward(map)


@forward.register_fake
def _(*arguments):
    map = FeatureMap(*arguments)
    return map.x.new_empty(*map.x.shape[:3], map.size)


@torch.library.custom_op(
    "lcpt_kernels::feature_map_backward", mutates_args=(), schema=f"(Tensor dphi, {ARGUMENTS}) -> Tensor[]"
)
def backward(dphi, *arguments):
    """-> the gradients of x, W, G and b; empty for what is not there or, favor's W, a constant."""
    map = of(*arguments)
    with on_device_of(map.x):
        gradients = feature_map_backward(map, dphi)
    return [map.x.new_empty(0) if dx is None else dx for dx in gradients]


@backward.register_fake
def _(dphi, *arguments):
    map = FeatureMap(*arguments)
    return [map.x.new_empty(0) if w is None else w.new_empty(w.shape) for w in (map.x, *map.learned)]


def save(ctx, inputs, output):
    *tensors, ctx.map, ctx.subtract_peak = inputs
    ctx.save_for_backward(*tensors)


def differentiate(ctx, dphi):
    map = FeatureMap(*ctx.saved_tensors, ctx.map, ctx.subtract_peak)
    dx, *gradients = torch.ops.lcpt_kernels.feature_map_backward(dphi, *map)
    return dx, *(None if w is None else dw for w, dw in zip(map.learned, gradients, strict=True)), None, None


forward.register_autograd(differentiate, setup_context=save)
backward.register_autograd(no_second_derivative(NAME, "torch"))
