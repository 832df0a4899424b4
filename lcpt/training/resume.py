"""Continue a run from its newest whole checkpoint: on any number of ranks, at any ZeRO stage, with the same batches."""

from __future__ import annotations

import os
from pathlib import Path

from lcpt.checkpoint import TensorReader, newest_checkpoint, read_manifest, read_state
from lcpt.model.conversion import fit, open_source
from lcpt.parallel import groups
from lcpt.training.telemetry import log_rank0
from lcpt.training.zero_shards import local_shards, set_adam_steps


def find_start(run: Path) -> tuple[Path | None, list[Path]]:
    """Find, on rank 0 for all ranks, (the step folder to continue from, the damaged ones that are newer).

    None at the beginning. Raises SetupError where there are checkpoints, and none is whole.
    """
    step: Path | None = None
    complaints: dict[Path, str] = {}
    with groups.raise_on_all_ranks():
        if groups.rank() == 0:
            step, complaints = newest_checkpoint(run / "checkpoints")
            if step is None and complaints:
                raise ValueError(
                    f"none of the checkpoints of {run} can be used ({'; '.join(complaints.values())}): "
                    f"restore one, or move {run} away to begin again"
                )
            if step:
                for complaint in complaints.values():
                    log_rank0(f"warning: {complaint}; going back to {step.name}")
    return groups.broadcast((step, list(complaints)))


def set_aside(damaged: list[Path]) -> None:
    """Rename step folders that a start goes back past: they must not count again later."""
    for step in damaged:
        if step.exists():
            os.replace(step, step.with_name(f"{step.name}.damaged"))


def restore(engine, step: Path) -> None:
    """Load the fp32 weights, moments and update counts of a verified step folder; each rank reads its own shards.

    The engine's model has its weights already. Every rank calls this before the first step.
    """
    reader = TensorReader(step, read_manifest(step, hashes=False))
    for name, _, start, tensors in local_shards(engine):
        for group, tensor in tensors.items():
            tensor.copy_(reader.part(group, name, start, start + len(tensor)))
    set_adam_steps(engine, read_state(step))


def restore_weights(engine, folder: Path) -> None:
    """Load the fp32 weights of training.init_from as they are: in bf16 the engine begins with rounded ones."""
    source = open_source(folder, hashes=False)
    shards = {shard.name: shard for shard in local_shards(engine)}
    names = [name for name in fit(source, engine.module.config).taken if name in shards]
    for name, tensor in source.read(names):
        weights = shards[name].tensors["weights"]
        weights.copy_(tensor.flatten()[shards[name].start :][: len(weights)])
