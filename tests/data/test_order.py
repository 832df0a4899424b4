"""The order of windows: each once an epoch, another order and another offset each epoch."""

import itertools
import random

import numpy as np
import pytest

from lcpt.data import DataError
from lcpt.data.order import draws, n_windows, permute, window_start


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4097])
def test_permutation_is_a_bijection(size):
    draw = random.Random(size)
    for _ in range(3):
        keys = [draw.getrandbits(64) for _ in range(6)]
        assert sorted(permute(index, size, keys) for index in range(size)) == list(range(size))


def test_permutation_is_well_mixed():
    size, times = 12, 6000
    counts, follows = np.zeros((size, size)), 0
    for seed in range(times):
        _, *keys = draws(seed, "fingerprint", 0)
        images = [permute(index, size, keys) for index in range(size)]
        counts[range(size), images] += 1
        follows += sum(b == a + 1 for a, b in itertools.pairwise(images))
    expected = times / size
    # chi-squared with 11 · 11 degrees of freedom: mean 121, standard deviation 15.6
    assert ((counts - expected) ** 2 / expected).sum() < 121 + 6 * 15.6
    assert follows / times == pytest.approx((size - 1) / size, rel=0.1)  # neighbours stay neighbours by chance only


@pytest.mark.parametrize("tokens, context", [(1000, 10), (1009, 10), (25, 10), (20, 10), (15, 10), (11, 10), (9, 1)])
def test_each_window_once_an_epoch_within_the_stream(tokens, context):
    windows, offsets = n_windows(tokens, context), set()
    for epoch in range(40):
        starts = [window_start(epoch * windows + n, tokens, context, 3, "f") for n in range(windows)]
        offset = min(starts)
        assert sorted(starts) == [offset + n * context for n in range(windows)]
        assert 0 <= offset < context and max(starts) + context + 1 <= tokens
        offsets.add(offset)
    possible = context if tokens >= 2 * context else tokens - context
    assert len(offsets) >= 0.7 * possible and windows >= max(1, tokens // context - 1)


def test_epochs_seeds_and_corpora_differ():
    def order(seed, fingerprint, epoch):
        return [window_start(epoch * 99 + n, 1000, 10, seed, fingerprint) for n in range(99)]

    orders = [order(0, "a", 0), order(0, "a", 1), order(1, "a", 0), order(0, "b", 0)]
    relative = {tuple(start - min(starts) for start in starts) for starts in orders}
    assert len(relative) == 4
    assert order(0, "a", 0) == orders[0]


def test_order_never_changes_by_accident():
    """A resumed run needs the order of the program that began it: these numbers may not change."""
    assert [window_start(n, 100_000, 100, 42, "fingerprint") for n in (0, 1, 998, 999, 10**9)] == [
        25476,
        28776,
        83076,
        48288,
        65571,
    ]


def test_a_stream_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="10 tokens"):
        n_windows(10, 10)
