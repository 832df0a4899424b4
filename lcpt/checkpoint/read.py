"""Find, verify and read a checkpoint, on any number of processes, without DeepSpeed and without unpickling."""

from __future__ import annotations

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lcpt.checkpoint.errors import CheckpointError
from lcpt.checkpoint.write import SCHEMA_VERSION, step_folders
from lcpt.utils.file_names import is_inside
from lcpt.utils.hashing import file_sha256, self_sha256


class SchemaError(CheckpointError):
    """Names a checkpoint of another version of the format."""


def find_checkpoint(path: str | Path) -> Path:
    """Find the newest step folder of a run that has all its files; a step folder is returned itself."""
    return open_checkpoint(path, hashes=False)[0]


def open_checkpoint(path: str | Path, *, hashes: bool = True) -> tuple[Path, dict]:
    """Find the newest whole step folder of a run folder, or the step folder itself; returns (folder, its manifest).

    Says on stderr which newer ones it passes over, as training does that goes on. Raises CheckpointError where nothing
    is whole; a step folder that is named itself is not replaced by another.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path, read_manifest(path, hashes=hashes)
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not (step_folders(checkpoints) or (checkpoints / "latest").is_file()):
        raise CheckpointError(
            f"{path} is no run folder (checkpoints/latest) and no step folder (manifest.json); name one, or an export"
        )
    step, complaints = newest_checkpoint(checkpoints, hashes=hashes)
    if step is None:
        raise CheckpointError(f"no checkpoint of {path} is whole: {'; '.join(complaints.values())}")
    for complaint in complaints.values():
        print(f"warning: {complaint}; taking {step.name}", file=sys.stderr)
    return step, read_manifest(step, hashes=False)


def newest_checkpoint(checkpoints: Path, *, hashes: bool = True) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest whole step folder, None if there is none, and what is wrong with each newer one.

    Raises CheckpointError for one of another schema: it is not damaged, but this lcpt cannot tell what it is worth.
    """
    complaints = _missing_latest(checkpoints)
    for step in reversed(step_folders(checkpoints).values()):
        try:
            read_manifest(step, hashes=hashes)
            return step, complaints
        except SchemaError:
            raise
        except (CheckpointError, OSError) as error:  # OSError: a disk that cannot read it
            complaints[step] = f"{step}: {error}" if isinstance(error, OSError) else str(error)
    return None, complaints


def _missing_latest(checkpoints: Path) -> dict[Path, str]:
    """Return a complaint if `latest` names a step that is gone."""
    latest = checkpoints / "latest"
    if not latest.is_file():
        return {}
    name = latest.read_text(errors="replace").strip()
    if name in (step.name for step in step_folders(checkpoints).values()):
        return {}
    return {checkpoints / (name or "latest"): f"{latest} names {name!r}, and no such step is there"}


def read_manifest(step: Path, *, hashes: bool = True) -> dict:
    """Read the manifest after checking it and every file that it lists. CheckpointError names the damaged file."""
    path = step / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}); use another checkpoint") from error
    if not isinstance(manifest, dict) or "tensors" not in manifest:
        raise CheckpointError(f"{step} is no checkpoint: its manifest.json lists no tensors")
    if manifest.get("sha256") != self_sha256(manifest):
        raise CheckpointError(f"{path} does not match its own hash: it was damaged or edited; use another checkpoint")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise SchemaError(
            f"{path} is of schema {manifest['schema_version']}, this lcpt reads {SCHEMA_VERSION}; "
            "take the lcpt that wrote it"
        )
    pieces = (p for group in manifest["tensors"].values() for tensor in group.values() for p in tensor["slices"])
    if outside := {*manifest["files"], *(piece["file"] for piece in pieces)} - set(
        filter(is_inside, manifest["files"])
    ):
        raise CheckpointError(f"{path} lists {min(outside)!r}, which is no file of its folder; use another checkpoint")
    for name, expected in manifest["files"].items():
        file = step / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; use another checkpoint")
        if file.stat().st_size != expected["size_bytes"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes instead of {expected['size_bytes']}; use another checkpoint"
            )
    if hashes:
        with ThreadPoolExecutor() as threads:
            found = threads.map(lambda name: file_sha256(step / name), manifest["files"])
            for (name, expected), sha256 in zip(manifest["files"].items(), found, strict=True):
                if sha256 != expected["sha256"]:
                    raise CheckpointError(
                        f"{step / name} does not match its sha256 in the manifest; use another checkpoint"
                    )
    return manifest


class TensorReader:
    """Reads the tensors of a verified step folder, whole or in part, whichever rank wrote which slice."""

    def __init__(self, step: Path, manifest: dict):
        self._step, self._tensors = step, manifest["tensors"]
        self._files: dict[Path, safe_open] = {}

    def names(self, group: str) -> list[str]:
        return list(self._tensors[group])

    def whole(self, group: str, name: str) -> torch.Tensor:
        """Read a tensor, fp32 in its own shape."""
        shape = self._tensors[group][name]["shape"]
        return self.part(group, name, 0, math.prod(shape)).view(shape)

    def part(self, group: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Read elements start … stop of the flattened tensor, fp32 [stop - start]."""
        flat, filled = torch.empty(stop - start, dtype=torch.float32), start
        for piece in sorted(self._tensors[group][name]["slices"], key=lambda piece: piece["start"]):
            low, high = max(start, piece["start"]), min(stop, piece["stop"])
            if low >= high:
                continue
            if low != filled:
                break
            flat[low - start : high - start] = self._read(piece, name, low, high)
            filled = high
        if filled != stop:
            raise CheckpointError(
                f"{self._step} holds {filled - start} of the {stop - start} numbers from {start} on "
                f"of {group} {name}; use another checkpoint"
            )
        return flat

    def _read(self, piece: dict, name: str, low: int, high: int) -> torch.Tensor:
        file = self._step / piece["file"]
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt")
            return self._files[file].get_slice(name)[low - piece["start"] : high - piece["start"]]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read for {name}: {error}") from error


def read_tensors(step: Path, manifest: dict, group: str = "weights") -> dict[str, torch.Tensor]:
    """Read all tensors of a group, name -> whole fp32 tensor."""
    reader = TensorReader(step, manifest)
    return {name: reader.whole(group, name) for name in reader.names(group)}


def read_state(step: Path) -> dict:
    """Read the scalars of a step folder, and its position in the data."""
    return json.loads((step / "state.json").read_text())
