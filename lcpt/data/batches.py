"""Make batches: that of step k is a pure function of source, seed, k, global batch and context, on any world size."""

from __future__ import annotations

import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
from omegaconf import MISSING

from lcpt.data.errors import DataError
from lcpt.data.mixture import SourceConfig, check_sources
from lcpt.data.sample_source import SampleSource
from lcpt.data.synthetic import SyntheticConfig, is_task

Batch = tuple[np.ndarray, np.ndarray]  # inputs and labels, int64 [sequences, context] each


@dataclass
class DataConfig:
    """Says what to train on.

    path, valid_path: prepared folders, or synthetic:TASK. sources: prepared folders to mix, in place of path. context:
    tokens of a sequence. valid: validation sets {name: path}, in place of valid_path.
    """

    path: Optional[str] = MISSING  # noqa: UP045  OmegaConf reads this annotation on every Python
    valid_path: Optional[str] = None  # noqa: UP045
    context: int = 8192
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    sources: Optional[list[SourceConfig]] = None  # noqa: UP045
    valid: Optional[dict[str, str]] = None  # noqa: UP045

    def __post_init__(self):
        if self.context < 1:
            raise DataError(f"data.context is {self.context}; it must be 1 or more tokens")
        if self.path is None and self.sources is None:
            raise DataError("neither data.path nor data.sources is set; set one of them")
        if self.path is not None and self.sources is not None:
            raise DataError("data.path and data.sources are both set; set one of them to null")
        if self.sources is not None:
            check_sources(self.sources)
        if self.valid_path and self.valid:
            raise DataError("data.valid_path and data.valid are both set; set one of them to null")
        for name, path in self.valid_sets.items():
            if self.valid and not re.fullmatch(r"[^\s/]+", name):
                raise DataError(f"data.valid: {name!r} is no name; take one without blanks and slashes")
            if not isinstance(path, str):
                raise DataError(f"{valid_key(name)} is {path}; it takes one folder or task")
            if is_task(self.path or "") != is_task(path):
                raise DataError(
                    f"{valid_key(name)} is {path} and training takes {self.origin}; take text for both or a "
                    "task for both, which gives fresh samples"
                )

    @property
    def valid_sets(self) -> dict[str, str]:
        """Map each validation set's name to its folder or task, in order; that of valid_path has the name ""."""
        return {"": self.valid_path} if self.valid_path else dict(self.valid or {})

    @property
    def origin(self) -> str:
        """Name the training data, for messages: the path, or each source with its weight."""
        if self.sources is None:
            return self.path or "nothing"
        return f"data.sources {', '.join(f'{source.path} {source.weight}' for source in self.sources)}"


def valid_key(name: str) -> str:
    """Name the key of a validation set, for messages."""
    return f"data.valid.{name}" if name else "data.valid_path"


def rows(source: SampleSource, seed: int, first: int, count: int, context: int) -> Batch:
    """Stack training samples first, first + 1, … Raises DataError when there is none of that context."""
    samples = [source.sample(number, seed, context) for number in range(first, first + count)]
    inputs, labels = zip(*samples, strict=True)
    return np.stack(inputs), np.stack(labels)


def batch(source: SampleSource, seed: int, step: int, sequences: int, context: int) -> Batch:
    """Make the global batch of step 0, 1, 2, …"""
    return rows(source, seed, step * sequences, sequences, context)


def batch_documents(source: SampleSource, seed: int, step: int, sequences: int, context: int) -> list[str]:
    """List the ids of the documents in that batch, each once, in the order in which they occur."""
    samples = range(step * sequences, (step + 1) * sequences)
    return list(dict.fromkeys(name for number in samples for name in source.documents(number, seed, context)))


class Prefetcher:
    """Gives one rank its rows of each step's global batch, reading the next step's ahead in a thread.

    Rank r of W gets rows r·S/W up to (r + 1)·S/W of the S sequences. `scored`: labels ≥ 0 of all S; `waited` sums the
    seconds that callers waited. Raises DataError at once when S is not a multiple of W or there is no such sample.
    """

    def __init__(self, source: SampleSource, seed: int, sequences: int, context: int, rank: int = 0, world: int = 1):
        if sequences % world:
            raise DataError(f"{sequences} sequences a step do not divide among {world} ranks; change the global batch")
        self.scored = sequences * source.scored(context)
        self._source, self._seed, self._context = source, seed, context
        self._sequences, self._count, self._rank = sequences, sequences // world, rank
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[int, Future] | None = None
        self.waited = 0.0

    def get(self, step: int) -> Batch:
        """Return this rank's S / W sequences of any step; those of the step after the last one are ready."""
        began = time.perf_counter()
        if self._ahead is not None and self._ahead[0] == step:
            future = self._ahead[1]
        else:
            future = self._submit(step)
        result = future.result()
        self._ahead = step + 1, self._submit(step + 1)
        self.waited += time.perf_counter() - began
        return result

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self, step: int) -> Future:
        first = step * self._sequences + self._rank * self._count
        return self._thread.submit(rows, self._source, self._seed, first, self._count, self._context)
