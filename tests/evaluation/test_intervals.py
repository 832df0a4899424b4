"""The interval of a mean over documents, in simulations whose truth is known."""

import numpy as np
import pytest

from lcpt.evaluation.intervals import interval_over_documents


def of_books(rng, count):
    """Nats and bytes of books whose lengths differ twofold either way, and whose longer ones are easier."""
    sizes = np.exp(rng.normal(0, 0.4, count))
    return sizes * (3 - 0.1 * np.log(sizes) + rng.normal(0, 0.3, count)), sizes


@pytest.mark.parametrize("count", [10, 30])
def test_it_covers_the_truth_as_often_as_it_says(count):
    rng = np.random.default_rng(0)
    nats, sizes = of_books(rng, 2_000_000)
    truth, trials = nats.sum() / sizes.sum(), 500
    intervals = (interval_over_documents(*of_books(rng, count)) for _ in range(trials))
    covered = sum(low <= truth <= high for low, high in intervals) / trials
    assert 0.92 < covered < 0.98  # a percentile bootstrap of ten: 0.89


def test_few_documents():
    assert interval_over_documents([], []) is None
    assert interval_over_documents([2.0], [1.0]) is None
    assert interval_over_documents([2.0, 5.0], [1.0, 0.0]) is None  # of one of them nothing was scored
    low, high = interval_over_documents([2.0, 3.0], [1.0, 1.0])
    assert low < 2 and high > 3
    assert (low, high) == pytest.approx((2.5 - 12.706 * 0.5, 2.5 + 12.706 * 0.5))  # of two draws most are one alone
    assert interval_over_documents([2.0, 4.0], [1.0, 2.0]) == pytest.approx((2, 2))  # all alike


def test_memory_does_not_grow_with_the_resamples():
    """Thirty thousand documents, 2,000 times: at once they would be 2.4 GB."""
    import tracemalloc

    rng = np.random.default_rng(0)
    nats, sizes = of_books(rng, 30_000)
    tracemalloc.start()
    low, high = interval_over_documents(nats, sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert low < nats.sum() / sizes.sum() < high
    assert peak < 60e6
