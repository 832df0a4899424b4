"""Named tensors into a model, with one clear line where they are another model's."""

from __future__ import annotations

from pathlib import Path

import torch

from lcpt.checkpoint import CheckpointError, find_checkpoint, read_manifest, read_tensors
from lcpt.model.gpt import GPT


def load_weights(model: GPT, source: str | Path, *, verified: bool = False) -> Path:
    """Fill `model` from a run or step folder; returns the step folder. CheckpointError if it holds another model, or is
    damaged; `verified`: its hashes have been checked a moment ago."""
    step = find_checkpoint(source)
    tensors, wanted = read_tensors(step, read_manifest(step, hashes=not verified)), model.state_dict()
    for name in sorted(tensors.keys() | wanted.keys()):
        there, here = (list(x[name].shape) if name in x else "absent" for x in (tensors, wanted))
        if there != here:
            raise CheckpointError(f"{step} holds another model: {name} is {there} there and {here} in this config")
    with torch.no_grad():
        model.load_state_dict(tensors)
    return step
