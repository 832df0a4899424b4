"""Load named tensors into a model, with one clear error where they belong to another model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcpt.checkpoint import CheckpointError, open_checkpoint, read_tensors
from lcpt.model.gpt import GPT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # that weights are stored in


def stored_state(model: GPT, dtype: str) -> dict[str, Tensor]:
    """Return a model's state by name as an export stores it: fp32 or bf16; whole numbers, such as seeds, stay.

    Raises ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; it is {' or '.join(DTYPES)}")
    return {name: x.to(DTYPES[dtype]) if x.is_floating_point() else x for name, x in model.state_dict().items()}


def load_weights(model: GPT, source: str | Path, *, verified: bool = False) -> Path:
    """Load a run or step folder into `model`; returns the step folder. CheckpointError if it holds another model, or
    is damaged; `verified`: its hashes have been checked a moment ago."""
    step, manifest = open_checkpoint(source, hashes=not verified)
    load_tensors(model, read_tensors(step, manifest), step)
    return step


def load_tensors(model: GPT, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load the tensors of `source`, or raise CheckpointError naming one that is missing, extra or of another shape."""
    there, wanted = ({name: list(x.shape) for name, x in of.items()} for of in (tensors, model.state_dict()))
    check_tensors(there, wanted, source)
    with torch.no_grad():
        model.load_state_dict(tensors)


def check_tensors(there: Mapping[str, list[int]], wanted: Mapping[str, list[int]], source: Path) -> None:
    """Raise CheckpointError unless the shapes in `source` are those that a model wants."""
    for name in sorted(there.keys() | wanted.keys()):
        if (found := there.get(name, "absent")) != (here := wanted.get(name, "absent")):
            raise CheckpointError(
                f"{source} holds another model: {name} is {found} there and {here} in the config; "
                "take the config that it was trained with"
            )
