"""Save a run while it goes on: a quick copy of what each rank holds, then hashing and writing in the background."""

from __future__ import annotations

import concurrent.futures
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from lcpt.checkpoint import CheckpointConfig, Slice, open_partial, remove_old, seal, write_piece
from lcpt.parallel import groups
from lcpt.training.telemetry import say
from lcpt.training.watchdog import Watch
from lcpt.training.zero_shards import MOMENTS, held_once

PATIENCE = 1800.0  # seconds that a disk may take to write a checkpoint before it counts as a hang

SETTLE_SECONDS = 10.0


class SaveError(OSError):
    """The last state of a run could not be saved."""


class Saver:
    """Every rank has one and calls `save` after the same steps; each writes its own part.

    `stalled` sums the seconds in which saving kept this rank from training, `writing` those that the thread behind it
    worked, `saves` counts. A save that fails is told and given up: the run goes on, and the next one tries again. Only
    `finish` insists.
    """

    def __init__(
        self, engine, checkpoints: Path, config: CheckpointConfig, attachments: Mapping[str, Path], watch: Watch
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
        """Whether checkpoint.every_minutes asks for a save, by this rank's clock."""
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._began >= 60 * minutes

    def save(self, step: int, state: dict, blocked: OSError | None) -> None:
        """Copy the state of after `step`, and return while it is being written. Waits for the save before this one.

        blocked: why there must be none, by rank 0's word.
        """
        began, self._began, self.saves = time.perf_counter(), time.monotonic(), self.saves + 1
        self._wait()
        self._copy()
        opened = blocked
        if groups.rank() == 0 and not blocked:
            try:
                opened = open_partial(self._checkpoints, step)
            except OSError as error:
                opened = error
        opened = groups.share(opened)
        if isinstance(opened, OSError):
            self._outcome = _finished(_complain(step, opened))
        else:
            self._outcome = self._thread.submit(self._write, opened, step, state)
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
        """Give a save that is being written the time to end, before this process does; not for long."""
        concurrent.futures.wait([self._outcome], timeout=SETTLE_SECONDS)

    def _wait(self) -> str | None:
        self._watch.beat("waiting for a checkpoint to be written", patience=PATIENCE)
        return self._outcome.result()

    def _copy(self) -> None:
        """What this rank holds into host memory, which the next save uses again."""
        fragments, pinned = list(held_once(self._engine)), torch.cuda.is_available()
        live = {
            group: [Slice(f.name, f.shape, f.start, f.tensors[group]) for f in fragments]
            for group in ("weights", *MOMENTS)
        }
        if groups.rank() == 0:  # buffers are the same everywhere
            module = self._engine.module
            kept = module.state_dict().keys()  # a module makes the others anew
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
        """In the background, on every rank: returns None when the checkpoint is whole, else what went wrong."""
        began, piece, error = time.perf_counter(), None, None
        try:
            piece = write_piece(partial, groups.rank(), self._copies)
        except OSError as caught:
            error = f"rank {groups.rank()}: {caught}"
        pieces, errors = zip(*groups.gather((piece, error), self._group), strict=True)
        error = next(filter(None, errors), None)
        if groups.rank() == 0 and not error:
            try:
                seal(partial, step, pieces, state, self._attachments)
                remove_old(self._checkpoints, step, self._config)
            except OSError as caught:
                error = str(caught)
        error = groups.gather(error, self._group)[0]
        if error and groups.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self.writing += time.perf_counter() - began
        return _complain(step, error) if error else None


def _complain(step: int, error: object) -> str:
    line = f"the checkpoint of step {step} could not be written: {' '.join(str(error).split())}"
    say(f"warning: {line}")
    return line


def _finished(result) -> Future:
    future = Future()
    future.set_result(result)
    return future
