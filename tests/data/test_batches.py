"""Batches are the stream's own windows, whatever the number of ranks."""

import itertools

import numpy as np
import pytest
from omegaconf import OmegaConf

from lcpt.data import BatchPhase, Contiguous, DataConfig, DataError, Prefetcher, batch, rows
from lcpt.data.order import n_windows, window_start
from lcpt.data.packed_documents import cu_seqlens

CONTEXT, SEED = 256, 5


def starts_of(corpus):
    """Where the documents begin in the stream."""
    return np.cumsum([0, *(len(corpus.document(number)[1]) for number in range(len(corpus) - 1))])


@pytest.mark.parametrize("mask", [False, True])
def test_windows_are_the_stream(corpus, mask):
    """Its documents' starts are known, and no label is of another document, where documents are apart."""
    stream, begins = corpus.read(0, corpus.tokens), starts_of(corpus)
    source, borders = Contiguous(corpus, mask_documents=mask), 0
    for number in range(200):
        sample = source.sample(number, SEED, CONTEXT)
        start = window_start(number, corpus.tokens, CONTEXT, SEED, corpus.fingerprint)
        expected = stream[start + 1 : start + CONTEXT + 1].copy()
        inside = begins[(begins > start) & (begins <= start + CONTEXT)] - start
        if mask:
            expected[inside - 1] = -1
            assert sample.starts.tolist() == [0, *inside[inside < CONTEXT]]
            borders += len(inside)
        else:
            assert sample.starts is None
        assert sample.inputs.dtype == sample.labels.dtype == np.int64 and sample.padding == 0
        np.testing.assert_array_equal(sample.inputs, stream[start : start + CONTEXT])
        np.testing.assert_array_equal(sample.labels, expected)
    assert borders > 20 or not mask


def test_document_starts_are_found_in_any_range(corpus):
    begins = starts_of(corpus)
    shards = np.cumsum([0, *(shard["tokens"] for shard in corpus.manifest["shards"])])
    places = sorted({0, 1, corpus.tokens, *begins[:5], *begins[:5] + 1, *shards[1:-1], *shards[1:-1] - 1})
    for start, stop in itertools.combinations_with_replacement(map(int, places), 2):
        expected = begins[(begins >= start) & (begins < stop)]
        np.testing.assert_array_equal(corpus.document_starts(start, stop), expected)


def test_an_epoch_is_the_stream_once(corpus):
    windows, source = n_windows(corpus.tokens, CONTEXT), Contiguous(corpus)
    inputs = rows(source, SEED, windows, windows, CONTEXT).inputs  # of epoch 1
    starts = [window_start(windows + n, corpus.tokens, CONTEXT, SEED, corpus.fingerprint) for n in range(windows)]
    joined = inputs[np.argsort(starts)].ravel()
    np.testing.assert_array_equal(joined, corpus.read(min(starts), min(starts) + windows * CONTEXT))


def test_borders_are_offsets_in_the_row_of_a_micro_batch():
    """They end in the number of tokens, repeated up to one length, the same for a step's micro-batches."""
    starts = [np.array(x) for x in ([0], [0, 5, 60], [0, 1, 2, 3], [0, 63])]
    expected = [[0, 64, 69, 124, *[128] * 13], [0, 1, 2, 3, 64, 127, *[128] * 11]]
    assert cu_seqlens([starts[:2], starts[2:]], 64).tolist() == expected
    long = cu_seqlens([[np.array([0])]], 8192)
    assert long.dtype == np.int32 and long.tolist() == [[0, *[8192] * 16]]
    assert cu_seqlens([[np.arange(0, 8192, 40)]], 8192).shape == (1, 257)


def phase(source, sequences, first=0, context=CONTEXT, micro_batch=1):
    return BatchPhase(first=first, source=source, context=context, sequences=sequences, micro_batch=micro_batch)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_join_to_the_global_batch(corpus, world):
    source = Contiguous(corpus)
    loaders = [Prefetcher([phase(source, 8)], SEED, rank, world) for rank in range(world)]
    for step in (0, 1, 2, 40, 41, 7):  # in a row, and after a jump as on resume
        parts, whole = [loader.get(step) for loader in loaders], batch(source, SEED, step, 8, CONTEXT)
        for name in ("inputs", "labels"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))
    for loader in loaders:
        assert loader.waited > 0
        loader.close()


def test_global_batch_does_not_move_samples(corpus):
    """Steps of 4 and steps of 8 sequences walk through the same samples."""
    source = Contiguous(corpus)
    small = np.concatenate([batch(source, SEED, step, 4, CONTEXT).inputs for step in (2, 3)])
    np.testing.assert_array_equal(small, batch(source, SEED, 1, 8, CONTEXT).inputs)


def test_batches_that_cannot_be_are_refused(corpus):
    source = Contiguous(corpus)
    with pytest.raises(DataError, match="6 sequences .* 4 ranks"):
        Prefetcher([phase(source, 6)], SEED, 0, 4)
    too_long = phase(source, 1, context=10**6)
    for make in (lambda: Prefetcher([too_long], SEED), lambda: batch(source, SEED, 0, 1, 10**6)):
        with pytest.raises(DataError, match="less than a window"):
            make()


def test_config_is_a_structured_config():
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), {"path": "runs/data", "context": "64"})
    assert OmegaConf.to_object(config) == DataConfig("runs/data", None, 64)
    with pytest.raises(DataError, match="context is 0"):
        DataConfig("runs/data", context=0)
    with pytest.raises(DataError, match="take text for both or a task for both"):
        DataConfig("runs/data", "synthetic:mqar")
