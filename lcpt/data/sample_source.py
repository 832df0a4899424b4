"""Define what training draws its samples from: a prepared folder, several, or a task, which look alike to the loop."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class Drawn(NamedTuple):
    """Says how much of a folder or task some samples have used."""

    tokens: int
    epochs: float | None  # None: it has no end


class SampleSource(Protocol):
    """Gives samples 0, 1, 2, …, each a pure function of its number, seed, context and the source's fingerprint."""

    vocab_size: int
    fingerprint: str  # two sources that differ in any sample differ in it
    tokenizer_sha256: str | None  # None: the tokens are not text
    attachments: dict[str, Path]  # name -> file that must lie beside a model trained on it: the tokenizer

    def scored(self, context: int) -> int:
        """Count the labels ≥ 0 of a sample, the same in each. Raises DataError if no sample has that context."""

    def sample(self, number: int, seed: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, labels), int64 [context] each; labels are -1 where nothing is to be predicted."""

    def documents(self, number: int, seed: int, context: int) -> list[str]:
        """List the documents of that sample: where to look when its loss is bad."""

    def drawn(self, samples: int, context: int) -> dict[str, Drawn]:
        """Count what the first `samples` samples use of each folder or task, by its path."""
