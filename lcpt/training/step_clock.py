"""Measure how long the parts of a step take, on a GPU by events on its stream: nothing waits for them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Sums the time in each part. `seconds` gives the sums since the last call; the device must have been read."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: defaultdict[str, list] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans[name].append((start, self._now()))

    def seconds(self) -> dict[str, float]:
        spans, self._spans = self._spans, defaultdict(list)
        return {f"{name}_seconds": sum(self._between(*span) for span in spans[name]) for name in spans}

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
