"""The folder of one run: what was asked for, on what, and every step's numbers."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from omegaconf import MISSING

from lcpt.checkpoint.files import replace_text
from lcpt.evaluation.memory import peak_memory_bytes
from lcpt.parallel import groups
from lcpt.training.endings import GiveUp
from lcpt.training.history import History

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "sentencepiece", "safetensors")


@dataclass
class RunConfig:
    dir: str = MISSING
    seed: int = 0


def begin(folder: Path, config_yaml: str, history: History, state: dict) -> None:
    """Rank 0 makes a run folder ready for a start from a checkpoint of this state.

    It writes config.yaml and environment.json, cuts the rows that the checkpoint does not know, and removes what the
    end of an earlier start left. Raises, the same on all ranks, SetupError, and GiveUp in a crash loop.
    """
    step, refusal = state["step"], None
    with groups.agreed():
        if groups.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            last_sign = None
            for name in ("metrics.jsonl", "skipped.jsonl"):
                if (folder / name).exists():
                    last_sign = last_sign or (folder / name).stat().st_mtime
                    drop_rows_after(folder / name, step - ("unvalidated" in state))
            refusal = history.refusal(step)
            if not refusal:
                history.begin(step, last_sign)
                for name in ("summary.json", "preempted.json"):
                    (folder / name).unlink(missing_ok=True)
                replace_text(folder / "config.yaml", config_yaml)
                replace_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    if refusal := groups.share(refusal):
        raise GiveUp(refusal)


def lock(folder: Path) -> None:
    """Keep other jobs out of a run until this process ends, however it ends. ValueError if one is there already."""
    descriptor = os.open(folder, os.O_RDONLY)  # never closed: the system does, and so frees the lock
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another job trains in {folder}; wait for it, or name another run.dir") from None
    except OSError:  # some network file systems have no locks
        pass


def finish(folder: Path, history: History, **numbers: float) -> None:
    """Rank 0 writes summary.json, if it is not there: the last row of the metrics, how the time was used, `numbers`."""
    if groups.rank() == 0 and not (folder / "summary.json").exists():
        history.end("finished")
        metrics = folder / "metrics.jsonl"
        rows = read_rows(metrics)
        summary = rows[-1] | history.goodput(sum(row["step_seconds"] for row in rows), metrics.stat().st_mtime) | {
            "world_size": groups.world_size(), "peak_memory_bytes": peak_memory_bytes(groups.device()), **numbers,
        }
        replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def write_marker(folder: Path, step: int, asked: str) -> None:
    """Rank 0 writes preempted.json: for a supervisor to whom the exit code is lost."""
    if groups.rank() == 0:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        marker = {"step": step, "asked_by": asked, "date": now}
        replace_text(folder / "preempted.json", json.dumps(marker) + "\n")


def read_rows(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


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
