"""Measure time and memory of several functions in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch

from lcpt.utils.errors import typed_first_line
from lcpt.utils.memory import memory_in_use_bytes, peak_memory_bytes, reset_peak_memory


def time_in_turn(
    steps: dict[str, Callable],
    repeats: int,
    device: torch.device,
    *,
    budget: float = math.inf,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, dict]:
    """Run the steps in turn, after one warm-up each.

    Returns name -> {"milliseconds": {p10, p50, p90}, "repeats", "peak_memory_bytes", "memory_before_bytes"}.

    On a CPU it is the CPU time of one thread, since the wall clock of a shared machine depends on its other users. On a
    GPU it is the time between two events, with a cold L2 cache. A step that has taken `budget` seconds is not repeated
    further; where the warm-up alone took as long, that is its one time. progress(name) is called before each run.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        _filler(device)  # allocated here, so that it counts in no step's memory
    seconds: dict[str, list[float]] = {}
    memory = {}
    for name, step in steps.items():
        progress(name)
        reset_peak_memory(device)
        before = memory_in_use_bytes(device)
        first = _seconds(step, device)
        memory[name] = {"peak_memory_bytes": peak_memory_bytes(device), "memory_before_bytes": before}
        seconds[name] = [first] if first >= budget else []
    for _ in range(repeats):
        for name, step in steps.items():
            if sum(seconds[name]) < budget:
                progress(name)
                seconds[name].append(_seconds(step, device))
    figures = {}
    for name, taken in seconds.items():
        p10, p50, p90 = (1e3 * np.percentile(taken, [10, 50, 90])).tolist()
        figures[name] = {"milliseconds": {"p10": p10, "p50": p50, "p90": p90}, "repeats": len(taken), **memory[name]}
    return figures


def first_passes(steps: dict[str, Callable], device: torch.device) -> dict[str, str]:
    """Run each step once on a GPU, which compiles and tunes; returns those that fail, and why in one line."""
    failed = {}
    for name, step in steps.items() if device.type == "cuda" else ():
        try:
            step()
            torch.cuda.synchronize()
        except Exception as error:  # other libraries raise what they like
            failed[name] = typed_first_line(error)
            torch.cuda.empty_cache()
    return failed


def _seconds(step: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        return _seconds_on_gpu(step, device)
    began = time.process_time()
    step()
    return time.process_time() - began


def _seconds_on_gpu(step: Callable, device: torch.device) -> float:
    """Time a step on a GPU. Python queues the first launches while the GPU still overwrites its cache."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _filler(device).zero_()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _filler(device: torch.device) -> torch.Tensor:
    """Allocate a tensor several times as large as an L2 cache."""
    return torch.empty(2**29, dtype=torch.int8, device=device)
