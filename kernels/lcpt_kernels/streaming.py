"""Sequences in pieces, one after the other or on several ranks: what one leaves to the next. Packed documents."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcpt_kernels.arguments import check_packed, require
from lcpt_kernels.chunked import Plan, StateInput, accumulated, accumulator, block_causal_attention
from lcpt_kernels.reference import per_query_head


class State(NamedTuple):
    """What a sequence leaves for its continuation; its size does not depend on the sequence's length."""

    S: Tensor  # Σ φ(b_s) [v_s, 1]ᵀ of the finished blocks that are no longer local, [B, Hkv, F, Dv + 1], fp32
    tail: dict[str, Tensor]  # keys, values, gates of the blocks that are, [B, < ℓc, Hkv, ·] each, by their names


class Exchange(Protocol):
    """What the ranks that share a sequence tell each other. Each holds consecutive tokens, at least ℓ·c of them, and
    the summaries of the blocks that end there. All ranks call both methods; the results are differentiable."""

    start: int  # tokens of the sequence before this rank's

    def shift(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the rank before; the first rank gets them without rows, [B, 0, ...]."""

    def before(self, S: Tensor, log_decay: Tensor | None) -> Tensor:
        """What S would be at this rank's start: with S and log_decay [B, Hkv] of each rank, S₀' = 0 and
        S'ᵢ₊₁ = e^(log_decayᵢ) S'ᵢ + Sᵢ; None: 0."""


class Compute(Protocol):
    """One of the ways to compute a piece, `in_pytorch` and the like."""

    def __call__(
        self, plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], initial: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """keys with those of the tail before them; initial [B, Hkv, F, Dv + 1]. -> (o, with `final` S like initial)."""


def attend(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: dict[str, Tensor | None],
    initial_state: State | None,
    output_final_state: bool,
    exchange: Exchange | None = None,
    compute: Compute | None = None,
) -> tuple[Tensor, State | None]:
    """The continuation of `initial_state`, or of what `exchange` brings, by queries q [B, T, H, D], a [B, T, H, r] and
    as many keys: "k", "b", "v", "log_gate", each [B, T, Hkv, ·]; where plan.summaries is set, "b", "far_v" and "mass"
    are of the blocks that these tokens complete, [B, N·r, Hkv, ·]. -> (o, the state after it if asked for)."""
    compute = compute or in_pytorch
    present = {name: x for name, x in keys.items() if x is not None}
    if exchange is not None:
        initial_state = _from_ranks_before(plan, q, a, present, exchange, compute)
    if initial_state is not None:
        check_state(initial_state, plan, present)
        present = {name: torch.cat((initial_state.tail[name], x), dim=1) for name, x in present.items()}
    o, S = compute(plan, q, a, present, None if initial_state is None else initial_state.S, output_final_state)
    return o, State(S, _tail(plan, present, first=0)) if output_final_state else None


def in_pytorch(
    plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], initial: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    per_head = dict(zip(keys, per_query_head(q.shape[2], *keys.values()), strict=True))
    v, b = per_head["v"], per_head["b"]
    state_input = StateInput(b, per_head.get("far_v", v), per_head.get("mass"))
    group = q.shape[2] // keys["v"].shape[2]
    initial = None if initial is None else initial.repeat_interleave(group, dim=1)
    o, S = block_causal_attention(
        q, per_head.get("k", b), v, a, state_input, plan, per_head.get("log_gate"), initial, final
    )
    return o, S[:, ::group].contiguous() if final else None


def _tail(plan: Plan, keys: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """Of keys that begin with token `first` of a sequence, those which are not in S at their end."""
    c = plan.block_size
    gone = max(0, (first + keys["v"].shape[1]) // c - plan.local_blocks + 1)  # blocks that are in S
    start = {name: (gone - first // c) * plan.summaries for name in ("b", "far_v", "mass")} if plan.summaries else {}
    # Copies: views would keep all of the sequence in memory.
    return {name: x[:, start.get(name, gone * c - first) :].clone() for name, x in keys.items()}


def _from_ranks_before(
    plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], exchange: Exchange, compute: Compute
) -> State:
    c, v, reach = plan.block_size, keys["v"], plan.block_size * plan.local_blocks
    require(v.shape[1] >= reach, f"a rank holds {v.shape[1]} tokens; block_size · local_blocks = {reach} are the least")
    tail = exchange.shift(_tail(plan, keys, exchange.start))
    held = tail["v"].shape[1]
    nothing = v.new_zeros(v.shape[0], v.shape[2], plan.features.dimension, v.shape[3] + 1, dtype=accumulator(v))
    # The output is made again, with what came before.
    _, own = attend(plan, q, a, keys, State(nothing, tail), True, compute=compute)
    log_decay = None
    if "log_gate" in keys:
        gates = torch.cat((tail["log_gate"], keys["log_gate"]), dim=1)
        log_decay = accumulated(gates[:, held // c * c : gates.shape[1] // c * c]).sum(1)
    return State(exchange.before(own.S, log_decay), tail)


def check_state(state: State, plan: Plan, keys: dict[str, Tensor]) -> None:
    require(
        state.tail.keys() == keys.keys(),
        f"initial_state is of a sequence with {', '.join(sorted(state.tail))}; this one has {', '.join(sorted(keys))}",
    )
    tail, reach = state.tail["v"].shape[1], plan.block_size * plan.local_blocks
    require(tail < reach, f"initial_state has a tail of {tail} tokens, block_size · local_blocks is only {reach}")
    expected = keys["v"].shape[0], keys["v"].shape[2], plan.features.dimension, keys["v"].shape[3] + 1
    require(tuple(state.S.shape) == expected, f"initial_state.S is {tuple(state.S.shape)}, it must be {expected}")


def each_document(
    attend_one: Callable[..., Tensor],
    cu_seqlens: Tensor | None,
    tensors: dict[str, Tensor | None],
    summaries: dict[str, Tensor | None] | None = None,
    block_size: int = 1,
    number: int = 0,
) -> Tensor:
    """attend_one(**tensors, **summaries), where documents are packed one document at a time: o [1, T, H, Dv].

    cu_seqlens [N + 1], int: document n is tokens cu_seqlens[n] … cu_seqlens[n + 1], and begins its blocks anew.
    summaries: `number` rows of each whole block of `block_size` tokens, document after document.
    """
    summaries = summaries or {}
    if cu_seqlens is None:
        return attend_one(**tensors, **summaries)
    check_packed(cu_seqlens, *next(iter(tensors.values())).shape[:2])
    ends = cu_seqlens.tolist()
    blocks = [0, *accumulate((stop - start) // block_size for start, stop in pairwise(ends))]
    outputs = []
    for (start, stop), (first, last) in zip(pairwise(ends), pairwise(blocks), strict=True):
        if start < stop:
            document = {name: x if x is None else x[:, start:stop] for name, x in tensors.items()}
            for name, x in summaries.items():
                document[name] = x if x is None else x[:, first * number : last * number]
            outputs.append(attend_one(**document))
    return torch.cat(outputs, dim=1)
