"""Make recall tasks: sequences that ask at the end for what they hold. Only answers are scored.

    mqar               pairs of key and value, then some of the keys again among noise: which value? (Zoology,
                       arXiv 2312.04927)
    selective_copying  tokens scattered over noise, to be given back in order at the end (Mamba, arXiv 2312.00752)
    induction          a run of tokens somewhere in noise, and again at the end: which token comes next?
                       (arXiv 2209.11895)
    needle             one pair in noise, its key as the last token: which value?

Keys and noise that must not be taken for answers come from the lower half of the vocabulary, answers from the upper.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from lcpt.data.errors import DataError
from lcpt.data.sample_source import Drawn, Sample

PREFIX = "synthetic:"


@dataclass
class SyntheticConfig:
    """Says how hard the tasks are."""

    items: Optional[int] = None  # noqa: UP045  to remember, each asked for once; None: a 16th of the context, needle 1
    power: float = 1.0  # mqar asks n places after the pairs with a weight of n^(power - 1); 1: evenly

    def __post_init__(self):
        if self.items is not None and self.items < 1:
            raise DataError(f"data.synthetic.items is {self.items}; it must be ≥ 1")
        if not 0 < self.power <= 1:
            raise DataError(f"data.synthetic.power is {self.power}; it must be > 0 and ≤ 1")


def is_task(path: str) -> bool:
    """Check whether a data path names a task, such as synthetic:mqar."""
    return path.startswith(PREFIX)


class TaskSample(NamedTuple):
    """Holds int64 [context] each; where nothing is asked, label and origin are -1.

    origins: where in the inputs the answer stands.
    """

    inputs: np.ndarray
    labels: np.ndarray
    origins: np.ndarray


class Task:
    """Is a SampleSource without end: the `stream`s of one task have no sample in common.

    Raises DataError for an unknown task.
    """

    attachments: dict[str, Path] = {}
    tokenizer_sha256: str | None = None

    used = 0  # tokens drawn before sample 0

    def __init__(self, path: str, config: SyntheticConfig, vocab_size: int, stream: str):
        self.name, self.vocab_size, self.stream = path, vocab_size, stream
        task = path.removeprefix(PREFIX)
        if task not in TASKS:
            close = difflib.get_close_matches(task, TASKS, n=1)
            hint = f"did you mean {PREFIX}{close[0]}?" if close else f"there are {', '.join(TASKS)}"
            raise DataError(f"{path}: there is no task {task!r}; {hint}")
        self._spec, self._config = TASKS[task], config
        settings = f"{task} items={config.items} power={config.power} vocabulary={vocab_size}"
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()

    def scored(self, context: int) -> int:
        """Count the answers of a sample. Raises DataError where they do not fit the context or the vocabulary."""
        spec, items = self._spec, self._config.items
        if items is None:
            items = int(min(spec.max_items, max(1, context // 16)))
        if items > spec.max_items:
            raise DataError(f"{self.name}: data.synthetic.items is {items}, and it has {spec.max_items:.0f} at most")
        if context < spec.min_context(items):
            raise DataError(
                f"{self.name}: data.synthetic.items {items} need data.context {spec.min_context(items)} or more, "
                f"and it is {context}"
            )
        if self.vocab_size // 2 < items + 1:
            raise DataError(
                f"{self.name}: data.synthetic.items {items} need model.vocab_size {2 * items + 2} or more, "
                f"and it is {self.vocab_size}"
            )
        return items

    def check_context(self, context: int) -> None:
        """Raise DataError where the answers of a sample do not fit the context or the vocabulary."""
        self.scored(context)

    def sample(self, number: int, seed: int, context: int) -> Sample:
        """Return sample 0, 1, 2, …; its labels are -1 where nothing is asked."""
        return Sample(*self.full_sample(self._before(context) + number, seed, context)[:2])

    def full_sample(self, number: int, seed: int, context: int) -> TaskSample:
        rng = _Random(f"{self.fingerprint}/{self.stream}/{seed}/{number}")
        sample = TaskSample(*(np.full(context, -1, dtype=np.int64) for _ in range(3)))
        self._spec.fill(sample, rng, self.scored(context), self.vocab_size, self._config.power)
        return sample

    def documents(self, number: int, seed: int, context: int) -> list[str]:
        return [f"{self.name} sample {self._before(context) + number} of seed {seed}"]

    def drawn(self, samples: int, context: int) -> dict[str, Drawn]:
        tokens = (self._before(context) + samples) * context
        return {self.name: Drawn(tokens, None, self.fingerprint, self.order(context))}

    def order(self, context: int) -> str:
        """Name the order in which samples of that context come."""
        return f"samples of {context}"

    def _before(self, context: int) -> int:
        return -(-self.used // context)


class _Random:
    """Draws random numbers from a name. NumPy keeps Philox's bits stable, but not what `Generator` makes of them."""

    def __init__(self, name: str):
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest, "little"))

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count] in [0, 1)"""
        return (self._bits.random_raw(count) >> 11) * 2.0**-53

    def integers(self, count: int, low: int, high: int) -> np.ndarray:
        """int64 [count] in low … high - 1"""
        return low + (self.uniform(count) * (high - low)).astype(np.int64)

    def distinct(self, count: int, low: int, high: int, weights: np.ndarray | float = 1.0) -> np.ndarray:
        """int64 [count], distinct ones of low … high - 1, drawn one after the other by weight (Efraimidis and
        Spirakis 2006: the `count` smallest of exponential times)."""
        times = -np.log1p(-self.uniform(high - low)) / weights
        first = np.argpartition(times, count - 1)[:count]
        return low + first[np.argsort(times[first])]

    def noise(self, count: int, vocab_size: int, without: np.ndarray) -> np.ndarray:
        """int64 [count]: any tokens but those of `without`."""
        allowed = np.ones(vocab_size, dtype=bool)
        allowed[without] = False
        return np.flatnonzero(allowed)[self.integers(count, 0, int(allowed.sum()))]


def _mqar(sample: TaskSample, rng: _Random, items: int, vocab_size: int, power: float) -> None:
    context, half = len(sample.inputs), vocab_size // 2
    keys, values = rng.distinct(items, 0, half), rng.distinct(items, half, vocab_size)
    places = (context - 2 * items) // 2  # two tokens each: after a key there is always noise
    asked = 2 * items + 2 * rng.distinct(items, 0, places, np.arange(1.0, places + 1) ** (power - 1))
    sample.inputs[:] = rng.noise(context, vocab_size, without=keys)
    sample.inputs[0 : 2 * items : 2], sample.inputs[1 : 2 * items : 2] = keys, values
    sample.inputs[asked], sample.labels[asked], sample.origins[asked] = keys, values, np.arange(1, 2 * items, 2)


def _selective_copying(sample: TaskSample, rng: _Random, items: int, vocab_size: int, power: float) -> None:
    noisy, half = len(sample.inputs) - items, vocab_size // 2
    tokens, places = rng.distinct(items, half, vocab_size), np.sort(rng.distinct(items, 0, noisy))
    sample.inputs[:noisy] = rng.integers(noisy, 1, half)
    sample.inputs[places] = tokens
    sample.inputs[noisy], sample.inputs[noisy + 1 :] = 0, tokens[:-1]  # 0 asks for the first
    sample.labels[noisy:], sample.origins[noisy:] = tokens, places


def _induction(sample: TaskSample, rng: _Random, items: int, vocab_size: int, power: float) -> None:
    noisy, half = len(sample.inputs) - items, vocab_size // 2
    tokens, place = rng.distinct(items + 1, half, vocab_size), rng.integers(1, 0, noisy - items)[0]
    sample.inputs[:noisy] = rng.integers(noisy, 0, half)
    sample.inputs[place : place + items + 1] = tokens
    sample.inputs[noisy:], sample.labels[noisy:] = tokens[:-1], tokens[1:]
    sample.origins[noisy:] = np.arange(place + 1, place + items + 1)


def _needle(sample: TaskSample, rng: _Random, items: int, vocab_size: int, power: float) -> None:
    context, half = len(sample.inputs), vocab_size // 2
    key, value = rng.integers(1, 0, half)[0], rng.integers(1, half, vocab_size)[0]
    place = rng.integers(1, 0, context - 2)[0]
    sample.inputs[:] = rng.noise(context, vocab_size, without=key)
    sample.inputs[place : place + 2] = key, value
    sample.inputs[-1], sample.labels[-1], sample.origins[-1] = key, value, place + 1


class _TaskSpec(NamedTuple):
    fill: Callable[[TaskSample, _Random, int, int, float], None]  # a sample of these items, vocabulary and power
    min_context: Callable[[int], int]  # that so many items need
    max_items: float = math.inf


TASKS = {
    "mqar": _TaskSpec(_mqar, lambda items: 4 * items),
    "selective_copying": _TaskSpec(_selective_copying, lambda items: 2 * items),
    "induction": _TaskSpec(_induction, lambda items: 2 * items + 1),
    "needle": _TaskSpec(_needle, lambda items: 3, max_items=1),
}
