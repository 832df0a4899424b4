"""Strides and padding of tensors before and after the kernels."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Return x with a last stride of 1; other strides are free."""
    return x if x.stride(3) == 1 else x.contiguous()


def with_padded_rows(x: Tensor, size: int) -> Tensor:
    """Return x with a last stride of 1, padded with zeros to rows of `size`: products need whole groups."""
    return with_contiguous_rows(x if x.shape[3] == size else pad(x, (0, size - x.shape[3])))


def trimmed_rows(x: Tensor, size: int) -> Tensor:
    """Return x without the padding behind `size`."""
    return x if x.shape[3] == size else x[..., :size].contiguous()


def flat(x: Tensor) -> Tensor:
    """Return x [B, T, H, D] as [B · T, H, D] with a last stride of 1; a view where strides allow."""
    return with_contiguous_rows(x).flatten(0, 1)


def on_device_of(x: Tensor):
    """Return a context in which kernels start on the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def padded(width: int) -> int:
    """Return the width of a tile: the next power of two, at least the 16 that a tensor core needs."""
    return max(16, triton.next_power_of_2(width))


def as_rows(x: Tensor) -> Tensor:
    """Return x [..., D] as [N, D] with a last stride of 1; a view where strides allow."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
