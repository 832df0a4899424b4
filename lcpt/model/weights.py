"""Load named tensors into a model, with one clear error where they belong to another model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcpt.checkpoint import CheckpointError, find_checkpoint, read_manifest, read_tensors
from lcpt.model.gpt import GPT


def load_weights(model: GPT, source: str | Path, *, verified: bool = False) -> Path:
    """Load a run or step folder into `model`; returns the step folder. CheckpointError if it holds another model, or
    is damaged; `verified`: its hashes have been checked a moment ago."""
    step = find_checkpoint(source)
    load_tensors(model, read_tensors(step, read_manifest(step, hashes=not verified)), step)
    return step


def load_tensors(model: GPT, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load the tensors of `source`, or raise CheckpointError naming one that is missing, extra or of another shape."""
    wanted = model.state_dict()
    for name in sorted(tensors.keys() | wanted.keys()):
        there, here = (list(x[name].shape) if name in x else "absent" for x in (tensors, wanted))
        if there != here:
            raise CheckpointError(
                f"{source} holds another model: {name} is {there} there and {here} in the config; "
                "take the config that it was trained with"
            )
    with torch.no_grad():
        model.load_state_dict(tensors)
