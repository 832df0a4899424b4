"""Cut long documents for a model of bounded context: every token is scored once, with context before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Holds inputs and labels int64 [n ≤ context]; labels are -1 where a token is context only.

    known: tokens before these that the model has seen, when it carries its state from piece to piece.
    bytes: UTF-8 bytes of the text that its scored labels stand for; 0 where there is no text.
    """

    document: int
    inputs: np.ndarray
    labels: np.ndarray
    known: int = 0
    bytes: int = 0


def stack(batch: list[Window], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Stack inputs and labels int64 [B, length], padded at the end, where the labels are -1.

    length: that of the longest window, unless given.
    """
    length = length or max(len(window.inputs) for window in batch)
    inputs = [np.pad(w.inputs, (0, length - len(w.inputs))) for w in batch]
    labels = [np.pad(w.labels, (0, length - len(w.labels)), constant_values=-1) for w in batch]
    return np.stack(inputs), np.stack(labels)


def windows(
    document: int, tokens: np.ndarray, context: int, stride: int, sizes: np.ndarray | None = None
) -> Iterator[Window]:
    """Cut tokens [n + 1], BOS first, into windows that begin `stride` apart; all but BOS are scored.

    stride = context: disjoint windows, each but the first knowing one token before its own. A smaller stride gives
    every scored token at least context - stride tokens of context, at context/stride times the cost.
    sizes: bytes of the n tokens after BOS, from `share_bytes`.
    """
    end = 0  # labels before this one are scored
    for begin in range(0, len(tokens) - 1, stride):
        inputs = tokens[begin : begin + context + 1][:-1]
        labels = tokens[begin + 1 : begin + context + 1].copy()
        labels[: max(0, end - begin)] = -1
        n_bytes = 0 if sizes is None else int(sizes[end : begin + len(inputs)].sum())
        end = begin + len(inputs)
        yield Window(document, inputs, labels, bytes=n_bytes)
        if end == len(tokens) - 1:
            return


def share_bytes(tokens: np.ndarray, n_bytes: int, token_bytes: np.ndarray) -> np.ndarray:
    """Share the `n_bytes` of a document's text among tokens [n + 1], BOS first: int64 [n], their sum is n_bytes.

    token_bytes [vocab_size] is what each token decodes to. A tokenizer that gives texts back exactly shares just that.
    One that normalises changes the length, so its tokens share in proportion; tokens that all decode to nothing share
    alike. Without a token there is no share.
    """
    shares = token_bytes[tokens[1:]]
    if not shares.any():
        shares = np.ones_like(shares)
    ends = np.cumsum(shares)
    scaled = np.rint(ends * (n_bytes / ends[-1])) if len(ends) else ends
    return np.diff(scaled.astype(np.int64), prepend=0)
