"""Checkpoints of named tensors: world-independent, verified, without pickle."""

from lcpt.checkpoint.errors import CheckpointError
from lcpt.checkpoint.read import (
    TensorReader,
    find_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    read_manifest,
    read_state,
    read_tensors,
)
from lcpt.checkpoint.retention import remove_old
from lcpt.checkpoint.write import CheckpointConfig, Slice, commit_checkpoint, open_partial, step_name, write_piece

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Slice",
    "TensorReader",
    "find_checkpoint",
    "newest_checkpoint",
    "open_checkpoint",
    "open_partial",
    "read_manifest",
    "read_state",
    "read_tensors",
    "remove_old",
    "commit_checkpoint",
    "step_name",
    "write_piece",
]
