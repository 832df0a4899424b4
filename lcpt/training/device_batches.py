"""Bring batches to the device: the next one is copied while the device works on this one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lcpt.data import Prefetcher

DeviceBatch = tuple[Tensor, Tensor]  # inputs and labels, int32 [sequences, context] each


class DeviceBatches:
    """Gives a rank's share of each step's batch on its device. On a GPU batches travel through pinned memory, on a
    stream of their own."""

    def __init__(self, batches: Prefetcher, device: torch.device):
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, DeviceBatch] | None = None
        self.scored, self.close = batches.scored, batches.close

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
            for tensor in batch:
                tensor.record_stream(current)  # its memory is not used again before this stream is done with it
        return batch

    def copy_ahead(self, step: int) -> None:
        """Begin to copy the batch of a step, which `get` gives then."""
        inputs, labels = self._batches.get(step)
        with torch.cuda.stream(self._stream):  # does nothing where there is none
            self._ahead = step, (self._copy(inputs), self._copy(labels))

    def _copy(self, tokens: np.ndarray) -> Tensor:
        host = torch.from_numpy(tokens.astype(np.int32))
        return host.pin_memory().to(self._device, non_blocking=True) if self._stream else host
