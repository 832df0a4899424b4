"""Sequences in pieces, and several in one: states that a piece leaves to the next, and packed documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lcpt_kernels.arguments import require
from lcpt_kernels.chunked import Plan, block_causal_attention
from lcpt_kernels.reference import per_query_head


class State(NamedTuple):
    """What a sequence leaves for its continuation; its size does not depend on the sequence's length."""

    S: Tensor  # Σ φ(b_s) [v_s, 1]ᵀ of the finished blocks that are no longer local, [B, Hkv, F, Dv + 1], fp32
    tail: dict[str, Tensor]  # keys, values, gates of the blocks that are, [B, < ℓc, Hkv, ·] each, by their names


def attend(
    plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor | None], initial_state: State | None,
    output_final_state: bool,
) -> tuple[Tensor, State | None]:
    """The continuation of `initial_state` by queries q [B, T, H, D], a [B, T, H, r] and as many keys: "k", "b", "v",
    "log_gate", each [B, T, Hkv, ·]. -> (o, the state after it if asked for)."""
    present = {name: x for name, x in keys.items() if x is not None}
    if initial_state is not None:
        check_state(initial_state, plan, present)
        present = {name: torch.cat((initial_state.tail[name], x), dim=1) for name, x in present.items()}
    k, b, v, log_gate = per_query_head(q.shape[2], *map(present.get, ("k", "b", "v", "log_gate")))
    group = q.shape[2] // present["v"].shape[2]
    initial = None if initial_state is None else initial_state.S.repeat_interleave(group, dim=1)
    o, S = block_causal_attention(q, b if k is None else k, v, a, b, plan, log_gate, initial, output_final_state)
    if not output_final_state:
        return o, None
    first = max(0, v.shape[1] // plan.block_size - plan.local_blocks + 1) * plan.block_size
    # Copies: views would keep all of the sequence in memory.
    return o, State(S[:, ::group].contiguous(), {name: x[:, first:].clone() for name, x in present.items()})


def check_state(state: State, plan: Plan, keys: dict[str, Tensor]) -> None:
    require(state.tail.keys() == keys.keys(), f"initial_state is of a sequence with {', '.join(sorted(state.tail))}; "
            f"this one has {', '.join(sorted(keys))}")
    tail, reach = state.tail["v"].shape[1], plan.block_size * plan.local_blocks
    require(tail < reach, f"initial_state has a tail of {tail} tokens, block_size · local_blocks is only {reach}")
    expected = keys["v"].shape[0], keys["v"].shape[2], plan.features.dimension, keys["v"].shape[3] + 1
    require(tuple(state.S.shape) == expected, f"initial_state.S is {tuple(state.S.shape)}, it must be {expected}")


def each_document(
    attend_one: Callable[..., Tensor], cu_seqlens: Tensor | None, tensors: dict[str, Tensor | None]
) -> Tensor:
    """attend_one(**tensors), where documents are packed one document at a time: o [1, T, H, Dv].

    cu_seqlens [N + 1], int: document n is tokens cu_seqlens[n] … cu_seqlens[n + 1], and begins its blocks anew.
    """
    if cu_seqlens is None:
        return attend_one(**tensors)
    ends = cu_seqlens.tolist()
    batch, tokens = next(x.shape[:2] for x in tensors.values() if x is not None)
    require(batch == 1, f"packed documents need B = 1, not {batch}")
    require(ends[0] == 0 and ends[-1] == tokens and ends == sorted(ends),
            f"cu_seqlens must rise from 0 to T = {tokens}; it is {ends}")
    documents = [
        attend_one(**{name: x if x is None else x[:, start:stop] for name, x in tensors.items()})
        for start, stop in zip(ends[:-1], ends[1:], strict=True) if start < stop
    ]
    return torch.cat(documents, dim=1)
