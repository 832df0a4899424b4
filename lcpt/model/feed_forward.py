"""Transform each token by itself: a projection up, an activation, a projection down."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from lcpt_kernels import gated_activation
from torch import Tensor, nn

from lcpt.utils.recomputation import recompute

PIECE = 8192  # tokens at a time, where a slice is long; products of so many rows are as fast as larger ones


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU in its tanh approximation (arXiv 1606.08415), [..., F] -> [..., F]: the one of GPT-2."""
    return F.gelu(x, approximate="tanh")


class Activation(NamedTuple):
    """Says what stands between the projections up and down."""

    function: Callable[[Tensor], Tensor]  # of the projection up, as one tensor
    packed: int  # how many times d_ff that tensor is wide


ACTIVATIONS = {
    "geglu": Activation(partial(gated_activation, activation="gelu"), 2),  # arXiv 2002.05202
    "swiglu": Activation(partial(gated_activation, activation="silu"), 2),  # the same paper; Llama and Qwen
    "gelu_tanh": Activation(gelu_tanh, 1),
}


def default_width(kind: str, d_model: int) -> int:
    """Choose d_ff so that all kinds have 8 d_model² weights: 4 d_model, or 8/3 of it with a gate, in multiples of 8."""
    return 4 * d_model if ACTIVATIONS[kind].packed == 1 else d_model * 8 // 3 // 8 * 8


class FeedForward(nn.Module):
    """Computes W_down activation(W_up x), [..., d_model] -> [..., d_model]. In `up`, the gate's rows come first."""

    def __init__(self, kind: str, d_model: int, d_ff: int, bias: bool):
        super().__init__()
        self.activation, packed = ACTIVATIONS[kind]
        self.up = nn.Linear(d_model, packed * d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """norm: of x, for selective activation checkpointing: its result and the activation's are made again in
        backward."""
        if norm is None:
            return self.down(self.activation(self.up(x)))
        packed = recompute(lambda x: self.up(norm(x)), x)
        return recompute(lambda packed: self.down(self.activation(packed)), packed)

    def in_pieces(self, x: Tensor) -> Tensor:
        """Do the same for PIECE tokens at a time, each piece made again in backward: one alone is ever d_ff wide."""
        rows = x.flatten(end_dim=-2)
        if len(rows) <= PIECE:
            return self(x)
        return torch.cat([recompute(self, piece) for piece in rows.split(PIECE)]).view_as(x)
