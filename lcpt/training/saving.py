"""Save a run while it trains: a quick copy of each rank's shards, then hashing and writing in the background."""

from __future__ import annotations

import concurrent.futures
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from lcpt.checkpoint import CheckpointConfig, Slice, commit_checkpoint, open_partial, remove_old, write_piece
from lcpt.parallel import groups
from lcpt.training.telemetry import log_rank0
from lcpt.training.watchdog import Watchdog
from lcpt.training.zero_shards import MOMENTS, owned_shards
from lcpt.utils.errors import one_line

WRITE_TIMEOUT_S = 1800.0  # that a disk may take to write a checkpoint before it counts as a hang
SETTLE_SECONDS = 10.0  # that a save still being written gets when the run ends by an error


class SaveError(OSError):
    """Ends a run whose last state could not be saved."""


class Saver:
    """Writes this rank's part of each checkpoint; every rank has one and calls `save` after the same steps.

    `stalled` sums the seconds in which saving kept this rank from training, `writing` those in which the background
    thread worked, `saves` counts. A save that fails is logged and dropped: the run goes on, and the next save tries
    again. Only `finish` raises.
    """

    def __init__(
        self, engine, checkpoints: Path, config: CheckpointConfig, attachments: Mapping[str, Path], watch: Watchdog
    ):
        self._engine, self._checkpoints, self._config = engine, checkpoints, config
        self._attachments, self._watch = attachments, watch
        self._thread = ThreadPoolExecutor(max_workers=1)
        # The threads agree through a group of their own: two threads of a process must not share one.
        self._group = dist.new_group(backend="gloo")
        self._copies: dict[str, list[Slice]] = {}
        self._outcome: Future = _finished(None)  # of the last save: None, or what went wrong
        self._began = time.monotonic()
        self.saves, self.stalled, self.writing = 0, 0.0, 0.0

    def minutes_are_up(self) -> bool:
        """Check whether checkpoint.every_minutes wants a save, by this rank's clock."""
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._began >= 60 * minutes

    def save(self, step: int, state: dict, blocked: OSError | None) -> None:
        """Copy the state after `step`, and return while it is being written. Waits for the save before this one.

        blocked: the error of rank 0 that rules this save out.
        """
        began, self._began, self.saves = time.perf_counter(), time.monotonic(), self.saves + 1
        self._wait()
        self._copy_shards()
        opened: Path | OSError | None = blocked
        if groups.rank() == 0 and not blocked:
            try:
                opened = open_partial(self._checkpoints, step)
            except OSError as error:
                opened = error
        opened = groups.broadcast(opened)
        if isinstance(opened, Path):
            self._outcome = self._thread.submit(self._write, opened, step, state)
        else:
            self._outcome = _finished(_log_failed_save(step, opened))
        self.stalled += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the last save is on the disk. Raises SaveError, the same on all ranks, if it is not."""
        began = time.perf_counter()
        error = self._wait()
        self._thread.shutdown()
        self.stalled += time.perf_counter() - began
        if error:
            raise SaveError(f"{error}; mend that, then start again: the run continues from its newest whole checkpoint")

    def settle(self) -> None:
        """Give a save that is being written a little time to end before this process does."""
        concurrent.futures.wait([self._outcome], timeout=SETTLE_SECONDS)

    def _wait(self) -> str | None:
        self._watch.heartbeat("waiting for a checkpoint to be written", timeout_s=WRITE_TIMEOUT_S)
        return self._outcome.result()

    def _copy_shards(self) -> None:
        """Copy what this rank saves into host memory, which the next save uses again."""
        shards, pinned = list(owned_shards(self._engine)), groups.device().type == "cuda"
        live = {
            group: [Slice(s.name, s.shape, s.start, s.tensors[group]) for s in shards]
            for group in ("weights", *MOMENTS)
        }
        if groups.rank() == 0:  # buffers are the same on every rank
            module = self._engine.module
            kept = module.state_dict().keys()  # modules recompute the others
            buffers = [(name, x) for name, x in module.named_buffers() if name in kept]
            live["weights"] += [Slice(name, tuple(x.shape), 0, x.flatten()) for name, x in buffers]
        if not self._copies:
            self._copies = {
                group: [part._replace(data=torch.empty(part.data.shape, pin_memory=pinned)) for part in parts]
                for group, parts in live.items()
            }
        for group, parts in live.items():
            for part, copy in zip(parts, self._copies[group], strict=True):
                copy.data.copy_(part.data, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()

    def _write(self, partial: Path, step: int, state: dict) -> str | None:
        """Write the copies, in a thread of every rank; returns None when the checkpoint is whole, else the error."""
        began, piece, error = time.perf_counter(), None, None
        try:
            piece = write_piece(partial, groups.rank(), self._copies)
        except OSError as caught:
            error = f"rank {groups.rank()}: {caught}"
        pieces, errors = zip(*groups.all_gather((piece, error), self._group), strict=True)
        error = next(filter(None, errors), None)
        if groups.rank() == 0 and not error:
            try:
                commit_checkpoint(partial, step, pieces, state, self._attachments)
                remove_old(self._checkpoints, step, self._config)
            except OSError as caught:
                error = str(caught)
        error = groups.all_gather(error, self._group)[0]
        if error and groups.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self.writing += time.perf_counter() - began
        return _log_failed_save(step, error) if error else None


def _log_failed_save(step: int, error: object) -> str:
    line = f"the checkpoint of step {step} could not be written: {one_line(error)}"
    log_rank0(f"warning: {line}")
    return line


def _finished(result: object) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future
