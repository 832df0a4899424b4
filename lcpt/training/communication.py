"""Count what ranks send each other in one step, by the stage of ZeRO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lcpt.training.engine import ParallelConfig

PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay gathered at stage 3
REUSE_DISTANCE = 1_000_000_000  # its stage3_max_reuse_distance: weights that are needed again sooner stay gathered too


class Communication(NamedTuple):
    """Holds the bytes of a step that pass through collectives of all ranks, as each rank sees them."""

    gathered: float  # weights, in the model's precision
    reduced: float  # gradients, in fp32
    reduction: str = "all-reduce"  # or reduce-scatter

    def on_wire(self, world: int) -> float:
        """Count the bytes that a rank sends, and receives: by rings, an all-reduce as a reduce-scatter and a gather."""
        passes = self.gathered + self.reduced * (2 if self.reduction == "all-reduce" else 1)
        return passes * (world - 1) / world


def communication_per_step(
    modules: Mapping[str, Sequence[int]],
    parallel: ParallelConfig,
    *,
    world: int,
    precision: str,
    micro_batches: int,
) -> Communication:
    """Count the bytes of one step of `micro_batches` micro-batches a rank; `modules` is that of model.cost.Cost.

    Stage 0 reduces the sum of a step's gradients; 1 too, and then gathers the weights that each rank updated. Stage 2
    reduces in every micro-batch, since no rank holds the sum. So does stage 3, and gathers small parameters once a
    step, others in every micro-batch: once, or again for the backward pass of a block that more than REUSE_DISTANCE of
    parameters follow. A first step gathers more. Up to stage 2 DeepSpeed's padding is left out, at most 2 · world
    elements for each group of the optimizer.
    """
    if world == 1:
        return Communication(0.0, 0.0)
    width, stage = 2 if precision == "bf16" else 4, parallel.zero_stage
    parameters = later = sum(map(sum, modules.values()))
    if stage == 3:
        zero = parallel.deepspeed.get("zero_optimization", {})
        kept_below = float(zero.get("stage3_param_persistence_threshold", PERSISTENT))
        reuse = float(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE))
        gathered = 0
        for name, sizes in modules.items():
            later -= sum(sizes)
            again = name.startswith("blocks") and later >= reuse
            for size in sizes:
                times = 1 if size <= kept_below else micro_batches * (1 + again)
                gathered += times * _padded(size, world)
        reduced = micro_batches * sum(_padded(size, world) for sizes in modules.values() for size in sizes)
        return Communication(float(width * gathered), 4.0 * reduced, "reduce-scatter")
    return Communication(
        float(width * parameters if stage else 0), 4.0 * parameters * (micro_batches if stage == 2 else 1)
    )


def _padded(size: int, world: int) -> int:
    return -(-size // world) * world
