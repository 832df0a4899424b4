"""Sequences in pieces, one after the other or on several ranks, with the state between them; packed documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcpt_kernels.arguments import check_packed, require
from lcpt_kernels.chunked import Plan, StateInput, accumulated, accumulator, block_causal_attention
from lcpt_kernels.reference import per_query_head


class State(NamedTuple):
    """The state after a sequence, from which a later call continues it. Its size does not grow with the sequence."""

    S: Tensor  # Σ φ(b_s) [v_s, 1]ᵀ of the blocks that are no longer local, [B, Hkv, F, Dv + 1], fp32
    tail: dict[str, Tensor]  # keys, values and gates of the local blocks, [B, < ℓc, Hkv, ·] each, by name


class Exchange(Protocol):
    """Communication between ranks that share a sequence. Each rank holds at least ℓ·c consecutive tokens and the
    summaries of the blocks that end there. All ranks call both methods; the results are differentiable."""

    start: int  # the number of tokens on the ranks before

    def shift(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the rank before; on the first rank, tensors without rows, [B, 0, ...]."""

    def before(self, S: Tensor, log_decay: Tensor | None) -> Tensor:
        """Return S' at this rank's start, from S and log_decay [B, Hkv] of all ranks: S'₀ = 0 and
        S'ᵢ₊₁ = e^(log_decayᵢ) S'ᵢ + Sᵢ; log_decay None: 0."""


class Compute(Protocol):
    """A function that computes a piece of a sequence, as `in_pytorch` does."""

    def __call__(
        self, plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], initial: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return o and, with `final`, S [B, Hkv, F, Dv + 1]. The keys include those of the tail; `initial` is S before
        them."""


class PackedCompute(Compute, Protocol):
    """A Compute that also takes packed documents, as that in Triton does."""

    def __call__(
        self,
        plan: Plan,
        q: Tensor,
        a: Tensor,
        keys: dict[str, Tensor],
        initial: Tensor | None,
        final: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...


def attend(
    plan: Plan,
    q: Tensor,
    a: Tensor,
    keys: Mapping[str, Tensor | None],
    initial_state: State | None,
    output_final_state: bool,
    exchange: Exchange | None = None,
    compute: Compute | None = None,
) -> tuple[Tensor, State | None]:
    """Return o and, with output_final_state, the state after the last token.

    The tokens continue the sequence of `initial_state`, or of the ranks before in `exchange`. q is [B, T, H, D], a
    [B, T, H, r]; `keys` has "k", "b", "v" and "log_gate", each [B, T, Hkv, ·]. With plan.summaries, "b", "far_v" and
    "mass" are those of the blocks that these tokens complete, [B, N·r, Hkv, ·].
    """
    compute = compute or in_pytorch
    present = {name: x for name, x in keys.items() if x is not None}
    if exchange is not None:
        initial_state = _from_ranks_before(plan, q, a, present, exchange, compute)
    if initial_state is not None:
        check_state(initial_state, plan, present)
        present = {name: torch.cat((initial_state.tail[name], x), dim=1) for name, x in present.items()}
    o, S = compute(plan, q, a, present, None if initial_state is None else initial_state.S, output_final_state)
    return o, None if S is None else State(S, _tail(plan, present, first=0))


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
    return o, None if S is None else S[:, ::group].contiguous()


def _tail(plan: Plan, keys: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """Return those keys that are not in S after the last one; the first one is token `first` of its sequence."""
    c = plan.block_size
    blocks_in_state = max(0, (first + keys["v"].shape[1]) // c - plan.local_blocks + 1)
    start = (
        dict.fromkeys(("b", "far_v", "mass"), (blocks_in_state - first // c) * plan.summaries) if plan.summaries else {}
    )
    # Copies: views would keep all of the sequence in memory.
    return {name: x[:, start.get(name, blocks_in_state * c - first) :].clone() for name, x in keys.items()}


def _from_ranks_before(
    plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], exchange: Exchange, compute: Compute
) -> State:
    assert plan.features is not None
    c, v, reach = plan.block_size, keys["v"], plan.block_size * plan.local_blocks
    require(v.shape[1] >= reach, f"a rank holds {v.shape[1]} tokens; block_size · local_blocks = {reach} are the least")
    tail = exchange.shift(_tail(plan, keys, exchange.start))
    held = tail["v"].shape[1]
    nothing = v.new_zeros(v.shape[0], v.shape[2], plan.features.dimension, v.shape[3] + 1, dtype=accumulator(v))
    # This call is for the state of this rank's tokens; the output is computed later, with the state before them.
    _, own = attend(plan, q, a, keys, State(nothing, tail), True, compute=compute)
    assert own is not None
    log_decay = None
    if "log_gate" in keys:
        gates = torch.cat((tail["log_gate"], keys["log_gate"]), dim=1)
        log_decay = accumulated(gates[:, held // c * c : gates.shape[1] // c * c]).sum(1)
    return State(exchange.before(own.S, log_decay), tail)


def check_state(state: State, plan: Plan, keys: dict[str, Tensor]) -> None:
    assert plan.features is not None
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
    tensors: Mapping[str, Tensor | None],
    summaries: Mapping[str, Tensor | None] | None = None,
    block_size: int = 1,
    number: int = 0,
) -> Tensor:
    """Return o of attend_one(**tensors, **summaries); if documents are packed, computed for one document at a time.

    Document n has the tokens cu_seqlens[n] … cu_seqlens[n + 1], and its blocks count from its start. `summaries` have
    `number` rows for each whole block of `block_size` tokens, document after document.
    """
    summaries = summaries or {}
    if cu_seqlens is None:
        return attend_one(**tensors, **summaries)
    # A graph has no loop over lengths that are read from a tensor: it would be that of one batch.
    run = torch.compiler.disable(_one_by_one) if torch.compiler.is_compiling() else _one_by_one
    return run(attend_one, cu_seqlens, tensors, summaries, block_size, number)


def _one_by_one(
    attend_one: Callable[..., Tensor],
    cu_seqlens: Tensor,
    tensors: Mapping[str, Tensor | None],
    summaries: Mapping[str, Tensor | None],
    block_size: int,
    number: int,
) -> Tensor:
    first_tensor = next(iter(tensors.values()))
    assert first_tensor is not None
    check_packed(cu_seqlens, *first_tensor.shape[:2])
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
