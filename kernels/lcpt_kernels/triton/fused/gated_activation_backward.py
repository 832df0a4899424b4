"""Gated activation, backward: d[g, v] = [dh v f'(g), dh f(g)], with f made again. SiLU' = σ (1 + g (1 − σ)) at g."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.fused.gated_activation_forward import load_gate_and_value
from lcpt_kernels.triton.fused.gelu import gelu_and_slope


def gated_activation_backward(d_out: Tensor, packed: Tensor, activation: str) -> Tensor:
    """Launch the backward kernel: d_out [N, F], packed [N, 2F], last strides 1 -> the gradient of packed [N, 2F]."""
    rows, width = d_out.shape
    d_packed = torch.empty(rows, 2 * width, dtype=packed.dtype, device=packed.device)
    tiles = launch_configs.tiles("gated_activation_backward", width, packed.dtype)
    if rows:
        gated_activation_backward_kernel[(rows, triton.cdiv(width, tiles["BC"]))](
            d_out,
            d_out.stride(0),
            packed,
            packed.stride(0),
            d_packed,
            width,
            SILU=activation == "silu",
            **tiles,
        )
    return d_packed


@triton.jit
def gated_activation_backward_kernel(
    d_out,  # [N, F]
    d_out_stride,
    packed,  # [N, 2F]
    packed_stride,
    d_packed,  # [N, 2F]
    width,  # F
    SILU: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < width
    gate, value = load_gate_and_value(packed, row, packed_stride, column, width)
    dh = tl.load(d_out + row * d_out_stride + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        share = tl.sigmoid(gate)
        active, slope = gate * share, share * (1.0 + gate * (1.0 - share))
    else:
        active, slope = gelu_and_slope(gate)
    at = d_packed + row * 2 * width + column
    tl.store(at, (dh * value * slope).to(d_packed.dtype.element_ty), mask=inside)
    tl.store(at + width, (dh * active).to(d_packed.dtype.element_ty), mask=inside)
