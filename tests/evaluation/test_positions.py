"""Loss by position: fixed bins, the same texts in each, and a unigram model that is flat."""

import itertools

import numpy as np
import pytest

from lcpt.evaluation.perplexity import DocumentRecords, report
from lcpt.evaluation.positions import position_edges, reached
from lcpt.evaluation.windows import TextBytes, windows

V = 50
BYTE_A_TOKEN = TextBytes(np.ones(V, dtype=np.int64), 1.0)


def records_of(texts, context, loss_of, stride=None):
    """Records of windows whose losses are loss_of(labels, positions), 0 where a label is context only."""
    records = DocumentRecords(V)
    for number, tokens in enumerate(texts):
        for window in windows(number, tokens, context, stride or context, BYTE_A_TOKEN):
            losses = loss_of(window.labels, np.arange(len(window.labels))) * (window.labels >= 0)
            records.add(window, losses.astype(np.float32))
    return records, records.rows([str(number) for number in range(len(texts))])


def texts_of(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(V, size=n + 1) for n in lengths]


@pytest.mark.parametrize("length", [0, 1, 5, 64, 100, 8192, 32768, 463_826])
def test_edges_are_powers_of_two_and_the_halves_between(length):
    edges = position_edges(length)
    assert edges == sorted(set(edges)) and edges[0] == 0 and edges[-1] >= length
    assert len(edges) < 2 or edges[-2] < length
    assert set(edges[2:]) <= {2**k for k in range(20)} | {3 * 2**k for k in range(20)}
    assert reached(length) <= length and reached(length) in (*edges[-2:], 0)
    assert position_edges(10 * length)[: len(edges)] == edges  # those of a short text are those of a long one


def test_every_bin_holds_the_same_windows():
    """Losses are the position, so each bin tells which tokens it is of; short windows would pull early bins alone."""
    texts = texts_of(300, 64, 20, 130)
    _, rows = records_of(texts, 64, lambda labels, positions: positions)
    found = report(rows)
    full = 4 + 1 + 0 + 2
    assert found["position_windows"] == full
    bins = found["loss_by_position"]
    assert (bins[0]["start"], bins[-1]["end"]) == (0, 64)
    assert all(first["end"] == second["start"] for first, second in itertools.pairwise(bins))
    for part in bins:
        assert part["tokens"] == full * (part["end"] - part["start"])
        assert part["loss"] == pytest.approx((part["start"] + part["end"] - 1) / 2)


@pytest.mark.parametrize(
    "lengths, last",
    [((1000, 90, 80, 70, 5), 768), ((130, 90, 80, 70, 5), 64), ((400, 390, 385), 384), ((1,), 1), ((3, 40), 32)],
)
def test_bins_end_where_the_most_tokens_are_compared(lengths, last):
    """One long document decides where it holds most of the text, many short ones where they do."""
    _, rows = records_of(texts_of(*lengths), 10**6, lambda labels, positions: positions)
    assert report(rows)["loss_by_position"][-1]["end"] == last


def test_a_stride_compares_first_windows_alone():
    _, rows = records_of(texts_of(300, 200), 64, lambda labels, positions: positions, stride=16)
    found = report(rows)
    assert found["tokens_scored"] == 500 and found["position_windows"] == 2


def test_the_unigram_is_what_token_frequencies_give_in_each_bin():
    """Against a model that says these frequencies, whose loss by position is computed from its losses."""
    rng = np.random.default_rng(1)
    texts = [rng.choice(V, size=n + 1, p=np.arange(1, V + 1) / (V * (V + 1) / 2)) for n in (200, 90, 64, 30)]
    counts = np.bincount(np.concatenate([tokens[1:] for tokens in texts]), minlength=V)
    nats = -np.log(np.maximum(counts, 1) / counts.sum())
    records, rows = records_of(texts, 64, lambda labels, _: nats[labels])
    bins = report(rows)["loss_by_position"]
    assert records.unigram_losses(rows) == pytest.approx([part["loss"] for part in bins], rel=1e-6)


def test_a_unigram_is_flat_where_documents_differ_in_length_and_words():
    """Long documents have rare words: were late bins of long documents alone, the unigram would seem to learn."""
    rng = np.random.default_rng(2)
    texts = [rng.integers(40, 50, size=4097) for _ in range(3)] + [rng.integers(0, 10, size=301) for _ in range(30)]
    records, rows = records_of(texts, 10**6, lambda labels, _: np.ones(len(labels)))
    late = [
        loss
        for part, loss in zip(report(rows)["loss_by_position"], records.unigram_losses(rows), strict=True)
        if part["start"] >= 64
    ]
    assert len(late) > 8 and max(late) - min(late) < 0.03


def test_intervals_are_over_documents():
    texts = texts_of(*[64] * 20)
    shift = iter(np.random.default_rng(3).normal(size=20))
    _, rows = records_of(texts, 64, lambda labels, _: 5 + next(shift) + 0 * labels)
    for part in report(rows)["loss_by_position"]:
        low, high = part["interval"]
        assert low < part["loss"] < high and 0.5 < high - low < 1.6
    assert report(rows[:1])["loss_by_position"][0]["interval"] is None
