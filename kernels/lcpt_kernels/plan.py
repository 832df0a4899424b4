"""Say what block-causal attention computes, and which tokens each of its blocks reads."""

from __future__ import annotations

from dataclasses import dataclass

from lcpt_kernels.local_weights import Exponential, Linear, Power, Quadratic
from lcpt_kernels.symmetric_features import Explicit, QuadraticFeatures


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of block-causal attention.

    The methods of `local` take a tile of scores s [.., rows, keys], the number `diagonal` of keys that the first row
    sees before itself, and the log of the decay:
        weights returns the weights, 0 for future keys, and m_i [.., rows, 1] where they are over e^{m_i}, else None;
        weights_and_slopes returns the weights again, over e^{m_i}, and their derivatives by s.
    """

    local: Power | Quadratic | Linear | Exponential
    features: QuadraticFeatures | Explicit | None  # None: there is no state
    scale: float
    offset: float
    block_size: int
    local_blocks: int
    summaries: int | None = None  # summaries of a block in the state; None: its tokens are in the state


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The tokens of one block, as slices of the keys. The first keys may be older than the first query."""

    whole: slice
    rows: slice  # the block's queries; empty where a state is carried to the start of an empty block
    local: slice  # the local keys of these queries
    leaving: (
        slice | None
    )  # rows of StateInput that enter the state at the start of this block, of the block that leaves
    fading: (
        slice | None
    )  # tokens whose gate sums these rows decay from: the same tokens, for summaries their block's last

    @property
    def diagonal(self) -> int:
        """Return how many local keys the first row sees before itself."""
        return self.rows.start - self.local.start

    @property
    def before(self) -> slice:
        """Return the last token before the block, if there is one."""
        return slice(max(0, self.whole.start - 1), self.whole.start)

    @classmethod
    def all(cls, plan: Plan, past: int, keys: int, to_the_end: bool) -> list[Block]:
        """Return the blocks of the queries past … keys; with to_the_end, up to the next token's block."""
        c = plan.block_size
        last = keys // c if to_the_end else (keys - 1) // c
        return [cls._at(plan, t, past, keys) for t in range(past // c * c, last * c + 1, c)]

    @classmethod
    def _at(cls, plan: Plan, t: int, past: int, keys: int) -> Block:
        c, reach = plan.block_size, plan.block_size * plan.local_blocks
        leaving = fading = None
        if t >= reach and plan.features:
            r, first = plan.summaries or c, t - reach
            leaving = slice(first // c * r, first // c * r + r)
            fading = slice(first + c - 1, first + c) if plan.summaries else leaving
        end = min(t + c, keys)
        return cls(
            whole=slice(t, end),
            rows=slice(max(t, past), end),
            local=slice(max(0, t + c - reach), end),
            leaving=leaving,
            fading=fading,
        )
