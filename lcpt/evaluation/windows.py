"""Cut long documents for a model of bounded context: every token is scored once, with context before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Holds inputs and labels int64 [n ≤ context]; labels are -1 where a token is context only.

    bytes: UTF-8 bytes of the text that its scored labels stand for; 0 where there is no text.
    """

    document: int
    inputs: np.ndarray
    labels: np.ndarray
    bytes: float = 0.0


class TextBytes(NamedTuple):
    """Counts the UTF-8 bytes of a document's text that some of its tokens stand for."""

    token_bytes: np.ndarray  # int64 [vocab_size], what each decodes to
    scale: float  # bytes of the text for one of these

    def of(self, tokens: np.ndarray) -> float:
        return float(self.token_bytes[tokens].sum() * self.scale)


def stack(batch: list[Window], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Stack inputs and labels int64 [B, length], padded at the end, where the labels are -1.

    length: that of the longest window, unless given.
    """
    length = length or max(len(window.inputs) for window in batch)
    inputs = [np.pad(w.inputs, (0, length - len(w.inputs))) for w in batch]
    labels = [np.pad(w.labels, (0, length - len(w.labels)), constant_values=-1) for w in batch]
    return np.stack(inputs), np.stack(labels)


def windows(
    document: int,
    tokens: np.ndarray,
    context: int,
    stride: int,
    text: TextBytes | None = None,
    *,
    full_last: bool = False,
) -> Iterator[Window]:
    """Cut tokens [n + 1], BOS first, into windows that begin `stride` apart; all but BOS are scored.

    stride = context: disjoint windows, each but the first knowing one token before its own. A smaller stride gives
    every scored token at least context - stride tokens of context, at context/stride times the cost.
    text: counts the bytes of a window; without it they are 0.
    full_last: the last window of a document begins earlier, so that it is as long as the others, as in
    lm-evaluation-harness; what others scored is its context.
    """
    end = 0  # labels before this one are scored
    for begin in range(0, len(tokens) - 1, stride):
        if full_last:
            begin = max(0, min(begin, len(tokens) - 1 - context))
        inputs = tokens[begin : begin + context + 1][:-1]
        labels = tokens[begin + 1 : begin + context + 1].copy()
        labels[: max(0, end - begin)] = -1
        end = begin + len(inputs)
        n_bytes = text.of(labels[labels >= 0]) if text else 0.0
        yield Window(document, inputs, labels, bytes=n_bytes)
        if end == len(tokens) - 1:
            return


def text_bytes(pieces: Iterable[np.ndarray], n_bytes: int, token_bytes: np.ndarray) -> TextBytes:
    """Count for a document whose tokens without BOS are `pieces` and whose text has `n_bytes`.

    token_bytes int64 [vocab_size] is what each token decodes to. A tokenizer that gives texts back exactly has just
    that. One that normalises changes the length, so its tokens share the text in proportion; where all of them decode
    to nothing, alike.
    """
    decoded = tokens = 0
    for piece in pieces:
        decoded += int(token_bytes[piece].sum())
        tokens += len(piece)
    if decoded:
        return TextBytes(token_bytes, n_bytes / decoded)
    return TextBytes(np.ones_like(token_bytes), n_bytes / max(tokens, 1))
