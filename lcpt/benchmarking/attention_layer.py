"""What an attention benchmark times: a method at the size of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lcpt.attention.base import Projected

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # of a kernel of ours: DESIGN.md, section 5
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of what rounds more: modules with a sketch, other libraries


class Layer(NamedTuple):
    """Of what size the attention is, in what it computes, and where."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def d_model(self) -> int:
        return self.heads * self.head_dim


class Method(NamedTuple):
    settings: dict
    inputs: Callable[[Projected], list[Tensor]]  # what is ready before the clock starts
    attend: Callable[..., Tensor]  # of the inputs -> o [B, T, H, D]: what is timed
    definition: Callable[..., Tensor]  # of the inputs in float64 -> the same, as it should be
    weights: tuple[Tensor, ...] = ()  # that learn, of `attend`
    exact_weights: tuple[Tensor, ...] = ()  # the same in float64, of `definition`
    tolerance: dict[torch.dtype, float] = TOLERANCE  # of ‖found − exact‖ / ‖exact‖
    cost: Callable[[int, str], tuple[float, float]] | None = None  # of context, mode: FLOPs and bytes a sequence
    cost_of: str | None = None  # the backend whose cost this is; None: any
