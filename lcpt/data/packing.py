"""Pack pieces of documents into bins of one size, each piece whole where it can be."""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np


class Parts(NamedTuple):
    """Lists parts of a token stream."""

    starts: np.ndarray  # int64 [n]
    lengths: np.ndarray  # int64 [n]
    continues: np.ndarray  # bool [n]: the token behind it is of the same document

    def pick(self, which: np.ndarray | slice) -> Parts:
        return Parts(*(each[which] for each in self))


class Packing(NamedTuple):
    """Says which parts lie in which bin."""

    parts: Parts  # by bin; in a bin in the order of the stream, then what was cut to fit in
    borders: np.ndarray  # int64 [bins + 1]: the parts of bin i begin at the i-th
    cut: int  # pieces that were cut though they are no longer than a bin

    def bin(self, number: int) -> Parts:
        return self.parts.pick(slice(self.borders[number], self.borders[number + 1]))


def best_fit_decreasing(pieces: Parts, bins: int, size: int) -> Packing:
    """Pack all pieces, 1 to `size` tokens long and in the order of the stream, into bins of that size.

    Longest first, each into the bin in which least room is left behind it. Pieces that no bin has room for are cut at
    the end, into as few parts as the room allows: nothing is dropped. Raises ValueError when there are more tokens
    than room.

    Pieces of one length are packed together, so a step of the loop is a length or a bin that it fills, never a piece.
    """
    if pieces.lengths.sum() > bins * size:
        raise ValueError(f"{pieces.lengths.sum()} tokens do not go into {bins} bins of {size}")
    # Small unsigned integers: numpy sorts those in linear time.
    by_length = np.argsort((size - pieces.lengths).astype(np.min_scalar_type(size)), kind="stable")
    sorted_lengths = pieces.lengths[by_length]
    firsts = np.flatnonzero(np.diff(sorted_lengths, prepend=-1))
    counts = np.diff(firsts, append=len(by_length))

    rooms = [(size, number) for number in range(bins)]  # ascending
    chosen, times = [], []  # bins in turn, and how many pieces each takes; bin `bins` stands for none
    for length, count in zip(sorted_lengths[firsts].tolist(), counts.tolist(), strict=True):
        at = bisect.bisect_left(rooms, (length,))
        while count and at < bins:
            room, number = rooms.pop(at)
            taken = min(count, room // length)
            bisect.insort(rooms, (room - taken * length, number))
            at += 1  # it is full now, or the last that is needed
            chosen.append(number)
            times.append(taken)
            count -= taken
        chosen.append(bins)
        times.append(count)
    places = np.empty(len(by_length), dtype=np.min_scalar_type(bins))
    places[by_length] = np.repeat(np.array(chosen, dtype=places.dtype), times)

    order = np.argsort(places, kind="stable")
    borders = np.searchsorted(places[order], np.arange(bins + 2))
    packed, left = pieces.pick(order[: borders[bins]]), pieces.pick(order[borders[bins] :])
    if len(left.starts):
        cut, where = _cut(left, rooms)
        packed = Parts(*(np.concatenate(both) for both in zip(packed, cut, strict=True)))
        where = np.concatenate([places[order[: borders[bins]]], where])
        order = np.argsort(where, kind="stable")
        packed, borders = packed.pick(order), np.searchsorted(where[order], np.arange(bins + 1))
    return Packing(packed, borders[: bins + 1], len(left.starts))


def _cut(pieces: Parts, rooms: list[tuple[int, int]]) -> tuple[Parts, np.ndarray]:
    """Cut pieces so that they fill the rooms, (tokens, bin) ascending: the parts, and the bin of each."""
    found, where = [], []
    for start, length, continues in zip(*(each.tolist() for each in pieces), strict=True):
        while length:
            at = min(bisect.bisect_left(rooms, (length,)), len(rooms) - 1)  # the tightest that takes it, or the largest
            room, number = rooms.pop(at)
            taken = min(length, room)
            bisect.insort(rooms, (room - taken, number))
            found.append((start, taken, continues or taken < length))
            where.append(number)
            start, length = start + taken, length - taken
    starts, lengths, continue_ = zip(*found, strict=True)
    parts = Parts(np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64), np.array(continue_, dtype=bool))
    return parts, np.array(where)
