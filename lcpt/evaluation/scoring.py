"""Score windows of documents: the loss of each token that is to be scored, by one rank or by many in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from lcpt.evaluation.windows import Window, stack
from lcpt.model import GPT
from lcpt.model.loss import token_losses
from lcpt.parallel import groups

Scored = tuple[Window, np.ndarray]
Unit = TypeVar("Unit")
Result = TypeVar("Result")


def score(model: GPT, windows: Iterable[Window], batch: int, device: torch.device) -> Iterator[Scored]:
    """Yield (window, -log p of its labels in nats, fp32 [n], 0 where the label is -1), in order, on the first rank.

    Windows of a batch are padded at the end, which a causal model cannot see. Ranks take batches in turn, and the same
    ones at any number of them, so that it changes no figure; all ranks call this with the same windows.
    """
    return _score(windows, batch, partial(_losses, model, device))


def score_with_carried_state(
    model: GPT, documents: Iterable[Window], batch: int, piece: int, device: torch.device
) -> Iterator[Scored]:
    """Score windows that are whole documents, `piece` tokens at a time: each token sees all of its document before it.

    Layers of linear cost hand on a state that does not grow; softmax layers keep every key and value of the document.
    """
    return _score(documents, batch, partial(_losses_piece_by_piece, model, piece, device))


def in_turn(units: Iterable[Unit], work: Callable[[Unit], Result]) -> Iterator[tuple[Unit, Result]]:
    """Do the work of every unit on the ranks in turn; yield (unit, its result), in order, on the first rank alone."""
    remaining, rank = iter(units), groups.rank()
    while together := list(islice(remaining, groups.world_size())):
        results = groups.gather(work(together[rank]) if rank < len(together) else None)
        if results is not None:
            yield from zip(together, results, strict=False)


def _score(windows: Iterable[Window], batch: int, work: Callable[[list[Window]], np.ndarray]) -> Iterator[Scored]:
    remaining = iter(windows)
    batches = iter(lambda: list(islice(remaining, batch)), [])
    for together, losses in in_turn(batches, work):
        for window, row in zip(together, losses, strict=True):
            yield window, row[: len(window.inputs)]


def _losses(model: GPT, device: torch.device, batch: list[Window]) -> np.ndarray:
    inputs, labels = (torch.from_numpy(x).to(device) for x in stack(batch))
    return model.token_losses(inputs, labels).cpu().numpy()


@torch.no_grad()
def _losses_piece_by_piece(model: GPT, piece: int, device: torch.device, batch: list[Window]) -> np.ndarray:
    """Documents of a batch are padded to the longest; what a shorter one's state becomes past its end nobody reads."""
    cache, losses = None, []
    for inputs, labels in zip(*(torch.from_numpy(x).split(piece, dim=1) for x in stack(batch)), strict=True):
        hidden, cache = model.extend(inputs.to(device), cache)
        losses.append(token_losses(hidden, model.head_weight, labels.to(device)).cpu())
    return torch.cat(losses, dim=1).numpy()
