"""Cut long documents for a model of bounded context: every token is scored once, with context before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Holds inputs and labels int64 [n ≤ context]; labels are -1 where a token is context only.

    known: tokens before these that the model has seen, when it carries its state from piece to piece.
    """

    document: int
    inputs: np.ndarray
    labels: np.ndarray
    known: int = 0


def stack(batch: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """Stack inputs and labels int64 [B, longest], padded at the end, where the labels are -1."""
    length = max(len(window.inputs) for window in batch)
    inputs = [np.pad(w.inputs, (0, length - len(w.inputs))) for w in batch]
    labels = [np.pad(w.labels, (0, length - len(w.labels)), constant_values=-1) for w in batch]
    return np.stack(inputs), np.stack(labels)


def windows(document: int, tokens: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Cut tokens [n + 1], BOS first, into windows that begin `stride` apart; all but BOS are scored.

    stride = context: disjoint windows, each but the first knowing one token before its own. A smaller stride gives
    every scored token at least context - stride tokens of context, at context/stride times the cost.
    """
    end = 0  # labels before this one are scored
    for begin in range(0, len(tokens) - 1, stride):
        inputs = tokens[begin : begin + context + 1][:-1]
        labels = tokens[begin + 1 : begin + context + 1].copy()
        labels[: max(0, end - begin)] = -1
        end = begin + len(inputs)
        yield Window(document, inputs, labels)
        if end == len(tokens) - 1:
            return
