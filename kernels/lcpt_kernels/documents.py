"""Packed documents: one after the other, or a row of them that begins and ends inside longer ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from lcpt_kernels.arguments import check_packed
from lcpt_kernels.plan import Plan
from lcpt_kernels.state import of_summaries

P = ParamSpec("P")
R = TypeVar("R")


def each_document(
    attend_one: Callable[..., Tensor],
    cu_seqlens: Tensor | None,
    tensors: Mapping[str, Tensor | None],
    summaries: Mapping[str, Tensor | None] | None = None,
    block_size: int = 1,
    number: int = 0,
) -> Tensor:
    """Return o of attend_one(**tensors, **summaries); if documents are packed, computed for one document at a time.

    Document n has the tokens cu_seqlens[n] … cu_seqlens[n + 1], and its blocks count from its start. `summaries` have
    `number` rows for each whole block of `block_size` tokens, document after document.
    """
    summaries = summaries or {}
    if cu_seqlens is None:
        return attend_one(**tensors, **summaries)
    run = outside_graphs(_one_by_one)
    return run(attend_one, cu_seqlens, tensors, summaries, block_size, number)


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function as one that torch.compile leaves out: a graph has no loop over lengths that are read from a
    tensor, it would be that of one batch."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _one_by_one(
    attend_one: Callable[..., Tensor],
    cu_seqlens: Tensor,
    tensors: Mapping[str, Tensor | None],
    summaries: Mapping[str, Tensor | None],
    block_size: int,
    number: int,
) -> Tensor:
    first_tensor = next(iter(tensors.values()))
    assert first_tensor is not None
    check_packed(cu_seqlens, *first_tensor.shape[:2])
    ends = cu_seqlens.tolist()
    blocks = [0, *accumulate((stop - start) // block_size for start, stop in pairwise(ends))]
    outputs = []
    for (start, stop), (first, last) in zip(pairwise(ends), pairwise(blocks), strict=True):
        if start < stop:
            document = {name: x if x is None else x[:, start:stop] for name, x in tensors.items()}
            for name, x in summaries.items():
                document[name] = x if x is None else x[:, first * number : last * number]
            outputs.append(attend_one(**document))
    return torch.cat(outputs, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some documents of a row."""

    q: Tensor
    a: Tensor
    keys: dict[str, Tensor]
    cu_seqlens: Tensor | None = None  # None: one document


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of documents, of which the first may go on from before and the last may go on after it."""

    first: Part
    between: Part | None
    last: Part | None  # None: the first one is the last one
    continues: bool  # whether the first one goes on from before

    @classmethod
    def split(
        cls, plan: Plan, q: Tensor, a: Tensor, keys: Mapping[str, Tensor], cu_seqlens: Tensor | None, held: int
    ) -> Row:
        """Return the parts of a row; `held` is the number of tokens of the first document before the row.

        With an empty first document, that of the tokens before ends there, and a document begins with the row. Other
        empty documents are passed over. None: one document, which goes on.
        """
        if cu_seqlens is None:
            return cls(first=Part(q=q, a=a, keys=dict(keys)), between=None, last=None, continues=True)
        ends = cu_seqlens.tolist()
        continues, borders = ends[1] > 0, sorted(set(ends))
        c, r, summaries = plan.block_size, plan.summaries or 0, of_summaries(plan)
        pending = held % c if continues else 0
        blocks = [
            0,
            *((pending + stop) // c if start == 0 else (stop - start) // c for start, stop in pairwise(borders)),
        ]
        rows = [r * block for block in accumulate(blocks)]

        def part(first: int, last: int) -> Part:
            """Return the documents `first` … `last`, without the last."""
            tokens, of_blocks = slice(borders[first], borders[last]), slice(rows[first], rows[last])
            offsets = None
            if last - first > 1:
                offsets = torch.tensor(borders[first : last + 1], device=q.device) - borders[first]
            return Part(
                q=q[:, tokens],
                a=a[:, tokens],
                keys={name: x[:, of_blocks if name in summaries else tokens] for name, x in keys.items()},
                cu_seqlens=offsets,
            )

        number = len(borders) - 1
        return cls(
            first=part(0, 1),
            between=part(1, number - 1) if number > 2 else None,
            last=part(number - 1, number) if number > 1 else None,
            continues=continues,
        )
