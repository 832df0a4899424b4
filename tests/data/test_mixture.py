"""A mixture draws its sources by their weights, each in its own order, wherever a run starts and on any ranks."""

import itertools
import random
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from lcpt.data import (
    BatchPhase,
    Contiguous,
    Corpus,
    DataConfig,
    DataError,
    Drawn,
    Prefetcher,
    SourceConfig,
    batch,
    open_text,
)
from lcpt.data.mixture import Mixture, Split
from lcpt.data.order import n_windows, window_start

CONTEXT, SEED = 64, 5
WEIGHTS = [(0.5, 0.3, 0.2), (0.333333, 0.333333, 0.333334), (1.0,), (0.999, 0.001), (0.0001, 0.9999), (0.1,) * 10]


@pytest.fixture(scope="module")
def folders(make_corpus):
    first = make_corpus(seed=0, sentences=60)
    return [first, *(make_corpus(n, tokenizer=first / "tokenizer.model", sentences=20 * n) for n in (1, 2))]


@pytest.fixture(scope="module")
def mixture(folders):
    return mix(folders)


def mix(folders, weights=(0.5, 0.3, 0.2), **settings):
    return opened([SourceConfig(str(path), w, **settings) for path, w in zip(folders, weights, strict=True)])


def opened(sources):
    return open_text(DataConfig(None, sources=sources))


def borders(cu_seqlens, micro_batch):
    """The documents' offsets in each sequence, from those in each micro-batch."""
    found = []
    for offsets in cu_seqlens.astype(int):
        assert offsets[0] == 0 and offsets[-1] == micro_batch * CONTEXT
        within = np.unique(offsets[offsets < micro_batch * CONTEXT])
        for sequence in range(micro_batch):
            own = within[within // CONTEXT == sequence] - sequence * CONTEXT
            assert own[0] == 0
            found.append(own.tolist())
    return found


def assert_same(found, expected):
    """Two samples or batches."""
    for name, x in expected._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), x)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_are_those_of_the_places(weights):
    """Each source gives its samples 0, 1, 2, … in turn, and the formula counts them."""
    split, found = Split(weights), [0] * len(weights)
    for sample in range(3000):
        assert split.counts(sample) == found
        source, own = split.place(sample)
        assert own == found[source]
        found[source] += 1


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_stay_exact_at_any_length(weights):
    split, draw = Split(weights), random.Random(0)
    exact = [Fraction(str(w)) for w in weights]
    for sample in [draw.randrange(10**n) for n in range(1, 30)]:
        before, after = split.counts(sample), split.counts(sample + 1)
        source, own = split.place(sample)
        assert own == before[source] and sum(before) == sample
        assert [b - a for a, b in zip(before, after, strict=True)] == [i == source for i in range(len(weights))]
        for count, weight in zip(before, exact, strict=True):
            assert abs(count - sample * weight / sum(exact)) <= Fraction(len(weights), 2)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_ten_million_tokens_hold_the_weights_to_a_thousandth(weights):
    """Any ten million in a row, and 20 million where there are ten sources, in samples of 1,024 tokens."""
    split, draw = Split(weights), random.Random(1)
    samples = 10**7 // 1024 * (2 if len(weights) > 3 else 1)
    for start in [0, *(draw.randrange(10**9) for _ in range(300))]:
        counts = zip(split.counts(start), split.counts(start + samples), weights, strict=True)
        assert all(abs((end - begin) / samples - weight) < 1e-3 for begin, end, weight in counts)


def test_the_draw_never_changes_by_accident():
    """A resumed run needs the draw of the program that began it: these numbers may not change."""
    split = Split((0.5, 0.3, 0.2))
    assert "".join("abc"[split.place(n)[0]] for n in range(20)) == 2 * "abacabacab"
    assert split.place(10**12) == (0, 5 * 10**11)


def test_samples_are_those_of_each_source_in_its_own_order(mixture, folders):
    own = [0, 0, 0]
    corpora = [Contiguous(Corpus(folder)) for folder in folders]
    for number in range(200):
        drawn = [mixture.drawn(n, CONTEXT) for n in (number, number + 1)]
        [source] = [i for i, path in enumerate(map(str, folders)) if drawn[0][path] != drawn[1][path]]
        expected = corpora[source].sample(own[source], SEED, CONTEXT)
        assert_same(mixture.sample(number, SEED, CONTEXT), expected)
        names = corpora[source].documents(own[source], SEED, CONTEXT)
        assert mixture.documents(number, SEED, CONTEXT) == [f"{folders[source]}: {name}" for name in names]
        own[source] += 1
        assert [drawn[1][str(path)].tokens for path in folders] == [CONTEXT * n for n in own]


def test_every_source_is_used_whole_in_each_epoch(mixture, folders):
    """No window is skipped or comes twice, in the first three epochs of each source."""
    samples = {path: [] for path in map(str, folders)}
    for number in itertools.count():
        before, after = mixture.drawn(number, CONTEXT), mixture.drawn(number + 1, CONTEXT)
        if min(drawn.epochs for drawn in before.values()) >= 3:
            break
        [path] = [path for path in samples if before[path] != after[path]]
        samples[path].append(mixture.sample(number, SEED, CONTEXT)[0])
    for path, inputs in samples.items():
        corpus = Corpus(path)
        windows = n_windows(corpus.tokens, CONTEXT)
        assert before[path].epochs == len(inputs) / windows >= 3
        for epoch in range(3):
            numbers = range(epoch * windows, (epoch + 1) * windows)
            starts = [window_start(n, corpus.tokens, CONTEXT, SEED, corpus.fingerprint) for n in numbers]
            joined = np.concatenate([inputs[numbers[i]] for i in np.argsort(starts)])
            np.testing.assert_array_equal(joined, corpus.read(min(starts), min(starts) + windows * CONTEXT))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_batches_do_not_depend_on_ranks_micro_batches_or_resume(folders, mixture, world, micro_batch):
    """Opened again, read from any step on, in any order."""
    expected = [batch(mixture, SEED, step, 8, CONTEXT) for step in range(12)]
    phase = BatchPhase(first=0, source=mix(folders), context=CONTEXT, sequences=8, micro_batch=micro_batch)
    loaders = [Prefetcher([phase], SEED, rank, world) for rank in range(world)]
    for step in (5, 6, 7, 11, 0, 1, 9):  # as on resume
        parts = [loader.get(step) for loader in loaders]
        for name in ("inputs", "labels"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(expected[step], name))
        assert sum((borders(part.cu_seqlens, micro_batch) for part in parts), []) == borders(
            expected[step].cu_seqlens, 1
        )
    for loader in loaders:
        loader.close()


def test_one_source_is_that_source(folders):
    alone, corpus = mix(folders[:1], [1.0]), Contiguous(Corpus(folders[0]))
    assert_same(batch(alone, SEED, 3, 4, CONTEXT), batch(corpus, SEED, 3, 4, CONTEXT))
    drawn = Drawn(7 * 64, 7 / corpus.samples_in_epoch(CONTEXT), corpus.fingerprint, "windows of 64")
    assert alone.drawn(7, CONTEXT) == corpus.drawn(7, CONTEXT) == {str(folders[0]): drawn}


def test_the_fingerprint_is_that_of_content_and_weights(folders, mixture):
    assert mix(folders, max_repeats=3).fingerprint == mixture.fingerprint  # it decides no batch
    others = [mix(folders, (0.5, 0.2, 0.3)), mix(folders[:2], (0.5, 0.5)), mix(folders[::-1], (0.2, 0.3, 0.5))]
    assert len({mixture.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_a_source_that_runs_out_is_named_with_what_would_do(folders):
    path, corpus = folders[1], Corpus(folders[1])
    windows, sequences = n_windows(corpus.tokens, CONTEXT), 8
    sources = [SourceConfig(str(folders[0]), 0.75), SourceConfig(str(path), 0.25, max_repeats=1.5)]
    mixture = opened(sources)
    enough = max(n for n in range(1000) if mixture.drawn(n * sequences, CONTEXT)[str(path)].epochs <= 1.5)
    mixture.check_lasts(enough, sequences, CONTEXT)
    with pytest.raises(DataError, match=rf"{path} runs out after step {enough} of {enough + 1}:") as caught:
        mixture.check_lasts(enough + 1, sequences, CONTEXT)
    needed = float(str(caught.value).split("set its max_repeats to ")[1].split()[0])
    drawn = mixture.drawn((enough + 1) * sequences, CONTEXT)[str(path)]
    assert drawn.epochs <= needed < drawn.epochs + 0.011 and drawn.tokens == drawn.epochs * windows * CONTEXT
    sources[1].max_repeats = needed
    opened(sources).check_lasts(enough + 1, sequences, CONTEXT)


@pytest.mark.parametrize("hundredths", range(100, 400))
def test_a_limit_in_decimals_is_met_exactly(hundredths):
    """2.3 epochs of 100 windows are 230 samples, though 2.3 · 100 is less in floating point."""
    mixture = Mixture.__new__(Mixture)
    mixture.parts = [SimpleNamespace(folder="a", used=0, samples_in_epoch=lambda context: 100)]
    mixture._split, mixture._max_repeats = Split([1.0]), [hundredths / 100]
    mixture.check_lasts(hundredths, 1, CONTEXT)
    with pytest.raises(DataError, match=f"after step {hundredths} of {hundredths + 1}:"):
        mixture.check_lasts(hundredths + 1, 1, CONTEXT)


def test_the_source_that_runs_out_first_is_named(folders):
    sources = [SourceConfig(str(folders[2]), 0.2, 1), SourceConfig(str(folders[1]), 0.8, 1)]
    with pytest.raises(DataError, match=f"{folders[1]} runs out"):
        opened(sources).check_lasts(10**9, 8, CONTEXT)


@pytest.mark.parametrize(
    "sources, parts",
    [
        ([], ["empty"]),
        ([("a", 0.5), ("b", 0.4)], ["add up to 0.9;"]),
        ([("a", 0.5), ("b", 0.50001)], ["add up to 1.00001;"]),
        ([("a", -0.5), ("b", 1.5)], ["a has weight -0.5"]),
        ([("a", 0), ("b", 1)], ["a has weight 0"]),
        ([("a", float("nan"))], ["a has weight nan"]),
        ([("a", float("inf"))], ["a has weight inf"]),
        ([("a", 1.0, 0.5)], ["a has max_repeats 0.5", "≥ 1"]),
        ([("a", 1.0, float("nan"))], ["a has max_repeats nan"]),
        ([("a", 0.5), ("a/", 0.5)], ["listed twice"]),
        ([("synthetic:mqar", 0.5), ("a", 0.5)], ["synthetic:mqar is a task"]),
    ],
)
def test_sources_that_cannot_be_are_refused(sources, parts):
    with pytest.raises(DataError) as caught:
        opened([SourceConfig(*source) for source in sources])
    assert all(part in str(caught.value) for part in ("data.sources", *parts)) and "\n" not in str(caught.value)
