"""Say how far a mean over documents may be from that of all texts of their kind: a bootstrap over documents.

Tokens of one document are alike, so that windows are no independent draws: documents are. Of few documents, some of
them long, a plain bootstrap is too sure of itself; the studentised one (bootstrap-t; Efron and Tibshirani, An
Introduction to the Bootstrap, chapter 12) resamples how many standard errors the mean is off.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
DRAWS = 2**18  # documents drawn at a time
FEW = 10  # documents: with fewer, an interval is a hint and no more
MANY = 1000  # with more, their mean is as good as normal
# The 97.5 percentile of Student's t for 2 … 9 documents, too few to draw from.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)


def interval_over_documents(amounts: ArrayLike, sizes: ArrayLike) -> tuple[float, float] | None:
    """Return the 95 % interval of Σ amounts / Σ sizes over documents, as of nats a byte; None for fewer than two.

    Documents of size 0 do not count. Memory is that of a few copies of the documents and of DRAWS more.
    """
    x, n = np.asarray(amounts, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    x, n = x[n > 0], n[n > 0]
    if len(n) < 2:
        return None
    ratio = x.sum() / n.sum()
    terms = np.stack((x, n, x * x, x * n, n * n), axis=1)
    error = _standard_error(terms.sum(0), len(n))
    if error <= 1e-12 * abs(ratio):
        return float(ratio), float(ratio)
    if len(n) < FEW or len(n) > MANY:
        reach = (STUDENT_T[len(n) - 2] if len(n) < FEW else 1.96) * error
        return float(ratio - reach), float(ratio + reach)
    rng, off, together = np.random.default_rng(0), [], max(1, DRAWS // len(n))
    for done in range(0, RESAMPLES, together):
        drawn = rng.integers(len(n), size=(min(together, RESAMPLES - done), len(n)))
        sums = terms[drawn].sum(1)
        # All draws may be one document, whose error is 0.
        off.append((sums[:, 0] / sums[:, 1] - ratio) / np.maximum(_standard_error(sums, len(n)), 1e-3 * error))
    low, high = np.percentile(np.concatenate(off), [2.5, 97.5])
    return float(ratio - high * error), float(ratio - low * error)


def _standard_error(sums: np.ndarray, count: int) -> np.ndarray:
    """Return that of ratios of sums [..., 5], linearised: of Σ (x − ratio · n)², from Σ of x, n, x², x n and n²."""
    x, n, xx, xn, nn = np.moveaxis(sums, -1, 0)
    squares = np.maximum(xx - 2 * (x / n) * xn + (x / n) ** 2 * nn, 0.0)
    return np.sqrt(count / (count - 1) * squares) / n
