"""Memory for the keys of the local blocks, in which a sequence that grows token by token copies none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Room:
    """Tensors [B, capacity, Hkv, ·] by name, and how many tokens they hold. States of one sequence, one token after the
    other, have views of the same room: the rows of a state are never written again."""

    tensors: dict[str, Tensor]
    tokens: int

    def fits(self, v: Tensor, more: int) -> bool:
        """Return whether the tail with these values is the latest view of this room, and `more` tokens fit behind it.

        A sequence that went on in two ways has two states with the same tail: the second one no longer fits. Copies of
        a state, for other sequences say, are in other memory.
        """
        room = self.tensors["v"]
        same = v.data_ptr() == room.data_ptr() and v.shape[0] == room.shape[0]
        if room.is_inference() and not torch.is_inference_mode_enabled():
            return False  # PyTorch lets nobody write there
        return same and self.tokens == v.shape[1] and v.shape[1] + more <= room.shape[1]


def append(
    room: Room | None, tail: Mapping[str, Tensor], keys: Mapping[str, Tensor], capacity: Mapping[str, int]
) -> tuple[Room, dict[str, Tensor]]:
    """Return the tail with the rows of `keys` behind it, [B, P + T, Hkv, ·] by name, and its room.

    In `room` if they fit there, else in new memory of `capacity` rows. Needs no gradients.
    """
    if room is None or not room.fits(tail["v"], keys["v"].shape[1]):
        room = Room({name: x.new_empty(x.shape[0], capacity[name], *x.shape[2:]) for name, x in tail.items()}, 0)
        _write(room.tensors, tail, dict.fromkeys(tail, 0))
    _write(room.tensors, keys, {name: x.shape[1] for name, x in tail.items()})
    room.tokens = tail["v"].shape[1] + keys["v"].shape[1]
    return room, {name: x[:, : tail[name].shape[1] + keys[name].shape[1]] for name, x in room.tensors.items()}


def _write(tensors: Mapping[str, Tensor], rows: Mapping[str, Tensor], start: Mapping[str, int]) -> None:
    with torch.no_grad():
        for name, x in rows.items():
            if x.shape[1]:
                tensors[name][:, start[name] : start[name] + x.shape[1]] = x
