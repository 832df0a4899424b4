"""Define what an attention benchmark times: a method at the size of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcpt.attention.base import Projected

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # of our own kernels: docs/contract.md
ROUNDED = {
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
}  # of modules with a sketch and of other libraries, which round more


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Gives the size of the attention, its dtype and its device."""

    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def d_model(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """Holds a way to compute attention, with the definition that it is checked against."""

    settings: dict
    inputs: Callable[[Projected], list[Tensor]]  # prepared before the clock starts
    attend: Callable[..., Tensor]  # timed: the inputs -> o [B, T, H, D]
    definition: Callable[..., Tensor]  # the inputs in float64 -> the exact o
    weights: tuple[Tensor, ...] = ()  # the parameters of `attend`
    exact_weights: tuple[Tensor, ...] = ()  # the same in float64, of `definition`
    tolerance: dict[torch.dtype, float] = field(default_factory=TOLERANCE.copy)  # of ‖found − exact‖ / ‖exact‖
    cost: Callable[[int, str], tuple[float, float]] | None = None  # of context, mode: FLOPs and bytes a sequence
    cost_of: str | None = None  # the backend whose cost this is; None: any
