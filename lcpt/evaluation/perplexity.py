"""Measure loss, perplexity and bits per byte of a model on whole documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from lcpt.evaluation.intervals import interval_over_documents
from lcpt.evaluation.windows import Window, stack
from lcpt.model import GPT

Scored = tuple[Window, np.ndarray]


def score(model: GPT, windows: Iterable[Window], batch: int, device: torch.device) -> Iterator[Scored]:
    """Yield (window, -log p of its labels in nats, fp32 [n], 0 where the label is -1), in order.

    Windows of a batch are padded at the end, which a causal model cannot see.
    """
    pending: list[Window] = []
    for window in windows:
        pending.append(window)
        if len(pending) == batch:
            yield from _score_batch(model, pending, device)
            pending = []
    if pending:
        yield from _score_batch(model, pending, device)


def _score_batch(model: GPT, pending: list[Window], device: torch.device) -> Iterator[Scored]:
    inputs, labels = (torch.from_numpy(x).to(device) for x in stack(pending))
    losses = model.token_losses(inputs, labels).float().cpu().numpy()
    for window, row in zip(pending, losses, strict=True):
        yield window, row[: len(window.inputs)]


class Tally:
    """Sums over scored windows and reports on them, as docs/contract.md says."""

    def __init__(self, context: int):
        self.context = context
        self.documents: list[int] = []  # of each window
        self.nats: list[float] = []
        self.tokens: list[int] = []
        self.bytes: list[float] = []
        self.position_nats: np.ndarray = np.zeros(context)
        self.position_tokens: np.ndarray = np.zeros(context, dtype=np.int64)

    def add(self, window: Window, losses: np.ndarray) -> None:
        scored = window.labels >= 0
        self.documents.append(window.document)
        self.nats.append(losses[scored].sum(dtype=np.float64))
        self.tokens.append(int(scored.sum()))
        self.bytes.append(window.bytes)
        first, end = window.known, window.known + len(losses)
        if end > self.context:
            self._lengthen(end)
        self.position_nats[first:end] += losses * scored
        self.position_tokens[first:end] += scored

    def report(self) -> dict:
        """Report on the windows so far.

        tokens_scored, bytes_scored, loss (nats a token), perplexity, bits_per_byte with its 95 % interval over
        documents (None of one), how many of them were scored, and loss_by_position: the loss where a scored token could
        look back on start … end - 1 tokens of its window, or of its document when the state is carried."""
        nats, tokens, n_bytes = sum(self.nats), sum(self.tokens), round(sum(self.bytes))
        return {
            "tokens_scored": tokens,
            "bytes_scored": n_bytes,
            "loss": nats / tokens,
            "perplexity": math.exp(nats / tokens),
            "bits_per_byte": bits_per_byte(nats, n_bytes),
            "bits_per_byte_interval": self._interval(),
            "documents_scored": int((self._of_documents(self.tokens) > 0).sum()),
            "loss_by_position": self._loss_by_position(),
        }

    def by_document(self, identifiers: list[str]) -> list[dict]:
        """Sum over the windows of each document: id, tokens, bytes and nats, from which every figure can be made."""
        count = len(identifiers)
        tokens, n_bytes, nats = (self._of_documents(x, count) for x in (self.tokens, self.bytes, self.nats))
        return [
            {"id": name, "tokens": int(tokens[n]), "bytes": round(n_bytes[n]), "nats": float(nats[n])}
            for n, name in enumerate(identifiers)
        ]

    def _lengthen(self, context: int) -> None:
        more = context - self.context
        sums = self.position_nats, self.position_tokens
        self.position_nats, self.position_tokens = (np.pad(x, (0, more)) for x in sums)
        self.context = context

    def _of_documents(self, values: list, count: int = 0) -> np.ndarray:
        """Sum values of windows over each document, float64 [documents]."""
        return np.bincount(np.array(self.documents, dtype=np.int64), values, count)

    def _interval(self) -> list[float] | None:
        interval = interval_over_documents(self._of_documents(self.nats), self._of_documents(self.bytes))
        return None if interval is None else [end / math.log(2) for end in interval]

    def _loss_by_position(self) -> list[dict]:
        bins = []
        for start, end in itertools.pairwise(position_edges(self.context)):
            tokens = int(self.position_tokens[start:end].sum())
            if tokens:
                loss = float(self.position_nats[start:end].sum() / tokens)
                bins.append({"start": start, "end": end, "tokens": tokens, "loss": loss})
        return bins


def position_edges(context: int) -> list[int]:
    """List 0, 16, 32, 64 … up to an eighth of the context, then its eighths."""
    doubling = [16 * 2**i for i in range(context.bit_length()) if 16 * 2**i < context / 8]
    return sorted({0, *doubling, *(max(1, round(context * part / 8)) for part in range(1, 9))})


def bits_per_byte(nats: float, n_bytes: float) -> float:
    return nats / n_bytes / math.log(2)
