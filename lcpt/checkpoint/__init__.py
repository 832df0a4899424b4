"""Checkpoints of named tensors: world-independent, verified, without pickle."""

from lcpt.checkpoint.files import CheckpointError
from lcpt.checkpoint.read import find_checkpoint, newest_checkpoint, read_manifest, read_state, read_tensors
from lcpt.checkpoint.write import CheckpointConfig, step_name, write_checkpoint

__all__ = [
    "CheckpointConfig", "CheckpointError", "find_checkpoint", "newest_checkpoint", "read_manifest", "read_state",
    "read_tensors", "step_name", "write_checkpoint",
]
