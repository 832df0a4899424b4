"""Measure recall in text: loss on tokens that complete a bigram that the model has seen before, and on all others."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from lcpt.evaluation.positions import position_edges
from lcpt.evaluation.windows import Window


class Bigrams(NamedTuple):
    """Holds the bigrams (input, label) of the scored tokens of a window, [n] each."""

    document: int
    codes: np.ndarray  # int64, the same for the same bigram
    distances: np.ndarray  # int64, -1 where the bigram is new
    nats: np.ndarray  # fp32, -log p of the label


class RepeatedBigrams:
    """Splits the losses of scored windows by whether a token repeats a bigram, as Zoology does (arXiv 2312.04927).

    The scored token x[t+1] repeats a bigram if (x[s], x[s+1]) = (x[t], x[t+1]) for an s < t of its window, or of its
    document where the state is carried. Tokens that are context only count as seen. The distance is t - (s+1) for the
    latest such s: tokens from the answer to its question, as in recall.py.

    A model knows frequent bigrams by heart, and needs no memory for them. Zoology leaves out those that are frequent
    in the training data, but a checkpoint does not hold these counts. So the report is on all repeated bigrams, and
    apart on the rare ones, which no other scored document holds. Measured: in windows of 8,192 tokens of five books,
    bigram statistics alone reach a loss of 4.1 on repeated bigrams, 5.9 on other tokens, and 7.1 on the rare ones.

    Holds 20 bytes a scored token until the report.
    """

    def __init__(self) -> None:
        self.longest = 0  # window
        self.parts: list[Bigrams] = []

    def add(self, window: Window, losses: np.ndarray) -> None:
        """Add a window, or with carried state a document, and the losses of its labels, fp32 [n]."""
        codes, scored = bigram_codes(window.inputs, window.labels), window.labels >= 0
        distances = repeat_distances(codes)[scored]
        self.parts.append(Bigrams(window.document, codes[scored], distances, losses[scored]))
        self.longest = max(self.longest, len(codes))

    def report(self) -> dict:
        """Report on the windows so far: of repeated bigrams `tokens`, `loss` (nats a token) and `by_distance`, the
        same of the `rare` ones, `other_tokens` and `other_loss`.

        A loss is None where there are no tokens, and `rare` where there is one document: every bigram would be."""
        codes, distances, nats = (np.concatenate(x) for x in zip(*(part[1:] for part in self.parts), strict=True))
        numbers = [part.document for part in self.parts]
        documents = np.repeat(numbers, [len(part.codes) for part in self.parts])
        repeated = distances >= 0
        rare = repeated & in_one_document(codes, documents)
        edges = position_edges(self.longest)
        return {
            **_by_distance(distances[repeated], nats[repeated], edges),
            "rare": _by_distance(distances[rare], nats[rare], edges) if len(set(numbers)) > 1 else None,
            "other_tokens": int((~repeated).sum()),
            "other_loss": _mean(nats[~repeated]),
        }


def bigram_codes(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Number the bigrams of an input [n] and its next token: int64 [n], the same for the same bigram.

    Labels count at the end alone, where no input follows; a bigram that ends in -1 equals no other."""
    following = np.append(inputs[1:], labels[-1])
    return inputs.astype(np.int64) << 32 | following


def repeat_distances(codes: np.ndarray) -> np.ndarray:
    """Count the tokens between each bigram and its latest earlier occurrence: int64 [n], -1 where there is none.

    Bigrams that overlap, as in three equal tokens, have the distance 0."""
    order = np.argsort(codes, kind="stable")
    again = codes[order[1:]] == codes[order[:-1]]
    earlier, later = order[:-1][again], order[1:][again]
    distances = np.full(len(codes), -1)
    distances[later] = later - earlier - 1
    return distances


def in_one_document(codes: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return bool [n]: whether all bigrams of this code stand in one document. codes, documents: int64 [n]."""
    order = np.argsort(codes)
    codes, documents = codes[order], documents[order]
    starts = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1))
    lowest, highest = (of.reduceat(documents, starts) for of in (np.minimum, np.maximum))
    found = np.empty(len(codes), dtype=bool)
    found[order] = np.repeat(lowest == highest, np.diff(starts, append=len(codes)))
    return found


def _by_distance(distances: np.ndarray, nats: np.ndarray, edges: list[int]) -> dict:
    """Report tokens, loss and by_distance: those where the answer stood start … end - 1 tokens before its question."""
    tokens, sums = (np.histogram(distances, edges, weights=w)[0] for w in (None, nats.astype(np.float64)))
    bins = [
        {"start": start, "end": end, "tokens": int(n), "loss": float(total / n)}
        for (start, end), n, total in zip(itertools.pairwise(edges), tokens, sums, strict=True)
        if n
    ]
    return {"tokens": len(nats), "loss": _mean(nats), "by_distance": bins}


def _mean(nats: np.ndarray) -> float | None:
    return float(nats.mean(dtype=np.float64)) if len(nats) else None
