"""Find, verify and read a checkpoint, on any number of processes, without DeepSpeed and without unpickling."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lcpt.checkpoint.files import CheckpointError, self_hash, sha256_of
from lcpt.checkpoint.write import SCHEMA_VERSION


def find_checkpoint(path: str | Path) -> Path:
    """The step folder that a run folder's `latest` names, or the step folder itself."""
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    for latest in (path / "checkpoints" / "latest", path / "latest"):
        if latest.is_file():
            step = latest.parent / latest.read_text().strip()
            if (step / "manifest.json").is_file():
                return step
            raise CheckpointError(f"{latest} names {step.name}, which holds no manifest.json; name another step folder")
    raise CheckpointError(f"{path} is no run folder (checkpoints/latest) and no step folder (manifest.json)")


def newest_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole step folder, None if there is none, and what is wrong with each newer one."""
    complaints = []
    for step in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            read_manifest(step)
            return step, complaints
        except CheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def read_manifest(step: Path, *, hashes: bool = True) -> dict:
    """The manifest, after checking it and every file that it lists. Raises CheckpointError naming the damaged file."""
    path = step / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}); use another checkpoint") from error
    if not isinstance(manifest, dict) or "tensors" not in manifest:
        raise CheckpointError(f"{step} is no checkpoint: its manifest.json lists no tensors")
    if manifest.get("sha256") != self_hash(manifest):
        raise CheckpointError(f"{path} does not match its own hash: it was damaged or edited; use another checkpoint")
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise CheckpointError(f"{path} is of schema {manifest['schema_version']}, this lcpt reads {SCHEMA_VERSION}")
    for name, expected in manifest["files"].items():
        file = step / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; use another checkpoint")
        if file.stat().st_size != expected["size_bytes"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {expected['size_bytes']}; "
                                  "use another checkpoint")
        if hashes and sha256_of(file) != expected["sha256"]:
            raise CheckpointError(f"{file} does not match its sha256 in the manifest; use another checkpoint")
    return manifest


def read_tensors(step: Path, manifest: dict, group: str = "weights") -> dict[str, torch.Tensor]:
    """name -> whole fp32 tensor, put together from its slices."""
    tensors = {}
    for name, entry in manifest["tensors"][group].items():
        whole = torch.empty(entry["shape"], dtype=torch.float32)
        flat, filled = whole.view(-1), 0
        for piece in sorted(entry["slices"], key=lambda piece: piece["start"]):
            if piece["start"] != filled:
                break
            flat[piece["start"] : piece["stop"]] = _read_slice(step / piece["file"], name)
            filled = piece["stop"]
        if filled != flat.numel():
            raise CheckpointError(f"{step} holds {filled} of the {flat.numel()} numbers of {group} {name}")
        tensors[name] = whole
    return tensors


def read_state(step: Path) -> dict:
    return json.loads((step / "state.json").read_text())


def _read_slice(file: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read for {name}: {error}") from error
