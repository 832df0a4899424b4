"""Count what ranks send each other in one step, by the stage of ZeRO."""

from __future__ import annotations

from typing import NamedTuple


class Communication(NamedTuple):
    """Holds the bytes of a step that pass through collectives of all ranks, as each rank sees them."""

    gathered: float  # weights, in the model's precision
    reduced: float  # gradients, in fp32


def communication_per_step(
    parameters: int, *, world: int, zero_stage: int, precision: str, micro_batches: int
) -> Communication:
    """Count the bytes of one step of `micro_batches` micro-batches a rank.

    Stage 0 reduces the sum of a step's gradients; 1 too, and then gathers the weights that each rank updated. Stage 2
    reduces in every micro-batch, since no rank holds the sum. Stage 3 does too, and gathers the weights in every
    micro-batch at most twice, for forward and for backward: DeepSpeed leaves some gathered between them.
    """
    if world == 1:
        return Communication(0.0, 0.0)
    weights = parameters * (2 if precision == "bf16" else 4)
    gatherings = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[zero_stage]
    reductions = micro_batches if zero_stage >= 2 else 1
    return Communication(float(gatherings * weights), 4.0 * parameters * reductions)
