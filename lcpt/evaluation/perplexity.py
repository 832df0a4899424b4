"""Measure loss, perplexity and bits per byte on whole documents, from one record a document."""

from __future__ import annotations

import math

import numpy as np

from lcpt.evaluation.intervals import interval_over_documents
from lcpt.evaluation.positions import Positions, last_edge, loss_by_position
from lcpt.evaluation.windows import Window


class DocumentRecords:
    """Sums the losses of scored windows document by document: every figure is computed from these records."""

    def __init__(self, vocab_size: int):
        self.sums: dict[int, list] = {}  # document -> tokens, bytes, nats
        self.positions = Positions(vocab_size)

    def add(self, window: Window, losses: np.ndarray) -> None:
        scored = window.labels >= 0
        sums = self.sums.setdefault(window.document, [0, 0.0, 0.0])
        for n, value in enumerate((int(scored.sum()), window.bytes, float(losses[scored].sum(dtype=np.float64)))):
            sums[n] += value
        self.positions.add(window.document, window.labels, losses)

    def rows(self, identifiers: list[str]) -> list[dict]:
        """Return the record of each document: id, tokens, bytes, nats and by_position, as docs/contract.md says."""
        rows = []
        for number, identifier in enumerate(identifiers):
            tokens, n_bytes, nats = self.sums.get(number, (0, 0.0, 0.0))
            sums = {"tokens": tokens, "bytes": round(n_bytes), "nats": nats}
            rows.append({"id": identifier, **sums, "by_position": self.positions.rows(number)})
        return rows

    def unigram_losses(self, records: list[dict]) -> list[float]:
        """Compute the loss of a model that sees no context in each bin of the records' loss_by_position."""
        return self.positions.unigram_losses(last_edge(records))


def report(records: list[dict]) -> dict:
    """Compute from documents' records what evaluate.py reports of them.

    tokens_scored, bytes_scored, loss (nats a token), perplexity, bits_per_byte with its 95 % interval over documents
    (None of one), how many of them were scored, loss_by_position and the number of windows that it is of.
    """
    tokens, n_bytes, nats = (sum(record[key] for record in records) for key in ("tokens", "bytes", "nats"))
    interval = interval_over_documents([r["nats"] for r in records], [r["bytes"] for r in records])
    bins, windows = loss_by_position(records)
    return {
        "tokens_scored": tokens,
        "bytes_scored": n_bytes,
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": bits_per_byte(nats, n_bytes),
        "bits_per_byte_interval": None if interval is None else [end / math.log(2) for end in interval],
        "documents_scored": sum(record["tokens"] > 0 for record in records),
        "loss_by_position": bins,
        "position_windows": windows,
    }


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Turn a loss of so many nats over a text of so many bytes into bits per byte."""
    return nats / n_bytes / math.log(2)
