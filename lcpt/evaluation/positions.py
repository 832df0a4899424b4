"""Tell loss by position: how it falls with the tokens that a model can look back on, over the same texts in every bin.

Bins have fixed edges, so that two corpora, contexts and models share them. A window counts only if it reaches the last
bin: otherwise late bins would hold other texts than early ones, and a model that sees no context, the unigram, would
seem to gain from it. Its own loss is told beside each bin: where the bins are comparable, it is flat.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np

from lcpt.evaluation.intervals import interval_over_documents

LONGEST = 2**40
# 0, 1, 2, 3, 4, 6, 8, 12, 16, 24 …: powers of two and the halves between them.
EDGES = (0, 1, *sorted(2**k * half // 2 for k in range(1, 40) for half in (2, 3)))


def position_edges(length: int) -> list[int]:
    """List the edges up to the first that is ≥ length."""
    return list(EDGES[: next(n for n, edge in enumerate(EDGES) if edge >= length) + 1])


def reached(length: int) -> int:
    """Return the largest edge ≤ length."""
    return max(edge for edge in position_edges(length) if edge <= length)


class Positions:
    """Sums the losses of windows over bins of positions, document by document, and counts the tokens in each bin.

    Windows of which a token is not scored, as those of a stride are but for a document's first, are left out: their
    early bins would be empty. Holds [bins, vocab_size] counts for each of the few edges that windows reach.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.sums: dict[int, dict[int, np.ndarray]] = defaultdict(dict)  # document -> edge reached -> nats of each bin
        self.windows: dict[tuple[int, int], int] = defaultdict(int)  # (document, edge reached) -> how many
        self.counts: dict[int, np.ndarray] = {}  # edge reached -> how often each token stood in each bin
        self.everywhere = np.zeros(vocab_size, dtype=np.int64)

    def add(self, document: int, labels: np.ndarray, losses: np.ndarray) -> None:
        scored = labels >= 0
        self.everywhere += np.bincount(labels[scored], minlength=self.vocab_size)
        edge = reached(len(labels))
        if not edge or not scored.all():
            return
        edges, of_document = position_edges(edge), self.sums[document]
        of_document[edge] = of_document.get(edge, 0) + np.add.reduceat(losses[:edge], edges[:-1], dtype=np.float64)
        self.windows[document, edge] += 1
        if edge not in self.counts:
            self.counts[edge] = np.zeros((len(edges) - 1, self.vocab_size), dtype=np.uint32)
        bins = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
        np.add.at(self.counts[edge], (bins, labels[:edge]), 1)

    def rows(self, document: int) -> list[dict]:
        """Return `by_position` of a document's record: reached, windows, and nats of each bin."""
        return [
            {"reached": edge, "windows": self.windows[document, edge], "nats": sums.tolist()}
            for edge, sums in sorted(self.sums.get(document, {}).items())
        ]

    def unigram_losses(self, last: int) -> list[float]:
        """Compute the loss that token frequencies of all scored text have in each bin of windows that reach `last`."""
        nats = -np.log(np.maximum(self.everywhere, 1) / self.everywhere.sum())
        bins = len(position_edges(last)) - 1
        counts = np.sum([rows[:bins] for edge, rows in self.counts.items() if edge >= last], axis=0, dtype=np.float64)
        return (counts @ nats / counts.sum(1)).tolist()


def last_edge(records: list[dict]) -> int:
    """Choose where the bins end: the edge up to which the most tokens are compared, those of windows that reach it."""
    windows: dict[int, int] = defaultdict(int)
    for part in itertools.chain.from_iterable(record["by_position"] for record in records):
        windows[part["reached"]] += part["windows"]
    compared = {edge: edge * sum(n for far, n in windows.items() if far >= edge) for edge in sorted(windows)}
    return max(compared, key=lambda edge: (compared[edge], edge), default=0)


def loss_by_position(records: list[dict]) -> tuple[list[dict], int]:
    """Compute, from the records of documents, (start, end, tokens, loss and its interval of each bin; the windows)."""
    last = last_edge(records)
    edges = position_edges(last)
    parts = [[part for part in record["by_position"] if part["reached"] >= last] for record in records]
    windows = np.array([sum(part["windows"] for part in document) for document in parts])
    nats = np.array([[sum(p["nats"][n] for p in document) for n in range(len(edges) - 1)] for document in parts])
    bins = []
    for n, (start, end) in enumerate(itertools.pairwise(edges)):
        tokens = windows * (end - start)
        total, interval = int(tokens.sum()), interval_over_documents(nats[:, n], tokens)
        loss = float(nats[:, n].sum() / total)
        bins.append({"start": start, "end": end, "tokens": total, "loss": loss, "interval": interval})
    return bins, int(windows.sum())
