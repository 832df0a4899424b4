"""Hand the state of a layer of linear cost from rank to rank: what lcpt_kernels calls an Exchange."""

from __future__ import annotations

import torch
from lcpt_kernels.state import tail_rows
from torch import Tensor

from lcpt.parallel.collectives import all_gather
from lcpt.parallel.sequence import SequenceSlice, shift


class StateExchange:
    """Exchanges what one layer needs in one forward pass, in two collectives whose size the context does not change.

    summaries: of a block, where the state holds summaries of blocks.
    """

    def __init__(self, part: SequenceSlice, block_size: int, local_blocks: int, summaries: int | None = None):
        self.part, self.start = part, part.start
        self._tail = block_size, local_blocks, summaries
        self._shifted: list[Tensor] = []

    def shift(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the keys of the rank before that are not in its state, where its last document goes on here."""
        found = shift(self.part, tensors, [tail_rows(tensors, held, *self._tail) for held in self.part.held])
        self._shifted = [x.flatten()[:0] for x in found.values()]
        return found

    def before(self, S: Tensor, log_decay: Tensor | None) -> Tensor:
        """Return S'_r = Σ_{j < r} exp(Σ_{j < i < r} log_decay_i) S_j: an all-gather, and in backward its transpose."""
        group = self.part.group
        mine = [S.flatten()] if log_decay is None else [S.flatten(), log_decay.flatten()]
        # With what was shifted, all ranks go backwards through both collectives in one order.
        sizes, mine = [len(x) for x in mine], mine + [x.to(S.dtype) for x in self._shifted]
        all_S, *all_decays = all_gather(torch.cat(mine), group.size, group.name)[: group.rank].split(sizes, dim=1)
        all_S = all_S.unflatten(1, S.shape)
        if log_decay is None:
            return all_S.sum(0)
        decays = all_decays[0].unflatten(1, log_decay.shape)
        after = torch.cat((decays[1:], torch.zeros_like(decays[:1])[: len(decays)])).flip(0).cumsum(0).flip(0)
        return (all_S * after.exp()[..., None, None]).sum(0)
