"""Sums of a log gate, and its gradient, in PyTorch: a hundredth of the attention's traffic. In float64: differences of
long sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpt_kernels.triton.blocks import Blocks


def sums_in_blocks(log_gate: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """log_gate [B, T, H] -> its sums from the block's first token to t, and from t + 1 to the block's last, fp32."""
    first, after, _, _ = blocks.of_tokens(log_gate.shape[1])
    G = before(log_gate)
    return (G[:, 1:] - G[:, first]).float(), (G[:, after] - G[:, 1:]).float()


def log_decay_of_blocks(since: Tensor, blocks: Blocks, past: int) -> Tensor:
    """since [B, T, H], the sums from the block's first token -> [N, H] those of whole blocks. A block without queries
    does not decay: a state that is handed over is that of the first block with some."""
    batch, _, stop, _, _ = blocks.table.long().unbind(1)
    return torch.where((stop > past)[:, None], since[batch, (stop - 1).clamp_(min=0)], 0.0)


def gradient_of_gate(
    near: Tensor, of_rows: Tensor, of_keys: Tensor, through: Tensor, blocks: Blocks, past: int
) -> Tensor:
    """With dW_ts W_ts of every weight, W_ts ∝ e^{G_t − G_s}: a gate counts all with s before it and t not before it.

    near [B, T, H]: Σ_s − Σ_t of those of local keys, which a sum from t on leaves to be crossed; of the state's, summed
    over keys for each query, of_rows [B, T, H], over queries for each key, of_keys [B, T, H], and the part that goes
    through a whole block, through [N, H]. -> [B, T, H] fp32.

    That the last does not come from the two before it, as it could, keeps their roundings inside a block.
    """
    first, after, end, rows = blocks.of_tokens(near.shape[1])
    near, of_rows, of_keys = before(near), before(of_rows), before(of_keys)
    crossing = near[:, end] - near[:, :-1]
    inside = of_rows[:, after] - of_rows[:, :-1] + of_keys[:, :-1] - of_keys[:, first]
    decayed = torch.where(after > past, 1.0, 0.0)[:, None]  # as in log_decay_of_blocks
    return (crossing + inside + decayed * through[rows]).float()


def before(x: Tensor) -> Tensor:
    """x [B, T, H] -> float64 [B, T + 1, H]: the sum of all before t."""
    return pad(x.double().cumsum(1), (0, 0, 1, 0))
