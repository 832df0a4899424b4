"""Sequences in pieces, one after the other or on several ranks, with the state between them; packed documents."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcpt_kernels import in_pytorch
from lcpt_kernels.between_ranks import Exchange, attend_between_ranks
from lcpt_kernels.decode import is_decoding
from lcpt_kernels.documents import Row, outside_graphs
from lcpt_kernels.plan import Plan
from lcpt_kernels.room import append
from lcpt_kernels.state import Compute, State, after_tail, check_state, tail_after, tail_capacity


def attend(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: Mapping[str, Tensor | None],
    *,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    exchange: Exchange | None,
    compute: Compute | None,
) -> tuple[Tensor, State | None]:
    """Return o and, with output_final_state, the state after the last token.

    The tokens continue the sequence of `initial_state`, or of the ranks before in `exchange`. q is [B, T, H, D], a
    [B, T, H, r]; `keys` has "k", "b", "v" and "log_gate", each [B, T, Hkv, ·]. With plan.summaries, "b", "far_v" and
    "mass" are those of the blocks that these tokens complete, [B, N·r, Hkv, ·]. cu_seqlens: the borders of packed
    documents, of which the first is the one that goes on, and the last the one whose state is returned. compute None:
    PyTorch.
    """
    compute = compute or in_pytorch
    present = {name: x for name, x in keys.items() if x is not None}
    if exchange is not None:
        run = attend_between_ranks if cu_seqlens is None else outside_graphs(attend_between_ranks)
        return run(plan, q, a, present, exchange, output_final_state, cu_seqlens, compute)
    if cu_seqlens is None:
        return _continued(plan, q, a, present, initial_state, output_final_state, compute)
    if initial_state is None and not output_final_state:
        return compute.attention(plan, q, a, present, None, False, cu_seqlens)[0], None
    run_row = outside_graphs(_row)
    return run_row(plan, q, a, present, initial_state, output_final_state, cu_seqlens, compute)


def _continued(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: dict[str, Tensor],
    before: State | None,
    final: bool,
    compute: Compute,
) -> tuple[Tensor, State | None]:
    if before is not None:
        check_state(before, plan, keys)
        if is_decoding(plan, q, a, keys, before):
            room, keys = append(before.room, before.tail, keys, tail_capacity(plan, keys))
            o = compute.decode(plan, q, a, keys, before.S)
            return o, State(before.S, keys, room) if final else None
        keys = after_tail(before.tail, keys)
    o, S = compute.attention(plan, q, a, keys, None if before is None else before.S, final)
    return o, None if S is None else State(S, tail_after(plan, keys, first=0))


def _row(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: dict[str, Tensor],
    before: State | None,
    final: bool,
    cu_seqlens: Tensor,
    compute: Compute,
) -> tuple[Tensor, State | None]:
    row = Row.split(plan, q, a, keys, cu_seqlens, 0 if before is None else before.tail["v"].shape[1])
    x = row.first
    before = before if row.continues else None
    o, state = _continued(plan, x.q, x.a, x.keys, before, final and row.last is None, compute)
    outputs = [o]
    if row.between:
        x = row.between
        outputs.append(compute.attention(plan, x.q, x.a, x.keys, None, False, x.cu_seqlens)[0])
    if row.last:
        x = row.last
        o, state = _continued(plan, x.q, x.a, x.keys, None, final, compute)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state
