"""Keep the folder of one run: its config, its environment, its metrics and its summary."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import torch
from omegaconf import MISSING

from lcpt.parallel import groups
from lcpt.training.announcement import end_block
from lcpt.training.branching import record
from lcpt.training.exit_codes import GiveUp
from lcpt.training.history import History
from lcpt.training.resume import set_aside
from lcpt.training.telemetry import log_rank0
from lcpt.utils.atomic_files import replace_text
from lcpt.utils.home_folder import expand_home
from lcpt.utils.memory import peak_memory_bytes
from lcpt.utils.provenance import command, git_commit, versions

if TYPE_CHECKING:
    from lcpt.training.checks import Start

LOCK_SECONDS = 30.0  # that the last job in a run folder may need to end, or a file server to notice that it has
_locks: dict[Path, int] = {}  # descriptors, which the system closes when the process ends


@dataclass
class RunConfig:
    dir: str = MISSING
    seed: int = 0
    wandb_project: Optional[str] = None  # noqa: UP045  of Weights & Biases, where metrics go too

    def __post_init__(self):
        self.dir = expand_home(self.dir)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"run.seed is {self.seed}; it must be ≥ 0 and below 2^63")


def begin(folder: Path, config_yaml: str, history: History, start: Start) -> None:
    """Make a run folder ready, on rank 0, for a start that was checked.

    It writes config.yaml and environment.json, cuts the rows that the checkpoint does not know, and removes what the
    end of an earlier start left. Raises, the same on all ranks, SetupError, and GiveUp in a crash loop.
    """
    step, refusal = start.state["step"], None
    kept = step - ("unvalidated" in start.state) if start.checkpoint else -1  # a new run validates at step 0 again
    with groups.raise_on_all_ranks():
        if groups.rank() == 0:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock(folder)
            set_aside(start.damaged)
            last_seen = None
            for name in ("metrics.jsonl", "skipped.jsonl", "samples.jsonl"):
                if (folder / name).exists():
                    last_seen = last_seen or (folder / name).stat().st_mtime
                    drop_rows_after(folder / name, kept)
            refusal = history.refuse_crash_loop(step)
            if not refusal:
                history.begin(step, last_seen, start.changes)
                for name in ("summary.json", "preempted.json"):
                    (folder / name).unlink(missing_ok=True)
                replace_text(folder / "config.yaml", config_yaml)
                if start.branch_from:
                    record(start.branch_from, folder)
                replace_text(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    if refusal := groups.broadcast(refusal):
        raise GiveUp(refusal)


def check_writable(folder: Path) -> None:
    """Raise ValueError if a run folder could not be made or written there; changes nothing."""
    for path in (folder, folder / "checkpoints"):
        place = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
        if not place.is_dir():
            raise ValueError(f"{place} is no folder, or leads nowhere: remove it, or name another run.dir")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{place} cannot be written to: run.dir {folder} needs another place")


def lock(folder: Path, seconds: float | None = None) -> None:
    """Keep other jobs out of a run until this process ends, however it ends, or unlocks it.

    ValueError if one is there and stays for `seconds`, LOCK_SECONDS if None.
    """
    if folder.resolve() in _locks:
        return
    descriptor = _locks[folder.resolve()] = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + (LOCK_SECONDS if seconds is None else seconds)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                unlock(folder)
                raise ValueError(f"another job trains in {folder}; wait for it, or name another run.dir") from None
            time.sleep(0.5)
        except OSError:  # some network file systems have no locks
            return


def unlock(folder: Path) -> None:
    """Let other jobs in again."""
    if (descriptor := _locks.pop(folder.resolve(), None)) is not None:
        os.close(descriptor)


def finish(folder: Path, history: History, **figures: float) -> None:
    """Write summary.json on rank 0, if it is not there: the last row of the metrics, how time was used, `figures`."""
    if groups.rank() == 0 and not (folder / "summary.json").exists():
        history.end("finished")
        metrics = folder / "metrics.jsonl"
        rows, last_seen = (read_rows(metrics), metrics.stat().st_mtime) if metrics.exists() else ([{}], time.time())
        summary = (
            rows[-1]
            | history.goodput(sum(row.get("step_seconds", 0) for row in rows), last_seen)
            | {
                "world_size": groups.world_size(),
                "peak_memory_bytes": peak_memory_bytes(groups.device()),
                **figures,
            }
        )
        replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        log_rank0(end_block(folder, summary))


def write_marker(folder: Path, step: int, asked: str) -> None:
    """Write preempted.json on rank 0, for a supervisor that does not see the exit code."""
    if groups.rank() == 0:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        marker = {"step": step, "asked_by": asked, "date": now}
        with contextlib.suppress(OSError):  # a full disk: the exit code says it too
            replace_text(folder / "preempted.json", json.dumps(marker) + "\n")


def read_rows(metrics: Path) -> list[dict]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def drop_rows_after(metrics: Path, step: int) -> None:
    """Drop the rows of later steps, a half-written one, and lines that are no rows; the rest stays as it is."""
    lines = metrics.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    kept = [line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    if damaged := sum(at is None for at, line in zip(steps, lines, strict=True) if line.endswith(b"\n")):
        log_rank0(f"warning: {damaged} lines of {metrics} are damaged, and dropped")
        replace_text(metrics, b"".join(kept).decode())
    else:
        os.truncate(metrics, sum(map(len, kept)))


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def environment() -> dict:
    """Collect versions, devices and the command: what one needs to repeat a run."""
    return {
        "command": command(),
        "world_size": groups.world_size(),
        "device": torch.cuda.get_device_name() if groups.device().type == "cuda" else platform.processor() or "cpu",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "versions": versions(),
    }
