"""Estimate what a run would cost, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lcpt.model.cost import memory_per_rank, model_cost

if TYPE_CHECKING:
    from lcpt.config import Config


def describe(config: Config, world: int, gpu: str | None = None) -> str:
    """Format a table: parameters, FLOPs of the algorithm that really runs, estimated memory of one of `world` ranks."""
    model, training, context = config.model, config.training, config.data.context
    cost = model_cost(model, context)
    memory = memory_per_rank(
        model,
        cost.parameters,
        tokens=training.micro_batch * context,
        world=world,
        zero_stage=config.parallel.zero_stage,
        precision=training.precision,
    )
    host = {"copies to save from": 12 * cost.parameters / world}
    if config.parallel.offload_optimizer:
        host["optimizer"] = memory.pop("optimizer")
    tokens = training.last_step * training.global_batch_tokens
    rows = {
        "layers": ", ".join(f"{model.kinds.count(kind)} {kind}" for kind in sorted(set(model.kinds))),
        "parameters": f"{cost.parameters:,}",
        "FLOPs a token": f"{cost.flops_forward / 1e6:,.1f} M forward, {cost.flops_step / 1e6:,.1f} M a training step",
        "FLOPs of the run": f"{cost.flops_step * tokens:.3g} for {tokens:,} tokens in {training.last_step:,} steps",
        "decoding state": f"{cost.state_bytes / 2**20:,.1f} MiB a sequence of {context:,} tokens",
        f"memory a rank of {world}": _gibibytes(memory),
        "  of its host": _gibibytes(host),
    }
    return "\n".join(f"{name:20s}{value}" for name, value in rows.items()) + "\n"


def _gibibytes(parts: dict[str, float]) -> str:
    named = ", ".join(f"{part} {n_bytes / 2**30:,.2f}" for part, n_bytes in parts.items())
    return f"{sum(parts.values()) / 2**30:,.2f} GiB, estimated: {named}"
