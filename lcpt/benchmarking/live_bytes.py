"""Count the bytes of tensors that are alive, on any device, as they are made and freed."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcpt.utils.host_offload import bytes_on_host


class LiveBytes(TorchDispatchMode):
    """Counts storages that operators make within its context while anything refers to them: `now`, and `peak` without
    what host_offload keeps on the host at that time, whose own peak is `host_peak`.

    What one operator allocates and frees inside itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.host_peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = operator(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and all(x.untyped_storage() is not storage for storage in given):
                self._count(x.untyped_storage())
        host = bytes_on_host()
        self.peak, self.host_peak = max(self.peak, self.now - host), max(self.host_peak, host)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, n_bytes: int) -> None:
        self.now -= n_bytes
