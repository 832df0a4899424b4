"""Define what training draws its samples from: a prepared folder, several, or a task, which look alike to the loop."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class Sample(NamedTuple):
    """Holds one sequence to train on."""

    inputs: np.ndarray  # int64 [context]
    labels: np.ndarray  # int64 [context], -1 where nothing is to be predicted
    starts: np.ndarray | None = None  # where its documents begin, int64, the first 0; None: they are one text
    padding: int = 0  # tokens at the end that belong to no document


class Drawn(NamedTuple):
    """Says how much of a folder or task a run has used."""

    tokens: int  # up to the place in the folder that the run has come to
    epochs: float | None  # None: it has no end
    fingerprint: str
    order: str  # names that in which it is used
    passed: int = 0  # of the tokens, those passed over where the order changed


class SampleSource(Protocol):
    """Gives samples 0, 1, 2, …, each a pure function of its number, seed, context and the source's fingerprint."""

    vocab_size: int
    fingerprint: str  # two sources that differ in any sample differ in it
    tokenizer_sha256: str | None  # None: the tokens are not text
    attachments: dict[str, Path]  # name -> file that must lie beside a model trained on it: the tokenizer

    def check_context(self, context: int) -> None:
        """Raise DataError if no sample has that context."""

    def sample(self, number: int, seed: int, context: int) -> Sample:
        """Return a sample of that context."""

    def documents(self, number: int, seed: int, context: int) -> list[str]:
        """List the documents of that sample: where to look when its loss is bad."""

    def drawn(self, samples: int, context: int) -> dict[str, Drawn]:
        """Count what is used of each folder or task, by its path, after the first `samples` samples."""
