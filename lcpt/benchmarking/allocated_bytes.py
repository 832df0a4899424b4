"""Count the bytes that a pass allocates, by PyTorch's own account; on a CPU also those of a GPU's kernels."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from lcpt_kernels import dispatch
from torch.profiler import ProfilerActivity, profile


def changes_of_allocated_bytes(step: Callable[[], object]) -> list[tuple[int, int]]:
    """Run `step` and list (nanoseconds, bytes) of what it allocates on the CPU, and frees (bytes < 0), in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say on stderr when it starts and stops
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    return sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")


def most_allocated_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes that `step` holds at a time beyond those that were there before it."""
    return max(itertools.accumulate(n_bytes for _, n_bytes in changes_of_allocated_bytes(step)), default=0)


@contextmanager
def kernels_left_out() -> Iterator[None]:
    """Take the Triton backend on a CPU, and start none of its kernels: what is allocated is what a GPU's allocator
    would be asked for, what is in it means nothing."""
    from triton.runtime.jit import JITFunction

    with patch.object(dispatch, "INTERPRETED", True), patch.object(JITFunction, "run", lambda *args, **kwargs: None):
        yield
