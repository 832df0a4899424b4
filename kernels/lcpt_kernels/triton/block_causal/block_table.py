"""The table of blocks that programs take their tokens from, for dense and for packed sequences. It is made on the
device, so the host does not wait."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """N blocks of at most `size` tokens, in the order of their documents. Rows beyond the last document are empty."""

    table: Tensor  # [N, 5] int32: batch, start and end of the block's tokens, start and end of its document's
    documents: Tensor  # [docs, 2] int32: start and end of the document's blocks
    ends: Tensor  # [docs of a sequence + 1] int64: where documents start and end, the same in each sequence
    size: int

    @property
    def count(self) -> int:
        return self.table.shape[0]

    def token_blocks(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return for each token [T] the start and the end of its block and the end of its document, and [B, T] its
        block's row of the table."""
        t = torch.arange(tokens, device=self.ends.device)
        document = torch.searchsorted(self.ends[1:], t, right=True).clamp_(max=len(self.ends) - 2)
        begin, end = self.ends[document], self.ends[document + 1]
        number = (t - begin) // self.size
        first = begin + number * self.size
        rows = self.documents[:, 0].long().unflatten(0, (-1, len(self.ends) - 1))[:, document] + number
        return first, torch.minimum(first + self.size, end), end, rows

    def summary_table(self, batch: int, summaries: int) -> Tensor:
        """Return a table like `table` of summaries, [N, 5]: each whole block of a sequence has the next `summaries`
        rows, other blocks have none."""
        sequence, first, stop, _, _ = self.table.unflatten(0, (batch, self.count // max(batch, 1))).unbind(2)
        whole = (stop - first == self.size).int()
        after = whole.cumsum(1) * summaries
        begin, end = torch.zeros_like(after), after[:, -1:].expand_as(after)
        return torch.stack((sequence, after - whole * summaries, after, begin, end), dim=2).flatten(0, 1).int()


@lru_cache(maxsize=64)
def dense(batch: int, tokens: int, size: int, device: torch.device, to_the_end: bool) -> Blocks:
    """Return the blocks of `batch` sequences of `tokens` tokens; with to_the_end, up to the next token's block."""
    number = tokens // size + 1 if to_the_end else -(-tokens // size)
    first = torch.arange(number, device=device) * size
    columns = (first, (first + size).clamp(max=tokens), torch.zeros_like(first), torch.full_like(first, tokens))
    sequence = torch.arange(batch, device=device)
    table = torch.stack([sequence.repeat_interleave(number), *(x.repeat(batch) for x in columns)], dim=1)
    documents = torch.stack((sequence * number, (sequence + 1) * number), dim=1)
    return Blocks(table.int(), documents.int(), torch.tensor([0, tokens], device=device), size)


def packed(cu_seqlens: Tensor, tokens: int, size: int) -> Blocks:
    """Return the blocks of the documents cu_seqlens[n] … cu_seqlens[n + 1] of one sequence.

    The table has as many rows as there can be: the host does not read cu_seqlens, so it does not wait for the device.
    """
    ends = cu_seqlens.long()
    count = (ends.diff() + size - 1) // size
    after = count.cumsum(0)  # [docs]: the block after a document's last
    block = torch.arange(tokens // size + len(count), device=ends.device)
    document = torch.searchsorted(after, block, right=True).clamp_(max=len(count) - 1)
    begin, end = ends[document], ends[document + 1]
    first = torch.minimum(begin + (block - (after - count)[document]) * size, end)
    table = torch.stack((torch.zeros_like(block), first, torch.minimum(first + size, end), begin, end), dim=1)
    return Blocks(table.int(), torch.stack((after - count, after), dim=1).int(), ends, size)
