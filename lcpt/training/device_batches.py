"""Bring batches to the device: the next one is copied while the device works on this one.

Where ranks share sequences, each copies its slice alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcpt.data import Batch, Prefetcher, padded_offsets
from lcpt.parallel.sequence import SequenceGroup, SequenceSlice


class MicroBatch(NamedTuple):
    """Holds what a rank computes at one time, on its device: sequences, or one row of packed documents, B = 1."""

    inputs: Tensor  # int32 [B, T]
    labels: Tensor  # int32 [B, T], -1 where nothing is to be predicted
    cu_seqlens: Tensor | None  # int32 [N + 1], where documents are packed
    part: SequenceSlice | None  # whose tokens these are, where ranks share sequences


class DeviceBatch(NamedTuple):
    """Holds a rank's part of a step's batch."""

    micro_batches: list[MicroBatch]
    padding: int  # tokens that belong to no document; of a shared sequence its first rank counts them


class DeviceBatches:
    """Gives a rank's share of each step's batch on its device. On a GPU batches travel through pinned memory, on a
    stream of their own."""

    def __init__(self, batches: Prefetcher, device: torch.device, group: SequenceGroup):
        self._batches, self._device, self._group = batches, device, group
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, DeviceBatch] | None = None
        self.close = batches.close

    @property
    def waited(self) -> float:
        """The seconds in which training waited for data to be read."""
        return self._batches.waited

    def get(self, step: int) -> DeviceBatch:
        """Return the batch of step 0, 1, 2, …; work that is enqueued from now on sees it whole."""
        if self._ahead is None or self._ahead[0] != step:
            self.copy_ahead(step)
        assert self._ahead is not None
        batch = self._ahead[1]
        if self._stream:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in (x for micro_batch in batch.micro_batches for x in micro_batch if isinstance(x, Tensor)):
                tensor.record_stream(current)  # its memory is not used again before this stream is done with it
        return batch

    def copy_ahead(self, step: int) -> None:
        """Begin to copy the batch of a step, which `get` gives then."""
        batch = self._batches.get(step)
        inputs, labels = (in_micro_batches(x, batch) for x in (batch.inputs, batch.labels))
        parts = slices(batch, inputs.shape[2], self._group)
        cu_seqlens = batch.cu_seqlens
        if parts[0] is not None:
            own = slice(parts[0].first, parts[0].first + parts[0].tokens)
            inputs, labels = inputs[:, :, own], labels[:, :, own]
            if cu_seqlens is not None:
                cu_seqlens = padded_offsets([part.local_borders for part in parts if part])
        with torch.cuda.stream(self._stream):  # does nothing where there is none
            offsets = [None] * len(parts) if cu_seqlens is None else self._copy(cu_seqlens).unbind()
            micro_batches = zip(self._copy(inputs).unbind(), self._copy(labels).unbind(), offsets, parts, strict=True)
            padding = batch.padding if self._group.rank == 0 else 0
            self._ahead = step, DeviceBatch([MicroBatch(*each) for each in micro_batches], padding)

    def _copy(self, integers: np.ndarray) -> Tensor:
        host = torch.from_numpy(integers.astype(np.int32))
        return host.pin_memory().to(self._device, non_blocking=True) if self._stream else host


def in_micro_batches(integers: np.ndarray, batch: Batch) -> np.ndarray:
    """Return integers [sequences, context] of a batch as [micro-batches, B, T]; packed documents make one row."""
    rows = batch.micro_batch if batch.cu_seqlens is None else 1
    return integers.reshape(len(integers) // batch.micro_batch, rows, -1)


def slices(batch: Batch, tokens: int, group: SequenceGroup) -> Sequence[SequenceSlice | None]:
    """Describe this rank's slice of each micro-batch, whose rows have so many tokens."""
    if batch.cu_seqlens is None:
        return [group.slice(tokens)] * (len(batch.inputs) // batch.micro_batch)
    return [group.slice(tokens, tuple(np.unique(offsets).tolist())) for offsets in batch.cu_seqlens]
