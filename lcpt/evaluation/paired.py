"""Compare two settings on the same documents: the difference of their losses, its interval and its p-value.

What is hard for both cancels in a document's difference. If neither setting were better, each difference could as well
have the other sign: flips of signs, document by document, say how large a difference arises by chance. The interval
holds every difference that this test does not reject (Hartigan, "Using subsample values as typical values", 1969), so
that it excludes 0 where p is below 0.05.

This assumes that differences a byte are symmetric, and nothing of the lengths. In simulations of ten to forty documents
p is below 0.05 in 3 to 7 % of trials without a difference, in 7 to 10 % where differences a byte are as skewed as an
exponential distribution, and in 16 to 20 % where they grow with lengths that differ a hundredfold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcpt.data import DataError
from lcpt.evaluation.intervals import interval_over_documents

Documents = list[dict]  # rows of OUT.documents.jsonl: id, tokens, bytes, nats
ALL_FLIPS = 13  # documents up to which every set of flips is tried: 8,191
DRAWS = 9999  # sets of flips, of more documents
SIGNS_AT_A_TIME = 2**20
FEWEST = 6  # documents whose flips can exclude 5 %: 2 of 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Holds a loss of one setting minus another's: below 0 the first is better."""

    mean: float  # bits a byte, or nats a token
    interval: tuple[float, float] | None  # 95 %, over documents; None of one
    p: float  # two-sided, that documents differ so much by chance
    documents: int
    of_seeds: tuple[float, ...]  # the difference of each seed that both have

    @property
    def over_seeds(self) -> tuple[float, float] | None:
        """Mean and standard deviation over the seeds that both have; None of fewer than two."""
        return (statistics.fmean(self.of_seeds), statistics.stdev(self.of_seeds)) if self.of_seeds[1:] else None


def paired_difference(
    first: Mapping[int, Documents], second: Mapping[int, Documents], per: Literal["bytes", "tokens"] = "bytes"
) -> Difference:
    """Compute the loss of `first` minus that of `second`, {seed: documents} each, in bits a byte or nats a token.

    A document's nats are averaged over the seeds of a setting; documents pair by id and size. The interval and p are
    those over documents alone: what another seed would change is in of_seeds. DataError where documents do not pair.
    """
    seeds = [seed for seed in first if seed in second]
    runs = aligned([*first.values(), *second.values()], per)
    sizes = np.array([row[per] for row in runs[0]], dtype=np.float64)
    nats = np.array([[row["nats"] for row in documents] for documents in runs]) / (math.log(2) if per == "bytes" else 1)
    of_first, of_second = nats[: len(first)], nats[len(first) :]
    differences, scored = (of_first.mean(0) - of_second.mean(0))[sizes > 0], sizes[sizes > 0]
    if not len(scored):
        raise DataError("no document has a scored token")
    interval, p = by_sign_flips(differences, scored)
    numbers = [(list(first).index(seed), list(second).index(seed)) for seed in seeds]
    return Difference(
        mean=float(differences.sum() / scored.sum()),
        interval=interval or interval_over_documents(differences, scored),
        p=p,
        documents=len(scored),
        of_seeds=tuple(float((of_first[a] - of_second[b]).sum() / scored.sum()) for a, b in numbers),
    )


def aligned(runs: list[Documents], per: str = "bytes") -> list[Documents]:
    """Return the documents of each run in one order. DataError naming what one run scored and another did not."""
    ordered = [sorted(documents, key=lambda row: (row["id"], row[per])) for documents in runs]
    keys = [[(row["id"], row[per]) for row in documents] for documents in ordered]
    if not all(keys):
        raise DataError("a run scored no document")
    for other in keys[1:]:
        if other != keys[0]:
            raise DataError(_mismatch(keys[0], other, per))
    return ordered


def _mismatch(first: list[tuple[str, int]], second: list[tuple[str, int]], per: str) -> str:
    sizes = dict(first), dict(second)
    for mine, others in (sizes, sizes[::-1]):
        if missing := [name for name in mine if name not in others]:
            return f"different documents: {len(missing):,} of {len(mine):,} in one alone, such as {missing[0]!r}"
    for name in sizes[0]:
        if sizes[0][name] != sizes[1][name]:
            return f"different documents: {name!r} has {sizes[0][name]:,} {per} in one, {sizes[1][name]:,} in another"
    return "different documents: an id stands for several, not as many in both"


def mean_of_runs(runs: list[Documents]) -> Documents:
    """Average the nats of runs of one seed, document by document. DataError where they scored different documents."""
    together = zip(*aligned(runs), strict=True)
    return [{**rows[0], "nats": statistics.fmean(row["nats"] for row in rows)} for rows in together]


def by_sign_flips(amounts: np.ndarray, sizes: np.ndarray) -> tuple[tuple[float, float] | None, float]:
    """Return the 95 % interval of Σ amounts / Σ sizes, None of fewer than FEWEST, and the two-sided p-value of 0.

    Of a true value θ, flipping the signs of some documents' amounts - θ · sizes enlarges their sum exactly where these
    documents' own ratio lies below θ. So θ has any rank among the ratios of all sets of documents with equal chance.
    """
    ratios = np.sort(np.concatenate([chosen @ amounts / (chosen @ sizes) for chosen in _sets(len(sizes))]))
    tail = min(int((ratios <= 0).sum()), int((ratios >= 0).sum()))
    left_out = math.floor(0.025 * (len(ratios) + 1) + 1e-9)  # a side
    interval = (float(ratios[left_out - 1]), float(ratios[-left_out])) if len(sizes) >= FEWEST else None
    return interval, min(1.0, 2 * (1 + tail) / (len(ratios) + 1))


def _sets(count: int) -> Iterable[np.ndarray]:
    """Yield sets of documents, float64 [sets, count], 1 for a document inside: all but the empty one, or DRAWS."""
    if count <= ALL_FLIPS:
        yield (np.arange(1, 2**count)[:, None] >> np.arange(count) & 1).astype(np.float64)
        return
    rng, together = np.random.default_rng(0), max(1, SIGNS_AT_A_TIME // count)
    for done in range(0, DRAWS, together):
        chosen = rng.integers(2, size=(min(together, DRAWS - done), count), dtype=np.int8).astype(np.float64)
        chosen[~chosen.any(1)] = 1  # one in thousands at most; no documents have no ratio
        yield chosen
