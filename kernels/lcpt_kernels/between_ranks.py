"""A sequence, or a row of packed documents, on several ranks: state pass → exchange → output pass.

A rank takes part in a document that goes on from the ranks before, in one that goes on behind it, and in documents of
its own between them. Only the last document's state is passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from lcpt_kernels.accumulation import accumulated
from lcpt_kernels.arguments import require
from lcpt_kernels.documents import Row
from lcpt_kernels.plan import Plan
from lcpt_kernels.state import Compute, State, after_tail, tail_after


class Exchange(Protocol):
    """Communication between ranks that share a sequence. Each rank holds at least ℓ·c consecutive tokens and the
    summaries of the blocks that end there. All ranks call both methods; the results are differentiable."""

    start: int  # the number of tokens on the ranks before; with packed documents, of the one that is first on this rank

    def shift(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the rank before; on the first rank, tensors without rows, [B, 0, ...]."""

    def before(self, S: Tensor, log_decay: Tensor | None) -> Tensor:
        """Return S' at this rank's start, from S and log_decay [B, Hkv] of all ranks: S'₀ = 0 and
        S'ᵢ₊₁ = e^(log_decayᵢ) S'ᵢ + Sᵢ; log_decay None: 0 on all ranks. It is −∞ where a document begins on a rank."""


def attend_between_ranks(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: Mapping[str, Tensor],
    exchange: Exchange,
    final: bool,
    cu_seqlens: Tensor | None,
    compute: Compute,
) -> tuple[Tensor, State | None]:
    """Return o of this rank's tokens and, with `final`, the state after the last one. Arguments as in `attend`."""
    tokens, reach = keys["v"].shape[1], plan.block_size * plan.local_blocks
    require(tokens >= reach, f"a rank holds {tokens} tokens; block_size · local_blocks = {reach} are the least")
    row = Row.split(plan, q, a, keys, cu_seqlens, exchange.start)
    begins = cu_seqlens is not None and (exchange.start == 0 or not row.continues)  # no document goes on from before
    start = 0 if begins or row.last else exchange.start

    own = (row.last or row.first).keys
    tail = exchange.shift(tail_after(plan, own, start))
    # Nothing is left of what is dropped, but all ranks take part in its backward pass.
    tail = {name: x[:, :0] for name, x in tail.items()} if begins else tail
    past = 0 if row.last else tail["v"].shape[1]
    own = own if row.last else after_tail(tail, own)

    added, S = compute.state_pass(plan, own, past)
    log_decay = _log_decay(plan, own, past, cu_seqlens is not None, begins or row.last is not None)
    before = exchange.before(S, log_decay)
    before = _dropped(before, 0.0) if begins else before
    if row.last is None:
        o = compute.output_pass(plan, row.first.q, row.first.a, own, before, added)
        S = S + (before if log_decay is None else before * log_decay.exp().to(S.dtype)[..., None, None])
    else:  # those that need nothing from other ranks first: the state may still be on its way
        outputs = [compute.output_pass(plan, row.last.q, row.last.a, own, None, added)]
        if row.between:
            x = row.between
            outputs.append(compute.attention(plan, x.q, x.a, x.keys, None, False, x.cu_seqlens)[0])
        x = row.first
        outputs.append(compute.attention(plan, x.q, x.a, after_tail(tail, x.keys), before, False)[0])
        o = torch.cat(outputs[::-1], dim=1)
    return o, State(S, tail_after(plan, own, 0)) if final else None


def _log_decay(plan: Plan, keys: Mapping[str, Tensor], past: int, packed: bool, cut: bool) -> Tensor | None:
    """Return the log of what is left of the state before the keys in that after them, [B, Hkv]; with `cut`, −∞. The
    first `past` keys were there before."""
    c, v = plan.block_size, keys["v"]
    if "log_gate" in keys:
        gates = accumulated(keys["log_gate"][:, past // c * c : v.shape[1] // c * c])
        return _dropped(gates.sum(1), -torch.inf) if cut else gates.sum(1)
    return (
        v.new_full((v.shape[0], v.shape[2]), -torch.inf if cut else 0.0, dtype=accumulated(v[:, :0]).dtype)
        if packed
        else None
    )


def _dropped(x: Tensor, value: float) -> Tensor:
    """Return `value` in x's shape, with a gradient of zeros for x."""
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), value)
