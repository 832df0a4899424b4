"""Validate during training on a fixed set of windows, the same for every step, world size, batch and run.seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from lcpt.data import Corpus, DataError, Task, open_tokenizer
from lcpt.evaluation.perplexity import bits_per_byte
from lcpt.evaluation.windows import Window, stack, text_bytes, windows
from lcpt.parallel import groups
from lcpt.parallel.sequence import SequenceGroup, SequenceSlice
from lcpt.training.preemption import Preemption
from lcpt.training.watchdog import STARTUP_TIMEOUT_S, Watchdog

SHORTEST = 32  # positions to which a window is padded at least: kernels work on tiles of that size
PIECE = 2**20  # tokens of a document that are read at once: a document may be a whole corpus
MOST_ROWS = 64  # short windows for one long one of a batch: a GPU is busy then, and its grids have room for them


class Validation:
    """Scores `tokens` labels of a corpus, or samples of that many tokens of a task, in windows of `context`.

    batch: windows of the full context that a forward pass holds. group: ranks that share windows, where a slice has
    `least_slice` tokens or more.
    """

    def __init__(
        self,
        source: Corpus | Task,
        tokens: int,
        context: int,
        batch: int,
        group: SequenceGroup | None = None,
        least_slice: int = 1,
    ):
        chosen = held_out(source, tokens, context)
        self.batches = list(_batches(chosen, context, batch, group or SequenceGroup(), least_slice))
        self._known_shapes: set[tuple[int, ...]] = set()
        self.bytes = round(sum(window.bytes for window in chosen))  # of all ranks; a task has none

    @torch.no_grad()
    def run(
        self, model, device: torch.device, watch: Watchdog, preemption: Preemption, place: str = "validation"
    ) -> dict[str, float] | None:
        """Return valid_loss (nats a label), valid_tokens_scored, and of text valid_bits_per_byte, valid_bytes_scored.

        They are those of the windows of all ranks, all of which call it. None if any rank was asked to leave before
        the last batch. place: what the watchdog calls it.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats and labels
        for number, (inputs, labels, part) in enumerate(self.batches):
            # A shape that is new may have to be compiled, and before the first step the start is not over.
            usual = inputs.shape in self._known_shapes and not watch.is_starting
            self._known_shapes.add(inputs.shape)
            watch.heartbeat(f"batch {number} of {place}", None if usual else STARTUP_TIMEOUT_S)
            if any(groups.all_reduce_sum(bool(preemption.requested_by), device=device)):
                return None
            tensors = (torch.from_numpy(x).to(device) for x in (inputs, labels))
            loss, count = model(next(tensors), labels=next(tensors), part=part)
            sums += torch.stack((loss, count))
        nats, scored = groups.all_reduce_sum(*sums, device=device)
        measured = {"valid_loss": nats / scored, "valid_tokens_scored": int(scored)}
        if self.bytes:
            measured |= {"valid_bits_per_byte": bits_per_byte(nats, self.bytes), "valid_bytes_scored": self.bytes}
        return measured


def validate(
    validations: Mapping[str, Validation],
    model,
    device: torch.device,
    watch: Watchdog,
    preemption: Preemption,
    place: str = "validation",
) -> dict[str, float] | None:
    """Run each validation -> its measures as "valid_loss/NAME" …, and those of the first as "valid_loss" … too.

    One without a name has these alone. None if any rank was asked to leave.
    """
    row: dict[str, float] = {}
    for name, validation in validations.items():
        measured = validation.run(model, device, watch, preemption, f"{place} on {name}" if name else place)
        if measured is None:
            return None
        named = {f"{key}/{name}": value for key, value in measured.items()} if name else {}
        row = (row or measured) | named
    return row


def held_out(source: Corpus | Task, tokens: int, context: int) -> list[Window]:
    """Choose windows of `tokens` labels spread evenly over a corpus's documents, or a task's first samples."""
    if isinstance(source, Corpus):
        return list(spread_windows(source, tokens, context))
    samples = (source.sample(number, 0, context) for number in range(max(1, tokens // context)))
    return [Window(number, sample.inputs, sample.labels) for number, sample in enumerate(samples)]


def spread_windows(corpus: Corpus, tokens: int, context: int) -> Iterator[Window]:
    """Yield disjoint windows of the corpus's documents, evenly spaced, as few as hold `tokens` labels; or all.

    Raises DataError when no document has a label.
    """
    numbers, begins = choose_windows(corpus.document_lengths() - 1, tokens, context)
    if not len(numbers):
        raise DataError(f"{corpus.folder}: no document has a token to score; validate on other data")
    token_bytes = open_tokenizer(corpus.tokenizer).token_bytes()
    opened = None
    for number, begin in zip(numbers.tolist(), begins.tolist(), strict=True):
        if number != opened:
            opened, (_, start, stop, n_bytes) = number, corpus.document_place(number)
            pieces = (corpus.read(i, min(i + PIECE, stop)) for i in range(start + 1, stop, PIECE))
            text = text_bytes(pieces, n_bytes, token_bytes)
        piece = corpus.read(start + begin, min(start + begin + context + 1, stop))
        yield from windows(number, piece, context, context, text)


def choose_windows(labels: np.ndarray, tokens: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose evenly among the disjoint windows of documents that have `labels` int [documents] labels.

    Returns the document and the first label of each, int64 [chosen]. They hold `tokens` labels, which one window fewer
    does not, or are all. Only windows that are tried are formed: there may be very many.
    """
    ends = np.cumsum(-(-labels // context))  # windows up to each document's last
    everything = int(ends[-1])

    def spread(count: int) -> tuple[np.ndarray, np.ndarray]:
        picks = np.linspace(0, everything - 1, count).round().astype(np.int64)
        documents = np.searchsorted(ends, picks, side="right")
        firsts = ends[documents] + labels[documents] // -context
        return documents, (picks - firsts) * context

    def enough(count: int) -> bool:
        documents, begins = spread(count)
        return int(np.minimum(labels[documents] - begins, context).sum()) >= tokens

    few, many = 0, min(everything, -(-tokens // context))
    while many < everything and not enough(many):
        few, many = many, min(everything, 2 * many)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return spread(many)


def _batches(
    chosen: list[Window], context: int, batch: int, group: SequenceGroup, least_slice: int
) -> Iterator[tuple[np.ndarray, np.ndarray, SequenceSlice | None]]:
    """Yield this rank's inputs and labels, and the slice that they are where ranks share windows.

    All ranks get the same shapes: under ZeRO-3 a forward pass is a collective. Windows are padded to a power of two, so
    that there are few shapes to compile, and short ones share a pass.
    """
    by_length: dict[int, list[Window]] = {}
    for window in chosen:
        length = min(context, max(SHORTEST, 1 << (len(window.inputs) - 1).bit_length()))
        by_length.setdefault(length, []).append(window)
    for length, alike in sorted(by_length.items()):
        shared = length % group.size == 0 and length // group.size >= least_slice
        part = group.slice(length) if shared else None
        rank, ranks = (group.data_rank, group.data_ranks) if part else (groups.rank(), groups.world_size())
        mine = alike[rank::ranks]
        mine += [_unscored(alike[0])] * (-(-len(alike) // ranks) - len(mine))
        own = slice(part.first, part.first + part.tokens) if part else slice(None)
        rows = batch * min(context // length, MOST_ROWS)
        for i in range(0, len(mine), rows):
            inputs, labels = stack(mine[i : i + rows], length)
            yield inputs[:, own], labels[:, own], part


def _unscored(window: Window) -> Window:
    return window._replace(labels=np.full_like(window.labels, -1))
