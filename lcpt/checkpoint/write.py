"""Write a checkpoint: named fp32 tensors in slices with global offsets, scalars in JSON, a manifest, then `latest`.

    checkpoints/step-00000100/weights-00000.safetensors    rank 0's flat slices, keyed by parameter name
                              exp_avg-00000.safetensors    its slices of Adam's first moments
                              exp_avg_sq-00000.safetensors and of its second
                              weights-00001.safetensors …  rank 1's
                              state.json                   scalars and the position in the data
                              config.yaml, tokenizer.model what else it takes to use the weights; or tokenizer.json
                              manifest.json                shapes, slices, sizes and hashes of all of these
    checkpoints/latest                                     the name of the newest whole folder

Every rank writes its shards; a reader needs to know neither how many ranks there were nor how the state was sharded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import torch

from lcpt.utils.atomic_files import fsync_path, replace_text
from lcpt.utils.hashing import self_sha256, size_and_sha256
from lcpt.utils.tensor_files import save_tensors

SCHEMA_VERSION = 1


@dataclass
class CheckpointConfig:
    """Says when a run saves, and which checkpoints it keeps."""

    every_steps: int = 1000
    every_minutes: Optional[float] = None  # noqa: UP045  as well, by rank 0's clock
    keep_last: int = 3  # older ones are removed
    milestone_steps: Optional[int] = None  # noqa: UP045  steps that are multiples of it are saved and kept for good

    def __post_init__(self):
        for name in ("every_steps", "keep_last", "milestone_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"checkpoint.{name} is {value}; it must be ≥ 1")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes is {self.every_minutes}; it must be > 0, or null for never")

    def due(self, step: int) -> bool:
        return step % self.every_steps == 0 or (self.milestone_steps is not None and step % self.milestone_steps == 0)


class Slice(NamedTuple):
    """Elements start … start + len(data) of a flattened tensor: `data` is flat, fp32 and on the CPU."""

    name: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor


def step_name(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:08d}"


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Find the step folders, step -> folder, the oldest first; other files that lie beside them are left out."""
    found = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in checkpoints.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def open_partial(checkpoints: Path, step: int) -> Path:
    """Make a folder for all ranks to write into; one process calls this. Nothing in it counts before the commit."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    fsync_path(checkpoints.parent)
    for stale in checkpoints.glob(".step-*"):  # of processes that died
        shutil.rmtree(stale, ignore_errors=True)
    # A name of its own: a process of a job that is believed dead may still be writing into the last one.
    partial = checkpoints / f".{step_name(step)}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    return partial


def write_piece(partial: Path, rank: int, groups: Mapping[str, Sequence[Slice]]) -> dict:
    """Write a rank's slices of "weights", "exp_avg", "exp_avg_sq"; returns its piece of the manifest."""
    piece: dict[str, dict] = {"tensors": {}, "files": {}}
    for group, slices in groups.items():
        path = partial / f"{group}-{rank:05d}.safetensors"
        save_tensors(path, {part.name: part.data for part in slices})
        fsync_path(path)
        piece["files"][path.name] = size_and_sha256(path)
        piece["tensors"][group] = {
            name: {"shape": list(shape), "slices": [{"file": path.name, "start": start, "stop": start + len(data)}]}
            for name, shape, start, data in slices
        }
    return piece


def commit_checkpoint(
    partial: Path, step: int, pieces: Sequence[dict], state: dict, attachments: Mapping[str, Path]
) -> Path:
    """Rename a folder that all ranks have written to checkpoints/step-XXXXXXXX and point `latest` at it.

    pieces: what write_piece returned on each rank. state: JSON scalars. attachments: file name -> file to copy in.
    One process calls this. Until the rename nothing carries the final name.
    """
    checkpoints, final = partial.parent, partial.parent / step_name(step)
    files: dict[str, dict] = {}
    tensors: dict[str, dict] = {}
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "tensors": tensors, "files": files}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for name, source in attachments.items():
        shutil.copyfile(source, partial / name)
    for name in ("state.json", *attachments):
        fsync_path(partial / name)
        files[name] = size_and_sha256(partial / name)
    for piece in pieces:
        files |= piece["files"]
        for group, named in piece["tensors"].items():
            known = tensors.setdefault(group, {})
            for name, entry in named.items():
                known.setdefault(name, {"shape": entry["shape"], "slices": []})["slices"] += entry["slices"]
    manifest["sha256"] = self_sha256(manifest)
    replace_text(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    if final.exists():  # the same step once more: the old folder goes only when the new one is in its place
        os.replace(final, checkpoints / f".{final.name}.replaced")
    os.replace(partial, final)
    fsync_path(checkpoints)
    shutil.rmtree(checkpoints / f".{final.name}.replaced", ignore_errors=True)
    replace_text(checkpoints / "latest", final.name + "\n")
    return final
