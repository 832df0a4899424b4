"""Continue a run from its newest whole checkpoint: on any number of ranks, at any ZeRO stage, with the same batches."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from lcpt.checkpoint import TensorReader, newest_checkpoint, read_manifest, read_state
from lcpt.data import SampleSource
from lcpt.model.config_version import VERSION, upgrade_saved
from lcpt.parallel import groups
from lcpt.training.telemetry import log_rank0
from lcpt.training.zero_shards import local_shards

if TYPE_CHECKING:
    from lcpt.config import Config

CHANGEABLE = ("model.activation_checkpointing",)  # what a model computes does not depend on it


def find_start(run: Path) -> Path | None:
    """Find, on rank 0 for all ranks, the step folder to continue from; None at the beginning."""
    step = None
    with groups.raise_on_all_ranks():
        if groups.rank() == 0:
            step, complaints = newest_checkpoint(run / "checkpoints")
            for damaged, complaint in complaints.items():
                if step is None:
                    raise ValueError(
                        f"none of the checkpoints of {run} can be used ({'; '.join(complaints.values())}): "
                        f"restore one, or move {run} away to begin again"
                    )
                log_rank0(f"warning: {complaint}; going back to {step.name}")
                os.replace(damaged, damaged.with_name(f"{damaged.name}.damaged"))  # it must not count again later
    return groups.broadcast(step)


def check_same_run(step: Path, config: Config, source: SampleSource) -> None:
    """Raise ValueError if the run was begun with another model, data, batches or seed."""
    saved = OmegaConf.load(step / "config.yaml").model
    model = OmegaConf.merge(OmegaConf.structured(type(config.model)), upgrade_saved(saved))
    then = read_state(step) | flatten(cast(dict, OmegaConf.to_container(model)), "model")
    for name, now in (data_position(config, source) | flatten(asdict(config.model), "model")).items():
        if then.get(name) != now and name not in CHANGEABLE:
            version = saved.get("version", 1)
            remedy = f"model.version={version} gives the defaults of that day; else " if version < VERSION else ""
            raise ValueError(
                f"{step.parents[1]} was begun with {name} {then.get(name)}, this is {now}; {remedy}name another run.dir"
            )


def flatten(section: dict, name: str) -> dict:
    """Flatten nested keys: {"a": {"b": 1}} -> {"name.a.b": 1}"""
    items: dict[str, Any] = {}
    for key, value in section.items():
        items |= flatten(value, f"{name}.{key}") if isinstance(value, dict) else {f"{name}.{key}": value}
    return items


def data_position(config: Config, source: SampleSource) -> dict:
    """Collect what, beside the step, decides the next batch."""
    return {
        "run.seed": config.run.seed,
        "data.context": config.data.context,
        "training.global_batch_tokens": config.training.global_batch_tokens,
        "data fingerprint": source.fingerprint,
    }


def restore(engine, step: Path) -> None:
    """Load the fp32 weights, moments and update count of a verified step folder; each rank reads its own shards.

    The engine's model has its weights already. Every rank calls this before the first step.
    """
    reader = TensorReader(step, read_manifest(step, hashes=False))
    for name, _, start, tensors in local_shards(engine):
        for group, tensor in tensors.items():
            tensor.copy_(reader.part(group, name, start, start + len(tensor)))
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(read_state(step)["adam_step"])
