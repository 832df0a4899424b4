"""Share sequences among neighbouring ranks: each holds a slice of consecutive tokens, all slices of one length.

Rank r of W is number r % N of the N ranks that share a sequence, and reads the data of data rank r // N of W / N.
DeepSpeed is told nothing of it: to its ZeRO all ranks are alike, and every token counts on one of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from lcpt.parallel import groups
from lcpt.parallel.collectives import all_to_all


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceGroup:
    """Names the ranks that share sequences with this one."""

    size: int = 1
    rank: int = 0  # this one's number among them
    name: str = ""  # of their process group
    data_rank: int = 0
    data_ranks: int = 1

    def slice(self, tokens: int, borders: tuple[int, ...] | None = None) -> SequenceSlice | None:
        """Describe this rank's slice of a row of so many tokens with documents between `borders`, 0 and `tokens` among
        them; None where the row is not shared."""
        return None if self.size == 1 else SequenceSlice(group=self, tokens=tokens // self.size, borders=borders)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSlice:
    """Describes one rank's slice of a sequence, or of a row of packed documents."""

    group: SequenceGroup
    tokens: int  # of each rank's slice
    borders: tuple[int, ...] | None = None  # of the documents in the whole row; None: one sequence

    @property
    def first(self) -> int:
        """The place in the row of this slice's first token."""
        return self.group.rank * self.tokens

    @property
    def held(self) -> tuple[int, ...]:
        """Of each rank, the number of tokens on the ranks before of the document that is first on it; 0 where that
        begins there."""
        firsts = range(0, self.group.size * self.tokens, self.tokens)
        if self.borders is None:
            return tuple(firsts)
        return tuple(first - self.borders[bisect_right(self.borders, first) - 1] for first in firsts)

    @property
    def start(self) -> int:
        """The entry of `held` of this rank."""
        return self.held[self.group.rank]

    @property
    def longest(self) -> int:
        """The number of tokens of the longest document, or of the sequence."""
        if self.borders is None:
            return self.group.size * self.tokens
        return max(stop - start for start, stop in pairwise(self.borders))

    @property
    def local_borders(self) -> list[int]:
        """Those of the documents in this slice, from its first token on: 0, …, tokens."""
        if self.borders is None:
            return [0, self.tokens]
        first, end = self.first, self.first + self.tokens
        inside = self.borders[bisect_right(self.borders, first) : bisect_left(self.borders, end)]
        return [0, *(border - first for border in inside), self.tokens]

    @property
    def cu_seqlens(self) -> Tensor | None:
        """local_borders as lcpt_kernels takes them, on the host, which reads them; None: one sequence."""
        return None if self.borders is None else torch.tensor(self.local_borders)


def join_sequence_group(size: int) -> SequenceGroup:
    """Form the groups of `size` neighbouring ranks; every rank calls it. Raises ValueError where they do not divide."""
    world, rank = groups.world_size(), groups.rank()
    if world % size:
        raise ValueError(
            f"parallel.sequence is {size}, and {world} ranks cannot be divided into groups of {size}; "
            f"take a number that divides {world}"
        )
    name = ""
    for first in range(0, world, size) if size > 1 else ():
        group = dist.new_group(range(first, first + size))  # every rank takes part in forming every group
        if first <= rank < first + size:
            name = group.group_name
    return SequenceGroup(size=size, rank=rank % size, name=name, data_rank=rank // size, data_ranks=world // size)


def shift(part: SequenceSlice, tensors: Mapping[str, Tensor], rows: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
    """Return the last rows of the rank before, by name: rows[i] says how many rank i of the group needs.

    tensors: [B, ≥ rows, ...] each. A rank that needs none gets [B, 0, ...]. All ranks call it; differentiable.
    """
    group = part.group
    wanted = rows[group.rank]
    given = rows[group.rank + 1] if group.rank + 1 < group.size else dict.fromkeys(tensors, 0)
    if not any(count for each in rows for count in each.values()):
        return {name: x[:, :0] for name, x in tensors.items()}
    found: dict[str, Tensor] = {}
    flat: Tensor | None = None
    for dtype in sorted({x.dtype for x in tensors.values()}, key=str):
        alike = {name: x for name, x in tensors.items() if x.dtype == dtype}
        last = [x[:, x.shape[1] - given[name] :].flatten() for name, x in alike.items()]
        # Each rank also sends itself a number of the exchange before, so that all send back in one order. And each
        # receives something, also in backward: a compiler leaves out an exchange of nothing, and others would wait.
        before = next(iter(alike.values())) if flat is None else flat
        kept = before.flatten()[-1:].to(dtype)
        shapes = {name: (x.shape[0], wanted[name], *x.shape[2:]) for name, x in alike.items()}
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        sent, received = [0] * group.size, [0] * group.size
        sent[group.rank] = received[group.rank] = len(kept)
        if group.rank + 1 < group.size:
            sent[group.rank + 1] = sum(map(len, last))
        if group.rank:
            received[group.rank - 1] = sum(sizes)
        flat = all_to_all(torch.cat((kept, *last)), sent, received, group.name)
        for (name, shape), piece in zip(shapes.items(), flat.split([*sizes, len(kept)])[:-1], strict=True):
            found[name] = piece.view(shape)
    return found
