"""The folder of one run: what was asked for, on what, and every step's numbers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING

from lcpt.checkpoint.files import replace_text
from lcpt.evaluation.memory import peak_memory_bytes
from lcpt.parallel import groups

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "sentencepiece", "safetensors")


@dataclass
class RunConfig:
    dir: str = MISSING
    seed: int = 0


def open_run_folder(folder: Path, config_yaml: str, done: int) -> None:
    """Rank 0 writes config.yaml and environment.json, and cuts metrics.jsonl behind the row of step `done`."""
    if groups.rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "metrics.jsonl").exists():
        drop_rows_after(folder / "metrics.jsonl", done)
    replace_text(folder / "config.yaml", config_yaml)
    replace_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")


def write_summary(folder: Path, last_row: dict, wall_seconds: float) -> None:
    """Rank 0 writes summary.json: the last step's numbers, seconds from start to end, peak memory."""
    if groups.rank() == 0:
        summary = last_row | {
            "wall_seconds": wall_seconds,
            "world_size": groups.world_size(),
            "peak_memory_bytes": peak_memory_bytes(groups.device()),
        }
        replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def drop_rows_after(metrics: Path, step: int) -> None:
    """Cut the rows of later steps and a half-written one; what stays is not touched."""
    end = 0
    with open(metrics, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
        file.truncate(end)


def environment() -> dict:
    """Versions, devices and the command: what one needs to repeat a run."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "world_size": groups.world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def package_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def git_commit() -> str | None:
    """The commit of lcpt's own checkout, None outside one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
