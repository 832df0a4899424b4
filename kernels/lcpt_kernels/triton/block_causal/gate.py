"""Sums of the log gate and its gradient, in PyTorch, since they read a hundredth of what attention reads. They are
float64, because their results are differences of long sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lcpt_kernels.triton.block_causal.block_table import Blocks


def gate_sums_in_blocks(log_gate: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Return gate_cumsum [B, H, 2, T] and gate_rev_cumsum [B, H, T], fp32, of log_gate [B, T, H].

    gate_cumsum is the sum from the block's first token to t, as a whole number and the rest: so small differences of
    large sums are exact. gate_rev_cumsum is the sum from t + 1 to the block's last token.
    """
    first, after, _, _ = blocks.token_blocks(log_gate.shape[1])
    G = exclusive_cumsum(log_gate.mT)
    cumsum = (G[:, 1:] - G[:, first]).mT
    whole = cumsum.round()
    return torch.stack((whole, cumsum - whole), dim=2).float(), (G[:, after] - G[:, 1:]).float().mT.contiguous()


def block_log_decay(gate_cumsum: Tensor, blocks: Blocks, past: int) -> Tensor:
    """Return the sums of the log gate over whole blocks, [N, H], of gate_cumsum [B, H, 2, T]. A block without queries
    has 0, because an initial state is that of the first block with queries."""
    batch, _, stop, _, _ = blocks.table.long().unbind(1)
    return torch.where((stop > past)[:, None], gate_cumsum.sum(2).mT[batch, (stop - 1).clamp_(min=0)], 0.0)


def gate_gradient(
    local: Tensor, state_queries: Tensor, state_keys: Tensor | None, through: Tensor, blocks: Blocks, past: int
) -> Tensor:
    """Return the gradient of the log gate, [B, T, H] fp32: that of token u is Σ dW_ts W_ts over all s < u ≤ t.

    Args:
        local: [B, H, T], of local weights, the sum over keys of each query less the sum over queries of each key.
            Summed from u on, only pairs with s < u ≤ t remain.
        state_queries: [B, H, T], of weights through the state, the sum over keys of each query.
        state_keys: [B, H, T], of the same weights, the sum over queries of each key; None: summaries, which fade from
            the end of their block on.
        through: [N, H], of each block, the sum over weights of earlier keys and later queries; of a document's last
            block, that of the final state.

    Weights through the state from one block to later ones are known from the keys and from the queries. The sums of the
    queries are the more exact, because with `local` they add up to almost 0. The sums of the keys are corrected to
    agree with them, each in proportion to its size.
    """
    first, after, end, rows = blocks.token_blocks(local.shape[2])
    local, state_queries = exclusive_cumsum(local), exclusive_cumsum(state_queries)
    crossing = local[:, end] - local[:, :-1] + state_queries[:, after] - state_queries[:, :-1]
    batch, start, stop, _, _ = blocks.table.long().unbind(1)
    decayed = _decayed(blocks, past)
    crossing += torch.where(decayed[:, None], through, 0.0)[rows]
    if state_keys is None:
        return crossing.float()

    state_keys, size = exclusive_cumsum(state_keys), exclusive_cumsum(state_keys.abs())
    crossing += state_keys[:, :-1] - state_keys[:, first]
    entering = state_queries[batch, stop] - state_queries[batch, start] + through
    missing = entering.roll(-1, 0) - through - (state_keys[batch, stop] - state_keys[batch, start])
    missing = torch.where(decayed[:, None], missing / (size[batch, stop] - size[batch, start]).clamp(min=1e-30), 0.0)
    return (crossing + missing[rows] * (size[:, :-1] - size[:, first])).float()


def state_gate_gradient(state_keys: Tensor | None, through: Tensor, blocks: Blocks, past: int, tokens: int) -> Tensor:
    """Return the gradient of the log gate, [B, T, H] fp32, in what blocks add to the state and in the state after them.

    state_keys is as in `gate_gradient`, through [N, H] what of that state goes through a block.
    """
    first, _, _, rows = blocks.token_blocks(tokens)
    crossing = torch.where(_decayed(blocks, past)[:, None], through, 0.0).double()[rows]
    if state_keys is not None:
        sums = exclusive_cumsum(state_keys)
        crossing += sums[:, :-1] - sums[:, first]
    return crossing.float()


def _decayed(blocks: Blocks, past: int) -> Tensor:
    """Return which blocks a state decays through, [N]: as in block_log_decay, and not a document's last block."""
    decayed = blocks.table[:, 2] > past
    decayed[blocks.documents[:, 1].long() - 1] = False
    return decayed


def exclusive_cumsum(x: Tensor) -> Tensor:
    """Return the sum of x [B, H, T] before each t, float64 [B, T + 1, H].

    Rows are summed, because a GPU sums a column with one thread. A second row of zeros is added, because over a single
    row PyTorch's order on a GPU is not fixed.
    """
    rows = pad(x.double().flatten(0, 1), (1, 0, 0, 1))
    return rows.cumsum(1)[:-1].unflatten(0, x.shape[:2]).transpose(1, 2).contiguous()
