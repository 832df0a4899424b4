"""Compare two models on the same documents, over the same seeds: the difference of their losses and its interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
Documents = list[dict]  # rows of OUT.documents.jsonl: id, tokens, bytes, nats


@dataclass(frozen=True, slots=True)
class Difference:
    loss: float  # nats a token; below 0: the first model is better
    low: float  # of the 95 % interval
    high: float


def paired_difference(first: list[Documents], second: list[Documents]) -> Difference:
    """Compute the mean loss of `first` minus that of `second`, a list of documents for each seed, in the same order.

    The interval is the 2.5 and 97.5 percentiles over bootstrap samples of documents and of seeds, each drawn together
    for both models, so that what is hard for both cancels. ValueError where the documents are not the same.
    """
    key = [[(row["id"], row["tokens"]) for row in documents] for documents in (*first, *second)]
    if not key or len(first) != len(second) or any(other != key[0] for other in key):
        raise ValueError("the runs scored different documents, or there are not as many of both")
    nats = [np.array([[row["nats"] for row in documents] for documents in runs]) for runs in (first, second)]
    tokens, difference = np.array([row["tokens"] for row in first[0]]), nats[0] - nats[1]  # [seeds, documents]
    seeds, count = difference.shape
    rng = np.random.default_rng(0)
    of_seed = rng.integers(seeds, size=(RESAMPLES, seeds, 1))
    of_document = rng.integers(count, size=(RESAMPLES, 1, count))
    sampled = difference[of_seed, of_document].sum((1, 2)) / (seeds * tokens[of_document].sum((1, 2)))
    low, high = np.percentile(sampled, [2.5, 97.5])
    return Difference(float(difference.sum() / (seeds * tokens.sum())), float(low), float(high))
