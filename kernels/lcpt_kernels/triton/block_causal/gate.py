"""Sums of a log gate, and its gradient, in PyTorch: a hundredth of the attention's traffic. In float64: differences of
long sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpt_kernels.triton.block_causal.block_table import Blocks


def sums_in_blocks(log_gate: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """log_gate [B, T, H] -> fp32 its sums from the block's first token to t, [B, T, H, 2], each a whole number and the
    rest, so that small differences of large sums are exact; and from t + 1 to the block's last, [B, T, H]."""
    first, after, _, _ = blocks.of_tokens(log_gate.shape[1])
    G = before(log_gate)
    since = G[:, 1:] - G[:, first]
    whole = since.round()
    return torch.stack((whole, since - whole), dim=-1).float(), (G[:, after] - G[:, 1:]).float()


def log_decay_of_blocks(since: Tensor, blocks: Blocks, past: int) -> Tensor:
    """since [B, T, H, 2], sums from the block's first token -> [N, H] those of whole blocks. A block without queries
    does not decay: a state that is handed over is that of the first block with some."""
    batch, _, stop, _, _ = blocks.table.long().unbind(1)
    return torch.where((stop > past)[:, None], since[batch, (stop - 1).clamp_(min=0)].sum(-1), 0.0)


def gradient_of_gate(
    near: Tensor, of_rows: Tensor, of_keys: Tensor | None, through: Tensor, blocks: Blocks, past: int
) -> Tensor:
    """With dW_ts W_ts of every weight, W_ts ∝ e^{G_t − G_s}: a gate counts all with s before it and t not before it.

    near [B, T, H]: Σ_s − Σ_t of those of local keys, which a sum from t on leaves to be crossed; of the state's, summed
    over keys for each query, of_rows [B, T, H], over queries for each key, of_keys [B, T, H] (None: of summaries, which
    fade from the end of their block on), and the part that goes through a whole block, through [N, H], of a document's
    last: that which leaves it. -> [B, T, H] fp32.

    What crosses from one block into the next is seen from both, of_keys before it and of_rows behind it. Rows are the
    more exact: with those of near they add up to almost 0. So keys make up for what is missing, each its share.
    """
    first, after, end, rows = blocks.of_tokens(near.shape[1])
    near, of_rows = before(near), before(of_rows)
    crossing = near[:, end] - near[:, :-1] + of_rows[:, after] - of_rows[:, :-1]
    batch, start, stop, _, _ = blocks.table.long().unbind(1)
    decayed = stop > past  # as in log_decay_of_blocks
    decayed[blocks.documents[:, 1].long() - 1] = False  # nor does a document's last block
    crossing += torch.where(decayed[:, None], through, 0.0)[rows]
    if of_keys is None:
        return crossing.float()

    of_keys, size = before(of_keys), before(of_keys.abs())
    crossing += of_keys[:, :-1] - of_keys[:, first]
    entering = of_rows[batch, stop] - of_rows[batch, start] + through
    missing = entering.roll(-1, 0) - through - (of_keys[batch, stop] - of_keys[batch, start])
    missing = torch.where(decayed[:, None], missing / (size[batch, stop] - size[batch, start]).clamp(min=1e-30), 0.0)
    return (crossing + missing[rows] * (size[:, :-1] - size[:, first])).float()


def before(x: Tensor) -> Tensor:
    """x [B, T, H] -> float64 [B, T + 1, H]: the sum of all before t. Heads first: over columns, a thread of a GPU would
    sum a whole sequence. One row more than there are: over a single row, PyTorch's order on a GPU is not fixed."""
    rows = pad(x.double().transpose(1, 2).flatten(0, 1), (1, 0, 0, 1))
    return rows.cumsum(1)[:-1].unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2).contiguous()
