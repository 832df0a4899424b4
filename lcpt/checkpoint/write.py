"""Write a checkpoint: named fp32 tensors in slices with global offsets, scalars in JSON, a manifest, then `latest`.

    checkpoints/step-00000100/weights-00000.safetensors    flat slices, keyed by parameter name
                              exp_avg-00000.safetensors    Adam's first moments, in the same way
                              exp_avg_sq-00000.safetensors and its second
                              state.json                   scalars and the position in the data
                              config.yaml, tokenizer.model what else it takes to use the weights
                              manifest.json                shapes, slices, sizes and hashes of all of these
    checkpoints/latest                                     the name of the newest whole folder

Nothing in it depends on the number of processes or on how they divided the state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lcpt.checkpoint.files import replace_text, self_hash, sha256_of, sync

SCHEMA_VERSION = 1


@dataclass
class CheckpointConfig:
    every_steps: int = 1000

    def __post_init__(self):
        if self.every_steps < 1:
            raise ValueError(f"checkpoint.every_steps is {self.every_steps}; it must be ≥ 1")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def write_checkpoint(
    checkpoints: Path, step: int, groups: Mapping[str, Mapping[str, torch.Tensor]], state: dict,
    attachments: Mapping[str, Path],
) -> Path:
    """Write checkpoints/step-XXXXXXXX and point `latest` at it; one process calls this.

    groups: "weights", "exp_avg", "exp_avg_sq" -> name -> whole fp32 tensor. state: JSON scalars.
    attachments: file name -> file to copy in. Until the final rename nothing carries the final name.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    sync(checkpoints.parent)
    final, partial = checkpoints / step_name(step), checkpoints / f".{step_name(step)}.partial"
    for stale in checkpoints.glob(".step-*"):  # of a process that died while it wrote
        shutil.rmtree(stale)
    partial.mkdir()
    tensors = {group: _write_group(partial, group, named) for group, named in groups.items()}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for name, source in attachments.items():
        shutil.copyfile(source, partial / name)

    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "tensors": tensors, "files": {}}
    for path in sorted(partial.iterdir()):
        sync(path)
        manifest["files"][path.name] = {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest["sha256"] = self_hash(manifest)
    replace_text(partial / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    if final.exists():  # the same step once more: the old folder goes only when the new one is in its place
        os.replace(final, checkpoints / f".{final.name}.replaced")
    os.replace(partial, final)
    sync(checkpoints)
    shutil.rmtree(checkpoints / f".{final.name}.replaced", ignore_errors=True)
    replace_text(checkpoints / "latest", final.name + "\n")
    return final


def _write_group(folder: Path, group: str, named: Mapping[str, torch.Tensor]) -> dict:
    """One file of flat tensors; returns what the manifest says of each: its shape and where its slices lie."""
    file = f"{group}-00000.safetensors"
    save_file({name: tensor.detach().float().cpu().flatten().contiguous() for name, tensor in named.items()},
              folder / file)
    return {
        name: {"shape": list(tensor.shape), "slices": [{"file": file, "start": 0, "stop": tensor.numel()}]}
        for name, tensor in named.items()
    }
