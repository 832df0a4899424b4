"""Batches are the stream's own windows, whatever the number of ranks."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from lcpt.data import DataConfig, DataError, Prefetcher, batch, rows
from lcpt.data.order import n_windows, window_start

CONTEXT, SEED = 256, 5


def test_windows_are_the_stream(corpus):
    stream = corpus.read(0, corpus.tokens)
    inputs, labels = batch(corpus, SEED, 3, 4, CONTEXT)
    assert inputs.dtype == labels.dtype == np.int64 and inputs.shape == labels.shape == (4, CONTEXT)
    for row, following, sample in zip(inputs, labels, range(12, 16), strict=True):
        start = window_start(sample, corpus.tokens, CONTEXT, SEED, corpus.fingerprint)
        np.testing.assert_array_equal(row, stream[start : start + CONTEXT])
        np.testing.assert_array_equal(following, stream[start + 1 : start + CONTEXT + 1])


def test_an_epoch_is_the_stream_once(corpus):
    windows = n_windows(corpus.tokens, CONTEXT)
    inputs, _ = rows(corpus, SEED, windows, windows, CONTEXT)  # of epoch 1
    starts = [window_start(windows + n, corpus.tokens, CONTEXT, SEED, corpus.fingerprint) for n in range(windows)]
    joined = inputs[np.argsort(starts)].ravel()
    np.testing.assert_array_equal(joined, corpus.read(min(starts), min(starts) + windows * CONTEXT))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_join_to_the_global_batch(corpus, world):
    loaders = [Prefetcher(corpus, SEED, 8, CONTEXT, rank, world) for rank in range(world)]
    for step in (0, 1, 2, 40, 41, 7):  # in a row, and after a jump as on resume
        joined = np.concatenate([loader.get(step) for loader in loaders], axis=1)
        np.testing.assert_array_equal(joined, batch(corpus, SEED, step, 8, CONTEXT))
    assert {loader.scored for loader in loaders} == {8 * CONTEXT}
    for loader in loaders:
        assert loader.waited > 0
        loader.close()


def test_global_batch_does_not_move_samples(corpus):
    """Steps of 4 and steps of 8 sequences walk through the same samples."""
    small = np.concatenate([batch(corpus, SEED, step, 4, CONTEXT) for step in (2, 3)], axis=1)
    np.testing.assert_array_equal(small, batch(corpus, SEED, 1, 8, CONTEXT))


def test_batches_that_cannot_be_are_refused(corpus):
    with pytest.raises(DataError, match="6 sequences .* 4 ranks"):
        Prefetcher(corpus, SEED, 6, CONTEXT, 0, 4)
    for make in (lambda: Prefetcher(corpus, SEED, 1, 10**6), lambda: batch(corpus, SEED, 0, 1, 10**6)):
        with pytest.raises(DataError, match="less than a window"):
            make()


def test_config_is_a_structured_config():
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), {"path": "runs/data", "context": "64"})
    assert OmegaConf.to_object(config) == DataConfig("runs/data", None, 64)
    with pytest.raises(DataError, match="context is 0"):
        DataConfig("runs/data", context=0)
    with pytest.raises(DataError, match="take text for both or a task for both"):
        DataConfig("runs/data", "synthetic:mqar")
