"""Keep on the host what backward needs only later."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import cast
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def keep_on_host() -> saved_tensors_hooks:
    """Return a context, to be entered once or more in a forward pass: what autograd saves in it lies on the host.

    Backward gets each tensor back on its device, the last one first, and the one before it is on its way by then. So
    two of them are on the device at a time, forward and backward. Copies from and to a GPU go through pinned memory,
    beside its computation. On a CPU they are made too: there is one way only, and memory is counted as on a GPU.

    Around torch.utils.checkpoint.checkpoint it sees the tensors that are positional arguments, and no others.
    """
    last: list[ref[_Kept]] = []  # a weak reference, for autograd's graph refers to this function

    def keep(x: Tensor) -> _Kept:
        before = last.pop()() if last else None
        if before is not None:
            before.leave_device()
        kept = _Kept(x.detach(), before)
        last.append(ref(kept))
        return kept

    return saved_tensors_hooks(keep, _Kept.take)


def bytes_on_host() -> int:
    """Count the bytes that lie on the host for backward."""
    return sum(kept.host.nbytes for kept in _all)


class _Kept:
    """Holds a tensor on the host, and for a time on its device.

    Its memory there always comes from the stream that computes, which waits for a copy before it reuses the memory: the
    allocator needs no knowledge of other streams, and does not depend on how far the host runs ahead.
    """

    def __init__(self, x: Tensor, before: _Kept | None):
        self.before = before
        self.copied: torch.cuda.Event | None = None
        self.on_device: Tensor | None = x
        self.device = x.device
        place = "meta" if x.is_meta else "cpu"  # a tensor without memory stays one
        self.host = torch.empty(x.shape, dtype=x.dtype, device=place, pin_memory=x.is_cuda)
        self._copy(x, self.host)
        _all.add(self)

    def __del__(self):
        self._wait()  # backward need not come to every tensor whose copy is under way

    def leave_device(self) -> None:
        """Give up the memory on the device once it is copied."""
        self._wait()
        self.on_device = None

    def take(self) -> Tensor:
        """Return the tensor on its device, and send for the one before."""
        self._send_for()
        self._wait()
        x, self.on_device = cast(Tensor, self.on_device), None
        if self.before is not None:
            self.before._send_for()
        return x

    def _send_for(self) -> None:
        if self.on_device is None:
            self.on_device = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
            self._copy(self.host, self.on_device)

    def _copy(self, x: Tensor, to: Tensor) -> None:
        context: AbstractContextManager = nullcontext()
        if self.device.type == "cuda":
            stream = _copying_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            context = torch.cuda.stream(stream)
        with torch.no_grad(), context:
            to.copy_(x, non_blocking=True)
            if self.device.type == "cuda":
                self.copied = stream.record_event()

    def _wait(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)


_all: WeakSet[_Kept] = WeakSet()


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
