"""Batches: step k's are a pure function of corpus, seed, k, global batch and context, on any number of ranks."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Optional

import numpy as np
from omegaconf import MISSING

from lcpt.data.errors import DataError
from lcpt.data.order import n_windows, window_start
from lcpt.data.shards import Corpus


@dataclass
class DataConfig:
    """`path`, `valid_path`: prepared folders. `context`: tokens that a sequence is trained on."""

    path: str = MISSING
    valid_path: Optional[str] = None  # noqa: UP045  OmegaConf reads this annotation on every Python
    context: int = 8192

    def __post_init__(self):
        if self.context < 1:
            raise DataError(f"data.context is {self.context}; it must be 1 or more tokens")


def rows(corpus: Corpus, seed: int, first: int, count: int, context: int) -> np.ndarray:
    """int64 [count, context + 1]: training samples first, first + 1, …; labels are the inputs one token later.

    Raises DataError when the corpus is shorter than one window.
    """
    out = np.empty((count, context + 1), dtype=np.int64)
    for row in range(count):
        start = window_start(first + row, corpus.tokens, context, seed, corpus.fingerprint)
        out[row] = corpus.read(start, start + context + 1)
    return out


def batch(corpus: Corpus, seed: int, step: int, sequences: int, context: int) -> np.ndarray:
    """int64 [sequences, context + 1]: the global batch of step 0, 1, 2, …"""
    return rows(corpus, seed, step * sequences, sequences, context)


def batch_documents(corpus: Corpus, seed: int, step: int, sequences: int, context: int) -> list[str]:
    """The ids of the documents in that batch, each once, in the order in which they occur."""
    starts = [
        window_start(sample, corpus.tokens, context, seed, corpus.fingerprint)
        for sample in range(step * sequences, (step + 1) * sequences)
    ]
    return list(dict.fromkeys(name for start in starts for name in corpus.document_ids(start, start + context + 1)))


class Prefetcher:
    """Gives one rank its rows of each step's global batch, reading the next step's ahead in a thread.

    Rank r of W gets rows r·S/W up to (r + 1)·S/W of the S sequences. `waited` sums the seconds that callers waited.
    Raises DataError at once when S is not a multiple of W or the corpus is shorter than one window.
    """

    def __init__(self, corpus: Corpus, seed: int, sequences: int, context: int, rank: int = 0, world: int = 1):
        if sequences % world:
            raise DataError(f"{sequences} sequences a step do not divide among {world} ranks; change the global batch")
        n_windows(corpus.tokens, context)
        self._corpus, self._seed, self._context = corpus, seed, context
        self._sequences, self._count, self._rank = sequences, sequences // world, rank
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[int, Future] | None = None
        self.waited = 0.0

    def get(self, step: int) -> np.ndarray:
        """int64 [S / W, context + 1]; any step may be asked for, the one after the last is ready."""
        began = time.perf_counter()
        ahead, future = self._ahead or (None, None)
        result = (future if ahead == step else self._submit(step)).result()
        self._ahead = step + 1, self._submit(step + 1)
        self.waited += time.perf_counter() - began
        return result

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self, step: int) -> Future:
        first = step * self._sequences + self._rank * self._count
        return self._thread.submit(rows, self._corpus, self._seed, first, self._count, self._context)
