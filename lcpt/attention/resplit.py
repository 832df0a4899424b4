"""Share attention whose cost grows with the context: every rank has all keys, and queries of equal causal work.

The N slices of a row are cut into 2N halves. Rank i works on the queries of halves i and 2N − 1 − i, which together see
as many keys on every rank; with its own queries the last rank would have twice the mean. Memory grows with the row, as
the gathered keys do, and nothing grows with its square.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lcpt.parallel.collectives import all_gather, all_to_all
from lcpt.parallel.sequence import SequenceGroup, SequenceSlice


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Describes the queries of one call: consecutive ones of a document, or of several that begin among them."""

    start: int  # the queries' places in the row
    stop: int
    document: int  # where their document begins, or the first of several
    borders: tuple[int, ...] | None = None  # of several documents, `start` and `stop` among them

    @property
    def keys(self) -> slice:
        """The places of the keys that these queries may see."""
        return slice(self.document, self.stop)

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        """Return the borders as lcpt_kernels takes them; None: one document."""
        if self.borders is None:
            return None
        borders = torch.tensor([border - self.start for border in self.borders])
        return borders.to(device, non_blocking=True)  # the host does not wait for the device


def cut_into_pieces(start: int, stop: int, borders: Sequence[int] | None) -> list[Piece]:
    """Cut the queries [start, stop) of a row into what goes on from before and the documents that begin here: at most
    two pieces. borders: of the documents in the row; None: one sequence."""
    if start == stop:
        return []
    if borders is None:
        return [Piece(start=start, stop=stop, document=0)]
    pieces = []
    edges = (start, *borders[bisect_right(borders, start) : bisect_left(borders, stop)], stop)
    document = borders[bisect_right(borders, start) - 1]
    if document < start:
        pieces.append(Piece(start=start, stop=edges[1], document=document))
        edges = edges[1:]
    if len(edges) > 1:
        pieces.append(Piece(start=edges[0], stop=stop, document=edges[0], borders=edges if len(edges) > 2 else None))
    return pieces


def mean_over_ranks(x: Tensor, group: SequenceGroup) -> Tensor:
    """Return the mean over the ranks of a group, without a gradient."""
    return all_gather(x.detach(), group.size, group.name).mean(0)


class Resplit:
    """Exchanges queries, keys and outputs of one layer in one forward pass; all ranks make the same calls.

    Ranks with other documents have other autograd graphs, and could run backwards through the collectives in another
    order, each waiting for another. So every collective takes the end of a thread, an empty tensor, from the one before
    it. `after` is a tensor that all of the layer's earlier collectives went into.
    """

    def __init__(self, part: SequenceSlice, after: Tensor):
        self.part, self.thread = part, after.flatten()[:0]
        ranks, rank = part.group.size, part.group.rank
        self._own = (2 * rank, 2 * rank + 1)
        self._work = (rank, 2 * ranks - 1 - rank)  # the halves whose queries are this rank's to work on
        self._owners = [half // 2 for half in range(2 * ranks)]
        self._workers = [min(half, 2 * ranks - 1 - half) for half in range(2 * ranks)]
        self.pieces = [piece for half in self._work for piece in cut_into_pieces(*self.places(half), part.borders)]

    def places(self, half: int) -> tuple[int, int]:
        """Return the places in the row where a half begins and ends; slices of odd length have a shorter first one."""
        first, tokens = half // 2 * self.part.tokens, self.part.tokens
        return (first + tokens // 2, first + tokens) if half % 2 else (first, first + tokens // 2)

    def queries(self, x: Tensor) -> list[Tensor]:
        """Send x [B, T, ...] of this rank's queries to who works on them: one tensor [B, ·, ...] for each of
        `pieces`. Differentiable where x is."""
        x = self._send(x, self._own, self._workers, self._work, self._owners)
        return list(x.split([piece.stop - piece.start for piece in self.pieces], dim=1))

    def home(self, o: list[Tensor]) -> Tensor:
        """Return the outputs [B, T, ...] of this rank's queries; o: those of `pieces`."""
        return self._send(torch.cat(o, dim=1), self._work, self._owners, self._own, self._workers)

    def keys(self, tensors: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Gather tensors [B, T, ...] of one dtype along T, by name.

        rows: how many of its first rows each rank gives; None: all, as many on every rank.
        """
        group = self.part.group
        rows = (self.part.tokens,) * group.size if rows is None else rows
        most, mine = max(rows), rows[group.rank]
        if most == 0:
            return {name: x[:, :0] for name, x in tensors.items()}
        wide = torch.cat([x[:, :mine].flatten(2) for x in tensors.values()], dim=2)
        wide = F.pad(wide, (0, 0, 0, most - mine))
        flat = all_gather(self._threaded(wide), group.size, group.name)
        gathered, thread = flat.split((wide.numel(), 0), dim=1)
        self._hold(thread)
        gathered = gathered.view(group.size, *wide.shape)
        if mine == most == min(rows):
            whole = gathered.transpose(0, 1).flatten(1, 2)
        else:
            whole = torch.cat([x[:, :count] for x, count in zip(gathered, rows, strict=True)], dim=1)
        widths = [x.shape[2:].numel() for x in tensors.values()]
        return {
            name: found.unflatten(2, x.shape[2:])
            for (name, x), found in zip(tensors.items(), whole.split(widths, dim=2), strict=True)
        }

    def _send(
        self, x: Tensor, halves: tuple[int, int], to: list[int], wanted: tuple[int, int], of: list[int]
    ) -> Tensor:
        """Send x, the rows of two halves, to ranks `to`; return those of the `wanted` ones, from ranks `of`."""
        ranks = self.part.group.size
        lengths = [stop - start for start, stop in map(self.places, range(2 * ranks))]
        rows = dict(zip(halves, x.split([lengths[half] for half in halves], dim=1), strict=True))
        # Ranks in order, and what goes to one of them too.
        sending = sorted(halves, key=lambda half: (to[half], half))
        arriving = sorted(wanted, key=lambda half: (of[half], half))
        row = torch.Size((x.shape[0], *x.shape[2:])).numel()
        sent, received = ([0] * ranks for _ in range(2))
        for half in sending:
            sent[to[half]] += lengths[half] * row
        for half in arriving:
            received[of[half]] += lengths[half] * row
        flat = self._threaded(torch.cat([rows[half].flatten() for half in sending]))
        flat = all_to_all(flat, sent, received, self.part.group.name)
        *pieces, thread = flat.split([*(lengths[half] * row for half in arriving), 0])
        self._hold(thread)
        incoming = {
            half: piece.view(x.shape[0], lengths[half], *x.shape[2:])
            for half, piece in zip(arriving, pieces, strict=True)
        }
        return torch.cat([incoming[half] for half in wanted], dim=1)

    def _threaded(self, x: Tensor) -> Tensor:
        return torch.cat((x.flatten(), self.thread.to(x.dtype))) if x.is_floating_point() else x.flatten()

    def _hold(self, thread: Tensor) -> None:
        if thread.is_floating_point():
            self.thread = thread.flatten().clone()  # a view would keep all that was exchanged
