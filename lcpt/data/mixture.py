"""Mix prepared folders by weight: say which of them gives training sample g, and which of its own samples that is.

Samples have one length, so that shares of samples are shares of tokens. How many of the first g samples come from each
source is a formula; sample g is of the source whose count grows at g, and the count is its number there. Nothing is
stored, and every batch is as near to the weights as whole samples allow.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Optional

from omegaconf import MISSING

from lcpt.data.corpus_samples import CorpusSamples
from lcpt.data.errors import DataError
from lcpt.data.sample_source import Drawn, Sample
from lcpt.data.synthetic import is_task
from lcpt.utils.home_folder import expand_home

TOLERANCE = Fraction(1, 10**6)  # of the sum of weights, which people round


@dataclass
class SourceConfig:
    """Says how much of a mixture comes from a prepared folder."""

    path: str = MISSING
    weight: float = MISSING  # share of the tokens
    max_repeats: Optional[float] = None  # noqa: UP045  epochs that a run may use at most; None: any number

    def __post_init__(self):
        self.path = expand_home(self.path)


def check_sources(sources: Sequence[SourceConfig]) -> None:
    """Raise DataError unless these can be a mixture, as far as can be seen without opening a folder."""
    if not sources:
        raise DataError("data.sources is empty; list a path and a weight, or set data.path instead")
    seen = set()
    for source in sources:
        name = f"data.sources: {source.path}"
        if is_task(source.path):
            raise DataError(f"{name} is a task, which cannot be mixed; set data.path to it, or list prepared folders")
        if (folder := Path(source.path)) in seen:
            raise DataError(f"{name} is listed twice; list it once, with the sum of its weights")
        seen.add(folder)
        if not 0 < source.weight < math.inf:
            raise DataError(f"{name} has weight {source.weight:g}; it must be > 0: leave out what is not wanted")
        if source.max_repeats is not None and not source.max_repeats >= 1:
            raise DataError(
                f"{name} has max_repeats {source.max_repeats:g}; it must be ≥ 1 epoch, or null for no limit"
            )
    total = sum((Fraction(str(source.weight)) for source in sources), Fraction())
    if abs(total - 1) > TOLERANCE:
        raise DataError(f"data.sources: the weights add up to {float(total):.7g}; they must add up to 1")


class Split:
    """Divides the first n samples among sources of these weights, which it scales to a sum of exactly 1.

    The sources take their part one after the other, each of what those before it left, rounded to the nearest whole
    number. So one count grows by one with each sample, no count ever falls, and none is off by more than half a sample
    a source. Integers throughout: exact for any n.
    """

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]  # as people write them: 0.1 is a tenth
        self.weights = [weight / sum(exact) for weight in exact]
        parts = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]
        self._parts = [(2 * part.numerator, part.denominator, 2 * part.denominator) for part in parts]

    def counts(self, samples: int) -> list[int]:
        """Count the samples of each source among the first `samples`."""
        found, left = [], samples
        for numerator, half, denominator in self._parts:
            taken = (left * numerator + half) // denominator
            found.append(taken)
            left -= taken
        return found

    def place(self, sample: int) -> tuple[int, int]:
        """Return (source, number of the sample among those of that source) of sample 0, 1, 2, …"""
        before, after = sample, sample + 1
        for source, (numerator, half, denominator) in enumerate(self._parts):
            taken = (before * numerator + half) // denominator
            taken_after = (after * numerator + half) // denominator
            if taken_after > taken:
                return source, taken
            before, after = before - taken, after - taken_after
        raise IndexError(f"sample {sample}")

    def steps(self, source: int, most: int, sequences: int) -> int:
        """Count the whole steps of so many sequences that need `most` samples of a source or fewer."""
        low, high = 0, 1
        while self.counts(high * sequences)[source] <= most:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.counts(middle * sequences)[source] <= most else (low, middle)
        return low


class Mixture:
    """Is a SampleSource that draws from several prepared folders, each in its own order.

    parts: the samples of each source. Raises DataError where two have different tokenizers or the same content.
    """

    def __init__(self, sources: Sequence[SourceConfig], parts: Sequence[CorpusSamples]):
        check_sources(sources)
        self.parts = list(parts)
        self._max_repeats = [source.max_repeats for source in sources]
        self._split = Split([source.weight for source in sources])
        first = self.parts[0]
        by_content: dict[str, CorpusSamples] = {}
        for part in self.parts:
            if part.tokenizer_sha256 != first.tokenizer_sha256:
                raise DataError(
                    f"data.sources: {first.folder} and {part.folder} were made with different tokenizers; "
                    "prepare one of them again with --tokenizer of the other"
                )
            if (twin := by_content.setdefault(part.fingerprint, part)) is not part:
                raise DataError(
                    f"data.sources: {twin.folder} and {part.folder} hold the same; list one, with both weights"
                )
        self.vocab_size, self.tokenizer_sha256 = first.vocab_size, first.tokenizer_sha256
        self.attachments = first.attachments
        lines = [f"{part.fingerprint} {w}\n" for part, w in zip(self.parts, self._split.weights, strict=True)]
        self.fingerprint = hashlib.sha256("".join(lines).encode()).hexdigest()

    def check_context(self, context: int) -> None:
        """Raise DataError when a source has no sample of that context."""
        for part in self.parts:
            try:
                part.check_context(context)
            except DataError as error:
                raise DataError(f"data.sources: {error}") from None

    def sample(self, number: int, seed: int, context: int) -> Sample:
        source, own = self._split.place(number)
        return self.parts[source].sample(own, seed, context)

    def documents(self, number: int, seed: int, context: int) -> list[str]:
        """List the documents of that sample, each behind its folder's name."""
        source, own = self._split.place(number)
        part = self.parts[source]
        return [f"{part.folder}: {name}" for name in part.documents(own, seed, context)]

    def drawn(self, samples: int, context: int) -> dict[str, Drawn]:
        found: dict[str, Drawn] = {}
        for part, count in zip(self.parts, self._split.counts(samples), strict=True):
            found |= part.drawn(count, context)
        return found

    def check_lasts(self, steps: int, sequences: int, context: int, done: int = 0) -> None:
        """Raise DataError, naming the source that runs out first, if one would in so many steps after those done."""
        short = []
        for i, (part, most) in enumerate(zip(self.parts, self._max_repeats, strict=True)):
            before, needed = part.used // context, self._split.counts(steps * sequences)[i]
            in_epoch = part.samples_in_epoch(context)
            if most is None or (before + needed) / in_epoch <= most:
                continue
            left = math.floor(Fraction(str(most)) * in_epoch) - before
            enough = done + (self._split.steps(i, left, sequences) if left >= 0 else 0)
            epochs = math.ceil(100 * (before + needed) / in_epoch) / 100
            line = (
                f"data.sources: {part.folder} runs out after step {enough:,} of {done + steps:,}: its weight needs "
                f"{epochs:.2f} epochs of it, and its max_repeats is {most:g}; train fewer steps, lower its weight, set "
                f"its max_repeats to {epochs:.2f} or more, or prepare more text for it"
            )
            short.append((enough, line))
        if short:
            raise DataError(min(short)[1])
