"""Write safetensors files with the errors and the permissions of any other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file. OSError names the file."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:  # it hides the system's errors, such as a full disk
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)  # save_file makes files that only their owner can read
