"""Estimate what a run would cost, without running it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lcpt.model.cost import Cost, activation_elements, elements_on_host, model_cost
from lcpt.model.sequence_cost import exchange, layers_by_kind
from lcpt.training.communication import communication_per_step
from lcpt.training.fitting import HEADROOM, fitting_settings, memory_on_gpu
from lcpt.training.parameter_groups import describe_groups
from lcpt.training.phases import Phase, divide
from lcpt.training.slices import check_slices, data_ranks, slices_of
from lcpt.utils.gpus import gpu_bytes

if TYPE_CHECKING:
    from lcpt.config import Config


def describe(config: Config, world: int, gpu: str | None = None) -> str:
    """Format a table for each phase of a run: parameters, FLOPs of the algorithm that really runs, estimated memory of
    one of `world` ranks, what they send each other; for a GPU of lcpt.utils.gpus, which settings fit it. ValueError for
    an unknown GPU, and where ranks cannot share sequences as parallel.sequence says."""
    return "\n".join(_describe(phase, config.training.last_step, world, gpu) for phase in divide(config))


def _describe(phase: Phase, end: int, world: int, gpu: str | None) -> str:
    config, steps = phase.config, max(0, min(end, phase.last_step) - phase.first_step + 1)
    model, training, context = config.model, config.training, config.data.context
    check_slices(config, world)
    cost = model_cost(model, context)
    saved = activation_elements(model)
    memory = memory_on_gpu(config, world, cost.parameters, saved, training.micro_batch)
    host = {"copies to save from": 12 * cost.parameters / world}
    if config.parallel.offload_optimizer:
        host["optimizer"] = 12 * cost.parameters / world
    if kept_there := elements_on_host(model):
        width = 2 if training.precision == "bf16" else 4
        host["activations"] = width * kept_there * training.micro_batch * context / config.parallel.sequence
    tokens = steps * training.global_batch_tokens
    rows, whole = ({"phase": _shown(phase)}, "phase") if phase.number else ({}, "run")
    rows |= {
        "layers": ", ".join(f"{model.kinds.count(kind)} {kind}" for kind in sorted(set(model.kinds))),
        "parameters": f"{cost.parameters:,}",
        **({"  groups of them": describe_groups(rules, model)} if (rules := training.parameter_groups) else {}),
        "FLOPs a token": f"{cost.flops_forward / 1e6:,.1f} M forward, {cost.flops_step / 1e6:,.1f} M a training step",
        f"FLOPs of the {whole}": f"{cost.flops_step * tokens:.3g} for {tokens:,} tokens in {steps:,} steps",
        "decoding state": f"{cost.state_bytes / 2**20:,.1f} MiB a sequence of {context:,} tokens",
        "communication": _communication(config, cost, world),
        **({"a sequence": _shared(config, world, saved.at_times > 0)} if config.parallel.sequence > 1 else {}),
        f"memory a rank of {world}": _gibibytes(memory),
        "  of its host": _gibibytes(host),
    }
    if gpu is not None:
        rows |= _on_gpu(config, world, gpu, sum(memory.values()))
    return "\n".join(f"{name:20s}{value}" for name, value in rows.items()) + "\n"


def _shown(phase: Phase) -> str:
    data, training = phase.config.data, phase.config.training
    last = phase.tokens_after(phase.last_step)
    return (
        f"{phase.number}, steps {phase.first_step:,} to {phase.last_step:,}, up to {last:,} tokens: {data.origin}, "
        f"data.context {data.context:,}, {training.global_batch_tokens:,} tokens a step"
        f"{', a schedule of its own' if phase.has_schedule else ''}"
    )


def _communication(config: Config, cost: Cost, world: int) -> str:
    micro_batches = _micro_batches(config, world)
    stage = config.parallel.zero_stage
    sent = communication_per_step(
        cost.modules,
        config.parallel,
        world=world,
        precision=config.training.precision,
        micro_batches=micro_batches,
    )
    if not sent.reduced:
        return "none on one rank"
    how_often = f"in each of {micro_batches} micro-batches" if stage >= 2 else "once"
    return (
        f"{sent.gathered / 2**30:,.2f} GiB all-gathered, {sent.reduced / 2**30:,.2f} GiB reduced a step "
        f"({sent.reduction}): stage {stage} reduces {how_often}"
    )


def _shared(config: Config, world: int, recomputed: bool) -> str:
    exchanged = exchange(layers_by_kind(config.model), slices_of(config, config.training.micro_batch))
    n_bytes, ranks = exchanged.per_step(_micro_batches(config, world), recomputed), config.parallel.sequence
    return (
        f"on {ranks} ranks, {config.data.context // ranks:,} tokens on each, which sends the others "
        f"{n_bytes / 2**20:,.1f} MiB a step"
    )


def _micro_batches(config: Config, world: int) -> int:
    return math.ceil(config.sequences / (data_ranks(config, world) * config.training.micro_batch))


def _on_gpu(config: Config, world: int, gpu: str, needed: float) -> dict[str, str]:
    size = gpu_bytes(gpu)
    verdict = "fits" if needed <= (1 - HEADROOM) * size else f"does not fit with {HEADROOM:.0%} left free"
    settings = fitting_settings(config, world, size)
    advice = "; ".join(map(str, settings)) or (
        "none: more ranks, a higher parallel.zero_stage or parallel.sequence, a shorter data.context"
    )
    return {
        f"on {gpu}": f"{needed / 2**30:,.1f} of {size / 2**30:,.1f} GiB: {verdict}",
        "  fits with": advice,
    }


def _gibibytes(parts: dict[str, float]) -> str:
    named = ", ".join(f"{part} {n_bytes / 2**30:,.2f}" for part, n_bytes in parts.items())
    return f"{sum(parts.values()) / 2**30:,.2f} GiB, estimated: {named}"
