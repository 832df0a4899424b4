"""Measure what context is worth: the loss of the same target tokens when the model sees more and more before them.

Loss by position compares different tokens; here only the context differs. The gain of a context is what it takes off
the loss of the smallest one, so that its interval is that of a paired difference.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lcpt.evaluation.intervals import interval_over_documents
from lcpt.evaluation.windows import Window

STRETCHES = 8  # of target tokens in a document
WIDEST = 128  # tokens of a stretch


def default_contexts(longest: int) -> list[int]:
    """List doublings from 512 up to `longest`, or four of them where it is shorter than 4,096."""
    count = max(4, (longest // 512).bit_length())
    return [longest >> n for n in reversed(range(count)) if longest >> n]


def stretch_width(contexts: list[int]) -> int:
    """Return the target tokens of a stretch: few beside the smallest context, which the first of them see less of."""
    return max(1, min(WIDEST, min(contexts) // 4))


def target_windows(document: int, tokens: np.ndarray, contexts: list[int]) -> Iterator[Window]:
    """Yield windows of a document's tokens [n + 1], BOS first, one for each context and each stretch of targets.

    Stretches lie evenly between the longest context and the end of the document; a shorter document has none. The
    targets are the last labels of a window of `context` inputs: they see context - width + 1 … context tokens.
    """
    longest, width = max(contexts), stretch_width(contexts)
    room = len(tokens) - 1 - longest  # for the ends of stretches
    if room < 0:
        return
    ends = longest + np.unique(np.linspace(0, room, min(STRETCHES, room // width + 1)).round().astype(int))
    for context in contexts:
        for end in ends.tolist():
            inputs, labels = tokens[end - context : end], tokens[end - context + 1 : end + 1].copy()
            labels[:-width] = -1
            yield Window(document, inputs, labels)


class ContextGain:
    """Sums the losses of targets, by document and context."""

    def __init__(self, contexts: list[int]):
        self.contexts = contexts
        self.nats: dict[int, dict[int, float]] = {}  # document -> context -> nats
        self.tokens: dict[int, int] = {}  # document -> targets of each context

    def add(self, window: Window, losses: np.ndarray) -> None:
        context = len(window.inputs)
        of_document = self.nats.setdefault(window.document, dict.fromkeys(self.contexts, 0.0))
        of_document[context] += float(losses.sum(dtype=np.float64))
        if context == self.contexts[0]:
            self.tokens[window.document] = self.tokens.get(window.document, 0) + int((window.labels >= 0).sum())

    def row(self, document: int) -> dict | None:
        """Return `context_gain` of a document's record: tokens, and nats of each context; None where it is short."""
        if document not in self.nats:
            return None
        nats = {str(context): value for context, value in self.nats[document].items()}
        return {"tokens": self.tokens[document], "nats": nats}


def report(records: list[dict]) -> dict:
    """Compute from documents' records: documents, targets, and of contexts the loss and the gain with intervals."""
    rows = [record["context_gain"] for record in records if "context_gain" in record]
    tokens = np.array([row["tokens"] for row in rows])
    nats = {int(context): np.array([row["nats"][context] for row in rows]) for context in rows[0]["nats"]}
    smallest, contexts = nats[min(nats)], []
    for context in sorted(nats):
        saved = smallest - nats[context]
        contexts.append(
            {
                "context": context,
                "loss": float(nats[context].sum() / tokens.sum()),
                "interval": interval_over_documents(nats[context], tokens),
                "gain": float(saved.sum() / tokens.sum()),
                "gain_interval": interval_over_documents(saved, tokens) if context > min(nats) else None,
            }
        )
    return {"documents": len(rows), "targets": int(tokens.sum()), "contexts": contexts}
