"""Continue a run from its newest whole checkpoint: on any number of ranks, at any ZeRO stage, with the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lcpt.checkpoint import TensorReader, newest_checkpoint, read_manifest, read_state
from lcpt.data import Corpus
from lcpt.parallel import groups
from lcpt.training.fragments import held
from lcpt.training.telemetry import say

if TYPE_CHECKING:
    from lcpt.config import Config


def find_start(run: Path) -> Path | None:
    """The step folder to continue from, None at the beginning; rank 0 looks, and all ranks hear of it."""
    step = None
    with groups.agreed():
        if groups.rank() == 0:
            step, complaints = newest_checkpoint(run / "checkpoints")
            for complaint in complaints:
                say(f"warning: {complaint}; going back to {step.name if step else 'the beginning'}")
    return groups.share(step)


def check_same_batches(step: Path, config: Config, corpus: Corpus) -> None:
    """ValueError if the run was begun with other data, batches or seed."""
    then = read_state(step)
    for name, now in data_position(config, corpus).items():
        if then[name] != now:
            raise ValueError(f"{step.parents[1]} was begun with {name} {then[name]}, this is {now}; "
                             "name another run.dir")


def data_position(config: Config, corpus: Corpus) -> dict:
    """What, beside the step, decides the next batch."""
    return {
        "run.seed": config.run.seed,
        "data.context": config.data.context,
        "training.global_batch_tokens": config.training.global_batch_tokens,
        "data fingerprint": corpus.fingerprint,
    }


def restore(engine, step: Path) -> None:
    """The fp32 weights, moments and update count of a verified step folder, into an engine whose model has its weights
    already: each rank reads what it holds. Every rank calls it before the first step."""
    reader = TensorReader(step, read_manifest(step, hashes=False))
    for name, _, start, tensors in held(engine):
        for group, tensor in tensors.items():
            tensor.copy_(reader.part(group, name, start, start + len(tensor)))
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(read_state(step)["adam_step"])
