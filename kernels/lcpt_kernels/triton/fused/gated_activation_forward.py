"""Gated activation, forward: h = f(g) v of packed rows [g, v], f = GELU or SiLU(g) = g / (1 + e^(−g))."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcpt_kernels.triton.common import launch_configs
from lcpt_kernels.triton.fused.gelu import gelu


def gated_activation_forward(packed: Tensor, activation: str) -> Tensor:
    """Launch the forward kernel: packed [N, 2F], last stride 1 -> [N, F] in its dtype."""
    rows, width = packed.shape[0], packed.shape[1] // 2
    out = torch.empty(rows, width, dtype=packed.dtype, device=packed.device)
    tiles = launch_configs.tiles("gated_activation_forward", width, packed.dtype)
    if rows:
        gated_activation_forward_kernel[(rows, triton.cdiv(width, tiles["BC"]))](
            packed, packed.stride(0), out, width, SILU=activation == "silu", **tiles
        )
    return out


@triton.jit
def gated_activation_forward_kernel(
    packed,  # [N, 2F]
    stride,
    out,  # [N, F]
    width,  # F
    SILU: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    gate, value = load_gate_and_value(packed, row, stride, column, width)
    if SILU:
        active = gate * tl.sigmoid(gate)
    else:
        active = gelu(gate)
    tl.store(out + row * width + column, (active * value).to(out.dtype.element_ty), mask=column < width)


@triton.jit
def load_gate_and_value(packed, row, stride, column, width):
    """Load columns of both halves of a row, fp32."""
    x = packed + row * stride + column
    inside = column < width
    gate = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    return gate, tl.load(x + width, mask=inside, other=0.0).to(tl.float32)
