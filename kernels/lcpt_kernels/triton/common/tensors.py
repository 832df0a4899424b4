"""What the operators do with tensors before and after the kernels."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad


def with_contiguous_rows(x: Tensor) -> Tensor:
    """x with numbers of one row side by side; other strides are free."""
    return x if x.stride(3) == 1 else x.contiguous()


def with_padded_rows(x: Tensor, size: int) -> Tensor:
    """The same with zeros up to `size`: products of whole groups."""
    return with_contiguous_rows(x if x.shape[3] == size else pad(x, (0, size - x.shape[3])))


def trimmed_rows(x: Tensor, size: int) -> Tensor:
    """Without the zeros behind `size`."""
    return x if x.shape[3] == size else x[..., :size].contiguous()


def flat(x: Tensor) -> Tensor:
    """x [B, T, H, D] -> [B · T, H, D], numbers of a row side by side; a view where strides allow."""
    return with_contiguous_rows(x).flatten(0, 1)


def on_device_of(x: Tensor):
    """Where kernels start."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def padded(width: int) -> int:
    """Of a tile: a power of two, and as wide as a tensor core needs."""
    return max(16, triton.next_power_of_2(width))
