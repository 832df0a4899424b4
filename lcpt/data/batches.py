"""Make batches: that of step k is a pure function of sources, seed, k, global batch and context, on any world size."""

from __future__ import annotations

import bisect
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lcpt.data.errors import DataError
from lcpt.data.packed_documents import cu_seqlens
from lcpt.data.sample_source import SampleSource


class Batch(NamedTuple):
    """Holds sequences to train on."""

    inputs: np.ndarray  # int64 [sequences, context]
    labels: np.ndarray  # int64 [sequences, context], -1 where nothing is to be predicted
    cu_seqlens: np.ndarray | None  # int32 [micro-batches, N + 1], borders in the row that a micro-batch makes; or none
    padding: int  # tokens that belong to no document
    micro_batch: int = 1  # sequences that are computed at one time


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPhase:
    """Says what the batches are made of from a step on."""

    first: int  # step, counted from 0
    source: SampleSource
    context: int
    sequences: int  # of a step, over all ranks
    micro_batch: int  # sequences


def rows(source: SampleSource, seed: int, first: int, count: int, context: int, micro_batch: int = 1) -> Batch:
    """Stack training samples first, first + 1, … Raises DataError when there is none of that context."""
    samples = [source.sample(number, seed, context) for number in range(first, first + count)]
    starts = [sample.starts for sample in samples if sample.starts is not None]
    micro_batches = [starts[i : i + micro_batch] for i in range(0, len(starts), micro_batch)]
    return Batch(
        np.stack([sample.inputs for sample in samples]),
        np.stack([sample.labels for sample in samples]),
        cu_seqlens(micro_batches, context) if starts else None,
        sum(sample.padding for sample in samples),
        micro_batch,
    )


def batch(source: SampleSource, seed: int, step: int, sequences: int, context: int) -> Batch:
    """Make the global batch of step 0, 1, 2, …"""
    return rows(source, seed, step * sequences, sequences, context)


def batch_documents(source: SampleSource, seed: int, step: int, sequences: int, context: int) -> list[str]:
    """List the ids of the documents in that batch, each once, in the order in which they occur."""
    samples = range(step * sequences, (step + 1) * sequences)
    return list(dict.fromkeys(name for number in samples for name in source.documents(number, seed, context)))


class Prefetcher:
    """Gives one rank its rows of each step's global batch, reading the next step's ahead in a thread.

    Rank r of W gets rows r·S/W up to (r + 1)·S/W of the S sequences. `waited` sums the seconds that callers waited.
    Raises DataError at once when S is not a multiple of W or there is no such sample.
    """

    def __init__(self, phases: Sequence[BatchPhase], seed: int, rank: int = 0, world: int = 1):
        for phase in phases:
            if phase.sequences % world:
                raise DataError(
                    f"{phase.sequences} sequences a step do not divide among {world} ranks; change the global batch"
                )
            phase.source.check_context(phase.context)
        self._phases, self._seed, self._rank, self._world = list(phases), seed, rank, world
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[int, Future] | None = None
        self.waited = 0.0

    def get(self, step: int) -> Batch:
        """Return this rank's S / W sequences of any step; those of the step after the last one are ready."""
        began = time.perf_counter()
        if self._ahead is not None and self._ahead[0] == step:
            future = self._ahead[1]
        else:
            future = self._submit(step)
        result = future.result()
        self._ahead = step + 1, self._submit(step + 1)
        self.waited += time.perf_counter() - began
        return result

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self, step: int) -> Future:
        phase = self._phases[bisect.bisect_right(self._phases, step, key=lambda phase: phase.first) - 1]
        count = phase.sequences // self._world
        first = (step - phase.first) * phase.sequences + self._rank * count
        return self._thread.submit(rows, phase.source, self._seed, first, count, phase.context, phase.micro_batch)
