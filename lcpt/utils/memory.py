"""Measure the memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement: reset the peak, and on the CPU return freed memory to the system."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets the peak resident set size


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most that was allocated on a GPU, or resident on the CPU, since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def memory_in_use_bytes(device: torch.device) -> int:
    """Return what is allocated on a GPU, or resident on the CPU, now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def host_memory_bytes() -> int:
    """Return the memory of this machine, or what this process's control groups may have of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):  # no Linux
        limits += control_group_limits(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    return min(limits)


def control_group_limits(membership: str, root: Path) -> list[int]:
    """Read the limits in bytes of the groups of a /proc/PID/cgroup (cgroups(7)), and of those above them."""
    limits = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):  # no such file in the topmost group; "max"
                    limits.append(int((folder / name).read_text()))
    return limits
