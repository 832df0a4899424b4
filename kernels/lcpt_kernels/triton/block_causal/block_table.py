"""Which tokens a program works on: one table for dense and for packed sequences, made on the device without a wait."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """N blocks of at most `size` tokens, in the order of their documents; rows of no document are empty blocks."""

    table: Tensor  # [N, 5] int32: batch; first token, the one after the last; the same of its document
    documents: Tensor  # [docs, 2] int32: its first block, the one after its last
    ends: Tensor  # [docs a batch + 1] int64: where documents begin and end, the same in each batch
    size: int

    @property
    def count(self) -> int:
        return self.table.shape[0]

    def of_tokens(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each token [T]: its block's first token, the one after its block's last, the one after its document's
        last; and its block's row of the table [B, T]."""
        t = torch.arange(tokens, device=self.ends.device)
        document = torch.searchsorted(self.ends[1:], t, right=True).clamp_(max=len(self.ends) - 2)
        begin, end = self.ends[document], self.ends[document + 1]
        number = (t - begin) // self.size
        first = begin + number * self.size
        rows = self.documents[:, 0].long().unflatten(0, (-1, len(self.ends) - 1))[:, document] + number
        return first, torch.minimum(first + self.size, end), end, rows

    def of_summaries(self, batch: int, summaries: int) -> Tensor:
        """Like `table`, of rows of which each whole block of one of `batch` sequences has the next `summaries`."""
        sequence, first, stop, _, _ = self.table.unflatten(0, (batch, self.count // max(batch, 1))).unbind(2)
        whole = (stop - first == self.size).int()
        after = whole.cumsum(1) * summaries
        begin, end = torch.zeros_like(after), after[:, -1:].expand_as(after)
        return torch.stack((sequence, after - whole * summaries, after, begin, end), dim=2).flatten(0, 1).int()


@lru_cache(maxsize=64)
def dense(batch: int, tokens: int, size: int, device: torch.device, to_the_end: bool) -> Blocks:
    """`batch` sequences of as many tokens. to_the_end: up to the block that the next token will be in."""
    number = tokens // size + 1 if to_the_end else -(-tokens // size)
    first = torch.arange(number, device=device) * size
    columns = (first, (first + size).clamp(max=tokens), torch.zeros_like(first), torch.full_like(first, tokens))
    of_batch = torch.arange(batch, device=device)
    table = torch.stack([of_batch.repeat_interleave(number), *(x.repeat(batch) for x in columns)], dim=1)
    documents = torch.stack((of_batch * number, (of_batch + 1) * number), dim=1)
    return Blocks(table.int(), documents.int(), torch.tensor([0, tokens], device=device), size)


def packed(cu_seqlens: Tensor, tokens: int, size: int) -> Blocks:
    """Documents cu_seqlens[n] … cu_seqlens[n + 1] of one sequence. As many rows as there can be: the host does not
    read cu_seqlens, so that it need not wait for the device."""
    ends = cu_seqlens.long()
    count = (ends.diff() + size - 1) // size
    after = count.cumsum(0)  # [docs]: the block after a document's last
    block = torch.arange(tokens // size + len(count), device=ends.device)
    document = torch.searchsorted(after, block, right=True).clamp_(max=len(count) - 1)
    begin, end = ends[document], ends[document + 1]
    first = torch.minimum(begin + (block - (after - count)[document]) * size, end)
    table = torch.stack((torch.zeros_like(block), first, torch.minimum(first + size, end), begin, end), dim=1)
    return Blocks(table.int(), torch.stack((after - count, after), dim=1).int(), ends, size)
