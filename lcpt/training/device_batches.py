"""Bring batches to the device: the next one is copied while the device works on this one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcpt.data import Prefetcher


class DeviceBatch(NamedTuple):
    """Holds a rank's sequences of a step, on its device."""

    inputs: Tensor  # int32 [sequences, context]
    labels: Tensor  # int32 [sequences, context], -1 where nothing is to be predicted
    cu_seqlens: Tensor | None  # int32 [micro-batches, N + 1]; None where a sequence is one text
    padding: int  # tokens that belong to no document


class DeviceBatches:
    """Gives a rank's share of each step's batch on its device. On a GPU batches travel through pinned memory, on a
    stream of their own."""

    def __init__(self, batches: Prefetcher, device: torch.device):
        self._batches, self._device = batches, device
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
            for tensor in filter(torch.is_tensor, batch):
                tensor.record_stream(current)  # its memory is not used again before this stream is done with it
        return batch

    def copy_ahead(self, step: int) -> None:
        """Begin to copy the batch of a step, which `get` gives then."""
        inputs, labels, cu_seqlens, padding = self._batches.get(step)
        with torch.cuda.stream(self._stream):  # does nothing where there is none
            borders = None if cu_seqlens is None else self._copy(cu_seqlens)
            self._ahead = step, DeviceBatch(self._copy(inputs), self._copy(labels), borders, padding)

    def _copy(self, integers: np.ndarray) -> Tensor:
        host = torch.from_numpy(integers.astype(np.int32))
        return host.pin_memory().to(self._device, non_blocking=True) if self._stream else host
