"""What training draws its samples from: a prepared folder or a task, which look alike to the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np


class Source(Protocol):
    """Sample number 0, 1, 2, … of a seed and a context is a pure function of them and of the fingerprint."""

    vocab_size: int
    fingerprint: str  # another one wherever any sample is another
    tokenizer_sha256: str | None  # None: its tokens are no text
    attachments: dict[str, Path]  # name -> file that must lie beside a model trained on it: the tokenizer

    def scored(self, context: int) -> int:
        """How many labels of a sample are ≥ 0, the same in each. Raises DataError if none has that context."""

    def sample(self, number: int, seed: int, context: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels), int64 [context] each; labels are -1 where nothing is to be predicted."""

    def documents(self, number: int, seed: int, context: int) -> list[str]:
        """Where to look when that sample makes trouble."""
