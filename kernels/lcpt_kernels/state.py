"""What a sequence leaves for those that go on from it, and how a backend computes with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lcpt_kernels.arguments import require
from lcpt_kernels.plan import Plan
from lcpt_kernels.room import Room

OF_SUMMARIES = ("b", "far_v", "mass")  # keys whose rows are summaries of blocks, where there are any


class State(NamedTuple):
    """The state after a sequence, from which a later call continues it. Its size does not grow with the sequence."""

    S: Tensor  # Σ φ(b_s) [v_s, 1]ᵀ of the blocks that are no longer local, [B, Hkv, F, Dv + 1], fp32
    tail: dict[str, Tensor]  # keys, values and gates of the local blocks, [B, < ℓc, Hkv, ·] each, by name
    room: Room | None = None  # where the next token may be appended to the tail


class Compute(Protocol):
    """A backend: attention at once, or in two passes between which ranks exchange states.

    `keys` include those of the tail, the first ones; `initial` is S [B, Hkv, F, Dv + 1] before them, None: 0.
    """

    def attention(
        self,
        plan: Plan,
        q: Tensor,
        a: Tensor,
        keys: dict[str, Tensor],
        initial: Tensor | None,
        final: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return o and, with `final`, S after the keys. cu_seqlens: packed documents, without `initial` or `final`."""

    def decode(self, plan: Plan, q: Tensor, a: Tensor, keys: dict[str, Tensor], S: Tensor) -> Tensor:
        """Return o of one token, the last of `keys`, which are all those of its local blocks; S is before them."""

    def state_pass(self, plan: Plan, keys: dict[str, Tensor], past: int) -> tuple[Sequence[Tensor], Tensor]:
        """Return what blocks add to the state, for `output_pass`, and S after the keys, of which the first `past` have
        no queries. Nothing is before them."""

    def output_pass(
        self,
        plan: Plan,
        q: Tensor,
        a: Tensor,
        keys: dict[str, Tensor],
        initial: Tensor | None,
        added: Sequence[Tensor],
    ) -> Tensor:
        """Return o, from what `state_pass` returned for the same keys."""


def check_state(state: State, plan: Plan, keys: Mapping[str, Tensor]) -> None:
    """Raise ValueError if `state` is not one of a sequence like that of `keys`."""
    assert plan.features is not None
    require(
        state.tail.keys() == keys.keys(),
        f"initial_state is of a sequence with {', '.join(sorted(state.tail))}; this one has {', '.join(sorted(keys))}",
    )
    tail, reach = state.tail["v"].shape[1], plan.block_size * plan.local_blocks
    require(tail < reach, f"initial_state has a tail of {tail} tokens, block_size · local_blocks is only {reach}")
    expected = keys["v"].shape[0], keys["v"].shape[2], plan.features.dimension, keys["v"].shape[3] + 1
    require(tuple(state.S.shape) == expected, f"initial_state.S is {tuple(state.S.shape)}, it must be {expected}")


def tail_after(plan: Plan, keys: Mapping[str, Tensor], first: int) -> dict[str, Tensor]:
    """Return those keys that are not in S after the last one; the first one is token `first` of its sequence."""
    rows = tail_rows(keys, first + keys["v"].shape[1], plan.block_size, plan.local_blocks, plan.summaries)
    # Copies: views would keep all of the sequence in memory.
    return {name: x[:, x.shape[1] - rows[name] :].clone() for name, x in keys.items()}


def tail_rows(
    names: Iterable[str], tokens: int, block_size: int, local_blocks: int, summaries: int | None
) -> dict[str, int]:
    """Return how many rows of the keys with these names are in the tail of a sequence of so many tokens."""
    whole = tokens // block_size
    in_state = max(0, whole - local_blocks + 1)
    of_blocks = OF_SUMMARIES if summaries else ()
    return {
        name: (whole - in_state) * (summaries or 0) if name in of_blocks else tokens - in_state * block_size
        for name in names
    }


def tail_capacity(plan: Plan, names: Iterable[str]) -> dict[str, int]:
    """Return the rows by name that no tail exceeds."""
    reach, of_blocks = plan.block_size * plan.local_blocks, of_summaries(plan)
    return {name: plan.local_blocks * (plan.summaries or 0) if name in of_blocks else reach for name in names}


def after_tail(tail: Mapping[str, Tensor], keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the keys of the tail and then those of `keys`, by name."""
    return {name: torch.cat((tail[name], x), dim=1) for name, x in keys.items()}


def of_summaries(plan: Plan) -> tuple[str, ...]:
    """Return the names of those keys whose rows are summaries of blocks."""
    return OF_SUMMARIES if plan.summaries else ()
